//! Calls about drivers, their failures and their streams.

use vattn::ffi::vattn_status::*;
use vattn::ffi::{vattn_driver_info, vattn_host_options, vattn_ledger_options, vattn_live};

use super::room::{Expect, Room, WRONG};
use super::source::Source;
use super::voice::{STREAMS, call, fired, handle, keep, note_fire, pointer};
use super::world::{ANYTHING, Base, Crowd, Driver, Layer, World};

impl World {
    pub(crate) fn driver_create(&mut self, s: &mut impl Source) {
        let mut expect = Expect::default();
        let mut room = Room::new::<usize>(s, &mut expect);
        let is_host = s.one_in(2);
        let granule = if is_host { 4096 << s.below(3) } else { 1 << s.pick(&[6_u64, 12, 12, 14, 21]) };
        let capacity = granule * (1 + s.below(600));
        let mut base = Base { is_host, is_ample: true, capacity, granule, ..Base::default() };
        let mut given = [granule, capacity, 0];
        if s.one_in(WRONG) {
            // Not a power of two, less than a page, or beyond all addresses.
            given[0] = s.pick(&[3, 4097, (1 << 63) + 1, u64::MAX]);
            expect.spoil(VATTN_INVALID_CONFIG);
        }
        if s.one_in(8) {
            // The kernel's mappings, or addresses.
            given[2] = if is_host { 1 + s.below(60) } else { granule * (1 + s.below(5000)) };
            base.is_ample = false;
        }
        let mut options = Options { words: vec![0; 8], is_null: false };
        let size = if s.one_in(WRONG) {
            expect.spoil(VATTN_INVALID_ARGUMENT);
            s.pick(&[0, 31, usize::MAX, 65_537])
        } else {
            s.pick(&[32, 32, 40, 64])
        };
        options.words[0] = u64::try_from(size).unwrap();
        options.words[1..4].copy_from_slice(&given);
        if size == 64 && s.one_in(2) {
            options.words[s.pick(&[4, 7])] = 1 << s.below(64);
            expect.spoil(VATTN_INVALID_ARGUMENT);
        }
        if s.one_in(24) {
            options.is_null = true;
            expect.spoil(VATTN_INVALID_ARGUMENT);
        }
        let status = if is_host {
            call!(self, vattn_driver_create_host(options.at::<vattn_host_options>(), room.at()))
        } else {
            call!(self, vattn_driver_create_ledger(options.at::<vattn_ledger_options>(), room.at()))
        };
        room.check(status);
        self.judge(status, &expect, &[VATTN_OK]);
        if status != VATTN_OK {
            return;
        }
        let driver: usize = room.get();
        let mut keeper = Room::new::<usize>(&mut super::source::Given(&[1]), &mut Expect::default());
        let status = call!(self, vattn_driver_create_checked(handle(driver), keeper.at()));
        assert_eq!(status, VATTN_OK);
        base.keeper = keeper.get();
        keep(base.keeper);
        self.bases.push(base);
        self.drivers.push(Driver { handle: driver, base: self.bases.len() - 1, layers: Vec::new() });
        if s.one_in(2) {
            self.driver_checked(s);
        }
    }

    pub(crate) fn driver_checked(&mut self, s: &mut impl Source) {
        let mut expect = Expect::default();
        let (driver, at) = self.driver(s, &mut expect);
        let mut room = Room::new::<usize>(s, &mut expect);
        let status = call!(self, vattn_driver_create_checked(handle(driver), room.at()));
        room.check(status);
        self.judge(status, &expect, &[VATTN_OK]);
        if let (VATTN_OK, Some(at)) = (status, at) {
            let Driver { base, mut layers, .. } = self.drivers[at].clone();
            self.layers.push(Layer::default());
            layers.push(self.layers.len() - 1);
            self.drivers.push(Driver { handle: room.get(), base, layers });
        }
    }

    pub(crate) fn driver_destroy(&mut self, s: &mut impl Source) {
        let mut expect = Expect::default();
        let (driver, at) = self.driver(s, &mut expect);
        if self.crowd == Crowd::Apart && at.is_some() {
            return;
        }
        let status = call!(self, vattn_driver_destroy(handle(driver)));
        let expect = if driver == 0 { Expect::default() } else { expect };
        self.judge(status, &expect, &[VATTN_OK]);
        if let Some(at) = at {
            self.drivers.swap_remove(at);
            self.dead.push(driver);
        }
    }

    pub(crate) fn driver_ask(&mut self, s: &mut impl Source) {
        let mut expect = Expect::default();
        let (driver, at) = self.driver(s, &mut expect);
        let object = at.map(|at| self.drivers[at].clone());
        let is_checked = object.as_ref().is_none_or(|driver| !driver.layers.is_empty());
        let natural = if is_checked { [VATTN_OK] } else { [VATTN_UNSUPPORTED] };
        let verb = if s.one_in(WRONG) { s.no_choice() } else { i32::try_from(s.below(15)).unwrap() - 1 };
        match s.below(4) {
            0 => {
                let mut room = Room::sized::<vattn_driver_info>(s, &mut expect);
                let status = call!(self, vattn_driver_describe(handle(driver), room.at()));
                room.check(status);
                self.judge(status, &expect, &[VATTN_OK]);
            }
            1 => {
                let (mut free, mut total) =
                    (Room::new::<u64>(s, &mut expect), Room::new::<u64>(s, &mut expect));
                let status = call!(self, vattn_driver_memory(handle(driver), free.at(), total.at()));
                free.check(status);
                total.check(status);
                let is_planned = object.as_ref().is_some_and(|driver| self.is_planned(&driver.layers));
                self.judge(status, &expect, if is_planned { &ANYTHING } else { &[VATTN_OK] });
                if let (VATTN_OK, Some(driver)) = (status, object) {
                    let (free, total): (u64, u64) = (free.get(), total.get());
                    assert!(free <= total, "{free} of {total} are free");
                    assert_eq!(total, self.bases[driver.base].capacity);
                }
            }
            2 => {
                let mut room = Room::new::<vattn_live>(s, &mut expect);
                let status = call!(self, vattn_driver_live(handle(driver), room.at()));
                room.check(status);
                self.judge(status, &expect, &natural);
            }
            _ => {
                if !(-1..14).contains(&verb) {
                    expect.spoil(VATTN_INVALID_ARGUMENT);
                }
                let (mut calls, mut failed) =
                    (Room::new::<u64>(s, &mut expect), Room::new::<u64>(s, &mut expect));
                let status = call!(self, vattn_driver_calls(handle(driver), verb, calls.at(), failed.at()));
                calls.check(status);
                failed.check(status);
                self.judge(status, &expect, &natural);
            }
        }
    }

