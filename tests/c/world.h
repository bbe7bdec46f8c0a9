/*
 * A small model, a host driver that can be told to fail, and a cache: what most tests work on.
 *
 * A slot takes up to 12 granules of 4 KiB, and the budget has 40, for four slots.
 */
#ifndef WORLD_H
#define WORLD_H

#include "check.h"

#define WORLD_GRANULE 4096u
#define WORLD_SLOTS 4u
#define WORLD_TOKENS 256u
#define WORLD_LAYERS 2u

typedef struct {
    vattn_geometry *geometry;
    vattn_driver *host;
    /* The host driver, with failures to order. */
    vattn_driver *driver;
    vattn_config config;
    vattn_cache *cache;
} world;

static inline vattn_geometry *world_geometry(void) {
    const vattn_layers layers = {WORLD_LAYERS, 2, 16, 8};
    vattn_geometry *geometry = NULL;
    CHECK_OK(vattn_geometry_create(&layers, 1, 1, VATTN_DTYPE_F16, &geometry));
    return geometry;
}

static inline vattn_driver *world_host(void) {
    vattn_host_options options;
    vattn_driver *host = NULL;
    SIZED(options);
    options.granule = WORLD_GRANULE;
    options.capacity = (uint64_t)1 << 20;
    CHECK_OK(vattn_driver_create_host(&options, &host));
    return host;
}

static inline vattn_config world_config(int32_t background) {
    vattn_config config;
    CHECK_OK(vattn_config_init(&config, sizeof config));
    config.budget = 40 * WORLD_GRANULE;
    config.max_tokens = WORLD_TOKENS;
    config.max_slots = WORLD_SLOTS;
    config.background = background;
    return config;
}

static inline void world_make(world *made, int32_t background) {
    made->geometry = world_geometry();
    made->host = world_host();
    made->driver = NULL;
    made->cache = NULL;
    CHECK_OK(vattn_driver_create_checked(made->host, &made->driver));
    made->config = world_config(background);
    CHECK_OK(vattn_cache_create(&made->config, made->geometry, made->driver, &made->cache));
}

/* Nothing of the driver's is alive, but for events that it refused to take back. */
static inline void world_none_alive(const vattn_driver *driver, uint64_t refused) {
    vattn_live live;
    CHECK_OK(vattn_driver_live(driver, &live));
    CHECK(live.handles == 0 && live.mappings == 0 && live.reservations == 0 && live.events == refused);
}

static inline void world_end(world *made) {
    CHECK_OK(vattn_cache_destroy(made->cache));
    world_none_alive(made->driver, 0);
    CHECK_OK(vattn_driver_destroy(made->driver));
    CHECK_OK(vattn_driver_destroy(made->host));
    CHECK_OK(vattn_geometry_destroy(made->geometry));
}

/* A buffer of 64 granules but a byte, in extents of up to 4. */
static inline vattn_buffer *world_buffer(const vattn_driver *driver) {
    vattn_buffer_options options;
    vattn_buffer *buffer = NULL;
    SIZED(options);
    options.size = 64 * WORLD_GRANULE - 1;
    options.largest_extent = 4 * WORLD_GRANULE;
    CHECK_OK(vattn_buffer_create(&options, driver, &buffer));
    return buffer;
}

static inline vattn_slot_tokens world_acquire(const vattn_cache *cache, uint64_t tokens) {
    vattn_slot_tokens entry;
    memset(&entry, 0, sizeof entry);
    CHECK_OK(vattn_cache_acquire(cache, tokens, &entry.slot));
    entry.tokens = tokens;
    return entry;
}

static inline vattn_bytes world_bytes(const vattn_cache *cache) {
    vattn_bytes bytes;
    SIZED(bytes);
    CHECK_OK(vattn_cache_bytes(cache, &bytes));
    return bytes;
}

static inline vattn_stats world_stats(const vattn_cache *cache) {
    vattn_stats stats;
    SIZED(stats);
    CHECK_OK(vattn_cache_stats(cache, &stats));
    return stats;
}

/* The cache's own walk through its books agrees with them. */
static inline void world_audit(const vattn_cache *cache) {
    char *report = NULL;
    CHECK_OK(vattn_cache_report_json(cache, &report));
    CHECK(report != NULL && report[0] == '{');
    CHECK_OK(vattn_string_destroy(report));
}

/* What a token's element holds, of 16 bits, for whoever owns it. */
static inline uint16_t world_value(unsigned owner, unsigned layer, int32_t part, uint64_t token, int64_t head,
                                   int64_t dim) {
    uint64_t mixed = owner * 40503u + layer * 3571u + (uint64_t)part * 2237u + token * 97u;
    return (uint16_t)(mixed + (uint64_t)head * 31u + (uint64_t)dim);
}

static inline uint16_t *world_element(const vattn_view *view, int64_t i, int64_t j, int64_t h, int64_t d) {
    return (uint16_t *)view->data + i * view->strides[0] + j * view->strides[1] + h * view->strides[2] +
           d * view->strides[3];
}

/* Writes, or reads and compares, tokens `from` to `to` of a slot in all layers: whether all are as written. */
static inline bool world_touch(const vattn_cache *cache, unsigned owner, uint32_t index, uint64_t from,
                               uint64_t to, bool write) {
    bool same = true;
    for (uint32_t layer = 0; layer < WORLD_LAYERS; layer++) {
        for (int32_t part = VATTN_KEY; part <= VATTN_VALUE; part++) {
            vattn_view view;
            CHECK_OK(vattn_cache_view(cache, layer, part, &view));
            for (uint64_t token = from; token < to; token++) {
                for (int64_t h = 0; h < view.shape[2]; h++) {
                    for (int64_t d = 0; d < view.shape[3]; d++) {
                        uint16_t *element = world_element(&view, (int64_t)index, (int64_t)token, h, d);
                        uint16_t value = world_value(owner, layer, part, token, h, d);
                        if (write) *element = value;
                        same = same && *element == value;
                    }
                }
            }
        }
    }
    return same;
}

static inline void world_write(const vattn_cache *cache, unsigned owner, vattn_slot_tokens entry) {
    CHECK(world_touch(cache, owner, entry.slot.index, 0, entry.tokens, true));
}

static inline void world_read(const vattn_cache *cache, unsigned owner, vattn_slot_tokens entry) {
    CHECK(world_touch(cache, owner, entry.slot.index, 0, entry.tokens, false));
}

#endif
