//! What may happen while the mapper is at work: every call meets it in the middle of a driver call.
//!
//! The mapper is held at gates in the driver; nothing sleeps, and no test depends on who is faster.
//! A call that must not wait for it is made while it is held: were the call to wait, the test would hang,
//! and be ended.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]
#![allow(unsafe_code, reason = "writes through addresses")]

mod common;

use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread;

use common::gate::{Gate, until};
use common::rig::{Rig, request};
use common::{contents, kind, step, stream, tokens};
use vattn::driver::{Live, Stream};
use vattn::error::{ErrorKind, Verb};
use vattn::geometry::Reclaim;
use vattn::{Bytes, Fence, Health, SlotId, SlotTokens};

const ONE: Stream = stream(1);
const TWO: Stream = stream(2);
const IDLE: &[Fence] = &[Fence::Idle];
/// What the mapper calls to map one extent ahead.
const MAPPING: [Verb; 3] = [Verb::Create, Verb::Map, Verb::SetAccess];

/// Two requests of 60 tokens each: the first has all that it will soon need, and the mapper is held at a
/// gate while it maps for the second.
struct Scene {
    rig: Rig,
    gate: Arc<Gate>,
    first: SlotId,
    second: SlotId,
}

impl Deref for Scene {
    type Target = Rig;
    fn deref(&self) -> &Rig {
        &self.rig
    }
}

impl Scene {
    fn held_at(verb: Verb) -> Self {
        let mut rig = Rig::new(|builder| builder);
        let first = request(&rig.cache, 60, 1);
        rig.cache.flush().unwrap();
        assert!(!rig.cache.bytes().ahead.is_zero(), "the first has what it will need");
        let gate = rig.gate(verb);
        let second = request(&rig.cache, 60, 2);
        gate.wait();
        Self { rig, gate, first, second }
    }

    /// Lets the mapper do the rest, and looks at everything.
    fn settle(&self) {
        self.gate.open();
        self.cache.flush().unwrap();
        contents::find(&self.cache, self.first, 1, 60);
        self.cache.report().unwrap();
        assert_eq!(self.cache.health(), Health::Healthy);
        assert_eq!(self.watch.violations(), Vec::<String>::new());
    }

    fn end(self) {
        self.settle();
        let Rig { cache, watch, .. } = self.rig;
        drop(cache);
        assert_eq!(watch.checked.live(), Live::default());
    }
}

#[test]
fn a_slot_is_retired_while_its_mapping_is_in_flight() {
    for verb in MAPPING {
        let scene = Scene::held_at(verb);
        let cache = &scene.cache;
        let ahead = cache.bytes().ahead;
        cache.retire(scene.second, IDLE).unwrap();
        assert_eq!(kind(cache.retire(scene.second, IDLE)), ErrorKind::StaleSlot);
        let slots = cache.snapshot().slots;
        assert_eq!((slots.active, slots.parked), (1, 1));
        scene.settle();
        // What came for him is parked with the rest, and nobody's growth any more.
        assert_eq!(cache.bytes().ahead, ahead);
        let before = scene.watch.on_the_path();
        let third = request(cache, 120, 3);
        assert_eq!((third.index(), scene.watch.on_the_path()), (scene.second.index(), before));
        contents::find(cache, third, 3, 120);
        scene.end();
    }
}

#[test]
fn a_step_waits_for_a_mapping_in_flight_and_maps_nothing_itself() {
    for verb in MAPPING {
        let scene = Scene::held_at(verb);
        let cache = &scene.cache;
        let before = scene.watch.on_the_path();
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            let stepping = scope.spawn(|| {
                step(cache, scene.second, 70).unwrap();
                over.store(true, SeqCst);
            });
            // Who has what he needs does not wait: within what he has used, and beyond.
            step(cache, scene.first, 62).unwrap();
            step(cache, scene.first, 70).unwrap();
            cache.truncate(scene.first, tokens(60), IDLE).unwrap();
            assert!(!over.load(SeqCst), "its memory is not there yet");
            scene.gate.open();
            stepping.join().unwrap();
        });
        assert_eq!(scene.watch.on_the_path(), before);
        contents::fill(cache, scene.second, 2, 60..70);
        contents::find(cache, scene.second, 2, 70);
        scene.end();
    }
}

