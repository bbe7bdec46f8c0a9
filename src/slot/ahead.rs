//! Which slots will soon need more memory than they have, as the mapper is told.
//!
//! A slot has memory up to its end: the first of its runs' ends, without pieces that a step would replace
//! because they reach too far. Once its tokens come within the look-ahead of that, it is due. Slots begin
//! at different points, so that requests which grow in step are not all due in one step.

use crate::error::Result;
use crate::slot::{Growth, Place, SlotTable, SlotTokens, State, reach};
use crate::sync::atomic::Ordering;
use crate::tensor::Run;
use crate::units::{Granules, TokenCount, index};

/// More tokens than any slot holds.
pub(super) const NEVER: TokenCount = TokenCount::new(u64::MAX);
/// Into how many groups slots are parted that are told of at different points.
const GROUPS: u32 = 8;

/// A slot that will soon need more memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Due {
    pub(crate) slot: u32,
    /// Tokens that it can still grow by with what it has.
    pub(crate) left: TokenCount,
    /// Tokens up to which it should have memory.
    pub(crate) target: TokenCount,
    /// Whether its owner asked for it, and no step needs it yet.
    pub(crate) wished: bool,
}

impl SlotTable {
    /// Granules that were mapped ahead for slots in use.
    pub(crate) fn ahead(&self) -> Granules {
        self.ahead
    }

    /// What of it their owners asked for.
    pub(crate) fn ahead_wished(&self) -> Granules {
        self.ahead_wished
    }

    /// How many tokens the slot's owner said it will soon hold.
    pub(crate) fn wished(&self, slot: u32) -> TokenCount {
        self.records[index(slot)].wish
    }

    /// With how many tokens to go growth is mapped.
    pub(crate) fn look_ahead(&self) -> TokenCount {
        self.look_ahead
    }

    /// The slots that will soon need more memory, those first that will need it soonest.
    pub(crate) fn due(&self) -> Vec<Due> {
        let mut due: Vec<_> = self.due.iter().map(|slot| self.describe_due(*slot)).collect();
        due.sort_unstable_by_key(|due| (due.wished, due.left, due.slot));
        due
    }

    fn describe_due(&self, slot: u32) -> Due {
        let (record, tokens) = (&self.records[index(slot)], self.tokens(slot));
        let wished = self.is_wished(slot);
        let end = record.usable;
        // Who is told of at all gets something: the first group is told of just where its target ends.
        let target = if wished {
            record.wish
        } else {
            (tokens + self.look_ahead).max(TokenCount::new(end.get().saturating_add(1)))
        };
        Due { slot, left: end.saturating_sub(tokens), target: target.min(self.layout.max_tokens()), wished }
    }

    /// Whether a slot's owner asked for more than growth would be given.
    fn is_wished(&self, slot: u32) -> bool {
        let tokens = self.tokens(slot);
        tokens.is_zero() || tokens + self.look_ahead < self.records[index(slot)].wish
    }

    /// Whether any slot will soon need more memory, and whether some would if there were any to be had.
    pub(crate) fn is_hungry(&self) -> (bool, bool) {
        (!self.due.is_empty(), !self.starved.is_empty())
    }

    /// The slot's owner says how many tokens it will soon hold.
    pub(crate) fn wish(&mut self, entries: &[SlotTokens]) -> Result<()> {
        for entry in entries {
            self.check(entry.slot)?;
            self.check_most(entry)?;
        }
        for entry in entries {
            let slot = entry.slot.index();
            let before = std::mem::replace(&mut self.records[index(slot)].wish, entry.tokens);
            if entry.tokens < before {
                // What was mapped for it is as good as anybody's, and is there if it is needed after all.
                self.records[index(slot)].runs.iter_mut().for_each(Run::forget_ahead);
            }
            self.forgive(slot);
            self.settle(slot);
        }
        self.revive();
        Ok(())
    }

    /// The slot could not be given what it will need: it is not looked at until memory is given up.
    pub(crate) fn starve(&mut self, slot: u32) {
        if self.records[index(slot)].growth == Growth::Due {
            self.set_growth(slot, Growth::Starved);
        }
    }

    /// Memory was given up: those that could not be given any are looked at again.
    pub(crate) fn revive(&mut self) {
        for slot in std::mem::take(&mut self.starved) {
            self.records[index(slot)].growth = Growth::Enough;
            self.settle_growth(slot);
        }
    }

    /// After a truncation: what lies within the look-ahead, give or take an extent, is mapped ahead as before,
    /// and what reaches further is not.
    pub(super) fn keep_ahead(&mut self, slot: u32) {
        let near = self.layout.round_to_tile(self.tokens(slot) + self.look_ahead);
        let tensors = self.layout.tensors();
        for ((run, tensor), terms) in self.records[index(slot)].runs.iter_mut().zip(tensors).zip(&self.terms)
        {
            let near = tensor.granules(near);
            run.forget_ahead();
            if !self.look_ahead.is_zero() && run.end() <= near + terms.growth(near) * 2 {
                run.add_ahead(run.pieces().len());
            }
        }
    }

    /// The last pieces of a run were mapped ahead for the owner of that generation, if he has it still.
    pub(crate) fn note_ahead(&mut self, place: Place, generation: u64, pieces: usize) {
        let record = &mut self.records[index(place.slot)];
        let his = record.generation == generation && matches!(record.state, State::Active | State::Busy);
        if his {
            record.runs[place.tensor].add_ahead(pieces);
            self.renew_age(place.slot);
        }
    }

