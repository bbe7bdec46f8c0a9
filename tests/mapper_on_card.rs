//! The mapper beside real work of a card: graphs that were captured before memory came and went, captures
//! that are open while it maps, and kernels that still read what was given up.
//!
//! Each test says SKIP where there is no GPU.

#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]
#![allow(unsafe_code, reason = "calls CUDA beside the library")]

mod common;

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use common::card::{Alone, Card, Graph, card_alone};
use common::contents::{self, Place};
use common::kernels::{Counter, Kernels, Row, Told};
use common::{Backend, Watch, setting, step, stream, tokens};
use vattn::driver::{Live, Stream};
use vattn::error::Verb;
use vattn::geometry::Reclaim;
use vattn::units::Bytes;
use vattn::{Config, Fence, Geometry, Health, KvCache, SlotId};

const ONE: Stream = stream(1);
const TWO: Stream = stream(2);
const IDLE: &[Fence] = &[Fence::Idle];
const MAX_TOKENS: u64 = 8192;

/// A card for one test alone, with a driver that keeps books of it.
struct Bench {
    watch: Watch,
    card: Arc<Card>,
    _alone: Alone,
}

impl Bench {
    fn open() -> Option<Self> {
        let (alone, card) = card_alone()?;
        // Streams and kernels are made now: neither may be during a capture.
        for number in [ONE, TWO] {
            card.stream(number);
        }
        Kernels::get();
        Some(Self { watch: Watch::new(Backend::Card(Arc::clone(&card)), None), card, _alone: alone })
    }

    /// A cache with the mapper's thread: 32 tokens fill a granule of 2 MiB, of keys and of values alike.
    fn cache(&self, slots: u32, budget: Bytes, reclaim: Reclaim) -> KvCache {
        let config = Config::builder(Geometry::preset("llama-3-8b").unwrap())
            .max_slots(slots)
            .max_tokens(tokens(MAX_TOKENS))
            .budget(budget)
            .reclaim(reclaim);
        KvCache::new(config.build().unwrap(), self.watch.driver()).unwrap()
    }

    /// The books agree, nothing failed, and nothing is left of the cache.
    fn close(&self, cache: KvCache) {
        cache.flush().unwrap();
        let report = cache.report().unwrap();
        assert_eq!((report.health, report.snapshot.events.background_failures), (Health::Healthy, 0));
        assert_eq!(self.watch.violations(), Vec::<String>::new());
        drop(cache);
        assert_eq!(self.watch.checked.live(), Live::default());
    }
}

/// A request of so many tokens, whose work is in that stream.
fn admit(cache: &KvCache, count: u64, stream: Stream) -> SlotId {
    let slot = cache.acquire(tokens(count), Some(stream)).unwrap();
    step(cache, slot, count).unwrap();
    slot
}

/// How often the mapper has made a call so far.
fn in_background(cache: &KvCache, verb: Verb) -> u64 {
    cache.snapshot().background[&verb].calls
}

/// A captured iteration over one slot, in every layer: it finds the tokens that there were, writes new ones,
/// and finds all. Which those are it looks up when it runs.
struct Iteration {
    card: Arc<Card>,
    graph: Graph,
    told: Row<Told>,
    wrong: Counter,
}

impl Iteration {
    fn capture(card: &Arc<Card>, cache: &KvCache, slot: SlotId) -> Self {
        let (kernels, on) = (Kernels::get(), card.stream(ONE));
        let told = Row::new(card, &[Told { first: 0, tokens: 0, owner: 0 }; 3]);
        let wrong = Counter::new(card);
        card.capture(ONE, true);
        for place in contents::places(cache, slot, 0, 0..0) {
            kernels.find_told(on, place, &told, 0, &wrong);
            kernels.fill_told(on, place, &told, 1);
            kernels.find_told(on, place, &told, 2, &wrong);
        }
        Self { graph: card.captured(ONE), card: Arc::clone(card), told, wrong }
    }

    /// Replays it in a stream, without waiting.
    fn replay(&self, stream: Stream, owner: u64, before: u64, after: u64) {
        let of = |first: u64, end: u64| Told { first, tokens: end - first, owner };
        self.told.write(self.card.stream(stream), &[of(0, before), of(before, after), of(0, after)]);
        self.graph.launch(&self.card, stream);
    }

