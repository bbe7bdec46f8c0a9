//! What frees on drop: [`Reservation`], [`PhysicalMemory`], [`Mapping`], [`Event`].
//!
//! Each has private fields and one constructor, so that the safety conditions of [`Driver`] follow
//! from facts in this file. Arguments are checked here, once for all backends. A drop never panics:
//! what the driver refuses is logged and counted ([`DriverHandle::refused_drops`]).
//!
//! ```text
//!   DriverHandle ◄── Reservation ◄── Mapping      (an arrow: keeps alive)
//!         ▲──────── PhysicalMemory
//!         ▲──────── Event
//! ```

#![allow(unsafe_code, reason = "the safe face of the driver's unsafe verbs")]

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use crate::driver::{Access, Driver, DriverInfo, MemoryInfo, RawEvent, RawHandle, Stream};
use crate::error::{Error, ErrorKind, Result, Verb};
use crate::stats::Counters;
use crate::sync::assert_unlocked;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::units::{Bytes, DeviceAddr};

/// A driver that is shared by everything made through it, with the counters of its calls.
#[derive(Clone, Debug)]
pub struct DriverHandle {
    driver: Arc<dyn Driver>,
    counters: Arc<Counters>,
}

impl DriverHandle {
    /// Shares a driver; its calls are counted in `counters`.
    #[must_use]
    pub fn new(driver: Arc<dyn Driver>, counters: Arc<Counters>) -> Self {
        Self { driver, counters }
    }

    /// What the driver is.
    #[must_use]
    pub fn info(&self) -> &DriverInfo {
        self.driver.info()
    }

    /// How much memory there is and how much of it is free now.
    ///
    /// # Errors
    /// The driver's.
    pub fn memory_info(&self) -> Result<MemoryInfo> {
        self.call(Verb::MemoryInfo, |driver| driver.memory_info())
    }

    /// How many drops the driver refused: memory that is lost until the process ends.
    #[must_use]
    pub fn refused_drops(&self) -> u64 {
        self.counters.refused_drops()
    }

    /// One call of the driver, counted and timed, with no lock held.
    fn call<T>(&self, verb: Verb, call: impl FnOnce(&dyn Driver) -> Result<T>) -> Result<T> {
        assert_unlocked();
        let start = Instant::now();
        let result = call(&*self.driver);
        self.counters.count_call(verb, start.elapsed(), result.is_ok());
        if let Err(error) = &result
            && error.kind() == ErrorKind::DeviceLost
        {
            self.counters.note_device_lost(error);
        }
        result
    }

    /// A call that gives something back. A device that is gone has taken it already.
    fn cleanup(&self, verb: Verb, call: impl FnOnce(&dyn Driver) -> Result<()>) -> Result<()> {
        match self.call(verb, call) {
            Err(error) if error.kind() == ErrorKind::DeviceLost => Ok(()),
            result => result,
        }
    }

    /// The same from a drop, where nobody takes an error. Says whether the driver did it.
    fn cleanup_in_drop(&self, verb: Verb, call: impl FnOnce(&dyn Driver) -> Result<()>) -> bool {
        let result = self.cleanup(verb, call);
        if let Err(error) = &result {
            self.counters.count_refused_drop();
            tracing::error!(
                verb = verb.as_str(),
                error = error.report(),
                "the driver refused to take memory back"
            );
        }
        result.is_ok()
    }

    fn check_size(&self, what: &str, size: Bytes) -> Result<()> {
        let granule = self.info().granule;
        if size.is_zero() || !granule.divides(size) {
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                format!(
                    "{what} of {size} is not a positive multiple of the granule, {}; round it up",
                    granule.bytes()
                ),
            ));
        }
        Ok(())
    }
}

/// Addresses with nothing behind them, until something is mapped.
#[derive(Debug)]
pub struct Reservation {
    driver: DriverHandle,
    addr: DeviceAddr,
    size: Bytes,
    /// A mapping is left in it that the driver would not take away: it can't be freed.
    lost: AtomicBool,
}

impl Reservation {
    /// Reserves `size` bytes of addresses, starting on a granule.
    ///
    /// # Errors
    /// [`InvalidArgument`](ErrorKind::InvalidArgument) unless `size` is a positive multiple of the
    /// granule; the driver's otherwise ([`OutOfAddressSpace`](ErrorKind::OutOfAddressSpace)).
    pub fn new(driver: &DriverHandle, size: Bytes) -> Result<Arc<Self>> {
        driver.check_size("a reservation", size)?;
        let addr = driver.call(Verb::Reserve, |driver| driver.reserve(size))?;
        Ok(Arc::new(Self { driver: driver.clone(), addr, size, lost: AtomicBool::new(false) }))
    }

    /// Where it starts.
    #[must_use]
    pub fn addr(&self) -> DeviceAddr {
        self.addr
    }

    /// How long it is.
    #[must_use]
    pub fn size(&self) -> Bytes {
        self.size
    }

    /// Whether so many bytes from `addr` on lie in it.
    #[must_use]
    pub fn contains(&self, addr: DeviceAddr, size: Bytes) -> bool {
        let offset = addr.get().checked_sub(self.addr.get());
        let end = offset.and_then(|offset| Bytes::new(offset).checked_add(size));
        end.is_some_and(|end| end <= self.size)
    }

