//! Which kinds of memory can be made, and for which uses it can be mapped.
//!
//! What a device claims a system may refuse, so one handle of each kind is made.

use serde::{Deserialize, Serialize};
use vattn::Result;
use vattn::driver::cuda::{Cuda, CudaOptions};
use vattn::driver::owned::{DriverHandle, PhysicalMemory, Reservation};
use vattn::driver::{Access, HandleOptions};
use vattn::units::Device;

use crate::Failure;
use crate::place::Place;
use crate::probe::Subject;
use crate::probe::child::Teller;

/// What is tried.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum What {
    /// Memory for this process.
    Plain,
    /// Memory that a file descriptor hands to another process.
    FileDescriptor,
    /// Memory that a network card reads and writes.
    Rdma,
    /// Memory that other machines of a fabric import.
    Fabric,
    MapReadWrite,
    MapReadOnly,
    /// One handle at two addresses, writable at the first and readable at the second.
    MapTwice,
}

/// What came of it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Trial {
    pub(super) what: What,
    pub(super) works: bool,
    pub(super) refusal: Option<String>,
}

pub(super) fn answer(subject: &Subject, teller: &mut Teller<'_>) -> Result<(), Failure> {
    let mut trials = Vec::new();
    for what in [
        What::Plain,
        What::MapReadWrite,
        What::MapReadOnly,
        What::MapTwice,
        What::FileDescriptor,
        What::Rdma,
        What::Fabric,
    ] {
        let Some(tried) = attempt(subject, what) else { continue };
        trials.push(Trial { what, works: tried.is_ok(), refusal: tried.err().map(|error| error.report()) });
        teller.so_far(&trials)?;
    }
    teller.done(&trials)
}

/// `None` where the device has no such kind.
fn attempt(subject: &Subject, what: What) -> Option<Result<()>> {
    match what {
        What::Plain => Some(create(&subject.driver)),
        What::MapReadWrite => Some(map(subject, &[Access::ReadWrite])),
        What::MapReadOnly => Some(map(subject, &[Access::Read])),
        What::MapTwice => Some(map(subject, &[Access::ReadWrite, Access::Read])),
        What::FileDescriptor | What::Rdma | What::Fabric => {
            let Place::Cuda { driver, .. } = &subject.place else { return None };
            Some(match what {
                What::FileDescriptor => create_with(subject, HandleOptions { exportable: true, rdma: false }),
                What::Rdma => create_with(subject, HandleOptions { exportable: false, rdma: true }),
                _ => driver.try_fabric(),
            })
        }
    }
}

fn create(driver: &DriverHandle) -> Result<()> {
    PhysicalMemory::new(driver, driver.info().granule.bytes())?.release().map_err(|(_, error)| error)
}

/// On the same device, with a driver whose handles are all of that kind.
fn create_with(subject: &Subject, handles: HandleOptions) -> Result<()> {
    let ordinal = match subject.driver.info().device {
        Device::Cuda(ordinal) => Some(ordinal),
        Device::Cpu => None,
    };
    let driver = Cuda::new(CudaOptions { ordinal, handles })?;
    create(&DriverHandle::new(driver, subject.counters.clone()))
}

/// One handle at as many addresses.
fn map(subject: &Subject, accesses: &[Access]) -> Result<()> {
    let memory = PhysicalMemory::new(&subject.driver, subject.granule())?;
    let mut mappings = Vec::new();
    for access in accesses {
        let reservation = Reservation::new(&subject.driver, subject.granule())?;
        mappings.push(reservation.map_for(vattn::units::Bytes::ZERO, &memory, *access)?);
    }
    mappings.into_iter().try_for_each(|mapping| mapping.unmap().map_err(|(_, error)| error))
}
