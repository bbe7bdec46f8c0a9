/* A program that was built with the header of another ABI is told so by the first object that it makes. */
#include <vattn.h>
#undef VATTN_ABI_VERSION
#define VATTN_ABI_VERSION 4711
#include "check.hpp"

int main() {
    const vattn_layers layers{1, 1, 1, 1};
    THROWS(Unsupported, Unsupported, "built for version 4711", vattn::check_abi());
    THROWS(Unsupported, Unsupported, "has version 1 of the ABI", vattn::Geometry(vattn::Span(&layers, 1)));
    THROWS(Unsupported, Unsupported, "the library's own headers", vattn::Geometry::preset("llama-3-8b"));
    THROWS(Unsupported, Unsupported, "vattn::check_abi: ", vattn::Driver::host({1 << 20}));
    THROWS(Unsupported, Unsupported, "vattn::check_abi: ", vattn::Driver::ledger({1 << 20}));
    THROWS(Unsupported, Unsupported, "vattn::check_abi: ", vattn::Driver::cuda());
    THROWS(Unsupported, Unsupported, "vattn::check_abi: ", vattn::Config());
    CHECK(vattn::abi_version() == 1);
    return check_end();
}
