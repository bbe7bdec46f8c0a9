//! Does every slot keep its contents, and do the books agree, after whatever several threads do for as long
//! as one likes?
//!
//! `VATTN_SOAK_SECONDS` (2) are spent on spells: a cache of some shape, and four threads that acquire, step,
//! prefetch, truncate, retire, trim, reclaim, change the budget and look at the books at random, each on
//! slots and a stream of its own, while work of the streams is held back now and then. On a card
//! (`VATTN_TEST_DEVICE=cuda`) kernels write and check the contents, and slots are given up while those still
//! run. `VATTN_SOAK_SEED` (1) starts the numbers.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]
#![allow(unsafe_code, reason = "events, and writes through addresses")]

mod common;

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

#[cfg(feature = "cuda")]
use common::kernels::{Counter, Kernels};
use common::{Backend, Numbers, Shape, Watch, contents, on_card, setting, shapes, stream, tokens};
use vattn::driver::{Driver, Live, Stream};
use vattn::error::{ErrorKind, Verb};
use vattn::geometry::{Background, Reclaim};
use vattn::{Bytes, Fence, Health, KvCache, SlotId, SlotTokens};

/// Each with a stream.
const WORKERS: u64 = 4;
/// Slots that a worker has at most.
const SLOTS: usize = 3;
/// How long a cache is used at most.
const LONGEST: Duration = Duration::from_secs(5);
/// Kernels of a worker that may be under way: CUDA holds up whoever launches a thousand into a stream.
const LAUNCHES: usize = 256;
/// What CUDA may have kept for itself in the end.
const OF_CUDA: Bytes = Bytes::mib(32);

/// A cache to be used for a while.
struct Spell {
    shape: Shape,
    reclaim: Reclaim,
    look_ahead: u64,
}

impl Spell {
    /// With a budget for three full slots, while there may be twelve.
    fn new(shape: Shape, background: Background, reclaim: Reclaim, look_ahead: u64) -> Self {
        let tensors = 0..shape.rows.len();
        let full: u64 = tensors.map(|tensor| shape.granules(tensor, shape.max_tokens)).sum();
        Self { shape: Shape { slots: 10, budget: full * 3, background, ..shape }, reclaim, look_ahead }
    }

    fn all() -> Vec<Self> {
        use Background::{Caller, Thread};
        use Reclaim::{Deferred, Eager};
        let mut spells = vec![
            Self::new(shapes::sliced(), Thread, Deferred, 64),
            Self::new(shapes::per_layer(), Thread, Eager, 16),
            Self::new(shapes::grouped(), Caller, Deferred, 64),
            Self::new(shapes::unequal(), Thread, Deferred, 0),
        ];
        if on_card() {
            let llama = Shape { max_tokens: 2048, ..shapes::llama() };
            spells.push(Self::new(llama, Thread, Deferred, 64));
        }
        spells
    }

    fn cache(&self, watch: &Watch) -> KvCache {
        let config = self.shape.config().to_builder().reclaim(self.reclaim);
        KvCache::new(config.look_ahead(tokens(self.look_ahead)).build().unwrap(), watch.driver()).unwrap()
    }
}

/// Where contents are written and checked.
enum Lane {
    Here,
    #[cfg(feature = "cuda")]
    Card {
        stream: Stream,
        wrong: Counter,
    },
}

impl Lane {
    fn new(backend: &Backend, stream: Stream) -> Self {
        match backend {
            #[cfg(feature = "cuda")]
            Backend::Card(card) => Self::Card { stream: card.stream(stream), wrong: Counter::new(card) },
            _ => {
                let _ = stream;
                Self::Here
            }
        }
    }

    /// Returns how many kernels it launched.
    fn fill(&self, cache: &KvCache, request: &Request, range: Range<u64>) -> usize {
        match self {
            Self::Here => {
                contents::fill(cache, request.slot, request.owner, range);
                0
            }
            #[cfg(feature = "cuda")]
            Self::Card { stream, .. } => {
                let places = contents::places(cache, request.slot, request.owner, range);
                places.map(|place| Kernels::get().fill_in(*stream, place)).count()
            }
        }
    }

    /// The same. What kernels find is told by [`settle`](Self::settle).
    fn find(&self, cache: &KvCache, request: &Request) -> usize {
        match self {
            Self::Here => {
                contents::find(cache, request.slot, request.owner, request.held);
                0
            }
            #[cfg(feature = "cuda")]
            Self::Card { stream, wrong } => {
                let places = contents::places(cache, request.slot, request.owner, 0..request.held);
                places.map(|place| Kernels::get().find_in(*stream, place, wrong)).count()
            }
        }
    }

