//! Which device, driver and system this is.

use std::fs;

use serde::Serialize;
use vattn::driver::Driver;
use vattn::driver::cuda::driver_version;
use vattn::driver::host::{Host, HostOptions};
use vattn::units::Bytes;
use vattn::{Error, ErrorKind, Result};

use crate::place::Place;

/// The system and the device.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub(super) struct Machine {
    pub(super) system: String,
    pub(super) device: Device,
}

/// A device by what describes it.
#[derive(Clone, PartialEq, Debug, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub(super) enum Device {
    Cuda(Card),
    Host(Memory),
}

#[derive(Clone, PartialEq, Debug, Serialize)]
pub(super) struct Card {
    pub(super) ordinal: u32,
    pub(super) name: String,
    pub(super) compute_capability: String,
    /// The newest that the driver knows.
    pub(super) cuda_version: String,
    /// Of NVIDIA's module in the kernel, where the system tells it.
    pub(super) kernel_module: Option<String>,
    pub(super) memory_bytes: Bytes,
    pub(super) free_bytes: Bytes,
    pub(super) granule_bytes: Bytes,
    pub(super) recommended_granule_bytes: Bytes,
    pub(super) claims: Claims,
}

/// Which handles the device says it can make.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub(super) struct Claims {
    pub(super) file_descriptor: bool,
    pub(super) rdma: bool,
    pub(super) fabric: bool,
}

#[derive(Clone, PartialEq, Debug, Serialize)]
pub(super) struct Memory {
    /// What the probe uses; a user sets his own.
    pub(super) granule_bytes: Bytes,
    /// The least that can be set: a page.
    pub(super) page_bytes: Bytes,
    /// A file in memory could be made.
    pub(super) memfd: bool,
    /// The kernel's limit on the mappings of a process, where it tells.
    pub(super) max_map_count: Option<u64>,
}

impl Machine {
    pub(super) fn of(place: &Place) -> Result<Self> {
        let kernel =
            line_of("/proc/sys/kernel/osrelease").map(|release| format!(" {release}")).unwrap_or_default();
        Ok(Self {
            system: format!("{}{kernel}, {}", std::env::consts::OS, std::env::consts::ARCH),
            device: match place {
                Place::Cuda { driver, .. } => {
                    let device = driver.device()?;
                    let memory = driver.memory_info()?;
                    let (major, minor) = device.compute_capability;
                    let (cuda_major, cuda_minor) = driver_version()?;
                    let granule = driver.info().granule.bytes();
                    Device::Cuda(Card {
                        ordinal: device.ordinal,
                        name: device.name,
                        compute_capability: format!("{major}.{minor}"),
                        cuda_version: format!("{cuda_major}.{cuda_minor}"),
                        kernel_module: line_of("/sys/module/nvidia/version"),
                        memory_bytes: memory.total,
                        free_bytes: memory.free,
                        granule_bytes: granule,
                        recommended_granule_bytes: device.recommended_granule.unwrap_or(granule),
                        claims: Claims {
                            file_descriptor: device.exportable,
                            rdma: device.rdma,
                            fabric: device.fabric,
                        },
                    })
                }
                Place::Host | Place::Ledger => Device::Host(Memory {
                    granule_bytes: place.granule(None)?,
                    page_bytes: page()?,
                    // Without one there would be no page to tell of.
                    memfd: true,
                    max_map_count: line_of("/proc/sys/vm/max_map_count").and_then(|text| text.parse().ok()),
                }),
            },
        })
    }
}

/// The least granule that the host driver takes.
fn page() -> Result<Bytes> {
    let mut refusal = Error::new(ErrorKind::Internal, "no granule was tried");
    for shift in 9..=30 {
        let granule = Bytes::new(1 << shift);
        match Host::new(HostOptions::new(granule, granule)) {
            Ok(_) => return Ok(granule),
            Err(error) => refusal = error,
        }
    }
    Err(refusal)
}

/// The first line of one of the kernel's files, where it is there and says something.
fn line_of(path: &str) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    text.lines().next().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned)
}
