//! Wraps any driver for tests and replays: asserts the contract, keeps a budget, fails calls on
//! demand, counts them and charges what they would cost on a GPU.
//!
//! Owns books of its own beside the inner driver's. Refuses to know which driver that is.
//!
//! ```text
//!   call ─► count ─► hook ─► planned failure? ─► contract? ─► budget? ─► inner driver ─► books, cost
//! ```
//!
//! - A call that is made to fail never reaches the inner driver.
//! - What takes is entered after the inner driver did it, and what gives back is taken out before, so
//!   that no other thread's lawful call is ever seen in the wrong order.
//! - The lock of the books is a leaf: neither the hook nor the inner driver is called under it.

#![allow(unsafe_code, reason = "the seam's contract is an unsafe trait")]

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use serde::Serialize;

use crate::driver::books::{Books, Live};
use crate::driver::{Access, Driver, DriverInfo, MemoryInfo, RawEvent, RawHandle, Stream};
use crate::error::{DriverFailure, Error, ErrorKind, Result, Verb};
use crate::sync::Leaf;
use crate::units::{Bytes, DeviceAddr};

mod costs;

pub use costs::{CostModel, CostRow};

const VERBS: usize = Verb::ALL.len();

/// What a [`Checked`] driver does beside counting.
#[derive(Clone, Copy, Debug)]
pub struct CheckedOptions {
    /// Whether a broken condition of the contract is a panic. Where not, the inner driver's refusal
    /// is handed on.
    pub assert_contract: bool,
    /// How many bytes may be created in all; `None` for what the inner driver has.
    pub budget: Option<Bytes>,
    /// Whether the budget is told as the memory of a smaller device. Where not, what the inner driver
    /// tells is handed on.
    pub budget_is_memory: bool,
    /// What each call is charged.
    pub costs: CostModel,
}

impl CheckedOptions {
    /// For tests: the contract is asserted; no budget; the costs of an H200.
    pub const TEST: Self =
        Self { assert_contract: true, budget: None, budget_is_memory: true, costs: CostModel::H200 };
    /// For replays: nothing is asserted; no budget, and one that is set is no device's memory; the costs
    /// of an H200.
    pub const REPLAY: Self = Self { assert_contract: false, budget_is_memory: false, ..Self::TEST };
}

/// How often each verb was called.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct CallCounts([u64; VERBS]);

impl CallCounts {
    /// How often that verb was called.
    #[must_use]
    pub fn of(&self, verb: Verb) -> u64 {
        self.0[number(verb)]
    }

    /// How many calls there were.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }

    /// Each verb with its calls.
    pub fn iter(&self) -> impl Iterator<Item = (Verb, u64)> {
        Verb::ALL.into_iter().zip(self.0)
    }
}

/// A call that is to fail.
#[derive(Debug)]
struct Fault {
    /// Only calls of this verb count; `None` for all.
    verb: Option<Verb>,
    /// How many calls go well before.
    spare: u64,
    /// Whether every later call fails too.
    forever: bool,
    kind: ErrorKind,
}

type Hook = Arc<dyn Fn(Verb) + Send + Sync>;

/// A driver around a driver. See the [module](self).
pub struct Checked {
    inner: Arc<dyn Driver>,
    options: CheckedOptions,
    state: Leaf<State>,
    calls: [AtomicU64; VERBS],
    modelled_ns: [AtomicU64; VERBS],
    /// Whether `faults` or `hook` need a look.
    watched: AtomicBool,
    faults: Leaf<Vec<Fault>>,
    injected: AtomicU64,
    hook: Leaf<Option<Hook>>,
}

#[derive(Debug)]
struct State {
    books: Books,
    events: HashSet<RawEvent>,
    /// Events that must not be named any more; kept only where that is asserted.
    destroyed: HashSet<RawEvent>,
}

