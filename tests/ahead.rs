//! What is mapped ahead: when, how much at a time, and whom it must never stand in the way of.
//!
//! The work in the background is done by `tend` on the test's own thread, so that every call is counted
//! and every run is the same.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]
#![allow(unsafe_code, reason = "writes through addresses")]

mod common;

use common::rig::{cache_of, request, shape};
use common::{Shape, Watch, contents, kind, step, stream, tokens};
use vattn::driver::{Live, Stream};
use vattn::error::{ErrorKind, Verb};
use vattn::geometry::{Background, Reclaim};
use vattn::{Bytes, Fence, KvCache, SlotTokens};

const ONE: Stream = stream(1);
const IDLE: &[Fence] = &[Fence::Idle];
const GRANULE: Bytes = Bytes::new(4096);

/// Does what there is to do now; whether something is left.
fn tend(cache: &KvCache) -> bool {
    cache.tend().unwrap()
}

/// The calls that something makes at the driver.
fn calls(watch: &Watch, run: impl FnOnce()) -> u64 {
    let before = watch.checked.calls().total();
    run();
    watch.checked.calls().total() - before
}

/// Until it says that nothing is left, which comes soon or never.
fn tend_all(cache: &KvCache) {
    assert!((0..1000).any(|_| !tend(cache)), "there is always something left");
}

/// What a tend may map of what is not urgent, in a step, of so few that are due.
const SHARE: u64 = 16;

/// So many slots grow by a token a step, all in the same steps.
fn lockstep(slots: u32, look_ahead: u64) {
    let shape = Shape { slots, max_tokens: 2000, budget: 40_000, on_host: false, ..shape() };
    let (watch, cache) = cache_of(&shape, |builder| {
        builder.look_ahead(tokens(look_ahead)).look_ahead_budget(GRANULE * 20_000)
    });
    let all: Vec<_> = (0..slots).map(|_| cache.acquire(tokens(100), None).unwrap()).collect();
    let all_at = |count| all.iter().map(|slot| SlotTokens::new(*slot, tokens(count))).collect::<Vec<_>>();
    cache.step(&all_at(100)).unwrap();
    let maps = |run: &dyn Fn()| {
        let before = watch.checked.calls().of(Verb::Map);
        run();
        watch.checked.calls().of(Verb::Map) - before
    };
    let (mut most, mut total) = (0, 0);
    for count in 101..=1500 {
        let mapped = maps(&|| _ = tend(&cache));
        (most, total) = (most.max(mapped), total + mapped);
        let in_step = calls(&watch, || cache.step(&all_at(count)).unwrap());
        assert_eq!(in_step, 0, "{slots} slots, {look_ahead} ahead: the step to {count} met the driver");
    }
    println!("{slots} slots, {look_ahead} ahead: {total} mappings, at most {most} in one of 1,400 steps");
    assert!(total >= u64::from(slots) * 20 && most <= SHARE, "{total} in all, {most} in one");
    cache.report().unwrap();
}

#[test]
fn steps_of_requests_that_grow_together_make_no_call_and_their_calls_are_spread() {
    lockstep(32, 64);
    lockstep(32, 32);
    lockstep(64, 32);
}

#[test]
fn one_request_alone_is_mapped_ahead_as_well() {
    for (slots, look_ahead) in [(1, 64), (1, 1), (3, 2)] {
        lockstep(slots, look_ahead);
    }
}

