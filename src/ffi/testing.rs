//! For tests of whoever uses a cache: a driver that fails on demand, and fences that are fired by hand.

use std::ffi::c_void;

use super::args;
use super::driver::{ByHand, DriverObject, vattn_driver, vattn_verb};
use super::entry::{Failure, enter};
use super::handle::DRIVERS;
use super::status::vattn_status;
use crate::driver::checked::{Checked, CheckedOptions};
use crate::error::{Error, ErrorKind, Result, Verb};

/// Any of a driver's calls.
pub const VATTN_ANY_VERB: i32 = -1;

/// A driver around another that can be told to fail, so that a program can be tested against every failure
/// there is. It costs some time in each call. The inner driver stays alive as long as it does.
///
/// # Safety
/// - `out` is NULL, or a pointer can be written there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_driver_create_checked(
    inner: *const vattn_driver,
    out: *mut *mut vattn_driver,
) -> vattn_status {
    enter("vattn_driver_create_checked", || {
        let inner = DRIVERS.get(inner)?;
        // SAFETY: as the caller promises.
        let out = unsafe { args::out("out", out) }?;
        let options = CheckedOptions { assert_contract: false, ..CheckedOptions::TEST };
        let checked = Checked::new(std::sync::Arc::clone(&inner.driver), options);
        let by_hand = inner.by_hand.clone();
        out.set(DRIVERS.keep(DriverObject { driver: checked.clone(), by_hand, checked: Some(checked) })?);
        Ok(())
    })
}

/// Has the `nth` call from now on fail with `status`, 1 for the next, counting only calls of `verb`, a
/// `vattn_verb`, or all with `VATTN_ANY_VERB`; and with `onward` 1 every later one too. Several may be
/// planned. `status` is a failure that a driver can have, from `VATTN_INVALID_GEOMETRY` to `VATTN_INTERNAL`.
///
/// Fails with `VATTN_UNSUPPORTED` for a driver that `vattn_driver_create_checked` did not make.
///
/// # Safety
/// - any handle may be passed; one that is not alive is refused.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_driver_fail(
    driver: *const vattn_driver,
    verb: i32,
    nth: u64,
    onward: u32,
    status: i32,
) -> vattn_status {
    enter("vattn_driver_fail", || {
        let object = DRIVERS.get(driver)?;
        let checked = checked(&object)?;
        let verb = any_or_one(verb)?;
        let kind = vattn_status::kind_of(status).ok_or_else(|| {
            args::invalid(format!("status is {status}; use a failure from 1 to {}", ErrorKind::ALL.len()))
        })?;
        if nth == 0 {
            return Err(args::invalid("nth is 0, and calls are counted from 1; use 1 for the next").into());
        }
        match (verb, args::flag("onward", onward)?) {
            (None, false) => checked.fail_call(nth, kind),
            (None, true) => checked.fail_from(nth, kind),
            (Some(verb), false) => checked.fail_call_of(verb, nth, kind),
            (Some(verb), true) => checked.fail_from_of(verb, nth, kind),
        }
        Ok(())
    })
}

/// Has no call fail any more that was planned to.
///
/// Fails with `VATTN_UNSUPPORTED` for a driver that `vattn_driver_create_checked` did not make.
///
/// # Safety
/// - any handle may be passed; one that is not alive is refused.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_driver_clear_failures(driver: *const vattn_driver) -> vattn_status {
    enter("vattn_driver_clear_failures", || {
        checked(&*DRIVERS.get(driver)?)?.clear_faults();
        Ok(())
    })
}

/// How many calls there were so far, of `verb` or, with `VATTN_ANY_VERB`, in all, and how many were made to
/// fail.
///
/// Fails with `VATTN_UNSUPPORTED` for a driver that `vattn_driver_create_checked` did not make.
///
/// # Safety
/// - `out_calls` and `out_failed` are NULL, or a `uint64_t` can be written there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_driver_calls(
    driver: *const vattn_driver,
    verb: i32,
    out_calls: *mut u64,
    out_failed: *mut u64,
) -> vattn_status {
    enter("vattn_driver_calls", || {
        let object = DRIVERS.get(driver)?;
        // SAFETY: as the caller promises.
        let (calls, failed) =
            unsafe { (args::out("out_calls", out_calls)?, args::out("out_failed", out_failed)?) };
        let checked = checked(&object)?;
        let counts = checked.calls();
        calls.set(any_or_one(verb)?.map_or(counts.total(), |verb| counts.of(verb)));
        failed.set(checked.injected());
        Ok(())
    })
}

