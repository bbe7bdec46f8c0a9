//! Slots: who has one, how many tokens it holds, and what is mapped for it.
//!
//! Owns the slot table: the life cycle below, the runs of every slot, and the two orders in which
//! slots are looked for (by what they hold, to be adopted; by age, to be reclaimed). Refuses to know
//! the driver and the pool: pieces are put in and taken out, and others map them. Which parked slot
//! is adopted is [`fit`]'s answer, how much a run grows is [`growth`]'s.
//!
//! ```text
//!            acquire                    retire
//!   Empty ─────────────► Active ───────────────────► Parked ──┐
//!     ▲                   │  ▲  ◄────── acquire (adopt) ──────┤
//!     │              step │  │ done                           │ last extent reclaimed
//!     │                   ▼  │                                │
//!     │                   Busy                                │
//!     └───────────────────────────────────────────────────────┘
//! ```
//!
//! Invariants, checked by [`SlotTable::audit`]:
//! - an active slot's tokens lie within its frontier: what is handed out is backed;
//! - a slot's pins lie within its frontier, whoever has it: what is pinned is never taken;
//! - the totals are the sums over the runs;
//! - every parked slot, and no other, is in the order for adoption; every slot with memory that holds
//!   nobody's tokens is in the order for reclaiming.
//!
//! The table is behind the lock of rank 1.

mod ahead;
mod audit;
pub(crate) mod fit;
pub(crate) mod growth;
mod pins;

pub(crate) use crate::fence::{Kept as Fence, add as add_fences};
pub(crate) use ahead::Due;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::layout::Layout;
use crate::slot::fit::Wish;
use crate::slot::growth::Generosity;
use crate::stats::Counters;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::tensor::{Piece, Run};
use crate::units::{Granules, SizeClass, SlotId, TokenCount, index};

/// How many parked slots that hold enough are looked at for an adoption, and how many that do not.
const CANDIDATES_ABOVE: usize = 40;
const CANDIDATES_BELOW: usize = 8;
/// How many slots are looked at, the oldest first, for a spare extent of just the right class.
const MATCHING_SLOTS: usize = 64;

/// Where a slot stands in its life.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum State {
    /// Nobody has it and nothing is mapped. The table may give it out.
    Empty,
    /// A request has it. Its owner may step, truncate and retire it.
    Active,
    /// Nobody has it, but its extents are still mapped. It may be adopted, and its extents taken but for
    /// those that pins keep.
    Parked,
    /// An operation that names it is under way and holds no lock; only that operation may touch it.
    /// It goes back to what it was when the operation ends, whichever way.
    Busy,
}

/// One slot and the number of tokens that it holds in all: what a step is made of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct SlotTokens {
    /// The slot.
    pub slot: SlotId,
    /// Its tokens in all, those of earlier steps included.
    pub tokens: TokenCount,
}

impl SlotTokens {
    /// That slot with that many tokens in all.
    #[must_use]
    pub const fn new(slot: SlotId, tokens: TokenCount) -> Self {
        Self { slot, tokens }
    }
}

/// What a step looks at when nothing has to be mapped; kept small and apart from the rest.
#[derive(Debug, Default)]
struct Hot {
    /// The generation of the request that has the slot, or 0 while nobody may step it.
    live: u64,
    tokens: TokenCount,
    /// Up to so many tokens the slot stays within the extents that it needs already.
    edge: TokenCount,
    /// From so many tokens on the mapper is told that the slot will need more; all tokens there are if
    /// it has been, or need not be.
    wake: TokenCount,
    /// The last step that named the slot.
    step: u64,
}

#[derive(Debug)]
struct Record {
    state: State,
    generation: u64,
    runs: Box<[Run]>,
    fences: Vec<Fence>,
    /// When the memory that holds nobody's tokens was last used, and whether that has a place in the
    /// order by age.
    stamp: u64,
    listed_by_age: Option<Age>,
    /// Granules in its runs that the driver would not let go of.
    quarantined: Granules,
    /// What the first step of the request needed, in tokens; zero before it.
    prompt: TokenCount,
    /// The tokens that all runs together back: the key in the order for adoption while parked.
    backed: TokenCount,
    /// What of its spare memory was mapped ahead for its owner.
    ahead: Granules,
    /// What of that he asked for.
    ahead_wished: Granules,
    /// How many tokens its owner said it will soon hold.
    wish: TokenCount,
    /// Up to how many tokens it has memory, when that was last looked at.
    usable: TokenCount,
    growth: Growth,
    /// Its pins: how many there are of so many tokens.
    pins: BTreeMap<TokenCount, usize>,
    /// Granules of the pieces that they keep.
    pinned: Granules,
    /// A pin was given up while the slot was busy: what it needs is to be worked out anew.
    unpinned: bool,
}

