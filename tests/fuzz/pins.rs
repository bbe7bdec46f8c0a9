//! Calls about pins, and tensors made of them that are deleted as others would.

use std::ffi::c_void;

use vattn::ffi::vattn_dtype::*;
use vattn::ffi::vattn_status::{self, *};
use vattn::ffi::{vattn_array, vattn_pin_info, vattn_slot};

use super::buffers::Buffer;
use super::contents::{self, View};
use super::room::{Expect, Room, WRONG};
use super::source::Source;
use super::voice::{call, handle};
use super::world::{Crowd, World};

/// What is kept of a cache: the cache may be gone.
#[derive(Clone, Debug)]
pub(crate) struct Kept {
    /// The cache's handle.
    cache: usize,
    pub(crate) base: usize,
    slot: vattn_slot,
    tokens: u64,
    views: Vec<View>,
    /// Where a buffer is, and how long.
    buffer: Option<(usize, u64)>,
}

impl Kept {
    pub(crate) fn of_buffer(buffer: &Buffer) -> Self {
        Self {
            cache: buffer.handle,
            base: buffer.base,
            slot: NO_SLOT,
            tokens: 0,
            views: Vec::new(),
            buffer: Some((buffer.data, buffer.size)),
        }
    }

    /// An array in what is kept: where it is, the bytes of an element, the shape and the strides.
    fn array(&self, s: &mut impl Source) -> Option<(usize, usize, [i64; 3], [i64; 3])> {
        if let Some((data, size)) = self.buffer {
            let rows = i64::try_from(size).unwrap() / 64;
            return Some((data, 1, [rows, 1, 64], [64, 64, 1]));
        }
        (!self.views.is_empty()).then(|| self.views[s.index(self.views.len())].array(self.slot, self.tokens))
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Pin {
    pub(crate) handle: usize,
    pub(crate) kept: Kept,
}

/// A DLPack tensor.
#[derive(Clone, Debug)]
pub(crate) struct Tensor {
    at: usize,
    version: u32,
    data: usize,
    pub(crate) kept: Kept,
}

impl Tensor {
    /// Where a field of it is, which lies elsewhere in each version.
    fn field<T>(&self, at: [usize; 2]) -> *mut T {
        let at = self.at + at[usize::from(self.version == 1)];
        std::ptr::with_exposed_provenance_mut(at)
    }
}

const NO_SLOT: vattn_slot = vattn_slot { index: 0, cache: 0, generation: 0 };

impl World {
    fn pin(&self, s: &mut impl Source, expect: &mut Expect) -> (usize, Option<usize>) {
        let alive: Vec<_> = self.pins.iter().map(|pin| pin.handle).collect();
        self.handle_of(s, expect, &alive)
    }

    /// How many pins there are of a cache.
    pub(crate) fn pins_of(&self, cache: usize) -> usize {
        let kept =
            self.pins.iter().map(|pin| &pin.kept).chain(self.tensors.iter().map(|tensor| &tensor.kept));
        kept.filter(|kept| kept.cache == cache).count()
    }

    /// Whether a cache of that base was destroyed and is kept by pins.
    pub(crate) fn is_kept(&self, base: usize) -> bool {
        let kept =
            self.pins.iter().map(|pin| &pin.kept).chain(self.tensors.iter().map(|tensor| &tensor.kept));
        let mut of_base = kept.filter(|kept| kept.base == base);
        of_base.any(|kept| self.caches.iter().all(|cache| cache.handle != kept.cache))
    }

    pub(crate) fn pin_create(&mut self, s: &mut impl Source) {
        let mut expect = Expect::default();
        let (cache, at) = self.cache_in_use(s, &mut expect);
        let is_slot = !s.one_in(6);
        let slot = self.any_slot(s, at);
        let mut first: *const vattn_slot = if is_slot { &raw const slot } else { std::ptr::null() };
        if s.one_in(WRONG) {
            expect.spoil(VATTN_INVALID_ARGUMENT);
            first = (&raw const slot).cast::<u8>().wrapping_add(1).cast();
        }
        let refusal = at.filter(|_| is_slot).map(|at| self.refusal(at, slot)).unwrap_or_default();
        let strict = if refusal.is_empty() { vec![VATTN_OK] } else { refusal };
        let natural = self.natural(at, is_slot, strict);
        let mut room = Room::new::<usize>(s, &mut expect);
        let status = call!(self, vattn_pin_create(handle(cache), first, room.at()));
        room.check(status);
        self.judge(status, &expect, &natural);
        let (VATTN_OK, Some(at)) = (status, at) else { return };
        let of = &self.caches[at];
        let is_known = self.crowd != Crowd::Wild && !of.is_unknown;
        let tokens = if is_slot { self.held(at, slot) } else { 0 };
        let kept = Kept {
            cache,
            base: of.base,
            slot: if is_slot { slot } else { NO_SLOT },
            tokens,
            views: if is_known { of.views.clone() } else { Vec::new() },
            buffer: None,
        };
        self.pins.push(Pin { handle: room.get(), kept });
    }

    pub(crate) fn pin_describe(&mut self, s: &mut impl Source) {
        let mut expect = Expect::default();
        let (pin, at) = self.pin(s, &mut expect);
        let mut room = Room::sized::<vattn_pin_info>(s, &mut expect);
        let status = call!(self, vattn_pin_describe(handle(pin), room.at()));
        room.check(status);
        self.judge(status, &expect, &[VATTN_OK]);
        if let (VATTN_OK, Some(at)) = (status, at) {
            let (info, kept) = (room.get::<vattn_pin_info>(), &self.pins[at].kept);
            assert!(info.tokens >= kept.tokens || self.crowd == Crowd::Wild, "{info:?} of {kept:?}");
            let is_buffer = kept.buffer.is_some();
            assert!((info.tokens == 0) == (info.bytes == 0) || is_buffer, "{info:?}");
            self.touch(kept);
        }
    }

    /// What is kept can be read, whoever has the slot, and whether there is a cache or not.
    fn touch(&self, kept: &Kept) {
        if self.crowd == Crowd::None {
            contents::touch(&kept.views, kept.slot, kept.tokens);
        }
    }

    pub(crate) fn pin_dlpack(&mut self, s: &mut impl Source) {
        let mut expect = Expect::default();
        let (pin, at) = self.pin(s, &mut expect);
        let view = at.and_then(|at| self.pins[at].kept.array(s));
        // Of a driver that only keeps books, addresses are nobody's.
        let (data, element, mut shape, mut strides) = view.unwrap_or((2, 1, [1; 3], [1; 3]));
        if view.is_none() {
            expect.spoil(VATTN_INVALID_ARGUMENT);
        }
        let dtype = [VATTN_DTYPE_U8, VATTN_DTYPE_F16, VATTN_DTYPE_F32]
            [usize::from(element > 1) + usize::from(element > 2)];
        let mut array = vattn_array {
            struct_size: size_of::<vattn_array>(),
            data: std::ptr::with_exposed_provenance_mut(data),
            #[expect(clippy::as_conversions, reason = "an enum of that representation")]
            dtype: dtype as i32,
            ndim: 3,
            shape: std::ptr::null(),
            strides: std::ptr::null(),
        };
        let (mut version, mut is_shaped) = (s.small(2), true);
        if s.one_in(6) {
            expect.spoil(VATTN_INVALID_ARGUMENT);
            match s.below(9) {
                0 => array.struct_size = s.pick(&[0, 8, 39, usize::MAX]),
                1 => array.dtype = s.no_choice(),
                2 => array.ndim = s.pick(&[9, u32::MAX]),
                3 => is_shaped = false,
                4 => array.data = std::ptr::without_provenance_mut(s.pick(&[0, 4096, usize::MAX])),
                5 => shape[s.index(3)] = -1 - i64::from(s.small(9)),
                6 => strides[s.index(3)] = s.pick(&[-1, i64::MIN]),
                7 => (shape, strides) = ([i64::MAX, 2, 2], [s.pick(&[1, i64::MAX]); 3]),
                _ => version = 2 + s.small(9),
            }
        }
        if is_shaped {
            array.shape = shape.as_ptr();
            array.strides = strides.as_ptr();
        }
        let mut room = Room::new::<*mut c_void>(s, &mut expect);
        let status = call!(self, vattn_pin_dlpack(handle(pin), &raw const array, version, room.at()));
        room.check(status);
        self.judge(status, &expect, &[VATTN_OK]);
        if let (VATTN_OK, Some(at)) = (status, at) {
            let tensor = room.get::<*mut c_void>().expose_provenance();
            let kept = self.pins[at].kept.clone();
            self.tensors.push(Tensor { at: tensor, version, data, kept });
        }
    }

    /// A tensor is given up, by the library's function or as a consumer does.
    pub(crate) fn tensor_delete(&mut self, s: &mut impl Source) {
        if self.tensors.is_empty() || s.one_in(WRONG) {
            let (version, none) = (s.small(4), std::ptr::null_mut::<c_void>());
            let expected = if version > 1 { VATTN_INVALID_ARGUMENT } else { VATTN_OK };
            let status = call!(self, vattn_dlpack_destroy(none, version));
            assert_eq!(status, expected);
            self.voice.begin("vattn_dlpack_capsule_destroy");
            // SAFETY: NULL is no capsule.
            unsafe { vattn::ffi::vattn_dlpack_capsule_destroy(none) };
            self.voice.end("vattn_dlpack_capsule_destroy", VATTN_OK);
            return;
        }
        let tensor = self.tensors.swap_remove(s.index(self.tensors.len()));
        self.touch(&tensor.kept);
        if s.one_in(2) {
            return self.end_tensor(&tensor);
        }
        // SAFETY: the tensor is alive: its data and deleter are where dlpack.h has them.
        unsafe {
            let data: *mut *mut c_void = tensor.field([0, 32]);
            assert_eq!(data.read().addr(), tensor.data);
            let deleter: *mut unsafe extern "C" fn(*mut c_void) = tensor.field([56, 16]);
            self.voice.begin("deleter");
            deleter.read()(tensor.field([0, 0]));
        }
        self.voice.end("deleter", VATTN_OK);
    }

    fn end_tensor(&mut self, tensor: &Tensor) {
        let at: *mut c_void = tensor.field([0, 0]);
        let status = call!(self, vattn_dlpack_destroy(at, tensor.version));
        assert_eq!(status, VATTN_OK);
    }

    pub(crate) fn pin_destroy(&mut self, s: &mut impl Source) {
        let mut expect = Expect::default();
        let (pin, at) = self.pin(s, &mut expect);
        if let Some(at) = at {
            self.touch(&self.pins[at].kept);
        }
        let status: vattn_status = call!(self, vattn_pin_destroy(handle(pin)));
        let expect = if pin == 0 { Expect::default() } else { expect };
        self.judge(status, &expect, &[VATTN_OK]);
        if let Some(at) = at {
            self.pins.swap_remove(at);
            self.dead.push(pin);
        }
    }

    /// Gives up all pins and tensors but so many of each.
    pub(crate) fn end_pins(&mut self, but: usize) {
        for pin in self.pins.split_off(but.min(self.pins.len())) {
            let status = call!(self, vattn_pin_destroy(handle(pin.handle)));
            assert_eq!(status, VATTN_OK, "{}", self.voice.last());
            self.dead.push(pin.handle);
        }
        for tensor in self.tensors.split_off(but.min(self.tensors.len())) {
            self.end_tensor(&tensor);
        }
    }
}
