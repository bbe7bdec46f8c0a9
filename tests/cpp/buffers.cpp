/* Buffers: what is committed can be touched and stays, what is refused, and tensors over one. */
#include "check.hpp"

#include <cstring>

using vattn::Buffer;
using vattn::Fence;
using vattn::Verb;

static unsigned char* data(const Buffer& buffer) { return static_cast<unsigned char*>(buffer.info().data); }

static void rows_share_granules() {
    const vattn::Driver driver = vattn::Driver::checked(small_host());
    Buffer buffer({64 * granule, 4 * granule}, driver);
    const std::uint64_t row = granule * 3 / 2;
    buffer.commit(0, row);
    buffer.commit(row, row);
    std::memset(data(buffer), 1, row);
    std::memset(data(buffer) + row, 2, row);
    buffer.decommit(0, row, Fence::idle());
    CHECK(buffer.info().committed == row && data(buffer)[row] == 2 && data(buffer)[2 * row - 1] == 2);
    buffer.decommit(row, row, {Fence::idle(), Fence::stream(stream(7))});
    CHECK(buffer.info().committed == 0 && buffer.info().held == 0);
    CHECK(buffer.info().size == 64 * granule && buffer.info().granule == granule);
    CHECK(static_cast<vattn::DeviceType>(buffer.info().device_type) == vattn::DeviceType::Cpu);
    buffer.close();
    CHECK(none_alive(driver));
    CHECK(Buffer({1}, driver).info().size == granule);
}

static void refusals() {
    vattn::Driver driver = vattn::Driver::checked(small_host());
    Buffer buffer({64 * granule, 4 * granule}, driver);
    THROWS(Error, InvalidArgument, "vattn_buffer_create: ", Buffer({0}, driver));
    THROWS(Error, InvalidArgument, "power of two", Buffer({1, 3 * granule}, driver));
    THROWS(Error, InvalidArgument, "is NULL", Buffer({1}, vattn::Driver()));
    THROWS(Error, InvalidArgument, "reach beyond the buffer", buffer.commit(64 * granule, 1));
    THROWS(Error, InvalidArgument, "0 bytes", buffer.decommit(0, 0, Fence::idle()));
    THROWS(OutOfDeviceMemory, OutOfDeviceMemory, "", Buffer({1 << 21}, driver).commit(0, 1 << 21));
    buffer.commit(0, 8 * granule);
    driver.fail(Verb::Unmap, 2, vattn::Status::Driver);
    THROWS(Error, Driver, "nothing was changed", buffer.decommit(0, 8 * granule, Fence::idle()));
    CHECK(buffer.info().committed == 8 * granule);
    driver.fail(Verb::Unmap, 2, vattn::Status::Driver);
    driver.fail(Verb::Map, 1, vattn::Status::Driver);
    THROWS(Broken, Unhealthy, "16 KiB at offset 0 bytes", buffer.decommit(0, 8 * granule, Fence::idle()));
    CHECK(buffer.info().committed == 4 * granule);

    Buffer empty;
    THROWS(Error, InvalidArgument, "is NULL", empty.commit(0, 1));
    THROWS(Error, InvalidArgument, "is NULL", empty.decommit(0, 1, Fence::idle()));
    THROWS(Error, InvalidArgument, "is NULL", empty.info());
    THROWS(Error, InvalidArgument, "is NULL", empty.pin());
    empty = std::move(buffer);
    CHECK(!buffer && empty.info().committed == 4 * granule);
}

static void a_tensor_outlives_its_buffer() {
    const vattn::Driver driver = vattn::Driver::checked(small_host());
    Buffer buffer({64 * granule, granule}, driver);
    buffer.commit(0, 2 * granule);
    unsigned char* const first = data(buffer);
    first[0] = 42;
    vattn::DlpackTensor tensor = buffer.pin().dlpack(first, vattn::Dtype::U8, {64, granule});
    THROWS(Error, InvalidArgument, "reserves", buffer.pin().dlpack(first, vattn::Dtype::U8, {65, granule}));
    buffer.decommit(granule, granule, Fence::idle());
    CHECK(buffer.info().held == granule);
    buffer.close();
    CHECK(first[0] == 42 && driver.live().mappings == 1);
    tensor = vattn::DlpackTensor();
    CHECK(none_alive(driver));
}

static void what_is_known_by_name() {
    const std::string catalog = vattn::catalog_json();
    CHECK(catalog.find("\"name\":\"llama-3-8b\"") != std::string::npos);
    CHECK(catalog.find("\"name\":\"fa3-decode\"") != std::string::npos);
}

int main() {
    rows_share_granules();
    refusals();
    a_tensor_outlives_its_buffer();
    what_is_known_by_name();
    return check_end();
}
