/* Memory: budgets that run out, what is given back and when, and work in the background. */
#include "world.h"

static void too_small_a_budget(const world *made) {
    const vattn_fence idle = vattn_fence_idle();
    const uint64_t prompts[4] = {256, 256, 256, 256};
    vattn_slot_tokens entries[WORLD_SLOTS];
    bool fits[WORLD_SLOTS];
    size_t admitted = 0;
    uint64_t bytes = 0;
    CHECK_OK(vattn_cache_bytes_for(made->cache, WORLD_TOKENS, &bytes));
    CHECK(bytes == 12 * WORLD_GRANULE);
    CHECK_FAILS_OUT(VATTN_INVALID_ARGUMENT, "tokens is 257", bytes, vattn_cache_bytes_for(made->cache, 257, &bytes));
    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "out is NULL", vattn_cache_bytes_for(made->cache, 1, NULL));
    CHECK_OK(vattn_cache_admits(made->cache, prompts, 4, &admitted));
    CHECK(admitted == 3);
    for (unsigned nth = 0; nth < WORLD_SLOTS; nth++) entries[nth] = world_acquire(made->cache, WORLD_TOKENS);
    CHECK_OK(vattn_cache_fits(made->cache, entries, WORLD_SLOTS, fits));
    CHECK(fits[0] && fits[1] && fits[2] && !fits[3]);
    CHECK_FAILS(VATTN_OUT_OF_BUDGET, "a step of 4 slots does not fit", vattn_cache_step(made->cache, entries, 4));
    CHECK(world_bytes(made->cache).mapped == 0);
    CHECK_OK(vattn_cache_step(made->cache, entries, 3));
    for (unsigned nth = 0; nth < 3; nth++) world_write(made->cache, nth, entries[nth]);
    CHECK_FAILS(VATTN_OUT_OF_BUDGET, "retire", vattn_cache_step(made->cache, &entries[3], 1));
    CHECK_FAILS(VATTN_OUT_OF_BUDGET, "a budget of 48 KiB is less than the 144 KiB",
                vattn_cache_set_budget(made->cache, 12 * WORLD_GRANULE));
    CHECK_FAILS(VATTN_INVALID_CONFIG, "the budget is 4 KiB", vattn_cache_set_budget(made->cache, WORLD_GRANULE));
    CHECK_FAILS(VATTN_INVALID_CONFIG, "the budget is 0", vattn_cache_set_budget(made->cache, 0));
    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "it is 160 KiB now", vattn_cache_set_budget(made->cache, VATTN_AUTO));
    CHECK(world_bytes(made->cache).budget == 40 * WORLD_GRANULE);
    CHECK_OK(vattn_cache_set_budget(made->cache, 48 * WORLD_GRANULE));
    CHECK_OK(vattn_cache_step(made->cache, entries, 4));
    world_write(made->cache, 3, entries[3]);
    for (unsigned nth = 0; nth < 4; nth++) {
        world_read(made->cache, nth, entries[nth]);
        CHECK_OK(vattn_cache_retire(made->cache, entries[nth].slot, &idle, 1));
    }
    CHECK_OK(vattn_cache_set_budget(made->cache, 40 * WORLD_GRANULE));
    CHECK(world_bytes(made->cache).held <= 40 * WORLD_GRANULE);
    world_audit(made->cache);
}

static void given_back(const world *made) {
    const vattn_fence idle = vattn_fence_idle();
    vattn_slot_tokens kept = world_acquire(made->cache, 100), gone = world_acquire(made->cache, 200);
    uint64_t unused = 0, held = 0;
    bool more;
    CHECK_OK(vattn_cache_step(made->cache, &kept, 1));
    CHECK_OK(vattn_cache_step(made->cache, &gone, 1));
    world_write(made->cache, 1, kept);
    CHECK_OK(vattn_cache_retire(made->cache, gone.slot, &idle, 1));
    CHECK(world_bytes(made->cache).parked > 0);
    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "out_free is NULL", vattn_cache_reclaim(made->cache, 1, &idle, 1, NULL));
    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "out_held is NULL", vattn_cache_trim(made->cache, 0, &idle, 1, NULL));
    CHECK(world_bytes(made->cache).parked > 0);
    CHECK_OK(vattn_cache_reclaim(made->cache, UINT64_MAX, &idle, 1, &unused));
    CHECK(world_bytes(made->cache).parked == 0 && unused == world_bytes(made->cache).free_bytes);
    CHECK_OK(vattn_cache_trim(made->cache, 0, &idle, 1, &held));
    CHECK(held == world_bytes(made->cache).mapped && world_bytes(made->cache).free_bytes == 0);
    CHECK_OK(vattn_cache_trim(made->cache, UINT64_MAX, &idle, 1, &held));
    world_read(made->cache, 1, kept);
    CHECK_OK(vattn_cache_flush(made->cache));
    CHECK_FAILS_OUT(VATTN_INVALID_ARGUMENT, "tend is for a cache", more, vattn_cache_tend(made->cache, &more));
    CHECK_OK(vattn_cache_prefetch(made->cache, &kept, 1));
    kept.tokens = 200;
    CHECK_OK(vattn_cache_prefetch(made->cache, &kept, 1));
    CHECK(world_bytes(made->cache).ahead > 0);
    CHECK_OK(vattn_cache_retire(made->cache, kept.slot, &idle, 1));
}

