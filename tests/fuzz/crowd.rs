//! Several threads at once, and the end of everything.

use vattn::ffi::vattn_status::*;
use vattn::ffi::{self, vattn_live};

use super::room::{Expect, Room};
use super::source::{Given, Seeded, Source};
use super::voice::{STREAMS, call, fire_all, forget, handle, pointer};
use super::world::{Crowd, Driver, World};

impl World {
    /// Two to four threads on the same objects.
    pub(crate) fn crowd(&mut self, s: &mut impl Source) {
        let crowd = if s.one_in(3) { Crowd::Wild } else { Crowd::Apart };
        let shared: Vec<_> =
            (0..2 + s.below(3)).map(|_| (self.shared(crowd), s.word(), 200 + s.below(2000))).collect();
        let threads: Vec<_> = shared
            .into_iter()
            .map(|(world, seed, bytes)| {
                std::thread::spawn(move || {
                    let (mut world, mut s) = (world(), Seeded::new(seed, bytes));
                    while !s.is_over() {
                        world.act(&mut s);
                    }
                    world
                })
            })
            .collect();
        for thread in threads {
            match thread.join() {
                Ok(other) => self.merge(other, crowd),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        self.settle_streams();
        if crowd == Crowd::Wild {
            self.end_all(true);
            return;
        }
        for at in 0..self.caches.len() {
            self.look_over(at);
        }
    }

    /// Takes over what another thread has made and knows.
    fn merge(&mut self, mut other: Self, crowd: Crowd) {
        self.voice.calls += other.voice.calls;
        for (name, by_status) in std::mem::take(&mut other.voice.tally) {
            for (status, count) in by_status {
                *self.voice.tally.entry(name).or_default().entry(status).or_default() += count;
            }
        }
        let (own_bases, own_layers) = (self.bases.len(), self.layers.len());
        // Those that were there before keep their numbers; those that the thread made go behind ours.
        let shared = other.shared_bases.min(own_bases);
        let shared_layers = other.shared_layers.min(own_layers);
        let base = |number: usize| if number < shared { number } else { own_bases + number - shared };
        let layer =
            |number: usize| if number < shared_layers { number } else { own_layers + number - shared_layers };
        self.bases.extend(other.bases.drain(shared..));
        for (own, others) in self.layers.iter_mut().zip(&other.layers[..shared_layers]) {
            own.is_planned |= others.is_planned;
            own.is_leaky |= others.is_leaky;
        }
        self.layers.extend(other.layers.drain(shared_layers..));
        let known: Vec<_> = self.drivers.iter().map(|driver| driver.handle).collect();
        for driver in other.drivers {
            if !known.contains(&driver.handle) {
                let layers = driver.layers.into_iter().map(layer).collect();
                self.drivers.push(Driver { base: base(driver.base), layers, ..driver });
            }
        }
        let known: Vec<_> = self.geometries.iter().map(|geometry| geometry.handle).collect();
        self.geometries
            .extend(other.geometries.into_iter().filter(|geometry| !known.contains(&geometry.handle)));
        for mut cache in other.caches {
            match self.caches.iter_mut().find(|own| own.handle == cache.handle) {
                Some(own) => {
                    own.slots.append(&mut cache.slots);
                    own.past.append(&mut cache.past);
                    own.steps += cache.steps;
                    own.acquired += cache.acquired;
                    own.retired += cache.retired;
                    own.number = own.number.or(cache.number);
                    for (index, generation) in cache.generations {
                        let latest = own.generations.entry(index).or_default();
                        *latest = generation.max(*latest);
                    }
                    own.pending.clear();
                    // Which of the threads' budgets came last is not known.
                    own.budget = u64::MAX;
                    own.is_lax |= cache.is_lax;
                    own.is_unknown |= crowd == Crowd::Wild;
                }
                None => {
                    cache.base = base(cache.base);
                    cache.layers = cache.layers.into_iter().map(layer).collect();
                    self.caches.push(cache);
                }
            }
        }
        for mut buffer in other.buffers {
            buffer.base = base(buffer.base);
            buffer.layers = buffer.layers.into_iter().map(layer).collect();
            buffer.is_unknown = true;
            self.buffers.push(buffer);
        }
        for pin in other.pins.iter_mut() {
            pin.kept.base = base(pin.kept.base);
        }
        for tensor in other.tensors.iter_mut() {
            tensor.kept.base = base(tensor.kept.base);
        }
        self.pins.append(&mut other.pins);
        self.tensors.append(&mut other.tensors);
        self.strings.append(&mut other.strings);
        self.dead.append(&mut other.dead);
        let dead = &self.dead;
        self.geometries.retain(|geometry| !dead.contains(&geometry.handle));
        for layer in 0..self.layers.len() {
            if self.layers[layer].is_planned {
                for cache in self.caches.iter_mut().filter(|cache| cache.layers.contains(&layer)) {
                    cache.is_lax = true;
                }
                for buffer in self.buffers.iter_mut().filter(|buffer| buffer.layers.contains(&layer)) {
                    buffer.is_unknown = true;
                }
            }
        }
    }

    /// No stream is held or captured any more.
    fn settle_streams(&mut self) {
        fire_all();
        for at in 0..self.bases.len() {
            self.bases[at].held.clear();
            self.bases[at].capturing.clear();
            for stream in STREAMS {
                let keeper = self.bases[at].keeper;
                let status = call!(self, vattn_driver_set_capturing(handle(keeper), pointer(stream), 0));
                assert_eq!(status, VATTN_OK);
            }
        }
    }

    /// Destroys everything, some of which others may have destroyed if it was `wild`, and looks whether the
    /// drivers have it all back.
    pub(crate) fn end_all(&mut self, wild: bool) {
        self.settle_streams();
        self.end_pins(2);
        self.end_buffers();
        for cache in std::mem::take(&mut self.caches) {
            let status = call!(self, vattn_cache_destroy(handle(cache.handle)));
            let gone = wild && status == VATTN_INVALID_HANDLE;
            assert!(status == VATTN_OK || gone, "{status:?}: {}", self.voice.last());
            self.dead.push(cache.handle);
        }
        self.end_pins(0);
        for driver in std::mem::take(&mut self.drivers) {
            self.check_driver(&driver);
            let status = call!(self, vattn_driver_destroy(handle(driver.handle)));
            let gone = wild && status == VATTN_INVALID_HANDLE;
            assert!(status == VATTN_OK || gone, "{status:?}: {}", self.voice.last());
            self.dead.push(driver.handle);
        }
        for geometry in std::mem::take(&mut self.geometries) {
            let status = call!(self, vattn_geometry_destroy(handle(geometry.handle)));
            assert!(status == VATTN_OK || (wild && status == VATTN_INVALID_HANDLE), "{status:?}");
            self.dead.push(geometry.handle);
        }
        for base in std::mem::take(&mut self.bases) {
            forget(base.keeper);
            let status = call!(self, vattn_driver_destroy(handle(base.keeper)));
            assert_eq!(status, VATTN_OK);
        }
        self.layers.clear();
    }

    /// Nothing of a driver is alive once its caches are gone.
    fn check_driver(&mut self, driver: &Driver) {
        let leaky = self.layers.iter().any(|layer| layer.is_leaky);
        if driver.layers.is_empty() {
            let [mut free, mut total] =
                [0; 2].map(|_: i32| Room::new::<u64>(&mut Given(&[1]), &mut Expect::default()));
            let status = call!(self, vattn_driver_memory(handle(driver.handle), free.at(), total.at()));
            if status == VATTN_OK && !leaky {
                assert_eq!(free.get::<u64>(), total.get::<u64>(), "all memory is free again");
            }
            return;
        }
        let mut room = Room::new::<vattn_live>(&mut Given(&[1]), &mut Expect::default());
        let status = call!(self, vattn_driver_live(handle(driver.handle), room.at()));
        if status == VATTN_OK && !leaky {
            let live: vattn_live = room.get();
            let counts = [live.handles, live.mappings, live.reservations, live.events];
            assert_eq!(counts, [0; 4], "alive in the end: {live:?}");
        }
    }

    /// The end of a sequence: afterwards no handle of it is alive.
    pub(crate) fn finish(&mut self) {
        for at in 0..self.caches.len() {
            self.look_over(at);
        }
        self.end_all(false);
        for string in std::mem::take(&mut self.strings) {
            let status = call!(self, vattn_string_destroy(handle(string)));
            assert_eq!(status, VATTN_OK);
        }
        let none: vattn::ffi::vattn_log_callback = None;
        assert_eq!(call!(self, vattn_log_set(none, std::ptr::null_mut::<std::ffi::c_void>(), 0)), VATTN_OK);
        for dead in std::mem::take(&mut self.dead) {
            // Beside the count: there are many.
            // SAFETY: a handle may be any number.
            let again = unsafe {
                [
                    ffi::vattn_cache_destroy(handle(dead)),
                    ffi::vattn_driver_destroy(handle(dead)),
                    ffi::vattn_geometry_destroy(handle(dead)),
                    ffi::vattn_pin_destroy(handle(dead)),
                    ffi::vattn_buffer_destroy(handle(dead)),
                ]
            };
            assert_eq!(again, [VATTN_INVALID_HANDLE; 5], "{dead:#x} is alive in the end");
        }
    }
}
