//! The driver that a replay calls, and what it counted.
//!
//! Each policy gets a driver of its own, so that counts and leaks are its own too.

use clap::ValueEnum;
use serde::Serialize;
use std::sync::Arc;
use std::time::Duration;
use vattn::driver::owned::DriverHandle;

use vattn::Result;
use vattn::driver::Driver;
use vattn::driver::checked::{Checked, CheckedOptions};
use vattn::driver::host::{Host, HostOptions};
use vattn::driver::ledger::{Ledger, LedgerOptions};
use vattn::error::Verb;
use vattn::stats::Counters;
use vattn::units::Bytes;

/// Where the memory is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum DeviceKind {
    /// This machine's memory, really mapped (Linux)
    Host,
    /// Nowhere: calls are counted and nothing is mapped, so that any size works anywhere
    Ledger,
}

/// How many verbs [`DriverCalls`] counts.
pub(crate) const VERBS: usize = 6;

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

impl DriverCalls {
    /// The verbs, in the order of [`counts`](Self::counts).
    pub(crate) const NAMES: [&str; VERBS] = ["reserve", "create", "map", "set_access", "unmap", "release"];

    /// Each verb's calls.
    pub(crate) fn counts(self) -> [u64; VERBS] {
        [self.reserve, self.create, self.map, self.set_access, self.unmap, self.release]
    }
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
    checked: Arc<Checked>,
}

impl Bench {
    /// Opens a driver that has `budget` bytes and refuses more.
    pub(crate) fn open(kind: DeviceKind, granule: Bytes, budget: Bytes) -> Result<Self> {
        let inner: Arc<dyn Driver> = match kind {
            DeviceKind::Host => Host::new(HostOptions::new(granule, budget))?,
            DeviceKind::Ledger => Ledger::new(LedgerOptions { granule, capacity: budget, addresses: None })?,
        };
        let checked = Checked::new(inner, CheckedOptions { budget: Some(budget), ..CheckedOptions::REPLAY });
        let handle = DriverHandle::new(checked.clone(), Arc::new(Counters::default()));
        Ok(Self { handle, checked })
    }

    /// The driver itself, for what counts its own calls.
    pub(crate) fn driver(&self) -> Arc<dyn Driver> {
        self.checked.clone()
    }

    /// To make things with.
    pub(crate) fn handle(&self) -> &DriverHandle {
        &self.handle
    }

    /// The calls so far.
    pub(crate) fn calls(&self) -> DriverCalls {
        let calls = self.checked.calls();
        DriverCalls {
            reserve: calls.of(Verb::Reserve),
            create: calls.of(Verb::Create),
            map: calls.of(Verb::Map),
            set_access: calls.of(Verb::SetAccess),
            unmap: calls.of(Verb::Unmap),
            release: calls.of(Verb::Release),
        }
    }

    /// The calls so far at the costs that were measured on an H200.
    pub(crate) fn modelled(&self) -> Duration {
        self.checked.modelled()
    }

    /// What was counted so far, and what is alive now.
    pub(crate) fn books(&self) -> Books {
        let live = self.checked.live();
        Books {
            calls: self.calls(),
            modelled_seconds: self.modelled().as_secs_f64(),
            live: Leaked { extents: live.handles, mappings: live.mappings, reservations: live.reservations },
        }
    }
}
