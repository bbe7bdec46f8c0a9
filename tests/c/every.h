/*
 * Every function, in calls that have to be refused for one reason: the handle, or where they are made from.
 *
 * Whatever else is passed is in order, so that nothing but the reason can be at fault.
 */
#ifndef EVERY_H
#define EVERY_H

#include "world.h"

static inline void every_geometry_call_fails(const world *good, vattn_geometry *bad, int32_t status,
                                             const char *part) {
    vattn_geometry_info info;
    vattn_layers layer;
    uint32_t tile;
    vattn_layout layout;
    vattn_cache *cache;
    CHECK_FAILS_SIZED(status, part, info, vattn_geometry_describe(bad, &info));
    CHECK_FAILS_OUT(status, part, layer, vattn_geometry_layer(bad, 0, &layer));
    CHECK_FAILS_OUT(status, part, tile, vattn_geometry_tile_tokens(bad, "fa3-decode", &tile));
    CHECK_FAILS_SIZED(status, part, layout, vattn_layout_plan(&good->config, bad, WORLD_GRANULE, &layout));
    CHECK_FAILS_OUT(status, part, cache, vattn_cache_create(&good->config, bad, good->driver, &cache));
    /* To destroy NULL is no error. */
    if (bad != NULL) CHECK_FAILS(status, part, vattn_geometry_destroy(bad));
}

static inline void every_driver_call_fails(const world *good, vattn_driver *bad, int32_t status,
                                           const char *part) {
    vattn_driver_info info;
    uint64_t first, second;
    vattn_live live;
    vattn_driver *driver;
    vattn_cache *cache;
    vattn_buffer *buffer;
    vattn_buffer_options options;
    void *stream = (void *)(uintptr_t)7;
    SIZED(options);
    options.size = 1;
    CHECK_FAILS_SIZED(status, part, info, vattn_driver_describe(bad, &info));
    check_fill(&second, 0, sizeof second);
    CHECK_FAILS_OUT(status, part, first, vattn_driver_memory(bad, &first, &second));
    CHECK_FAILS_OUT(status, part, first, vattn_driver_calls(bad, VATTN_ANY_VERB, &first, &second));
    CHECK(check_filled(&second, 0, sizeof second));
    CHECK_FAILS_OUT(status, part, driver, vattn_driver_create_checked(bad, &driver));
    CHECK_FAILS(status, part, vattn_driver_fail(bad, VATTN_ANY_VERB, 1, 0, VATTN_OUT_OF_DEVICE_MEMORY));
    CHECK_FAILS(status, part, vattn_driver_clear_failures(bad));
    CHECK_FAILS_OUT(status, part, live, vattn_driver_live(bad, &live));
    CHECK_FAILS(status, part, vattn_driver_hold(bad, stream));
    CHECK_FAILS(status, part, vattn_driver_fire(bad, stream));
    CHECK_FAILS(status, part, vattn_driver_set_capturing(bad, stream, 1));
    CHECK_FAILS_OUT(status, part, cache, vattn_cache_create(&good->config, good->geometry, bad, &cache));
    CHECK_FAILS_OUT(status, part, buffer, vattn_buffer_create(&options, bad, &buffer));
    if (bad != NULL) CHECK_FAILS(status, part, vattn_driver_destroy(bad));
}

/* `entry` is a slot of the cache, where there is one. */
static inline void every_cache_call_fails(vattn_cache *bad, vattn_slot_tokens entry, int32_t status,
                                          const char *part) {
    const uint64_t prompts[2] = {8, 16};
    const vattn_fence idle = vattn_fence_idle();
    vattn_slot slot;
    vattn_view view;
    vattn_layout layout;
    vattn_tensor tensor;
    vattn_bytes bytes;
    vattn_stats stats;
    vattn_call_stats calls;
    uint64_t number;
    size_t admitted;
    int32_t health;
    bool truth;
    char *text;
    vattn_pin *pin;
    CHECK_FAILS_OUT(status, part, slot, vattn_cache_acquire(bad, 8, &slot));
    CHECK_FAILS_OUT(status, part, slot, vattn_cache_acquire_on(bad, 8, NULL, &slot));
    CHECK_FAILS(status, part, vattn_cache_step(bad, &entry, 1));
    CHECK_FAILS_OUT(status, part, truth, vattn_cache_fits(bad, &entry, 1, &truth));
    CHECK_FAILS_OUT(status, part, admitted, vattn_cache_admits(bad, prompts, 2, &admitted));
    CHECK_FAILS(status, part, vattn_cache_prefetch(bad, &entry, 1));
    CHECK_FAILS(status, part, vattn_cache_truncate(bad, entry.slot, 0, &idle, 1));
    CHECK_FAILS(status, part, vattn_cache_retire(bad, entry.slot, &idle, 1));
    CHECK_FAILS_OUT(status, part, number, vattn_cache_reclaim(bad, 1, &idle, 1, &number));
    CHECK_FAILS_OUT(status, part, number, vattn_cache_trim(bad, 0, &idle, 1, &number));
    CHECK_FAILS(status, part, vattn_cache_set_budget(bad, 30 * WORLD_GRANULE));
    CHECK_FAILS_OUT(status, part, truth, vattn_cache_tend(bad, &truth));
    CHECK_FAILS(status, part, vattn_cache_flush(bad));
    CHECK_FAILS_OUT(status, part, health, vattn_cache_health(bad, &health));
    CHECK_FAILS_SIZED(status, part, bytes, vattn_cache_bytes(bad, &bytes));
    CHECK_FAILS_SIZED(status, part, stats, vattn_cache_stats(bad, &stats));
    CHECK_FAILS_OUT(status, part, calls, vattn_cache_calls(bad, VATTN_VERB_MAP, &calls));
    CHECK_FAILS_OUT(status, part, text, vattn_cache_stats_json(bad, &text));
    CHECK_FAILS_OUT(status, part, text, vattn_cache_report_json(bad, &text));
    CHECK_FAILS_SIZED(status, part, layout, vattn_cache_layout(bad, &layout));
    CHECK_FAILS_SIZED(status, part, tensor, vattn_cache_tensor(bad, 0, &tensor));
    CHECK_FAILS_OUT(status, part, number, vattn_cache_bytes_for(bad, 8, &number));
    CHECK_FAILS_OUT(status, part, view, vattn_cache_view(bad, 0, VATTN_KEY, &view));
    CHECK_FAILS_OUT(status, part, view, vattn_cache_paged_view(bad, 0, VATTN_KEY, &view));
    CHECK_FAILS_OUT(status, part, view, vattn_cache_token_view(bad, 0, VATTN_KEY, &view));
    CHECK_FAILS_OUT(status, part, pin, vattn_pin_create(bad, &entry.slot, &pin));
    CHECK_FAILS_OUT(status, part, pin, vattn_pin_create(bad, NULL, &pin));
    if (bad != NULL) CHECK_FAILS(status, part, vattn_cache_destroy(bad));
}

