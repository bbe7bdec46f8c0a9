//! Calls that make caches, plan them and end them.

use vattn::ffi::vattn_background::*;
use vattn::ffi::vattn_status::{self, *};
use vattn::ffi::{VATTN_AUTO, VATTN_NO_SLOT, vattn_config, vattn_extents, vattn_layout, vattn_view};

use super::contents::View;
use super::room::{Expect, Room, WRONG};
use super::source::{Given, Source};
use super::voice::{call, handle};
use super::world::{ANYTHING, Cache, Crowd, World};

/// What is made of the parts that a cache is made of.
const REFUSALS: [vattn_status; 6] = [
    VATTN_OK,
    VATTN_INVALID_CONFIG,
    VATTN_OUT_OF_DEVICE_MEMORY,
    VATTN_OUT_OF_MAPPINGS,
    VATTN_OUT_OF_ADDRESS_SPACE,
    VATTN_OUT_OF_BUDGET,
];

/// Memory that is worth writing to.
const MOST_ROW: u64 = 4096;

struct Options {
    room: Room,
    config: vattn_config,
    extents: Vec<vattn_extents>,
    /// Whether the options can be used by themselves.
    is_plain: bool,
}

impl Options {
    /// The pointer that goes in, with the config written there, and extents that are read now.
    fn at(&mut self) -> *const vattn_config {
        if !self.extents.is_empty() {
            (self.config.extents, self.config.extents_count) = (self.extents.as_ptr(), self.extents.len());
        }
        let at = self.room.at::<vattn_config>();
        if !at.is_null() && at.is_aligned() {
            // SAFETY: there is room for one. The size stays as it was chosen.
            unsafe { at.write(self.config) };
        }
        at
    }
}

impl World {
    pub(crate) fn config_init(&mut self, s: &mut impl Source) {
        let mut expect = Expect::default();
        let size = if s.one_in(6) {
            s.pick(&[0, 8, size_of::<vattn_config>() - 1, 65_537, usize::MAX])
        } else {
            size_of::<vattn_config>() + s.pick(&[0, 8, 100])
        };
        if size > 65_536 || size < size_of::<vattn_config>() {
            expect.spoil(VATTN_INVALID_ARGUMENT);
        }
        let mut room = Room::with_size::<vattn_config>(s, &mut expect, size);
        let status = call!(self, vattn_config_init(room.at(), size));
        room.check(status);
        self.judge(status, &expect, &[VATTN_OK]);
    }

    /// Options for a device of so many granules, wrong in ways that are told in `expect`.
    fn options(&mut self, s: &mut impl Source, expect: &mut Expect, granule: u64, granules: u64) -> Options {
        let mut made = Room::with_size::<vattn_config>(
            &mut Given(&[1]),
            &mut Expect::default(),
            size_of::<vattn_config>(),
        );
        let status = call!(self, vattn_config_init(made.at(), size_of::<vattn_config>()));
        assert_eq!(status, VATTN_OK);
        let mut config: vattn_config = made.get();
        let mut extents = Vec::new();
        config.max_slots = 1 + s.small(12);
        let most = s.pick(&[40, 500, 5000]);
        config.max_tokens = 1 + s.below(most);
        let share = granule * (1 + s.below(granules.max(1)));
        config.budget = if s.one_in(8) { VATTN_AUTO } else { share };
        config.spare_slot = u32::from(s.one_in(4));
        config.tile_tokens = s.pick(&[1, 1, 1, 2, 16, 128]);
        config.page_tokens = s.pick(&[1, 16, 16, 7, 32]);
        config.layout = i32::from(s.pick(&[0_i8, 0, 1, 2]));
        config.layers_per_tensor = if config.layout == 2 { 1 + s.small(4) } else { 0 };
        config.kv_order = i32::from(s.one_in(3));
        config.slack_divisor = s.pick(&[32, 32, 1, 4, 1000]);
        config.background = i32::from(s.pick(&[0_i8, 0, 1, 2]));
        config.reclaim = i32::from(s.one_in(3));
        config.look_ahead = s.pick(&[32, 0, 1, 4, 300]);
        config.look_ahead_budget = s.pick(&[VATTN_AUTO, VATTN_AUTO, 0, granule, granule * 9, u64::MAX - 1]);
        config.at_hand = s.pick(&[VATTN_AUTO, VATTN_AUTO, 0, granule, granule * 5]);
        let mut is_plain = config.budget != VATTN_AUTO;
        match s.below(12) {
            0 => {
                config.commit = 1;
                is_plain = false;
            }
            1 => {
                config.commit = 2;
                for _ in 0..=s.below(3) {
                    extents.push(vattn_extents { granules: 1 << s.below(4), count: s.below(4) });
                }
                is_plain = false;
            }
            _ => {}
        }
        for _ in 0..2 {
            if s.one_in(8) {
                is_plain = false;
                spoil(s, expect, &mut config, &mut extents);
            }
        }
        let mut room = Room::sized::<vattn_config>(s, expect);
        // As it states it, whichever way.
        config.struct_size = usize::try_from(room.get::<u64>()).unwrap();
        if config.struct_size <= 65_536 {
            room.zero();
        }
        Options { room, config, extents, is_plain }
    }

