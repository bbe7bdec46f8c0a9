//! Whoever maps memory, and the devices that there are.

use std::ffi::c_char;
use std::sync::Arc;

use super::args::{self, Numbered as _};
use super::entry::{Failure, enter};
use super::handle::DRIVERS;
use super::status::vattn_status;
use crate::driver::Driver;
use crate::driver::checked::Checked;
use crate::driver::host::{Host, HostOptions};
use crate::driver::ledger::{Ledger, LedgerOptions};
#[cfg(not(feature = "cuda"))]
use crate::error::{Error, ErrorKind};
use crate::error::{Result, Verb};
use crate::units::{Bytes, Device};

/// Whoever maps memory. A cache keeps the driver that it was made with alive, and several caches may
/// share one.
#[derive(Debug)]
pub struct vattn_driver {
    _opaque: [u8; 0],
}

/// A driver, and what a test can do with it.
pub(super) struct DriverObject {
    pub(super) driver: Arc<dyn Driver>,
    pub(super) by_hand: ByHand,
    pub(super) checked: Option<Arc<Checked>>,
}

/// A driver whose fences can be held back.
#[derive(Clone)]
pub(super) enum ByHand {
    Host(Arc<Host>),
    Ledger(Arc<Ledger>),
    No,
}

/// Where memory is, with the numbers that DLPack has for it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(i32)]
pub enum vattn_device_type {
    /// The processor's memory.
    VATTN_DEVICE_CPU = 1,
    /// A CUDA device's.
    VATTN_DEVICE_CUDA = 2,
}

/// A device's type and number, as DLPack has them.
pub(super) fn device(device: Device) -> (i32, i32) {
    match device {
        Device::Cpu => (vattn_device_type::VATTN_DEVICE_CPU.number(), 0),
        Device::Cuda(ordinal) => {
            (vattn_device_type::VATTN_DEVICE_CUDA.number(), i32::try_from(ordinal).unwrap_or(i32::MAX))
        }
    }
}

/// The calls of a driver, under CUDA's names.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(i32)]
pub enum vattn_verb {
    /// `cuMemAddressReserve`
    VATTN_VERB_RESERVE = 0,
    /// `cuMemCreate`
    VATTN_VERB_CREATE = 1,
    /// `cuMemMap`
    VATTN_VERB_MAP = 2,
    /// `cuMemSetAccess`
    VATTN_VERB_SET_ACCESS = 3,
    /// `cuMemUnmap`
    VATTN_VERB_UNMAP = 4,
    /// `cuMemRelease`
    VATTN_VERB_RELEASE = 5,
    /// `cuMemAddressFree`
    VATTN_VERB_FREE = 6,
    /// `cuMemGetInfo`
    VATTN_VERB_MEMORY_INFO = 7,
    /// `cuEventRecord`, with the creation of the event
    VATTN_VERB_RECORD_EVENT = 8,
    /// `cuStreamWaitEvent` and `cuEventRecord` on a stream of the library's own
    VATTN_VERB_FOLLOW_EVENT = 9,
    /// `cuEventQuery`
    VATTN_VERB_QUERY_EVENT = 10,
    /// `cuEventSynchronize`
    VATTN_VERB_WAIT_EVENT = 11,
    /// `cuEventDestroy`
    VATTN_VERB_DESTROY_EVENT = 12,
    /// `cuStreamWaitEvent`
    VATTN_VERB_STREAM_WAIT = 13,
}

args::numbered!(vattn_verb);
args::numbered!(vattn_device_type);

use vattn_verb::*;

impl vattn_verb {
    /// The verb that a number stands for.
    pub(super) fn named(name: &str, value: i32) -> Result<Verb> {
        args::choice(name, value, &Verb::ALL.map(|verb| (Self::from(verb), verb)))
    }
}

impl From<Verb> for vattn_verb {
    fn from(verb: Verb) -> Self {
        match verb {
            Verb::Reserve => VATTN_VERB_RESERVE,
            Verb::Create => VATTN_VERB_CREATE,
            Verb::Map => VATTN_VERB_MAP,
            Verb::SetAccess => VATTN_VERB_SET_ACCESS,
            Verb::Unmap => VATTN_VERB_UNMAP,
            Verb::Release => VATTN_VERB_RELEASE,
            Verb::Free => VATTN_VERB_FREE,
            Verb::MemoryInfo => VATTN_VERB_MEMORY_INFO,
            Verb::RecordEvent => VATTN_VERB_RECORD_EVENT,
            Verb::FollowEvent => VATTN_VERB_FOLLOW_EVENT,
            Verb::QueryEvent => VATTN_VERB_QUERY_EVENT,
            Verb::WaitEvent => VATTN_VERB_WAIT_EVENT,
            Verb::DestroyEvent => VATTN_VERB_DESTROY_EVENT,
            Verb::StreamWait => VATTN_VERB_STREAM_WAIT,
        }
    }
}

