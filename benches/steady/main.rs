//! What does the cache itself cost a server, once no driver call, or only the driver's own time, is
//! left out?
//!
//! Asked because a decode step of a small model takes a few milliseconds, and a manager that walks its
//! slots or its parked memory in every one of them would be seen: the peers do. So five things are
//! measured, most of them beside how many slots hold memory, since none may grow with that:
//!
//! | group | what is timed | at most, at the median |
//! |---|---|---|
//! | `step` | 256 requests gain a token each and nothing has to be mapped | 1.5 µs |
//! | `step beside parked` | the same beside 16 … 16,384 parked slots | 1.5 µs, flat |
//! | `adopt` | a request takes over a parked slot that holds enough for it | 5 µs, flat |
//! | `own time per mapping` | a step that maps, less the time inside the driver, by mapping | 1 µs, flat |
//! | `step through C` | a step of 1 … 1,024 requests in which nothing is mapped, through Rust and through the C ABI | 50 ns more |
//!
//! The model is Llama-3-8B with all layers in one tensor, K and V apart. The driver is the one that
//! keeps books and maps nothing, so that 16,384 slots of memory fit any machine; what is timed is the
//! same code on every driver. There is no mapper, which would map beside what is timed. `step` is measured on the host driver too, which shows that. Beside
//! `step` stands the policy of vAttention, without and with the thread that it starts in every step.
//!
//! With `VATTN_LIBRARY` naming the shared library, `step through C` calls that one, too, as a program does that
//! is linked to it.
//!
//! `benches/record.sh` keeps the medians of a run under `benches/record/`.

#![allow(clippy::unwrap_used, missing_docs, reason = "a bench may panic, and has no callers")]

mod c_abi;
#[path = "../common/mod.rs"]
mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::baseline;
use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use vattn::driver::Driver;
use vattn::driver::ledger::{Ledger, LedgerOptions};
use vattn::driver::owned::DriverHandle;
use vattn::error::Verb;
use vattn::geometry::Background;
use vattn::stats::Counters;
use vattn::units::{Bytes, SlotId, TokenCount};
use vattn::{Config, Fence, Geometry, KvCache, SlotTokens};
use vattn_baselines::{Mapping, Policy, RequestId, Vattention};

const GRANULE: Bytes = Bytes::mib(2);
/// Requests that decode.
const ACTIVE: u32 = 256;
/// How many slots hold memory besides.
const HELD: [u32; 4] = [16, 256, 4096, 16_384];
/// Tokens that one granule holds: steps within them map nothing.
const TOKENS_A_GRANULE: u64 = 32;
/// Prompts in one step that maps.
const PROMPTS: usize = 16;

fn config(slots: u32, budget: Bytes) -> Config {
    Config::builder(Geometry::preset("llama-3-8b").unwrap())
        .max_slots(slots)
        .max_tokens(TokenCount::new(32_768))
        .budget(budget)
        .background(Background::Off)
        .build()
        .unwrap()
}

fn ledger() -> Arc<dyn Driver> {
    Ledger::new(LedgerOptions { granule: GRANULE, capacity: Bytes::gib(1 << 20), addresses: None }).unwrap()
}

fn cache(slots: u32, budget: Bytes) -> KvCache {
    KvCache::new(config(slots, budget), ledger()).unwrap()
}

fn tokens(count: u64) -> TokenCount {
    TokenCount::new(count)
}

/// A request of `count` tokens in a slot of its own.
fn admit(cache: &KvCache, count: u64) -> SlotId {
    let slot = cache.acquire(tokens(count), None).unwrap();
    cache.step(&[SlotTokens::new(slot, tokens(count))]).unwrap();
    slot
}

/// Lengths as they come in traffic: 40 to about 3,600 tokens, short ones more often.
fn length(number: u64) -> u64 {
    let spread = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    let (tens, rest) = (spread % 100, (spread / 100) % 100);
    40 + tens * tens * tens / 280 + rest
}

/// Leaves so many slots parked, of lengths as they come.
fn park(cache: &KvCache, count: u32) {
    let slots: Vec<_> = (0..count).map(|number| admit(cache, length(number.into()))).collect();
    slots.into_iter().for_each(|slot| cache.retire(slot, &[Fence::Idle]).unwrap());
}

fn map_calls(cache: &KvCache) -> u64 {
    cache.snapshot().driver[&Verb::Map].calls
}

fn driver_time(cache: &KvCache) -> Duration {
    Duration::from_nanos(cache.snapshot().driver.values().map(|call| call.nanoseconds).sum())
}

/// Times `steps` steps in rounds of as many as a granule has tokens for; `reset` puts everybody back
/// to one token, and is not timed.
fn in_rounds(steps: u64, mut reset: impl FnMut(), mut step: impl FnMut()) -> Duration {
    let (mut left, mut took) = (steps, Duration::ZERO);
    while left > 0 {
        reset();
        let round = left.min(TOKENS_A_GRANULE - 1);
        let start = Instant::now();
        for _ in 0..round {
            step();
        }
        took += start.elapsed();
        left -= round;
    }
    took
}