/// The place in the order in which memory that holds nobody's tokens is taken: what was mapped ahead for
/// somebody comes last, otherwise what was used longest ago first.
type Age = (bool, u64);

/// What the mapper knows of a slot's growth.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Growth {
    /// The slot has enough, or nobody maps ahead.
    #[default]
    Enough,
    /// It is on the list of those that will soon need more.
    Due,
    /// It was, and could not be given any. Looked at again once memory has been given up.
    Starved,
}

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct SlotTable {
    cache: u32,
    layout: Arc<Layout>,
    /// The tensor with the largest row: the one whose extents matter when a slot is chosen.
    lead: usize,
    terms: Box<[Generosity]>,
    hot: Vec<Hot>,
    records: Vec<Record>,
    /// Empty slots, those first in which nothing is quarantined.
    empty: BTreeSet<(bool, u32)>,
    by_room: BTreeSet<(TokenCount, u32)>,
    by_age: BTreeSet<(Age, u32)>,
    /// Slots whose growth is to be mapped, each once, and those that could not be given any.
    due: Vec<u32>,
    starved: Vec<u32>,
    look_ahead: TokenCount,
    /// Whether the next step tells the mapper, which sleeps although some slots are due.
    tells_next_step: bool,
    /// Told that there is something for the mapper to do.
    alert: Arc<AtomicBool>,
    clock: u64,
    steps: u64,
    tokens: TokenCount,
    frontier: Granules,
    backed: Granules,
    quarantined: Granules,
    ahead: Granules,
    ahead_wished: Granules,
    pinned: Granules,
    active: u64,
    /// Fences that nobody needs any more, to be destroyed where no lock is held.
    trash: Vec<Fence>,
    /// Slots of which a pin was given up while they were busy, and which are not any more.
    unpinned: Vec<SlotId>,
    spare: Option<u32>,
    counters: Arc<Counters>,
}

/// What a step came to that looked at nothing but the slots' edges.
#[derive(Debug)]
pub(crate) enum Quick {
    /// All done.
    Done,
    /// Some slot needs more than it has used so far; nothing is changed.
    Beyond,
}

/// Whose spare memory may be taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Among {
    /// Anybody's; whoever takes it waits for its fences.
    Any,
    /// That of slots for which nothing is mapped ahead and no fence has yet to fire, last used by then.
    Fired {
        /// On the clock of [`SlotTable::clock`].
        until: u64,
    },
}

/// Where a piece was taken from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Place {
    pub(crate) slot: u32,
    pub(crate) tensor: usize,
}

/// A piece that was taken out of its run, to be unmapped once its fences have fired.
#[derive(Debug)]
pub(crate) struct Spare {
    pub(crate) place: Place,
    /// The generation of the slot when the piece was taken.
    pub(crate) generation: u64,
    pub(crate) piece: Piece,
    pub(crate) fences: Vec<Fence>,
}

/// What a table is told of its cache's options.
#[derive(Debug)]
pub(crate) struct Options {
    pub(crate) slack_divisor: u32,
    /// The slot that is always backed: it is active from the start, and nobody is given it.
    pub(crate) spare: Option<u32>,
    /// With how many tokens to go a slot's growth is mapped; zero if it is not mapped ahead.
    pub(crate) look_ahead: TokenCount,
    /// Set when there is something for the mapper to do.
    pub(crate) alert: Arc<AtomicBool>,
}

