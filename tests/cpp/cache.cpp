/* The life of slots, and the memory behind them: every call, done right and done wrong. */
#include "check.hpp"

#include <limits>
#include <memory>
#include <vector>

using vattn::Background;
using vattn::Cache;
using vattn::Fence;
using vattn::Slot;

static const Fence idle = Fence::idle();

static void slots() {
    World world;
    Cache& cache = world.cache;
    std::vector<Slot> taken;
    for (int i = 0; i < 4; ++i) taken.push_back(cache.acquire(10));
    THROWS(NoFreeSlot, NoFreeSlot, "vattn_cache_acquire: ", cache.acquire(10));
    THROWS(NoFreeSlot, NoFreeSlot, "vattn_cache_acquire_on: ", cache.acquire_on(10, stream(1)));
    cache.step({{taken[0], 10}});
    cache.retire(taken[0], Fence::stream(stream(2)));
    const Slot next = cache.acquire_on(10, stream(1));
    CHECK(next.index == taken[0].index && next.generation == taken[0].generation + 1);
    CHECK(!same(next, taken[0]));
    CHECK(cache.stats().adopted == 1 && cache.stats().acquired == 5 && cache.stats().retired == 1);

    THROWS(StaleSlot, StaleSlot, "vattn_cache_step: ", cache.step({{taken[0], 20}}));
    THROWS(StaleSlot, StaleSlot, "vattn_cache_retire: ", cache.retire(taken[0], idle));
    THROWS(StaleSlot, StaleSlot, "", cache.truncate(taken[0], 0, idle));
    THROWS(StaleSlot, StaleSlot, "", cache.prefetch({{taken[0], 20}}));
    THROWS(StaleSlot, StaleSlot, "", cache.fits({{taken[0], 20}}));
    World other;
    const Slot foreign = other.cache.acquire(1);
    THROWS(Error, ForeignSlot, "", cache.step({{foreign, 20}}));
    THROWS(Error, InvalidArgument, "vattn_cache_retire: ", cache.retire(next, {}));
    THROWS(Error, InvalidArgument, "", cache.retire(next, vattn_fence{9, 0, nullptr}));
    world.host.hold(stream(4));
    cache.step({{taken[1], 10}});
    cache.retire(taken[1], Fence::stream(stream(4)));
    world.host.set_capturing(stream(3), true);
    THROWS(Error, CapturingStream, "vattn_cache_acquire_on: ", cache.acquire_on(1, stream(3)));
    CHECK(cache.stats().active_slots == 3);
    world.host.fire(stream(4));
}

static void steps() {
    World world;
    Cache& cache = world.cache;
    const Slot a = cache.acquire(1);
    const Slot b = cache.acquire(1);
    cache.step({{a, 100}, {b, 10}});
    const vattn::Bytes before = cache.bytes();
    THROWS(Error, DuplicateSlot, "vattn_cache_step: ", cache.step({{a, 120}, {a, 130}}));
    THROWS(Error, TooManyTokens, "257", cache.step({{b, 20}, {a, 257}}));
    THROWS(Error, FewerTokens, "", cache.step({{b, 20}, {a, 99}}));
    // The half of a step that could be done is not.
    CHECK(cache.bytes().needed == before.needed && before.needed == 110 * 192);
    CHECK(cache.bytes().held == before.held && before.held >= cache.bytes_for(100) + cache.bytes_for(10));
    CHECK(cache.bytes_for(0) == 0 && cache.bytes_for(256) == 12 * granule);
    THROWS(Error, InvalidArgument, "vattn_cache_bytes_for: ", cache.bytes_for(257));
    CHECK(cache.stats().steps == 1 && cache.stats().failures >= 3);
    cache.truncate(a, 50, {Fence::stream(stream(1)), Fence::stream(stream(2))});
    CHECK(cache.bytes().needed == 60 * 192);
    THROWS(Error, InvalidArgument, "vattn_cache_truncate: ", cache.truncate(a, 51, idle));
    THROWS(Error, InvalidArgument, "", cache.truncate(a, 50, {}));
}

