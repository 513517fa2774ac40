/* A fixed pool of threads that share out the tasks of one job at a time. */
#ifndef OFFLOAD_POOL_H
#define OFFLOAD_POOL_H

#include <stdint.h>

typedef void (*Task)(const void *job, int index);

/* Run task(job, 0) ... task(job, count - 1) on the calling thread and up to `threads` - 1 workers; returns when all are
 * done. Tasks are taken one by one, so a worker that gets no processor delays nobody. While another thread's job runs,
 * the caller does its own alone. */
void pool_run(Task task, const void *job, int count, int threads);

typedef void (*Call)(const void *told, int threads);

/* Let a worker begin call(told, threads), in which it is the caller of `pool_run`, and return. What the call reads and
 * writes must stay until `pool_wait`. One call at a time is under way so: this waits for the one before. Where there are
 * no workers the call is over when this returns. */
void pool_begin(Call call, const void *told, int threads);

/* Help with what `pool_begin` has begun; returns when it is done, at once where it was nothing. */
void pool_wait(void);

/* How long the latest call took that `pool_begin` was given, and that is done. */
int64_t pool_lasted_ns(void);

#endif
