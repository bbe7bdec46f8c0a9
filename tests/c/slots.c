/* The life of a slot: acquire, step, truncate, retire, and every way to name one that has to be refused. */
#include "world.h"

static void life(const world *made) {
    const vattn_fence idle = vattn_fence_idle();
    vattn_slot_tokens entry = world_acquire(made->cache, 10), next;
    CHECK(entry.slot.index < WORLD_SLOTS && entry.slot.generation > 0);
    CHECK_OK(vattn_cache_step(made->cache, &entry, 1));
    world_write(made->cache, 1, entry);
    for (entry.tokens = 11; entry.tokens <= WORLD_TOKENS; entry.tokens += 35) {
        vattn_slot_tokens before = entry;
        before.tokens -= entry.tokens == 11 ? 1 : 35;
        CHECK_OK(vattn_cache_step(made->cache, &entry, 1));
        world_read(made->cache, 1, before);
        world_write(made->cache, 1, entry);
    }
    entry.tokens = WORLD_TOKENS;
    CHECK_OK(vattn_cache_step(made->cache, &entry, 1));
    CHECK_OK(vattn_cache_truncate(made->cache, entry.slot, 20, &idle, 1));
    entry.tokens = 20;
    world_read(made->cache, 1, entry);
    CHECK_OK(vattn_cache_step(made->cache, &entry, 1));
    CHECK_OK(vattn_cache_retire(made->cache, entry.slot, &idle, 1));
    /* A successor in the same place has another generation, and may have the memory. */
    next = world_acquire(made->cache, 20);
    CHECK(next.slot.index == entry.slot.index && next.slot.generation > entry.slot.generation);
    CHECK(next.slot.cache == entry.slot.cache);
    CHECK_OK(vattn_cache_step(made->cache, &next, 1));
    world_write(made->cache, 2, next);
    world_read(made->cache, 2, next);
    CHECK_OK(vattn_cache_retire(made->cache, next.slot, &idle, 1));
    world_audit(made->cache);
}

/* Every call that names a slot, of one that has to be refused. */
static void refused(const vattn_cache *cache, vattn_slot_tokens entry, int32_t status, const char *part) {
    const vattn_fence idle = vattn_fence_idle();
    bool fits;
    CHECK_FAILS(status, part, vattn_cache_step(cache, &entry, 1));
    CHECK_FAILS_OUT(status, part, fits, vattn_cache_fits(cache, &entry, 1, &fits));
    CHECK_FAILS(status, part, vattn_cache_prefetch(cache, &entry, 1));
    CHECK_FAILS(status, part, vattn_cache_truncate(cache, entry.slot, 0, &idle, 1));
    CHECK_FAILS(status, part, vattn_cache_retire(cache, entry.slot, &idle, 1));
}

static void not_this_slot(const world *made) {
    const vattn_fence idle = vattn_fence_idle();
    vattn_slot_tokens entry = world_acquire(made->cache, 10), foreign, wrong;
    vattn_cache *other = NULL;
    CHECK_OK(vattn_cache_create(&made->config, made->geometry, made->driver, &other));
    foreign = world_acquire(other, 10);
    refused(made->cache, foreign, VATTN_FOREIGN_SLOT, "another cache");
    refused(other, entry, VATTN_FOREIGN_SLOT, "another cache");
    CHECK_OK(vattn_cache_destroy(other));
    refused(made->cache, foreign, VATTN_FOREIGN_SLOT, "another cache");

    memset(&wrong, 0, sizeof wrong);
    wrong.tokens = 10;
    refused(made->cache, wrong, VATTN_FOREIGN_SLOT, "another cache");
    wrong = entry;
    wrong.slot.generation++;
    refused(made->cache, wrong, VATTN_STALE_SLOT, "retired");
    wrong.slot.generation = UINT64_MAX;
    refused(made->cache, wrong, VATTN_STALE_SLOT, "retired");
    wrong.slot.generation = 0;
    refused(made->cache, wrong, VATTN_STALE_SLOT, "retired");
    wrong = entry;
    wrong.slot.index = WORLD_SLOTS;
    refused(made->cache, wrong, VATTN_FOREIGN_SLOT, "another cache");
    wrong.slot.index = UINT32_MAX;
    refused(made->cache, wrong, VATTN_FOREIGN_SLOT, "4294967295");

    CHECK_OK(vattn_cache_retire(made->cache, entry.slot, &idle, 1));
    refused(made->cache, entry, VATTN_STALE_SLOT, "retired");
    foreign = world_acquire(made->cache, 10);
    refused(made->cache, entry, VATTN_STALE_SLOT, "retired");
    CHECK_OK(vattn_cache_retire(made->cache, foreign.slot, &idle, 1));
}

