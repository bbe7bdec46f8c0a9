//! What do the policies cost a server on real traffic, in the time of real calls?
//!
//! Asked because `vattn replay` tells what calls would cost by a model, and how much memory is wasted,
//! while only a real driver tells how long a step waits. The Azure conversation trace comes in as its
//! times say; each policy has the same budget and the same tensors. `starting` is making the cache with
//! what it commits. `in the driver` is the time inside the driver's calls from then on.

use std::time::Duration;

use vattn::driver::owned::DriverHandle;
use vattn::error::Verb;
use vattn::geometry::Background;
use vattn::stats::{CallStats, Counters};
use vattn::units::Bytes;
use vattn::{Config, KvCache};
use vattn_baselines::{Mapping, Paged, Policy, Vattention};

use crate::common::baseline;
use crate::server::{Served, Vattn, serve};
use crate::table::{Cell, Table};
use crate::timing::{Limit, Samples};
use crate::{Arc, Bench, LAYOUTS, llama, tokens, trace, wide};

const BUDGETS: [Bytes; 2] = [Bytes::gib(64), Bytes::gib(16)];
const SLOTS: u32 = 256;
const MOST_TOKENS: u64 = 16_384;
/// For each row.
const SECONDS: u64 = 8;

const COLUMNS: [&str; 15] = [
    "budget",
    "policy",
    "starting µs",
    "served",
    "most at once",
    "preempted",
    "in the driver µs",
    "maps",
    "unmaps",
    "creates",
    "admission µs",
    "admission p99",
    "step µs",
    "step p99",
    "worst µs",
];

pub(crate) fn run(bench: &Bench<'_>) -> Vec<Table> {
    let (name, requests) = trace::first(if bench.test { 20 } else { usize::MAX });
    let mut table = Table::new(format!("Llama-3-8B, K and V apart, {name}"), &COLUMNS);
    for budget in BUDGETS.map(|budget| bench.budget(budget)) {
        let config = Config::builder(llama())
            .layout(LAYOUTS[1].1)
            .max_slots(SLOTS)
            .max_tokens(tokens(MOST_TOKENS))
            .budget(budget)
            .background(Background::Off)
            .build()
            .unwrap();
        for policy in ["vattn", "vattention", "paged"] {
            if bench.limit.is_over() {
                break;
            }
            // What the policy before held has just been released.
            bench.settle(budget);
            table.row(row(bench, &config, policy, &requests));
        }
    }
    table.note("`paged` maps nothing once it has started; its price is paid in the kernels.");
    bench.limit.note().into_iter().for_each(|note| table.note(note));
    vec![table]
}

fn row(bench: &Bench<'_>, config: &Config, name: &str, requests: &[trace::Request]) -> [Cell; 15] {
    let (driver, limit) = (&bench.target.driver, Limit::seconds(SECONDS));
    let counters = Arc::new(Counters::default());
    let handle = DriverHandle::new(Arc::clone(driver), Arc::clone(&counters));
    let mut starting = Samples::default();
    let run = |policy: &mut dyn Policy, calls: &dyn Fn() -> Calls| {
        let before = calls();
        let served = serve(policy, requests, &limit);
        (served, calls().since(&before))
    };
    let (served, calls) = if name == "vattn" {
        let cache = starting.time(|| KvCache::new(config.clone(), Arc::clone(driver))).unwrap();
        run(&mut Vattn::new(&cache), &|| Calls::of(&|verb| cache.snapshot().driver[&verb]))
    } else {
        let shape = baseline::shape(config, bench.target.driver.info());
        let mut policy: Box<dyn Policy> = match name {
            "paged" => Box::new(starting.time(|| Paged::new(&handle, &shape)).unwrap()),
            _ => Box::new(starting.time(|| Vattention::new(&handle, &shape, Mapping::Synchronous)).unwrap()),
        };
        run(&mut *policy, &|| Calls::of(&|verb| counters.snapshot().driver[&verb]))
    };
    let Served { admissions, steps, most_at_once, completed, preempted } = served;
    [
        Cell::Size(config.budget().unwrap()),
        Cell::text(name),
        Cell::Time(starting.last()),
        Cell::Count(wide(completed)),
        Cell::Count(wide(most_at_once)),
        Cell::Count(preempted),
        Cell::Time(calls.inside),
        Cell::Count(calls.maps),
        Cell::Count(calls.unmaps),
        Cell::Count(calls.creates),
        Cell::Time(admissions.median()),
        Cell::Time(admissions.at(990)),
        Cell::Time(steps.median()),
        Cell::Time(steps.at(990)),
        Cell::Time(steps.max().max(admissions.max())),
    ]
}

/// What was asked of the driver.
struct Calls {
    inside: Duration,
    maps: u64,
    unmaps: u64,
    creates: u64,
}

impl Calls {
    fn of(stats: &dyn Fn(Verb) -> CallStats) -> Self {
        Self {
            inside: Duration::from_nanos(Verb::ALL.into_iter().map(|verb| stats(verb).nanoseconds).sum()),
            maps: stats(Verb::Map).calls,
            unmaps: stats(Verb::Unmap).calls,
            creates: stats(Verb::Create).calls,
        }
    }

    fn since(self, before: &Self) -> Self {
        Self {
            inside: self.inside - before.inside,
            maps: self.maps - before.maps,
            unmaps: self.unmaps - before.unmaps,
            creates: self.creates - before.creates,
        }
    }
}
