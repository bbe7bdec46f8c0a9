//! Calls about memory, and those that only ask.

use std::ffi::{CStr, c_char};

use vattn::ffi::vattn_background::*;
use vattn::ffi::vattn_status::*;
use vattn::ffi::{
    VATTN_AUTO, vattn_bytes, vattn_call_stats, vattn_layout, vattn_stats, vattn_tensor, vattn_view,
};

use super::room::{Expect, Room, WRONG};
use super::slots::array;
use super::source::{Given, Source};
use super::voice::{call, handle};
use super::world::{ANYTHING, Crowd, World};

impl World {
    pub(crate) fn give_up(&mut self, s: &mut impl Source) {
        let mut expect = Expect::default();
        let (cache, at) = self.cache(s, &mut expect);
        let granule = at.map_or(1, |at| self.caches[at].layout.granule);
        let amount = if s.one_in(4) { s.any_number() } else { granule * s.below(40) };
        let fences = self.fences(s, &mut expect, at);
        let (first, count) = array(s, &mut expect, &fences.all);
        let mut room = Room::new::<u64>(s, &mut expect);
        let natural = self.natural(at, true, vec![VATTN_OK]);
        let status = if s.one_in(2) {
            call!(self, vattn_cache_reclaim(handle(cache), amount, first, count, room.at()))
        } else {
            call!(self, vattn_cache_trim(handle(cache), amount, first, count, room.at()))
        };
        room.check(status);
        self.judge(status, &expect, &natural);
        if let (VATTN_OK, true) = (status, at.is_some_and(|at| !self.caches[at].is_unknown)) {
            assert!(room.get::<u64>().is_multiple_of(granule), "memory comes in granules");
            at.into_iter().for_each(|at| self.check_pending(at));
        }
    }

    pub(crate) fn set_budget(&mut self, s: &mut impl Source) {
        let mut expect = Expect::default();
        let (cache, at) = self.cache(s, &mut expect);
        let granule = at.map_or(1, |at| self.caches[at].layout.granule);
        let budget = if s.one_in(6) { s.any_number() } else { granule * s.below(200) + s.below(2) };
        if budget == VATTN_AUTO {
            expect.spoil(VATTN_INVALID_ARGUMENT);
        }
        let known = at.filter(|at| self.crowd == Crowd::None && !self.caches[*at].is_unknown);
        let strict = match known {
            None => vec![VATTN_OK],
            Some(at) => {
                let bytes = self.bytes_of(at);
                let least = self.least_budget(at);
                let limit = budget / granule * granule;
                vec![match () {
                    () if budget < least => VATTN_INVALID_CONFIG,
                    () if bytes.mapped + bytes.quarantined > limit => VATTN_OUT_OF_BUDGET,
                    () => VATTN_OK,
                }]
            }
        };
        let natural = self.natural(at, true, strict);
        let status = call!(self, vattn_cache_set_budget(handle(cache), budget));
        self.judge(status, &expect, &natural);
        if let (VATTN_OK, Some(at)) = (status, at) {
            self.caches[at].budget = budget;
            self.check_pending(at);
        }
    }

    /// A granule for each tensor, or what the spare slot takes, where that is more.
    fn least_budget(&mut self, cache: usize) -> u64 {
        let of = &self.caches[cache];
        let (layout, number) = (of.layout, of.handle);
        let one_each = u64::from(layout.tensors) * layout.granule;
        if layout.spare_slot == vattn::ffi::VATTN_NO_SLOT {
            return one_each;
        }
        let mut room = Room::new::<u64>(&mut Given(&[1]), &mut Expect::default());
        let status = call!(self, vattn_cache_bytes_for(handle(number), spare_tokens(&layout), room.at()));
        assert_eq!(status, VATTN_OK);
        one_each.max(room.get())
    }

    pub(crate) fn bytes_of(&mut self, cache: usize) -> vattn_bytes {
        let size = size_of::<vattn_bytes>();
        let mut room = Room::with_size::<vattn_bytes>(&mut Given(&[1]), &mut Expect::default(), size);
        let status = call!(self, vattn_cache_bytes(handle(self.caches[cache].handle), room.at()));
        assert_eq!(status, VATTN_OK);
        room.get()
    }