/// What is alive of a driver's: extents, mappings, reservations and events that nobody has given back. All
/// are 0 once every cache of it is destroyed, but for what a planned failure kept it from giving back.
///
/// Fails with `VATTN_UNSUPPORTED` for a driver that `vattn_driver_create_checked` did not make.
///
/// # Safety
/// - `out` is NULL, or a `vattn_live` can be written there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_driver_live(
    driver: *const vattn_driver,
    out: *mut vattn_live,
) -> vattn_status {
    enter("vattn_driver_live", || {
        let object = DRIVERS.get(driver)?;
        // SAFETY: as the caller promises.
        let out = unsafe { args::out("out", out) }?;
        let live = checked(&object)?.live();
        out.set(vattn_live {
            handles: live.handles,
            mappings: live.mappings,
            reservations: live.reservations,
            events: live.events,
        });
        Ok(())
    })
}

/// What is alive of a driver's.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct vattn_live {
    /// Allocations.
    pub handles: u64,
    /// Mappings.
    pub mappings: u64,
    /// Ranges of addresses.
    pub reservations: u64,
    /// Events.
    pub events: u64,
}

/// Holds a stream back: fences that are recorded on it from now on fire when `vattn_driver_fire` says so.
/// For host and ledger drivers, on which any number may name a stream and fences otherwise fire at once. Fire
/// it before the driver's handle is given up: whoever waits for such a fence, a cache that is destroyed among
/// them, waits until then.
///
/// Fails with `VATTN_UNSUPPORTED` for another driver.
///
/// # Safety
/// - any handle may be passed; one that is not alive is refused.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_driver_hold(driver: *const vattn_driver, stream: *mut c_void) -> vattn_status {
    enter("vattn_driver_hold", || {
        let stream = super::cache::stream(stream);
        by_hand(driver, |host| host.hold(stream), |ledger| ledger.hold(stream))
    })
}

/// Fires all fences of a stream, and holds it back no longer.
///
/// Fails with `VATTN_UNSUPPORTED` for a driver that is neither host nor ledger.
///
/// # Safety
/// - any handle may be passed; one that is not alive is refused.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_driver_fire(driver: *const vattn_driver, stream: *mut c_void) -> vattn_status {
    enter("vattn_driver_fire", || {
        let stream = super::cache::stream(stream);
        by_hand(driver, |host| host.fire(stream), |ledger| ledger.fire(stream))
    })
}

/// Says that a stream is being captured into a graph, with `capturing` 1, or no longer, with 0: fences on
/// it are refused meanwhile with `VATTN_CAPTURING_STREAM`.
///
/// Fails with `VATTN_UNSUPPORTED` for a driver that is neither host nor ledger.
///
/// # Safety
/// - any handle may be passed; one that is not alive is refused.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_driver_set_capturing(
    driver: *const vattn_driver,
    stream: *mut c_void,
    capturing: u32,
) -> vattn_status {
    enter("vattn_driver_set_capturing", || {
        let (stream, capturing) = (super::cache::stream(stream), args::flag("capturing", capturing)?);
        by_hand(
            driver,
            |host| host.set_capturing(stream, capturing),
            |ledger| ledger.set_capturing(stream, capturing),
        )
    })
}

fn by_hand(
    driver: *const vattn_driver,
    host: impl FnOnce(&crate::driver::host::Host),
    ledger: impl FnOnce(&crate::driver::ledger::Ledger),
) -> Result<(), Failure> {
    match &DRIVERS.get(driver)?.by_hand {
        ByHand::Host(driver) => host(driver),
        ByHand::Ledger(driver) => ledger(driver),
        ByHand::No => {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "this driver's streams are the device's own; use a host or a ledger driver",
            )
            .into());
        }
    }
    Ok(())
}

fn checked(object: &DriverObject) -> Result<&Checked> {
    object.checked.as_deref().ok_or_else(|| {
        Error::new(
            ErrorKind::Unsupported,
            "this driver was not made by vattn_driver_create_checked; make one around it",
        )
    })
}

fn any_or_one(verb: i32) -> Result<Option<Verb>> {
    if verb == VATTN_ANY_VERB { Ok(None) } else { vattn_verb::named("verb", verb).map(Some) }
}
