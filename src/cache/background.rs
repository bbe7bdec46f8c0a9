//! What is done beside the path of requests, in which order, and how much at a time.
//!
//! A turn does the first of these that there is: map what slots need urgently; give memory up that was
//! asked for; map what they will soon need; keep extents at hand. It moves a few extents, under the lock of
//! rank 0 as everybody does, and gives that to whoever has waited longest. It never waits for a fence: it
//! asks whether one has fired, and what has to wait is looked at again a little later.
//!
//! Growth that is not urgent gets a share of each step, so that the calls for many requests that grow
//! together are spread over the steps that are left before the memory is needed.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use crate::cache::core::Core;
use crate::cache::work;
use crate::error::{Error, ErrorKind, Result};
use crate::geometry::{Background, Reclaim};
use crate::mapper::{Mapper, Turn};
use crate::slot::{self, Among, State};
use crate::stats::beside_the_path;
use crate::sync::Ranked;
use crate::sync::atomic::Ordering;
use crate::units::{Bytes, Granules, SlotId};

/// What the thread is called.
const NAME: &str = "vattn-mapper";
/// The most extents that are moved before others get their turn.
pub(super) const BATCH: usize = 8;
/// How long until a fence is asked again, or the next step's share is looked for.
const A_WHILE: Duration = Duration::from_millis(1);
/// Extents that may be mapped ahead in the time of one step, at least,
const SHARE: u64 = 16;
/// or so large a part of all that are due.
const SHARE_DIVISOR: u64 = 8;
/// After so many steps a device that had no more memory is asked for some again.
const ASK_AGAIN: u64 = 1_000;
/// Without a step for so long the server is idle, and what is due may as well be done at once.
const IDLE: Duration = Duration::from_millis(50);

/// What was asked for that the slot table does not know of.
#[derive(Debug, Default)]
pub(super) struct Goals {
    /// How much may be held, and when that was asked for, on the slot table's clock.
    trim: Option<(Granules, u64)>,
    /// How much has to be free in the pool, and when that was asked for.
    free: Option<(Granules, u64)>,
    /// What both wait for.
    fences: Vec<slot::Fence>,
    /// Whether what the driver would not let go of has been tried again for these.
    tried: bool,
    /// Slots whose spare memory is unmapped as soon as their fences have fired, with the generation that
    /// gave it up last.
    eager: BTreeMap<u32, u64>,
    /// What a call failed with, the first since somebody asked.
    error: Option<Error>,
}

impl Goals {
    /// Whether memory is still to be given back to the device.
    pub(super) fn is_trimming(&self) -> bool {
        self.trim.is_some()
    }

    /// What trims and reclaims that were not done yet wait for.
    pub(super) fn fences(&self) -> Vec<slot::Fence> {
        self.fences.clone()
    }

    /// The same, of a cache that ends.
    pub(super) fn take_fences(&mut self) -> Vec<slot::Fence> {
        std::mem::take(&mut self.fences)
    }
}

/// How much of a step's share of growth is spent.
#[derive(Debug)]
pub(super) struct Pace {
    step: u64,
    spent: u64,
    /// When that step was first seen.
    since: Instant,
    /// Whether it counts how long that was ago.
    by_time: bool,
    /// What was held when the device had no more, and after how many steps that was.
    ceiling: Option<(Granules, u64)>,
}

impl Default for Pace {
    fn default() -> Self {
        Self { step: 0, spent: 0, since: Instant::now(), by_time: false, ceiling: None }
    }
}

impl Pace {
    /// Extents that may still be mapped ahead of need, after so many steps in all, of so many that are due.
    pub(super) fn left(&mut self, steps: u64, due: u64) -> u64 {
        if steps != self.step {
            *self = Self { step: steps, spent: 0, since: Instant::now(), ..*self };
        }
        if self.is_quiet() { u64::MAX } else { SHARE.max(due / SHARE_DIVISOR).saturating_sub(self.spent) }
    }

    /// Whether there has been no step for a while.
    pub(super) fn is_quiet(&self) -> bool {
        self.by_time && self.since.elapsed() > IDLE
    }

    /// The device had no more than what is held now; whether that is news.
    pub(super) fn note_refusal(&mut self, held: Granules) -> bool {
        self.ceiling.replace((held, self.step)).is_none()
    }

