//! What is the worst step on a card that is 95 % full and whose free memory is scattered?
//!
//! Asked because creating is slow there (about 1.2 ms a handle, whatever its size), so that an extent
//! made larger out of smaller ones while requests wait is the stall that a server would see. All memory
//! is taken in handles of 2 MiB by bare calls and every other one is released. What is free then, less a
//! twentieth of the card, is the cache's budget. Requests of 40 to 3,600 tokens come and go so that their
//! tokens fill a share of it. The same is done on an empty card at the same budget.
//!
//! `merged` are extents that a step created out of smaller ones that it released for them, `split` those
//! that it created out of a larger one; see [`resizes`]. The filling up, until the load is reached for the first time, is told
//! apart from what follows.

use std::collections::HashMap;

use vattn::driver::RawHandle;
use vattn::geometry::{Background, Commit};
use vattn::units::Bytes;
use vattn::{Config, ErrorKind, Fence, KvCache, SlotTokens};

use crate::recorder::{Call, Recorder};
use crate::resizes::{self, Resizes, resizes};
use crate::table::{Cell, Table};
use crate::timing::{Limit, Samples};
use crate::{Arc, Bench, LAYOUTS, llama, tokens, trace, wide};

const GRANULE: Bytes = Bytes::mib(2);
/// Percent of the budget that tokens fill.
const LOADS: [u64; 2] = [80, 95];
const STEPS: usize = 1_500;
/// For each of the eight rows.
const SECONDS: u64 = 7;

const COLUMNS: [&str; 18] = [
    "card",
    "committed",
    "load %",
    "card full %",
    "worst filling µs",
    "creates filling",
    "step µs",
    "p99",
    "worst µs",
    "maps",
    "unmaps",
    "creates",
    "releases",
    "merged",
    "split",
    "goal",
    "preempted",
    "steps",
];

pub(crate) fn run(bench: &Bench<'_>) -> Vec<Table> {
    if bench.test {
        resizes::check();
    }
    let bare = &bench.target.bare;
    let total = bench.target.driver.memory_info().unwrap().total;
    let most = if bench.test { 1_024 } else { usize::MAX };
    let mut taken: Vec<RawHandle> = std::iter::from_fn(|| bare.try_create(GRANULE)).take(most).collect();
    let mut number = 0_u64;
    taken.retain(|handle| {
        number += 1;
        let keep = number % 2 == 1;
        if !keep {
            bare.release(*handle);
        }
        keep
    });
    let free = (GRANULE * wide(taken.len())).min(bench.target.driver.memory_info().unwrap().free);
    let spared = if bench.test { GRANULE * 16 } else { Bytes::new(total.get() / 20) };
    let budget = free - spared;
    let mut table = Table::new(
        format!("Llama-3-8B, K and V apart, requests that come and go in {}", Cell::Size(budget)),
        &COLUMNS,
    );
    for card in ["scattered", "empty"] {
        if card == "empty" {
            taken.drain(..).for_each(|handle| bare.release(handle));
        }
        for (committed, commit) in [("whole", Commit::Whole), ("on demand", Commit::OnDemand)] {
            for load in LOADS {
                if !bench.limit.is_over() {
                    let done = churn(bench, budget, commit.clone(), load);
                    table.row(done.cells(bench, card, committed, load));
                }
            }
        }
    }
    bench.limit.note().into_iter().for_each(|note| table.note(note));
    vec![table]
}

/// What happened in one phase.
#[derive(Default)]
struct Phase {
    steps: Samples,
    maps: u64,
    unmaps: u64,
    creates: u64,
    releases: u64,
    resizes: Resizes,
}

impl Phase {
    /// Enters the calls of one step.
    fn enter(&mut self, recorded: &[Call], sizes: &mut HashMap<RawHandle, Bytes>, budget: Bytes) {
        let room = budget - sizes.values().copied().sum();
        let (mut released, mut created) = (Vec::new(), Vec::new());
        for call in recorded {
            match *call {
                Call::Map { .. } => self.maps += 1,
                Call::Unmap { .. } => self.unmaps += 1,
                Call::SetAccess { .. } => {}
                Call::Release { handle } => {
                    self.releases += 1;
                    released.extend(sizes.remove(&handle));
                }
                Call::Create { size, handle } => {
                    self.creates += 1;
                    sizes.insert(handle, size);
                    created.push(size);
                }
            }
        }
        self.resizes += resizes(released, created, room);
    }
}

