//! Do calls of two threads, in any order of their locks, leave the books of a whole cache right? And do
//! they with the mapper as a third?
//!
//! The bookkeeping driver is real and its locks are not loom's: nothing else happens under one, and no
//! model waits for an event. Up to two switches of threads that neither asked for are tried at every lock
//! and atomic, which keeps the whole to seconds. Run with
//!
//! ```text
//! RUSTFLAGS="--cfg loom" cargo test -p vattn --release --lib loom
//! ```

use std::sync::Arc;

use loom::thread;

use crate::cache::{Fence, Health, KvCache, Report, SlotTokens};
use crate::driver::Live;
use crate::driver::ledger::{Ledger, LedgerOptions};
use crate::error::ErrorKind;
use crate::geometry::{Background, Config, Geometry};
use crate::units::{Bytes, SlotId, TokenCount};

fn model(run: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(2);
    builder.max_branches = 100_000;
    builder.check(run);
}

/// Two tensors in which a granule holds 32 tokens, and a budget of so many granules in all.
fn cache(slots: u32, granules: u64) -> Arc<KvCache> {
    cache_on(&ledger(granules), slots, granules, Background::Off)
}

/// The same with a mapper, which maps the second of a slot's two granules ahead as soon as there is a
/// token in the first.
fn cache_with_mapper(slots: u32, granules: u64) -> (Arc<Ledger>, Arc<KvCache>) {
    let ledger = ledger(granules);
    let cache = cache_on(&ledger, slots, granules, Background::Thread);
    (ledger, cache)
}

const GRANULE: Bytes = Bytes::mib(2);

fn ledger(granules: u64) -> Arc<Ledger> {
    Ledger::new(LedgerOptions { granule: GRANULE, capacity: GRANULE * granules, addresses: None }).unwrap()
}

fn cache_on(ledger: &Arc<Ledger>, slots: u32, granules: u64, background: Background) -> Arc<KvCache> {
    let config = Config::builder(Geometry::preset("llama-3-8b").unwrap())
        .max_slots(slots)
        .max_tokens(TokenCount::new(64))
        .budget(GRANULE * granules)
        .background(background)
        .look_ahead(TokenCount::new(64))
        .look_ahead_budget(GRANULE * granules)
        .at_hand(Bytes::ZERO)
        .build()
        .unwrap();
    Arc::new(KvCache::new(config, ledger.clone()).unwrap())
}

/// Nobody waits for anything any more, and all books agree.
fn settle(cache: &KvCache) -> Report {
    cache.flush().unwrap();
    let report = cache.report().unwrap();
    assert_eq!(report.health, Health::Healthy);
    report
}

fn acquire(cache: &KvCache) -> SlotId {
    cache.acquire(TokenCount::new(1), None).unwrap()
}

/// Whether the step fitted.
fn step(cache: &KvCache, slot: SlotId, tokens: u64) -> bool {
    match cache.step(&[SlotTokens::new(slot, TokenCount::new(tokens))]) {
        Ok(()) => true,
        Err(error) if error.kind() == ErrorKind::OutOfBudget => false,
        Err(error) => panic!("{}", error.report()),
    }
}

#[test]
fn two_requests_share_a_budget_for_one() {
    model(|| {
        let cache = cache(2, 2);
        let (mine, others) = (acquire(&cache), acquire(&cache));
        let other = {
            let cache = Arc::clone(&cache);
            thread::spawn(move || step(&cache, others, 1))
        };
        let fitted = step(&cache, mine, 1);
        assert_ne!(fitted, other.join().unwrap(), "one of them fits, and one only");
        let report = cache.report().unwrap();
        assert_eq!(report.snapshot.bytes.mapped, cache.budget());
    });
}

