//! What a replay shows: JSON for programs, a table for people.
//!
//! The names in the JSON are a contract; a field is never renamed.

use std::fmt::Write;

use serde::Serialize;
use vattn::units::Bytes;

use crate::device::{Books, DriverCalls, Leaked};
use crate::meter::Split;
use crate::model::Plan;
use crate::num::{float, percentile, wide};
use crate::server::Outcome;
use crate::trace::Trace;

/// One policy's replay.
///
/// Driver calls, modelled seconds and leaks are of the policy's whole life: made, used, dropped. The
/// modelled seconds are the sum of three: on the path, off it, at the start and the end.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) driver: &'static str,
    pub(crate) policy: &'static str,
    pub(crate) model: String,
    pub(crate) layout: String,
    pub(crate) trace: String,
    pub(crate) requests: u64,
    pub(crate) completed: u64,
    pub(crate) rejected: u64,
    pub(crate) preempted: u64,
    /// Iterations of the server.
    pub(crate) steps: u64,
    pub(crate) simulated_seconds: f64,
    pub(crate) driver_calls: DriverCalls,
    pub(crate) modelled_driver_seconds: f64,
    pub(crate) step_ns: StepTimes,
    pub(crate) bytes: Peaks,
    pub(crate) mapped_over_needed: f64,
    pub(crate) held_over_needed: f64,
    pub(crate) active_slots: ActiveSlots,
    pub(crate) adopted: u64,
    pub(crate) reclaimed: u64,
    pub(crate) leaked: Leaked,
    pub(crate) device: String,
    pub(crate) budget_bytes: Bytes,
    pub(crate) device_free_bytes: Free,
    /// Modelled seconds that requests waited for: in calls that admit, step and retire. What a policy does
    /// beside the model and has not done when the model is, the next call waits for: it is part of this.
    pub(crate) driver_seconds_on_path: f64,
    /// Modelled seconds beside the model: what vattn does when it is tended, and what the thread of
    /// vattention-ahead does.
    pub(crate) driver_seconds_off_path: f64,
    /// Modelled seconds before the first request and after the last: what making and dropping the policy
    /// takes.
    pub(crate) driver_seconds_start_and_end: f64,
    /// The most of the modelled seconds on the path that one call waited for.
    pub(crate) longest_stall_seconds: f64,
    /// The calls off the path, whether the next call waited for them or not.
    pub(crate) driver_calls_off_path: DriverCalls,
}

/// What a policy was given to run on.
#[derive(Clone, Debug)]
pub(crate) struct Used {
    pub(crate) driver: &'static str,
    pub(crate) device: String,
    pub(crate) budget: Bytes,
    pub(crate) free: Free,
}

/// What the device said was free, before the policy was made and after it was dropped.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub(crate) struct Free {
    pub(crate) before: Bytes,
    pub(crate) after: Bytes,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub(crate) struct StepTimes {
    pub(crate) p50: u64,
    pub(crate) p99: u64,
    pub(crate) max: u64,
}

#[derive(Clone, Copy, Debug, Serialize)]
#[expect(clippy::struct_field_names, reason = "the names are the JSON's")]
pub(crate) struct Peaks {
    pub(crate) peak_needed: Bytes,
    pub(crate) peak_mapped: Bytes,
    pub(crate) peak_held: Bytes,
}

#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct ActiveSlots {
    pub(crate) mean: f64,
    pub(crate) peak: u64,
}

impl StepTimes {
    /// Exact, by nearest rank; sorts what it is given.
    fn of(samples: &mut [u64]) -> Self {
        samples.sort_unstable();
        let rank = |percent| percentile(samples, percent);
        Self { p50: rank(50), p99: rank(99), max: rank(100) }
    }
}