#[test]
fn a_slot_is_truncated_while_its_mapping_is_in_flight() {
    for verb in MAPPING {
        for to in [0, 10, 60] {
            let scene = Scene::held_at(verb);
            let cache = &scene.cache;
            cache.truncate(scene.second, tokens(to), IDLE).unwrap();
            step(cache, scene.second, to + 3).unwrap();
            contents::fill(cache, scene.second, 2, to..to + 3);
            scene.settle();
            contents::find(cache, scene.second, 2, to + 3);
            // Old and new memory are one run.
            let before = scene.watch.on_the_path();
            step(cache, scene.second, 100).unwrap();
            contents::fill(cache, scene.second, 2, to + 3..100);
            assert_eq!(scene.watch.on_the_path(), before);
            contents::find(cache, scene.second, 2, 100);
            scene.end();
        }
    }
}

#[test]
fn a_slot_is_adopted_while_its_mapping_is_in_flight() {
    for verb in MAPPING {
        let scene = Scene::held_at(verb);
        let (watch, cache) = (&scene.watch, &scene.cache);
        watch.hold(ONE);
        cache.retire(scene.second, &[Fence::Stream(ONE)]).unwrap();
        watch.used_by(cache, scene.second.index(), ONE);
        let third = cache.acquire(tokens(60), Some(TWO)).unwrap();
        assert_eq!(third.index(), scene.second.index());
        assert_eq!(watch.checked.calls().of(Verb::StreamWait), 1);
        // What was there is his already; what is in flight will be.
        step(cache, third, 61).unwrap();
        contents::fill(cache, third, 3, 0..61);
        watch.fire(ONE);
        scene.settle();
        let before = scene.watch.on_the_path();
        step(cache, third, 120).unwrap();
        contents::fill(cache, third, 3, 61..120);
        assert_eq!(scene.watch.on_the_path(), before);
        contents::find(cache, third, 3, 120);
        scene.end();
    }
}

#[test]
fn a_slot_is_acquired_on_no_stream_while_its_mapping_is_in_flight() {
    let scene = Scene::held_at(Verb::Map);
    let (watch, cache) = (&scene.watch, &scene.cache);
    watch.hold(ONE);
    cache.retire(scene.second, &[Fence::Stream(ONE)]).unwrap();
    thread::scope(|scope| {
        // It is busy when what is in flight arrives.
        let acquiring = scope.spawn(|| cache.acquire(tokens(60), None).unwrap());
        until(|| watch.backend.waiting() > 0);
        scene.gate.open();
        until(|| cache.snapshot().events.mapped_ahead > 2);
        watch.fire(ONE);
        let third = acquiring.join().unwrap();
        assert_eq!(third.index(), scene.second.index());
        step(cache, third, 120).unwrap();
        contents::fill(cache, third, 3, 0..120);
        contents::find(cache, third, 3, 120);
    });
    scene.end();
}

/// All but what moves memory itself.
#[test]
fn no_call_waits_for_the_mapper_that_can_do_without() {
    for verb in MAPPING {
        let scene = Scene::held_at(verb);
        let cache = &scene.cache;
        let slot = cache.acquire(tokens(1), Some(ONE)).unwrap();
        cache.prefetch(&[SlotTokens::new(slot, tokens(100))]).unwrap();
        cache.prefetch(&[SlotTokens::new(slot, tokens(0))]).unwrap();
        step(cache, scene.first, 70).unwrap();
        cache.truncate(scene.first, tokens(60), &[Fence::Stream(ONE)]).unwrap();
        assert_eq!(cache.fits(&[SlotTokens::new(scene.second, tokens(300))]).unwrap(), [true]);
        assert_eq!(cache.admits(&[tokens(300)]), 1);
        assert_eq!(cache.trim(cache.bytes().held, IDLE).unwrap(), cache.bytes().held);
        assert_eq!(cache.reclaim(Bytes::ZERO, IDLE).unwrap(), cache.bytes().free);
        assert_eq!(kind(cache.tend()), ErrorKind::InvalidArgument);
        cache.retire(slot, IDLE).unwrap();
        assert_eq!((cache.budget(), cache.health()), (cache.bytes().budget, Health::Healthy));
        scene.end();
    }
}

