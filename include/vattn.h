/*
 * vattn: a KV cache for LLM servers, contiguous in virtual memory and backed on demand.
 *
 * Made by cbindgen from src/ffi; do not edit. The first part of this file is a book, the second the
 * reference. C++ programs may prefer vattn.hpp, which wraps all of it.
 *
 * CONVENTIONS
 *
 * - Every function returns a vattn_status, VATTN_OK on success. The few that return something else can't
 *   fail, and say so.
 * - Inputs come before outputs. An output is written on success and on success alone; after a failure it is
 *   as it was before, and so is everything else that a caller can see.
 * - What went wrong is kept for the thread: vattn_last_error_message copies the text out, which names the
 *   function, the value, the limit and the cure, and vattn_last_error has the driver's call and code. A call
 *   that succeeds leaves both as they are.
 * - Objects are made by a _create function and given up by the _destroy function of their type. Destroying
 *   NULL does nothing. A handle is no address: one that was destroyed is refused with VATTN_INVALID_HANDLE,
 *   in every function, and so is one of another type. Nothing is ever read through it.
 * - An object that was made from others keeps what it needs of them. They may be destroyed before it, in
 *   any order.
 * - Strings that go in end with a NUL and are UTF-8; they, arrays and structs are read during the call and
 *   not kept. Strings that come out are the caller's until vattn_string_destroy, but for the constant ones.
 * - An array is a pointer and a count. NULL with a count of 0 is an array of none.
 * - Structs that may grow begin with struct_size, which the caller sets to sizeof the struct: `vattn_bytes
 *   bytes = { .struct_size = sizeof bytes };`. A program may be older or newer than the library: fields that
 *   the library does not know have to be 0 and are refused otherwise, fields that the program does not know
 *   have their defaults, and what comes out is 0 where the library does not know it.
 * - Enums arrive and leave as int32_t, so that a number from elsewhere is an error and not a trap. A number
 *   keeps its meaning in every later version.
 * - Sizes are in bytes, lengths in tokens, strides in elements, and the names say which where it could be
 *   either.
 * - No function ends the process, unless the heap has no memory left at all. A defect of the library comes
 *   back as VATTN_PANIC; the cache that was being worked on has failed from then on, and says so in every call.
 *
 * A FIRST PROGRAM
 *
 * [example]
 *     #include <stdio.h>
 *     #include <vattn.h>
 *
 *     static int failed(vattn_status status) {
 *         char text[512];
 *         if (status == VATTN_OK) return 0;
 *         vattn_last_error_message(text, sizeof text);
 *         fprintf(stderr, "%s\n", text);
 *         return 1;
 *     }
 *
 *     int main(void) {
 *         vattn_host_options host = { .struct_size = sizeof host, .capacity = (uint64_t)1 << 30 };
 *         vattn_geometry *model = NULL;
 *         vattn_driver *driver = NULL;
 *         vattn_cache *cache = NULL;
 *         vattn_config config;
 *         vattn_slot_tokens prompt = { .tokens = 1000 };
 *         vattn_view keys;
 *         vattn_fence idle = vattn_fence_idle();
 *
 *         if (failed(vattn_geometry_create_preset("llama-3-8b", 1, VATTN_DTYPE_MODEL, &model))) return 1;
 *         if (failed(vattn_driver_create_host(&host, &driver))) return 1;
 *         if (failed(vattn_config_init(&config, sizeof config))) return 1;
 *         config.max_slots = 64;
 *         if (failed(vattn_cache_create(&config, model, driver, &cache))) return 1;
 *
 *         if (failed(vattn_cache_acquire(cache, prompt.tokens, &prompt.slot))) return 1;
 *         if (failed(vattn_cache_step(cache, &prompt, 1))) return 1;      // the prompt is backed
 *         if (failed(vattn_cache_view(cache, 0, VATTN_KEY, &keys))) return 1;
 *         printf("layer 0: keys of slot %u at %p\n", prompt.slot.index,
 *                (void *)((uint16_t *)keys.data + prompt.slot.index * keys.strides[0]));
 *         if (failed(vattn_cache_retire(cache, prompt.slot, &idle, 1))) return 1;
 *
 *         vattn_cache_destroy(cache);
 *         vattn_driver_destroy(driver);
 *         vattn_geometry_destroy(model);
 *         return 0;
 *     }
 * [end]
 *
 * It needs no GPU: the host driver maps this machine's own memory. With vattn_driver_create_cuda the same
 * cache lies in a GPU's.
 *
 * HOW TO SIZE A CACHE
 *
 * Addresses cost nothing, so max_tokens is the longest context that the model serves and max_slots the most
 * requests that are ever in a batch. Memory is bounded by budget alone: what is left of the device beside
 * weights and activations. vattn_layout_plan tells, without a cache and without a device, what one token
 * takes and how many addresses are reserved; vattn_cache_bytes_for what a slot of so many tokens takes.
 *
 * layout says how many of the model's layers share a tensor. All of them (the default) need the fewest
 * mappings and waste the least; a tensor for each layer is what kernels with a fixed token stride want, and
 * costs a mapping for each layer's keys and values whenever a slot grows. With interleaved keys and values
 * half as many mappings are needed again.
 *
 * THE LIFE OF A SLOT
 *
 *     acquire ──► step ──► step ──► … ──► retire
 *                  │ ▲
 *                  ▼ │
 *               truncate
 *
 * vattn_cache_acquire gives a request a slot: an index into every tensor, with a generation that makes an id
 * of the past known for what it is. The slot has addresses for max_tokens tokens and no memory, or, where an
 * earlier request left some, that request's: it is adopted, and the first step maps little or nothing.
 *
 * vattn_cache_step says how many tokens the slot holds in all, from now on. It backs them.
 * vattn_cache_truncate takes tokens away: for rejected drafts, or a prefix that is kept.
 *
 * vattn_cache_retire ends the request. Its memory stays mapped, parked for the next one, until somebody
 * needs it: it counts as free to vattn_cache_fits and vattn_cache_admits.
 *
 * A STEP IN A SERVER'S LOOP
 *
 *     for (;;) {
 *         // 1. admit: how many of the queue fit now
 *         vattn_cache_admits(cache, prompts, waiting, &admitted);
 *         // ... vattn_cache_acquire_on(cache, prompt, stream, &slot) for each of them
 *
 *         // 2. who can go on? preempt those that can't: retire them, and queue them again
 *         vattn_cache_fits(cache, batch, count, fits);
 *
 *         // 3. one call for the whole batch: each slot with its tokens in all
 *         vattn_cache_step(cache, batch, count);
 *
 *         // 4. launch the model's kernels on the stream, over the views, with slot.index as batch index
 *
 *         // 5. retire what is done: its kernels may still run
 *         vattn_fence done = vattn_fence_stream(stream);
 *         vattn_cache_retire(cache, slot, &done, 1);
 *     }
 *
 * Views are asked for once: their addresses never change while the cache lives, so they can be captured
 * into a CUDA graph. A step of a slot whose memory is mapped costs a fraction of a microsecond, and the
 * mapper, a thread of the cache's own, maps ahead, so that most steps find it so. Where a program has
 * threads of its own for such work, VATTN_BACKGROUND_CALLER and vattn_cache_tend let it do that.
 *
 * FENCES
 *
 * Memory is unmapped only once the device is done with it. So whoever gives memory up (retire, truncate,
 * reclaim, trim) says when that will be: one fence for each stream that touched it.
 *
 *     vattn_fence_idle()          nothing is running: after a cudaStreamSynchronize, or on the host
 *     vattn_fence_stream(stream)  all that is in the stream by now; NULL is CUDA's legacy default stream
 *     vattn_fence_event(event)    an event that was recorded; it may be destroyed after the call
 *
 * There is no implicit fence, and no call of this library synchronises a device. The memory of a retired
 * slot may be adopted before its fence has fired: on the same stream the device's own order is enough, on
 * another vattn_cache_acquire_on has that stream wait. A fence on a stream that is being captured is refused
 * with VATTN_CAPTURING_STREAM.
 *
 * PINS AND DLPACK
 *
 * An array of another library over a slot's keys or values, a PyTorch tensor for example, may outlive the
 * request. A pin keeps its memory mapped where it is until the pin is destroyed: through retire, truncate,
 * reclaim, trim, a smaller budget, adoption by another request, and the end of the cache.
 *
 *     vattn_pin *pin;
 *     vattn_pin_create(cache, &slot, &pin);             // what backs the slot's tokens now
 *
 *     int64_t shape[3] = { tokens, keys.shape[2], keys.shape[3] };
 *     vattn_array array = { .struct_size = sizeof array, .data = where, .dtype = keys.dtype,
 *                           .ndim = 3, .shape = shape, .strides = keys.strides + 1 };
 *     void *tensor;                                     // a DLManagedTensorVersioned
 *     vattn_pin_dlpack(pin, &array, 1, &tensor);        // a pin of its own, given up by its deleter
 *     vattn_pin_destroy(pin);
 *
 * What a pin keeps is memory and addresses, not contents: whoever has the slot, or is given it next, writes
 * there. Pinned memory counts as mapped and against the budget, and vattn_cache_fits and vattn_cache_admits do
 * not take it for free; vattn_stats has the number of pins, vattn_bytes what they keep. A pin with no slot keeps
 * the addresses alone. A pin has no fence: it is given up once the device is done with the memory, or before the
 * slot is retired with a fence that covers what was launched.
 *
 * A tensor's deleter may be called on any thread at any time, inside a log callback too. In a child after fork
 * it does nothing.
 *
 * WHICH KERNEL NEEDS WHICH TILE
 *
 * What lies past a slot's tokens is not backed, and a kernel that reads there faults. Most do not: PyTorch's
 * FlashAttention with variable lengths, SDPA over exact views, FlashInfer over the paged view,
 * FlashAttention-3 over one slot's exact view. FlashAttention-3 over the whole batch with lengths given loads
 * whole tiles. For it, tile_tokens rounds up what a step backs: vattn_geometry_tile_tokens knows by how much,
 * for "fa3-decode", "fa3-causal", "fa3-window", "fa3-view", "torch-varlen", "sdpa-view" and "flashinfer".
 * What each was measured with is in docs/kernels.md.
 *
 * BUFFERS
 *
 * A vattn_buffer is what a cache is built on, without the cache: a range of addresses that never move, of
 * which any part can be backed. For a tensor that grows in place, or for a pool of the program's own.
 *
 *     vattn_buffer_options options = { .struct_size = sizeof options, .size = (uint64_t)1 << 40 };
 *     vattn_buffer_create(&options, driver, &buffer);            // addresses, and no memory
 *     vattn_buffer_commit(buffer, offset, size);                 // every byte of it can be touched now
 *     vattn_buffer_decommit(buffer, offset, size, &fence, 1);    // and now it need not be any more
 *
 * Ranges are any bytes: of two rows that share a granule one can go without the other. Memory is allocated in
 * extents, each the largest that fits into what of a commit is not backed yet, up to largest_extent, and is
 * given back by whole extents of which no byte is committed. On an H200 a commit costs about 45 µs an extent,
 * however large: 1.4 ms a GiB with the default of 32 MiB, and nothing where all of it is committed already.
 *
 * vattn_pin_create_buffer pins a buffer, for an array over it that may outlive it. Decommitting under a pin
 * works: such an array has parts that are not there, and its owner knows which.
 *
 * WHEN A CALL FAILS
 *
 *     VATTN_OUT_OF_BUDGET           retire or preempt a request, or raise the budget; then call again
 *     VATTN_OUT_OF_DEVICE_MEMORY    somebody else has the device's memory: lower the budget, or trim
 *     VATTN_NO_FREE_SLOT            let the request wait
 *     VATTN_SLOT_BUSY               another thread works on the slot; let it finish
 *     VATTN_CAPTURING_STREAM        call before the capture begins, or after it ends
 *     VATTN_DEVICE_LOST,            destroy the cache; on the device nothing can be saved. The process, and
 *     VATTN_UNHEALTHY, VATTN_PANIC  caches on other devices, go on
 *     VATTN_FORKED                  make objects in the child
 *     all others                    a mistake in the program: the text says which, and what would be right
 *
 * vattn_cache_health tells whether a cache can be trusted:
 *
 *     call                                          healthy   degraded   failed
 *     step, acquire, truncate, prefetch,            yes       yes        no
 *     pins of a slot
 *     retire, reclaim, trim, set_budget,            yes       yes        no
 *     tend, flush
 *     fits, admits, views, layout, statistics,      yes       yes        yes
 *     pins of addresses
 *     destroy                                       yes       yes        yes
 *
 * THREADS AND FORK
 *
 * Any thread may call any function with any object at any time. Of two calls that name the same slot at once
 * one may get VATTN_SLOT_BUSY, or see what the other has done already. Destroying an object waits for the
 * calls on it that are under way, and those that come later are refused. The last error is the thread's own.
 * A log callback must not call the library: such calls are refused with VATTN_IN_CALLBACK.
 *
 * After fork the objects of the parent are refused in the child with VATTN_FORKED, destroying them included:
 * the threads and the device's context that they need are not there. The child can make objects of its own.
 *
 * WHAT IS LEFT OUT
 *
 * - Copying, sharing or swapping tokens: the library never touches what is in memory.
 * - Scheduling: fits and admits answer, the server decides.
 * - Allocation callbacks: what the library keeps for itself is small, and in the process's heap.
 * - A function that waits for the device: streams and events are the program's.
 */