static void not_this_many(const world *made) {
    const vattn_fence idle = vattn_fence_idle();
    vattn_slot_tokens twice[2], entry = world_acquire(made->cache, 100);
    bool fits[2];
    CHECK_OK(vattn_cache_step(made->cache, &entry, 1));
    world_write(made->cache, 3, entry);
    twice[0] = twice[1] = entry;
    CHECK_FAILS(VATTN_DUPLICATE_SLOT, "named twice", vattn_cache_step(made->cache, twice, 2));
    CHECK_FAILS_OUT(VATTN_DUPLICATE_SLOT, "named twice", fits, vattn_cache_fits(made->cache, twice, 2, fits));
    entry.tokens = WORLD_TOKENS + 1;
    CHECK_FAILS(VATTN_TOO_MANY_TOKENS, "257 tokens, and a slot holds 256", vattn_cache_step(made->cache, &entry, 1));
    CHECK_FAILS_OUT(VATTN_TOO_MANY_TOKENS, "257 tokens", fits, vattn_cache_fits(made->cache, &entry, 1, fits));
    CHECK_FAILS(VATTN_TOO_MANY_TOKENS, "257 tokens", vattn_cache_prefetch(made->cache, &entry, 1));
    entry.tokens = UINT64_MAX;
    CHECK_FAILS(VATTN_TOO_MANY_TOKENS, "18446744073709551615 tokens", vattn_cache_step(made->cache, &entry, 1));
    entry.tokens = 99;
    CHECK_FAILS(VATTN_FEWER_TOKENS, "99 tokens and holds 100", vattn_cache_step(made->cache, &entry, 1));
    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "truncated to 101 tokens and holds 100",
                vattn_cache_truncate(made->cache, entry.slot, 101, &idle, 1));
    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "18",
                vattn_cache_truncate(made->cache, entry.slot, UINT64_MAX, &idle, 1));
    entry.tokens = 100;
    world_read(made->cache, 3, entry);
    CHECK_OK(vattn_cache_retire(made->cache, entry.slot, &idle, 1));
}

static void all_slots(const world *made) {
    const vattn_fence idle = vattn_fence_idle();
    vattn_slot_tokens entries[WORLD_SLOTS];
    vattn_slot slot;
    for (unsigned nth = 0; nth < WORLD_SLOTS; nth++) entries[nth] = world_acquire(made->cache, 8);
    CHECK_FAILS_OUT(VATTN_NO_FREE_SLOT, "all 4 slots are in use", slot, vattn_cache_acquire(made->cache, 8, &slot));
    CHECK_FAILS_OUT(VATTN_NO_FREE_SLOT, "all 4 slots are in use", slot,
                    vattn_cache_acquire_on(made->cache, 8, NULL, &slot));
    CHECK_OK(vattn_cache_step(made->cache, entries, WORLD_SLOTS));
    for (unsigned nth = 0; nth < WORLD_SLOTS; nth++) world_write(made->cache, nth, entries[nth]);
    for (unsigned nth = 0; nth < WORLD_SLOTS; nth++) {
        world_read(made->cache, nth, entries[nth]);
        CHECK_OK(vattn_cache_retire(made->cache, entries[nth].slot, &idle, 1));
    }
    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "out is NULL", vattn_cache_acquire(made->cache, 8, NULL));
    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "out is NULL", vattn_cache_acquire_on(made->cache, 8, NULL, NULL));
    CHECK(world_stats(made->cache).active_slots == 0);
    /* A hint is no promise: any is taken. */
    CHECK_OK(vattn_cache_acquire(made->cache, UINT64_MAX, &slot));
    CHECK_OK(vattn_cache_retire(made->cache, slot, &idle, 1));
}

