//! What is reserved, created and mapped, and the contract's conditions as questions to that book.
//!
//! Owns the rows of one driver and answers in O(log n). Refuses to know where memory comes from:
//! [`host`](super::host), [`ledger`](super::ledger) and [`checked`](super::checked) keep one each
//! and do the rest themselves. Every `check_` looks and changes nothing, and the call that changes
//! comes after it. What gives something up comes in two halves, so that the driver's own work can
//! fail in between: take out, then either settle or put back.
//!
//! ```text
//!   reservations ── base ──► mappings ── addr ──► Mapped { size, memory, access }
//!                                                            │
//!   handles ── RawHandle ──────────────────────► memory ◄────┘  Memory { size, place, holds }
//! ```
//!
//! - Mappings of a reservation don't overlap and don't cross its ends.
//! - A row of `memory` exists while somebody holds it: its living handle, a mapping, or either of them
//!   taken out and not settled. `bytes` is the sum of the rows and of what was set aside.
//! - A handle's number leads to its memory only while the handle is alive: a driver may use the
//!   number again while the old memory is still mapped.

use std::collections::{BTreeMap, HashMap};

use serde::Serialize;

use crate::driver::{Access, RawHandle};
use crate::error::{DriverFailure, Error, ErrorKind, Result, Verb};
use crate::units::{Bytes, DeviceAddr, GranuleSize};

/// `EINVAL`, which is this number on every system that has it.
const EINVAL: i64 = 22;

/// What a driver holds for its callers. All zero once everything was given back.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Live {
    /// Reservations that have not been freed.
    pub reservations: u64,
    /// Handles that have not been released.
    pub handles: u64,
    /// Mappings that have not been unmapped.
    pub mappings: u64,
    /// Events that have not been destroyed.
    pub events: u64,
    /// Memory behind handles that are alive, and behind mappings of released ones.
    pub bytes: Bytes,
}

/// The row of a piece of memory in [`Books::memory`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct MemoryKey(usize);

#[derive(Clone, Copy, Debug)]
pub(super) struct Memory {
    pub(super) size: Bytes,
    /// Where the owner of the books put it (the host: an offset in its file).
    pub(super) place: u64,
    /// Its handle and its mappings.
    holds: u64,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Mapped {
    pub(super) size: Bytes,
    /// Copied from the memory's row, so that walks over mappings need not look there.
    pub(super) place: u64,
    /// `None` until it is first set.
    pub(super) access: Option<Access>,
    memory: MemoryKey,
}

#[derive(Debug)]
pub(super) struct Reserved {
    pub(super) size: Bytes,
    pub(super) mappings: BTreeMap<u64, Mapped>,
}

/// Mappings that were taken out, to be settled or put back.
#[derive(Debug, Default)]
#[must_use]
pub(super) struct Removed {
    base: u64,
    pub(super) mappings: Vec<(u64, Mapped)>,
}

/// A handle that was taken out, to be settled or put back.
#[derive(Debug)]
#[must_use]
pub(super) struct Released {
    handle: RawHandle,
    memory: MemoryKey,
}

#[derive(Debug)]
pub(super) struct Books {
    granule: GranuleSize,
    capacity: Bytes,
    reservations: BTreeMap<u64, Reserved>,
    handles: HashMap<RawHandle, MemoryKey>,
    memory: Vec<Option<Memory>>,
    vacant: Vec<usize>,
    mappings: u64,
    bytes: Bytes,
}

/// A refusal for a broken condition of the contract.
#[cold]
pub(super) fn invalid(verb: Verb, size: Option<Bytes>, why: &str) -> Error {
    let failure = DriverFailure { verb, code: EINVAL, name: "EINVAL", size };
    Error::from_driver(ErrorKind::Driver, failure, why)
}

impl Books {
    pub(super) fn new(granule: GranuleSize, capacity: Bytes) -> Self {
        Self {
            granule,
            capacity,
            reservations: BTreeMap::new(),
            handles: HashMap::new(),
            memory: Vec::new(),
            vacant: Vec::new(),
            mappings: 0,
            bytes: Bytes::ZERO,
        }
    }

