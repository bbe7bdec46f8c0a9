/* Drivers: what they are, which are there, and how they are made to fail. */
#include "check.hpp"

using vattn::Driver;
using vattn::Fence;
using vattn::Status;
using vattn::Verb;

static void host() {
    const Driver driver = Driver::host({1 << 20, granule, 100});
    const vattn::DriverInfo info = driver.info();
    CHECK(info.name == "host" && info.device_type == vattn::DeviceType::Cpu && info.device_id == 0);
    CHECK(info.granule == granule && !info.exportable && !info.rdma);
    CHECK(driver.memory().total == 1 << 20 && driver.memory().free == 1 << 20);
    CHECK(Driver::host({std::uint64_t{1} << 30}).info().granule == 2 << 20);
    THROWS(Error, InvalidConfig, "vattn_driver_create_host: ", Driver::host({1 << 20, 5000}));
}

static void ledger() {
    vattn::LedgerOptions options;
    options.capacity = std::uint64_t{1} << 45;
    options.addresses = 1 << 24;
    const Driver driver = Driver::ledger(options);
    CHECK(driver.info().name == "ledger" && driver.memory().total == options.capacity);
    const vattn::Geometry model = vattn::Geometry::preset("llama-3-8b");
    THROWS(Error, OutOfAddressSpace, "", vattn::Cache(vattn::Config(), model, driver));
    THROWS(Error, InvalidConfig, "", Driver::ledger({1 << 20, 3}));
}

static void cuda() {
    const Caught none = catch_from([] {
        if (vattn::cuda_device_count() == 0) throw vattn::Unsupported(Status::Unsupported, "none");
    });
    if (none.kind == "nothing") {
        const vattn::CudaDevice device = vattn::cuda_device(0);
        CHECK(!device.name.empty() && device.memory > 0 && device.major_version > 0);
        THROWS(Error, InvalidArgument, "", vattn::cuda_device(4711));
        THROWS(Error, InvalidArgument, "", Driver::cuda({4711}));
        CHECK(Driver::cuda().info().name == "cuda" && Driver::cuda({0}).info().device_id == 0);
    } else {
        std::puts("SKIP: no GPU; only that it is said");
        CHECK(none.kind == "Unsupported" && none.error->status() == Status::Unsupported);
        THROWS(Unsupported, Unsupported, "vattn_driver_create_cuda: ", Driver::cuda());
        THROWS(Unsupported, Unsupported, "vattn_cuda_device_describe: ", vattn::cuda_device(0));
    }
}

static void failures() {
    World world;
    Driver& driver = world.driver;
    const vattn::Slot slot = world.cache.acquire(1);
    const std::uint64_t maps = driver.calls(Verb::Map).calls;
    CHECK(driver.calls().calls > maps && driver.calls().failed == 0);

    driver.fail(Verb::Map, 2, Status::OutOfMappings);
    THROWS(Error, OutOfMappings, "vattn_cache_step: ", world.cache.step({{slot, 256}}));
    CHECK(driver.calls(Verb::Map).calls == maps + 2 && driver.calls(Verb::Map).failed == 1);
    world.cache.step({{slot, 100}});
    driver.fail(Verb::Any, 1, Status::Driver, true);
    THROWS(Error, Driver, "", world.cache.step({{slot, 256}}));
    THROWS(Error, Driver, "", world.cache.step({{slot, 256}}));
    driver.clear_failures();
    world.cache.step({{slot, 256}});

    THROWS(Error, InvalidArgument, "vattn_driver_fail: ", driver.fail(Verb::Map, 0, Status::Driver));
    THROWS(Error, InvalidArgument, "", driver.fail(Verb::Map, 1, Status::Ok));
    THROWS(Error, InvalidArgument, "", driver.fail(static_cast<Verb>(99), 1, Status::Driver));
    THROWS(Error, InvalidArgument, "", driver.calls(static_cast<Verb>(99)));
    THROWS(Unsupported, Unsupported, "vattn_driver_fail: ", world.host.fail(Verb::Map, 1, Status::Driver));
    THROWS(Unsupported, Unsupported, "", world.host.clear_failures());
    THROWS(Unsupported, Unsupported, "", world.host.calls());
    THROWS(Unsupported, Unsupported, "", world.host.live());
    CHECK(!none_alive(driver));
    world.cache.close();
    CHECK(none_alive(driver));
}

static void streams() {
    World world;
    world.host.hold(stream(1));
    vattn::Slot slot = world.cache.acquire(1);
    world.cache.step({{slot, 256}});
    const std::uint64_t held = world.cache.bytes().held;
    world.cache.retire(slot, Fence::stream(stream(1)));
    world.host.fire(stream(1));
    CHECK(world.cache.trim(0, Fence::idle()) == 0 && held > 0);

    slot = world.cache.acquire(1);
    world.host.set_capturing(stream(2), true);
    THROWS(Error, CapturingStream, "vattn_cache_retire: ",
           world.cache.retire(slot, Fence::stream(stream(2))));
    world.host.set_capturing(stream(2), false);
    world.cache.retire(slot, Fence::stream(stream(2)));
    // A checked driver hands it on.
    slot = world.cache.acquire(1);
    world.driver.set_capturing(stream(2), true);
    THROWS(Error, CapturingStream, "", world.cache.retire(slot, Fence::stream(stream(2))));
}

int main() {
    host();
    ledger();
    cuda();
    failures();
    streams();
    return check_end();
}
