/* What a server calls in every iteration allocates nothing on this side of the ABI. */
#include "check.hpp"

#include <cstdlib>
#include <new>

static std::atomic<unsigned long> allocated{0};

void* operator new(std::size_t size) {
    ++allocated;
    if (void* place = std::malloc(size)) return place;
    throw std::bad_alloc();
}
void operator delete(void* place) noexcept { std::free(place); }
void operator delete(void* place, std::size_t) noexcept { std::free(place); }

int main() {
    World world(small_config(vattn::Background::Caller));
    vattn::Cache& cache = world.cache;
    bool fits[2];
    const unsigned long before = allocated;
    for (std::uint64_t round = 1; round <= 20; ++round) {
        const vattn::Slot a = cache.acquire(round);
        const vattn::Slot b = cache.acquire_on(round, stream(1));
        cache.fits({{a, round}, {b, round}}, fits);
        cache.step({{a, round}, {b, round}});
        cache.prefetch({{a, round + 100}});
        cache.tend();
        CHECK(cache.admits({round, 1}) == 2 && cache.health() == vattn::Health::Healthy);
        CHECK(cache.bytes().needed > 0 && cache.stats().steps == round);
        CHECK(cache.view(0, vattn::Part::Key).slot(a.index).typed<std::uint16_t>().shape(0) == 1);
        cache.truncate(a, 0, vattn::Fence::stream(stream(2)));
        cache.retire(a, {vattn::Fence::stream(stream(1)), vattn::Fence::stream(stream(2))});
        cache.retire(b, vattn::Fence::idle());
    }
    CHECK(allocated == before);
    // Texts do, which shows that this counts.
    CHECK(!cache.stats_json().empty() && allocated > before);
    return check_end();
}