    /// The mapper goes to sleep although some slots are due: it is told of the next step.
    pub(crate) fn tell_next_step(&mut self) {
        self.tells_next_step = true;
    }

    /// A step came to the point where the mapper is told of some of its slots.
    #[cold]
    pub(super) fn note_due(&mut self, entries: &[SlotTokens]) {
        for entry in entries {
            if entry.tokens >= self.hot[index(entry.slot.index())].wake {
                self.settle_growth(entry.slot.index());
            }
        }
    }

    /// Brings what is known of a slot's growth up to date with its runs.
    pub(super) fn settle_ahead(&mut self, slot: u32) {
        let is_wished = self.is_wished(slot);
        let record = &mut self.records[index(slot)];
        let ahead = record.runs.iter().map(Run::ahead).sum();
        let before = std::mem::replace(&mut record.ahead, ahead);
        self.ahead = self.ahead + ahead - before;
        let wished = if is_wished { ahead } else { Granules::ZERO };
        let before_wished = std::mem::replace(&mut record.ahead_wished, wished);
        self.ahead_wished = self.ahead_wished + wished - before_wished;
        self.settle_growth(slot);
        if ahead < before {
            // What may be mapped ahead in all has room again.
            self.revive();
        }
    }

    fn settle_growth(&mut self, slot: u32) {
        let record = &self.records[index(slot)];
        let in_use = matches!(record.state, State::Active | State::Busy) && self.spare != Some(slot);
        let wish = record.wish;
        let look_ahead = if self.tokens(slot).is_zero() { TokenCount::ZERO } else { self.look_ahead };
        if !in_use || (look_ahead.is_zero() && wish.is_zero()) {
            self.hot[index(slot)].wake = NEVER;
            return self.set_growth(slot, Growth::Enough);
        }
        let end = self.memory_up_to(slot);
        self.records[index(slot)].usable = end;
        let wake = if end >= self.layout.max_tokens() {
            NEVER
        } else if wish > end {
            TokenCount::ZERO
        } else if look_ahead.is_zero() {
            NEVER
        } else {
            end.saturating_sub(self.notice(slot))
        };
        let due = self.tokens(slot) >= wake;
        self.hot[index(slot)].wake = if due { NEVER } else { wake };
        match (due, self.records[index(slot)].growth) {
            (true, Growth::Starved) => {}
            (true, _) => self.set_growth(slot, Growth::Due),
            (false, _) => self.set_growth(slot, Growth::Enough),
        }
    }

    /// With how many tokens to go the mapper is told of a slot: the look-ahead for one slot in eight, and
    /// down to somewhat more than half of it for the others.
    fn notice(&self, slot: u32) -> TokenCount {
        let less = self.look_ahead.get() * u64::from(slot % GROUPS) / u64::from(2 * GROUPS);
        TokenCount::new((self.look_ahead.get() - less).max(1))
    }

    pub(super) fn forgive(&mut self, slot: u32) {
        if self.records[index(slot)].growth == Growth::Starved {
            self.set_growth(slot, Growth::Enough);
        }
    }

    fn set_growth(&mut self, slot: u32, growth: Growth) {
        let before = std::mem::replace(&mut self.records[index(slot)].growth, growth);
        if before == growth {
            return;
        }
        match before {
            Growth::Enough => {}
            Growth::Due => self.due.retain(|other| *other != slot),
            Growth::Starved => self.starved.retain(|other| *other != slot),
        }
        match growth {
            Growth::Enough => {}
            Growth::Due => {
                self.due.push(slot);
                self.alert.store(true, Ordering::Relaxed);
            }
            Growth::Starved => self.starved.push(slot),
        }
    }

    /// The tokens up to which a slot has memory that a step would use: exact up to where the mapper would
    /// be told of it.
    fn memory_up_to(&self, slot: u32) -> TokenCount {
        let record = &self.records[index(slot)];
        let far = self.layout.round_to_tile((self.tokens(slot) + self.look_ahead).max(record.wish));
        let tensors = self.layout.tensors();
        let ends = (0..tensors.len()).map(|tensor| {
            let enough = tensors[tensor].granules(far);
            reach(&tensors[tensor], self.usable_end(Place { slot, tensor }, enough))
        });
        let end = ends.min().unwrap_or(NEVER);
        if end >= self.layout.max_tokens() { end } else { self.layout.tile_floor(end) }
    }

    /// Where the pieces of a run end that steps would use one after the other: looked at up to `enough`.
    pub(crate) fn usable_end(&self, place: Place, enough: Granules) -> Granules {
        let run = self.run(place);
        let spare = &run.pieces()[run.needed()..];
        if spare.is_empty() {
            return run.frontier();
        }
        let (terms, shape) = (&self.terms[place.tensor], &self.layout.tensors()[place.tensor]);
        let prompt = shape.granules(self.layout.round_to_tile(self.prompt(place.slot)));
        let wish = shape.granules(self.layout.round_to_tile(self.wished(place.slot)));
        let mut end = run.frontier();
        for piece in spare {
            let largest = terms.largest(end, prompt);
            if end > enough || (piece.granules() > largest && piece.end() > wish + largest) {
                break;
            }
            end = piece.end();
        }
        end
    }
}
