/* After fork: the parent's objects are refused in the child, which makes its own; the parent goes on. */
#include <pthread.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "every.h"

static vattn_buffer *parents_buffer;

/* In a child: what it inherits is refused, in every function. */
static void inherited(const world *parents, const world *good, vattn_slot_tokens entry) {
    every_geometry_call_fails(good, parents->geometry, VATTN_FORKED, "the vattn_geometry was made before fork");
    every_driver_call_fails(good, parents->driver, VATTN_FORKED, "the vattn_driver was made before fork");
    every_driver_call_fails(good, parents->host, VATTN_FORKED, "the vattn_driver was made before fork");
    every_cache_call_fails(parents->cache, entry, VATTN_FORKED, "the vattn_cache was made before fork");
    every_buffer_call_fails(parents_buffer, VATTN_FORKED, "the vattn_buffer was made before fork");
}

static void some_work(const world *made, unsigned owner) {
    const vattn_fence idle = vattn_fence_idle();
    vattn_slot_tokens entry = world_acquire(made->cache, 50);
    CHECK_OK(vattn_cache_step(made->cache, &entry, 1));
    world_write(made->cache, owner, entry);
    CHECK_OK(vattn_cache_flush(made->cache));
    world_read(made->cache, owner, entry);
    CHECK_OK(vattn_cache_retire(made->cache, entry.slot, &idle, 1));
}

/*
 * Ends a child: well if nothing failed, and something was checked. It becomes another program, as what the
 * parent's threads had is nobody's here, and Valgrind would call that lost.
 */
static void end(void) {
    const char *verdict = check_failed == 0 && check_passed > 0 ? "true" : "false";
    fflush(NULL);
    execlp(verdict, verdict, (char *)NULL);
    _exit(1);
}

static void wait_for(pid_t child) {
    int state = 0;
    CHECK(child > 0 && waitpid(child, &state, 0) == child);
    CHECK(WIFEXITED(state) && WEXITSTATUS(state) == 0);
}

static void grandchild(const world *parents, const world *own, vattn_slot_tokens entry) {
    world third;
    world_make(&third, VATTN_BACKGROUND_OFF);
    inherited(parents, &third, entry);
    inherited(own, &third, entry);
    some_work(&third, 3);
    world_end(&third);
    end();
}

static void child(const world *parents, vattn_slot_tokens entry, char *text) {
    world own;
    pid_t next;
    vattn_error error;
    SIZED(error);
    /* The last error is the thread's, which goes on here. */
    CHECK_OK(vattn_last_error(&error));
    CHECK(error.status == VATTN_TOO_MANY_TOKENS);
    CHECK_FAILS(VATTN_FORKED, "create another here", vattn_cache_flush(parents->cache));
    world_make(&own, VATTN_BACKGROUND_THREAD);
    inherited(parents, &own, entry);
    some_work(&own, 2);
    /* Memory of the program's own is there. */
    CHECK_OK(vattn_string_destroy(text));
    fflush(NULL);
    next = fork();
    if (next == 0) grandchild(parents, &own, entry);
    wait_for(next);
    some_work(&own, 4);
    world_end(&own);
    end();
}

static void nap(void) {
    const struct timespec millisecond = {0, 1000000};
    nanosleep(&millisecond, NULL);
}

static bool is_set(bool *flag) {
    return __atomic_load_n(flag, __ATOMIC_ACQUIRE);
}

static void set(bool *flag) {
    __atomic_store_n(flag, true, __ATOMIC_RELEASE);
}

static void *makes_and_destroys(void *done) {
    const vattn_layers layers = {1, 1, 64, 64};
    while (!is_set((bool *)done)) {
        vattn_geometry *geometry = NULL;
        CHECK_OK(vattn_geometry_create(&layers, 1, 1, VATTN_DTYPE_F16, &geometry));
        CHECK_OK(vattn_geometry_destroy(geometry));
    }
    return NULL;
}