    pub(crate) fn layout_plan(&mut self, s: &mut impl Source) {
        let mut expect = Expect::default();
        let (geometry, _) = self.geometry(s, &mut expect);
        let mut granule = 1 << s.pick(&[6_u64, 12, 14, 21]);
        let mut options = self.options(s, &mut expect, granule, 100);
        if s.one_in(WRONG) {
            granule = s.pick(&[0, 3, u64::MAX]);
            expect.spoil(VATTN_INVALID_ARGUMENT);
            expect.spoil(VATTN_INVALID_CONFIG);
        }
        if expect.is_good() && s.one_in(WRONG) {
            granule = 1 << s.below(64);
        }
        let mut room = Room::sized::<vattn_layout>(s, &mut expect);
        let at = options.at();
        let status = call!(self, vattn_layout_plan(at, handle(geometry), granule, room.at()));
        room.check(status);
        self.judge(status, &expect, &[VATTN_OK, VATTN_INVALID_CONFIG, VATTN_OUT_OF_ADDRESS_SPACE]);
        if status == VATTN_OK {
            let layout: vattn_layout = room.get();
            assert!(layout.tensors > 0 && layout.stride_tokens >= layout.max_tokens);
            assert!(layout.virtual_size / layout.bytes_per_token >= layout.max_tokens);
        }
    }

    pub(crate) fn cache_create(&mut self, s: &mut impl Source) {
        let mut expect = Expect::default();
        let (geometry, geometry_at) = self.geometry(s, &mut expect);
        let (driver, driver_at) = self.driver(s, &mut expect);
        let object = driver_at.map(|at| self.drivers[at].clone());
        let base = object.as_ref().map(|driver| self.bases[driver.base].clone()).unwrap_or_default();
        let granules = base.capacity.checked_div(base.granule).unwrap_or(16);
        let mut options = self.options(s, &mut expect, base.granule.max(1), granules);
        let is_planned = object.as_ref().is_some_and(|driver| self.is_planned(&driver.layers));
        let mut room = Room::new::<usize>(s, &mut expect);
        let at = options.at();
        let plan = self.plan(at, geometry, base.granule, expect.is_good());
        let status = call!(self, vattn_cache_create(at, handle(geometry), handle(driver), room.at()));
        room.check(status);
        let alone =
            !self.caches.iter().any(|cache| object.as_ref().is_some_and(|driver| cache.base == driver.base));
        let sure = options.is_plain && alone && base.is_ample;
        let enough = plan.is_some_and(|plan| {
            let one_each = u64::from(plan.tensors) * base.granule;
            options.config.spare_slot == 0 && plan.virtual_size < 1 << 40 && one_each <= options.config.budget
        });
        self.judge(
            status,
            &expect,
            match () {
                () if is_planned => &ANYTHING,
                () if sure && enough && expect.is_good() => &[VATTN_OK],
                () => &REFUSALS,
            },
        );
        let (VATTN_OK, Some(driver), Some(_)) = (status, object, geometry_at) else { return };
        let number = room.get();
        let config = options.config;
        let spare = if self.crowd == Crowd::Wild { None } else { self.learn(number, &config) };
        let Some((layout, layer_bytes, views)) = spare else {
            // Others may have ended it already.
            self.caches.push(Cache { is_unknown: true, ..Cache::unknown(number, &driver) });
            return;
        };
        let views = if base.is_host && layout.bytes_per_token <= MOST_ROW { views } else { Vec::new() };
        let budget = if config.budget == VATTN_AUTO { u64::MAX } else { config.budget };
        self.caches.push(Cache {
            layout,
            layer_bytes,
            background: [VATTN_BACKGROUND_THREAD, VATTN_BACKGROUND_CALLER, VATTN_BACKGROUND_OFF]
                [usize::try_from(config.background).unwrap()],
            budget,
            views,
            max_slots: config.max_slots,
            is_lax: is_planned,
            ..Cache::unknown(number, &driver)
        });
    }

