/* Drivers: what each is, what is refused, and the devices of a machine that may have none. */
#include "sizes.h"
#include "world.h"

static void host(void) {
    vattn_host_options options;
    vattn_driver *driver = NULL, *out;
    vattn_driver_info info;
    uint64_t unused = 0, total = 0;
    SIZED(options);
    SIZED(info);
    options.capacity = (uint64_t)1 << 20;
    CHECK_OK(vattn_driver_create_host(&options, &driver));
    CHECK_OK(vattn_driver_describe(driver, &info));
    CHECK(strcmp(info.name, "host") == 0 && info.device_type == VATTN_DEVICE_CPU && info.device_id == 0);
    CHECK(info.granule == (uint64_t)2 << 20 && info.exportable == 0 && info.rdma == 0);
    CHECK_SIZES_OUT(vattn_driver_info, "out", vattn_driver_describe(driver, it));
    CHECK_OK(vattn_driver_memory(driver, &unused, &total));
    CHECK(unused <= total && total > 0);
    check_fill(&total, 0, sizeof total);
    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "out_free is NULL", vattn_driver_memory(driver, NULL, &total));
    CHECK(check_filled(&total, 0, sizeof total));
    CHECK_FAILS_OUT(VATTN_INVALID_ARGUMENT, "out_total is NULL", unused,
                    vattn_driver_memory(driver, &unused, NULL));
    CHECK_OK(vattn_driver_destroy(driver));
    CHECK_OK(vattn_driver_destroy(NULL));

    CHECK_SIZES_IN(vattn_host_options, "options", options, vattn_driver_create_host(it, &driver),
                   CHECK_OK(vattn_driver_destroy(driver)));
    options.granule = 5000;
    CHECK_FAILS_OUT(VATTN_INVALID_CONFIG, "5000 bytes", out, vattn_driver_create_host(&options, &out));
    options.granule = 1024;
    CHECK_FAILS_OUT(VATTN_INVALID_CONFIG, "at least one page", out, vattn_driver_create_host(&options, &out));
    options.granule = UINT64_MAX;
    CHECK_FAILS_OUT(VATTN_INVALID_CONFIG, "a granule of", out, vattn_driver_create_host(&options, &out));
    options.granule = 0;
    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "out is NULL", vattn_driver_create_host(&options, NULL));
    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "not a multiple of 8",
                vattn_driver_create_host(&options, (vattn_driver **)(void *)((char *)&out + 1)));
}

static void ledger(void) {
    vattn_ledger_options options;
    vattn_driver *driver = NULL, *out;
    vattn_driver_info info;
    uint64_t unused = 0, total = 0;
    SIZED(options);
    SIZED(info);
    options.granule = 65536;
    options.capacity = (uint64_t)80 << 30;
    CHECK_OK(vattn_driver_create_ledger(&options, &driver));
    CHECK_OK(vattn_driver_describe(driver, &info));
    CHECK(strcmp(info.name, "ledger") == 0 && info.granule == 65536);
    CHECK_OK(vattn_driver_memory(driver, &unused, &total));
    CHECK(unused == options.capacity && total == options.capacity);
    CHECK_OK(vattn_driver_destroy(driver));

    CHECK_SIZES_IN(vattn_ledger_options, "options", options, vattn_driver_create_ledger(it, &driver),
                   CHECK_OK(vattn_driver_destroy(driver)));
    options.granule = 3;
    CHECK_FAILS_OUT(VATTN_INVALID_CONFIG, "a granule of 3", out, vattn_driver_create_ledger(&options, &out));
    options.granule = (uint64_t)1 << 63;
    CHECK_FAILS_OUT(VATTN_INVALID_CONFIG, "256 TiB", out, vattn_driver_create_ledger(&options, &out));
    options.granule = 0;
    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "out is NULL", vattn_driver_create_ledger(&options, NULL));
}

/* A ledger can refuse addresses: the cache is not made, and nothing is left of it. */
static void too_few_addresses(void) {
    vattn_ledger_options options;
    vattn_driver *inner = NULL, *driver = NULL;
    vattn_geometry *geometry = world_geometry();
    vattn_config config = world_config(VATTN_BACKGROUND_OFF);
    vattn_cache *cache;
    SIZED(options);
    options.granule = WORLD_GRANULE;
    options.capacity = (uint64_t)1 << 30;
    options.addresses = 65536;
    CHECK_OK(vattn_driver_create_ledger(&options, &inner));
    CHECK_OK(vattn_driver_create_checked(inner, &driver));
    CHECK_FAILS_OUT(VATTN_OUT_OF_ADDRESS_SPACE, "fewer slots", cache,
                    vattn_cache_create(&config, geometry, driver, &cache));
    world_none_alive(driver, 0);
    CHECK_OK(vattn_driver_destroy(driver));
    CHECK_OK(vattn_driver_destroy(inner));
    CHECK_OK(vattn_geometry_destroy(geometry));
}

