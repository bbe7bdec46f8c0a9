/* Buffers: what is committed can be touched and stays, what is given back is, and what is refused. */
#include "every.h"
#include "sizes.h"

static vattn_buffer_info describe(const vattn_buffer *buffer) {
    vattn_buffer_info info;
    SIZED(info);
    CHECK_OK(vattn_buffer_describe(buffer, &info));
    return info;
}

static void making(const world *made) {
    vattn_buffer_options options;
    vattn_buffer *buffer = NULL, *out;
    vattn_buffer_info info;
    vattn_ledger_options ledger;
    vattn_driver *small = NULL;
    SIZED(options);
    options.size = (uint64_t)1 << 30;
    CHECK_OK(vattn_buffer_create(&options, made->driver, &buffer));
    info = describe(buffer);
    CHECK(info.data != NULL && info.size == options.size && info.granule == WORLD_GRANULE);
    CHECK(info.committed == 0 && info.held == 0);
    CHECK(info.device_type == VATTN_DEVICE_CPU && info.device_id == 0);
    CHECK_SIZES_OUT(vattn_buffer_info, "out", vattn_buffer_describe(buffer, it));
    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "out is NULL", vattn_buffer_describe(buffer, NULL));
    CHECK_OK(vattn_buffer_destroy(buffer));
    CHECK_OK(vattn_buffer_destroy(NULL));

    CHECK_SIZES_IN(vattn_buffer_options, "options", options, vattn_buffer_create(it, made->driver, &buffer),
                   CHECK_OK(vattn_buffer_destroy(buffer)));
    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "out is NULL", vattn_buffer_create(&options, made->driver, NULL));
    options.largest_extent = 3 * WORLD_GRANULE;
    CHECK_FAILS_OUT(VATTN_INVALID_ARGUMENT, "12 KiB can't be", out,
                    vattn_buffer_create(&options, made->driver, &out));
    options.largest_extent = 0;
    options.size = 0;
    CHECK_FAILS_OUT(VATTN_INVALID_ARGUMENT, "a buffer of 0 bytes", out,
                    vattn_buffer_create(&options, made->driver, &out));
    options.size = UINT64_MAX;
    CHECK_FAILS_OUT(VATTN_INVALID_ARGUMENT, "can't be reserved", out,
                    vattn_buffer_create(&options, made->driver, &out));
    SIZED(ledger);
    ledger.capacity = ledger.addresses = (uint64_t)1 << 30;
    CHECK_OK(vattn_driver_create_ledger(&ledger, &small));
    options.size = (uint64_t)1 << 40;
    CHECK_FAILS_OUT(VATTN_OUT_OF_ADDRESS_SPACE, "reserving 1 TiB of addresses", out,
                    vattn_buffer_create(&options, small, &out));
    CHECK_OK(vattn_driver_destroy(small));
}

/* Rows of a granule and a half: neighbours share one. */
static void rows(const world *made) {
    const uint64_t row = WORLD_GRANULE * 3 / 2;
    const vattn_fence idle = vattn_fence_idle();
    vattn_buffer *buffer = world_buffer(made->driver);
    unsigned char *data = (unsigned char *)describe(buffer).data;
    for (uint64_t nth = 0; nth < 4; nth++) {
        CHECK_OK(vattn_buffer_commit(buffer, nth * row, row));
        check_fill(data, (size_t)(nth * row), (size_t)((nth + 1) * row));
    }
    CHECK(describe(buffer).committed == 4 * row && describe(buffer).held == 6 * WORLD_GRANULE);
    CHECK_OK(vattn_buffer_decommit(buffer, row, row, &idle, 1));
    CHECK_OK(vattn_buffer_decommit(buffer, 3 * row, row, &idle, 1));
    CHECK(describe(buffer).committed == 2 * row);
    CHECK(check_filled(data, 0, (size_t)row) && check_filled(data, (size_t)(2 * row), (size_t)(3 * row)));
    /* What is there stays, and the rest comes back. */
    CHECK_OK(vattn_buffer_commit(buffer, 0, 4 * row));
    CHECK(check_filled(data, 0, (size_t)row) && check_filled(data, (size_t)(2 * row), (size_t)(3 * row)));
    check_fill(data, 0, (size_t)(4 * row));
    CHECK_OK(vattn_buffer_decommit(buffer, 0, describe(buffer).size, &idle, 1));
    CHECK(describe(buffer).committed == 0 && describe(buffer).held == 0);
    CHECK_OK(vattn_buffer_destroy(buffer));
}

