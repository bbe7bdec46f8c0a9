//! The atomics.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use crate::error::{Error, ErrorKind, Verb};
use crate::stats::snapshot::{ByteCounts, CallStats, ClassStats, Events, SlotCounts, Snapshot};
use crate::units::{Bytes, SizeClass};

/// A number of things that happened: it only rises.
#[derive(Debug, Default)]
pub struct Tally(AtomicU64);

impl Tally {
    /// It happened once more.
    pub fn bump(&self) {
        self.add(1);
    }

    /// It happened that often more.
    pub fn add(&self, times: u64) {
        self.0.fetch_add(times, Relaxed);
    }

    /// How often it has happened.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// How much of something there is now.
#[derive(Debug, Default)]
pub struct Gauge(AtomicU64);

impl Gauge {
    /// That much more.
    pub fn add(&self, amount: u64) {
        self.0.fetch_add(amount, Relaxed);
    }

    /// That much less.
    pub fn sub(&self, amount: u64) {
        let before = self.0.fetch_sub(amount, Relaxed);
        debug_assert!(before >= amount, "a gauge at {before} sinks by {amount}");
    }

    /// That much now.
    pub fn set(&self, amount: u64) {
        self.0.store(amount, Relaxed);
    }

    /// How much it is.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

#[derive(Debug, Default)]
struct Call {
    calls: Tally,
    failed: Tally,
    nanoseconds: Tally,
}

impl Call {
    fn count(&self, took: Duration, succeeded: bool) {
        self.calls.bump();
        self.nanoseconds.add(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
        if !succeeded {
            self.failed.bump();
        }
    }

    fn stats(&self) -> CallStats {
        CallStats { calls: self.calls.get(), failed: self.failed.get(), nanoseconds: self.nanoseconds.get() }
    }
}

thread_local! {
    /// Whether this thread works beside the path of requests just now.
    static BESIDE: Cell<bool> = const { Cell::new(false) };
}

/// Runs something whose calls of the driver are not on the path of any request.
pub fn beside_the_path<T>(run: impl FnOnce() -> T) -> T {
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            BESIDE.set(self.0);
        }
    }
    let _restore = Restore(BESIDE.replace(true));
    run()
}

/// Everything that is counted, shared by the rooms that count. See [`Snapshot`] for the meanings.
#[derive(Debug, Default)]
#[expect(missing_docs, reason = "each field is the field of the same name in the snapshot, documented there")]
pub struct Counters {
    calls: [Call; Verb::ALL.len()],
    calls_beside: [Call; Verb::ALL.len()],
    refused_drops: Tally,
    device_lost: OnceLock<String>,
    failures: [Tally; ErrorKind::ALL.len()],
    pub free_extents: [Gauge; SizeClass::COUNT],
    pub mapped_extents: [Gauge; SizeClass::COUNT],
    pub needed: Gauge,
    pub mapped: Gauge,
    pub parked: Gauge,
    pub ahead: Gauge,
    pub pinned: Gauge,
    pub free: Gauge,
    pub quarantined: Gauge,
    pub held: Gauge,
    pub budget: Gauge,
    pub active_slots: Gauge,
    pub parked_slots: Gauge,
    pub max_slots: Gauge,
    pub pins: Gauge,
    pub steps: Tally,
    pub acquired: Tally,
    pub adopted: Tally,
    pub retired: Tally,
    pub reclaimed: Tally,
    pub resized: Tally,
    pub rolled_back: Tally,
    pub mapped_ahead: Tally,
    pub background_failures: Tally,
}

impl Counters {
    /// Counts a call of the driver.
    pub fn count_call(&self, verb: Verb, took: Duration, succeeded: bool) {
        let verb = position(&Verb::ALL, verb);
        self.calls[verb].count(took, succeeded);
        if BESIDE.get() {
            self.calls_beside[verb].count(took, succeeded);
        }
    }

    /// Notes that a call of the driver found the device gone, in its words. It never comes back.
    pub fn note_device_lost(&self, error: &Error) {
        self.device_lost.get_or_init(|| error.report());
    }