/* A child finds no lock held by a thread that it does not have: it would wait for it until it is ended. */
static void while_others_make_objects(void) {
    pthread_t threads[3];
    bool done = false;
    for (size_t at = 0; at < 3; at++) CHECK(pthread_create(&threads[at], NULL, makes_and_destroys, &done) == 0);
    for (int forks = 0; forks < 20; forks++) {
        const vattn_layers layers = {1, 1, 64, 64};
        vattn_geometry *geometry = NULL;
        pid_t next = fork();
        if (next == 0) {
            alarm(60);
            check_passed = check_failed = 0;
            CHECK_OK(vattn_geometry_create(&layers, 1, 1, VATTN_DTYPE_F16, &geometry));
            CHECK_OK(vattn_geometry_destroy(geometry));
            end();
        }
        wait_for(next);
    }
    set(&done);
    for (size_t at = 0; at < 3; at++) CHECK(pthread_join(threads[at], NULL) == 0);
}

/* What a callback that is held up tells of itself, and waits for. */
typedef struct {
    bool inside;
    bool go;
} held_up;

static void holds_up(void *user, int32_t level, const char *target, const char *text) {
    held_up *held = (held_up *)user;
    (void)level, (void)target, (void)text;
    set(&held->inside);
    while (!is_set(&held->go)) nap();
}

static void *makes_a_world(void *none) {
    world one;
    world_make(&one, VATTN_BACKGROUND_OFF);
    world_end(&one);
    return none;
}

/* A callback that runs on another thread of the parent is waited for by nobody in the child. */
static void while_a_callback_runs(void) {
    held_up held = {false, false};
    pthread_t thread;
    pid_t next;
    CHECK_OK(vattn_log_set(holds_up, &held, VATTN_LOG_TRACE));
    CHECK(pthread_create(&thread, NULL, makes_a_world, NULL) == 0);
    while (!is_set(&held.inside)) nap();
    next = fork();
    if (next == 0) {
        alarm(60);
        check_passed = check_failed = 0;
        CHECK_OK(vattn_log_set(NULL, NULL, VATTN_LOG_OFF));
        makes_a_world(NULL);
        end();
    }
    wait_for(next);
    set(&held.go);
    CHECK_OK(vattn_log_set(NULL, NULL, VATTN_LOG_OFF));
    CHECK(pthread_join(thread, NULL) == 0);
}

static void forks(void *user, int32_t level, const char *target, const char *text) {
    pid_t *child = (pid_t *)user;
    (void)level, (void)target, (void)text;
    if (*child == -1) *child = fork();
}

/* A callback may fork: it returns in both processes, and both can change the callback afterwards. */
static void from_a_callback(void) {
    pid_t next = -1;
    vattn_cache *cache = NULL;
    vattn_config config;
    world made;
    world_make(&made, VATTN_BACKGROUND_OFF);
    CHECK_OK(vattn_config_init(&config, sizeof config));
    config.max_slots = 2;
    config.max_tokens = 1024;
    config.background = VATTN_BACKGROUND_OFF;
    CHECK_OK(vattn_log_set(forks, &next, VATTN_LOG_TRACE));
    CHECK_OK(vattn_cache_create(&config, made.geometry, made.driver, &cache));
    CHECK_OK(vattn_log_set(NULL, NULL, VATTN_LOG_OFF));
    if (next == 0) {
        alarm(60);
        CHECK_OK(vattn_cache_destroy(cache));
        makes_a_world(NULL);
        end();
    }
    wait_for(next);
    CHECK_OK(vattn_cache_destroy(cache));
    world_end(&made);
}

int main(void) {
    world made;
    vattn_slot_tokens entry, many;
    char *text = NULL;
    pid_t first;
    world_make(&made, VATTN_BACKGROUND_THREAD);
    entry = world_acquire(made.cache, 100);
    CHECK_OK(vattn_cache_step(made.cache, &entry, 1));
    world_write(made.cache, 1, entry);
    CHECK_OK(vattn_cache_stats_json(made.cache, &text));
    parents_buffer = world_buffer(made.driver);
    many = entry;
    many.tokens = 1000;
    CHECK_FAILS(VATTN_TOO_MANY_TOKENS, "1000", vattn_cache_step(made.cache, &many, 1));
    fflush(NULL);
    first = fork();
    if (first == 0) child(&made, entry, text);
    wait_for(first);
    CHECK_OK(vattn_string_destroy(text));
    world_read(made.cache, 1, entry);
    some_work(&made, 5);
    CHECK_OK(vattn_buffer_commit(parents_buffer, 0, 1));
    CHECK_OK(vattn_buffer_destroy(parents_buffer));
    world_end(&made);
    while_others_make_objects();
    while_a_callback_runs();
    from_a_callback();
    return check_end();
}
