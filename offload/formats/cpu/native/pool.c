/* The pool behind the kernels: workers are started when they are first asked for, and live as long as the process.
 *
 * Every thread has its share of a job's tasks, which lie side by side: so it reads matrices from front to back, and no
 * counter goes to and fro between processors. Whoever is done first goes on with what is left of the others' shares. So
 * a thread that has lost its processor holds nobody up.
 *
 * A worker that has nothing to do watches for the next job for a while, giving the processor away between looks, since
 * the next product of a layer is microseconds away; then it sleeps. The caller of `pool_run` works too, and waits at the
 * end only for tasks that workers have begun.
 *
 * A call may be begun for a worker to lead: then its caller goes on, and comes back to help. The worker with the number 0
 * leads, so that this number is free for the helper. If it has not begun by then, because it has no processor, the
 * helper leads.
 *
 * `open` and `active` keep a job's fields from being read while they change: a worker counts itself in before it looks
 * whether the job is open, the caller closes the job before it looks who is in.
 */
#define _GNU_SOURCE
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <time.h>

enum { MOST_WORKERS = 255, WATCH_NS = 300000, PATIENCE = 5000 };

static pthread_mutex_t callers = PTHREAD_MUTEX_INITIALIZER;
static pthread_mutex_t sleeping = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
static int started; /* workers; guarded by `callers` */

/* What one processor writes often is in no other's cache line. */
#define OWN_LINE _Alignas(128)

typedef struct {
    OWN_LINE atomic_int next;
    int end;
} Share;

OWN_LINE static Task job_task;
static const void *job_data;
static int job_threads;
static Share shares[MOST_WORKERS + 1]; /* the caller's is the last of `job_threads` */
OWN_LINE static atomic_int active;
OWN_LINE static atomic_int open_, sleepers;
OWN_LINE static atomic_uint generation;
OWN_LINE static atomic_int to_lead, under_way; /* whether a begun call waits for its leader, and whether one is not done */
static Call begun_call;
static const void *begun_told;
static int begun_threads;
static int64_t begun_ns;
static _Atomic int64_t lasted_ns;

static void work(int own) {
    for (int i = 0, index; i < job_threads; i++) {
        Share *share = &shares[(own + i) % job_threads];
        while (atomic_load_explicit(&share->next, memory_order_relaxed) < share->end &&
               (index = atomic_fetch_add(&share->next, 1)) < share->end)
            job_task(job_data, index);
    }
}

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

/* Lead the call that was begun, unless somebody else does. */
static void lead(void) {
    if (atomic_load(&to_lead) && atomic_exchange(&to_lead, 0)) {
        begun_call(begun_told, begun_threads);
        atomic_store(&lasted_ns, now_ns() - begun_ns);
        atomic_store(&under_way, 0);
    }
}

/* Do what a worker does for the job that is open, if there is one. */
static void take_part(int id) {
    atomic_fetch_add(&active, 1);
    if (atomic_load(&open_) && id < job_threads - 1)
        work(id);
    atomic_fetch_sub(&active, 1);
}

/* Let the workers see that there is something new. */
static void call_workers(void) {
    atomic_fetch_add(&generation, 1);
    if (atomic_load(&sleepers)) {
        pthread_mutex_lock(&sleeping);
        pthread_cond_broadcast(&wake);
        pthread_mutex_unlock(&sleeping);
    }
}

/* Until there is a job after `seen`; returns its number. */
static unsigned wait_for_job(unsigned seen) {
    unsigned latest;
    int64_t end = now_ns() + WATCH_NS;
    while ((latest = atomic_load(&generation)) == seen) {
        if (now_ns() < end) {
            sched_yield();
            continue;
        }
        pthread_mutex_lock(&sleeping);
        atomic_fetch_add(&sleepers, 1);
        while (atomic_load(&generation) == seen)
            pthread_cond_wait(&wake, &sleeping);
        atomic_fetch_sub(&sleepers, 1);
        pthread_mutex_unlock(&sleeping);
    }
    return latest;
}

#ifdef __linux__
static cpu_set_t everywhere; /* where this process might run when it loaded the library */
#endif

static void *worker(void *argument) {
    int id = (int)(intptr_t)argument;
#ifdef __linux__
    sched_setaffinity(0, sizeof everywhere, &everywhere); /* whoever started it may be confined to a core */
#endif
    unsigned seen = 0;
    for (;;) {
        seen = wait_for_job(seen);
        if (id == 0)
            lead();
        take_part(id);
    }
    return 0;
}

static void start_workers(int wanted) {
    for (; started < wanted && started < MOST_WORKERS; started++) {
        pthread_t thread;
        if (pthread_create(&thread, 0, worker, (void *)(intptr_t)started))
            return; /* the others do its tasks */
        pthread_detach(thread);
    }
}

void pool_run(Task task, const void *job, int count, int threads) {
    if (threads < 2 || count < 2 || pthread_mutex_trylock(&callers)) {
        for (int index = 0; index < count; index++)
            task(job, index);
        return;
    }
    start_workers(threads - 1);
    job_task = task, job_data = job, job_threads = started + 1 < threads ? started + 1 : threads;
    for (int i = 0; i < job_threads; i++) {
        atomic_store_explicit(&shares[i].next, (int)((int64_t)count * i / job_threads), memory_order_relaxed);
        shares[i].end = (int)((int64_t)count * (i + 1) / job_threads);
    }
    atomic_store(&open_, 1);
    call_workers();
    work(job_threads - 1);
    atomic_store(&open_, 0);
    /* What a worker has begun takes microseconds, unless it has lost its processor. */
    for (int looks = 0; atomic_load(&active); looks++)
        if (looks > PATIENCE)
            sched_yield();
    pthread_mutex_unlock(&callers);
}

void pool_begin(Call call, const void *told, int threads) {
    pool_wait();
    int begun = 0;
    if (threads > 1 && !pthread_mutex_trylock(&callers)) {
        start_workers(threads - 1);
        if (started && !atomic_load(&under_way)) {
            begun_call = call, begun_told = told, begun_threads = threads;
            atomic_store(&under_way, begun = 1);
        }
        pthread_mutex_unlock(&callers);
    }
    const int64_t start = now_ns();
    if (begun) {
        begun_ns = start;
        atomic_store(&to_lead, 1);
        call_workers();
        return;
    }
    call(told, threads);
    atomic_store(&lasted_ns, now_ns() - start);
}

void pool_wait(void) {
    lead();
    for (int looks = 0; atomic_load(&under_way); looks++) {
        if (atomic_load(&open_))
            take_part(0);
        else if (looks > PATIENCE)
            sched_yield();
    }
}

int64_t pool_lasted_ns(void) { return atomic_load(&lasted_ns); }

/* In a forked child there are no workers, and locks may be held by threads that are gone. */
static void forget(void) {
    pthread_mutex_init(&callers, 0);
    pthread_mutex_init(&sleeping, 0);
    pthread_cond_init(&wake, 0);
    started = 0;
    atomic_store(&active, 0);
    atomic_store(&sleepers, 0);
    atomic_store(&open_, 0);
    atomic_store(&to_lead, 0);
    atomic_store(&under_way, 0);
}

__attribute__((constructor)) static void prepare(void) {
    pthread_atfork(0, 0, forget);
#ifdef __linux__
    sched_getaffinity(0, sizeof everywhere, &everywhere);
#endif
}
