//! How pointers, arrays, strings, numbers and sized structs of C are read and written.
//!
//! Every message names the argument, its value and its limit. An output is written through [`Out`] and
//! only where nothing can fail any more.

use std::ffi::{CStr, c_char};
use std::mem::MaybeUninit;

use crate::error::{Error, ErrorKind, Result};

/// Beyond any struct of this library: a size that was never set.
const MOST: usize = 1 << 16;

#[cold]
pub(super) fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidArgument, message)
}

fn check<T>(name: &str, pointer: *const T) -> Result<()> {
    if pointer.is_null() {
        return Err(invalid(format!("{name} is NULL; pass the address of one")));
    }
    if !pointer.is_aligned() {
        return Err(invalid(format!(
            "{name} is {pointer:p}, not a multiple of {}, its alignment",
            align_of::<T>()
        )));
    }
    Ok(())
}

fn check_array<T>(name: &str, first: *const T, count: usize) -> Result<()> {
    if first.is_null() {
        return Err(invalid(format!(
            "{name} is NULL and its count is {count}; pass an array, or a count of 0"
        )));
    }
    check(name, first)?;
    if count.checked_mul(size_of::<T>()).is_none_or(|bytes| bytes > isize::MAX.unsigned_abs()) {
        return Err(invalid(format!(
            "{name} has {count} elements of {} bytes, and an array can have 2^63 bytes; pass its real count",
            size_of::<T>()
        )));
    }
    Ok(())
}

/// An array that is read. NULL is one of none.
///
/// # Safety
/// - where `first` is neither NULL nor misaligned, `count` elements can be read there while `'a` lasts.
pub(super) unsafe fn slice<'a, T>(name: &str, first: *const T, count: usize) -> Result<&'a [T]> {
    if count == 0 {
        return Ok(&[]);
    }
    check_array(name, first, count)?;
    // SAFETY: not NULL, aligned, of a possible size, and readable as the caller promises.
    Ok(unsafe { std::slice::from_raw_parts(first, count) })
}

/// An array that is written. NULL is one of none.
///
/// # Safety
/// - where `first` is neither NULL nor misaligned, `count` elements can be written there while `'a`
///   lasts, and nobody else uses them.
pub(super) unsafe fn slice_mut<'a, T>(
    name: &str,
    first: *mut T,
    count: usize,
) -> Result<&'a mut [MaybeUninit<T>]> {
    if count == 0 {
        return Ok(&mut []);
    }
    check_array(name, first, count)?;
    // SAFETY: not NULL, aligned, of a possible size, and writable as the caller promises.
    Ok(unsafe { std::slice::from_raw_parts_mut(first.cast(), count) })
}

/// A string.
///
/// # Safety
/// - where `text` is not NULL, it ends with a NUL, and nobody writes to it while `'a` lasts.
pub(super) unsafe fn text<'a>(name: &str, text: *const c_char) -> Result<&'a str> {
    if text.is_null() {
        return Err(invalid(format!("{name} is NULL; pass a string that ends with a NUL")));
    }
    // SAFETY: not NULL, and ends with a NUL as the caller promises.
    let text = unsafe { CStr::from_ptr(text) };
    text.to_str()
        .map_err(|error| invalid(format!("{name} is not UTF-8 from byte {} on", error.valid_up_to())))
}

/// An enum of C. It never arrives as one: a number does, and is looked up.
pub(super) trait Numbered: Copy {
    const NAME: &'static str;
    fn number(self) -> i32;
}

macro_rules! numbered {
    ($name:ident) => {
        impl $crate::ffi::args::Numbered for $name {
            const NAME: &'static str = stringify!($name);

            fn number(self) -> i32 {
                #[expect(clippy::as_conversions, reason = "an enum of that representation")]
                {
                    self as i32
                }
            }
        }
    };
}
pub(super) use numbered;

/// What a number stands for among the values of an enum.
pub(super) fn choice<E: Numbered, T: Copy>(name: &str, value: i32, choices: &[(E, T)]) -> Result<T> {
    choices.iter().find(|(number, _)| number.number() == value).map(|(_, choice)| *choice).ok_or_else(|| {
        let known: Vec<_> = choices.iter().map(|(number, _)| number.number().to_string()).collect();
        invalid(format!(
            "{name} is {value}, and the values of {} are {}; use their names",
            E::NAME,
            known.join(", ")
        ))
    })
}

/// A truth.
pub(super) fn flag(name: &str, value: u32) -> Result<bool> {
    match value {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(invalid(format!("{name} is {value}; use 0 for no, 1 for yes"))),
    }
}

/// A field that a later version may give a meaning.
pub(super) fn unused(name: &str, value: u32) -> Result<()> {
    if value == 0 { Ok(()) } else { Err(invalid(format!("{name} is {value}; leave it 0"))) }
}

/// A place for an output, checked before anything is done, and written when all is.
#[must_use]
pub(super) struct Out<T>(*mut T);

impl<T> Out<T> {
    pub(super) fn set(self, value: T) {
        // SAFETY: it was checked when this was made, and whoever made it promised that it can be written
        // until the call returns.
        unsafe { self.0.write(value) }
    }
}

/// # Safety
/// - where `place` is neither NULL nor misaligned, a `T` can be written there until the call returns.
pub(super) unsafe fn out<T>(name: &str, place: *mut T) -> Result<Out<T>> {
    check(name, place)?;
    Ok(Out(place))
}