#ifndef VATTN_H
#define VATTN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>


/// The version of the ABI that this header describes. It changes where a program that was built with an
/// earlier header would no longer work; fields and functions are added without.
#define VATTN_ABI_VERSION 1

/// An amount that the library chooses, where a field says that it can.
#define VATTN_AUTO UINT64_MAX

/// No slot: what `spare_slot` says where there is none.
#define VATTN_NO_SLOT UINT32_MAX

/// Any of a driver's calls.
#define VATTN_ANY_VERB -1

/// What a call comes to. Zero is success. Numbers are never used for anything else in a later version;
/// new ones may come, so treat one that you do not know as a failure.
enum vattn_status
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    /// All is done.
    VATTN_OK = 0,
    /// A model's dimensions, or a file that describes them, can't be used as they are.
    VATTN_INVALID_GEOMETRY = 1,
    /// An option of the cache can't be used as it is.
    VATTN_INVALID_CONFIG = 2,
    /// An argument of a call can't be used as it is: NULL, out of range, a struct of an unknown size.
    VATTN_INVALID_ARGUMENT = 3,
    /// The budget is used up by slots that are in use. Retire or truncate some, or raise the budget.
    VATTN_OUT_OF_BUDGET = 4,
    /// The device has no memory left. Retiring does not help if another program holds it.
    VATTN_OUT_OF_DEVICE_MEMORY = 5,
    /// The operating system allows no further mapping (host driver: `vm.max_map_count`).
    VATTN_OUT_OF_MAPPINGS = 6,
    /// Not so many addresses can be reserved. Use fewer slots, fewer tokens a slot or a smaller buffer.
    VATTN_OUT_OF_ADDRESS_SPACE = 7,
    /// Every slot is in use. Retire one, or create the cache with more.
    VATTN_NO_FREE_SLOT = 8,
    /// The slot's request has been retired; the id is of the past. Use the id of the latest acquire.
    VATTN_STALE_SLOT = 9,
    /// The slot is another cache's, perhaps one that was destroyed.
    VATTN_FOREIGN_SLOT = 10,
    /// Another thread is working on the slot. Let it finish.
    VATTN_SLOT_BUSY = 11,
    /// One call names a slot twice. Name it once, with its total.
    VATTN_DUPLICATE_SLOT = 12,
    /// More tokens than a slot can hold. Create the cache with a larger `max_tokens`.
    VATTN_TOO_MANY_TOKENS = 13,
    /// Fewer tokens than the slot holds. `vattn_cache_truncate` is the call for that.
    VATTN_FEWER_TOKENS = 14,
    /// A fence was asked of a stream that is being captured into a graph. Call before or after.
    VATTN_CAPTURING_STREAM = 15,
    /// The driver refused for a reason of its own: `vattn_last_error` has its call and its code.
    VATTN_DRIVER = 16,
    /// The device or its context is gone. Nothing on it can be used again; destroy the cache.
    VATTN_DEVICE_LOST = 17,
    /// This cache does not work any more, or not in this state of health. See `vattn_cache_health`.
    VATTN_UNHEALTHY = 18,
    /// This machine, device or build can't do that. The text says what is missing.
    VATTN_UNSUPPORTED = 19,
    /// A defect of this library; please report it.
    VATTN_INTERNAL = 20,
    /// The handle is of an object that was destroyed, of another kind, or was never given out.
    VATTN_INVALID_HANDLE = 101,
    /// The object was made before `fork`, and this is the child. Make objects of its own there.
    VATTN_FORKED = 102,
    /// The library panicked, which is a defect of it; please report the text. The cache that was being
    /// worked on has failed from then on.
    VATTN_PANIC = 103,
    /// The call was made from inside a log callback. Make it after the callback has returned.
    VATTN_IN_CALLBACK = 104,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum vattn_status vattn_status;
#else
typedef int32_t vattn_status;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/// How much a message matters.
enum vattn_log_level
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    /// Nothing at all.
    VATTN_LOG_OFF = 0,
    /// Something is lost: a failed cache, memory that could not be given back.
    VATTN_LOG_ERROR = 1,
    /// Something is worse than it should be: quarantined memory, failed work in the background.
    VATTN_LOG_WARN = 2,
    /// What happens rarely: a cache is made, the budget is changed.
    VATTN_LOG_INFO = 3,
    /// What happens often.
    VATTN_LOG_DEBUG = 4,
    /// Everything.
    VATTN_LOG_TRACE = 5,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum vattn_log_level vattn_log_level;
#else
typedef int32_t vattn_log_level;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/// The type of a cache's elements.
enum vattn_dtype
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    /// As the model says; bfloat16 where nothing says otherwise. Never found in an output.
    VATTN_DTYPE_MODEL = 0,
    /// IEEE single precision, 4 bytes.
    VATTN_DTYPE_F32 = 1,
    /// IEEE half precision, 2 bytes.
    VATTN_DTYPE_F16 = 2,
    /// bfloat16, 2 bytes.
    VATTN_DTYPE_BF16 = 3,
    /// 8-bit float, 4 bits of exponent and 3 of mantissa, without infinities (PyTorch's float8_e4m3fn).
    VATTN_DTYPE_F8_E4M3 = 4,
    /// 8-bit float, 5 bits of exponent and 2 of mantissa (PyTorch's float8_e5m2).
    VATTN_DTYPE_F8_E5M2 = 5,
    /// Signed byte.
    VATTN_DTYPE_I8 = 6,
    /// Unsigned byte.
    VATTN_DTYPE_U8 = 7,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum vattn_dtype vattn_dtype;
#else
typedef int32_t vattn_dtype;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/// Keys or values.
enum vattn_part
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    /// The keys, or the latent of a layer that keeps only that.
    VATTN_KEY = 0,
    /// The values. A latent layer has none.
    VATTN_VALUE = 1,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum vattn_part vattn_part;
#else
typedef int32_t vattn_part;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/// Where memory is, with the numbers that DLPack has for it.
enum vattn_device_type
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    /// The processor's memory.
    VATTN_DEVICE_CPU = 1,
    /// A CUDA device's.
    VATTN_DEVICE_CUDA = 2,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum vattn_device_type vattn_device_type;