static void refused(const world *made) {
    const vattn_fence idle = vattn_fence_idle();
    vattn_fence wrong = vattn_fence_event(NULL);
    vattn_buffer *buffer = world_buffer(made->driver);
    const uint64_t size = describe(buffer).size;
    CHECK(size == 64 * WORLD_GRANULE);
    CHECK_OK(vattn_buffer_commit(buffer, 0, size));
    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "0 bytes", vattn_buffer_commit(buffer, 0, 0));
    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "reach beyond the buffer", vattn_buffer_commit(buffer, size, 1));
    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "reach beyond the buffer",
                vattn_buffer_commit(buffer, UINT64_MAX, 2));
    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "0 bytes", vattn_buffer_decommit(buffer, 0, 0, &idle, 1));
    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "reach beyond the buffer",
                vattn_buffer_decommit(buffer, 1, size, &idle, 1));
    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "no fence is given", vattn_buffer_decommit(buffer, 0, size, NULL, 0));
    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "fences is NULL", vattn_buffer_decommit(buffer, 0, size, NULL, 1));
    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "an event's fence",
                vattn_buffer_decommit(buffer, 0, size, &wrong, 1));
    wrong.kind = 7;
    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "a fence's kind is 7",
                vattn_buffer_decommit(buffer, 0, size, &wrong, 1));
    CHECK(describe(buffer).committed == size);
    CHECK_OK(vattn_buffer_destroy(buffer));
}

/* A driver that fails changes nothing, and one that can't undo says what of. */
static void failing(const world *made) {
    const vattn_fence idle = vattn_fence_idle();
    vattn_buffer *buffer = world_buffer(made->driver);
    const uint64_t extent = 4 * WORLD_GRANULE;
    unsigned char *data = (unsigned char *)describe(buffer).data;
    CHECK_OK(vattn_buffer_commit(buffer, 0, 2 * extent));
    check_fill(data, 0, (size_t)(2 * extent));
    CHECK_OK(vattn_driver_fail(made->driver, VATTN_VERB_CREATE, 2, 0, VATTN_OUT_OF_DEVICE_MEMORY));
    CHECK_FAILS(VATTN_OUT_OF_DEVICE_MEMORY, "committing 48 KiB at offset 16 KiB",
                vattn_buffer_commit(buffer, extent, 3 * extent));
    CHECK(describe(buffer).committed == 2 * extent && describe(buffer).held == 2 * extent);
    CHECK_OK(vattn_driver_fail(made->driver, VATTN_VERB_UNMAP, 2, 0, VATTN_DRIVER));
    CHECK_FAILS(VATTN_DRIVER, "nothing was changed", vattn_buffer_decommit(buffer, 0, 2 * extent, &idle, 1));
    CHECK(check_filled(data, 0, (size_t)(2 * extent)));
    CHECK_OK(vattn_driver_fail(made->driver, VATTN_VERB_UNMAP, 2, 0, VATTN_DRIVER));
    CHECK_OK(vattn_driver_fail(made->driver, VATTN_VERB_MAP, 1, 0, VATTN_DRIVER));
    CHECK_FAILS(VATTN_UNHEALTHY, "would not map back 16 KiB at offset 0 bytes",
                vattn_buffer_decommit(buffer, 0, 2 * extent, &idle, 1));
    CHECK(describe(buffer).committed == extent);
    CHECK(check_filled(data, (size_t)extent, (size_t)(2 * extent)));
    CHECK_OK(vattn_buffer_commit(buffer, 0, extent));
    check_fill(data, 0, (size_t)extent);
    CHECK_OK(vattn_buffer_destroy(buffer));
}

static void streams(const world *made) {
    void *stream = (void *)(uintptr_t)7;
    vattn_fence fence = vattn_fence_stream(stream);
    vattn_buffer *buffer = world_buffer(made->driver);
    CHECK_OK(vattn_buffer_commit(buffer, 0, 1));
    CHECK_OK(vattn_driver_set_capturing(made->driver, stream, 1));
    CHECK_FAILS(VATTN_CAPTURING_STREAM, "captured", vattn_buffer_decommit(buffer, 0, 1, &fence, 1));
    CHECK_OK(vattn_driver_set_capturing(made->driver, stream, 0));
    CHECK_OK(vattn_buffer_decommit(buffer, 0, 1, &fence, 1));
    CHECK_OK(vattn_buffer_destroy(buffer));
}

