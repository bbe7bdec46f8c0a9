//! A buffer: a range of addresses that knows nothing of caches.

use std::ffi::c_void;
use std::sync::Arc;

use super::args;
use super::cache::{read_fences, vattn_fence};
use super::driver::{device, vattn_driver};
use super::entry::enter;
use super::handle::{BUFFERS, DRIVERS};
use super::layout::pointer;
use super::status::vattn_status;
use crate::buffer::{Buffer, BufferOptions};
use crate::units::Bytes;

/// A range of addresses of which a part is backed: see "Buffers" above. Any thread may call any function on
/// it at any time.
#[derive(Debug)]
pub struct vattn_buffer {
    _opaque: [u8; 0],
}

/// How large a buffer is, and its extents.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct vattn_buffer_options {
    /// `sizeof(vattn_buffer_options)`, set by the caller.
    pub struct_size: usize,
    /// Bytes of addresses, rounded up to granules. Addresses cost nothing.
    pub size: u64,
    /// The most bytes of one allocation: a granule times a power of two. 0 for 32 MiB, or a granule where
    /// that is more. Large ones make commits cheap, small ones make decommits exact.
    pub largest_extent: u64,
}

/// A buffer in numbers.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct vattn_buffer_info {
    /// `sizeof(vattn_buffer_info)`, set by the caller.
    pub struct_size: usize,
    /// The address of the first byte, which never changes. What is not committed faults when it is touched.
    pub data: *mut c_void,
    /// Bytes of addresses.
    pub size: u64,
    /// The driver's unit of allocation in bytes.
    pub granule: u64,
    /// Bytes that are committed.
    pub committed: u64,
    /// Bytes of memory that were allocated and not given back: whole extents.
    pub held: u64,
    /// A `vattn_device_type`.
    pub device_type: i32,
    /// The device's number; 0 for the processor.
    pub device_id: i32,
}

args::sized!(vattn_buffer_options);
args::sized!(vattn_buffer_info);

/// Reserves addresses, with nothing committed.
///
/// Fails with `VATTN_INVALID_ARGUMENT` for a size of 0 or one that granules can't round up, and a largest
/// extent that is no granule times a power of two; with `VATTN_OUT_OF_ADDRESS_SPACE`.
///
/// # Safety
/// - `options` is NULL, or points to a `vattn_buffer_options` of which `struct_size` is set;
/// - `out` is NULL, or a pointer can be written there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_buffer_create(
    options: *const vattn_buffer_options,
    driver: *const vattn_driver,
    out: *mut *mut vattn_buffer,
) -> vattn_status {
    enter("vattn_buffer_create", || {
        let driver = DRIVERS.get(driver)?;
        // SAFETY: as the caller promises.
        let (options, out) = unsafe { (args::sized_in("options", options)?, args::out("out", out)?) };
        let vattn_buffer_options { size, largest_extent, .. } = options;
        let options = BufferOptions {
            size: Bytes::new(size),
            largest_extent: (largest_extent > 0).then_some(Bytes::new(largest_extent)),
        };
        let buffer = Buffer::new(Arc::clone(&driver.driver), options)?;
        out.set(BUFFERS.keep(Arc::new(buffer))?);
        Ok(())
    })
}

/// Backs a range: afterwards every byte of it can be touched. What is committed already stays as it is, with
/// what is in it; what is in new memory is not defined. Ranges need not begin or end on granules.
///
/// Fails with `VATTN_INVALID_ARGUMENT` for a range that is empty or reaches beyond the buffer;
/// `VATTN_OUT_OF_DEVICE_MEMORY`, `VATTN_OUT_OF_MAPPINGS` and the driver's other refusals, and nothing was
/// committed; `VATTN_UNHEALTHY` after a driver panicked in a call on this buffer.
///
/// # Safety
/// - any handle may be passed; one that is not alive is refused.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_buffer_commit(
    buffer: *const vattn_buffer,
    offset: u64,
    size: u64,
) -> vattn_status {
    enter("vattn_buffer_commit", || Ok(BUFFERS.get(buffer)?.commit(Bytes::new(offset), Bytes::new(size))?))
}

/// Says that the bytes of a range are no longer wanted. Memory is given back by whole extents of which no byte
/// is committed any more.
///
/// The fences say when the device is done with the range, one for each stream that touched it. They are
/// waited for on the calling thread: whoever must not wait gives an event that has fired. Until this returns
/// the range counts as committed.
///
/// Fails with `VATTN_INVALID_ARGUMENT` for a range that is empty or reaches beyond the buffer, and for no
/// fence; `VATTN_CAPTURING_STREAM`; the driver's refusals. The range is as it was, with what is in it. With
/// `VATTN_UNHEALTHY` where the driver stopped in the middle and would not undo: the text names the bytes that
/// are not committed any more, and all others are as they were.
///
/// # Safety
/// - `fences` is NULL, or `fence_count` of them can be read there, with streams and events that are alive;
/// - no kernel that is not covered by a fence still uses the range.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_buffer_decommit(
    buffer: *const vattn_buffer,
    offset: u64,
    size: u64,
    fences: *const vattn_fence,
    fence_count: usize,
) -> vattn_status {
    enter("vattn_buffer_decommit", || {
        let buffer = BUFFERS.get(buffer)?;
        // SAFETY: as the caller promises.
        let fences = unsafe { read_fences(fences, fence_count) }?;
        Ok(buffer.decommit(Bytes::new(offset), Bytes::new(size), &fences)?)
    })
}

/// A buffer in numbers.
///
/// # Safety
/// - `out` is NULL, or points to a `vattn_buffer_info` of which `struct_size` is set.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_buffer_describe(
    buffer: *const vattn_buffer,
    out: *mut vattn_buffer_info,
) -> vattn_status {
    enter("vattn_buffer_describe", || {
        let buffer = BUFFERS.get(buffer)?;
        // SAFETY: as the caller promises.
        let out = unsafe { args::out_sized("out", out) }?;
        let (device_type, device_id) = device(buffer.device());
        out.set(vattn_buffer_info {
            struct_size: 0,
            data: pointer(buffer.addr().get()),
            size: buffer.size().get(),
            granule: buffer.granule().bytes().get(),
            committed: buffer.committed().get(),
            held: buffer.held().get(),
            device_type,
            device_id,
        });
        Ok(())
    })
}

/// Gives a buffer up, its memory and its addresses; where it is pinned they go with the last pin. Waits for the
/// calls on it that are under way, and for no device: nothing may use the memory any more. NULL is no error.
///
/// # Safety
/// - any handle may be passed; one that is not alive is refused;
/// - no kernel still uses the memory, unless it is pinned.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_buffer_destroy(buffer: *mut vattn_buffer) -> vattn_status {
    enter("vattn_buffer_destroy", || BUFFERS.destroy(buffer))
}
