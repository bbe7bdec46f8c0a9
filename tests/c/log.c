/* The log: what is told, and that every call from within is refused and nothing is changed by it. */
#include "every.h"

typedef struct {
    const world *made;
    vattn_slot_tokens entry;
    vattn_buffer *buffer;
    unsigned long told;
    int32_t most;
} listener;

static void tell(void *user, int32_t level, const char *target, const char *text) {
    listener *told = (listener *)user;
    __atomic_fetch_add(&told->told, 1UL, __ATOMIC_RELAXED);
    CHECK(level >= VATTN_LOG_ERROR && level <= told->most);
    CHECK(strncmp(target, "vattn", 5) == 0 && text[0] != 0);
}

static void call_everything(void *user, int32_t level, const char *target, const char *text) {
    listener *told = (listener *)user;
    const world *made = told->made;
    const char *said = "from inside a log callback";
    vattn_error error;
    (void)level, (void)target, (void)text;
    if (__atomic_fetch_add(&told->told, 1UL, __ATOMIC_RELAXED) > 0) return;
    every_geometry_call_fails(made, made->geometry, VATTN_IN_CALLBACK, said);
    every_driver_call_fails(made, made->driver, VATTN_IN_CALLBACK, said);
    every_cache_call_fails(made->cache, told->entry, VATTN_IN_CALLBACK, said);
    every_buffer_call_fails(told->buffer, VATTN_IN_CALLBACK, said);
    every_free_call_fails(VATTN_IN_CALLBACK, said);
    /* What refuses nothing answers here too. */
    SIZED(error);
    CHECK_OK(vattn_last_error(&error));
    CHECK(error.status == VATTN_IN_CALLBACK && vattn_last_error_message(NULL, 0) > 0);
    CHECK(vattn_abi_version() == VATTN_ABI_VERSION && vattn_version()[0] != 0);
    CHECK(strcmp(vattn_status_name(VATTN_OK), "ok") == 0);
}

int main(void) {
    world made;
    listener told;
    vattn_driver *other;
    world_make(&made, VATTN_BACKGROUND_OFF);
    memset(&told, 0, sizeof told);
    told.made = &made;
    told.entry = world_acquire(made.cache, 100);
    told.buffer = world_buffer(made.driver);
    told.most = VATTN_LOG_INFO;
    CHECK_OK(vattn_cache_step(made.cache, &told.entry, 1));

    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "level is 6, and the values of vattn_log_level are 0, 1",
                vattn_log_set(tell, &told, 6));
    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "level is -1", vattn_log_set(NULL, NULL, -1));
    CHECK_OK(vattn_log_set(NULL, NULL, VATTN_LOG_TRACE));
    CHECK_OK(vattn_log_set(tell, &told, VATTN_LOG_OFF));
    CHECK_OK(vattn_cache_set_budget(made.cache, 41 * WORLD_GRANULE));
    CHECK(told.told == 0);
    CHECK_OK(vattn_log_set(tell, &told, VATTN_LOG_INFO));
    CHECK_OK(vattn_cache_set_budget(made.cache, 42 * WORLD_GRANULE));
    CHECK(told.told > 0);
    told.most = VATTN_LOG_TRACE;
    CHECK_OK(vattn_log_set(tell, &told, VATTN_LOG_TRACE));
    CHECK_OK(vattn_cache_set_budget(made.cache, 43 * WORLD_GRANULE));

    told.told = 0;
    CHECK_OK(vattn_log_set(call_everything, &told, VATTN_LOG_TRACE));
    CHECK_OK(vattn_cache_set_budget(made.cache, 44 * WORLD_GRANULE));
    CHECK(told.told > 0);
    CHECK_OK(vattn_log_set(NULL, NULL, VATTN_LOG_OFF));
    told.told = 0;
    CHECK_OK(vattn_cache_set_budget(made.cache, 40 * WORLD_GRANULE));
    CHECK(told.told == 0);
    /* Nothing came of what was called from within. */
    world_write(made.cache, 1, told.entry);
    CHECK(world_stats(made.cache).active_slots == 1);
    CHECK_OK(vattn_buffer_commit(told.buffer, 0, 1));
    CHECK_OK(vattn_buffer_destroy(told.buffer));
    CHECK_OK(vattn_driver_create_checked(made.host, &other));
    CHECK_OK(vattn_driver_destroy(other));
    world_end(&made);
    return check_end();
}
