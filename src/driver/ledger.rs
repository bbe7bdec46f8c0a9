//! A driver that keeps the books and maps nothing.
//!
//! Owns invented addresses and handles. Refuses to touch memory: an address of it is a number. It
//! says yes and no where a real driver would, so that a replay can run at the size of a card that
//! this machine does not have. Every call is O(log n) in what is held.
//!
//! - No address is given out twice, so that a use after free never goes unseen.
//! - Events fire at once, unless a test holds their stream.

use std::sync::Arc;

use crate::driver::books::{Books, Live};
use crate::driver::events::Events;
use crate::driver::{Access, Driver, DriverInfo, HandleOptions, MemoryInfo, RawEvent, RawHandle, Stream};
use crate::error::{Error, ErrorKind, Result, Verb};
use crate::sync::Leaf;
use crate::units::{Bytes, Device, DeviceAddr, GranuleSize};

/// Where invented addresses start: above everything that a process of this machine has, so that
/// none is ever taken for a pointer.
const FIRST_ADDRESS: u64 = 1 << 56;

/// How large a [`Ledger`] pretends to be.
#[derive(Clone, Copy, Debug)]
pub struct LedgerOptions {
    /// The unit of allocation: a power of two.
    pub granule: Bytes,
    /// Bytes that can be created in all.
    pub capacity: Bytes,
    /// Bytes of addresses that can be reserved at a time; `None` for no limit but 2^63.
    pub addresses: Option<Bytes>,
}

/// The driver that only keeps books. See the [module](self).
#[derive(Debug)]
pub struct Ledger {
    info: DriverInfo,
    addresses: Bytes,
    state: Leaf<State>,
    events: Events,
}

#[derive(Debug)]
struct State {
    books: Books,
    next_address: u64,
    next_handle: u64,
    reserved: Bytes,
}

impl Ledger {
    /// A driver with nothing in it.
    ///
    /// # Errors
    /// [`InvalidConfig`](ErrorKind::InvalidConfig) for a granule that is not a power of two or lies
    /// above 2^48 bytes.
    pub fn new(options: LedgerOptions) -> Result<Arc<Self>> {
        let granule = GranuleSize::new(options.granule)
            .filter(|granule| granule.bytes() <= Bytes::gib(1 << 18))
            .ok_or_else(|| {
                Error::new(
                    ErrorKind::InvalidConfig,
                    format!(
                        "a granule of {} is not a power of two of at most 256 TiB; 2 MiB is what CUDA has",
                        options.granule
                    ),
                )
            })?;
        Ok(Arc::new(Self {
            info: DriverInfo {
                name: "ledger",
                device: Device::Cpu,
                granule,
                options: HandleOptions::default(),
            },
            addresses: options.addresses.unwrap_or(Bytes::new(1 << 63)),
            state: Leaf::new(State {
                books: Books::new(granule, options.capacity),
                next_address: FIRST_ADDRESS,
                next_handle: 1,
                reserved: Bytes::ZERO,
            }),
            events: Events::default(),
        }))
    }

    /// What callers have not given back.
    #[must_use]
    pub fn live(&self) -> Live {
        self.state.lock().books.live(self.events.live())
    }

    /// From now on work of this stream stays undone, and its events unfired, until
    /// [`fire`](Self::fire).
    pub fn hold(&self, stream: Stream) {
        self.events.hold(stream);
    }

    /// The stream's work is done: the hold ends and its events fire, if nothing else holds them.
    pub fn fire(&self, stream: Stream) {
        self.events.fire(stream);
    }

    /// Every stream's work is done.
    pub fn fire_all(&self) {
        self.events.fire_all();
    }

    /// Says whether a stream is being captured into a graph.
    pub fn set_capturing(&self, stream: Stream, capturing: bool) {
        self.events.set_capturing(stream, capturing);
    }

    /// How many threads block on an event now.
    #[must_use]
    pub fn waiting(&self) -> u64 {
        self.events.waiting()
    }
}

