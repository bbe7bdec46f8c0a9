//! What is there: a plain model of objects, slots and planned failures, and the verdict on a call.

use std::collections::BTreeMap;

use vattn::ffi::vattn_status::{self, *};
use vattn::ffi::{vattn_background, vattn_layout, vattn_slot};

use super::buffers::Buffer;
use super::contents::View;
use super::pins::{Pin, Tensor};
use super::room::{Expect, WRONG};
use super::source::Source;
use super::voice::Voice;

/// Who else makes calls meanwhile.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Crowd {
    /// Nobody: what a call comes to is known.
    None,
    /// Other threads, each with slots of its own. Caches and drivers stay.
    Apart,
    /// Other threads, on everything, which may be destroyed at any time.
    Wild,
}

#[derive(Clone, Debug)]
pub(crate) struct Geometry {
    pub(crate) handle: usize,
    pub(crate) layers: u32,
    pub(crate) bytes_per_token: u64,
}

/// A driver without checks, and what its streams are up to.
#[derive(Clone, Debug, Default)]
pub(crate) struct Base {
    /// A driver of ours around it, by which streams are fired when nothing else is left.
    pub(crate) keeper: usize,
    pub(crate) is_host: bool,
    /// Whether what it refuses can be known beforehand: nothing of it is short.
    pub(crate) is_ample: bool,
    pub(crate) capacity: u64,
    pub(crate) granule: u64,
    /// Streams that are held back, and since which firing.
    pub(crate) held: BTreeMap<u64, u64>,
    pub(crate) capturing: BTreeMap<u64, bool>,
}

/// Checks around a driver.
#[derive(Clone, Debug, Default)]
pub(crate) struct Layer {
    /// Failures are planned.
    pub(crate) is_planned: bool,
    /// Calls that give back were made to fail, at some time: what is lost is lost.
    pub(crate) is_leaky: bool,
}

#[derive(Clone, Debug)]
pub(crate) struct Driver {
    pub(crate) handle: usize,
    pub(crate) base: usize,
    /// The checks around the base, the outermost last.
    pub(crate) layers: Vec<usize>,
}

#[derive(Clone, Debug)]
pub(crate) struct Slot {
    pub(crate) id: vattn_slot,
    pub(crate) tokens: u64,
}

/// Memory that was retired while a held stream used it.
#[derive(Clone, Debug)]
pub(crate) struct Pending {
    pub(crate) slot: Slot,
    pub(crate) fired: u64,
}

#[derive(Clone, Debug)]
pub(crate) struct Cache {
    pub(crate) handle: usize,
    pub(crate) base: usize,
    pub(crate) layers: Vec<usize>,
    pub(crate) layout: vattn_layout,
    pub(crate) layer_bytes: Vec<[bool; 2]>,
    pub(crate) background: vattn_background,
    pub(crate) budget: u64,
    pub(crate) views: Vec<View>,
    pub(crate) max_slots: u32,
    pub(crate) number: Option<u32>,
    pub(crate) slots: Vec<Slot>,
    pub(crate) past: Vec<vattn_slot>,
    pub(crate) generations: BTreeMap<u32, u64>,
    pub(crate) pending: Vec<Pending>,
    pub(crate) steps: u64,
    pub(crate) acquired: u64,
    pub(crate) retired: u64,
    /// A failure was planned in its driver while it was there.
    pub(crate) is_lax: bool,
    /// Others have worked on its slots in ways that are not known.
    pub(crate) is_unknown: bool,
}

pub(crate) struct World {
    pub(crate) voice: Voice,
    pub(crate) crowd: Crowd,
    pub(crate) geometries: Vec<Geometry>,
    pub(crate) bases: Vec<Base>,
    pub(crate) layers: Vec<Layer>,
    pub(crate) drivers: Vec<Driver>,
    pub(crate) caches: Vec<Cache>,
    pub(crate) buffers: Vec<Buffer>,
    pub(crate) pins: Vec<Pin>,
    pub(crate) tensors: Vec<Tensor>,
    pub(crate) strings: Vec<usize>,
    pub(crate) dead: Vec<usize>,
    /// How many bases and layers were there before this thread began.
    pub(crate) shared_bases: usize,
    pub(crate) shared_layers: usize,
}

