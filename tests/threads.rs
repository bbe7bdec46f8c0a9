//! What may happen at the same time, who waits for whom, and what fences hold back.
//!
//! Threads meet at gates in the driver and are counted where they arrive; nothing sleeps, and no test
//! depends on who is faster.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]
#![allow(unsafe_code, reason = "foreign events, and writes through addresses")]

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;

use common::gate::Gate;
use common::{Numbers, Shape, Watch, contents, kind, setting, shapes, step, stream, tokens};
use vattn::driver::{Driver, Live, Stream};
use vattn::error::{ErrorKind, Verb};
use vattn::{Bytes, Fence, Health, KvCache, SlotId, SlotTokens};

const ONE: Stream = stream(1);
const TWO: Stream = stream(2);
const IDLE: &[Fence] = &[Fence::Idle];

fn shape() -> Shape {
    Shape { budget: 400, ..shapes::sliced() }
}

fn cache_of(shape: &Shape) -> (Watch, KvCache) {
    let watch = shape.watch();
    let cache = shape.cache(&watch);
    (watch, cache)
}

/// A request of so many tokens.
fn request(cache: &KvCache, count: u64) -> SlotId {
    let slot = cache.acquire(tokens(count), Some(ONE)).unwrap();
    step(cache, slot, count).unwrap();
    slot
}

/// What a caller sees of slots and memory.
fn seen(cache: &KvCache) -> (Vec<vattn::cache::SlotReport>, vattn::stats::ByteCounts) {
    (cache.report().unwrap().slots, cache.bytes())
}

/// Until a thread blocks on an event. One that ends without having waited is a failure, not a hang.
fn wait_for_waiting<T>(watch: &Watch, waiter: &thread::ScopedJoinHandle<'_, T>) {
    while watch.backend.waiting() == 0 {
        assert!(!waiter.is_finished(), "it did not wait");
        thread::yield_now();
    }
}

#[test]
fn a_slot_is_stepped_while_another_is_being_mapped() {
    let (watch, cache) = cache_of(&shape());
    let (first, second) = (request(&cache, 60), request(&cache, 10));
    contents::fill(&cache, first, 1, 0..60);
    for verb in [Verb::Create, Verb::Map, Verb::SetAccess] {
        let now = cache.report().unwrap().slots[usize::try_from(second.index()).unwrap()].tokens.get();
        // Nothing is left over that the step could use without a call.
        cache.trim(Bytes::ZERO, IDLE).unwrap();
        let gate = Gate::before(&watch, verb);
        thread::scope(|scope| {
            let mapping = scope.spawn(|| step(&cache, second, now + 80));
            gate.wait_for_arrival(&mapping);
            // The other slot does all that needs no driver call.
            step(&cache, first, 60).unwrap();
            cache.truncate(first, tokens(60), IDLE).unwrap();
            assert!(cache.fits(&[SlotTokens::new(first, tokens(64))]).unwrap()[0]);
            assert!(cache.admits(&[tokens(8)]) == 1);
            let third = cache.acquire(tokens(1), Some(ONE)).unwrap();
            cache.retire(third, IDLE).unwrap();
            assert_eq!(cache.bytes().needed, Bytes::new(1024 * (60 + now)));
            // The slot itself is busy.
            assert_eq!(kind(cache.retire(second, IDLE)), ErrorKind::SlotBusy);
            assert_eq!(kind(cache.truncate(second, tokens(0), IDLE)), ErrorKind::SlotBusy);
            assert_eq!(kind(cache.fits(&[SlotTokens::new(second, tokens(200))])), ErrorKind::SlotBusy);
            // A step of it waits for its turn.
            let after = scope.spawn(|| step(&cache, second, now + 81));
            gate.open();
            mapping.join().unwrap().unwrap();
            after.join().unwrap().map_or_else(
                |error| panic!("a step that waited for the one before: {error}"),
                |()| assert!(cache.bytes().needed >= Bytes::new(1024 * (60 + now + 81))),
            );
        });
        watch.checked.clear_on_call();
        contents::find(&cache, first, 1, 60);
        cache.report().unwrap();
    }
}

