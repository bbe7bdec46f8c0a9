//! What an operation does to memory: planned under the locks, carried out with none, and published
//! or undone under the locks again.
//!
//! ```text
//!   Planner (locks held)          carry_out (no lock)                          locks held
//!   ─────────────────────  ──►  ─────────────────────────────────────────  ──►  ─────────
//!   which spare pieces go,      wait for fences, unmap, release, create,        publish,
//!   what is created, and        map; on a refusal unmap what was mapped         or return
//!   where it is mapped                                                          everything
//! ```
//!
//! Only one operation at a time does this (lock of rank 0), so that what a planner found stays true
//! until its work is done: others may retire, acquire and step within what they have, but nobody else
//! moves an extent.

use std::collections::VecDeque;
use std::panic::{self, AssertUnwindSafe};

use crate::cache::fence;
use crate::driver::owned::{DriverHandle, PhysicalMemory};
use crate::error::{Error, ErrorKind, Result};
use crate::pool::{Extent, Pool, Promise, Withdrawn};
use crate::slot::{self, Among, Place, SlotTable, Spare, State};
use crate::tensor::{Piece, Refused, Tensor};
use crate::units::{GranuleSize, Granules, SizeClass, wide};

/// Into how many smaller extents one may be split rather than made anew.
const MOST_PARTS: u64 = 4;

/// Whether free extents may be given up so that one larger than they is made.
///
/// Creating costs a few microseconds on a device with room, and a millisecond on one that is nearly
/// full, where its free memory is scattered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Merging {
    /// The device has to be asked, should it come to that.
    Unknown,
    Allowed,
    /// What is wanted is made up of smaller extents, however many.
    Forbidden,
}

/// What becomes of a piece that was taken out of its run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fate {
    /// Its extent is free.
    Free,
    /// Its extent is mapped elsewhere.
    Used,
    /// Its memory goes back to the driver.
    Released,
}

#[derive(Debug)]
struct Taken {
    spare: Spare,
    fate: Fate,
}

#[derive(Debug)]
enum Source {
    Extent(Extent),
    /// The piece of that number among the taken ones.
    Taken(usize),
    Create(Promise),
}

#[derive(Debug)]
struct Want {
    place: Place,
    at: Granules,
    source: Source,
}

/// What became of a wish for extents.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Wanted {
    Found,
    /// There is no way to come by them.
    Missing,
    /// Extents would be merged, and whether they may be is not known.
    Undecided,
}

/// Everything that an operation has taken out of the books, to be done.
#[derive(Debug, Default)]
pub(super) struct Work {
    quarantined: Vec<(Place, Piece)>,
    taken: Vec<Taken>,
    withdrawn: Vec<Withdrawn>,
    wants: Vec<Want>,
    /// To be created, and free then.
    stock: Vec<Promise>,
    /// Fences of the caller's, besides those of the pieces.
    fences: Vec<slot::Fence>,
}

impl Work {
    pub(super) fn is_empty(&self) -> bool {
        self.extents() == 0
    }

    /// How many extents it moves.
    fn extents(&self) -> usize {
        let Self { quarantined, taken, withdrawn, wants, stock, fences: _ } = self;
        quarantined.len() + taken.len() + withdrawn.len() + wants.len() + stock.len()
    }

    /// Where something will be mapped, and how many extents in each place.
    pub(super) fn places(&self) -> Vec<(Place, usize)> {
        let mut places: Vec<(Place, usize)> = Vec::new();
        for want in &self.wants {
            match places.iter_mut().find(|(place, _)| *place == want.place) {
                Some((_, count)) => *count += 1,
                None => places.push((want.place, 1)),
            }
        }
        places
    }
}

/// Finds extents for an operation. Nothing it takes is lost: [`Planner::finish`] hands it over,
/// [`abandon`] puts it back.
#[derive(Debug)]
pub(super) struct Planner<'a> {
    table: &'a mut SlotTable,
    pool: &'a mut Pool,
    limit: Granules,
    merging: Merging,
    among: Among,
    /// Bytes that will be released before anything is created.
    credit: Granules,
    unclaimed: [Vec<usize>; SizeClass::COUNT],
    work: Work,
}

