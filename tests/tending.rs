//! What is done in the background, one turn at a time on the thread that asks for it.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]
#![allow(unsafe_code, reason = "foreign events, and writes through addresses")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use common::{Shape, Watch, shapes, step, stream, tokens};
use vattn::error::Verb;
use vattn::geometry::Background;
use vattn::{Bytes, Fence, KvCache};

fn cache_of(budget: u64) -> (Watch, KvCache) {
    let shape = Shape { budget, background: Background::Caller, slots: 8, ..shapes::sliced() };
    let watch = shape.watch();
    let cache = shape.cache(&watch);
    (watch, cache)
}

/// Whichever slot it is: they are told of at different points.
#[test]
fn a_request_that_grows_token_by_token_maps_nothing_itself_after_its_prompt() {
    let (_watch, cache) = cache_of(800);
    let slots: Vec<_> = (0..8).map(|_| cache.acquire(tokens(10), None).unwrap()).collect();
    for slot in &slots {
        step(&cache, *slot, 10).unwrap();
    }
    cache.tend().unwrap();
    let on_the_path = || {
        let snapshot = cache.snapshot();
        snapshot.driver[&Verb::Map].calls - snapshot.background[&Verb::Map].calls
    };
    let (before, mapped) = (on_the_path(), cache.snapshot().events.mapped_ahead);
    for count in 11..=150 {
        for slot in &slots {
            step(&cache, *slot, count).unwrap();
            assert_eq!(on_the_path(), before, "{slot:?} at {count} tokens");
            cache.tend().unwrap();
        }
    }
    assert!(cache.snapshot().events.mapped_ahead > mapped);
}

#[test]
fn what_is_given_back_is_not_taken_again_before_the_trim_has_come_to_its_end() {
    let (watch, cache) = cache_of(640);
    let [slot, other] = [200, 50].map(|count| {
        let slot = cache.acquire(tokens(count), None).unwrap();
        step(&cache, slot, count).unwrap();
        slot
    });
    watch.hold(stream(1));
    cache.retire(slot, &[Fence::Stream(stream(1))]).unwrap();
    cache.trim(Bytes::ZERO, &[Fence::Idle]).unwrap();
    // Extents that this lacks are to be kept at hand from now on.
    step(&cache, other, 120).unwrap();
    step(&cache, other, 180).unwrap();
    let creates = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&creates);
    watch.checked.on_call(Box::new(move |verb| {
        counted.fetch_add(u64::from(verb == Verb::Create), Ordering::SeqCst);
    }));
    let cache = Arc::new(cache);
    let tended = Arc::clone(&cache);
    // Not waited for where it never ends.
    let tending = thread::spawn(move || tended.tend().unwrap());
    while !tending.is_finished() {
        assert!(creates.load(Ordering::SeqCst) < 100, "the same extents are made and given up over and over");
        thread::yield_now();
    }
    assert!(tending.join().unwrap(), "the trim waits");
    watch.fire(stream(1));
    cache.flush().unwrap();
    assert_eq!(cache.report().unwrap().slots.len(), 1, "the other's alone");
}
