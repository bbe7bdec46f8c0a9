//! What is drawn: a row of panels for each thing, a panel for each policy, all on the same axes.

use serde::Serialize;
use vattn::units::Bytes;

use super::Run;
use super::chart::{self, Drawn, Panel, Time};
use super::scale::{Scale, binary_step, unit};
use crate::device::{DriverCalls, VERBS};
use crate::num::{float, whole, wide};
use crate::report::{count, gib, micros, millis};
use crate::series::{Bucket, Columns, Gauges, Range, Spread};

/// A thing that is drawn.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) title: &'static str,
    pub(super) note: String,
    /// Classes of colours, and what they stand for.
    pub(super) legend: Vec<(&'static str, &'static str)>,
    /// The class that says how high the panels are.
    pub(super) height: &'static str,
    pub(super) panels: String,
    pub(super) readouts: Vec<Readout>,
}

/// What a panel tells where the pointer is.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Readout {
    id: String,
    /// Seconds of a column.
    width: f64,
    /// `ns` for times, otherwise what stands behind a number.
    unit: &'static str,
    lines: Vec<Line>,
}

/// A figure of each column.
#[derive(Clone, Debug, Serialize)]
struct Line {
    name: &'static str,
    class: &'static str,
    values: Vec<Option<f64>>,
}

impl Line {
    fn new(name: &'static str, class: &'static str, values: impl Iterator<Item = Option<f64>>) -> Self {
        Self { name, class, values: values.collect() }
    }
}

/// All runs with what their rows have in common.
#[derive(Debug)]
pub(super) struct Frame<'a> {
    runs: &'a [Run],
    budget: Bytes,
    time: Scale,
    /// Nanoseconds that are shown.
    pub(super) end: u64,
    fine: Vec<Columns>,
    /// For bars, which need some width.
    coarse: Vec<Columns>,
}

/// A run that takes this many times as long as the quickest is shown in part, since it would leave the
/// others no room.
const LONG: f64 = 1.5;

/// Nanoseconds that are shown where nothing took any time.
const LEAST: u64 = 1_000_000;

/// One that is shown in part has no say in an axis of requests if it goes this far beyond the others.
const FAR: u64 = 3;

const NONE: &str = "none while serving";

impl<'a> Frame<'a> {
    pub(super) fn new(runs: &'a [Run], budget: Bytes) -> Self {
        let end = end(runs);
        // Columns and ticks for the width that a panel has.
        let (fine, coarse, ticks) = match runs.len() {
            0 | 1 => (1000, 150, 10),
            2 => (600, 100, 6),
            _ => (400, 60, 5),
        };
        let columns = |most| runs.iter().map(|run| run.series.columns(end, most)).collect();
        let (fine, coarse) = (columns(fine), columns(coarse));
        Self { runs, budget, time: Scale::time(end, ticks), end, fine, coarse }
    }

    /// All rows, in the order in which they are shown.
    pub(super) fn rows(&self) -> Vec<Row> {
        vec![self.memory(), self.slots(), self.waiting(), self.driver(), self.step(), self.calls()]
    }

    /// Whether a run goes on beyond the axis.
    pub(super) fn cuts(&self, run: &Run) -> bool {
        run.nanoseconds() > self.end
    }

