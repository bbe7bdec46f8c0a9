/* What is thrown: the class for each status, the text, the driver's own words. */
#include "check.hpp"

#include <cstring>

using vattn::Status;

static void classes() {
    const std::pair<Status, const char*> kinds[] = {
        {Status::OutOfBudget, "OutOfBudget"}, {Status::OutOfDeviceMemory, "OutOfDeviceMemory"},
        {Status::NoFreeSlot, "NoFreeSlot"},   {Status::StaleSlot, "StaleSlot"},
        {Status::Unsupported, "Unsupported"}, {Status::DeviceLost, "Broken"},
        {Status::Unhealthy, "Broken"},        {Status::Panic, "Broken"},
    };
    for (std::int32_t number = 1; number < 110; ++number) {
        const auto status = static_cast<Status>(number);
        const char* wanted = "Error";
        for (const auto& [known, kind] : kinds) {
            if (known == status) wanted = kind;
        }
        const Caught caught = catch_from([&] { vattn::detail::raise(status, "some text"); });
        CHECK(caught.kind == wanted);
        CHECK(caught.error && caught.error->status() == status && caught.error->driver() == nullptr);
        CHECK(caught.error && std::string(caught.error->what()) == "some text");
    }
    CHECK(std::strcmp(vattn::name(Status::OutOfBudget), "out_of_budget") == 0);
    CHECK(std::strcmp(vattn::name(static_cast<Status>(77)), "unknown") == 0);
}

static void a_driver_that_fails() {
    World world;
    const vattn::Slot slot = world.cache.acquire(8);
    world.driver.fail(vattn::Verb::Create, 1, Status::OutOfDeviceMemory, true);
    const Caught caught = catch_from([&] { world.cache.step({{slot, 100}}); });
    CHECK(caught.kind == "OutOfDeviceMemory");
    const vattn::DriverFailure* failure = caught.error ? caught.error->driver() : nullptr;
    if (CHECK(failure != nullptr)) {
        CHECK(failure->verb == vattn::Verb::Create);
        CHECK(failure->bytes > 0 && failure->bytes % granule == 0);
        CHECK(std::string(caught.error->what()).find("vattn_cache_step: ") == 0);
        CHECK(std::memchr(failure->name.data(), '\0', failure->name.size()) != nullptr);
        const vattn::Error copy = *caught.error;
        CHECK(copy.driver() != failure && copy.driver()->verb == vattn::Verb::Create);
    }
    world.driver.clear_failures();

    world.driver.fail(vattn::Verb::Map, 1, Status::Driver);
    const Caught other = catch_from([&] { world.cache.step({{slot, 100}}); });
    CHECK(other.kind == "Error" && other.error->status() == Status::Driver);
    CHECK(other.error->driver() != nullptr && other.error->driver()->verb == vattn::Verb::Map);
    CHECK(world.cache.bytes().needed == 0);
    world.cache.step({{slot, 100}});
    CHECK(world.cache.bytes().needed > 0);
    // What succeeded since has nothing to do with an error that was thrown before.
    CHECK(other.error->driver()->verb == vattn::Verb::Map);
}

static void a_lost_device() {
    World world;
    const vattn::Slot slot = world.cache.acquire(8);
    world.driver.fail(vattn::Verb::Create, 1, Status::DeviceLost);
    THROWS(Broken, DeviceLost, "vattn_cache_step: ", world.cache.step({{slot, 100}}));
    CHECK(world.cache.health() == vattn::Health::Failed);
    THROWS(Broken, Unhealthy, "vattn_cache_step: ", world.cache.step({{slot, 100}}));
    THROWS(Broken, Unhealthy, "vattn_cache_acquire: ", world.cache.acquire(1));
    CHECK(world.cache.stats().health == static_cast<std::int32_t>(vattn::Health::Failed));
    CHECK(world.cache.view(0, vattn::Part::Key).data() != nullptr);
}

static void long_texts() {
    // The list of presets is longer than any buffer that one would guess.
    const Caught caught = catch_from([] { vattn::Geometry::preset(std::string(5000, 'x')).close(); });
    CHECK(caught.kind == "Error" && caught.error->status() == Status::InvalidGeometry);
    const std::string text = caught.error->what();
    CHECK(text.find("vattn_geometry_create_preset: ") == 0 && text.find("llama-3-8b") != std::string::npos);
    CHECK(text.find('\0') == std::string::npos);
}

int main() {
    classes();
    a_driver_that_fails();
    a_lost_device();
    long_texts();
    CHECK(vattn::probe_json().find("\"abi_version\":") != std::string::npos);
    CHECK(std::string(vattn::version()).find('.') != std::string::npos);
    vattn::check_abi();
    return check_end();
}
