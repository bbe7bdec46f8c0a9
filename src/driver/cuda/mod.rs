//! Memory of an NVIDIA GPU behind the driver's contract: CUDA's virtual memory management.
//!
//! Owns a context, or the use of somebody else's, and the function table of a library that is looked
//! for at run time. Refuses to keep books: what is mapped where, CUDA knows. The same binary runs
//! where there is no CUDA, and [`Cuda::new`] then says what is missing.
//!
//! | file | question |
//! |---|---|
//! | `mod.rs` | what each verb does |
//! | `api.rs` | which functions of the driver library, and what they take |
//! | `codes.rs` | which kind of error a `CUresult` is, and what cures it |
//! | `context.rs` | in which context a call is made, and that it disturbs no capture |
//! | `device.rs` | which devices there are and what each can do |
//! | `events.rs` | events of streams, and of other people's events |
//!
//! - The context is the one that is current on the thread that makes the driver, else the primary
//!   one of the device, which the CUDA runtime and PyTorch use. The library never makes one. Someone
//!   else's context that is not the device's primary one must outlive the driver: CUDA follows a
//!   pointer to it, and whoever destroys it answers for those who still use it.
//! - Each call finds its context current, or makes it so and puts the old one back. It runs in
//!   relaxed capture mode, so that another thread's capture into a graph goes on.
//! - A primary context that was reset answers [`DeviceLost`](crate::ErrorKind::DeviceLost). In one in which a
//!   kernel faulted CUDA goes on mapping memory; there the calls on streams and events answer so.
//! - A handle's number is CUDA's own, as are those of events and streams.

#![expect(unsafe_code, reason = "calls a C library")]

mod api;
mod codes;
mod context;
mod device;
mod events;

use std::sync::Arc;

use crate::driver::{Access, Driver, DriverInfo, HandleOptions, MemoryInfo, RawEvent, RawHandle, Stream};
use crate::error::{Error, ErrorKind, Result, Verb};
use crate::units::{Bytes, Device, DeviceAddr, GranuleSize};
use api::{AccessDesc, AllocationProp, Api};
use context::Context;
use events::Events;

pub use device::{CudaDevice, devices, driver_version};

/// Above this CUDA answers that the size is invalid, not that there are too few addresses.
const ADDRESS_BITS: u32 = 47;

/// Which device, and how its memory is allocated.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CudaOptions {
    /// The device by its number; `None` for that of the context which is current on this thread, or
    /// the first where none is.
    pub ordinal: Option<u32>,
    /// What every handle can do. Asked of the device, and refused where it can't.
    pub handles: HandleOptions,
}

/// The driver for an NVIDIA GPU. See the [module](self).
#[derive(Debug)]
pub struct Cuda {
    info: DriverInfo,
    ordinal: u32,
    prop: AllocationProp,
    access: [AccessDesc; 2],
    // Before the context, in which they live.
    events: Events,
    context: Context,
}

impl Cuda {
    /// A driver for one device.
    ///
    /// # Errors
    /// - [`Unsupported`](ErrorKind::Unsupported) without a driver library, with one that lacks a
    ///   function, without a device, for a device without virtual memory management, or without an
    ///   option that was asked for: the text says which;
    /// - [`InvalidArgument`](ErrorKind::InvalidArgument) for an ordinal that is not there;
    /// - [`DeviceLost`](ErrorKind::DeviceLost) where the current context is gone or faulted.
    pub fn new(options: CudaOptions) -> Result<Arc<Self>> {
        let api = api::api()?;
        let (context, ordinal) = Context::choose(api, options.ordinal)?;
        let entered = context.enter(Verb::MemoryInfo)?;
        let device = device::describe(api, ordinal)?;
        device.check(options.handles)?;
        let prop = AllocationProp::new(ordinal, options.handles);
        let bytes = device::granularity(api, &prop, device::MINIMUM)?;
        let granule = GranuleSize::new(bytes).ok_or_else(|| {
            Error::new(
                ErrorKind::Unsupported,
                format!("{} allocates in units of {bytes}, which is not a power of two", device.name),
            )
        })?;
        let info =
            DriverInfo { name: "cuda", device: Device::Cuda(ordinal), granule, options: options.handles };
        let access = [Access::Read, Access::ReadWrite].map(|access| AccessDesc::new(ordinal, access));
        drop(entered);
        Ok(Arc::new(Self { info, ordinal, prop, access, events: Events::default(), context }))
    }