static void arrays(const world *made) {
    const vattn_cache *cache = made->cache;
    const vattn_fence idle = vattn_fence_idle();
    const uint64_t prompts[3] = {200, 200, 1};
    vattn_slot_tokens room[2], *off = (vattn_slot_tokens *)(void *)((char *)room + 4);
    bool fits[2];
    size_t admitted;
    memset(room, 0, sizeof room);
    room[0] = world_acquire(cache, 8);
    CHECK_OK(vattn_cache_step(cache, NULL, 0));
    CHECK_OK(vattn_cache_prefetch(cache, NULL, 0));
    CHECK_OK(vattn_cache_fits(cache, NULL, 0, NULL));
    CHECK_OK(vattn_cache_admits(cache, NULL, 0, &admitted));
    CHECK(admitted == 0);
    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "entries is NULL and its count is 1", vattn_cache_step(cache, NULL, 1));
    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "entries is NULL and its count is 2", vattn_cache_prefetch(cache, NULL, 2));
    CHECK_FAILS_OUT(VATTN_INVALID_ARGUMENT, "entries is NULL", fits, vattn_cache_fits(cache, NULL, 1, fits));
    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "out is NULL", vattn_cache_fits(cache, room, 1, NULL));
    CHECK_FAILS_OUT(VATTN_INVALID_ARGUMENT, "prompts is NULL", admitted,
                    vattn_cache_admits(cache, NULL, 1, &admitted));
    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "out is NULL", vattn_cache_admits(cache, prompts, 1, NULL));
    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "entries has 18446744073709551615 elements",
                vattn_cache_step(cache, room, SIZE_MAX));
    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "entries has 768614336404564651 elements of 24 bytes",
                vattn_cache_prefetch(cache, room, SIZE_MAX / 24 + 1));
    CHECK_FAILS_OUT(VATTN_INVALID_ARGUMENT, "entries has", fits, vattn_cache_fits(cache, room, SIZE_MAX / 2, fits));
    CHECK_FAILS_OUT(VATTN_INVALID_ARGUMENT, "prompts has 2305843009213693952 elements of 8 bytes", admitted,
                    vattn_cache_admits(cache, prompts, (size_t)1 << 61, &admitted));
    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "not a multiple of 8", vattn_cache_step(cache, off, 1));

    CHECK_OK(vattn_cache_admits(cache, prompts, 3, &admitted));
    CHECK(admitted == 3);
    room[1] = world_acquire(cache, 8);
    room[0].tokens = room[1].tokens = WORLD_TOKENS;
    CHECK_OK(vattn_cache_fits(cache, room, 2, fits));
    CHECK(fits[0] && fits[1]);
    CHECK_OK(vattn_cache_retire(cache, room[0].slot, &idle, 1));
    CHECK_OK(vattn_cache_retire(cache, room[1].slot, &idle, 1));
}

/* Every call that takes fences, with some that can't be. */
static void no_such_fences(const vattn_cache *cache, vattn_slot slot, const vattn_fence *fences, size_t count,
                           int32_t status, const char *part) {
    uint64_t out;
    CHECK_FAILS(status, part, vattn_cache_truncate(cache, slot, 4, fences, count));
    CHECK_FAILS(status, part, vattn_cache_retire(cache, slot, fences, count));
    CHECK_FAILS_OUT(status, part, out, vattn_cache_reclaim(cache, 4096, fences, count, &out));
    CHECK_FAILS_OUT(status, part, out, vattn_cache_trim(cache, 0, fences, count, &out));
}

