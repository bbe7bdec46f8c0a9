//! What is left when the driver fails, panics, crawls or stands still in the background?
//!
//! Steps that succeed, contents that nobody touched, books that agree, and an error for whoever flushes.
//! Nothing hangs: whatever does is ended.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]
#![allow(unsafe_code, reason = "writes through addresses")]

mod common;

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;
use std::{panic, thread};

use common::gate::{is_mapper, until};
use common::rig::{Rig, request};
use common::{Shape, Watch, contents, kind, shapes, step, stream, tokens};
use vattn::driver::{Live, Stream};
use vattn::error::{ErrorKind, Verb};
use vattn::geometry::Background;
use vattn::{Bytes, Fence, Health, KvCache, SlotId, SlotTokens};

const ONE: Stream = stream(1);
const TWO: Stream = stream(2);
const IDLE: &[Fence] = &[Fence::Idle];
const MAPPING: [Verb; 3] = [Verb::Create, Verb::Map, Verb::SetAccess];
const KINDS: [ErrorKind; 4] =
    [ErrorKind::Driver, ErrorKind::OutOfDeviceMemory, ErrorKind::OutOfMappings, ErrorKind::DeviceLost];

/// A call in the background that is to fail.
#[derive(Clone, Copy, Debug)]
struct Failure {
    nth: u64,
    kind: ErrorKind,
    /// Nothing can be unmapped in that turn either.
    undoing_too: bool,
}

/// A server that does its own background work, and what it knows of its requests.
struct Server {
    watch: Watch,
    cache: KvCache,
    active: Vec<(SlotId, u64, u64)>,
    failure: Option<Failure>,
    /// Calls that were made in the background.
    calls: u64,
    /// How many of them failed.
    failed: u64,
}

/// What ends a script early: the device is gone.
struct Lost;

impl Server {
    fn new(failure: Option<Failure>) -> Self {
        let shape = Shape { budget: 260, background: Background::Caller, ..shapes::sliced() };
        let watch = shape.watch();
        watch.fire_when_waited_for();
        let builder = shape.config().to_builder().at_hand(shape.granule * 32);
        let builder = builder.look_ahead(tokens(64)).look_ahead_budget(shape.granule * 100);
        let cache = KvCache::new(builder.build().unwrap(), watch.driver()).unwrap();
        Self { watch, cache, active: Vec::new(), failure, calls: 0, failed: 0 }
    }

    fn request(&mut self, count: u64) -> SlotId {
        let owner = 10 + u64::try_from(self.active.len()).unwrap();
        let slot = request(&self.cache, count, owner);
        self.active.push((slot, owner, count));
        slot
    }

    fn to(&mut self, slot: SlotId, count: u64) {
        let known = self.active.iter_mut().find(|known| known.0 == slot).unwrap();
        step(&self.cache, slot, count).unwrap();
        contents::fill(&self.cache, slot, known.1, known.2..count);
        known.2 = count;
    }

    fn retire(&mut self, slot: SlotId, fence: Fence) {
        self.active.retain(|known| known.0 != slot);
        self.cache.retire(slot, &[fence]).unwrap();
    }

    /// Does background work, with the call failing that is to fail.
    fn tend(&mut self) -> Result<(), Lost> {
        let checked = &self.watch.checked;
        let before = (checked.calls().total(), checked.injected());
        let due = self.failure.filter(|failure| failure.nth > self.calls);
        if let Some(Failure { nth, kind, undoing_too }) = due {
            if kind == ErrorKind::DeviceLost {
                checked.lose_device_at(nth - self.calls);
            } else {
                checked.fail_call(nth - self.calls, kind);
            }
            if undoing_too {
                checked.fail_from_of(Verb::Unmap, 1, kind);
            }
        }
        self.cache.tend().unwrap();
        self.calls += checked.calls().total() - before.0;
        let injected = checked.injected() - before.1;
        self.failed += injected;
        // A device that is gone stays gone.
        if self.cache.health() == Health::Failed {
            return Err(Lost);
        }
        checked.clear_faults();
        if injected > 0 {
            self.look();
        }
        Ok(())
    }

    /// Everybody's bytes, and all books.
    fn look(&self) {
        for (slot, owner, count) in &self.active {
            contents::find(&self.cache, *slot, *owner, *count);
        }
        self.cache.report().unwrap();
        assert_eq!(self.watch.violations(), Vec::<String>::new());
    }
}

