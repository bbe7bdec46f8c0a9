//! From values to places on an axis, with round ticks.

use crate::num::{float, whole};
use crate::report::count;

/// An axis: 0 is its low end and 1 its high end.
#[derive(Clone, Debug)]
pub(super) struct Scale {
    low: f64,
    high: f64,
    logarithmic: bool,
    /// Values with their labels, ascending; a tick without a label is a line only.
    pub(super) ticks: Vec<(f64, String)>,
}

/// How much of a linear axis is left above the highest value, so that its line is seen whole.
const HEADROOM: f64 = 1.04;

impl Scale {
    fn linear(top: f64, step: f64, label: impl Fn(f64) -> String) -> Self {
        let mut ticks: Vec<(f64, String)> = Vec::new();
        let mut tick = 0.0;
        while tick <= top * (1.0 + 1e-9) {
            ticks.push((tick, label(tick)));
            tick += step;
        }
        Self { low: 0.0, high: top * HEADROOM, logarithmic: false, ticks }
    }

    /// Bytes from 0 to `top`, in steps of a power of two, of which there are up to four.
    pub(super) fn bytes(top: u64) -> Self {
        let step = binary_step(top);
        let top = top.max(1);
        let (unit, name) = unit(step);
        let last = top / step;
        Self::linear(float(top), float(step), |bytes| {
            let number = count(whole(bytes) / unit);
            if whole(bytes) / step == last { format!("{number} {name}") } else { number }
        })
    }

    /// A count from 0 to `top`, in round steps.
    pub(super) fn counts(top: f64) -> Self {
        let top = top.max(1.0);
        Self::linear(top, round_step(top / 5.0).max(1.0), |number| count(whole(number)))
    }

    /// Time from 0 to `end` nanoseconds, with about as many ticks as are wanted.
    pub(super) fn time(end: u64, ticks: u32) -> Self {
        let end = float(end.max(1));
        let (unit, name) = match end / 1e9 {
            seconds if seconds >= 4.0 * DAY => (DAY, "d"),
            seconds if seconds >= 4.0 * HOUR => (HOUR, "h"),
            seconds if seconds >= 1.0 => (1.0, "s"),
            _ => (1e-3, "ms"),
        };
        let span = end / 1e9 / unit;
        let step = round_step(span / f64::from(ticks));
        let last = (span / step * (1.0 + 1e-9)).floor() * step;
        let digits = if step < 1.0 { 1 } else { 0 };
        let mut scale = Self::linear(span, step, |number| {
            let text = if digits == 0 { count(whole(number)) } else { format!("{number:.digits$}") };
            if number > last - step / 2.0 { format!("{text} {name}") } else { text }
        });
        for (tick, _) in &mut scale.ticks {
            *tick *= unit * 1e9;
        }
        Self { high: end, ..scale }
    }

    /// Nanoseconds by decades, from the one that `least` lies in to `most`, and at least two of them.
    pub(super) fn decades(least: u64, most: u64) -> Self {
        let low = least.max(1).ilog10();
        let high = (float(most) * 1.25).max(float(10_u64.saturating_pow(low + 2)));
        let tens = || (low..20).map(|power| (power, 10_f64.powf(f64::from(power))));
        let shown = tens().take_while(|(_, ns)| *ns <= high).count();
        let every = if shown > 5 { 2 } else { 1 };
        let ticks = tens()
            .take(shown)
            .map(|(power, ns)| {
                let named = (power - low).is_multiple_of(every);
                (ns, if named { decade(power) } else { String::new() })
            })
            .collect();
        Self { low: 10_f64.powf(f64::from(low)), high, logarithmic: true, ticks }
    }

    /// Where a value lies, from 0 to 1; what is beyond an end lies on it.
    pub(super) fn place(&self, value: f64) -> f64 {
        let place = if self.logarithmic {
            (value.max(self.low) / self.low).ln() / (self.high / self.low).ln()
        } else {
            value / self.high
        };
        place.clamp(0.0, 1.0)
    }
}

const HOUR: f64 = 3600.0;
const DAY: f64 = 24.0 * HOUR;

