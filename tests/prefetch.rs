//! What is asked for ahead, where it could get in the way of others or of itself. Counted, with a mapper
//! that works when it is told to.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]
#![allow(unsafe_code, reason = "foreign events, and writes through addresses")]

mod common;

use common::rig::{cache_of, shape};
use common::{Shape, Watch, shapes, step, stream, tokens};
use vattn::driver::Stream;
use vattn::error::{ErrorKind, Verb};
use vattn::geometry::{Background, Reclaim};
use vattn::{Bytes, Fence, KvCache, SlotId, SlotTokens};

const ONE: Stream = stream(1);
const IDLE: &[Fence] = &[Fence::Idle];
const GRANULE: Bytes = Bytes::new(4096);
const MOVES: [Verb; 5] = [Verb::Create, Verb::Map, Verb::SetAccess, Verb::Unmap, Verb::Release];

/// Calls that move memory.
fn moves(watch: &Watch) -> u64 {
    MOVES.map(|verb| watch.checked.calls().of(verb)).iter().sum()
}

fn wish(cache: &KvCache, slot: SlotId, count: u64) {
    cache.prefetch(&[SlotTokens::new(slot, tokens(count))]).unwrap();
}

/// Decodes one token at a time with a turn of the mapper before each, and counts the calls of the steps.
fn decode(watch: &Watch, cache: &KvCache, slot: SlotId, counts: std::ops::Range<u64>) -> u64 {
    counts
        .map(|count| {
            cache.tend().unwrap();
            let before = moves(watch);
            step(cache, slot, count).unwrap();
            moves(watch) - before
        })
        .sum()
}

#[test]
fn a_prefetched_prompt_that_comes_in_parts_meets_no_driver() {
    let shape = Shape { background: Background::Caller, budget: 4000, max_tokens: 32_768, ..shapes::llama() };
    let (watch, cache) = cache_of(&shape, |builder| builder);
    let slot = cache.acquire(tokens(4096), Some(ONE)).unwrap();
    wish(&cache, slot, 4096);
    cache.flush().unwrap();
    for part in 1..=8 {
        let before = moves(&watch);
        step(&cache, slot, part * 512).unwrap();
        assert_eq!(moves(&watch), before, "part {part}");
        cache.flush().unwrap();
    }
    cache.report().unwrap();
}

#[test]
fn a_prompt_is_prefetched_in_every_tensor() {
    let shape = Shape {
        background: Background::Caller,
        budget: 8000,
        max_tokens: 32_768,
        ..shapes::llama_per_layer()
    };
    let (watch, cache) = cache_of(&shape, |builder| builder);
    let slot = cache.acquire(tokens(8192), Some(ONE)).unwrap();
    wish(&cache, slot, 8192);
    cache.flush().unwrap();
    let before = moves(&watch);
    step(&cache, slot, 8192).unwrap();
    assert_eq!(moves(&watch), before);
}

#[test]
fn a_wish_that_is_taken_back_is_given_up() {
    let (_watch, cache) = cache_of(&shape(), |builder| builder);
    let slot = cache.acquire(tokens(100), Some(ONE)).unwrap();
    wish(&cache, slot, 300);
    cache.flush().unwrap();
    assert!(cache.bytes().ahead >= GRANULE * 70, "{:?}", cache.bytes());
    wish(&cache, slot, 0);
    cache.trim(Bytes::ZERO, IDLE).unwrap();
    cache.flush().unwrap();
    assert_eq!((cache.bytes().ahead, cache.bytes().held), (Bytes::ZERO, Bytes::ZERO));
}

#[test]
fn a_wish_beyond_the_budget_is_mapped_in_all_tensors_alike() {
    let shape = Shape { budget: 60, ..shape() };
    let (watch, cache) = cache_of(&shape, |builder| builder);
    let slot = cache.acquire(tokens(300), Some(ONE)).unwrap();
    wish(&cache, slot, 300);
    cache.flush().unwrap();
    let before = moves(&watch);
    step(&cache, slot, 100).unwrap();
    assert_eq!(moves(&watch), before, "{:?}", cache.bytes());
}

#[test]
fn a_prefetch_does_not_end_the_look_ahead_of_others() {
    let shape = Shape { budget: 4000, slots: 8, max_tokens: 2000, ..shape() };
    let (watch, cache) = cache_of(&shape, |builder| builder.look_ahead_budget(GRANULE * 100));
    let waiting = cache.acquire(tokens(1000), Some(ONE)).unwrap();
    wish(&cache, waiting, 1000);
    cache.flush().unwrap();
    let decoding = cache.acquire(tokens(100), Some(ONE)).unwrap();
    step(&cache, decoding, 100).unwrap();
    assert_eq!(decode(&watch, &cache, decoding, 101..400), 0);
}

#[test]
fn growth_comes_from_parked_memory_where_the_device_has_no_more() {
    let shape = Shape { device_has: Some(80), slots: 4, ..shape() };
    let (watch, cache) = cache_of(&shape, |builder| builder.look_ahead_budget(GRANULE * 100));
    let (parked, decoding) =
        (cache.acquire(tokens(250), Some(ONE)).unwrap(), cache.acquire(tokens(40), Some(ONE)).unwrap());
    step(&cache, decoding, 40).unwrap();
    step(&cache, parked, 250).unwrap();
    cache.retire(parked, IDLE).unwrap();
    assert_eq!(decode(&watch, &cache, decoding, 41..200), 0);
}

