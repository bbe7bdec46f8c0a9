/* Whatever an array, or a fence, can be made from. */
#include "check.hpp"

#include <array>
#include <numeric>
#include <type_traits>
#include <vector>
#if __cplusplus >= 202002L
#include <span>
#endif

using vattn::Fence;
using vattn::Fences;
using vattn::Slot;
using vattn::SlotTokens;
using vattn::Span;

template <class To, class From>
constexpr bool becomes = std::is_convertible<From, To>::value;

static_assert(becomes<Span<const int>, std::vector<int>&> &&
                  becomes<Span<const int>, const std::vector<int>&>, "");
static_assert(becomes<Span<int>, std::vector<int>&> && !becomes<Span<int>, const std::vector<int>&>, "");
static_assert(becomes<Span<const int>, Span<int>> && !becomes<Span<int>, Span<const int>>, "");
static_assert(becomes<Span<const int>, int (&)[3]> &&
                  becomes<Span<const int>, const std::array<int, 3>&>, "");
static_assert(!becomes<Span<const int>, std::vector<long>&> && !becomes<Span<const int>, int*>, "");
static_assert(!becomes<Span<bool>, std::vector<bool>&> &&
                  !becomes<Span<const vattn_fence>, std::vector<Fence>&>, "");
static_assert(!becomes<Span<int>, std::initializer_list<int>> &&
                  becomes<Span<const int>, std::initializer_list<int>>, "");
static_assert(std::is_trivially_copyable<Span<const int>>::value &&
                  sizeof(Span<int>) == 2 * sizeof(void*), "");
static_assert(becomes<Fences, Fence> && becomes<Fences, vattn_fence> &&
                  becomes<Fences, std::vector<Fence>>, "");
static_assert(!becomes<Fences, void*> && !becomes<Fence, void*> && !becomes<Fences, std::nullptr_t>, "");

static std::size_t count(Span<const int> span) { return span.size(); }
static int sum(Span<const int> span) { return std::accumulate(span.begin(), span.end(), 0); }

static void spans() {
    int array[3] = {1, 2, 3};
    const std::vector<int> vector{4, 5};
    CHECK(count({}) == 0 && Span<int>().empty() && Span<int>().data() == nullptr);
    CHECK(sum(array) == 6 && sum(vector) == 9 && sum({7, 8, 9}) == 24 && sum({7}) == 7);
    CHECK(sum({array, 2}) == 3 && sum(std::array<int, 2>{1, 1}) == 2 && sum(std::vector<int>{1, 2}) == 3);
    const Span<int> writable(array);
    writable[1] = 20;
    CHECK(array[1] == 20 && writable.data() == array && sum(writable) == 24);
#if __cplusplus >= 202002L
    const std::span<int> standard(array);
    CHECK(sum(standard) == 24 && sum(standard.first(1)) == 1 && Span<int>(standard).data() == array);
    const std::span<const int> back(Span<const int>{vector});
    CHECK(back.size() == 2 && back.data() == vector.data());
    static_assert(becomes<Span<const int>, std::span<int>> && !becomes<Span<int>, std::span<const int>>, "");
#endif
}

static std::size_t fences_of(Fences fences) { return fences.size(); }

static void fences() {
    const Fence idle = Fence::idle();
    const Fence of_stream = Fence::stream(stream(7));
    const Fence of_event = Fence::event(stream(8));
    CHECK(idle.kind == VATTN_FENCE_IDLE && idle.handle == nullptr && idle.reserved == 0);
    CHECK(of_stream.kind == VATTN_FENCE_STREAM && of_stream.handle == stream(7) && of_stream.reserved == 0);
    CHECK(of_event.kind == VATTN_FENCE_EVENT && of_event.handle == stream(8) && of_event.reserved == 0);
    CHECK(Fence(vattn_fence_stream(stream(7))).handle == stream(7));

    const Fence array[] = {idle, of_stream};
    const std::vector<Fence> vector(3, of_stream);
    CHECK(fences_of(idle) == 1 && fences_of(vattn_fence_idle()) == 1 && fences_of({idle}) == 1);
    CHECK(fences_of({idle, of_stream, vattn_fence_idle()}) == 3 && fences_of({}) == 0);
    CHECK(fences_of(array) == 2 && fences_of(vector) == 3 && fences_of(std::vector<Fence>()) == 0);
    CHECK(fences_of(Span<const Fence>(array, 1)) == 1 && fences_of(std::array<Fence, 1>{idle}) == 1);
    const auto second = [](Fences some) { return some.data()[1].handle; };
    CHECK(second(array) == stream(7) && second({idle, of_event}) == stream(8) && second(vector) == stream(7));
#if __cplusplus >= 202002L
    CHECK(fences_of(std::span(array)) == 2 && fences_of(std::span(vector).first(1)) == 1);
#endif
}

static void in_calls() {
    World world;
    vattn::Cache& cache = world.cache;
    const Slot a = cache.acquire(1);
    const Slot b = cache.acquire(1);
    cache.step({{a, 10}, {b, 20}});
    SlotTokens array[] = {{a, 11}, {b, 21}};
    cache.step(array);
    std::vector<SlotTokens> vector{{a, 12}, {b, 22}};
    cache.step(vector);
    cache.step(std::array<SlotTokens, 1>{{{a, 13}}});
    cache.step({array, 0});
    cache.step({});
    std::uint64_t held = 35;
#if __cplusplus >= 202002L
    const std::span<SlotTokens> batch(vector);
    batch[0].tokens = 14;
    batch[1].tokens = 24;
    cache.step(batch);
    cache.step(std::span<const SlotTokens>(batch).subspan(1));
    held = 38;
#endif
    CHECK(cache.bytes().needed == held * world.geometry.info().bytes_per_token);
    cache.truncate(a, 1, Fence::idle());
    cache.truncate(a, 1, {Fence::stream(stream(1)), Fence::stream(stream(2))});
    const std::vector<Fence> both{Fence::stream(stream(1)), Fence::idle()};
    cache.retire(a, both);
    cache.retire(b, vattn_fence_idle());
}

int main() {
    spans();
    fences();
    in_calls();
    return check_end();
}