/// Growth, a prefetch, a trim and a reclaim with fences, extents at hand: some of all that is done in the
/// background.
fn script(server: &mut Server) -> Result<(), Lost> {
    let (first, second, third) = (server.request(60), server.request(100), server.request(150));
    for count in 61..=130 {
        server.to(first, count);
        server.tend()?;
    }
    server.watch.hold(ONE);
    server.retire(second, Fence::Stream(ONE));
    server.watch.used_by(&server.cache, second.index(), ONE);
    let waiting = server.cache.acquire(tokens(290), None).unwrap();
    server.active.push((waiting, 5, 0));
    server.cache.prefetch(&[SlotTokens::new(waiting, tokens(200))]).unwrap();
    server.tend()?;
    server.cache.trim(server.cache.bytes().needed, IDLE).unwrap();
    server.tend()?;
    server.watch.fire(ONE);
    server.tend()?;
    server.to(waiting, 200);
    server.tend()?;
    server.retire(third, Fence::Idle);
    server.watch.hold(TWO);
    server.cache.reclaim(Bytes::new(4096 * 20), &[Fence::Stream(TWO)]).unwrap();
    server.tend()?;
    server.watch.fire(TWO);
    server.tend()?;
    for count in 201..=260 {
        server.to(waiting, count);
        server.tend()?;
    }
    server.request(120);
    server.tend()
}

/// Plays the script with one failure; how many there were, and how many calls.
fn play(failure: Option<Failure>) -> (u64, u64) {
    let mut server = Server::new(failure);
    let lost = script(&mut server).is_err();
    let what = format!("{failure:?}");
    let Server { cache, active, failed, calls, .. } = &server;
    if lost {
        assert_eq!(cache.health(), Health::Failed, "{what}");
        let slot = active[0].0;
        for refused in
            [cache.flush(), step(cache, slot, 300), cache.retire(slot, IDLE), cache.tend().map(drop)]
        {
            // There is nothing to tend, which is no error.
            let Err(error) = refused else { continue };
            assert_eq!(error.kind(), ErrorKind::Unhealthy, "{what}: {error}");
        }
        return (*failed, *calls);
    }
    // Whoever flushes is told, once.
    let told = cache.flush();
    let counted = cache.snapshot().events.background_failures;
    assert_eq!(told.is_err(), counted > 0, "{what}: {told:?}, {counted} failures");
    if let Some(Failure { kind, .. }) = failure
        && let Err(error) = told
    {
        assert_eq!(error.kind(), kind, "{what}: {error}");
    }
    // What was left is caught up on, and what the driver held on to is let go of.
    cache.trim(Bytes::ZERO, IDLE).unwrap();
    cache.flush().unwrap_or_else(|error| panic!("{what}: {}", error.report()));
    assert_eq!(cache.health(), Health::Healthy, "{what}");
    assert_eq!(cache.bytes().quarantined, Bytes::ZERO, "{what}");
    server.look();
    let Server { watch, cache, active, failed, calls, .. } = server;
    active.iter().for_each(|(slot, ..)| cache.retire(*slot, IDLE).unwrap());
    cache.trim(Bytes::ZERO, IDLE).unwrap();
    cache.flush().unwrap();
    assert_eq!(cache.bytes().held, Bytes::ZERO, "{what}");
    let events = cache.snapshot().events.refused_drops;
    drop(cache);
    assert_eq!(watch.checked.live(), Live { events, ..Live::default() }, "{what}");
    (failed, calls)
}

#[test]
fn any_call_in_the_background_may_fail() {
    let (_, calls) = play(None);
    assert!(calls > 50, "{calls} calls in the background");
    let mut injected = 0;
    for kind in KINDS {
        for nth in 1..=calls {
            injected += play(Some(Failure { nth, kind, undoing_too: false })).0;
            if kind != ErrorKind::DeviceLost {
                injected += play(Some(Failure { nth, kind, undoing_too: true })).0;
            }
        }
    }
    println!("{injected} failures in {calls} calls");
    assert!(injected >= calls * 7, "{injected} failures in {calls} calls");
}

/// Each call takes 10 ms.
#[test]
fn nothing_hangs_on_a_slow_driver() {
    let Rig { _deadline, watch, cache, lets_go: _lets_go } = Rig::new(|builder| builder);
    watch.checked.on_call(Box::new(|_| thread::sleep(Duration::from_millis(10))));
    thread::scope(|scope| {
        for owner in 1..=2 {
            let (cache, watch) = (&cache, &watch);
            scope.spawn(move || {
                let slot = request(cache, 60, owner);
                cache.flush().unwrap();
                // All that is needed is there, so nobody waits for a call.
                for count in 61..=120 {
                    step(cache, slot, count).unwrap();
                    contents::fill(cache, slot, owner, count - 1..count);
                }
                contents::find(cache, slot, owner, 120);
                watch.hold(stream(owner));
                cache.retire(slot, &[Fence::Stream(stream(owner))]).unwrap();
                cache.trim(Bytes::ZERO, IDLE).unwrap();
                watch.fire(stream(owner));
            });
        }
    });
    cache.set_budget(Bytes::new(4096 * 300)).unwrap();
    cache.flush().unwrap();
    assert_eq!(cache.bytes().held, Bytes::ZERO);
    cache.report().unwrap();
    drop(cache);
    assert_eq!(watch.checked.live(), Live::default());
}

