//! What a cache counts.

use std::ffi::c_char;

use super::args::{self, Numbered as _};
use super::cache::{vattn_cache, vattn_health};
use super::driver::vattn_verb;
use super::entry::on_cache;
use super::library::keep_text;
use super::status::vattn_status;
use crate::stats::{ByteCounts, CallStats};

/// How much memory is used for what, in bytes. `held = mapped + parked + free_bytes + quarantined`, but for
/// what is being moved at this moment, by the mapper or another thread, which is held and neither.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct vattn_bytes {
    /// `sizeof(vattn_bytes)`, set by the caller.
    pub struct_size: usize,
    /// What the tokens of the slots in use fill, with no rounding at all.
    pub needed: u64,
    /// Extents of slots in use, up to the last one that holds a byte of their tokens, and those that pins keep.
    pub mapped: u64,
    /// Extents that are mapped, hold nobody's tokens and are not pinned: all of a retired slot's, and what lies
    /// beyond the tokens of a slot in use.
    pub parked: u64,
    /// What of `parked` was mapped ahead for slots in use.
    pub ahead: u64,
    /// Extents that are created and mapped nowhere.
    pub free_bytes: u64,
    /// Extents that the driver would not let go of after a failure.
    pub quarantined: u64,
    /// All that was created and not released. While extents are made of other ones, those that go and those
    /// that come both count, so for a moment it can be more than the budget; what exists never is.
    pub held: u64,
    /// What may be held at most, in whole granules.
    pub budget: u64,
    /// What of `mapped` pins keep, whether anybody's tokens need it or not.
    pub pinned: u64,
}

/// Everything that a cache counts, at one moment. `vattn_cache_stats_json` has more: calls of the driver by
/// verb, extents by size, failures by kind.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct vattn_stats {
    /// `sizeof(vattn_stats)`, set by the caller.
    pub struct_size: usize,
    /// A `vattn_health`.
    pub health: i32,
    /// 0.
    pub reserved: u32,
    /// Slots that a request has.
    pub active_slots: u64,
    /// Slots that nobody has and that still have memory.
    pub parked_slots: u64,
    /// Slots that requests can have.
    pub max_slots: u64,
    /// Steps that succeeded.
    pub steps: u64,
    /// Slots that were acquired, adopted ones included.
    pub acquired: u64,
    /// Slots that were acquired with memory in them.
    pub adopted: u64,
    /// Slots that were retired.
    pub retired: u64,
    /// Parked extents that were unmapped for somebody else.
    pub reclaimed: u64,
    /// Free extents that were given up so that others, of another size, could be made.
    pub resized: u64,
    /// Operations that failed on the way and were undone.
    pub rolled_back: u64,
    /// Extents that were mapped before a step needed them.
    pub mapped_ahead: u64,
    /// Work in the background that a call of the driver put an end to.
    pub background_failures: u64,
    /// What could not be given back when it was dropped.
    pub refused_drops: u64,
    /// Calls that returned an error.
    pub failures: u64,
    /// Calls of the driver: all of them.
    pub driver: vattn_call_stats,
    /// Those of them that were made beside the path of requests: by the mapper, or in `vattn_cache_tend`.
    pub background: vattn_call_stats,
    /// Pins that are alive, DLPack tensors among them.
    pub pins: u64,
}

/// Calls of the driver.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct vattn_call_stats {
    /// How many there were.
    pub calls: u64,
    /// How many of them failed.
    pub failed: u64,
    /// How long they took in all.
    pub nanoseconds: u64,
}

args::sized!(vattn_bytes);
args::sized!(vattn_stats);

impl From<ByteCounts> for vattn_bytes {
    fn from(bytes: ByteCounts) -> Self {
        Self {
            struct_size: 0,
            needed: bytes.needed.get(),
            mapped: bytes.mapped.get(),
            parked: bytes.parked.get(),
            ahead: bytes.ahead.get(),
            free_bytes: bytes.free.get(),
            quarantined: bytes.quarantined.get(),
            held: bytes.held.get(),
            budget: bytes.budget.get(),
            pinned: bytes.pinned.get(),
        }
    }
}

fn sum<'a>(calls: impl IntoIterator<Item = &'a CallStats>) -> vattn_call_stats {
    calls.into_iter().fold(vattn_call_stats::default(), |sum, stats| vattn_call_stats {
        calls: sum.calls + stats.calls,
        failed: sum.failed + stats.failed,
        nanoseconds: sum.nanoseconds + stats.nanoseconds,
    })
}