impl<'a> Planner<'a> {
    /// A planner that may hold up to `limit`, and take anybody's spare memory.
    pub(super) fn new(
        table: &'a mut SlotTable,
        pool: &'a mut Pool,
        limit: Granules,
        merging: Merging,
    ) -> Self {
        Self {
            table,
            pool,
            limit,
            merging,
            among: Among::Any,
            credit: Granules::ZERO,
            unclaimed: Default::default(),
            work: Work::default(),
        }
    }

    /// The same for who works beside the path of requests: it takes spare memory only from those named,
    /// and never waits for a fence.
    pub(super) fn beside_the_path(
        table: &'a mut SlotTable,
        pool: &'a mut Pool,
        limit: Granules,
        among: Among,
    ) -> Self {
        Self { among, ..Self::new(table, pool, limit, Merging::Forbidden) }
    }

    /// Clears what lies in the way of a run and the driver would not let go of before.
    pub(super) fn clear(&mut self, place: Place) {
        let quarantined = self.table.take_quarantined(place);
        if !quarantined.is_empty() {
            self.work.fences.extend_from_slice(self.table.fences(place.slot));
        }
        self.work.quarantined.extend(quarantined.into_iter().map(|piece| (place, piece)));
    }

    /// Clears whatever the driver would not let go of before, anywhere.
    pub(super) fn clear_all(&mut self) {
        self.table.quarantined_places().into_iter().for_each(|place| self.clear(place));
    }

    /// Clears it where nothing has to be waited for.
    pub(super) fn clear_unfenced(&mut self) {
        for place in self.table.quarantined_places() {
            if self.table.fences(place.slot).is_empty() {
                self.clear(place);
            }
        }
    }

    /// Takes all pieces of a run out that hold nobody's tokens.
    pub(super) fn cut(&mut self, place: Place) {
        while let Some(spare) = self.table.pop_spare(place) {
            self.take(spare);
        }
    }

    /// Takes the last pieces of a run out, down to so many; whether that was done before the work came to
    /// `most` extents.
    pub(super) fn cut_to(&mut self, place: Place, keep: usize, most: usize) -> bool {
        while self.table.run(place).pieces().len() > keep {
            if self.extents() >= most {
                return false;
            }
            let Some(spare) = self.table.pop_spare(place) else { break };
            self.take(spare);
        }
        true
    }

    /// How many extents the work moves so far.
    pub(super) fn extents(&self) -> usize {
        self.work.extents()
    }

    /// Extents of any sizes for that place that come to one of that class, as long as the work comes to no
    /// more than `most`; `false` if there are no more to be had.
    pub(super) fn want_some(&mut self, place: Place, at: Granules, class: SizeClass, most: usize) -> bool {
        if self.extents() >= most {
            return true;
        }
        if let Some(source) = self.ready(class) {
            self.work.wants.push(Want { place, at, source });
            return true;
        }
        self.want_pieces(place, at, class, most)
    }

    /// Takes what holds nobody's tokens out of a slot that is still that generation's, at most so many
    /// pieces; what was mapped ahead for it is left.
    pub(super) fn cut_all(&mut self, slot: u32, generation: u64, mut most: usize) {
        let open = matches!(self.table.state(slot), State::Parked | State::Active);
        if !open || self.table.generation(slot) != generation {
            return;
        }
        for tensor in 0..self.table.layout().tensors().len() {
            let place = Place { slot, tensor };
            while most > 0 && self.table.run(place).ahead().is_zero() {
                let Some(spare) = self.table.pop_spare(place) else { break };
                self.take(spare);
                most -= 1;
            }
        }
    }

    /// Takes nothing from that slot, until it is settled.
    pub(super) fn leave_out(&mut self, slot: u32) {
        self.table.unlist(slot);
    }

