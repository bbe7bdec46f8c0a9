//! Which devices there are, and what each can do.

use std::ffi::CStr;

use serde::Serialize;

use crate::driver::HandleOptions;
use crate::driver::cuda::api::{self, AllocationProp, Api};
use crate::driver::cuda::codes;
use crate::error::{Error, ErrorKind, Result};
use crate::units::{Bytes, wide};

/// `CU_MEM_ALLOC_GRANULARITY_MINIMUM`
pub(super) const MINIMUM: u32 = 0;
/// `CU_MEM_ALLOC_GRANULARITY_RECOMMENDED`
const RECOMMENDED: u32 = 1;

const COMPUTE_CAPABILITY_MAJOR: u32 = 75;
const COMPUTE_CAPABILITY_MINOR: u32 = 76;
const VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED: u32 = 102;
const HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED: u32 = 103;
const GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED: u32 = 110;
const HANDLE_TYPE_FABRIC_SUPPORTED: u32 = 128;

/// A device as CUDA describes it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[non_exhaustive]
pub struct CudaDevice {
    /// Its number among those that the process may see.
    pub ordinal: u32,
    /// Such as `NVIDIA H200`.
    pub name: String,
    /// Major and minor.
    pub compute_capability: (u32, u32),
    /// Bytes of memory in all.
    pub memory: Bytes,
    /// It can map memory behind addresses at all.
    pub virtual_memory: bool,
    /// Handles can be exported through a file descriptor.
    pub exportable: bool,
    /// Handles can be made so that a network card reads and writes them.
    pub rdma: bool,
    /// Handles can be exported to other machines of one NVLink fabric, as far as the device goes.
    pub fabric: bool,
    /// The smallest unit of allocation; `None` without virtual memory.
    pub granule: Option<Bytes>,
    /// The unit that CUDA recommends; `None` without virtual memory.
    pub recommended_granule: Option<Bytes>,
}

impl CudaDevice {
    /// Whether the device can make such handles.
    pub(super) fn check(&self, options: HandleOptions) -> Result<()> {
        let lack = |what: &str, cure: &str| {
            let message = format!("device {} ({}) has no {what}; {cure}", self.ordinal, self.name);
            Err(Error::new(ErrorKind::Unsupported, message))
        };
        if !self.virtual_memory {
            return lack("virtual memory management", "use another device, or the host driver");
        }
        if options.exportable && !self.exportable {
            return lack("handles that a file descriptor exports", "leave the option exportable unset");
        }
        if options.rdma && !self.rdma {
            return lack("RDMA to virtual memory", "leave the option rdma unset");
        }
        Ok(())
    }
}

/// The devices that this process may see.
///
/// # Errors
/// [`Unsupported`](ErrorKind::Unsupported) without a driver library, with one that lacks a function,
/// or without a device: the text says which.
pub fn devices() -> Result<Vec<CudaDevice>> {
    let api = api::api()?;
    (0..count(api)?).map(|ordinal| describe(api, ordinal)).collect()
}

/// The newest version of CUDA that the driver knows: major and minor.
///
/// # Errors
/// As [`devices`].
pub fn driver_version() -> Result<(u32, u32)> {
    let api = api::api()?;
    let mut version = 0;
    // SAFETY: the pointer is to a living integer.
    codes::check_set_up(api, unsafe { (api.driver_get_version)(&raw mut version) })?;
    let version = u32::try_from(version).unwrap_or_default();
    Ok((version / 1000, version % 1000 / 10))
}

fn count(api: &Api) -> Result<u32> {
    let mut count = 0;
    // SAFETY: the pointer is to a living integer.
    codes::check_set_up(api, unsafe { (api.device_get_count)(&raw mut count) })?;
    Ok(u32::try_from(count).unwrap_or_default())
}

