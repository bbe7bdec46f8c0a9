//! Do calls of two threads, in any order of their locks, leave the books of a whole cache right?
//!
//! The bookkeeping driver is real and its locks are not loom's: nothing else happens under one. Up
//! to two switches of threads that neither asked for are tried at every lock and atomic, which keeps
//! the whole to seconds. Run with
//!
//! ```text
//! RUSTFLAGS="--cfg loom" cargo test -p vattn --release --lib loom
//! ```

use std::sync::Arc;

use loom::thread;

use crate::cache::{Fence, KvCache, SlotTokens};
use crate::driver::ledger::{Ledger, LedgerOptions};
use crate::error::ErrorKind;
use crate::geometry::{Config, Geometry};
use crate::units::{Bytes, SlotId, TokenCount};

fn model(run: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(2);
    builder.max_branches = 100_000;
    builder.check(run);
}

/// Two tensors in which a granule holds 32 tokens, and a budget of so many granules in all.
fn cache(slots: u32, granules: u64) -> Arc<KvCache> {
    let granule = Bytes::mib(2);
    let config = Config::builder(Geometry::preset("llama-3-8b").unwrap())
        .max_slots(slots)
        .max_tokens(TokenCount::new(64))
        .budget(granule * granules)
        .build()
        .unwrap();
    let options = LedgerOptions { granule, capacity: granule * granules, addresses: None };
    Arc::new(KvCache::new(config, Ledger::new(options).unwrap()).unwrap())
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
