/* Who owns a handle: moving, adopting, giving away, closing, and in which order things end. */
#include "check.hpp"

#include <sys/wait.h>
#include <type_traits>
#include <unistd.h>

template <class T>
constexpr bool move_only =
    !std::is_copy_constructible<T>::value && !std::is_copy_assignable<T>::value &&
    std::is_nothrow_move_constructible<T>::value && std::is_nothrow_move_assignable<T>::value &&
    std::is_nothrow_destructible<T>::value && std::is_nothrow_default_constructible<T>::value &&
    !std::is_polymorphic<T>::value && sizeof(T) == sizeof(void*);

static_assert(move_only<vattn::Geometry> && move_only<vattn::Driver>, "handles");
static_assert(move_only<vattn::Cache> && move_only<vattn::Pin>, "handles");
static_assert(move_only<vattn::Buffer>, "handles");
static_assert(!std::is_convertible<vattn_cache*, vattn::Cache>::value, "taking over is said aloud");
static_assert(!std::is_convertible<vattn::Cache, bool>::value, "no number by accident");
static_assert(!std::is_constructible<vattn::Cache, vattn_driver*>::value, "a handle of another kind");
static_assert(!std::is_default_constructible<vattn::Fence>::value, "there is no implicit fence");
static_assert(std::is_nothrow_copy_constructible<vattn::Error>::value, "copying an exception throws none");

static void moves() {
    World world;
    vattn::Cache& cache = world.cache;
    vattn_cache* const handle = cache.get();
    CHECK(cache && handle != nullptr);

    vattn::Cache moved(std::move(cache));
    CHECK(!cache && cache.get() == nullptr && moved.get() == handle);
    cache = std::move(moved);
    CHECK(!moved && cache.get() == handle);
    vattn::Cache& itself = cache;
    cache = std::move(itself);
    CHECK(cache.get() == handle && cache.health() == vattn::Health::Healthy);

    vattn::Cache second(small_config(), world.geometry, world.driver);
    CHECK(world.driver.live().reservations == 4);
    cache = std::move(second);
    // The one that it had is gone.
    CHECK(world.driver.live().reservations == 2 && cache.get() != handle);
    CHECK(vattn_cache_flush(handle) == VATTN_INVALID_HANDLE);
    std::swap(cache, moved);
    CHECK(moved && !cache);
    cache = vattn::Cache();
    moved = vattn::Cache();
    CHECK(none_alive(world.driver));
}

static void empty_handles() {
    vattn::Cache cache;
    vattn::Driver driver;
    vattn::Geometry geometry;
    const vattn::Fence idle = vattn::Fence::idle();
    bool room[1];
    const vattn::SlotTokens one{{0, 1, 1}, 5};
    THROWS(Error, InvalidArgument, "vattn_cache_layout: ", cache.layout());
    THROWS(Error, InvalidArgument, "is NULL", cache.bytes_for(1));
    THROWS(Error, InvalidArgument, "is NULL", cache.view(0, vattn::Part::Key));
    THROWS(Error, InvalidArgument, "is NULL", cache.paged_view(0, vattn::Part::Key));
    THROWS(Error, InvalidArgument, "is NULL", cache.token_view(0, vattn::Part::Key));
    THROWS(Error, InvalidArgument, "is NULL", cache.acquire(1));
    THROWS(Error, InvalidArgument, "is NULL", cache.acquire_on(1, nullptr));
    THROWS(Error, InvalidArgument, "is NULL", cache.step({one}));
    THROWS(Error, InvalidArgument, "is NULL", cache.fits({one}, room));
    THROWS(Error, InvalidArgument, "is NULL", cache.fits({one}));
    THROWS(Error, InvalidArgument, "is NULL", cache.admits({1}));
    THROWS(Error, InvalidArgument, "is NULL", cache.prefetch({one}));
    THROWS(Error, InvalidArgument, "is NULL", cache.truncate(one.slot, 1, idle));
    THROWS(Error, InvalidArgument, "is NULL", cache.retire(one.slot, idle));
    THROWS(Error, InvalidArgument, "is NULL", cache.reclaim(1, idle));
    THROWS(Error, InvalidArgument, "is NULL", cache.trim(1, idle));
    THROWS(Error, InvalidArgument, "is NULL", cache.set_budget(1));
    THROWS(Error, InvalidArgument, "is NULL", cache.tend());
    THROWS(Error, InvalidArgument, "is NULL", cache.flush());
    THROWS(Error, InvalidArgument, "is NULL", cache.health());
    THROWS(Error, InvalidArgument, "is NULL", cache.bytes());
    THROWS(Error, InvalidArgument, "is NULL", cache.stats());
    THROWS(Error, InvalidArgument, "is NULL", cache.calls(vattn::Verb::Map));
    THROWS(Error, InvalidArgument, "is NULL", cache.stats_json());
    THROWS(Error, InvalidArgument, "is NULL", cache.report_json());
    THROWS(Error, InvalidArgument, "is NULL", cache.pin(one.slot));
    THROWS(Error, InvalidArgument, "is NULL", cache.pin_addresses());
    THROWS(Error, InvalidArgument, "is NULL", vattn::Pin().info());
    THROWS(Error, InvalidArgument, "is NULL", vattn::Pin().dlpack(room, vattn::Dtype::U8, {1}));
    THROWS(Error, InvalidArgument, "is NULL", geometry.info());
    THROWS(Error, InvalidArgument, "is NULL", geometry.layer(0));
    THROWS(Error, InvalidArgument, "is NULL", geometry.tile_tokens("fa3-decode"));
    THROWS(Error, InvalidArgument, "is NULL", driver.info());
    THROWS(Error, InvalidArgument, "is NULL", driver.memory());
    THROWS(Error, InvalidArgument, "is NULL", driver.fail(vattn::Verb::Map, 1, vattn::Status::Driver));
    THROWS(Error, InvalidArgument, "is NULL", driver.clear_failures());
    THROWS(Error, InvalidArgument, "is NULL", driver.calls());
    THROWS(Error, InvalidArgument, "is NULL", driver.live());
    THROWS(Error, InvalidArgument, "is NULL", driver.hold(nullptr));
    THROWS(Error, InvalidArgument, "is NULL", driver.fire(nullptr));
    THROWS(Error, InvalidArgument, "is NULL", driver.set_capturing(nullptr, true));
    THROWS(Error, InvalidArgument, "is NULL", vattn::Driver::checked(driver));
    THROWS(Error, InvalidArgument, "is NULL", vattn::Cache(vattn::Config(), geometry, small_host()));
    THROWS(Error, InvalidArgument, "is NULL", vattn::Cache(vattn::Config(), small_geometry(), driver));
    THROWS(Error, InvalidArgument, "is NULL", vattn::plan_layout(vattn::Config(), geometry, granule));
    cache.close();
    driver.close();
    geometry.close();
    CHECK(cache.release() == nullptr);
}