impl SlotTable {
    /// A table of empty slots.
    pub(crate) fn new(cache: u32, layout: Arc<Layout>, options: Options, counters: Arc<Counters>) -> Self {
        let Options { slack_divisor, spare, look_ahead, alert } = options;
        let tensors = layout.tensors();
        let most = layout.max_tokens();
        let terms = tensors.iter().map(|tensor| Generosity::of(tensor, most, slack_divisor)).collect();
        let lead = (0..tensors.len()).max_by_key(|tensor| tensors[*tensor].row()).unwrap_or(0);
        let record = || Record {
            state: State::Empty,
            generation: 0,
            runs: tensors.iter().map(|_| Run::default()).collect(),
            fences: Vec::new(),
            stamp: 0,
            listed_by_age: None,
            quarantined: Granules::ZERO,
            prompt: TokenCount::ZERO,
            backed: TokenCount::ZERO,
            ahead: Granules::ZERO,
            ahead_wished: Granules::ZERO,
            wish: TokenCount::ZERO,
            usable: TokenCount::ZERO,
            growth: Growth::Enough,
            pins: BTreeMap::new(),
            pinned: Granules::ZERO,
            unpinned: false,
        };
        let slots = layout.slots();
        counters.max_slots.set(u64::from(slots) - u64::from(spare.is_some()));
        let mut table = Self {
            cache,
            lead,
            terms,
            hot: (0..slots).map(|_| Hot { wake: ahead::NEVER, ..Hot::default() }).collect(),
            records: (0..slots).map(|_| record()).collect(),
            empty: (0..slots).map(|slot| (false, slot)).collect(),
            by_room: BTreeSet::new(),
            by_age: BTreeSet::new(),
            due: Vec::new(),
            starved: Vec::new(),
            look_ahead: look_ahead.min(most),
            tells_next_step: false,
            alert,
            clock: 0,
            steps: 0,
            tokens: TokenCount::ZERO,
            frontier: Granules::ZERO,
            backed: Granules::ZERO,
            quarantined: Granules::ZERO,
            ahead: Granules::ZERO,
            ahead_wished: Granules::ZERO,
            pinned: Granules::ZERO,
            active: 0,
            trash: Vec::new(),
            unpinned: Vec::new(),
            spare,
            layout,
            counters,
        };
        if let Some(spare) = spare {
            let record = &mut table.records[index(spare)];
            record.generation = 1;
            record.state = State::Active;
            table.hot[index(spare)].live = 1;
            table.empty.remove(&(false, spare));
        }
        table
    }

    /// The slot that is always backed.
    pub(crate) fn spare_slot(&self) -> Option<SlotId> {
        self.spare.map(|slot| SlotId::new(slot, self.cache, 1))
    }

    /// The spare slot has its memory: nobody can name it any more.
    pub(crate) fn seal_spare(&mut self) {
        if let Some(spare) = self.spare {
            self.hot[index(spare)].live = 0;
        }
    }

    pub(crate) fn layout(&self) -> Arc<Layout> {
        Arc::clone(&self.layout)
    }

    /// Granules that slots in use need, and those that pins keep: what can't be reclaimed.
    pub(crate) fn frontier(&self) -> Granules {
        self.frontier
    }

    /// Granules that the driver would not let go of.
    pub(crate) fn quarantined(&self) -> Granules {
        self.quarantined
    }

    /// What of `limit` slots in use and pins do not need, and the driver does not hold on to.
    pub(crate) fn left_of(&self, limit: Granules) -> Granules {
        limit.saturating_sub(self.frontier + self.quarantined)
    }

    /// Slots that somebody has.
    pub(crate) fn in_use(&self) -> u64 {
        self.active
    }

    /// Granules that are mapped and hold nobody's tokens.
    pub(crate) fn parked(&self) -> Granules {
        self.backed - self.frontier
    }

    /// Slots that a new request could be given.
    pub(crate) fn available(&self) -> usize {
        self.empty.len() + self.by_room.len()
    }

    pub(crate) fn terms(&self, tensor: usize) -> &Generosity {
        &self.terms[tensor]
    }

    /// The class in which most sequences grow.
    pub(crate) fn growth_class(&self) -> SizeClass {
        SizeClass::at_most(self.terms[self.lead].growth(Granules::ZERO)).unwrap_or(SizeClass::SMALLEST)
    }

    pub(crate) fn run(&self, place: Place) -> &Run {
        &self.records[index(place.slot)].runs[place.tensor]
    }

