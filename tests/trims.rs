//! A trim that has to wait for a fence, while there is other work in the background.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]
#![allow(unsafe_code, reason = "foreign events, and writes through addresses")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use common::{Shape, shapes, step, stream, tokens};
use vattn::error::Verb;
use vattn::geometry::Background;
use vattn::{Bytes, Fence};

#[test]
fn what_is_given_back_is_not_taken_again_before_the_trim_has_come_to_its_end() {
    let shape = Shape { budget: 640, background: Background::Caller, ..shapes::sliced() };
    let watch = shape.watch();
    let cache = shape.cache(&watch);
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
