//! The driver that a replay calls, and what it counted.
//!
//! Each policy gets a driver of its own, so that counts and leaks are its own too.

use clap::ValueEnum;
use serde::Serialize;
use vattn::driver::owned::DriverHandle;
use vattn::units::{Bytes, GranuleSize};
use vattn::{Error, ErrorKind, Result};
use vattn_baselines::standin::StandIn;

/// Where the memory is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum DeviceKind {
    /// This machine's memory, really mapped (Linux)
    Host,
    /// Nowhere: calls are counted and nothing is mapped, so that any size works anywhere
    Ledger,
}

/// Calls of the driver by verb.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub(crate) struct DriverCalls {
    pub(crate) reserve: u64,
    pub(crate) create: u64,
    pub(crate) map: u64,
    pub(crate) set_access: u64,
    pub(crate) unmap: u64,
    pub(crate) release: u64,
}

/// What the driver still has on its books.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub(crate) struct Leaked {
    pub(crate) extents: u64,
    pub(crate) mappings: u64,
    pub(crate) reservations: u64,
}

/// What a driver counted.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub(crate) struct Books {
    pub(crate) calls: DriverCalls,
    /// The calls at the costs that were measured on an H200.
    pub(crate) modelled_seconds: f64,
    pub(crate) live: Leaked,
}

/// A driver under the counting one.
#[derive(Debug)]
pub(crate) struct Bench {
    handle: DriverHandle,
    driver: std::sync::Arc<StandIn>,
}

impl Bench {
    /// Opens a driver that can hold `budget`.
    pub(crate) fn open(_kind: DeviceKind, granule: Bytes, _budget: Bytes) -> Result<Self> {
        if GranuleSize::new(granule).is_none() {
            return Err(Error::new(
                ErrorKind::InvalidConfig,
                format!("a granule of {granule} is not a power of two; 2 MiB is what CUDA has"),
            ));
        }
        let (handle, driver) = StandIn::handle(granule);
        Ok(Self { handle, driver })
    }

    /// To make things with.
    pub(crate) fn handle(&self) -> &DriverHandle {
        &self.handle
    }

    /// What was counted so far, and what is alive now.
    pub(crate) fn books(&self) -> Books {
        let books = self.driver.books();
        let (extents, mappings, reservations) = books.live;
        Books {
            calls: DriverCalls {
                reserve: books.reserve,
                create: books.create,
                map: books.map,
                set_access: books.set_access,
                unmap: books.unmap,
                release: books.release,
            },
            modelled_seconds: books.modelled,
            live: Leaked { extents, mappings, reservations },
        }
    }
}