    /// How much may be held: what the device had when it was last asked for more, for some steps, and then
    /// it is asked anew.
    pub(super) fn limit(&mut self, budget: Granules) -> Granules {
        self.ceiling = self.ceiling.filter(|(_, step)| self.step < step + ASK_AGAIN);
        self.ceiling.map_or(budget, |(held, _)| held.min(budget))
    }

    pub(super) fn spend(&mut self, extents: u64) {
        self.spent += extents;
    }
}

/// What one kind of work came to in a turn.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Came {
    /// Extents were moved; there may be more to move.
    Moved,
    /// There is work for which a fence has to fire first.
    Fenced,
    /// There is work, but not in the time of this step.
    Paced,
    /// There is none.
    ToNothing,
}

/// What there may be to do, the first first. What was asked to be given back is not mapped ahead of its
/// need meanwhile, or the two would go on for ever.
const JOBS: [fn(&Core, &mut Pace) -> Came; 5] =
    [Core::grow_urgently, Core::let_go_eagerly, Core::give_back, Core::grow, Core::stock];

impl Core {
    /// Starts the thread.
    pub(super) fn spawn_mapper(self: &Arc<Self>) -> Result<Mapper> {
        let (core, failed) = (Arc::clone(self), Arc::clone(self));
        core.pace.lock().by_time = true;
        let turn = move || {
            let mut pace = core.pace.lock();
            core.turn(&mut pace)
        };
        let panicked = move |words: String| {
            tracing::error!(words, "the mapper panicked: the cache has failed");
            let _ = failed.failure.set(format!("the mapper panicked: {words}; please report it"));
        };
        let mapper = Mapper::spawn(NAME, turn, panicked).map_err(|error| {
            Error::new(
                ErrorKind::Unsupported,
                format!("the thread {NAME} could not be started: {error}; allow one more, or leave the background's work to the caller"),
            )
        })?;
        self.waker.get_or_init(|| mapper.waker());
        Ok(mapper)
    }

    /// Whether something was left to the mapper since this was last asked.
    pub(super) fn take_alert(&self) -> bool {
        self.alert.load(Relaxed) && self.alert.swap(false, Relaxed)
    }

    pub(super) fn tend(&self) -> Result<bool> {
        if self.config.background() != Background::Caller {
            return self.noted(Err(Error::new(
                ErrorKind::InvalidArgument,
                format!(
                    "tend is for a cache whose background's work is left to the caller, and here {}; there is nothing to call",
                    match self.config.background() {
                        Background::Off => "there is none",
                        _ => "a thread does it",
                    }
                ),
            )));
        }
        self.noted(self.check_health())?;
        // Somebody else is at it.
        let Some(mut pace) = self.pace.try_lock() else { return Ok(true) };
        loop {
            match self.turn(&mut pace) {
                Turn::Again => {}
                Turn::Later(_) => return Ok(true),
                Turn::Idle => return Ok(false),
            }
        }
    }

    pub(super) fn flush(&self, mapper: Option<&Mapper>) -> Result<()> {
        self.hurry.fetch_add(1, Ordering::Relaxed);
        match (mapper, self.config.background()) {
            (Some(mapper), _) => {
                mapper.wake();
                mapper.wait_until_idle();
            }
            (None, Background::Caller) => loop {
                let turn = self.turn(&mut self.pace.lock());
                match turn {
                    Turn::Again => {}
                    Turn::Later(after) => std::thread::sleep(after),
                    Turn::Idle => break,
                }
            },
            (None, _) => {}
        }
        self.hurry.fetch_sub(1, Ordering::Relaxed);
        self.noted(self.check_health().and_then(|()| match self.goals.lock().error.take() {
            Some(error) => Err(error),
            None => Ok(()),
        }))
    }

    /// Nobody waits for the background: what is due may be spread over steps.
    pub(super) fn may_wait(&self) -> bool {
        self.hurry.load(Ordering::Relaxed) == 0
    }

