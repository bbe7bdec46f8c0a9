//! What requests wait for of the driver's time.
//!
//! Owns the split of what a driver has counted. What a call of the policy asks of it is on the path, since
//! requests wait for the call; what tending the policy asks is beside it while the model runs. Tending
//! that takes longer than an iteration delays the next call, so the rest counts as that call's. Refuses
//! to know policies and prices: it is handed a clock that says what was counted so far. The clock is
//! read between calls, so that no call's wall time contains it.

use std::fmt;
use std::time::{Duration, Instant};

use vattn::Result;

use crate::device::{DriverCalls, Spent};

/// What was counted so far.
pub(crate) type Clock<'a> = &'a dyn Fn() -> Spent;

/// What a driver counted, by who waited for it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Split {
    pub(crate) on_path: Duration,
    pub(crate) off_path: Duration,
    /// The most that one call on the path waited for.
    pub(crate) longest_stall: Duration,
    pub(crate) calls_off_path: DriverCalls,
}

/// Reads the clock around each call of a policy.
pub(crate) struct Meter<'a> {
    clock: Clock<'a>,
    iteration: Duration,
    /// As of the end of the last call.
    seen: Spent,
    /// What tending has still to do when the model is done.
    late: Duration,
    split: Split,
}

impl<'a> Meter<'a> {
    /// What was counted before is nobody's.
    pub(crate) fn new(clock: Clock<'a>, iteration: Duration) -> Self {
        Self { clock, iteration, seen: clock(), late: Duration::ZERO, split: Split::default() }
    }

    /// A call that requests wait for, and its wall time.
    pub(crate) fn on_path<T>(&mut self, call: impl FnOnce() -> Result<T>) -> Result<(T, Duration)> {
        let start = Instant::now();
        let answer = call()?;
        let wall = start.elapsed();
        let stall = std::mem::take(&mut self.late) + self.advance().modelled;
        self.split.on_path += stall;
        self.split.longest_stall = self.split.longest_stall.max(stall);
        Ok((answer, wall))
    }

    /// A call beside the model, which runs for an iteration.
    pub(crate) fn off_path(&mut self, call: impl FnOnce() -> Result<()>) -> Result<()> {
        call()?;
        let new = self.advance();
        let work = self.late + new.modelled;
        let beside = work.min(self.iteration);
        self.split.off_path += beside;
        self.late = work - beside;
        self.split.calls_off_path = self.split.calls_off_path + new.calls;
        Ok(())
    }

    /// The split, once there are no more calls: what is late then, nobody waits for.
    pub(crate) fn finish(&self) -> Split {
        Split { off_path: self.split.off_path + self.late, ..self.split }
    }

    fn advance(&mut self) -> Spent {
        let now = (self.clock)();
        let new = now - self.seen;
        self.seen = now;
        new
    }
}

impl fmt::Debug for Meter<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Meter").field("split", &self.split).field("late", &self.late).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// A clock that calls put forward, by a millisecond a map.
    #[derive(Default)]
    struct Maps(Cell<u64>);

    impl Maps {
        fn read(&self) -> Spent {
            let map = self.0.get();
            Spent {
                calls: DriverCalls { map, ..DriverCalls::default() },
                modelled: Duration::from_millis(map),
            }
        }

        fn make(&self, maps: u64) -> Result<()> {
            self.0.set(self.0.get() + maps);
            Ok(())
        }
    }

    /// Calls of so many maps, on the path or off it, in iterations of 10 ms; 100 maps come before.
    fn split(calls: &[(bool, u64)]) -> Split {
        let maps = Maps::default();
        maps.make(100).unwrap();
        let clock = || maps.read();
        let mut meter = Meter::new(&clock, 10 * MS);
        for &(on_path, count) in calls {
            if on_path {
                meter.on_path(|| maps.make(count)).unwrap();
            } else {
                meter.off_path(|| maps.make(count)).unwrap();
            }
        }
        let split = meter.finish();
        let spent = split.on_path + split.off_path + 100 * MS;
        assert_eq!(spent, maps.read().modelled, "nothing is lost and nothing counts twice");
        split
    }

    #[test]
    fn a_call_on_the_path_is_waited_for_and_one_beside_the_model_is_not() {
        let split = split(&[(true, 3), (false, 7), (true, 5), (true, 1), (false, 2)]);
        assert_eq!((split.on_path, split.off_path, split.longest_stall), (9 * MS, 9 * MS, 5 * MS));
        assert_eq!(split.calls_off_path, DriverCalls { map: 9, ..DriverCalls::default() });
    }

    #[test]
    fn the_next_call_waits_for_what_takes_longer_than_the_model() {
        let split = split(&[(true, 3), (false, 14), (true, 1), (true, 4)]);
        assert_eq!((split.on_path, split.off_path, split.longest_stall), (12 * MS, 10 * MS, 5 * MS));
        assert_eq!(split.calls_off_path.map, 14);
    }

    #[test]
    fn what_is_late_is_made_up_for_where_nobody_calls() {
        assert_eq!(split(&[(false, 14), (false, 1), (true, 0)]).longest_stall, Duration::ZERO);
        assert_eq!(split(&[(false, 14), (false, 8), (true, 0)]).longest_stall, 2 * MS);
        assert_eq!(split(&[(false, 14)]).off_path, 14 * MS);
    }
}