/// What is made of a driver's refusals when failures are planned.
pub(crate) const ANYTHING: [vattn_status; 21] = [
    VATTN_OK,
    VATTN_INVALID_GEOMETRY,
    VATTN_INVALID_CONFIG,
    VATTN_INVALID_ARGUMENT,
    VATTN_OUT_OF_BUDGET,
    VATTN_OUT_OF_DEVICE_MEMORY,
    VATTN_OUT_OF_MAPPINGS,
    VATTN_OUT_OF_ADDRESS_SPACE,
    VATTN_NO_FREE_SLOT,
    VATTN_STALE_SLOT,
    VATTN_FOREIGN_SLOT,
    VATTN_SLOT_BUSY,
    VATTN_DUPLICATE_SLOT,
    VATTN_TOO_MANY_TOKENS,
    VATTN_FEWER_TOKENS,
    VATTN_CAPTURING_STREAM,
    VATTN_DRIVER,
    VATTN_DEVICE_LOST,
    VATTN_UNHEALTHY,
    VATTN_UNSUPPORTED,
    VATTN_INTERNAL,
];

/// What never comes, unless it was asked for.
const DEFECTS: [vattn_status; 4] = [VATTN_INTERNAL, VATTN_FORKED, VATTN_PANIC, VATTN_IN_CALLBACK];

impl Cache {
    /// One of which nothing is known but whose it is.
    pub(crate) fn unknown(handle: usize, driver: &Driver) -> Self {
        Self {
            handle,
            base: driver.base,
            layers: driver.layers.clone(),
            layout: NO_LAYOUT,
            layer_bytes: Vec::new(),
            background: vattn_background::VATTN_BACKGROUND_OFF,
            budget: u64::MAX,
            views: Vec::new(),
            max_slots: 1,
            number: None,
            slots: Vec::new(),
            past: Vec::new(),
            generations: BTreeMap::new(),
            pending: Vec::new(),
            steps: 0,
            acquired: 0,
            retired: 0,
            is_lax: false,
            is_unknown: false,
        }
    }
}

const NO_LAYOUT: vattn_layout = vattn_layout {
    struct_size: 0,
    layers: 1,
    tensors: 1,
    slots: 1,
    spare_slot: u32::MAX,
    page_tokens: 1,
    tile_tokens: 1,
    pages_per_slot: 1,
    max_tokens: 1,
    stride_tokens: 1,
    granule: 1,
    bytes_per_token: 1,
    virtual_size: 1,
};

impl World {
    pub(crate) fn new() -> Self {
        Self {
            voice: Voice::new(),
            crowd: Crowd::None,
            geometries: Vec::new(),
            bases: Vec::new(),
            layers: Vec::new(),
            drivers: Vec::new(),
            caches: Vec::new(),
            buffers: Vec::new(),
            pins: Vec::new(),
            tensors: Vec::new(),
            strings: Vec::new(),
            dead: Vec::new(),
            shared_bases: 0,
            shared_layers: 0,
        }
    }

    /// What another thread knows of it to begin with.
    pub(crate) fn shared(&self, crowd: Crowd) -> impl FnOnce() -> Self + Send + use<> {
        let (geometries, bases, layers) = (self.geometries.clone(), self.bases.clone(), self.layers.clone());
        let (drivers, mut caches, dead) = (self.drivers.clone(), self.caches.clone(), self.dead.clone());
        if crowd == Crowd::Apart {
            for cache in &mut caches {
                cache.slots.clear();
                cache.past.clear();
                cache.pending.clear();
                (cache.steps, cache.acquired, cache.retired) = (0, 0, 0);
            }
        }
        let (shared_bases, shared_layers) = (bases.len(), layers.len());
        move || Self {
            crowd,
            geometries,
            bases,
            layers,
            drivers,
            caches,
            dead,
            shared_bases,
            shared_layers,
            ..Self::new()
        }
    }

    /// The verdict on what a call came to: with arguments that are right, `natural` is what it may come to.
    #[track_caller]
    pub(crate) fn judge(&self, status: vattn_status, expect: &Expect, natural: &[vattn_status]) {
        let text = self.voice.last();
        if self.crowd != Crowd::None {
            let asked_for = text.contains("a test asked for this failure");
            let known = asked_for || expect.allows(status) || natural.contains(&status);
            let defect = DEFECTS.contains(&status) && !known;
            assert!(!defect, "{status:?} among other threads: {text}");
            assert!(expect.is_good() || status != VATTN_OK, "OK in spite of {expect:?}");
            return;
        }
        let natural_is_it = natural.contains(&status);
        if expect.is_good() {
            assert!(
                natural_is_it || expect.allows(status),
                "came to {status:?}, and one of {natural:?} was expected: {text}"
            );
        } else {
            let fits = expect.allows(status) || (natural_is_it && status != VATTN_OK);
            assert!(fits, "came to {status:?}, and {expect:?} was expected: {text}");
        }
    }

