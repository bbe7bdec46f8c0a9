/* What a cache counts, at two speeds, and what of it adds up. */
#include "sizes.h"
#include "world.h"

static void counts(const world *made) {
    const vattn_fence idle = vattn_fence_idle();
    vattn_slot_tokens entry = world_acquire(made->cache, 100);
    vattn_call_stats calls, sum;
    vattn_stats stats;
    vattn_bytes bytes;
    int32_t health = -1;
    memset(&sum, 0, sizeof sum);
    CHECK_OK(vattn_cache_step(made->cache, &entry, 1));
    bytes = world_bytes(made->cache);
    CHECK(bytes.needed == 100 * 192 && bytes.mapped >= bytes.needed && bytes.quarantined == 0);
    CHECK(bytes.held == bytes.mapped + bytes.parked + bytes.free_bytes + bytes.quarantined);
    CHECK(bytes.budget == 40 * WORLD_GRANULE && bytes.struct_size == sizeof bytes);
    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "out is NULL", vattn_cache_health(made->cache, NULL));
    CHECK_OK(vattn_cache_health(made->cache, &health));
    CHECK(health == VATTN_HEALTHY);
    entry.tokens = WORLD_TOKENS + 1;
    CHECK_FAILS(VATTN_TOO_MANY_TOKENS, "257", vattn_cache_step(made->cache, &entry, 1));
    CHECK_OK(vattn_cache_retire(made->cache, entry.slot, &idle, 1));
    stats = world_stats(made->cache);
    CHECK(stats.health == VATTN_HEALTHY && stats.reserved == 0 && stats.max_slots == WORLD_SLOTS);
    CHECK(stats.active_slots == 0 && stats.parked_slots == 1 && stats.steps == 1);
    CHECK(stats.acquired == 1 && stats.adopted == 0 && stats.retired == 1 && stats.failures >= 1);
    CHECK(stats.driver.failed == 0 && stats.background.calls == 0);
    for (int32_t verb = VATTN_VERB_RESERVE; verb <= VATTN_VERB_STREAM_WAIT; verb++) {
        CHECK_OK(vattn_cache_calls(made->cache, verb, &calls));
        sum.calls += calls.calls;
        sum.nanoseconds += calls.nanoseconds;
    }
    CHECK(sum.calls == stats.driver.calls && sum.nanoseconds == stats.driver.nanoseconds);
    CHECK_OK(vattn_cache_calls(made->cache, VATTN_VERB_MAP, &calls));
    CHECK(calls.calls > 0 && calls.failed == 0);
    CHECK_FAILS_OUT(VATTN_INVALID_ARGUMENT, "verb is 14, and the values of vattn_verb are", calls,
                    vattn_cache_calls(made->cache, 14, &calls));
    CHECK_FAILS_OUT(VATTN_INVALID_ARGUMENT, "verb is -1", calls,
                    vattn_cache_calls(made->cache, VATTN_ANY_VERB, &calls));
    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "out is NULL", vattn_cache_calls(made->cache, 0, NULL));
}

static void texts(const world *made) {
    char *text = NULL;
    CHECK_OK(vattn_cache_stats_json(made->cache, &text));
    CHECK(strstr(text, "\"steps\":1") != NULL);
    CHECK_OK(vattn_string_destroy(text));
    CHECK_OK(vattn_cache_report_json(made->cache, &text));
    CHECK(strstr(text, "\"slots\"") != NULL);
    CHECK_OK(vattn_string_destroy(text));
    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "out is NULL", vattn_cache_stats_json(made->cache, NULL));
    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "out is NULL", vattn_cache_report_json(made->cache, NULL));
}

int main(void) {
    world made;
    world_make(&made, VATTN_BACKGROUND_OFF);
    counts(&made);
    texts(&made);
    CHECK_SIZES_OUT(vattn_bytes, "out", vattn_cache_bytes(made.cache, it));
    CHECK_SIZES_OUT(vattn_stats, "out", vattn_cache_stats(made.cache, it));
    world_end(&made);
    return check_end();
}