static void checked(void) {
    vattn_driver *inner = world_host(), *driver = NULL;
    vattn_driver_info info;
    vattn_live live;
    uint64_t calls = 0, failed = 0, unused, total;
    SIZED(info);
    CHECK_OK(vattn_driver_create_checked(inner, &driver));
    CHECK_OK(vattn_driver_describe(driver, &info));
    CHECK(info.granule == WORLD_GRANULE);
    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "out is NULL", vattn_driver_create_checked(inner, NULL));

    CHECK_OK(vattn_driver_fail(driver, VATTN_VERB_MEMORY_INFO, 2, 0, VATTN_DRIVER));
    CHECK_OK(vattn_driver_memory(driver, &unused, &total));
    check_fill(&total, 0, sizeof total);
    CHECK_FAILS_OUT(VATTN_DRIVER, "memory_info", unused, vattn_driver_memory(driver, &unused, &total));
    CHECK(check_filled(&total, 0, sizeof total));
    CHECK_OK(vattn_driver_memory(driver, &unused, &total));
    CHECK_OK(vattn_driver_calls(driver, VATTN_VERB_MEMORY_INFO, &calls, &failed));
    CHECK(calls == 3 && failed == 1);
    CHECK_OK(vattn_driver_fail(driver, VATTN_ANY_VERB, 1, 1, VATTN_OUT_OF_DEVICE_MEMORY));
    CHECK_FAILS(VATTN_OUT_OF_DEVICE_MEMORY, "memory_info", vattn_driver_memory(driver, &unused, &total));
    CHECK_FAILS(VATTN_OUT_OF_DEVICE_MEMORY, "memory_info", vattn_driver_memory(driver, &unused, &total));
    CHECK_OK(vattn_driver_clear_failures(driver));
    CHECK_OK(vattn_driver_memory(driver, &unused, &total));

    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "nth is 0", vattn_driver_fail(driver, VATTN_ANY_VERB, 0, 0, VATTN_DRIVER));
    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "onward is 2", vattn_driver_fail(driver, VATTN_ANY_VERB, 1, 2, VATTN_DRIVER));
    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "verb is 14", vattn_driver_fail(driver, 14, 1, 0, VATTN_DRIVER));
    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "verb is -2", vattn_driver_fail(driver, -2, 1, 0, VATTN_DRIVER));
    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "status is 0", vattn_driver_fail(driver, VATTN_ANY_VERB, 1, 0, VATTN_OK));
    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "from 1 to 20",
                vattn_driver_fail(driver, VATTN_ANY_VERB, 1, 0, VATTN_FORKED));
    check_fill(&failed, 0, sizeof failed);
    CHECK_FAILS_OUT(VATTN_INVALID_ARGUMENT, "verb is 99", calls, vattn_driver_calls(driver, 99, &calls, &failed));
    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "out_calls is NULL", vattn_driver_calls(driver, 0, NULL, &failed));
    CHECK(check_filled(&failed, 0, sizeof failed));
    CHECK_FAILS_OUT(VATTN_INVALID_ARGUMENT, "out_failed is NULL", calls,
                    vattn_driver_calls(driver, 0, &calls, NULL));
    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "out is NULL", vattn_driver_live(driver, NULL));

    CHECK_FAILS(VATTN_UNSUPPORTED, "vattn_driver_create_checked",
                vattn_driver_fail(inner, VATTN_ANY_VERB, 1, 0, VATTN_DRIVER));
    CHECK_FAILS(VATTN_UNSUPPORTED, "vattn_driver_create_checked", vattn_driver_clear_failures(inner));
    CHECK_FAILS_OUT(VATTN_UNSUPPORTED, "vattn_driver_create_checked", live, vattn_driver_live(inner, &live));
    CHECK_FAILS_OUT(VATTN_UNSUPPORTED, "vattn_driver_create_checked", calls,
                    vattn_driver_calls(inner, 0, &calls, &failed));
    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "capturing is 2", vattn_driver_set_capturing(driver, NULL, 2));
    /* The inner one may go first. */
    CHECK_OK(vattn_driver_destroy(inner));
    CHECK_OK(vattn_driver_memory(driver, &unused, &total));
    world_none_alive(driver, 0);
    CHECK_OK(vattn_driver_destroy(driver));
}