impl Report {
    pub(crate) fn new(
        used: Used,
        policy: &'static str,
        plan: &Plan,
        trace: &Trace,
        outcome: &mut Outcome,
        books: &Books,
        (adopted, reclaimed): (u64, u64),
    ) -> Self {
        let Split { on_path, off_path, longest_stall, calls_off_path } = outcome.split;
        let modelled = books.spent.modelled;
        Self {
            driver: used.driver,
            policy,
            model: plan.model.clone(),
            layout: plan.config.layout().to_string(),
            trace: trace.name.clone(),
            requests: wide(trace.requests.len()),
            completed: outcome.completed,
            rejected: outcome.rejected,
            preempted: outcome.preempted,
            steps: outcome.iterations,
            simulated_seconds: float(outcome.simulated) / 1e9,
            driver_calls: books.spent.calls,
            modelled_driver_seconds: modelled.as_secs_f64(),
            step_ns: StepTimes::of(&mut outcome.step_ns),
            bytes: Peaks {
                peak_needed: outcome.peak_needed,
                peak_mapped: outcome.peak_mapped,
                peak_held: outcome.peak_held,
            },
            mapped_over_needed: outcome.mapped_over_needed,
            held_over_needed: outcome.held_over_needed,
            active_slots: ActiveSlots { mean: outcome.mean_active, peak: outcome.peak_active },
            adopted,
            reclaimed,
            leaked: books.live,
            device: used.device,
            budget_bytes: used.budget,
            device_free_bytes: used.free,
            driver_seconds_on_path: on_path.as_secs_f64(),
            driver_seconds_off_path: off_path.as_secs_f64(),
            driver_seconds_start_and_end: (modelled - on_path - off_path).as_secs_f64(),
            longest_stall_seconds: longest_stall.as_secs_f64(),
            driver_calls_off_path: calls_off_path,
        }
    }

    /// As one JSON object on one line.
    pub(crate) fn to_json(&self) -> String {
        serde_json::to_string(self).expect("plain data with string keys is always JSON")
    }

    /// What leaked, if something did.
    pub(crate) fn leak(&self) -> Option<String> {
        let Leaked { extents, mappings, reservations } = self.leaked;
        (self.leaked != Leaked::default()).then(|| {
            format!(
                "policy {} leaked {extents} extents, {mappings} mappings and {reservations} reservations",
                self.policy
            )
        })
    }
}

/// A line of the table: its name, and a policy's figure in it.
pub(crate) type Row = (&'static str, fn(&Report) -> String);

/// What the table always shows, in groups.
pub(crate) const ROWS: &[&[Row]] = &[
    &[
        ("requests completed", |r| count(r.completed)),
        ("requests rejected: they could never fit", |r| count(r.rejected)),
        ("preemptions: out of memory while growing", |r| count(r.preempted)),
        ("time to serve them all, simulated seconds", |r| format!("{:.1}", r.simulated_seconds)),
        ("requests in service at once, mean", |r| format!("{:.1}", r.active_slots.mean)),
        ("requests in service at once, peak", |r| count(r.active_slots.peak)),
    ],
    &[
        ("memory that live tokens fill, peak GiB", |r| gib(r.bytes.peak_needed)),
        ("memory mapped for them, peak GiB", |r| gib(r.bytes.peak_mapped)),
        ("memory taken from the device, peak GiB", |r| gib(r.bytes.peak_held)),
        ("bytes mapped per byte needed, mean over time", |r| format!("{:.3}", r.mapped_over_needed)),
        ("bytes taken per byte needed, mean over time", |r| format!("{:.2}", r.held_over_needed)),
    ],
    &[
        ("driver calls: create memory", |r| count(r.driver_calls.create)),
        ("driver calls: map", |r| count(r.driver_calls.map)),
        ("driver calls: unmap", |r| count(r.driver_calls.unmap)),
        ("driver time if this were an H200, ms", |r| millis(r.modelled_driver_seconds)),
        ("... that requests waited for, ms", |r| millis(r.driver_seconds_on_path)),
        ("... while the model ran, ms", |r| millis(r.driver_seconds_off_path)),
        ("... before the first and after the last, ms", |r| millis(r.driver_seconds_start_and_end)),
        ("the longest wait for the driver, ms", |r| format!("{:.3}", r.longest_stall_seconds * 1e3)),
        ("requests that took over mapped memory", |r| count(r.adopted)),
        ("mappings taken away for another request", |r| count(r.reclaimed)),
    ],
    &[
        ("a step here, wall time, median µs", |r| micros(r.step_ns.p50)),
        ("a step here, wall time, 99th percentile µs", |r| micros(r.step_ns.p99)),
        ("leaked extents, mappings and reservations", |r| {
            count(r.leaked.extents + r.leaked.mappings + r.leaked.reservations)
        }),
    ],
];

/// What is shown beside [`ROWS`] where others use the device too, so that what they do is seen.
const ROWS_OF_A_CARD: &[Row] = &[
    ("free on the card before, GiB", |r| gib(r.device_free_bytes.before)),
    ("free on the card after all was given back, GiB", |r| gib(r.device_free_bytes.after)),
];

const NOTES: &str = "\
All columns serve the same requests with the same simulated server, so they differ only in how memory
is managed. Fewer seconds and fewer preemptions mean that more requests fitted at once. A mapped/needed
of 1.00 would waste nothing. Driver time is what the calls cost where they were measured, on an H200;
calls to make memory at the start and to give it back at the end are part of it. Requests wait for what
admitting, stepping and retiring them asks of the driver, and for nothing that is done while the model
runs, unless that takes longer. A step is one call a server makes each iteration. It is the only row
that depends on this machine.
";

const NOTES_OF_A_CARD: &str = "What is free is the card's own count, and depends on whoever else uses it.\n";

impl Report {
    /// What the table shows of it, in groups.
    pub(crate) fn rows(&self) -> impl Iterator<Item = &'static [Row]> + use<> {
        ROWS.iter().copied().chain(self.on_a_card().then_some(ROWS_OF_A_CARD))
    }

    /// What the figures mean, in lines.
    pub(crate) fn notes(&self) -> String {
        format!("{NOTES}{}", if self.on_a_card() { NOTES_OF_A_CARD } else { "" })
    }

    fn on_a_card(&self) -> bool {
        self.driver == "cuda"
    }
}