    pub(crate) fn tend(&mut self, s: &mut impl Source) {
        let mut expect = Expect::default();
        let (cache, at) = self.cache(s, &mut expect);
        let mut room = Room::new::<bool>(s, &mut expect);
        let is_callers = at.is_none_or(|at| self.caches[at].background == VATTN_BACKGROUND_CALLER);
        let strict = if is_callers { VATTN_OK } else { VATTN_INVALID_ARGUMENT };
        let natural = self.natural(at, is_callers, vec![strict]);
        let status = call!(self, vattn_cache_tend(handle(cache), room.at()));
        room.check(status);
        self.judge(status, &expect, &natural);
    }

    pub(crate) fn flush(&mut self, s: &mut impl Source) {
        let mut expect = Expect::default();
        let (cache, at) = self.cache(s, &mut expect);
        let mut strict = vec![VATTN_OK];
        if at.is_some_and(|at| self.is_tight(at)) {
            strict.extend([VATTN_OUT_OF_DEVICE_MEMORY, VATTN_OUT_OF_MAPPINGS]);
        }
        let natural = self.natural(at, true, strict);
        let status = call!(self, vattn_cache_flush(handle(cache)));
        self.judge(status, &expect, &natural);
        if let (VATTN_OK, Some(at)) = (status, at) {
            self.recover(at);
        }
    }

    /// A cache that is healthy again, with nothing planned, has to do all that it is asked.
    fn recover(&mut self, at: usize) {
        let of = &self.caches[at];
        if self.crowd != Crowd::None || of.is_unknown || self.is_planned(&of.layers) || !of.is_lax {
            return;
        }
        let mut room = Room::new::<i32>(&mut Given(&[1]), &mut Expect::default());
        let status = call!(self, vattn_cache_health(handle(self.caches[at].handle), room.at()));
        assert_eq!(status, VATTN_OK);
        self.caches[at].is_lax = room.get::<i32>() != 0;
    }

    pub(crate) fn cache_ask(&mut self, s: &mut impl Source) {
        let mut expect = Expect::default();
        let (cache, at) = self.cache(s, &mut expect);
        let known = at.filter(|at| self.crowd == Crowd::None && !self.caches[*at].is_unknown);
        let natural = if known.is_some() || at.is_none() { vec![VATTN_OK] } else { ANYTHING.to_vec() };
        match s.below(7) {
            0 => {
                let mut room = Room::sized::<vattn_layout>(s, &mut expect);
                let status = call!(self, vattn_cache_layout(handle(cache), room.at()));
                room.check(status);
                self.judge(status, &expect, &natural);
            }
            1 if s.one_in(4) => {
                let tensors = at.map_or(1, |at| self.caches[at].layout.tensors);
                let tensor = if s.one_in(8) { u32::MAX - tensors } else { s.small(tensors) };
                if tensor >= tensors {
                    expect.spoil(VATTN_INVALID_ARGUMENT);
                }
                let mut room = Room::sized::<vattn_tensor>(s, &mut expect);
                let status = call!(self, vattn_cache_tensor(handle(cache), tensor, room.at()));
                room.check(status);
                self.judge(status, &expect, &natural);
            }
            1 => {
                let most = at.map_or(1, |at| self.caches[at].layout.max_tokens);
                let tokens = if s.one_in(8) { s.any_number() } else { s.below(most + 1) };
                if tokens > most {
                    expect.spoil(VATTN_INVALID_ARGUMENT);
                }
                let mut room = Room::new::<u64>(s, &mut expect);
                let status = call!(self, vattn_cache_bytes_for(handle(cache), tokens, room.at()));
                room.check(status);
                if at.is_none_or(|at| !self.caches[at].is_unknown) {
                    self.judge(status, &expect, &natural);
                }
            }
            2 => {
                let mut room = Room::new::<i32>(s, &mut expect);
                let status = call!(self, vattn_cache_health(handle(cache), room.at()));
                room.check(status);
                self.judge(status, &expect, &natural);
                if let (VATTN_OK, Some(at)) = (status, known) {
                    assert!(room.get::<i32>() == 0 || self.is_lax(at), "unhealthy, and no call has failed");
                }
            }
            3 => {
                let verb = if s.one_in(WRONG) { s.no_choice() } else { i32::try_from(s.below(14)).unwrap() };
                if !(0..14).contains(&verb) {
                    expect.spoil(VATTN_INVALID_ARGUMENT);
                }
                let mut room = Room::new::<vattn_call_stats>(s, &mut expect);
                let status = call!(self, vattn_cache_calls(handle(cache), verb, room.at()));
                room.check(status);
                self.judge(status, &expect, &natural);
            }
            4 => {
                let mut room = Room::sized::<vattn_bytes>(s, &mut expect);
                let status = call!(self, vattn_cache_bytes(handle(cache), room.at()));
                room.check(status);
                self.judge(status, &expect, &natural);
            }
            5 => {
                let mut room = Room::sized::<vattn_stats>(s, &mut expect);
                let status = call!(self, vattn_cache_stats(handle(cache), room.at()));
                room.check(status);
                self.judge(status, &expect, &natural);
            }
            _ => {
                let mut room = Room::new::<*mut c_char>(s, &mut expect);
                let status = if s.one_in(2) {
                    call!(self, vattn_cache_stats_json(handle(cache), room.at()))
                } else {
                    call!(self, vattn_cache_report_json(handle(cache), room.at()))
                };
                room.check(status);
                self.judge(status, &expect, &natural);
                self.keep_text(status, &room);
            }
        }
        if let Some(at) = known {
            self.look_over(at);
        }
    }

