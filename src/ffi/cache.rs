//! A cache: the life of slots, steps, memory.

use std::ffi::c_void;

use super::args;
use super::config::{self, VATTN_AUTO, vattn_config};
use super::driver::vattn_driver;
use super::entry::{enter, on_cache};
use super::geometry::vattn_geometry;
use super::handle::{CACHES, DRIVERS, GEOMETRIES};
use super::status::vattn_status;
use crate::cache::{Fence, ForeignEvent, Health, KvCache, SlotTokens};
use crate::driver::{RawEvent, Stream};
use crate::error::Result;
use crate::units::{Bytes, SlotId, TokenCount};

/// A KV cache. Any thread may call any function on it at any time.
#[derive(Debug)]
pub struct vattn_cache {
    _opaque: [u8; 0],
}

/// A request's place in every tensor, with the proof that it is this request's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct vattn_slot {
    /// The number that kernels take: the first dimension's index in every tensor.
    pub index: u32,
    /// The cache that it belongs to.
    pub cache: u32,
    /// Which of the index's successive requests this is, from 1. A slot of all zeros is none.
    pub generation: u64,
}

/// A slot and the number of tokens that it holds in all, those of earlier steps included.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct vattn_slot_tokens {
    /// The slot.
    pub slot: vattn_slot,
    /// Its tokens in all.
    pub tokens: u64,
}

// Arrays of them are read in place.
const _: () = {
    assert!(size_of::<vattn_slot>() == size_of::<SlotId>() && size_of::<vattn_slot>() == 16);
    assert!(align_of::<vattn_slot>() == align_of::<SlotId>());
    assert!(
        std::mem::offset_of!(vattn_slot, cache) == 4 && std::mem::offset_of!(vattn_slot, generation) == 8
    );
    assert!(size_of::<vattn_slot_tokens>() == size_of::<SlotTokens>() && size_of::<SlotTokens>() == 24);
    assert!(align_of::<vattn_slot_tokens>() == align_of::<SlotTokens>());
    assert!(std::mem::offset_of!(vattn_slot_tokens, tokens) == std::mem::offset_of!(SlotTokens, tokens));
    assert!(size_of::<TokenCount>() == 8);
};

/// What tells that device work submitted earlier is done with memory.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct vattn_fence {
    /// A `vattn_fence_kind`.
    pub kind: i32,
    /// 0.
    pub reserved: u32,
    /// The stream (`cudaStream_t`, `CUstream`) or the event (`cudaEvent_t`, `CUevent`); NULL for none.
    pub handle: *mut c_void,
}

/// What kind of fence.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(i32)]
pub enum vattn_fence_kind {
    /// Nothing on the device uses the memory any more. `handle` is NULL.
    VATTN_FENCE_IDLE = 0,
    /// All that is in the stream by now. NULL is CUDA's legacy default stream.
    VATTN_FENCE_STREAM = 1,
    /// An event that the caller recorded. Prefer a stream: an event is followed on one of a few streams of
    /// the library's, where one that is long in firing can hold up others.
    VATTN_FENCE_EVENT = 2,
}

/// Whether a cache can be trusted with more work.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(i32)]
pub enum vattn_health {
    /// All is well.
    VATTN_HEALTHY = 0,
    /// The driver failed, and then refused to undo: some extents are quarantined, nothing else is affected.
    /// Ends by itself once the driver lets go of them.
    VATTN_DEGRADED = 1,
    /// The device or its context is gone, or the library panicked. Only views, statistics and destroying
    /// still work.
    VATTN_FAILED = 2,
}

args::numbered!(vattn_fence_kind);
args::numbered!(vattn_health);

impl From<Health> for vattn_health {
    fn from(health: Health) -> Self {
        match health {
            Health::Healthy => Self::VATTN_HEALTHY,
            Health::Degraded => Self::VATTN_DEGRADED,
            Health::Failed => Self::VATTN_FAILED,
        }
    }
}