    /// Does a little of what there is to do.
    fn turn(&self, pace: &mut Pace) -> Turn {
        if self.check_health().is_err() {
            let mut goals = self.goals.lock();
            let error = goals.error.take();
            let gone = std::mem::replace(&mut *goals, Goals { error, ..Goals::default() });
            drop(goals);
            drop(gone);
            return Turn::Idle;
        }
        beside_the_path(|| {
            let mut came = Vec::new();
            for job in JOBS {
                match job(self, pace) {
                    Came::Moved => return Turn::Again,
                    other => came.push(other),
                }
            }
            if came.contains(&Came::Fenced) {
                match self.ask_fences() {
                    Ok(true) => return Turn::Again,
                    Ok(false) => {}
                    Err(error) => {
                        // Who is woken asks again, and nobody waits for an answer that does not come.
                        self.note_failure(error.context("asking whether a fence has fired"));
                        return Turn::Idle;
                    }
                }
            }
            if came.iter().all(|came| *came == Came::ToNothing) { Turn::Idle } else { Turn::Later(A_WHILE) }
        })
    }

    /// Gives the right to move extents up, to whoever waits for it.
    pub(super) fn give_way(moves: crate::sync::Guard<'_, (), 0>) {
        Ranked::unlock_fair(moves);
    }

    /// Notes what a call of the driver in the background failed with.
    pub(super) fn note_failure(&self, error: Error) {
        self.counters.background_failures.bump();
        self.note_loss(&error);
        tracing::warn!(error = error.report(), "work in the background failed");
        let mut goals = self.goals.lock();
        if goals.error.is_none() {
            goals.error = Some(error);
        }
    }

    /// Forgets the fences that have fired; whether there were any. Calls the driver.
    fn ask_fences(&self) -> Result<bool> {
        let all = self.table.lock().fences_by_slot();
        let asked = self.goals.lock().fences.clone();
        let mut some = false;
        for (slot, fences) in all {
            let fired = Self::fired(fences)?;
            if !fired.is_empty() {
                some = true;
                let mut table = self.table.lock();
                table.drop_fences(slot, fired);
                table.revive();
            }
        }
        let fired = Self::fired(asked)?;
        if !fired.is_empty() {
            some = true;
            let dropped: Vec<_> = {
                let mut goals = self.goals.lock();
                goals.fences.extract_if(.., |fence| fired.iter().any(|fired| fired.is(fence))).collect()
            };
            drop(dropped);
        }
        self.sweep();
        Ok(some)
    }

    /// Those of the fences that have fired.
    fn fired(fences: Vec<slot::Fence>) -> Result<Vec<slot::Fence>> {
        let mut fired = Vec::new();
        for fence in fences {
            if fence.event().query()? {
                fired.push(fence);
            }
        }
        Ok(fired)
    }

    /// Asks that no more than so much be held.
    pub(super) fn ask_for_trim(&self, keep: Granules, fences: Vec<slot::Fence>) -> Bytes {
        let until = self.table.lock().clock();
        let held = {
            let mut pool = self.pool.lock();
            pool.forget_misses();
            pool.held()
        };
        self.ask(fences, |goals| {
            let least = goals.trim.map_or(keep, |(other, _)| keep.min(other));
            goals.trim = Some((least, until));
        });
        self.driver.info().granule.to_bytes(held)
    }

    /// Asks that so much more be free in the pool.
    pub(super) fn ask_for_free(&self, more: Granules, fences: Vec<slot::Fence>) -> Bytes {
        let until = self.table.lock().clock();
        let free = self.pool.lock().free_granules();
        self.ask(fences, |goals| {
            let from = goals.free.map_or(free, |(target, _)| target.max(free));
            goals.free = Some((Granules::new(from.get().saturating_add(more.get())), until));
        });
        self.driver.info().granule.to_bytes(free)
    }

    /// Leaves something to whoever works in the background, to be done once the fences have fired.
    fn ask(&self, fences: Vec<slot::Fence>, note: impl FnOnce(&mut Goals)) {
        let implied = {
            let mut goals = self.goals.lock();
            note(&mut goals);
            goals.tried = false;
            slot::add_fences(&mut goals.fences, fences)
        };
        drop(implied);
        self.alert.store(true, Relaxed);
    }

