//! What each call costs, by the size of the handle.
//!
//! The times are those of the calls as this library makes them, which for CUDA includes making its
//! context current. A cycle calls each verb once, so the counters before and after it hold one call.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use vattn::Result;
use vattn::driver::Stream;
use vattn::driver::owned::{Event, PhysicalMemory, Reservation};
use vattn::error::Verb;
use vattn::units::{Bytes, Device, SizeClass};

use crate::Failure;
use crate::num::{float, percentile, wide};
use crate::probe::Subject;
use crate::probe::child::Teller;

/// The verbs of a cycle, in the order of a row's fields.
const CYCLE: [Verb; 5] = [Verb::Create, Verb::Map, Verb::SetAccess, Verb::Unmap, Verb::Release];
/// Beside each other in the addresses, so that a cycle does not meet the last one's page tables.
const PLACES: u64 = 16;
/// The first cycles, which set things up, are not counted.
const WARM_UP: usize = 3;
/// How many cycles there are even where time runs out, unless one takes very long.
const LEAST: usize = 50;

#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub(super) struct Latencies {
    /// Ascending by size.
    pub(super) by_size: Vec<Row>,
    /// Of one granule of addresses, like `free`.
    pub(super) reserve: Option<Call>,
    pub(super) free: Option<Call>,
    pub(super) memory_info: Option<Call>,
    pub(super) record_event: Option<Call>,
    pub(super) query_event: Option<Call>,
    pub(super) destroy_event: Option<Call>,
    /// Why larger sizes are missing.
    pub(super) refusal: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub(super) struct Row {
    pub(super) size_bytes: Bytes,
    pub(super) times: u64,
    pub(super) create: Spread,
    pub(super) map: Spread,
    pub(super) set_access: Spread,
    pub(super) unmap: Spread,
    pub(super) release: Spread,
}

/// A call that does not depend on a handle.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub(super) struct Call {
    pub(super) times: u64,
    #[serde(flatten)]
    pub(super) us: Spread,
}

/// How long it took, in microseconds.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub(super) struct Spread {
    #[serde(rename = "median_us")]
    pub(super) median: f64,
    #[serde(rename = "p99_us")]
    pub(super) p99: f64,
}

impl Spread {
    /// Of nanoseconds.
    fn of(mut samples: Vec<u64>) -> Self {
        samples.sort_unstable();
        let at = |percent| float(percentile(&samples, percent)) / 1e3;
        Self { median: at(50), p99: at(99) }
    }
}

pub(super) fn answer(
    subject: &Subject,
    time: Duration,
    quick: bool,
    teller: &mut Teller<'_>,
) -> Result<(), Failure> {
    let sizes = sizes(subject);
    let share = time / u32::try_from(sizes.len() + 3).unwrap_or(u32::MAX);
    let pace = Pace { times: if quick { 200 } else { 1000 }, share };
    let mut found = Latencies::default();
    events(subject, pace, &mut found)?;
    addresses(subject, pace, &mut found)?;
    teller.so_far(&found)?;
    for size in sizes {
        match row(subject, size, pace) {
            Ok(row) => found.by_size.push(row),
            Err(error) => {
                found.refusal = Some(error.report());
                break;
            }
        }
        teller.so_far(&found)?;
    }
    teller.done(&found)
}

/// The sizes that the cache's extents have; on the host, where size matters less, up to 32 granules.
fn sizes(subject: &Subject) -> Vec<Bytes> {
    let largest = match subject.driver.info().device {
        Device::Cuda(_) => SizeClass::LARGEST,
        Device::Cpu => SizeClass::new(5).unwrap_or(SizeClass::LARGEST),
    };
    let granule = subject.driver.info().granule;
    SizeClass::all()
        .filter(|class| *class <= largest)
        .map(|class| granule.to_bytes(class.granules()))
        .collect()
}

/// How often something is measured, and for how long.
#[derive(Clone, Copy, Debug)]
struct Pace {
    times: usize,
    share: Duration,
}

impl Pace {
    /// Runs cycles in which each verb is called once; the nanoseconds of each, by verb.
    fn measure<const N: usize>(
        self,
        subject: &Subject,
        verbs: [Verb; N],
        mut cycle: impl FnMut(u64) -> Result<()>,
    ) -> Result<[Vec<u64>; N]> {
        let spent = || {
            let driver = subject.counters.snapshot().driver;
            verbs.map(|verb| driver[&verb].nanoseconds)
        };
        let mut samples = verbs.map(|_| Vec::with_capacity(self.times));
        let start = Instant::now();
        for turn in 0..self.times + WARM_UP {
            let before = spent();
            cycle(wide(turn))?;
            let after = spent();
            if turn < WARM_UP {
                continue;
            }
            for ((samples, after), before) in samples.iter_mut().zip(after).zip(before) {
                samples.push(after - before);
            }
            let elapsed = start.elapsed();
            if elapsed > self.share && turn >= LEAST + WARM_UP || elapsed > self.share * 3 {
                break;
            }
        }
        Ok(samples)
    }
}

fn row(subject: &Subject, size: Bytes, pace: Pace) -> Result<Row> {
    let addresses = Reservation::new(&subject.driver, size * PLACES)?;
    let samples = pace.measure(subject, CYCLE, |turn| {
        let memory = PhysicalMemory::new(&subject.driver, size)?;
        addresses.map(size * (turn % PLACES), &memory)?.unmap().map_err(|(_, error)| error)?;
        memory.release().map_err(|(_, error)| error)
    })?;
    let times = wide(samples[0].len());
    let [create, map, set_access, unmap, release] = samples.map(Spread::of);
    Ok(Row { size_bytes: size, times, create, map, set_access, unmap, release })
}

fn call(samples: Vec<u64>) -> Option<Call> {
    Some(Call { times: wide(samples.len()), us: Spread::of(samples) })
}

fn events(subject: &Subject, pace: Pace, found: &mut Latencies) -> Result<()> {
    let verbs = [Verb::RecordEvent, Verb::QueryEvent, Verb::DestroyEvent];
    let [record, query, destroy] =
        pace.measure(subject, verbs, |_| Event::record(&subject.driver, Stream::LEGACY)?.query().map(drop))?;
    (found.record_event, found.query_event, found.destroy_event) = (call(record), call(query), call(destroy));
    Ok(())
}

fn addresses(subject: &Subject, pace: Pace, found: &mut Latencies) -> Result<()> {
    let verbs = [Verb::Reserve, Verb::Free, Verb::MemoryInfo];
    let [reserve, free, info] = pace.measure(subject, verbs, |_| {
        drop(Reservation::new(&subject.driver, subject.granule())?);
        subject.driver.memory_info().map(drop)
    })?;
    (found.reserve, found.free, found.memory_info) = (call(reserve), call(free), call(info));
    Ok(())
}
