//! [`Buffer`]: a range of addresses of which a part is backed, and that knows nothing of caches.
//!
//! Owns which bytes are committed, exactly, and what lies behind them. Refuses to know what the bytes are:
//! rows of a tensor, somebody's pages, anything.
//!
//! ```text
//!   committed   ▕███████████▏      ▕████▏    ▕██▏            any bytes
//!   extents     ▕     4     ▕ 2  ▕  ▕1▕1▕    ▕1▕             2^k granules, at multiples of their size
//!   reserved    ▕                                        ▏   whole granules
//! ```
//!
//! - Every committed byte is backed.
//! - An extent is unmapped only once none of its bytes is committed, so after the fences of whoever
//!   decommitted each of them.
//!
//! | file | what it answers |
//! |---|---|
//! | `ranges.rs` | which bytes are in a set |
//! | `extents.rs` | what is mapped; how memory comes and goes, whole or not at all |
//!
//! One lock, of rank 0: it is held over driver calls, and not while fences are waited for.

mod extents;
mod ranges;

use std::fmt;
use std::sync::Arc;

use crate::driver::Driver;
use crate::driver::owned::{DriverHandle, Reservation};
use crate::error::{Error, ErrorKind, Result};
use crate::fence::{self, Fence};
use crate::stats::Counters;
use crate::sync::Ranked;
use crate::units::{Bytes, Device, DeviceAddr, GranuleSize};

use extents::{Extents, Refused};
use ranges::{Ranges, Span};

/// The largest extent where none is named, unless a granule is larger.
const LARGEST_EXTENT: Bytes = Bytes::mib(32);

/// How large a [`Buffer`] is, and its extents.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BufferOptions {
    /// Bytes of addresses, rounded up to granules. Addresses cost nothing.
    pub size: Bytes,
    /// The most bytes of one allocation: a granule times a power of two. `None` for 32 MiB, or a granule
    /// where that is more.
    ///
    /// Large extents make commits cheap, since a driver charges for each and hardly for its size; small
    /// ones make decommits exact, since an extent is given back once nothing in it is wanted, and whole.
    pub largest_extent: Option<Bytes>,
}

impl BufferOptions {
    /// That many bytes, and extents of the usual size.
    #[must_use]
    pub const fn new(size: Bytes) -> Self {
        Self { size, largest_extent: None }
    }
}

/// A range of addresses that never move, with physical memory behind the bytes that are committed.
///
/// [`commit`](Self::commit) backs a range and [`decommit`](Self::decommit) takes it back; what is neither
/// faults when it is touched. Ranges are any bytes: they need not begin or end on granules, and two that
/// share a granule don't take it from each other.
///
/// **Extents.** Memory is allocated in extents of 2^k granules that lie at multiples of their own size,
/// each the largest that fits into what of a commit is not backed yet and is allowed
/// ([`largest_extent`](BufferOptions::largest_extent)). So what is committed together lies in few large
/// extents, and what is committed granule by granule in small ones. (PyTorch's expandable segments use
/// blocks of 20 MiB for large tensors throughout.) An extent is given back once none of its bytes is
/// committed: at each end of what is decommitted, up to one extent less a byte stays held for its neighbours.
/// [`held`](Self::held) tells how much there is.
///
/// **What it costs.** About 45 µs an extent for a commit and 50 for a decommit on an H200, with the default:
/// 1.4 ms a GiB. A commit of what is committed already, and a decommit in which no extent becomes empty, call
/// no driver, fences aside. A byte of a granule counts as the whole of it.
///
/// **Threads.** `Send + Sync`; every method takes `&self`. Calls that move memory queue up behind one
/// another. Commit and decommit of the same bytes at the same time come to either result.
///
/// **Whole or not at all.** A call that returns an error has changed nothing that a caller can see, with one
/// exception that says so: see [`decommit`](Self::decommit).
///
/// Dropping it gives everything back; nothing on the device may use it by then.
///
/// ```
/// use vattn::driver::ledger::{Ledger, LedgerOptions};
/// use vattn::units::Bytes;
/// use vattn::{Buffer, BufferOptions, Fence};
///
/// let driver = Ledger::new(LedgerOptions { granule: Bytes::mib(2), capacity: Bytes::gib(1), addresses: None })?;
/// let buffer = Buffer::new(driver, BufferOptions::new(Bytes::gib(256)))?;
///
/// // Two rows of 3 MiB: the second granule holds a part of both.
/// buffer.commit(Bytes::ZERO, Bytes::mib(3))?;
/// buffer.commit(Bytes::mib(3), Bytes::mib(3))?;
/// assert_eq!(buffer.held(), Bytes::mib(6));
/// buffer.decommit(Bytes::mib(3), Bytes::mib(3), &[Fence::Idle])?;
/// assert_eq!(buffer.held(), Bytes::mib(4));
/// assert!(buffer.is_committed(Bytes::ZERO, Bytes::mib(3)));
/// # Ok::<(), vattn::Error>(())
/// ```
pub struct Buffer {
    state: Ranked<State, 0>,
    reservation: Arc<Reservation>,
    driver: DriverHandle,
}

