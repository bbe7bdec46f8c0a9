//! Calls about slots: who has one, what it holds, what would fit.

use std::collections::BTreeSet;

use vattn::ffi::vattn_fence_kind::*;
use vattn::ffi::vattn_status::{self, *};
use vattn::ffi::{vattn_fence, vattn_health, vattn_slot, vattn_slot_tokens};

use super::contents;
use super::room::{Expect, Room, WRONG};
use super::source::{Given, Source};
use super::voice::{STREAMS, call, fired, handle, pointer, unless_fired};
use super::world::{ANYTHING, Crowd, Pending, Slot, World};

/// An array that goes in: as it is, or NULL, or misaligned, with a count that goes with it.
pub(crate) fn array<T>(s: &mut impl Source, expect: &mut Expect, items: &[T]) -> (*const T, usize) {
    if !s.one_in(WRONG) {
        return (
            if items.is_empty() && s.one_in(2) { std::ptr::null() } else { items.as_ptr() },
            items.len(),
        );
    }
    match s.below(3) {
        0 if !items.is_empty() => {
            expect.spoil(VATTN_INVALID_ARGUMENT);
            (items.as_ptr().cast::<u8>().wrapping_add(1).cast(), items.len())
        }
        1 => {
            expect.spoil(VATTN_INVALID_ARGUMENT);
            (std::ptr::null(), s.pick(&[1, 5, usize::MAX, usize::MAX / 2, 1 << 40]))
        }
        _ => {
            expect.spoil(VATTN_INVALID_ARGUMENT);
            // Misaligned, and of a count that cannot be.
            (std::ptr::without_provenance(usize::MAX - 8), s.pick(&[1, usize::MAX]))
        }
    }
}

/// What fences a call is given, and what is known of them.
pub(crate) struct Fences {
    pub(crate) all: Vec<vattn_fence>,
    /// Whether every one of them is of a stream that is held, and since which firing.
    held: Option<u64>,
}

impl World {
    pub(crate) fn fences(&self, s: &mut impl Source, expect: &mut Expect, cache: Option<usize>) -> Fences {
        self.fences_of(s, expect, cache.map(|cache| self.caches[cache].base))
    }

    /// Fences for work on the streams of a base.
    pub(crate) fn fences_of(&self, s: &mut impl Source, expect: &mut Expect, base: Option<usize>) -> Fences {
        let base = base.map(|base| &self.bases[base]);
        let mut all = Vec::new();
        let mut held = Some(fired());
        for _ in 0..s.pick(&[1, 1, 1, 1, 2, 3]) {
            let held_now = base.map(|base| base.held.keys().copied().collect::<Vec<_>>()).unwrap_or_default();
            let stream =
                if held_now.is_empty() || s.one_in(3) { s.pick(&STREAMS) } else { s.pick(&held_now) };
            let mut fence = vattn_fence { kind: 0, reserved: 0, handle: std::ptr::null_mut() };
            match s.below(20) {
                0 => {
                    fence.kind = number(VATTN_FENCE_EVENT);
                    fence.handle = pointer(s.any_number());
                    if fence.handle.is_null() {
                        expect.spoil(VATTN_INVALID_ARGUMENT);
                    }
                    // An event is refused unless it happens to be one.
                    expect.may(VATTN_INVALID_ARGUMENT);
                    expect.may(VATTN_DRIVER);
                    held = None;
                }
                1 => {
                    expect.spoil(VATTN_INVALID_ARGUMENT);
                    match s.below(3) {
                        0 => fence.kind = s.no_choice(),
                        1 => fence.reserved = 1 + s.small(9),
                        _ => fence.handle = pointer(1 + s.below(9)),
                    }
                }
                2..=11 => {
                    fence.kind = number(VATTN_FENCE_STREAM);
                    fence.handle = pointer(stream);
                    if base.is_some_and(|base| base.capturing.get(&stream) == Some(&true)) {
                        match self.crowd {
                            Crowd::None => expect.spoil(VATTN_CAPTURING_STREAM),
                            _ => expect.may(VATTN_CAPTURING_STREAM),
                        }
                    }
                    held = held.filter(|now| base.is_some_and(|base| base.held.get(&stream) == Some(now)));
                }
                _ => held = None,
            }
            all.push(fence);
        }
        if s.one_in(16) {
            all.clear();
            expect.spoil(VATTN_INVALID_ARGUMENT);
            held = None;
        }
        Fences { all, held }
    }