fn number(verb: Verb) -> usize {
    // The compiler makes a plain conversion of it.
    match verb {
        Verb::Reserve => 0,
        Verb::Create => 1,
        Verb::Map => 2,
        Verb::SetAccess => 3,
        Verb::Unmap => 4,
        Verb::Release => 5,
        Verb::Free => 6,
        Verb::MemoryInfo => 7,
        Verb::RecordEvent => 8,
        Verb::FollowEvent => 9,
        Verb::QueryEvent => 10,
        Verb::WaitEvent => 11,
        Verb::DestroyEvent => 12,
        Verb::StreamWait => 13,
    }
}

impl fmt::Debug for Checked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Checked")
            .field("inner", &self.inner)
            .field("options", &self.options)
            .field("calls", &self.calls())
            .finish_non_exhaustive()
    }
}

impl Checked {
    /// Wraps a driver that nothing has been made with yet.
    #[must_use]
    pub fn new(inner: Arc<dyn Driver>, options: CheckedOptions) -> Arc<Self> {
        let granule = inner.info().granule;
        Arc::new(Self {
            inner,
            options,
            state: Leaf::new(State {
                books: Books::new(granule, options.budget.unwrap_or(Bytes::new(u64::MAX))),
                events: HashSet::new(),
                destroyed: HashSet::new(),
            }),
            calls: Default::default(),
            modelled_ns: Default::default(),
            watched: AtomicBool::new(false),
            faults: Leaf::new(Vec::new()),
            injected: AtomicU64::new(0),
            hook: Leaf::new(None),
        })
    }

    /// What callers have not given back.
    #[must_use]
    pub fn live(&self) -> Live {
        let state = self.state.lock();
        state.books.live(crate::units::wide(state.events.len()))
    }

    /// The calls so far, those that failed included.
    #[must_use]
    pub fn calls(&self) -> CallCounts {
        CallCounts(std::array::from_fn(|verb| self.calls[verb].load(Relaxed)))
    }

    /// What the calls that succeeded would have cost, in all.
    #[must_use]
    pub fn modelled(&self) -> Duration {
        Duration::from_nanos(self.modelled_ns.iter().map(|ns| ns.load(Relaxed)).sum())
    }

    /// The same of one verb.
    #[must_use]
    pub fn modelled_of(&self, verb: Verb) -> Duration {
        Duration::from_nanos(self.modelled_ns[number(verb)].load(Relaxed))
    }

    /// Counts and costs from zero again; the books and the planned failures stay.
    pub fn reset_counts(&self) {
        for count in self.calls.iter().chain(&self.modelled_ns) {
            count.store(0, Relaxed);
        }
    }

    /// The n-th call from now on, 1 for the next, fails with that kind, once.
    pub fn fail_call(&self, n: u64, kind: ErrorKind) {
        self.plan(None, n, false, kind);
    }

    /// The same, counting only calls of one verb.
    pub fn fail_call_of(&self, verb: Verb, n: u64, kind: ErrorKind) {
        self.plan(Some(verb), n, false, kind);
    }

    /// The n-th call from now on and every later one fails with that kind.
    pub fn fail_from(&self, n: u64, kind: ErrorKind) {
        self.plan(None, n, true, kind);
    }

    /// The same, counting and failing only calls of one verb.
    pub fn fail_from_of(&self, verb: Verb, n: u64, kind: ErrorKind) {
        self.plan(Some(verb), n, true, kind);
    }

    /// The device is gone at the n-th call from now on, and stays gone.
    pub fn lose_device_at(&self, n: u64) {
        self.fail_from(n, ErrorKind::DeviceLost);
    }

    /// No call is to fail any more.
    pub fn clear_faults(&self) {
        self.faults.lock().clear();
        self.rewatch();
    }

    /// How many calls were made to fail so far: a sweep over n ends where this stays zero.
    #[must_use]
    pub fn injected(&self) -> u64 {
        self.injected.load(Relaxed)
    }

    /// Has a closure called before each call, on the caller's thread: to delay it, or to hold it at
    /// a gate. Replaces the one before.
    pub fn on_call(&self, hook: Box<dyn Fn(Verb) + Send + Sync>) {
        *self.hook.lock() = Some(Arc::from(hook));
        self.rewatch();
    }

    /// Takes the closure away.
    pub fn clear_on_call(&self) {
        *self.hook.lock() = None;
        self.rewatch();
    }

