//! Giving memory up: reclaim, trim, and a budget that changes.

use crate::cache::{Fence, KvCache, fence};
use crate::error::{Error, ErrorKind, Result};
use crate::units::{Bytes, Granules};

impl KvCache {
    /// Unmaps memory that holds nobody's tokens, the one of least use first, until so many bytes more
    /// are free in the pool or nothing is left to unmap. Waits for the fences of what it unmaps, and
    /// for `fences`.
    ///
    /// Returns what is free in the pool now.
    ///
    /// # Errors
    /// [`InvalidArgument`](ErrorKind::InvalidArgument) for no fence,
    /// [`CapturingStream`](ErrorKind::CapturingStream), and the driver's.
    pub fn reclaim(&self, bytes: Bytes, fences: &[Fence]) -> Result<Bytes> {
        self.noted(self.check_health().and_then(|()| {
            let fences = fence::record(&self.driver, fences)?;
            let granule = self.driver.info().granule;
            let _moves = self.moves.lock();
            let limit = self.pool.lock().budget();
            self.give_up_memory(fences, |planner| planner.reclaim(granule.covering(bytes)), limit)?;
            Ok(granule.to_bytes(self.pool.lock().free_granules()))
        }))
    }

    /// Gives memory back to the device until no more than `keep` is held, or until all is given back
    /// that holds nobody's tokens. Waits for the fences of what it unmaps, and for `fences`.
    ///
    /// Returns what is held now: more than `keep` only where slots in use need it.
    ///
    /// # Errors
    /// [`InvalidArgument`](ErrorKind::InvalidArgument) for no fence,
    /// [`CapturingStream`](ErrorKind::CapturingStream), and the driver's.
    pub fn trim(&self, keep: Bytes, fences: &[Fence]) -> Result<Bytes> {
        self.noted(self.check_health().and_then(|()| {
            let fences = fence::record(&self.driver, fences)?;
            let granule = self.driver.info().granule;
            let _moves = self.moves.lock();
            self.give_up_memory(fences, |planner| planner.shrink(), granule.within(keep))?;
            let held = granule.to_bytes(self.pool.lock().held());
            tracing::info!(%keep, %held, "memory was given back");
            Ok(held)
        }))
    }

    /// Changes what may be held. With a smaller budget memory is given back at once, as
    /// [`trim`](Self::trim) does.
    ///
    /// # Errors
    /// [`InvalidConfig`](ErrorKind::InvalidConfig) for a budget that [`new`](Self::new) would refuse,
    /// [`OutOfBudget`](ErrorKind::OutOfBudget) where slots in use need more than `budget`, and the
    /// driver's. The old budget stays.
    pub fn set_budget(&self, budget: Bytes) -> Result<()> {
        self.noted(self.check_health().and_then(|()| {
            let granule = self.driver.info().granule;
            let limit: Granules = granule.within(budget);
            if budget < super::least_budget(&self.config, &self.layout) {
                return Err(super::too_small(budget, &self.config, &self.layout));
            }
            let _moves = self.moves.lock();
            let (needed, quarantined) = {
                let table = self.table.lock();
                (table.frontier() + table.quarantined(), table.quarantined())
            };
            if needed > limit {
                return Err(Error::new(
                    ErrorKind::OutOfBudget,
                    format!(
                        "a budget of {budget} is less than the {} that slots in use need{}; retire or truncate slots first",
                        granule.to_bytes(needed),
                        if quarantined.is_zero() { "" } else { ", quarantined memory included" },
                    ),
                ));
            }
            self.give_up_memory(Vec::new(), |planner| planner.shrink(), limit)?;
            self.pool.lock().set_budget(budget);
            tracing::info!(%budget, "the budget was changed");
            Ok(())
        }))
    }

    /// What may be held at most.
    #[must_use]
    pub fn budget(&self) -> Bytes {
        self.driver.info().granule.to_bytes(self.pool.lock().budget())
    }
}
