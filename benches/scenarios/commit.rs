//! How long does a server wait that commits most of a card when it starts, and is what it made the right
//! mix?
//!
//! Asked because whoever commits up front wants neither to pay much more than the bare creates, nor to
//! see an extent made into another size while requests wait. The bare creates are those of the start
//! itself, in its order; who is first, ours or they, changes each time, and the card gets a pause after
//! each release, for memory that was released a moment before may be slow to create. Then the first 100 requests of a trace come in, 25 ms an iteration, as many at
//! once as their times say.

use vattn::error::Verb;
use vattn::geometry::{Background, Commit, LayoutChoice, LayoutKind};
use vattn::units::Bytes;
use vattn::{Config, KvCache};

use crate::recorder::{Call, Recorder};
use crate::server::{self, Vattn};
use crate::table::{Cell, Table};
use crate::timing::{Samples, ratio};
use crate::trace::{self, Request};
use crate::{Arc, Bench, LAYOUTS, calls, llama, tokens, wide};

const BUDGET: Bytes = Bytes::gib(120);
const MOST: f64 = 1.1;
const RUNS: usize = 9;
const REQUESTS: usize = 100;

pub(crate) fn run(bench: &Bench<'_>) -> Vec<Table> {
    let budget = bench.budget(if bench.test { Bytes::gib(2) } else { BUDGET });
    let mut starts = Table::new(
        "Llama-3-8B, the whole budget committed when the cache is made",
        &[
            "layout",
            "budget",
            "extents",
            "ours µs",
            "ours p10",
            "ours p90",
            "bare µs",
            "bare p10",
            "bare p90",
            "ours/bare",
            "of p10",
            "goal",
            "runs",
        ],
    );
    let (name, requests) = trace::first(if bench.test { 10 } else { REQUESTS });
    let mut served = Table::new(
        format!("Then come {name}"),
        &[
            "layout",
            "served",
            "most at once",
            "admission µs",
            "worst admission",
            "step µs",
            "worst step",
            "maps",
            "unmaps",
            "creates",
            "releases",
            "resized",
            "goal",
        ],
    );
    let card = bench.target.is_card();
    for (name, layout) in LAYOUTS.into_iter().filter(|(_, layout)| layout.kind == LayoutKind::Sliced) {
        starts.row(start(bench, name, layout, budget, card));
        served.row(serve(bench, name, layout, budget, &requests, card));
    }
    bench.pauses_noted(&mut starts);
    bench.limit.note().into_iter().for_each(|note| starts.note(note));
    vec![starts, served]
}

fn config(layout: LayoutChoice, budget: Bytes) -> Config {
    Config::builder(llama())
        .layout(layout)
        .max_slots(256)
        .max_tokens(tokens(32_768))
        .budget(budget)
        .commit(Commit::Whole)
        .background(Background::Off)
        .build()
        .unwrap()
}

fn start(bench: &Bench<'_>, name: &str, layout: LayoutChoice, budget: Bytes, card: bool) -> [Cell; 13] {
    let config = config(layout, budget);
    let recorder = Recorder::new(Arc::clone(&bench.target.driver));
    let (cache, recorded) = recorder.record(|| KvCache::new(config.clone(), recorder.clone()));
    drop(cache.unwrap());
    let sizes: Vec<Bytes> = recorded
        .iter()
        .filter_map(|call| match call {
            Call::Create { size, .. } => Some(*size),
            _ => None,
        })
        .collect();
    let bare_calls = &bench.target.bare;
    let (mut ours, mut bare) = (Samples::default(), Samples::default());
    bench.settle(budget);
    while bench.again(ours.count(), RUNS) {
        let play = |samples: &mut Samples| {
            let mut handles = Vec::with_capacity(sizes.len());
            samples.time(|| handles.extend(sizes.iter().map(|size| bare_calls.create(*size))));
            handles.into_iter().for_each(|handle| bare_calls.release(handle));
            bench.settle(budget);
        };
        let bare_first = ours.count() % 2 == 1;
        if bare_first {
            play(&mut bare);
        }
        let (driver, config) = (Arc::clone(&bench.target.driver), config.clone());
        let cache = ours.time(|| KvCache::new(config, driver)).unwrap();
        assert_eq!(calls(&cache, Verb::Create), wide(sizes.len()));
        drop(cache);
        bench.settle(budget);
        if !bare_first {
            play(&mut bare);
        }
    }
    let beside = ratio(ours.median(), bare.median());
    [
        Cell::text(name),
        Cell::Size(sizes.iter().copied().sum()),
        Cell::Count(wide(sizes.len())),
        Cell::Time(ours.median()),
        Cell::Time(ours.at(100)),
        Cell::Time(ours.at(900)),
        Cell::Time(bare.median()),
        Cell::Time(bare.at(100)),
        Cell::Time(bare.at(900)),
        Cell::Number(beside),
        Cell::Number(ratio(ours.at(100), bare.at(100))),
        Cell::goal(card, format!("≤ {MOST}"), beside <= MOST),
        Cell::Count(wide(ours.count())),
    ]
}

fn serve(
    bench: &Bench<'_>,
    name: &str,
    layout: LayoutChoice,
    budget: Bytes,
    requests: &[Request],
    card: bool,
) -> [Cell; 13] {
    let cache = KvCache::new(config(layout, budget), Arc::clone(&bench.target.driver)).unwrap();
    let before = cache.snapshot();
    let done = server::serve(&mut Vattn::new(&cache), requests, &bench.limit);
    let after = cache.snapshot();
    let made = |verb| after.driver[&verb].calls - before.driver[&verb].calls;
    let resized = after.events.resized - before.events.resized;
    let (creates, releases) = (made(Verb::Create), made(Verb::Release));
    [
        Cell::text(name),
        Cell::Count(wide(done.completed)),
        Cell::Count(wide(done.most_at_once)),
        Cell::Time(done.admissions.median()),
        Cell::Time(done.admissions.max()),
        Cell::Time(done.steps.median()),
        Cell::Time(done.steps.max()),
        Cell::Count(made(Verb::Map)),
        Cell::Count(made(Verb::Unmap)),
        Cell::Count(creates),
        Cell::Count(releases),
        Cell::Count(resized),
        Cell::goal(card, "none resized", creates + releases + resized == 0),
    ]
}