impl From<vattn_slot> for SlotId {
    fn from(slot: vattn_slot) -> Self {
        Self::new(slot.index, slot.cache, slot.generation)
    }
}

impl From<SlotId> for vattn_slot {
    fn from(slot: SlotId) -> Self {
        Self { index: slot.index(), cache: slot.cache(), generation: slot.generation() }
    }
}

/// Pairs as C has them, read in place.
///
/// # Safety
/// - `entries` is NULL, or `count` of them can be read there while `'a` lasts.
unsafe fn pairs<'a>(entries: *const vattn_slot_tokens, count: usize) -> Result<&'a [SlotTokens]> {
    // SAFETY: the two types are laid out alike, as was asserted, and have a value for all bits.
    unsafe { args::slice("entries", entries.cast(), count) }
}

/// A stream's number as the crate has it.
pub(super) fn stream(stream: *mut c_void) -> Stream {
    let number = u64::from_le_bytes(stream.expose_provenance().to_le_bytes());
    // SAFETY: the C function's own conditions ask that the stream is alive.
    unsafe { Stream::new(number) }
}

/// # Safety
/// - `fences` is NULL, or `count` of them can be read there;
/// - their streams and events are alive while the call lasts.
pub(super) unsafe fn read_fences(fences: *const vattn_fence, count: usize) -> Result<Vec<Fence>> {
    // SAFETY: as the caller promises.
    let fences = unsafe { args::slice("fences", fences, count) }?;
    let read = |fence: &vattn_fence| {
        let kinds = [
            (vattn_fence_kind::VATTN_FENCE_IDLE, Fence::Idle),
            (vattn_fence_kind::VATTN_FENCE_STREAM, Fence::Stream(stream(fence.handle))),
            (vattn_fence_kind::VATTN_FENCE_EVENT, Fence::Event(event(fence.handle))),
        ];
        args::unused("a fence's reserved", fence.reserved)?;
        match args::choice("a fence's kind", fence.kind, &kinds)? {
            Fence::Idle if !fence.handle.is_null() => Err(args::invalid(format!(
                "an idle fence has the handle {:p}; name its kind, VATTN_FENCE_STREAM or VATTN_FENCE_EVENT, or pass NULL",
                fence.handle
            ))),
            Fence::Event(_) if fence.handle.is_null() => {
                Err(args::invalid("an event's fence has the handle NULL; pass the event that was recorded"))
            }
            read => Ok(read),
        }
    };
    fences.iter().map(read).collect()
}

fn event(event: *mut c_void) -> ForeignEvent {
    let number = u64::from_le_bytes(event.expose_provenance().to_le_bytes());
    // SAFETY: the C function's own conditions ask that the event is alive.
    unsafe { ForeignEvent::new(RawEvent(number)) }
}

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
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_cache_create(
    config: *const vattn_config,
    geometry: *const vattn_geometry,
    driver: *const vattn_driver,
    out: *mut *mut vattn_cache,
) -> vattn_status {
    enter("vattn_cache_create", || {
        let (geometry, driver) = (GEOMETRIES.get(geometry)?, DRIVERS.get(driver)?);
        // SAFETY: as the caller promises.
        let (config, out) = unsafe { (config::read(config, geometry.clone())?, args::out("out", out)?) };
        let cache = KvCache::new(config, std::sync::Arc::clone(&driver.driver))?;
        out.set(CACHES.keep(cache)?);
        Ok(())
    })
}

