//! The driver that a replay calls, and what it counted.
//!
//! Each policy gets a driver of its own, so that counts and leaks are its own too.

use serde::Serialize;
use std::sync::Arc;
use std::time::Duration;
use vattn::driver::owned::DriverHandle;

use vattn::Result;
use vattn::driver::Driver;
use vattn::driver::checked::{Checked, CheckedOptions};
use vattn::error::Verb;
use vattn::stats::Counters;
use vattn::units::Bytes;

use crate::place::Place;

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
    inner: Arc<dyn Driver>,
    handle: DriverHandle,
    checked: Arc<Checked>,
}

impl Bench {
    /// Opens a driver that has `budget` bytes and refuses more.
    pub(crate) fn open(place: &Place, granule: Bytes, budget: Bytes) -> Result<Self> {
        let inner = place.driver(granule, budget)?;
        let checked =
            Checked::new(inner.clone(), CheckedOptions { budget: Some(budget), ..CheckedOptions::REPLAY });
        let handle = DriverHandle::new(checked.clone(), Arc::new(Counters::default()));
        Ok(Self { inner, handle, checked })
    }

    /// What the device says is free. Not one of the calls that are counted.
    pub(crate) fn free(&self) -> Result<Bytes> {
        Ok(self.inner.memory_info()?.free)
    }

    /// The driver itself, for what counts its own calls.
    pub(crate) fn driver(&self) -> Arc<dyn Driver> {
        self.checked.clone()
    }

    /// To make things with.
    pub(crate) fn handle(&self) -> &DriverHandle {
        &self.handle
    }

    /// How often that verb was called so far, and what its calls cost at the modelled prices.
    pub(crate) fn spent_on(&self, verb: Verb) -> (u64, Duration) {
        (self.checked.calls().of(verb), self.checked.modelled_of(verb))
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
