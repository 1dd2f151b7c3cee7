/* Threads that share the work of a long kernel. One job at a time: who finds the pool in use works alone, so that a
 * short kernel of one session does not wait for a long one of another. Threads start with the first job that is worth
 * it, sleep between jobs, and end with the process. */
#include "pool.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>

#include "kernels.h"

/* A piece of a job takes at least so long, for to wake a thread takes 5 to 50 us. Where there is enough to do each
 * thread gets several, so that one whose core is taken away holds up the others the less. */
enum { PIECE = 30000, SHARES = 4, STACK = 4 << 20 };

static struct {
    pthread_mutex_t lock;
    pthread_cond_t work, done;
    int busy;
    size_t started, crew; /* threads that exist beside the callers; those that may work on this job, the caller included */
    mk_piece *run;
    const void *job;
    size_t items, grain, pieces, next, left; /* next to be begun; not yet ended */
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER, .work = PTHREAD_COND_INITIALIZER, .done = PTHREAD_COND_INITIALIZER};

static atomic_size_t most = 1;
static _Thread_local int alone;

size_t mk_threads(void)
{
    return atomic_load_explicit(&most, memory_order_relaxed);
}

void mk_threads_use(size_t n)
{
    atomic_store(&most, n < 1 ? 1 : n > MK_THREADS ? MK_THREADS : n);
}

void mk_threads_alone(void)
{
    alone = 1;
}

/* With the lock held: take pieces until none is left. Who takes the first wakes two others if there is work for them, so
 * that no more are woken than find some, and all are after as many steps as their number has bits. */
static void take_pieces(void)
{
    for (int first = 1; pool.next < pool.pieces; first = 0) {
        size_t units = (pool.items + pool.grain - 1) / pool.grain, piece = pool.next++;
        size_t begin = units * piece / pool.pieces * pool.grain, end = units * (piece + 1) / pool.pieces * pool.grain;
        mk_piece *run = pool.run;
        const void *job = pool.job;
        if (end > pool.items) end = pool.items;
        for (size_t i = 0; first && i < 2 && pool.next + i < pool.pieces; i++) pthread_cond_signal(&pool.work);
        pthread_mutex_unlock(&pool.lock);
        run(job, begin, end - begin);
        pthread_mutex_lock(&pool.lock);
        if (--pool.left == 0) pthread_cond_signal(&pool.done);
    }
}

static void *worker(void *number)
{
    pthread_mutex_lock(&pool.lock);
    for (;;) {
        if ((size_t)number < pool.crew) take_pieces();
        pthread_cond_wait(&pool.work, &pool.lock);
    }
    return NULL;
}

/* With the lock held. Where no more threads can be had, there are fewer. Signals are for the threads of Python. */
static void start_workers(size_t wanted)
{
    pthread_attr_t attributes;
    pthread_t thread;
    sigset_t all, before;
    if (pool.started >= wanted || pthread_attr_init(&attributes)) return;
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, STACK);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (pool.started < wanted && !pthread_create(&thread, &attributes, worker, (void *)(pool.started + 1)))
        pool.started++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
}

static size_t pieces_of(size_t units, size_t nanoseconds, size_t threads)
{
    size_t pieces = nanoseconds / PIECE;
    if (pieces > threads) pieces = pieces < SHARES * threads ? threads : SHARES * threads;
    return pieces < units ? pieces : units;
}

void mk_split(size_t items, size_t grain, size_t nanoseconds, mk_piece *run, const void *job)
{
    size_t threads = mk_threads(), pieces = threads == 1 || alone ? 1 : pieces_of((items + grain - 1) / grain, nanoseconds, threads);
    if (pieces < 2) {
        run(job, 0, items);
        return;
    }
    pthread_mutex_lock(&pool.lock);
    if (pool.busy) {
        pthread_mutex_unlock(&pool.lock);
        run(job, 0, items);
        return;
    }
    pool.busy = 1;
    start_workers(threads - 1);
    pool.crew = threads;
    pool.run = run, pool.job = job;
    pool.items = items, pool.grain = grain;
    pool.pieces = pool.left = pieces, pool.next = 0;
    take_pieces();
    while (pool.left > 0) pthread_cond_wait(&pool.done, &pool.lock);
    pool.busy = 0;
    pthread_mutex_unlock(&pool.lock);
}