#else
typedef int32_t vattn_device_type;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/// The calls of a driver, under CUDA's names.
enum vattn_verb
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    /// `cuMemAddressReserve`
    VATTN_VERB_RESERVE = 0,
    /// `cuMemCreate`
    VATTN_VERB_CREATE = 1,
    /// `cuMemMap`
    VATTN_VERB_MAP = 2,
    /// `cuMemSetAccess`
    VATTN_VERB_SET_ACCESS = 3,
    /// `cuMemUnmap`
    VATTN_VERB_UNMAP = 4,
    /// `cuMemRelease`
    VATTN_VERB_RELEASE = 5,
    /// `cuMemAddressFree`
    VATTN_VERB_FREE = 6,
    /// `cuMemGetInfo`
    VATTN_VERB_MEMORY_INFO = 7,
    /// `cuEventRecord`, with the creation of the event
    VATTN_VERB_RECORD_EVENT = 8,
    /// `cuStreamWaitEvent` and `cuEventRecord` on a stream of the library's own
    VATTN_VERB_FOLLOW_EVENT = 9,
    /// `cuEventQuery`
    VATTN_VERB_QUERY_EVENT = 10,
    /// `cuEventSynchronize`
    VATTN_VERB_WAIT_EVENT = 11,
    /// `cuEventDestroy`
    VATTN_VERB_DESTROY_EVENT = 12,
    /// `cuStreamWaitEvent`
    VATTN_VERB_STREAM_WAIT = 13,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum vattn_verb vattn_verb;
#else
typedef int32_t vattn_verb;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/// How many layers share a tensor. The more they are, the fewer mappings and the less waste a token costs,
/// and the further apart the tokens of one layer lie.
enum vattn_layout_kind
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    /// All layers in one tensor.
    VATTN_LAYOUT_SLICED = 0,
    /// Each layer has tensors of its own: the shape that kernels are written for.
    VATTN_LAYOUT_PER_LAYER = 1,
    /// `layers_per_tensor` successive layers share one; the last may have fewer.
    VATTN_LAYOUT_GROUPED = 2,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum vattn_layout_kind vattn_layout_kind;
#else
typedef int32_t vattn_layout_kind;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/// Whether keys and values share a tensor.
enum vattn_kv_order
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    /// Keys in one tensor, values in another.
    VATTN_KV_APART = 0,
    /// A token's values of a layer follow its keys of that layer.
    VATTN_KV_INTERLEAVED = 1,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum vattn_kv_order vattn_kv_order;
#else
typedef int32_t vattn_kv_order;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/// When physical memory is allocated.
enum vattn_commit
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    /// When a step needs it.
    VATTN_COMMIT_ON_DEMAND = 0,
    /// All of the budget when the cache is made, in a mix of sizes that suits the layout.
    VATTN_COMMIT_WHOLE = 1,
    /// What `extents` says when the cache is made, the rest when a step needs it.
    VATTN_COMMIT_EXTENTS = 2,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum vattn_commit vattn_commit;
#else
typedef int32_t vattn_commit;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/// Who does the work that need not be done on the path of a request: mapping ahead of growth, keeping
/// extents at hand, unmapping what was given up.
enum vattn_background
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    /// A thread of the cache's own, the mapper: asleep while there is nothing to do, joined when the cache
    /// is destroyed.
    VATTN_BACKGROUND_THREAD = 0,
    /// Whoever calls `vattn_cache_tend`, once an iteration.
    VATTN_BACKGROUND_CALLER = 1,
    /// Nobody: every call does all of its work before it returns, and waits for the fences of what it
    /// unmaps.
    VATTN_BACKGROUND_OFF = 2,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum vattn_background vattn_background;
#else
typedef int32_t vattn_background;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/// When the memory that a request gave up is unmapped.
enum vattn_reclaim
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    /// When somebody else needs it: until then a new request may take it over without a call of the driver.
    VATTN_RECLAIM_DEFERRED = 0,
    /// As soon as its fences have fired.
    VATTN_RECLAIM_EAGER = 1,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum vattn_reclaim vattn_reclaim;
#else
typedef int32_t vattn_reclaim;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/// What kind of fence.
enum vattn_fence_kind
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    /// Nothing on the device uses the memory any more. `handle` is NULL.
    VATTN_FENCE_IDLE = 0,
    /// All that is in the stream by now. NULL is CUDA's legacy default stream.
    VATTN_FENCE_STREAM = 1,
    /// An event that the caller recorded. Prefer a stream: an event is followed on one of a few streams of
    /// the library's, where one that is long in firing can hold up others.
    VATTN_FENCE_EVENT = 2,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum vattn_fence_kind vattn_fence_kind;
#else
typedef int32_t vattn_fence_kind;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/// Whether a cache can be trusted with more work.
enum vattn_health
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    /// All is well.
    VATTN_HEALTHY = 0,
    /// The driver failed, and then refused to undo: some extents are quarantined, nothing else is affected.
    /// Ends by itself once the driver lets go of them.
    VATTN_DEGRADED = 1,
    /// The device or its context is gone, or the library panicked. Only views, statistics and destroying
    /// still work.
    VATTN_FAILED = 2,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum vattn_health vattn_health;
#else
typedef int32_t vattn_health;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/// A range of addresses of which a part is backed: see "Buffers" above. Any thread may call any function on
/// it at any time.
typedef struct vattn_buffer vattn_buffer;

/// A KV cache. Any thread may call any function on it at any time.
typedef struct vattn_cache vattn_cache;

/// Whoever maps memory. A cache keeps the driver that it was made with alive, and several caches may
/// share one.
typedef struct vattn_driver vattn_driver;

/// What a model (one rank's part of it) keeps for each token: its layers in model order. Never changes.
typedef struct vattn_geometry vattn_geometry;

/// What keeps memory mapped at its addresses, and addresses reserved.
typedef struct vattn_pin vattn_pin;

/// The last call of this thread that failed: what a program may branch on.
typedef struct {
    /// `sizeof(vattn_error)`, set by the caller.
    size_t struct_size;
    /// A `vattn_status`; `VATTN_OK` while no call of this thread has failed.
    int32_t status;
    /// Which call of the driver failed, a `vattn_verb`; -1 where none did.
    int32_t verb;
    /// The driver's own number: a `CUresult`, or an `errno` of the host. 0 where no call failed.
    int64_t driver_code;
    /// The bytes that the driver's call was about; 0 where it has none.
    uint64_t driver_bytes;
    /// The name of `driver_code`, such as `CUDA_ERROR_OUT_OF_MEMORY`; empty where no call failed.
    char driver_name[64];
} vattn_error;

/// Is told of a message: a `vattn_log_level`, the part of the library that speaks, and the text. Both
/// strings end with a NUL and live until it returns. It may be called by any thread, the mapper among
/// them, by several at once, and while locks are held, so it must not call the library
/// (`VATTN_IN_CALLBACK`), not throw, and not take long.
typedef void (*vattn_log_callback)(void *user, int32_t level, const char *target, const char *text);

/// Successive layers that keep the same. Layers that keep nothing for a token are left out.
typedef struct {
    /// How many layers, from 1.
    uint32_t layers;
    /// KV heads of this rank (not query heads). 0 for layers that keep one latent vector of `key_dim`
    /// elements from which keys and values are computed (MLA), its rotary part included.
    uint32_t kv_heads;
    /// Elements of a key, or of the latent.
    uint32_t key_dim;
    /// Elements of a value; 0 for a latent.
    uint32_t value_dim;
} vattn_layers;

/// A geometry in numbers.
typedef struct {
    /// `sizeof(vattn_geometry_info)`, set by the caller.
    size_t struct_size;
    /// How many layers keep something.
    uint32_t layers;
    /// A `vattn_dtype`, the same in all layers.
    int32_t dtype;
    /// Bytes that one token takes in all layers, with no rounding: the packed floor.
    uint64_t bytes_per_token;
} vattn_geometry_info;

/// How the host driver allocates this machine's own memory. Linux only.
typedef struct {
    /// `sizeof(vattn_host_options)`, set by the caller.
    size_t struct_size;
    /// The unit of allocation in bytes: a power of two, and a multiple of the page size. 0 for 2 MiB.
    uint64_t granule;
    /// Bytes that can be created in all. They are taken from the system when they are first touched, so
    /// more than the machine has ends in `SIGBUS` or the kernel's OOM killer.
    uint64_t capacity;
    /// How many of the kernel's mappings may be used; 0 for what `vm.max_map_count` leaves.
    uint64_t max_mappings;
} vattn_host_options;

/// How the CUDA driver allocates a GPU's memory.
typedef struct {
    /// `sizeof(vattn_cuda_options)`, set by the caller.
    size_t struct_size;
    /// The device's number; -1 for that of the context which is current on this thread, or the first
    /// where none is.
    int32_t ordinal;
    /// 1 where every allocation can be exported through a file descriptor, else 0.
    uint32_t exportable;
    /// 1 where a network card can read and write every allocation, else 0.
    uint32_t rdma;
    /// 0.
    uint32_t reserved;
} vattn_cuda_options;

/// How large a device the ledger driver pretends to be. It keeps the books and maps nothing: for
/// simulations of sizes that no machine at hand can map. Its addresses must not be touched.
typedef struct {
    /// `sizeof(vattn_ledger_options)`, set by the caller.
    size_t struct_size;
    /// The unit of allocation in bytes, a power of two. 0 for 2 MiB.
    uint64_t granule;
    /// Bytes that can be created in all.
    uint64_t capacity;
    /// Bytes of addresses that can be reserved at a time; 0 for no limit.
    uint64_t addresses;
} vattn_ledger_options;

/// What a driver is; the same for its whole life.
typedef struct {
    /// `sizeof(vattn_driver_info)`, set by the caller.
    size_t struct_size;
    /// `host`, `ledger` or `cuda`.
    char name[16];
    /// A `vattn_device_type`.
    int32_t device_type;
    /// The device's number; 0 for the processor.
    int32_t device_id;
    /// The unit of allocation in bytes.
    uint64_t granule;
    /// 1 where allocations can be exported through a file descriptor.
    uint32_t exportable;
    /// 1 where a network card can read and write them.
    uint32_t rdma;
} vattn_driver_info;