/// Ends a cache: waits for the calls under way and for the fences that were given, ends the mapper, and
/// gives everything back. Addresses from its views must not be used any more. NULL is no error.
///
/// Under living pins the handle is dead all the same, and a warning is logged. What they do not keep is given
/// back here, the rest as they go.
///
/// # Safety
/// - any handle may be passed; one that is not alive is refused;
/// - no kernel that is not covered by a fence still uses the memory.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_cache_destroy(cache: *mut vattn_cache) -> vattn_status {
    enter("vattn_cache_destroy", || CACHES.destroy(cache))
}

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
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_cache_acquire(
    cache: *const vattn_cache,
    hint: u64,
    out: *mut vattn_slot,
) -> vattn_status {
    on_cache("vattn_cache_acquire", cache, |cache| {
        // SAFETY: as the caller promises.
        let out = unsafe { args::out("out", out) }?;
        out.set(cache.acquire(TokenCount::new(hint), None)?.into());
        Ok(())
    })
}

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
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_cache_acquire_on(
    cache: *const vattn_cache,
    hint: u64,
    stream: *mut c_void,
    out: *mut vattn_slot,
) -> vattn_status {
    on_cache("vattn_cache_acquire_on", cache, |cache| {
        // SAFETY: as the caller promises.
        let out = unsafe { args::out("out", out) }?;
        out.set(cache.acquire(TokenCount::new(hint), Some(self::stream(stream)))?.into());
        Ok(())
    })
}

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
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_cache_step(
    cache: *const vattn_cache,
    entries: *const vattn_slot_tokens,
    count: usize,
) -> vattn_status {
    on_cache("vattn_cache_step", cache, |cache| {
        // SAFETY: as the caller promises.
        Ok(cache.step(unsafe { pairs(entries, count) }?)?)
    })
}

/// Which of these would succeed now, each together with those before it that would: `out[i]` is true where
/// `entries[i]` would. One step of exactly those succeeds, unless the driver refuses or another thread
/// takes the memory first.
///
/// Fails as `vattn_cache_step` does, for anything but memory.
///
/// # Safety
/// - `entries` is NULL, or `count` of them can be read there;
/// - `out` is NULL, or `count` values can be written there, apart from `entries`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_cache_fits(
    cache: *const vattn_cache,
    entries: *const vattn_slot_tokens,
    count: usize,
    out: *mut bool,
) -> vattn_status {
    on_cache("vattn_cache_fits", cache, |cache| {
        // SAFETY: as the caller promises.
        let (entries, out) = unsafe { (pairs(entries, count)?, args::slice_mut("out", out, count)?) };
        for (place, fits) in out.iter_mut().zip(cache.fits(entries)?) {
            place.write(fits);
        }
        Ok(())
    })
}

/// How many of these new requests, in order, could each be given a slot and stepped to so many tokens now.
/// Counting ends at the first that could not, as a queue does.
///
/// # Safety
/// - `prompts` is NULL, or `count` of them can be read there;
/// - `out` is NULL, or a `size_t` can be written there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_cache_admits(
    cache: *const vattn_cache,
    prompts: *const u64,
    count: usize,
    out: *mut usize,
) -> vattn_status {
    on_cache("vattn_cache_admits", cache, |cache| {
        // SAFETY: as the caller promises; a count of tokens is its number, and nothing else.
        let (prompts, out) =
            unsafe { (args::slice::<TokenCount>("prompts", prompts.cast(), count)?, args::out("out", out)?) };
        out.set(cache.admits(prompts));
        Ok(())
    })
}

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
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_cache_prefetch(
    cache: *const vattn_cache,
    entries: *const vattn_slot_tokens,
    count: usize,
) -> vattn_status {
    on_cache("vattn_cache_prefetch", cache, |cache| {
        // SAFETY: as the caller promises.
        Ok(cache.prefetch(unsafe { pairs(entries, count) }?)?)
    })
}

