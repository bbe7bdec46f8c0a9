//! What does a cache answer to options that can't work and to a driver that won't? Each refusal names
//! the value, the limit and the cure, and leaves nothing behind.

#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

use std::sync::Arc;

use vattn::driver::checked::{Checked, CheckedOptions};
use vattn::driver::ledger::{Ledger, LedgerOptions};
use vattn::driver::{Live, Stream};
use vattn::error::Verb;
use vattn::geometry::{Background, ConfigBuilder, Dtype, LayoutKind};
use vattn::{Bytes, Config, ErrorKind, Fence, Geometry, Health, KvCache, SlotTokens, TokenCount};

const GRANULE: Bytes = Bytes::new(4096);

fn driver(addresses: Option<Bytes>) -> Arc<Checked> {
    let options = LedgerOptions { granule: GRANULE, capacity: Bytes::gib(1), addresses };
    Checked::new(Ledger::new(options).unwrap(), CheckedOptions::TEST)
}

/// Two layers of two heads of 64: 512 bytes a token in each of two tensors.
fn small() -> ConfigBuilder {
    Config::builder(Geometry::uniform(2, 2, 64, Dtype::BF16).unwrap())
        .max_slots(4)
        .max_tokens(TokenCount::new(1000))
        .budget(Bytes::mib(1))
}

fn tokens(count: u64) -> TokenCount {
    TokenCount::new(count)
}

/// The refusal's kind, after it was checked to say all of `words`.
fn refusal<T>(result: vattn::Result<T>, words: &[&str]) -> ErrorKind {
    let Err(error) = result else { panic!("it was accepted") };
    for word in words {
        assert!(error.report().contains(word), "{word:?} is not in: {}", error.report());
    }
    error.kind()
}

#[test]
fn a_budget_that_no_step_fits() {
    let build = |builder: ConfigBuilder| KvCache::new(builder.build().unwrap(), driver(None));
    let words = ["4 KiB", "8 KiB in all", "raise it"];
    assert_eq!(refusal(build(small().budget(GRANULE)), &words), ErrorKind::InvalidConfig);
    // 64 tokens of the spare slot take eight granules in each tensor.
    let spare = small().spare_slot(true).page_tokens(64).budget(GRANULE * 15);
    assert_eq!(refusal(build(spare), &["60 KiB", "64 tokens", "64 KiB in all"]), ErrorKind::InvalidConfig);
    build(small().spare_slot(true).page_tokens(64).budget(GRANULE * 16)).unwrap();

    let cache = build(small()).unwrap();
    for budget in [Bytes::ZERO, GRANULE] {
        assert_eq!(
            refusal(cache.set_budget(budget), &["8 KiB in all", "raise it"]),
            ErrorKind::InvalidConfig
        );
    }
    assert_eq!(cache.budget(), Bytes::mib(1));
    let slot = cache.acquire(tokens(100), None).unwrap();
    cache.step(&[SlotTokens::new(slot, tokens(100))]).unwrap();
}

#[test]
fn more_addresses_than_there_are() {
    let driver = driver(Some(Bytes::mib(1)));
    let config = small().max_tokens(tokens(1_000_000)).build().unwrap();
    let words = ["4 slots", "1000000 tokens", "fewer slots or fewer tokens"];
    let kind = refusal(KvCache::new(config, driver.clone()), &words);
    assert_eq!((kind, driver.live()), (ErrorKind::OutOfAddressSpace, Live::default()));
}

#[test]
fn more_books_than_a_gigabyte_holds() {
    let geometry = Geometry::uniform(200, 2, 64, Dtype::BF16).unwrap();
    let config = Config::builder(geometry).layout(LayoutKind::PerLayer).max_slots(100_000);
    let config = config.max_tokens(tokens(16)).budget(Bytes::gib(1)).build().unwrap();
    let words = ["100000 slots in 400 tensors", "16777216 is the limit", "fewer slots"];
    assert_eq!(refusal(KvCache::new(config, driver(None)), &words), ErrorKind::InvalidConfig);
}

#[test]
fn a_token_of_many_petabytes_is_no_reason_to_panic() {
    let granule = Bytes::gib(1 << 18);
    let options = LedgerOptions { granule, capacity: Bytes::new(1 << 60), addresses: None };
    let geometry = Geometry::uniform(1, 1 << 29, 1 << 28, Dtype::U8).unwrap();
    let config = Config::builder(geometry).max_slots(1).max_tokens(tokens(1)).budget(Bytes::new(1 << 60));
    let cache = KvCache::new(config.build().unwrap(), Ledger::new(options).unwrap()).unwrap();
    let slot = cache.acquire(tokens(u64::MAX), None).unwrap();
    cache.step(&[SlotTokens::new(slot, tokens(1))]).unwrap();
}