/// The table, with a head that says what was replayed and a foot that says what it means.
pub(crate) fn text(reports: &[Report], description: Option<&str>) -> String {
    let Some(first) = reports.first() else { return String::new() };
    let mut out = String::new();
    // Writing to a string never fails.
    let _ = writeln!(
        out,
        "{} requests ({}) on {}, layout {}, budget {}, driver {}\n",
        count(first.requests),
        first.trace,
        first.model,
        first.layout,
        first.budget_bytes,
        first.device
    );
    if let Some(description) = description {
        let _ = writeln!(out, "The trace is generated: {description}.\n");
    }
    let label = first.rows().flatten().map(|row| row.0.chars().count()).max().unwrap_or(0);
    let width = reports.iter().map(|report| report.policy.len()).max().unwrap_or(0).max(12);
    let _ = write!(out, "{:label$}", "");
    for report in reports {
        let _ = write!(out, "  {:>width$}", report.policy);
    }
    out.push('\n');
    for group in first.rows() {
        let _ = writeln!(out, "{}", "-".repeat(label + reports.len() * (width + 2)));
        for (name, value) in group {
            let _ = write!(out, "{name:label$}");
            for report in reports {
                let _ = write!(out, "  {:>width$}", value(report));
            }
            out.push('\n');
        }
    }
    out.push('\n');
    out.push_str(&first.notes());
    for report in reports.iter().filter(|report| report.completed == 0 && report.rejected > 0) {
        let _ = writeln!(
            out,
            "Policy {} served nobody: what it needs for one request is more than the budget.",
            report.policy
        );
    }
    out
}

/// In GiB, without the unit.
pub(crate) fn gib(bytes: Bytes) -> String {
    format!("{:.2}", float(bytes.get()) / float(1 << 30))
}

/// In ms, without the unit.
pub(crate) fn millis(seconds: f64) -> String {
    format!("{:.1}", seconds * 1e3)
}

/// In µs, without the unit.
pub(crate) fn micros(nanoseconds: u64) -> String {
    format!("{:.2}", float(nanoseconds) / 1e3)
}

/// With commas between thousands.
pub(crate) fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!(count(0), "0");
        assert_eq!(count(999), "999");
        assert_eq!(count(1_234_567), "1,234,567");
        assert_eq!(gib(Bytes::mib(1536)), "1.50");
    }

    #[test]
    fn percentiles_are_of_the_nearest_rank() {
        assert_eq!(StepTimes::of(&mut []), StepTimes::default());
        assert_eq!(StepTimes::of(&mut [7]), StepTimes { p50: 7, p99: 7, max: 7 });
        let mut samples: Vec<u64> = (1..=200).rev().collect();
        assert_eq!(StepTimes::of(&mut samples), StepTimes { p50: 100, p99: 198, max: 200 });
    }
}