    /// A slot's memory was given up: where that is the option, it is unmapped without delay.
    pub(super) fn let_go(&self, id: SlotId) {
        if self.config.reclaim() == Reclaim::Deferred {
            return;
        }
        let slot = (id.index(), id.generation());
        if self.has_background() {
            self.goals.lock().eager.insert(slot.0, slot.1);
            self.alert.store(true, Relaxed);
            return;
        }
        let _moves = self.moves.lock();
        let limit = self.pool.lock().budget();
        let work = self.plan(Vec::new(), |planner| planner.cut_all(slot.0, slot.1, usize::MAX), limit);
        if let Err(error) = self.perform(work, |_| {}, |_| {}) {
            self.note_failure(error.context("unmapping what was given up"));
        }
    }

    /// Unmaps what was given up, where that is to be done without delay.
    fn let_go_eagerly(&self, _pace: &mut Pace) -> Came {
        let slots = self.goals.lock().eager.clone();
        let mut came = Came::ToNothing;
        for (slot, generation) in slots {
            {
                let table = self.table.lock();
                if table.generation(slot) == generation && !table.fences(slot).is_empty() {
                    came = Came::Fenced;
                    continue;
                }
            }
            let moves = self.moves.lock();
            let work = {
                let mut table = self.table.lock();
                let mine = table.generation(slot) == generation
                    && matches!(table.state(slot), State::Parked | State::Active);
                if mine && !table.fences(slot).is_empty() {
                    came = Came::Fenced;
                    continue;
                }
                let mut pool = self.pool.lock();
                let limit = pool.budget();
                let among = Among::Fired { until: u64::MAX };
                let mut planner = work::Planner::beside_the_path(&mut table, &mut pool, limit, among);
                planner.cut_all(slot, generation, BATCH);
                planner.finish(Vec::new())
            };
            let done = work.is_empty();
            let result = if done { Ok(()) } else { self.perform(work, |_| {}, |_| {}) };
            Self::give_way(moves);
            if done || result.is_err() {
                self.goals.lock().eager.retain(|other, last| (*other, *last) != (slot, generation));
            }
            match result {
                Err(error) => self.note_failure(error.context("unmapping what was given up")),
                Ok(()) if !done => return Came::Moved,
                Ok(()) => {}
            }
        }
        came
    }

    /// Carries on with a trim, or a reclaim.
    fn give_back(&self, _pace: &mut Pace) -> Came {
        let (trim, free, fenced, tried) = {
            let goals = self.goals.lock();
            (goals.trim, goals.free, !goals.fences.is_empty(), goals.tried)
        };
        if trim.is_none() && free.is_none() {
            return Came::ToNothing;
        }
        if fenced {
            return Came::Fenced;
        }
        let until = trim.into_iter().chain(free).map(|(_, until)| until).max().unwrap_or(0);
        // What was mapped ahead would only be mapped again.
        let among = Among::Fired { until };
        let moves = self.moves.lock();
        if !tried {
            self.clear_quarantined(|planner| planner.clear_unfenced());
            let waits = self.table.lock().has_fenced_quarantine();
            self.goals.lock().tried = !waits;
        }
        let (work, has_fenced, unfinished) = {
            let mut table = self.table.lock();
            let mut pool = self.pool.lock();
            let has_fenced = table.has_fenced(until) || table.has_fenced_quarantine();
            let limit = trim.map_or(pool.budget(), |(keep, _)| keep);
            let missing =
                free.map_or(Granules::ZERO, |(target, _)| target.saturating_sub(pool.free_granules()));
            let unfinished = pool.held() > limit || !missing.is_zero();
            let mut planner = work::Planner::beside_the_path(&mut table, &mut pool, limit, among);
            if trim.is_some() {
                planner.shrink(BATCH);
            }
            planner.reclaim(missing, BATCH);
            (planner.finish(Vec::new()), has_fenced, unfinished)
        };
        if work.is_empty() {
            if unfinished && has_fenced {
                return Came::Fenced;
            }
            self.end_goals(trim, free);
            return Came::ToNothing;
        }
        let result = self.perform(work, |_| {}, |_| {});
        Self::give_way(moves);
        if let Err(error) = result {
            self.end_goals(trim, free);
            self.note_failure(error.context("giving memory back"));
        }
        Came::Moved
    }

    /// These have come to their end, unless more was asked for meanwhile.
    fn end_goals(&self, trim: Option<(Granules, u64)>, free: Option<(Granules, u64)>) {
        let mut goals = self.goals.lock();
        if (goals.trim, goals.free) == (trim, free) {
            (goals.trim, goals.free) = (None, None);
        }
    }
}
