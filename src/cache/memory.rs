//! Giving memory up: reclaim, trim, and a budget that changes.

use crate::cache::core::{self, Core};
use crate::cache::{Fence, fence, work};
use crate::error::{Error, ErrorKind, Result};
use crate::units::{Bytes, Granules};

impl Core {
    pub(super) fn reclaim(&self, bytes: Bytes, fences: &[Fence]) -> Result<Bytes> {
        self.noted(self.check_health().and_then(|()| {
            let fences = fence::record(&self.driver, fences)?;
            let granule = self.driver.info().granule;
            if self.has_background() {
                return Ok(self.ask_for_free(granule.covering(bytes), fences));
            }
            let _moves = self.moves.lock();
            let limit = self.pool.lock().budget();
            self.give_up_memory(
                fences,
                |planner| planner.reclaim(granule.covering(bytes), usize::MAX),
                limit,
            )?;
            Ok(granule.to_bytes(self.pool.lock().free_granules()))
        }))
    }

    pub(super) fn trim(&self, keep: Bytes, fences: &[Fence]) -> Result<Bytes> {
        self.noted(self.check_health().and_then(|()| {
            let fences = fence::record(&self.driver, fences)?;
            let granule = self.driver.info().granule;
            if self.has_background() {
                return Ok(self.ask_for_trim(granule.within(keep), fences));
            }
            let _moves = self.moves.lock();
            self.give_up_memory(fences, |planner| planner.shrink(usize::MAX), granule.within(keep))?;
            let held = granule.to_bytes(self.pool.lock().held());
            tracing::info!(%keep, %held, "memory was given back");
            Ok(held)
        }))
    }

    pub(super) fn set_budget(&self, budget: Bytes) -> Result<()> {
        self.noted(self.check_health().and_then(|()| {
            let granule = self.driver.info().granule;
            let limit: Granules = granule.within(budget);
            if budget < core::least_budget(&self.config, &self.layout) {
                return Err(core::too_small(budget, &self.config, &self.layout));
            }
            let _moves = self.moves.lock();
            let (needed, quarantined, pinned) = {
                let table = self.table.lock();
                let pinned = work::pinned(granule, &table);
                (table.frontier() + table.quarantined(), table.quarantined(), pinned)
            };
            if needed > limit {
                return Err(Error::new(
                    ErrorKind::OutOfBudget,
                    format!(
                        "a budget of {budget} is less than the {} that slots in use need{}{pinned}; retire or truncate slots{} \
                         first",
                        granule.to_bytes(needed),
                        if quarantined.is_zero() { "" } else { ", quarantined memory included" },
                        if pinned.is_empty() { "" } else { " or give up pins" },
                    ),
                ));
            }
            self.give_up_memory(Vec::new(), |planner| planner.shrink(usize::MAX), limit)?;
            self.pool.lock().set_budget(budget);
            self.table.lock().revive();
            tracing::info!(%budget, "the budget was changed");
            Ok(())
        }))
    }

    pub(super) fn budget(&self) -> Bytes {
        self.driver.info().granule.to_bytes(self.pool.lock().budget())
    }
}