    /// Waits until all is done, and says how many bytes were not what they should be.
    fn settle(&self) -> u64 {
        match self {
            Self::Here => 0,
            #[cfg(feature = "cuda")]
            Self::Card { stream, wrong } => wrong.read(*stream),
        }
    }
}

/// The last operations of a thread, told if it panics.
#[derive(Default)]
struct Trail(VecDeque<String>);

impl Trail {
    fn note(&mut self, what: String) {
        if self.0.len() == 64 {
            self.0.pop_front();
        }
        self.0.push_back(what);
    }
}

impl Drop for Trail {
    fn drop(&mut self) {
        if thread::panicking() {
            let lines: Vec<_> = self.0.iter().map(|what| format!("  {what}\n")).collect();
            println!("the last operations of this thread:\n{}", lines.concat());
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Request {
    slot: SlotId,
    owner: u64,
    held: u64,
    /// Whether the other stream has read it, too.
    read_away: bool,
}

struct Worker<'a> {
    spell: &'a Spell,
    watch: &'a Watch,
    cache: &'a KvCache,
    /// This thread's stream, and the next one's.
    streams: [Stream; 2],
    lanes: [Lane; 2],
    numbers: Numbers,
    active: Vec<Request>,
    owners: u64,
    launched: usize,
    operations: u64,
    trail: Trail,
}

/// The stream of a worker, counted from 1 so that none is CUDA's own.
fn of_worker(number: u64) -> Stream {
    stream(1 + number % WORKERS)
}

impl<'a> Worker<'a> {
    fn new(spell: &'a Spell, watch: &'a Watch, cache: &'a KvCache, number: u64, seed: u64) -> Self {
        let streams = [of_worker(number), of_worker(number + 1)];
        Self {
            spell,
            watch,
            cache,
            lanes: streams.map(|stream| Lane::new(&watch.backend, stream)),
            streams,
            numbers: Numbers::new(seed << 8 | number),
            active: Vec::new(),
            owners: number << 32,
            launched: 0,
            operations: 0,
            trail: Trail::default(),
        }
    }

    /// Gives up all of its slots in the end.
    fn run(mut self, until: Instant) -> Self {
        while Instant::now() < until {
            self.act();
            self.operations += 1;
            if self.launched > LAUNCHES || self.operations.is_multiple_of(16) {
                self.settle();
            }
        }
        while !self.active.is_empty() {
            self.retire(0);
            self.settle();
        }
        self
    }

    fn act(&mut self) {
        if self.spell.shape.background == Background::Caller && self.numbers.below(4) == 0 {
            self.cache.tend().unwrap();
        }
        let kind = self.numbers.below(16);
        if kind < 4 && self.active.len() < SLOTS {
            return self.acquire();
        }
        if kind == 15 || self.active.is_empty() {
            return self.keep_house();
        }
        let pick = usize::try_from(self.numbers.below(64)).unwrap() % self.active.len();
        match kind {
            0..8 => self.grow(pick),
            8 => self.grow_all(),
            9 | 10 => self.truncate(pick),
            11 | 12 => self.retire(pick),
            13 => self.prefetch(pick),
            _ => self.read_away(pick),
        }
    }

    fn most(&self) -> u64 {
        self.spell.shape.max_tokens
    }

    fn acquire(&mut self) {
        let hint = self.numbers.below(self.most());
        // Without a stream this thread waits for whoever had the slot.
        let on = (self.numbers.below(8) > 0).then_some(self.streams[0]);
        match self.cache.acquire(tokens(hint), on) {
            Ok(slot) => {
                self.trail.note(format!("acquire: {slot:?}, {hint} tokens soon, {on:?}"));
                self.owners += 1;
                self.active.push(Request { slot, owner: self.owners, held: 0, read_away: false });
            }
            Err(error) => assert_eq!(error.kind(), ErrorKind::NoFreeSlot, "{error}"),
        }
    }

    fn grow(&mut self, pick: usize) {
        let more = match self.numbers.below(3) {
            0 => self.numbers.below(self.most() / 2),
            _ => 1 + self.numbers.below(12),
        };
        let to = (self.active[pick].held + more).min(self.most());
        self.step(&[(pick, to)]);
    }

    fn grow_all(&mut self) {
        let most = self.most();
        let all: Vec<_> =
            self.active.iter().map(|request| (request.held + 2).min(most)).enumerate().collect();
        self.step(&all);
    }

    /// Those that are named grow together, or are as before.
    fn step(&mut self, growth: &[(usize, u64)]) {
        for (pick, _) in growth {
            self.find(*pick, 0);
        }
        let entries: Vec<_> =
            growth.iter().map(|(pick, to)| SlotTokens::new(self.active[*pick].slot, tokens(*to))).collect();
        let result = self.cache.step(&entries);
        self.trail.note(format!("step: {entries:?}, {:?}", result.as_ref().map_err(vattn::Error::kind)));
        if let Err(error) = result {
            assert_eq!(error.kind(), ErrorKind::OutOfBudget, "{error}");
        } else {
            for (pick, to) in growth {
                let request = &mut self.active[*pick];
                self.launched += self.lanes[0].fill(self.cache, request, request.held..*to);
                request.held = *to;
            }
        }
        for (pick, _) in growth {
            self.find(*pick, 0);
        }
    }

    fn truncate(&mut self, pick: usize) {
        self.find(pick, 0);
        let Request { slot, held, .. } = self.active[pick];
        let to = self.numbers.below(held + 1);
        self.trail.note(format!("truncate: {slot:?} from {held} to {to}"));
        self.cache.truncate(slot, tokens(to), &self.fences(pick)).unwrap();
        self.active[pick].held = to;
        self.find(pick, 0);
    }

    /// Kernels that look for its contents may still run.
    fn retire(&mut self, pick: usize) {
        self.find(pick, 0);
        let fences = self.fences(pick);
        let Request { slot, held, .. } = self.active.swap_remove(pick);
        self.trail.note(format!("retire: {slot:?} of {held}, {fences:?}"));
        self.cache.retire(slot, &fences).unwrap();
    }

    fn prefetch(&mut self, pick: usize) {
        let Request { slot, held, .. } = self.active[pick];
        let to = (held + self.numbers.below(self.most() / 4)).min(self.most());
        self.trail.note(format!("prefetch: {slot:?} of {held} to {to}"));
        self.cache.prefetch(&[SlotTokens::new(slot, tokens(to))]).unwrap();
        self.find(pick, 0);
    }

    /// The other stream reads what this one has written, and goes on reading.
    fn read_away(&mut self, pick: usize) {
        let written = self.watch.record_event(self.streams[0]).unwrap();
        // SAFETY: the event lives until it is destroyed here, and is one of this driver's.
        unsafe {
            self.watch.stream_wait(self.streams[1], written).unwrap();
            self.watch.destroy_event(written).unwrap();
        }
        self.trail.note(format!("read on {:?}: {:?}", self.streams[1], self.active[pick]));
        self.active[pick].read_away = true;
        self.find(pick, 1);
    }

    /// What concerns others' memory, too.
    fn keep_house(&mut self) {
        let Shape { granule, budget, .. } = self.spell.shape;
        let fences = &[Fence::Stream(self.streams[0])];
        let bytes = granule * self.numbers.below(budget);
        match self.numbers.below(4) {
            0 => {
                self.trail.note(format!("trim to {bytes}"));
                self.cache.trim(bytes, fences).map(drop).unwrap();
            }
            1 => {
                self.trail.note(format!("reclaim {bytes}"));
                self.cache.reclaim(bytes, fences).map(drop).unwrap();
            }
            2 => {
                let bytes = bytes + granule * (budget / 2);
                let result = self.cache.set_budget(bytes).map_err(|error| error.kind());
                self.trail.note(format!("a budget of {bytes}: {result:?}"));
                assert!(matches!(result, Ok(()) | Err(ErrorKind::OutOfBudget)), "{result:?}");
            }
            _ => {
                self.trail.note("report".to_owned());
                let report = self.cache.report().unwrap();
                assert_eq!(report.health, Health::Healthy);
            }
        }
    }

    fn fences(&self, pick: usize) -> Vec<Fence> {
        let streams = if self.active[pick].read_away { &self.streams[..] } else { &self.streams[..1] };
        streams.iter().copied().map(Fence::Stream).collect()
    }

    fn find(&mut self, pick: usize, lane: usize) {
        self.launched += self.lanes[lane].find(self.cache, &self.active[pick]);
    }

    fn settle(&mut self) {
        self.launched = 0;
        for lane in &self.lanes {
            assert_eq!(lane.settle(), 0, "bytes that are not their owner's, among these: {:?}", self.active);
        }
        self.trail.note("all is as it should be".to_owned());
    }
}

/// Holds back the work of one stream after the other, each for a moment, until it is over.
fn hold_back(watch: &Watch, seed: u64, over: &AtomicBool) {
    let mut numbers = Numbers::new(seed);
    while !over.load(Ordering::SeqCst) {
        let stream = of_worker(numbers.below(WORKERS));
        watch.hold(stream);
        thread::sleep(Duration::from_micros(numbers.below(2000)));
        watch.fire(stream);
        thread::sleep(Duration::from_micros(numbers.below(2000)));
    }
}

/// One cache, from its making to its end.
fn run_spell(spell: &Spell, backend: Backend, seed: u64, lasting: Duration) {
    let watch = Watch::new(backend, None);
    let free = || watch.checked.memory_info().unwrap().free;
    // A stream that was used has all that CUDA gives it.
    for number in 0..WORKERS {
        assert_eq!(Lane::new(&watch.backend, of_worker(number)).settle(), 0);
    }
    let before = free();
    let cache = spell.cache(&watch);
    let (over, until) = (AtomicBool::new(false), Instant::now() + lasting);
    // Dropped here: CUDA frees memory once all streams are done, and one of them may be held back.
    let workers: Vec<Worker<'_>> = thread::scope(|scope| {
        scope.spawn(|| hold_back(&watch, seed, &over));
        let workers: Vec<_> = (0..WORKERS)
            .map(|number| Worker::new(spell, &watch, &cache, number, seed))
            .map(|worker| scope.spawn(move || worker.run(until)))
            .collect();
        let results: Vec<_> = workers.into_iter().map(thread::ScopedJoinHandle::join).collect();
        over.store(true, Ordering::SeqCst);
        results.into_iter().map(Result::unwrap).collect()
    });
    let operations: u64 = workers.iter().map(|worker| worker.operations).sum();
    drop(workers);
    watch.fire_all();
    cache.flush().unwrap();
    let report = cache.report().unwrap();
    let snapshot = &report.snapshot;
    let beside = |verb: Verb| snapshot.background[&verb].calls;
    println!(
        "{}, {:?}, {:?}: {operations} operations, {:?}; beside the path {} creates, {} maps, {} unmaps; \
         refused {:?}",
        spell.shape.name,
        spell.shape.background,
        spell.reclaim,
        snapshot.events,
        beside(Verb::Create),
        beside(Verb::Map),
        beside(Verb::Unmap),
        snapshot.failures,
    );
    assert_eq!((report.health, snapshot.slots.active), (Health::Healthy, 0));
    assert!(operations > WORKERS * 10 && snapshot.events.adopted > 0 && beside(Verb::Unmap) > 0);
    assert!(snapshot.events.mapped_ahead > 0 || spell.look_ahead == 0);
    assert!(beside(Verb::Create) < operations * 4, "the mapper makes and gives up the same extents forever");
    let fences: Vec<_> = (0..WORKERS).map(|number| Fence::Stream(of_worker(number))).collect();
    cache.trim(Bytes::ZERO, &fences).unwrap();
    cache.flush().unwrap();
    let bytes = cache.report().unwrap().snapshot.bytes;
    assert_eq!(bytes.held, bytes.mapped, "of nobody: {bytes:?}");
    drop(cache);
    assert_eq!(watch.violations(), Vec::<String>::new());
    assert_eq!(watch.checked.live(), Live::default());
    let after = free();
    println!("  {before} were free before, {after} are after");
    assert!(after + OF_CUDA >= before, "{before} were free before, {after} are after");
}

#[test]
fn what_slots_hold_outlives_whatever_is_done_to_others() {
    let seconds = setting("VATTN_SOAK_SECONDS", 2);
    let (spells, length) = (Spell::all(), Duration::from_secs(seconds));
    let card = on_card().then(Backend::card);
    #[cfg(feature = "cuda")]
    if on_card() {
        Kernels::get();
    }
    let each = (length / u32::try_from(spells.len()).unwrap()).min(LONGEST);
    let (start, mut seed) = (Instant::now(), setting("VATTN_SOAK_SEED", 1));
    for spell in spells.iter().cycle() {
        let Shape { granule, budget, .. } = spell.shape;
        let backend = card.clone().unwrap_or_else(|| Backend::host(granule, granule * (budget * 4)));
        run_spell(spell, backend, seed, each);
        seed += 1;
        if start.elapsed() >= length {
            break;
        }
    }
}
