//! What a `CUresult` means: the kind of error, its name, and what cures it.

use std::ffi::CStr;

use crate::driver::cuda::api::Api;
use crate::error::{DriverFailure, Error, ErrorKind, Result, Verb};
use crate::units::Bytes;

pub(super) const NOT_READY: u32 = 600;
const OUT_OF_MEMORY: u32 = 2;
const NOT_INITIALIZED: u32 = 3;
const STUB_LIBRARY: u32 = 34;
const NO_DEVICE: u32 = 100;
const INVALID_CONTEXT: u32 = 201;
const INVALID_HANDLE: u32 = 400;
const CONTEXT_IS_DESTROYED: u32 = 709;

/// Which kind of error a number is. A number of a newer driver is a refusal like any other.
fn kind(code: u32) -> ErrorKind {
    match code {
        OUT_OF_MEMORY => ErrorKind::OutOfDeviceMemory,
        // Not initialised (a forked child), deinitialised, invalid context, uncorrectable ECC or NVLink error.
        NOT_INITIALIZED | 4 | INVALID_CONTEXT | 214 | 220 | 226 => ErrorKind::DeviceLost,
        // A kernel's fault, or an external device's, which every later call reports.
        700 | 702 | CONTEXT_IS_DESTROYED | 710 | 714..=719 | 721 | 911 => ErrorKind::DeviceLost,
        // The server between several processes and one device went away.
        806 | 810 => ErrorKind::DeviceLost,
        900..=908 => ErrorKind::CapturingStream,
        _ => ErrorKind::Driver,
    }
}

/// Whether a number may speak of the context that a stream or an event of the caller's belongs to.
pub(super) fn may_be_the_callers(code: u32) -> bool {
    matches!(code, INVALID_CONTEXT | CONTEXT_IS_DESTROYED | INVALID_HANDLE)
}

fn cure(code: u32) -> &'static str {
    match (kind(code), code) {
        (_, NOT_INITIALIZED) => {
            "this process was forked after CUDA had been used, which CUDA can't follow: start it anew (spawn)"
        }
        (_, 46) => "another process has the device to itself: see its compute mode in nvidia-smi",
        (_, 802) => {
            "the machine is not ready: start nvidia-fabricmanager, and see whether its services are up"
        }
        (_, 803 | 804) => {
            "the driver library does not fit the kernel module: reinstall NVIDIA's driver, or restart"
        }
        (_, 807) => "the MPS server is starting or recovering: try again",
        (ErrorKind::OutOfDeviceMemory, _) => {
            "the device has no memory left: free some, lower the budget, or see which other process holds it"
        }
        (ErrorKind::DeviceLost, _) => {
            "the device's context is gone or a kernel faulted in it: nothing in it can be used again, restart the process"
        }
        (ErrorKind::CapturingStream, _) => "end the capture into a graph first, or name a stream outside it",
        _ => "CUDA's documentation of the call says when it answers that",
    }
}

/// The name that the driver gives a number, such as `CUDA_ERROR_OUT_OF_MEMORY`.
fn name(api: &Api, code: u32) -> &'static str {
    let mut name = std::ptr::null();
    // SAFETY: the pointer is to a living pointer, which is set to null or to a string of the library.
    if unsafe { (api.get_error_name)(code, &raw mut name) } != 0 || name.is_null() {
        return "CUDA_ERROR_UNKNOWN_TO_ITS_DRIVER";
    }
    // SAFETY: the string is a constant of the library, which is never closed.
    unsafe { CStr::from_ptr(name) }.to_str().unwrap_or("CUDA_ERROR_WITH_A_BROKEN_NAME")
}

#[cold]
pub(super) fn refused(api: &Api, verb: Verb, size: Option<Bytes>, code: u32) -> Error {
    Error::from_driver(kind(code), failure(api, verb, size, code), cure(code))
}

/// The refusal of a stream or an event that is the caller's, by a context that is well.
#[cold]
pub(super) fn refused_of_caller(api: &Api, verb: Verb, code: u32) -> Error {
    let why = "the stream or event that was named is destroyed, or of another context; name one of the device's that lives";
    Error::from_driver(ErrorKind::InvalidArgument, failure(api, verb, None, code), why)
}

fn failure(api: &Api, verb: Verb, size: Option<Bytes>, code: u32) -> DriverFailure {
    DriverFailure { verb, code: i64::from(code), name: name(api, code), size }
}

/// The same for calls that look for a device and set it up, which have no verb.
pub(super) fn check_set_up(api: &Api, code: u32) -> Result<()> {
    if code == 0 {
        return Ok(());
    }
    let kind = match kind(code) {
        ErrorKind::Driver => ErrorKind::Unsupported,
        other => other,
    };
    let what = match code {
        NO_DEVICE => {
            "no CUDA device is found: look at nvidia-smi and CUDA_VISIBLE_DEVICES, or use the host driver"
        }
        STUB_LIBRARY => {
            "the library that was found is the toolkit's stub: put NVIDIA's driver before it on LD_LIBRARY_PATH"
        }
        46 | NOT_INITIALIZED | 802..=804 | 807 => cure(code),
        _ if kind != ErrorKind::Unsupported => cure(code),
        _ => "CUDA can't be used on this machine: see whether nvidia-smi works, or use the host driver",
    };
    Err(Error::new(kind, format!("CUDA answers {} ({code}); {what}", name(api, code))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_of_the_kind_that_an_engine_can_act_on() {
        assert_eq!(kind(2), ErrorKind::OutOfDeviceMemory);
        for gone in [3, 4, 201, 700, 709, 719, 911] {
            assert_eq!(kind(gone), ErrorKind::DeviceLost, "{gone}");
        }
        for capturing in [900, 906, 907] {
            assert_eq!(kind(capturing), ErrorKind::CapturingStream, "{capturing}");
        }
        for other in [1, 46, 400, 801, 807, 99_999] {
            assert_eq!(kind(other), ErrorKind::Driver, "{other}");
        }
    }
}
