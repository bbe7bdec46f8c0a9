//! Pins: memory that stays where it is, whoever has the slot.
//!
//! A pin is of so many tokens of a slot, from its start. The pieces that back the largest of a slot's pins
//! count as needed, as those of the owner's tokens do, so that whatever asks what may be taken (the frontier,
//! the order by age, the budget) knows of pins without asking for them.

use std::sync::Arc;

use crate::slot::{Place, SlotTable, State};
use crate::units::{Granules, SlotId, TokenCount, index};

impl SlotTable {
    /// Granules that pins keep.
    pub(crate) fn pinned(&self) -> Granules {
        self.pinned
    }

    /// Keeps what backs the slot's tokens now: up to which token that is, and in how many granules.
    pub(crate) fn pin(&mut self, slot: u32) -> (TokenCount, Granules) {
        let tokens = self.layout.round_to_tile(self.tokens(slot));
        if tokens.is_zero() {
            return (tokens, Granules::ZERO);
        }
        *self.records[index(slot)].pins.entry(tokens).or_default() += 1;
        self.count_pinned(slot);
        (tokens, self.granules_backing(slot, tokens))
    }

    /// A pin of so many tokens is given up. Returns the slot if it has more memory to spare now.
    pub(crate) fn unpin(&mut self, slot: u32, tokens: TokenCount) -> Option<SlotId> {
        if tokens.is_zero() {
            return None;
        }
        let record = &mut self.records[index(slot)];
        if let Some(count) = record.pins.get_mut(&tokens) {
            *count -= 1;
            if *count == 0 {
                record.pins.remove(&tokens);
            }
        }
        self.count_pinned(slot);
        let record = &mut self.records[index(slot)];
        if record.state == State::Busy {
            // Whoever works on it has planned with what is needed now, and works it out anew in the end.
            record.unpinned = true;
            return None;
        }
        let before = self.frontier;
        self.work_out_needed(slot);
        if self.frontier == before {
            return None;
        }
        self.renew_age(slot);
        self.settle(slot);
        self.revive();
        Some(SlotId::new(slot, self.cache, self.generation(slot)))
    }

    /// The slots that may have more memory to spare, as pins of theirs were given up while they were busy.
    pub(crate) fn take_unpinned(&mut self) -> Vec<SlotId> {
        std::mem::take(&mut self.unpinned)
    }

    /// Up to which token the slot's pins reach.
    pub(super) fn pinned_to(&self, slot: u32) -> TokenCount {
        self.records[index(slot)].pins.last_key_value().map_or(TokenCount::ZERO, |(tokens, _)| *tokens)
    }

    /// Granules of the pieces that back so many tokens.
    pub(super) fn granules_backing(&self, slot: u32, tokens: TokenCount) -> Granules {
        let of_run = |(tensor, shape): (usize, &crate::layout::TensorLayout)| {
            let run = self.run(Place { slot, tensor });
            let pieces = run.covering(shape.granules(tokens));
            run.boundary(pieces.expect("pinned memory stays mapped"))
        };
        self.layout.tensors().iter().enumerate().map(of_run).sum()
    }

    /// Works out how many pieces of the slot's runs are needed, for its tokens or its pins.
    pub(super) fn work_out_needed(&mut self, slot: u32) {
        let layout = Arc::clone(&self.layout);
        let backed = layout.round_to_tile(self.tokens(slot)).max(self.pinned_to(slot));
        for (tensor, layout) in layout.tensors().iter().enumerate() {
            let place = Place { slot, tensor };
            let pieces = self.run(place).covering(layout.granules(backed));
            self.set_needed(
                place,
                pieces.expect("tokens are published after their memory, and pins keep it"),
            );
        }
    }

    /// The cache is gone: nobody has a slot any more, and what no pin keeps holds nobody's tokens.
    pub(crate) fn retire_all(&mut self) {
        // A slot as any other from now on.
        self.active += u64::from(self.spare.take().is_some());
        let slots = 0..self.layout.slots();
        for slot in slots.filter(|slot| self.state(*slot) == State::Active).collect::<Vec<_>>() {
            self.retire(slot, Vec::new());
        }
    }

    fn count_pinned(&mut self, slot: u32) {
        let pinned = self.granules_backing(slot, self.pinned_to(slot));
        let before = std::mem::replace(&mut self.records[index(slot)].pinned, pinned);
        self.pinned = self.pinned + pinned - before;
        self.count_memory();
    }
}
