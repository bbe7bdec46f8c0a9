//! What a replay looked like over time.
//!
//! Owns how samples are merged: a series has at most [`MOST`] buckets of equal length, however long
//! the run. When time goes beyond the last, neighbours become one and the length doubles. Peaks
//! survive, since a bucket keeps the least and the most of what it saw; of times it keeps how they
//! are spread. Refuses to know who draws it.

use std::time::Duration;

use vattn::units::Bytes;

use crate::device::{Spent, VERBS};
use crate::server::{Pace, Sample};

/// How many buckets a series has at most.
pub(crate) const MOST: usize = 2048;

/// The least, the most and the last value of a figure.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Range {
    pub(crate) least: u64,
    pub(crate) most: u64,
    pub(crate) last: u64,
}

impl Range {
    fn of(value: u64) -> Self {
        Self { least: value, most: value, last: value }
    }

    fn merge(&mut self, later: Self) {
        self.least = self.least.min(later.least);
        self.most = self.most.max(later.most);
        self.last = later.last;
    }
}

/// How times are spread: their number in classes of a quarter of a power of two, their sum and the
/// longest.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Spread {
    counts: Vec<u64>,
    sum: u64,
    most: u64,
}

impl Spread {
    fn add(&mut self, ns: u64) {
        let class = Self::class(ns);
        if self.counts.len() <= class {
            self.counts.resize(class + 1, 0);
        }
        self.counts[class] += 1;
        self.sum = self.sum.saturating_add(ns);
        self.most = self.most.max(ns);
    }

    fn merge(&mut self, other: &Self) {
        if self.counts.len() < other.counts.len() {
            self.counts.resize(other.counts.len(), 0);
        }
        for (count, more) in self.counts.iter_mut().zip(&other.counts) {
            *count += more;
        }
        self.sum = self.sum.saturating_add(other.sum);
        self.most = self.most.max(other.most);
    }

    /// The class of 0 holds it alone; every power of two has four.
    fn class(ns: u64) -> usize {
        let Some(power) = ns.checked_ilog2() else { return 0 };
        let quarter = if power < 2 { 0 } else { (ns >> (power - 2)) & 3 };
        usize::try_from(1 + 4 * u64::from(power) + quarter).expect("there are 257 classes")
    }

    /// The longest time; `None` where there is none at all.
    pub(crate) fn most(&self) -> Option<u64> {
        (!self.counts.is_empty()).then_some(self.most)
    }

    fn number(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// The mean; `None` where there is no time at all.
    pub(crate) fn mean(&self) -> Option<u64> {
        self.sum.checked_div(self.number())
    }

    /// The median, to an eighth; `None` where there is no time at all.
    pub(crate) fn median(&self) -> Option<u64> {
        let half = self.number().div_ceil(2);
        let mut below = 0;
        let class = self.counts.iter().position(|count| {
            below += count;
            below >= half.max(1)
        })?;
        let Some(place) = class.checked_sub(1) else { return Some(0) };
        let power = u32::try_from(place / 4).expect("there are 64 powers");
        let quarter = u64::try_from(place % 4).expect("a quarter is below 4");
        let low = 1_u64 << power;
        let width = low >> 2;
        Some((low + width * quarter + width / 2).min(self.most))
    }
}

/// What was seen of what has a value at every moment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Gauges {
    pub(crate) needed: Range,
    pub(crate) mapped: Range,
    /// Mapped and parked together, where the policy tells what is parked.
    pub(crate) kept: Option<Range>,
    pub(crate) held: Range,
    pub(crate) active: Range,
    pub(crate) waiting: Range,
}

impl Gauges {
    fn of(sample: &Sample) -> Self {
        let range = |bytes: Bytes| Range::of(bytes.get());
        let usage = sample.usage;
        Self {
            needed: range(usage.needed),
            mapped: range(usage.mapped),
            kept: usage.parked.map(|parked| range(usage.mapped + parked)),
            held: range(usage.held),
            active: Range::of(sample.active),
            waiting: Range::of(sample.waiting),
        }
    }

    fn merge(&mut self, later: Self) {
        self.needed.merge(later.needed);
        self.mapped.merge(later.mapped);
        if let (Some(kept), Some(later)) = (&mut self.kept, later.kept) {
            kept.merge(later);
        }
        self.held.merge(later.held);
        self.active.merge(later.active);
        self.waiting.merge(later.waiting);
    }

    /// What comes after it while nothing happens.
    fn still(&self) -> Self {
        let still = |range: Range| Range::of(range.last);
        Self {
            needed: still(self.needed),
            mapped: still(self.mapped),
            kept: self.kept.map(still),
            held: still(self.held),
            active: still(self.active),
            waiting: still(self.waiting),
        }
    }
}