#[test]
fn what_is_mapped_ahead_stands_in_the_way_of_nobody() {
    // 38 granules of each tensor hold a slot's 300 tokens: the budget is two full slots.
    let shape = Shape { budget: 152, ..shape() };
    let full = [300, 300].map(tokens);
    let ahead = || {
        let (watch, cache) =
            cache_of(&shape, |builder| builder.look_ahead(tokens(300)).look_ahead_budget(GRANULE * 152));
        let both = [request(&cache, 60, 1), request(&cache, 64, 2)];
        // Memory is short by then: what is not urgent would wait for more steps.
        cache.flush().unwrap();
        let bytes = cache.bytes();
        assert_eq!((bytes.held, bytes.mapped), (GRANULE * 152, GRANULE * 32));
        assert_eq!(bytes.ahead, GRANULE * 120, "all that is left is mapped ahead");
        (watch, cache, both)
    };
    // They themselves need no call for it.
    let (watch, cache, both) = ahead();
    let entries = [0, 1].map(|one| SlotTokens::new(both[one], full[one]));
    assert_eq!(cache.fits(&entries).unwrap(), [true, true]);
    assert_eq!(calls(&watch, || cache.step(&entries).unwrap()), 0);
    assert_eq!(cache.bytes().ahead, Bytes::ZERO);
    cache.report().unwrap();
    // Nor does it keep others out: 120 granules are 300 tokens and 170 more.
    let (_, cache, both) = ahead();
    assert_eq!(cache.admits(&[300, 170, 1].map(tokens)), 2);
    assert_eq!(cache.admits(&[300, 180].map(tokens)), 1);
    let new =
        [300, 170].map(|count| SlotTokens::new(cache.acquire(tokens(count), None).unwrap(), tokens(count)));
    assert_eq!(cache.fits(&new).unwrap(), [true, true]);
    cache.step(&new).unwrap();
    contents::fill(&cache, new[0].slot, 3, 0..300);
    contents::fill(&cache, new[1].slot, 4, 0..170);
    cache.flush().unwrap();
    assert_eq!(cache.bytes().ahead, Bytes::ZERO, "there is nothing left to map ahead");
    for (slot, owner, count) in
        [(both[0], 1, 60), (both[1], 2, 64), (new[0].slot, 3, 300), (new[1].slot, 4, 170)]
    {
        contents::find(&cache, slot, owner, count);
    }
    assert_eq!(kind(step(&cache, both[0], 65)), ErrorKind::OutOfBudget);
    cache.report().unwrap();
}

#[test]
fn growth_that_found_no_memory_is_mapped_once_there_is_some() {
    let shape = Shape { budget: 76 + 16, ..shape() };
    let (watch, cache) =
        cache_of(&shape, |builder| builder.look_ahead(tokens(64)).look_ahead_budget(GRANULE * 40));
    let (first, second) = (request(&cache, 60, 1), request(&cache, 300, 2));
    assert_eq!(calls(&watch, || tend_all(&cache)), 0, "there is no memory, and nobody asks for it again");
    watch.hold(ONE);
    cache.retire(second, &[Fence::Stream(ONE)]).unwrap();
    watch.used_by(&cache, second.index(), ONE);
    assert!(tend(&cache) && tend(&cache), "what was given up may still be read");
    assert_eq!(cache.bytes().ahead, Bytes::ZERO);
    watch.fire(ONE);
    tend_all(&cache);
    assert_eq!(calls(&watch, || step(&cache, first, 120).unwrap()), 0);
    contents::find(&cache, first, 1, 60);
    assert_eq!(watch.violations(), Vec::<String>::new());
    cache.report().unwrap();
}

#[test]
fn a_step_finds_what_was_prefetched() {
    let (watch, cache) = cache_of(&shape(), |builder| builder);
    let busy = request(&cache, 60, 1);
    let waiting = cache.acquire(tokens(200), None).unwrap();
    let before = watch.checked.calls().total();
    cache.prefetch(&[SlotTokens::new(waiting, tokens(200)), SlotTokens::new(busy, tokens(150))]).unwrap();
    assert_eq!(watch.checked.calls().total(), before, "it returns at once");
    tend_all(&cache);
    assert!(cache.bytes().ahead >= GRANULE * (50 + 22), "{:?}", cache.bytes());
    let entries = [SlotTokens::new(waiting, tokens(200)), SlotTokens::new(busy, tokens(150))];
    assert_eq!(calls(&watch, || cache.step(&entries).unwrap()), 0);
    contents::fill(&cache, waiting, 2, 0..200);
    contents::find(&cache, busy, 1, 60);
    contents::find(&cache, waiting, 2, 200);
    cache.report().unwrap();
}

