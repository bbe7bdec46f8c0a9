/* After fork: the parent's objects are refused in the child, which makes its own; the parent goes on. */
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

#include "every.h"

/* In a child: what it inherits is refused, in every function. */
static void inherited(const world *parents, const world *good, vattn_slot_tokens entry) {
    every_geometry_call_fails(good, parents->geometry, VATTN_FORKED, "the vattn_geometry was made before fork");
    every_driver_call_fails(good, parents->driver, VATTN_FORKED, "the vattn_driver was made before fork");
    every_driver_call_fails(good, parents->host, VATTN_FORKED, "the vattn_driver was made before fork");
    every_cache_call_fails(parents->cache, entry, VATTN_FORKED, "the vattn_cache was made before fork");
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
    world_end(&made);
    return check_end();
}