    fn plan(&self, verb: Option<Verb>, n: u64, forever: bool, kind: ErrorKind) {
        assert!(n > 0, "calls are counted from 1");
        self.faults.lock().push(Fault { verb, spare: n - 1, forever, kind });
        self.rewatch();
    }

    fn rewatch(&self) {
        let watched = !self.faults.lock().is_empty() || self.hook.lock().is_some();
        self.watched.store(watched, Relaxed);
    }

    /// What comes before every call.
    fn enter(&self, verb: Verb, size: Option<Bytes>) -> Result<()> {
        self.calls[number(verb)].fetch_add(1, Relaxed);
        if !self.watched.load(Relaxed) {
            return Ok(());
        }
        let hook = self.hook.lock().clone();
        if let Some(hook) = hook {
            hook(verb);
        }
        let mut failure = None;
        self.faults.lock().retain_mut(|fault| {
            if fault.verb.is_some_and(|only| only != verb) {
                return true;
            }
            if fault.spare > 0 {
                fault.spare -= 1;
                return true;
            }
            failure.get_or_insert(fault.kind);
            fault.forever
        });
        let Some(kind) = failure else { return Ok(()) };
        self.injected.fetch_add(1, Relaxed);
        let failure = DriverFailure { verb, code: 0, name: "INJECTED", size };
        Err(Error::from_driver(kind, failure, "a test asked for this failure"))
    }

    fn charge(&self, verb: Verb, cost: Duration) {
        let ns = u64::try_from(cost.as_nanos()).unwrap_or(u64::MAX);
        self.modelled_ns[number(verb)].fetch_add(ns, Relaxed);
    }

    /// Panics if a condition of the contract is broken, where that is asserted.
    fn require(&self, met: impl FnOnce(&State) -> Result<()>) {
        if !self.options.assert_contract {
            return;
        }
        let broken = met(&self.state.lock()).err();
        if let Some(broken) = broken {
            panic!("the driver's contract is broken: {}", broken.report());
        }
    }

    fn require_event(&self, verb: Verb, event: RawEvent) {
        // An event may be somebody else's; but it must not be one that was destroyed.
        self.require(|state| {
            if state.destroyed.contains(&event) {
                return Err(Error::new(
                    ErrorKind::Internal,
                    format!("{verb} names event {:#x}, which was destroyed", event.0),
                ));
            }
            Ok(())
        });
    }

    fn enter_event(&self, event: RawEvent) {
        let mut state = self.state.lock();
        state.destroyed.remove(&event);
        state.events.insert(event);
    }
}

// SAFETY: every verb is the inner driver's, which keeps the promises; a call that is made to fail does
// not reach it.
unsafe impl Driver for Checked {
    fn info(&self) -> &DriverInfo {
        self.inner.info()
    }

    fn memory_info(&self) -> Result<MemoryInfo> {
        self.enter(Verb::MemoryInfo, None)?;
        let inner = self.inner.memory_info()?;
        self.charge(Verb::MemoryInfo, self.options.costs.memory_info);
        if !self.options.budget_is_memory {
            return Ok(inner);
        }
        let state = self.state.lock();
        Ok(MemoryInfo {
            free: inner.free.min(state.books.free_bytes()),
            total: inner.total.min(state.books.capacity()),
        })
    }

    fn reserve(&self, size: Bytes) -> Result<DeviceAddr> {
        self.enter(Verb::Reserve, Some(size))?;
        self.require(|state| state.books.check_size(Verb::Reserve, size));
        let addr = self.inner.reserve(size)?;
        self.charge(Verb::Reserve, self.options.costs.reserve);
        self.require(|state| {
            if !state.books.is_apart(addr, size) || !self.info().granule.divides(Bytes::new(addr.get())) {
                return Err(Error::new(
                    ErrorKind::Internal,
                    format!("the inner driver reserved {addr}, off a granule or in another reservation"),
                ));
            }
            Ok(())
        });
        self.state.lock().books.enter_reservation(addr, size);
        Ok(addr)
    }