/* A tensor over a buffer keeps it, and no part of it committed. */
static void pinned(const world *made) {
    const vattn_fence idle = vattn_fence_idle();
    const int64_t rows[2] = {64, WORLD_GRANULE / 2}, beyond[2] = {65, WORLD_GRANULE / 2};
    vattn_buffer *buffer = world_buffer(made->driver);
    unsigned char *data = (unsigned char *)describe(buffer).data;
    vattn_pin *pin = NULL;
    vattn_pin_info info;
    vattn_array array;
    void *tensor = NULL, *out;
    CHECK_OK(vattn_buffer_commit(buffer, 0, 8 * WORLD_GRANULE));
    CHECK_OK(vattn_pin_create_buffer(buffer, &pin));
    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "out is NULL", vattn_pin_create_buffer(buffer, NULL));
    SIZED(info);
    CHECK_OK(vattn_pin_describe(pin, &info));
    CHECK(info.tokens == 0 && info.bytes == 8 * WORLD_GRANULE);
    SIZED(array);
    array.data = data;
    array.dtype = VATTN_DTYPE_BF16;
    array.ndim = 2;
    array.shape = beyond;
    CHECK_FAILS_OUT(VATTN_INVALID_ARGUMENT, "260 KiB from", out, vattn_pin_dlpack(pin, &array, 1, &out));
    array.shape = rows;
    array.data = data - 2;
    CHECK_FAILS_OUT(VATTN_INVALID_ARGUMENT, "reserves", out, vattn_pin_dlpack(pin, &array, 1, &out));
    array.data = data;
    CHECK_OK(vattn_pin_dlpack(pin, &array, 1, &tensor));

    CHECK_OK(vattn_buffer_decommit(buffer, 4 * WORLD_GRANULE, 4 * WORLD_GRANULE, &idle, 1));
    CHECK(describe(buffer).held == 4 * WORLD_GRANULE);
    check_fill(data, 0, 4 * WORLD_GRANULE);
    CHECK_OK(vattn_pin_destroy(pin));
    CHECK_OK(vattn_buffer_destroy(buffer));
    every_buffer_call_fails(buffer, VATTN_INVALID_HANDLE, "the vattn_buffer has been destroyed");
    CHECK(check_filled(data, 0, 4 * WORLD_GRANULE));
    CHECK_OK(vattn_dlpack_destroy(tensor, 1));
    world_none_alive(made->driver, 0);
}

/* Handles that are none, and a buffer that outlives its driver's handle. */
static void handles(world *made) {
    vattn_buffer *buffer = world_buffer(made->driver);
    every_buffer_call_fails(NULL, VATTN_INVALID_ARGUMENT, "the vattn_buffer is NULL");
    every_buffer_call_fails((vattn_buffer *)(void *)made->driver, VATTN_INVALID_HANDLE, "is no vattn_buffer");
    every_driver_call_fails(made, (vattn_driver *)(void *)buffer, VATTN_INVALID_HANDLE, "is no vattn_driver");
    CHECK_OK(vattn_buffer_commit(buffer, 0, WORLD_GRANULE));
    CHECK_OK(vattn_buffer_destroy(buffer));
    every_buffer_call_fails(buffer, VATTN_INVALID_HANDLE, "the vattn_buffer has been destroyed");
    world_none_alive(made->driver, 0);

    buffer = world_buffer(made->driver);
    CHECK_OK(vattn_driver_destroy(made->driver));
    CHECK_OK(vattn_buffer_commit(buffer, 0, WORLD_GRANULE));
    check_fill(describe(buffer).data, 0, WORLD_GRANULE);
    CHECK_OK(vattn_buffer_destroy(buffer));
    CHECK_OK(vattn_driver_create_checked(made->host, &made->driver));
}

int main(void) {
    world made;
    world_make(&made, VATTN_BACKGROUND_OFF);
    CHECK_OK(vattn_cache_destroy(made.cache));
    made.cache = NULL;
    making(&made);
    rows(&made);
    refused(&made);
    failing(&made);
    streams(&made);
    pinned(&made);
    handles(&made);
    world_end(&made);
    return check_end();
}
