//! A driver that counts which calls are made of it on the serving thread and elsewhere, and writes down,
//! while it is asked to, those that move memory.

#![allow(unsafe_code, reason = "implements the seam's unsafe trait by handing every call on")]

use std::collections::HashMap;
use std::ops::Sub;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, ThreadId};

use vattn::driver::{Access, Driver, DriverInfo, MemoryInfo, RawEvent, RawHandle, Stream};
use vattn::error::Result;
use vattn::units::{Bytes, DeviceAddr};

use crate::common::bare::Bare;

/// One call that succeeded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Call {
    Create { size: Bytes, handle: RawHandle },
    Map { addr: DeviceAddr, size: Bytes, handle: RawHandle },
    SetAccess { addr: DeviceAddr, size: Bytes },
    Unmap { addr: DeviceAddr, size: Bytes },
    Release { handle: RawHandle },
}

/// How many calls succeeded so far.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Made {
    /// Those that move memory, on the serving thread.
    pub(crate) moves: u64,
    /// The same on other threads.
    pub(crate) moves_beside: u64,
    /// Those of fences, on the serving thread.
    pub(crate) fences: u64,
}

impl Sub for Made {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self {
            moves: self.moves - before.moves,
            moves_beside: self.moves_beside - before.moves_beside,
            fences: self.fences - before.fences,
        }
    }
}

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct Recorder {
    inner: Arc<dyn Driver>,
    serving: ThreadId,
    moves: AtomicU64,
    moves_beside: AtomicU64,
    fences: AtomicU64,
    on: AtomicBool,
    calls: Mutex<Vec<Call>>,
}

impl Recorder {
    /// The serving thread is the one that calls this.
    pub(crate) fn new(inner: Arc<dyn Driver>) -> Arc<Self> {
        Arc::new(Self {
            inner,
            serving: thread::current().id(),
            moves: AtomicU64::new(0),
            moves_beside: AtomicU64::new(0),
            fences: AtomicU64::new(0),
            on: AtomicBool::new(false),
            calls: Mutex::default(),
        })
    }

    pub(crate) fn made(&self) -> Made {
        let [moves, moves_beside, fences] =
            [&self.moves, &self.moves_beside, &self.fences].map(|count| count.load(Ordering::Relaxed));
        Made { moves, moves_beside, fences }
    }

    fn is_serving(&self) -> bool {
        thread::current().id() == self.serving
    }

    /// Writes down what is called during `run`.
    pub(crate) fn record<T>(&self, run: impl FnOnce() -> T) -> (T, Vec<Call>) {
        self.on.store(true, Ordering::Relaxed);
        let result = run();
        self.on.store(false, Ordering::Relaxed);
        (result, std::mem::take(&mut *self.calls.lock().unwrap()))
    }

    fn note(&self, call: Call) {
        let count = if self.is_serving() { &self.moves } else { &self.moves_beside };
        count.fetch_add(1, Ordering::Relaxed);
        if self.on.load(Ordering::Relaxed) {
            self.calls.lock().unwrap().push(call);
        }
    }

    fn note_fence(&self) {
        if self.is_serving() {
            self.fences.fetch_add(1, Ordering::Relaxed);
        }
    }
}

// SAFETY: every call is handed on unchanged, and so is its answer; the inner driver keeps the contract.
unsafe impl Driver for Recorder {
    fn info(&self) -> &DriverInfo {
        self.inner.info()
    }

    fn memory_info(&self) -> Result<MemoryInfo> {
        self.inner.memory_info()
    }

    fn reserve(&self, size: Bytes) -> Result<DeviceAddr> {
        self.inner.reserve(size)
    }

    unsafe fn free(&self, addr: DeviceAddr, size: Bytes) -> Result<()> {
        // SAFETY: the caller's conditions are the callee's.
        unsafe { self.inner.free(addr, size) }
    }

    fn create(&self, size: Bytes) -> Result<RawHandle> {
        self.inner.create(size).inspect(|handle| self.note(Call::Create { size, handle: *handle }))
    }

    unsafe fn map(&self, addr: DeviceAddr, size: Bytes, handle: RawHandle) -> Result<()> {
        // SAFETY: the caller's conditions are the callee's.
        let done = unsafe { self.inner.map(addr, size, handle) };
        done.inspect(|()| self.note(Call::Map { addr, size, handle }))
    }

    unsafe fn set_access(&self, addr: DeviceAddr, size: Bytes, access: Access) -> Result<()> {
        // SAFETY: the caller's conditions are the callee's.
        let done = unsafe { self.inner.set_access(addr, size, access) };
        done.inspect(|()| self.note(Call::SetAccess { addr, size }))
    }

    unsafe fn unmap(&self, addr: DeviceAddr, size: Bytes) -> Result<()> {
        // SAFETY: the caller's conditions are the callee's.
        let done = unsafe { self.inner.unmap(addr, size) };
        done.inspect(|()| self.note(Call::Unmap { addr, size }))
    }

