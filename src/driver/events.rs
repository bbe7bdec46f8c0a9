//! Events of a backend that has no streams of work of its own: they fire at once, unless a test
//! holds their stream.
//!
//! Owns which events live and which have fired. Refuses to know about memory. An event is a point;
//! a point that has not fired waits for others and is waited for by others:
//!
//! ```text
//!   hold(s) ── makes a gate ──► s.tail ──► record_event(s) ──► point
//!                                 ▲
//!   stream_wait(s, e) ── e's point┘        fire(s) opens the gates
//! ```
//!
//! - A number in `unfired` has not fired; every other number that was given out has.
//! - A point leaves `unfired` when the last one it waits for does, so that no walk recurses.

use std::collections::{HashMap, HashSet};

use crate::driver::books::invalid;
use crate::driver::{RawEvent, Stream};
use crate::error::{Error, ErrorKind, Result, Verb};
use crate::sync::{Condvar, Leaf};
use crate::units::wide;

/// The streams and events of one driver.
#[derive(Debug, Default)]
pub(super) struct Events {
    state: Leaf<State>,
    fired: Condvar,
}

#[derive(Debug, Default)]
struct State {
    next: u64,
    live: HashSet<u64>,
    unfired: HashMap<u64, Point>,
    /// Streams that a test has touched; any other has nothing to wait for.
    streams: HashMap<Stream, StreamState>,
    waiting: u64,
}

/// Something that has not happened yet.
#[derive(Debug, Default)]
struct Point {
    /// How many others it waits for.
    needs: usize,
    /// Those that wait for it.
    dependents: Vec<u64>,
}

#[derive(Debug, Default)]
struct StreamState {
    /// What later events of the stream wait for.
    tail: Vec<u64>,
    /// Those of them that the test opens.
    gates: Vec<u64>,
    capturing: bool,
}

/// The refusal of a call on a stream that is being captured, whichever backend's.
#[cold]
pub(super) fn capturing(verb: Verb, stream: Stream) -> Error {
    Error::new(
        ErrorKind::CapturingStream,
        format!(
            "{verb} on stream {:#x}, which is being captured; end the capture first, or name a stream outside it",
            stream.0
        ),
    )
}

impl State {
    fn new_point(&mut self, conditions: &[u64]) -> u64 {
        self.next += 1;
        let id = self.next;
        let mut needs = 0;
        for condition in conditions {
            if let Some(point) = self.unfired.get_mut(condition) {
                point.dependents.push(id);
                needs += 1;
            }
        }
        if needs > 0 {
            self.unfired.insert(id, Point { needs, dependents: Vec::new() });
        }
        id
    }

    fn new_event(&mut self, conditions: &[u64]) -> RawEvent {
        let id = self.new_point(conditions);
        self.live.insert(id);
        RawEvent(id)
    }

    fn open(&mut self, gates: Vec<u64>) {
        let mut fired = gates;
        while let Some(id) = fired.pop() {
            for dependent in self.unfired.remove(&id).map(|point| point.dependents).unwrap_or_default() {
                if let Some(point) = self.unfired.get_mut(&dependent) {
                    point.needs -= 1;
                    if point.needs == 0 {
                        fired.push(dependent);
                    }
                }
            }
        }
    }

    fn check_event(&self, verb: Verb, event: RawEvent) -> Result<()> {
        if self.live.contains(&event.0) {
            return Ok(());
        }
        let why = format!("event {:#x} is unknown or was destroyed; record one", event.0);
        Err(invalid(verb, None, &why))
    }

    /// What later work of the stream waits for, without what has fired meanwhile.
    fn tail(&mut self, verb: Verb, stream: Stream) -> Result<Vec<u64>> {
        let Some(state) = self.streams.get_mut(&stream) else { return Ok(Vec::new()) };
        if state.capturing {
            return Err(capturing(verb, stream));
        }
        state.tail.retain(|id| self.unfired.contains_key(id));
        Ok(state.tail.clone())
    }
}

impl Events {
    /// Work of the stream stays undone from now on, until it is fired.
    pub(super) fn hold(&self, stream: Stream) {
        let mut state = self.state.lock();
        let gate = state.new_point(&[]);
        state.unfired.insert(gate, Point::default());
        let held = state.streams.entry(stream).or_default();
        held.tail.push(gate);
        held.gates.push(gate);
    }

    /// Ends the stream's holds.
    pub(super) fn fire(&self, stream: Stream) {
        let mut state = self.state.lock();
        let gates = state.streams.get_mut(&stream).map(|held| std::mem::take(&mut held.gates));
        state.open(gates.unwrap_or_default());
        self.fired.notify_all();
    }

    /// Ends every hold.
    pub(super) fn fire_all(&self) {
        let mut state = self.state.lock();
        let gates = state.streams.values_mut().flat_map(|held| std::mem::take(&mut held.gates)).collect();
        state.open(gates);
        self.fired.notify_all();
    }

    pub(super) fn set_capturing(&self, stream: Stream, capturing: bool) {
        self.state.lock().streams.entry(stream).or_default().capturing = capturing;
    }

    /// How many threads block in [`wait`](Self::wait).
    pub(super) fn waiting(&self) -> u64 {
        self.state.lock().waiting
    }

    /// How many events have not been destroyed.
    pub(super) fn live(&self) -> u64 {
        wide(self.state.lock().live.len())
    }

    pub(super) fn record(&self, stream: Stream) -> Result<RawEvent> {
        let mut state = self.state.lock();
        let tail = state.tail(Verb::RecordEvent, stream)?;
        Ok(state.new_event(&tail))
    }

    pub(super) fn follow(&self, event: RawEvent) -> Result<RawEvent> {
        let mut state = self.state.lock();
        state.check_event(Verb::FollowEvent, event)?;
        Ok(state.new_event(&[event.0]))
    }

    pub(super) fn query(&self, event: RawEvent) -> Result<bool> {
        let state = self.state.lock();
        state.check_event(Verb::QueryEvent, event)?;
        Ok(!state.unfired.contains_key(&event.0))
    }

    pub(super) fn wait(&self, event: RawEvent) -> Result<()> {
        let mut state = self.state.lock();
        state.check_event(Verb::WaitEvent, event)?;
        while state.unfired.contains_key(&event.0) {
            state.waiting += 1;
            self.fired.wait(&mut state);
            state.waiting -= 1;
        }
        Ok(())
    }

    pub(super) fn stream_wait(&self, stream: Stream, event: RawEvent) -> Result<()> {
        let mut state = self.state.lock();
        state.check_event(Verb::StreamWait, event)?;
        state.tail(Verb::StreamWait, stream)?;
        if state.unfired.contains_key(&event.0) {
            state.streams.entry(stream).or_default().tail.push(event.0);
        }
        Ok(())
    }

    pub(super) fn destroy(&self, event: RawEvent) -> Result<()> {
        let mut state = self.state.lock();
        state.check_event(Verb::DestroyEvent, event)?;
        state.live.remove(&event.0);
        Ok(())
    }
}
