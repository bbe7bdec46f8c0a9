/* What the tools have to find: a run that misses one of these proves nothing about the others. */
#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void *volatile kept;

int main(int count, char **arguments) {
    const char *what = count > 1 ? arguments[1] : "";
    volatile int most = INT_MAX;
    if (strcmp(what, "overflow") == 0) {
        volatile char *bytes = (volatile char *)malloc(8);
        if (bytes == NULL) return 0;
        bytes[8 + (most == 0)] = 1;
        free((void *)(uintptr_t)bytes);
    } else if (strcmp(what, "leak") == 0) {
        kept = malloc(100);
        kept = NULL;
    } else if (strcmp(what, "arithmetic") == 0) {
        most = most + 1;
    }
    return 0;
}