    pub(crate) fn tokens(&self, slot: u32) -> TokenCount {
        self.hot[index(slot)].tokens
    }

    pub(crate) fn prompt(&self, slot: u32) -> TokenCount {
        self.records[index(slot)].prompt
    }

    pub(crate) fn state(&self, slot: u32) -> State {
        self.records[index(slot)].state
    }

    pub(crate) fn generation(&self, slot: u32) -> u64 {
        self.records[index(slot)].generation
    }

    pub(crate) fn fences(&self, slot: u32) -> &[Fence] {
        &self.records[index(slot)].fences
    }

    /// The slot's index, if the id is of a request that has it now.
    pub(crate) fn check(&self, id: SlotId) -> Result<u32> {
        if id.cache() != self.cache {
            return Err(foreign(id, self.cache));
        }
        let Some(record) = self.records.get(index(id.index())) else {
            return Err(foreign(id, self.cache));
        };
        match record.state {
            _ if record.generation != id.generation() => Err(stale(id)),
            // All but the spare slot, which was never given to anybody.
            State::Active if self.hot[index(id.index())].live == id.generation() => Ok(id.index()),
            State::Busy => Err(Error::new(
                ErrorKind::SlotBusy,
                format!("{id:?} is being worked on by another call; a slot is used by one thread at a time"),
            )),
            State::Active | State::Empty | State::Parked => Err(stale(id)),
        }
    }

    /// Refuses more tokens than a slot can hold.
    fn check_most(&self, entry: &SlotTokens) -> Result<()> {
        let most = self.layout.max_tokens();
        if entry.tokens > most {
            return Err(Error::new(
                ErrorKind::TooManyTokens,
                format!(
                    "slot {} is to hold {} tokens, and a slot holds {most} at most; create the cache with a larger \
                     max_tokens",
                    entry.slot.index(),
                    entry.tokens
                ),
            ));
        }
        Ok(())
    }

    /// Checks everything about a step that does not depend on memory.
    pub(crate) fn check_step(&mut self, entries: &[SlotTokens]) -> Result<()> {
        self.steps += 1;
        for entry in entries {
            let slot = self.check(entry.slot)?;
            self.check_most(entry)?;
            let hot = &mut self.hot[index(slot)];
            if entry.tokens < hot.tokens {
                return Err(Error::new(
                    ErrorKind::FewerTokens,
                    format!(
                        "slot {slot} is stepped to {} tokens and holds {} already; call truncate to take tokens away",
                        entry.tokens, hot.tokens
                    ),
                ));
            }
            if hot.step == self.steps {
                return Err(Error::new(
                    ErrorKind::DuplicateSlot,
                    format!("slot {slot} is named twice in one step; name it once, with its tokens in all"),
                ));
            }
            hot.step = self.steps;
        }
        Ok(())
    }

    /// A step as long as every slot stays within the extents that it needs already. Anything else,
    /// mistakes included, is left to the long way.
    pub(crate) fn step_within(&mut self, entries: &[SlotTokens]) -> Quick {
        self.steps += 1;
        let step = self.steps;
        for entry in entries {
            let Some(hot) = self.hot.get_mut(index(entry.slot.index())) else { return Quick::Beyond };
            let is_live = hot.live != 0 && hot.live == entry.slot.generation();
            let known = is_live && entry.slot.cache() == self.cache;
            let within = hot.tokens <= entry.tokens && entry.tokens <= hot.edge;
            if !(known && within && hot.step != step) {
                return Quick::Beyond;
            }
            hot.step = step;
        }
        self.set_tokens_within(entries);
        Quick::Done
    }

    /// Whether a slot stays within the extents that it needs already.
    pub(crate) fn is_within(&self, entry: &SlotTokens) -> bool {
        entry.tokens <= self.hot[index(entry.slot.index())].edge
    }

    /// Publishes the tokens of slots that stay within the extents that they need already.
    pub(crate) fn set_tokens_within(&mut self, entries: &[SlotTokens]) {
        let (mut more, mut due) = (0, false);
        for entry in entries {
            let hot = &mut self.hot[index(entry.slot.index())];
            more += entry.tokens.get() - hot.tokens.get();
            hot.tokens = entry.tokens;
            due |= entry.tokens >= hot.wake;
        }
        self.tokens += TokenCount::new(more);
        if due {
            self.note_due(entries);
        }
        if std::mem::take(&mut self.tells_next_step) {
            self.alert.store(true, Ordering::Relaxed);
        }
        self.count_tokens();
    }

