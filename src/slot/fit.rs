//! Which parked slot a new request adopts: pure.
//!
//! Adopting costs no driver call, so the question is only what the slot's extents will waste and
//! what will still have to be mapped. Best fit is the least waste at an extent boundary over the
//! tokens that are likely to come, not the smallest slot that is large enough: a request of 20
//! granules is better off with boundaries at 16, 20, 22 of a long slot than with one extent of 32.
//!
//! The score of a candidate is in mappings: the ones it will need, plus the mean waste, in granules,
//! at a price.

use crate::layout::TensorLayout;
use crate::pool::fewest;
use crate::slot::growth::Generosity;
use crate::tensor::Run;
use crate::units::{Granules, TokenCount, wide};

/// Tokens to come over which the waste is averaged.
const HORIZON: TokenCount = TokenCount::new(256);
/// In so many granules at the most, far beyond any model's: they are gone through one extent at a time.
const MOST_HORIZON: Granules = Granules::new(1 << 12);
/// Tokens to come for which a slot should have memory.
const REACH: TokenCount = TokenCount::new(320);
/// What a granule of mean waste costs, in mappings.
const WASTE_PRICE: f64 = 0.4;
/// What unmapping an extent costs, in mappings (20 µs to 31: the record of the driver's costs).
const UNMAP_PRICE: f64 = 0.6;
/// How likely the memory within reach will be needed.
const REACH_LIKELIHOOD: f64 = 0.9;

/// What is asked of a slot, in granules of the tensor with the largest row.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wish {
    need: Granules,
    horizon: Granules,
    reach: Granules,
    terms: Generosity,
    short: bool,
}

impl Wish {
    /// A slot for a request that will soon hold `hint` tokens, of `most` that it can hold.
    pub(crate) fn new(
        hint: TokenCount,
        most: TokenCount,
        tensor: &TensorLayout,
        terms: Generosity,
        short: bool,
    ) -> Self {
        Self {
            need: tensor.granules(hint),
            horizon: tensor.granules(HORIZON.min(most)).clamp(Granules::new(1), MOST_HORIZON),
            reach: tensor.granules(REACH.min(most)),
            terms,
            short,
        }
    }

    /// How bad a fit a run is; the least is the best.
    pub(crate) fn score(&self, run: &Run) -> f64 {
        let pieces = run.pieces();
        let (mut next, mut end, held, mappings) = match run.covering(self.need) {
            Some(count)
                if count <= run.needed()
                    || run.boundary(count) - self.need <= self.terms.overshoot(self.short) =>
            {
                (count, run.boundary(count), run.end(), 0.0)
            }
            Some(count) => {
                let (end, mappings) = self.cover_from(run.boundary(count - 1));
                let dropped = number(wide(pieces.len() - count + 1));
                (pieces.len(), end, end, mappings + UNMAP_PRICE * dropped)
            }
            None => {
                let (end, mappings) = self.cover_from(run.end());
                (pieces.len(), end, end, mappings)
            }
        };
        let last = self.need + self.horizon;
        let mut at = self.need;
        let mut waste = 0.0;
        while at < last {
            while end <= at {
                end = match pieces.get(next) {
                    Some(piece) => piece.end(),
                    None => end + self.terms.growth(at).max(Granules::new(1)),
                };
                next += 1;
            }
            let to = end.min(last);
            let tokens = number((to - at).get());
            // The mean distance from a point between `at` and `to` to the piece's end, at granules' middles.
            let mean = number(end.get()) - f64::midpoint(number(at.get()), number(to.get())) - 0.5;
            waste += tokens * mean.max(0.0);
            at = to;
        }
        waste /= number(self.horizon.get());
        let reach = self.need + self.reach;
        let short_of = reach.saturating_sub(held);
        let to_come = number(short_of.get()) / number(self.terms.growth(self.need).get().max(1));
        mappings + REACH_LIKELIHOOD * to_come + WASTE_PRICE * waste
    }