    pub(crate) fn driver_fail(&mut self, s: &mut impl Source) {
        let mut expect = Expect::default();
        let (mut driver, mut at) = self.driver(s, &mut expect);
        let is_checked = |driver: &Driver| !driver.layers.is_empty();
        if let (Some(found), true) = (self.drivers.iter().position(is_checked), at.is_some() && !s.one_in(4))
        {
            (driver, at) = (self.drivers[found].handle, Some(found));
        }
        let object = at.map(|at| self.drivers[at].clone());
        let layer = object.as_ref().and_then(|driver| driver.layers.last().copied());
        let natural = if layer.is_some() || at.is_none() { [VATTN_OK] } else { [VATTN_UNSUPPORTED] };
        if s.one_in(2) {
            let status = call!(self, vattn_driver_clear_failures(handle(driver)));
            self.judge(status, &expect, &natural);
            if let (VATTN_OK, Some(layer)) = (status, layer) {
                self.layers[layer].is_planned = false;
            }
            return;
        }
        let verb = i32::try_from(s.below(15)).unwrap() - 1;
        let verb = if s.one_in(WRONG) { s.no_choice() } else { verb };
        let nth = if s.one_in(WRONG) { s.pick(&[0, u64::MAX]) } else { 1 + s.below(6) };
        let onward = if s.one_in(WRONG) { s.pick(&[2, u32::MAX]) } else { u32::from(s.one_in(4)) };
        let kind = match s.below(10) {
            0 => s.pick(&[0, -1, 21, 101, i32::MAX]),
            1..=2 => 17,
            3..=4 => s.pick(&[5, 6, 16]),
            _ => 1 + i32::try_from(s.below(20)).unwrap(),
        };
        if nth == 0 || onward > 1 || !(1..=20).contains(&kind) || !(-1..14).contains(&verb) {
            expect.spoil(VATTN_INVALID_ARGUMENT);
        }
        let status = call!(self, vattn_driver_fail(handle(driver), verb, nth, onward, kind));
        self.judge(status, &expect, &natural);
        if let (VATTN_OK, Some(layer)) = (status, layer) {
            // A device that is gone has taken everything already.
            let gives_back = [-1, 4, 5, 6, 12].contains(&verb) || kind == 17;
            self.layers[layer].is_planned = true;
            self.layers[layer].is_leaky |= gives_back;
            for cache in self.caches.iter_mut().filter(|cache| cache.layers.contains(&layer)) {
                cache.is_lax = true;
            }
            for buffer in self.buffers.iter_mut().filter(|buffer| buffer.layers.contains(&layer)) {
                buffer.is_unknown = true;
            }
        }
    }

    pub(crate) fn stream_ask(&mut self, s: &mut impl Source) {
        let mut expect = Expect::default();
        let (driver, at) = self.driver(s, &mut expect);
        let stream = s.pick(&STREAMS);
        let base = at.map(|at| self.drivers[at].base);
        match s.below(4) {
            0 | 1 => {
                let status = call!(self, vattn_driver_hold(handle(driver), pointer(stream)));
                self.judge(status, &expect, &[VATTN_OK]);
                if let (VATTN_OK, Some(base)) = (status, base) {
                    let held = &mut self.bases[base].held;
                    let since = held.get(&stream).copied().filter(|since| *since == fired());
                    held.insert(stream, since.unwrap_or_else(fired));
                }
            }
            2 => {
                note_fire();
                let status = call!(self, vattn_driver_fire(handle(driver), pointer(stream)));
                self.judge(status, &expect, &[VATTN_OK]);
                if let Some(base) = base {
                    self.bases[base].held.remove(&stream);
                }
            }
            _ => {
                let capturing = if s.one_in(8) { s.pick(&[2, u32::MAX]) } else { u32::from(s.one_in(3)) };
                if capturing > 1 {
                    expect.spoil(VATTN_INVALID_ARGUMENT);
                }
                let status =
                    call!(self, vattn_driver_set_capturing(handle(driver), pointer(stream), capturing));
                self.judge(status, &expect, &[VATTN_OK]);
                if let (VATTN_OK, Some(base)) = (status, base) {
                    self.bases[base].capturing.insert(stream, capturing == 1);
                }
            }
        }
    }
}

/// Options as C has them: words of which the first is their size.
struct Options {
    words: Vec<u64>,
    is_null: bool,
}

impl Options {
    fn at<T>(&self) -> *const T {
        if self.is_null { std::ptr::null() } else { self.words.as_ptr().cast() }
    }
}
