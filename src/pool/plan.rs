//! Which classes cover a need: pure.
//!
//! The driver charges per mapping, whatever its size, so a need is covered with as few extents as
//! the allowed waste permits: it is rounded up to the multiple of the largest power of two that the
//! slack allows, and then taken largest first.

use std::cmp::Ordering;

use crate::units::{Granules, SizeClass, wide};

/// What is to be covered, in granules from the start of a slot's part of a tensor.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Need<'a> {
    /// What is covered already.
    pub(crate) from: Granules,
    /// What must be covered at least.
    pub(crate) to: Granules,
    /// How far beyond `to` the cover may reach.
    pub(crate) slack: Granules,
    /// Positions at which an extent has to end, ascending: what lies before one can be shared
    /// without what lies behind it.
    pub(crate) cuts: &'a [Granules],
}

/// Appends the classes that cover `need`, in the order in which they lie.
pub(crate) fn cover(need: Need<'_>, out: &mut Vec<SizeClass>) {
    let mut at = need.from;
    for cut in need.cuts.iter().copied().filter(|cut| need.from < *cut && *cut < need.to) {
        largest_first(cut - at, out);
        at = cut;
    }
    if at < need.to {
        // A cut within the slack ends the cover, too.
        let beyond = need.cuts.iter().copied().find(|cut| *cut >= need.to).map(|cut| cut - need.to);
        let slack = beyond.map_or(need.slack, |beyond| beyond.min(need.slack));
        largest_first(fewest(need.to - at, slack).0, out);
    }
}

/// The number from `need` to `need + slack` that takes the fewest extents, the smallest of those, and
/// how many extents that is.
pub(crate) fn fewest(need: Granules, slack: Granules) -> (Granules, u64) {
    let mut best = (need, extents(need));
    for class in SizeClass::all().skip(1) {
        match need.get().checked_next_multiple_of(class.granules().get()) {
            Some(up) if up - need.get() <= slack.get() => {
                let up = Granules::new(up);
                if extents(up) < best.1 {
                    best = (up, extents(up));
                }
            }
            _ => break,
        }
    }
    best
}

/// How many extents cover exactly that many granules, largest first.
fn extents(granules: Granules) -> u64 {
    let largest = SizeClass::LARGEST.granules().get();
    granules.get() / largest + u64::from((granules.get() % largest).count_ones())
}

/// A mix of classes that comes to exactly `budget`: for each class how many extents.
///
/// `growth` is the class in which sequences grow, of which most mappings are made: it gets a fifth,
/// every larger class an equal part of the rest, and every smaller one, for what is left over, a
/// thirtieth.
pub(crate) fn mix(budget: Granules, growth: SizeClass) -> Vec<(SizeClass, u64)> {
    let larger = SizeClass::all().filter(|class| *class > growth).count();
    let smaller = SizeClass::all().filter(|class| *class < growth).count();
    let (growing, below) = (budget.get() / 5, budget.get() / 30);
    let each = (budget.get() - growing - below * wide(smaller)) / wide(larger.max(1));
    let mut left = budget;
    let mut counts: Vec<_> = SizeClass::all()
        .rev()
        .map(|class| {
            let share = match class.cmp(&growth) {
                Ordering::Greater => each,
                Ordering::Equal => growing,
                Ordering::Less => below,
            };
            let count = share / class.granules().get();
            left -= class.granules() * count;
            (class, count)
        })
        .collect();
    // What rounding left over goes to the classes from the growth class down.
    for (class, count) in counts.iter_mut().filter(|(class, _)| *class <= growth) {
        let more = left.get() / class.granules().get();
        *count += more;
        left -= class.granules() * more;
    }
    counts
}

fn largest_first(mut granules: Granules, out: &mut Vec<SizeClass>) {
    while let Some(class) = SizeClass::at_most(granules) {
        out.push(class);
        granules -= class.granules();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn covered(from: u64, to: u64, slack: u64, cuts: &[u64]) -> Vec<u64> {
        let cuts: Vec<_> = cuts.iter().copied().map(Granules::new).collect();
        let mut out = Vec::new();
        let need = Need { from: from.into(), to: to.into(), slack: slack.into(), cuts: &cuts };
        cover(need, &mut out);
        out.into_iter().map(|class| class.granules().get()).collect()
    }

    #[test]
    fn a_prompt_is_covered_largest_first() {
        assert_eq!(covered(0, 37, 0, &[]), [32, 4, 1]);
        assert_eq!(covered(0, 37, 3, &[]), [32, 8]);
        assert_eq!(covered(0, 2048, 0, &[]), [256; 8]);
        assert_eq!(covered(5, 5, 9, &[]), [0; 0]);
        assert_eq!(covered(37, 38, 0, &[]), [1]);
    }

    #[test]
    fn extents_end_at_cuts() {
        assert_eq!(covered(0, 37, 0, &[5]), [4, 1, 32]);
        assert_eq!(covered(0, 37, 3, &[5, 39]), [4, 1, 32]);
        assert_eq!(covered(0, 37, 3, &[38]), [32, 4, 1]);
        assert_eq!(covered(8, 10, 0, &[3, 8, 9, 40]), [1, 1]);
    }

    /// One checker for every plan.
    fn check(from: u64, to: u64, slack: u64, cuts: &[u64]) {
        let sizes = covered(from, to, slack, cuts);
        let mut at = from;
        let mut ends = Vec::new();
        for size in &sizes {
            assert!(size.is_power_of_two() && *size <= SizeClass::LARGEST.granules().get());
            at += size;
            ends.push(at);
        }
        assert!(at >= to.max(from), "the need is covered");
        if to > from {
            assert!(at <= to + slack, "the waste stays within the slack");
        } else {
            assert!(sizes.is_empty(), "nothing is needed");
        }
        let within = cuts.iter().filter(|cut| from < **cut && **cut < at);
        assert!(within.clone().all(|cut| ends.contains(cut)), "an extent ends at every cut: {ends:?}");
        let segments = u64::try_from(within.count()).unwrap() + 1;
        let most = (at - from) / SizeClass::LARGEST.granules().get() + 8 * segments;
        assert!(u64::try_from(sizes.len()).unwrap() <= most, "few mappings: {sizes:?}");
        if cuts.is_empty() && to > from {
            let exact = extents(Granules::new(to - from));
            assert!(u64::try_from(sizes.len()).unwrap() <= exact, "slack never adds mappings");
        }
    }

    proptest! {
        #[test]
        fn a_mix_is_the_whole_budget(budget in 1u64..200_000, growth in 0u8..9) {
            let growth = SizeClass::new(growth).unwrap();
            let mix = mix(Granules::new(budget), growth);
            let total: Granules = mix.iter().map(|(class, count)| class.granules() * *count).sum();
            prop_assert_eq!(total, Granules::new(budget));
            let of = |wanted: SizeClass| mix.iter().find(|(class, _)| *class == wanted).unwrap().1;
            prop_assert!(of(growth) >= budget / 5 / growth.granules().get());
        }

        #[test]
        fn any_need_is_covered(
            from in 0u64..5000, more in 0u64..5000, slack in 0u64..300,
            cuts in proptest::collection::btree_set(0u64..10_000, 0..6),
        ) {
            let cuts: Vec<_> = cuts.into_iter().collect();
            check(from, from + more, slack, &cuts);
            check(from, from + more, slack, &[]);
        }
    }
}
