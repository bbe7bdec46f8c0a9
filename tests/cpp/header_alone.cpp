/* The header is enough by itself, and may be included twice. */
#include <vattn.hpp>
#include <vattn.hpp>

int main() { return vattn::abi_version() == VATTN_ABI_VERSION ? 0 : 1; }