/// What was seen in a stretch of time.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Bucket {
    pub(crate) gauges: Gauges,
    /// Modelled nanoseconds of the driver's calls in an iteration.
    pub(crate) driver: Spread,
    /// Wall nanoseconds of a step.
    pub(crate) step: Spread,
    /// Calls of the driver by verb.
    pub(crate) calls: [u64; VERBS],
}

impl Bucket {
    fn of(sample: &Sample, calls: [u64; VERBS], modelled: u64) -> Self {
        let (mut driver, mut step) = (Spread::default(), Spread::default());
        if sample.pace != Pace::Idle {
            driver.add(modelled);
        }
        if let Pace::Step(ns) = sample.pace {
            step.add(ns);
        }
        Self { gauges: Gauges::of(sample), driver, step, calls }
    }

    /// What a stretch is like in which nothing happens.
    fn quiet(gauges: Gauges) -> Self {
        Self { gauges, driver: Spread::default(), step: Spread::default(), calls: [0; VERBS] }
    }

    fn merge(&mut self, later: &Self) {
        self.gauges.merge(later.gauges);
        self.driver.merge(&later.driver);
        self.step.merge(&later.step);
        for (count, more) in self.calls.iter_mut().zip(later.calls) {
            *count += more;
        }
    }
}

/// A run's buckets.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Series {
    /// Nanoseconds of a bucket.
    width: u64,
    /// `None` where nothing was seen, because time jumped.
    buckets: Vec<Option<Bucket>>,
    /// Calls before the first sample, and up to the last.
    before: [u64; VERBS],
    so_far: [u64; VERBS],
    /// Modelled nanoseconds up to the last sample.
    modelled: u64,
}

/// Equal stretches of time with something in each.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Columns {
    /// Nanoseconds of a column.
    pub(crate) width: u64,
    pub(crate) columns: Vec<Bucket>,
}

impl Series {
    /// A series without a sample, of a policy that has already asked so much of the driver. A bucket is as long
    /// as a step until there are too many of them.
    pub(crate) fn new(step: u64, spent: Spent) -> Self {
        let before = spent.calls.counts();
        Self {
            width: step.max(1),
            buckets: Vec::new(),
            before,
            so_far: before,
            modelled: nanoseconds(spent.modelled),
        }
    }

    /// Takes a sample, no earlier than the last, and what the driver has counted up to then.
    pub(crate) fn record(&mut self, sample: &Sample, spent: Spent) {
        let (calls, modelled) = (spent.calls.counts(), nanoseconds(spent.modelled));
        let new = std::array::from_fn(|verb| calls[verb] - self.so_far[verb]);
        let bucket = Bucket::of(sample, new, modelled - self.modelled);
        (self.so_far, self.modelled) = (calls, modelled);
        let place = loop {
            match usize::try_from(sample.at / self.width) {
                Ok(place) if place < MOST => break place,
                _ => self.halve(),
            }
        };
        if self.buckets.len() <= place {
            self.buckets.resize(place + 1, None);
        }
        match &mut self.buckets[place] {
            Some(there) => there.merge(&bucket),
            empty => *empty = Some(bucket),
        }
    }

    fn halve(&mut self) {
        self.width = self.width.saturating_mul(2);
        self.buckets = self.buckets.chunks(2).map(merged).collect();
    }

    /// Calls before the first sample.
    pub(crate) fn calls_before(&self) -> [u64; VERBS] {
        self.before
    }

    /// Calls from the first sample to the last.
    pub(crate) fn calls_during(&self) -> [u64; VERBS] {
        std::array::from_fn(|verb| self.so_far[verb] - self.before[verb])
    }

    /// Everything up to `end` nanoseconds in at most `most` columns.
    pub(crate) fn columns(&self, end: u64, most: usize) -> Columns {
        let shown = usize::try_from(end.div_ceil(self.width)).unwrap_or(usize::MAX);
        let shown = &self.buckets[..self.buckets.len().min(shown)];
        let share = shown.len().div_ceil(most.max(1)).max(1);
        let mut columns: Vec<Bucket> = Vec::new();
        for chunk in shown.chunks(share) {
            match (merged(chunk), columns.last()) {
                (Some(bucket), _) => columns.push(bucket),
                (None, Some(last)) => columns.push(Bucket::quiet(last.gauges.still())),
                // There is always a first sample, at 0.
                (None, None) => {}
            }
        }
        let width = self.width.saturating_mul(u64::try_from(share).unwrap_or(u64::MAX));
        Columns { width, columns }
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// Neighbours as one.
fn merged(chunk: &[Option<Bucket>]) -> Option<Bucket> {
    let mut buckets = chunk.iter().flatten();
    let mut whole = buckets.next()?.clone();
    buckets.for_each(|bucket| whole.merge(bucket));
    Some(whole)
}

#[cfg(test)]
mod tests;
