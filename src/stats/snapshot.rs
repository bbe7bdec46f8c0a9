//! The plain data.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::error::{ErrorKind, Verb};
use crate::units::{Bytes, Granules};

/// Everything that a cache counts, at one moment.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[non_exhaustive]
pub struct Snapshot {
    /// How much memory is used for what.
    pub bytes: ByteCounts,
    /// How many slots are used for what.
    pub slots: SlotCounts,
    /// Pins that are alive, each clone of one counted.
    pub pins: u64,
    /// Extents by size, smallest first.
    pub extents: Vec<ClassStats>,
    /// Calls of the driver by verb.
    pub driver: BTreeMap<Verb, CallStats>,
    /// Those of them that were made beside the path of requests: by the mapper, or in `tend`.
    pub background: BTreeMap<Verb, CallStats>,
    /// What has happened so far.
    pub events: Events,
    /// Errors that callers were given, by kind; a kind that never occurred is left out.
    pub failures: BTreeMap<ErrorKind, u64>,
}

impl Snapshot {
    /// As one JSON object.
    #[must_use]
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("plain data with string keys is always JSON")
    }
}

/// How much memory is used for what. `held = mapped + parked + free + quarantined`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
#[non_exhaustive]
pub struct ByteCounts {
    /// What the tokens of the slots in use fill, with no rounding at all: the packed floor. The
    /// tokens of the spare slot are among them.
    pub needed: Bytes,
    /// Extents of slots in use, up to the last one that holds a byte of their tokens, and those that pins
    /// keep.
    pub mapped: Bytes,
    /// Extents that are mapped, hold nobody's tokens and are not pinned: all of a retired slot's, and what
    /// lies beyond the tokens of a slot in use.
    pub parked: Bytes,
    /// What of `parked` was mapped ahead for slots in use. It is `parked` all the same: whoever needs it
    /// may take it.
    pub ahead: Bytes,
    /// Extents that are created and mapped nowhere.
    pub free: Bytes,
    /// Extents that the driver would not let go of after a failure.
    pub quarantined: Bytes,
    /// All that was created and not released. While extents are made of other ones, those that go and those
    /// that come both count, so for a moment it can be more than the budget; what exists never is.
    pub held: Bytes,
    /// What may be held at most, in whole granules.
    pub budget: Bytes,
    /// What of `mapped` pins keep, whether anybody's tokens need it or not.
    pub pinned: Bytes,
}

/// How many slots are used for what.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
#[non_exhaustive]
pub struct SlotCounts {
    /// Slots that a request has.
    pub active: u64,
    /// Slots that nobody has and that still have memory.
    pub parked: u64,
    /// Slots that requests can have.
    pub max: u64,
}

/// Extents of one size.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[non_exhaustive]
pub struct ClassStats {
    /// How many granules each has.
    pub granules: Granules,
    /// How many are mapped nowhere.
    pub free: u64,
    /// How many are mapped.
    pub mapped: u64,
}

/// Calls of one verb of the driver.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct CallStats {
    /// How many there were.
    pub calls: u64,
    /// How many of them failed.
    pub failed: u64,
    /// How long they took in all.
    pub nanoseconds: u64,
}

/// What has happened so far.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
#[non_exhaustive]
pub struct Events {
    /// Steps that succeeded.
    pub steps: u64,
    /// Slots that were acquired, adopted ones included.
    pub acquired: u64,
    /// Slots that were acquired with memory in them.
    pub adopted: u64,
    /// Slots that were retired.
    pub retired: u64,
    /// Parked extents that were unmapped for somebody else.
    pub reclaimed: u64,
    /// Free extents that were given up so that others, of another size, could be made.
    pub resized: u64,
    /// Operations that failed on the way and were undone.
    pub rolled_back: u64,
    /// Extents that were mapped before a step needed them.
    pub mapped_ahead: u64,
    /// Work in the background that a call of the driver put an end to.
    pub background_failures: u64,
    /// What could not be given back when it was dropped.
    pub refused_drops: u64,
}
