//! What does a whole prompt into an empty slot cost, beside the bare driver calls of the same plan and
//! beside vAttention?
//!
//! Asked because a prompt is the one moment at which a server waits for much memory at once. Warm, the
//! extents are at hand; cold, they are created. The bare calls are those that the timed step itself
//! makes (there is no mapper), written down once and played on the driver: the same sizes at the same addresses, warm with
//! the very same handles. Ours and the bare calls take turns, and who is first changes each time. What
//! empties the slot in between is not timed; each run is checked to have created nothing (warm), or all
//! that it mapped (cold). Where memory was released for a cold run, the card gets a pause before the next,
//! ours and bare alike: memory that was released a moment before is now and then ten times slower to
//! create, for whoever comes next. Goals are asked of the medians; `of p10` is the ratio of the quickest
//! tenths, which other users of the card disturb least. vAttention has a tensor for each part of each layer, as it has in real
//! servers, a map and an access for each granule, and its handles at hand.

use std::time::Duration;

use vattn::error::Verb;
use vattn::geometry::{Background, LayoutChoice};
use vattn::layout::Layout;
use vattn::stats::Counters;
use vattn::units::Bytes;
use vattn::{Config, Fence, KvCache, SlotTokens};
use vattn_baselines::{Mapping, Policy, RequestId, Vattention};

use crate::common::baseline;
use crate::recorder::{Plan, Recorder};
use crate::table::{Cell, Table};
use crate::timing::{Samples, ratio};
use crate::{Arc, Bench, LAYOUTS, calls, llama, tokens, wide};
use vattn::driver::owned::DriverHandle;

const LENGTHS: [u64; 8] = [1_024, 8_192, 32_768, 131_072, 1_000, 8_111, 30_011, 120_007];
const MOST_TOKENS: u64 = 131_072;
const BUDGET: Bytes = Bytes::gib(64);
/// At least this many times faster than vAttention, all layers in one tensor, at these lengths.
const FACTOR: f64 = 80.0;
const FACTOR_AT: [u64; 2] = [32_768, 120_007];

/// How often a row is measured, by what a run and its pause take.
fn runs(length: u64, warm: bool) -> usize {
    match length {
        32_769.. if !warm => 15,
        8_193.. if !warm => 21,
        _ => 41,
    }
}

fn runs_of_vattention(length: u64) -> usize {
    if length <= 32_768 { 21 } else { 7 }
}

const COLUMNS: [&str; 18] = [
    "prompt",
    "layout",
    "extents",
    "mappings",
    "created",
    "ours µs",
    "ours p10",
    "ours p90",
    "bare µs",
    "bare p10",
    "bare p90",
    "ours/bare",
    "of p10",
    "goal",
    "vattention µs",
    "times faster",
    "goal of the factor",
    "runs",
];

pub(crate) fn run(bench: &Bench<'_>) -> Vec<Table> {
    let mut table = Table::new("One prompt of Llama-3-8B into an empty slot", &COLUMNS);
    let lengths = if bench.test { &LENGTHS[4..6] } else { &LENGTHS[..] };
    for length in lengths {
        if bench.limit.is_over() {
            break;
        }
        let peer = vattention(bench, *length);
        for (name, layout) in LAYOUTS {
            for warm in [true, false] {
                let row = measure(bench, *length, layout, warm);
                table.row(row.cells(bench, *length, name, warm, &peer));
            }
        }
    }
    bench.pauses_noted(&mut table);
    bench.limit.note().into_iter().for_each(|note| table.note(note));
    vec![table]
}

struct Row {
    plan: Plan,
    ours: Samples,
    bare: Samples,
}

impl Row {
    fn cells(&self, bench: &Bench<'_>, length: u64, layout: &str, warm: bool, peer: &Samples) -> [Cell; 18] {
        let card = bench.target.is_card();
        let beside = ratio(self.ours.median(), self.bare.median());
        let most = if warm { 1.05 } else { 1.10 };
        let factor = ratio(peer.median(), self.ours.median());
        let factor_asked = card && warm && layout == LAYOUTS[0].0 && FACTOR_AT.contains(&length);
        let [ours, bare] =
            [&self.ours, &self.bare].map(|s| [s.median(), s.at(100), s.at(900)].map(Cell::Time));
        let [ours_median, ours_low, ours_high] = ours;
        let [bare_median, bare_low, bare_high] = bare;
        [
            Cell::Count(length),
            Cell::text(layout),
            Cell::text(if warm { "warm" } else { "cold" }),
            Cell::Count(wide(self.plan.mappings())),
            Cell::Count(wide(self.plan.creates())),
            ours_median,
            ours_low,
            ours_high,
            bare_median,
            bare_low,
            bare_high,
            Cell::Number(beside),
            Cell::Number(ratio(self.ours.at(100), self.bare.at(100))),
            Cell::goal(card, format!("≤ {most:.2}"), beside <= most),
            if warm { Cell::Time(peer.median()) } else { Cell::Nothing },
            if warm { Cell::Number(factor) } else { Cell::Nothing },
            Cell::goal(factor_asked, format!("≥ {FACTOR}"), factor >= FACTOR),
            Cell::Count(wide(self.ours.count())),
        ]
    }
}

