//! What does a step cost a server whose requests all cross a granule together?
//!
//! Asked because requests of the same length that decode in lockstep ask for all of their memory in the same
//! step: that is where mapping on the serving thread stalls it longest. 64 requests with prompts of one length
//! gain a token a step; kernels run after each step, and the serving thread waits for them. What is told
//! begins with the first step after all prompts. `calls here` move memory and are made on the serving thread,
//! `fence calls` are events' there, `calls beside` move memory on another thread.
//!
//! A card's granule holds 32 tokens with all layers in one tensor and 1,024 with one for each layer: there
//! one crossing is seen, in the middle, of 4,096 granules. They are 8 GiB at least, so that row has a
//! larger budget for looking ahead.

use std::time::Duration;

use vattn::Config;
use vattn::units::Bytes;

use crate::serving::{Load, Manager, Served};
use crate::table::{Cell, Table};
use crate::trace::Request;
use crate::{Bench, LAYOUTS, llama, tokens, wide};

const REQUESTS: usize = 64;
const PROMPT: u64 = 1_848;
const KERNELS: Duration = Duration::from_millis(20);
/// The layout, the steps, and what may be mapped ahead, where that is not the default.
const ROWS: [(usize, u64, Option<Bytes>); 2] = [(1, 2_000, None), (2, 500, Some(Bytes::gib(16)))];
const MEDIAN: Duration = Duration::from_micros(2);
const P99: Duration = Duration::from_micros(20);
const WORST: Duration = Duration::from_millis(1);

const COLUMNS: [&str; 14] = [
    "layout",
    "policy",
    "kernels µs",
    "step µs",
    "goal",
    "p99",
    "goal of p99",
    "worst µs",
    "goal of worst",
    "calls here",
    "goal of calls",
    "fence calls",
    "calls beside",
    "steps",
];

pub(crate) fn run(bench: &Bench<'_>) -> Vec<Table> {
    let budget = bench.budget(Bytes::gib(64));
    let mut table = Table::new(
        format!("{REQUESTS} requests of Llama-3-8B in lockstep, from {PROMPT} tokens on"),
        &COLUMNS,
    );
    for (layout, steps, ahead) in ROWS {
        let (name, layout) = LAYOUTS[layout];
        let builder =
            ahead.iter().fold(Config::builder(llama()), |builder, ahead| builder.look_ahead_budget(*ahead));
        let config = builder
            .layout(layout)
            .max_slots(u32::try_from(REQUESTS).unwrap())
            .max_tokens(tokens(4_096))
            .budget(budget)
            .build()
            .unwrap();
        // The first is not told.
        let output = if bench.test { 50 } else { steps + 1 };
        let request = Request { arrival: Duration::ZERO, prompt: PROMPT, output };
        let load = Load {
            requests: &[request; REQUESTS],
            batch: |_| REQUESTS,
            announced: false,
            kernels: KERNELS,
            warm_up: REQUESTS,
        };
        for manager in bench.managers() {
            if !bench.limit.is_over() {
                table.row(cells(bench, name, manager, &manager.serve(bench, &config, &load)));
                bench.settle(budget);
            }
        }
    }
    table.note(Manager::NOTE);
    bench.limit.note().into_iter().for_each(|note| table.note(note));
    vec![table]
}

fn cells(bench: &Bench<'_>, layout: &str, manager: Manager, served: &Served) -> [Cell; 14] {
    let steps = &served.steps;
    let [median, p99, worst] = [steps.median(), steps.at(990), steps.max()];
    let ours = manager == Manager::Mapper;
    let goal = |text, took, most| Cell::goal(ours && bench.target.is_card(), text, took <= most);
    [
        Cell::text(layout),
        Cell::text(manager.name()),
        Cell::Time(served.kernels),
        Cell::Time(median),
        goal("≤ 2 µs", median, MEDIAN),
        Cell::Time(p99),
        goal("≤ 20 µs", p99, P99),
        Cell::Time(worst),
        goal("≤ 1 ms", worst, WORST),
        Cell::Count(served.made.moves),
        Cell::goal(ours && !bench.test, "none", served.made.moves == 0),
        Cell::Count(served.made.fences),
        Cell::Count(served.made.moves_beside),
        Cell::Count(wide(steps.count())),
    ]
}