    pub(super) fn live(&self, events: u64) -> Live {
        Live {
            reservations: crate::units::wide(self.reservations.len()),
            handles: crate::units::wide(self.handles.len()),
            mappings: self.mappings,
            events,
            bytes: self.bytes,
        }
    }

    pub(super) fn capacity(&self) -> Bytes {
        self.capacity
    }

    /// What can still be created.
    pub(super) fn free_bytes(&self) -> Bytes {
        self.capacity.saturating_sub(self.bytes)
    }

    /// Whether a size is a positive multiple of the granule.
    pub(super) fn check_size(&self, verb: Verb, size: Bytes) -> Result<()> {
        if size.is_zero() || !self.granule.divides(size) {
            let granule = self.granule.bytes();
            let why = format!("the size is not a positive multiple of the granule, {granule}; round it up");
            return Err(invalid(verb, Some(size), &why));
        }
        Ok(())
    }

    // Reservations

    pub(super) fn reservations(&self) -> impl Iterator<Item = (u64, &Reserved)> {
        self.reservations.iter().map(|(base, reserved)| (*base, reserved))
    }

    /// Whether a range lies apart from every reservation.
    pub(super) fn is_apart(&self, addr: DeviceAddr, size: Bytes) -> bool {
        let end = addr.get().saturating_add(size.get());
        self.reservations
            .range(..end)
            .next_back()
            .is_none_or(|(base, reserved)| base + reserved.size.get() <= addr.get())
    }

    pub(super) fn enter_reservation(&mut self, addr: DeviceAddr, size: Bytes) {
        self.reservations.insert(addr.get(), Reserved { size, mappings: BTreeMap::new() });
    }

    pub(super) fn check_free(&self, addr: DeviceAddr, size: Bytes) -> Result<()> {
        let refuse = |why: &str| Err(invalid(Verb::Free, Some(size), why));
        match self.reservations.get(&addr.get()) {
            None => refuse(&format!("no reservation starts at {addr}; free it once, where it starts")),
            Some(reserved) if reserved.size != size => {
                refuse(&format!("the reservation at {addr} is {} long; free the whole of it", reserved.size))
            }
            Some(reserved) if !reserved.mappings.is_empty() => refuse(&format!(
                "{} mappings are left in the reservation at {addr}; unmap them first",
                reserved.mappings.len()
            )),
            Some(_) => Ok(()),
        }
    }

    /// After [`check_free`](Self::check_free).
    pub(super) fn remove_reservation(&mut self, addr: DeviceAddr) {
        self.reservations.remove(&addr.get());
    }

    // Memory

    /// Sets bytes aside for memory that is about to be created, if the capacity has them.
    pub(super) fn take_bytes(&mut self, size: Bytes) -> Result<()> {
        match self.bytes.checked_add(size) {
            Some(bytes) if bytes <= self.capacity => {
                self.bytes = bytes;
                Ok(())
            }
            _ => Err(Error::new(
                ErrorKind::OutOfDeviceMemory,
                format!(
                    "{size} can't be created: {} of {} are taken; release some that is mapped nowhere, or \
                     set a larger capacity",
                    self.bytes, self.capacity
                ),
            )),
        }
    }

    /// Gives back bytes that were set aside and not used.
    pub(super) fn return_bytes(&mut self, size: Bytes) {
        self.bytes -= size;
    }

    /// Enters memory whose bytes were set aside.
    pub(super) fn enter_memory(&mut self, handle: RawHandle, size: Bytes, place: u64) {
        let row = Some(Memory { size, place, holds: 1 });
        let key = match self.vacant.pop() {
            Some(vacant) => {
                self.memory[vacant] = row;
                vacant
            }
            None => {
                self.memory.push(row);
                self.memory.len() - 1
            }
        };
        self.handles.insert(handle, MemoryKey(key));
    }