#[test]
fn a_prefetch_can_be_given_up() {
    let (watch, cache) = cache_of(&shape(), |builder| builder.look_ahead(tokens(0)));
    let wish = |slot, count| cache.prefetch(&[SlotTokens::new(slot, tokens(count))]).unwrap();
    // Before anything is done for it.
    let slot = cache.acquire(tokens(200), None).unwrap();
    wish(slot, 200);
    wish(slot, 0);
    assert_eq!(calls(&watch, || tend_all(&cache)), 0);
    // By the request that waits no longer.
    wish(slot, 200);
    tend_all(&cache);
    let ahead = cache.bytes().ahead;
    assert!(ahead >= GRANULE * 50);
    cache.retire(slot, IDLE).unwrap();
    let bytes = cache.bytes();
    assert_eq!((bytes.ahead, bytes.parked, bytes.mapped), (Bytes::ZERO, ahead, Bytes::ZERO));
    assert_eq!(calls(&watch, || tend_all(&cache)), 0, "nobody maps for a slot that was retired");
    // What came of it is another's, without a call.
    assert_eq!(calls(&watch, || _ = request(&cache, 200, 1)), 0);
    cache.report().unwrap();
}

#[test]
fn a_prefetch_takes_what_is_left_and_no_more() {
    let shape = Shape { budget: 76 + 20, ..shape() };
    let (_, cache) = cache_of(&shape, |builder| builder);
    let busy = request(&cache, 300, 1);
    let waiting = cache.acquire(tokens(300), None).unwrap();
    cache.prefetch(&[SlotTokens::new(waiting, tokens(300))]).unwrap();
    tend_all(&cache);
    assert!(cache.bytes().held <= cache.budget());
    assert_eq!(kind(step(&cache, waiting, 300)), ErrorKind::OutOfBudget);
    step(&cache, waiting, 80).unwrap();
    contents::fill(&cache, waiting, 2, 0..80);
    cache.retire(busy, IDLE).unwrap();
    tend_all(&cache);
    step(&cache, waiting, 300).unwrap();
    contents::find(&cache, waiting, 2, 80);
    cache.report().unwrap();
}

#[test]
fn a_prefetch_that_is_wrong_changes_nothing() {
    let (watch, cache) = cache_of(&shape(), |builder| builder);
    let (slot, gone) = (cache.acquire(tokens(1), None).unwrap(), cache.acquire(tokens(1), None).unwrap());
    cache.retire(gone, IDLE).unwrap();
    let prefetch = |wrong| cache.prefetch(&[SlotTokens::new(slot, tokens(200)), wrong]);
    assert_eq!(kind(prefetch(SlotTokens::new(gone, tokens(1)))), ErrorKind::StaleSlot);
    assert_eq!(kind(prefetch(SlotTokens::new(slot, tokens(301)))), ErrorKind::TooManyTokens);
    let (_, other) = cache_of(&shape(), |builder| builder);
    let foreign = other.acquire(tokens(1), None).unwrap();
    assert_eq!(kind(prefetch(SlotTokens::new(foreign, tokens(1)))), ErrorKind::ForeignSlot);
    assert_eq!(calls(&watch, || tend_all(&cache)), 0);
}

#[test]
fn memory_is_unmapped_eagerly_once_its_fence_has_fired() {
    let (watch, cache) = cache_of(&shape(), |builder| builder.reclaim(Reclaim::Eager).look_ahead(tokens(0)));
    let (first, second) = (request(&cache, 60, 1), request(&cache, 100, 2));
    step(&cache, first, 200).unwrap();
    watch.hold(ONE);
    cache.retire(second, &[Fence::Stream(ONE)]).unwrap();
    cache.truncate(first, tokens(60), &[Fence::Stream(ONE)]).unwrap();
    [first, second].iter().for_each(|slot| watch.used_by(&cache, slot.index(), ONE));
    // Over and over, with work that nobody sees the end of: what is to be done does not pile up.
    for _ in 0..1000 {
        cache.truncate(first, tokens(60), &[Fence::Stream(ONE)]).unwrap();
        assert!(tend(&cache), "a fence has to fire");
    }
    assert_eq!(watch.checked.calls().of(Verb::Unmap), 0);
    watch.fire(ONE);
    tend_all(&cache);
    let bytes = cache.bytes();
    assert_eq!((bytes.parked, bytes.mapped), (Bytes::ZERO, GRANULE * 16));
    assert_eq!((bytes.free, cache.snapshot().slots.parked), (bytes.held - bytes.mapped, 0));
    contents::find(&cache, first, 1, 60);
    assert_eq!(watch.violations(), Vec::<String>::new());
    cache.report().unwrap();
}