/// How the host driver allocates this machine's own memory. Linux only.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct vattn_host_options {
    /// `sizeof(vattn_host_options)`, set by the caller.
    pub struct_size: usize,
    /// The unit of allocation in bytes: a power of two, and a multiple of the page size. 0 for 2 MiB.
    pub granule: u64,
    /// Bytes that can be created in all. They are taken from the system when they are first touched, so
    /// more than the machine has ends in `SIGBUS` or the kernel's OOM killer.
    pub capacity: u64,
    /// How many of the kernel's mappings may be used; 0 for what `vm.max_map_count` leaves.
    pub max_mappings: u64,
}

/// How the CUDA driver allocates a GPU's memory.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct vattn_cuda_options {
    /// `sizeof(vattn_cuda_options)`, set by the caller.
    pub struct_size: usize,
    /// The device's number; -1 for that of the context which is current on this thread, or the first
    /// where none is.
    pub ordinal: i32,
    /// 1 where every allocation can be exported through a file descriptor, else 0.
    pub exportable: u32,
    /// 1 where a network card can read and write every allocation, else 0.
    pub rdma: u32,
    /// 0.
    pub reserved: u32,
}

/// How large a device the ledger driver pretends to be. It keeps the books and maps nothing: for
/// simulations of sizes that no machine at hand can map. Its addresses must not be touched.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct vattn_ledger_options {
    /// `sizeof(vattn_ledger_options)`, set by the caller.
    pub struct_size: usize,
    /// The unit of allocation in bytes, a power of two. 0 for 2 MiB.
    pub granule: u64,
    /// Bytes that can be created in all.
    pub capacity: u64,
    /// Bytes of addresses that can be reserved at a time; 0 for no limit.
    pub addresses: u64,
}

/// What a driver is; the same for its whole life.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct vattn_driver_info {
    /// `sizeof(vattn_driver_info)`, set by the caller.
    pub struct_size: usize,
    /// `host`, `ledger` or `cuda`.
    pub name: [c_char; 16],
    /// A `vattn_device_type`.
    pub device_type: i32,
    /// The device's number; 0 for the processor.
    pub device_id: i32,
    /// The unit of allocation in bytes.
    pub granule: u64,
    /// 1 where allocations can be exported through a file descriptor.
    pub exportable: u32,
    /// 1 where a network card can read and write them.
    pub rdma: u32,
}

/// A device as CUDA describes it.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct vattn_cuda_device {
    /// `sizeof(vattn_cuda_device)`, set by the caller.
    pub struct_size: usize,
    /// Such as `NVIDIA H200`.
    pub name: [c_char; 256],
    /// The compute capability's first number.
    pub major: u32,
    /// The compute capability's second number.
    pub minor: u32,
    /// Bytes of memory in all.
    pub memory: u64,
    /// The smallest unit of allocation in bytes; 0 without virtual memory.
    pub granule: u64,
    /// The unit that CUDA recommends; 0 without virtual memory.
    pub recommended_granule: u64,
    /// 1 where it can map memory behind addresses: without that, no cache.
    pub virtual_memory: u32,
    /// 1 where allocations can be exported through a file descriptor.
    pub exportable: u32,
    /// 1 where a network card can read and write them.
    pub rdma: u32,
    /// 1 where they can be exported to other machines of one NVLink fabric, as far as the device goes.
    pub fabric: u32,
}

args::sized!(vattn_host_options);
args::sized!(vattn_cuda_options);
args::sized!(vattn_ledger_options);
args::sized!(vattn_driver_info);
args::sized!(vattn_cuda_device);

/// What zero stands for where a granule is asked for.
const GRANULE: Bytes = Bytes::mib(2);

fn or_default(granule: u64) -> Bytes {
    if granule == 0 { GRANULE } else { Bytes::new(granule) }
}

fn unless_zero(bytes: u64) -> Option<u64> {
    (bytes > 0).then_some(bytes)
}