static void giving_away_and_taking_over() {
    World world;
    vattn_cache* handle = world.cache.release();
    CHECK(!world.cache && vattn_cache_flush(handle) == VATTN_OK);
    {
        const vattn::Cache taken(handle);
        CHECK(taken.get() == handle && taken.health() == vattn::Health::Healthy);
    }
    CHECK(vattn_cache_flush(handle) == VATTN_INVALID_HANDLE && none_alive(world.driver));

    vattn_geometry* model = nullptr;
    CHECK(vattn_geometry_create_preset("llama-3-8b", 1, VATTN_DTYPE_MODEL, &model) == VATTN_OK);
    CHECK(vattn::Geometry(model).info().layers == 32);
    CHECK(vattn_geometry_destroy(model) == VATTN_INVALID_HANDLE);
    vattn::Driver driver(small_host().release());
    CHECK(driver.info().granule == granule);
}

static void closing() {
    World world;
    vattn_cache* const handle = world.cache.get();
    world.cache.close();
    CHECK(!world.cache && none_alive(world.driver));
    world.cache.close();

    // Destroyed behind its back: closing says so and keeps what it has, the destructor is silent.
    vattn::Geometry geometry = small_geometry();
    CHECK(vattn_geometry_destroy(geometry.get()) == VATTN_OK);
    THROWS(Error, InvalidHandle, "vattn_geometry_destroy: ", geometry.close());
    CHECK(geometry.get() != nullptr);
    const vattn::Cache stale(handle);
    THROWS(Error, InvalidHandle, "vattn_cache_health: ", stale.health());
}

static void any_order() {
    vattn::Driver checked;
    vattn::Cache cache;
    {
        const vattn::Geometry geometry = small_geometry();
        const vattn::Driver host = small_host();
        checked = vattn::Driver::checked(host);
        cache = vattn::Cache(small_config(vattn::Background::Thread), geometry, checked);
    }
    const vattn::Slot slot = cache.acquire(10);
    cache.step({{slot, 10}});
    cache.view(1, vattn::Part::Value).typed<std::uint16_t>().at(slot.index, 9, 1, 7) = 5;
    checked.close();
    cache.step({{slot, 200}});
    CHECK(cache.view(1, vattn::Part::Value).typed<std::uint16_t>().at(slot.index, 9, 1, 7) == 5);
}

static void a_constructor_that_throws_leaves_nothing() {
    World world;
    const vattn::Live before = world.driver.live();
    vattn::Cache cache;
    THROWS(Error, InvalidConfig, "vattn_cache_create: ",
           cache = vattn::Cache(small_config().with_max_slots(0), world.geometry, world.driver));
    world.driver.fail(vattn::Verb::Reserve, 2, vattn::Status::OutOfAddressSpace);
    THROWS(Error, OutOfAddressSpace, "", cache = vattn::Cache(small_config(), world.geometry, world.driver));
    CHECK(!cache && world.driver.live().reservations == before.reservations);
}

static void a_child_after_fork() {
    World world;
    const pid_t child = fork();
    if (child == 0) {
        const Caught caught = catch_from([&] { world.cache.flush(); });
        const Caught closing = catch_from([&] { world.cache.close(); });
        bool good = caught.kind == "Error" && caught.error->status() == vattn::Status::Forked;
        good = good && closing.kind == "Error" && closing.error->status() == vattn::Status::Forked;
        {
            const vattn::Cache ends = std::move(world.cache);
        }
        good = good && !world.cache;
        _exit(good ? 0 : 1);
    }
    int status = -1;
    CHECK(child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    CHECK(world.cache.health() == vattn::Health::Healthy);
}

int main() {
    moves();
    empty_handles();
    giving_away_and_taking_over();
    closing();
    any_order();
    a_constructor_that_throws_leaves_nothing();
    a_child_after_fork();
    return check_end();
}
