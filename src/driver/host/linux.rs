//! What each verb does, and how a half-done one is undone.

#![allow(unsafe_code, reason = "the seam's contract is an unsafe trait over system calls")]

use std::sync::Arc;

use crate::driver::books::{Books, Live};
use crate::driver::events::Events;
use crate::driver::host::HostOptions;
use crate::driver::host::budget::{Purpose, Share};
use crate::driver::host::cover::{Cover, Run, View, runs, seams, shown, shown_with};
use crate::driver::host::mmap::{self, Errno, File};
use crate::driver::host::space::Space;
use crate::driver::{Access, Driver, DriverInfo, HandleOptions, MemoryInfo, RawEvent, RawHandle, Stream};
use crate::error::{Error, ErrorKind, Result, Verb};
use crate::sync::Leaf;
use crate::units::{Bytes, Device, DeviceAddr, GranuleSize};

const RAISE: &str = "use larger extents, or raise the limit with `sysctl vm.max_map_count`";

/// Memory of this machine. See the [module](super).
///
/// Dropping it gives back whatever its callers did not.
#[derive(Debug)]
pub struct Host {
    info: DriverInfo,
    state: Leaf<State>,
    events: Events,
}

#[derive(Debug)]
struct State {
    books: Books,
    space: Space,
    file: File,
    file_len: u64,
    share: Share,
    /// The kernel's mappings by the books, in both views.
    now: u64,
    promised: u64,
    next_handle: u64,
    /// Undoing failed: what is mapped where is not known any more.
    lost: bool,
    /// Which of the next system calls that show or hide memory are refused.
    #[cfg(test)]
    refusals: std::collections::VecDeque<bool>,
}

impl Host {
    /// A driver with nothing in it.
    ///
    /// # Errors
    /// [`InvalidConfig`](ErrorKind::InvalidConfig) for a granule that is not a power of two and a
    /// multiple of the page size; [`Driver`](ErrorKind::Driver) where the system gives no memfd.
    pub fn new(options: HostOptions) -> Result<Arc<Self>> {
        let page = mmap::page_size();
        let granule = GranuleSize::new(options.granule).filter(|granule| granule.bytes() >= page);
        let Some(granule) = granule else {
            return Err(Error::new(
                ErrorKind::InvalidConfig,
                format!(
                    "a granule of {} is not a power of two of at least one page, {page}; 2 MiB is a good one",
                    options.granule
                ),
            ));
        };
        let file = File::new().map_err(|errno| {
            let cure = "raise `ulimit -n` or close files";
            errno.error(Verb::Create, None, ErrorKind::OutOfDeviceMemory, cure)
        })?;
        Ok(Arc::new(Self {
            info: DriverInfo {
                name: "host",
                device: Device::Cpu,
                granule,
                options: HandleOptions::default(),
            },
            state: Leaf::new(State {
                books: Books::new(granule, options.capacity),
                space: Space::default(),
                file,
                file_len: 0,
                share: Share::new(options.max_mappings),
                now: 0,
                promised: 0,
                next_handle: 1,
                lost: false,
                #[cfg(test)]
                refusals: std::collections::VecDeque::new(),
            }),
            events: Events::default(),
        }))
    }

    /// What callers have not given back.
    #[must_use]
    pub fn live(&self) -> Live {
        self.state.lock().books.live(self.events.live())
    }

    /// How much memory the system has given to this driver: pages that were touched and not given
    /// back.
    ///
    /// # Errors
    /// [`Driver`](ErrorKind::Driver) where the system does not say.
    pub fn resident(&self) -> Result<Bytes> {
        let kind = ErrorKind::Driver;
        let resident = self.state.lock().file.resident();
        resident.map_err(|errno| errno.error(Verb::MemoryInfo, None, kind, "ask again"))
    }