/// Steps of all active slots of a cache, a token each, in which nothing has to be mapped.
fn steps_within(cache: &KvCache, entries: &mut [SlotTokens], steps: u64) -> Duration {
    let before = map_calls(cache);
    let entries = std::cell::RefCell::new(entries);
    let took = in_rounds(
        steps,
        || {
            for entry in entries.borrow_mut().iter_mut() {
                entry.tokens = tokens(1);
                cache.truncate(entry.slot, entry.tokens, &[Fence::Idle]).unwrap();
            }
        },
        || {
            let mut entries = entries.borrow_mut();
            for entry in entries.iter_mut() {
                entry.tokens += tokens(1);
            }
            cache.step(&entries).unwrap();
        },
    );
    assert_eq!(map_calls(cache), before, "nothing was mapped");
    took
}

fn active(cache: &KvCache, count: u32) -> Vec<SlotTokens> {
    (0..count).map(|_| SlotTokens::new(admit(cache, 1), tokens(1))).collect()
}

fn step_of_256(c: &mut Criterion) {
    const SLOTS: u32 = 1024;
    let budget = Bytes::gib(16);
    let mut group = c.benchmark_group("step");

    let mut vattn = |name: &str, driver: Arc<dyn Driver>| {
        let cache = KvCache::new(config(SLOTS, budget), driver).unwrap();
        let mut entries = active(&cache, ACTIVE);
        group.bench_function(name, |b| b.iter_custom(|steps| steps_within(&cache, &mut entries, steps)));
        assert_eq!(cache.report().unwrap().snapshot.slots.active, u64::from(ACTIVE));
    };
    vattn("vattn", ledger());
    #[cfg(target_os = "linux")]
    {
        use vattn::driver::host::{Host, HostOptions};
        vattn("vattn on the host driver", Host::new(HostOptions::new(GRANULE, budget)).unwrap());
    }

    for (name, mapping) in
        [("vattention", Mapping::Synchronous), ("vattention, a thread a step", Mapping::Ahead)]
    {
        let driver = DriverHandle::new(ledger(), Arc::new(Counters::default()));
        let policy =
            Vattention::new(&driver, &baseline::shape(&config(SLOTS, budget), driver.info()), mapping)
                .unwrap();
        let policy = std::cell::RefCell::new(policy);
        let mut totals: Vec<_> = (0..ACTIVE).map(|number| (RequestId::new(number), tokens(1))).collect();
        for (request, total) in &totals {
            assert!(policy.borrow_mut().admit(*request, *total).unwrap());
        }
        let totals = std::cell::RefCell::new(&mut totals);
        group.bench_function(name, |b| {
            b.iter_custom(|steps| {
                in_rounds(
                    steps,
                    || {
                        for (request, total) in totals.borrow_mut().iter_mut() {
                            *total = tokens(1);
                            let mut policy = policy.borrow_mut();
                            policy.retire(*request).unwrap();
                            assert!(policy.admit(*request, *total).unwrap());
                        }
                    },
                    || {
                        let mut totals = totals.borrow_mut();
                        for (_, total) in totals.iter_mut() {
                            *total += tokens(1);
                        }
                        assert!(policy.borrow_mut().step(&totals).unwrap());
                    },
                )
            });
        });
    }
    group.finish();
}

fn step_beside_parked(c: &mut Criterion) {
    let mut group = c.benchmark_group("step beside parked");
    for held in HELD {
        let cache = cache(ACTIVE + held, Bytes::gib(1 << 16));
        let mut entries = active(&cache, ACTIVE);
        park(&cache, held);
        group.bench_function(BenchmarkId::from_parameter(held), |b| {
            b.iter_custom(|steps| steps_within(&cache, &mut entries, steps));
        });
        assert_eq!(cache.report().unwrap().snapshot.slots.parked, u64::from(held));
    }
    group.finish();
}