    unsafe fn free(&self, addr: DeviceAddr, size: Bytes) -> Result<()> {
        self.enter(Verb::Free, Some(size))?;
        self.require(|state| state.books.check_free(addr, size));
        let known = {
            let mut state = self.state.lock();
            let known = state.books.check_free(addr, size).is_ok();
            if known {
                state.books.remove_reservation(addr);
            }
            known
        };
        // SAFETY: the caller's conditions are the callee's.
        unsafe { self.inner.free(addr, size) }.inspect_err(|_| {
            if known {
                self.state.lock().books.enter_reservation(addr, size);
            }
        })
    }

    fn create(&self, size: Bytes) -> Result<RawHandle> {
        self.enter(Verb::Create, Some(size))?;
        self.require(|state| state.books.check_size(Verb::Create, size));
        self.state.lock().books.take_bytes(size)?;
        let handle = self.inner.create(size).inspect_err(|_| self.state.lock().books.return_bytes(size))?;
        self.charge(Verb::Create, self.options.costs.create(size));
        self.state.lock().books.enter_memory(handle, size, 0);
        Ok(handle)
    }

    unsafe fn map(&self, addr: DeviceAddr, size: Bytes, handle: RawHandle) -> Result<()> {
        self.enter(Verb::Map, Some(size))?;
        self.require(|state| state.books.check_map(addr, size, handle));
        // SAFETY: the caller's conditions are the callee's.
        unsafe { self.inner.map(addr, size, handle) }?;
        self.charge(Verb::Map, self.options.costs.map(size));
        self.state.lock().books.enter_mapping(addr, size, handle);
        Ok(())
    }

    unsafe fn set_access(&self, addr: DeviceAddr, size: Bytes, access: Access) -> Result<()> {
        self.enter(Verb::SetAccess, Some(size))?;
        self.require(|state| state.books.check_whole(Verb::SetAccess, addr, size).map(drop));
        // SAFETY: the caller's conditions are the callee's.
        unsafe { self.inner.set_access(addr, size, access) }?;
        let costs = &self.options.costs;
        let cost = {
            let mut state = self.state.lock();
            state.books.set_access(addr, size, access);
            state.books.mappings_in(addr, size).map(|(_, mapped)| costs.set_access(mapped.size)).sum()
        };
        self.charge(Verb::SetAccess, cost);
        Ok(())
    }

    unsafe fn unmap(&self, addr: DeviceAddr, size: Bytes) -> Result<()> {
        self.enter(Verb::Unmap, Some(size))?;
        self.require(|state| state.books.check_whole(Verb::Unmap, addr, size).map(drop));
        let removed = {
            let mut state = self.state.lock();
            let whole = state.books.check_whole(Verb::Unmap, addr, size).is_ok();
            whole.then(|| state.books.take_mappings(addr, size))
        };
        // SAFETY: the caller's conditions are the callee's.
        let result = unsafe { self.inner.unmap(addr, size) };
        let Some(removed) = removed else { return result };
        let mut state = self.state.lock();
        match result {
            Ok(()) => {
                state.books.settle_unmap(&removed);
                drop(state);
                let costs = &self.options.costs;
                let cost = removed.mappings.iter().map(|(_, mapped)| costs.unmap(mapped.size)).sum();
                self.charge(Verb::Unmap, cost);
                Ok(())
            }
            Err(error) => {
                state.books.put_mappings_back(&removed);
                Err(error)
            }
        }
    }

    unsafe fn release(&self, handle: RawHandle) -> Result<()> {
        self.enter(Verb::Release, None)?;
        self.require(|state| state.books.check_release(handle).map(drop));
        let (size, released) = {
            let mut state = self.state.lock();
            (state.books.check_release(handle), state.books.take_handle(handle))
        };
        // SAFETY: the caller's condition is the callee's.
        let result = unsafe { self.inner.release(handle) };
        let (Ok(size), Some(released)) = (size, released) else { return result };
        let mut state = self.state.lock();
        match result {
            Ok(()) => {
                state.books.settle_release(&released);
                drop(state);
                self.charge(Verb::Release, self.options.costs.release(size));
                Ok(())
            }
            Err(error) => {
                state.books.put_handle_back(&released);
                Err(error)
            }
        }
    }