/// A device as CUDA describes it.
typedef struct {
    /// `sizeof(vattn_cuda_device)`, set by the caller.
    size_t struct_size;
    /// Such as `NVIDIA H200`.
    char name[256];
    /// The compute capability's first number.
    uint32_t major;
    /// The compute capability's second number.
    uint32_t minor;
    /// Bytes of memory in all.
    uint64_t memory;
    /// The smallest unit of allocation in bytes; 0 without virtual memory.
    uint64_t granule;
    /// The unit that CUDA recommends; 0 without virtual memory.
    uint64_t recommended_granule;
    /// 1 where it can map memory behind addresses: without that, no cache.
    uint32_t virtual_memory;
    /// 1 where allocations can be exported through a file descriptor.
    uint32_t exportable;
    /// 1 where a network card can read and write them.
    uint32_t rdma;
    /// 1 where they can be exported to other machines of one NVLink fabric, as far as the device goes.
    uint32_t fabric;
} vattn_cuda_device;

/// So many extents of one size.
typedef struct {
    /// Granules of each: 1, 2, 4 … 256.
    uint64_t granules;
    /// How many.
    uint64_t count;
} vattn_extents;

/// All options of a cache. `vattn_config_init` fills in the defaults; then change what you like.
typedef struct {
    /// `sizeof(vattn_config)`, set by `vattn_config_init`.
    size_t struct_size;
    /// Bytes of physical memory that the cache may hold. Default `VATTN_AUTO`: what the driver says is free.
    uint64_t budget;
    /// The most tokens that a slot can hold. Costs addresses only. Default 131,072.
    uint64_t max_tokens;
    /// How many requests can have a slot at a time, up to 2^20. Default 1,024.
    uint32_t max_slots;
    /// 1 for one more slot behind the requests' own, always backed: padded entries of a batch write there.
    /// Default 0.
    uint32_t spare_slot;
    /// What a step rounds the tokens it backs up to a multiple of, for kernels that load whole tiles past a
    /// sequence's length; clipped at the slot's end. Default 1: exactly the tokens.
    uint32_t tile_tokens;
    /// Tokens of a page, for kernels that read the tensors as pages. Default 16.
    uint32_t page_tokens;
    /// A `vattn_layout_kind`. Default `VATTN_LAYOUT_SLICED`.
    int32_t layout;
    /// With `VATTN_LAYOUT_GROUPED`, how many; else 0. Default 0.
    uint32_t layers_per_tensor;
    /// A `vattn_kv_order`. Default `VATTN_KV_APART`.
    int32_t kv_order;
    /// A plan may round a need up by at most the need divided by this. Default 32.
    uint32_t slack_divisor;
    /// A `vattn_background`. Default `VATTN_BACKGROUND_THREAD`.
    int32_t background;
    /// A `vattn_reclaim`. Default `VATTN_RECLAIM_DEFERRED`.
    int32_t reclaim;
    /// With how many tokens to go the memory for a slot's growth is mapped; 0 turns it off. Default 32.
    uint64_t look_ahead;
    /// Bytes that may be mapped ahead at a time, for all slots together. They stand in nobody's way:
    /// whoever needs them takes them. Default `VATTN_AUTO`: an eighth of the budget.
    uint64_t look_ahead_budget;
    /// Bytes that may be kept created and mapped nowhere, ready for the next step; 0 turns it off. Default
    /// `VATTN_AUTO`: a sixty-fourth of the budget.
    uint64_t at_hand;
    /// A `vattn_commit`. Default `VATTN_COMMIT_ON_DEMAND`.
    int32_t commit;
    /// 0.
    uint32_t reserved;
    /// With `VATTN_COMMIT_EXTENTS`, which; read while the cache is created. Default NULL.
    const vattn_extents *extents;
    /// How many elements `extents` has. Default 0.
    size_t extents_count;
} vattn_config;

/// How a cache's tensors lie, in numbers: the same for its whole life.
typedef struct {
    /// `sizeof(vattn_layout)`, set by the caller.
    size_t struct_size;
    /// Layers with a view.
    uint32_t layers;
    /// Tensors, each one range of addresses.
    uint32_t tensors;
    /// The first dimension of every tensor: the requests' slots and the spare one.
    uint32_t slots;
    /// The index of the slot that is always backed, or `VATTN_NO_SLOT`.
    uint32_t spare_slot;
    /// Tokens of a page.
    uint32_t page_tokens;
    /// What a step rounds up to.
    uint32_t tile_tokens;
    /// Pages from one slot to the next.
    uint64_t pages_per_slot;
    /// The most tokens that a slot can hold.
    uint64_t max_tokens;
    /// Tokens from one slot to the next, the same in all tensors.
    uint64_t stride_tokens;
    /// Bytes of a granule, the unit of mapping.
    uint64_t granule;
    /// Bytes that one token takes in all tensors, with no rounding.
    uint64_t bytes_per_token;
    /// Bytes of addresses that all tensors reserve together.
    uint64_t virtual_size;
} vattn_layout;

/// One tensor: a range of addresses, as whoever registers memory with a network card wants it.
typedef struct {
    /// `sizeof(vattn_tensor)`, set by the caller.
    size_t struct_size;
    /// Where it begins. Never changes while the cache lives.
    void *data;
    /// Bytes of addresses, of all slots together. What no step has asked for has no memory behind it.
    uint64_t size;
    /// Bytes from one slot to the next: a multiple of the granule.
    uint64_t slot_stride;
    /// Bytes that one token takes in it, without padding: what all of its layers keep, one after another.
    uint64_t token_bytes;
    /// The first of the model's layers that lie in it.
    uint32_t first_layer;
    /// How many layers lie in it.
    uint32_t layers;
    /// 1 where it holds keys, or latents.
    uint32_t has_keys;
    /// 1 where it holds values.
    uint32_t has_values;
    /// A `vattn_device_type`.
    int32_t device_type;
    /// The device's number; 0 for the processor.
    int32_t device_id;
} vattn_tensor;

/// A layer's keys or values as a strided array of four dimensions, the way kernels and DLPack take it.
///
/// Element `[i, j, h, d]` lies `i * strides[0] + j * strides[1] + h * strides[2] + d` elements behind
/// `data`. It says where tokens are, not that they are backed: touching what no step has asked for is
/// fatal, a segmentation fault on the host and an illegal access on a device.
typedef struct {
    /// Where element `[0, 0, 0, 0]` is. Never changes while the cache lives.
    void *data;
    /// Elements along each dimension.
    int64_t shape[4];
    /// From one element to the next along each dimension, in elements. The last is 1.
    int64_t strides[4];
    /// A `vattn_dtype`.
    int32_t dtype;
    /// Bytes of an element.
    uint32_t element_bytes;
    /// A `vattn_device_type`.
    int32_t device_type;
    /// The device's number; 0 for the processor.
    int32_t device_id;
} vattn_view;

/// A request's place in every tensor, with the proof that it is this request's.
typedef struct {
    /// The number that kernels take: the first dimension's index in every tensor.
    uint32_t index;
    /// The cache that it belongs to.
    uint32_t cache;
    /// Which of the index's successive requests this is, from 1. A slot of all zeros is none.
    uint64_t generation;
} vattn_slot;

/// A slot and the number of tokens that it holds in all, those of earlier steps included.
typedef struct {
    /// The slot.
    vattn_slot slot;
    /// Its tokens in all.
    uint64_t tokens;
} vattn_slot_tokens;

/// What tells that device work submitted earlier is done with memory.
typedef struct {
    /// A `vattn_fence_kind`.
    int32_t kind;
    /// 0.
    uint32_t reserved;
    /// The stream (`cudaStream_t`, `CUstream`) or the event (`cudaEvent_t`, `CUevent`); NULL for none.
    void *handle;
} vattn_fence;

/// What a pin keeps.
typedef struct {
    /// `sizeof(vattn_pin_info)`, set by the caller.
    size_t struct_size;
    /// Tokens that it keeps backed: those of the slot when it was pinned, and what `tile_tokens` adds.
    uint64_t tokens;
    /// Bytes of physical memory that it keeps in place. Other pins may keep the same. Of a buffer, what it
    /// holds now.
    uint64_t bytes;
} vattn_pin_info;

/// An array in memory.
typedef struct {
    /// `sizeof(vattn_array)`, set by the caller.
    size_t struct_size;
    /// Where its first element is.
    void *data;
    /// A `vattn_dtype`, of the elements.
    int32_t dtype;
    /// Its dimensions: 8 at most.
    uint32_t ndim;
    /// Elements along each dimension, none of them negative. NULL with `ndim` 0.
    const int64_t *shape;
    /// From one element to the next along each dimension, in elements, none of them negative. NULL if they lie
    /// side by side, the last dimension's closest.
    const int64_t *strides;
} vattn_array;

/// How much memory is used for what, in bytes. `held = mapped + parked + free_bytes + quarantined`, but for
/// what is being moved at this moment, by the mapper or another thread, which is held and neither.
typedef struct {
    /// `sizeof(vattn_bytes)`, set by the caller.
    size_t struct_size;
    /// What the tokens of the slots in use fill, with no rounding at all.
    uint64_t needed;
    /// Extents of slots in use, up to the last one that holds a byte of their tokens, and those that pins keep.
    uint64_t mapped;
    /// Extents that are mapped, hold nobody's tokens and are not pinned: all of a retired slot's, and what lies
    /// beyond the tokens of a slot in use.
    uint64_t parked;
    /// What of `parked` was mapped ahead for slots in use.
    uint64_t ahead;
    /// Extents that are created and mapped nowhere.
    uint64_t free_bytes;
    /// Extents that the driver would not let go of after a failure.
    uint64_t quarantined;
    /// All that was created and not released. While extents are made of other ones, those that go and those
    /// that come both count, so for a moment it can be more than the budget; what exists never is.
    uint64_t held;
    /// What may be held at most, in whole granules.
    uint64_t budget;
    /// What of `mapped` pins keep, whether anybody's tokens need it or not.
    uint64_t pinned;
} vattn_bytes;

