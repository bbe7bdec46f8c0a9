//! Does a server that has warmed up ever meet the driver's calls that move memory?
//!
//! Asked because memory that stays mapped is to serve the next request, and what is missing is to be mapped
//! beside the serving thread. Requests with the lengths of the Azure trace come and go, 64 to 128 at a time,
//! in a budget that is more than twice what they fill. A request is given a slot, and its prompt's memory is
//! asked for, an iteration before it is admitted. `ready` are those admitted without a call that moves
//! memory; `in all a request` counts such calls on every thread, and `by thousands` says what it was in each
//! thousand requests. An iteration's kernels last 2 ms (1 ms where there is no card), a tenth of a model's:
//! so much less time has the mapper than in earnest.

use std::time::Duration;

use vattn::Config;
use vattn::units::Bytes;

use crate::serving::{Load, Manager, Served};
use crate::table::{Cell, Table};
use crate::{Bench, LAYOUTS, llama, tokens, trace, wide};

const WARM_UP: usize = 11_000;
const REQUESTS: usize = 19_366;
const LEAST: usize = 64;
const MOST: usize = 128;
/// Iterations that it takes from the least to the most and back.
const WAVE: usize = 1_024;
const KERNELS: Duration = Duration::from_millis(2);
const A_REQUEST: f64 = 0.1;

const COLUMNS: [&str; 15] = [
    "layout",
    "kernels µs",
    "admitted",
    "ready",
    "calls here",
    "goal",
    "calls beside",
    "in all a request",
    "goal of all",
    "by thousands",
    "fence calls",
    "step µs",
    "worst µs",
    "all calls of an iteration, worst",
    "iterations",
];

pub(crate) fn run(bench: &Bench<'_>) -> Vec<Table> {
    let (name, requests) = trace::first(if bench.test { 100 } else { REQUESTS });
    let warm_up = requests.len().min(WARM_UP * requests.len() / REQUESTS);
    let mut table = Table::new(
        format!("Llama-3-8B, {name} come and go, {LEAST} to {MOST} at a time, told after {warm_up}"),
        &COLUMNS,
    );
    let (name, layout) = LAYOUTS[1];
    let config = Config::builder(llama())
        .layout(layout)
        .max_slots(256)
        .max_tokens(tokens(16_384))
        .budget(bench.budget(Bytes::gib(64)))
        .build()
        .unwrap();
    let load = Load { requests: &requests, batch: at_once, announced: true, kernels: KERNELS, warm_up };
    let served = Manager::Mapper.serve(bench, &config, &load);
    table.row(cells(bench, name, &served));
    bench.limit.note().into_iter().for_each(|note| table.note(note));
    vec![table]
}

fn at_once(iteration: usize) -> usize {
    let up = iteration % WAVE;
    LEAST + (MOST - LEAST) * up.min(WAVE - up) / (WAVE / 2)
}

fn cells(bench: &Bench<'_>, layout: &str, served: &Served) -> [Cell; 15] {
    let made = served.made;
    let count = |count: u64| f64::from(u32::try_from(count).unwrap());
    let a_request = count(made.moves + made.moves_beside) / count(wide(served.admitted.max(1)));
    let thousands = served.by_thousands.iter().map(|calls| format!("{:.2}", count(*calls) / 1e3));
    [
        Cell::text(layout),
        Cell::Time(served.kernels),
        Cell::Count(wide(served.admitted)),
        Cell::Count(wide(served.ready)),
        Cell::Count(made.moves),
        Cell::goal(!bench.test, "none", made.moves == 0),
        Cell::Count(made.moves_beside),
        Cell::Number(a_request),
        Cell::goal(!bench.test, format!("< {A_REQUEST}"), a_request < A_REQUEST),
        Cell::text(thousands.collect::<Vec<_>>().join(", ")),
        Cell::Count(made.fences),
        Cell::Time(served.steps.median()),
        Cell::Time(served.steps.max()),
        Cell::Time(served.calls.max()),
        Cell::Count(wide(served.calls.count())),
    ]
}
