/* A team of threads that run the same steps together: FW_THREADS of them, the caller is the first.
 *
 * Between two steps all wait for each other at a barrier: they spin, for steps are short, and yield where a processor is
 * shared. Between two runs the helpers spin for a while and then sleep, so an idle network costs nothing.
 * fw_team_start and fw_team_stop surround a context's life; fw_team_run runs the steps first <= i < last. */
#ifndef FW_TEAM_H
#define FW_TEAM_H

#include <pthread.h>
#include <sched.h>

#define FW_SPINS 20000

struct fw_team;
typedef struct fw_helper {
    struct fw_team *team;
    pthread_t thread;
    int tid;
} fw_helper;

typedef struct fw_team {
    pthread_mutex_t lock;
    pthread_cond_t wake;
    int run, stop, arrived, phase, first, last, size; /* run: how many there were; size: threads that exist */
    void (*work)(void *context, int step, int tid, int threads);
    void *context;
    fw_helper helpers[FW_THREADS];
} fw_team;

static inline void fw_pause(int spins) {
    if (spins % 512 == 511) sched_yield();
#if defined(__x86_64__) || defined(__i386__)
    else __builtin_ia32_pause();
#endif
}

static inline void fw_barrier(fw_team *t) {
    const int phase = __atomic_load_n(&t->phase, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&t->arrived, 1, __ATOMIC_ACQ_REL) == t->size) {
        __atomic_store_n(&t->arrived, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&t->phase, phase + 1, __ATOMIC_RELEASE);
        return;
    }
    for (int spins = 0; __atomic_load_n(&t->phase, __ATOMIC_ACQUIRE) == phase; spins++) fw_pause(spins);
}

static inline void fw_team_steps(fw_team *t, int tid) {
    /* Read once: behind the last barrier the caller may already have begun the next run. */
    const int last = t->last;
    for (int i = t->first; i < last; i++) {
        t->work(t->context, i, tid, t->size);
        fw_barrier(t);
    }
}

static void *fw_team_help(void *argument) {
    fw_helper *me = (fw_helper *)argument;
    fw_team *t = me->team;
    int seen = 0;
    for (;;) {
        for (int spins = 0; spins < FW_SPINS && __atomic_load_n(&t->run, __ATOMIC_ACQUIRE) == seen; spins++)
            fw_pause(spins);
        if (__atomic_load_n(&t->run, __ATOMIC_ACQUIRE) == seen) {
            pthread_mutex_lock(&t->lock);
            while (t->run == seen) pthread_cond_wait(&t->wake, &t->lock);
            pthread_mutex_unlock(&t->lock);
        }
        seen++;
        if (t->stop) return NULL;
        fw_team_steps(t, me->tid);
    }
}

static inline void fw_team_wake(fw_team *t) {
    pthread_mutex_lock(&t->lock);
    __atomic_add_fetch(&t->run, 1, __ATOMIC_RELEASE);
    pthread_cond_broadcast(&t->wake);
    pthread_mutex_unlock(&t->lock);
}

/* The caller and FW_THREADS - 1 helpers; fewer where the system refuses a thread. */
static inline void fw_team_start(fw_team *t, void *context, void (*work)(void *, int, int, int)) {
    memset(t, 0, sizeof *t);
    pthread_mutex_init(&t->lock, NULL);
    pthread_cond_init(&t->wake, NULL);
    t->context = context, t->work = work, t->size = 1;
    for (int i = 1; i < FW_THREADS; i++) {
        fw_helper *helper = t->helpers + t->size;
        helper->team = t, helper->tid = t->size;
        if (pthread_create(&helper->thread, NULL, fw_team_help, helper) == 0) t->size++;
    }
}

static inline void fw_team_run(fw_team *t, int first, int last) {
    t->first = first, t->last = last;
    if (t->size > 1) fw_team_wake(t);
    fw_team_steps(t, 0);
}

static inline void fw_team_stop(fw_team *t) {
    t->stop = 1;
    fw_team_wake(t);
    for (int i = 1; i < t->size; i++) pthread_join(t->helpers[i].thread, NULL);
    pthread_cond_destroy(&t->wake);
    pthread_mutex_destroy(&t->lock);
}
#endif