/// Calls of the driver.
typedef struct {
    /// How many there were.
    uint64_t calls;
    /// How many of them failed.
    uint64_t failed;
    /// How long they took in all.
    uint64_t nanoseconds;
} vattn_call_stats;

/// Everything that a cache counts, at one moment. `vattn_cache_stats_json` has more: calls of the driver by
/// verb, extents by size, failures by kind.
typedef struct {
    /// `sizeof(vattn_stats)`, set by the caller.
    size_t struct_size;
    /// A `vattn_health`.
    int32_t health;
    /// 0.
    uint32_t reserved;
    /// Slots that a request has.
    uint64_t active_slots;
    /// Slots that nobody has and that still have memory.
    uint64_t parked_slots;
    /// Slots that requests can have.
    uint64_t max_slots;
    /// Steps that succeeded.
    uint64_t steps;
    /// Slots that were acquired, adopted ones included.
    uint64_t acquired;
    /// Slots that were acquired with memory in them.
    uint64_t adopted;
    /// Slots that were retired.
    uint64_t retired;
    /// Parked extents that were unmapped for somebody else.
    uint64_t reclaimed;
    /// Free extents that were given up so that others, of another size, could be made.
    uint64_t resized;
    /// Operations that failed on the way and were undone.
    uint64_t rolled_back;
    /// Extents that were mapped before a step needed them.
    uint64_t mapped_ahead;
    /// Work in the background that a call of the driver put an end to.
    uint64_t background_failures;
    /// What could not be given back when it was dropped.
    uint64_t refused_drops;
    /// Calls that returned an error.
    uint64_t failures;
    /// Calls of the driver: all of them.
    vattn_call_stats driver;
    /// Those of them that were made beside the path of requests: by the mapper, or in `vattn_cache_tend`.
    vattn_call_stats background;
    /// Pins that are alive, DLPack tensors among them.
    uint64_t pins;
} vattn_stats;

/// How large a buffer is, and its extents.
typedef struct {
    /// `sizeof(vattn_buffer_options)`, set by the caller.
    size_t struct_size;
    /// Bytes of addresses, rounded up to granules. Addresses cost nothing.
    uint64_t size;
    /// The most bytes of one allocation: a granule times a power of two. 0 for 32 MiB, or a granule where
    /// that is more. Large ones make commits cheap, small ones make decommits exact.
    uint64_t largest_extent;
} vattn_buffer_options;

/// A buffer in numbers.
typedef struct {
    /// `sizeof(vattn_buffer_info)`, set by the caller.
    size_t struct_size;
    /// The address of the first byte, which never changes. What is not committed faults when it is touched.
    void *data;
    /// Bytes of addresses.
    uint64_t size;
    /// The driver's unit of allocation in bytes.
    uint64_t granule;
    /// Bytes that are committed.
    uint64_t committed;
    /// Bytes of memory that were allocated and not given back: whole extents.
    uint64_t held;
    /// A `vattn_device_type`.
    int32_t device_type;
    /// The device's number; 0 for the processor.
    int32_t device_id;
} vattn_buffer_info;

/// What is alive of a driver's.
typedef struct {
    /// Allocations.
    uint64_t handles;
    /// Mappings.
    uint64_t mappings;
    /// Ranges of addresses.
    uint64_t reservations;
    /// Events.
    uint64_t events;
} vattn_live;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/// The name of a status in one word, such as `out_of_budget`; `unknown` for a number that is none. The
/// string is the library's and lives as long as it.
const char *vattn_status_name(int32_t status);

/// The last call of this thread that failed. A call that succeeds leaves it as it is, and so does this
/// one, whatever it comes to.
///
/// # Safety
/// - `out` is NULL, or points to a `vattn_error` of which `struct_size` is set.
vattn_status vattn_last_error(vattn_error *out);

/// Copies out the text of the last call of this thread that failed: it names the value, the limit and
/// the cure. At most `capacity` bytes are written, the closing NUL among them; what does not fit is left
/// out. Returns the length of the whole text without its NUL, so a first call with NULL and 0 tells how
/// much room it needs. Empty while no call has failed; a call that succeeds leaves it as it is.
///
/// # Safety
/// - `buffer` is NULL and `capacity` 0, or `capacity` bytes can be written there.
size_t vattn_last_error_message(char *buffer, size_t capacity);

/// The version of the ABI that the library has: compare it with `VATTN_ABI_VERSION`.
uint32_t vattn_abi_version(void);

/// The version of the library, such as `0.1.0`. The string is the library's and lives as long as it.
const char *vattn_version(void);

/// What this library finds on this machine, as one JSON object: its version, CUDA's version and devices,
/// or why there are none, and whether the host driver works. The text is the caller's:
/// `vattn_string_destroy` gives it up.
///
/// # Safety
/// - `out` is NULL, or a pointer can be written there.
vattn_status vattn_probe_json(char **out);

/// The models and the kernels that can be named, as one JSON object with two arrays.
///
/// `presets`: `name`, `description`, `layers`, `kv_heads`, `key_dim`, `value_dim`, `dtype`, `bytes_per_token`.
/// Where layers keep a latent, `key_dim` is its elements, and `kv_heads` and `value_dim` are 0.
///
/// `kernels`: `name`, `summary`, `evidence` (`measured` or `source`), `source`, `exact`, `tiles`, `latents`. One
/// that is exact reads nothing past a length. Of any other the first of its `tiles` counts that has the type
/// and is wide enough: each has `dtypes`, `key_dim`, `value_dim`, `tokens`, of which `tile_tokens` is to be a
/// multiple. `latents` says as heads of which `key_dim` and `value_dim` one of `dim` is looked up.
///
/// Types have PyTorch's names. The text is the caller's: `vattn_string_destroy` gives it up.
///
/// # Safety
/// - `out` is NULL, or a pointer can be written there.
vattn_status vattn_catalog_json(char **out);

/// Gives up a string that the library gave out. NULL is no error.
///
/// # Safety
/// - any pointer may be passed; one to anything else is refused.
vattn_status vattn_string_destroy(char *string);

/// Has the process's messages told to `callback`, those of `level` and of more importance. It replaces the
/// one before; NULL, or `VATTN_LOG_OFF`, tells nobody. When it returns, the one before is not running and
/// will not be called again.
///
/// Fails with `VATTN_UNSUPPORTED` where the program has a subscriber of its own for Rust's `tracing`.
///
/// # Safety
/// - `callback` is NULL, or may be called with `user` from any thread until another is set; set NULL before
///   the program ends what it uses.
vattn_status vattn_log_set(vattn_log_callback callback, void *user, int32_t level);

/// A model of those layers, in model order, split over `tensor_parallel` ranks.
///
/// KV heads are divided between the ranks. Where there are fewer heads than ranks each rank keeps one,
/// and a latent is kept whole by every rank. 1 for a model in one piece, or for numbers that are a
/// rank's already. `dtype` is a `vattn_dtype`.
///
/// Fails with `VATTN_INVALID_GEOMETRY` for no layers, more than 65,536, a dimension of zero, a token of
/// 2^64 bytes, or heads that can't be split so.
///
/// # Safety
/// - `groups` is NULL, or `count` of them can be read there;
/// - `out` is NULL, or a pointer can be written there.
vattn_status vattn_geometry_create(const vattn_layers *groups,
                                   size_t count,
                                   uint32_t tensor_parallel,
                                   int32_t dtype,
                                   vattn_geometry **out);

/// A model by name, such as `llama-3-8b`; a name that is not known fails with a text that lists those
/// that are. Otherwise as `vattn_geometry_create`.
///
/// # Safety
/// - `name` is NULL, or ends with a NUL;
/// - `out` is NULL, or a pointer can be written there.
vattn_status vattn_geometry_create_preset(const char *name,
                                          uint32_t tensor_parallel,
                                          int32_t dtype,
                                          vattn_geometry **out);

/// The model that a Hugging Face `config.json` describes; `json` is the file's text.
///
/// Knows Llama, Qwen, Mistral, Yi, Gemma, DeepSeek V2 and V3, and whatever describes itself in the same
/// fields, at the top or in `text_config`. What would make layers keep something else than the common
/// fields say fails with `VATTN_INVALID_GEOMETRY` and a text that names the field: it is never guessed.
/// Otherwise as `vattn_geometry_create`.
///
/// # Safety
/// - `json` is NULL, or ends with a NUL;
/// - `out` is NULL, or a pointer can be written there.
vattn_status vattn_geometry_create_from_hf_config(const char *json,
                                                  uint32_t tensor_parallel,
                                                  int32_t dtype,
                                                  vattn_geometry **out);

/// Gives a geometry up. Caches that were made from it keep what they need. NULL is no error.
///
/// # Safety
/// - any handle may be passed; one that is not alive is refused.
vattn_status vattn_geometry_destroy(vattn_geometry *geometry);

/// A geometry in numbers.
///
/// # Safety
/// - `out` is NULL, or points to a `vattn_geometry_info` of which `struct_size` is set.
vattn_status vattn_geometry_describe(const vattn_geometry *geometry, vattn_geometry_info *out);

/// What one layer keeps, `layers` set to 1.
///
/// # Safety
/// - `out` is NULL, or a `vattn_layers` can be written there.
vattn_status vattn_geometry_layer(const vattn_geometry *geometry, uint32_t layer, vattn_layers *out);

/// The `tile_tokens` that a cache of this model needs for a kernel by name, in all of its layers: see
/// "Which kernel needs which tile" above. For several kernels take the least common multiple. A name that
/// is not known fails with a text that lists those that are, and so does one of which it is not known how
/// far it reads for this model, both with `VATTN_INVALID_CONFIG`.
///
/// # Safety
/// - `kernel` is NULL, or ends with a NUL;
/// - `out` is NULL, or a `uint32_t` can be written there.
vattn_status vattn_geometry_tile_tokens(const vattn_geometry *geometry, const char *kernel, uint32_t *out);

