/* Pins: memory that stays through all that happens to its slot, and arrays over it as DLPack has them. */
#include <sys/types.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "sizes.h"
#include "world.h"

/* DLPack's own structs, of its versions 0 and 1, as dlpack.h has them. */
typedef struct {
    void *data;
    int32_t device_type, device_id, ndim;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape, *strides;
    uint64_t byte_offset;
} dl_tensor;

typedef struct dl_managed {
    dl_tensor tensor;
    void *context;
    void (*deleter)(struct dl_managed *);
} dl_managed;

typedef struct dl_versioned {
    uint32_t major, minor;
    void *context;
    void (*deleter)(struct dl_versioned *);
    uint64_t flags;
    dl_tensor tensor;
} dl_versioned;

/* The keys of a slot's tokens in a layer: [token, head, dim]. */
typedef struct {
    vattn_view view;
    vattn_array array;
} keys;

static void keys_of(const vattn_cache *cache, vattn_slot_tokens entry, keys *made) {
    CHECK_OK(vattn_cache_view(cache, 0, VATTN_KEY, &made->view));
    made->view.shape[1] = (int64_t)entry.tokens;
    SIZED(made->array);
    made->array.data = world_element(&made->view, (int64_t)entry.slot.index, 0, 0, 0);
    made->array.dtype = made->view.dtype;
    made->array.ndim = 3;
    made->array.shape = made->view.shape + 1;
    made->array.strides = made->view.strides + 1;
}

static bool keys_are(const dl_tensor *tensor, unsigned owner) {
    for (int64_t token = 0; token < tensor->shape[0]; token++)
        for (int64_t head = 0; head < tensor->shape[1]; head++)
            for (int64_t dim = 0; dim < tensor->shape[2]; dim++) {
                const uint16_t *element = (const uint16_t *)tensor->data + token * tensor->strides[0] +
                                          head * tensor->strides[1] + dim * tensor->strides[2];
                if (*element != world_value(owner, 0, VATTN_KEY, (uint64_t)token, head, dim)) return false;
            }
    return true;
}

static vattn_slot_tokens request(const vattn_cache *cache, uint64_t tokens, unsigned owner) {
    vattn_slot_tokens entry = world_acquire(cache, tokens);
    CHECK_OK(vattn_cache_step(cache, &entry, 1));
    world_write(cache, owner, entry);
    return entry;
}

static vattn_pin_info info_of(const vattn_pin *pin) {
    vattn_pin_info info;
    SIZED(info);
    CHECK_OK(vattn_pin_describe(pin, &info));
    return info;
}

/* Retired, reclaimed, trimmed, adopted: the tokens are there, and no call has them to give. */
static void outlives_its_slot(const world *made) {
    const vattn_fence idle = vattn_fence_idle();
    vattn_slot_tokens entry = request(made->cache, 100, 1), next;
    vattn_pin *pin = NULL;
    vattn_pin_info info;
    uint64_t number;
    char *text = NULL;
    CHECK_OK(vattn_pin_create(made->cache, &entry.slot, &pin));
    info = info_of(pin);
    CHECK(info.tokens == 100 && info.bytes >= 100 * 192 && info.bytes == world_bytes(made->cache).pinned);
    CHECK(world_stats(made->cache).pins == 1);
    CHECK_OK(vattn_cache_retire(made->cache, entry.slot, &idle, 1));
    CHECK_OK(vattn_cache_reclaim(made->cache, UINT32_MAX, &idle, 1, &number));
    CHECK_OK(vattn_cache_trim(made->cache, 0, &idle, 1, &number));
    CHECK_OK(vattn_cache_flush(made->cache));
    CHECK(world_bytes(made->cache).held == info.bytes && world_bytes(made->cache).mapped == info.bytes);
    CHECK_FAILS(VATTN_OUT_OF_BUDGET, "give up pins", vattn_cache_set_budget(made->cache, info.bytes - 1));
    world_read(made->cache, 1, entry);
    next = world_acquire(made->cache, 100);
    CHECK(next.slot.index == entry.slot.index);
    CHECK_OK(vattn_cache_step(made->cache, &next, 1));
    world_read(made->cache, 1, next);
    CHECK_FAILS(VATTN_STALE_SLOT, "was retired", vattn_pin_create(made->cache, &entry.slot, &pin));
    CHECK_OK(vattn_cache_stats_json(made->cache, &text));
    CHECK(strstr(text, "\"pins\":1") != NULL && strstr(text, "\"pinned\":") != NULL);
    CHECK_OK(vattn_string_destroy(text));
    CHECK_OK(vattn_cache_retire(made->cache, next.slot, &idle, 1));
    CHECK_OK(vattn_pin_destroy(pin));
    CHECK(world_stats(made->cache).pins == 0 && world_bytes(made->cache).pinned == 0);
    world_audit(made->cache);
}