#[test]
fn a_fence_that_fails_makes_the_cache_failed_and_says_so() {
    let Rig { _deadline, watch, cache, lets_go: _lets_go } = Rig::new(|builder| builder);
    let (first, second) = (request(&cache, 60, 1), request(&cache, 100, 2));
    cache.flush().unwrap();
    watch.hold(ONE);
    cache.retire(second, &[Fence::Stream(ONE)]).unwrap();
    watch.used_by(&cache, second.index(), ONE);
    watch.checked.fail_from_of(Verb::QueryEvent, 1, ErrorKind::DeviceLost);
    cache.trim(Bytes::ZERO, IDLE).unwrap();
    until(|| cache.health() == Health::Failed);
    let refused = [
        step(&cache, first, 61),
        step(&cache, first, 200),
        cache.acquire(tokens(1), None).map(drop),
        cache.retire(first, IDLE),
        cache.trim(Bytes::ZERO, IDLE).map(drop),
        cache.prefetch(&[SlotTokens::new(first, tokens(100))]),
        cache.set_budget(Bytes::gib(1)),
        cache.flush(),
    ];
    for (place, result) in refused.into_iter().enumerate() {
        let error = result.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unhealthy, "call {place}: {error}");
        let words = error.report();
        assert!(words.contains(Verb::QueryEvent.as_str()), "call {place} does not say which call: {words}");
    }
    assert_eq!(watch.violations(), Vec::<String>::new());
}

#[test]
fn a_fence_that_can_not_be_asked_hangs_nobody() {
    let Rig { _deadline, watch, cache, lets_go: _lets_go } = Rig::new(|builder| builder);
    let (first, second) = (request(&cache, 60, 1), request(&cache, 100, 2));
    cache.flush().unwrap();
    watch.hold(ONE);
    cache.retire(second, &[Fence::Stream(ONE)]).unwrap();
    watch.used_by(&cache, second.index(), ONE);
    watch.checked.fail_from_of(Verb::QueryEvent, 1, ErrorKind::Driver);
    cache.trim(Bytes::ZERO, IDLE).unwrap();
    assert_eq!(kind(cache.flush()), ErrorKind::Driver);
    step(&cache, first, 100).unwrap();
    watch.checked.clear_faults();
    watch.fire(ONE);
    // Others may have woken the mapper meanwhile.
    drop(cache.flush());
    cache.trim(Bytes::ZERO, IDLE).unwrap();
    cache.flush().unwrap();
    let bytes = cache.bytes();
    assert_eq!((bytes.free, bytes.parked), (Bytes::ZERO, bytes.ahead));
    assert_eq!(watch.violations(), Vec::<String>::new());
    contents::find(&cache, first, 1, 60);
    cache.report().unwrap();
}

#[test]
fn a_panic_in_the_mapper_is_the_next_calls_error_and_hangs_nobody() {
    for verb in MAPPING.into_iter().chain([Verb::Unmap, Verb::Release, Verb::QueryEvent]) {
        let Rig { _deadline, watch, cache, lets_go: _lets_go } = Rig::new(|builder| builder);
        let (first, second) = (request(&cache, 60, 1), request(&cache, 100, 2));
        cache.flush().unwrap();
        let armed = AtomicBool::new(true);
        watch.checked.on_call(Box::new(move |called| {
            let trips = called == verb && is_mapper() && armed.swap(false, SeqCst);
            assert!(!trips, "the driver tripped over its own feet");
        }));
        cache.retire(second, &[Fence::Stream(ONE)]).unwrap();
        let third = cache.acquire(tokens(1), Some(ONE)).unwrap();
        if MAPPING.contains(&verb) {
            drop(cache.prefetch(&[SlotTokens::new(third, tokens(300))]));
        } else {
            watch.hold(ONE);
            drop(cache.truncate(first, tokens(59), &[Fence::Stream(ONE)]));
            drop(cache.trim(Bytes::ZERO, IDLE));
            watch.fire(ONE);
        }
        // Whoever waits for the mapper is told, and so is everybody else.
        for result in [cache.flush(), step(&cache, first, 61), cache.retire(first, IDLE), cache.flush()] {
            let error = result.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unhealthy, "{verb}: {error}");
            assert!(error.report().contains("tripped over its own feet"), "{verb}: {}", error.report());
        }
        assert_eq!(cache.health(), Health::Failed);
        watch.checked.clear_on_call();
        drop(cache);
    }
}
