/* Pins and the DLPack tensors made of them: who gives them up, and that they outlive their slot and cache. */
#include "check.hpp"

#include <cstddef>
#include <memory>
#include <type_traits>

/* As dlpack.h has it, of its version 1. */
struct Versioned {
    std::uint32_t major, minor;
    void* context;
    void (*deleter)(Versioned*);
    std::uint64_t flags;
    void* data;
    std::int32_t device_type, device_id, ndim;
    std::uint8_t code, bits;
    std::uint16_t lanes;
    std::int64_t *shape, *strides;
    std::uint64_t byte_offset;
};

static_assert(sizeof(Versioned) == 80 && offsetof(Versioned, shape) == 56, "the layout of dlpack.h");
static_assert(std::is_nothrow_move_constructible<vattn::DlpackTensor>::value &&
                  std::is_nothrow_move_assignable<vattn::DlpackTensor>::value &&
                  !std::is_copy_constructible<vattn::DlpackTensor>::value,
              "a tensor has one owner");

static void a_tensor_outlives_its_slot_and_cache() {
    World world;
    const vattn::Slot slot = world.cache.acquire(100);
    world.cache.step({{slot, 100}});
    const vattn::View keys = world.cache.view(0, vattn::Part::Key).slot(slot.index);
    keys.typed<std::uint16_t>().at(0, 99, 1, 15) = 4711;

    const auto give_up = [](Versioned* tensor) { tensor->deleter(tensor); };
    std::unique_ptr<Versioned, void (*)(Versioned*)> taken(nullptr, give_up);
    {
        const vattn::Pin pin = world.cache.pin(slot);
        CHECK(pin.info().tokens == 100 && pin.info().bytes == world.cache.bytes().pinned);
        taken.reset(static_cast<Versioned*>(
            pin.dlpack(keys.data(), keys.dtype(), {100, keys.shape(2), keys.shape(3)},
                       {keys.stride(1), keys.stride(2), keys.stride(3)})
                .release()));
        CHECK(world.cache.stats().pins == 2);
    }
    CHECK(world.cache.stats().pins == 1);
    world.cache.retire(slot, vattn::Fence::idle());
    CHECK(world.cache.trim(0, vattn::Fence::idle()) == world.cache.bytes().pinned);
    world.cache.close();
    CHECK(world.driver.live().mappings > 0);
    CHECK(taken->major == 1 && taken->ndim == 3 && taken->code == 2 && taken->bits == 16);
    const auto* elements = static_cast<const std::uint16_t*>(taken->data);
    CHECK(elements[99 * taken->strides[0] + taken->strides[1] + 15] == 4711);
    taken.reset();
    CHECK(none_alive(world.driver));
}

static void a_tensor_that_nobody_takes_is_given_up() {
    World world;
    const vattn::Slot slot = world.cache.acquire(10);
    world.cache.step({{slot, 10}});
    const vattn::View keys = world.cache.view(1, vattn::Part::Key);
    vattn::Pin pin = world.cache.pin(slot);
    {
        vattn::DlpackTensor one = pin.dlpack(keys);
        vattn::DlpackTensor other = pin.dlpack(keys, 0);
        CHECK(one && one.version_major() == 1 && other.version_major() == 0);
        CHECK(world.cache.stats().pins == 3);
        void* const tensor = other.get();
        one = std::move(other);
        CHECK(world.cache.stats().pins == 2 && one.get() == tensor && one.version_major() == 0 && !other);
        vattn::DlpackTensor& itself = one;
        one = std::move(itself);
        CHECK(one.get() == tensor);
        const vattn::DlpackTensor last(std::move(one));
        CHECK(last.get() == tensor && last.version_major() == 0 && !one);
    }
    CHECK(world.cache.stats().pins == 1 && !vattn::DlpackTensor());
    pin.close();
    CHECK(world.cache.stats().pins == 0);
}

static void what_is_refused() {
    World world;
    const vattn::Slot slot = world.cache.acquire(10);
    const vattn::View keys = world.cache.view(0, vattn::Part::Key);
    const vattn::Pin pin = world.cache.pin_addresses();
    CHECK(pin.info().tokens == 0 && pin.info().bytes == 0 && pin.dlpack(keys));
    int elsewhere = 0;
    THROWS(Error, InvalidArgument, "2 strides for a shape of 1",
           pin.dlpack(keys.data(), keys.dtype(), {1}, {1, 1}));
    THROWS(Error, InvalidArgument, "reserves", pin.dlpack(&elsewhere, vattn::Dtype::F32, {1}));
    THROWS(Error, InvalidArgument, "version_major is 7", pin.dlpack(keys, 7));
    THROWS(Error, InvalidArgument, "array->dtype is 0", pin.dlpack(keys.data(), vattn::Dtype::Model, {1}));
    world.cache.retire(slot, vattn::Fence::idle());
    THROWS(StaleSlot, StaleSlot, "vattn_pin_create: ", world.cache.pin(slot));
}

int main() {
    a_tensor_outlives_its_slot_and_cache();
    a_tensor_that_nobody_takes_is_given_up();
    what_is_refused();
    return check_end();
}