#[derive(Debug)]
struct State {
    extents: Extents,
    committed: Ranges,
    /// Memory is being moved. Found set by a later call, it says that one panicked on the way.
    moving: bool,
}

impl Buffer {
    /// Reserves addresses, with nothing committed.
    ///
    /// # Errors
    /// [`InvalidArgument`](ErrorKind::InvalidArgument) for a size of zero or one that granules can't round
    /// up, and a largest extent that is no granule times a power of two; the driver's
    /// ([`OutOfAddressSpace`](ErrorKind::OutOfAddressSpace)).
    pub fn new(driver: Arc<dyn Driver>, options: BufferOptions) -> Result<Self> {
        let driver = DriverHandle::new(driver, Arc::new(Counters::default()));
        let granule = driver.info().granule.bytes();
        let size = match options.size.checked_next_multiple_of(granule) {
            Some(size) if !size.is_zero() => size,
            _ => {
                return Err(invalid(format!(
                    "a buffer of {} can't be reserved: use from 1 byte to 2^64 less a granule of {granule}",
                    options.size
                )));
            }
        };
        let largest = options.largest_extent.unwrap_or(LARGEST_EXTENT.max(granule));
        if largest < granule || !largest.get().is_power_of_two() {
            return Err(invalid(format!(
                "extents of up to {largest} can't be: use a power of two of at least a granule, {granule}"
            )));
        }
        let reservation = Reservation::new(&driver, size).map_err(|error| {
            error.context(format!("reserving {size} of addresses for a buffer; use a smaller one"))
        })?;
        let extents = Extents::new(driver.clone(), Arc::clone(&reservation), largest);
        let state = State { extents, committed: Ranges::default(), moving: false };
        Ok(Self { state: Ranked::new(state), reservation, driver })
    }

    /// Backs a range: afterwards every byte of it can be touched. What is committed already stays as it is,
    /// with what is in it; what is in new memory is not defined. `offset` is from the buffer's start.
    ///
    /// # Errors
    /// [`InvalidArgument`](ErrorKind::InvalidArgument) for a range that is empty or reaches beyond the
    /// buffer; the driver's ([`OutOfDeviceMemory`](ErrorKind::OutOfDeviceMemory),
    /// [`OutOfMappings`](ErrorKind::OutOfMappings)), and nothing was committed;
    /// [`Unhealthy`](ErrorKind::Unhealthy) after a driver panicked in a call on this buffer.
    pub fn commit(&self, offset: Bytes, size: Bytes) -> Result<()> {
        let span = self.span(offset, size)?;
        self.move_memory(|state| {
            if !state.committed.contains(&span) {
                let doing = |error: Error| error.context(format!("committing {size} at offset {offset}"));
                state.extents.back(&self.whole(&span)).map_err(doing)?;
                state.committed.insert(&span);
            }
            Ok(())
        })
    }

    /// Says that the bytes of a range are no longer wanted, those of it that were committed. Memory is given
    /// back by whole extents of which no byte is committed any more.
    ///
    /// The fences say when the device is done with the range, one for each stream that touched it. They are
    /// waited for on the calling thread, before anything else: whoever must not wait gives an event that has
    /// fired. Until this returns the range counts as committed.
    ///
    /// # Errors
    /// [`InvalidArgument`](ErrorKind::InvalidArgument) for a range that is empty or reaches beyond the
    /// buffer, and for no fence; [`CapturingStream`](ErrorKind::CapturingStream); the driver's. The range is
    /// as it was, with what is in it: what was unmapped is mapped back.
    /// [`Unhealthy`](ErrorKind::Unhealthy) where the driver refused that as well: the text names what is
    /// backed no more. Those bytes are not committed any more, and all others are as they were. The same kind
    /// after a driver panicked in a call on this buffer.
    ///
    /// A driver that unmaps memory and will not release it is no error: the memory counts as
    /// [`held`](Self::held), is used again, and is offered to the driver with each later call.
    pub fn decommit(&self, offset: Bytes, size: Bytes, fences: &[Fence]) -> Result<()> {
        let span = self.span(offset, size)?;
        let fences = fence::record(&self.driver, fences)?;
        fence::wait(&fences)?;
        drop(fences);
        self.move_memory(|state| {
            let removed = state.committed.remove(&span);
            let result = state.extents.give_up(&self.whole(&span), &state.committed);
            let Err(Refused { error, lost }) = result else { return Ok(()) };
            removed.iter().for_each(|span| state.committed.insert(span));
            // What an earlier commit left behind was nobody's to lose.
            let was_committed = |span: &Span| !state.committed.remove(span).is_empty();
            let lost: Vec<_> = lost.into_iter().filter(was_committed).collect();
            Err(refused(&span, &lost, error))
        })
    }