/// A driver for this machine's own memory, on which a cache can be tried, tested and used without a GPU.
///
/// Fails with `VATTN_INVALID_CONFIG` for a granule that can't be, `VATTN_UNSUPPORTED` elsewhere than on
/// Linux, `VATTN_DRIVER` where the system gives no memory file.
///
/// # Safety
/// - `options` is NULL, or points to a `vattn_host_options` of which `struct_size` is set;
/// - `out` is NULL, or a pointer can be written there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_driver_create_host(
    options: *const vattn_host_options,
    out: *mut *mut vattn_driver,
) -> vattn_status {
    enter("vattn_driver_create_host", || {
        // SAFETY: as the caller promises.
        let (options, out) = unsafe { (args::sized_in("options", options)?, args::out("out", out)?) };
        let vattn_host_options { granule, capacity, max_mappings, .. } = options;
        let max_mappings = unless_zero(max_mappings);
        let host = Host::new(HostOptions {
            granule: or_default(granule),
            capacity: Bytes::new(capacity),
            max_mappings,
        })?;
        let by_hand = ByHand::Host(Arc::clone(&host));
        out.set(DRIVERS.keep(DriverObject { driver: host, by_hand, checked: None })?);
        Ok(())
    })
}

/// A driver for an NVIDIA GPU. NULL options are -1, 0, 0.
///
/// It works in the context that is current on this thread, else in the device's primary one, which the
/// CUDA runtime and PyTorch use; it never makes one. A context that is neither must outlive it.
///
/// Fails with `VATTN_UNSUPPORTED` where there is no driver library, no device, or not what was asked for,
/// and the text says which; `VATTN_INVALID_ARGUMENT` for a device that is not there; `VATTN_DEVICE_LOST`
/// where the current context is gone.
///
/// # Safety
/// - `options` is NULL, or points to a `vattn_cuda_options` of which `struct_size` is set;
/// - `out` is NULL, or a pointer can be written there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_driver_create_cuda(
    options: *const vattn_cuda_options,
    out: *mut *mut vattn_driver,
) -> vattn_status {
    enter("vattn_driver_create_cuda", || {
        // SAFETY: as the caller promises.
        let (options, out) = unsafe {
            let defaults =
                vattn_cuda_options { struct_size: 0, ordinal: -1, exportable: 0, rdma: 0, reserved: 0 };
            let options = if options.is_null() { defaults } else { args::sized_in("options", options)? };
            (options, args::out("out", out)?)
        };
        args::unused("options->reserved", options.reserved)?;
        let driver = cuda(&options)?;
        out.set(DRIVERS.keep(DriverObject { driver, by_hand: ByHand::No, checked: None })?);
        Ok(())
    })
}

#[cfg(feature = "cuda")]
fn cuda(options: &vattn_cuda_options) -> Result<Arc<dyn Driver>, Failure> {
    use crate::driver::HandleOptions;
    use crate::driver::cuda::{Cuda, CudaOptions};
    let ordinal = match options.ordinal {
        -1 => None,
        ordinal => Some(u32::try_from(ordinal).map_err(|_| {
            args::invalid(format!("options->ordinal is {ordinal}; use a device's number from 0, or -1"))
        })?),
    };
    let handles = HandleOptions {
        exportable: args::flag("options->exportable", options.exportable)?,
        rdma: args::flag("options->rdma", options.rdma)?,
    };
    Ok(Cuda::new(CudaOptions { ordinal, handles })?)
}

#[cfg(not(feature = "cuda"))]
fn cuda(_options: &vattn_cuda_options) -> Result<Arc<dyn Driver>, Failure> {
    Err(without_cuda().into())
}

#[cfg(not(feature = "cuda"))]
fn without_cuda() -> Error {
    Error::new(
        ErrorKind::Unsupported,
        "this library was built without the driver for GPUs; build it with the feature cuda",
    )
}

/// A driver that only keeps books. Fails with `VATTN_INVALID_CONFIG` for a granule that can't be.
///
/// # Safety
/// - `options` is NULL, or points to a `vattn_ledger_options` of which `struct_size` is set;
/// - `out` is NULL, or a pointer can be written there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_driver_create_ledger(
    options: *const vattn_ledger_options,
    out: *mut *mut vattn_driver,
) -> vattn_status {
    enter("vattn_driver_create_ledger", || {
        // SAFETY: as the caller promises.
        let (options, out) = unsafe { (args::sized_in("options", options)?, args::out("out", out)?) };
        let vattn_ledger_options { granule, capacity, addresses, .. } = options;
        let addresses = unless_zero(addresses).map(Bytes::new);
        let ledger = Ledger::new(LedgerOptions {
            granule: or_default(granule),
            capacity: Bytes::new(capacity),
            addresses,
        })?;
        let by_hand = ByHand::Ledger(Arc::clone(&ledger));
        out.set(DRIVERS.keep(DriverObject { driver: ledger, by_hand, checked: None })?);
        Ok(())
    })
}

