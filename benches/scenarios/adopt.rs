//! What does a request cost that finds a parked slot with enough memory in it?
//!
//! Asked because that is how a busy server's requests mostly start, and the answer is to be: no driver
//! call but for fences. Requests come and go on one stream, then without a device that runs anything. What
//! the mapper does beside is not counted.

use std::collections::BTreeMap;

use vattn::driver::Stream;
use vattn::error::Verb;
use vattn::stats::Snapshot;
use vattn::units::Bytes;
use vattn::{Config, Fence, KvCache, SlotTokens};

use crate::table::{Cell, Table};
use crate::timing::Samples;
use crate::{Arc, Bench, LAYOUTS, llama, tokens, wide};

const PARKED: usize = 64;
const TURNS: usize = 2_000;
/// The verbs of fences.
const FENCES: [Verb; 6] = [
    Verb::RecordEvent,
    Verb::FollowEvent,
    Verb::QueryEvent,
    Verb::WaitEvent,
    Verb::DestroyEvent,
    Verb::StreamWait,
];

pub(crate) fn run(bench: &Bench<'_>) -> Vec<Table> {
    let mut table = Table::new(
        format!("Adopting one of {PARKED} parked slots of Llama-3-8B: acquire and step to the prompt"),
        &[
            "layout",
            "fence",
            "µs",
            "p99",
            "retire µs",
            "adoptions",
            "driver calls an adoption",
            "calls but for fences",
            "goal",
        ],
    );
    let turns = if bench.test { 10 } else { TURNS };
    for (name, layout) in LAYOUTS {
        let config = Config::builder(llama())
            .layout(layout)
            .max_slots(u32::try_from(PARKED).unwrap())
            .max_tokens(tokens(32_768))
            .budget(bench.budget(Bytes::gib(64)))
            .build()
            .unwrap();
        let cache = KvCache::new(config, Arc::clone(&bench.target.driver)).unwrap();
        let slots: Vec<_> = (0..PARKED)
            .map(|_| {
                let slot = cache.acquire(tokens(1), None).unwrap();
                cache.step(&[SlotTokens::new(slot, tokens(2_048))]).unwrap();
                slot
            })
            .collect();
        slots.into_iter().for_each(|slot| cache.retire(slot, &[Fence::Idle]).unwrap());

        for (fence_name, fence, stream) in
            [("a stream", Fence::Stream(Stream::LEGACY), Some(Stream::LEGACY)), ("idle", Fence::Idle, None)]
        {
            let (mut taken, mut left) = (Samples::default(), Samples::default());
            cache.flush().unwrap();
            let before = cache.snapshot();
            while taken.count() < turns && !bench.limit.is_over() {
                let prompt = tokens(2_048 - wide(taken.count()) % 200);
                let slot = taken.time(|| {
                    let slot = cache.acquire(prompt, stream).unwrap();
                    cache.step(&[SlotTokens::new(slot, prompt)]).unwrap();
                    slot
                });
                left.time(|| cache.retire(slot, &[fence])).unwrap();
            }
            cache.flush().unwrap();
            let after = cache.snapshot();
            assert_eq!(after.events.adopted - before.events.adopted, wide(taken.count()), "all were adopted");
            let on_the_path = |at: &Snapshot, verb| at.driver[&verb].calls - at.background[&verb].calls;
            let made: BTreeMap<_, _> = Verb::ALL
                .into_iter()
                .map(|verb| (verb, on_the_path(&after, verb) - on_the_path(&before, verb)))
                .filter(|(_, calls)| *calls > 0)
                .collect();
            let others: u64 =
                made.iter().filter(|(verb, _)| !FENCES.contains(verb)).map(|(_, calls)| calls).sum();
            let each: Vec<_> = made
                .iter()
                .map(|(verb, calls)| format!("{} {:.2}", verb.as_str(), share(*calls, taken.count())))
                .collect();
            table.row([
                Cell::text(name),
                Cell::text(fence_name),
                Cell::Time(taken.median()),
                Cell::Time(taken.at(990)),
                Cell::Time(left.median()),
                Cell::Count(wide(taken.count())),
                Cell::text(if each.is_empty() { "none".into() } else { each.join(", ") }),
                Cell::Count(others),
                Cell::goal(true, "none", others == 0),
            ]);
        }
    }
    table.note("The driver calls include those of the retirement.");
    bench.limit.note().into_iter().for_each(|note| table.note(note));
    vec![table]
}

fn share(calls: u64, turns: usize) -> f64 {
    f64::from(u32::try_from(calls).unwrap()) / f64::from(u32::try_from(turns.max(1)).unwrap())
}