#[test]
fn a_slot_whose_way_is_blocked_for_ever_stops_nobody_else() {
    let driver = driver(None);
    let cache = KvCache::new(small().build().unwrap(), driver.clone()).unwrap();
    let first = cache.acquire(tokens(100), None).unwrap();
    driver.fail_call_of(Verb::SetAccess, 1, ErrorKind::Driver);
    driver.fail_from_of(Verb::Unmap, 1, ErrorKind::Driver);
    cache.step(&[SlotTokens::new(first, tokens(100))]).unwrap_err();
    cache.retire(first, &[Fence::Idle]).unwrap();
    assert_eq!(cache.health(), Health::Degraded);
    let report = cache.report().unwrap();
    assert_eq!(report.slots.len(), 1, "the slot is empty, and still has memory in its way");
    assert_eq!(report.slots[0].quarantined, cache.bytes().quarantined);
    for _ in 0..8 {
        let slot = cache.acquire(tokens(100), None).unwrap();
        assert_ne!(slot.index(), first.index());
        cache.step(&[SlotTokens::new(slot, tokens(100))]).unwrap();
        cache.retire(slot, &[Fence::Idle]).unwrap();
    }
    // With all others in use it is better than none.
    let others: Vec<_> = (0..3).map(|_| cache.acquire(tokens(100), None).unwrap()).collect();
    driver.clear_faults();
    let last = cache.acquire(tokens(100), None).unwrap();
    assert_eq!((last.index(), others.len()), (first.index(), 3));
    cache.step(&[SlotTokens::new(last, tokens(100))]).unwrap();
    assert_eq!(cache.health(), Health::Healthy);
    cache.report().unwrap();
}

#[test]
fn what_failed_is_not_counted_as_done() {
    let driver = driver(None);
    let cache = KvCache::new(small().build().unwrap(), driver.clone()).unwrap();
    let slot = cache.acquire(tokens(100), Some(Stream::LEGACY)).unwrap();
    cache.step(&[SlotTokens::new(slot, tokens(100))]).unwrap();
    cache.retire(slot, &[Fence::Stream(Stream::LEGACY)]).unwrap();
    driver.fail_call_of(Verb::StreamWait, 1, ErrorKind::CapturingStream);
    let before = cache.snapshot().events;
    assert_eq!(
        refusal(cache.acquire(tokens(100), Some(Stream::PER_THREAD)), &[]),
        ErrorKind::CapturingStream
    );
    let after = cache.snapshot();
    assert_eq!((after.events, after.slots.active), (before, 0));
    assert_eq!(after.failures[&ErrorKind::CapturingStream], 1);
}

#[test]
fn the_spare_slot_is_nobodys() {
    let cache = KvCache::new(small().spare_slot(true).build().unwrap(), driver(None)).unwrap();
    let slots = cache.snapshot().slots;
    assert_eq!((slots.max, slots.active, cache.spare_slot()), (4, 0, Some(4)));
    let all: Vec<_> = (0..4).map(|_| cache.acquire(tokens(1), None).unwrap()).collect();
    assert!(all.iter().all(|slot| slot.index() < 4));
    assert_eq!(refusal(cache.acquire(tokens(1), None), &["all 4 slots"]), ErrorKind::NoFreeSlot);
}

#[test]
fn per_thread_streams_are_never_taken_for_one_another() {
    let driver = driver(None);
    let cache = KvCache::new(small().build().unwrap(), driver.clone()).unwrap();
    let stream = Stream::PER_THREAD;
    let slot = cache.acquire(tokens(100), Some(stream)).unwrap();
    cache.step(&[SlotTokens::new(slot, tokens(100))]).unwrap();
    cache.retire(slot, &[Fence::Stream(stream)]).unwrap();
    cache.acquire(tokens(100), Some(stream)).unwrap();
    assert_eq!(driver.calls().of(Verb::StreamWait), 1);
}

/// Not a refusal, but no reason to be long about it either.
#[test]
fn a_token_of_many_terabytes_is_given_a_slot_at_once() {
    let geometry = Geometry::uniform(1, u32::MAX, 4096, Dtype::F32).unwrap();
    let config = Config::builder(geometry).max_slots(2).max_tokens(tokens(256)).budget(Bytes::mib(1));
    let cache = KvCache::new(config.build().unwrap(), driver(None)).unwrap();
    let start = std::time::Instant::now();
    let slot = cache.acquire(tokens(4), None).unwrap();
    assert_eq!(refusal(cache.step(&[SlotTokens::new(slot, tokens(1))]), &[]), ErrorKind::OutOfBudget);
    assert!(start.elapsed().as_secs() < 5, "it took {:?}", start.elapsed());
}

#[test]
fn what_no_device_has_is_refused_before_it_is_planned() {
    let geometry = Geometry::uniform(1, u32::MAX, 4096, Dtype::F32).unwrap();
    let config = Config::builder(geometry).max_slots(2).max_tokens(tokens(256)).background(Background::Off);
    let cache = KvCache::new(config.budget(Bytes::new(u64::MAX)).build().unwrap(), driver(None)).unwrap();
    let start = std::time::Instant::now();
    let slot = cache.acquire(tokens(1), None).unwrap();
    let step = [SlotTokens::new(slot, tokens(1))];
    assert_eq!(refusal(cache.step(&step), &["1 slots"]), ErrorKind::OutOfDeviceMemory);
    cache.prefetch(&[SlotTokens::new(slot, tokens(8))]).unwrap();
    assert!(start.elapsed().as_secs() < 1, "it took {:?}", start.elapsed());
    cache.report().unwrap();
}
