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
/// Tokens to come for which a slot should have memory.
const REACH: TokenCount = TokenCount::new(512);
/// What a granule of mean waste costs, in mappings.
const WASTE_PRICE: f64 = 0.5;
/// What unmapping an extent costs, in mappings (20 µs to 31: the record of the driver's costs).
const UNMAP_PRICE: f64 = 0.6;
/// How likely the memory within reach will be needed.
const REACH_LIKELIHOOD: f64 = 0.5;

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
    /// A slot for a request that will soon hold `hint` tokens.
    pub(crate) fn new(hint: TokenCount, tensor: &TensorLayout, terms: Generosity, short: bool) -> Self {
        Self {
            need: tensor.granules(hint),
            horizon: tensor.granules(HORIZON).max(Granules::new(1)),
            reach: tensor.granules(REACH),
            terms,
            short,
        }
    }

    /// How bad a fit a run is; the least is the best.
    pub(crate) fn score(&self, run: &Run) -> f64 {
        let pieces = run.pieces();
        let (mut next, mut end, mappings) = match run.covering(self.need) {
            Some(count) if run.boundary(count) - self.need <= self.terms.overshoot(self.short) => {
                (count, run.boundary(count), 0.0)
            }
            Some(count) => {
                let (end, mappings) = self.cover_from(run.boundary(count - 1));
                let dropped = number(wide(pieces.len() - count + 1));
                (pieces.len(), end, mappings + UNMAP_PRICE * dropped)
            }
            None => {
                let (end, mappings) = self.cover_from(run.end());
                (pieces.len(), end, mappings)
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
        let short_of = reach.saturating_sub(run.end().max(end.min(reach)));
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
