//! Which objects C has, and whether a handle is one of them.
//!
//! Owns a table for each kind of object. A handle is a number in the shape of a pointer, never an
//! address:
//!
//! ```text
//!   │ generation, 32 bits │ forks, 8 bits │ place, 16 bits │ kind, 8 bits │
//! ```
//!
//! A place is used again once its object is gone, with the next generation, so an old handle is known for
//! what it is. `forks` says in which process it was given out: a child of that one may not use it, as
//! the threads and the device that belong to it are not there.
//!
//! A call holds its place for reading, and taking an object away holds it for writing: it waits for the
//! calls under way, while those that come later are refused. Places are made in blocks and never given up.

use std::ops::Deref;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};

use super::buffer::vattn_buffer;
use super::cache::vattn_cache;
use super::driver::{DriverObject, vattn_driver};
use super::entry::Failure;
use super::fork;
use super::geometry::vattn_geometry;
use super::pin::{PinObject, vattn_pin};
use super::status::vattn_status::{
    VATTN_FORKED, VATTN_INVALID_ARGUMENT, VATTN_INVALID_HANDLE, VATTN_UNSUPPORTED,
};
use crate::buffer::Buffer;
use crate::cache::KvCache;
use crate::geometry::Geometry;
use crate::sync::{Leaf, ReadGuard, ReadWrite};

const _: () = assert!(size_of::<usize>() == 8, "a handle has 64 bits");

/// Places of a block, and blocks of a table.
const BLOCK: usize = 64;
const BLOCKS: usize = 1024;

pub(super) static BUFFERS: Handles<vattn_buffer, Arc<Buffer>> = Handles::new(0x42, "vattn_buffer");
pub(super) static CACHES: Handles<vattn_cache, KvCache> = Handles::new(0x4b, "vattn_cache");
pub(super) static DRIVERS: Handles<vattn_driver, DriverObject> = Handles::new(0x44, "vattn_driver");
pub(super) static GEOMETRIES: Handles<vattn_geometry, Geometry> = Handles::new(0x47, "vattn_geometry");
pub(super) static PINS: Handles<vattn_pin, PinObject> = Handles::new(0x50, "vattn_pin");

/// All objects of one kind. `C` is what C calls it, `T` what it is.
pub(super) struct Handles<C, T> {
    kind: u8,
    name: &'static str,
    blocks: [OnceLock<Box<[Place<T>]>>; BLOCKS],
    pub(super) free: Leaf<Free>,
    of: std::marker::PhantomData<fn(*const C)>,
}

pub(super) struct Free {
    places: Vec<u16>,
    /// Places that were never used begin here.
    fresh: u32,
}

struct Place<T> {
    /// The generation that was last destroyed, from the moment on at which that was asked for: later calls
    /// do not get in before the one that waits to take the object away.
    ended: AtomicU32,
    content: ReadWrite<Content<T>>,
}

struct Content<T> {
    generation: u32,
    object: Option<T>,
}

/// An object, there for as long as this is.
pub(super) struct Held<'a, T>(ReadGuard<'a, Content<T>>);

impl<T> Deref for Held<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.0.object.as_ref().expect("it was there when it was looked up, and is held since")
    }
}

impl<C, T> Handles<C, T> {
    const fn new(kind: u8, name: &'static str) -> Self {
        Self {
            kind,
            name,
            blocks: [const { OnceLock::new() }; BLOCKS],
            free: Leaf::new(Free { places: Vec::new(), fresh: 0 }),
            of: std::marker::PhantomData,
        }
    }