/// A struct of C that begins with its own size, so that later versions of it can have more fields.
///
/// # Safety
/// - `repr(C)`, and the first field is a `usize`, its size;
/// - made of integers, pointers and arrays of them, for all of which all bits zero is a value.
pub(super) unsafe trait Sized: Copy {
    /// Its size in this version of the library.
    const SIZE: usize = size_of::<Self>();
    /// Its size in the version that first had it.
    const LEAST: usize;
    const NAME: &'static str;
}

macro_rules! sized {
    ($name:ident) => {
        // SAFETY: every struct that this is said of begins with `struct_size` and has plain fields alone.
        unsafe impl $crate::ffi::args::Sized for $name {
            const LEAST: usize = size_of::<Self>();
            const NAME: &'static str = stringify!($name);
        }
    };
}
pub(super) use sized;

/// The size that a struct states.
///
/// # Safety
/// - where `place` is neither NULL nor misaligned, its size can be read there.
unsafe fn stated<T: Sized>(name: &str, place: *const T) -> Result<usize> {
    check(name, place)?;
    // SAFETY: not NULL, aligned, and the first field is the size, as the trait asks.
    let size = unsafe { place.cast::<usize>().read() };
    if (T::LEAST..=MOST).contains(&size) {
        return Ok(size);
    }
    Err(invalid(format!(
        "{name}->struct_size is {size}, and {} has {} bytes; set it to sizeof({})",
        T::NAME,
        T::SIZE,
        T::NAME
    )))
}

/// A struct that is read, of this version's size. What an older caller's lacks is zero, which stands for
/// the default of every field that came later.
///
/// # Safety
/// - where `place` is neither NULL nor misaligned, as many bytes can be read there as its size states.
pub(super) unsafe fn sized_in<T: Sized>(name: &str, place: *const T) -> Result<T> {
    // SAFETY: as the caller promises.
    let size = unsafe { stated(name, place) }?;
    let known = size.min(T::SIZE);
    // SAFETY: readable as the caller promises, and of a possible size.
    let bytes = unsafe { std::slice::from_raw_parts(place.cast::<u8>(), size) };
    if let Some(at) = bytes[known..].iter().position(|&byte| byte != 0) {
        return Err(invalid(format!(
            "byte {} of {name} is set, and this version of the library knows {} of them: it is older than the header \
             that the program was built with; use a newer one, or leave the field zero",
            known + at,
            T::SIZE
        )));
    }
    // SAFETY: all zero is a value of every field, as the trait asks; `known` bytes fit both.
    unsafe {
        let mut value = MaybeUninit::<T>::zeroed();
        std::ptr::copy_nonoverlapping(place.cast::<u8>(), value.as_mut_ptr().cast::<u8>(), known);
        Ok(value.assume_init())
    }
}

/// A place for a struct that begins with its size.
#[must_use]
pub(super) struct OutSized<T> {
    place: *mut T,
    size: usize,
}

impl<T: Sized> OutSized<T> {
    /// Writes what fits; what the caller's has more is set to zero, and its size stays.
    pub(super) fn set(self, value: T) {
        let known = self.size.min(T::SIZE);
        let place = self.place.cast::<u8>();
        // SAFETY: whoever made this promised that `size` bytes can be written until the call returns, and
        // `known` is no more than either has. The size, the first field, is put back as it was.
        unsafe {
            std::ptr::copy_nonoverlapping((&raw const value).cast::<u8>(), place, known);
            place.add(known).write_bytes(0, self.size - known);
            self.place.cast::<usize>().write(self.size);
        }
    }
}

/// # Safety
/// - where `place` is neither NULL nor misaligned, as many bytes can be read and written there until the
///   call returns as its size states.
pub(super) unsafe fn out_sized<T: Sized>(name: &str, place: *mut T) -> Result<OutSized<T>> {
    // SAFETY: as the caller promises.
    let size = unsafe { stated(name, place) }?;
    Ok(OutSized { place, size })
}

/// A place for a struct whose size the caller states beside it, as nothing is in it yet.
///
/// # Safety
/// - where `place` is neither NULL nor misaligned, `size` bytes can be written there until the call returns.
pub(super) unsafe fn out_new<T: Sized>(name: &str, place: *mut T, size: usize) -> Result<OutSized<T>> {
    check(name, place)?;
    if !(T::LEAST..=MOST).contains(&size) {
        return Err(invalid(format!(
            "size is {size}, and {} has {} bytes; pass sizeof({})",
            T::NAME,
            T::SIZE,
            T::NAME
        )));
    }
    Ok(OutSized { place, size })
}

/// As much of a text as fits, and a NUL behind it.
pub(super) fn copy_text<C: Room>(text: &str, room: &mut [C]) {
    let Some(most) = room.len().checked_sub(1) else { return };
    let mut end = text.len().min(most);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    for (place, byte) in room.iter_mut().zip(text.as_bytes()[..end].iter().chain([&0])) {
        place.put(c_char::from_ne_bytes([*byte]));
    }
}

/// A character's place, with something in it or not.
pub(super) trait Room {
    fn put(&mut self, character: c_char);
}

impl Room for c_char {
    fn put(&mut self, character: c_char) {
        *self = character;
    }
}

impl Room for MaybeUninit<c_char> {
    fn put(&mut self, character: c_char) {
        self.write(character);
    }
}