    /// Puts memory behind the addresses from `offset` on, readable and writable. Whole or not at all.
    ///
    /// The range must be free of mappings: the room `tensor` keeps that book, and every driver
    /// refuses an overlap.
    ///
    /// # Errors
    /// [`InvalidArgument`](ErrorKind::InvalidArgument) for a range that is not on granules or not
    /// inside; the driver's otherwise. [`MapError::stuck`] is what could neither be made usable nor
    /// taken away again.
    pub fn map(self: &Arc<Self>, offset: Bytes, memory: &PhysicalMemory) -> Result<Mapping, MapError> {
        self.map_for(offset, memory, Access::ReadWrite)
    }

    /// The same, for that use alone: what is mapped at several addresses may be writable at one of
    /// them.
    ///
    /// # Errors
    /// As [`map`](Self::map).
    pub fn map_for(
        self: &Arc<Self>,
        offset: Bytes,
        memory: &PhysicalMemory,
        access: Access,
    ) -> Result<Mapping, MapError> {
        let size = memory.size;
        self.driver.check_size("a mapping", size)?;
        let end = offset.checked_add(size);
        if !self.driver.info().granule.divides(offset) || end.is_none_or(|end| end > self.size) {
            return Err(MapError::from(Error::new(
                ErrorKind::InvalidArgument,
                format!(
                    "a mapping of {size} at offset {offset} is not on granules inside the reservation of {}",
                    self.size
                ),
            )));
        }
        let addr = self.addr + offset;
        // SAFETY:
        // - `addr` starts on a granule, since the reservation and `offset` do, and `size` is the handle's own;
        // - the range was just checked to lie in this reservation, which `self` keeps alive; where something is
        //   mapped already, the driver refuses;
        // - the handle is released only when `memory` is dropped.
        self.driver.call(Verb::Map, |driver| unsafe { driver.map(addr, size, memory.handle) })?;
        let mapping = Mapping { reservation: Arc::clone(self), addr, size, state: Mapped::Yes };
        match mapping.give_access(access) {
            Ok(()) => Ok(mapping),
            Err(error) => Err(MapError { error, stuck: mapping.unmap().err().map(|(mapping, _)| mapping) }),
        }
    }
}

/// Why memory could not be put behind addresses.
#[derive(Debug)]
pub struct MapError {
    /// What the driver refused.
    pub error: Error,
    /// The mapping, where the driver would not take it away again either: without access, and in
    /// the way of another.
    pub stuck: Option<Mapping>,
}

/// For callers to whom what is stuck does not matter: its drop tries once more.
impl From<MapError> for Error {
    fn from(error: MapError) -> Self {
        error.error
    }
}

impl From<Error> for MapError {
    fn from(error: Error) -> Self {
        Self { error, stuck: None }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if self.lost.load(Ordering::Relaxed) {
            return;
        }
        let (addr, size) = (self.addr, self.size);
        // SAFETY:
        // - both are those of the one reservation made in `new`, freed only here;
        // - every `Mapping` in it keeps it alive, so none is left that was not unmapped: `lost` would say so;
        // - users of the addresses are bound by the documentation of the views that give them out.
        self.driver.cleanup_in_drop(Verb::Free, |driver| unsafe { driver.free(addr, size) });
    }
}

/// One physical allocation. It may be mapped at several addresses, and stays behind them after it is
/// dropped.
pub struct PhysicalMemory {
    driver: DriverHandle,
    handle: RawHandle,
    size: Bytes,
    alive: bool,
}

impl PhysicalMemory {
    /// Allocates `size` bytes.
    ///
    /// # Errors
    /// [`InvalidArgument`](ErrorKind::InvalidArgument) unless `size` is a positive multiple of the
    /// granule; the driver's otherwise ([`OutOfDeviceMemory`](ErrorKind::OutOfDeviceMemory)).
    pub fn new(driver: &DriverHandle, size: Bytes) -> Result<Self> {
        driver.check_size("an allocation", size)?;
        let handle = driver.call(Verb::Create, |driver| driver.create(size))?;
        Ok(Self { driver: driver.clone(), handle, size, alive: true })
    }

    /// How much it is.
    #[must_use]
    pub fn size(&self) -> Bytes {
        self.size
    }

    /// Gives the memory back and says whether the driver took it.
    ///
    /// # Errors
    /// The driver's, with the memory as it was.
    pub fn release(mut self) -> Result<(), (Self, Error)> {
        let handle = self.handle;
        // Also where the driver panics: what became of the memory is not known then.
        self.alive = false;
        // SAFETY: `handle` came from `create` in `new`; `alive` makes this or the drop the only release.
        match self.driver.cleanup(Verb::Release, |driver| unsafe { driver.release(handle) }) {
            Ok(()) => Ok(()),
            Err(error) => {
                self.alive = true;
                Err((self, error))
            }
        }
    }
}

