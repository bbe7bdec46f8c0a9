//! How much a run grows, and what of it is kept: pure.
//!
//! A mapping costs the same whatever its size, and memory that stays mapped costs nothing to use
//! again. So a growing run asks for more than the next token: for a share of what it holds, or for
//! a fixed number of tokens where that is more. The constants were chosen by replaying the Azure
//! conversation trace; `DESIGN.md` has the figures.

use crate::layout::TensorLayout;
use crate::tensor::Run;
use crate::units::{Granules, SizeClass, TokenCount};

/// Tokens that an extent of a growing run holds at least, where that is a granule or more.
const GROWTH: TokenCount = TokenCount::new(64);
/// Tokens by which a prompt may be rounded up to need fewer extents.
const SLACK: TokenCount = TokenCount::new(64);
/// Tokens that an extent left by an earlier owner may reach beyond the need and still be used.
const OVERSHOOT: TokenCount = TokenCount::new(768);
/// The same two when memory is short.
const TIGHT: TokenCount = TokenCount::new(96);
/// A growing run asks for at least this share of what it has grown since its prompt.
const GROWN_DIVISOR: u64 = 3;
/// Memory is short when less than this share of the budget is left.
const SHORT_DIVISOR: u64 = 10;
/// No single rounding takes more than this share of what is left,
const ROUNDING_DIVISOR: u64 = 8;
/// and no growth more than this one, or than one slot's of all in use.
const GROWTH_DIVISOR: u64 = 2;

/// How generous one tensor may be: in granules, from constants in tokens.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Generosity {
    growth: Granules,
    slack: Granules,
    overshoot: Granules,
    tight_slack: Granules,
    tight_overshoot: Granules,
    divisor: u64,
}

impl Generosity {
    /// For slots of `most` tokens, beyond which no number of tokens is looked at.
    pub(crate) fn of(tensor: &TensorLayout, most: TokenCount, slack_divisor: u32) -> Self {
        let touched = |tokens: TokenCount| tensor.granules(tokens.min(most));
        let whole = |tokens: TokenCount| {
            let touched = touched(tokens);
            let exact = tensor.tokens_within(touched) == tokens.min(most);
            if exact { touched } else { touched.saturating_sub(Granules::new(1)) }
        };
        Self {
            growth: whole(GROWTH).max(Granules::new(1)),
            slack: whole(SLACK),
            overshoot: touched(OVERSHOOT),
            tight_slack: whole(TIGHT),
            tight_overshoot: touched(TIGHT),
            divisor: u64::from(slack_divisor),
        }
    }

    /// The extent that a run of `held` granules asks for when it grows.
    pub(crate) fn growth(&self, held: Granules) -> Granules {
        power_of_two(self.growth.max(Granules::new(held.get() / self.divisor)))
    }

    /// How far a cover of `need` granules may be rounded up.
    pub(crate) fn slack(&self, need: Granules, short: bool) -> Granules {
        if short { self.tight_slack } else { self.slack.max(Granules::new(need.get() / self.divisor)) }
    }

    /// The largest extent that a run of `held` granules, `prompt` of them its prompt's, uses as it is while
    /// there is room: what an earlier owner may leave, or growth would take.
    pub(crate) fn largest(&self, held: Granules, prompt: Granules) -> Granules {
        (self.overshoot + Granules::new(1)).max(self.grown(held, prompt))
    }

    /// The extent that a run asks for when it grows: at least a share of what it has grown.
    fn grown(&self, held: Granules, prompt: Granules) -> Granules {
        let grown = Granules::new(held.saturating_sub(prompt).get() / GROWN_DIVISOR);
        power_of_two(self.growth(held).max(grown))
    }

    /// How far an extent that is there already may reach beyond the need.
    pub(crate) fn overshoot(&self, short: bool) -> Granules {
        if short { self.tight_overshoot } else { self.overshoot }
    }
}

fn power_of_two(granules: Granules) -> Granules {
    SizeClass::at_most(granules).map_or(Granules::ZERO, SizeClass::granules)
}

/// What is left to be generous with, in one operation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Room {
    left: Granules,
    tensors: u64,
    slots: u64,
    short: bool,
}

impl Room {
    /// `left` granules beyond what the operation must have, of `budget` in all, for so many tensors of so many
    /// slots in use.
    pub(crate) fn new(left: Granules, budget: Granules, tensors: u64, slots: u64) -> Self {
        Self { left, tensors, slots: slots.max(1), short: left.get() < budget.get() / SHORT_DIVISOR }
    }

    /// What one growth may take: all other slots in use may want as much.
    fn growth(&self) -> Granules {
        self.share(GROWTH_DIVISOR.max(self.slots))
    }

    pub(crate) fn is_short(&self) -> bool {
        self.short
    }

    fn share(&self, divisor: u64) -> Granules {
        Granules::new(self.left.get() / (divisor * self.tensors))
    }

    fn spend(&mut self, granules: Granules) {
        self.left = self.left.saturating_sub(granules);
    }
}

/// What happens to one run so that it covers a need.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Change {
    /// The first so many pieces cover it.
    Covered {
        /// Pieces that are needed from now on.
        pieces: usize,
    },
    /// All but the first so many pieces go, since the next reaches too far, and a cover is mapped
    /// behind them.
    Extend {
        /// Pieces that stay.
        keep: usize,
        /// What must be covered at least, in granules from the slot's start.
        to: Granules,
        /// How far beyond the cover may reach.
        slack: Granules,
    },
}

