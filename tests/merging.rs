//! Are free extents merged into larger ones on the serving path? On a device with room, where creating
//! is quick; never on one that is nearly full, where it takes a millisecond.

#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

use std::sync::Arc;

use vattn::driver::checked::{Checked, CheckedOptions};
use vattn::driver::ledger::{Ledger, LedgerOptions};
use vattn::error::Verb;
use vattn::units::{Bytes, TokenCount};
use vattn::{Config, Fence, Geometry, KvCache, SlotTokens};

const GRANULE: Bytes = Bytes::mib(2);
/// Of the cache, in granules: 32 tokens of Llama-3-8B in each of two tensors.
const BUDGET: u64 = 256;

/// A cache whose whole budget lies free in extents of one granule.
fn of_small_extents(device: u64) -> (KvCache, Arc<Checked>) {
    let ledger = Ledger::new(LedgerOptions { granule: GRANULE, capacity: GRANULE * device, addresses: None });
    let driver = Checked::new(ledger.unwrap(), CheckedOptions::TEST);
    let config = Config::builder(Geometry::preset("llama-3-8b").unwrap())
        .max_slots(200)
        .max_tokens(TokenCount::new(4096))
        .budget(GRANULE * BUDGET)
        .background(vattn::geometry::Background::Off)
        .build()
        .unwrap();
    let cache = KvCache::new(config, driver.clone()).unwrap();
    // Whoever has a token, and no more room than that, has one granule of keys and one of values.
    let slots: Vec<_> = (0..BUDGET / 2)
        .map(|_| {
            let slot = cache.acquire(TokenCount::new(1), None).unwrap();
            cache.step(&[SlotTokens::new(slot, TokenCount::new(1))]).unwrap();
            slot
        })
        .collect();
    for slot in slots {
        cache.retire(slot, &[Fence::Idle]).unwrap();
    }
    cache.reclaim(GRANULE * BUDGET, &[Fence::Idle]).unwrap();
    assert_eq!(cache.snapshot().extents[0].free, BUDGET);
    (cache, driver)
}

/// A prompt of so many granules in each tensor: how many extents are created, released and mapped for it.
fn prompt(cache: &KvCache, driver: &Checked, granules: u64) -> [u64; 3] {
    driver.reset_counts();
    let tokens = TokenCount::new(granules * 32);
    let slot = cache.acquire(tokens, None).unwrap();
    cache.step(&[SlotTokens::new(slot, tokens)]).unwrap();
    [Verb::Create, Verb::Release, Verb::Map].map(|verb| driver.calls().of(verb))
}

/// How many extents of so many granules are free, and how many are mapped.
fn extents(cache: &KvCache, granules: u64) -> [u64; 2] {
    let extents = cache.snapshot().extents;
    let class = extents.iter().find(|class| class.granules.get() == granules).unwrap();
    [class.free, class.mapped]
}

#[test]
fn a_device_with_room_is_worth_fewer_mappings() {
    let (cache, driver) = of_small_extents(BUDGET * 2);
    assert_eq!(prompt(&cache, &driver, 64), [2, 128, 2]);
    assert_eq!(driver.calls().of(Verb::MemoryInfo), 1, "the device is asked once a step");
}

#[test]
fn on_a_device_that_is_nearly_full_a_prompt_takes_what_there_is() {
    let (cache, driver) = of_small_extents(BUDGET + BUDGET / 32);
    assert_eq!(prompt(&cache, &driver, 64), [0, 0, 128]);
    assert_eq!(cache.snapshot().events.resized, 0);
}

#[test]
fn on_a_device_that_is_nearly_full_a_large_extent_is_split_once_the_small_ones_are_used() {
    let (cache, driver) = of_small_extents(BUDGET + BUDGET / 32);
    cache.trim(GRANULE * (BUDGET / 2), &[Fence::Idle]).unwrap();
    let tokens = TokenCount::new(64 * 32);
    let slot = cache.acquire(tokens, None).unwrap();
    cache.step(&[SlotTokens::new(slot, tokens)]).unwrap();
    cache.retire(slot, &[Fence::Idle]).unwrap();
    cache.reclaim(GRANULE * BUDGET, &[Fence::Idle]).unwrap();
    assert_eq!([1, 64].map(|granules| extents(&cache, granules)), [[BUDGET / 2, 0], [2, 0]]);

    for _ in 0..2 {
        assert_eq!(
            prompt(&cache, &driver, 32),
            [0, 0, 64],
            "one of 64 is left whole, and none of 32 is merged"
        );
    }
    assert_eq!(prompt(&cache, &driver, 32), [2, 1, 2], "one of 64 becomes two of 32");
    assert_eq!([1, 32, 64].map(|granules| extents(&cache, granules)), [[0, BUDGET / 2], [0, 2], [1, 0]]);
}
