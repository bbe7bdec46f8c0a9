//! What does a decode step cost on a real driver: one in which nothing is to be mapped, and one that maps
//! an extent?
//!
//! Asked because a step of a small model takes a few milliseconds and every request is in it. The first
//! asks no driver; the second should cost one mapping and hardly anything of our own. `benches/steady`
//! asks more about the first.
//!
//! `driver` is the time inside the driver's calls by the library's own counters, `own` the rest of the
//! call. Where an extent is mapped, that is: the look at every request of the step, several times over
//! (what it lacks, what is planned for it, its tokens published), the choice of the extent, the locks,
//! and the clocks around the driver's calls. So it grows with the requests and not with what is mapped.
//! It is not the quick way with a mapping added: a step takes that way for all its requests or for none.

use std::time::Duration;

use vattn::error::Verb;
use vattn::geometry::{Background, Commit};
use vattn::units::{Bytes, TokenCount};
use vattn::{Config, Fence, KvCache, SlotTokens};

use crate::table::{Cell, Table};
use crate::timing::Samples;
use crate::{Arc, Bench, LAYOUTS, calls, llama, tokens, wide};

const SLOTS: [usize; 2] = [64, 256];
/// Tokens that one granule holds with all layers, K and V in one tensor.
const GRANULE_TOKENS: u64 = 16;

pub(crate) fn run(bench: &Bench<'_>) -> Vec<Table> {
    let mut table = Table::new(
        "A decode step of Llama-3-8B, all layers in one tensor, extents at hand",
        &[
            "requests",
            "step",
            "µs",
            "p99",
            "worst",
            "driver µs",
            "own µs",
            "own p99",
            "driver calls a step",
            "steps",
        ],
    );
    for slots in SLOTS {
        let cache = cache(bench, slots);
        let mut entries: Vec<_> = (0..slots)
            .map(|_| {
                let slot = cache.acquire(tokens(1), None).unwrap();
                cache.step(&[SlotTokens::new(slot, tokens(1))]).unwrap();
                SlotTokens::new(slot, tokens(1))
            })
            .collect();
        let steps = if bench.test { 20 } else { 5_000 };
        let done = nothing_to_map(bench, &cache, &mut entries, steps);
        table.row(done.cells(slots, "maps nothing"));
        // A request asks for ever more when it grows: a few times each.
        let rounds = if bench.test { 1 } else { 512 / slots };
        let done = one_extent(bench, &cache, &mut entries, rounds);
        table.row(done.cells(slots, "maps one extent"));
    }
    bench.limit.note().into_iter().for_each(|note| table.note(note));
    vec![table]
}

fn cache(bench: &Bench<'_>, slots: usize) -> KvCache {
    let config = Config::builder(llama())
        .layout(LAYOUTS[0].1)
        .max_slots(u32::try_from(slots).unwrap())
        .max_tokens(tokens(32_768))
        .budget(bench.budget(Bytes::gib(64)))
        .commit(Commit::Whole)
        .background(Background::Off)
        .build()
        .unwrap();
    KvCache::new(config, Arc::clone(&bench.target.driver)).unwrap()
}

#[derive(Default)]
struct Steps {
    wall: Samples,
    driver: Samples,
    own: Samples,
    calls: u64,
}

impl Steps {
    fn time(&mut self, cache: &KvCache, entries: &[SlotTokens]) {
        let (driver, made) = in_driver(cache);
        self.wall.time(|| cache.step(entries)).unwrap();
        let (driver_after, made_after) = in_driver(cache);
        let inside = driver_after - driver;
        self.driver.push(inside);
        self.own.push(self.wall.last().saturating_sub(inside));
        self.calls += made_after - made;
    }

    fn add(&mut self, step: Self) {
        self.wall.push(step.wall.last());
        self.driver.push(step.driver.last());
        self.own.push(step.own.last());
        self.calls += step.calls;
    }

    fn cells(&self, slots: usize, what: &str) -> [Cell; 10] {
        [
            Cell::Count(wide(slots)),
            Cell::text(what),
            Cell::Time(self.wall.median()),
            Cell::Time(self.wall.at(990)),
            Cell::Time(self.wall.max()),
            Cell::Time(self.driver.median()),
            Cell::Time(self.own.median()),
            Cell::Time(self.own.at(990)),
            Cell::Count(self.calls / wide(self.wall.count().max(1))),
            Cell::Count(wide(self.wall.count())),
        ]
    }
}

/// The time inside the driver so far, and the calls.
fn in_driver(cache: &KvCache) -> (Duration, u64) {
    let driver = cache.snapshot().driver;
    let nanoseconds = driver.values().map(|call| call.nanoseconds).sum();
    (Duration::from_nanos(nanoseconds), driver.values().map(|call| call.calls).sum())
}

/// Everybody gains a token within the granule that is there.
fn nothing_to_map(bench: &Bench<'_>, cache: &KvCache, entries: &mut [SlotTokens], steps: usize) -> Steps {
    let mut done = Steps::default();
    while done.wall.count() < steps && !bench.limit.is_over() {
        for entry in entries.iter_mut() {
            entry.tokens = TokenCount::new(1);
            cache.truncate(entry.slot, entry.tokens, &[Fence::Idle]).unwrap();
        }
        for _ in 1..GRANULE_TOKENS {
            entries.iter_mut().for_each(|entry| entry.tokens += tokens(1));
            done.time(cache, entries);
        }
    }
    assert_eq!(done.calls, 0, "no driver was asked");
    done
}

/// One request in turn outgrows what it has, and the others stay as they are. A step that needed more
/// than one extent is left out.
fn one_extent(bench: &Bench<'_>, cache: &KvCache, entries: &mut [SlotTokens], rounds: usize) -> Steps {
    let (mut done, slots) = (Steps::default(), entries.len());
    for turn in (0..rounds * slots).map(|turn| turn % slots) {
        if bench.limit.is_over() {
            break;
        }
        let slot = entries[turn].slot;
        let report = cache.report().unwrap();
        let backed = report.slots.iter().find(|found| found.index == slot.index()).unwrap().backed;
        // Up to the last byte that it has, and then one token more.
        entries[turn].tokens = tokens(backed.get() / cache.layout().bytes_per_token().get());
        cache.step(&[entries[turn]]).unwrap();
        entries[turn].tokens += tokens(1);
        let (maps, mut step) = (calls(cache, Verb::Map), Steps::default());
        step.time(cache, entries);
        if calls(cache, Verb::Map) - maps == 1 {
            done.add(step);
        }
    }
    done
}