static void tensors(const world *made) {
    const vattn_fence idle = vattn_fence_idle();
    vattn_slot_tokens entry = request(made->cache, 60, 2);
    vattn_pin *pin = NULL;
    void *old = NULL, *recent = NULL, *unused = NULL;
    dl_managed *managed;
    dl_versioned *versioned;
    keys key;
    CHECK(sizeof(dl_tensor) == 48 && sizeof(dl_managed) == 64 && sizeof(dl_versioned) == 80);
    keys_of(made->cache, entry, &key);
    CHECK_OK(vattn_pin_create(made->cache, &entry.slot, &pin));
    CHECK_OK(vattn_pin_dlpack(pin, &key.array, 0, &old));
    CHECK_OK(vattn_pin_dlpack(pin, &key.array, 1, &recent));
    key.array.strides = NULL;
    CHECK_OK(vattn_pin_dlpack(pin, &key.array, 1, &unused));
    CHECK(world_stats(made->cache).pins == 4);
    CHECK(((dl_versioned *)unused)->tensor.strides[0] == key.view.shape[2] * key.view.shape[3]);
    CHECK(((dl_versioned *)unused)->tensor.strides[2] == 1);
    CHECK_OK(vattn_dlpack_destroy(unused, 1));
    CHECK_OK(vattn_dlpack_destroy(NULL, 0));
    vattn_dlpack_capsule_destroy(NULL);
    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "version_major is 2", vattn_dlpack_destroy(old, 2));
    CHECK_OK(vattn_pin_destroy(pin));
    CHECK_OK(vattn_cache_retire(made->cache, entry.slot, &idle, 1));
    CHECK(world_stats(made->cache).pins == 2 && world_bytes(made->cache).pinned > 0);

    managed = (dl_managed *)old;
    versioned = (dl_versioned *)recent;
    CHECK(versioned->major == 1 && versioned->minor == 0 && versioned->flags == 0);
    CHECK(managed->tensor.device_type == 1 && managed->tensor.device_id == 0 && managed->tensor.ndim == 3);
    CHECK(managed->tensor.code == 2 && managed->tensor.bits == 16 && managed->tensor.lanes == 1);
    CHECK(managed->tensor.byte_offset == 0 && managed->tensor.shape[0] == 60);
    CHECK(keys_are(&managed->tensor, 2) && keys_are(&versioned->tensor, 2));
    managed->deleter(managed);
    CHECK(world_stats(made->cache).pins == 1 && keys_are(&versioned->tensor, 2));
    versioned->deleter(versioned);
    CHECK(world_stats(made->cache).pins == 0 && world_bytes(made->cache).pinned == 0);
    world_audit(made->cache);
}

static void refused(const world *made) {
    const vattn_fence idle = vattn_fence_idle();
    vattn_slot_tokens entry = request(made->cache, 60, 3);
    vattn_slot garbage = {7, 7, 7};
    vattn_pin *pin = NULL, *other = NULL;
    void *tensor;
    keys key;
    int64_t shape[9] = {1, 1, 1, 1, 1, 1, 1, 1, 1}, strides[9] = {0};
    keys_of(made->cache, entry, &key);
    CHECK_FAILS_OUT(VATTN_FOREIGN_SLOT, "another cache", other, vattn_pin_create(made->cache, &garbage, &other));
    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "out is NULL", vattn_pin_create(made->cache, &entry.slot, NULL));
    CHECK_OK(vattn_pin_create(made->cache, &entry.slot, &pin));
    CHECK_SIZES_OUT(vattn_pin_info, "out", vattn_pin_describe(pin, it));
    CHECK_SIZES_IN(vattn_array, "array", key.array, vattn_pin_dlpack(pin, it, 1, &tensor),
                   vattn_dlpack_destroy(tensor, 1));
    CHECK_FAILS(VATTN_INVALID_ARGUMENT, "out is NULL", vattn_pin_dlpack(pin, &key.array, 1, NULL));
    CHECK_FAILS_OUT(VATTN_INVALID_ARGUMENT, "version_major is 2", tensor,
                    vattn_pin_dlpack(pin, &key.array, 2, &tensor));