    /// The size of a living handle's memory.
    pub(super) fn check_release(&self, handle: RawHandle) -> Result<Bytes> {
        match self.handles.get(&handle) {
            Some(key) => Ok(self.row(*key).size),
            None => Err(invalid(
                Verb::Release,
                None,
                &format!("handle {:#x} is unknown or was released; release it once", handle.0),
            )),
        }
    }

    /// After [`check_release`](Self::check_release): takes the handle out.
    pub(super) fn take_handle(&mut self, handle: RawHandle) -> Option<Released> {
        self.handles.remove(&handle).map(|memory| Released { handle, memory })
    }

    /// The handle is gone for good. Returns the memory that nobody holds any more.
    pub(super) fn settle_release(&mut self, released: &Released) -> Option<Memory> {
        self.let_go(released.memory)
    }

    /// The handle lives after all.
    pub(super) fn put_handle_back(&mut self, released: &Released) {
        self.handles.insert(released.handle, released.memory);
    }

    fn row(&self, key: MemoryKey) -> &Memory {
        self.memory[key.0].as_ref().expect("a key in the books leads to a row")
    }

    fn let_go(&mut self, key: MemoryKey) -> Option<Memory> {
        let row = self.memory[key.0].as_mut().expect("a key in the books leads to a row");
        row.holds -= 1;
        if row.holds > 0 {
            return None;
        }
        let gone = self.memory[key.0].take()?;
        self.vacant.push(key.0);
        self.bytes -= gone.size;
        Some(gone)
    }

    // Mappings

    /// The reservation that an address lies in.
    pub(super) fn reservation_at(&self, addr: DeviceAddr) -> Option<(u64, &Reserved)> {
        let (base, reserved) = self.reservations.range(..=addr.get()).next_back()?;
        Some((*base, reserved))
    }

    /// The reservation that holds the whole range, and where it starts.
    fn reservation_of(&self, verb: Verb, addr: DeviceAddr, size: Bytes) -> Result<(u64, &Reserved)> {
        let end = addr.get().checked_add(size.get());
        match (self.reservations.range(..=addr.get()).next_back(), end) {
            (Some((base, reserved)), Some(end)) if end <= base + reserved.size.get() => Ok((*base, reserved)),
            _ => Err(invalid(
                verb,
                Some(size),
                &format!("the range at {addr} does not lie in one reservation; reserve it first"),
            )),
        }
    }

    /// Whether a handle's whole memory can go behind a range.
    pub(super) fn check_map(&self, addr: DeviceAddr, size: Bytes, handle: RawHandle) -> Result<()> {
        let refuse = |why: &str| Err(invalid(Verb::Map, Some(size), why));
        let Some(key) = self.handles.get(&handle) else {
            return refuse(&format!("handle {:#x} is unknown or was released; create one", handle.0));
        };
        let whole = self.row(*key).size;
        if size != whole {
            return refuse(&format!(
                "handle {:#x} has {whole} and maps whole; create one of the size",
                handle.0
            ));
        }
        if !self.granule.divides(Bytes::new(addr.get())) {
            let granule = self.granule.bytes();
            return refuse(&format!("{addr} is not a multiple of the granule, {granule}; align it"));
        }
        let (_, reserved) = self.reservation_of(Verb::Map, addr, size)?;
        let last_before_end = reserved.mappings.range(..addr.get() + size.get()).next_back();
        if let Some((start, mapped)) = last_before_end
            && start + mapped.size.get() > addr.get()
        {
            return refuse(&format!(
                "{} are mapped at {:#x}, which overlaps the range at {addr}; unmap them first",
                mapped.size, start
            ));
        }
        Ok(())
    }

    /// After [`check_map`](Self::check_map).
    pub(super) fn enter_mapping(&mut self, addr: DeviceAddr, size: Bytes, handle: RawHandle) {
        let Some(key) = self.handles.get(&handle).copied() else { return };
        let Some((_, reserved)) = self.reservations.range_mut(..=addr.get()).next_back() else { return };
        let memory = self.memory[key.0].as_mut().expect("a key in the books leads to a row");
        memory.holds += 1;
        let mapped = Mapped { size, place: memory.place, access: None, memory: key };
        reserved.mappings.insert(addr.get(), mapped);
        self.mappings += 1;
    }