    /// What a call on a cache may come to, if it comes to that where nothing is known to be wrong with the
    /// driver. A failed cache refuses those that are `gated`.
    pub(crate) fn natural(
        &mut self,
        cache: Option<usize>,
        gated: bool,
        strict: Vec<vattn_status>,
    ) -> Vec<vattn_status> {
        let Some(at) = cache else { return strict };
        if self.crowd != Crowd::None || self.caches[at].is_unknown {
            return ANYTHING.to_vec();
        }
        if !self.is_lax(at) {
            return strict;
        }
        match gated && self.has_failed(at) {
            true => vec![VATTN_UNHEALTHY],
            false => ANYTHING.to_vec(),
        }
    }

    pub(crate) fn has_failed(&mut self, cache: usize) -> bool {
        let mut room = Room::new::<i32>(&mut Given(&[1]), &mut Expect::default());
        let status = call!(self, vattn_cache_health(handle(self.caches[cache].handle), room.at()));
        assert!(status == VATTN_OK || self.crowd == Crowd::Wild, "{status:?}");
        status != VATTN_OK || room.get::<i32>() == i32::from(failed_number())
    }

    /// Whether the device may have less than the budget.
    pub(crate) fn is_tight(&self, cache: usize) -> bool {
        let of = &self.caches[cache];
        let base = &self.bases[of.base];
        let others = self.caches.iter().filter(|other| other.base == of.base).count() > 1;
        let lost = self.drivers.iter().any(|driver| {
            driver.base == of.base && driver.layers.iter().any(|layer| self.layers[*layer].is_leaky)
        });
        !base.is_ample
            || others
            || lost
            || self.is_kept(of.base)
            || self.buffers.iter().any(|buffer| buffer.base == of.base)
            || of.layers.iter().any(|layer| self.layers[*layer].is_leaky)
            || of.budget > base.capacity
    }

    fn with_refusals(&self, cache: Option<usize>, mut natural: Vec<vattn_status>) -> Vec<vattn_status> {
        if cache.is_some_and(|cache| self.is_tight(cache)) {
            natural.extend([VATTN_OUT_OF_DEVICE_MEMORY, VATTN_OUT_OF_MAPPINGS]);
        }
        natural
    }

    /// What is wrong with naming a slot.
    pub(crate) fn refusal(&self, cache: usize, id: vattn_slot) -> Vec<vattn_status> {
        let of = &self.caches[cache];
        if of.slots.iter().any(|slot| slot.id == id) {
            return Vec::new();
        }
        match of.number {
            None => vec![VATTN_FOREIGN_SLOT, VATTN_STALE_SLOT],
            Some(number) if number != id.cache || id.index >= of.layout.slots => vec![VATTN_FOREIGN_SLOT],
            Some(_) => vec![VATTN_STALE_SLOT],
        }
    }

    pub(crate) fn held(&self, cache: usize, id: vattn_slot) -> u64 {
        self.caches[cache].slots.iter().find(|slot| slot.id == id).map_or(0, |slot| slot.tokens)
    }

    /// A slot that is none of the cache's, or not any more.
    fn wrong_slot(&self, s: &mut impl Source, cache: usize) -> vattn_slot {
        let of = &self.caches[cache];
        let number = of.number.unwrap_or(1);
        let none = vattn_slot { index: 0, cache: 0, generation: 0 };
        match s.below(6) {
            0 if !of.past.is_empty() => of.past[s.index(of.past.len())],
            // One of its own, as another cache would have it.
            1 if !of.slots.is_empty() && s.one_in(2) => vattn_slot {
                cache: s.pick(&[0, number + 1, u32::MAX]),
                ..of.slots[s.index(of.slots.len())].id
            },
            1 => {
                let others = self.caches.iter().filter(|other| other.handle != of.handle);
                others.flat_map(|other| other.slots.first()).next().map_or(none, |slot| slot.id)
            }
            2 => none,
            // The spare slot is nobody's to name.
            3 => vattn_slot { index: of.layout.spare_slot, cache: number, generation: s.below(3) },
            4 => {
                vattn_slot { index: s.small(20), cache: number, generation: s.pick(&[0, 1 << 40, u64::MAX]) }
            }
            _ => {
                let bits = s.word();
                let [a, b, c, d, ..] = bits.to_le_bytes();
                vattn_slot { index: u32::from_le_bytes([a, b, c, d]), cache: number, generation: bits >> 60 }
            }
        }
    }