    /// How many bytes were not what they should be, in all replays of the stream.
    fn wrong(&self, stream: Stream) -> u64 {
        self.wrong.read(self.card.stream(stream))
    }
}

/// A request that is served by replays.
struct Served<'a> {
    cache: &'a KvCache,
    iteration: &'a Iteration,
    slot: SlotId,
    owner: u64,
    stream: Stream,
    held: u64,
}

impl Served<'_> {
    fn step(&mut self, to: u64) {
        step(self.cache, self.slot, to).unwrap();
        self.iteration.replay(self.stream, self.owner, self.held, to);
        self.held = to;
    }

    fn grow(&mut self, to: u64) {
        while self.held < to {
            self.step(to.min(self.held + 5));
        }
    }

    fn truncate(&mut self, to: u64) {
        self.cache.truncate(self.slot, tokens(to), &self.fences()).unwrap();
        self.held = to;
        self.check("truncation");
    }

    fn fences(&self) -> [Fence; 1] {
        [Fence::Stream(self.stream)]
    }

    fn check(&self, after: &str) {
        self.iteration.replay(self.stream, self.owner, self.held, self.held);
        let wrong = self.iteration.wrong(self.stream);
        assert_eq!(wrong, 0, "bytes after {after}, of {} tokens of owner {}", self.held, self.owner);
    }
}

#[test]
fn a_graph_captured_once_is_right_whatever_happens_to_its_slot() {
    let Some(bench) = Bench::open() else { return };
    let cache = bench.cache(2, Bytes::mib(512), Reclaim::Deferred);
    let neighbour = admit(&cache, 50, ONE);
    contents::fill(&cache, neighbour, 99, 0..50);
    let mut slot = cache.acquire(tokens(100), Some(ONE)).unwrap();
    let index = slot.index();
    let mapped = || bench.watch.mapped(&cache, index, MAX_TOKENS);
    assert_eq!(mapped(), Bytes::ZERO, "the graph's addresses are not backed yet");
    let iteration = Iteration::capture(&bench.card, &cache, slot);

    let mut streams = [ONE, TWO].into_iter().cycle();
    for round in 0..4 {
        let stream = streams.next().unwrap();
        let mut served =
            Served { cache: &cache, iteration: &iteration, slot, owner: 1 + round, stream, held: 0 };
        served.step(100 + 50 * round);
        served.check("a prompt");
        served.grow(400);
        cache.flush().unwrap();
        served.check("growth");
        served.truncate(150);
        served.grow(220);
        served.check("regrowth over memory that stayed");

        served.truncate(120);
        let (before, unmaps) = (mapped(), in_background(&cache, Verb::Unmap));
        cache.trim(Bytes::ZERO, &served.fences()).unwrap();
        cache.flush().unwrap();
        assert!(mapped() < before && in_background(&cache, Verb::Unmap) > unmaps);
        served.check("a trim");

        // Another takes what was given back.
        let count = 50 + 100 * (round + 1);
        step(&cache, neighbour, count).unwrap();
        contents::fill(&cache, neighbour, 99, count - 100..count);
        served.grow(500);
        served.check("regrowth over memory that is new");

        // The work of the last replay may still be under way.
        served.grow(600);
        cache.retire(slot, &served.fences()).unwrap();
        if round == 1 {
            // The next request finds nothing behind the addresses.
            cache.trim(Bytes::ZERO, IDLE).unwrap();
            cache.flush().unwrap();
            assert_eq!(mapped(), Bytes::ZERO);
        }
        let next = cache.acquire(tokens(500), streams.clone().next()).unwrap();
        assert_eq!(next.index(), index, "there is no other");
        slot = next;
    }
    contents::find(&cache, neighbour, 99, 450);
    for stream in [ONE, TWO] {
        assert_eq!(iteration.wrong(stream), 0);
    }
    let events = cache.snapshot().events;
    assert!(events.adopted >= 3 && events.mapped_ahead > 0, "{events:?}");
    drop(iteration);
    bench.close(cache);
}

