//! Does a cache do what a plain model of it says, whatever is asked of it and in whatever order?
//!
//! The model knows slots with tokens, a budget and the bytes of a token in each tensor. From what is
//! mapped, which it sees at the driver, it works out which memory is in use; from that, exactly
//! which step fits. After every operation all books are compared: the cache's, the checked driver's,
//! the backend's, and the model's.
//!
//! `VATTN_MODEL_CASES` multiplies the number of sequences, `VATTN_MODEL_SEED` changes them. A
//! failure is shrunk to the shortest sequence that shows it.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]
#![allow(unsafe_code, reason = "the watching driver hands unsafe verbs on")]

mod common;

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};

use common::{Backend, Shape, Watch, setting, shapes, tokens};
use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, TestCaseError, TestRng, TestRunner};
use vattn::driver::{Live, Stream};
use vattn::error::ErrorKind;
use vattn::geometry::Background;
use vattn::units::Bytes;
use vattn::{Config, Fence, Geometry, KvCache, Pin, SlotId, SlotTokens};

const STREAMS: u8 = 3;

#[derive(Clone, Debug)]
enum To {
    Plus(u64),
    /// In thousandths of the most tokens.
    Share(u64),
    Same,
    Most,
}

#[derive(Clone, Debug)]
enum Spoil {
    Twice,
    Stale,
    Foreign,
    Beyond,
    Fewer,
}

#[derive(Clone, Copy, Debug)]
enum Done {
    Idle,
    Stream(u8),
    Foreign(u8),
}

#[derive(Clone, Debug)]
enum Op {
    Acquire {
        share: u64,
        stream: Option<u8>,
    },
    Step {
        picks: Vec<(usize, To)>,
        spoil: Option<(usize, Spoil)>,
        ask: bool,
    },
    Admit {
        shares: Vec<u64>,
        go: bool,
    },
    Retire {
        pick: usize,
        done: Vec<Done>,
    },
    RetireStale {
        pick: usize,
    },
    Truncate {
        pick: usize,
        thousandths: u64,
        done: Vec<Done>,
    },
    Reclaim {
        granules: u64,
        done: Vec<Done>,
    },
    Trim {
        thousandths: u64,
        done: Vec<Done>,
    },
    SetBudget {
        thousandths: u64,
    },
    Hold {
        stream: u8,
    },
    Fire {
        stream: u8,
    },
    /// What the mapper would do by now; nothing where there is none.
    Tend,
    /// Memory for tokens that will come.
    Prefetch {
        pick: usize,
        to: To,
    },
    /// A slot's memory is kept, or the addresses alone.
    Pin {
        pick: usize,
        slot: bool,
    },
    Unpin {
        pick: usize,
    },
}

fn to() -> impl Strategy<Value = To> {
    prop_oneof![
        8 => (1_u64..20).prop_map(To::Plus),
        4 => (0_u64..600).prop_map(To::Share),
        1 => Just(To::Same),
        1 => Just(To::Most),
    ]
}

fn spoil() -> impl Strategy<Value = Spoil> {
    prop_oneof![
        Just(Spoil::Twice),
        Just(Spoil::Stale),
        Just(Spoil::Foreign),
        Just(Spoil::Beyond),
        Just(Spoil::Fewer)
    ]
}