#[test]
fn tokens_that_are_taken_back_again_and_again_keep_their_memory() {
    for reclaim in [Reclaim::Deferred, Reclaim::Eager] {
        let shape = Shape { max_tokens: 2000, ..shape() };
        let (watch, cache) = cache_of(&shape, |builder| builder.reclaim(reclaim));
        let slot = cache.acquire(tokens(100), Some(ONE)).unwrap();
        step(&cache, slot, 100).unwrap();
        cache.flush().unwrap();
        let before = watch.checked.calls().of(Verb::Map);
        for count in 101..301 {
            step(&cache, slot, count + 4).unwrap();
            cache.truncate(slot, tokens(count), IDLE).unwrap();
            cache.flush().unwrap();
        }
        // 200 tokens are 25 granules in each of two tensors, in extents of 8.
        let maps = watch.checked.calls().of(Verb::Map) - before;
        assert!(maps <= 50, "{reclaim:?}: {maps} mappings");
    }
}

#[test]
fn a_long_tail_that_was_truncated_is_given_back() {
    let (_watch, cache) = cache_of(&shape(), |builder| builder);
    let slot = cache.acquire(tokens(50), Some(ONE)).unwrap();
    (50..=280).for_each(|count| step(&cache, slot, count).unwrap());
    cache.truncate(slot, tokens(50), IDLE).unwrap();
    let held = cache.bytes().held;
    cache.trim(Bytes::ZERO, IDLE).unwrap();
    cache.flush().unwrap();
    // 50 tokens are 7 granules in each of two tensors; what is mapped ahead of them is some extents more.
    assert!(cache.bytes().held <= GRANULE * 2 * 30, "{held} became {:?}", cache.bytes());
}

#[test]
fn the_mapper_moves_a_few_extents_at_a_time() {
    // All memory lies in extents of a granule, parked; a prompt of a thousand granules is asked for.
    let shape = Shape { budget: 1200, slots: 600, max_tokens: 4000, ..shape() };
    let (watch, cache) = cache_of(&shape, |builder| builder.look_ahead(tokens(0)));
    let small: Vec<_> = (0..500).map(|_| cache.acquire(tokens(1), Some(ONE)).unwrap()).collect();
    small.iter().for_each(|slot| step(&cache, *slot, 8).unwrap());
    small.iter().for_each(|slot| cache.retire(*slot, IDLE).unwrap());
    let big = cache.acquire(tokens(4000), Some(ONE)).unwrap();
    wish(&cache, big, 4000);
    // What was settled while the mapper was at it shows in between: never more than a batch at once.
    let (mut last, mut most) = (0, 0);
    let log = std::sync::Arc::new(parking_lot::Mutex::new(Vec::new()));
    let its = std::sync::Arc::clone(&log);
    watch.checked.on_call(Box::new(move |verb| its.lock().push(verb)));
    cache.flush().unwrap();
    watch.checked.clear_on_call();
    for (place, pair) in log.lock().windows(2).enumerate() {
        // A batch unmaps first and maps then.
        if matches!(pair, [Verb::SetAccess | Verb::Map, Verb::Unmap]) {
            most = most.max(place + 1 - last);
            last = place + 1;
        }
    }
    assert!(last > 0, "it unmapped what was parked");
    assert!(most <= 8 * 5, "{most} calls in a batch");
    assert!(cache.bytes().ahead > GRANULE * 500, "{:?}", cache.bytes());
}

#[test]
fn nothing_is_given_up_for_an_extent_that_cannot_be_had() {
    let shape = Shape { budget: 380, slots: 60, max_tokens: 2000, ..shape() };
    let (watch, cache) = cache_of(&shape, |builder| builder.at_hand(GRANULE * 200).look_ahead(tokens(0)));
    let small: Vec<_> = (0..40).map(|_| cache.acquire(tokens(8), None).unwrap()).collect();
    small.iter().for_each(|slot| step(&cache, *slot, 8).unwrap());
    let big = cache.acquire(tokens(1024), None).unwrap();
    step(&cache, big, 1024).unwrap();
    small.iter().for_each(|slot| cache.retire(*slot, IDLE).unwrap());
    let (before, unmapped) = (cache.bytes().parked, watch.checked.calls().of(Verb::Unmap));
    cache.flush().unwrap();
    assert_eq!((cache.bytes().parked, watch.checked.calls().of(Verb::Unmap)), (before, unmapped));
}

#[test]
fn two_reclaims_free_what_both_ask_for() {
    let (_watch, cache) = cache_of(&shape(), |builder| builder);
    let slot = cache.acquire(tokens(300), Some(ONE)).unwrap();
    step(&cache, slot, 300).unwrap();
    cache.retire(slot, IDLE).unwrap();
    cache.reclaim(GRANULE * 10, IDLE).unwrap();
    cache.reclaim(GRANULE * 40, IDLE).unwrap();
    cache.flush().unwrap();
    assert!(cache.bytes().free >= GRANULE * 50, "{:?}", cache.bytes());
}

#[test]
fn what_a_failed_adoption_puts_back_is_unmapped_eagerly_too() {
    let (watch, cache) = cache_of(&shape(), |builder| builder.reclaim(Reclaim::Eager));
    let slot = cache.acquire(tokens(300), Some(ONE)).unwrap();
    step(&cache, slot, 300).unwrap();
    watch.hold(ONE);
    cache.retire(slot, &[Fence::Stream(ONE)]).unwrap();
    watch.checked.fail_call_of(Verb::StreamWait, 1, ErrorKind::Driver);
    cache.acquire(tokens(300), Some(stream(2))).unwrap_err();
    watch.fire_all();
    cache.flush().unwrap();
    assert_eq!(cache.bytes().parked, Bytes::ZERO);
}