impl Drop for PhysicalMemory {
    fn drop(&mut self) {
        if self.alive {
            let handle = self.handle;
            // SAFETY: `handle` came from `create` in `new`; `alive` says that `release` has not taken it.
            self.driver.cleanup_in_drop(Verb::Release, |driver| unsafe { driver.release(handle) });
        }
    }
}

impl fmt::Debug for PhysicalMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PhysicalMemory")
            .field("handle", &self.handle)
            .field("size", &self.size)
            .finish_non_exhaustive()
    }
}

/// Memory behind addresses. Dropping it unmaps; nobody may use the addresses by then.
pub struct Mapping {
    reservation: Arc<Reservation>,
    addr: DeviceAddr,
    size: Bytes,
    state: Mapped,
}

/// Whether a mapping is there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Mapped {
    Yes,
    /// The driver was asked to take it away and gave no answer: it panicked.
    Unknown,
    No,
}

impl Mapping {
    /// Where it starts.
    #[must_use]
    pub fn addr(&self) -> DeviceAddr {
        self.addr
    }

    /// How long it is.
    #[must_use]
    pub fn size(&self) -> Bytes {
        self.size
    }

    /// Takes the memory from behind the addresses and says whether the driver did.
    ///
    /// # Errors
    /// The driver's, with the mapping as it was.
    pub fn unmap(mut self) -> Result<(), (Self, Error)> {
        self.state = Mapped::Unknown;
        match self.unmap_now() {
            Ok(()) => {
                self.state = Mapped::No;
                Ok(())
            }
            Err(error) => {
                self.state = Mapped::Yes;
                Err((self, error))
            }
        }
    }

    fn give_access(&self, access: Access) -> Result<()> {
        let (addr, size) = (self.addr, self.size);
        // SAFETY: the range is exactly the mapping made in `Reservation::map_for`; access is given, not taken.
        self.reservation
            .driver
            .call(Verb::SetAccess, |driver| unsafe { driver.set_access(addr, size, access) })
    }

    fn unmap_now(&self) -> Result<()> {
        let (addr, size) = (self.addr, self.size);
        // SAFETY:
        // - the range is exactly the one mapping made in `Reservation::map_for`;
        // - that nobody uses it any more is what the owner of a `Mapping` waits for before it gives it up.
        self.reservation.driver.cleanup(Verb::Unmap, |driver| unsafe { driver.unmap(addr, size) })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let unmapped = match self.state {
            Mapped::No => true,
            Mapped::Unknown => false,
            Mapped::Yes => {
                let (addr, size) = (self.addr, self.size);
                // SAFETY: as in `unmap_now`; the state says that it has not happened yet.
                self.reservation
                    .driver
                    .cleanup_in_drop(Verb::Unmap, |driver| unsafe { driver.unmap(addr, size) })
            }
        };
        if !unmapped {
            self.reservation.lost.store(true, Ordering::Relaxed);
        }
    }
}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mapping").field("addr", &self.addr).field("size", &self.size).finish_non_exhaustive()
    }
}

/// A point in a stream that the library marked.
#[derive(Debug)]
pub struct Event {
    driver: DriverHandle,
    event: RawEvent,
}

impl Event {
    /// Marks the point that `stream` has reached.
    ///
    /// # Errors
    /// The driver's ([`CapturingStream`](ErrorKind::CapturingStream)).
    pub fn record(driver: &DriverHandle, stream: Stream) -> Result<Self> {
        let event = driver.call(Verb::RecordEvent, |driver| driver.record_event(stream))?;
        Ok(Self { driver: driver.clone(), event })
    }

    /// An event that fires once `event`, which is somebody else's, has.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Safety
    /// - `event` is a living event of this device until the call returns.
    pub unsafe fn follow(driver: &DriverHandle, event: RawEvent) -> Result<Self> {
        // SAFETY: the caller's condition is the callee's.
        let event = driver.call(Verb::FollowEvent, |driver| unsafe { driver.follow_event(event) })?;
        Ok(Self { driver: driver.clone(), event })
    }

    /// Whether it has fired.
    ///
    /// # Errors
    /// The driver's.
    pub fn query(&self) -> Result<bool> {
        // SAFETY: the event lives until this is dropped.
        self.driver.call(Verb::QueryEvent, |driver| unsafe { driver.query_event(self.event) })
    }

    /// Blocks until it has fired.
    ///
    /// # Errors
    /// The driver's.
    pub fn wait(&self) -> Result<()> {
        // SAFETY: the event lives until this is dropped.
        self.driver.call(Verb::WaitEvent, |driver| unsafe { driver.wait_event(self.event) })
    }

    /// Makes later work of `stream` wait for it.
    ///
    /// # Errors
    /// The driver's ([`CapturingStream`](ErrorKind::CapturingStream)).
    pub fn stream_waits(&self, stream: Stream) -> Result<()> {
        // SAFETY: the event lives until this is dropped.
        self.driver.call(Verb::StreamWait, |driver| unsafe { driver.stream_wait(stream, self.event) })
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let event = self.event;
        // SAFETY: the event came from `record_event` or `follow_event` and is destroyed only here.
        self.driver.cleanup_in_drop(Verb::DestroyEvent, |driver| unsafe { driver.destroy_event(event) });
    }
}