#[test]
fn a_pin_is_dropped_while_its_slot_grows() {
    model(|| {
        let cache = cache(1, 4);
        let slot = acquire(&cache);
        assert!(step(&cache, slot, 32));
        let pin = cache.pin(slot).unwrap();
        cache.truncate(slot, TokenCount::new(5), &[Fence::Idle]).unwrap();
        let other = thread::spawn(move || drop(pin));
        assert!(step(&cache, slot, 40));
        other.join().unwrap();
        let report = cache.report().unwrap();
        assert_eq!((report.snapshot.bytes.pinned, report.snapshot.pins), (Bytes::ZERO, 0));
        cache.retire(slot, &[Fence::Idle]).unwrap();
        assert_eq!(cache.report().unwrap().snapshot.bytes.mapped, Bytes::ZERO);
    });
}

#[test]
fn a_cache_and_a_pin_of_it_are_dropped_at_once() {
    model(|| {
        let ledger = ledger(4);
        let cache = cache_on(&ledger, 2, 4, Background::Off);
        let slots = [acquire(&cache), acquire(&cache)];
        let pins = slots.map(|slot| {
            assert!(step(&cache, slot, 1));
            cache.pin(slot).unwrap()
        });
        let [first, second] = pins;
        let other = thread::spawn(move || drop(first));
        drop(cache);
        other.join().unwrap();
        assert_eq!(ledger.live().bytes, second.bytes(), "what nobody keeps is given back");
        drop(second);
        assert_eq!(ledger.live(), Live::default());
    });
}

#[test]
fn one_retires_while_another_needs_its_memory() {
    model(|| {
        let cache = cache(2, 2);
        let (mine, others) = (acquire(&cache), acquire(&cache));
        assert!(step(&cache, mine, 32));
        let other = {
            let cache = Arc::clone(&cache);
            thread::spawn(move || step(&cache, others, 20))
        };
        cache.retire(mine, &[Fence::Idle]).unwrap();
        let fitted = other.join().unwrap();
        cache.report().unwrap();
        assert!(fitted || step(&cache, others, 20), "what was retired is there to be taken");
        let report = cache.report().unwrap();
        assert_eq!(report.slots.len(), 1);
        assert_eq!(report.snapshot.bytes.parked, Bytes::ZERO);
    });
}

#[test]
fn two_calls_on_one_slot_are_one_after_the_other_or_refused() {
    model(|| {
        let cache = cache(1, 4);
        let slot = acquire(&cache);
        let other = {
            let cache = Arc::clone(&cache);
            thread::spawn(move || cache.step(&[SlotTokens::new(slot, TokenCount::new(40))]))
        };
        let retired = cache.retire(slot, &[Fence::Idle]);
        let stepped = other.join().unwrap();
        let expected = [ErrorKind::SlotBusy, ErrorKind::StaleSlot];
        for error in [&retired, &stepped].into_iter().filter_map(|result| result.as_ref().err()) {
            assert!(expected.contains(&error.kind()), "{}", error.report());
        }
        assert!(retired.is_ok() || stepped.is_ok(), "one of the two came first");
        let report = cache.report().unwrap();
        assert_eq!(report.snapshot.slots.active, u64::from(retired.is_err()));
    });
}

#[test]
fn an_adoption_and_a_trim_do_not_meet() {
    model(|| {
        let cache = cache(2, 2);
        let slot = acquire(&cache);
        assert!(step(&cache, slot, 32));
        cache.retire(slot, &[Fence::Idle]).unwrap();
        let other = {
            let cache = Arc::clone(&cache);
            thread::spawn(move || cache.trim(Bytes::ZERO, &[Fence::Idle]).unwrap())
        };
        let slot = acquire(&cache);
        assert!(step(&cache, slot, 32), "there is memory, parked or free");
        other.join().unwrap();
        let report = cache.report().unwrap();
        assert_eq!(report.snapshot.bytes.mapped, cache.budget());
    });
}

