//! Which extents are kept at hand: those that operations have lacked.

use crate::pool::{Pool, Withdrawn};
use crate::units::{Granules, SizeClass};

/// The most free extents of one class that are kept at hand.
const MOST: u64 = 2;

impl Pool {
    /// Nothing of that class was at hand where it was wanted at once.
    pub(crate) fn note_miss(&mut self, class: SizeClass) {
        let wanted = &mut self.wanted[class.index()];
        *wanted = (*wanted + 1).min(MOST);
    }

    /// The smallest class of which too little is at hand, as long as all that is kept stays within `limit`.
    pub(crate) fn lacking(&self, limit: Granules) -> Option<SizeClass> {
        let kept =
            |class: SizeClass| class.granules() * self.count_free(class).min(self.wanted[class.index()]);
        let kept: Granules = SizeClass::all().map(kept).sum();
        SizeClass::all().find(|class| {
            self.count_free(*class) < self.wanted[class.index()] && kept + class.granules() <= limit
        })
    }

    /// Extents of that class can't be had: none is kept at hand until one is wanted again.
    pub(crate) fn give_up_on(&mut self, class: SizeClass) {
        self.wanted[class.index()] = 0;
    }

    /// Nothing is kept at hand until it is wanted again.
    pub(crate) fn forget_misses(&mut self) {
        self.wanted = [0; SizeClass::COUNT];
    }

    /// Free granules that are not kept at hand.
    pub(crate) fn surplus(&self) -> Granules {
        let surplus = |class: SizeClass| self.count_free(class).saturating_sub(self.wanted[class.index()]);
        SizeClass::all().map(|class| class.granules() * surplus(class)).sum()
    }

    /// A free extent to be released that is not kept at hand: the smallest that is large enough, else the
    /// largest there is.
    pub(crate) fn withdraw_surplus(&mut self, granules: Granules) -> Option<Withdrawn> {
        let surplus = |class: &SizeClass| self.count_free(*class) > self.wanted[class.index()];
        let class = SizeClass::all()
            .filter(surplus)
            .find(|class| class.granules() >= granules)
            .or_else(|| SizeClass::all().rev().find(surplus))?;
        Some(Withdrawn { class, extent: self.take(class)? })
    }
}