#[test]
fn a_cache_is_dropped_while_the_mapper_is_in_a_call() {
    let verbs = MAPPING.into_iter().chain([Verb::Unmap, Verb::Release, Verb::QueryEvent, Verb::DestroyEvent]);
    for verb in verbs {
        let mut rig = Rig::new(|builder| builder);
        let (first, second) = (request(&rig.cache, 60, 1), request(&rig.cache, 100, 2));
        // What nobody uses any more: a trim unmaps it at once.
        let third = request(&rig.cache, 100, 3);
        rig.cache.retire(third, IDLE).unwrap();
        rig.cache.flush().unwrap();
        let gate = rig.gate(verb);
        let Rig { _deadline, watch, cache, lets_go: _lets_go } = rig;
        watch.hold(ONE);
        cache.retire(second, &[Fence::Stream(ONE)]).unwrap();
        watch.used_by(&cache, second.index(), ONE);
        if MAPPING.contains(&verb) {
            step(&cache, first, 120).unwrap();
        } else {
            cache.trim(Bytes::ZERO, IDLE).unwrap();
        }
        let fired = verb == Verb::DestroyEvent;
        if fired {
            watch.fire(ONE);
        }
        gate.wait();
        contents::find(&cache, first, 1, 60);
        let begun = AtomicBool::new(false);
        thread::scope(|scope| {
            let dropping = scope.spawn(|| {
                begun.store(true, SeqCst);
                drop(cache);
            });
            until(|| begun.load(SeqCst));
            gate.open();
            // Whatever the mapper was at, memory that a stream may use outlives it.
            until(|| fired || watch.backend.waiting() > 0);
            watch.fire(ONE);
            dropping.join().unwrap();
        });
        assert_eq!(watch.violations(), Vec::<String>::new(), "{verb}");
        assert_eq!(watch.checked.live(), Live::default(), "{verb}");
    }
}

#[test]
fn a_drop_waits_for_the_fences_of_a_trim_that_was_not_done() {
    let Rig { _deadline, watch, cache, lets_go: _lets_go } = Rig::new(|builder| builder);
    let slot = request(&cache, 100, 1);
    cache.retire(slot, IDLE).unwrap();
    watch.hold(TWO);
    cache.trim(Bytes::ZERO, &[Fence::Stream(TWO)]).unwrap();
    watch.before_any(&[TWO]);
    thread::scope(|scope| {
        let dropping = scope.spawn(|| drop(cache));
        until(|| watch.backend.waiting() > 0 || dropping.is_finished());
        watch.fire(TWO);
        dropping.join().unwrap();
    });
    assert_eq!(watch.violations(), Vec::<String>::new());
    assert_eq!(watch.checked.live(), Live::default());
}

#[test]
fn the_budget_is_changed_while_the_mapper_is_in_a_call() {
    for verb in MAPPING {
        for granules in [32, 48, 200, 1000] {
            let scene = Scene::held_at(verb);
            let cache = &scene.cache;
            let budget = cache.layout().granule().bytes() * granules;
            let result = thread::scope(|scope| {
                let changing = scope.spawn(|| cache.set_budget(budget));
                step(cache, scene.first, 61).unwrap();
                scene.gate.open();
                changing.join().unwrap()
            });
            // Both need 8 granules of each tensor: 32 in all.
            result.unwrap();
            assert_eq!(cache.budget(), budget);
            // A report waits for what is under way, during which more may be counted than exists.
            let bytes = cache.report().unwrap().snapshot.bytes;
            assert!(bytes.held <= budget, "{bytes:?}");
            scene.settle();
            assert!(cache.bytes().held <= budget, "{:?}", cache.bytes());
            contents::find(cache, scene.second, 2, 60);
            scene.end();
        }
    }
}

