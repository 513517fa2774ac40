/* A fixed pool of threads that share out the tasks of one job at a time. */
#ifndef OFFLOAD_POOL_H
#define OFFLOAD_POOL_H

typedef void (*Task)(const void *job, int index);

/* Run task(job, 0) ... task(job, count - 1) on the calling thread and up to `threads` - 1 workers; returns when all are
 * done. Tasks are taken one by one, so a worker that gets no processor delays nobody. While another thread's job runs,
 * the caller does its own alone. */
void pool_run(Task task, const void *job, int count, int threads);

#endif