/// The device of that ordinal.
pub(super) fn get(api: &Api, ordinal: u32) -> Result<i32> {
    let count = count(api)?;
    let mut device = 0;
    if let Some(ordinal) = i32::try_from(ordinal).ok().filter(|_| ordinal < count) {
        // SAFETY: the pointer is to a living integer.
        codes::check_set_up(api, unsafe { (api.device_get)(&raw mut device, ordinal) })?;
        return Ok(device);
    }
    Err(Error::new(
        ErrorKind::InvalidArgument,
        format!(
            "there is no CUDA device {ordinal}: this process sees {count}, numbered from 0; see CUDA_VISIBLE_DEVICES"
        ),
    ))
}

pub(super) fn describe(api: &Api, ordinal: u32) -> Result<CudaDevice> {
    let device = get(api, ordinal)?;
    let attribute = |which: u32| -> Result<u32> {
        let mut value = 0;
        // SAFETY: the pointer is to a living integer.
        codes::check_set_up(api, unsafe { (api.device_get_attribute)(&raw mut value, which, device) })?;
        Ok(u32::try_from(value).unwrap_or_default())
    };
    // An attribute that an older driver does not know is something that it can't do.
    let can = |which: u32| attribute(which).is_ok_and(|value| value != 0);
    let mut memory = 0_usize;
    // SAFETY: the pointer is to a living integer.
    codes::check_set_up(api, unsafe { (api.device_total_mem)(&raw mut memory, device) })?;
    let virtual_memory = can(VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED);
    let prop = AllocationProp::new(ordinal, HandleOptions::default());
    let unit = |which| virtual_memory.then(|| granularity(api, &prop, which)).transpose();
    Ok(CudaDevice {
        ordinal,
        name: name(api, device)?,
        compute_capability: (attribute(COMPUTE_CAPABILITY_MAJOR)?, attribute(COMPUTE_CAPABILITY_MINOR)?),
        memory: Bytes::new(wide(memory)),
        virtual_memory,
        exportable: can(HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED),
        rdma: can(GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED),
        fabric: can(HANDLE_TYPE_FABRIC_SUPPORTED),
        granule: unit(MINIMUM)?,
        recommended_granule: unit(RECOMMENDED)?,
    })
}

fn name(api: &Api, device: i32) -> Result<String> {
    let mut name = [0_u8; 256];
    // SAFETY: the buffer is as long as the call is told, and CUDA ends the text with a zero.
    codes::check_set_up(api, unsafe { (api.device_get_name)(name.as_mut_ptr().cast(), 256, device) })?;
    let text = CStr::from_bytes_until_nul(&name).unwrap_or_default();
    Ok(text.to_string_lossy().into_owned())
}

pub(super) fn granularity(api: &Api, prop: &AllocationProp, which: u32) -> Result<Bytes> {
    let mut granule = 0_usize;
    // SAFETY: both pointers are to living values.
    codes::check_set_up(api, unsafe { (api.mem_get_granularity)(&raw mut granule, prop, which) })?;
    Ok(Bytes::new(wide(granule)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device() -> CudaDevice {
        CudaDevice {
            ordinal: 1,
            name: "NVIDIA Test".into(),
            compute_capability: (9, 0),
            memory: Bytes::gib(1),
            virtual_memory: true,
            exportable: false,
            rdma: false,
            fabric: false,
            granule: Some(Bytes::mib(2)),
            recommended_granule: Some(Bytes::mib(2)),
        }
    }

    #[test]
    fn what_a_device_lacks_is_refused_by_name() {
        device().check(HandleOptions::default()).unwrap();
        let refused = |device: &CudaDevice, options| device.check(options).unwrap_err().to_string();
        let exportable = HandleOptions { exportable: true, rdma: false };
        assert!(refused(&device(), exportable).contains("option exportable"));
        let rdma = HandleOptions { exportable: false, rdma: true };
        assert!(refused(&device(), rdma).contains("device 1 (NVIDIA Test) has no RDMA"));
        let old = CudaDevice { virtual_memory: false, ..device() };
        assert!(refused(&old, HandleOptions::default()).contains("virtual memory management"));
    }
}