static void fences(const world *made) {
    const vattn_cache *cache = made->cache;
    void *stream = (void *)(uintptr_t)77;
    vattn_slot_tokens entry = world_acquire(cache, 8);
    vattn_fence some[2], wrong = vattn_fence_idle();
    vattn_slot slot;
    some[0] = vattn_fence_stream(stream);
    some[1] = vattn_fence_stream(NULL);
    CHECK_OK(vattn_cache_step(cache, &entry, 1));
    no_such_fences(cache, entry.slot, NULL, 0, VATTN_INVALID_ARGUMENT, "no fence is given");
    no_such_fences(cache, entry.slot, some, 0, VATTN_INVALID_ARGUMENT, "no fence is given");
    no_such_fences(cache, entry.slot, NULL, 2, VATTN_INVALID_ARGUMENT, "fences is NULL and its count is 2");
    no_such_fences(cache, entry.slot, some, SIZE_MAX, VATTN_INVALID_ARGUMENT, "fences has 18446744073709551615");
    no_such_fences(cache, entry.slot, (vattn_fence *)(void *)((char *)some + 1), 1, VATTN_INVALID_ARGUMENT,
                   "not a multiple of 8");
    wrong.kind = 3;
    no_such_fences(cache, entry.slot, &wrong, 1, VATTN_INVALID_ARGUMENT, "kind is 3, and the values of vattn_fence_kind");
    wrong.kind = -1;
    no_such_fences(cache, entry.slot, &wrong, 1, VATTN_INVALID_ARGUMENT, "kind is -1");
    wrong = vattn_fence_idle();
    wrong.reserved = 9;
    no_such_fences(cache, entry.slot, &wrong, 1, VATTN_INVALID_ARGUMENT, "reserved is 9");
    wrong.reserved = 0;
    wrong.handle = stream;
    no_such_fences(cache, entry.slot, &wrong, 1, VATTN_INVALID_ARGUMENT, "0x4d");
    wrong = vattn_fence_event(NULL);
    no_such_fences(cache, entry.slot, &wrong, 1, VATTN_INVALID_ARGUMENT, "the handle NULL");
    wrong = vattn_fence_event((void *)(uintptr_t)0xabcdef);
    no_such_fences(cache, entry.slot, &wrong, 1, VATTN_DRIVER, "event 0xabcdef is unknown");
    /* The last of several counts too. */
    some[1] = wrong;
    no_such_fences(cache, entry.slot, some, 2, VATTN_DRIVER, "event 0xabcdef is unknown");
    some[1] = vattn_fence_stream(NULL);

    CHECK_OK(vattn_driver_set_capturing(made->driver, stream, 1));
    no_such_fences(cache, entry.slot, some, 2, VATTN_CAPTURING_STREAM, "0x4d, which is being captured");
    CHECK_OK(vattn_driver_set_capturing(made->driver, stream, 0));
    CHECK_OK(vattn_driver_hold(made->driver, stream));
    CHECK_OK(vattn_cache_retire(cache, entry.slot, some, 2));

    /* What it left running is waited for on the device, and not on a stream that is being captured. */
    CHECK_OK(vattn_driver_set_capturing(made->driver, NULL, 1));
    CHECK_FAILS_OUT(VATTN_CAPTURING_STREAM, "being captured", slot, vattn_cache_acquire_on(cache, 8, NULL, &slot));
    CHECK_OK(vattn_driver_set_capturing(made->driver, NULL, 0));
    CHECK_OK(vattn_cache_acquire_on(cache, 8, NULL, &slot));
    CHECK(slot.index == entry.slot.index);
    CHECK_OK(vattn_driver_fire(made->driver, stream));
    CHECK_OK(vattn_cache_retire(cache, slot, some, 2));
}

int main(void) {
    world made;
    world_make(&made, VATTN_BACKGROUND_OFF);
    life(&made);
    not_this_slot(&made);
    not_this_many(&made);
    all_slots(&made);
    arrays(&made);
    fences(&made);
    world_audit(made.cache);
    world_end(&made);
    return check_end();
}