#define ARRAY_FAILS(change, part)                                                                              \
    do {                                                                                                       \
        keys_of(made->cache, entry, &key);                                                                     \
        change;                                                                                                \
        CHECK_FAILS_OUT(VATTN_INVALID_ARGUMENT, part, tensor, vattn_pin_dlpack(pin, &key.array, 1, &tensor));  \
    } while (0)
    ARRAY_FAILS(key.array.dtype = VATTN_DTYPE_MODEL, "array->dtype is 0");
    ARRAY_FAILS(key.array.dtype = 8, "array->dtype is 8");
    ARRAY_FAILS(key.array.ndim = 9; key.array.shape = shape, "array->ndim is 9, and 8 is the limit");
    ARRAY_FAILS(key.array.shape = NULL, "array->shape is NULL");
    ARRAY_FAILS(key.array.data = (char *)key.array.data + 1, "not a multiple of 2");
    ARRAY_FAILS(key.array.data = shape, "reserves");
    ARRAY_FAILS(key.array.data = NULL, "reserves");
    ARRAY_FAILS(key.view.shape[2] = -1, "array->shape[1] is -1");
    ARRAY_FAILS(key.view.strides[1] = -1, "array->strides[0] is -1");
    ARRAY_FAILS(key.view.shape[1] = INT64_MAX, "more bytes than there are addresses");
    ARRAY_FAILS(key.view.shape[1] = INT64_MAX; key.array.strides = NULL, "more bytes than there are addresses");
    ARRAY_FAILS(key.view.shape[1] = 100000, "reserves");
    /* What it may be: of no dimensions, of the most, of no elements, of many that are one. */
    keys_of(made->cache, entry, &key);
    key.array.ndim = 0;
    key.array.shape = key.array.strides = NULL;
    CHECK_OK(vattn_pin_dlpack(pin, &key.array, 0, &tensor));
    CHECK_OK(vattn_dlpack_destroy(tensor, 0));
    key.array.ndim = 8;
    key.array.shape = shape;
    CHECK_OK(vattn_pin_dlpack(pin, &key.array, 0, &tensor));
    CHECK_OK(vattn_dlpack_destroy(tensor, 0));
    shape[0] = INT64_MAX;
    key.array.strides = strides;
    CHECK_OK(vattn_pin_dlpack(pin, &key.array, 0, &tensor));
    CHECK_OK(vattn_dlpack_destroy(tensor, 0));
    shape[1] = 0;
    CHECK_OK(vattn_pin_dlpack(pin, &key.array, 0, &tensor));
    CHECK_OK(vattn_dlpack_destroy(tensor, 0));
    CHECK_OK(vattn_pin_destroy(pin));
    CHECK_FAILS(VATTN_INVALID_HANDLE, "has been destroyed", vattn_pin_destroy(pin));
    CHECK_OK(vattn_cache_retire(made->cache, entry.slot, &idle, 1));
    CHECK(world_stats(made->cache).pins == 0);
}

typedef struct {
    dl_versioned *tensor;
    unsigned warnings;
} heard;

/* Told of the cache's end, and drops a tensor then, as a collector of garbage may at any time. */
static void listen(void *user, int32_t level, const char *target, const char *message) {
    heard *told = (heard *)user;
    (void)target;
    if (level != VATTN_LOG_WARN || strstr(message, "pins") == NULL) return;
    told->warnings++;
    if (told->tensor != NULL) told->tensor->deleter(told->tensor);
    told->tensor = NULL;
}

/* Bytes that exist. */
static uint64_t used(const vattn_driver *driver) {
    uint64_t left = 0, total = 0;
    CHECK_OK(vattn_driver_memory(driver, &left, &total));
    return total - left;
}