    /// How many of the kernel's mappings the driver counts on needing: one for each reservation, and
    /// more for each run of neighbours in it.
    #[must_use]
    pub fn kernel_mappings(&self) -> u64 {
        self.state.lock().share.used()
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

impl State {
    fn check_alive(&self) -> Result<()> {
        if self.lost {
            return Err(Error::new(
                ErrorKind::DeviceLost,
                "the host's address space could not be restored after a failed call; make a new driver",
            ));
        }
        Ok(())
    }

    /// The seams around a range, in both views. The range lies in one reservation.
    fn seams(&self, addr: DeviceAddr, size: Bytes) -> [u64; 2] {
        let (from, to) = (addr.get(), addr.get() + size.get());
        let around = self.books.reservation_at(addr);
        [View::Now, View::Promised]
            .map(|view| around.map_or(0, |(base, reserved)| seams(base, reserved, from, to, view)))
    }

    /// Counts a change of the seams around a range, or refuses it.
    fn recount(&mut self, before: [u64; 2], after: [u64; 2], purpose: Purpose) -> Result<()> {
        let now = self.now + after[0] - before[0];
        let promised = self.promised + after[1] - before[1];
        self.share.resize(now.max(promised), purpose)?;
        (self.now, self.promised) = (now, promised);
        Ok(())
    }

    /// Takes back what [`recount`](Self::recount) counted. Never refused: the mappings were there before.
    fn recount_back(&mut self, before: [u64; 2], after: [u64; 2]) {
        self.now = self.now + before[0] - after[0];
        self.promised = self.promised + before[1] - after[1];
        if self.share.resize(self.now.max(self.promised), Purpose::Change).is_err() {
            // Others took the mappings meanwhile. What is there is there; the next call that grows is refused.
            tracing::warn!("more of the kernel's mappings are in use than the limit allows");
        }
    }

    fn show(&mut self, run: Run) -> Result<(), Errno> {
        #[cfg(test)]
        if self.refusals.pop_front() == Some(true) {
            return Err(Errno::NO_MEMORY);
        }
        match run.cover {
            // SAFETY: the books say that the run lies in a reservation of this driver; that nobody uses it is the
            // condition of the verb that hides it.
            Cover::Nothing => unsafe { mmap::hide(run.addr, run.size) },
            // SAFETY:
            // - the books say that the run lies in a reservation of this driver, and what is mapped there;
            // - a place in the books lies in the file, which only grows.
            Cover::File { place, access } => unsafe { self.file.show(run.addr, run.size, place, access) },
        }
    }

    /// Makes the kernel show `after` where it shows `before`, whole or not at all. Both cover the same
    /// range.
    fn execute(&mut self, verb: Verb, size: Bytes, after: &[Run], before: &[Run]) -> Result<()> {
        let mut done = None;
        let mut failed = None;
        for run in after {
            if let Err(errno) = self.show(*run) {
                failed = Some((errno, run));
                break;
            }
            done = Some(run.addr + run.size);
        }
        let Some((errno, run)) = failed else { return Ok(()) };
        // A refused call has changed nothing, unless it left a gap; then it counts as done.
        let undo_to = if mmap::is_intact(run.addr, run.size) { done } else { Some(run.addr + run.size) };
        for old in before.iter().filter(|old| undo_to.is_some_and(|end| old.addr < end)) {
            if let Err(errno) = self.show(*old) {
                self.lost = true;
                tracing::error!(
                    ?errno,
                    addr = old.addr.get(),
                    "a failed call could not be undone; the host driver is lost"
                );
                break;
            }
        }
        Err(errno.error(verb, Some(size), ErrorKind::OutOfMappings, RAISE))
    }

    /// Gives the system memory that nobody holds any more.
    fn drop_memory(&mut self, place: u64, size: Bytes) {
        if let Err(errno) = self.file.punch(place, size) {
            // The place can be used again all the same: what new memory contains is not defined.
            tracing::warn!(?errno, size = size.get(), "the system did not take memory back");
        }
        self.space.give(place, size.get());
    }
}

// SAFETY:
// - the kernel picks a reservation's addresses, and they stay mapped (to nothing) until they are freed;
// - a mapping shows one range of the file; the books keep that range until it is unmapped and its handle
//   released, and `Space` gives no range out twice;
// - every call checks before it changes anything, and `execute` restores what it showed; if it can't, the
//   driver says that the device is lost.
unsafe impl Driver for Host {
    fn info(&self) -> &DriverInfo {
        &self.info
    }

    fn memory_info(&self) -> Result<MemoryInfo> {
        let state = self.state.lock();
        state.check_alive()?;
        Ok(MemoryInfo { free: state.books.free_bytes(), total: state.books.capacity() })
    }

    fn reserve(&self, size: Bytes) -> Result<DeviceAddr> {
        let mut state = self.state.lock();
        state.check_alive()?;
        state.books.check_size(Verb::Reserve, size)?;
        state.recount([0, 0], [1, 1], Purpose::Grow)?;
        match mmap::reserve(size, self.info.granule.bytes()) {
            Ok(addr) => {
                state.books.enter_reservation(addr, size);
                Ok(addr)
            }
            Err(errno) => {
                state.recount_back([0, 0], [1, 1]);
                let cure = "reserve less, or raise `ulimit -v`";
                Err(errno.error(Verb::Reserve, Some(size), ErrorKind::OutOfAddressSpace, cure))
            }
        }
    }

    unsafe fn free(&self, addr: DeviceAddr, size: Bytes) -> Result<()> {
        let mut state = self.state.lock();
        state.check_alive()?;
        state.books.check_free(addr, size)?;
        // SAFETY: the books say that the range is one reservation of this driver, with nothing mapped; that
        // nobody uses the addresses is the caller's condition.
        unsafe { mmap::free(addr, size) }
            .map_err(|errno| errno.error(Verb::Free, Some(size), ErrorKind::OutOfMappings, RAISE))?;
        state.books.remove_reservation(addr);
        state.recount([1, 1], [0, 0], Purpose::Change)
    }

    fn create(&self, size: Bytes) -> Result<RawHandle> {
        let mut state = self.state.lock();
        state.check_alive()?;
        state.books.check_size(Verb::Create, size)?;
        state.books.take_bytes(size)?;
        let too_long = |errno: Option<Errno>| match errno {
            Some(errno) => {
                errno.error(Verb::Create, Some(size), ErrorKind::OutOfDeviceMemory, "raise `ulimit -f`")
            }
            None => Error::new(
                ErrorKind::OutOfDeviceMemory,
                format!("{size} would take the file past 2^63 bytes; create less"),
            ),
        };
        let Some(place) = state.space.take(size.get()) else {
            state.books.return_bytes(size);
            return Err(too_long(None));
        };
        let end = state.space.end();
        if end > state.file_len {
            if let Err(errno) = state.file.set_len(end) {
                state.space.give(place, size.get());
                state.books.return_bytes(size);
                return Err(too_long(Some(errno)));
            }
            state.file_len = end;
        }
        let handle = RawHandle(state.next_handle);
        state.next_handle += 1;
        state.books.enter_memory(handle, size, place);
        Ok(handle)
    }

    unsafe fn map(&self, addr: DeviceAddr, size: Bytes, handle: RawHandle) -> Result<()> {
        let mut state = self.state.lock();
        state.check_alive()?;
        state.books.check_map(addr, size, handle)?;
        let before = state.seams(addr, size);
        state.books.enter_mapping(addr, size, handle);
        let after = state.seams(addr, size);
        state.recount(before, after, Purpose::Grow).inspect_err(|_| {
            let removed = state.books.take_mappings(addr, size);
            state.books.settle_unmap(&removed);
        })
    }

    unsafe fn set_access(&self, addr: DeviceAddr, size: Bytes, access: Access) -> Result<()> {
        let mut state = self.state.lock();
        state.check_alive()?;
        state.books.check_whole(Verb::SetAccess, addr, size)?;
        let old = runs(shown(state.books.mappings_in(addr, size)));
        let new = runs(shown_with(state.books.mappings_in(addr, size), access));
        if old == new {
            return Ok(());
        }
        let old_access: Vec<_> =
            state.books.mappings_in(addr, size).map(|(_, mapped)| mapped.access).collect();
        let before = state.seams(addr, size);
        state.books.set_access(addr, size, access);
        let after = state.seams(addr, size);
        if let Err(error) = state.recount(before, after, Purpose::Change) {
            state.books.restore_access(addr, size, &old_access);
            return Err(error);
        }
        state.execute(Verb::SetAccess, size, &new, &old).inspect_err(|_| {
            state.books.restore_access(addr, size, &old_access);
            state.recount_back(before, after);
        })
    }

    unsafe fn unmap(&self, addr: DeviceAddr, size: Bytes) -> Result<()> {
        let mut state = self.state.lock();
        state.check_alive()?;
        state.books.check_whole(Verb::Unmap, addr, size)?;
        let old = runs(shown(state.books.mappings_in(addr, size)));
        let before = state.seams(addr, size);
        let removed = state.books.take_mappings(addr, size);
        let after = state.seams(addr, size);
        if let Err(error) = state.recount(before, after, Purpose::Change) {
            state.books.put_mappings_back(&removed);
            return Err(error);
        }
        let nothing = [Run { addr, size, cover: Cover::Nothing }];
        let new = if old == nothing { &[][..] } else { &nothing[..] };
        if let Err(error) = state.execute(Verb::Unmap, size, new, &old) {
            state.books.put_mappings_back(&removed);
            state.recount_back(before, after);
            return Err(error);
        }
        for gone in state.books.settle_unmap(&removed) {
            state.drop_memory(gone.place, gone.size);
        }
        Ok(())
    }

    unsafe fn release(&self, handle: RawHandle) -> Result<()> {
        let mut state = self.state.lock();
        state.check_alive()?;
        state.books.check_release(handle)?;
        if let Some(released) = state.books.take_handle(handle)
            && let Some(gone) = state.books.settle_release(&released)
        {
            state.drop_memory(gone.place, gone.size);
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

impl Drop for Host {
    fn drop(&mut self) {
        let state = self.state.get_mut();
        for (base, reserved) in state.books.reservations() {
            // SAFETY: the books say that the range is a reservation of this driver that was not freed. Whoever
            // still used its addresses would have to hold the driver.
            if let Err(errno) = unsafe { mmap::free(DeviceAddr::new(base), reserved.size) } {
                tracing::error!(?errno, addr = base, "the system did not take addresses back");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRANULE: Bytes = Bytes::new(64 << 10);

    /// What the kernel shows in a range: where each piece ends, its protection and its offset in the file.
    fn kernel_shows(addr: DeviceAddr, size: Bytes) -> Vec<(u64, String, u64)> {
        let (from, to) = (addr.get(), addr.get() + size.get());
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        maps.lines()
            .filter_map(|line| {
                let mut fields = line.split_whitespace();
                let (start, end) = fields.next()?.split_once('-')?;
                let start = u64::from_str_radix(start, 16).ok()?;
                let end = u64::from_str_radix(end, 16).ok()?;
                let protection = fields.next()?.to_owned();
                let offset = u64::from_str_radix(fields.next()?, 16).ok()?;
                (start < to && end > from).then_some((end.min(to), protection, offset))
            })
            .collect()
    }

    /// Four handles in an order in which no two of them merge, mapped and not yet accessible.
    fn four_runs() -> (Arc<Host>, DeviceAddr, Bytes, Vec<RawHandle>) {
        let host = Host::new(HostOptions::new(GRANULE, Bytes::mib(64))).unwrap();
        let size = GRANULE * 4;
        let base = host.reserve(size).unwrap();
        let handles: Vec<_> = (0..4).map(|_| host.create(GRANULE).unwrap()).collect();
        for (place, which) in [3, 2, 1, 0].into_iter().enumerate() {
            let addr = base + GRANULE * crate::units::wide(place);
            // SAFETY: a free granule of this test's reservation, and the handle's whole size.
            unsafe { host.map(addr, GRANULE, handles[which]) }.unwrap();
        }
        (host, base, size, handles)
    }

    #[test]
    fn a_call_that_fails_half_way_shows_what_was_there() {
        for refused in 0..4 {
            let (host, base, size, _) = four_runs();
            // SAFETY: one mapping of this test, which nobody uses.
            unsafe { host.set_access(base + GRANULE, GRANULE, Access::Read) }.unwrap();
            let before = (kernel_shows(base, size), host.kernel_mappings(), host.live());
            host.state.lock().refusals = (0..=refused).map(|call| call == refused).collect();
            // SAFETY: four mappings of this test, which nobody uses.
            let error = unsafe { host.set_access(base, size, Access::ReadWrite) }.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::OutOfMappings);
            assert_eq!((kernel_shows(base, size), host.kernel_mappings(), host.live()), before);
            // SAFETY: as before.
            unsafe { host.set_access(base, size, Access::ReadWrite) }.unwrap();
            assert_eq!(kernel_shows(base, size).len(), 4);

            host.state.lock().refusals.push_back(true);
            let before = (kernel_shows(base, size), host.kernel_mappings(), host.live());
            // SAFETY: as before.
            unsafe { host.unmap(base, size) }.unwrap_err();
            assert_eq!((kernel_shows(base, size), host.kernel_mappings(), host.live()), before);
            // SAFETY: as before.
            unsafe { host.unmap(base, size) }.unwrap();
            assert_eq!(kernel_shows(base, size).len(), 1);
        }
    }

    #[test]
    fn a_failure_that_cannot_be_undone_loses_the_driver() {
        let (host, base, size, _) = four_runs();
        host.state.lock().refusals = [false, true, true].into();
        // SAFETY: four mappings of this test, which nobody uses.
        let error = unsafe { host.set_access(base, size, Access::ReadWrite) }.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfMappings);
        assert_eq!(host.create(GRANULE).unwrap_err().kind(), ErrorKind::DeviceLost);
    }
}
