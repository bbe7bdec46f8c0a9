//! Pins, and arrays over what they keep, as DLPack has them.

use std::ffi::c_void;
use std::sync::Arc;

use super::args;
use super::buffer::vattn_buffer;
use super::cache::{vattn_cache, vattn_slot};
use super::dlpack::{self, Array};
use super::entry::{enter, on_cache, plain};
use super::geometry::element;
use super::handle::{BUFFERS, PINS};
use super::python;
use super::status::vattn_status;
use crate::buffer::Buffer;
use crate::cache::Pin;
use crate::error::Result;
use crate::units::{Bytes, Device, DeviceAddr, TokenCount, index};

/// What keeps memory mapped at its addresses, and addresses reserved.
#[derive(Debug)]
pub struct vattn_pin {
    _opaque: [u8; 0],
}

/// What a pin keeps.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct vattn_pin_info {
    /// `sizeof(vattn_pin_info)`, set by the caller.
    pub struct_size: usize,
    /// Tokens that it keeps backed: those of the slot when it was pinned, and what `tile_tokens` adds.
    pub tokens: u64,
    /// Bytes of physical memory that it keeps in place. Other pins may keep the same. Of a buffer, what it
    /// holds now.
    pub bytes: u64,
}

/// An array in memory.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct vattn_array {
    /// `sizeof(vattn_array)`, set by the caller.
    pub struct_size: usize,
    /// Where its first element is.
    pub data: *mut c_void,
    /// A `vattn_dtype`, of the elements.
    pub dtype: i32,
    /// Its dimensions: 8 at most.
    pub ndim: u32,
    /// Elements along each dimension, none of them negative. NULL with `ndim` 0.
    pub shape: *const i64,
    /// From one element to the next along each dimension, in elements, none of them negative. NULL if they lie
    /// side by side, the last dimension's closest.
    pub strides: *const i64,
}

args::sized!(vattn_pin_info);
args::sized!(vattn_array);

/// A pin of C's: of whichever object it keeps memory of.
#[derive(Clone, Debug)]
pub(super) enum PinObject {
    Cache(Pin),
    /// It keeps the object, whatever is committed in it.
    Buffer(Arc<Buffer>),
}

impl PinObject {
    pub(super) fn tokens(&self) -> TokenCount {
        match self {
            Self::Cache(pin) => pin.tokens(),
            Self::Buffer(_) => TokenCount::ZERO,
        }
    }

    pub(super) fn bytes(&self) -> Bytes {
        match self {
            Self::Cache(pin) => pin.bytes(),
            Self::Buffer(buffer) => buffer.held(),
        }
    }

    pub(super) fn device(&self) -> Device {
        match self {
            Self::Cache(pin) => pin.device(),
            Self::Buffer(buffer) => buffer.device(),
        }
    }

    /// Whether the object reserves these addresses.
    pub(super) fn contains(&self, addr: DeviceAddr, size: Bytes) -> bool {
        match self {
            Self::Cache(pin) => pin.contains(addr, size),
            Self::Buffer(buffer) => buffer.contains(addr, size),
        }
    }
}

/// Pins what backs a slot's tokens now: it stays mapped at its addresses until the pin is destroyed, through
/// retire, truncate, reclaim, trim, a smaller budget, adoption of the slot by another request, and destruction
/// of the cache. With `slot` NULL the addresses of all tensors stay reserved, and no memory is kept.
///
/// Pinned memory counts as mapped, and against the budget. Its contents are not kept: whoever has the slot,
/// or is given it next, writes there.
///
/// Fails with `VATTN_STALE_SLOT`, `VATTN_FOREIGN_SLOT`, `VATTN_SLOT_BUSY`, `VATTN_UNHEALTHY`. Nothing is
/// changed.
///
/// # Safety
/// - `slot` is NULL, or can be read;
/// - `out` is NULL, or a pointer can be written there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_pin_create(
    cache: *const vattn_cache,
    slot: *const vattn_slot,
    out: *mut *mut vattn_pin,
) -> vattn_status {
    on_cache("vattn_pin_create", cache, |cache| {
        // SAFETY: as the caller promises.
        let (slot, out) =
            unsafe { (args::slice("slot", slot, usize::from(!slot.is_null()))?, args::out("out", out)?) };
        let pin = match slot.first() {
            Some(slot) => cache.pin((*slot).into())?,
            None => cache.pin_addresses(),
        };
        out.set(PINS.keep(PinObject::Cache(pin))?);
        Ok(())
    })
}

/// Pins a buffer: its addresses, and what is committed in it, last until the pin is destroyed, though the
/// buffer is destroyed before. Decommitting works as ever: whoever has the buffer says what of it is wanted.
///
/// # Safety
/// - `out` is NULL, or a pointer can be written there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_pin_create_buffer(
    buffer: *const vattn_buffer,
    out: *mut *mut vattn_pin,
) -> vattn_status {
    enter("vattn_pin_create_buffer", || {
        let buffer = BUFFERS.get(buffer)?;
        // SAFETY: as the caller promises.
        let out = unsafe { args::out("out", out) }?;
        out.set(PINS.keep(PinObject::Buffer(Arc::clone(&buffer)))?);
        Ok(())
    })
}