/* A cache is destroyed under its pins, which keep their memory and nothing else. */
static void outlives_its_cache(int32_t background) {
    const struct timespec millisecond = {0, 1000000};
    world made;
    vattn_slot_tokens first, second, third;
    vattn_pin *pin = NULL, *addresses = NULL;
    vattn_pin_info info;
    vattn_live live;
    void *tensor = NULL, *dropped = NULL;
    dl_versioned *versioned;
    heard told = {NULL, 0};
    keys key;
    world_make(&made, background);
    first = request(made.cache, 60, 4);
    second = request(made.cache, 30, 5);
    third = request(made.cache, 30, 6);
    CHECK_OK(vattn_pin_create(made.cache, NULL, &addresses));
    CHECK(info_of(addresses).tokens == 0 && info_of(addresses).bytes == 0);
    CHECK_OK(vattn_pin_create(made.cache, &first.slot, &pin));
    keys_of(made.cache, first, &key);
    CHECK_OK(vattn_pin_dlpack(pin, &key.array, 1, &tensor));
    info = info_of(pin);
    CHECK_OK(vattn_pin_destroy(pin));
    CHECK_OK(vattn_pin_create(made.cache, &second.slot, &pin));
    keys_of(made.cache, second, &key);
    CHECK_OK(vattn_pin_dlpack(pin, &key.array, 1, &dropped));
    CHECK_OK(vattn_pin_destroy(pin));
    told.tensor = (dl_versioned *)dropped;
    (void)third;

    CHECK_OK(vattn_log_set(listen, &told, VATTN_LOG_WARN));
    CHECK_OK(vattn_cache_destroy(made.cache));
    CHECK_OK(vattn_log_set(NULL, NULL, VATTN_LOG_OFF));
    CHECK(told.warnings == 1 && told.tensor == NULL);
    CHECK_FAILS(VATTN_INVALID_HANDLE, "has been destroyed", vattn_cache_flush(made.cache));
    /* The tensor that was dropped inside of the callback goes on another thread. */
    for (unsigned tries = 0; tries < 10000; tries++) {
        if (used(made.driver) == info.bytes) break;
        nanosleep(&millisecond, NULL);
    }
    CHECK(used(made.driver) == info.bytes);
    versioned = (dl_versioned *)tensor;
    CHECK(keys_are(&versioned->tensor, 4));
    versioned->deleter(versioned);
    CHECK_OK(vattn_driver_live(made.driver, &live));
    CHECK(used(made.driver) == 0 && live.handles == 0 && live.mappings == 0 && live.reservations > 0);
    CHECK_OK(vattn_pin_describe(addresses, &info));
    CHECK_OK(vattn_pin_destroy(addresses));
    world_none_alive(made.driver, 0);
    CHECK_OK(vattn_driver_destroy(made.driver));
    CHECK_OK(vattn_driver_destroy(made.host));
    CHECK_OK(vattn_geometry_destroy(made.geometry));
}

/* In a child a deleter does nothing: what it would give back is not there. */
static void in_a_child(const world *made) {
    const vattn_fence idle = vattn_fence_idle();
    vattn_slot_tokens entry = request(made->cache, 60, 7);
    vattn_pin *pin = NULL;
    void *tensor = NULL;
    dl_versioned *versioned;
    vattn_pin_info info;
    keys key;
    pid_t child;
    int state = 0;
    keys_of(made->cache, entry, &key);
    CHECK_OK(vattn_pin_create(made->cache, &entry.slot, &pin));
    CHECK_OK(vattn_pin_dlpack(pin, &key.array, 1, &tensor));
    versioned = (dl_versioned *)tensor;
    SIZED(info);
    fflush(NULL);
    child = fork();
    if (child == 0) {
        alarm(60);
        check_passed = check_failed = 0;
        CHECK_FAILS(VATTN_FORKED, "made before fork", vattn_pin_describe(pin, &info));
        CHECK_FAILS(VATTN_FORKED, "made before fork", vattn_pin_destroy(pin));
        CHECK_FAILS(VATTN_FORKED, "made before fork", vattn_dlpack_destroy(tensor, 1));
        versioned->deleter(versioned);
        versioned->deleter(versioned);
        fflush(NULL);
        /* Another program, as in fork.c: Valgrind would call lost what the parent's threads had. */
        execlp(check_failed == 0 ? "true" : "false", "true", (char *)NULL);
        _exit(1);
    }
    CHECK(child > 0 && waitpid(child, &state, 0) == child);
    CHECK(WIFEXITED(state) && WEXITSTATUS(state) == 0);
    CHECK(keys_are(&versioned->tensor, 7));
    versioned->deleter(versioned);
    CHECK_OK(vattn_pin_destroy(pin));
    CHECK_OK(vattn_cache_retire(made->cache, entry.slot, &idle, 1));
    CHECK(world_stats(made->cache).pins == 0);
}

int main(void) {
    world made;
    world_make(&made, VATTN_BACKGROUND_THREAD);
    outlives_its_slot(&made);
    tensors(&made);
    refused(&made);
    in_a_child(&made);
    world_end(&made);
    outlives_its_cache(VATTN_BACKGROUND_OFF);
    outlives_its_cache(VATTN_BACKGROUND_THREAD);
    return check_end();
}