#[test]
fn a_slot_is_acquired_while_its_memory_is_reclaimed() {
    let (watch, cache) = cache_of(&shape());
    let (first, second) = (request(&cache, 100), request(&cache, 50));
    cache.retire(first, IDLE).unwrap();
    contents::fill(&cache, second, 2, 0..50);
    let gate = Gate::before(&watch, Verb::Unmap);
    thread::scope(|scope| {
        let reclaiming = scope.spawn(|| cache.reclaim(Bytes::gib(1), IDLE));
        gate.wait_for_arrival(&reclaiming);
        let all: Vec<_> = (0..5).map(|_| cache.acquire(tokens(100), Some(TWO)).unwrap()).collect();
        assert_eq!(kind(cache.acquire(tokens(1), Some(TWO))), ErrorKind::NoFreeSlot);
        let stepping = scope.spawn(|| {
            for slot in &all {
                step(&cache, *slot, 100).unwrap();
                contents::fill(&cache, *slot, u64::from(slot.index()) + 10, 0..100);
            }
            all
        });
        gate.open();
        reclaiming.join().unwrap().unwrap();
        for slot in stepping.join().unwrap() {
            contents::find(&cache, slot, u64::from(slot.index()) + 10, 100);
        }
    });
    contents::find(&cache, second, 2, 50);
    cache.report().unwrap();
}

#[test]
fn two_threads_drop_the_last_references() {
    for _ in 0..50 {
        let (watch, cache) = cache_of(&shape());
        let slot = request(&cache, 100);
        cache.retire(slot, &[Fence::Stream(ONE)]).unwrap();
        request(&cache, 30);
        let (cache, meet) = (Arc::new(cache), Arc::new(Barrier::new(2)));
        let threads = [Arc::clone(&cache), cache].map(|cache| {
            let meet = Arc::clone(&meet);
            thread::spawn(move || {
                meet.wait();
                drop(cache);
            })
        });
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(watch.checked.live(), Live::default());
    }
}

/// One thread's traffic on slots of its own.
fn traffic(cache: &KvCache, thread: u64, rounds: u64) {
    let mut numbers = Numbers::new(thread + 1);
    let stream = stream(thread % 4);
    for round in 0..rounds {
        let owner = thread << 32 | round;
        let Ok(slot) = cache.acquire(tokens(numbers.below(100)), Some(stream)) else {
            thread::yield_now();
            continue;
        };
        let mut held = 0;
        for _ in 0..numbers.below(6) {
            let to = held + numbers.below(24);
            match step(cache, slot, to) {
                Ok(()) => {
                    contents::fill(cache, slot, owner, held..to);
                    held = to;
                }
                Err(error) => assert_eq!(error.kind(), ErrorKind::OutOfBudget, "{error}"),
            }
            if numbers.below(8) == 0 {
                held /= 2;
                cache.truncate(slot, tokens(held), &[Fence::Stream(stream)]).unwrap();
            }
        }
        contents::find(cache, slot, owner, held);
        cache.retire(slot, &[Fence::Stream(stream)]).unwrap();
        assert_eq!(kind(step(cache, slot, held)), ErrorKind::StaleSlot);
    }
}

