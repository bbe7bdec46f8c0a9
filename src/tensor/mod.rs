//! One reservation, and what is mapped where in it.
//!
//! Owns the addresses of a tensor ([`Tensor`]) and, for each slot, the extents mapped into its part
//! ([`Run`]). Refuses to know who owns a slot, how much it should have, and where extents come from.
//!
//! ```text
//!   a slot's part:  ├──── piece ────┼─ piece ─┼ piece ┤ ......... addresses only ......... │
//!                   0              32        36      37 granules                  slot stride
//! ```
//!
//! Invariants:
//! - a run's pieces lie side by side from the slot's start: what is backed is always a prefix;
//! - a piece is one whole extent, mapped once;
//! - what the driver would not let go of lies behind the pieces and is tried again before anything
//!   is mapped there ([`Run::quarantined`]).
//!
//! Runs are part of a slot's record, behind the lock of rank 1. Mapping and unmapping are done with
//! no lock held, on pieces that are in no run at the time.

use std::sync::Arc;

use crate::driver::owned::{DriverHandle, MapError, Mapping, Reservation};
use crate::error::{Error, Result};
use crate::layout::TensorLayout;
use crate::pool::Extent;
use crate::units::{Bytes, DeviceAddr, GranuleSize, Granules};

/// The addresses of one tensor.
#[derive(Debug)]
pub(crate) struct Tensor {
    layout: TensorLayout,
    granule: GranuleSize,
    reservation: Arc<Reservation>,
}

impl Tensor {
    /// Reserves the addresses; nothing is behind them.
    pub(crate) fn reserve(driver: &DriverHandle, layout: &TensorLayout) -> Result<Self> {
        let reservation = Reservation::new(driver, layout.size())?;
        Ok(Self { layout: layout.clone(), granule: driver.info().granule, reservation })
    }

    pub(crate) fn addr(&self) -> DeviceAddr {
        self.reservation.addr()
    }

    /// Whether so many bytes from `addr` on are its own.
    pub(crate) fn contains(&self, addr: DeviceAddr, size: Bytes) -> bool {
        self.reservation.contains(addr, size)
    }

    /// Maps an extent into a slot's part, from granule `at` on.
    pub(crate) fn map(&self, slot: u32, at: Granules, extent: Extent) -> Result<Piece, Refused> {
        let offset = self.layout.slot_offset(slot) + self.granule.to_bytes(at);
        match self.reservation.map(offset, extent.memory()) {
            Ok(mapping) => Ok(Piece { end: at + extent.class().granules(), extent, mapping }),
            Err(MapError { error, stuck: None }) => Err(Refused { error, extent: Some(extent), piece: None }),
            Err(MapError { error, stuck: Some(mapping) }) => {
                let piece = Piece { end: at + extent.class().granules(), extent, mapping };
                Err(Refused { error, extent: None, piece: Some(piece) })
            }
        }
    }
}

/// Why an extent was not mapped or not unmapped, and where it is now.
#[derive(Debug)]
pub(crate) struct Refused {
    pub(crate) error: Error,
    /// The extent, where it is mapped nowhere.
    pub(crate) extent: Option<Extent>,
    /// The piece, where the driver would not let go of it.
    pub(crate) piece: Option<Piece>,
}

/// One extent, mapped into one slot's part of one tensor.
#[derive(Debug)]
pub(crate) struct Piece {
    end: Granules,
    // Before the extent, so that a drop unmaps before it releases.
    mapping: Mapping,
    extent: Extent,
}

impl Piece {
    pub(crate) fn granules(&self) -> Granules {
        self.extent.class().granules()
    }

    pub(crate) fn extent(&self) -> &Extent {
        &self.extent
    }

    /// Where it ends, in granules from the slot's start.
    pub(crate) fn end(&self) -> Granules {
        self.end
    }