    /// A handle of `alive`, or one that is none of them.
    pub(crate) fn handle_of(
        &self,
        s: &mut impl Source,
        expect: &mut Expect,
        alive: &[usize],
    ) -> (usize, Option<usize>) {
        if !alive.is_empty() && !s.one_in(WRONG) {
            // The first ones are used the most, so that they come far.
            let most = s.index(alive.len()) + 1;
            let at = s.index(most);
            return (alive[at], Some(at));
        }
        let bit = 1_usize << s.below(64);
        let bad = match s.below(5) {
            0 => 0,
            1 if !self.dead.is_empty() => s.pick(&self.dead),
            2 if !alive.is_empty() => s.pick(alive) ^ bit,
            3 => usize::try_from(s.any_number()).unwrap(),
            _ => {
                let all = self.all_alive();
                if all.is_empty() { 0 } else { s.pick(&all) }
            }
        };
        if let Some(at) = alive.iter().position(|handle| *handle == bad) {
            return (bad, Some(at));
        }
        // A keeper is nobody's to destroy.
        let bad = if self.bases.iter().any(|base| base.keeper == bad) { 0 } else { bad };
        if bad == 0 {
            expect.spoil(VATTN_INVALID_ARGUMENT);
        } else if self.crowd != Crowd::None && !self.dead.contains(&bad) {
            // It may be what another thread was given just now.
            expect.may(VATTN_INVALID_HANDLE);
            expect.may(VATTN_FORKED);
        } else {
            expect.spoil(VATTN_INVALID_HANDLE);
            // A number that says that it is from another process.
            if bad.to_le_bytes()[3] != 0 {
                expect.spoil(VATTN_FORKED);
            }
        }
        (bad, None)
    }

    fn all_alive(&self) -> Vec<usize> {
        let geometries = self.geometries.iter().map(|geometry| geometry.handle);
        let drivers = self.drivers.iter().map(|driver| driver.handle);
        let caches = self.caches.iter().map(|cache| cache.handle);
        let pins = self.pins.iter().map(|pin| pin.handle);
        let buffers = self.buffers.iter().map(|buffer| buffer.handle);
        geometries.chain(drivers).chain(caches).chain(pins).chain(buffers).collect()
    }

    pub(crate) fn geometry(&self, s: &mut impl Source, expect: &mut Expect) -> (usize, Option<usize>) {
        let alive: Vec<_> = self.geometries.iter().map(|geometry| geometry.handle).collect();
        self.handle_of(s, expect, &alive)
    }

    pub(crate) fn driver(&self, s: &mut impl Source, expect: &mut Expect) -> (usize, Option<usize>) {
        let alive: Vec<_> = self.drivers.iter().map(|driver| driver.handle).collect();
        self.handle_of(s, expect, &alive)
    }

    pub(crate) fn cache(&self, s: &mut impl Source, expect: &mut Expect) -> (usize, Option<usize>) {
        let alive: Vec<_> = self.caches.iter().map(|cache| cache.handle).collect();
        self.handle_of(s, expect, &alive)
    }

    /// The same, most often one in which somebody has a slot.
    pub(crate) fn cache_in_use(&self, s: &mut impl Source, expect: &mut Expect) -> (usize, Option<usize>) {
        let used: Vec<_> = (0..self.caches.len()).filter(|at| !self.caches[*at].slots.is_empty()).collect();
        if used.is_empty() || s.one_in(8) {
            return self.cache(s, expect);
        }
        let at = s.pick(&used);
        (self.caches[at].handle, Some(at))
    }

    /// Whether failures are planned in any of those layers.
    pub(crate) fn is_planned(&self, layers: &[usize]) -> bool {
        layers.iter().any(|layer| self.layers[*layer].is_planned)
    }

    /// Whether a cache's driver may refuse anything, or has.
    pub(crate) fn is_lax(&self, cache: usize) -> bool {
        let cache = &self.caches[cache];
        cache.is_lax || self.is_planned(&cache.layers)
    }
}