#[test]
fn sixteen_threads_at_once() {
    let shape = Shape { slots: 20, budget: 150, ..shapes::sliced() };
    let (watch, cache) = cache_of(&shape);
    let rounds = 40 * setting("VATTN_THREADS_ROUNDS", 1);
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let (cache, over) = (&cache, &over);
        let workers: Vec<_> =
            (0..16).map(|thread| scope.spawn(move || traffic(cache, thread, rounds))).collect();
        scope.spawn(move || {
            let mut numbers = Numbers::new(99);
            while !over.load(Ordering::SeqCst) {
                let bytes = Bytes::new(4096 * numbers.below(150));
                match numbers.below(4) {
                    0 => cache.reclaim(bytes, IDLE).map(drop).unwrap(),
                    1 => cache.trim(bytes, &[Fence::Stream(stream(3))]).map(drop).unwrap(),
                    2 => drop(cache.set_budget(Bytes::new(4096 * (100 + numbers.below(100))))),
                    _ => cache.report().map(drop).unwrap(),
                }
                let bytes = cache.snapshot().bytes;
                assert!(bytes.quarantined.is_zero());
            }
        });
        let results: Vec<_> = workers.into_iter().map(thread::ScopedJoinHandle::join).collect();
        over.store(true, Ordering::SeqCst);
        results.into_iter().for_each(|result| result.unwrap());
    });
    let report = cache.report().unwrap();
    assert_eq!((report.health, report.snapshot.slots.active), (Health::Healthy, 0));
    assert!(report.snapshot.events.adopted > 0, "{report:?}");
    cache.trim(Bytes::ZERO, IDLE).unwrap();
    assert_eq!(watch.checked.live().bytes, Bytes::ZERO);
    assert_eq!(watch.checked.live().events, 0);
    drop(cache);
    assert_eq!(watch.checked.live(), Live::default());
}

#[test]
fn unmapping_waits_for_the_stream() {
    let give_up: [fn(&KvCache); 4] = [
        |cache| assert!(!cache.reclaim(Bytes::gib(1), IDLE).unwrap().is_zero()),
        |cache| assert!(!cache.trim(Bytes::ZERO, IDLE).unwrap().is_zero()),
        |cache| cache.set_budget(Bytes::new(4096 * 30)).unwrap(),
        |cache| {
            // A step that only parked memory is left for.
            cache.set_budget(cache.bytes().held).unwrap();
            let slot = cache.acquire(tokens(1), Some(ONE)).unwrap();
            step(cache, slot, 200).unwrap();
        },
    ];
    for (place, give_up) in give_up.into_iter().enumerate() {
        let shape = Shape { slots: 3, ..shape() };
        let (watch, cache) = cache_of(&shape);
        let (first, second) = (request(&cache, 200), request(&cache, 60));
        watch.hold(ONE);
        cache.retire(first, &[Fence::Stream(ONE)]).unwrap();
        watch.used_by(&cache, first.index(), ONE);
        if place == 3 {
            // Nobody adopts it: the parked slot is somebody's again, without tokens.
            let adopted = cache.acquire(tokens(200), Some(ONE)).unwrap();
            assert_eq!(adopted.index(), first.index());
        }
        thread::scope(|scope| {
            let waiting = scope.spawn(|| give_up(&cache));
            wait_for_waiting(&watch, &waiting);
            // Meanwhile others go on.
            step(&cache, second, 61).unwrap();
            cache.retire(second, IDLE).unwrap();
            assert_eq!(watch.checked.calls().of(Verb::Unmap), 0);
            watch.fire(ONE);
            waiting.join().unwrap();
        });
        assert!(watch.checked.calls().of(Verb::Unmap) > 0, "way {place}");
        assert_eq!(watch.violations(), Vec::<String>::new());
        cache.report().unwrap();
    }
}

