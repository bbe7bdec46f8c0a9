//! Arrays over pinned memory as DLPack's structs.
//!
//! Owns those structs, what an array may look like, and the deleter, which is all that a consumer calls of
//! this library. Their layout and the numbers of types are those of `dlpack.h` 1.1 (github.com/dmlc/dlpack);
//! the 8-bit floats came with 1.1, all else with 1.0 and before. Device types have the numbers that the C ABI
//! uses.

use std::ffi::c_void;
use std::mem::ManuallyDrop;

use super::args;
use super::driver;
use super::entry::{Failure, in_callback, plain};
use super::fork;
use super::log;
use super::pin::PinObject;
use super::python;
use super::status::vattn_status::VATTN_FORKED;
use crate::error::Result;
use crate::geometry::Dtype;
use crate::units::{Bytes, DeviceAddr, wide};

/// As many as a tensor's shape has room for.
pub(super) const MOST_DIMENSIONS: u32 = 8;

type Dimensions = [i64; crate::units::index(MOST_DIMENSIONS)];

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
pub(super) struct Device {
    pub(super) device_type: i32,
    pub(super) device_id: i32,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
pub(super) struct DataType {
    pub(super) code: u8,
    pub(super) bits: u8,
    pub(super) lanes: u16,
}

/// `DLTensor`
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(super) struct Tensor {
    pub(super) data: *mut c_void,
    pub(super) device: Device,
    pub(super) ndim: i32,
    pub(super) dtype: DataType,
    pub(super) shape: *mut i64,
    pub(super) strides: *mut i64,
    pub(super) byte_offset: u64,
}

type Deleter<M> = unsafe extern "C" fn(*mut M);

/// `DLManagedTensor`
#[derive(Debug)]
#[repr(C)]
pub(super) struct Managed {
    pub(super) tensor: Tensor,
    pub(super) context: *mut c_void,
    pub(super) deleter: Option<Deleter<Self>>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
pub(super) struct Version {
    pub(super) major: u32,
    pub(super) minor: u32,
}

/// `DLManagedTensorVersioned`
#[derive(Debug)]
#[repr(C)]
pub(super) struct Versioned {
    pub(super) version: Version,
    pub(super) context: *mut c_void,
    pub(super) deleter: Option<Deleter<Self>>,
    pub(super) flags: u64,
    pub(super) tensor: Tensor,
}

/// One of the two.
trait Form: Sized {
    fn new(tensor: Tensor, context: *mut c_void) -> Self;
    fn context(&self) -> *mut c_void;
    fn deleter(&self) -> Option<Deleter<Self>>;
}

impl Form for Managed {
    fn new(tensor: Tensor, context: *mut c_void) -> Self {
        Self { tensor, context, deleter: Some(delete::<Self>) }
    }

    fn context(&self) -> *mut c_void {
        self.context
    }

    fn deleter(&self) -> Option<Deleter<Self>> {
        self.deleter
    }
}

impl Form for Versioned {
    fn new(tensor: Tensor, context: *mut c_void) -> Self {
        let minor = u32::from(tensor.dtype.code > CODE_BFLOAT);
        let version = Version { major: 1, minor };
        Self { version, context, deleter: Some(delete::<Self>), flags: 0, tensor }
    }

    fn context(&self) -> *mut c_void {
        self.context
    }

    fn deleter(&self) -> Option<Deleter<Self>> {
        self.deleter
    }
}

const CODE_INT: u8 = 0;
const CODE_UINT: u8 = 1;
const CODE_FLOAT: u8 = 2;
const CODE_BFLOAT: u8 = 4;
const CODE_FLOAT8_E4M3FN: u8 = 10;
const CODE_FLOAT8_E5M2: u8 = 12;

fn data_type(dtype: Dtype) -> DataType {
    let (code, bits) = match dtype {
        Dtype::F32 => (CODE_FLOAT, 32),
        Dtype::F16 => (CODE_FLOAT, 16),
        Dtype::BF16 => (CODE_BFLOAT, 16),
        Dtype::F8E4M3 => (CODE_FLOAT8_E4M3FN, 8),
        Dtype::F8E5M2 => (CODE_FLOAT8_E5M2, 8),
        Dtype::I8 => (CODE_INT, 8),
        Dtype::U8 => (CODE_UINT, 8),
    };
    DataType { code, bits, lanes: 1 }
}

/// An array whose numbers make sense; where it lies is for others to say.
#[derive(Clone, Copy, Debug)]
pub(super) struct Array {
    data: *mut c_void,
    dtype: Dtype,
    dimensions: usize,
    shape: Dimensions,
    strides: Dimensions,
}

impl Array {
    /// Of as many dimensions as `shape` has, which are no more than may be. Without strides its elements lie
    /// side by side.
    pub(super) fn new(
        data: *mut c_void,
        dtype: Dtype,
        shape: &[i64],
        strides: Option<&[i64]>,
    ) -> Result<Self> {
        let mut array = Self {
            data,
            dtype,
            dimensions: shape.len(),
            shape: Dimensions::default(),
            strides: Dimensions::default(),
        };
        for (name, from, to) in
            [("shape", Some(shape), &mut array.shape), ("strides", strides, &mut array.strides)]
        {
            let from = from.unwrap_or_default();
            if let Some(at) = from.iter().position(|number| *number < 0) {
                return Err(args::invalid(format!(
                    "array->{name}[{at}] is {}; pass 0 or more: an array lies behind its data",
                    from[at]
                )));
            }
            to[..from.len()].copy_from_slice(from);
        }
        if strides.is_none() {
            let mut stride = 1_i64;
            for (to, along) in array.strides.iter_mut().zip(shape).rev() {
                *to = stride;
                stride = stride.checked_mul((*along).max(1)).ok_or_else(|| array_too_large(shape))?;
            }
        }
        let element = dtype.bytes().get();
        if !wide(data.addr()).is_multiple_of(element) {
            return Err(args::invalid(format!(
                "array->data is {data:p}, not a multiple of {element}, the bytes of its element"
            )));
        }
        Ok(array)
    }

