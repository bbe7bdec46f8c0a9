/* A device that refuses: at each call of each operation, and what is left as it was. */
#include "world.h"

/* Two slots with tokens, one parked behind a fence, and one that is new. */
typedef struct {
    world made;
    vattn_slot_tokens first, second, fresh;
} scene;

static void scene_make(scene *now) {
    const vattn_fence fence = vattn_fence_stream((void *)(uintptr_t)1);
    vattn_slot_tokens parked;
    world_make(&now->made, VATTN_BACKGROUND_OFF);
    now->first = world_acquire(now->made.cache, 60);
    now->second = world_acquire(now->made.cache, 90);
    parked = world_acquire(now->made.cache, 130);
    CHECK_OK(vattn_cache_step(now->made.cache, &now->first, 1));
    CHECK_OK(vattn_cache_step(now->made.cache, &now->second, 1));
    CHECK_OK(vattn_cache_step(now->made.cache, &parked, 1));
    world_write(now->made.cache, 1, now->first);
    world_write(now->made.cache, 2, now->second);
    now->fresh = world_acquire(now->made.cache, 0);
    CHECK_OK(vattn_cache_retire(now->made.cache, parked.slot, &fence, 1));
}

typedef vattn_status (*operation)(scene *);

static vattn_status acquire(scene *now) {
    vattn_slot slot;
    return vattn_cache_acquire_on(now->made.cache, 100, (void *)(uintptr_t)2, &slot);
}

static vattn_status grow(scene *now) {
    vattn_slot_tokens entry = now->first;
    entry.tokens = 250;
    return vattn_cache_step(now->made.cache, &entry, 1);
}

static vattn_status grow_all(scene *now) {
    vattn_slot_tokens entries[3];
    entries[0] = now->first;
    entries[1] = now->second;
    entries[2] = now->fresh;
    entries[0].tokens = entries[1].tokens = entries[2].tokens = 200;
    return vattn_cache_step(now->made.cache, entries, 3);
}

static vattn_status truncate(scene *now) {
    const vattn_fence fence = vattn_fence_stream((void *)(uintptr_t)3);
    return vattn_cache_truncate(now->made.cache, now->fresh.slot, 0, &fence, 1);
}

static vattn_status retire(scene *now) {
    const vattn_fence fence = vattn_fence_stream((void *)(uintptr_t)3);
    return vattn_cache_retire(now->made.cache, now->fresh.slot, &fence, 1);
}

static vattn_status reclaim(scene *now) {
    const vattn_fence fence = vattn_fence_stream((void *)(uintptr_t)3);
    uint64_t out;
    vattn_status status;
    check_fill(&out, 0, sizeof out);
    status = vattn_cache_reclaim(now->made.cache, UINT64_MAX, &fence, 1, &out);
    CHECK(status == VATTN_OK || check_filled(&out, 0, sizeof out));
    return status;
}

static vattn_status trim(scene *now) {
    const vattn_fence fence = vattn_fence_stream((void *)(uintptr_t)3);
    uint64_t out;
    vattn_status status;
    check_fill(&out, 0, sizeof out);
    status = vattn_cache_trim(now->made.cache, 0, &fence, 1, &out);
    CHECK(status == VATTN_OK || check_filled(&out, 0, sizeof out));
    return status;
}

static vattn_status less_budget(scene *now) {
    return vattn_cache_set_budget(now->made.cache, 10 * WORLD_GRANULE);
}

static const struct {
    const char *name;
    operation run;
} operations[] = {{"acquire", acquire}, {"grow", grow},       {"grow all", grow_all}, {"truncate", truncate},
                  {"retire", retire},   {"reclaim", reclaim}, {"trim", trim},         {"less budget", less_budget}};

/* What a program can see of slots and tokens is as before. */
static void unchanged(const scene *now, const vattn_stats *stats, const vattn_bytes *bytes) {
    vattn_stats later = world_stats(now->made.cache);
    vattn_bytes left = world_bytes(now->made.cache);
    CHECK(later.active_slots == stats->active_slots && later.steps == stats->steps);
    CHECK(later.acquired == stats->acquired && later.retired == stats->retired);
    CHECK(left.needed == bytes->needed && left.budget == bytes->budget && left.quarantined == 0);
    CHECK(later.health == VATTN_HEALTHY && later.failures == stats->failures + 1);
}

