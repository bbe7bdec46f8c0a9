//! How long does a server wait for the addresses of all the requests that it might ever serve?
//!
//! Asked because nothing is backed at first, so that a start should cost no more than a few calls: Yi-34B
//! with 500 slots of 200K tokens, whole and as one rank of two, which comes to some 12 TiB.

use std::time::Duration;

use vattn::error::Verb;
use vattn::units::Bytes;
use vattn::{Config, Geometry, KvCache};

use crate::table::{Cell, Table};
use crate::timing::Samples;
use crate::{Arc, Bench, LAYOUTS, calls, tokens};

const SLOTS: u32 = 500;
const TOKENS: u64 = 200_000;
const RUNS: usize = 41;
const MOST: Duration = Duration::from_millis(5);

pub(crate) fn run(bench: &Bench<'_>) -> Vec<Table> {
    let mut table = Table::new(
        format!("A cache of Yi-34B with {SLOTS} slots of {TOKENS} tokens, nothing backed"),
        &[
            "ranks",
            "layout",
            "virtual",
            "reservations",
            "new µs",
            "p90",
            "of which reserving",
            "the rest",
            "goal",
            "drop µs",
            "runs",
        ],
    );
    for ranks in [2, 1] {
        for (name, layout) in LAYOUTS {
            let geometry = Geometry::preset("yi-34b").unwrap().with_tensor_parallel(ranks).unwrap();
            let config = Config::builder(geometry)
                .layout(layout)
                .max_slots(SLOTS)
                .max_tokens(tokens(TOKENS))
                .budget(bench.budget(Bytes::gib(64)))
                .build()
                .unwrap();
            let [mut made, mut reserved, mut rest, mut dropped] = <[Samples; 4]>::default();
            let (mut addresses, mut reservations) = (Bytes::ZERO, 0);
            while bench.again(made.count(), RUNS) {
                let (driver, config) = (Arc::clone(&bench.target.driver), config.clone());
                let cache = made.time(|| KvCache::new(config, driver)).unwrap();
                let nanoseconds = cache.snapshot().driver[&Verb::Reserve].nanoseconds;
                let reserving = Duration::from_nanos(nanoseconds);
                reserved.push(reserving);
                rest.push(made.last().saturating_sub(reserving));
                addresses = cache.layout().virtual_size();
                reservations = calls(&cache, Verb::Reserve);
                dropped.time(|| drop(cache));
            }
            table.row([
                Cell::Count(ranks.into()),
                Cell::text(name),
                Cell::Size(addresses),
                Cell::Count(reservations),
                Cell::Time(made.median()),
                Cell::Time(made.at(900)),
                Cell::Time(reserved.median()),
                Cell::Time(rest.median()),
                Cell::goal(bench.target.is_card(), "< 5 ms", made.median() < MOST),
                Cell::Time(dropped.median()),
                Cell::Count(crate::wide(made.count())),
            ]);
        }
    }
    bench.limit.note().into_iter().for_each(|note| table.note(note));
    vec![table]
}