    /// Where a run ends now.
    pub(super) fn end(&self, place: Place) -> Granules {
        self.table.run(place).end()
    }

    /// Extents for that place that come to one of that class.
    pub(super) fn want(&mut self, place: Place, at: Granules, class: SizeClass) -> Wanted {
        // The cheapest first: what is there, what may be made, a spare extent of the right size.
        if let Some(source) = self.ready(class) {
            self.work.wants.push(Want { place, at, source });
            return Wanted::Found;
        }
        let found = self.want_parts(place, at, class)
            || match self.merging {
                Merging::Unknown => return Wanted::Undecided,
                Merging::Allowed => self.want_resized(place, at, class),
                Merging::Forbidden => self.want_pieces(place, at, class, usize::MAX),
            };
        if found { Wanted::Found } else { Wanted::Missing }
    }

    fn ready(&mut self, class: SizeClass) -> Option<Source> {
        if let Some(source) = self.at_hand(class) {
            return Some(source);
        }
        if self.among == Among::Any {
            self.pool.note_miss(class);
        }
        if let Some(promise) = self.pool.promise(class, self.limit + self.credit) {
            return Some(Source::Create(promise));
        }
        let spare = self.table.pop_matching(class.granules(), self.among)?;
        self.take(spare);
        self.claim(class)
    }

    fn at_hand(&mut self, class: SizeClass) -> Option<Source> {
        self.pool.take(class).map(Source::Extent).or_else(|| self.claim(class))
    }

    /// A few smaller extents that are at hand: each costs a mapping, but resizing costs more.
    fn want_parts(&mut self, place: Place, mut at: Granules, class: SizeClass) -> bool {
        let mut rest = class.granules();
        let mut parts = [0; SizeClass::COUNT];
        for smaller in SizeClass::all().rev().filter(|smaller| *smaller < class) {
            let there = self.pool.count_free(smaller) + wide(self.unclaimed[smaller.index()].len());
            parts[smaller.index()] = there.min(rest.get() / smaller.granules().get());
            rest -= smaller.granules() * parts[smaller.index()];
        }
        if !rest.is_zero() || parts.iter().sum::<u64>() > MOST_PARTS {
            return false;
        }
        for smaller in SizeClass::all().rev() {
            for _ in 0..parts[smaller.index()] {
                let source = self.at_hand(smaller).expect("the parts were just counted");
                self.work.wants.push(Want { place, at, source });
                at += smaller.granules();
            }
        }
        true
    }

    /// An extent of that class, for which free ones of other sizes are given up, and then the spare
    /// ones of least use.
    fn want_resized(&mut self, place: Place, at: Granules, class: SizeClass) -> bool {
        let source = loop {
            if let Some(promise) = self.pool.promise(class, self.limit + self.credit) {
                break Source::Create(promise);
            }
            if !self.release_something(class.granules()) {
                let Some(spare) = self.table.pop_oldest(self.among) else { return false };
                self.take(spare);
                if let Some(source) = self.claim(class) {
                    break source;
                }
            }
        };
        self.work.wants.push(Want { place, at, source });
        true
    }

    /// Extents of any sizes that come to that class: smaller ones that are at hand or may be made, then
    /// the spare ones of least use, of which one that is too large is split; as long as the work comes to no
    /// more than `most`.
    fn want_pieces(&mut self, place: Place, mut at: Granules, class: SizeClass, most: usize) -> bool {
        let mut rest = class.granules();
        while !rest.is_zero() && self.extents() < most {
            let Some(came) = self.want_piece(place, at, rest) else { return false };
            at += came;
            rest -= came;
        }
        true
    }