    pub(crate) fn any_slot(&self, s: &mut impl Source, cache: Option<usize>) -> vattn_slot {
        let Some(at) = cache else { return vattn_slot { index: 0, cache: 1, generation: 1 } };
        let of = &self.caches[at];
        if of.slots.is_empty() || s.one_in(WRONG) {
            return self.wrong_slot(s, at);
        }
        of.slots[s.index(of.slots.len())].id
    }

    pub(crate) fn acquire(&mut self, s: &mut impl Source) {
        let mut expect = Expect::default();
        let (cache, at) = self.cache(s, &mut expect);
        let hint = if s.one_in(8) { s.any_number() } else { s.below(200) };
        let stream = s.pick(&STREAMS);
        let mut room = Room::new::<vattn_slot>(s, &mut expect);
        let full = at.is_some_and(|at| {
            self.caches[at].slots.len() >= usize::try_from(self.caches[at].max_slots).unwrap()
        });
        let mut strict = vec![if full { VATTN_NO_FREE_SLOT } else { VATTN_OK }];
        let on = s.one_in(2);
        if on && at.is_some_and(|at| self.bases[self.caches[at].base].capturing.get(&stream) == Some(&true)) {
            strict.push(VATTN_CAPTURING_STREAM);
        }
        let natural = self.natural(at, true, strict);
        let status = if on {
            call!(self, vattn_cache_acquire_on(handle(cache), hint, pointer(stream), room.at()))
        } else {
            call!(self, vattn_cache_acquire(handle(cache), hint, room.at()))
        };
        room.check(status);
        self.judge(status, &expect, &natural);
        let (VATTN_OK, Some(at)) = (status, at) else { return };
        let id: vattn_slot = room.get();
        let of = &mut self.caches[at];
        of.acquired += 1;
        assert!(of.is_unknown || id.index < of.max_slots, "{id:?} of {} slots", of.max_slots);
        assert!(of.number.is_none_or(|number| number == id.cache), "{id:?} has another cache's number");
        of.number = Some(id.cache);
        assert!(
            of.slots.iter().all(|slot| slot.id.index != id.index) || self.crowd == Crowd::Wild,
            "{id:?} is in use"
        );
        let before = of.generations.insert(id.index, id.generation);
        assert!(before.is_none_or(|before| before < id.generation), "{id:?} was given before");
        of.pending.retain(|pending| pending.slot.id.index != id.index);
        of.slots.push(Slot { id, tokens: 0 });
    }

    fn entries(&self, s: &mut impl Source, cache: Option<usize>) -> Vec<vattn_slot_tokens> {
        let mut entries: Vec<vattn_slot_tokens> = Vec::new();
        let count = s.pick(&[1, 1, 1, 2, 3, 5, 0]);
        let Some(at) = cache else {
            let slot = vattn_slot { index: 0, cache: 1, generation: 1 };
            return vec![vattn_slot_tokens { slot, tokens: 1 }; count];
        };
        let of = &self.caches[at];
        let most = of.layout.max_tokens;
        for _ in 0..count {
            let slot = self.any_slot(s, cache);
            let now = self.held(at, slot);
            let named = entries.iter().any(|entry| entry.slot == slot);
            if named && !s.one_in(24) {
                continue;
            }
            let tokens = match s.below(20) {
                0 => now,
                1 => most,
                2..=5 => now.max(s.below(most + 1)),
                6 if s.one_in(4) => s.any_number(),
                7 if s.one_in(4) => now.saturating_sub(1),
                8 if s.one_in(4) => most + 1,
                _ => now.saturating_add(1 + s.below(20)).min(most),
            };
            entries.push(vattn_slot_tokens { slot, tokens });
        }
        entries
    }

    /// What is wrong with a step's entries, whatever memory there is.
    fn mistake(&self, cache: usize, entries: &[vattn_slot_tokens]) -> Vec<vattn_status> {
        let mut named = BTreeSet::new();
        for entry in entries {
            let refusal = self.refusal(cache, entry.slot);
            if !refusal.is_empty() {
                return refusal;
            }
            if entry.tokens > self.caches[cache].layout.max_tokens {
                return vec![VATTN_TOO_MANY_TOKENS];
            }
            if entry.tokens < self.held(cache, entry.slot) {
                return vec![VATTN_FEWER_TOKENS];
            }
            if !named.insert(entry.slot.index) {
                return vec![VATTN_DUPLICATE_SLOT];
            }
        }
        Vec::new()
    }