#[test]
fn a_trim_returns_at_once_and_others_grow_until_its_fence_has_fired() {
    let Rig { _deadline, watch, cache, lets_go: _lets_go } = Rig::new(|builder| builder);
    let (first, second, third) = (request(&cache, 60, 1), request(&cache, 100, 2), request(&cache, 100, 3));
    cache.flush().unwrap();
    watch.hold(ONE);
    watch.hold(TWO);
    cache.retire(second, &[Fence::Stream(ONE)]).unwrap();
    watch.used_by(&cache, second.index(), ONE);
    cache.retire(third, IDLE).unwrap();
    let unmapped = watch.checked.calls().of(Verb::Unmap);
    let held = cache.bytes().held;
    assert_eq!(cache.trim(Bytes::ZERO, &[Fence::Stream(TWO)]).unwrap(), held);
    assert_eq!(watch.checked.calls().of(Verb::Unmap), unmapped);
    watch.before_any(&[TWO]);
    // Growth goes on, ahead of the steps.
    let (mapped, before) = (cache.snapshot().events.mapped_ahead, watch.on_the_path());
    for count in 61..=180 {
        step(&cache, first, count).unwrap();
        contents::fill(&cache, first, 1, count - 1..count);
        let backed = cache.report().unwrap().slots[usize::try_from(first.index()).unwrap()].backed;
        if backed < Bytes::new(1024 * (count + 16)) {
            until(|| !cache.bytes().ahead.is_zero());
        }
    }
    assert!(cache.snapshot().events.mapped_ahead > mapped);
    assert_eq!((watch.on_the_path(), watch.checked.calls().of(Verb::Unmap)), (before, unmapped));
    // With its own fence what was idle goes, and with the other the rest.
    watch.fire(TWO);
    until(|| watch.checked.calls().of(Verb::Unmap) > unmapped);
    assert_eq!(watch.violations(), Vec::<String>::new());
    watch.fire(ONE);
    cache.flush().unwrap();
    let bytes = cache.bytes();
    assert_eq!((bytes.free, bytes.parked), (Bytes::ZERO, bytes.ahead), "{bytes:?}");
    assert_eq!(watch.violations(), Vec::<String>::new());
    contents::find(&cache, first, 1, 180);
    cache.report().unwrap();
}

#[test]
fn a_trim_gives_back_what_was_in_flight_for_a_slot_that_was_retired_before() {
    for verb in MAPPING {
        let scene = Scene::held_at(verb);
        scene.cache.retire(scene.second, IDLE).unwrap();
        scene.cache.trim(Bytes::ZERO, IDLE).unwrap();
        scene.settle();
        let bytes = scene.cache.bytes();
        assert_eq!((scene.cache.snapshot().slots.parked, bytes.free), (0, Bytes::ZERO));
        assert_eq!(bytes.parked, bytes.ahead);
        scene.end();
    }
}

#[test]
fn a_reclaim_returns_at_once_and_frees_once_its_fence_has_fired() {
    let Rig { _deadline, watch, cache, lets_go: _lets_go } = Rig::new(|builder| builder);
    let (first, second) = (request(&cache, 60, 1), request(&cache, 200, 2));
    cache.flush().unwrap();
    watch.hold(ONE);
    cache.retire(second, &[Fence::Stream(ONE)]).unwrap();
    watch.used_by(&cache, second.index(), ONE);
    let wanted = Bytes::new(4096 * 20);
    let free = cache.bytes().free;
    assert_eq!(cache.reclaim(wanted, IDLE).unwrap(), free);
    // Others are served meanwhile.
    step(&cache, first, 64).unwrap();
    watch.fire(ONE);
    cache.flush().unwrap();
    assert!(cache.bytes().free >= free + wanted, "{:?}", cache.bytes());
    assert_eq!(watch.violations(), Vec::<String>::new());
    contents::find(&cache, first, 1, 60);
    cache.report().unwrap();
}

