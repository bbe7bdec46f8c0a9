//! The slot table's books, compared with one another and described.

use crate::slot::{Growth, SlotTable, State};
use crate::tensor::{Piece, Run};
use crate::units::{Granules, TokenCount, index, wide};

impl SlotTable {
    /// Compares the totals and the orders with the records; returns all granules in runs.
    pub(crate) fn audit(&self) -> Result<Granules, String> {
        let (mut frontier, mut backed, mut quarantined) = (Granules::ZERO, Granules::ZERO, Granules::ZERO);
        let mut tokens = TokenCount::ZERO;
        let (mut active, mut parked) = (0, 0);
        let (mut total_ahead, mut pinned) = (Granules::ZERO, Granules::ZERO);
        for (slot, (record, hot)) in (0..).zip(self.records.iter().zip(&self.hot)) {
            for (run, tensor) in record.runs.iter().zip(self.layout.tensors()) {
                let listed: Granules = run.pieces().iter().map(Piece::granules).sum();
                if listed != run.end() {
                    return Err(format!("slot {slot}: pieces of {listed} granules end at {}", run.end()));
                }
                let need = tensor.granules(self.layout.round_to_tile(hot.tokens).max(self.pinned_to(slot)));
                if run.frontier() < need {
                    return Err(format!(
                        "slot {slot}: {} granules are backed and {need} needed",
                        run.frontier()
                    ));
                }
                frontier += run.frontier();
                backed += run.end();
                quarantined += run.quarantined_granules();
            }
            let of_pins = self.granules_backing(slot, self.pinned_to(slot));
            if of_pins != record.pinned {
                return Err(format!(
                    "slot {slot}: pins keep {of_pins} granules, {} are counted",
                    record.pinned
                ));
            }
            pinned += of_pins;
            tokens += hot.tokens;
            let spare = record.runs.iter().any(|run| run.spare().is_some());
            let pieces = record.runs.iter().any(|run| !run.pieces().is_empty());
            let ahead: Granules = record.runs.iter().map(Run::ahead).sum();
            let in_use = matches!(record.state, State::Active | State::Busy);
            if ahead != record.ahead || (!in_use && !ahead.is_zero()) {
                return Err(format!(
                    "slot {slot} is {:?}: {ahead} granules are mapped ahead, {} are counted",
                    record.state, record.ahead
                ));
            }
            let wanted = [(Growth::Due, &self.due), (Growth::Starved, &self.starved)];
            if wanted.iter().any(|(growth, list)| (record.growth == *growth) != list.contains(&slot)) {
                return Err(format!(
                    "slot {slot}: its growth is {:?}, and the lists say otherwise",
                    record.growth
                ));
            }
            total_ahead += ahead;
            let age = spare.then_some((!ahead.is_zero(), record.stamp));
            if age != record.listed_by_age || age.is_some_and(|age| !self.by_age.contains(&(age, slot))) {
                return Err(format!(
                    "slot {slot}: spare memory is {spare}, and the order by age says otherwise"
                ));
            }
            if (record.state == State::Parked) != self.by_room.contains(&(record.backed, slot)) {
                return Err(format!(
                    "slot {slot} is {:?}, and the order for adoption says otherwise",
                    record.state
                ));
            }
            if (record.state == State::Empty) != self.empty.contains(&(!record.quarantined.is_zero(), slot)) {
                return Err(format!(
                    "slot {slot} is {:?}, and the list of empty ones says otherwise",
                    record.state
                ));
            }
            match record.state {
                State::Empty if pieces => return Err(format!("slot {slot} is empty and has memory")),
                State::Parked if !pieces => return Err(format!("slot {slot} is parked and has no memory")),
                State::Parked => parked += 1,
                State::Active | State::Busy => active += u64::from(self.spare != Some(slot)),
                State::Empty => {}
            }
        }
        let listed = wide(self.by_room.len());
        let totals = (frontier, backed, quarantined, total_ahead, pinned, tokens, active, parked);
        let counted = (
            self.frontier,
            self.backed,
            self.quarantined,
            self.ahead,
            self.pinned,
            self.tokens,
            self.active,
            listed,
        );
        if totals != counted {
            return Err(format!("the records add up to {totals:?}, the totals say {counted:?}"));
        }
        Ok(backed + quarantined)
    }

    /// One slot's state, tokens and granules: mapped for them and for pins, kept by pins, backed in all,
    /// quarantined.
    pub(crate) fn describe(&self, slot: u32) -> (State, TokenCount, [Granules; 4]) {
        let record = &self.records[index(slot)];
        let mapped = record.runs.iter().map(Run::frontier).sum();
        let backed = record.runs.iter().map(Run::end).sum();
        (record.state, self.hot[index(slot)].tokens, [mapped, record.pinned, backed, record.quarantined])
    }
}