    pub(crate) fn view(&mut self, s: &mut impl Source) {
        let mut expect = Expect::default();
        let (cache, at) = self.cache(s, &mut expect);
        let layers = at.map_or(1, |at| self.caches[at].layer_bytes.len());
        let layer = if layers == 0 || s.one_in(WRONG) {
            u32::MAX - s.small(3)
        } else {
            s.small(u32::try_from(layers).unwrap())
        };
        let part = if s.one_in(WRONG) { s.no_choice() } else { i32::from(s.one_in(2)) };
        let has = at.is_none_or(|at| {
            let of = &self.caches[at];
            let parts = usize::try_from(layer).ok().and_then(|layer| of.layer_bytes.get(layer));
            of.is_unknown
                || parts
                    .is_some_and(|has| usize::try_from(part).is_ok_and(|part| has.get(part) == Some(&true)))
        });
        let strict = if has { vec![VATTN_OK] } else { vec![VATTN_INVALID_ARGUMENT] };
        let known = at.is_none_or(|at| !self.caches[at].is_unknown) && self.crowd == Crowd::None;
        let natural = if known { strict } else { ANYTHING.to_vec() };
        let mut room = Room::new::<vattn_view>(s, &mut expect);
        let status = match s.below(3) {
            0 => call!(self, vattn_cache_view(handle(cache), layer, part, room.at())),
            1 => call!(self, vattn_cache_paged_view(handle(cache), layer, part, room.at())),
            _ => call!(self, vattn_cache_token_view(handle(cache), layer, part, room.at())),
        };
        room.check(status);
        self.judge(status, &expect, &natural);
    }

    pub(crate) fn admits(&mut self, s: &mut impl Source) {
        let mut expect = Expect::default();
        let (cache, at) = self.cache(s, &mut expect);
        let known = at.filter(|at| self.crowd == Crowd::None && !self.caches[*at].is_unknown);
        let most = at.map_or(1, |at| self.caches[at].layout.max_tokens);
        let mut prompts = Vec::new();
        for _ in 0..s.below(6) {
            prompts.push(if s.one_in(12) { s.any_number() } else { s.below(most + 1) });
        }
        let (first, count) = array(s, &mut expect, &prompts);
        let mut room = Room::new::<usize>(s, &mut expect);
        let answer = known.map(|at| self.admitted(at, &prompts));
        let status = call!(self, vattn_cache_admits(handle(cache), first, count, room.at()));
        room.check(status);
        self.judge(status, &expect, &[VATTN_OK]);
        if let (VATTN_OK, Some(answer)) = (status, answer) {
            assert_eq!(room.get::<usize>(), answer, "of {prompts:?}");
        }
    }

