/* Threads: each with slots of its own, two at one slot, and an object that goes while others use it. */
#include <pthread.h>
#include <stdlib.h>

#include "world.h"

#define THREADS WORLD_SLOTS
#define ROUNDS 12

typedef struct {
    const world *made;
    unsigned number;
    vattn_slot_tokens shared;
} job;

static void run(void *(*what)(void *), const world *made, vattn_slot_tokens shared, void (*meanwhile)(const world *)) {
    pthread_t threads[THREADS];
    job jobs[THREADS];
    for (unsigned nth = 0; nth < THREADS; nth++) {
        jobs[nth].made = made;
        jobs[nth].number = nth;
        jobs[nth].shared = shared;
        CHECK(pthread_create(&threads[nth], NULL, what, &jobs[nth]) == 0);
    }
    if (meanwhile != NULL) meanwhile(made);
    for (unsigned nth = 0; nth < THREADS; nth++) CHECK(pthread_join(threads[nth], NULL) == 0);
}

/* The last error is this thread's own, and the tokens are as this thread wrote them. */
static void *own_slots(void *argument) {
    const job *mine = (const job *)argument;
    const vattn_cache *cache = mine->made->cache;
    const vattn_fence idle = vattn_fence_idle();
    for (unsigned round = 0; round < ROUNDS; round++) {
        vattn_slot_tokens entry = world_acquire(cache, 20), wrong;
        char said[64];
        for (; entry.tokens <= 110; entry.tokens += 30) {
            CHECK_OK(vattn_cache_step(cache, &entry, 1));
            world_write(cache, mine->number + round, entry);
        }
        entry.tokens -= 30;
        wrong = entry;
        wrong.tokens = 1000 + mine->number;
        snprintf(said, sizeof said, "to hold 100%u tokens", mine->number);
        CHECK_FAILS(VATTN_TOO_MANY_TOKENS, said, vattn_cache_step(cache, &wrong, 1));
        world_read(cache, mine->number + round, entry);
        CHECK_OK(vattn_cache_truncate(cache, entry.slot, 15, &idle, 1));
        entry.tokens = 15;
        world_read(cache, mine->number + round, entry);
        CHECK_OK(vattn_cache_retire(cache, entry.slot, &idle, 1));
    }
    return NULL;
}

/* All step one slot: a call comes to what it would alone, or to "busy". */
static void *one_slot(void *argument) {
    const job *mine = (const job *)argument;
    for (uint64_t tokens = 1; tokens <= 100; tokens++) {
        vattn_slot_tokens entry = mine->shared;
        vattn_status status;
        entry.tokens = tokens;
        status = vattn_cache_step(mine->made->cache, &entry, 1);
        CHECK(status == VATTN_OK || status == VATTN_SLOT_BUSY || status == VATTN_FEWER_TOKENS);
    }
    return NULL;
}

static unsigned long calls;

/* Works until the cache is gone; the first refusal has to be that, and so has every later one. */
static void *until_it_is_gone(void *argument) {
    const job *mine = (const job *)argument;
    const vattn_cache *cache = mine->made->cache;
    const vattn_fence idle = vattn_fence_idle();
    for (;;) {
        vattn_slot_tokens entry;
        vattn_status status;
        entry.tokens = 40;
        status = vattn_cache_acquire(cache, 40, &entry.slot);
        if (status == VATTN_OK) status = vattn_cache_step(cache, &entry, 1);
        if (status == VATTN_OK) status = vattn_cache_retire(cache, entry.slot, &idle, 1);
        __atomic_fetch_add(&calls, 1UL, __ATOMIC_RELAXED);
        if (status != VATTN_OK) {
            CHECK(status == VATTN_INVALID_HANDLE);
            CHECK_FAILS(VATTN_INVALID_HANDLE, "has been destroyed", vattn_cache_flush(cache));
            return NULL;
        }
    }
}

static void destroy(const world *made) {
    while (__atomic_load_n(&calls, __ATOMIC_RELAXED) < 50) {
        int32_t health = -1;
        CHECK_OK(vattn_cache_health(made->cache, &health));
    }
    CHECK_OK(vattn_cache_destroy(made->cache));
}

static unsigned long destroyers;

static void *destroy_too(void *argument) {
    const job *mine = (const job *)argument;
    vattn_status status = vattn_cache_destroy(mine->made->cache);
    if (status == VATTN_OK) __atomic_fetch_add(&destroyers, 1UL, __ATOMIC_RELAXED);
    CHECK(status == VATTN_OK || status == VATTN_INVALID_HANDLE);
    return NULL;
}

/* Objects come and go in all threads at once. */
static void *objects(void *argument) {
    (void)argument;
    for (int round = 0; round < ROUNDS / 3; round++) {
        world own;
        vattn_slot_tokens entry;
        world_make(&own, VATTN_BACKGROUND_THREAD);
        entry = world_acquire(own.cache, 30);
        CHECK_OK(vattn_cache_step(own.cache, &entry, 1));
        world_write(own.cache, 1, entry);
        world_end(&own);
    }
    return NULL;
}

int main(void) {
    world made;
    vattn_slot_tokens none, shared;
    const vattn_fence idle = vattn_fence_idle();
    memset(&none, 0, sizeof none);
    world_make(&made, VATTN_BACKGROUND_THREAD);
    run(own_slots, &made, none, NULL);
    shared = world_acquire(made.cache, 100);
    run(one_slot, &made, shared, NULL);
    shared.tokens = 100;
    CHECK_OK(vattn_cache_step(made.cache, &shared, 1));
    CHECK_OK(vattn_cache_retire(made.cache, shared.slot, &idle, 1));
    CHECK_OK(vattn_cache_flush(made.cache));
    world_audit(made.cache);
    run(until_it_is_gone, &made, none, destroy);
    world_none_alive(made.driver, 0);
    CHECK_OK(vattn_cache_create(&made.config, made.geometry, made.driver, &made.cache));
    run(destroy_too, &made, none, NULL);
    CHECK(destroyers == 1);
    run(objects, &made, none, NULL);
    CHECK_OK(vattn_cache_create(&made.config, made.geometry, made.driver, &made.cache));
    world_end(&made);
    return check_end();
}
