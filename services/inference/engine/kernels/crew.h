/* A few threads that share the items of one job after another.
 *
 * Whoever is free takes the next item, so a thread that the system has descheduled delays nothing but the one item it holds; which
 * thread computes an item never changes its bits. Waiting threads spin for a bounded time and then sleep: an idle engine burns nothing.
 */
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>

#define SPINS 3000 /* pauses, about 60 us: longer than the serial parts of a step, shorter than the gap between steps */

typedef void (*Work)(void *with, long item, int worker);

typedef struct Crew {
    _Atomic uint64_t ticket; /* count << 32 | next: one word, so that a late reader never mixes two jobs */
    char apart_a[56];
    _Atomic uint32_t finished;
    char apart_b[60];
    Work work; /* read only by the holder of an item, whose job cannot end before it */
    void *with;
    _Atomic int asleep, closing;
    int threads;
    pthread_t *ids;
    pthread_mutex_t lock;
    pthread_cond_t wake;
} Crew;

typedef struct {
    Crew *crew;
    int worker;
} Place;

static int open_items(Crew *crew) {
    uint64_t seen = atomic_load(&crew->ticket);
    return (uint32_t)seen < (uint32_t)(seen >> 32);
}

static void take_items(Crew *crew, int worker) {
    uint32_t done = 0;
    while (open_items(crew)) {
        uint64_t seen = atomic_fetch_add(&crew->ticket, 1);
        if ((uint32_t)seen >= (uint32_t)(seen >> 32)) break;
        crew->work(crew->with, (uint32_t)seen, worker);
        done = 1;
        atomic_fetch_add_explicit(&crew->finished, done, memory_order_release);
    }
}

static void *stand_by(void *argument) {
    Place place = *(Place *)argument;
    Crew *crew = place.crew;
    free(argument);
    for (;;) {
        for (int spin = 0; spin < SPINS && !open_items(crew); spin++) _mm_pause();
        if (!open_items(crew)) {
            pthread_mutex_lock(&crew->lock);
            atomic_fetch_add(&crew->asleep, 1);
            while (!open_items(crew) && !atomic_load(&crew->closing)) pthread_cond_wait(&crew->wake, &crew->lock);
            atomic_fetch_sub(&crew->asleep, 1);
            pthread_mutex_unlock(&crew->lock);
        }
        if (atomic_load(&crew->closing)) return NULL;
        take_items(crew, place.worker);
    }
}

/* Run work(with, 0..count-1) and return when all are done. One caller at a time. */
static void share(Crew *crew, long count, Work work, void *with) {
    if (crew->threads == 1 || count <= 1) {
        for (long item = 0; item < count; item++) work(with, item, 0);
        return;
    }
    crew->work = work;
    crew->with = with;
    atomic_store(&crew->finished, 0);
    atomic_store(&crew->ticket, (uint64_t)count << 32);
    if (atomic_load(&crew->asleep)) {
        pthread_mutex_lock(&crew->lock);
        pthread_cond_broadcast(&crew->wake);
        pthread_mutex_unlock(&crew->lock);
    }
    take_items(crew, 0);
    for (int spin = 0; atomic_load_explicit(&crew->finished, memory_order_acquire) != (uint32_t)count; spin++) {
        if (spin < SPINS) _mm_pause();
        else sched_yield(); /* the holder was descheduled: let it run */
    }
}

static void disband(Crew *crew, int started) {
    pthread_mutex_lock(&crew->lock);
    atomic_store(&crew->closing, 1);
    pthread_cond_broadcast(&crew->wake);
    pthread_mutex_unlock(&crew->lock);
    for (int i = 1; i <= started; i++) pthread_join(crew->ids[i], NULL);
    pthread_mutex_destroy(&crew->lock);
    pthread_cond_destroy(&crew->wake);
    free(crew->ids);
    free(crew);
}

/* NULL where the system refuses a thread. */
static Crew *muster(int threads) {
    Crew *crew = calloc(1, sizeof *crew);
    if (!crew) return NULL;
    crew->threads = threads < 1 ? 1 : threads;
    crew->ids = calloc((size_t)crew->threads, sizeof *crew->ids);
    pthread_mutex_init(&crew->lock, NULL);
    pthread_cond_init(&crew->wake, NULL);
    for (int worker = 1; worker < crew->threads; worker++) {
        Place *place = malloc(sizeof *place);
        if (place) *place = (Place){crew, worker};
        if (!place || pthread_create(&crew->ids[worker], NULL, stand_by, place)) {
            free(place);
            disband(crew, worker - 1);
            return NULL;
        }
    }
    return crew;
}
