/* Handles that are none: NULL, garbage, of another type, destroyed; in every function. */
#include "every.h"

static void garbage(const world *made) {
    const uintptr_t numbers[] = {1,          0x42,       0x44,       0x47,       0x4b,       0x50,
                                 0x7fffffff, UINTPTR_MAX, 0x5a5a5a5a, (uintptr_t)1 << 63};
    vattn_slot_tokens entry = world_acquire(made->cache, 8);
    /* Its address ends in a multiple of 8, and so can't end as a handle of these types does. */
    uint64_t local = 0;
    for (size_t nth = 0; nth < sizeof numbers / sizeof numbers[0]; nth++) {
        every_geometry_call_fails(made, (vattn_geometry *)numbers[nth], VATTN_INVALID_HANDLE, "vattn_geometry");
        every_driver_call_fails(made, (vattn_driver *)numbers[nth], VATTN_INVALID_HANDLE, "vattn_driver");
        every_cache_call_fails((vattn_cache *)numbers[nth], entry, VATTN_INVALID_HANDLE, "vattn_cache");
        every_buffer_call_fails((vattn_buffer *)numbers[nth], VATTN_INVALID_HANDLE, "vattn_buffer");
        every_pin_call_fails((vattn_pin *)numbers[nth], VATTN_INVALID_HANDLE, "vattn_pin");
    }
    every_geometry_call_fails(made, (vattn_geometry *)(void *)&local, VATTN_INVALID_HANDLE, "vattn_geometry");
    every_driver_call_fails(made, (vattn_driver *)(void *)&local, VATTN_INVALID_HANDLE, "vattn_driver");
    every_cache_call_fails((vattn_cache *)(void *)&local, entry, VATTN_INVALID_HANDLE, "vattn_cache");
    /* One bit off what is alive, wherever it is. */
    for (unsigned bit = 0; bit < 64; bit++) {
        int32_t health;
        uintptr_t near = (uintptr_t)made->cache ^ ((uintptr_t)1 << bit);
        vattn_status status = vattn_cache_health((vattn_cache *)near, &health);
        CHECK(status == VATTN_INVALID_HANDLE || (bit >= 24 && bit < 32 && status == VATTN_FORKED));
    }
}

static void null(const world *made) {
    vattn_slot_tokens entry = world_acquire(made->cache, 8);
    every_geometry_call_fails(made, NULL, VATTN_INVALID_ARGUMENT, "the vattn_geometry is NULL");
    every_driver_call_fails(made, NULL, VATTN_INVALID_ARGUMENT, "the vattn_driver is NULL");
    every_cache_call_fails(NULL, entry, VATTN_INVALID_ARGUMENT, "the vattn_cache is NULL");
    every_pin_call_fails(NULL, VATTN_INVALID_ARGUMENT, "the vattn_pin is NULL");
    CHECK_OK(vattn_pin_destroy(NULL));
    CHECK_OK(vattn_cache_destroy(NULL));
    CHECK_OK(vattn_driver_destroy(NULL));
    CHECK_OK(vattn_geometry_destroy(NULL));
}

static void of_another_type(const world *made) {
    vattn_slot_tokens entry = world_acquire(made->cache, 8);
    every_geometry_call_fails(made, (vattn_geometry *)(void *)made->driver, VATTN_INVALID_HANDLE, "is no vattn_geometry");
    every_geometry_call_fails(made, (vattn_geometry *)(void *)made->cache, VATTN_INVALID_HANDLE, "is no vattn_geometry");
    every_driver_call_fails(made, (vattn_driver *)(void *)made->geometry, VATTN_INVALID_HANDLE, "is no vattn_driver");
    every_driver_call_fails(made, (vattn_driver *)(void *)made->cache, VATTN_INVALID_HANDLE, "is no vattn_driver");
    every_cache_call_fails((vattn_cache *)(void *)made->geometry, entry, VATTN_INVALID_HANDLE, "is no vattn_cache");
    every_cache_call_fails((vattn_cache *)(void *)made->driver, entry, VATTN_INVALID_HANDLE, "is no vattn_cache");
    every_pin_call_fails((vattn_pin *)(void *)made->cache, VATTN_INVALID_HANDLE, "is no vattn_pin");
}

/* Objects may go in any order, and none comes back. */
static void destroyed(const world *made) {
    world gone;
    vattn_slot_tokens entry;
    vattn_pin *pin = NULL;
    world_make(&gone, VATTN_BACKGROUND_THREAD);
    entry = world_acquire(gone.cache, 8);
    CHECK_OK(vattn_pin_create(gone.cache, NULL, &pin));
    CHECK_OK(vattn_pin_destroy(pin));
    every_pin_call_fails(pin, VATTN_INVALID_HANDLE, "the vattn_pin has been destroyed");
    CHECK_OK(vattn_geometry_destroy(gone.geometry));
    CHECK_OK(vattn_driver_destroy(gone.host));
    CHECK_OK(vattn_driver_destroy(gone.driver));
    CHECK_OK(vattn_cache_step(gone.cache, &entry, 1));
    world_write(gone.cache, 1, entry);
    every_geometry_call_fails(made, gone.geometry, VATTN_INVALID_HANDLE, "the vattn_geometry has been destroyed");
    every_driver_call_fails(made, gone.driver, VATTN_INVALID_HANDLE, "the vattn_driver has been destroyed");
    CHECK_OK(vattn_cache_destroy(gone.cache));
    every_cache_call_fails(gone.cache, entry, VATTN_INVALID_HANDLE, "the vattn_cache has been destroyed");
    /* Nor when their places are taken again. */
    {
        world again;
        world_make(&again, VATTN_BACKGROUND_OFF);
        CHECK(again.cache != gone.cache && again.driver != gone.driver && again.geometry != gone.geometry);
        every_geometry_call_fails(made, gone.geometry, VATTN_INVALID_HANDLE, "has been destroyed");
        every_driver_call_fails(made, gone.driver, VATTN_INVALID_HANDLE, "has been destroyed");
        every_cache_call_fails(gone.cache, entry, VATTN_INVALID_HANDLE, "has been destroyed");
        world_end(&again);
    }
}

/* More objects than a table's block has places for, and all of them given up. */
static void many(void) {
    static vattn_geometry *all[1000];
    for (size_t nth = 0; nth < 1000; nth++) all[nth] = world_geometry();
    for (size_t nth = 0; nth < 1000; nth++) {
        vattn_layers layer;
        CHECK_OK(vattn_geometry_layer(all[nth], 0, &layer));
        CHECK_OK(vattn_geometry_destroy(all[nth]));
    }
    CHECK_FAILS(VATTN_INVALID_HANDLE, "has been destroyed", vattn_geometry_destroy(all[999]));
}

int main(void) {
    world made;
    world_make(&made, VATTN_BACKGROUND_OFF);
    null(&made);
    garbage(&made);
    of_another_type(&made);
    destroyed(&made);
    many();
    CHECK(world_stats(made.cache).active_slots == 3);
    world_end(&made);
    return check_end();
}
