//! The walk through everything under the locks: exact, and dearer than a snapshot.

use serde::Serialize;

use crate::cache::Health;
use crate::cache::core::Core;
use crate::error::{Error, ErrorKind, Result};
use crate::slot::State;
use crate::stats::Snapshot;
use crate::units::{Bytes, TokenCount};

/// Everything about a cache at one moment.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[non_exhaustive]
pub struct Report {
    /// Whether the cache can be trusted with more work.
    pub health: Health,
    /// What is counted.
    pub snapshot: Snapshot,
    /// Every slot that somebody has or that has memory, in order.
    pub slots: Vec<SlotReport>,
}

/// One slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[non_exhaustive]
pub struct SlotReport {
    /// The number that kernels take.
    pub index: u32,
    /// Whether a request has it.
    pub active: bool,
    /// The tokens it holds.
    pub tokens: TokenCount,
    /// Extents up to the last one that holds a byte of its tokens, or that a pin keeps, over all tensors.
    pub mapped: Bytes,
    /// What of that pins keep.
    pub pinned: Bytes,
    /// All extents that are mapped for it, over all tensors, those beyond its tokens included.
    pub backed: Bytes,
    /// Extents in its way that the driver would not let go of.
    pub quarantined: Bytes,
}

impl Report {
    /// As one JSON object.
    #[must_use]
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("plain data with string keys is always JSON")
    }
}

impl Core {
    pub(super) fn report(&self) -> Result<Report> {
        let _moves = self.moves.lock();
        let table = self.table.lock();
        let pool = self.pool.lock();
        let audit = table.audit().and_then(|in_use| pool.audit(in_use));
        let report = audit.map(|()| Report {
            health: self.health(),
            snapshot: self.counters.snapshot(),
            slots: (0..self.layout.slots())
                .map(|slot| (slot, table.describe(slot)))
                .filter(|(_, (state, _, [.., quarantined]))| *state != State::Empty || !quarantined.is_zero())
                .map(|(index, (state, tokens, granules))| {
                    let [mapped, pinned, backed, quarantined] =
                        granules.map(|granules| self.layout.granule().to_bytes(granules));
                    let active = matches!(state, State::Active | State::Busy);
                    SlotReport { index, active, tokens, mapped, pinned, backed, quarantined }
                })
                .collect(),
        });
        drop((table, pool));
        self.noted(audit_error(report))
    }
}

fn audit_error<T>(audit: Result<T, String>) -> Result<T> {
    audit.map_err(|what| {
        Error::new(ErrorKind::Internal, format!("the books disagree: {what}; please report it"))
    })
}