#[expect(unsafe_code, reason = "the seam's contract is an unsafe trait")]
// SAFETY: addresses are never given out twice and lead nowhere, so that no memory is at stake; every
// call checks before it changes anything.
unsafe impl Driver for Ledger {
    fn info(&self) -> &DriverInfo {
        &self.info
    }

    fn memory_info(&self) -> Result<MemoryInfo> {
        let state = self.state.lock();
        Ok(MemoryInfo { free: state.books.free_bytes(), total: state.books.capacity() })
    }

    fn reserve(&self, size: Bytes) -> Result<DeviceAddr> {
        let mut state = self.state.lock();
        state.books.check_size(Verb::Reserve, size)?;
        let step = self.info.granule.bytes();
        let start = Bytes::new(state.next_address).checked_next_multiple_of(step);
        // A granule of nobody's lies between two reservations.
        let next = start.and_then(|start| start.checked_add(size)?.checked_add(step));
        let reserved = state.reserved.checked_add(size).filter(|reserved| *reserved <= self.addresses);
        let (Some(start), Some(next), Some(reserved)) = (start, next, reserved) else {
            return Err(Error::new(
                ErrorKind::OutOfAddressSpace,
                format!(
                    "{size} of addresses can't be reserved: {} of {} are; reserve less",
                    state.reserved, self.addresses
                ),
            ));
        };
        let addr = DeviceAddr::new(start.get());
        state.next_address = next.get();
        state.reserved = reserved;
        state.books.enter_reservation(addr, size);
        Ok(addr)
    }

    unsafe fn free(&self, addr: DeviceAddr, size: Bytes) -> Result<()> {
        let mut state = self.state.lock();
        state.books.check_free(addr, size)?;
        state.books.remove_reservation(addr);
        state.reserved -= size;
        Ok(())
    }

    fn create(&self, size: Bytes) -> Result<RawHandle> {
        let mut state = self.state.lock();
        state.books.check_size(Verb::Create, size)?;
        state.books.take_bytes(size)?;
        let handle = RawHandle(state.next_handle);
        state.next_handle += 1;
        state.books.enter_memory(handle, size, 0);
        Ok(handle)
    }

    unsafe fn map(&self, addr: DeviceAddr, size: Bytes, handle: RawHandle) -> Result<()> {
        let mut state = self.state.lock();
        state.books.check_map(addr, size, handle)?;
        state.books.enter_mapping(addr, size, handle);
        Ok(())
    }

    unsafe fn set_access(&self, addr: DeviceAddr, size: Bytes, access: Access) -> Result<()> {
        let mut state = self.state.lock();
        state.books.check_whole(Verb::SetAccess, addr, size)?;
        state.books.set_access(addr, size, access);
        Ok(())
    }

    unsafe fn unmap(&self, addr: DeviceAddr, size: Bytes) -> Result<()> {
        let mut state = self.state.lock();
        state.books.check_whole(Verb::Unmap, addr, size)?;
        let removed = state.books.take_mappings(addr, size);
        state.books.settle_unmap(&removed);
        Ok(())
    }

    unsafe fn release(&self, handle: RawHandle) -> Result<()> {
        let mut state = self.state.lock();
        state.books.check_release(handle)?;
        if let Some(released) = state.books.take_handle(handle) {
            state.books.settle_release(&released);
        }
        Ok(())
    }

    fn record_event(&self, stream: Stream) -> Result<RawEvent> {
        self.events.record(stream)
    }

    unsafe fn follow_event(&self, event: RawEvent) -> Result<RawEvent> {
        self.events.follow(event)
    }

    unsafe fn query_event(&self, event: RawEvent) -> Result<bool> {
        self.events.query(event)
    }

    unsafe fn wait_event(&self, event: RawEvent) -> Result<()> {
        self.events.wait(event)
    }

    unsafe fn stream_wait(&self, stream: Stream, event: RawEvent) -> Result<()> {
        self.events.stream_wait(stream, event)
    }

    unsafe fn destroy_event(&self, event: RawEvent) -> Result<()> {
        self.events.destroy(event)
    }
}