/* What can be refused of a GPU without having one. */
static void cuda_refused(void) {
    vattn_cuda_options options;
    vattn_driver *out;
    vattn_cuda_device device;
    SIZED(options);
    SIZED(device);
    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "out is NULL", vattn_cuda_device_count(NULL));
    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "out is NULL", vattn_driver_create_cuda(NULL, NULL));
    {
        SIZES_ROOM(vattn_cuda_device);
        SIZES_REFUSED(vattn_cuda_device, "out", vattn_cuda_device_describe(0, it));
    }
    {
        const size_t beyond = sizeof(vattn_cuda_options) + 8;
        SIZES_ROOM(vattn_cuda_options);
        /* NULL stands for the defaults here. */
        room.size = 1;
        CHECK_FAILS_OUT(VATTN_INVALID_ARGUMENT, "options->struct_size is 1", out, vattn_driver_create_cuda(it, &out));
        room.size = SIZE_MAX;
        CHECK_FAILS_OUT(VATTN_INVALID_ARGUMENT, "options->struct_size is", out, vattn_driver_create_cuda(it, &out));
        memset(&room, 0, sizeof room);
        room.size = beyond;
        room.bytes[beyond - 1] = 1;
        CHECK_FAILS_OUT(VATTN_INVALID_ARGUMENT, "is set", out, vattn_driver_create_cuda(it, &out));
    }
    options.ordinal = -2;
    CHECK_FAILS_OUT(VATTN_INVALID_ARGUMENT, "options->ordinal is -2", out, vattn_driver_create_cuda(&options, &out));
    options.ordinal = 0;
    options.exportable = 2;
    CHECK_FAILS_OUT(VATTN_INVALID_ARGUMENT, "options->exportable is 2", out,
                    vattn_driver_create_cuda(&options, &out));
    options.exportable = 0;
    options.rdma = UINT32_MAX;
    CHECK_FAILS_OUT(VATTN_INVALID_ARGUMENT, "options->rdma is 4294967295", out,
                    vattn_driver_create_cuda(&options, &out));
    options.rdma = 0;
    options.reserved = 1;
    CHECK_FAILS_OUT(VATTN_INVALID_ARGUMENT, "options->reserved is 1", out,
                    vattn_driver_create_cuda(&options, &out));
}

static void cuda(void) {
    uint32_t count;
    vattn_cuda_device device;
    vattn_driver *driver;
    SIZED(device);
    check_fill(&count, 0, sizeof count);
    if (vattn_cuda_device_count(&count) == VATTN_OK) {
        CHECK_OK(vattn_cuda_device_count(&count));
        CHECK(count > 0);
        CHECK_OK(vattn_cuda_device_describe(0, &device));
        CHECK(device.struct_size == sizeof device && device.memory > 0 && device.name[0] != 0);
        CHECK_FAILS_SIZED(VATTN_INVALID_ARGUMENT, "ordinal is 4294967295", device,
                          vattn_cuda_device_describe(UINT32_MAX, &device));
        CHECK_OK(vattn_driver_create_cuda(NULL, &driver));
        CHECK_FAILS(VATTN_UNSUPPORTED, "streams are the device's own", vattn_driver_hold(driver, NULL));
        CHECK_FAILS(VATTN_UNSUPPORTED, "streams are the device's own", vattn_driver_fire(driver, NULL));
        CHECK_FAILS(VATTN_UNSUPPORTED, "streams are the device's own",
                    vattn_driver_set_capturing(driver, NULL, 1));
        CHECK_OK(vattn_driver_destroy(driver));
        return;
    }
    printf("there is no GPU here: the calls that need one are seen to be refused, and no more\n");
    CHECK(check_filled(&count, 0, sizeof count));
    CHECK_FAILS_OUT(VATTN_UNSUPPORTED, "", count, vattn_cuda_device_count(&count));
    CHECK_FAILS_SIZED(VATTN_UNSUPPORTED, "", device, vattn_cuda_device_describe(0, &device));
    CHECK_FAILS_OUT(VATTN_UNSUPPORTED, "", driver, vattn_driver_create_cuda(NULL, &driver));
}

int main(void) {
    host();
    ledger();
    too_few_addresses();
    checked();
    cuda_refused();
    cuda();
    return check_end();
}
