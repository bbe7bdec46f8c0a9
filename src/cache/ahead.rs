//! What is mapped before tokens need it: the growth of the next steps, and what a request that waits will
//! need.
//!
//! It becomes spare memory at the end of a run, like the tail that an earlier owner left: a step that comes
//! to need it makes no call of the driver, and whoever needs it sooner may take it. The slot is not busy
//! meanwhile. Its owner may step, truncate and retire it; only the end of its runs is not his.

use crate::cache::SlotTokens;
use crate::cache::background::{BATCH, Came, Pace};
use crate::cache::core::Core;
use crate::cache::work::{Planner, Work};
use crate::error::{ErrorKind, Result};
use crate::geometry::Background;
use crate::pool::{Need, Pool, cover};
use crate::slot::growth::{Change, Room, change};
use crate::slot::{Among, Due, Place, SlotTable, State};
use crate::units::{Granules, SizeClass, TokenCount, wide};

/// Growth is urgent once less than this part of the look-ahead is left.
const URGENT_DIVISOR: u64 = 4;
/// What may be mapped ahead at a time, of the budget, if nobody says.
const AHEAD_DIVISOR: u64 = 8;

/// A run that is to be extended.
#[derive(Clone, Copy, Debug)]
struct Extension {
    place: Place,
    generation: u64,
    /// Pieces that stay.
    keep: usize,
    to: Granules,
    slack: Granules,
}

/// What was found to be mapped next.
#[derive(Debug, Default)]
struct Found {
    extensions: Vec<Extension>,
    /// Slots with memory in the way, and with fences.
    fenced: bool,
    /// Slots for which this is not the time.
    paced: bool,
    /// Slots that could not be given any.
    starved: bool,
}

impl Core {
    pub(super) fn prefetch(&self, entries: &[SlotTokens]) -> Result<()> {
        self.noted(self.check_health().and_then(|()| {
            self.table.lock().wish(entries)?;
            if self.config.background() == Background::Off {
                // Not paced: what was asked for is due by itself.
                let mut pace = Pace::default();
                while self.grow(&mut pace) == Came::Moved {}
            }
            Ok(())
        }))
    }

    /// Maps a few of the extents that slots need before long, or that were asked for.
    pub(super) fn grow(&self, pace: &mut Pace) -> Came {
        self.grow_by(pace, false)
    }

    /// Maps a few of the extents that slots need within the next steps.
    pub(super) fn grow_urgently(&self, pace: &mut Pace) -> Came {
        self.grow_by(pace, true)
    }

    fn grow_by(&self, pace: &mut Pace, urgent: bool) -> Came {
        let hungry = self.table.lock().is_hungry();
        match hungry {
            (false, false) => return Came::ToNothing,
            (false, true) => {
                return if self.table.lock().has_fenced(u64::MAX) { Came::Fenced } else { Came::ToNothing };
            }
            (true, _) => {}
        }
        let moves = self.moves.lock();
        let (found, work) = {
            let mut table = self.table.lock();
            let mut pool = self.pool.lock();
            let found = self.look(&mut table, &pool, pace, urgent);
            let limit = pace.limit(pool.budget());
            let (work, missing) = plan(&mut table, &mut pool, limit, &found.extensions);
            (Found { starved: found.starved || missing, ..found }, work)
        };
        if work.is_empty() {
            return match found {
                Found { fenced: true, .. } => Came::Fenced,
                Found { paced: true, .. } if !pace.is_quiet() => Came::Paced,
                Found { paced: true, .. } => {
                    self.table.lock().tell_next_step();
                    Came::ToNothing
                }
                // Those that were due could not be given any, and are not due any more.
                Found { starved: true, .. } => Came::Moved,
                Found { .. } => Came::ToNothing,
            };
        }
        let places = work.places();
        let generation = |place: Place| {
            found
                .extensions
                .iter()
                .find(|extension| extension.place == place)
                .map_or(0, |found| found.generation)
        };
        let result = self.perform(
            work,
            |table| {
                for (place, pieces) in &places {
                    let end = table.run(*place).end();
                    table.note_ahead(*place, generation(*place), *pieces);
                    table.settle(place.slot);
                    // What steps would not use as it is must not be mapped over and over.
                    if table.usable_end(*place, end) < end {
                        table.starve(place.slot);
                    }
                }
            },
            |table| {
                for extension in &found.extensions {
                    table.settle(extension.place.slot);
                    table.starve(extension.place.slot);
                }
            },
        );
        Self::give_way(moves);
        match result {
            Ok(()) => {
                let pieces = wide(places.iter().map(|(_, pieces)| pieces).sum());
                pace.spend(pieces);
                self.counters.mapped_ahead.add(pieces);
            }
            // The device has less than the budget says: no error, as long as nobody needs it.
            Err(error) if error.kind() == ErrorKind::OutOfDeviceMemory => {
                let held = self.pool.lock().held();
                if pace.note_refusal(held) {
                    self.table.lock().revive();
                }
            }
            Err(error) => self.note_failure(error.context("mapping ahead")),
        }
        Came::Moved
    }