    pub(crate) fn step(&mut self, s: &mut impl Source) {
        let mut expect = Expect::default();
        let (cache, at) = self.cache_in_use(s, &mut expect);
        let entries = self.entries(s, at);
        let (first, count) = array(s, &mut expect, &entries);
        let mistake = at.map(|at| self.mistake(at, &entries)).unwrap_or_default();
        let strict = match (at, mistake.is_empty()) {
            (Some(at), true) if self.crowd == Crowd::None => match self.all_fit(at, &entries) {
                true => self.with_refusals(Some(at), vec![VATTN_OK]),
                false => self.with_refusals(Some(at), vec![VATTN_OUT_OF_BUDGET]),
            },
            (_, true) => vec![VATTN_OK],
            _ => mistake.clone(),
        };
        let natural = self.natural(at, true, strict);
        let status = call!(self, vattn_cache_step(handle(cache), first, count));
        self.judge(status, &expect, &natural);
        let (VATTN_OK, Some(at)) = (status, at) else { return };
        self.caches[at].steps += 1;
        self.check_pending(at);
        assert!(mistake.is_empty() || self.crowd != Crowd::None, "a step with {mistake:?} has succeeded");
        let chosen = s.word();
        for entry in entries {
            let is_wild = self.crowd == Crowd::Wild;
            let of = &mut self.caches[at];
            let Some(slot) = of.slots.iter_mut().find(|slot| slot.id == entry.slot) else { continue };
            let before = std::mem::replace(&mut slot.tokens, entry.tokens);
            if of.views.is_empty() || is_wild || of.is_unknown {
                continue;
            }
            contents::write(&of.views, entry.slot, before.min(entry.tokens)..entry.tokens);
            if entry.tokens > 0 {
                contents::check(&of.views, entry.slot, [0, entry.tokens - 1, chosen % entry.tokens]);
            }
        }
    }

    /// What the cache itself says of a step.
    fn all_fit(&mut self, cache: usize, entries: &[vattn_slot_tokens]) -> bool {
        let mut room = Room::array::<bool>(&mut Given(&[1]), &mut Expect::default(), entries.len());
        let number = self.caches[cache].handle;
        let status =
            call!(self, vattn_cache_fits(handle(number), entries.as_ptr(), entries.len(), room.at()));
        let is_sure = !self.caches[cache].is_unknown;
        assert!(status == VATTN_OK || !is_sure, "{entries:?} came to {status:?}: {}", self.voice.last());
        status == VATTN_OK && (0..entries.len()).all(|at| room.byte(at) == 1)
    }

    pub(crate) fn fits(&mut self, s: &mut impl Source) {
        let mut expect = Expect::default();
        let (cache, at) = self.cache_in_use(s, &mut expect);
        let entries = self.entries(s, at);
        let (first, count) = array(s, &mut expect, &entries);
        let mut room = Room::array::<bool>(s, &mut expect, entries.len());
        let mistake = at.map(|at| self.mistake(at, &entries)).unwrap_or_default();
        let strict = if mistake.is_empty() { vec![VATTN_OK] } else { mistake };
        // It never asks the driver, and a failed cache still answers.
        let known = at.is_none_or(|at| !self.caches[at].is_unknown) && self.crowd == Crowd::None;
        let natural = if known { strict } else { ANYTHING.to_vec() };
        let status = call!(self, vattn_cache_fits(handle(cache), first, count, room.at()));
        room.check(status);
        self.judge(status, &expect, &natural);
        if status == VATTN_OK {
            assert!((0..entries.len()).all(|at| room.byte(at) <= 1), "no bool");
        }
    }

    pub(crate) fn prefetch(&mut self, s: &mut impl Source) {
        let mut expect = Expect::default();
        let (cache, at) = self.cache_in_use(s, &mut expect);
        let entries = self.entries(s, at);
        let (first, count) = array(s, &mut expect, &entries);
        let mistake = at.and_then(|at| {
            entries.iter().find_map(|entry| {
                let refusal = self.refusal(at, entry.slot);
                let beyond = entry.tokens > self.caches[at].layout.max_tokens;
                match (refusal.is_empty(), beyond) {
                    (false, _) => Some(refusal),
                    (true, true) => Some(vec![VATTN_TOO_MANY_TOKENS]),
                    (true, false) => None,
                }
            })
        });
        let natural = self.natural(at, true, mistake.unwrap_or(vec![VATTN_OK]));
        let status = call!(self, vattn_cache_prefetch(handle(cache), first, count));
        self.judge(status, &expect, &natural);
    }