    /// Keeps an object, and gives out a handle for it.
    pub(super) fn keep(&self, object: T) -> Result<*mut C, Failure> {
        fork::watch()?;
        // Held until the block is made as well: a fork waits for this lock, and so never sees half of one.
        let mut free = self.free.lock();
        let number = free.take().ok_or_else(|| {
            Failure::new(
                VATTN_UNSUPPORTED,
                format!(
                    "{} objects of type {} are there, which is the limit; destroy some",
                    BLOCK * BLOCKS,
                    self.name
                ),
            )
        })?;
        let (block, within) = (usize::from(number) / BLOCK, usize::from(number) % BLOCK);
        let places = self.blocks[block].get_or_init(|| {
            let content = || ReadWrite::new(Content { generation: 0, object: None });
            (0..BLOCK).map(|_| Place { ended: AtomicU32::new(0), content: content() }).collect()
        });
        drop(free);
        let mut content = places[within].content.write();
        content.generation = content.generation.wrapping_add(1).max(1);
        content.object = Some(object);
        let token = u64::from(content.generation) << 32
            | u64::from(fork::count()) << 24
            | u64::from(number) << 8
            | u64::from(self.kind);
        Ok(std::ptr::without_provenance_mut(usize::from_le_bytes(token.to_le_bytes())))
    }

    /// The object of a handle.
    #[inline]
    pub(super) fn get(&self, handle: *const C) -> Result<Held<'_, T>, Failure> {
        let (place, generation, _) = self.place(handle)?;
        self.held(place, generation)
    }

    /// Takes an object away from its handle, once the calls under way have returned.
    fn take(&self, handle: *const C) -> Result<T, Failure> {
        let (place, generation, number) = self.place(handle)?;
        let held = self.held(place, generation)?;
        if place.ended.swap(generation, Ordering::Relaxed) == generation {
            return Err(self.gone());
        }
        drop(held);
        // Whoever set the generation as ended is alone in taking its object.
        let object = place.content.write().object.take().ok_or_else(|| self.gone())?;
        self.free.lock().places.push(number);
        Ok(object)
    }

    /// Drops an object, once the calls under way have returned. NULL is none, and no error.
    pub(super) fn destroy(&self, handle: *const C) -> Result<(), Failure> {
        if handle.is_null() { Ok(()) } else { self.take(handle).map(drop) }
    }

    #[inline]
    fn held<'a>(&self, place: &'a Place<T>, generation: u32) -> Result<Held<'a, T>, Failure> {
        if place.ended.load(Ordering::Relaxed) == generation {
            return Err(self.gone());
        }
        // Not behind a writer that waits: it may wait for a call that this one is made from.
        let content = place.content.read_recursive();
        if content.generation != generation || content.object.is_none() {
            return Err(self.gone());
        }
        Ok(Held(content))
    }

    #[inline]
    fn place(&self, handle: *const C) -> Result<(&Place<T>, u32, u16), Failure> {
        let [kind, low, high, forks, generation @ ..] = handle.addr().to_le_bytes();
        let number = u16::from_le_bytes([low, high]);
        if kind != self.kind {
            return Err(self.never(handle));
        }
        if forks != fork::count() {
            return Err(self.of_parent());
        }
        let (block, within) = (usize::from(number) / BLOCK, usize::from(number) % BLOCK);
        let Some(places) = self.blocks[block].get() else { return Err(self.never(handle)) };
        Ok((&places[within], u32::from_le_bytes(generation), number))
    }

    #[cold]
    fn never(&self, handle: *const C) -> Failure {
        if handle.is_null() {
            return Failure::new(
                VATTN_INVALID_ARGUMENT,
                format!("the {} is NULL; pass one that was created", self.name),
            );
        }
        Failure::new(
            VATTN_INVALID_HANDLE,
            format!("{handle:p} is no {}; pass what its create function gave out", self.name),
        )
    }

    #[cold]
    fn gone(&self) -> Failure {
        Failure::new(
            VATTN_INVALID_HANDLE,
            format!("the {} has been destroyed; create another, and keep its handle", self.name),
        )
    }

    #[cold]
    fn of_parent(&self) -> Failure {
        Failure::new(
            VATTN_FORKED,
            format!("the {} was made before fork, and this is a child; create another here", self.name),
        )
    }
}

impl Free {
    fn take(&mut self) -> Option<u16> {
        self.places.pop().or_else(|| {
            let place = u16::try_from(self.fresh).ok()?;
            self.fresh += 1;
            Some(place)
        })
    }
}
