//! What a `CUresult` means: the kind of error, its name, and what cures it.

use std::ffi::CStr;

use crate::driver::cuda::api::Api;
use crate::error::{DriverFailure, Error, ErrorKind, Result, Verb};
use crate::units::Bytes;

pub(super) const NOT_READY: u32 = 600;
const OUT_OF_MEMORY: u32 = 2;
const NO_DEVICE: u32 = 100;

/// Which kind of error a number is. A number of a newer driver is a refusal like any other.
fn kind(code: u32) -> ErrorKind {
    match code {
        OUT_OF_MEMORY => ErrorKind::OutOfDeviceMemory,
        // Deinitialized, device unavailable, invalid context, uncorrectable ECC or NVLink error.
        4 | 46 | 201 | 214 | 220 | 226 => ErrorKind::DeviceLost,
        // A kernel's fault, which every later call reports.
        700 | 702 | 709 | 710 | 714..=719 | 721 => ErrorKind::DeviceLost,
        // The server between several processes and one device went away.
        806 | 807 | 810 => ErrorKind::DeviceLost,
        900..=908 => ErrorKind::CapturingStream,
        _ => ErrorKind::Driver,
    }
}

fn cure(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::OutOfDeviceMemory => {
            "the device has no memory left: free some, lower the budget, or see which other process holds it"
        }
        ErrorKind::DeviceLost => {
            "the device's context is gone or a kernel faulted in it: nothing in it can be used again, restart the process"
        }
        ErrorKind::CapturingStream => "end the capture into a graph first, or name a stream outside it",
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

/// Zero is success; anything else is an error.
pub(super) fn check(api: &Api, verb: Verb, size: Option<Bytes>, code: u32) -> Result<()> {
    if code == 0 { Ok(()) } else { Err(refused(api, verb, size, code)) }
}

#[cold]
fn refused(api: &Api, verb: Verb, size: Option<Bytes>, code: u32) -> Error {
    let kind = kind(code);
    let failure = DriverFailure { verb, code: i64::from(code), name: name(api, code), size };
    Error::from_driver(kind, failure, cure(kind))
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
        34 => {
            "the library that was found is the toolkit's stub: put NVIDIA's driver before it on LD_LIBRARY_PATH"
        }
        803 | 804 => {
            "the driver library does not fit the kernel module: reinstall NVIDIA's driver, or restart"
        }
        OUT_OF_MEMORY => "the device has no memory left for a context: see which process holds it",
        _ if kind == ErrorKind::DeviceLost => cure(kind),
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
        for gone in [4, 201, 700, 709, 719] {
            assert_eq!(kind(gone), ErrorKind::DeviceLost, "{gone}");
        }
        for capturing in [900, 906, 907] {
            assert_eq!(kind(capturing), ErrorKind::CapturingStream, "{capturing}");
        }
        for other in [1, 400, 801, 99_999] {
            assert_eq!(kind(other), ErrorKind::Driver, "{other}");
        }
    }
}
