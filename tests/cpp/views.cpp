/* Views: their numbers, and real memory read and written through them. */
#include "check.hpp"

using vattn::Part;
using vattn::View;

/* What an element holds, for whoever owns it. */
static std::uint16_t value(int owner, std::uint32_t layer, Part part, std::int64_t j, std::int64_t h,
                           std::int64_t d) {
    const std::int64_t place = j * 97 + h * 31 + d + (part == Part::Value ? 2237 : 0);
    return static_cast<std::uint16_t>(owner * 40503 + std::int64_t{layer} * 3571 + place);
}

/* Every element of the first tokens of a slot, in all layers. */
template <class F>
static void each(const vattn::Cache& cache, std::int64_t tokens, F visit) {
    for (std::uint32_t layer = 0; layer < 2; ++layer) {
        for (const Part part : {Part::Key, Part::Value}) {
            const auto elements = cache.view(layer, part).typed<std::uint16_t>();
            for (std::int64_t j = 0; j < tokens; ++j) {
                for (std::int64_t h = 0; h < elements.shape(2); ++h) {
                    for (std::int64_t d = 0; d < elements.shape(3); ++d) {
                        visit(elements, layer, part, j, h, d);
                    }
                }
            }
        }
    }
}

static void write(const vattn::Cache& cache, int owner, const vattn::Slot& slot, std::int64_t tokens) {
    each(cache, tokens, [&](const auto& elements, auto layer, auto part, auto j, auto h, auto d) {
        elements(slot.index, j, h, d) = value(owner, layer, part, j, h, d);
    });
}

static bool holds(const vattn::Cache& cache, int owner, const vattn::Slot& slot, std::int64_t tokens) {
    bool all = true;
    each(cache, tokens, [&](const auto& elements, auto layer, auto part, auto j, auto h, auto d) {
        all = all && elements.at(slot.index, j, h, d) == value(owner, layer, part, j, h, d);
    });
    return all;
}

static void tokens_stay_where_they_are() {
    World world(small_config().with_kv_order(vattn::KvOrder::Interleaved));
    vattn::Cache& cache = world.cache;
    const vattn::Slot a = cache.acquire(200);
    const vattn::Slot b = cache.acquire(10);
    cache.step({{a, 200}, {b, 10}});
    write(cache, 1, a, 200);
    write(cache, 2, b, 10);
    cache.step({{b, 250}});
    CHECK(holds(cache, 1, a, 200) && holds(cache, 2, b, 10));
    write(cache, 3, b, 250);
    cache.truncate(a, 50, vattn::Fence::idle());
    cache.step({{a, 60}});
    CHECK(holds(cache, 1, a, 50) && holds(cache, 3, b, 250));
}

static void numbers() {
    World world;
    const vattn::Layout layout = world.cache.layout();
    CHECK(world.cache.tensor(0).data == world.cache.view(0, vattn::Part::Key).data());
    THROWS(Error, InvalidArgument, "vattn_cache_tensor: ", world.cache.tensor(layout.tensors));
    const View keys = world.cache.view(1, Part::Key);
    CHECK(keys.shape(0) == 4 && keys.shape(1) == 256 && keys.shape(2) == 2 && keys.shape(3) == 16);
    CHECK(keys.stride(3) == 1 && keys.stride(2) == 16 && keys.stride(1) == 64);
    CHECK(keys.stride(0) == static_cast<std::int64_t>(layout.stride_tokens) * 64);
    CHECK(keys.shape().size() == 4 && keys.shape()[1] == 256 && keys.strides()[1] == 64);
    CHECK(keys.dtype() == vattn::Dtype::F16 && keys.element_bytes() == 2);
    CHECK(keys.device_type() == vattn::DeviceType::Cpu && keys.device_id() == 0);
    CHECK(keys.raw().data == keys.data() && keys.data<std::uint16_t>() == keys.data());
    CHECK(world.cache.view(1, Part::Value).shape(3) == 8);

    const View paged = world.cache.paged_view(1, Part::Key);
    CHECK(paged.shape(1) == 16 && paged.data() == keys.data());
    CHECK(paged.stride(0) * static_cast<std::int64_t>(layout.pages_per_slot) == keys.stride(0));
    const View tokens = world.cache.token_view(1, Part::Key);
    CHECK(tokens.shape(0) == 1 && tokens.stride(1) == 64 && tokens.data() == keys.data());

    const View third = keys.slot(3);
    CHECK(third.shape(0) == 1 && third.shape(1) == 256 && third.stride(1) == 64);
    CHECK(third.data<std::uint16_t>() == keys.data<std::uint16_t>() + 3 * keys.stride(0));
    // Any type of whole numbers is an index.
    const auto elements = keys.typed<std::uint16_t>();
    CHECK(&third.typed<std::uint16_t>()(0, 5, 1, 2) == &elements(3U, std::size_t{5}, 1L, short{2}));
}

static void refusals() {
    World world;
    const View keys = world.cache.view(0, Part::Key);
    THROWS(Error, InvalidArgument, "vattn_cache_view: ", world.cache.view(2, Part::Key));
    THROWS(Error, InvalidArgument, "part is 7", world.cache.view(0, static_cast<Part>(7)));
    THROWS(Error, InvalidArgument, "vattn_cache_paged_view: ", world.cache.paged_view(2, Part::Key));
    THROWS(Error, InvalidArgument, "vattn_cache_token_view: ", world.cache.token_view(2, Part::Key));
    THROWS(Error, InvalidArgument, "View::typed: the type has 4 bytes and an element 2", keys.typed<float>());
    THROWS(Error, InvalidArgument, "vattn::View::data: the type has 1 bytes", keys.data<char>());
    THROWS(Error, InvalidArgument, "vattn::View::slot: index 4, and the view has 4", keys.slot(4));
    const auto elements = keys.typed<const std::uint16_t>();
    THROWS(Error, InvalidArgument, "index 4 of dimension 0, which has 4", elements.at(4, 0, 0, 0));
    THROWS(Error, InvalidArgument, "index 256 of dimension 1", elements.at(0, 256, 0, 0));
    THROWS(Error, InvalidArgument, "index -1 of dimension 2", elements.at(0, 0, -1, 0));
    THROWS(Error, InvalidArgument, "index 16 of dimension 3", elements.at(0, 0, 0, 16U));
    THROWS(Error, InvalidArgument, "of dimension 1", elements.at(0, UINT64_MAX, 0, 0));

    vattn_view device = keys.raw();
    device.device_type = VATTN_DEVICE_CUDA;
    device.device_id = 3;
    THROWS(Error, InvalidArgument, "that of device 3", View(device).typed<std::uint16_t>());
    CHECK(View(device).data<std::uint16_t>() == keys.data() && View(device).slot(1).device_id() == 3);
}

static void latents() {
    const vattn::Geometry model({{2, 0, 36, 0}}, 1, vattn::Dtype::F32);
    vattn::Cache cache(small_config(), model, small_host());
    const View keys = cache.view(1, Part::Key);
    CHECK(keys.shape(2) == 1 && keys.shape(3) == 36 && keys.element_bytes() == 4);
    THROWS(Error, InvalidArgument, "vattn_cache_view: ", cache.view(1, Part::Value));
    const vattn::Slot slot = cache.acquire(3);
    cache.step({{slot, 3}});
    keys.typed<float>().at(slot.index, 2, 0, 35) = 0.5F;
    CHECK(keys.slot(slot.index).typed<const float>().at(0, 2, 0, 35) > 0.25F);
}

int main() {
    tokens_stay_where_they_are();
    numbers();
    refusals();
    latents();
    return check_end();
}
