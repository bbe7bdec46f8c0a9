//! Which extents are kept at hand: of the sizes that steps have lacked, a few, created and mapped nowhere.
//!
//! Where the budget has no room left, memory that nobody uses is unmapped for it, and extents of other
//! sizes are given up: this is also where small extents become large ones again.

use crate::cache::background::{BATCH, Came, Pace};
use crate::cache::core::Core;
use crate::cache::work::Planner;
use crate::error::ErrorKind;
use crate::slot::Among;
use crate::units::Granules;

/// What may be kept at hand, of the budget, if nobody says.
const AT_HAND_DIVISOR: u64 = 64;

impl Core {
    /// Does a little towards one more extent at hand.
    pub(super) fn stock(&self, _pace: &mut Pace) -> Came {
        // What is given back to the device is not taken from it again meanwhile.
        if self.goals.lock().is_trimming() {
            return Came::ToNothing;
        }
        let limit = self.at_hand();
        if self.pool.lock().lacking(limit).is_none() {
            return Came::ToNothing;
        }
        let moves = self.moves.lock();
        let (class, work, is_possible) = {
            let mut table = self.table.lock();
            let mut pool = self.pool.lock();
            let budget = pool.budget();
            let Some(class) = pool.lacking(limit) else { return Came::ToNothing };
            let among = Among::Fired { until: u64::MAX };
            let mut planner = Planner::beside_the_path(&mut table, &mut pool, budget, among);
            let is_possible = planner.stock(class, BATCH);
            (class, planner.finish(Vec::new()), is_possible)
        };
        if !is_possible {
            self.pool.lock().give_up_on(class);
            return Came::Moved;
        }
        let result = self.perform(work, |_| {}, |_| {});
        Self::give_way(moves);
        if let Err(error) = result {
            self.pool.lock().give_up_on(class);
            if error.kind() != ErrorKind::OutOfDeviceMemory {
                self.note_failure(error.context("keeping extents at hand"));
            }
        }
        Came::Moved
    }

    /// How much may be kept at hand.
    fn at_hand(&self) -> Granules {
        match self.config.at_hand() {
            Some(bytes) => self.driver.info().granule.within(bytes),
            None => Granules::new(self.pool.lock().budget().get() / AT_HAND_DIVISOR),
        }
    }
}