    /// The device as CUDA describes it.
    ///
    /// # Errors
    /// As [`devices`].
    pub fn device(&self) -> Result<CudaDevice> {
        device::describe(self.context.api(), self.ordinal)
    }

    /// The context's number (`CUcontext`), for whoever launches kernels beside the driver.
    #[must_use]
    pub fn context(&self) -> u64 {
        self.context.number()
    }

    /// Makes memory of one granule that other machines of an NVLink fabric could import, and gives it
    /// back: whether the system grants what [`CudaDevice::fabric`] says the device can do.
    ///
    /// # Errors
    /// CUDA's refusal, such as `CUDA_ERROR_NOT_PERMITTED` where no fabric is set up.
    pub fn try_fabric(&self) -> Result<()> {
        let granule = self.info.granule.bytes();
        let prop = AllocationProp::fabric(self.ordinal);
        let mut handle = 0_u64;
        // SAFETY: both pointers are to living values.
        self.call(Verb::Create, Some(granule), |api| unsafe {
            (api.mem_create)(&raw mut handle, api::size(granule), &raw const prop, 0)
        })?;
        // SAFETY: made the line before, and mapped nowhere.
        self.call(Verb::Release, None, |api| unsafe { (api.mem_release)(handle) })
    }

    /// A call of the library, in the driver's context.
    fn call(&self, verb: Verb, size: Option<Bytes>, call: impl FnOnce(&Api) -> u32) -> Result<()> {
        let _entered = self.context.enter(verb)?;
        self.context.check(verb, size, call(self.context.api()))
    }
}

#[cfg(unix)]
impl Cuda {
    /// A file descriptor for a handle's memory, which another process can import.
    ///
    /// # Errors
    /// [`Unsupported`](ErrorKind::Unsupported) unless the driver was made with
    /// [`exportable`](HandleOptions::exportable); CUDA's refusal otherwise.
    ///
    /// # Safety
    /// - `handle` came from [`create`](Driver::create) of this driver and has not been released.
    pub unsafe fn export(&self, handle: RawHandle) -> Result<std::os::fd::OwnedFd> {
        use std::os::fd::FromRawFd;
        if !self.info.options.exportable {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "handles of this driver can't be exported; make it with the option exportable",
            ));
        }
        let mut fd: i32 = -1;
        // SAFETY: the handle is alive, as the caller promises, and the pointer is to an int, which is what
        // this kind of export writes.
        self.call(Verb::Create, None, |api| unsafe {
            (api.mem_export)(
                std::ptr::from_mut(&mut fd).cast(),
                handle.0,
                api::HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
                0,
            )
        })?;
        // SAFETY: CUDA has just opened the descriptor for us.
        Ok(unsafe { std::os::fd::OwnedFd::from_raw_fd(fd) })
    }
}

// SAFETY: the conditions of the trait are those of CUDA's virtual memory management: a reservation
// overlaps nothing, handles share no memory, memory lives while it is mapped, an overlap is refused,
// and a refused call has changed nothing.
unsafe impl Driver for Cuda {
    fn info(&self) -> &DriverInfo {
        &self.info
    }

    fn memory_info(&self) -> Result<MemoryInfo> {
        let (mut free, mut total) = (0_usize, 0_usize);
        // SAFETY: both pointers are to living integers.
        self.call(Verb::MemoryInfo, None, |api| unsafe {
            (api.mem_get_info)(&raw mut free, &raw mut total)
        })?;
        let bytes = |count| Bytes::new(crate::units::wide(count));
        Ok(MemoryInfo { free: bytes(free), total: bytes(total) })
    }

    fn reserve(&self, size: Bytes) -> Result<DeviceAddr> {
        let mut addr = 0_u64;
        let refuse = |error: Error| {
            let beyond = error.kind() == ErrorKind::Driver && size.get() >> ADDRESS_BITS > 0;
            if beyond || error.kind() == ErrorKind::OutOfDeviceMemory {
                return Error::new(
                    ErrorKind::OutOfAddressSpace,
                    format!("{size} of addresses can't be reserved; reserve less"),
                )
                .caused_by(error);
            }
            error
        };
        let length = api::size(size);
        // SAFETY: the pointer is to a living integer.
        self.call(Verb::Reserve, Some(size), |api| unsafe {
            (api.mem_address_reserve)(&raw mut addr, length, 0, 0, 0)
        })
        .map_err(refuse)?;
        Ok(DeviceAddr::new(addr))
    }