#[test]
fn the_mapper_works_beside_a_capture_in_global_mode_and_the_capture_survives() {
    let Some(bench) = Bench::open() else { return };
    let cache = bench.cache(4, Bytes::gib(2), Reclaim::Deferred);
    let slot = admit(&cache, 1000, TWO);
    contents::fill(&cache, slot, 7, 0..1000);
    let parked = admit(&cache, 3000, TWO);
    cache.retire(parked, &[Fence::Stream(TWO)]).unwrap();
    cache.flush().unwrap();

    let told = Row::new(&bench.card, &[Told { first: 0, tokens: 1000, owner: 7 }]);
    let wrong = Counter::new(&bench.card);
    let (kernels, on) = (Kernels::get(), bench.card.stream(ONE));
    let places: Vec<_> = contents::places(&cache, slot, 0, 0..0).collect();
    let calls = || [Verb::Map, Verb::Unmap].map(|verb| in_background(&cache, verb));
    bench.card.capture(ONE, true);
    let before = calls();
    let nodes = thread::scope(|scope| {
        let server = scope.spawn(|| {
            let mut count = 1000;
            while calls()[0] < before[0] + 4 {
                count += 4;
                step(&cache, slot, count).unwrap();
                cache.flush().unwrap();
            }
            cache.trim(Bytes::ZERO, &[Fence::Stream(TWO)]).unwrap();
            cache.flush().unwrap();
            step(&cache, slot, count + 500).unwrap();
            cache.flush().unwrap();
        });
        let mut nodes = 0;
        while !server.is_finished() && nodes < 4000 {
            for place in &places {
                kernels.find_told(on, *place, &told, 0, &wrong);
                nodes += 1;
            }
        }
        server.join().unwrap();
        nodes
    });
    let after = calls();
    kernels.find_told(on, places[0], &told, 0, &wrong);
    let graph = bench.card.captured(ONE);
    println!("during a capture of {nodes} nodes: maps and unmaps {before:?}, {after:?}");
    assert!(after[0] > before[0] && after[1] > before[1], "maps and unmaps: {before:?}, {after:?}");

    graph.launch(&bench.card, ONE);
    assert_eq!(wrong.read(on), 0);
    // It does look: of another's pattern it finds hardly a byte.
    told.write(on, &[Told { first: 0, tokens: 10, owner: 8 }]);
    graph.launch(&bench.card, ONE);
    assert!(wrong.read(on) > 10_000);
    drop((graph, told, wrong));
    bench.close(cache);
}

/// A slot that a kernel reads for a while, and a request that goes on.
struct Reading {
    bench: Bench,
    cache: KvCache,
    slot: SlotId,
    other: SlotId,
    /// Bytes that the kernel found to be another's.
    wrong: Counter,
    _places: Row<Place>,
}

/// Under a tool that checks every access, calls of the driver may wait for kernels.
fn is_under_a_tool() -> bool {
    setting("VATTN_UNDER_TOOL", 0) == 1
}

impl Reading {
    const TOKENS: u64 = 500;

    /// The kernel is launched, in the first stream.
    fn start(budget: Bytes, reclaim: Reclaim) -> Option<Self> {
        let bench = Bench::open()?;
        let cache = bench.cache(3, budget, reclaim);
        let [slot, other] = [Self::TOKENS, 100].map(|count| admit(&cache, count, ONE));
        contents::fill(&cache, slot, 1, 0..Self::TOKENS);
        contents::fill(&cache, other, 2, 0..100);
        cache.flush().unwrap();
        let places: Vec<_> = contents::places(&cache, slot, 1, 0..Self::TOKENS).collect();
        let (places, wrong) = (Row::new(&bench.card, &places), Counter::new(&bench.card));
        let milliseconds = setting("VATTN_DWELL_MS", 50);
        Kernels::get().dwell(bench.card.stream(ONE), &places, milliseconds, &wrong);
        Some(Self { bench, cache, slot, other, wrong, _places: places })
    }

    fn mapped(&self) -> Bytes {
        self.bench.watch.mapped(&self.cache, self.slot.index(), Self::TOKENS)
    }