    fn over(&self, columns: &Columns) -> Time<'_> {
        Time { scale: &self.time, width: columns.width, end: self.end }
    }

    /// Every column of every run.
    fn buckets(&self) -> impl Iterator<Item = &Bucket> {
        self.fine.iter().flat_map(|columns| &columns.columns)
    }

    /// A panel for each run, and what it tells.
    fn panels(
        &self,
        id: &str,
        unit: &'static str,
        (scale, columns): (&Scale, &[Columns]),
        draw: impl Fn(&Run, &Columns) -> (Drawn, Vec<Line>),
    ) -> (String, Vec<Readout>) {
        let mut html = String::new();
        let mut readouts = Vec::new();
        for (number, (run, columns)) in self.runs.iter().zip(columns).enumerate() {
            let (drawn, lines) = draw(run, columns);
            let id = format!("{id}{number}");
            let cut = self.cuts(run).then(|| format!("on to {} s →", run.seconds()));
            html += &chart::panel(&Panel { id: &id, name: run.report.policy, cut, drawn }, &self.time, scale);
            readouts.push(Readout { id, width: float(columns.width) / 1e9, unit, lines });
        }
        (html, readouts)
    }

    fn memory(&self) -> Row {
        let held = self.buckets().map(|bucket| bucket.gauges.held.most).max().unwrap_or(0);
        let budget = self.budget.get();
        // A budget far above what is held would leave the panels empty.
        let budget = (held..=held.saturating_add(held / 2)).contains(&budget).then_some(budget);
        let top = budget.unwrap_or(held);
        let scale = Scale::bytes(top);
        let (size, unit) = unit(binary_step(top));
        let (panels, readouts) = self.panels("memory", unit, (&scale, &self.fine), |run, columns| {
            let (mut drawing, lines) = memory(&self.over(columns), &scale, columns, size);
            if let Some(budget) = budget {
                drawing += &chart::rule(&scale, float(budget), "budget");
            }
            let bytes = &run.report.bytes;
            let drawn = Drawn {
                fact: format!("peak {} GiB needed", gib(bytes.peak_needed)),
                drawing,
                title: format!("Memory under {} over time", run.report.policy),
                description: format!(
                    "Needed up to {} GiB, mapped up to {} GiB, held up to {} GiB, of a budget of {}.",
                    gib(bytes.peak_needed),
                    gib(bytes.peak_mapped),
                    gib(bytes.peak_held),
                    self.budget
                ),
                ..Drawn::default()
            };
            (drawn, lines)
        });
        let mut legend = vec![
            ("needed", "needed by live tokens throughout"),
            ("needed sometimes", "at times"),
            ("mapped", "mapped beyond that"),
        ];
        if self.buckets().any(|bucket| bucket.gauges.kept.is_some()) {
            legend.push(("parked", "parked: mapped, holding nobody's tokens"));
        }
        legend.push(("held", "held beyond that"));
        if budget.is_some() {
            legend.push(("budget", "budget"));
        }
        Row { title: "Memory", note: String::new(), legend, height: "tall", panels, readouts }
    }

    fn slots(&self) -> Row {
        self.requests(
            ("Slots in use", "by requests that have memory", "slots"),
            |bucket| bucket.gauges.active,
            |run, _| {
                let slots = &run.report.active_slots;
                format!("mean {:.1}, peak {}", slots.mean, count(slots.peak))
            },
        )
    }

    fn waiting(&self) -> Row {
        self.requests(
            ("Requests waiting", "that have arrived and have no slot", "waiting"),
            |bucket| bucket.gauges.waiting,
            |_, peak| format!("peak {}", count(peak)),
        )
    }

    /// A row of counts of requests; `fact` is handed the highest of the whole run.
    fn requests(
        &self,
        (title, note, id): (&'static str, &str, &'static str),
        range: impl Fn(&Bucket) -> Range,
        fact: impl Fn(&Run, u64) -> String,
    ) -> Row {
        let peak = |columns: &Columns| columns.columns.iter().map(|bucket| range(bucket).most).max();
        let top = |cut: bool| {
            let runs = self.runs.iter().zip(&self.fine).filter(|(run, _)| self.cuts(run) == cut);
            runs.filter_map(|(_, columns)| peak(columns)).max().unwrap_or(0)
        };
        let (whole, part) = (top(false), top(true));
        let top = if whole > 0 && part > FAR * whole { whole } else { whole.max(part) };
        let scale = Scale::counts(float(top));
        let (panels, readouts) = self.panels(id, "", (&scale, &self.fine), |run, columns| {
            let ranges: Vec<Range> = columns.columns.iter().map(&range).collect();
            let mut drawing = swing(&self.over(columns), &scale, &ranges, "requests");
            let highest = peak(&run.series.columns(u64::MAX, usize::MAX)).unwrap_or(0);
            let mut fact = fact(run, highest);
            if peak(columns).unwrap_or(0) > top {
                drawing += &chart::ceiling();
                fact += ", beyond the axis";
            }
            let drawn = Drawn {
                drawing,
                title: format!("{title} under {} over time", run.report.policy),
                description: format!("{title}: {fact}."),
                fact,
                none: (highest == 0).then_some("none"),
                ..Drawn::default()
            };
            let values = ranges.iter().map(|range| Some(float(range.last)));
            (drawn, vec![Line::new(id, "requests", values)])
        });
        let legend = vec![("requests", "throughout"), ("requests sometimes", "at times")];
        Row { title, note: note.into(), legend, height: "low", panels, readouts }
    }

    fn driver(&self) -> Row {
        let mut note = "what its calls would cost on an H200".to_owned();
        if self.runs.iter().any(|run| run.report.driver_seconds_off_path > 0.0) {
            note += "; those made while the model runs are among them";
        }
        self.times(
            ("Driver time in an iteration, modelled", note, "driver"),
            |bucket| &bucket.driver,
            ("mean", Spread::mean),
            1000,
            |run| {
                let report = &run.report;
                let [on, all] = [report.driver_seconds_on_path, report.modelled_driver_seconds].map(millis);
                format!("{on} ms waited for, {all} in all")
            },
        )
    }

    fn step(&self) -> Row {
        let host = self.runs.iter().any(|run| run.report.driver == "host");
        let maps = if host { "this machine's mapping included" } else { "nothing is really mapped" };
        self.times(
            ("A step on this machine, measured", format!("wall time, {maps}"), "step"),
            |bucket| &bucket.step,
            ("median", Spread::median),
            1,
            |run| {
                let times = &run.report.step_ns;
                format!("median {}, 99 % {} µs", micros(times.p50), micros(times.p99))
            },
        )
    }

    /// A row of times: the slowest of each column, and another figure of them. The axis begins at
    /// `from` nanoseconds or above.
    fn times(
        &self,
        (title, note, id): (&'static str, String, &'static str),
        spread: impl Fn(&Bucket) -> &Spread,
        (name, figure): (&'static str, fn(&Spread) -> Option<u64>),
        from: u64,
        fact: impl Fn(&Run) -> String,
    ) -> Row {
        let least = self.buckets().filter_map(|bucket| figure(spread(bucket))).filter(|ns| *ns >= from).min();
        let longest = self.buckets().filter_map(|bucket| spread(bucket).most()).max();
        let scale = Scale::decades(least.unwrap_or(from), longest.unwrap_or(0));
        let (panels, readouts) = self.panels(id, "ns", (&scale, &self.fine), |run, columns| {
            let time = self.over(columns);
            let values = |figure: fn(&Spread) -> Option<u64>| {
                columns.columns.iter().map(&spread).map(move |spread| figure(spread).map(float))
            };
            let slowest = values(Spread::most).map(|ns| ns.unwrap_or(0.0));
            let usual = values(figure).map(|ns| ns.filter(|ns| *ns >= float(from)));
            let none = values(Spread::most).flatten().all(|ns| ns <= 0.0);
            let fact = fact(run);
            let drawn = Drawn {
                drawing: chart::area(&time, &scale, slowest, "slowest")
                    + &chart::line(&time, &scale, usual, "usual"),
                title: format!("{title}, under {}", run.report.policy),
                description: format!("On a logarithmic axis: {fact}."),
                fact,
                none: none.then_some(NONE),
                ..Drawn::default()
            };
            let lines = vec![
                Line::new("slowest", "slowest", values(Spread::most)),
                Line::new(name, "usual", values(figure)),
            ];
            (drawn, lines)
        });
        let legend = vec![("slowest", "slowest"), ("usual", name)];
        Row { title, note, legend, height: "mid", panels, readouts }
    }

    fn calls(&self) -> Row {
        let columns = self.coarse.iter().flat_map(|columns| self.rates(columns));
        let scale = Scale::counts(columns.map(|verbs| verbs.iter().sum()).fold(0.0, f64::max));
        let sum = |counts: [u64; VERBS]| counts.iter().sum::<u64>();
        let (panels, readouts) = self.panels("calls", "/s", (&scale, &self.coarse), |run, columns| {
            let rates = self.rates(columns);
            let counts = run.report.driver_calls.counts();
            let (before, during) = (sum(run.series.calls_before()), sum(run.series.calls_during()));
            let [start, serving, end] = [before, during, sum(counts) - before - during].map(count);
            let by_verb = DriverCalls::NAMES.into_iter().zip(counts);
            let by_verb: Vec<String> =
                by_verb.map(|(verb, calls)| format!("{verb} {}", count(calls))).collect();
            let drawn = Drawn {
                fact: format!("{} in all", count(sum(counts))),
                drawing: chart::bars(&self.over(columns), &scale, &rates, DriverCalls::NAMES),
                title: format!("Calls of the driver under {} over time", run.report.policy),
                description: format!(
                    "{}; at the start {start}, while serving {serving}, at the end {end}.",
                    by_verb.join(", ")
                ),
                foot: Some(format!("{start} + {serving} + {end}")),
                none: (during == 0).then_some(NONE),
            };
            let lines = DriverCalls::NAMES.into_iter().enumerate().map(|(verb, name)| {
                Line::new(name, name, rates.iter().map(|verbs| Some(verbs[verb].round())))
            });
            (drawn, lines.filter(|line| line.values.iter().any(|value| *value > Some(0.0))).collect())
        });
        let made = |verb: &usize| self.runs.iter().any(|run| run.series.calls_during()[*verb] > 0);
        let legend = (0..VERBS).filter(made).map(|verb| (DriverCalls::NAMES[verb], DriverCalls::NAMES[verb]));
        Row {
            title: "Driver calls a second, by verb",
            note: "below, how many before serving + while serving + after it".into(),
            legend: legend.collect(),
            height: "mid",
            panels,
            readouts,
        }
    }

    /// Calls a simulated second in each column.
    fn rates(&self, columns: &Columns) -> Vec<[f64; VERBS]> {
        let each = columns.columns.iter().enumerate();
        each.map(|(column, bucket)| {
            let start = columns.width.saturating_mul(wide(column));
            let length = columns.width.min(self.end.saturating_sub(start)).max(1);
            bucket.calls.map(|calls| float(calls) / (float(length) / 1e9))
        })
        .collect()
    }
}