    fn record_event(&self, stream: Stream) -> Result<RawEvent> {
        self.enter(Verb::RecordEvent, None)?;
        self.inner.record_event(stream).inspect(|event| self.enter_event(*event))
    }

    unsafe fn follow_event(&self, event: RawEvent) -> Result<RawEvent> {
        self.enter(Verb::FollowEvent, None)?;
        self.require_event(Verb::FollowEvent, event);
        // SAFETY: the caller's condition is the callee's.
        unsafe { self.inner.follow_event(event) }.inspect(|event| self.enter_event(*event))
    }

    unsafe fn query_event(&self, event: RawEvent) -> Result<bool> {
        self.enter(Verb::QueryEvent, None)?;
        self.require_event(Verb::QueryEvent, event);
        // SAFETY: the caller's condition is the callee's.
        unsafe { self.inner.query_event(event) }
    }

    unsafe fn wait_event(&self, event: RawEvent) -> Result<()> {
        self.enter(Verb::WaitEvent, None)?;
        self.require_event(Verb::WaitEvent, event);
        // SAFETY: the caller's condition is the callee's.
        unsafe { self.inner.wait_event(event) }
    }

    unsafe fn stream_wait(&self, stream: Stream, event: RawEvent) -> Result<()> {
        self.enter(Verb::StreamWait, None)?;
        self.require_event(Verb::StreamWait, event);
        // SAFETY: the caller's condition is the callee's.
        unsafe { self.inner.stream_wait(stream, event) }
    }

