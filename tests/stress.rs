//! Do sixteen threads and a mapper ever touch the same memory without saying so to each other?
//!
//! The question is ThreadSanitizer's (`.ci/run tsan`); without it this is a test of the books and of what
//! is in the slots. It has no harness, starts its threads by `spawn` and waits for them by `join`, and
//! locks with `parking_lot`: what the standard library does inside is not instrumented, and would be
//! reported. Patterns are written and read through the slots' addresses, so that a slot which passes from
//! one thread to another unannounced is a race as well.
//!
//! `VATTN_STRESS_ROUNDS` multiplies the traffic.

#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]
#![allow(unsafe_code, reason = "writes through addresses")]

#[cfg(target_os = "linux")]
mod common;

#[cfg(target_os = "linux")]
mod linux {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
    use std::thread;

    use super::common::gate::Deadline;
    use super::common::{Backend, Numbers, Shape, contents, setting, shapes, step, stream, tokens};
    use vattn::driver::{Live, Stream};
    use vattn::error::ErrorKind;
    use vattn::geometry::{Background, Reclaim};
    use vattn::{Bytes, Fence, Health, KvCache, SlotTokens};

    /// Of these one asks for memory back and one looks at everything; a seventeenth ends the streams' work.
    const THREADS: u64 = 16;
    const STREAMS: u64 = 4;
    const SLOTS: u32 = 20;
    /// Too little for all: who wants memory takes it from others.
    const BUDGET: u64 = 300;

    struct World {
        cache: KvCache,
        backend: Backend,
        granule: Bytes,
        has_bytes: bool,
        working: AtomicU64,
        calls: AtomicU64,
        over: AtomicBool,
    }

    impl World {
        fn new(shape: Shape, reclaim: Reclaim) -> Self {
            let shape = Shape { slots: SLOTS, budget: BUDGET, background: Background::Thread, ..shape };
            // The driver itself: whatever is wrapped around it has locks that would hide what is wrong.
            let backend = shape.backend();
            let builder = shape.config().to_builder().reclaim(reclaim).look_ahead(tokens(48));
            Self {
                cache: KvCache::new(builder.build().unwrap(), backend.driver()).unwrap(),
                backend,
                granule: shape.granule,
                has_bytes: shape.on_host,
                working: AtomicU64::new(THREADS - 2),
                calls: AtomicU64::new(0),
                over: AtomicBool::new(false),
            }
        }

        fn works(&self) -> bool {
            self.working.load(Relaxed) > 0
        }
    }

    fn fence(numbers: &mut Numbers) -> Fence {
        if numbers.below(3) == 0 { Fence::Idle } else { Fence::Stream(any_stream(numbers)) }
    }

    fn any_stream(numbers: &mut Numbers) -> Stream {
        stream(1 + numbers.below(STREAMS))
    }

    /// Requests that come, grow, shrink and go, one after the other. Now and then one is pinned, and that
    /// goes at some moment of a later one's.
    fn serve(world: &World, thread: u64, rounds: u64) {
        let (cache, mut numbers) = (&world.cache, Numbers::new(thread + 1));
        let mut pin = None;
        for round in 0..rounds {
            let owner = thread << 32 | round;
            let on = (numbers.below(4) > 0).then(|| any_stream(&mut numbers));
            let Ok(slot) = cache.acquire(tokens(numbers.below(200)), on) else {
                thread::yield_now();
                continue;
            };
            if numbers.below(4) == 0 {
                cache.prefetch(&[SlotTokens::new(slot, tokens(numbers.below(300)))]).unwrap();
            }
            let mut held = 0;
            let mut to = numbers.below(80);
            for _ in 0..numbers.below(60) {
                match step(cache, slot, to) {
                    Ok(()) if world.has_bytes => {
                        // As kernels do: some write, some read.
                        contents::fill(cache, slot, owner, held..to);
                        held = to;
                    }
                    Ok(()) => held = to,
                    Err(error) => assert_eq!(error.kind(), ErrorKind::OutOfBudget, "{}", error.report()),
                }
                if numbers.below(24) == 0 {
                    held /= 2;
                    cache.truncate(slot, tokens(held), &[fence(&mut numbers)]).unwrap();
                }
                if numbers.below(16) == 0 {
                    pin = None;
                }
                to = (held + 1 + numbers.below(4)).min(300);
                world.calls.fetch_add(1, Relaxed);
            }
            if world.has_bytes {
                contents::find(cache, slot, owner, held);
            }
            if numbers.below(10) == 0 {
                pin = Some(cache.pin(slot).unwrap());
            }
            cache.retire(slot, &[fence(&mut numbers)]).unwrap();
        }
        drop(pin);
        world.working.fetch_sub(1, Relaxed);
    }