    pub(super) fn data(&self) -> *mut c_void {
        self.data
    }

    /// The addresses from its first byte to its last.
    pub(super) fn range(&self) -> Result<(DeviceAddr, Bytes)> {
        let first = DeviceAddr::new(wide(self.data.addr()));
        let shape = &self.shape[..self.dimensions];
        if shape.contains(&0) {
            return Ok((first, Bytes::ZERO));
        }
        let last = shape
            .iter()
            .zip(&self.strides)
            .try_fold(0_i64, |last, (along, stride)| last.checked_add((along - 1).checked_mul(*stride)?));
        let size = last
            .and_then(|last| u64::try_from(last).ok()?.checked_add(1)?.checked_mul(self.dtype.bytes().get()))
            .ok_or_else(|| array_too_large(shape))?;
        Ok((first, Bytes::new(size)))
    }
}

#[cold]
fn array_too_large(shape: &[i64]) -> crate::error::Error {
    args::invalid(format!(
        "an array of the shape {shape:?} takes more bytes than there are addresses; take shape and strides from a view"
    ))
}

/// A tensor with all that it points to, and what keeps its memory.
#[repr(C)]
struct Kept<M> {
    managed: M,
    shape: Dimensions,
    strides: Dimensions,
    /// The forks before the process that made it.
    forks: u8,
    pin: PinObject,
}

/// Makes a tensor that is a pin of its own.
pub(super) fn make(array: Array, pin: PinObject, version_major: u32) -> Result<*mut c_void> {
    match version_major {
        0 => Ok(make_as::<Managed>(array, pin).cast()),
        1 => Ok(make_as::<Versioned>(array, pin).cast()),
        _ => Err(unknown(version_major)),
    }
}

#[cold]
fn unknown(version_major: u32) -> crate::error::Error {
    args::invalid(format!(
        "version_major is {version_major}; 0 is for a DLManagedTensor, 1 for a DLManagedTensorVersioned"
    ))
}

fn make_as<M: Form>(array: Array, pin: PinObject) -> *mut M {
    let Array { data, dtype, dimensions, shape, strides } = array;
    let (device_type, device_id) = driver::device(pin.device());
    let kept = Box::into_raw(Box::<Kept<M>>::new_uninit());
    // SAFETY: the memory was just allocated for a `Kept<M>` and is nobody else's; its fields are written
    // before it is anybody's, and none is read here.
    unsafe {
        let kept = kept.cast::<Kept<M>>();
        let tensor = Tensor {
            data,
            device: Device { device_type, device_id },
            ndim: i32::try_from(dimensions).expect("there are a few dimensions"),
            dtype: data_type(dtype),
            shape: (&raw mut (*kept).shape).cast(),
            strides: (&raw mut (*kept).strides).cast(),
            byte_offset: 0,
        };
        let managed = M::new(tensor, kept.cast());
        kept.write(Kept { managed, shape, strides, forks: fork::count(), pin });
        &raw mut (*kept).managed
    }
}

/// What a consumer calls once it is done.
///
/// # Safety
/// - `managed` is NULL, or was made by [`make_as`] and not deleted.
unsafe extern "C" fn delete<M: Form>(managed: *mut M) {
    plain((), || {
        if managed.is_null() {
            return;
        }
        // SAFETY: as the caller promises, it is alive, and its context is the allocation that it is part of.
        let kept = unsafe {
            let kept = (*managed).context().cast::<Kept<M>>();
            // The driver of the parent, and the threads that may hold its locks, are not in a child.
            if (*kept).forks != fork::count() {
                return;
            }
            Box::from_raw(kept)
        };
        let pin = kept.pin;
        let awaited = log::is_heard() && python::holds_lock();
        if !in_callback() && !awaited {
            return drop(pin);
        }
        // Giving the pin up takes locks of the cache. This thread may hold them; or another one does, in a log
        // callback, and waits for the interpreter's lock, which this thread holds.
        let pin = ManuallyDrop::new(pin);
        let given_up = std::thread::Builder::new().spawn(move || drop(ManuallyDrop::into_inner(pin)));
        if let Err(error) = given_up {
            tracing::error!(%error, "no thread could be started to give up a pin: its memory stays");
        }
    });
}

/// Deletes a tensor that nobody has taken over.
///
/// # Safety
/// - `tensor` is NULL, or was made by [`make`] with that version, and not deleted.
pub(super) unsafe fn destroy(tensor: *mut c_void, version_major: u32) -> Result<(), Failure> {
    // SAFETY: as the caller promises.
    unsafe {
        match version_major {
            0 => destroy_as::<Managed>(tensor.cast()),
            1 => destroy_as::<Versioned>(tensor.cast()),
            _ => Err(unknown(version_major).into()),
        }
    }
}

/// # Safety
/// - `managed` is NULL, or was made by [`make_as`] and not deleted.
unsafe fn destroy_as<M: Form>(managed: *mut M) -> Result<(), Failure> {
    if managed.is_null() {
        return Ok(());
    }
    if !managed.is_aligned() {
        return Err(args::invalid(format!(
            "the tensor is {managed:p}, which is no address of one; pass what vattn_pin_dlpack gave"
        ))
        .into());
    }
    // SAFETY: as the caller promises, it is alive.
    unsafe {
        let kept = (*managed).context().cast::<Kept<M>>();
        if (*kept).forks != fork::count() {
            return Err(Failure::new(
                VATTN_FORKED,
                "the tensor was made before fork, and this is a child; leave it",
            ));
        }
        if let Some(deleter) = (*managed).deleter() {
            deleter(managed);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::mem::{align_of, offset_of, size_of};

    use super::*;

    #[test]
    fn the_structs_lie_as_dlpack_h_has_them() {
        assert_eq!((size_of::<Tensor>(), align_of::<Tensor>()), (48, 8));
        let offsets = [
            offset_of!(Tensor, data),
            offset_of!(Tensor, device),
            offset_of!(Tensor, ndim),
            offset_of!(Tensor, dtype),
            offset_of!(Tensor, shape),
            offset_of!(Tensor, strides),
            offset_of!(Tensor, byte_offset),
        ];
        assert_eq!(offsets, [0, 8, 16, 20, 24, 32, 40]);
        assert_eq!(
            (offset_of!(DataType, code), offset_of!(DataType, bits), offset_of!(DataType, lanes)),
            (0, 1, 2)
        );
        assert_eq!((offset_of!(Device, device_type), offset_of!(Device, device_id)), (0, 4));
        assert_eq!(
            (size_of::<Managed>(), offset_of!(Managed, context), offset_of!(Managed, deleter)),
            (64, 48, 56)
        );
        let offsets = [
            offset_of!(Versioned, version),
            offset_of!(Versioned, context),
            offset_of!(Versioned, deleter),
            offset_of!(Versioned, flags),
            offset_of!(Versioned, tensor),
        ];
        assert_eq!((size_of::<Versioned>(), offsets), (80, [0, 8, 16, 24, 32]));
    }

    #[test]
    fn types_have_their_numbers() {
        let numbers: Vec<_> =
            Dtype::ALL.into_iter().map(data_type).map(|dtype| (dtype.code, dtype.bits)).collect();
        assert_eq!(numbers, [(2, 32), (2, 16), (4, 16), (10, 8), (12, 8), (0, 8), (1, 8)]);
    }

    fn array(addr: usize, shape: &[i64], strides: Option<&[i64]>) -> Result<Array> {
        Array::new(std::ptr::without_provenance_mut(addr), Dtype::BF16, shape, strides)
    }

    fn size(shape: &[i64], strides: Option<&[i64]>) -> u64 {
        array(4096, shape, strides).unwrap().range().unwrap().1.get()
    }

    #[test]
    fn an_array_ends_with_its_last_element() {
        assert_eq!(size(&[], None), 2);
        assert_eq!(size(&[3, 4], None), 24);
        assert_eq!(array(4096, &[3, 4, 5], None).unwrap().strides[..3], [20, 5, 1]);
        assert_eq!(size(&[3, 4], Some(&[100, 1])), 2 * (2 * 100 + 4));
        assert_eq!(size(&[3, 4], Some(&[0, 0])), 2);
        assert_eq!(size(&[3, 0, 4], None), 0);
    }

    #[test]
    fn numbers_that_make_no_array_are_refused() {
        for (addr, shape, strides, words) in [
            (4096, vec![3, -1], None, "shape[1] is -1"),
            (4096, vec![3, 1], Some(vec![-4, 1]), "strides[0] is -4"),
            (4097, vec![3], None, "multiple of 2"),
            (4096, vec![i64::MAX, 2], None, "more bytes than"),
            (4096, vec![i64::MAX, 3], Some(vec![i64::MAX, 1]), "more bytes than"),
            (4096, vec![i64::MAX], Some(vec![1]), ""),
        ] {
            let result = array(addr, &shape, strides.as_deref()).and_then(|array| array.range());
            match result {
                Err(error) => assert!(!words.is_empty() && error.to_string().contains(words), "{error}"),
                // 2^64 - 2 bytes: a number, though no place has so much.
                Ok((_, size)) => assert!(words.is_empty() && size.get() == u64::MAX - 1),
            }
        }
    }
}