    /// Until the kernel is done: the slot's memory is there, and whatever else happens meanwhile goes on.
    fn watch(&self, mapped: Bytes, mut meanwhile: impl FnMut()) {
        let mut looks = 0_u64;
        loop {
            let now = self.mapped();
            // Still busy afterwards, so it was so when that was looked at.
            if !self.bench.card.is_busy(ONE) {
                break;
            }
            assert!(now >= mapped, "{now} of {mapped} are mapped while the kernel reads");
            looks += 1;
            meanwhile();
            thread::yield_now();
        }
        println!("{looks} looks while the kernel read");
        assert!(looks > 0 || is_under_a_tool(), "the kernel was done before anybody looked");
        assert_eq!(self.wrong.read(self.bench.card.stream(ONE)), 0, "bytes changed under the kernel");
    }

    fn end(self) {
        contents::find(&self.cache, self.other, 2, 100);
        drop((self.wrong, self._places));
        self.bench.close(self.cache);
    }
}

#[test]
fn what_a_kernel_still_reads_is_unmapped_as_soon_as_it_is_done_and_no_sooner() {
    for reclaim in [Reclaim::Eager, Reclaim::Deferred] {
        let Some(reading) = Reading::start(Bytes::gib(1), reclaim) else { return };
        let mapped = reading.mapped();
        let ahead = reading.cache.snapshot().events.mapped_ahead;
        reading.cache.retire(reading.slot, &[Fence::Stream(ONE)]).unwrap();
        if reclaim == Reclaim::Deferred {
            reading.cache.trim(Bytes::ZERO, IDLE).unwrap();
        }
        // The mapper waits for nothing: the other request's growth is mapped meanwhile.
        let (mut count, mut due) = (100, Instant::now());
        reading.watch(mapped, || {
            if Instant::now() >= due && count < 2000 {
                count += 16;
                due = Instant::now() + Duration::from_micros(500);
                step(&reading.cache, reading.other, count).unwrap();
            }
        });
        let went_on = reading.cache.snapshot().events.mapped_ahead > ahead;
        assert!(went_on || is_under_a_tool(), "nothing was mapped ahead while the kernel read");

        reading.cache.flush().unwrap();
        assert_eq!(reading.mapped(), Bytes::ZERO, "{reclaim:?}");
        if reclaim == Reclaim::Deferred {
            // But for what is kept at hand.
            assert!(reading.cache.bytes().free <= Bytes::mib(16), "it was given back to the device");
        }
        reading.end();
    }
}

#[test]
fn a_slot_adopted_on_another_stream_is_written_only_once_its_reader_is_done() {
    let Some(reading) = Reading::start(Bytes::gib(1), Reclaim::Deferred) else { return };
    let mapped = reading.mapped();
    reading.cache.retire(reading.slot, &[Fence::Stream(ONE)]).unwrap();
    let adopted = admit(&reading.cache, Reading::TOKENS, TWO);
    assert_eq!(adopted.index(), reading.slot.index());
    // The host waits for nothing: the stream does.
    let (kernels, on) = (Kernels::get(), reading.bench.card.stream(TWO));
    let wrong = Counter::new(&reading.bench.card);
    for place in contents::places(&reading.cache, adopted, 3, 0..Reading::TOKENS) {
        kernels.fill_in(on, place);
        kernels.find_in(on, place, &wrong);
    }
    reading.watch(mapped, || {});
    assert_eq!(wrong.read(on), 0);
    drop(wrong);
    contents::find(&reading.cache, adopted, 3, Reading::TOKENS);
    reading.end();
}

#[test]
fn a_step_that_takes_what_a_kernel_still_reads_waits_for_it() {
    // Of 60 granules the first has 32, and the second will need 44.
    let Some(reading) = Reading::start(Bytes::mib(2 * 60), Reclaim::Deferred) else { return };
    let mapped = reading.mapped();
    reading.cache.retire(reading.slot, &[Fence::Stream(ONE)]).unwrap();
    thread::scope(|scope| {
        let taking = scope.spawn(|| step(&reading.cache, reading.other, 700));
        reading.watch(mapped, || {});
        taking.join().unwrap().unwrap();
    });
    assert!(reading.mapped() < mapped, "the step had to take some of it");
    contents::fill(&reading.cache, reading.other, 2, 100..700);
    contents::find(&reading.cache, reading.other, 2, 700);
    reading.end();
}