#[test]
fn an_adopted_slot_is_not_unmapped_for_the_one_who_gave_it_up() {
    let (watch, cache) = cache_of(&shape(), |builder| builder.reclaim(Reclaim::Eager).look_ahead(tokens(0)));
    let first = request(&cache, 100, 1);
    cache.retire(first, IDLE).unwrap();
    let second = cache.acquire(tokens(100), None).unwrap();
    assert_eq!((second.index(), calls(&watch, || tend_all(&cache))), (first.index(), 0));
    assert_eq!(calls(&watch, || step(&cache, second, 100).unwrap()), 0);
    cache.report().unwrap();
}

#[test]
fn without_look_ahead_nothing_is_mapped_ahead() {
    for background in [Background::Caller, Background::Off] {
        let shape = Shape { background, ..shape() };
        let look_ahead = if background == Background::Off { 64 } else { 0 };
        let (watch, cache) = cache_of(&shape, |builder| builder.look_ahead(tokens(look_ahead)));
        let slot = request(&cache, 60, 1);
        for count in 61..=300 {
            step(&cache, slot, count).unwrap();
            let in_flush = calls(&watch, || cache.flush().unwrap());
            assert_eq!((in_flush, cache.bytes().ahead), (0, Bytes::ZERO));
        }
        let snapshot = cache.snapshot();
        assert_eq!(snapshot.events.mapped_ahead, 0);
        assert!(snapshot.background.values().all(|calls| calls.calls == 0));
        if background == Background::Off {
            assert_eq!(kind(cache.tend()), ErrorKind::InvalidArgument);
            let waiting = cache.acquire(tokens(1), None).unwrap();
            cache.prefetch(&[SlotTokens::new(waiting, tokens(100))]).unwrap();
            assert_eq!(calls(&watch, || step(&cache, waiting, 100).unwrap()), 0, "it was mapped at once");
        }
    }
}

#[test]
fn extents_that_steps_lacked_are_kept_at_hand() {
    let (watch, cache) = cache_of(&shape(), |builder| builder.look_ahead(tokens(0)).at_hand(GRANULE * 64));
    request(&cache, 100, 1);
    tend_all(&cache);
    let free = cache.bytes().free;
    assert!(!free.is_zero() && free <= GRANULE * 64);
    let created = watch.checked.calls().of(Verb::Create);
    let second = request(&cache, 100, 2);
    assert_eq!(watch.checked.calls().of(Verb::Create), created, "they were there");
    // Who wants memory gets it all the same.
    cache.trim(Bytes::ZERO, IDLE).unwrap();
    tend_all(&cache);
    assert_eq!(cache.bytes().free, Bytes::ZERO);
    contents::find(&cache, second, 2, 100);
    cache.report().unwrap();
    drop(cache);
    assert_eq!(watch.checked.live(), Live::default());
}

#[test]
fn what_tends_did_is_told_apart_from_what_steps_did() {
    let (watch, cache) = cache_of(&shape(), |builder| builder.look_ahead(tokens(64)));
    let slot = request(&cache, 60, 1);
    let on_path = watch.checked.calls();
    tend_all(&cache);
    step(&cache, slot, 100).unwrap();
    let snapshot = cache.snapshot();
    let all = watch.checked.calls();
    for verb in [Verb::Create, Verb::Map, Verb::SetAccess] {
        assert!(all.of(verb) > on_path.of(verb));
        assert_eq!(snapshot.driver[&verb].calls, all.of(verb));
        assert_eq!(snapshot.background[&verb].calls, all.of(verb) - on_path.of(verb));
    }
    assert_eq!(snapshot.events.mapped_ahead, snapshot.background[&Verb::Map].calls);
}