    /// Keeps others away from a slot that an operation works on with no lock held.
    pub(crate) fn set_busy(&mut self, slot: u32) {
        debug_assert_eq!(self.records[index(slot)].state, State::Active);
        self.records[index(slot)].state = State::Busy;
        self.hot[index(slot)].live = 0;
    }

    /// Ends what [`set_busy`](Self::set_busy) began, once the tokens are published.
    pub(crate) fn set_active(&mut self, slot: u32) {
        let record = &mut self.records[index(slot)];
        record.state = State::Active;
        self.hot[index(slot)].live = record.generation;
        if std::mem::take(&mut record.unpinned) {
            self.renew_age(slot);
            self.restore_needed(slot);
            self.revive();
            self.unpinned.push(SlotId::new(slot, self.cache, self.generation(slot)));
        }
    }

    /// Publishes a slot's tokens: its runs cover them.
    pub(crate) fn set_tokens(&mut self, slot: u32, tokens: TokenCount) {
        let hot = &mut self.hot[index(slot)];
        self.tokens = self.tokens + tokens - hot.tokens;
        hot.tokens = tokens;
        let record = &mut self.records[index(slot)];
        if record.prompt.is_zero() {
            record.prompt = tokens;
        }
        self.forgive(slot);
        self.restore_needed(slot);
        self.count_tokens();
    }

    /// Works out anew how many pieces the slot's tokens and pins need.
    pub(crate) fn restore_needed(&mut self, slot: u32) {
        self.work_out_needed(slot);
        self.settle(slot);
    }

    /// Says how many pieces of a run are needed, without publishing tokens yet.
    pub(crate) fn set_needed(&mut self, place: Place, pieces: usize) {
        let run = &mut self.records[index(place.slot)].runs[place.tensor];
        self.frontier -= run.frontier();
        run.set_needed(pieces);
        self.frontier += run.frontier();
    }

    /// Adds a mapped piece at the end of a run.
    pub(crate) fn push(&mut self, place: Place, piece: Piece) {
        self.backed += piece.granules();
        self.records[index(place.slot)].runs[place.tensor].push(piece);
    }

    /// Takes the last piece of a run out, if it holds nobody's tokens.
    pub(crate) fn pop_spare(&mut self, place: Place) -> Option<Spare> {
        let record = &mut self.records[index(place.slot)];
        let piece = record.runs[place.tensor].pop_spare()?;
        let (generation, fences) = (record.generation, record.fences.clone());
        self.backed -= piece.granules();
        self.settle(place.slot);
        Some(Spare { place, generation, piece, fences })
    }

    /// Puts back a piece that was taken out and not unmapped.
    ///
    /// A new owner has not waited for its fences: to him it is as good as quarantined, and is unmapped
    /// after them before he comes to need its addresses.
    pub(crate) fn restore(&mut self, spare: Spare) {
        let Spare { place, generation, piece, fences } = spare;
        if self.records[index(place.slot)].generation == generation {
            self.push(place, piece);
        } else {
            self.quarantine(place, piece);
        }
        // If it was the slot's last piece, the slot has forgotten what was to be waited for.
        self.add_fences(place.slot, fences);
        self.settle(place.slot);
    }

    /// Notes a piece that the driver would not let go of.
    pub(crate) fn quarantine(&mut self, place: Place, piece: Piece) {
        let more = piece.granules();
        self.records[index(place.slot)].runs[place.tensor].quarantined().push(piece);
        self.set_quarantined(place.slot, |of_slot| of_slot + more);
    }

    /// Runs with pieces that the driver would not let go of.
    pub(crate) fn quarantined_places(&self) -> Vec<Place> {
        if self.quarantined.is_zero() {
            return Vec::new();
        }
        let of_slot = |(slot, record): (u32, &Record)| {
            let quarantined = |(_, run): &(usize, &Run)| !run.quarantined_granules().is_zero();
            let places =
                record.runs.iter().enumerate().filter(quarantined).map(|(tensor, _)| Place { slot, tensor });
            places.collect::<Vec<_>>()
        };
        (0..).zip(&self.records).flat_map(of_slot).collect()
    }