/* Fails the `nth` call of one operation: whether there was one. */
static bool fail_once(operation run, const char *name, uint64_t nth, int32_t wanted) {
    scene now;
    vattn_status status;
    vattn_stats stats;
    vattn_bytes bytes;
    uint64_t calls = 0, failed = 0, refused;
    scene_make(&now);
    stats = world_stats(now.made.cache);
    bytes = world_bytes(now.made.cache);
    CHECK_OK(vattn_driver_fail(now.made.driver, VATTN_ANY_VERB, nth, 0, wanted));
    status = run(&now);
    CHECK_OK(vattn_driver_calls(now.made.driver, VATTN_ANY_VERB, &calls, &failed));
    CHECK_OK(vattn_driver_clear_failures(now.made.driver));
    world_read(now.made.cache, 1, now.first);
    world_read(now.made.cache, 2, now.second);
    if (status != VATTN_OK) {
        vattn_error error;
        SIZED(error);
        CHECK_OK(vattn_last_error(&error));
        if (!CHECK(failed == 1 && status == wanted && error.status == wanted && error.verb >= 0))
            fprintf(stderr, "    %s, call %u\n", name, (unsigned)nth);
        unchanged(&now, &stats, &bytes);
        CHECK_OK(run(&now));
    }
    world_audit(now.made.cache);
    refused = world_stats(now.made.cache).refused_drops;
    CHECK_OK(vattn_cache_destroy(now.made.cache));
    world_none_alive(now.made.driver, refused);
    CHECK_OK(vattn_driver_destroy(now.made.driver));
    CHECK_OK(vattn_driver_destroy(now.made.host));
    CHECK_OK(vattn_geometry_destroy(now.made.geometry));
    return failed == 1;
}

static void every_call(int32_t status) {
    for (size_t which = 0; which < sizeof operations / sizeof operations[0]; which++) {
        uint64_t nth = 1;
        while (fail_once(operations[which].run, operations[which].name, nth, status)) nth++;
        printf("%s: %u calls that can fail\n", operations[which].name, (unsigned)nth - 1);
        CHECK(nth > 1);
    }
}

/* A cache that is not made leaves nothing behind. */
static void creation(void) {
    vattn_geometry *geometry = world_geometry();
    vattn_driver *host = world_host(), *driver = NULL;
    vattn_config config = world_config(VATTN_BACKGROUND_THREAD);
    vattn_cache *cache;
    CHECK_OK(vattn_driver_create_checked(host, &driver));
    config.commit = VATTN_COMMIT_WHOLE;
    config.spare_slot = 1;
    for (uint64_t nth = 1;; nth++) {
        uint64_t calls, before, failed;
        vattn_status status;
        CHECK_OK(vattn_driver_calls(driver, VATTN_ANY_VERB, &calls, &before));
        CHECK_OK(vattn_driver_fail(driver, VATTN_ANY_VERB, nth, 0, VATTN_OUT_OF_DEVICE_MEMORY));
        check_fill(&cache, 0, sizeof cache);
        status = vattn_cache_create(&config, geometry, driver, &cache);
        CHECK_OK(vattn_driver_calls(driver, VATTN_ANY_VERB, &calls, &failed));
        CHECK_OK(vattn_driver_clear_failures(driver));
        if (status == VATTN_OK) {
            CHECK_OK(vattn_cache_destroy(cache));
            world_none_alive(driver, 0);
            if (failed == before) break;
            continue;
        }
        CHECK(status == VATTN_OUT_OF_DEVICE_MEMORY && check_filled(&cache, 0, sizeof cache));
        world_none_alive(driver, 0);
    }
    CHECK_OK(vattn_driver_destroy(driver));
    CHECK_OK(vattn_driver_destroy(host));
    CHECK_OK(vattn_geometry_destroy(geometry));
}