/// A driver for this machine's own memory, on which a cache can be tried, tested and used without a GPU.
///
/// Fails with `VATTN_INVALID_CONFIG` for a granule that can't be, `VATTN_UNSUPPORTED` elsewhere than on
/// Linux, `VATTN_DRIVER` where the system gives no memory file.
///
/// # Safety
/// - `options` is NULL, or points to a `vattn_host_options` of which `struct_size` is set;
/// - `out` is NULL, or a pointer can be written there.
vattn_status vattn_driver_create_host(const vattn_host_options *options, vattn_driver **out);

/// A driver for an NVIDIA GPU. NULL options are -1, 0, 0.
///
/// It works in the context that is current on this thread, else in the device's primary one, which the
/// CUDA runtime and PyTorch use; it never makes one. A context that is neither must outlive it.
///
/// Fails with `VATTN_UNSUPPORTED` where there is no driver library, no device, or not what was asked for,
/// and the text says which; `VATTN_INVALID_ARGUMENT` for a device that is not there; `VATTN_DEVICE_LOST`
/// where the current context is gone.
///
/// # Safety
/// - `options` is NULL, or points to a `vattn_cuda_options` of which `struct_size` is set;
/// - `out` is NULL, or a pointer can be written there.
vattn_status vattn_driver_create_cuda(const vattn_cuda_options *options, vattn_driver **out);

/// A driver that only keeps books. Fails with `VATTN_INVALID_CONFIG` for a granule that can't be.
///
/// # Safety
/// - `options` is NULL, or points to a `vattn_ledger_options` of which `struct_size` is set;
/// - `out` is NULL, or a pointer can be written there.
vattn_status vattn_driver_create_ledger(const vattn_ledger_options *options, vattn_driver **out);

/// Gives a driver up. Caches that were made with it keep it alive. NULL is no error.
///
/// # Safety
/// - any handle may be passed; one that is not alive is refused.
vattn_status vattn_driver_destroy(vattn_driver *driver);

/// What a driver is.
///
/// # Safety
/// - `out` is NULL, or points to a `vattn_driver_info` of which `struct_size` is set.
vattn_status vattn_driver_describe(const vattn_driver *driver, vattn_driver_info *out);

/// How many bytes the device has, and how many of them are free now, by anybody's count.
///
/// # Safety
/// - `out_free` and `out_total` are NULL, or a `uint64_t` can be written there.
vattn_status vattn_driver_memory(const vattn_driver *driver, uint64_t *out_free, uint64_t *out_total);

/// How many CUDA devices this process may see. Fails with `VATTN_UNSUPPORTED` where there is no driver
/// library or no device, and the text says which.
///
/// # Safety
/// - `out` is NULL, or a `uint32_t` can be written there.
vattn_status vattn_cuda_device_count(uint32_t *out);

/// What a CUDA device is and can do.
///
/// # Safety
/// - `out` is NULL, or points to a `vattn_cuda_device` of which `struct_size` is set.
vattn_status vattn_cuda_device_describe(uint32_t ordinal, vattn_cuda_device *out);

/// Fills in the defaults. Pass `sizeof(vattn_config)` as `size`: a program that was built with an older or
/// a newer header than the library's is served all the same.
///
/// # Safety
/// - `config` is NULL, or `size` bytes can be written there.
vattn_status vattn_config_init(vattn_config *config, size_t size);

/// How the tensors of a cache with those options would lie, without making one: for sizing. `granule` is
/// the driver's unit of allocation in bytes: 2 MiB on every NVIDIA GPU so far.
///
/// Fails with `VATTN_INVALID_CONFIG` for options that `vattn_cache_create` would refuse, as far as that
/// needs no driver.
///
/// # Safety
/// - `config` is NULL, or filled by `vattn_config_init`;
/// - `out` is NULL, or points to a `vattn_layout` of which `struct_size` is set.
vattn_status vattn_layout_plan(const vattn_config *config,
                               const vattn_geometry *geometry,
                               uint64_t granule,
                               vattn_layout *out);

/// How a cache's tensors lie.
///
/// # Safety
/// - `out` is NULL, or points to a `vattn_layout` of which `struct_size` is set.
vattn_status vattn_cache_layout(const vattn_cache *cache, vattn_layout *out);

/// One of the tensors, counted from 0 to `vattn_layout.tensors`.
///
/// # Safety
/// - `out` is NULL, or points to a `vattn_tensor` of which `struct_size` is set.
vattn_status vattn_cache_tensor(const vattn_cache *cache, uint32_t tensor, vattn_tensor *out);

/// Bytes that a slot of so many tokens takes at the least, in whole granules over all tensors, tiles
/// included: for schedulers.
///
/// # Safety
/// - `out` is NULL, or a `uint64_t` can be written there.
vattn_status vattn_cache_bytes_for(const vattn_cache *cache, uint64_t tokens, uint64_t *out);

/// A layer's keys or values by slot: `[slot, token, head, dim]`. `part` is a `vattn_part`. Use
/// `slot.index` as the batch index. A latent layer has keys alone, of one head.
///
/// # Safety
/// - `out` is NULL, or a `vattn_view` can be written there.
vattn_status vattn_cache_view(const vattn_cache *cache, uint32_t layer, int32_t part, vattn_view *out);

/// The same memory by page: `[page, token of the page, head, dim]`. Page p of slot s is
/// `s * pages_per_slot + p`, in every layer alike, so a paged kernel reads a slot through a table that
/// counts upward.
///
/// # Safety
/// - `out` is NULL, or a `vattn_view` can be written there.
vattn_status vattn_cache_paged_view(const vattn_cache *cache, uint32_t layer, int32_t part, vattn_view *out);

/// The same memory as one long row of tokens: `[1, token, head, dim]`. Token t of slot s is
/// `s * stride_tokens + t`, in every layer alike: for kernels with variable lengths.
///
/// # Safety
/// - `out` is NULL, or a `vattn_view` can be written there.
vattn_status vattn_cache_token_view(const vattn_cache *cache, uint32_t layer, int32_t part, vattn_view *out);

/// Makes a cache: reserves the addresses of all tensors, commits what the options say, and starts the
/// mapper. The driver stays alive as long as the cache does; config and geometry are copied.
///
/// Fails with `VATTN_INVALID_CONFIG` for options that can't be used, among them a budget below one granule
/// for each tensor and more than 2^24 slots times tensors; `VATTN_OUT_OF_ADDRESS_SPACE`;
/// `VATTN_OUT_OF_DEVICE_MEMORY` for what is committed up front.
///
/// # Safety
/// - `config` is NULL, or filled by `vattn_config_init`;
/// - its `extents` are NULL, or `extents_count` of them can be read there;
/// - `out` is NULL, or a pointer can be written there.
vattn_status vattn_cache_create(const vattn_config *config,
                                const vattn_geometry *geometry,
                                const vattn_driver *driver,
                                vattn_cache **out);

/// Ends a cache: waits for the calls under way and for the fences that were given, ends the mapper, and
/// gives everything back. Addresses from its views must not be used any more. NULL is no error.
///
/// Under living pins the handle is dead all the same, and a warning is logged. What they do not keep is given
/// back here, the rest as they go.
///
/// # Safety
/// - any handle may be passed; one that is not alive is refused;
/// - no kernel that is not covered by a fence still uses the memory.
vattn_status vattn_cache_destroy(vattn_cache *cache);

/// Gives a new request a slot, of no tokens yet.
///
/// `hint` is how many tokens it will soon hold, its prompt's for example: of the parked slots the one is
/// adopted whose memory suits that best. What an earlier owner of the memory left running is waited for
/// here: where the request's work runs on a stream, `vattn_cache_acquire_on` makes the device wait instead.
///
/// Fails with `VATTN_NO_FREE_SLOT`, `VATTN_UNHEALTHY`, or the driver's refusal of a wait. Nothing is changed.
///
/// # Safety
/// - `out` is NULL, or a `vattn_slot` can be written there.
vattn_status vattn_cache_acquire(const vattn_cache *cache, uint64_t hint, vattn_slot *out);

/// As `vattn_cache_acquire`, for a request whose work runs on `stream` (`cudaStream_t` or `CUstream`; NULL
/// is CUDA's legacy default stream). What an earlier owner left running on another stream is waited for
/// there, on the device.
///
/// Fails with `VATTN_NO_FREE_SLOT`, `VATTN_CAPTURING_STREAM`, `VATTN_UNHEALTHY`, or the driver's refusal of a
/// wait. Nothing is changed.
///
/// # Safety
/// - `stream` is one of CUDA's own (NULL, 1, 2), or alive and of the context that the driver works in;
/// - `out` is NULL, or a `vattn_slot` can be written there.
vattn_status vattn_cache_acquire_on(const vattn_cache *cache, uint64_t hint, void *stream, vattn_slot *out);

/// One iteration of the server: these slots now hold this many tokens in all. Slots that are not named are
/// untouched. On return every token is backed in every tensor, and so is what `tile_tokens` adds to it.
/// New memory holds whatever it held before: kernels write before they read.
///
/// Nothing is changed by a step that fails: with `VATTN_STALE_SLOT`, `VATTN_FOREIGN_SLOT`,
/// `VATTN_SLOT_BUSY`, `VATTN_DUPLICATE_SLOT`, `VATTN_TOO_MANY_TOKENS`, `VATTN_FEWER_TOKENS`;
/// `VATTN_OUT_OF_BUDGET`, which `vattn_cache_fits` tells beforehand and retiring cures;
/// `VATTN_OUT_OF_DEVICE_MEMORY` where the budget has room but the device has not;
/// `VATTN_OUT_OF_MAPPINGS` and the driver's other refusals.
///
/// # Safety
/// - `entries` is NULL, or `count` of them can be read there.
vattn_status vattn_cache_step(const vattn_cache *cache, const vattn_slot_tokens *entries, size_t count);