    /// Takes the pieces of a run that the driver would not let go of, to try again.
    pub(crate) fn take_quarantined(&mut self, place: Place) -> Vec<Piece> {
        let run = &mut self.records[index(place.slot)].runs[place.tensor];
        let less = run.quarantined_granules();
        let pieces = std::mem::take(run.quarantined());
        self.set_quarantined(place.slot, |of_slot| of_slot - less);
        pieces
    }

    fn set_quarantined(&mut self, slot: u32, change: impl FnOnce(Granules) -> Granules) {
        let record = &mut self.records[index(slot)];
        let before = record.quarantined;
        record.quarantined = change(before);
        self.quarantined = self.quarantined + record.quarantined - before;
        if record.state == State::Empty {
            self.empty.remove(&(!before.is_zero(), slot));
            self.empty.insert((!record.quarantined.is_zero(), slot));
        }
        self.count_memory();
    }

    /// Gives a slot to a new request: the parked one that fits best, or an empty one.
    ///
    /// Returns it busy, and whether it has memory in it.
    pub(crate) fn acquire(&mut self, hint: TokenCount, short: bool) -> Result<(SlotId, bool)> {
        let hint = self.layout.round_to_tile(hint.max(TokenCount::new(1)));
        let wish = Wish::new(
            hint,
            self.layout.max_tokens(),
            &self.layout.tensors()[self.lead],
            self.terms[self.lead],
            short,
        );
        // A slot whose way is blocked comes last: its first step has to clear it, and may fail again.
        let score = |slot: u32| {
            let record = &self.records[index(slot)];
            (!record.quarantined.is_zero(), wish.score(&record.runs[self.lead]), slot)
        };
        let above = self.by_room.range((hint, 0)..).take(CANDIDATES_ABOVE);
        let below = self.by_room.range(..(hint, 0)).rev().take(CANDIDATES_BELOW);
        let parked = above.chain(below).map(|(_, slot)| *slot);
        let empty = self.empty.first().map(|(_, slot)| *slot);
        let best = parked.chain(empty).map(score).min_by(|one, other| {
            one.0.cmp(&other.0).then(one.1.total_cmp(&other.1)).then(one.2.cmp(&other.2))
        });
        let Some((.., slot)) = best else {
            return Err(Error::new(
                ErrorKind::NoFreeSlot,
                format!(
                    "all {} slots are in use; retire one, or create the cache with more",
                    self.layout.slots() - u32::from(self.spare.is_some())
                ),
            ));
        };
        let record = &mut self.records[index(slot)];
        let was = std::mem::replace(&mut record.state, State::Busy);
        self.empty.remove(&(!record.quarantined.is_zero(), slot));
        if was == State::Parked {
            self.by_room.remove(&(record.backed, slot));
            self.counters.parked_slots.sub(1);
        }
        record.generation += 1;
        record.prompt = TokenCount::ZERO;
        let id = SlotId::new(slot, self.cache, record.generation);
        self.active += 1;
        self.counters.active_slots.set(self.active);
        Ok((id, was == State::Parked))
    }

    /// The request is done: its extents stay mapped until somebody adopts or reclaims them.
    pub(crate) fn retire(&mut self, slot: u32, fences: Vec<Fence>) {
        self.add_fences(slot, fences);
        let hot = &mut self.hot[index(slot)];
        self.tokens -= hot.tokens;
        hot.tokens = TokenCount::ZERO;
        hot.live = 0;
        self.work_out_needed(slot);
        self.records[index(slot)].runs.iter_mut().for_each(Run::forget_ahead);
        self.active -= 1;
        self.renew_age(slot);
        let record = &mut self.records[index(slot)];
        record.state = State::Parked;
        record.wish = TokenCount::ZERO;
        self.counters.parked_slots.add(1);
        self.by_room.insert((record.backed, slot));
        self.settle(slot);
        self.counters.active_slots.set(self.active);
        self.count_tokens();
        self.revive();
    }