/// Whether a cache can be trusted with more work: `out` is a `vattn_health`. A server may want it every
/// iteration.
///
/// # Safety
/// - `out` is NULL, or an `int32_t` can be written there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_cache_health(cache: *const vattn_cache, out: *mut i32) -> vattn_status {
    on_cache("vattn_cache_health", cache, |cache| {
        // SAFETY: as the caller promises.
        let out = unsafe { args::out("out", out) }?;
        out.set(vattn_health::from(cache.health()).number());
        Ok(())
    })
}

/// How much memory is used for what. Waits for nobody and allocates nothing: a server may want it every
/// iteration.
///
/// # Safety
/// - `out` is NULL, or points to a `vattn_bytes` of which `struct_size` is set.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_cache_bytes(cache: *const vattn_cache, out: *mut vattn_bytes) -> vattn_status {
    on_cache("vattn_cache_bytes", cache, |cache| {
        // SAFETY: as the caller promises.
        let out = unsafe { args::out_sized("out", out) }?;
        out.set(cache.bytes().into());
        Ok(())
    })
}

/// What is counted, at any time and without waiting for anybody.
///
/// # Safety
/// - `out` is NULL, or points to a `vattn_stats` of which `struct_size` is set.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_cache_stats(cache: *const vattn_cache, out: *mut vattn_stats) -> vattn_status {
    on_cache("vattn_cache_stats", cache, |cache| {
        // SAFETY: as the caller promises.
        let out = unsafe { args::out_sized("out", out) }?;
        let snapshot = cache.snapshot();
        let (slots, events) = (snapshot.slots, snapshot.events);
        out.set(vattn_stats {
            struct_size: 0,
            health: vattn_health::from(cache.health()).number(),
            reserved: 0,
            active_slots: slots.active,
            parked_slots: slots.parked,
            max_slots: slots.max,
            steps: events.steps,
            acquired: events.acquired,
            adopted: events.adopted,
            retired: events.retired,
            reclaimed: events.reclaimed,
            resized: events.resized,
            rolled_back: events.rolled_back,
            mapped_ahead: events.mapped_ahead,
            background_failures: events.background_failures,
            refused_drops: events.refused_drops,
            failures: snapshot.failures.values().sum(),
            driver: sum(snapshot.driver.values()),
            background: sum(snapshot.background.values()),
            pins: snapshot.pins,
        });
        Ok(())
    })
}

/// Calls of the driver of one verb, a `vattn_verb`.
///
/// # Safety
/// - `out` is NULL, or a `vattn_call_stats` can be written there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_cache_calls(
    cache: *const vattn_cache,
    verb: i32,
    out: *mut vattn_call_stats,
) -> vattn_status {
    on_cache("vattn_cache_calls", cache, |cache| {
        // SAFETY: as the caller promises.
        let out = unsafe { args::out("out", out) }?;
        let verb = vattn_verb::named("verb", verb)?;
        out.set(sum(cache.snapshot().driver.get(&verb)));
        Ok(())
    })
}

/// What `vattn_cache_stats` has and more, as one JSON object. The text is the caller's:
/// `vattn_string_destroy` gives it up.
///
/// # Safety
/// - `out` is NULL, or a pointer can be written there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_cache_stats_json(
    cache: *const vattn_cache,
    out: *mut *mut c_char,
) -> vattn_status {
    on_cache("vattn_cache_stats_json", cache, |cache| {
        // SAFETY: as the caller promises.
        let out = unsafe { args::out("out", out) }?;
        out.set(keep_text(cache.snapshot().to_json()));
        Ok(())
    })
}

/// Walks through all slots and extents, compares the books, and tells everything as one JSON object, every
/// slot that has memory among it. Waits for operations under way. The text is the caller's:
/// `vattn_string_destroy` gives it up.
///
/// Fails with `VATTN_INTERNAL` where the books disagree, which is a defect of this library.
///
/// # Safety
/// - `out` is NULL, or a pointer can be written there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_cache_report_json(
    cache: *const vattn_cache,
    out: *mut *mut c_char,
) -> vattn_status {
    on_cache("vattn_cache_report_json", cache, |cache| {
        // SAFETY: as the caller promises.
        let out = unsafe { args::out("out", out) }?;
        out.set(keep_text(cache.report()?.to_json()));
        Ok(())
    })
}
