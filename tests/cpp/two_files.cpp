/* Two files of one program include the header: nothing is defined twice, and what is shared is one. */
#include "check.hpp"

vattn::Driver other_driver();
const void* other_listener();
bool other_catches(void (*call)());

static void throws_stale() { throw vattn::StaleSlot(vattn::Status::StaleSlot, "of the first file"); }

int main() {
    const vattn::Driver driver = other_driver();
    CHECK(driver.info().name == "host");
    CHECK(other_listener() == &vattn::detail::Listener::get());
    CHECK(other_catches(throws_stale));
    return check_end();
}