    /// Takes tokens away; what held them is spare from now on.
    pub(crate) fn truncate(&mut self, slot: u32, tokens: TokenCount, fences: Vec<Fence>) {
        self.add_fences(slot, fences);
        self.renew_age(slot);
        self.set_tokens(slot, tokens);
        self.keep_ahead(slot);
        self.settle(slot);
        self.revive();
    }

    /// The moment up to which memory may have been used so far, on the clock of [`Among::Fired`].
    pub(crate) fn clock(&self) -> u64 {
        self.clock
    }

    /// The spare extents of the slots of least use, one at a time.
    pub(crate) fn pop_oldest(&mut self, among: Among) -> Option<Spare> {
        let (_, slot) = *self.by_age.iter().find(|(age, slot)| self.is_among(*age, *slot, among))?;
        // The run that backs the most tokens gives first, so that all stay about equally long.
        let layout = Arc::clone(&self.layout);
        let runs = &self.records[index(slot)].runs;
        let tensor = (0..runs.len())
            .filter(|tensor| runs[*tensor].spare().is_some())
            .max_by_key(|tensor| layout.tensors()[*tensor].tokens_within(runs[*tensor].end()))?;
        self.pop_spare(Place { slot, tensor })
    }

    /// A spare extent of exactly that class, from a slot of little use.
    pub(crate) fn pop_matching(&mut self, granules: Granules, among: Among) -> Option<Spare> {
        let place = self.by_age.iter().take(MATCHING_SLOTS).find_map(|(age, slot)| {
            if !self.is_among(*age, *slot, among) {
                return None;
            }
            let runs = &self.records[index(*slot)].runs;
            let tensor =
                runs.iter().position(|run| run.spare().is_some_and(|piece| piece.granules() == granules))?;
            Some(Place { slot: *slot, tensor })
        })?;
        self.pop_spare(place)
    }

    fn is_among(&self, (ahead, stamp): Age, slot: u32, among: Among) -> bool {
        match among {
            Among::Any => true,
            Among::Fired { until } => !ahead && stamp <= until && self.records[index(slot)].fences.is_empty(),
        }
    }

    /// Brings everything that follows from a slot's runs and state up to date.
    pub(crate) fn settle(&mut self, slot: u32) {
        let tensors = self.layout.tensors();
        let most = self.layout.max_tokens();
        let record = &mut self.records[index(slot)];
        let (mut within, mut backed) = (most, most);
        let (mut spare, mut pieces) = (false, false);
        for (run, tensor) in record.runs.iter().zip(tensors) {
            within = within.min(reach(tensor, run.frontier()));
            backed = backed.min(reach(tensor, run.end()));
            spare |= run.spare().is_some();
            pieces |= !run.pieces().is_empty();
        }
        // Pins may back a slot of no tokens, whose first step is not one like any other.
        let hot = &mut self.hot[index(slot)];
        hot.edge = if hot.tokens.is_zero() { TokenCount::ZERO } else { self.layout.tile_floor(within) };
        if record.state == State::Parked {
            if backed != record.backed || !pieces {
                self.by_room.remove(&(record.backed, slot));
            }
            if pieces {
                if backed != record.backed {
                    self.by_room.insert((backed, slot));
                }
            } else {
                record.state = State::Empty;
                self.trash.append(&mut record.fences);
                self.empty.insert((!record.quarantined.is_zero(), slot));
                self.counters.parked_slots.sub(1);
            }
        } else if record.state == State::Empty && pieces {
            // A piece came back that could not be unmapped.
            record.state = State::Parked;
            self.empty.remove(&(!record.quarantined.is_zero(), slot));
            self.by_room.insert((backed, slot));
            self.counters.parked_slots.add(1);
        }
        record.backed = backed;
        self.settle_ahead(slot);
        let record = &self.records[index(slot)];
        let age = spare.then_some((!record.ahead.is_zero(), record.stamp));
        self.list_by_age(slot, age);
        self.count_memory();
    }

    /// Its spare memory is not to be had until it is settled.
    pub(crate) fn unlist(&mut self, slot: u32) {
        self.list_by_age(slot, None);
    }

    /// Puts a slot into the order by age, or takes it out.
    fn list_by_age(&mut self, slot: u32, age: Option<Age>) {
        let before = std::mem::replace(&mut self.records[index(slot)].listed_by_age, age);
        if before == age {
            return;
        }
        if let Some(before) = before {
            self.by_age.remove(&(before, slot));
        }
        if let Some(age) = age {
            self.by_age.insert((age, slot));
        }
    }

