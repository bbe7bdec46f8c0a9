/* The second file of two_files.cpp. */
#include <vattn.hpp>

vattn::Driver other_driver();
const void* other_listener();
bool other_catches(void (*call)());

vattn::Driver other_driver() { return vattn::Driver::host({1 << 20, 4096}); }

const void* other_listener() { return &vattn::detail::Listener::get(); }

bool other_catches(void (*call)()) {
    try {
        call();
    } catch (const vattn::StaleSlot&) {
        return true;
    }
    return false;
}