    /// The reservation around a range that is made of whole mappings without a gap.
    pub(super) fn check_whole(&self, verb: Verb, addr: DeviceAddr, size: Bytes) -> Result<(u64, &Reserved)> {
        let refuse = |why: &str| Err(invalid(verb, Some(size), why));
        if size.is_zero() {
            return refuse("the range is empty; name whole mappings");
        }
        let (base, reserved) = self.reservation_of(verb, addr, size)?;
        let (mut at, end) = (addr.get(), addr.get() + size.get());
        for (start, mapped) in reserved.mappings.range(at..end) {
            if *start != at {
                break;
            }
            at += mapped.size.get();
        }
        if at == end {
            return Ok((base, reserved));
        }
        if at > end {
            return refuse(&format!(
                "the range at {addr} ends inside a mapping that ends at {at:#x}; mappings are whole"
            ));
        }
        refuse(&format!("no mapping starts at {at:#x}; the range must be whole mappings without a gap"))
    }

    /// The mappings that start in a range.
    pub(super) fn mappings_in(&self, addr: DeviceAddr, size: Bytes) -> impl Iterator<Item = (u64, &Mapped)> {
        let end = addr.get().saturating_add(size.get());
        self.reservations
            .range(..=addr.get())
            .next_back()
            .into_iter()
            .flat_map(move |(_, reserved)| reserved.mappings.range(addr.get()..end))
            .map(|(start, mapped)| (*start, mapped))
    }

    fn mappings_in_mut(
        &mut self,
        addr: DeviceAddr,
        size: Bytes,
    ) -> impl Iterator<Item = (&u64, &mut Mapped)> {
        let end = addr.get().saturating_add(size.get());
        self.reservations
            .range_mut(..=addr.get())
            .next_back()
            .into_iter()
            .flat_map(move |(_, reserved)| reserved.mappings.range_mut(addr.get()..end))
    }

    /// After [`check_whole`](Self::check_whole).
    pub(super) fn set_access(&mut self, addr: DeviceAddr, size: Bytes, access: Access) {
        for (_, mapped) in self.mappings_in_mut(addr, size) {
            mapped.access = Some(access);
        }
    }

    /// Gives the mappings of a range the access that they had, in order of address.
    pub(super) fn restore_access(&mut self, addr: DeviceAddr, size: Bytes, before: &[Option<Access>]) {
        for ((_, mapped), access) in self.mappings_in_mut(addr, size).zip(before) {
            mapped.access = *access;
        }
    }

    /// After [`check_whole`](Self::check_whole): takes the range's mappings out.
    pub(super) fn take_mappings(&mut self, addr: DeviceAddr, size: Bytes) -> Removed {
        let end = addr.get().saturating_add(size.get());
        let Some((base, reserved)) = self.reservations.range_mut(..=addr.get()).next_back() else {
            return Removed::default();
        };
        let mappings: Vec<_> =
            reserved.mappings.range(addr.get()..end).map(|(at, mapped)| (*at, *mapped)).collect();
        for (start, _) in &mappings {
            reserved.mappings.remove(start);
        }
        self.mappings -= crate::units::wide(mappings.len());
        Removed { base: *base, mappings }
    }

    /// The mappings are gone for good. Returns the memory that nobody holds any more.
    pub(super) fn settle_unmap(&mut self, removed: &Removed) -> Vec<Memory> {
        removed.mappings.iter().filter_map(|(_, mapped)| self.let_go(mapped.memory)).collect()
    }

    /// The mappings are there after all.
    pub(super) fn put_mappings_back(&mut self, removed: &Removed) {
        let Some(reserved) = self.reservations.get_mut(&removed.base) else { return };
        reserved.mappings.extend(removed.mappings.iter().copied());
        self.mappings += crate::units::wide(removed.mappings.len());
    }
}