    /// Finds the next few runs to extend.
    fn look(&self, table: &mut SlotTable, pool: &Pool, pace: &mut Pace, urgent: bool) -> Found {
        let layout = table.layout();
        let due = table.due();
        let budget = pool.budget();
        let left = table.left_of(budget);
        let limit = match self.config.look_ahead_budget() {
            Some(bytes) => layout.granule().within(bytes),
            None => Granules::new(budget.get() / AHEAD_DIVISOR),
        };
        let mut ahead = table.ahead();
        // What is mapped ahead already will soon be needed, and is not left to be generous with.
        let mut room =
            Room::new(left.saturating_sub(ahead), budget, wide(layout.tensors().len()), table.in_use());
        let runs_due = wide(due.len() * layout.tensors().len());
        let share = pace.left(self.counters.steps.get(), runs_due);
        let mut found = Found::default();
        for mut due in due {
            let is_open = table.state(due.slot) == State::Active;
            let is_urgent = is_urgent(table, &due);
            let may_wait = self.may_wait() && !is_urgent && !due.wished;
            if urgent && !is_urgent {
                continue;
            }
            if !is_open || (may_wait && (room.is_short() || share <= wide(found.extensions.len()))) {
                found.paced = true;
                continue;
            }
            let before = found.extensions.len();
            let mut is_clipped = false;
            if due.wished {
                // No more than there is for all tensors alike.
                let bytes = layout.granule().to_bytes(left.saturating_sub(ahead)).get();
                let more = TokenCount::new(bytes / layout.bytes_per_token().get());
                let target = table.tokens(due.slot) + due.left + more;
                is_clipped = target < due.target;
                due.target = due.target.min(target);
            }
            // What was asked for may take all that is left, and no more than that.
            let most = if due.wished { left } else { left.min(limit + table.ahead_wished()) };
            let enough = extensions(table, &due, &mut room, |mut extension, mut more| {
                if is_clipped {
                    more -= extension.slack;
                    extension.slack = Granules::ZERO;
                }
                let run = table.run(extension.place);
                let unmaps = extension.keep < run.pieces().len() || !run.quarantined_granules().is_zero();
                if unmaps && !table.fences(due.slot).is_empty() {
                    found.fenced = true;
                    return Step::Skip;
                }
                if ahead + more > most {
                    return Step::Stop;
                }
                ahead += more;
                found.extensions.push(extension);
                if found.extensions.len() == BATCH { Step::Stop } else { Step::Next }
            });
            let nothing = found.extensions.len() == before;
            if (nothing && !found.fenced) || (enough == Step::Stop && found.extensions.len() < BATCH) {
                table.starve(due.slot);
                found.starved = true;
            }
            if found.extensions.len() == BATCH {
                break;
            }
        }
        found
    }
}

/// Whether growth is needed within the next few steps.
fn is_urgent(table: &SlotTable, due: &Due) -> bool {
    !due.wished && due.left.get() < (table.look_ahead().get() / URGENT_DIVISOR).max(1)
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    Next,
    Skip,
    Stop,
}

/// Goes through the runs of a slot that have to be extended, with how much more each will hold at most.
fn extensions(
    table: &SlotTable,
    due: &Due,
    room: &mut Room,
    mut take: impl FnMut(Extension, Granules) -> Step,
) -> Step {
    let layout = table.layout();
    let backed = layout.round_to_tile(due.target);
    let prompt = layout.round_to_tile(table.prompt(due.slot));
    for (tensor, shape) in layout.tensors().iter().enumerate() {
        let place = Place { slot: due.slot, tensor };
        let (run, target) = (table.run(place), shape.granules(backed));
        let end = table.usable_end(place, target);
        if end >= target {
            continue;
        }
        // A prompt is covered as a whole; growth goes on from where the memory ends.
        let need = if due.wished { target } else { end + Granules::new(1) };
        let first = if due.wished { Granules::ZERO } else { shape.granules(prompt) };
        let wish = shape.granules(layout.round_to_tile(table.wished(due.slot)));
        let change = change(run, need, (first, wish), shape.max_granules(), table.terms(tensor), room);
        let Change::Extend { keep, to, slack } = change else { continue };
        let extension = Extension { place, generation: table.generation(due.slot), keep, to, slack };
        if take(extension, to + slack - run.boundary(keep)) == Step::Stop {
            return Step::Stop;
        }
    }
    Step::Next
}

/// Plans them, up to so many extents in all. A slot for which there are none is not looked at until memory
/// is given up; whether there is one.
fn plan(table: &mut SlotTable, pool: &mut Pool, limit: Granules, found: &[Extension]) -> (Work, bool) {
    let among = Among::Fired { until: u64::MAX };
    let mut planner = Planner::beside_the_path(table, pool, limit, among);
    let mut classes = Vec::new();
    let mut missing = None;
    // A slot that is extended gives nothing: its pieces would lie elsewhere than was planned.
    let all_cut = found.iter().all(|Extension { place, keep, .. }| {
        planner.clear(*place);
        planner.cut_to(*place, *keep, BATCH)
    });
    for Extension { place, .. } in found {
        planner.leave_out(place.slot);
    }
    'found: for extension in found.iter().filter(|_| all_cut) {
        let Extension { place, to, slack, .. } = *extension;
        let mut at = planner.end(place);
        // As far as a turn goes at the most: a wish may be vast.
        let most = at + SizeClass::LARGEST.granules() * wide(BATCH);
        let (to, slack) = if to > most { (most, Granules::ZERO) } else { (to, slack) };
        classes.clear();
        cover(Need { from: at, to, slack, cuts: &[] }, &mut classes);
        for class in &classes {
            if !planner.want_some(place, at, *class, BATCH) {
                missing = Some(place.slot);
                break 'found;
            }
            if planner.extents() >= BATCH {
                break 'found;
            }
            at += class.granules();
        }
    }
    let work = planner.finish(Vec::new());
    for Extension { place, .. } in found {
        table.settle(place.slot);
    }
    if let Some(slot) = missing {
        table.starve(slot);
    }
    (work, missing.is_some())
}