/// The power of two that goes into `top` up to four times.
pub(super) fn binary_step(top: u64) -> u64 {
    top.max(1).div_ceil(4).next_power_of_two()
}

/// The largest unit that is not above the step, and its name.
pub(super) fn unit(step: u64) -> (u64, &'static str) {
    const UNITS: [(u32, &str); 4] = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    let found = UNITS.into_iter().find(|(shift, _)| step >> shift > 0);
    found.map_or((1, "B"), |(shift, name)| (1 << shift, name))
}

/// The least of 1, 2 and 5 times a power of ten that is not below.
fn round_step(least: f64) -> f64 {
    let power = 10_f64.powf(least.log10().floor());
    [1.0, 2.0, 5.0]
        .into_iter()
        .map(|digit| digit * power)
        .find(|step| *step >= least * (1.0 - 1e-9))
        .unwrap_or(10.0 * power)
}

/// 10^power nanoseconds.
fn decade(power: u32) -> String {
    let (unit, zeros) = match power {
        0..3 => ("ns", power),
        3..6 => ("µs", power - 3),
        6..9 => ("ms", power - 6),
        _ => ("s", power - 9),
    };
    format!("{} {unit}", count(10_u64.saturating_pow(zeros)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(scale: &Scale) -> Vec<&str> {
        scale.ticks.iter().map(|(_, label)| label.as_str()).collect()
    }

    #[test]
    fn bytes_have_binary_ticks_and_one_unit() {
        assert_eq!(labels(&Scale::bytes(64 << 30)), ["0", "16", "32", "48", "64 GiB"]);
        assert_eq!(labels(&Scale::bytes(33 << 30)), ["0", "16", "32 GiB"]);
        assert_eq!(labels(&Scale::bytes(3 << 29)), ["0", "512", "1,024", "1,536 MiB"]);
        assert_eq!(labels(&Scale::bytes(0)), ["0", "1 B"]);
        assert!(labels(&Scale::bytes(u64::MAX)).len() < 6);
    }

    #[test]
    fn counts_and_times_have_decimal_ticks() {
        assert_eq!(labels(&Scale::counts(88.0)), ["0", "20", "40", "60", "80"]);
        assert_eq!(labels(&Scale::counts(1911.0)), ["0", "500", "1,000", "1,500"]);
        assert_eq!(labels(&Scale::counts(0.0)), ["0", "1"]);
        let second = 1_000_000_000;
        assert_eq!(labels(&Scale::time(377 * second, 4)), ["0", "100", "200", "300 s"]);
        assert_eq!(labels(&Scale::time(3512 * second, 4)), ["0", "1,000", "2,000", "3,000 s"]);
        assert_eq!(labels(&Scale::time(100_000 * second, 4)), ["0", "10", "20 h"]);
        assert_eq!(labels(&Scale::time(second * 3 / 2, 4)), ["0.0", "0.5", "1.0", "1.5 s"]);
        assert_eq!(labels(&Scale::time(0, 4)).len(), 3);
    }

    #[test]
    fn decades_are_named_up_to_the_longest() {
        assert_eq!(labels(&Scale::decades(1000, 2_000_000)), ["1 µs", "10 µs", "100 µs", "1 ms"]);
        assert_eq!(labels(&Scale::decades(31, 4_000_000)), ["10 ns", "", "1 µs", "", "100 µs", ""]);
        assert_eq!(labels(&Scale::decades(0, 0)), ["1 ns", "10 ns", "100 ns"]);
        assert!(labels(&Scale::decades(1, u64::MAX)).len() > 18);
    }

    #[test]
    fn places_go_from_end_to_end() {
        let linear = Scale::counts(100.0);
        assert!(linear.place(0.0).abs() < 1e-9 && (linear.place(104.0) - 1.0).abs() < 1e-9);
        let decades = Scale::decades(1000, 800_000);
        assert!(decades.place(0.0).abs() < 1e-9, "none lies at the foot");
        assert!((decades.place(1_000_000.0) - 1.0).abs() < 1e-9);
        assert!((decades.place(10_000.0) - 1.0 / 3.0).abs() < 1e-9);
    }
}