/// What a pin keeps.
///
/// # Safety
/// - `out` is NULL, or points to a `vattn_pin_info` of which `struct_size` is set.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_pin_describe(pin: *const vattn_pin, out: *mut vattn_pin_info) -> vattn_status {
    enter("vattn_pin_describe", || {
        let pin = PINS.get(pin)?;
        // SAFETY: as the caller promises.
        let out = unsafe { args::out_sized("out", out) }?;
        out.set(vattn_pin_info { struct_size: 0, tokens: pin.tokens().get(), bytes: pin.bytes().get() });
        Ok(())
    })
}

/// Makes a DLPack tensor of an array that lies in what the pin's object reserves. With `version_major` 0 it is
/// a `DLManagedTensor`, with 1 a `DLManagedTensorVersioned`. It is a pin of its own: the array's memory is kept
/// as this pin keeps it until the tensor's deleter is called, which any thread may do, with no lock held. After
/// `fork` a deleter does nothing in the child.
///
/// Whether there is memory behind the array is not asked: what was not stepped to has none.
///
/// Fails with `VATTN_INVALID_ARGUMENT` for an array that reaches beyond what is reserved, numbers that make no
/// array (`data` is a multiple of an element's bytes), and a version that is neither.
///
/// # Safety
/// - `array` is NULL, or can be read, with `ndim` values at `shape` and, unless it is NULL, at `strides`;
/// - `out` is NULL, or a pointer can be written there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_pin_dlpack(
    pin: *const vattn_pin,
    array: *const vattn_array,
    version_major: u32,
    out: *mut *mut c_void,
) -> vattn_status {
    enter("vattn_pin_dlpack", || {
        let pin = PINS.get(pin)?;
        // SAFETY: as the caller promises.
        let (array, out) = unsafe { (read(array)?, args::out("out", out)?) };
        let (first, size) = array.range()?;
        if !pin.contains(first, size) {
            return Err(args::invalid(format!(
                "the array takes {size} from {:p} on, and that is not in one range that the pin's object reserves; take \
                 data, shape and strides from a view",
                array.data()
            ))
            .into());
        }
        out.set(dlpack::make(array, pin.clone(), version_major)?);
        Ok(())
    })
}

/// Calls the deleter of a tensor that `vattn_pin_dlpack` made with the same `version_major`, and that nobody
/// has taken over. NULL is no error.
///
/// # Safety
/// - `tensor` is NULL, or one that `vattn_pin_dlpack` made, whose deleter was not called.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_dlpack_destroy(tensor: *mut c_void, version_major: u32) -> vattn_status {
    enter("vattn_dlpack_destroy", || {
        // SAFETY: as the caller promises.
        unsafe { dlpack::destroy(tensor, version_major) }
    })
}

/// The destructor of a Python capsule that has a tensor of `vattn_pin_dlpack`, for `PyCapsule_New`: deletes the
/// tensor, unless a consumer has taken it over and renamed the capsule. NULL is no error.
///
/// # Safety
/// - `capsule` is NULL, or Python's, and the thread holds the interpreter's lock.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_dlpack_capsule_destroy(capsule: *mut c_void) {
    plain((), || {
        // SAFETY: as the caller promises.
        unsafe { python::destroy_capsule(capsule) }
    })
}

/// Gives a pin up: what it alone kept holds nobody's tokens from now on, and is unmapped as what a retired slot
/// leaves is, after the fences that were given for it. The device is done with what was launched on it, unless
/// a fence that is given later covers that. Of a cache that was destroyed it is given back here, and what was
/// left of the cache goes with its last pin, as does a buffer that was destroyed. NULL is no error.
///
/// # Safety
/// - any handle may be passed; one that is not alive is refused;
/// - no kernel that is not covered by a fence still uses the memory.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_pin_destroy(pin: *mut vattn_pin) -> vattn_status {
    enter("vattn_pin_destroy", || PINS.destroy(pin))
}

/// # Safety
/// - `array` is NULL, or can be read, with `ndim` values at `shape` and, unless it is NULL, at `strides`.
unsafe fn read(array: *const vattn_array) -> Result<Array> {
    // SAFETY: as the caller promises.
    let array = unsafe { args::sized_in("array", array) }?;
    if array.ndim > dlpack::MOST_DIMENSIONS {
        return Err(args::invalid(format!(
            "array->ndim is {}, and {} is the limit; use fewer dimensions",
            array.ndim,
            dlpack::MOST_DIMENSIONS
        )));
    }
    let ndim = index(array.ndim);
    // SAFETY: as the caller promises.
    let (shape, strides) = unsafe {
        let strides = if array.strides.is_null() { 0 } else { ndim };
        (
            args::slice("array->shape", array.shape, ndim)?,
            args::slice("array->strides", array.strides, strides)?,
        )
    };
    let strides = (!array.strides.is_null()).then_some(strides);
    Array::new(array.data, element("array->dtype", array.dtype)?, shape, strides)
}
