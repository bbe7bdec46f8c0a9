//! Memory committed up front: is all of it made when the cache is, and is a server's traffic then served
//! without making any?

#![allow(clippy::unwrap_used, reason = "a test's helpers fail as the test does")]

use vattn::driver::checked::{Checked, CheckedOptions};
use vattn::driver::ledger::{Ledger, LedgerOptions};
use vattn::error::Verb;
use vattn::geometry::Commit;
use vattn::units::SizeClass;
use vattn::{Bytes, Config, ErrorKind, Fence, Geometry, KvCache, SlotTokens, TokenCount};

const BUDGET: Bytes = Bytes::gib(120);

fn cache(commit: Commit) -> (std::sync::Arc<Checked>, vattn::Result<KvCache>) {
    let options = LedgerOptions { granule: Bytes::mib(2), capacity: BUDGET, addresses: None };
    let checked = Checked::new(Ledger::new(options).unwrap(), CheckedOptions::TEST);
    let config = Config::builder(Geometry::preset("llama-3-8b").unwrap()).budget(BUDGET).commit(commit);
    let cache = KvCache::new(config.build().unwrap(), checked.clone());
    (checked, cache)
}

#[test]
fn a_hundred_requests_are_served_from_what_is_there() {
    let (checked, cache) = cache(Commit::Whole);
    let cache = cache.unwrap();
    let bytes = cache.bytes();
    assert_eq!((bytes.held, bytes.free), (BUDGET, BUDGET));
    let calls = checked.calls();
    assert_eq!(calls.total(), calls.of(Verb::Create) + calls.of(Verb::Reserve), "nothing is mapped yet");

    checked.reset_counts();
    // Prompts of 100 to 4,000 tokens that each grow by 300, 30 at a time.
    let mut running = Vec::new();
    for number in 0..100_u64 {
        let prompt = TokenCount::new(100 + number * 1237 % 3900);
        let slot = cache.acquire(prompt, None).unwrap();
        cache.step(&[SlotTokens::new(slot, prompt)]).unwrap();
        running.push(SlotTokens::new(slot, prompt));
        for _ in 0..10 {
            running.iter_mut().for_each(|entry| entry.tokens += TokenCount::new(1));
            cache.step(&running).unwrap();
        }
        if running.len() == 30 {
            cache.retire(running.remove(0).slot, &[Fence::Idle]).unwrap();
        }
    }
    let calls = checked.calls();
    assert_eq!((calls.of(Verb::Create), calls.of(Verb::Release)), (0, 0), "no class was resized");
    assert!(calls.of(Verb::Map) > 0);
    cache.report().unwrap();
    drop((running, cache));
    assert_eq!(checked.live(), vattn::driver::Live::default());
}

#[test]
fn a_mix_is_made_as_it_is_asked_for() {
    let class = |exponent| SizeClass::new(exponent).unwrap();
    let (checked, cache) = cache(Commit::UpFront(vec![(class(0), 3), (class(8), 2)]));
    let cache = cache.unwrap();
    assert_eq!(checked.calls().of(Verb::Create), 5);
    assert_eq!(cache.bytes().free, Bytes::mib(6 + 1024));
    let extents = cache.snapshot().extents;
    assert_eq!((extents[0].free, extents[8].free), (3, 2));
}

#[test]
fn more_than_the_budget_is_refused_and_nothing_stays() {
    let (checked, cache) = cache(Commit::UpFront(vec![(SizeClass::LARGEST, 241)]));
    let error = cache.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidConfig, "{error}");
    assert!(error.report().contains("61696 granules") && error.report().contains("120 GiB"), "{error}");
    assert_eq!(checked.live(), vattn::driver::Live::default());
}
