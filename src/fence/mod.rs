//! What is waited for before memory is unmapped: fences as callers give them, and as the library keeps them.
//!
//! Owns the library's own events, and which of two fences stands for the other. Refuses to know whose
//! memory it is: a slot's, a buffer's.

#![allow(unsafe_code, reason = "a foreign event can only be vouched for by whoever hands it in")]

use std::sync::atomic::{AtomicU64, Ordering};

use crate::driver::owned::{DriverHandle, Event};
use crate::driver::{RawEvent, Stream};
use crate::error::{Error, ErrorKind, Result};

mod kept;

pub(crate) use kept::{Kept, add};

/// What tells that device work submitted earlier is done with memory.
///
/// Calls that give memory up take several, one for each stream that touched it. There is no implicit
/// fence: whoever knows that nothing is running says [`Idle`](Self::Idle).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Fence {
    /// Nothing on the device uses the memory any more.
    Idle,
    /// All that is in the stream by now. The stream is synchronised before it is destroyed, as
    /// [`Stream::new`] asks, since its number may be used again.
    Stream(Stream),
    /// An event of the caller's. Prefer a stream: an event is followed on a stream of the library's, of
    /// which a driver has a few (CUDA: eight), so that beyond those one that is long in firing can hold
    /// up others.
    Event(ForeignEvent),
}

/// An event that the caller recorded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ForeignEvent(RawEvent);

impl ForeignEvent {
    /// Hands an event to the library, which waits for it and never destroys it.
    ///
    /// # Safety
    /// - `event` is an event of the driver's device, and lives until the call that takes the fence
    ///   returns.
    #[must_use]
    pub unsafe fn new(event: RawEvent) -> Self {
        Self(event)
    }
}

/// The time on the clock that all fences share: every look at it is a later one.
fn now() -> u64 {
    static CLOCK: AtomicU64 = AtomicU64::new(0);
    CLOCK.fetch_add(1, Ordering::SeqCst)
}

/// Turns fences into events that the library owns. Calls the driver.
pub(crate) fn record(driver: &DriverHandle, fences: &[Fence]) -> Result<Vec<Kept>> {
    if fences.is_empty() {
        return Err(Error::new(
            ErrorKind::InvalidArgument,
            "no fence is given; name every stream that touched the memory, or give an idle fence if none is running",
        ));
    }
    let mut recorded = Vec::new();
    for fence in fences {
        let started = now();
        let (event, stream) = match *fence {
            Fence::Idle => continue,
            Fence::Stream(stream) => (Event::record(driver, stream)?, Some(stream)),
            // SAFETY: `ForeignEvent::new` made the caller promise that the event lives during this call.
            Fence::Event(ForeignEvent(event)) => (unsafe { Event::follow(driver, event) }?, None),
        };
        recorded.push(Kept::new(event, stream, started, now()));
    }
    Ok(recorded)
}

/// Blocks until all have fired.
pub(crate) fn wait(fences: &[Kept]) -> Result<()> {
    fences.iter().try_for_each(|fence| fence.event().wait())
}