fn done() -> impl Strategy<Value = Vec<Done>> {
    let one = || {
        prop_oneof![
            2 => Just(Done::Idle),
            3 => (0..STREAMS).prop_map(Done::Stream),
            1 => (0..STREAMS).prop_map(Done::Foreign),
        ]
    };
    prop_oneof![
        12 => one().prop_map(|done| vec![done]),
        3 => prop::collection::vec(one(), 2..4),
        1 => Just(Vec::new()),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    let pick = || 0_usize..64;
    prop_oneof![
        6 => (0_u64..1000, prop::option::of(0..STREAMS)).prop_map(|(share, stream)| Op::Acquire { share, stream }),
        14 => (
            prop::collection::vec((pick(), to()), 1..6),
            prop::option::weighted(0.08, (pick(), spoil())),
            any::<bool>(),
        )
            .prop_map(|(picks, spoil, ask)| Op::Step { picks, spoil, ask }),
        2 => (prop::collection::vec(0_u64..1100, 1..5), any::<bool>())
            .prop_map(|(shares, go)| Op::Admit { shares, go }),
        5 => (pick(), done()).prop_map(|(pick, done)| Op::Retire { pick, done }),
        1 => pick().prop_map(|pick| Op::RetireStale { pick }),
        2 => (pick(), 0_u64..1100, done())
            .prop_map(|(pick, thousandths, done)| Op::Truncate { pick, thousandths, done }),
        1 => (0_u64..60, done()).prop_map(|(granules, done)| Op::Reclaim { granules, done }),
        1 => (0_u64..1000, done()).prop_map(|(thousandths, done)| Op::Trim { thousandths, done }),
        1 => (0_u64..1300).prop_map(|thousandths| Op::SetBudget { thousandths }),
        2 => (0..STREAMS).prop_map(|stream| Op::Hold { stream }),
        1 => (0..STREAMS).prop_map(|stream| Op::Fire { stream }),
        8 => Just(Op::Tend),
        2 => (pick(), to()).prop_map(|(pick, to)| Op::Prefetch { pick, to }),
        2 => (pick(), prop::bool::weighted(0.9)).prop_map(|(pick, slot)| Op::Pin { pick, slot }),
        3 => pick().prop_map(|pick| Op::Unpin { pick }),
    ]
}

fn stream(number: u8) -> Stream {
    common::stream(u64::from(number))
}

struct World {
    shape: Shape,
    watch: Watch,
    cache: KvCache,
    /// Slots in use, the spare one included, and their tokens.
    used: BTreeMap<u32, u64>,
    ids: Vec<SlotId>,
    past: Vec<SlotId>,
    /// Pins, with the slot and the tokens that they keep.
    pins: Vec<(u32, u64, Pin)>,
    /// In bytes, as it was set.
    budget: Bytes,
    foreign: SlotId,
    _other: KvCache,
}

impl World {
    fn new(shape: &Shape) -> Self {
        let watch = shape.watch();
        watch.fire_when_waited_for();
        let cache = shape.cache(&watch);
        let other = {
            let config = Config::builder(Geometry::preset("llama-3-8b").unwrap()).budget(Bytes::gib(1));
            let ledger = Watch::new(Backend::ledger(Bytes::mib(2), Bytes::gib(1)), None);
            KvCache::new(config.build().unwrap(), ledger.driver()).unwrap()
        };
        let used = shape.spare.then(|| (shape.slots, shape.spare_tokens())).into_iter().collect();
        Self {
            watch,
            cache,
            used,
            ids: Vec::new(),
            past: Vec::new(),
            pins: Vec::new(),
            budget: shape.granule * shape.budget,
            foreign: other.acquire(tokens(1), None).unwrap(),
            _other: other,
            shape: shape.clone(),
        }
    }

    fn limit(&self) -> u64 {
        self.budget.get() / self.shape.granule.get()
    }

    /// A granule for each tensor, or the page that the spare slot backs, where that is more.
    fn least_budget(&self) -> Bytes {
        let granule = self.shape.granule.get();
        let one_each = u64::try_from(self.shape.rows.len()).unwrap();
        let config = self.cache.config();
        let page = u64::from(config.page_tokens().max(config.tile_tokens())).min(config.max_tokens().get());
        let page = if config.tile_tokens() == 1 {
            page
        } else {
            page.next_multiple_of(config.tile_tokens().into()).min(config.max_tokens().get())
        };
        let spare: u64 = self.shape.rows.iter().map(|row| (row * page).div_ceil(granule)).sum();
        let spare = if self.cache.spare_slot().is_some() { spare } else { 0 };
        Bytes::new(granule * one_each.max(spare))
    }

    /// Granules in use in each tensor: up to the end of the extent with the last byte that is needed.
    fn frontier(&self, slot: u32, count: u64) -> Vec<u64> {
        let tensors = 0..self.shape.rows.len();
        tensors
            .map(|tensor| {
                let need = self.shape.granules(tensor, count);
                let ends = self.watch.boundaries(&self.cache, slot, tensor);
                if need == 0 {
                    return 0;
                }
                *ends.iter().find(|end| **end >= need).unwrap_or_else(|| {
                    panic!("slot {slot} needs {need} granules of tensor {tensor}, and {ends:?} are backed")
                })
            })
            .collect()
    }

    /// The tokens up to which a slot's memory stays: its own, or those of its pins.
    fn kept(&self, slot: u32) -> u64 {
        self.used.get(&slot).copied().unwrap_or(0).max(self.pinned(slot))
    }

    fn pinned(&self, slot: u32) -> u64 {
        let of_slot = self.pins.iter().filter(|(other, ..)| *other == slot);
        of_slot.map(|(_, count, _)| *count).max().unwrap_or(0)
    }

    fn in_use(&self) -> u64 {
        let slots = 0..self.cache.layout().slots();
        slots.flat_map(|slot| self.frontier(slot, self.kept(slot))).sum()
    }

    fn in_pins(&self) -> u64 {
        let slots = 0..self.cache.layout().slots();
        slots.flat_map(|slot| self.frontier(slot, self.pinned(slot))).sum()
    }

    fn missing(&self, entry: &SlotTokens) -> u64 {
        let slot = entry.slot.index();
        let have = self.frontier(slot, self.kept(slot));
        let need = |tensor| self.shape.granules(tensor, entry.tokens.get());
        have.iter().enumerate().map(|(tensor, have)| need(tensor).saturating_sub(*have)).sum()
    }

    /// What is wrong with a step whatever memory there is.
    fn mistake(&self, entries: &[SlotTokens]) -> Option<ErrorKind> {
        let mut named = BTreeSet::new();
        entries.iter().find_map(|entry| {
            let count = entry.tokens.get();
            if entry.slot == self.foreign {
                Some(ErrorKind::ForeignSlot)
            } else if !self.ids.contains(&entry.slot) {
                Some(ErrorKind::StaleSlot)
            } else if count > self.shape.max_tokens {
                Some(ErrorKind::TooManyTokens)
            } else if count < self.used[&entry.slot.index()] {
                Some(ErrorKind::FewerTokens)
            } else if !named.insert(entry.slot) {
                Some(ErrorKind::DuplicateSlot)
            } else {
                None
            }
        })
    }

    fn step_comes_to(&self, entries: &[SlotTokens]) -> Result<(), ErrorKind> {
        if let Some(mistake) = self.mistake(entries) {
            return Err(mistake);
        }
        let missing: u64 = entries.iter().map(|entry| self.missing(entry)).sum();
        let total = self.in_use() + missing;
        if missing > 0 && total > self.limit() {
            return Err(ErrorKind::OutOfBudget);
        }
        if missing > 0 && self.shape.device_has.is_some_and(|device_has| total > device_has) {
            return Err(ErrorKind::OutOfDeviceMemory);
        }
        Ok(())
    }

    fn step(&mut self, entries: &[SlotTokens]) {
        let expected = self.step_comes_to(entries);
        let result = self.cache.step(entries);
        let kind = result.as_ref().err().map(vattn::Error::kind);
        assert_eq!(kind, expected.err(), "{entries:?}: {result:?}");
        if result.is_ok() {
            for entry in entries {
                self.used.insert(entry.slot.index(), entry.tokens.get());
            }
        }
    }

    fn tokens_of(&self, slot: SlotId) -> u64 {
        self.used[&slot.index()]
    }

    fn fences(&self, done: &[Done]) -> (Vec<Fence>, Vec<vattn::driver::RawEvent>, Vec<Stream>) {
        let (mut fences, mut events, mut streams) = (Vec::new(), Vec::new(), Vec::new());
        for done in done {
            match *done {
                Done::Idle => fences.push(Fence::Idle),
                Done::Stream(number) => {
                    fences.push(Fence::Stream(stream(number)));
                    streams.push(stream(number));
                }
                Done::Foreign(number) => {
                    let (fence, event) = self.watch.foreign(stream(number));
                    fences.push(fence);
                    events.push(event);
                    streams.push(stream(number));
                }
            }
        }
        (fences, events, streams)
    }

    /// Calls something with fences; `slot` is the one whose memory the streams still use after it.
    fn fenced<T>(
        &self,
        done: &[Done],
        slot: Option<SlotId>,
        call: impl FnOnce(&[Fence]) -> vattn::Result<T>,
    ) -> Result<T, ErrorKind> {
        let (fences, events, streams) = self.fences(done);
        if slot.is_none() {
            self.watch.before_any(&streams);
        }
        let result = call(&fences).map_err(|error| error.kind());
        self.watch.before_any(&[]);
        for event in events {
            self.watch.destroy(event);
        }
        if let (Some(slot), Ok(_)) = (slot, &result) {
            for stream in streams {
                self.watch.used_by(&self.cache, slot.index(), stream);
            }
        }
        if done.is_empty() {
            assert_eq!(result.as_ref().err(), Some(&ErrorKind::InvalidArgument), "no fence was given");
        }
        result
    }

    fn acquire(&mut self, hint: u64, on: Option<u8>) -> Option<SlotId> {
        let full = self.ids.len() == usize::try_from(self.shape.slots).unwrap();
        match self.cache.acquire(tokens(hint), on.map(stream)) {
            Ok(id) => {
                assert!(!full, "{id:?} is one more than there are");
                assert!(
                    id.index() < self.shape.slots && !self.used.contains_key(&id.index()),
                    "{id:?} is used"
                );
                assert!(!self.past.contains(&id), "{id:?} was given before");
                self.used.insert(id.index(), 0);
                self.ids.push(id);
                Some(id)
            }
            Err(error) => {
                assert!(full && error.kind() == ErrorKind::NoFreeSlot, "{error}");
                None
            }
        }
    }

    fn pick(&self, pick: usize) -> Option<SlotId> {
        (!self.ids.is_empty()).then(|| self.ids[pick % self.ids.len()])
    }

    fn entries(&self, picks: &[(usize, To)], spoil: Option<&(usize, Spoil)>) -> Vec<SlotTokens> {
        let most = self.shape.max_tokens;
        let mut entries: Vec<SlotTokens> = Vec::new();
        for (pick, to) in picks {
            let Some(id) = self.pick(*pick) else { break };
            if entries.iter().any(|entry| entry.slot == id) {
                continue;
            }
            let now = self.tokens_of(id);
            let to = match to {
                To::Plus(more) => (now + more).min(most),
                To::Share(thousandths) => now.max(most * thousandths / 1000),
                To::Same => now,
                To::Most => most,
            };
            entries.push(SlotTokens::new(id, tokens(to)));
        }
        if let Some((place, spoil)) = spoil
            && !entries.is_empty()
        {
            let place = place % entries.len();
            let id = entries[place].slot;
            match spoil {
                Spoil::Twice => entries.push(entries[place]),
                Spoil::Foreign => entries[place].slot = self.foreign,
                Spoil::Beyond => entries[place].tokens = tokens(most + 1),
                Spoil::Stale => entries[place].slot = self.past.last().copied().unwrap_or(id),
                Spoil::Fewer => entries[place].tokens = tokens(self.tokens_of(id).saturating_sub(1)),
            }
        }
        entries
    }

    fn apply(&mut self, op: &Op) {
        match op {
            Op::Acquire { share, stream } => {
                let _ = self.acquire(self.shape.max_tokens * share / 1000, *stream);
            }
            Op::Step { picks, spoil, ask } => {
                let mut entries = self.entries(picks, spoil.as_ref());
                if *ask {
                    let fits = self.cache.fits(&entries).map_err(|error| error.kind());
                    if let Some(mistake) = self.mistake(&entries) {
                        assert_eq!(fits, Err(mistake));
                    } else {
                        let mut left = self.limit() - self.in_use().min(self.limit());
                        let expected: Vec<bool> = entries
                            .iter()
                            .map(|entry| {
                                let missing = self.missing(entry);
                                let fits = missing <= left;
                                left -= if fits { missing } else { 0 };
                                fits
                            })
                            .collect();
                        let fits = fits.unwrap();
                        assert_eq!(fits, expected);
                        let mut fits = fits.into_iter();
                        entries.retain(|_| fits.next().unwrap());
                    }
                }
                self.step(&entries);
            }
            Op::Admit { shares, go } => {
                let counts: Vec<u64> =
                    shares.iter().map(|share| self.shape.max_tokens * share / 1000).collect();
                let prompts: Vec<_> = counts.iter().map(|count| tokens(*count)).collect();
                let admitted = self.cache.admits(&prompts);
                let mut left = self.limit().saturating_sub(self.in_use());
                let free = usize::try_from(self.shape.slots).unwrap() - self.ids.len();
                let fit = counts.iter().take_while(|count| {
                    let tensors = 0..self.shape.rows.len();
                    let need: u64 = tensors.map(|tensor| self.shape.granules(tensor, **count)).sum();
                    let fits = **count <= self.shape.max_tokens && need <= left;
                    left -= if fits { need } else { 0 };
                    fits
                });
                assert_eq!(admitted, fit.count().min(free));
                if *go {
                    let given: Vec<SlotTokens> = prompts[..admitted]
                        .iter()
                        .map(|prompt| SlotTokens::new(self.acquire(prompt.get(), Some(0)).unwrap(), *prompt))
                        .collect();
                    self.step(&given);
                }
            }
            Op::Retire { pick, done } => {
                let Some(id) = self.pick(*pick) else { return };
                if self.fenced(done, Some(id), |fences| self.cache.retire(id, fences)).is_ok() {
                    self.used.remove(&id.index());
                    self.ids.retain(|other| *other != id);
                    self.past.push(id);
                } else {
                    assert!(done.is_empty());
                }
            }
            Op::RetireStale { pick } => {
                let foreign = self.cache.retire(self.foreign, &[Fence::Stream(stream(0))]);
                assert_eq!(foreign.unwrap_err().kind(), ErrorKind::ForeignSlot);
                if !self.past.is_empty() {
                    let id = self.past[pick % self.past.len()];
                    let stale = self.cache.retire(id, &[Fence::Stream(stream(1))]);
                    assert_eq!(stale.unwrap_err().kind(), ErrorKind::StaleSlot);
                    let stale = self.cache.truncate(id, tokens(0), &[Fence::Idle]);
                    assert_eq!(stale.unwrap_err().kind(), ErrorKind::StaleSlot);
                }
            }
            Op::Truncate { pick, thousandths, done } => {
                let Some(id) = self.pick(*pick) else { return };
                let now = self.tokens_of(id);
                let to = now * thousandths / 1000 + u64::from(*thousandths > 1050);
                let result =
                    self.fenced(done, Some(id), |fences| self.cache.truncate(id, tokens(to), fences));
                let expected =
                    if done.is_empty() || to > now { Err(ErrorKind::InvalidArgument) } else { Ok(()) };
                assert_eq!(result, expected, "from {now} to {to}");
                if result.is_ok() {
                    self.used.insert(id.index(), to);
                }
            }
            Op::Reclaim { granules, done } => {
                let before = self.cache.bytes();
                let bytes = self.shape.granule * *granules;
                let Ok(free) = self.fenced(done, None, |fences| self.cache.reclaim(bytes, fences)) else {
                    assert!(done.is_empty());
                    return;
                };
                if self.has_background() {
                    assert_eq!(free, before.free);
                    return self.catch_up();
                }
                let after = self.cache.bytes();
                assert_eq!(free, after.free);
                assert!(after.free - before.free >= bytes.min(before.parked), "{before:?} became {after:?}");
                assert_eq!((after.mapped, after.held), (before.mapped, before.held));
            }
            Op::Trim { thousandths, done } => {
                let before = self.cache.bytes();
                let keep = Bytes::new(before.held.get() * thousandths / 1000);
                let Ok(held) = self.fenced(done, None, |fences| self.cache.trim(keep, fences)) else {
                    assert!(done.is_empty());
                    return;
                };
                if self.has_background() {
                    assert_eq!(held, before.held);
                    self.catch_up();
                    let after = self.cache.bytes();
                    // Only what is mapped ahead, or would be again, is left beyond it.
                    let idle = self
                        .cache
                        .report()
                        .unwrap()
                        .slots
                        .iter()
                        .any(|slot| !slot.active && slot.backed > slot.mapped);
                    let all_went = after.free.is_zero() && !idle;
                    // What mapping ahead had created when the device put an end to it is there again.
                    let all_went = all_went || self.shape.device_has.is_some();
                    assert!(after.held <= keep + after.ahead || all_went, "{after:?} is more than {keep}");
                    return;
                }
                let after = self.cache.bytes();
                assert_eq!(held, after.held);
                assert!(held <= keep || held == after.mapped, "{after:?} is more than {keep}");
            }
            Op::SetBudget { thousandths } => {
                let budget = Bytes::new(self.shape.granule.get() * self.shape.budget * thousandths / 1000);
                let result = self.cache.set_budget(budget).map_err(|error| error.kind());
                let expected = if budget < self.least_budget() {
                    Err(ErrorKind::InvalidConfig)
                } else if self.in_use() > budget.get() / self.shape.granule.get() {
                    Err(ErrorKind::OutOfBudget)
                } else {
                    self.budget = budget;
                    Ok(())
                };
                assert_eq!(result, expected);
            }
            Op::Hold { stream: number } => self.watch.hold(stream(*number)),
            Op::Fire { stream: number } => self.watch.fire(stream(*number)),
            Op::Tend => {
                let result = self.cache.tend();
                assert_eq!(result.is_ok(), self.has_background(), "{result:?}");
            }
            Op::Prefetch { pick, to } => {
                let entries = self.entries(&[(*pick, to.clone())], None);
                let before = self.cache.bytes();
                self.cache.prefetch(&entries).unwrap();
                let after = self.cache.bytes();
                assert_eq!((before.needed, before.mapped), (after.needed, after.mapped));
            }
            Op::Pin { pick, slot } => self.pin(*pick, *slot),
            Op::Unpin { pick } => {
                if !self.pins.is_empty() {
                    self.pins.swap_remove(pick % self.pins.len());
                }
            }
        }
    }

    fn pin(&mut self, pick: usize, slot: bool) {
        if !slot {
            return self.pins.push((0, 0, self.cache.pin_addresses()));
        }
        if let Some(id) = self.past.last() {
            assert_eq!(self.cache.pin(*id).unwrap_err().kind(), ErrorKind::StaleSlot);
        }
        if let Some((slot, count, pin)) = self.pins.get(pick).filter(|_| pick.is_multiple_of(4)) {
            return self.pins.push((*slot, *count, pin.clone()));
        }
        let Some(id) = self.pick(pick) else { return };
        let (pin, now) = (self.cache.pin(id).unwrap(), self.tokens_of(id));
        let granules: u64 = self.frontier(id.index(), now).iter().sum();
        assert_eq!(pin.tokens().get(), self.shape.tiled(now));
        assert_eq!(pin.bytes(), self.shape.granule * granules);
        self.pins.push((id.index(), now, pin));
    }

    fn has_background(&self) -> bool {
        self.shape.background != Background::Off
    }

    /// Lets every stream come to its end, and the background with it.
    fn catch_up(&self) {
        (0..STREAMS).for_each(|number| self.watch.fire(stream(number)));
        self.cache.flush().unwrap();
    }

    /// All books agree.
    fn check(&self) {
        assert_eq!(self.watch.violations(), Vec::<String>::new());
        let granule = self.shape.granule;
        let tensors = self.shape.rows.len();
        let live = self.watch.checked.live();
        assert_eq!(live, self.watch.backend.live().unwrap_or(live));

        let report = self.cache.report().unwrap();
        let listed: BTreeMap<u32, u64> = report
            .slots
            .iter()
            .filter(|slot| slot.active)
            .map(|slot| (slot.index, slot.tokens.get()))
            .collect();
        assert_eq!(listed, self.used);
        let (mut backed, mut mappings) = (0, 0);
        for slot in 0..self.cache.layout().slots() {
            let ends: Vec<_> =
                (0..tensors).map(|tensor| self.watch.boundaries(&self.cache, slot, tensor)).collect();
            let of_slot: u64 = ends.iter().filter_map(|ends| ends.last()).sum();
            backed += of_slot;
            mappings += ends.iter().map(Vec::len).sum::<usize>();
            let told = report.slots.iter().find(|told| told.index == slot);
            assert_eq!(told.map_or(Bytes::ZERO, |told| told.backed), granule * of_slot, "slot {slot}");
            let need: u64 = self.frontier(slot, self.kept(slot)).iter().sum();
            assert_eq!(told.map_or(Bytes::ZERO, |told| told.mapped), granule * need, "slot {slot}");
            let pinned: u64 = self.frontier(slot, self.pinned(slot)).iter().sum();
            assert_eq!(told.map_or(Bytes::ZERO, |told| told.pinned), granule * pinned, "slot {slot}");
        }
        assert_eq!(live.mappings, u64::try_from(mappings).unwrap());
        assert_eq!(live.reservations, u64::try_from(tensors).unwrap());

        let bytes = self.cache.bytes();
        assert_eq!(bytes, report.snapshot.bytes);
        let row: u64 = self.shape.rows.iter().sum();
        assert_eq!(bytes.needed.get(), self.used.values().sum::<u64>() * row);
        assert_eq!((bytes.mapped, bytes.pinned), (granule * self.in_use(), granule * self.in_pins()));
        assert_eq!(report.snapshot.pins, u64::try_from(self.pins.len()).unwrap());
        assert_eq!(bytes.mapped + bytes.parked, granule * backed);
        assert_eq!(bytes.held, live.bytes);
        assert_eq!(bytes.held, bytes.mapped + bytes.parked + bytes.free);
        assert_eq!((bytes.quarantined, bytes.budget), (Bytes::ZERO, granule * self.limit()));
        assert!(bytes.held.get() <= granule.get() * self.limit(), "{bytes:?}");
        let extents = &report.snapshot.extents;
        assert_eq!(extents.iter().map(|class| class.mapped).sum::<u64>(), live.mappings);
        assert_eq!(extents.iter().map(|class| class.mapped + class.free).sum::<u64>(), live.handles);
        let spare = usize::from(self.cache.spare_slot().is_some());
        assert_eq!(report.snapshot.slots.active, u64::try_from(self.used.len() - spare).unwrap());
    }

    fn finish(mut self, tidy: bool) {
        let checked = std::sync::Arc::clone(&self.watch.checked);
        if tidy {
            self.pins.clear();
            for id in std::mem::take(&mut self.ids) {
                self.cache.retire(id, &[Fence::Stream(stream(0))]).unwrap();
                self.watch.used_by(&self.cache, id.index(), stream(0));
                self.used.remove(&id.index());
            }
            self.cache.trim(Bytes::ZERO, &[Fence::Idle]).unwrap();
            if self.has_background() {
                self.catch_up();
            }
            self.check();
            assert_eq!(checked.live().events, 0, "nothing is parked");
            assert_eq!(self.cache.bytes().held, self.cache.bytes().mapped);
        }
        let (granule, pinned, last) = (self.shape.granule, self.in_pins(), self.pins.pop());
        drop(self.cache);
        if last.is_some() {
            assert_eq!(checked.live().bytes, granule * pinned);
        }
        self.pins.clear();
        if let Some((_, _, pin)) = last {
            assert_eq!(checked.live().bytes, pin.bytes());
        }
        assert_eq!(checked.live(), Live::default());
        assert_eq!(self.watch.backend.live().unwrap_or_default(), Live::default());
        assert_eq!(self.watch.violations(), Vec::<String>::new());
    }
}

/// Runs random sequences on a shape.
fn sequences(shape: &Shape) {
    const LEAST: usize = 1000;
    let cases = u32::try_from(24 * setting("VATTN_MODEL_CASES", 1)).unwrap();
    let mut seed = [0; 32];
    seed[..8].copy_from_slice(&setting("VATTN_MODEL_SEED", 0).to_le_bytes());
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(cases) };
    let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &seed));
    let done = Cell::new(0);
    let [adopted, reclaimed, refused] = [const { Cell::new(0) }; 3];
    let result = runner.run(&(prop::collection::vec(op(), 1..160), any::<bool>()), |(ops, tidy)| {
        let mut world = World::new(shape);
        world.check();
        for op in &ops {
            world.apply(op);
            world.check();
            done.set(done.get() + 1);
        }
        let snapshot = world.cache.snapshot();
        adopted.set(adopted.get() + snapshot.events.adopted);
        reclaimed.set(reclaimed.get() + snapshot.events.reclaimed);
        refused.set(refused.get() + snapshot.failures.get(&ErrorKind::OutOfBudget).unwrap_or(&0));
        world.finish(tidy);
        Ok::<(), TestCaseError>(())
    });
    if let Err(failure) = result {
        panic!("{}: {failure}", shape.name);
    }
    assert!(done.get() >= LEAST, "{}: {} operations are too few", shape.name, done.get());
    let rare = [adopted.get(), reclaimed.get(), refused.get()];
    assert!(rare.iter().all(|count| *count >= 10), "{}: adopted, reclaimed, refused {rare:?}", shape.name);
}

macro_rules! shapes {
    ($($name:ident)*) => {
        $(#[test]
        fn $name() {
            let shape = shapes::$name();
            sequences(&shape);
            sequences(&Shape { background: Background::Caller, ..shape });
        })*

        /// Ten thousand operations in all: ten shapes of a thousand each are there, at least.
        #[test]
        fn every_shape_is_tried() {
            let tried = [$(stringify!($name)),*];
            assert_eq!(tried.len(), shapes::all().len());
            assert!(tried.len() >= 10);
        }
    };
}

shapes! {
    sliced per_layer grouped unequal latents large_tokens small_slots committed llama llama_per_layer mixed
    small_device full_device
}
