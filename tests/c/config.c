/* The options of a cache: the defaults, what is refused, and how the tensors would lie. */
#include "sizes.h"
#include "world.h"

static void defaults(void) {
    vattn_config config;
    struct {
        vattn_config known;
        unsigned char tail[32];
    } newer;
    CHECK_OK(vattn_config_init(&config, sizeof config));
    CHECK(config.struct_size == sizeof config && config.budget == VATTN_AUTO);
    CHECK(config.max_tokens == 131072 && config.max_slots == 1024 && config.spare_slot == 0);
    CHECK(config.tile_tokens == 1 && config.page_tokens == 16 && config.slack_divisor == 32);
    CHECK(config.layout == VATTN_LAYOUT_SLICED && config.layers_per_tensor == 0);
    CHECK(config.kv_order == VATTN_KV_APART && config.background == VATTN_BACKGROUND_THREAD);
    CHECK(config.reclaim == VATTN_RECLAIM_DEFERRED && config.look_ahead == 32);
    CHECK(config.look_ahead_budget == VATTN_AUTO && config.at_hand == VATTN_AUTO);
    CHECK(config.commit == VATTN_COMMIT_ON_DEMAND && config.reserved == 0);
    CHECK(config.extents == NULL && config.extents_count == 0);

    check_fill(&newer, 0, sizeof newer);
    CHECK_OK(vattn_config_init(&newer.known, sizeof newer));
    CHECK(newer.known.struct_size == sizeof newer && newer.tail[0] == 0 && newer.tail[31] == 0);

    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "config is NULL", vattn_config_init(NULL, sizeof config));
    CHECK_FAILS_OUT(VATTN_INVALID_ARGUMENT, "size is 0, and vattn_config has", config, vattn_config_init(&config, 0));
    CHECK_FAILS_OUT(VATTN_INVALID_ARGUMENT, "pass sizeof(vattn_config)", config,
                    vattn_config_init(&config, sizeof config - 1));
    CHECK_FAILS_OUT(VATTN_INVALID_ARGUMENT, "size is 18446744073709551615", config,
                    vattn_config_init(&config, SIZE_MAX));
    CHECK_FAILS_OUT(VATTN_INVALID_ARGUMENT, "not a multiple of 8", newer,
                    vattn_config_init((vattn_config *)(void *)((char *)&newer + 4), sizeof config));
}

/* One field that is wrong, in both functions that read options. */
static void refused(const world *made, const vattn_config *config, int32_t status, const char *part) {
    vattn_layout layout;
    vattn_cache *cache;
    CHECK_FAILS_SIZED(status, part, layout, vattn_layout_plan(config, made->geometry, WORLD_GRANULE, &layout));
    CHECK_FAILS_OUT(status, part, cache, vattn_cache_create(config, made->geometry, made->driver, &cache));
}

#define REFUSED(field, value, status, part)                                                                    \
    do {                                                                                                       \
        vattn_config config = made->config;                                                                    \
        config.field = (value);                                                                                \
        refused(made, &config, status, part);                                                                  \
    } while (0)

