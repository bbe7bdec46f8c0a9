//! The functions of CUDA's driver library that this crate calls, and the structures they take.
//!
//! Declared here rather than taken from the bindings: those return a closed enum, for which a number
//! of a newer driver would be undefined behaviour, and their structures change with the version that
//! a program chooses. The three structures are the same from CUDA 11.4 to 13.4. The library itself is
//! cudarc's, so that a program that uses both opens it once.

use std::ffi::{c_char, c_void};
use std::sync::OnceLock;

use cudarc::driver::sys;

use crate::driver::cuda::codes;
use crate::driver::{Access, HandleOptions};
use crate::error::{Error, ErrorKind, Result};
use crate::units::Bytes;

/// `CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR`
pub(super) const HANDLE_TYPE_POSIX_FILE_DESCRIPTOR: u32 = 1;
/// `CU_MEM_HANDLE_TYPE_FABRIC`
const HANDLE_TYPE_FABRIC: u32 = 8;
/// `CU_MEM_ALLOCATION_TYPE_PINNED`
const ALLOCATION_TYPE_PINNED: u32 = 1;
/// `CU_MEM_LOCATION_TYPE_DEVICE`
const LOCATION_TYPE_DEVICE: u32 = 1;

/// `CUmemLocation`
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(super) struct Location {
    kind: u32,
    id: u32,
}

/// `CUmemAllocationProp`
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(super) struct AllocationProp {
    kind: u32,
    handle_types: u32,
    location: Location,
    /// A pointer, for Windows alone: always null.
    win32: usize,
    compression: u8,
    rdma: u8,
    usage: u16,
    reserved: [u8; 4],
}

/// `CUmemAccessDesc`
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(super) struct AccessDesc {
    location: Location,
    flags: u32,
}

const _: () = assert!(size_of::<Location>() == 8);
const _: () = assert!(size_of::<AllocationProp>() == 32);
const _: () = assert!(size_of::<AccessDesc>() == 12);

impl AllocationProp {
    pub(super) fn new(ordinal: u32, options: HandleOptions) -> Self {
        Self {
            kind: ALLOCATION_TYPE_PINNED,
            handle_types: if options.exportable { HANDLE_TYPE_POSIX_FILE_DESCRIPTOR } else { 0 },
            location: Location { kind: LOCATION_TYPE_DEVICE, id: ordinal },
            win32: 0,
            compression: 0,
            rdma: u8::from(options.rdma),
            usage: 0,
            reserved: [0; 4],
        }
    }

    /// For other machines of one NVLink fabric.
    pub(super) fn fabric(ordinal: u32) -> Self {
        Self { handle_types: HANDLE_TYPE_FABRIC, ..Self::new(ordinal, HandleOptions::default()) }
    }
}

impl AccessDesc {
    pub(super) fn new(ordinal: u32, access: Access) -> Self {
        let flags = match access {
            Access::Read => 1,
            Access::ReadWrite => 3,
        };
        Self { location: Location { kind: LOCATION_TYPE_DEVICE, id: ordinal }, flags }
    }
}

/// A size as CUDA takes it. No size that is too large for this machine gets past a reservation.
pub(super) fn size(bytes: Bytes) -> usize {
    usize::try_from(bytes.get()).unwrap_or(usize::MAX)
}

macro_rules! functions {
    ($($field:ident = $symbol:literal ($($argument:ty),*);)*) => {
        /// The functions, under CUDA's names. Handles, events, streams and contexts are numbers here:
        /// they are pointers, or 64 bits wide, in CUDA's headers.
        #[derive(Debug)]
        pub(super) struct Api {
            $(pub(super) $field: unsafe extern "C" fn($($argument),*) -> u32,)*
        }

        impl Api {
            fn load() -> Result<Self> {
                // SAFETY: a library was found, so that this does not panic.
                let library = unsafe { sys::culib() };
                Ok(Self {
                    $($field: {
                        let symbol = concat!($symbol, "\0");
                        // SAFETY: the signature is that of CUDA's header, with `CUresult` as the integer it is.
                        let found = unsafe {
                            library.get::<unsafe extern "C" fn($($argument),*) -> u32>(symbol.as_bytes())
                        };
                        *found.map_err(|_| lacks($symbol))?
                    },)*
                })
            }
        }
    };
}

#[cfg(not(target_pointer_width = "64"))]
compile_error!("CUDA's virtual memory management is for 64-bit systems; build without the feature `cuda`");