/// Which of these would succeed now, each together with those before it that would: `out[i]` is true where
/// `entries[i]` would. One step of exactly those succeeds, unless the driver refuses or another thread
/// takes the memory first.
///
/// Fails as `vattn_cache_step` does, for anything but memory.
///
/// # Safety
/// - `entries` is NULL, or `count` of them can be read there;
/// - `out` is NULL, or `count` values can be written there, apart from `entries`.
vattn_status vattn_cache_fits(const vattn_cache *cache,
                              const vattn_slot_tokens *entries,
                              size_t count,
                              bool *out);

/// How many of these new requests, in order, could each be given a slot and stepped to so many tokens now.
/// Counting ends at the first that could not, as a queue does.
///
/// # Safety
/// - `prompts` is NULL, or `count` of them can be read there;
/// - `out` is NULL, or a `size_t` can be written there.
vattn_status vattn_cache_admits(const vattn_cache *cache, const uint64_t *prompts, size_t count, size_t *out);

/// Has memory mapped for tokens that these slots will soon hold: for a request that was given a slot and
/// still waits for its turn, or a prompt that comes in parts. Whoever needs the memory first may take it,
/// so it never stands in the way of a step or an admission.
///
/// Returns at once; with `VATTN_BACKGROUND_OFF` it maps on the calling thread. The last call for a slot
/// counts. Where it does not fit, less is mapped: that is no error.
///
/// Fails with `VATTN_STALE_SLOT`, `VATTN_FOREIGN_SLOT`, `VATTN_SLOT_BUSY`, `VATTN_TOO_MANY_TOKENS`. Nothing
/// is changed.
///
/// # Safety
/// - `entries` is NULL, or `count` of them can be read there.
vattn_status vattn_cache_prefetch(const vattn_cache *cache, const vattn_slot_tokens *entries, size_t count);

/// Takes tokens away: the slot now holds that many. What held the others stays mapped, as spare memory of
/// the slot; the fences say when the device is done with it.
///
/// Fails as `vattn_cache_retire`, and with `VATTN_INVALID_ARGUMENT` for more tokens than the slot holds.
/// Nothing is changed.
///
/// # Safety
/// - `fences` is NULL, or `fence_count` of them can be read there;
/// - their streams and events are alive, and of the context that the driver works in.
vattn_status vattn_cache_truncate(const vattn_cache *cache,
                                  vattn_slot slot,
                                  uint64_t tokens,
                                  const vattn_fence *fences,
                                  size_t fence_count);

/// The request is done. Its memory stays mapped until another request adopts it or memory is short; the
/// fences, one for each stream that touched it, say when the device is done with it. The id is dead.
///
/// Fails with `VATTN_STALE_SLOT`, `VATTN_FOREIGN_SLOT`, `VATTN_SLOT_BUSY`, `VATTN_INVALID_ARGUMENT` for no
/// fence, `VATTN_CAPTURING_STREAM`, and the driver's refusals. Nothing is changed.
///
/// # Safety
/// - `fences` is NULL, or `fence_count` of them can be read there;
/// - their streams and events are alive, and of the context that the driver works in; a stream is
///   synchronised before it is destroyed.
vattn_status vattn_cache_retire(const vattn_cache *cache,
                                vattn_slot slot,
                                const vattn_fence *fences,
                                size_t fence_count);

/// Unmaps memory that holds nobody's tokens, the one of least use first, until `bytes` more are free or
/// nothing is left to unmap, once its fences and `fences` have fired. `out_free` is what is free now.
///
/// Returns at once; `vattn_cache_flush` waits until it is done. With `VATTN_BACKGROUND_OFF` it is done on
/// return.
///
/// Fails with `VATTN_INVALID_ARGUMENT` for no fence, `VATTN_CAPTURING_STREAM`, and the driver's refusals.
///
/// # Safety
/// - `fences` is NULL, or `fence_count` of them can be read there, with streams and events that are alive;
/// - `out_free` is NULL, or a `uint64_t` can be written there.
vattn_status vattn_cache_reclaim(const vattn_cache *cache,
                                 uint64_t bytes,
                                 const vattn_fence *fences,
                                 size_t fence_count,
                                 uint64_t *out_free);

/// Gives memory back to the device until no more than `keep` bytes are held, or until all is given back
/// that holds nobody's tokens, once its fences and `fences` have fired. `out_held` is what is held now.
///
/// Returns at once; `vattn_cache_flush` waits until it is done. With `VATTN_BACKGROUND_OFF` it is done on
/// return.
///
/// Fails with `VATTN_INVALID_ARGUMENT` for no fence, `VATTN_CAPTURING_STREAM`, and the driver's refusals.
///
/// # Safety
/// - `fences` is NULL, or `fence_count` of them can be read there, with streams and events that are alive;
/// - `out_held` is NULL, or a `uint64_t` can be written there.
vattn_status vattn_cache_trim(const vattn_cache *cache,
                              uint64_t keep,
                              const vattn_fence *fences,
                              size_t fence_count,
                              uint64_t *out_held);

/// Changes how many bytes may be held. With a smaller budget memory is given back before it returns, and
/// the fences of what is unmapped are waited for.
///
/// Fails with `VATTN_INVALID_CONFIG` for a budget that `vattn_cache_create` would refuse,
/// `VATTN_INVALID_ARGUMENT` for `VATTN_AUTO`, `VATTN_OUT_OF_BUDGET` where slots in use and pins need more,
/// and the driver's refusals. The old budget stays.
///
/// # Safety
/// - any handle may be passed; one that is not alive is refused.
vattn_status vattn_cache_set_budget(const vattn_cache *cache, uint64_t budget);

/// Does, on the calling thread, what the mapper would do by now: with `VATTN_BACKGROUND_CALLER`, once an
/// iteration. Never waits for a fence, nor for another thread that is in this call. `out_more` says whether
/// something is left that it will do later.
///
/// Fails with `VATTN_INVALID_ARGUMENT` with another choice of `vattn_background`.
///
/// # Safety
/// - `out_more` is NULL, or a `bool` can be written there.
vattn_status vattn_cache_tend(const vattn_cache *cache, bool *out_more);

/// Waits until all is done that the mapper was asked for before: memory is mapped ahead, trims and reclaims
/// have come to their end, and so has what waits for a fence, which therefore has to fire.
///
/// Fails with what a call of the driver in the background failed with since the last flush. Nothing is
/// lost by it: what could not be mapped ahead is mapped when it is needed, and what could not be given
/// back is still there.
///
/// # Safety
/// - any handle may be passed; one that is not alive is refused.
vattn_status vattn_cache_flush(const vattn_cache *cache);

/// Pins what backs a slot's tokens now: it stays mapped at its addresses until the pin is destroyed, through
/// retire, truncate, reclaim, trim, a smaller budget, adoption of the slot by another request, and destruction
/// of the cache. With `slot` NULL the addresses of all tensors stay reserved, and no memory is kept.
///
/// Pinned memory counts as mapped, and against the budget. Its contents are not kept: whoever has the slot,
/// or is given it next, writes there.
///
/// Fails with `VATTN_STALE_SLOT`, `VATTN_FOREIGN_SLOT`, `VATTN_SLOT_BUSY`, `VATTN_UNHEALTHY`. Nothing is
/// changed.
///
/// # Safety
/// - `slot` is NULL, or can be read;
/// - `out` is NULL, or a pointer can be written there.
vattn_status vattn_pin_create(const vattn_cache *cache,
                              const vattn_slot *slot,
                              vattn_pin **out);

/// Pins a buffer: its addresses, and what is committed in it, last until the pin is destroyed, though the
/// buffer is destroyed before. Decommitting works as ever: whoever has the buffer says what of it is wanted.
///
/// # Safety
/// - `out` is NULL, or a pointer can be written there.
vattn_status vattn_pin_create_buffer(const vattn_buffer *buffer, vattn_pin **out);

/// What a pin keeps.
///
/// # Safety
/// - `out` is NULL, or points to a `vattn_pin_info` of which `struct_size` is set.
vattn_status vattn_pin_describe(const vattn_pin *pin, vattn_pin_info *out);

/// Makes a DLPack tensor of an array that lies in what the pin's object reserves. With `version_major` 0 it is
/// a `DLManagedTensor`, with 1 a `DLManagedTensorVersioned`. It is a pin of its own: the array's memory is kept
/// as this pin keeps it until the tensor's deleter is called, which any thread may do, with no lock held. After
/// `fork` a deleter does nothing in the child.
///
/// Whether there is memory behind the array is not asked: what was not stepped to has none.
///
/// Fails with `VATTN_INVALID_ARGUMENT` for an array that reaches beyond what is reserved, numbers that make no
/// array (`data` is a multiple of an element's bytes), and a version that is neither.
///
/// # Safety
/// - `array` is NULL, or can be read, with `ndim` values at `shape` and, unless it is NULL, at `strides`;
/// - `out` is NULL, or a pointer can be written there.
vattn_status vattn_pin_dlpack(const vattn_pin *pin,
                              const vattn_array *array,
                              uint32_t version_major,
                              void **out);

/// Calls the deleter of a tensor that `vattn_pin_dlpack` made with the same `version_major`, and that nobody
/// has taken over. NULL is no error.
///
/// # Safety
/// - `tensor` is NULL, or one that `vattn_pin_dlpack` made, whose deleter was not called.
vattn_status vattn_dlpack_destroy(void *tensor, uint32_t version_major);

/// The destructor of a Python capsule that has a tensor of `vattn_pin_dlpack`, for `PyCapsule_New`: deletes the
/// tensor, unless a consumer has taken it over and renamed the capsule. NULL is no error.
///
/// # Safety
/// - `capsule` is NULL, or Python's, and the thread holds the interpreter's lock.
void vattn_dlpack_capsule_destroy(void *capsule);