    /// The memory that a slot does not need was used just now; `settle` lists it anew.
    fn renew_age(&mut self, slot: u32) {
        self.clock += 1;
        self.records[index(slot)].stamp = self.clock;
    }

    fn add_fences(&mut self, slot: u32, fences: Vec<Fence>) {
        let dropped = add_fences(&mut self.records[index(slot)].fences, fences);
        self.trash.extend(dropped);
    }

    /// Forgets fences that have fired. The caller's references go to the trash, too: one of them may
    /// be the last, and events are destroyed where no lock is held.
    pub(crate) fn drop_fences(&mut self, slot: u32, fired: Vec<Fence>) {
        let is_fired = |fence: &mut Fence| fired.iter().any(|other| other.is(fence));
        self.trash.extend(self.records[index(slot)].fences.extract_if(.., is_fired));
        self.trash.extend(fired);
    }

    /// The fences of every slot, by slot.
    pub(crate) fn fences_by_slot(&self) -> Vec<(u32, Vec<Fence>)> {
        let some = (0..).zip(&self.records).filter(|(_, record)| !record.fences.is_empty());
        some.map(|(slot, record)| (slot, record.fences.clone())).collect()
    }

    /// Granules of spare memory that may be taken.
    pub(crate) fn takeable(&self, among: Among) -> Granules {
        let listed = self.by_age.iter().filter(|(age, slot)| self.is_among(*age, *slot, among));
        let spare = |run: &Run| run.end() - run.frontier();
        listed.map(|(_, slot)| self.records[index(*slot)].runs.iter().map(spare).sum::<Granules>()).sum()
    }

    /// Whether what the driver would not let go of waits for a fence.
    pub(crate) fn has_fenced_quarantine(&self) -> bool {
        !self.quarantined.is_zero()
            && self.records.iter().any(|record| !record.quarantined.is_zero() && !record.fences.is_empty())
    }

    /// Whether memory that holds nobody's tokens, last used by then, waits for a fence.
    pub(crate) fn has_fenced(&self, until: u64) -> bool {
        self.by_age
            .iter()
            .any(|((_, stamp), slot)| *stamp <= until && !self.records[index(*slot)].fences.is_empty())
    }

    /// Every fence of every slot, and those that nobody needs any more.
    pub(crate) fn all_fences(&mut self) -> Vec<Fence> {
        let of_slots = self.records.iter().flat_map(|record| &record.fences).cloned();
        of_slots.chain(std::mem::take(&mut self.trash)).collect()
    }

    /// Fences that nobody needs any more, to be dropped where no lock is held.
    pub(crate) fn take_trash(&mut self) -> Vec<Fence> {
        std::mem::take(&mut self.trash)
    }

    fn count_tokens(&self) {
        self.counters.needed.set((self.layout.bytes_per_token() * self.tokens.get()).get());
    }

    fn count_memory(&self) {
        let granule = self.layout.granule();
        self.counters.mapped.set(granule.to_bytes(self.frontier).get());
        self.counters.parked.set(granule.to_bytes(self.parked()).get());
        self.counters.ahead.set(granule.to_bytes(self.ahead).get());
        self.counters.pinned.set(granule.to_bytes(self.pinned).get());
        self.counters.quarantined.set(granule.to_bytes(self.quarantined).get());
    }
}

/// The tokens that a run's first granules hold; no limit where they hold the slot's most tokens.
fn reach(tensor: &crate::layout::TensorLayout, granules: Granules) -> TokenCount {
    if granules >= tensor.max_granules() { TokenCount::new(u64::MAX) } else { tensor.tokens_within(granules) }
}

#[cold]
fn stale(id: SlotId) -> Error {
    Error::new(
        ErrorKind::StaleSlot,
        format!("{id:?} was retired; use the id that acquire gave to the request that is running"),
    )
}

#[cold]
fn foreign(id: SlotId, cache: u32) -> Error {
    Error::new(
        ErrorKind::ForeignSlot,
        format!("{id:?} was given out by another cache; this one has number {cache}"),
    )
}