    /// The largest extent up to so much that is at hand or may be made: or, where there is none, one that is
    /// taken for it. Returns the granules that were found, and `None` if there is nothing left to take.
    fn want_piece(&mut self, place: Place, at: Granules, rest: Granules) -> Option<Granules> {
        let Some((class, source)) = self.at_most(SizeClass::at_most(rest)?) else {
            if !self.release_something(Granules::new(1)) {
                let spare = self.table.pop_oldest(self.among)?;
                self.take(spare);
            }
            return Some(Granules::ZERO);
        };
        self.work.wants.push(Want { place, at, source });
        Some(class.granules())
    }

    /// The largest extent up to that class that is at hand, else the largest that may be made.
    fn at_most(&mut self, largest: SizeClass) -> Option<(SizeClass, Source)> {
        let classes = || SizeClass::all().rev().filter(|class| *class <= largest);
        classes().find_map(|class| Some((class, self.at_hand(class)?))).or_else(|| {
            let limit = self.limit + self.credit;
            classes().find_map(|class| Some((class, Source::Create(self.pool.promise(class, limit)?))))
        })
    }

    /// Plans one release towards holding `more` than now within the limit: the free extent that suits
    /// best, else a taken piece.
    fn release_something(&mut self, more: Granules) -> bool {
        let excess = (self.pool.held() + more).saturating_sub(self.limit + self.credit);
        if let Some(withdrawn) = self.pool.withdraw(excess) {
            self.credit += withdrawn.class().granules();
            self.work.withdrawn.push(withdrawn);
            return true;
        }
        self.release_taken()
    }

    /// Plans the release of a taken piece that nobody claimed, the largest first.
    fn release_taken(&mut self) -> bool {
        let Some(number) = self.unclaimed.iter_mut().rev().find_map(Vec::pop) else { return false };
        let taken = &mut self.work.taken[number];
        taken.fate = Fate::Released;
        self.credit += taken.spare.piece.granules();
        true
    }

    fn claim(&mut self, class: SizeClass) -> Option<Source> {
        let number = self.unclaimed[class.index()].pop()?;
        self.work.taken[number].fate = Fate::Used;
        Some(Source::Taken(number))
    }

    fn take(&mut self, spare: Spare) {
        // Memory that is mapped elsewhere too is not to be had; this mapping of it goes all the same.
        if !spare.piece.extent().is_shared() {
            self.unclaimed[spare.piece.extent().class().index()].push(self.work.taken.len());
        }
        self.work.taken.push(Taken { spare, fate: Fate::Free });
    }

    /// Takes spare pieces out, the ones of least use first, until they come to so much or none is left: at
    /// most so many.
    pub(super) fn reclaim(&mut self, granules: Granules, most: usize) {
        let mut got = Granules::ZERO;
        for _ in 0..most {
            if got >= granules {
                break;
            }
            let Some(spare) = self.table.pop_oldest(self.among) else { break };
            got += spare.piece.granules();
            self.take(spare);
        }
    }

    /// Plans releases until no more than the limit is held, or nothing is left to release: at most so many.
    pub(super) fn shrink(&mut self, most: usize) {
        for _ in 0..most {
            if self.pool.held() <= self.limit + self.credit {
                break;
            }
            if !self.release_something(Granules::ZERO) {
                let Some(spare) = self.table.pop_oldest(self.among) else { break };
                self.take(spare);
                self.release_taken();
            }
        }
    }

    /// Plans so many steps at most towards one more free extent of that class, and says whether there is a
    /// way at all.
    pub(super) fn stock(&mut self, class: SizeClass, most: usize) -> bool {
        if let Some(promise) = self.pool.promise(class, self.limit) {
            self.work.stock.push(promise);
            return true;
        }
        if let Some(spare) = self.table.pop_matching(class.granules(), self.among) {
            self.take(spare);
            return true;
        }
        // Nothing is given up for what can't be had.
        let had = self.pool.surplus() + self.table.takeable(self.among);
        if self.pool.held() + class.granules() > self.limit + had {
            return false;
        }
        for _ in 0..most {
            if let Some(promise) = self.pool.promise(class, self.limit + self.credit) {
                self.work.stock.push(promise);
                break;
            }
            let excess = (self.pool.held() + class.granules()).saturating_sub(self.limit + self.credit);
            if let Some(withdrawn) = self.pool.withdraw_surplus(excess) {
                self.credit += withdrawn.class().granules();
                self.work.withdrawn.push(withdrawn);
            } else if let Some(spare) = self.table.pop_oldest(self.among) {
                self.take(spare);
                self.release_taken();
            } else {
                break;
            }
        }
        !self.work.is_empty()
    }

