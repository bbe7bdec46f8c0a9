//! Random calls of the C ABI, and what has to be true of them.
//!
//! [`play`] turns a stream of choices into calls of every function of `vattn::ffi`, with arguments that are
//! right two times out of three and wrong in every way that a C caller may be wrong without undefined
//! behaviour. A plain model predicts what each call comes to:
//!
//! | file | what it answers |
//! |---|---|
//! | `source.rs` | where choices come from: a seed, or a fuzzer's bytes |
//! | `voice.rs` | what holds for every call: the last error, the count, the watch on calls that hang |
//! | `room.rs` | outputs that must stay untouched; what is wrong with a call's arguments |
//! | `world.rs` | the model, and the verdict on a call |
//! | `objects.rs`, `drivers.rs`, `making.rs`, `slots.rs`, `pins.rs`, `buffers.rs`, `asking.rs` | the calls |
//! | `contents.rs` | whose bytes are where |
//! | `crowd.rs` | several threads at once, and the end of everything |

mod asking;
mod buffers;
mod contents;
mod crowd;
mod drivers;
mod making;
mod objects;
mod pins;
mod room;
mod slots;
mod source;
pub(crate) mod voice;
mod world;

pub(crate) use source::*;
pub(crate) use voice::Tally;
use world::World;

/// What sequences may be made of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Options {
    /// Whether several threads make calls at once, now and then.
    pub(crate) threads: bool,
}

/// Makes calls until the source is used up, then destroys everything and looks whether nothing is left.
pub(crate) fn play(s: &mut impl Source, options: Options) -> (Tally, u64) {
    let mut world = World::new();
    for _ in 0..2 {
        world.geometry_create(s);
        world.driver_create(s);
    }
    world.cache_create(s);
    world.cuda(s);
    while !s.is_over() {
        world.act(s);
        if options.threads && s.one_in(300) {
            world.crowd(s);
        }
    }
    world.finish();
    let calls = world.voice.calls;
    (std::mem::take(&mut world.voice.tally), calls)
}

impl World {
    /// One call, or a few that belong together.
    pub(crate) fn act(&mut self, s: &mut impl Source) {
        if self.caches.len() < 2 && s.one_in(4) {
            match (self.geometries.is_empty(), self.drivers.len() < 2) {
                (true, _) => self.geometry_create(s),
                (false, true) => self.driver_create(s),
                (false, false) => self.cache_create(s),
            }
            return;
        }
        let is_unused = self.caches.iter().all(|cache| cache.slots.is_empty());
        match s.below(160) {
            53..=108 if is_unused && !s.one_in(16) => self.acquire(s),
            0..=3 => self.library(s),
            4..=6 if self.geometries.len() < 5 => self.geometry_create(s),
            4..=9 => self.geometry_ask(s),
            10 => self.geometry_destroy(s),
            11..=12 if self.drivers.len() < 7 => self.driver_create(s),
            11..=15 => self.driver_ask(s),
            16 if self.drivers.len() < 9 => self.driver_checked(s),
            16..=17 if s.one_in(3) => self.driver_destroy(s),
            16..=17 => self.driver_ask(s),
            18..=19 if self.layers.is_empty() => self.driver_checked(s),
            18..=19 => self.driver_fail(s),
            20..=25 => self.stream_ask(s),
            26..=27 => self.config_init(s),
            28..=29 => self.layout_plan(s),
            30..=34 if self.caches.len() < 5 => self.cache_create(s),
            30..=35 => self.cache_ask(s),
            36 if s.one_in(3) => self.cache_destroy(s),
            36 => self.view(s),
            37..=48 => self.acquire(s),
            49..=52 => self.retire(s),
            53..=84 => self.step(s),
            85..=88 => self.fits(s),
            89..=91 => self.admits(s),
            92..=95 => self.prefetch(s),
            96..=100 => self.truncate(s),
            101..=108 => self.retire(s),
            109..=112 => self.give_up(s),
            113..=114 => self.set_budget(s),
            115..=118 => self.tend(s),
            119 => self.flush(s),
            120..=123 => self.view(s),
            128..=131 if self.pins.len() < 12 => self.pin_create(s),
            128..=132 => self.pin_destroy(s),
            133..=134 => self.pin_describe(s),
            135..=137 if self.tensors.len() < 12 => self.pin_dlpack(s),
            135..=139 => self.tensor_delete(s),
            140..=155 if self.buffers.is_empty() && !s.one_in(8) => self.buffer_create(s),
            140..=142 if self.buffers.len() < 6 => self.buffer_create(s),
            140..=149 => self.buffer_commit(s),
            150..=155 => self.buffer_decommit(s),
            156..=157 => self.buffer_describe(s),
            158 if self.pins.len() < 12 => self.buffer_pin(s),
            158..=159 if s.one_in(3) => self.buffer_destroy(s),
            _ => self.cache_ask(s),
        }
    }
}