    pub(crate) fn truncate(&mut self, s: &mut impl Source) {
        let mut expect = Expect::default();
        let (cache, at) = self.cache_in_use(s, &mut expect);
        let slot = self.any_slot(s, at);
        let held = at.map_or(0, |at| self.held(at, slot));
        let tokens = if s.one_in(10) { s.any_number() } else { s.below(held + 1) };
        let fences = self.fences(s, &mut expect, at);
        let (first, count) = array(s, &mut expect, &fences.all);
        let refusal = at.map(|at| self.refusal(at, slot)).unwrap_or_default();
        let strict = match (refusal.is_empty(), tokens <= held) {
            (false, _) => refusal,
            (true, true) => vec![VATTN_OK],
            (true, false) => vec![VATTN_INVALID_ARGUMENT],
        };
        let natural = self.natural(at, true, strict);
        let status = call!(self, vattn_cache_truncate(handle(cache), slot, tokens, first, count));
        self.judge(status, &expect, &natural);
        let (VATTN_OK, Some(at)) = (status, at) else { return };
        let is_known = self.crowd != Crowd::Wild && !self.caches[at].is_unknown;
        let of = &mut self.caches[at];
        let Some(found) = of.slots.iter_mut().find(|found| found.id == slot) else {
            assert!(!is_known, "{slot:?} is none, and was truncated");
            return;
        };
        found.tokens = tokens;
        if is_known {
            contents::check(&of.views, slot, 0..tokens);
        }
    }

    pub(crate) fn retire(&mut self, s: &mut impl Source) {
        let mut expect = Expect::default();
        let (cache, at) = self.cache_in_use(s, &mut expect);
        let slot = self.any_slot(s, at);
        let fences = self.fences(s, &mut expect, at);
        let (first, count) = array(s, &mut expect, &fences.all);
        let refusal = at.map(|at| self.refusal(at, slot)).unwrap_or_default();
        let natural = self.natural(at, true, if refusal.is_empty() { vec![VATTN_OK] } else { refusal });
        if let Some(at) = at {
            self.check_contents(at, slot);
        }
        let status = call!(self, vattn_cache_retire(handle(cache), slot, first, count));
        self.judge(status, &expect, &natural);
        let (VATTN_OK, Some(at)) = (status, at) else { return };
        let is_known = self.crowd != Crowd::Wild && !self.caches[at].is_unknown;
        let of = &mut self.caches[at];
        of.retired += 1;
        let Some(place) = of.slots.iter().position(|found| found.id == slot) else {
            assert!(!is_known, "{slot:?} is none, and was retired");
            return;
        };
        let slot = of.slots.swap_remove(place);
        of.past.push(slot.id);
        if of.past.len() > 64 {
            of.past.remove(0);
        }
        if let (Some(fired), Crowd::None) = (fences.held, self.crowd) {
            of.pending.push(Pending { slot, fired });
        }
    }

    fn check_contents(&self, cache: usize, slot: vattn_slot) {
        let of = &self.caches[cache];
        if self.crowd == Crowd::Wild || of.is_unknown {
            return;
        }
        if let Some(found) = of.slots.iter().find(|found| found.id == slot) {
            contents::check(&of.views, slot, 0..found.tokens);
        }
    }

    /// What was retired while a stream that is still held used it is as it was.
    pub(crate) fn check_pending(&mut self, cache: usize) {
        let of = &mut self.caches[cache];
        of.pending.retain(|pending| pending.fired == fired());
        for pending in &of.pending {
            unless_fired(pending.fired, || {
                contents::check(&of.views, pending.slot.id, 0..pending.slot.tokens)
            });
        }
    }

    /// What all slots hold is theirs.
    pub(crate) fn check_all_contents(&mut self, cache: usize) {
        if self.crowd != Crowd::None || self.caches[cache].is_unknown || self.has_failed(cache) {
            return;
        }
        let of = &mut self.caches[cache];
        for slot in &of.slots {
            contents::check(&of.views, slot.id, 0..slot.tokens);
        }
        of.pending.retain(|pending| pending.fired == fired());
        for pending in &of.pending {
            unless_fired(pending.fired, || {
                contents::check(&of.views, pending.slot.id, 0..pending.slot.tokens)
            });
        }
    }
}

fn failed_number() -> i8 {
    // `VATTN_FAILED`.
    assert_eq!(format!("{:?}", vattn_health::VATTN_FAILED), "VATTN_FAILED");
    2
}

fn number(kind: vattn::ffi::vattn_fence_kind) -> i32 {
    match kind {
        VATTN_FENCE_IDLE => 0,
        VATTN_FENCE_STREAM => 1,
        VATTN_FENCE_EVENT => 2,
    }
}