functions! {
    init = "cuInit"(u32);
    driver_get_version = "cuDriverGetVersion"(*mut i32);
    get_error_name = "cuGetErrorName"(u32, *mut *const c_char);
    device_get = "cuDeviceGet"(*mut i32, i32);
    device_get_count = "cuDeviceGetCount"(*mut i32);
    device_get_name = "cuDeviceGetName"(*mut c_char, i32, i32);
    device_get_attribute = "cuDeviceGetAttribute"(*mut i32, u32, i32);
    device_total_mem = "cuDeviceTotalMem_v2"(*mut usize, i32);
    primary_ctx_retain = "cuDevicePrimaryCtxRetain"(*mut u64, i32);
    primary_ctx_release = "cuDevicePrimaryCtxRelease_v2"(i32);
    primary_ctx_get_state = "cuDevicePrimaryCtxGetState"(i32, *mut u32, *mut i32);
    ctx_get_current = "cuCtxGetCurrent"(*mut u64);
    ctx_get_api_version = "cuCtxGetApiVersion"(u64, *mut u32);
    ctx_get_device = "cuCtxGetDevice"(*mut i32);
    ctx_push_current = "cuCtxPushCurrent_v2"(u64);
    ctx_pop_current = "cuCtxPopCurrent_v2"(*mut u64);
    thread_exchange_capture_mode = "cuThreadExchangeStreamCaptureMode"(*mut u32);
    mem_get_info = "cuMemGetInfo_v2"(*mut usize, *mut usize);
    mem_get_granularity = "cuMemGetAllocationGranularity"(*mut usize, *const AllocationProp, u32);
    mem_address_reserve = "cuMemAddressReserve"(*mut u64, usize, usize, u64, u64);
    mem_address_free = "cuMemAddressFree"(u64, usize);
    mem_create = "cuMemCreate"(*mut u64, usize, *const AllocationProp, u64);
    mem_map = "cuMemMap"(u64, usize, usize, u64, u64);
    mem_set_access = "cuMemSetAccess"(u64, usize, *const AccessDesc, usize);
    mem_unmap = "cuMemUnmap"(u64, usize);
    mem_release = "cuMemRelease"(u64);
    mem_export = "cuMemExportToShareableHandle"(*mut c_void, u64, u32, u64);
    stream_create = "cuStreamCreate"(*mut u64, u32);
    stream_destroy = "cuStreamDestroy_v2"(u64);
    stream_query = "cuStreamQuery"(u64);
    stream_is_capturing = "cuStreamIsCapturing"(u64, *mut u32);
    stream_wait_event = "cuStreamWaitEvent"(u64, u64, u32);
    event_create = "cuEventCreate"(*mut u64, u32);
    event_destroy = "cuEventDestroy_v2"(u64);
    event_query = "cuEventQuery"(u64);
    event_record = "cuEventRecord"(u64, u64);
    event_synchronize = "cuEventSynchronize"(u64);
}

#[cold]
fn lacks(symbol: &str) -> Error {
    Error::new(
        ErrorKind::Unsupported,
        format!(
            "the CUDA driver library lacks the function {symbol}; virtual memory needs CUDA 11.4 or later: install a \
             newer NVIDIA driver, or use the host driver"
        ),
    )
}

/// The function table, once the library has been found and initialised. A failure is not kept: a
/// driver may be installed, or a device appear, while the process runs.
pub(super) fn api() -> Result<&'static Api> {
    static API: OnceLock<Api> = OnceLock::new();
    static FOUND: OnceLock<()> = OnceLock::new();
    if let Some(api) = API.get() {
        return Ok(api);
    }
    if FOUND.get().is_none() {
        // SAFETY: opening CUDA's library runs its initialisers, which is what every CUDA program does.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "no CUDA driver library (libcuda.so.1) is found on this machine; install NVIDIA's driver, or use \
                 the host driver",
            ));
        }
        FOUND.get_or_init(|| ());
    }
    let api = Api::load()?;
    // SAFETY: the flags must be zero, and are.
    codes::check_set_up(&api, unsafe { (api.init)(0) })?;
    Ok(API.get_or_init(|| api))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_function_is_named() {
        let error = lacks("cuMemMap");
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains("lacks the function cuMemMap"), "{error}");
    }

    #[test]
    fn without_a_driver_library_the_error_says_so() {
        match api() {
            Ok(_) => {}
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
                assert!(error.to_string().contains("host driver"), "{error}");
            }
        }
    }

    #[test]
    fn options_reach_the_structure_that_cuda_reads() {
        let plain = AllocationProp::new(3, HandleOptions::default());
        assert_eq!((plain.location.id, plain.handle_types, plain.rdma), (3, 0, 0));
        let both = AllocationProp::new(0, HandleOptions { exportable: true, rdma: true });
        assert_eq!((both.handle_types, both.rdma), (1, 1));
    }
}