/// Takes tokens away: the slot now holds that many. What held the others stays mapped, as spare memory of
/// the slot; the fences say when the device is done with it.
///
/// Fails as `vattn_cache_retire`, and with `VATTN_INVALID_ARGUMENT` for more tokens than the slot holds.
/// Nothing is changed.
///
/// # Safety
/// - `fences` is NULL, or `fence_count` of them can be read there;
/// - their streams and events are alive, and of the context that the driver works in.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_cache_truncate(
    cache: *const vattn_cache,
    slot: vattn_slot,
    tokens: u64,
    fences: *const vattn_fence,
    fence_count: usize,
) -> vattn_status {
    on_cache("vattn_cache_truncate", cache, |cache| {
        // SAFETY: as the caller promises.
        let fences = unsafe { read_fences(fences, fence_count) }?;
        Ok(cache.truncate(slot.into(), TokenCount::new(tokens), &fences)?)
    })
}

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
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_cache_retire(
    cache: *const vattn_cache,
    slot: vattn_slot,
    fences: *const vattn_fence,
    fence_count: usize,
) -> vattn_status {
    on_cache("vattn_cache_retire", cache, |cache| {
        // SAFETY: as the caller promises.
        let fences = unsafe { read_fences(fences, fence_count) }?;
        Ok(cache.retire(slot.into(), &fences)?)
    })
}

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
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_cache_reclaim(
    cache: *const vattn_cache,
    bytes: u64,
    fences: *const vattn_fence,
    fence_count: usize,
    out_free: *mut u64,
) -> vattn_status {
    on_cache("vattn_cache_reclaim", cache, |cache| {
        // SAFETY: as the caller promises.
        let (fences, out) = unsafe { (read_fences(fences, fence_count)?, args::out("out_free", out_free)?) };
        out.set(cache.reclaim(Bytes::new(bytes), &fences)?.get());
        Ok(())
    })
}

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
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_cache_trim(
    cache: *const vattn_cache,
    keep: u64,
    fences: *const vattn_fence,
    fence_count: usize,
    out_held: *mut u64,
) -> vattn_status {
    on_cache("vattn_cache_trim", cache, |cache| {
        // SAFETY: as the caller promises.
        let (fences, out) = unsafe { (read_fences(fences, fence_count)?, args::out("out_held", out_held)?) };
        out.set(cache.trim(Bytes::new(keep), &fences)?.get());
        Ok(())
    })
}

/// Changes how many bytes may be held. With a smaller budget memory is given back before it returns, and
/// the fences of what is unmapped are waited for.
///
/// Fails with `VATTN_INVALID_CONFIG` for a budget that `vattn_cache_create` would refuse,
/// `VATTN_INVALID_ARGUMENT` for `VATTN_AUTO`, `VATTN_OUT_OF_BUDGET` where slots in use and pins need more,
/// and the driver's refusals. The old budget stays.
///
/// # Safety
/// - any handle may be passed; one that is not alive is refused.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_cache_set_budget(cache: *const vattn_cache, budget: u64) -> vattn_status {
    on_cache("vattn_cache_set_budget", cache, |cache| {
        if budget == VATTN_AUTO {
            return Err(args::invalid(format!(
                "budget is VATTN_AUTO, which only a configuration may say: give bytes; it is {} now",
                cache.budget()
            ))
            .into());
        }
        Ok(cache.set_budget(Bytes::new(budget))?)
    })
}

/// Does, on the calling thread, what the mapper would do by now: with `VATTN_BACKGROUND_CALLER`, once an
/// iteration. Never waits for a fence, nor for another thread that is in this call. `out_more` says whether
/// something is left that it will do later.
///
/// Fails with `VATTN_INVALID_ARGUMENT` with another choice of `vattn_background`.
///
/// # Safety
/// - `out_more` is NULL, or a `bool` can be written there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_cache_tend(cache: *const vattn_cache, out_more: *mut bool) -> vattn_status {
    on_cache("vattn_cache_tend", cache, |cache| {
        // SAFETY: as the caller promises.
        let out = unsafe { args::out("out_more", out_more) }?;
        out.set(cache.tend()?);
        Ok(())
    })
}

/// Waits until all is done that the mapper was asked for before: memory is mapped ahead, trims and reclaims
/// have come to their end, and so has what waits for a fence, which therefore has to fire.
///
/// Fails with what a call of the driver in the background failed with since the last flush. Nothing is
/// lost by it: what could not be mapped ahead is mapped when it is needed, and what could not be given
/// back is still there.
///
/// # Safety
/// - any handle may be passed; one that is not alive is refused.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_cache_flush(cache: *const vattn_cache) -> vattn_status {
    on_cache("vattn_cache_flush", cache, |cache| Ok(cache.flush()?))
}