    /// The layout that those options come to, where they are right.
    fn plan(
        &mut self,
        config: *const vattn_config,
        geometry: usize,
        granule: u64,
        is_good: bool,
    ) -> Option<vattn_layout> {
        if !is_good {
            return None;
        }
        let size = size_of::<vattn_layout>();
        let mut room = Room::with_size::<vattn_layout>(&mut Given(&[1]), &mut Expect::default(), size);
        let status = call!(self, vattn_layout_plan(config, handle(geometry), granule, room.at()));
        (status == VATTN_OK).then(|| room.get())
    }

    /// What a new cache says of itself.
    fn learn(
        &mut self,
        cache: usize,
        config: &vattn_config,
    ) -> Option<(vattn_layout, Vec<[bool; 2]>, Vec<View>)> {
        let size = size_of::<vattn_layout>();
        let mut room = Room::with_size::<vattn_layout>(&mut Given(&[1]), &mut Expect::default(), size);
        let status = call!(self, vattn_cache_layout(handle(cache), room.at()));
        assert_eq!(status, VATTN_OK);
        let layout: vattn_layout = room.get();
        assert_eq!(layout.slots, config.max_slots + config.spare_slot);
        assert_eq!(layout.spare_slot == VATTN_NO_SLOT, config.spare_slot == 0);
        assert_eq!(layout.max_tokens, config.max_tokens);
        let (mut parts, mut views) = (Vec::new(), Vec::new());
        for layer in 0..layout.layers {
            let mut has = [false; 2];
            for part in 0..2 {
                let mut room = Room::new::<vattn_view>(&mut Given(&[1]), &mut Expect::default());
                let status = call!(self, vattn_cache_view(handle(cache), layer, part, room.at()));
                has[usize::try_from(part).unwrap()] = status == VATTN_OK;
                if status == VATTN_OK {
                    views.push(View::new(u64::from(layer) * 2 + u64::try_from(part).unwrap(), &room.get()));
                }
            }
            assert!(has[0], "every layer has keys");
            parts.push(has);
        }
        Some((layout, parts, views))
    }

    pub(crate) fn cache_destroy(&mut self, s: &mut impl Source) {
        let mut expect = Expect::default();
        let (cache, at) = self.cache(s, &mut expect);
        if self.crowd == Crowd::Apart && at.is_some() {
            return;
        }
        if let Some(at) = at {
            self.look_over(at);
        }
        let status = call!(self, vattn_cache_destroy(handle(cache)));
        let expect = if cache == 0 { Expect::default() } else { expect };
        self.judge(status, &expect, &[VATTN_OK]);
        if let Some(at) = at {
            self.caches.swap_remove(at);
            self.dead.push(cache);
        }
    }
}

/// Makes one option wrong.
fn spoil(
    s: &mut impl Source,
    expect: &mut Expect,
    config: &mut vattn_config,
    extents: &mut Vec<vattn_extents>,
) {
    let by_number = s.no_choice();
    match s.below(16) {
        0 => config.layout = by_number,
        1 => config.kv_order = by_number,
        2 => config.background = by_number,
        3 => config.reclaim = by_number,
        4 => config.commit = by_number,
        5 => config.reserved = 1 + s.small(9),
        6 => config.spare_slot = s.pick(&[2, u32::MAX]),
        7 => {
            config.extents = std::ptr::null();
            config.extents_count = s.pick(&[1, usize::MAX]);
            extents.clear();
        }
        8 => {
            config.commit = 2;
            extents.push(vattn_extents { granules: s.pick(&[0, 3, 512, u64::MAX]), count: 1 });
        }
        9 => config.max_slots = s.pick(&[0, (1 << 20) + 1, u32::MAX]),
        10 => config.max_tokens = s.pick(&[0, u64::MAX, 1 << 63]),
        11 => config.tile_tokens = s.pick(&[0, u32::MAX]),
        12 => config.page_tokens = s.pick(&[0, u32::MAX]),
        13 => config.budget = s.pick(&[0, 1, u64::MAX - 1]),
        14 => config.slack_divisor = s.pick(&[0, u32::MAX]),
        _ => config.look_ahead = s.pick(&[u64::MAX, 1 << 63]),
    }
    if config.commit != 2 && !extents.is_empty() {
        expect.spoil(VATTN_INVALID_ARGUMENT);
    }
    for status in REFUSALS.into_iter().skip(1).chain([VATTN_INVALID_ARGUMENT]) {
        expect.may(status);
    }
}
