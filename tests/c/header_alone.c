/* The header needs nothing before it, and may be taken in twice. */
#include <vattn.h>
#include <vattn.h>

int main(void) {
    vattn_fence fence = vattn_fence_event(NULL);
    return fence.kind == VATTN_FENCE_EVENT ? 0 : 1;
}