    /// The address of the first byte. It never changes.
    #[must_use]
    pub fn addr(&self) -> DeviceAddr {
        self.reservation.addr()
    }

    /// Bytes of addresses: what was asked for, rounded up to granules.
    #[must_use]
    pub fn size(&self) -> Bytes {
        self.reservation.size()
    }

    /// The driver's unit of allocation.
    #[must_use]
    pub fn granule(&self) -> GranuleSize {
        self.driver.info().granule
    }

    /// Where the memory lives.
    #[must_use]
    pub fn device(&self) -> Device {
        self.driver.info().device
    }

    /// Bytes that are committed.
    #[must_use]
    pub fn committed(&self) -> Bytes {
        self.state.lock().committed.total()
    }

    /// Bytes of memory that were allocated and not given back.
    #[must_use]
    pub fn held(&self) -> Bytes {
        self.state.lock().extents.held()
    }

    /// Whether every byte of a range is committed. Of an empty one, and one that is not inside, none is.
    #[must_use]
    pub fn is_committed(&self, offset: Bytes, size: Bytes) -> bool {
        let state = self.state.lock();
        !state.moving && self.span(offset, size).is_ok_and(|span| state.committed.contains(&span))
    }

    /// Whether so many bytes from `addr` on lie in the buffer: whether their addresses are reserved, not whether
    /// there is memory behind them.
    #[must_use]
    pub fn contains(&self, addr: DeviceAddr, size: Bytes) -> bool {
        self.reservation.contains(addr, size)
    }

    /// A range that is one.
    fn span(&self, offset: Bytes, size: Bytes) -> Result<Span> {
        if size.is_zero() {
            return Err(invalid(format!("the range at offset {offset} has 0 bytes; name at least one")));
        }
        match offset.checked_add(size) {
            Some(end) if end <= self.size() => Ok(offset..end),
            _ => Err(invalid(format!(
                "{size} at offset {offset} reach beyond the buffer, which has {}; name less, or reserve more",
                self.size()
            ))),
        }
    }

    /// The granules that a range lies in.
    fn whole(&self, span: &Span) -> Span {
        let granule = self.granule();
        granule.to_bytes(granule.within(span.start))..granule.to_bytes(granule.covering(span.end))
    }

    /// Does what moves memory, one call at a time.
    fn move_memory(&self, call: impl FnOnce(&mut State) -> Result<()>) -> Result<()> {
        let mut state = self.state.lock();
        if state.moving {
            return Err(Error::new(
                ErrorKind::Unhealthy,
                "the driver panicked in an earlier call on this buffer, and what it did is not known; give the buffer up",
            ));
        }
        state.moving = true;
        let result = call(&mut state);
        state.moving = false;
        result
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Buffer")
            .field("addr", &self.addr())
            .field("size", &self.size())
            .field("driver", self.driver.info())
            .finish_non_exhaustive()
    }
}

#[cold]
fn refused(span: &Span, lost: &[Span], error: Error) -> Error {
    let doing = format!("decommitting {} at offset {}", span.end - span.start, span.start);
    if lost.is_empty() {
        return error.context(format!("{doing}; nothing was changed"));
    }
    let named: Vec<_> =
        lost.iter().map(|span| format!("{} at offset {}", span.end - span.start, span.start)).collect();
    Error::new(
        ErrorKind::Unhealthy,
        format!(
            "{doing}: the driver stopped in the middle, and would not map back {}, where nothing is backed or committed \
             any more; decommit the rest again, or commit this again",
            named.join(", ")
        ),
    )
    .caused_by(error)
}

#[cold]
fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidArgument, message)
}