    /// Hands over what is to be done, once `fences` have fired, too.
    pub(super) fn finish(mut self, fences: Vec<slot::Fence>) -> Work {
        self.work.fences.extend(fences);
        self.work
    }
}

/// What work has come to so far; whatever happens, everything in here goes back into the books.
#[derive(Debug, Default)]
struct Progress {
    /// Not unmapped, in the order in which they were taken.
    not_unmapped: VecDeque<Spare>,
    extents: Vec<Extent>,
    withdrawn: Vec<Withdrawn>,
    unreleased: Vec<(SizeClass, PhysicalMemory)>,
    released: Vec<SizeClass>,
    promises: Vec<Promise>,
    quarantined: Vec<(Place, Piece)>,
    mapped: Vec<(Place, Piece)>,
    fired: Vec<(u32, Vec<slot::Fence>)>,
    reclaimed: u64,
}

impl Progress {
    /// Puts everything where it belongs now. Pieces that were mapped are pushed to their runs.
    fn settle(self, table: &mut SlotTable, pool: &mut Pool) {
        for spare in self.not_unmapped.into_iter().rev() {
            table.restore(spare);
        }
        self.extents.into_iter().for_each(|extent| pool.give_back(extent));
        self.withdrawn.into_iter().for_each(|withdrawn| pool.put_back(withdrawn));
        self.unreleased.into_iter().for_each(|(class, memory)| pool.put_back_memory(class, memory));
        self.released.into_iter().for_each(|class| pool.released(class));
        self.promises.into_iter().for_each(|promise| pool.break_promise(promise));
        self.quarantined.into_iter().for_each(|(place, piece)| table.quarantine(place, piece));
        self.mapped.into_iter().for_each(|(place, piece)| table.push(place, piece));
        self.fired.into_iter().for_each(|(slot, fences)| table.drop_fences(slot, fences));
    }
}

/// Puts back what a planner took, with nothing done.
pub(super) fn abandon(work: Work, table: &mut SlotTable, pool: &mut Pool) {
    let mut progress = Progress {
        not_unmapped: work.taken.into_iter().map(|taken| taken.spare).collect(),
        withdrawn: work.withdrawn,
        quarantined: work.quarantined,
        ..Progress::default()
    };
    for want in work.wants {
        progress.give_up(want.source);
    }
    progress.promises.extend(work.stock);
    progress.settle(table, pool);
}

impl Progress {
    fn give_up(&mut self, source: Source) {
        match source {
            Source::Extent(extent) => self.extents.push(extent),
            Source::Create(promise) => self.promises.push(promise),
            Source::Taken(_) => {}
        }
    }
}

/// What carried-out work leaves to be put into the books.
#[derive(Debug)]
pub(super) struct Done {
    progress: Progress,
    /// Pieces that were unmapped for somebody else, and extents that were given up for other sizes.
    pub(super) reclaimed: u64,
    pub(super) resized: u64,
}

impl Done {
    /// Puts it into the books.
    pub(super) fn settle(self, table: &mut SlotTable, pool: &mut Pool) {
        self.progress.settle(table, pool);
    }
}