/// Gives a driver up. Caches that were made with it keep it alive. NULL is no error.
///
/// # Safety
/// - any handle may be passed; one that is not alive is refused.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_driver_destroy(driver: *mut vattn_driver) -> vattn_status {
    enter("vattn_driver_destroy", || DRIVERS.destroy(driver))
}

/// What a driver is.
///
/// # Safety
/// - `out` is NULL, or points to a `vattn_driver_info` of which `struct_size` is set.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_driver_describe(
    driver: *const vattn_driver,
    out: *mut vattn_driver_info,
) -> vattn_status {
    enter("vattn_driver_describe", || {
        let object = DRIVERS.get(driver)?;
        // SAFETY: as the caller promises.
        let out = unsafe { args::out_sized("out", out) }?;
        let info = object.driver.info();
        let (device_type, device_id) = device(info.device);
        let mut name = [0; 16];
        args::copy_text(info.name, &mut name);
        out.set(vattn_driver_info {
            struct_size: 0,
            name,
            device_type,
            device_id,
            granule: info.granule.bytes().get(),
            exportable: info.options.exportable.into(),
            rdma: info.options.rdma.into(),
        });
        Ok(())
    })
}

/// How many bytes the device has, and how many of them are free now, by anybody's count.
///
/// # Safety
/// - `out_free` and `out_total` are NULL, or a `uint64_t` can be written there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_driver_memory(
    driver: *const vattn_driver,
    out_free: *mut u64,
    out_total: *mut u64,
) -> vattn_status {
    enter("vattn_driver_memory", || {
        let object = DRIVERS.get(driver)?;
        // SAFETY: as the caller promises.
        let (free, total) = unsafe { (args::out("out_free", out_free)?, args::out("out_total", out_total)?) };
        let memory = object.driver.memory_info()?;
        free.set(memory.free.get());
        total.set(memory.total.get());
        Ok(())
    })
}

/// How many CUDA devices this process may see. Fails with `VATTN_UNSUPPORTED` where there is no driver
/// library or no device, and the text says which.
///
/// # Safety
/// - `out` is NULL, or a `uint32_t` can be written there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_cuda_device_count(out: *mut u32) -> vattn_status {
    enter("vattn_cuda_device_count", || {
        // SAFETY: as the caller promises.
        let out = unsafe { args::out("out", out) }?;
        #[cfg(feature = "cuda")]
        {
            let devices = crate::driver::cuda::devices()?;
            out.set(u32::try_from(devices.len()).unwrap_or(u32::MAX));
            Ok(())
        }
        #[cfg(not(feature = "cuda"))]
        {
            let _ = out;
            Err(without_cuda().into())
        }
    })
}

/// What a CUDA device is and can do.
///
/// # Safety
/// - `out` is NULL, or points to a `vattn_cuda_device` of which `struct_size` is set.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_cuda_device_describe(
    ordinal: u32,
    out: *mut vattn_cuda_device,
) -> vattn_status {
    enter("vattn_cuda_device_describe", || {
        // SAFETY: as the caller promises.
        let out = unsafe { args::out_sized("out", out) }?;
        #[cfg(feature = "cuda")]
        {
            out.set(cuda_device(ordinal)?);
            Ok(())
        }
        #[cfg(not(feature = "cuda"))]
        {
            let _ = (ordinal, out);
            Err(without_cuda().into())
        }
    })
}

#[cfg(feature = "cuda")]
fn cuda_device(ordinal: u32) -> Result<vattn_cuda_device> {
    let devices = crate::driver::cuda::devices()?;
    let Some(device) = devices.iter().find(|device| device.ordinal == ordinal) else {
        return Err(args::invalid(format!(
            "ordinal is {ordinal}, and there are {} devices, from 0",
            devices.len()
        )));
    };
    let mut name = [0; 256];
    args::copy_text(&device.name, &mut name);
    Ok(vattn_cuda_device {
        struct_size: 0,
        name,
        major: device.compute_capability.0,
        minor: device.compute_capability.1,
        memory: device.memory.get(),
        granule: device.granule.map_or(0, Bytes::get),
        recommended_granule: device.recommended_granule.map_or(0, Bytes::get),
        virtual_memory: device.virtual_memory.into(),
        exportable: device.exportable.into(),
        rdma: device.rdma.into(),
        fabric: device.fabric.into(),
    })
}
