/*
 * Structs that begin with their size: every size that is wrong, and those that are right.
 *
 * `call` names the struct `it`, a pointer to `type`; the text names it as `name`.
 */
#ifndef SIZES_H
#define SIZES_H

#include "check.h"

/* Room for the struct and for what a later version of it may have. */
#define SIZES_TAIL 64
#define SIZES_ROOM(type)                                                                                       \
    union {                                                                                                    \
        type known;                                                                                            \
        size_t size;                                                                                           \
        unsigned char bytes[sizeof(type) + SIZES_TAIL];                                                        \
    } room;                                                                                                    \
    type *it = &room.known

/* NULL, off its alignment, and of sizes that no version has; nothing but the size is read. */
#define SIZES_REFUSED(type, name, call)                                                                        \
    do {                                                                                                       \
        const size_t wrong[] = {0, 1, sizeof(size_t), sizeof(type) - 1, ((size_t)1 << 16) + 1, SIZE_MAX};      \
        for (size_t nth = 0; nth < sizeof wrong / sizeof wrong[0]; nth++) {                                    \
            char part[128];                                                                                    \
            snprintf(part, sizeof part, "%s->struct_size is %zu, and %s has %zu bytes", name, wrong[nth],      \
                     #type, sizeof(type));                                                                     \
            check_fill(&room, 0, sizeof room);                                                                 \
            room.size = wrong[nth];                                                                            \
            CHECK_FAILS(VATTN_INVALID_ARGUMENT, part, call);                                                   \
            CHECK(room.size == wrong[nth] && check_filled(&room, sizeof(size_t), sizeof room));                \
        }                                                                                                      \
        it = NULL;                                                                                             \
        CHECK_FAILS(VATTN_INVALID_ARGUMENT, name " is NULL", call);                                            \
        check_fill(&room, 0, sizeof room);                                                                     \
        it = (type *)(void *)(room.bytes + 4);                                                                 \
        CHECK_FAILS(VATTN_INVALID_ARGUMENT, "not a multiple of 8, its alignment", call);                       \
        CHECK(check_filled(&room, 0, sizeof room));                                                            \
        it = &room.known;                                                                                      \
    } while (0)

/* A struct that is filled: what a newer program has more is set to zero, and the size stays. */
#define CHECK_SIZES_OUT(type, name, call)                                                                      \
    do {                                                                                                       \
        SIZES_ROOM(type);                                                                                      \
        SIZES_REFUSED(type, name, call);                                                                       \
        for (size_t more = 0; more <= SIZES_TAIL; more += SIZES_TAIL / 2) {                                    \
            size_t behind = sizeof(type) + more;                                                               \
            bool zero = true;                                                                                  \
            check_fill(&room, 0, sizeof room);                                                                 \
            room.size = behind;                                                                                \
            CHECK_OK(call);                                                                                    \
            for (size_t at = sizeof(type); at < behind; at++) zero = zero && room.bytes[at] == 0;              \
            CHECK(zero && room.size == behind && check_filled(&room, behind, sizeof room));                    \
        }                                                                                                      \
    } while (0)

/* A struct that is read, filled from `good`: what is set beyond the fields that the library knows is refused. */
#define CHECK_SIZES_IN(type, name, good, call, undo)                                                           \
    do {                                                                                                       \
        SIZES_ROOM(type);                                                                                      \
        SIZES_REFUSED(type, name, call);                                                                       \
        for (size_t more = 0; more <= SIZES_TAIL; more += SIZES_TAIL / 2) {                                    \
            memset(&room, 0, sizeof room);                                                                     \
            room.known = (good);                                                                               \
            room.size = sizeof(type) + more;                                                                   \
            CHECK_OK(call);                                                                                    \
            undo;                                                                                              \
        }                                                                                                      \
        for (size_t at = sizeof(type); at < sizeof room; at += 13) {                                           \
            char part[128];                                                                                    \
            snprintf(part, sizeof part, "byte %zu of %s is set, and this version of the library knows %zu",    \
                     at, name, sizeof(type));                                                                  \
            memset(&room, 0, sizeof room);                                                                     \
            room.known = (good);                                                                               \
            room.size = sizeof room.bytes;                                                                     \
            room.bytes[at] = 1;                                                                                \
            CHECK_FAILS(VATTN_INVALID_ARGUMENT, part, call);                                                   \
        }                                                                                                      \
    } while (0)

#endif
