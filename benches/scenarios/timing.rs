//! Samples of one quantity, and the time that a scenario may take.

use std::cell::Cell;
use std::time::{Duration, Instant};

/// How long each of many runs took.
#[derive(Clone, Debug, Default)]
pub(crate) struct Samples(Vec<Duration>);

impl Samples {
    pub(crate) fn push(&mut self, sample: Duration) {
        self.0.push(sample);
    }

    /// Times a call.
    pub(crate) fn time<T>(&mut self, call: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = call();
        self.push(start.elapsed());
        result
    }

    pub(crate) fn last(&self) -> Duration {
        self.0.last().copied().unwrap_or_default()
    }

    pub(crate) fn first(&self) -> Duration {
        self.0.first().copied().unwrap_or_default()
    }

    /// All but the first.
    pub(crate) fn after_first(&self) -> Self {
        Self(self.0.get(1..).unwrap_or_default().to_vec())
    }

    pub(crate) fn count(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn sum(&self) -> Duration {
        self.0.iter().sum()
    }

    /// The sample that so many of 1,000 lie below; zero of none.
    pub(crate) fn at(&self, permille: usize) -> Duration {
        let mut sorted = self.0.clone();
        sorted.sort_unstable();
        let place = (sorted.len() * permille / 1000).min(sorted.len().saturating_sub(1));
        sorted.get(place).copied().unwrap_or_default()
    }

    pub(crate) fn median(&self) -> Duration {
        self.at(500)
    }

    pub(crate) fn max(&self) -> Duration {
        self.0.iter().max().copied().unwrap_or_default()
    }
}

/// How many times as long as `other` it took.
pub(crate) fn ratio(took: Duration, other: Duration) -> f64 {
    took.as_secs_f64() / other.as_secs_f64()
}

/// When a scenario is to come to an end.
#[derive(Debug)]
pub(crate) struct Limit {
    start: Instant,
    most: Duration,
    cut: Cell<bool>,
}

impl Limit {
    pub(crate) fn seconds(seconds: u64) -> Self {
        Self { start: Instant::now(), most: Duration::from_secs(seconds), cut: Cell::new(false) }
    }

    pub(crate) fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }

    /// Whether the time is up; remembers that it was.
    pub(crate) fn is_over(&self) -> bool {
        let over = self.elapsed() > self.most;
        self.cut.set(self.cut.get() || over);
        over
    }

    /// A sentence for a table that was cut short.
    pub(crate) fn note(&self) -> Option<String> {
        self.cut
            .get()
            .then(|| format!("Cut short after {} s: rows are missing or of fewer runs.", self.most.as_secs()))
    }
}
