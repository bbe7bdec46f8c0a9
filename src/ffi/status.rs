//! Which statuses there are, and the last error of a thread.

use std::ffi::{CStr, c_char};

use super::args::{self, Numbered as _, Sized as _};
use super::entry::{Failure, last, plain};
use crate::error::ErrorKind;

/// What a call comes to. Zero is success. Numbers are never used for anything else in a later version;
/// new ones may come, so treat one that you do not know as a failure.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(i32)]
#[must_use]
pub enum vattn_status {
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
}

args::numbered!(vattn_status);

use vattn_status::*;

impl vattn_status {
    const ALL: [(Self, &'static CStr); 25] = [
        (VATTN_OK, c"ok"),
        (VATTN_INVALID_GEOMETRY, c"invalid_geometry"),
        (VATTN_INVALID_CONFIG, c"invalid_config"),
        (VATTN_INVALID_ARGUMENT, c"invalid_argument"),
        (VATTN_OUT_OF_BUDGET, c"out_of_budget"),
        (VATTN_OUT_OF_DEVICE_MEMORY, c"out_of_device_memory"),
        (VATTN_OUT_OF_MAPPINGS, c"out_of_mappings"),
        (VATTN_OUT_OF_ADDRESS_SPACE, c"out_of_address_space"),
        (VATTN_NO_FREE_SLOT, c"no_free_slot"),
        (VATTN_STALE_SLOT, c"stale_slot"),
        (VATTN_FOREIGN_SLOT, c"foreign_slot"),
        (VATTN_SLOT_BUSY, c"slot_busy"),
        (VATTN_DUPLICATE_SLOT, c"duplicate_slot"),
        (VATTN_TOO_MANY_TOKENS, c"too_many_tokens"),
        (VATTN_FEWER_TOKENS, c"fewer_tokens"),
        (VATTN_CAPTURING_STREAM, c"capturing_stream"),
        (VATTN_DRIVER, c"driver"),
        (VATTN_DEVICE_LOST, c"device_lost"),
        (VATTN_UNHEALTHY, c"unhealthy"),
        (VATTN_UNSUPPORTED, c"unsupported"),
        (VATTN_INTERNAL, c"internal"),
        (VATTN_INVALID_HANDLE, c"invalid_handle"),
        (VATTN_FORKED, c"forked"),
        (VATTN_PANIC, c"panic"),
        (VATTN_IN_CALLBACK, c"in_callback"),
    ];

    /// The kind of error that a number stands for, if it is one of the crate's.
    pub(super) fn kind_of(number: i32) -> Option<ErrorKind> {
        ErrorKind::ALL.into_iter().find(|&kind| Self::from(kind).number() == number)
    }
}

impl From<ErrorKind> for vattn_status {
    fn from(kind: ErrorKind) -> Self {
        match kind {
            ErrorKind::InvalidGeometry => VATTN_INVALID_GEOMETRY,
            ErrorKind::InvalidConfig => VATTN_INVALID_CONFIG,
            ErrorKind::InvalidArgument => VATTN_INVALID_ARGUMENT,
            ErrorKind::OutOfBudget => VATTN_OUT_OF_BUDGET,
            ErrorKind::OutOfDeviceMemory => VATTN_OUT_OF_DEVICE_MEMORY,
            ErrorKind::OutOfMappings => VATTN_OUT_OF_MAPPINGS,
            ErrorKind::OutOfAddressSpace => VATTN_OUT_OF_ADDRESS_SPACE,
            ErrorKind::NoFreeSlot => VATTN_NO_FREE_SLOT,
            ErrorKind::StaleSlot => VATTN_STALE_SLOT,
            ErrorKind::ForeignSlot => VATTN_FOREIGN_SLOT,
            ErrorKind::SlotBusy => VATTN_SLOT_BUSY,
            ErrorKind::DuplicateSlot => VATTN_DUPLICATE_SLOT,
            ErrorKind::TooManyTokens => VATTN_TOO_MANY_TOKENS,
            ErrorKind::FewerTokens => VATTN_FEWER_TOKENS,
            ErrorKind::CapturingStream => VATTN_CAPTURING_STREAM,
            ErrorKind::Driver => VATTN_DRIVER,
            ErrorKind::DeviceLost => VATTN_DEVICE_LOST,
            ErrorKind::Unhealthy => VATTN_UNHEALTHY,
            ErrorKind::Unsupported => VATTN_UNSUPPORTED,
            ErrorKind::Internal => VATTN_INTERNAL,
        }
    }
}

/// The last call of this thread that failed: what a program may branch on.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct vattn_error {
    /// `sizeof(vattn_error)`, set by the caller.
    pub struct_size: usize,
    /// A `vattn_status`; `VATTN_OK` while no call of this thread has failed.
    pub status: i32,
    /// Which call of the driver failed, a `vattn_verb`; -1 where none did.
    pub verb: i32,
    /// The driver's own number: a `CUresult`, or an `errno` of the host. 0 where no call failed.
    pub driver_code: i64,
    /// The bytes that the driver's call was about; 0 where it has none.
    pub driver_bytes: u64,
    /// The name of `driver_code`, such as `CUDA_ERROR_OUT_OF_MEMORY`; empty where no call failed.
    pub driver_name: [c_char; 64],
}