    /// Takes the extent from behind the addresses. Nobody may use them any more.
    pub(crate) fn unmap(self) -> Result<Extent, Refused> {
        let Self { end, extent, mapping } = self;
        match mapping.unmap() {
            Ok(()) => Ok(extent),
            Err((mapping, error)) => {
                Err(Refused { error, extent: None, piece: Some(Self { end, extent, mapping }) })
            }
        }
    }
}

/// What is mapped into one slot's part of one tensor.
#[derive(Debug, Default)]
pub(crate) struct Run {
    pieces: Vec<Piece>,
    /// How many pieces, from the start, hold a byte of the owner's tokens, or are pinned.
    needed: usize,
    /// How many pieces, at the end, were mapped ahead for the present owner.
    ahead: usize,
    quarantined: Vec<Piece>,
}

impl Run {
    /// Granules that are backed, from the slot's start.
    pub(crate) fn end(&self) -> Granules {
        self.pieces.last().map_or(Granules::ZERO, Piece::end)
    }

    /// Granules of the pieces that hold a byte of the owner's tokens, or that a pin keeps.
    pub(crate) fn frontier(&self) -> Granules {
        self.boundary(self.needed)
    }

    /// Where the first `pieces` pieces end.
    pub(crate) fn boundary(&self, pieces: usize) -> Granules {
        match pieces.checked_sub(1) {
            Some(last) => self.pieces[last].end,
            None => Granules::ZERO,
        }
    }

    /// How many pieces, from the start, it takes to cover that much; `None` if all do not.
    pub(crate) fn covering(&self, granules: Granules) -> Option<usize> {
        if granules.is_zero() {
            return Some(0);
        }
        // Growth goes on from the frontier: no search there, as each piece looked at is a line of memory.
        if let Some(next) = self.pieces.get(self.needed)
            && self.frontier() < granules
            && granules <= next.end
        {
            return Some(self.needed + 1);
        }
        let before = self.pieces.partition_point(|piece| piece.end < granules);
        (before < self.pieces.len()).then_some(before + 1)
    }

    pub(crate) fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    pub(crate) fn needed(&self) -> usize {
        self.needed
    }

    pub(crate) fn set_needed(&mut self, pieces: usize) {
        debug_assert!(pieces <= self.pieces.len(), "only what is there is needed");
        self.needed = pieces;
        self.ahead = self.ahead.min(self.pieces.len() - pieces);
    }

    /// Granules that were mapped ahead for the present owner, and that he has not come to need.
    pub(crate) fn ahead(&self) -> Granules {
        self.end() - self.boundary(self.pieces.len() - self.ahead)
    }

    /// The last so many pieces more were mapped ahead for the present owner.
    pub(crate) fn add_ahead(&mut self, pieces: usize) {
        self.ahead = (self.ahead + pieces).min(self.pieces.len() - self.needed);
    }

    /// The run has another owner, or none.
    pub(crate) fn forget_ahead(&mut self) {
        self.ahead = 0;
    }

    /// The last piece, if it holds nobody's tokens and no pin keeps it.
    pub(crate) fn spare(&self) -> Option<&Piece> {
        if self.pieces.len() > self.needed { self.pieces.last() } else { None }
    }

    /// Takes the last piece out, if it holds nobody's tokens and no pin keeps it.
    pub(crate) fn pop_spare(&mut self) -> Option<Piece> {
        if self.pieces.len() == self.needed {
            return None;
        }
        self.ahead = self.ahead.saturating_sub(1);
        self.pieces.pop()
    }

    /// Adds a piece that was mapped, or one that was taken out and could not be unmapped, where the
    /// last one ends.
    pub(crate) fn push(&mut self, piece: Piece) {
        debug_assert_eq!(self.end() + piece.granules(), piece.end, "pieces lie side by side");
        self.pieces.push(piece);
    }

    /// What lies behind the pieces because the driver would not let go of it.
    pub(crate) fn quarantined(&mut self) -> &mut Vec<Piece> {
        &mut self.quarantined
    }

    /// Granules of what the driver would not let go of.
    pub(crate) fn quarantined_granules(&self) -> Granules {
        self.quarantined.iter().map(Piece::granules).sum()
    }
}