    /// How many prompts the model would admit.
    fn admitted(&mut self, at: usize, prompts: &[u64]) -> usize {
        let bytes = self.bytes_of(at);
        let of = &self.caches[at];
        let (number, most) = (of.handle, of.layout.max_tokens);
        let available = usize::try_from(of.max_slots).unwrap() - of.slots.len();
        let mut left = bytes.budget.saturating_sub(bytes.mapped + bytes.quarantined);
        for (place, tokens) in prompts.iter().enumerate() {
            if place == available || *tokens > most {
                return place;
            }
            let mut room = Room::new::<u64>(&mut Given(&[1]), &mut Expect::default());
            let status = call!(self, vattn_cache_bytes_for(handle(number), *tokens, room.at()));
            assert_eq!(status, VATTN_OK);
            let need: u64 = room.get();
            if need > left {
                return place;
            }
            left -= need;
        }
        prompts.len()
    }

    /// Compares a cache's books with each other, with the model, and memory with what was written there.
    pub(crate) fn look_over(&mut self, at: usize) {
        if self.crowd != Crowd::None || self.caches[at].is_unknown {
            return;
        }
        let number = self.caches[at].handle;
        let mut room = Room::new::<*mut c_char>(&mut Given(&[1]), &mut Expect::default());
        let status = call!(self, vattn_cache_report_json(handle(number), room.at()));
        assert_eq!(status, VATTN_OK, "{}", self.voice.last());
        self.keep_text(status, &room);
        // Under the locks, so that nothing moves meanwhile.
        let settled = parse(&room)["snapshot"]["bytes"].take();
        let [held, mapped, parked, free, quarantined, budget] =
            ["held", "mapped", "parked", "free", "quarantined", "budget"]
                .map(|name| settled[name].as_u64().unwrap());
        assert_eq!(held, mapped + parked + free + quarantined, "{settled}");
        assert!(held <= budget, "{settled}");

        let bytes = self.bytes_of(at);
        let size = size_of::<vattn_stats>();
        let mut room = Room::with_size::<vattn_stats>(&mut Given(&[1]), &mut Expect::default(), size);
        let status = call!(self, vattn_cache_stats(handle(number), room.at()));
        assert_eq!(status, VATTN_OK);
        let stats: vattn_stats = room.get();
        let is_lax = self.is_lax(at);
        let of = &self.caches[at];
        assert_eq!(stats.pins, u64::try_from(self.pins_of(number)).unwrap(), "pins");
        assert!(bytes.pinned <= bytes.mapped, "{bytes:?}");
        let spare = if of.layout.spare_slot == vattn::ffi::VATTN_NO_SLOT { 0 } else { 1 };
        let tokens: u64 = of.slots.iter().map(|slot| slot.tokens).sum();
        let tokens = tokens + spare * spare_tokens(&of.layout);
        assert_eq!(bytes.needed, tokens * of.layout.bytes_per_token, "needed, of {tokens} tokens");
        assert!(bytes.mapped >= bytes.needed, "{bytes:?}");
        assert!(bytes.quarantined == 0 || is_lax, "{bytes:?}");
        if of.budget != u64::MAX {
            assert_eq!(bytes.budget, of.budget / of.layout.granule * of.layout.granule);
        }
        assert_eq!(stats.active_slots, u64::try_from(of.slots.len()).unwrap());
        assert_eq!(stats.max_slots, u64::from(of.max_slots));
        assert_eq!((stats.acquired, stats.retired), (of.acquired, of.retired));
        assert_eq!(stats.steps, of.steps + spare, "steps");
        self.check_all_contents(at);
    }
}

/// A text that the library has just given out.
pub(crate) fn parse(room: &Room) -> serde_json::Value {
    // SAFETY: the library's string, which ends with a NUL and is not given up yet.
    let text = unsafe { CStr::from_ptr(room.get::<*mut c_char>()) };
    serde_json::from_slice(text.to_bytes()).expect("JSON")
}

/// The tokens that the spare slot backs.
fn spare_tokens(layout: &vattn_layout) -> u64 {
    u64::from(layout.page_tokens.max(layout.tile_tokens)).min(layout.max_tokens)
}
