//! The driver that a replay calls, and what it counted.
//!
//! Each policy gets a driver of its own, so that counts and leaks are its own too.

use serde::Serialize;
use std::ops::{Add, Sub};
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

    fn each(self, other: Self, of: fn(u64, u64) -> u64) -> Self {
        let (ours, others) = (self.counts(), other.counts());
        let [reserve, create, map, set_access, unmap, release] =
            std::array::from_fn(|verb| of(ours[verb], others[verb]));
        Self { reserve, create, map, set_access, unmap, release }
    }
}

impl Add for DriverCalls {
    type Output = Self;

    fn add(self, more: Self) -> Self {
        self.each(more, |count, more| count + more)
    }
}

impl Sub for DriverCalls {
    type Output = Self;

    fn sub(self, earlier: Self) -> Self {
        self.each(earlier, |count, earlier| count - earlier)
    }
}

/// What a driver's calls came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Spent {
    pub(crate) calls: DriverCalls,
    /// At the costs that were measured on an H200.
    pub(crate) modelled: Duration,
}

impl Sub for Spent {
    type Output = Self;

    fn sub(self, earlier: Self) -> Self {
        Self { calls: self.calls - earlier.calls, modelled: self.modelled - earlier.modelled }
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
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Books {
    pub(crate) spent: Spent,
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

    /// The calls so far, and what they cost.
    pub(crate) fn spent(&self) -> Spent {
        let calls = self.checked.calls();
        let calls = DriverCalls {
            reserve: calls.of(Verb::Reserve),
            create: calls.of(Verb::Create),
            map: calls.of(Verb::Map),
            set_access: calls.of(Verb::SetAccess),
            unmap: calls.of(Verb::Unmap),
            release: calls.of(Verb::Release),
        };
        Spent { calls, modelled: self.checked.modelled() }
    }

    /// What was counted so far, and what is alive now.
    pub(crate) fn books(&self) -> Books {
        let live = self.checked.live();
        Books {
            spent: self.spent(),
            live: Leaked { extents: live.handles, mappings: live.mappings, reservations: live.reservations },
        }
    }
}
