/* Views: their shapes, that three of them are the same memory, and layers and parts that are not there. */
#include "sizes.h"
#include "world.h"

typedef vattn_status (*view_function)(const vattn_cache *, uint32_t, int32_t, vattn_view *);

/* Element `[slot, token, head, dim]`, looked up in each of the three views. */
static bool same_places(const vattn_layout *layout, const vattn_view *slots, const vattn_view *pages,
                        const vattn_view *row, vattn_slot_tokens entry) {
    int64_t slot = (int64_t)entry.slot.index;
    for (int64_t token = 0; token < (int64_t)entry.tokens; token++) {
        int64_t page = slot * (int64_t)layout->pages_per_slot + token / layout->page_tokens;
        for (int64_t head = 0; head < slots->shape[2]; head++) {
            uint16_t *element = world_element(slots, slot, token, head, 1);
            if (world_element(pages, page, token % layout->page_tokens, head, 1) != element) return false;
            if (world_element(row, 0, slot * (int64_t)layout->stride_tokens + token, head, 1) != element) return false;
        }
    }
    return true;
}

static void shapes(const vattn_cache *cache, const vattn_layout *layout, vattn_slot_tokens entry) {
    for (uint32_t layer = 0; layer < WORLD_LAYERS; layer++) {
        for (int32_t part = VATTN_KEY; part <= VATTN_VALUE; part++) {
            vattn_view slots, pages, row;
            CHECK_OK(vattn_cache_view(cache, layer, part, &slots));
            CHECK_OK(vattn_cache_paged_view(cache, layer, part, &pages));
            CHECK_OK(vattn_cache_token_view(cache, layer, part, &row));
            CHECK(slots.dtype == VATTN_DTYPE_F16 && slots.element_bytes == 2);
            CHECK(slots.device_type == VATTN_DEVICE_CPU && slots.device_id == 0);
            CHECK(slots.shape[0] == WORLD_SLOTS && slots.shape[1] == WORLD_TOKENS && slots.shape[2] == 2);
            CHECK(slots.shape[3] == (part == VATTN_KEY ? 16 : 8) && slots.strides[3] == 1);
            CHECK(pages.shape[1] == layout->page_tokens && row.shape[0] == 1);
            CHECK(slots.data == pages.data && slots.data == row.data && slots.data != NULL);
            CHECK(same_places(layout, &slots, &pages, &row, entry));
        }
    }
}

/* The tensors that the views lie in: as many as the layout says, apart from each other, and all of the memory. */
static void tensors(const vattn_cache *cache) {
    vattn_layout layout;
    uint64_t token_bytes = 0, size = 0;
    SIZED(layout);
    CHECK_OK(vattn_cache_layout(cache, &layout));
    for (uint32_t number = 0; number < layout.tensors; number++) {
        vattn_tensor tensor;
        vattn_view view;
        SIZED(tensor);
        CHECK_OK(vattn_cache_tensor(cache, number, &tensor));
        CHECK(tensor.layers > 0 && tensor.first_layer + tensor.layers <= layout.layers);
        CHECK(tensor.has_keys + tensor.has_values > 0 && tensor.device_type == VATTN_DEVICE_CPU);
        CHECK(tensor.slot_stride == layout.stride_tokens * tensor.token_bytes);
        CHECK(tensor.slot_stride % layout.granule == 0 && tensor.size == tensor.slot_stride * layout.slots);
        /* Its row begins with its first layer's keys, or values where it has no keys. */
        CHECK_OK(vattn_cache_view(cache, tensor.first_layer, tensor.has_keys ? VATTN_KEY : VATTN_VALUE, &view));
        CHECK(view.data == tensor.data);
        token_bytes += tensor.token_bytes;
        size += tensor.size;
    }
    CHECK(token_bytes == layout.bytes_per_token && size == layout.virtual_size);
}

/* In every layout, every token of every slot is memory of its own. */
static void layouts(const world *made) {
    const vattn_fence idle = vattn_fence_idle();
    for (int32_t kind = VATTN_LAYOUT_SLICED; kind <= VATTN_LAYOUT_GROUPED; kind++) {
        for (int32_t order = VATTN_KV_APART; order <= VATTN_KV_INTERLEAVED; order++) {
            vattn_config config = made->config;
            vattn_cache *cache = NULL;
            vattn_layout layout;
            vattn_slot_tokens entries[WORLD_SLOTS];
            SIZED(layout);
            config.layout = kind;
            config.layers_per_tensor = kind == VATTN_LAYOUT_GROUPED ? 2 : 0;
            config.kv_order = order;
            config.budget = 64 * WORLD_GRANULE;
            CHECK_OK(vattn_cache_create(&config, made->geometry, made->driver, &cache));
            CHECK_OK(vattn_cache_layout(cache, &layout));
            tensors(cache);
            for (unsigned nth = 0; nth < WORLD_SLOTS; nth++)
                entries[nth] = world_acquire(cache, WORLD_TOKENS - 50 * nth);
            CHECK_OK(vattn_cache_step(cache, entries, WORLD_SLOTS));
            for (unsigned nth = 0; nth < WORLD_SLOTS; nth++) world_write(cache, nth, entries[nth]);
            for (unsigned nth = 0; nth < WORLD_SLOTS; nth++) {
                world_read(cache, nth, entries[nth]);
                shapes(cache, &layout, entries[nth]);
                CHECK_OK(vattn_cache_retire(cache, entries[nth].slot, &idle, 1));
            }
            CHECK_OK(vattn_cache_destroy(cache));
        }
    }
}