#[test]
fn two_threads_step_slots_of_their_own_while_the_mapper_is_held() {
    for verb in MAPPING {
        let scene = Scene::held_at(verb);
        let cache = &scene.cache;
        // The second slot changes hands; what it has had so far is there.
        cache.retire(scene.second, IDLE).unwrap();
        let third = cache.acquire(tokens(60), Some(ONE)).unwrap();
        assert_eq!(third.index(), scene.second.index());
        let before = scene.watch.on_the_path();
        thread::scope(|scope| {
            for (slot, owner, from, to) in [(scene.first, 1, 60, 120), (third, 3, 0, 64)] {
                scope.spawn(move || {
                    for count in from + 1..=to {
                        step(cache, slot, count).unwrap();
                        contents::fill(cache, slot, owner, count - 1..count);
                    }
                });
            }
        });
        assert_eq!(scene.watch.on_the_path(), before);
        contents::find(cache, scene.first, 1, 120);
        contents::find(cache, third, 3, 64);
        scene.end();
    }
}

#[test]
fn two_threads_step_slots_of_their_own_while_the_mapper_works() {
    let Rig { _deadline, watch, cache, lets_go: _lets_go } = Rig::new(|builder| builder);
    for round in 0..10 {
        thread::scope(|scope| {
            for thread in 1..=2 {
                let cache = &cache;
                scope.spawn(move || {
                    let owner = round * 2 + thread;
                    let slot = request(cache, 20 * thread, owner);
                    for count in 20 * thread + 1..=300 {
                        step(cache, slot, count).unwrap();
                        contents::fill(cache, slot, owner, count - 1..count);
                        if count % 100 == 0 {
                            cache.flush().unwrap();
                        }
                    }
                    contents::find(cache, slot, owner, 300);
                    cache.retire(slot, IDLE).unwrap();
                    if round % 3 == 0 {
                        cache.trim(Bytes::ZERO, IDLE).unwrap();
                    }
                });
            }
        });
    }
    cache.flush().unwrap();
    cache.report().unwrap();
    assert!(cache.snapshot().events.mapped_ahead > 0);
    drop(cache);
    assert_eq!(watch.checked.live(), Live::default());
}

#[test]
fn memory_is_unmapped_eagerly_once_its_fence_has_fired() {
    let Rig { _deadline, watch, cache, lets_go: _lets_go } =
        Rig::new(|builder| builder.reclaim(Reclaim::Eager).look_ahead(tokens(0)));
    let (first, second) = (request(&cache, 60, 1), request(&cache, 100, 2));
    watch.hold(ONE);
    cache.retire(second, &[Fence::Stream(ONE)]).unwrap();
    watch.used_by(&cache, second.index(), ONE);
    step(&cache, first, 61).unwrap();
    assert_eq!(watch.checked.calls().of(Verb::Unmap), 0);
    watch.fire(ONE);
    // Nobody calls for it.
    until(|| cache.bytes().parked.is_zero());
    assert_eq!(cache.snapshot().slots.parked, 0);
    assert_eq!(watch.violations(), Vec::<String>::new());
    contents::find(&cache, first, 1, 60);
    cache.flush().unwrap();
    cache.report().unwrap();
}

#[test]
fn a_prefetch_is_given_up_while_it_is_in_flight() {
    for verb in MAPPING {
        let mut rig = Rig::new(|builder| builder);
        let slot = rig.cache.acquire(tokens(300), Some(ONE)).unwrap();
        let gate = rig.gate(verb);
        let Rig { _deadline, watch, cache, lets_go: _lets_go } = rig;
        cache.prefetch(&[SlotTokens::new(slot, tokens(300))]).unwrap();
        gate.wait();
        cache.retire(slot, IDLE).unwrap();
        gate.open();
        cache.flush().unwrap();
        assert_eq!((cache.bytes().ahead, cache.bytes().mapped), (Bytes::ZERO, Bytes::ZERO));
        let other = request(&cache, 300, 1);
        contents::find(&cache, other, 1, 300);
        cache.report().unwrap();
        drop(cache);
        assert_eq!(watch.checked.live(), Live::default());
    }
}