/// Whoever finds in his slot what he needs waits for no other thread's driver calls.
#[test]
fn a_request_that_adopts_what_it_needs_does_not_wait_for_memory_that_others_map() {
    let (watch, cache) = cache_of(&shape());
    let (first, second) = (request(&cache, 60), request(&cache, 60));
    contents::fill(&cache, first, 1, 0..60);
    cache.retire(second, IDLE).unwrap();
    let adopted = cache.acquire(tokens(60), Some(ONE)).unwrap();
    assert_eq!(adopted.index(), second.index());
    let third = cache.acquire(tokens(1), None).unwrap();
    let gate = Gate::before(&watch, Verb::Create);
    thread::scope(|scope| {
        let mapping = scope.spawn(|| step(&cache, third, 200));
        gate.wait_for_arrival(&mapping);
        let (steps, calls) = (cache.snapshot().events.steps, watch.checked.calls().total());
        step(&cache, adopted, 50).unwrap();
        cache.step(&[SlotTokens::new(adopted, tokens(60)), SlotTokens::new(first, tokens(60))]).unwrap();
        assert_eq!(cache.snapshot().events.steps, steps + 2);
        assert_eq!(watch.checked.calls().total(), calls);
        // What needs memory, and what is wrong, is told in its turn.
        let growing = scope.spawn(|| step(&cache, first, 250));
        let stale = scope.spawn(|| kind(step(&cache, second, 10)));
        gate.open();
        mapping.join().unwrap().unwrap();
        growing.join().unwrap().unwrap();
        assert_eq!(stale.join().unwrap(), ErrorKind::StaleSlot);
        contents::fill(&cache, adopted, 2, 0..60);
        contents::fill(&cache, third, 3, 0..200);
        for (slot, owner, count) in [(first, 1, 60), (adopted, 2, 60), (third, 3, 200)] {
            contents::find(&cache, slot, owner, count);
        }
    });
    cache.report().unwrap();
}

#[test]
fn the_callers_own_fences_are_waited_for() {
    let (watch, cache) = cache_of(&shape());
    let slot = request(&cache, 100);
    cache.retire(slot, IDLE).unwrap();
    watch.hold(ONE);
    watch.hold(TWO);
    thread::scope(|scope| {
        let fences = &[Fence::Stream(ONE), Fence::Stream(TWO)];
        let trimming = scope.spawn(|| cache.trim(Bytes::ZERO, fences).unwrap());
        for stream in [ONE, TWO] {
            wait_for_waiting(&watch, &trimming);
            assert_eq!(watch.checked.calls().of(Verb::Unmap), 0);
            watch.fire(stream);
        }
        assert_eq!(trimming.join().unwrap(), Bytes::ZERO);
    });
    assert_eq!(watch.checked.live().events, 0);
}

#[test]
fn adopting_on_the_same_stream_makes_no_call() {
    let (watch, cache) = cache_of(&shape());
    let slot = request(&cache, 100);
    watch.hold(ONE);
    cache.retire(slot, &[Fence::Stream(ONE)]).unwrap();
    watch.checked.reset_counts();
    let adopted = cache.acquire(tokens(100), Some(ONE)).unwrap();
    step(&cache, adopted, 100).unwrap();
    assert_eq!((adopted.index(), watch.checked.calls().total()), (slot.index(), 0));
    assert_eq!(cache.snapshot().events.adopted, 1);
    watch.fire_all();
}

#[test]
fn adopting_on_another_stream_waits_there_and_not_here() {
    let (watch, cache) = cache_of(&shape());
    let slot = request(&cache, 100);
    watch.hold(ONE);
    cache.retire(slot, &[Fence::Stream(ONE)]).unwrap();
    watch.checked.reset_counts();
    let adopted = cache.acquire(tokens(100), Some(TWO)).unwrap();
    step(&cache, adopted, 100).unwrap();
    assert_eq!(adopted.index(), slot.index());
    let calls = watch.checked.calls();
    assert_eq!((calls.of(Verb::StreamWait), calls.of(Verb::WaitEvent), calls.of(Verb::Map)), (1, 0, 0));
    // Work of the second stream comes after that of the first.
    let event = watch.checked.record_event(TWO).unwrap();
    // SAFETY: the event lives until it is destroyed below.
    let fired = || unsafe { watch.checked.query_event(event) }.unwrap();
    assert!(!fired());
    watch.fire(ONE);
    assert!(fired());
    watch.destroy(event);
}