    unsafe fn free(&self, addr: DeviceAddr, size: Bytes) -> Result<()> {
        // SAFETY: the caller's conditions are CUDA's.
        self.call(Verb::Free, Some(size), |api| unsafe {
            (api.mem_address_free)(addr.get(), api::size(size))
        })
    }

    fn create(&self, size: Bytes) -> Result<RawHandle> {
        let mut handle = 0_u64;
        // SAFETY: both pointers are to living values.
        self.call(Verb::Create, Some(size), |api| unsafe {
            (api.mem_create)(&raw mut handle, api::size(size), &raw const self.prop, 0)
        })?;
        Ok(RawHandle(handle))
    }

    unsafe fn map(&self, addr: DeviceAddr, size: Bytes, handle: RawHandle) -> Result<()> {
        // SAFETY: the caller's conditions are CUDA's.
        self.call(Verb::Map, Some(size), |api| unsafe {
            (api.mem_map)(addr.get(), api::size(size), 0, handle.0, 0)
        })
    }

    unsafe fn set_access(&self, addr: DeviceAddr, size: Bytes, access: Access) -> Result<()> {
        let [read, write] = &self.access;
        let desc = if access == Access::Read { read } else { write };
        // SAFETY: the caller's conditions are CUDA's, and the description lives.
        self.call(Verb::SetAccess, Some(size), |api| unsafe {
            (api.mem_set_access)(addr.get(), api::size(size), desc, 1)
        })
    }

    unsafe fn unmap(&self, addr: DeviceAddr, size: Bytes) -> Result<()> {
        // SAFETY: the caller's conditions are CUDA's.
        self.call(Verb::Unmap, Some(size), |api| unsafe { (api.mem_unmap)(addr.get(), api::size(size)) })
    }

    unsafe fn release(&self, handle: RawHandle) -> Result<()> {
        // SAFETY: the caller's condition is CUDA's.
        self.call(Verb::Release, None, |api| unsafe { (api.mem_release)(handle.0) })
    }

    fn record_event(&self, stream: Stream) -> Result<RawEvent> {
        let _entered = self.context.enter(Verb::RecordEvent)?;
        self.events.record(&self.context, stream)
    }

    unsafe fn follow_event(&self, event: RawEvent) -> Result<RawEvent> {
        let _entered = self.context.enter(Verb::FollowEvent)?;
        // SAFETY: the caller's condition is the callee's.
        unsafe { self.events.follow(&self.context, event) }
    }

    unsafe fn query_event(&self, event: RawEvent) -> Result<bool> {
        let _entered = self.context.enter(Verb::QueryEvent)?;
        // SAFETY: the caller's condition is the callee's.
        unsafe { events::query(&self.context, Verb::QueryEvent, event) }
    }

    unsafe fn wait_event(&self, event: RawEvent) -> Result<()> {
        // SAFETY: the caller's condition is CUDA's.
        self.call(Verb::WaitEvent, None, |api| unsafe { (api.event_synchronize)(event.0) })
    }

    unsafe fn stream_wait(&self, stream: Stream, event: RawEvent) -> Result<()> {
        let _entered = self.context.enter(Verb::StreamWait)?;
        events::refuse_capturing(&self.context, Verb::StreamWait, stream)?;
        // SAFETY: the caller says that the event lives, and `Stream::new` made it promise the stream.
        let code = unsafe { (self.context.api().stream_wait_event)(stream.0, event.0, 0) };
        self.context.check_of_caller(Verb::StreamWait, code)
    }

    unsafe fn destroy_event(&self, event: RawEvent) -> Result<()> {
        // SAFETY: the caller's condition is CUDA's.
        self.call(Verb::DestroyEvent, None, |api| unsafe { (api.event_destroy)(event.0) })
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        if let Ok(_entered) = self.context.enter(Verb::DestroyEvent) {
            self.events.destroy_streams(&self.context);
        }
    }
}