/// Decides how `run` comes to cover `need` granules, and spends what that takes beyond the need.
///
/// `prompt` is what the owner's first step needed; zero before it. `wish` is what he said he will soon need:
/// what was mapped for that does not reach too far.
pub(crate) fn change(
    run: &Run,
    need: Granules,
    (prompt, wish): (Granules, Granules),
    most: Granules,
    terms: &Generosity,
    room: &mut Room,
) -> Change {
    let growth = power_of_two(terms.grown(need, prompt).min(room.growth()));
    let (keep, end) = match run.covering(need) {
        Some(pieces) => {
            let over = run.boundary(pieces) - need;
            // What growth would take anew may as well be there already.
            let anew =
                if prompt.is_zero() { Granules::ZERO } else { growth.saturating_sub(Granules::new(1)) };
            let allowed = terms.overshoot(room.short).min(room.share(ROUNDING_DIVISOR)).max(anew);
            let beyond = run.boundary(pieces).saturating_sub(need.max(wish));
            if pieces <= run.needed() {
                return Change::Covered { pieces };
            }
            if beyond <= allowed && (over <= allowed || over <= room.left) {
                room.spend(over);
                return Change::Covered { pieces };
            }
            (pieces - 1, run.boundary(pieces - 1))
        }
        None => (run.pieces().len(), run.end()),
    };
    let missing = need - end;
    let (to, slack) = if !prompt.is_zero() && growth > missing {
        (end + growth, Granules::ZERO)
    } else {
        (need, terms.slack(need, room.short).min(room.share(ROUNDING_DIVISOR)))
    };
    // Addresses end at the slot's most tokens, and so does generosity.
    let to = to.min(most).max(need);
    let slack = slack.min(most - to);
    room.spend(to + slack - need);
    Change::Extend { keep, to, slack }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::{Config, Dtype, Geometry};
    use crate::layout::Layout;
    use crate::units::{Bytes, Device, GranuleSize};

    fn terms(layers_a_tensor: u32) -> Generosity {
        let geometry = Geometry::uniform(layers_a_tensor, 8, 128, Dtype::BF16).unwrap();
        let config = Config::builder(geometry).max_slots(4).build().unwrap();
        let layout = Layout::new(&config, GranuleSize::new(Bytes::mib(2)).unwrap(), Device::Cpu).unwrap();
        Generosity::of(&layout.tensors()[0], layout.max_tokens(), 32)
    }

    fn granules(count: u64) -> Granules {
        Granules::new(count)
    }

    #[test]
    fn tokens_become_granules() {
        let sliced = terms(32);
        assert_eq!(sliced.growth(granules(10)), granules(2));
        assert_eq!(sliced.growth(granules(300)), granules(8));
        assert_eq!(sliced.slack(granules(10), false), granules(2));
        assert_eq!(sliced.slack(granules(640), false), granules(20));
        assert_eq!(sliced.slack(granules(640), true), granules(3));
        assert_eq!(sliced.overshoot(false), granules(24));
        // A granule of one layer holds 1,024 tokens: nothing is rounded up, and one granule left by
        // an earlier owner is used.
        let single = terms(1);
        assert_eq!(single.growth(granules(10)), granules(1));
        assert_eq!(single.slack(granules(10), false), granules(0));
        assert_eq!(single.overshoot(true), granules(1));
    }

    #[test]
    fn a_prompt_is_rounded_and_growth_is_not_one_granule_at_a_time() {
        let (run, terms) = (Run::default(), terms(32));
        let plenty = || Room::new(granules(10_000), granules(10_000), 2, 4);
        let first =
            change(&run, granules(37), (granules(0), granules(0)), granules(4096), &terms, &mut plenty());
        assert_eq!(first, Change::Extend { keep: 0, to: granules(37), slack: granules(2) });
        let later =
            change(&run, granules(1), (granules(37), granules(0)), granules(4096), &terms, &mut plenty());
        assert_eq!(later, Change::Extend { keep: 0, to: granules(2), slack: granules(0) });
        let grown = change(&run, granules(1), (granules(1), granules(0)), granules(1), &terms, &mut plenty());
        assert_eq!(grown, Change::Extend { keep: 0, to: granules(1), slack: granules(0) });
    }

    #[test]
    fn growth_leaves_as_much_for_every_other_slot() {
        let (run, terms) = (Run::default(), terms(32));
        let grown = |left, slots| {
            let mut room = Room::new(granules(left), granules(10_000), 2, slots);
            change(&run, granules(1), (granules(37), granules(0)), granules(4096), &terms, &mut room)
        };
        let to = |end| Change::Extend { keep: 0, to: granules(end), slack: granules(0) };
        // Two granules for each of two tensors of 50 slots; one less, and growth asks for no more than is needed.
        assert_eq!([grown(200, 50), grown(199, 49)], [to(2), to(2)]);
        assert!(matches!(grown(199, 50), Change::Extend { keep: 0, to, .. } if to == granules(1)));
    }

    #[test]
    fn without_room_nothing_is_rounded() {
        let (run, terms) = (Run::default(), terms(32));
        let mut none = Room::new(granules(0), granules(10_000), 2, 4);
        assert!(none.is_short());
        let first = change(&run, granules(37), (granules(0), granules(0)), granules(4096), &terms, &mut none);
        assert_eq!(first, Change::Extend { keep: 0, to: granules(37), slack: granules(0) });
        let later =
            change(&run, granules(38), (granules(37), granules(0)), granules(4096), &terms, &mut none);
        assert_eq!(later, Change::Extend { keep: 0, to: granules(38), slack: granules(0) });
    }
}