static void refused_fields(const world *made) {
    const vattn_extents few = {3, 1};
    REFUSED(spare_slot, 2, VATTN_INVALID_ARGUMENT, "config->spare_slot is 2");
    REFUSED(layout, 3, VATTN_INVALID_ARGUMENT, "config->layout is 3, and the values of vattn_layout_kind are 0, 1, 2");
    REFUSED(layout, -1, VATTN_INVALID_ARGUMENT, "config->layout is -1");
    REFUSED(kv_order, 2, VATTN_INVALID_ARGUMENT, "config->kv_order is 2");
    REFUSED(background, 3, VATTN_INVALID_ARGUMENT, "config->background is 3");
    REFUSED(background, INT32_MIN, VATTN_INVALID_ARGUMENT, "config->background is -2147483648");
    REFUSED(reclaim, 2, VATTN_INVALID_ARGUMENT, "config->reclaim is 2");
    REFUSED(commit, 3, VATTN_INVALID_ARGUMENT, "config->commit is 3");
    REFUSED(reserved, 7, VATTN_INVALID_ARGUMENT, "config->reserved is 7");
    REFUSED(layers_per_tensor, 1, VATTN_INVALID_ARGUMENT, "config->layers_per_tensor is 1");
    REFUSED(layout, VATTN_LAYOUT_GROUPED, VATTN_INVALID_CONFIG, "0");
    REFUSED(extents_count, 1, VATTN_INVALID_ARGUMENT, "config->extents is NULL and its count is 1");
    REFUSED(max_slots, 0, VATTN_INVALID_CONFIG, "max_slots");
    REFUSED(max_slots, UINT32_MAX, VATTN_INVALID_CONFIG, "max_slots");
    REFUSED(max_tokens, 0, VATTN_INVALID_CONFIG, "max_tokens");
    REFUSED(max_tokens, UINT64_MAX, VATTN_INVALID_CONFIG, "max_tokens");
    REFUSED(tile_tokens, 0, VATTN_INVALID_CONFIG, "tile_tokens");
    REFUSED(page_tokens, 0, VATTN_INVALID_CONFIG, "page_tokens");
    REFUSED(slack_divisor, 0, VATTN_INVALID_CONFIG, "slack_divisor");
    {
        vattn_config config = made->config;
        config.extents = &few;
        config.extents_count = 1;
        refused(made, &config, VATTN_INVALID_ARGUMENT, "3 granules; use 1, 2, 4");
        config.extents_count = SIZE_MAX / 2;
        refused(made, &config, VATTN_INVALID_ARGUMENT, "config->extents has 9223372036854775807 elements");
    }
    {
        const vattn_extents one = {1, 1};
        vattn_config config = made->config;
        config.extents = &one;
        config.extents_count = 1;
        refused(made, &config, VATTN_INVALID_ARGUMENT, "config->extents_count is 1");
        config.commit = VATTN_COMMIT_WHOLE;
        refused(made, &config, VATTN_INVALID_ARGUMENT, "VATTN_COMMIT_EXTENTS");
    }
}

/* What a plan can't see, since it has no driver. */
static void refused_at_creation(const world *made) {
    const vattn_extents many = {256, UINT64_MAX};
    vattn_config config = made->config;
    vattn_cache *cache;
    config.budget = WORLD_GRANULE;
    CHECK_FAILS_OUT(VATTN_INVALID_CONFIG, "the budget is 4 KiB", cache,
                    vattn_cache_create(&config, made->geometry, made->driver, &cache));
    config.budget = made->config.budget;
    config.commit = VATTN_COMMIT_EXTENTS;
    config.extents = &many;
    config.extents_count = 1;
    CHECK_FAILS_OUT(VATTN_INVALID_CONFIG, "2^64 granules", cache,
                    vattn_cache_create(&config, made->geometry, made->driver, &cache));
    config = made->config;
    config.budget = (uint64_t)1 << 40;
    config.commit = VATTN_COMMIT_WHOLE;
    CHECK_FAILS_OUT(VATTN_OUT_OF_DEVICE_MEMORY, "", cache,
                    vattn_cache_create(&config, made->geometry, made->driver, &cache));
    CHECK_FAILS_OUT(VATTN_INVALID_ARGUMENT, "config is NULL", cache,
                    vattn_cache_create(NULL, made->geometry, made->driver, &cache));
    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "out is NULL",
                vattn_cache_create(&made->config, made->geometry, made->driver, NULL));
}