    unsafe fn release(&self, handle: RawHandle) -> Result<()> {
        // SAFETY: the caller's conditions are the callee's.
        let done = unsafe { self.inner.release(handle) };
        done.inspect(|()| self.note(Call::Release { handle }))
    }

    fn record_event(&self, stream: Stream) -> Result<RawEvent> {
        self.note_fence();
        self.inner.record_event(stream)
    }

    unsafe fn follow_event(&self, event: RawEvent) -> Result<RawEvent> {
        self.note_fence();
        // SAFETY: the caller's condition is the callee's.
        unsafe { self.inner.follow_event(event) }
    }

    unsafe fn query_event(&self, event: RawEvent) -> Result<bool> {
        self.note_fence();
        // SAFETY: the caller's condition is the callee's.
        unsafe { self.inner.query_event(event) }
    }

    unsafe fn wait_event(&self, event: RawEvent) -> Result<()> {
        self.note_fence();
        // SAFETY: the caller's condition is the callee's.
        unsafe { self.inner.wait_event(event) }
    }

    unsafe fn stream_wait(&self, stream: Stream, event: RawEvent) -> Result<()> {
        self.note_fence();
        // SAFETY: the caller's condition is the callee's.
        unsafe { self.inner.stream_wait(stream, event) }
    }

    unsafe fn destroy_event(&self, event: RawEvent) -> Result<()> {
        self.note_fence();
        // SAFETY: the caller's condition is the callee's.
        unsafe { self.inner.destroy_event(event) }
    }
}

/// Recorded calls that make memory and put it behind addresses, to be played on the driver itself.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    calls: Vec<Planned>,
    /// The handles that it maps and does not create, in the order of their numbers.
    at_hand: Vec<RawHandle>,
}

/// A call of which the handle is known by its number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Planned {
    Create { size: Bytes },
    Map { addr: DeviceAddr, size: Bytes, handle: usize },
    SetAccess { addr: DeviceAddr, size: Bytes },
}

impl Plan {
    /// The plan of a step. Handles that it takes are numbered before those that it creates; a step that
    /// also takes memory away is no plan that can be played twice.
    pub(crate) fn of(recorded: &[Call]) -> Self {
        let created: Vec<_> = recorded
            .iter()
            .filter_map(|call| match call {
                Call::Create { handle, .. } => Some(*handle),
                _ => None,
            })
            .collect();
        let at_hand: Vec<_> = recorded
            .iter()
            .filter_map(|call| match call {
                Call::Map { handle, .. } if !created.contains(handle) => Some(*handle),
                _ => None,
            })
            .collect();
        let numbers: HashMap<_, _> =
            at_hand.iter().chain(&created).enumerate().map(|(number, handle)| (*handle, number)).collect();
        let calls = recorded
            .iter()
            .map(|call| match *call {
                Call::Create { size, .. } => Planned::Create { size },
                Call::Map { addr, size, handle } => Planned::Map { addr, size, handle: numbers[&handle] },
                Call::SetAccess { addr, size } => Planned::SetAccess { addr, size },
                Call::Unmap { .. } | Call::Release { .. } => {
                    panic!("a step into an empty slot took memory away")
                }
            })
            .collect();
        Self { calls, at_hand }
    }

    pub(crate) fn mappings(&self) -> usize {
        self.calls.iter().filter(|call| matches!(call, Planned::Map { .. })).count()
    }

    pub(crate) fn creates(&self) -> usize {
        self.calls.iter().filter(|call| matches!(call, Planned::Create { .. })).count()
    }

    /// What it creates, in all.
    pub(crate) fn created(&self) -> Bytes {
        let sizes = self.calls.iter().filter_map(|call| match call {
            Planned::Create { size } => Some(*size),
            _ => None,
        });
        sizes.sum()
    }

    /// Whether it is the same calls, whichever handle each of them maps.
    pub(crate) fn is_like(&self, other: &Self) -> bool {
        let shape = |plan: &Self| -> Vec<_> {
            let calls = plan.calls.iter().map(|call| match *call {
                Planned::Map { addr, size, .. } => Planned::Map { addr, size, handle: 0 },
                call => call,
            });
            calls.collect()
        };
        shape(self) == shape(other)
    }

    /// Makes the calls. Returns the handles by their numbers.
    pub(crate) fn play(&self, bare: &Bare) -> Vec<RawHandle> {
        let mut handles = Vec::with_capacity(self.at_hand.len() + self.calls.len());
        handles.extend_from_slice(&self.at_hand);
        for call in &self.calls {
            match *call {
                Planned::Create { size } => handles.push(bare.create(size)),
                Planned::Map { addr, size, handle } => bare.map(addr, size, handles[handle]),
                Planned::SetAccess { addr, size } => bare.set_access(addr, size),
            }
        }
        handles
    }

    /// Unmaps what was mapped and releases what was created.
    pub(crate) fn undo(&self, bare: &Bare, handles: &[RawHandle]) {
        for call in self.calls.iter().rev() {
            if let Planned::Map { addr, size, .. } = *call {
                bare.unmap(addr, size);
            }
        }
        handles[self.at_hand.len()..].iter().for_each(|handle| bare.release(*handle));
    }
}