#[test]
fn adopting_on_no_stream_waits_here() {
    let (watch, cache) = cache_of(&shape());
    let slot = request(&cache, 100);
    watch.hold(ONE);
    cache.retire(slot, &[Fence::Stream(ONE)]).unwrap();
    thread::scope(|scope| {
        let acquiring = scope.spawn(|| cache.acquire(tokens(100), None).unwrap());
        wait_for_waiting(&watch, &acquiring);
        // Others find the table free, and the slot taken.
        let other = cache.acquire(tokens(100), Some(ONE)).unwrap();
        assert_ne!(other.index(), slot.index());
        cache.report().unwrap();
        watch.fire(ONE);
        assert_eq!(acquiring.join().unwrap().index(), slot.index());
    });
    assert_eq!(watch.checked.live().events, 0, "what has fired is destroyed");
}

#[test]
fn a_capturing_stream_is_refused() {
    let (watch, cache) = cache_of(&shape());
    let (slot, other) = (request(&cache, 100), request(&cache, 50));
    cache.retire(other, &[Fence::Stream(ONE)]).unwrap();
    watch.backend.set_capturing(TWO, true);
    let before = seen(&cache);
    let fences = &[Fence::Stream(ONE), Fence::Stream(TWO)];
    let refused = [
        kind(cache.retire(slot, fences)),
        kind(cache.truncate(slot, tokens(1), fences)),
        kind(cache.reclaim(Bytes::gib(1), fences)),
        kind(cache.trim(Bytes::ZERO, fences)),
        kind(cache.acquire(tokens(50), Some(TWO))),
    ];
    assert_eq!(refused, [ErrorKind::CapturingStream; 5]);
    assert_eq!(seen(&cache), before);
    assert_eq!(watch.checked.live().events, 1, "the parked slot's");
    watch.backend.set_capturing(TWO, false);
    cache.acquire(tokens(50), Some(TWO)).unwrap();
    cache.retire(slot, fences).unwrap();
}

#[test]
fn a_foreign_event_need_not_outlive_the_call() {
    let (watch, cache) = cache_of(&shape());
    let slot = request(&cache, 100);
    watch.hold(ONE);
    let (fence, event) = watch.foreign(ONE);
    cache.retire(slot, &[fence]).unwrap();
    watch.used_by(&cache, slot.index(), ONE);
    watch.destroy(event);
    thread::scope(|scope| {
        let reclaiming = scope.spawn(|| cache.reclaim(Bytes::gib(1), IDLE).unwrap());
        wait_for_waiting(&watch, &reclaiming);
        assert_eq!(watch.checked.calls().of(Verb::Unmap), 0);
        watch.fire(ONE);
        reclaiming.join().unwrap();
    });
    assert_eq!((watch.violations(), watch.checked.live().events), (Vec::new(), 0));
}

#[test]
fn idle_waits_for_nothing() {
    let (watch, cache) = cache_of(&shape());
    let slot = request(&cache, 100);
    watch.hold(ONE);
    cache.retire(slot, IDLE).unwrap();
    assert_eq!(cache.trim(Bytes::ZERO, IDLE).unwrap(), Bytes::ZERO);
    let calls = watch.checked.calls();
    assert_eq!((calls.of(Verb::RecordEvent), calls.of(Verb::WaitEvent)), (0, 0));
}

#[test]
fn memory_that_was_not_unmapped_after_all_keeps_its_fence() {
    let (watch, cache) = cache_of(&shape());
    let (first, second) = (request(&cache, 50), request(&cache, 100));
    cache.retire(first, IDLE).unwrap();
    watch.hold(ONE);
    cache.retire(second, &[Fence::Stream(ONE)]).unwrap();
    watch.used_by(&cache, second.index(), ONE);
    // Refused at the first slot's memory, before anything of the second's is waited for.
    watch.checked.fail_call_of(Verb::Unmap, 1, ErrorKind::Driver);
    assert_eq!(kind(cache.reclaim(Bytes::gib(1), IDLE)), ErrorKind::Driver);
    cache.report().unwrap();
    watch.checked.reset_counts();
    let adopted = cache.acquire(tokens(100), Some(TWO)).unwrap();
    assert_eq!(adopted.index(), second.index());
    assert_eq!(watch.checked.calls().of(Verb::StreamWait), 1, "the first stream may still use the memory");
    cache.retire(adopted, IDLE).unwrap();
    watch.fire_when_waited_for();
    cache.trim(Bytes::ZERO, IDLE).unwrap();
    assert_eq!((watch.violations(), watch.checked.live().events), (Vec::new(), 0));
}