    /// The words of the call of the driver that found the device gone, if one did.
    pub fn device_lost(&self) -> Option<&str> {
        self.device_lost.get().map(String::as_str)
    }

    /// Counts something that could not be given back.
    pub fn count_refused_drop(&self) {
        self.refused_drops.bump();
    }

    /// How often something could not be given back.
    pub fn refused_drops(&self) -> u64 {
        self.refused_drops.get()
    }

    /// Counts an error that a caller was given.
    pub fn count_failure(&self, kind: ErrorKind) {
        self.failures[position(&ErrorKind::ALL, kind)].bump();
    }

    /// How much memory is used for what.
    pub fn bytes(&self) -> ByteCounts {
        ByteCounts {
            needed: Bytes::new(self.needed.get()),
            mapped: Bytes::new(self.mapped.get()),
            parked: Bytes::new(self.parked.get()),
            ahead: Bytes::new(self.ahead.get()),
            free: Bytes::new(self.free.get()),
            quarantined: Bytes::new(self.quarantined.get()),
            held: Bytes::new(self.held.get()),
            budget: Bytes::new(self.budget.get()),
            pinned: Bytes::new(self.pinned.get()),
        }
    }

    /// All of it as plain data.
    pub fn snapshot(&self) -> Snapshot {
        // Counted last and read first, so that it is never more than all.
        let background = by_verb(&self.calls_beside);
        Snapshot {
            bytes: self.bytes(),
            slots: SlotCounts {
                active: self.active_slots.get(),
                parked: self.parked_slots.get(),
                max: self.max_slots.get(),
            },
            pins: self.pins.get(),
            extents: SizeClass::all()
                .map(|class| ClassStats {
                    granules: class.granules(),
                    free: self.free_extents[class.index()].get(),
                    mapped: self.mapped_extents[class.index()].get(),
                })
                .collect(),
            driver: by_verb(&self.calls),
            background,
            events: Events {
                steps: self.steps.get(),
                acquired: self.acquired.get(),
                adopted: self.adopted.get(),
                retired: self.retired.get(),
                reclaimed: self.reclaimed.get(),
                resized: self.resized.get(),
                rolled_back: self.rolled_back.get(),
                mapped_ahead: self.mapped_ahead.get(),
                background_failures: self.background_failures.get(),
                refused_drops: self.refused_drops.get(),
            },
            failures: ErrorKind::ALL
                .iter()
                .zip(&self.failures)
                .filter(|(_, count)| count.get() > 0)
                .map(|(kind, count)| (*kind, count.get()))
                .collect::<BTreeMap<_, _>>(),
        }
    }
}

fn by_verb(calls: &[Call; Verb::ALL.len()]) -> BTreeMap<Verb, CallStats> {
    Verb::ALL.iter().zip(calls).map(|(verb, call)| (*verb, call.stats())).collect()
}

/// Where `item` stands in the list of all of its type.
fn position<T: PartialEq>(all: &[T], item: T) -> usize {
    all.iter().position(|other| *other == item).expect("the list of all has every one")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_has_what_was_counted() {
        let counters = Counters::default();
        counters.count_call(Verb::Map, Duration::from_nanos(5), true);
        beside_the_path(|| counters.count_call(Verb::Map, Duration::from_nanos(6), false));
        counters.count_failure(ErrorKind::OutOfBudget);
        counters.held.add(10);
        counters.held.sub(4);
        let snapshot = counters.snapshot();
        assert_eq!(snapshot.driver[&Verb::Map], CallStats { calls: 2, failed: 1, nanoseconds: 11 });
        assert_eq!(snapshot.background[&Verb::Map], CallStats { calls: 1, failed: 1, nanoseconds: 6 });
        assert_eq!(snapshot.driver[&Verb::Create].calls, 0);
        assert_eq!(snapshot.failures, BTreeMap::from([(ErrorKind::OutOfBudget, 1)]));
        assert_eq!(snapshot.bytes.held, Bytes::new(6));
        let json: serde_json::Value = serde_json::from_str(&snapshot.to_json()).unwrap();
        assert_eq!(json["driver"]["map"]["calls"], 2);
        assert_eq!(json["failures"]["out_of_budget"], 1);
    }
}
