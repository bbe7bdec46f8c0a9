//! How much time does a server lose to allocation, on the load with which vAttention's artifact shows it?
//!
//! Asked because that is the peer's own measure of its thread. The first 300 requests of its trace, 64 at a
//! time, the next one admitted when one has ended, a token an iteration. What is lost is the time in the
//! manager's calls: to let requests go, to admit them, to step them. The first iteration, which admits 64
//! prompts at once, is told apart. Everybody's memory is created before: the peer does so by itself.

use std::time::Duration;

use vattn::Config;
use vattn::geometry::Commit;
use vattn::units::Bytes;

use crate::serving::{Load, Manager, Served};
use crate::table::{Cell, Table};
use crate::timing::ratio;
use crate::{Bench, LAYOUTS, llama, tokens, trace, wide};

const REQUESTS: usize = 300;
const AT_ONCE: usize = 64;
const KERNELS: Duration = Duration::from_millis(5);

const COLUMNS: [&str; 13] = [
    "policy",
    "kernels µs",
    "iterations",
    "lost first µs",
    "lost later µs",
    "times less",
    "an iteration µs",
    "p99",
    "worst µs",
    "calls here",
    "fence calls",
    "calls beside",
    "served",
];

pub(crate) fn run(bench: &Bench<'_>) -> Vec<Table> {
    let (name, requests) = trace::first_without_times(if bench.test { 70 } else { REQUESTS });
    let mut table = Table::new(format!("Llama-3-8B, K and V apart, {name}, {AT_ONCE} at a time"), &COLUMNS);
    let budget = bench.budget(Bytes::gib(32));
    let config = Config::builder(llama())
        .layout(LAYOUTS[1].1)
        .max_slots(u32::try_from(AT_ONCE).unwrap())
        .max_tokens(tokens(8_192))
        .budget(budget)
        .commit(Commit::Whole)
        .build()
        .unwrap();
    let load =
        Load { requests: &requests, batch: |_| AT_ONCE, announced: false, kernels: KERNELS, warm_up: 0 };
    let mut all = Vec::new();
    for manager in bench.managers() {
        if !bench.limit.is_over() {
            all.push((manager, manager.serve(bench, &config, &load)));
            bench.settle(budget);
        }
    }
    let peer = all.iter().find(|(manager, _)| *manager == Manager::Vattention);
    let peer = peer.map(|(_, served)| later(served));
    for (manager, served) in &all {
        table.row(cells(*manager, served, peer));
    }
    table.note("`times less` is what `vattention` loses after the first iteration, by what the row does.");
    table.note(Manager::NOTE);
    bench.limit.note().into_iter().for_each(|note| table.note(note));
    vec![table]
}

fn later(served: &Served) -> Duration {
    served.calls.after_first().sum()
}

fn cells(manager: Manager, served: &Served, peer: Option<Duration>) -> [Cell; 13] {
    let calls = served.calls.after_first();
    [
        Cell::text(manager.name()),
        Cell::Time(served.kernels),
        Cell::Count(wide(served.calls.count())),
        Cell::Time(served.calls.first()),
        Cell::Time(calls.sum()),
        peer.map_or(Cell::Nothing, |peer| Cell::Number(ratio(peer, calls.sum()))),
        Cell::Time(calls.median()),
        Cell::Time(calls.at(990)),
        Cell::Time(calls.max()),
        Cell::Count(served.made.moves),
        Cell::Count(served.made.fences),
        Cell::Count(served.made.moves_beside),
        Cell::Count(wide(served.admitted)),
    ]
}