/// `acquire` is the choice alone, as many at a time as arrive together, and what leaves in between is
/// not timed; `acquire and retire` is the pair; `acquire and step` is the whole adoption, up to the
/// prompt being backed by what was there.
fn adopt(c: &mut Criterion) {
    const ARRIVALS: u64 = 8;
    let mut group = c.benchmark_group("adopt");
    for held in HELD {
        let cache = cache(held, Bytes::gib(1 << 16));
        park(&cache, held);
        let (before, adopted) = (map_calls(&cache), cache.snapshot().events.adopted);
        let mut number = 0;
        // The length of one that was parked, a little less: somebody holds enough.
        let mut next = || {
            number = (number + 7) % u64::from(held);
            tokens(length(number) - 8)
        };
        let mut taken = 0;

        group.bench_function(BenchmarkId::new("acquire", held), |b| {
            b.iter_custom(|times| {
                let (mut left, mut took) = (times, Duration::ZERO);
                while left > 0 {
                    let hints: Vec<_> = (0..left.min(ARRIVALS)).map(|_| next()).collect();
                    let mut slots = Vec::with_capacity(hints.len());
                    let start = Instant::now();
                    for hint in &hints {
                        slots.push(cache.acquire(*hint, None).unwrap());
                    }
                    took += start.elapsed();
                    for slot in &slots {
                        cache.retire(*slot, &[Fence::Idle]).unwrap();
                    }
                    left -= left.min(ARRIVALS);
                }
                taken += times;
                took
            });
        });
        group.bench_function(BenchmarkId::new("acquire and retire", held), |b| {
            b.iter(|| {
                let slot = cache.acquire(next(), None).unwrap();
                cache.retire(slot, &[Fence::Idle]).unwrap();
                taken += 1;
            });
        });
        assert_eq!(cache.snapshot().events.adopted - adopted, taken, "every one was adopted");
        assert_eq!(map_calls(&cache), before, "nothing was mapped");
        cache.report().unwrap();
        group.bench_function(BenchmarkId::new("acquire and step", held), |b| {
            b.iter_custom(|times| {
                let mut took = Duration::ZERO;
                for _ in 0..times {
                    let hint = next();
                    let start = Instant::now();
                    let slot = cache.acquire(hint, None).unwrap();
                    cache.step(&[SlotTokens::new(slot, hint)]).unwrap();
                    took += start.elapsed();
                    cache.retire(slot, &[Fence::Idle]).unwrap();
                }
                took
            });
        });
        // Best fit may choose a slot that holds nearly enough, and then maps the rest, once.
        assert!(map_calls(&cache) - before <= 2 * u64::from(held), "hardly anything was mapped");
    }
    group.finish();
}

/// Sixteen prompts are stepped to in one step. `created` makes its extents, `free` takes those that
/// the pool has, `reclaimed` takes mapped ones from the slots that hold memory and no tokens, at a
/// budget that is all held. What is timed is the step, less what the driver took, by mapping.
fn own_time_per_mapping(c: &mut Criterion) {
    let mut group = c.benchmark_group("own time per mapping");
    for source in ["created", "free", "reclaimed"] {
        for held in HELD {
            let mut ring = Ring::new(held);
            if source == "reclaimed" {
                ring.cache.set_budget(ring.held).unwrap();
            }
            group.bench_function(BenchmarkId::new(source, held), |b| {
                b.iter_custom(|times| {
                    let (mut own, mut maps) = (Duration::ZERO, 0);
                    while maps < times {
                        let (took, mapped) = ring.turn();
                        assert!(mapped >= wide(PROMPTS), "{mapped} mappings for {PROMPTS} prompts");
                        own += took;
                        maps += mapped;
                        let cache = &ring.cache;
                        match source {
                            "created" => cache.trim(ring.held, &[Fence::Idle]).unwrap(),
                            "free" => {
                                cache.reclaim(cache.bytes().parked - ring.held, &[Fence::Idle]).unwrap()
                            }
                            _ => Bytes::ZERO,
                        };
                    }
                    let nanoseconds = own.as_nanos() * u128::from(times) / u128::from(maps);
                    Duration::from_nanos(nanoseconds.try_into().unwrap())
                });
            });
            ring.cache.report().unwrap();
        }
    }
    group.finish();
}

/// Slots that are given a prompt in turn and truncated to nothing after it. They stay with their
/// requests, so that nobody adopts them and each prompt maps. Memory is taken from the slot of least
/// use, which is the one whose turn is next.
struct Ring {
    cache: KvCache,
    slots: Vec<SlotId>,
    next: usize,
    /// What the slots hold together.
    held: Bytes,
}

impl Ring {
    fn new(held: u32) -> Self {
        let held = usize::try_from(held).unwrap();
        // More slots without memory than a turn takes: what is given back ends in the middle of one.
        let count = held + 4 * PROMPTS;
        let cache = cache(u32::try_from(count).unwrap(), Bytes::gib(1 << 16));
        let slots: Vec<_> = (0..count).map(|_| cache.acquire(tokens(1), None).unwrap()).collect();
        let mut ring = Self { cache, slots, next: 0, held: Bytes::ZERO };
        while ring.next < held {
            ring.turn();
        }
        ring.held = ring.cache.bytes().held;
        ring
    }

    /// Steps the next slots to prompts, at once. Returns the step's own time and its mappings.
    fn turn(&mut self) -> (Duration, u64) {
        let cache = &self.cache;
        let entries: Vec<_> = (0..PROMPTS)
            .map(|number| {
                let slot = self.slots[(self.next + number) % self.slots.len()];
                SlotTokens::new(slot, tokens(length(wide(number))))
            })
            .collect();
        self.next = (self.next + PROMPTS) % self.slots.len();
        let (maps, driver) = (map_calls(cache), driver_time(cache));
        let start = Instant::now();
        cache.step(&entries).unwrap();
        let wall = start.elapsed();
        let own = wall.saturating_sub(driver_time(cache) - driver);
        let maps = map_calls(cache) - maps;
        for entry in entries {
            cache.truncate(entry.slot, TokenCount::ZERO, &[Fence::Idle]).unwrap();
        }
        (own, maps)
    }
}

fn wide(count: usize) -> u64 {
    u64::try_from(count).unwrap()
}

criterion_group!(
    benches,
    step_of_256,
    step_beside_parked,
    adopt,
    own_time_per_mapping,
    c_abi::step_through_c
);
criterion_main!(benches);