struct Done {
    /// Of the device's memory, at the end.
    percent: u64,
    filling: Phase,
    serving: Phase,
    preempted: u64,
}

impl Done {
    fn cells(&self, bench: &Bench<'_>, card: &str, committed: &str, load: u64) -> [Cell; 18] {
        let serving = &self.serving;
        let asked = bench.target.is_card() && card == "scattered";
        [
            Cell::text(card),
            Cell::text(committed),
            Cell::Count(load),
            Cell::Count(self.percent),
            Cell::Time(self.filling.steps.max()),
            Cell::Count(self.filling.creates),
            Cell::Time(serving.steps.median()),
            Cell::Time(serving.steps.at(990)),
            Cell::Time(serving.steps.max()),
            Cell::Count(serving.maps),
            Cell::Count(serving.unmaps),
            Cell::Count(serving.creates),
            Cell::Count(serving.releases),
            Cell::Count(serving.resizes.merged),
            Cell::Count(serving.resizes.split),
            Cell::goal(asked, "none merged", serving.resizes.merged == 0),
            Cell::Count(self.preempted),
            Cell::Count(wide(serving.steps.count())),
        ]
    }
}

/// A request that has a slot.
struct Active {
    entry: SlotTokens,
    left: u64,
}

fn churn(bench: &Bench<'_>, budget: Bytes, commit: Commit, load: u64) -> Done {
    let recorder = Recorder::new(Arc::clone(&bench.target.driver));
    let config = Config::builder(llama())
        .layout(LAYOUTS[1].1)
        .max_slots(2_048)
        .max_tokens(tokens(32_768))
        .budget(budget)
        .commit(commit)
        .background(Background::Off)
        .build()
        .unwrap();
    let (cache, recorded) = recorder.record(|| KvCache::new(config, recorder.clone()).unwrap());
    let mut sizes = HashMap::new();
    let budget = cache.budget();
    Phase::default().enter(&recorded, &mut sizes, budget);

    let goal = Bytes::new(budget.get() / 100 * load);
    let row = cache.layout().bytes_per_token();
    let limit = Limit::seconds(SECONDS);
    let steps = if bench.test { 20 } else { STEPS };
    let mut done = Done { percent: 0, filling: Phase::default(), serving: Phase::default(), preempted: 0 };
    let (mut active, mut number, mut full) = (Vec::<Active>::new(), 0, false);
    while done.serving.steps.count() < steps && !limit.is_over() {
        loop {
            let next = trace::made_up(number);
            let needed = cache.bytes().needed + row * next.prompt;
            if needed > goal || cache.admits(&[tokens(next.prompt)]) == 0 {
                full = true;
                break;
            }
            number += 1;
            let slot = cache.acquire(tokens(next.prompt), None).unwrap();
            let entry = SlotTokens::new(slot, tokens(next.prompt));
            let phase = if full { &mut done.serving } else { &mut done.filling };
            let (result, recorded) = recorder.record(|| phase.steps.time(|| cache.step(&[entry])));
            result.unwrap();
            phase.enter(&recorded, &mut sizes, budget);
            active.push(Active { entry, left: next.output });
        }
        loop {
            let entries: Vec<_> = active
                .iter()
                .map(|request| SlotTokens::new(request.entry.slot, request.entry.tokens + tokens(1)))
                .collect();
            let (result, recorded) = recorder.record(|| done.serving.steps.time(|| cache.step(&entries)));
            done.serving.enter(&recorded, &mut sizes, budget);
            match result {
                Ok(()) => {
                    active.iter_mut().zip(entries).for_each(|(request, entry)| request.entry = entry);
                    break;
                }
                Err(error) if error.kind() == ErrorKind::OutOfBudget => {
                    let latest = active.pop().expect("one request alone fits");
                    cache.retire(latest.entry.slot, &[Fence::Idle]).unwrap();
                    done.preempted += 1;
                }
                Err(error) => panic!("{}", error.report()),
            }
        }
        active.iter_mut().for_each(|request| request.left -= 1);
        for gone in active.extract_if(.., |request| request.left == 0) {
            cache.retire(gone.entry.slot, &[Fence::Idle]).unwrap();
        }
    }
    let memory = bench.target.driver.memory_info().unwrap();
    done.percent = 100 - memory.free.get() * 100 / memory.total.get();
    done
}
