//! A bookkeeping driver to stand in until the ledger and the checked driver are there.

#![allow(unsafe_code, reason = "the driver trait is unsafe to implement; this one touches no memory")]
#![allow(missing_docs, reason = "goes away with the ledger")]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vattn::driver::owned::DriverHandle;
use vattn::driver::{Access, Driver, DriverInfo, HandleOptions, MemoryInfo, RawEvent, RawHandle, Stream};
use vattn::stats::Counters;
use vattn::units::{Bytes, Device, DeviceAddr, GranuleSize};
use vattn::{Error, ErrorKind, Result};

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Books {
    pub reserve: u64,
    pub create: u64,
    pub map: u64,
    pub set_access: u64,
    pub unmap: u64,
    pub release: u64,
    pub modelled: f64,
    pub live: (u64, u64, u64),
}

#[derive(Debug, Default)]
struct State {
    books: Books,
    next: u64,
    handles: BTreeMap<u64, Bytes>,
    mappings: BTreeMap<u64, Bytes>,
    reservations: u64,
}

#[derive(Debug)]
pub struct StandIn {
    info: DriverInfo,
    state: Mutex<State>,
}

impl StandIn {
    /// # Panics
    /// Unless the granule is a power of two.
    #[must_use]
    pub fn handle(granule: Bytes) -> (DriverHandle, Arc<Self>) {
        let driver = Arc::new(Self {
            info: DriverInfo {
                name: "ledger",
                device: Device::Cpu,
                granule: GranuleSize::new(granule).expect("the granule is a power of two"),
                options: HandleOptions::default(),
            },
            state: Mutex::new(State { next: 1 << 21, ..State::default() }),
        });
        (DriverHandle::new(driver.clone(), Arc::new(Counters::default())), driver)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn books(&self) -> Books {
        let state = self.state();
        let count = |len: usize| u64::try_from(len).unwrap_or(u64::MAX);
        let live = (count(state.handles.len()), count(state.mappings.len()), state.reservations);
        Books { live, ..state.books.clone() }
    }

    pub fn is_empty(&self) -> bool {
        self.books().live == (0, 0, 0)
    }
}

// SAFETY: addresses and handles are numbers that are never given twice, and nothing is behind them.
unsafe impl Driver for StandIn {
    fn info(&self) -> &DriverInfo {
        &self.info
    }
    fn memory_info(&self) -> Result<MemoryInfo> {
        Ok(MemoryInfo { free: Bytes::gib(1 << 20), total: Bytes::gib(1 << 20) })
    }
    fn reserve(&self, size: Bytes) -> Result<DeviceAddr> {
        let mut state = self.state();
        let addr = state.next;
        let Some(next) = addr.checked_add(size.get()) else {
            return Err(Error::new(ErrorKind::OutOfAddressSpace, "the stand-in has 2^64 addresses"));
        };
        state.next = next;
        state.reservations += 1;
        state.books.reserve += 1;
        state.books.modelled += 3e-6;
        Ok(DeviceAddr::new(addr))
    }
    unsafe fn free(&self, _addr: DeviceAddr, _size: Bytes) -> Result<()> {
        self.state().reservations -= 1;
        Ok(())
    }
    fn create(&self, size: Bytes) -> Result<RawHandle> {
        let mut state = self.state();
        state.books.create += 1;
        state.books.modelled += 12.1e-6;
        let handle = state.books.create;
        state.handles.insert(handle, size);
        Ok(RawHandle(handle))
    }
    unsafe fn map(&self, addr: DeviceAddr, size: Bytes, handle: RawHandle) -> Result<()> {
        let mut state = self.state();
        assert_eq!(state.handles.get(&handle.0), Some(&size));
        assert!(state.mappings.insert(addr.get(), size).is_none(), "mapped twice at {addr}");
        state.books.map += 1;
        state.books.modelled += 1.3e-6;
        Ok(())
    }
    unsafe fn set_access(&self, _addr: DeviceAddr, _size: Bytes, _access: Access) -> Result<()> {
        let mut state = self.state();
        state.books.set_access += 1;
        state.books.modelled += 31.8e-6;
        Ok(())
    }
    unsafe fn unmap(&self, addr: DeviceAddr, size: Bytes) -> Result<()> {
        let mut state = self.state();
        assert_eq!(state.mappings.remove(&addr.get()), Some(size));
        state.books.unmap += 1;
        state.books.modelled += 20.9e-6;
        Ok(())
    }
    unsafe fn release(&self, handle: RawHandle) -> Result<()> {
        let mut state = self.state();
        assert!(state.handles.remove(&handle.0).is_some());
        state.books.release += 1;
        state.books.modelled += 14.7e-6;
        Ok(())
    }
    fn record_event(&self, _stream: Stream) -> Result<RawEvent> {
        Ok(RawEvent(1))
    }
    unsafe fn follow_event(&self, event: RawEvent) -> Result<RawEvent> {
        Ok(event)
    }
    unsafe fn query_event(&self, _event: RawEvent) -> Result<bool> {
        Ok(true)
    }
    unsafe fn wait_event(&self, _event: RawEvent) -> Result<()> {
        Ok(())
    }
    unsafe fn stream_wait(&self, _stream: Stream, _event: RawEvent) -> Result<()> {
        Ok(())
    }
    unsafe fn destroy_event(&self, _event: RawEvent) -> Result<()> {
        Ok(())
    }
}