static inline void every_buffer_call_fails(vattn_buffer *bad, int32_t status, const char *part) {
    const vattn_fence idle = vattn_fence_idle();
    vattn_buffer_info info;
    vattn_pin *pin;
    CHECK_FAILS_OUT(status, part, pin, vattn_pin_create_buffer(bad, &pin));
    CHECK_FAILS(status, part, vattn_buffer_commit(bad, 0, 1));
    CHECK_FAILS(status, part, vattn_buffer_decommit(bad, 0, 1, &idle, 1));
    CHECK_FAILS_SIZED(status, part, info, vattn_buffer_describe(bad, &info));
    if (bad != NULL) CHECK_FAILS(status, part, vattn_buffer_destroy(bad));
}

static inline void every_pin_call_fails(vattn_pin *bad, int32_t status, const char *part) {
    vattn_pin_info info;
    vattn_array array;
    void *tensor;
    SIZED(array);
    array.dtype = VATTN_DTYPE_F16;
    CHECK_FAILS_SIZED(status, part, info, vattn_pin_describe(bad, &info));
    CHECK_FAILS_OUT(status, part, tensor, vattn_pin_dlpack(bad, &array, 1, &tensor));
    if (bad != NULL) CHECK_FAILS(status, part, vattn_pin_destroy(bad));
}

/* The functions that take no handle. */
static inline void every_free_call_fails(int32_t status, const char *part) {
    const vattn_layers layers = {1, 1, 8, 8};
    vattn_geometry *geometry;
    vattn_driver *driver;
    vattn_host_options host;
    vattn_ledger_options ledger;
    vattn_cuda_device device;
    vattn_config config;
    uint32_t count;
    char *text;
    SIZED(host);
    SIZED(ledger);
    CHECK_FAILS_OUT(status, part, geometry, vattn_geometry_create(&layers, 1, 1, VATTN_DTYPE_F16, &geometry));
    CHECK_FAILS_OUT(status, part, geometry,
                    vattn_geometry_create_preset("llama-3-8b", 1, VATTN_DTYPE_MODEL, &geometry));
    CHECK_FAILS_OUT(status, part, geometry,
                    vattn_geometry_create_from_hf_config("{}", 1, VATTN_DTYPE_MODEL, &geometry));
    CHECK_FAILS_OUT(status, part, driver, vattn_driver_create_host(&host, &driver));
    CHECK_FAILS_OUT(status, part, driver, vattn_driver_create_ledger(&ledger, &driver));
    CHECK_FAILS_OUT(status, part, driver, vattn_driver_create_cuda(NULL, &driver));
    CHECK_FAILS_OUT(status, part, count, vattn_cuda_device_count(&count));
    CHECK_FAILS_SIZED(status, part, device, vattn_cuda_device_describe(0, &device));
    CHECK_FAILS_OUT(status, part, config, vattn_config_init(&config, sizeof config));
    CHECK_FAILS_OUT(status, part, text, vattn_probe_json(&text));
    CHECK_FAILS_OUT(status, part, text, vattn_catalog_json(&text));
    CHECK_FAILS(status, part, vattn_string_destroy(NULL));
    CHECK_FAILS(status, part, vattn_dlpack_destroy(NULL, 1));
    CHECK_FAILS(status, part, vattn_log_set(NULL, NULL, VATTN_LOG_OFF));
}

#endif