/// Gives a pin up: what it alone kept holds nobody's tokens from now on, and is unmapped as what a retired slot
/// leaves is, after the fences that were given for it. The device is done with what was launched on it, unless
/// a fence that is given later covers that. Of a cache that was destroyed it is given back here, and what was
/// left of the cache goes with its last pin, as does a buffer that was destroyed. NULL is no error.
///
/// # Safety
/// - any handle may be passed; one that is not alive is refused;
/// - no kernel that is not covered by a fence still uses the memory.
vattn_status vattn_pin_destroy(vattn_pin *pin);

/// Whether a cache can be trusted with more work: `out` is a `vattn_health`. A server may want it every
/// iteration.
///
/// # Safety
/// - `out` is NULL, or an `int32_t` can be written there.
vattn_status vattn_cache_health(const vattn_cache *cache, int32_t *out);

/// How much memory is used for what. Waits for nobody and allocates nothing: a server may want it every
/// iteration.
///
/// # Safety
/// - `out` is NULL, or points to a `vattn_bytes` of which `struct_size` is set.
vattn_status vattn_cache_bytes(const vattn_cache *cache, vattn_bytes *out);

/// What is counted, at any time and without waiting for anybody.
///
/// # Safety
/// - `out` is NULL, or points to a `vattn_stats` of which `struct_size` is set.
vattn_status vattn_cache_stats(const vattn_cache *cache, vattn_stats *out);

/// Calls of the driver of one verb, a `vattn_verb`.
///
/// # Safety
/// - `out` is NULL, or a `vattn_call_stats` can be written there.
vattn_status vattn_cache_calls(const vattn_cache *cache, int32_t verb, vattn_call_stats *out);

/// What `vattn_cache_stats` has and more, as one JSON object. The text is the caller's:
/// `vattn_string_destroy` gives it up.
///
/// # Safety
/// - `out` is NULL, or a pointer can be written there.
vattn_status vattn_cache_stats_json(const vattn_cache *cache, char **out);

/// Walks through all slots and extents, compares the books, and tells everything as one JSON object, every
/// slot that has memory among it. Waits for operations under way. The text is the caller's:
/// `vattn_string_destroy` gives it up.
///
/// Fails with `VATTN_INTERNAL` where the books disagree, which is a defect of this library.
///
/// # Safety
/// - `out` is NULL, or a pointer can be written there.
vattn_status vattn_cache_report_json(const vattn_cache *cache, char **out);

/// Reserves addresses, with nothing committed.
///
/// Fails with `VATTN_INVALID_ARGUMENT` for a size of 0 or one that granules can't round up, and a largest
/// extent that is no granule times a power of two; with `VATTN_OUT_OF_ADDRESS_SPACE`.
///
/// # Safety
/// - `options` is NULL, or points to a `vattn_buffer_options` of which `struct_size` is set;
/// - `out` is NULL, or a pointer can be written there.
vattn_status vattn_buffer_create(const vattn_buffer_options *options,
                                 const vattn_driver *driver,
                                 vattn_buffer **out);

/// Backs a range: afterwards every byte of it can be touched. What is committed already stays as it is, with
/// what is in it; what is in new memory is not defined. Ranges need not begin or end on granules.
///
/// Fails with `VATTN_INVALID_ARGUMENT` for a range that is empty or reaches beyond the buffer;
/// `VATTN_OUT_OF_DEVICE_MEMORY`, `VATTN_OUT_OF_MAPPINGS` and the driver's other refusals, and nothing was
/// committed; `VATTN_UNHEALTHY` after a driver panicked in a call on this buffer.
///
/// # Safety
/// - any handle may be passed; one that is not alive is refused.
vattn_status vattn_buffer_commit(const vattn_buffer *buffer, uint64_t offset, uint64_t size);

/// Says that the bytes of a range are no longer wanted. Memory is given back by whole extents of which no byte
/// is committed any more.
///
/// The fences say when the device is done with the range, one for each stream that touched it. They are
/// waited for on the calling thread: whoever must not wait gives an event that has fired. Until this returns
/// the range counts as committed.
///
/// Fails with `VATTN_INVALID_ARGUMENT` for a range that is empty or reaches beyond the buffer, and for no
/// fence; `VATTN_CAPTURING_STREAM`; the driver's refusals. The range is as it was, with what is in it. With
/// `VATTN_UNHEALTHY` where the driver stopped in the middle and would not undo: the text names the bytes that
/// are not committed any more, and all others are as they were.
///
/// # Safety
/// - `fences` is NULL, or `fence_count` of them can be read there, with streams and events that are alive;
/// - no kernel that is not covered by a fence still uses the range.
vattn_status vattn_buffer_decommit(const vattn_buffer *buffer,
                                   uint64_t offset,
                                   uint64_t size,
                                   const vattn_fence *fences,
                                   size_t fence_count);

/// A buffer in numbers.
///
/// # Safety
/// - `out` is NULL, or points to a `vattn_buffer_info` of which `struct_size` is set.
vattn_status vattn_buffer_describe(const vattn_buffer *buffer, vattn_buffer_info *out);

/// Gives a buffer up, its memory and its addresses; where it is pinned they go with the last pin. Waits for the
/// calls on it that are under way, and for no device: nothing may use the memory any more. NULL is no error.
///
/// # Safety
/// - any handle may be passed; one that is not alive is refused;
/// - no kernel still uses the memory, unless it is pinned.
vattn_status vattn_buffer_destroy(vattn_buffer *buffer);

/// A driver around another that can be told to fail, so that a program can be tested against every failure
/// there is. It costs some time in each call. The inner driver stays alive as long as it does.
///
/// # Safety
/// - `out` is NULL, or a pointer can be written there.
vattn_status vattn_driver_create_checked(const vattn_driver *inner, vattn_driver **out);

/// Has the `nth` call from now on fail with `status`, 1 for the next, counting only calls of `verb`, a
/// `vattn_verb`, or all with `VATTN_ANY_VERB`; and with `onward` 1 every later one too. Several may be
/// planned. `status` is a failure that a driver can have, from `VATTN_INVALID_GEOMETRY` to `VATTN_INTERNAL`.
///
/// Fails with `VATTN_UNSUPPORTED` for a driver that `vattn_driver_create_checked` did not make.
///
/// # Safety
/// - any handle may be passed; one that is not alive is refused.
vattn_status vattn_driver_fail(const vattn_driver *driver,
                               int32_t verb,
                               uint64_t nth,
                               uint32_t onward,
                               int32_t status);

/// Has no call fail any more that was planned to.
///
/// Fails with `VATTN_UNSUPPORTED` for a driver that `vattn_driver_create_checked` did not make.
///
/// # Safety
/// - any handle may be passed; one that is not alive is refused.
vattn_status vattn_driver_clear_failures(const vattn_driver *driver);

/// How many calls there were so far, of `verb` or, with `VATTN_ANY_VERB`, in all, and how many were made to
/// fail.
///
/// Fails with `VATTN_UNSUPPORTED` for a driver that `vattn_driver_create_checked` did not make.
///
/// # Safety
/// - `out_calls` and `out_failed` are NULL, or a `uint64_t` can be written there.
vattn_status vattn_driver_calls(const vattn_driver *driver,
                                int32_t verb,
                                uint64_t *out_calls,
                                uint64_t *out_failed);

/// What is alive of a driver's: extents, mappings, reservations and events that nobody has given back. All
/// are 0 once every cache of it is destroyed, but for what a planned failure kept it from giving back.
///
/// Fails with `VATTN_UNSUPPORTED` for a driver that `vattn_driver_create_checked` did not make.
///
/// # Safety
/// - `out` is NULL, or a `vattn_live` can be written there.
vattn_status vattn_driver_live(const vattn_driver *driver, vattn_live *out);

/// Holds a stream back: fences that are recorded on it from now on fire when `vattn_driver_fire` says so.
/// For host and ledger drivers, on which any number may name a stream and fences otherwise fire at once. Fire
/// it before the driver's handle is given up: whoever waits for such a fence, a cache that is destroyed among
/// them, waits until then.
///
/// Fails with `VATTN_UNSUPPORTED` for another driver.
///
/// # Safety
/// - any handle may be passed; one that is not alive is refused.
vattn_status vattn_driver_hold(const vattn_driver *driver, void *stream);

/// Fires all fences of a stream, and holds it back no longer.
///
/// Fails with `VATTN_UNSUPPORTED` for a driver that is neither host nor ledger.
///
/// # Safety
/// - any handle may be passed; one that is not alive is refused.
vattn_status vattn_driver_fire(const vattn_driver *driver, void *stream);

/// Says that a stream is being captured into a graph, with `capturing` 1, or no longer, with 0: fences on
/// it are refused meanwhile with `VATTN_CAPTURING_STREAM`.
///
/// Fails with `VATTN_UNSUPPORTED` for a driver that is neither host nor ledger.
///
/// # Safety
/// - any handle may be passed; one that is not alive is refused.
vattn_status vattn_driver_set_capturing(const vattn_driver *driver, void *stream, uint32_t capturing);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#ifdef __cplusplus
extern "C" {
#endif

/// The fence of memory that nothing on the device uses any more.
static inline vattn_fence vattn_fence_idle(void) {
    vattn_fence fence = { VATTN_FENCE_IDLE, 0, NULL };
    return fence;
}

/// The fence of all that is in a stream (`cudaStream_t`, `CUstream`) by now.
static inline vattn_fence vattn_fence_stream(void *stream) {
    vattn_fence fence = { VATTN_FENCE_STREAM, 0, NULL };
    fence.handle = stream;
    return fence;
}

/// The fence of an event (`cudaEvent_t`, `CUevent`) that was recorded.
static inline vattn_fence vattn_fence_event(void *event) {
    vattn_fence fence = { VATTN_FENCE_EVENT, 0, NULL };
    fence.handle = event;
    return fence;
}

#ifdef __cplusplus
}
#endif

#endif  /* VATTN_H */