/* A device that is gone: the cache has failed, says so in every call, and can be looked at and destroyed. */
static void lost(void) {
    const vattn_fence idle = vattn_fence_idle();
    scene now;
    vattn_slot slot;
    vattn_view view;
    uint64_t out;
    bool fits = false;
    int32_t health = -1;
    scene_make(&now);
    CHECK_OK(vattn_driver_fail(now.made.driver, VATTN_ANY_VERB, 1, 1, VATTN_DEVICE_LOST));
    CHECK_FAILS(VATTN_DEVICE_LOST, "driver call", vattn_cache_step(now.made.cache, (now.first.tokens = 250, &now.first), 1));
    CHECK_OK(vattn_cache_health(now.made.cache, &health));
    CHECK(health == VATTN_FAILED);
    CHECK_FAILS_OUT(VATTN_UNHEALTHY, "has failed", slot, vattn_cache_acquire(now.made.cache, 8, &slot));
    CHECK_FAILS(VATTN_UNHEALTHY, "has failed", vattn_cache_step(now.made.cache, &now.second, 1));
    CHECK_FAILS(VATTN_UNHEALTHY, "has failed", vattn_cache_prefetch(now.made.cache, &now.second, 1));
    CHECK_FAILS(VATTN_UNHEALTHY, "has failed", vattn_cache_truncate(now.made.cache, now.second.slot, 1, &idle, 1));
    CHECK_FAILS(VATTN_UNHEALTHY, "has failed", vattn_cache_retire(now.made.cache, now.second.slot, &idle, 1));
    CHECK_FAILS_OUT(VATTN_UNHEALTHY, "has failed", out, vattn_cache_reclaim(now.made.cache, 1, &idle, 1, &out));
    CHECK_FAILS_OUT(VATTN_UNHEALTHY, "has failed", out, vattn_cache_trim(now.made.cache, 1, &idle, 1, &out));
    CHECK_FAILS(VATTN_UNHEALTHY, "has failed", vattn_cache_set_budget(now.made.cache, 45 * WORLD_GRANULE));
    CHECK_FAILS(VATTN_UNHEALTHY, "has failed", vattn_cache_flush(now.made.cache));
    CHECK_OK(vattn_cache_fits(now.made.cache, &now.second, 1, &fits));
    CHECK_OK(vattn_cache_view(now.made.cache, 0, VATTN_KEY, &view));
    CHECK(world_stats(now.made.cache).health == VATTN_FAILED);
    CHECK_OK(vattn_cache_destroy(now.made.cache));
    CHECK_OK(vattn_driver_destroy(now.made.driver));
    CHECK_OK(vattn_driver_destroy(now.made.host));
    CHECK_OK(vattn_geometry_destroy(now.made.geometry));
}

/* A refusal that can't be undone either: some memory is quarantined until the driver lets go of it. */
static void degraded(void) {
    const vattn_fence idle = vattn_fence_idle();
    scene now;
    uint64_t held = 0;
    int32_t health = -1;
    scene_make(&now);
    CHECK_OK(vattn_cache_trim(now.made.cache, 0, &idle, 1, &held));
    CHECK_OK(vattn_driver_fail(now.made.driver, VATTN_VERB_SET_ACCESS, 1, 1, VATTN_DRIVER));
    CHECK_OK(vattn_driver_fail(now.made.driver, VATTN_VERB_UNMAP, 1, 1, VATTN_DRIVER));
    CHECK(grow(&now) == VATTN_DRIVER);
    CHECK_OK(vattn_cache_health(now.made.cache, &health));
    CHECK(health == VATTN_DEGRADED && world_bytes(now.made.cache).quarantined > 0);
    world_read(now.made.cache, 1, now.first);
    world_read(now.made.cache, 2, now.second);
    CHECK_OK(vattn_driver_clear_failures(now.made.driver));
    CHECK_OK(vattn_cache_trim(now.made.cache, 0, &idle, 1, &held));
    world_audit(now.made.cache);
    world_end(&now.made);
}

int main(void) {
    every_call(VATTN_OUT_OF_DEVICE_MEMORY);
    every_call(VATTN_DRIVER);
    creation();
    lost();
    degraded();
    return check_end();
}