    unsafe fn destroy_event(&self, event: RawEvent) -> Result<()> {
        self.enter(Verb::DestroyEvent, None)?;
        self.require(|state| {
            if state.events.contains(&event) {
                return Ok(());
            }
            Err(Error::new(
                ErrorKind::Internal,
                format!("event {:#x} was not made here or was destroyed before", event.0),
            ))
        });
        let known = {
            let mut state = self.state.lock();
            if self.options.assert_contract {
                state.destroyed.insert(event);
            }
            state.events.remove(&event)
        };
        // SAFETY: the caller's condition is the callee's.
        unsafe { self.inner.destroy_event(event) }.inspect_err(|_| {
            if known {
                self.enter_event(event);
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::ledger::{Ledger, LedgerOptions};

    fn checked(options: CheckedOptions) -> Arc<Checked> {
        let ledger =
            Ledger::new(LedgerOptions { granule: Bytes::mib(2), capacity: Bytes::gib(4), addresses: None });
        Checked::new(ledger.unwrap(), options)
    }

    #[test]
    fn verbs_are_numbered_in_their_order() {
        for (place, verb) in Verb::ALL.into_iter().enumerate() {
            assert_eq!(number(verb), place);
        }
    }

    #[test]
    fn the_nth_call_fails_once_and_never_reaches_the_driver() {
        let driver = checked(CheckedOptions::TEST);
        driver.fail_call(2, ErrorKind::OutOfDeviceMemory);
        driver.fail_call_of(Verb::Release, 1, ErrorKind::Driver);
        let handle = driver.create(Bytes::mib(2)).unwrap();
        let before = driver.live();
        let error = driver.create(Bytes::mib(2)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfDeviceMemory);
        assert_eq!(error.driver().unwrap().name, "INJECTED");
        // SAFETY: the handle is this test's, and a failed release leaves it alive.
        let refused = unsafe { driver.release(handle) };
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::Driver);
        assert_eq!((driver.live(), driver.injected()), (before, 2));
        assert_eq!(driver.inner.memory_info().unwrap().free, Bytes::gib(4) - Bytes::mib(2));
        // SAFETY: the handle is this test's, released once.
        unsafe { driver.release(handle) }.unwrap();
        assert_eq!(driver.live(), Live::default());
        assert_eq!(driver.calls().of(Verb::Create), 2);
        assert_eq!(driver.calls().total(), 4);
    }

    #[test]
    fn a_lost_device_stays_lost() {
        let driver = checked(CheckedOptions::TEST);
        driver.lose_device_at(2);
        driver.memory_info().unwrap();
        for _ in 0..3 {
            assert_eq!(driver.memory_info().unwrap_err().kind(), ErrorKind::DeviceLost);
        }
        driver.clear_faults();
        driver.memory_info().unwrap();
    }

    #[test]
    fn the_budget_holds_and_recovers() {
        let driver = checked(CheckedOptions { budget: Some(Bytes::mib(4)), ..CheckedOptions::TEST });
        let handle = driver.create(Bytes::mib(4)).unwrap();
        assert_eq!(driver.create(Bytes::mib(2)).unwrap_err().kind(), ErrorKind::OutOfDeviceMemory);
        assert_eq!(driver.memory_info().unwrap(), MemoryInfo { free: Bytes::ZERO, total: Bytes::mib(4) });
        // SAFETY: the handle is this test's, released once.
        unsafe { driver.release(handle) }.unwrap();
        driver.create(Bytes::mib(2)).unwrap();
    }

    #[test]
    fn a_range_is_charged_for_each_of_its_mappings() {
        let driver = checked(CheckedOptions::TEST);
        let size = Bytes::mib(2);
        let base = driver.reserve(Bytes::mib(8)).unwrap();
        for place in 0..4 {
            let handle = driver.create(size).unwrap();
            // SAFETY: a free granule of this test's reservation, and the handle's whole size.
            unsafe { driver.map(base + size * place, size, handle) }.unwrap();
        }
        // SAFETY: the range is the four mappings; the ledger has no memory that anybody could use.
        unsafe {
            driver.set_access(base, Bytes::mib(8), Access::ReadWrite).unwrap();
            driver.unmap(base, Bytes::mib(8)).unwrap();
        }
        assert_eq!(driver.calls().of(Verb::SetAccess), 1);
        assert_eq!(driver.modelled_of(Verb::SetAccess), Duration::from_nanos(4 * 31_800));
        assert_eq!(driver.modelled_of(Verb::Unmap), Duration::from_nanos(4 * 20_900));
        driver.reset_counts();
        assert_eq!((driver.modelled(), driver.calls()), (Duration::ZERO, CallCounts::default()));
    }

    #[test]
    fn the_hook_sees_every_call() {
        let driver = checked(CheckedOptions::TEST);
        let seen = Arc::new(Leaf::new(Vec::new()));
        let log = Arc::clone(&seen);
        driver.on_call(Box::new(move |verb| log.lock().push(verb)));
        driver.memory_info().unwrap();
        driver.create(Bytes::mib(2)).unwrap();
        driver.clear_on_call();
        driver.memory_info().unwrap();
        assert_eq!(*seen.lock(), [Verb::MemoryInfo, Verb::Create]);
    }

    #[test]
    #[should_panic(expected = "maps whole")]
    fn a_part_of_a_handle_is_caught() {
        let driver = checked(CheckedOptions::TEST);
        let base = driver.reserve(Bytes::mib(8)).unwrap();
        let handle = driver.create(Bytes::mib(4)).unwrap();
        // SAFETY: breaks the contract on purpose, on a driver without memory.
        let _ = unsafe { driver.map(base, Bytes::mib(2), handle) };
    }

    #[test]
    #[should_panic(expected = "or was released")]
    fn a_second_release_is_caught() {
        let driver = checked(CheckedOptions::TEST);
        let handle = driver.create(Bytes::mib(4)).unwrap();
        // SAFETY: breaks the contract on purpose, on a driver without memory.
        unsafe {
            driver.release(handle).unwrap();
            let _ = driver.release(handle);
        }
    }

    #[test]
    #[should_panic(expected = "which was destroyed")]
    fn a_destroyed_event_is_caught() {
        let driver = checked(CheckedOptions::TEST);
        let event = driver.record_event(Stream::LEGACY).unwrap();
        // SAFETY: breaks the contract on purpose, on a driver without memory.
        unsafe {
            driver.destroy_event(event).unwrap();
            let _ = driver.query_event(event);
        }
    }
}