static void accepted(const world *made) {
    const vattn_extents extents[2] = {{1, 4}, {8, 2}};
    vattn_config config = made->config;
    vattn_cache *cache = NULL;
    config.commit = VATTN_COMMIT_EXTENTS;
    config.extents = extents;
    config.extents_count = 2;
    CHECK_OK(vattn_cache_create(&config, made->geometry, made->driver, &cache));
    CHECK(world_bytes(cache).held == 20 * WORLD_GRANULE);
    CHECK_OK(vattn_cache_destroy(cache));

    config = made->config;
    config.commit = VATTN_COMMIT_WHOLE;
    config.kv_order = VATTN_KV_INTERLEAVED;
    config.spare_slot = 1;
    config.tile_tokens = 64;
    config.look_ahead = 0;
    config.look_ahead_budget = 0;
    config.at_hand = 0;
    config.reclaim = VATTN_RECLAIM_EAGER;
    CHECK_OK(vattn_cache_create(&config, made->geometry, made->driver, &cache));
    CHECK(world_bytes(cache).held == config.budget);
    world_audit(cache);
    CHECK_OK(vattn_cache_destroy(cache));

    for (int32_t kind = VATTN_LAYOUT_SLICED; kind <= VATTN_LAYOUT_GROUPED; kind++) {
        vattn_layout layout;
        SIZED(layout);
        config = made->config;
        config.layout = kind;
        config.layers_per_tensor = kind == VATTN_LAYOUT_GROUPED ? 2 : 0;
        CHECK_OK(vattn_layout_plan(&config, made->geometry, WORLD_GRANULE, &layout));
        CHECK(layout.tensors == (kind == VATTN_LAYOUT_PER_LAYER ? 4u : 2u));
    }
    CHECK_SIZES_IN(vattn_config, "config", made->config,
                   vattn_cache_create(it, made->geometry, made->driver, &cache),
                   CHECK_OK(vattn_cache_destroy(cache)));
}

static void plans(const world *made) {
    vattn_layout plan, made_so;
    SIZED(plan);
    SIZED(made_so);
    CHECK_OK(vattn_layout_plan(&made->config, made->geometry, WORLD_GRANULE, &plan));
    CHECK_OK(vattn_cache_layout(made->cache, &made_so));
    CHECK(memcmp(&plan, &made_so, sizeof plan) == 0);
    CHECK(plan.layers == WORLD_LAYERS && plan.slots == WORLD_SLOTS && plan.spare_slot == VATTN_NO_SLOT);
    CHECK(plan.max_tokens == WORLD_TOKENS && plan.granule == WORLD_GRANULE && plan.bytes_per_token == 192);
    CHECK(plan.stride_tokens >= plan.max_tokens && plan.page_tokens == 16);
    CHECK(plan.pages_per_slot * plan.page_tokens == plan.stride_tokens);
    CHECK_FAILS_SIZED(VATTN_INVALID_ARGUMENT, "granule is 0", plan,
                      vattn_layout_plan(&made->config, made->geometry, 0, &plan));
    CHECK_FAILS_SIZED(VATTN_INVALID_ARGUMENT, "granule is 4097", plan,
                      vattn_layout_plan(&made->config, made->geometry, 4097, &plan));
    CHECK_FAILS_SIZED(VATTN_INVALID_ARGUMENT, "granule is 18446744073709551615", plan,
                      vattn_layout_plan(&made->config, made->geometry, UINT64_MAX, &plan));
    CHECK_FAILS_SIZED(VATTN_INVALID_ARGUMENT, "config is NULL", plan,
                      vattn_layout_plan(NULL, made->geometry, WORLD_GRANULE, &plan));
    CHECK_SIZES_OUT(vattn_layout, "out", vattn_layout_plan(&made->config, made->geometry, WORLD_GRANULE, it));
    CHECK_SIZES_OUT(vattn_layout, "out", vattn_cache_layout(made->cache, it));
}

int main(void) {
    world made;
    world_make(&made, VATTN_BACKGROUND_OFF);
    defaults();
    refused_fields(&made);
    refused_at_creation(&made);
    accepted(&made);
    plans(&made);
    world_end(&made);
    return check_end();
}