args::sized!(vattn_error);

/// The name of a status in one word, such as `out_of_budget`; `unknown` for a number that is none. The
/// string is the library's and lives as long as it.
#[unsafe(no_mangle)]
pub extern "C" fn vattn_status_name(status: i32) -> *const c_char {
    plain(c"unknown".as_ptr(), || {
        let known = vattn_status::ALL.into_iter().find(|(known, _)| known.number() == status);
        known.map_or(c"unknown", |(_, name)| name).as_ptr()
    })
}

/// The last call of this thread that failed. A call that succeeds leaves it as it is, and so does this
/// one, whatever it comes to.
///
/// # Safety
/// - `out` is NULL, or points to a `vattn_error` of which `struct_size` is set.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_last_error(out: *mut vattn_error) -> vattn_status {
    plain(VATTN_PANIC, || {
        // SAFETY: as the caller promises.
        let filled = unsafe { args::out_sized("out", out) }.map(|out| out.set(last(describe)));
        filled.map_or_else(|error| error.kind().into(), |()| VATTN_OK)
    })
}

fn describe(failure: Option<&Failure>) -> vattn_error {
    let driver = failure.and_then(|failure| failure.driver.as_ref());
    let mut name = [0; 64];
    if let Some(driver) = driver {
        args::copy_text(driver.name, &mut name);
    }
    vattn_error {
        struct_size: vattn_error::SIZE,
        status: failure.map_or(VATTN_OK, |failure| failure.status).number(),
        verb: driver.map_or(-1, |driver| super::vattn_verb::from(driver.verb).number()),
        driver_code: driver.map_or(0, |driver| driver.code),
        driver_bytes: driver.and_then(|driver| driver.size).map_or(0, crate::units::Bytes::get),
        driver_name: name,
    }
}

/// Copies out the text of the last call of this thread that failed: it names the value, the limit and
/// the cure. At most `capacity` bytes are written, the closing NUL among them; what does not fit is left
/// out. Returns the length of the whole text without its NUL, so a first call with NULL and 0 tells how
/// much room it needs. Empty while no call has failed; a call that succeeds leaves it as it is.
///
/// # Safety
/// - `buffer` is NULL and `capacity` 0, or `capacity` bytes can be written there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_last_error_message(buffer: *mut c_char, capacity: usize) -> usize {
    plain(0, || {
        last(|failure| {
            let text = failure.map_or("", |failure| failure.message.as_str());
            // SAFETY: as the caller promises.
            if let Ok(room) = unsafe { args::slice_mut("buffer", buffer, capacity) } {
                args::copy_text(text, room);
            }
            text.len()
        })
    })
}