static void refused(const vattn_cache *cache, view_function function, const char *name) {
    /* The text names the function that was called: through a pointer, by hand. */
    const struct {
        uint32_t layer;
        int32_t part;
        int32_t status;
        const char *said;
    } wrong[] = {
        {WORLD_LAYERS, VATTN_KEY, VATTN_INVALID_ARGUMENT, "layer 2"},
        {UINT32_MAX, VATTN_VALUE, VATTN_INVALID_ARGUMENT, "4294967295"},
        {0, 2, VATTN_INVALID_ARGUMENT, "part is 2, and the values of vattn_part are 0, 1"},
        {0, -1, VATTN_INVALID_ARGUMENT, "part is -1"},
    };
    vattn_view out;
    for (size_t nth = 0; nth < sizeof wrong / sizeof wrong[0]; nth++) {
        check_fill(&out, 0, sizeof out);
        check_fails((int32_t)function(cache, wrong[nth].layer, wrong[nth].part, &out), wrong[nth].status,
                    wrong[nth].said, name, __FILE__, __LINE__);
        CHECK(check_filled(&out, 0, sizeof out));
    }
    check_fails((int32_t)function(cache, 0, VATTN_KEY, NULL), VATTN_INVALID_ARGUMENT, "out is NULL", name, __FILE__,
                __LINE__);
}

/* A latent layer among others: it has keys of one head, and no values. */
static void latent(const world *made) {
    const vattn_layers groups[2] = {{1, 2, 16, 8}, {1, 0, 24, 0}};
    vattn_geometry *geometry = NULL;
    vattn_cache *cache = NULL;
    vattn_view view;
    CHECK_OK(vattn_geometry_create(groups, 2, 1, VATTN_DTYPE_F16, &geometry));
    CHECK_OK(vattn_cache_create(&made->config, geometry, made->driver, &cache));
    CHECK_OK(vattn_cache_view(cache, 1, VATTN_KEY, &view));
    CHECK(view.shape[2] == 1 && view.shape[3] == 24);
    CHECK_FAILS_OUT(VATTN_INVALID_ARGUMENT, "layer 1", view, vattn_cache_view(cache, 1, VATTN_VALUE, &view));
    CHECK_FAILS_OUT(VATTN_INVALID_ARGUMENT, "layer 1", view, vattn_cache_paged_view(cache, 1, VATTN_VALUE, &view));
    CHECK_FAILS_OUT(VATTN_INVALID_ARGUMENT, "layer 1", view, vattn_cache_token_view(cache, 1, VATTN_VALUE, &view));
    CHECK_OK(vattn_cache_destroy(cache));
    CHECK_OK(vattn_geometry_destroy(geometry));
}

/* The spare slot is backed without a step, and so is what tiles add to a slot's tokens. */
static void spare_and_tiles(const world *made) {
    vattn_config config = made->config;
    vattn_cache *cache = NULL;
    vattn_layout layout;
    vattn_slot_tokens entry;
    SIZED(layout);
    config.spare_slot = 1;
    config.tile_tokens = 128;
    CHECK_OK(vattn_cache_create(&config, made->geometry, made->driver, &cache));
    CHECK_OK(vattn_cache_layout(cache, &layout));
    CHECK(layout.slots == WORLD_SLOTS + 1 && layout.spare_slot == WORLD_SLOTS && layout.tile_tokens == 128);
    CHECK(world_touch(cache, 9, layout.spare_slot, 0, 1, true));
    entry = world_acquire(cache, 10);
    CHECK_OK(vattn_cache_step(cache, &entry, 1));
    entry.tokens = 128;
    world_write(cache, 1, entry);
    CHECK(world_touch(cache, 9, layout.spare_slot, 0, 1, false));
    CHECK_OK(vattn_cache_destroy(cache));
}

static void no_such_tensor(const vattn_cache *cache) {
    vattn_tensor tensor;
    CHECK_FAILS_SIZED(VATTN_INVALID_ARGUMENT, "tensor is 4294967295, and there are ", tensor,
                      vattn_cache_tensor(cache, UINT32_MAX, &tensor));
    CHECK_SIZES_OUT(vattn_tensor, "out", vattn_cache_tensor(cache, 0, it));
}

int main(void) {
    world made;
    world_make(&made, VATTN_BACKGROUND_OFF);
    layouts(&made);
    refused(made.cache, vattn_cache_view, "vattn_cache_view(");
    refused(made.cache, vattn_cache_paged_view, "vattn_cache_paged_view(");
    refused(made.cache, vattn_cache_token_view, "vattn_cache_token_view(");
    no_such_tensor(made.cache);
    latent(&made);
    spare_and_tiles(&made);
    world_end(&made);
    return check_end();
}