static void scheduling() {
    World world;
    Cache& cache = world.cache;
    std::vector<vattn::SlotTokens> batch;
    for (int i = 0; i < 4; ++i) batch.push_back({cache.acquire(1), 256});
    const std::unique_ptr<bool[]> fits = cache.fits(batch);
    CHECK(fits[0] && fits[1] && fits[2] && !fits[3]);
    bool room[5] = {false, false, false, true, true};
    cache.fits(batch, room);
    CHECK(room[0] && room[1] && room[2] && !room[3] && room[4]);
    std::array<bool, 3> three{};
    THROWS(Error, InvalidArgument, "out has room for 3 answers, and 4 slots are asked about",
           cache.fits(batch, three));
    THROWS(Error, TooManyTokens, "vattn_cache_fits: ", cache.fits({{batch[0].slot, 257}}, three));
    CHECK(!three[0] && cache.fits({}) != nullptr);

    THROWS(OutOfBudget, OutOfBudget, "vattn_cache_step: ", cache.step(batch));
    CHECK(cache.bytes().needed == 0);
    cache.retire(batch[3].slot, idle);
    batch.pop_back();
    cache.step(batch);
    CHECK(cache.admits({1}) == 1 && cache.admits({256}) == 0 && cache.admits({}) == 0);
    CHECK(cache.admits({1, 1}) == 1);
    const std::vector<std::uint64_t> queue{20, 256, 1};
    CHECK(cache.admits(queue) == 1);
    cache.retire(batch[0].slot, idle);
    CHECK(cache.admits(queue) == 2 && cache.admits({256, 256}) == 1);
}

static void memory_goes_back() {
    World world;
    Cache& cache = world.cache;
    const Slot a = cache.acquire(1);
    const Slot b = cache.acquire(1);
    cache.step({{a, 256}, {b, 256}});
    cache.retire(a, idle);
    const vattn::Bytes before = cache.bytes();
    CHECK(before.parked >= 12 * granule && before.mapped == 12 * granule);
    CHECK(cache.reclaim(granule, idle) >= granule && cache.bytes().parked < before.parked);
    CHECK(cache.trim(12 * granule, {idle, Fence::stream(stream(4))}) == 12 * granule);
    CHECK(cache.bytes().held == 12 * granule);
    THROWS(Error, InvalidArgument, "vattn_cache_reclaim: ", cache.reclaim(1, {}));
    THROWS(Error, InvalidArgument, "vattn_cache_trim: ", cache.trim(0, {}));

    THROWS(OutOfBudget, OutOfBudget, "vattn_cache_set_budget: ", cache.set_budget(6 * granule));
    THROWS(Error, InvalidConfig, "", cache.set_budget(0));
    THROWS(Error, InvalidArgument, "give bytes", cache.set_budget(vattn::Auto));
    CHECK(cache.bytes().budget == 40 * granule);
    cache.set_budget(20 * granule);
    CHECK(cache.bytes().budget == 20 * granule);
    CHECK(cache.calls(vattn::Verb::Map).calls > 0 && cache.calls(vattn::Verb::Map).failed == 0);
    THROWS(Error, InvalidArgument, "", cache.calls(vattn::Verb::Any));
    CHECK(cache.stats().driver.calls >= cache.calls(vattn::Verb::Map).calls);
}

static void work_beside() {
    World world(small_config(Background::Caller).with_look_ahead(64));
    Cache& cache = world.cache;
    const Slot slot = cache.acquire(1);
    cache.prefetch({{slot, 256}});
    while (cache.tend()) {
    }
    CHECK(cache.bytes().ahead == 12 * granule);
    const std::uint64_t maps = cache.calls(vattn::Verb::Map).calls;
    cache.step({{slot, 256}});
    CHECK(cache.calls(vattn::Verb::Map).calls == maps && cache.stats().mapped_ahead > 0);
    THROWS(Error, TooManyTokens, "vattn_cache_prefetch: ", cache.prefetch({{slot, 257}}));

    World threaded(small_config(Background::Thread));
    THROWS(Error, InvalidArgument, "vattn_cache_tend: ", threaded.cache.tend());
    const Slot other = threaded.cache.acquire(1);
    threaded.cache.prefetch({{other, 256}});
    threaded.cache.flush();
    CHECK(threaded.cache.bytes().ahead == 12 * granule);
    threaded.driver.fail(vattn::Verb::Unmap, 1, vattn::Status::Driver);
    threaded.cache.retire(other, idle);
    threaded.cache.trim(0, idle);
    THROWS(Error, Driver, "vattn_cache_flush: ", threaded.cache.flush());
    threaded.cache.flush();
}

static void accounts() {
    World world;
    const Slot slot = world.cache.acquire(5);
    world.cache.step({{slot, 5}});
    CHECK(world.cache.stats_json().front() == '{' && world.cache.stats_json().back() == '}');
    CHECK(world.cache.report_json().find("\"slots\"") != std::string::npos);
    CHECK(world.cache.health() == vattn::Health::Healthy && world.cache.stats().max_slots == 4);
    CHECK(world.cache.stats().struct_size == sizeof(vattn::Stats) && world.cache.layout().slots == 4);
}

int main() {
    slots();
    steps();
    scheduling();
    memory_goes_back();
    work_beside();
    accounts();
    return check_end();
}