#[test]
fn a_drop_waits_for_every_fence_also_when_one_cannot_be_waited_for() {
    let (watch, cache) = cache_of(&shape());
    let (first, second) = (request(&cache, 50), request(&cache, 100));
    cache.retire(first, &[Fence::Stream(TWO)]).unwrap();
    watch.hold(ONE);
    cache.retire(second, &[Fence::Stream(ONE)]).unwrap();
    watch.used_by(&cache, second.index(), ONE);
    watch.checked.fail_call_of(Verb::WaitEvent, 1, ErrorKind::Driver);
    let dropped = AtomicBool::new(false);
    thread::scope(|scope| {
        let dropping = scope.spawn(|| {
            drop(cache);
            dropped.store(true, Ordering::SeqCst);
        });
        while watch.backend.waiting() == 0 && !dropped.load(Ordering::SeqCst) {
            thread::yield_now();
        }
        watch.fire(ONE);
        dropping.join().unwrap();
    });
    assert_eq!(watch.violations(), Vec::<String>::new());
    assert_eq!(watch.checked.live(), Live::default());
}

#[test]
fn fences_do_not_pile_up_on_a_slot_that_is_adopted_over_and_over() {
    let (watch, cache) = cache_of(&shape());
    let mut slot = request(&cache, 100);
    for round in 0..100 {
        let (fence, event) = watch.foreign(stream(round % 7));
        cache.retire(slot, &[fence]).unwrap();
        watch.destroy(event);
        slot = cache.acquire(tokens(100), Some(stream(round % 5))).unwrap();
        step(&cache, slot, 100).unwrap();
    }
    assert_eq!(cache.snapshot().events.adopted, 100);
    let events = watch.checked.live().events;
    assert!(events <= 8, "{events} events are kept for one slot");
}

#[test]
fn memory_that_comes_back_to_a_new_owner_is_quarantined_until_its_fence_has_fired() {
    let (watch, cache) = cache_of(&shape());
    let first = request(&cache, 100);
    watch.hold(ONE);
    cache.retire(first, &[Fence::Stream(ONE)]).unwrap();
    watch.used_by(&cache, first.index(), ONE);
    let owners = thread::scope(|scope| {
        let reclaiming = scope.spawn(|| cache.reclaim(Bytes::gib(1), IDLE));
        wait_for_waiting(&watch, &reclaiming);
        // All of the slot's memory is on its way out, so nobody who gets the slot now waits for it.
        let owners: Vec<_> = (0..5).map(|_| cache.acquire(tokens(100), Some(TWO)).unwrap()).collect();
        assert_eq!(watch.checked.calls().of(Verb::StreamWait), 0);
        watch.checked.fail_call_of(Verb::Unmap, 1, ErrorKind::Driver);
        watch.fire(ONE);
        assert_eq!(kind(reclaiming.join().unwrap()), ErrorKind::Driver);
        owners
    });
    cache.report().unwrap();
    assert_eq!(cache.health(), Health::Degraded);
    assert!(!cache.bytes().quarantined.is_zero());
    // The slot's next step clears its way first.
    for owner in owners {
        step(&cache, owner, 100).unwrap();
        contents::fill(&cache, owner, u64::from(owner.index()), 0..100);
        contents::find(&cache, owner, u64::from(owner.index()), 100);
    }
    cache.report().unwrap();
    assert_eq!((cache.health(), cache.bytes().quarantined), (Health::Healthy, Bytes::ZERO));
    assert_eq!(watch.violations(), Vec::<String>::new());
}