/// Does the work, with no lock held but that of rank 0. On an error everything that was mapped is
/// unmapped again; what it comes to has to be settled either way.
pub(super) fn carry_out(
    work: Work,
    driver: &DriverHandle,
    tensors: &[Tensor],
    keep: impl Fn(Promise, PhysicalMemory) -> Extent,
) -> (Done, Result<()>) {
    let mut progress = Progress::default();
    let ran = panic::catch_unwind(AssertUnwindSafe(|| progress.run(work, driver, tensors, keep)));
    let result = match ran {
        Ok(result) => result,
        Err(panic) => {
            // Dropping a piece unmaps it, and a kernel may be reading it: better it stays mapped for good.
            std::mem::forget(progress);
            panic::resume_unwind(panic);
        }
    };
    if result.is_err() {
        // In reverse order, so that what is left of a run stays a prefix.
        while let Some((place, piece)) = progress.mapped.pop() {
            match piece.unmap() {
                Ok(extent) => progress.extents.push(extent),
                Err(refused) => {
                    let error = progress.quarantine(place, refused);
                    tracing::error!(
                        error = error.report(),
                        slot = place.slot,
                        "a mapping could not be undone"
                    );
                }
            }
        }
    }
    let (reclaimed, resized) = (progress.reclaimed, wide(progress.released.len()));
    (Done { progress, reclaimed, resized }, result)
}

impl Progress {
    /// Keeps what the driver would not map, or not let go of, and says why it would not.
    fn quarantine(&mut self, place: Place, refused: Refused) -> Error {
        let Refused { error, extent, piece } = refused;
        self.extents.extend(extent);
        self.quarantined.extend(piece.map(|piece| (place, piece)));
        error
    }

    fn run(
        &mut self,
        work: Work,
        driver: &DriverHandle,
        tensors: &[Tensor],
        keep: impl Fn(Promise, PhysicalMemory) -> Extent,
    ) -> Result<()> {
        let Work { quarantined, taken, withdrawn, wants, stock, fences } = work;
        self.withdrawn = withdrawn;
        let (fates, spares): (Vec<_>, Vec<_>) =
            taken.into_iter().map(|taken| (taken.fate, taken.spare)).unzip();
        self.not_unmapped = spares.into();
        let (places, sources): (Vec<_>, Vec<_>) =
            wants.into_iter().map(|want| ((want.place, want.at), want.source)).unzip();

        let mut unmapped = Vec::with_capacity(fates.len());
        let freed = self.unmap(quarantined, &fences, &mut unmapped);
        unmapped.resize_with(fates.len(), || None);
        let freed = freed.and_then(|()| self.release(&fates, &mut unmapped));

        // From here on every source is an extent, or is given up.
        let mut extents = Vec::with_capacity(sources.len());
        let mut result = freed;
        for source in sources {
            if result.is_err() {
                self.give_up(source);
                continue;
            }
            match source {
                Source::Extent(extent) => extents.push(extent),
                Source::Taken(number) => {
                    extents.push(unmapped[number].take().expect("a piece is claimed once and was unmapped"));
                }
                Source::Create(promise) => match self.create(driver, promise, &keep) {
                    Ok(extent) => extents.push(extent),
                    Err(error) => result = Err(error),
                },
            }
        }
        for promise in stock {
            if result.is_err() {
                self.promises.push(promise);
                continue;
            }
            match self.create(driver, promise, &keep) {
                Ok(extent) => self.extents.push(extent),
                Err(error) => result = Err(error),
            }
        }
        self.extents.extend(unmapped.into_iter().flatten());
        for ((place, at), extent) in places.into_iter().zip(extents) {
            if result.is_err() {
                self.extents.push(extent);
                continue;
            }
            match tensors[place.tensor].map(place.slot, at, extent) {
                Ok(piece) => self.mapped.push((place, piece)),
                Err(refused) => result = Err(self.quarantine(place, refused)),
            }
        }
        result
    }

    fn create(
        &mut self,
        driver: &DriverHandle,
        promise: Promise,
        keep: &impl Fn(Promise, PhysicalMemory) -> Extent,
    ) -> Result<Extent> {
        let size = driver.info().granule.to_bytes(promise.class().granules());
        match PhysicalMemory::new(driver, size) {
            Ok(memory) => Ok(keep(promise, memory)),
            Err(error) => {
                self.promises.push(promise);
                Err(error)
            }
        }
    }

