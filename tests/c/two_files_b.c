/* One program of two files that both take in the header: the second, which takes it in twice. */
#include <vattn.h>
#include <vattn.h>

int two_files_b(vattn_fence fence);

int two_files_b(vattn_fence fence) {
    vattn_fence same = vattn_fence_idle();
    same.kind = fence.kind;
    return vattn_abi_version() == VATTN_ABI_VERSION ? same.kind : -1;
}