    /// Somebody who wants memory back, as long as there are requests.
    fn press(world: &World) {
        let (cache, mut numbers) = (&world.cache, Numbers::new(1000));
        while world.works() {
            let bytes = world.granule * numbers.below(BUDGET);
            match numbers.below(4) {
                0 => _ = cache.reclaim(bytes, &[fence(&mut numbers)]).unwrap(),
                1 => _ = cache.trim(bytes, &[fence(&mut numbers)]).unwrap(),
                2 => drop(cache.set_budget(world.granule * (BUDGET / 2 + numbers.below(BUDGET)))),
                _ => cache.flush().unwrap(),
            }
            thread::yield_now();
        }
    }

    /// Somebody who looks at everything, as long as there are requests.
    fn look(world: &World) {
        let cache = &world.cache;
        while world.works() {
            cache.report().unwrap();
            let snapshot = cache.snapshot();
            assert!(snapshot.bytes.quarantined.is_zero());
            assert!(cache.admits(&[tokens(10), tokens(100)]) <= 2 && !cache.budget().is_zero());
            assert_eq!((cache.health(), cache.bytes().quarantined), (Health::Healthy, Bytes::ZERO));
            thread::yield_now();
        }
    }

    /// Work that begins and ends on streams, until nobody waits for any.
    fn compute(world: &World) {
        let mut numbers = Numbers::new(2000);
        while !world.over.load(Relaxed) {
            let stream = any_stream(&mut numbers);
            world.backend.hold(stream);
            (0..numbers.below(20)).for_each(|_| thread::yield_now());
            world.backend.fire(stream);
        }
        world.backend.fire_all();
    }

    fn stress(shape: Shape, reclaim: Reclaim, rounds: u64) {
        let name = shape.name;
        let world = Arc::new(World::new(shape, reclaim));
        let start = |run: Box<dyn FnOnce(&World) + Send>| {
            let world = Arc::clone(&world);
            thread::spawn(move || run(&world))
        };
        let compute = start(Box::new(compute));
        let mut threads: Vec<_> = (0..THREADS - 2)
            .map(|thread| start(Box::new(move |world| serve(world, thread, rounds))))
            .collect();
        threads.push(start(Box::new(press)));
        threads.push(start(Box::new(look)));
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        world.over.store(true, Relaxed);
        compute.join().unwrap();

        let World { cache, backend, calls, .. } = Arc::into_inner(world).unwrap();
        cache.trim(Bytes::ZERO, &[Fence::Idle]).unwrap();
        cache.flush().unwrap();
        let report = cache.report().unwrap();
        assert_eq!((report.health, report.snapshot.slots.active), (Health::Healthy, 0));
        assert_eq!(report.snapshot.bytes.held, Bytes::ZERO);
        let events = report.snapshot.events;
        assert!(events.mapped_ahead > 0 && events.adopted > 0 && events.reclaimed > 0, "{events:?}");
        drop(cache);
        assert_eq!(backend.live(), Some(Live::default()));
        println!(
            "{name}, {reclaim:?}: {} steps, {} mapped ahead, {} adopted, {} reclaimed",
            calls.into_inner(),
            events.mapped_ahead,
            events.adopted,
            events.reclaimed
        );
    }

    pub(super) fn main() {
        let times = setting("VATTN_STRESS_ROUNDS", 1);
        let _deadline = (times == 1).then(Deadline::new);
        let rounds = 60 * times;
        let on_books = || Shape { on_host: false, ..shapes::per_layer() };
        stress(shapes::sliced(), Reclaim::Deferred, rounds);
        stress(shapes::sliced(), Reclaim::Eager, rounds);
        stress(on_books(), Reclaim::Deferred, rounds * 4);
    }
}

fn main() {
    #[cfg(target_os = "linux")]
    linux::main();
}