impl Run {
    fn nanoseconds(&self) -> u64 {
        whole(self.report.simulated_seconds * 1e9)
    }

    /// How long the run took, for people.
    pub(super) fn seconds(&self) -> String {
        count(whole(self.report.simulated_seconds))
    }
}

/// A part of memory: its name, which is its colour's too, and where it ends.
type Part = (&'static str, fn(&Gauges) -> Option<Range>);

/// What is held, parked, mapped and needed, each painted over the one that it is part of. Readouts are
/// in units of `size` bytes.
fn memory(time: &Time<'_>, scale: &Scale, columns: &Columns, size: u64) -> (String, Vec<Line>) {
    let nested: [Part; 4] = [
        ("held", |gauges| Some(gauges.held)),
        ("parked", |gauges| gauges.kept),
        ("mapped", |gauges| Some(gauges.mapped)),
        ("needed", |gauges| Some(gauges.needed)),
    ];
    let gauges: Vec<&Gauges> = columns.columns.iter().map(|bucket| &bucket.gauges).collect();
    let (mut drawing, mut lines) = (String::new(), Vec::new());
    for (name, range) in nested {
        let ranges: Option<Vec<Range>> = gauges.iter().map(|gauges| range(gauges)).collect();
        let Some(ranges) = ranges else { continue };
        let draw = if name == "needed" { swing } else { most };
        drawing += &draw(time, scale, &ranges, name);
        let values = gauges.iter().zip(&ranges).map(|(gauges, range)| {
            let below = if name == "parked" { gauges.mapped.last } else { 0 };
            Some((float(range.last - below) / float(size) * 1e3).round() / 1e3)
        });
        lines.insert(0, Line::new(name, name, values));
    }
    (drawing, lines)
}

/// The area below the most of each column.
fn most(time: &Time<'_>, scale: &Scale, ranges: &[Range], class: &str) -> String {
    chart::area(time, scale, ranges.iter().map(|range| float(range.most)), class)
}

/// The same, and the area below the least in the full colour.
fn swing(time: &Time<'_>, scale: &Scale, ranges: &[Range], class: &str) -> String {
    most(time, scale, ranges, &format!("{class} sometimes"))
        + &chart::area(time, scale, ranges.iter().map(|range| float(range.least)), class)
}

/// Where the axis of time ends: with the longest run, those left aside that take far longer than the
/// quickest of those that serve the most.
fn end(runs: &[Run]) -> u64 {
    let most = runs.iter().map(|run| run.report.completed).max();
    let best = runs.iter().filter(|run| Some(run.report.completed) == most).map(Run::nanoseconds).min();
    let limit = whole(float(best.unwrap_or(0)) * LONG);
    runs.iter().map(Run::nanoseconds).filter(|time| *time <= limit).max().unwrap_or(0).max(LEAST)
}
