/* Statuses, the last error and its text, versions, strings. */
#include "sizes.h"
#include "world.h"

static void names(void) {
    CHECK(strcmp(vattn_status_name(VATTN_OK), "ok") == 0);
    CHECK(strcmp(vattn_status_name(VATTN_OUT_OF_BUDGET), "out_of_budget") == 0);
    CHECK(strcmp(vattn_status_name(VATTN_IN_CALLBACK), "in_callback") == 0);
    for (int32_t status = 0; status <= VATTN_INTERNAL; status++)
        CHECK(strcmp(vattn_status_name(status), "unknown") != 0);
    for (int32_t status = VATTN_INVALID_HANDLE; status <= VATTN_IN_CALLBACK; status++)
        CHECK(strcmp(vattn_status_name(status), "unknown") != 0);
    CHECK(strcmp(vattn_status_name(21), "unknown") == 0 && strcmp(vattn_status_name(-1), "unknown") == 0);
    CHECK(strcmp(vattn_status_name(INT32_MAX), "unknown") == 0);
    CHECK(strcmp(vattn_status_name(INT32_MIN), "unknown") == 0);
    CHECK(vattn_abi_version() == VATTN_ABI_VERSION);
    CHECK(strchr(vattn_version(), '.') != NULL);
}

static void none_yet(void) {
    vattn_error error;
    char text[8];
    SIZED(error);
    CHECK_OK(vattn_last_error(&error));
    CHECK(error.status == VATTN_OK && error.verb == -1 && error.driver_code == 0 && error.driver_name[0] == 0);
    check_fill(text, 0, sizeof text);
    CHECK(vattn_last_error_message(text, sizeof text) == 0 && text[0] == 0);
    CHECK(vattn_last_error_message(NULL, 0) == 0);
}

/* The text is cut at its room's end, never behind it and never within a character. */
static void cut(void) {
    const char *name = "no-such-m\xc3\xb6" "del";
    vattn_geometry *out;
    char whole[2048], part[2048];
    size_t length;
    CHECK_FAILS_OUT(VATTN_INVALID_GEOMETRY, name, out,
                    vattn_geometry_create_preset(name, 1, VATTN_DTYPE_MODEL, &out));
    length = vattn_last_error_message(NULL, 0);
    CHECK(length > 20 && length < sizeof whole - 1);
    CHECK(vattn_last_error_message(whole, sizeof whole) == length && strlen(whole) == length);
    for (size_t room = 0; room <= length + 2; room++) {
        size_t kept = room == 0 ? 0 : (room <= length ? room - 1 : length);
        if (room > 0 && ((unsigned char)whole[kept] & 0xc0) == 0x80) kept--;
        check_fill(part, 0, sizeof part);
        CHECK(vattn_last_error_message(part, room) == length);
        CHECK(room == 0 || (strlen(part) == kept && memcmp(part, whole, kept) == 0));
        CHECK(check_filled(part, room, sizeof part));
    }
    /* Room that can't be is not written to. */
    CHECK(vattn_last_error_message(NULL, 100) == length);
    CHECK(vattn_last_error_message(part, SIZE_MAX) == length);
}

static void kept_until_the_next(void) {
    vattn_geometry *geometry, *made = world_geometry();
    vattn_error error;
    char before[512], after[512];
    CHECK_FAILS_OUT(VATTN_INVALID_ARGUMENT, "dtype is 55", geometry,
                    vattn_geometry_create_preset("llama-3-8b", 1, 55, &geometry));
    vattn_last_error_message(before, sizeof before);
    CHECK_OK(vattn_geometry_destroy(made));
    vattn_last_error_message(after, sizeof after);
    CHECK(strcmp(before, after) == 0);
    CHECK_FAILS_QUIETLY(VATTN_INVALID_ARGUMENT, vattn_last_error(NULL));
    error.struct_size = 3;
    check_fill(&error, sizeof(size_t), sizeof error);
    CHECK_FAILS_QUIETLY(VATTN_INVALID_ARGUMENT, vattn_last_error(&error));
    CHECK(error.struct_size == 3 && check_filled(&error, sizeof(size_t), sizeof error));
    {
        struct {
            vattn_error known;
            unsigned char tail[16];
        } newer;
        check_fill(&newer, 0, sizeof newer);
        newer.known.struct_size = sizeof newer;
        CHECK_OK(vattn_last_error(&newer.known));
        CHECK(newer.known.status == VATTN_INVALID_ARGUMENT && newer.known.struct_size == sizeof newer);
        CHECK(newer.tail[0] == 0 && newer.tail[15] == 0);
    }
}

static void of_the_driver(void) {
    world made;
    vattn_slot_tokens entry;
    vattn_error error;
    SIZED(error);
    world_make(&made, VATTN_BACKGROUND_OFF);
    entry = world_acquire(made.cache, 8);
    CHECK_OK(vattn_driver_fail(made.driver, VATTN_VERB_CREATE, 1, 1, VATTN_OUT_OF_DEVICE_MEMORY));
    CHECK_FAILS(VATTN_OUT_OF_DEVICE_MEMORY, "create of", vattn_cache_step(made.cache, &entry, 1));
    CHECK_OK(vattn_last_error(&error));
    CHECK_OK(vattn_driver_clear_failures(made.driver));
    CHECK(error.verb == VATTN_VERB_CREATE && error.driver_bytes >= WORLD_GRANULE && error.driver_name[0] != 0);
    world_end(&made);
}

static void strings(void) {
    char *text = NULL, *kept;
    CHECK_OK(vattn_probe_json(&text));
    CHECK(strstr(text, "\"abi_version\":1") != NULL && strstr(text, vattn_version()) != NULL);
    kept = text;
    CHECK_OK(vattn_string_destroy(text));
    CHECK_FAILS(VATTN_INVALID_HANDLE, "is no string of this library", vattn_string_destroy(kept));
    CHECK_FAILS(VATTN_INVALID_HANDLE, "is no string of this library",
                vattn_string_destroy((char *)(uintptr_t)vattn_version()));
    CHECK_FAILS(VATTN_INVALID_HANDLE, "0x1 is no string", vattn_string_destroy((char *)(uintptr_t)1));
    CHECK_OK(vattn_string_destroy(NULL));
    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "out is NULL", vattn_probe_json(NULL));
    CHECK_OK(vattn_catalog_json(&text));
    CHECK(strstr(text, "{\"presets\":[{\"name\":\"yi-6b\",") == text);
    CHECK(strstr(text, "{\"name\":\"fa3-decode\",\"summary\":") != NULL);
    CHECK_OK(vattn_string_destroy(text));
    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "out is NULL", vattn_catalog_json(NULL));
}

int main(void) {
    names();
    none_yet();
    cut();
    kept_until_the_next();
    of_the_driver();
    strings();
    return check_end();
}