fn config(layout: LayoutChoice, budget: Bytes) -> Config {
    Config::builder(llama())
        .layout(layout)
        .max_slots(1)
        .max_tokens(tokens(MOST_TOKENS))
        .budget(budget)
        .background(Background::Off)
        .build()
        .unwrap()
}

fn measure(bench: &Bench<'_>, length: u64, layout: LayoutChoice, warm: bool) -> Row {
    let recorder = Recorder::new(Arc::clone(&bench.target.driver));
    let cache = KvCache::new(config(layout, bench.budget(BUDGET)), recorder.clone()).unwrap();
    let bare = &bench.target.bare;
    let prompt = |step: &mut dyn FnMut(&[SlotTokens])| {
        let slot = cache.acquire(tokens(length), None).unwrap();
        step(&[SlotTokens::new(slot, tokens(length))]);
        cache.retire(slot, &[Fence::Idle]).unwrap();
        if warm {
            cache.reclaim(cache.budget(), &[Fence::Idle]).unwrap();
        } else {
            assert!(cache.trim(Bytes::ZERO, &[Fence::Idle]).unwrap().is_zero(), "nothing is held");
        }
        assert!(cache.bytes().parked.is_zero(), "nothing is mapped");
    };
    let plan_of_one = || {
        let mut plan = None;
        prompt(&mut |entries| {
            let (result, recorded) = recorder.record(|| cache.step(entries));
            result.unwrap();
            plan = Some(Plan::of(&recorded));
        });
        plan.unwrap()
    };
    // The first makes what a warm one finds.
    plan_of_one();
    let plan = plan_of_one();
    assert_eq!(plan.creates() == 0, warm);

    let mut row = Row { plan, ours: Samples::default(), bare: Samples::default() };
    let (created, mapped) = (calls(&cache, Verb::Create), calls(&cache, Verb::Map));
    let released = row.plan.created();
    bench.settle(released);
    while bench.again(row.ours.count(), runs(length, warm)) {
        let play = |samples: &mut Samples| {
            let handles = samples.time(|| row.plan.play(bare));
            row.plan.undo(bare, &handles);
            bench.settle(released);
        };
        let bare_first = row.ours.count() % 2 == 1;
        if bare_first {
            play(&mut row.bare);
        }
        prompt(&mut |entries| row.ours.time(|| cache.step(entries)).unwrap());
        bench.settle(released);
        if !bare_first {
            play(&mut row.bare);
        }
    }
    let runs = wide(row.ours.count());
    assert_eq!(
        calls(&cache, Verb::Create) - created,
        runs * wide(row.plan.creates()),
        "creates of {runs} runs"
    );
    assert_eq!(
        calls(&cache, Verb::Map) - mapped,
        runs * wide(row.plan.mappings()),
        "mappings of {runs} runs"
    );
    assert!(plan_of_one().is_like(&row.plan), "the last prompt was as the one that was written down");
    row
}

/// The time to admit a prompt, its pages being at hand and unmapped.
fn vattention(bench: &Bench<'_>, length: u64) -> Samples {
    let driver = &bench.target.driver;
    let (layout, granule) = (LAYOUTS[2].1, driver.info().granule);
    let layout_of_all = Layout::new(&config(layout, BUDGET), granule, driver.info().device).unwrap();
    // A pool of exactly this prompt.
    let held = granule.to_bytes(layout_of_all.granules_for(tokens(length)));
    let shape = baseline::shape(&config(layout, held), bench.target.driver.info());
    let handle = DriverHandle::new(Arc::clone(driver), Arc::new(Counters::default()));
    let mut policy = Vattention::new(&handle, &shape, Mapping::Synchronous).unwrap();
    let (mut samples, request) = (Samples::default(), RequestId::new(0));
    while bench.again(samples.count(), runs_of_vattention(length)) {
        let admitted = samples.time(|| policy.admit(request, tokens(length))).unwrap();
        assert!(admitted, "the pool was made for it");
        policy.retire(request).unwrap();
        policy.unmap_surplus().unwrap();
    }
    assert!(samples.median() > Duration::ZERO);
    samples
}