    /// Unmaps what was taken, in order, and appends the extents. What could not be unmapped, and what
    /// comes behind it, is left where it was.
    fn unmap(
        &mut self,
        quarantined: Vec<(Place, Piece)>,
        fences: &[slot::Fence],
        extents: &mut Vec<Option<Extent>>,
    ) -> Result<()> {
        let mut result = fence::wait(fences);
        for (place, piece) in quarantined {
            if result.is_err() {
                self.quarantined.push((place, piece));
                continue;
            }
            match piece.unmap() {
                Ok(extent) => self.extents.push(extent),
                Err(refused) => result = Err(self.quarantine(place, refused)),
            }
        }
        // Each stays in the list until its fences have fired: a panic on the way must not drop it.
        while result.is_ok() {
            let Some(spare) = self.not_unmapped.front() else { break };
            if let Err(error) = wait_once(spare, &mut self.fired) {
                result = Err(error);
                break;
            }
            let Some(Spare { place, generation, piece, fences }) = self.not_unmapped.pop_front() else {
                break;
            };
            match piece.unmap() {
                Ok(extent) => {
                    self.reclaimed += 1;
                    extents.push(Some(extent));
                }
                Err(Refused { error, extent, piece }) => {
                    self.extents.extend(extent);
                    if let Some(piece) = piece {
                        self.not_unmapped.push_front(Spare { place, generation, piece, fences });
                    }
                    result = Err(error);
                }
            }
        }
        result
    }

    /// Gives memory back to the driver: what was withdrawn, and what was taken for it.
    fn release(&mut self, fates: &[Fate], unmapped: &mut [Option<Extent>]) -> Result<()> {
        while let Some(withdrawn) = self.withdrawn.pop() {
            let class = withdrawn.class();
            self.release_one(class, withdrawn.into_memory())?;
        }
        for (fate, extent) in fates.iter().zip(unmapped) {
            if *fate == Fate::Released
                && let Some(extent) = extent.take()
            {
                let class = extent.class();
                let memory = extent.into_memory().ok_or_else(|| {
                    Error::new(
                        ErrorKind::Internal,
                        "memory that was to be released is mapped elsewhere; please report it",
                    )
                })?;
                self.release_one(class, memory)?;
            }
        }
        Ok(())
    }

    fn release_one(&mut self, class: SizeClass, memory: PhysicalMemory) -> Result<()> {
        match memory.release() {
            Ok(()) => {
                self.released.push(class);
                Ok(())
            }
            Err((memory, error)) => {
                self.unreleased.push((class, memory));
                Err(error)
            }
        }
    }
}

/// Waits for a piece's fences, once for each slot that pieces come from.
fn wait_once(spare: &Spare, fired: &mut Vec<(u32, Vec<slot::Fence>)>) -> Result<()> {
    let known =
        |fence: &slot::Fence| fired.iter().flat_map(|(_, fences)| fences).any(|fired| fired.is(fence));
    if spare.fences.iter().all(known) {
        return Ok(());
    }
    fence::wait(&spare.fences)?;
    fired.push((spare.place.slot, spare.fences.clone()));
    Ok(())
}

/// What is held, needed and left, as an error tells it.
pub(super) fn shortage(
    granule: GranuleSize,
    table: &SlotTable,
    limit: Granules,
    missing: Granules,
) -> String {
    format!(
        "{} more are needed, and of {} that may be held, slots in use need {}{}",
        granule.to_bytes(missing),
        granule.to_bytes(limit),
        granule.to_bytes(table.frontier()),
        pinned(granule, table),
    )
}

/// What pins keep of what is needed, as an error goes on to tell it.
pub(super) fn pinned(granule: GranuleSize, table: &SlotTable) -> String {
    match table.pinned() {
        Granules::ZERO => String::new(),
        pinned => format!(", pinned memory included ({})", granule.to_bytes(pinned)),
    }
}
