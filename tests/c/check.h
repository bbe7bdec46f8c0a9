/*
 * What every test of the C ABI is made of: checks that are counted, and that name what failed.
 *
 * In the common part of C11 and C++17. A program calls checks, and ends with `return check_end();`.
 */
#ifndef CHECK_H
#define CHECK_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <vattn.h>

static unsigned long check_passed;
static unsigned long check_failed;

static inline bool check_that(bool good, const char *what, const char *file, int line) {
    __atomic_fetch_add(good ? &check_passed : &check_failed, 1UL, __ATOMIC_RELAXED);
    if (!good) fprintf(stderr, "%s:%d: %s\n", file, line, what);
    return good;
}

static inline void check_ok(int32_t status, const char *call, const char *file, int line) {
    char text[1024];
    if (check_that(status == VATTN_OK, call, file, line)) return;
    vattn_last_error_message(text, sizeof text);
    fprintf(stderr, "    came to %s: %s\n", vattn_status_name(status), text);
}

/* Whether a text begins with the name of the function in `call`. */
static inline bool check_names(const char *text, const char *call) {
    size_t length = strcspn(call, "(");
    return strncmp(text, call, length) == 0 && strncmp(text + length, ": ", 2) == 0;
}

/* The status, the last error's status, and its text: the function's name, and `part` within. */
static inline void check_fails(int32_t status, int32_t wanted, const char *part, const char *call,
                               const char *file, int line) {
    char text[2048];
    vattn_error error;
    memset(&error, 0, sizeof error);
    error.struct_size = sizeof error;
    if (!check_that(status == wanted, call, file, line)) {
        fprintf(stderr, "    came to %s, not to %s\n", vattn_status_name(status), vattn_status_name(wanted));
        if (status == VATTN_OK) return;
    }
    vattn_last_error_message(text, sizeof text);
    if (!check_that(check_names(text, call) && strstr(text, part) != NULL, call, file, line))
        fprintf(stderr, "    said \"%s\", without \"%s\"\n", text, part);
    check_that(vattn_last_error(&error) == VATTN_OK && error.status == status, call, file, line);
}

static inline unsigned char check_pattern(size_t at) {
    return (unsigned char)(0xa1u + at % 61u);
}

static inline void check_fill(void *place, size_t from, size_t size) {
    unsigned char *bytes = (unsigned char *)place;
    for (size_t at = from; at < size; at++) bytes[at] = check_pattern(at);
}

static inline bool check_filled(const void *place, size_t from, size_t size) {
    const unsigned char *bytes = (const unsigned char *)place;
    for (size_t at = from; at < size; at++)
        if (bytes[at] != check_pattern(at)) return false;
    return true;
}

#define CHECK(good) check_that((good), #good, __FILE__, __LINE__)

/* The call succeeds. */
#define CHECK_OK(call) check_ok((int32_t)(call), #call, __FILE__, __LINE__)

/* The call fails with that status and a text that has `part` in it. */
#define CHECK_FAILS(wanted, part, call) check_fails((int32_t)(call), (wanted), (part), #call, __FILE__, __LINE__)

/* As CHECK_FAILS, and `out`, which it was to fill, is as it was. */
#define CHECK_FAILS_OUT(wanted, part, out, call)                                                               \
    do {                                                                                                       \
        check_fill(&(out), 0, sizeof(out));                                                                    \
        CHECK_FAILS(wanted, part, call);                                                                       \
        check_that(check_filled(&(out), 0, sizeof(out)), #out " is as it was: " #call, __FILE__, __LINE__);    \
    } while (0)

/* As CHECK_FAILS_OUT, for a struct that begins with its size. */
#define CHECK_FAILS_SIZED(wanted, part, out, call)                                                             \
    do {                                                                                                       \
        (out).struct_size = sizeof(out);                                                                       \
        check_fill(&(out), sizeof(size_t), sizeof(out));                                                       \
        CHECK_FAILS(wanted, part, call);                                                                       \
        check_that((out).struct_size == sizeof(out) && check_filled(&(out), sizeof(size_t), sizeof(out)),      \
                   #out " is as it was: " #call, __FILE__, __LINE__);                                          \
    } while (0)

/* The call fails with that status and says nothing about it: the last error is as it was. */
#define CHECK_FAILS_QUIETLY(wanted, call)                                                                      \
    do {                                                                                                       \
        char check_before[2048], check_after[2048];                                                            \
        vattn_last_error_message(check_before, sizeof check_before);                                           \
        check_that((int32_t)(call) == (wanted), #call, __FILE__, __LINE__);                                    \
        vattn_last_error_message(check_after, sizeof check_after);                                             \
        check_that(strcmp(check_before, check_after) == 0, #call, __FILE__, __LINE__);                         \
    } while (0)

/* All zero but for its size: how a struct begins that says how large it is. */
#define SIZED(value) (memset(&(value), 0, sizeof(value)), (void)((value).struct_size = sizeof(value)))

static inline int check_end(void) {
    printf("%lu passed, %lu failed\n", check_passed, check_failed);
    return check_failed > 0 || check_passed == 0;
}

#endif