#[test]
fn a_slot_is_stepped_and_another_retired_while_memory_is_mapped_ahead() {
    model(|| {
        let (ledger, cache) = cache_with_mapper(2, 8);
        let (mine, others) = (acquire(&cache), acquire(&cache));
        assert!(step(&cache, mine, 1));
        assert!(step(&cache, others, 1));
        let other = {
            let cache = Arc::clone(&cache);
            thread::spawn(move || cache.retire(others, &[Fence::Idle]).unwrap())
        };
        assert!(step(&cache, mine, 40));
        other.join().unwrap();
        let report = settle(&cache);
        let bytes = report.snapshot.bytes;
        assert_eq!((bytes.mapped, bytes.ahead), (GRANULE * 4, Bytes::ZERO));
        assert_eq!(report.snapshot.slots.parked, 1);
        drop(cache);
        assert_eq!(ledger.live(), Live::default());
    });
}

#[test]
fn one_steps_to_what_the_mapper_is_mapping_for_another() {
    model(|| {
        // Room for one whole slot and the start of another: one of the two gets more.
        let (_ledger, cache) = cache_with_mapper(2, 6);
        let (mine, others) = (acquire(&cache), acquire(&cache));
        assert!(step(&cache, others, 1));
        let other = {
            let cache = Arc::clone(&cache);
            thread::spawn(move || step(&cache, others, 40))
        };
        let fitted = step(&cache, mine, 33);
        let other = other.join().unwrap();
        assert!(fitted || other, "there is room for one of them");
        assert!(!(fitted && other), "and for one only");
        settle(&cache);
    });
}

#[test]
fn a_slot_is_adopted_while_memory_is_mapped_for_it() {
    model(|| {
        let (_ledger, cache) = cache_with_mapper(1, 4);
        let slot = acquire(&cache);
        assert!(step(&cache, slot, 1));
        cache.retire(slot, &[Fence::Idle]).unwrap();
        let slot = acquire(&cache);
        assert!(step(&cache, slot, 20));
        let report = settle(&cache);
        assert_eq!(report.slots[0].backed, GRANULE * 4, "its memory is one run, whoever it was mapped for");
    });
}

#[test]
fn a_trim_is_carried_out_beside_a_step() {
    model(|| {
        let (ledger, cache) = cache_with_mapper(2, 4);
        let (mine, others) = (acquire(&cache), acquire(&cache));
        assert!(step(&cache, others, 64));
        cache.retire(others, &[Fence::Idle]).unwrap();
        let other = {
            let cache = Arc::clone(&cache);
            thread::spawn(move || _ = cache.trim(Bytes::ZERO, &[Fence::Idle]).unwrap())
        };
        assert!(step(&cache, mine, 1), "there is memory, parked or free");
        other.join().unwrap();
        let report = settle(&cache);
        let bytes = report.snapshot.bytes;
        assert_eq!((bytes.mapped, bytes.free), (GRANULE * 2, Bytes::ZERO));
        assert_eq!(bytes.parked, bytes.ahead);
        drop(cache);
        assert_eq!(ledger.live(), Live::default());
    });
}

#[test]
fn a_cache_is_dropped_with_its_mapper_just_woken() {
    model(|| {
        let (ledger, cache) = cache_with_mapper(1, 4);
        let slot = acquire(&cache);
        assert!(step(&cache, slot, 1));
        let other = {
            let cache = Arc::clone(&cache);
            thread::spawn(move || cache.retire(slot, &[Fence::Idle]).unwrap())
        };
        // Whoever lets go last ends the mapper.
        drop(cache);
        other.join().unwrap();
        assert_eq!(ledger.live(), Live::default());
    });
}

#[test]
fn who_flushes_finds_his_own_wishes_done() {
    model(|| {
        let (_ledger, cache) = cache_with_mapper(2, 8);
        let (mine, others) = (acquire(&cache), acquire(&cache));
        let wish = |cache: &KvCache, slot| {
            cache.prefetch(&[SlotTokens::new(slot, TokenCount::new(64))]).unwrap();
            cache.flush().unwrap();
            assert!(cache.bytes().ahead >= GRANULE * 4);
        };
        let other = {
            let cache = Arc::clone(&cache);
            thread::spawn(move || wish(&cache, others))
        };
        wish(&cache, mine);
        other.join().unwrap();
        let report = settle(&cache);
        assert_eq!(report.snapshot.bytes.ahead, GRANULE * 8);
    });
}