/* With a caller of its own: growth is mapped in tend, and a trim ends there once its stream has fired. */
static void by_the_caller(void) {
    world made;
    void *stream = (void *)(uintptr_t)5;
    const vattn_fence fence = vattn_fence_stream(stream);
    vattn_slot_tokens entry;
    uint64_t held = 0;
    bool more = true;
    world_make(&made, VATTN_BACKGROUND_CALLER);
    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "out_more is NULL", vattn_cache_tend(made.cache, NULL));
    entry = world_acquire(made.cache, 100);
    CHECK_OK(vattn_cache_step(made.cache, &entry, 1));
    CHECK_OK(vattn_driver_hold(made.driver, stream));
    CHECK_OK(vattn_cache_retire(made.cache, entry.slot, &fence, 1));
    CHECK_OK(vattn_cache_trim(made.cache, 0, &fence, 1, &held));
    for (int round = 0; round < 8; round++) CHECK_OK(vattn_cache_tend(made.cache, &more));
    CHECK(more && world_bytes(made.cache).parked > 0);
    CHECK_OK(vattn_driver_fire(made.driver, stream));
    for (int round = 0; round < 64 && more; round++) CHECK_OK(vattn_cache_tend(made.cache, &more));
    CHECK(!more && world_bytes(made.cache).held == 0);
    CHECK_OK(vattn_cache_flush(made.cache));
    world_end(&made);
}

/* With a mapper: it maps what comes next, and flush waits for it; what fails there is told by flush. */
static void by_the_mapper(void) {
    world made;
    const vattn_fence idle = vattn_fence_idle();
    vattn_slot_tokens entry;
    uint64_t held = 0;
    world_make(&made, VATTN_BACKGROUND_THREAD);
    entry = world_acquire(made.cache, 100);
    CHECK_OK(vattn_cache_step(made.cache, &entry, 1));
    world_write(made.cache, 1, entry);
    CHECK_OK(vattn_cache_flush(made.cache));
    for (uint64_t tokens = 101; tokens <= WORLD_TOKENS; tokens += 5) {
        vattn_slot_tokens next = entry;
        next.tokens = tokens;
        CHECK_OK(vattn_cache_step(made.cache, &next, 1));
        CHECK_OK(vattn_cache_flush(made.cache));
        world_read(made.cache, 1, entry);
        world_write(made.cache, 1, next);
        entry = next;
    }
    CHECK(world_stats(made.cache).mapped_ahead > 0);
    CHECK_OK(vattn_cache_retire(made.cache, entry.slot, &idle, 1));
    CHECK_OK(vattn_cache_trim(made.cache, 0, &idle, 1, &held));
    CHECK_OK(vattn_cache_flush(made.cache));
    CHECK(world_bytes(made.cache).held == 0);

    entry = world_acquire(made.cache, 8);
    CHECK_OK(vattn_driver_fail(made.driver, VATTN_ANY_VERB, 1, 1, VATTN_DRIVER));
    entry.tokens = 200;
    CHECK_OK(vattn_cache_prefetch(made.cache, &entry, 1));
    CHECK_FAILS(VATTN_DRIVER, "driver call", vattn_cache_flush(made.cache));
    CHECK_OK(vattn_driver_clear_failures(made.driver));
    CHECK_OK(vattn_cache_step(made.cache, &entry, 1));
    world_write(made.cache, 2, entry);
    CHECK(world_stats(made.cache).background_failures > 0);
    CHECK_OK(vattn_cache_retire(made.cache, entry.slot, &idle, 1));
    world_audit(made.cache);
    world_end(&made);
}

int main(void) {
    world made;
    world_make(&made, VATTN_BACKGROUND_OFF);
    too_small_a_budget(&made);
    given_back(&made);
    world_end(&made);
    by_the_caller();
    by_the_mapper();
    return check_end();
}