    /// Where a cover of the need would end if mapped from there on, and the mappings it takes.
    fn cover_from(&self, from: Granules) -> (Granules, f64) {
        let (granules, extents) = fewest(self.need - from, self.terms.slack(self.need, self.short));
        (from + granules, number(extents))
    }
}

/// A count as a score's number; counts of granules are far below 2^53.
fn number(count: u64) -> f64 {
    #[expect(clippy::as_conversions, reason = "counts of granules are far below 2^53; there is no `From`")]
    {
        count as f64
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::driver::ledger::{Ledger, LedgerOptions};
    use crate::driver::owned::{DriverHandle, PhysicalMemory};
    use crate::geometry::{Config, Geometry};
    use crate::layout::Layout;
    use crate::pool::Pool;
    use crate::stats::Counters;
    use crate::tensor::Tensor;
    use crate::units::{Bytes, SizeClass};

    /// Llama-3-8B, sliced: 32 tokens a granule.
    struct Bench {
        driver: DriverHandle,
        layout: Layout,
        tensor: Tensor,
        pool: Pool,
    }

    impl Bench {
        fn new() -> Self {
            let options = LedgerOptions { granule: Bytes::mib(2), capacity: Bytes::gib(64), addresses: None };
            let counters = Arc::new(Counters::default());
            let driver = DriverHandle::new(Ledger::new(options).unwrap(), Arc::clone(&counters));
            let config =
                Config::builder(Geometry::preset("llama-3-8b").unwrap()).max_slots(64).build().unwrap();
            let layout = Layout::new(&config, driver.info().granule, driver.info().device).unwrap();
            let tensor = Tensor::reserve(&driver, &layout.tensors()[0]).unwrap();
            let pool = Pool::new(driver.info().granule, Bytes::gib(64), counters);
            Self { driver, layout, tensor, pool }
        }

        /// A run of extents of those sizes, in granules.
        fn run(&mut self, slot: u32, sizes: &[u64]) -> Run {
            let mut run = Run::default();
            for size in sizes {
                let class = SizeClass::at_most(Granules::new(*size)).unwrap();
                let promise = self.pool.promise(class, self.pool.budget()).unwrap();
                let bytes = self.driver.info().granule.to_bytes(class.granules());
                let extent = self.pool.keep(promise, PhysicalMemory::new(&self.driver, bytes).unwrap());
                run.push(self.tensor.map(slot, run.end(), extent).unwrap());
            }
            run
        }

        fn wish(&self, tokens: u64) -> Wish {
            let tensor = &self.layout.tensors()[0];
            let most = self.layout.max_tokens();
            Wish::new(TokenCount::new(tokens), most, tensor, Generosity::of(tensor, most, 32), false)
        }
    }

    #[test]
    fn the_least_waste_at_a_boundary_beats_the_smallest_that_is_enough() {
        let mut bench = Bench::new();
        let (coarse, fine) = (bench.run(0, &[32]), bench.run(1, &[16, 4, 2, 2, 2, 2, 2, 2, 8]));
        let wish = bench.wish(20 * 32);
        assert!(wish.score(&fine) < wish.score(&coarse), "20 granules: 16, 20, 22 … suits better than 32");
    }

    #[test]
    fn memory_that_is_there_beats_none_and_mappings_saved_count() {
        let mut bench = Bench::new();
        let (empty, some) = (Run::default(), bench.run(1, &[16, 4, 2, 2]));
        let all = bench.run(2, &[16, 4, 2, 2, 2, 2, 2, 2, 2, 2]);
        let wish = bench.wish(22 * 32);
        assert!(wish.score(&some) < wish.score(&empty));
        assert!(wish.score(&all) < wish.score(&some), "what is within reach need not be mapped later");
    }

    #[test]
    fn an_extent_that_reaches_far_too_far_is_worse_than_an_empty_slot() {
        let mut bench = Bench::new();
        let (empty, huge) = (Run::default(), bench.run(1, &[256]));
        let wish = bench.wish(4 * 32);
        assert!(wish.score(&empty) < wish.score(&huge));
    }
}
