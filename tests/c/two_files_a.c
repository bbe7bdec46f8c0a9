/* One program of two files that both take in the header: the first has `main`. */
#include <vattn.h>

int two_files_b(vattn_fence fence);

int main(void) {
    return two_files_b(vattn_fence_stream(NULL)) == VATTN_FENCE_STREAM ? 0 : 1;
}
