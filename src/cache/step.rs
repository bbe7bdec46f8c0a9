//! How slots get their tokens, and what would fit.

use crate::cache::core::{self, Core};
use crate::cache::work::{Merging, Planner, Wanted, Work, abandon, shortage};
use crate::cache::{Health, SlotTokens};
use crate::error::{Error, ErrorKind, Result};
use crate::pool::{Need, Pool, cover};
use crate::slot::growth::{Change, Room, change};
use crate::slot::{Place, Quick, SlotTable};
use crate::sync::atomic::Ordering;
use crate::units::{Granules, TokenCount, wide};

/// How often a step is planned anew because the device had less memory than was planned with.
const ATTEMPTS: usize = 4;

/// What a device allows that was not asked.
const UNKNOWN: Granules = Granules::new(u64::MAX);

/// On a device with less than this share of its memory free, extents are not merged on the path.
const FULL_DIVISOR: u64 = 16;

/// A step that needs more granules than this (8 TiB on CUDA) is planned with what the device has in all: a
/// plan lists every extent, and a budget may be any number.
const VAST: Granules = Granules::new(1 << 22);

/// What planning a step came to.
enum Planned {
    /// No driver call was needed: it is published.
    Published,
    /// To be carried out. The named slots are busy.
    Work(Work),
    /// Extents would be merged: the device has to be asked whether they may be.
    Undecided,
    /// More is needed than any device has, as far as is known: the device has to be asked.
    Vast,
}

impl Core {
    pub(super) fn step(&self, entries: &[SlotTokens]) -> Result<()> {
        // The quick way asks no driver, which would say that the device is gone.
        let within =
            self.health() != Health::Failed && matches!(self.table.lock().step_within(entries), Quick::Done);
        if within {
            self.counters.steps.bump();
            return Ok(());
        }
        self.noted(self.check_health().and_then(|()| {
            let result = self.step_beyond(entries);
            self.let_go_unpinned();
            result
        }))
    }

    /// A step in which some slot needs more than it has used so far.
    fn step_beyond(&self, entries: &[SlotTokens]) -> Result<()> {
        // Whoever needs nothing moved does not wait for those who move extents.
        if self.step_covered(entries) {
            self.counters.steps.bump();
            return Ok(());
        }
        let _moves = self.moves.lock();
        // What the device was seen to allow during this step, where that is less than the budget. The
        // next step asks the device anew: whoever took its memory may have given it back.
        let mut device_limit = UNKNOWN;
        let mut merging = Merging::Unknown;
        let mut refused: Option<Error> = None;
        let mut attempt = 1;
        loop {
            let planned = {
                let mut table = self.table.lock();
                let mut pool = self.pool.lock();
                table.check_step(entries)?;
                let (within, beyond) = split(&table, entries);
                let planned = plan(&mut table, &mut pool, (device_limit, merging), &within, &beyond);
                planned.map(|planned| (planned, within, beyond))
            };
            let (planned, within, beyond) = match planned {
                Ok(planned) => planned,
                Err(error) => {
                    return Err(match refused {
                        Some(cause) => error.caused_by(cause),
                        None => error,
                    });
                }
            };
            let work = match planned {
                Planned::Published => break,
                Planned::Work(work) => work,
                Planned::Undecided => {
                    merging = self.merging();
                    continue;
                }
                Planned::Vast => {
                    device_limit = self.driver.info().granule.within(self.driver.memory_info()?.total);
                    continue;
                }
            };
            let result = self.perform(
                work,
                |table| {
                    publish(table, &within, &beyond);
                    entries.iter().for_each(|entry| table.set_active(entry.slot.index()));
                },
                |table| {
                    entries.iter().for_each(|entry| table.set_active(entry.slot.index()));
                    beyond.iter().for_each(|entry| table.restore_needed(entry.slot.index()));
                },
            );
            match result {
                Ok(()) => break,
                Err(error) if error.kind() == ErrorKind::OutOfDeviceMemory && attempt < ATTEMPTS => {
                    // The device has less than the budget says: plan with what there is, so that
                    // parked memory is used rather than new memory asked for. What the device says is
                    // free is believed once.
                    let free = match self.driver.memory_info() {
                        Ok(memory) if attempt == 1 => self.driver.info().granule.within(memory.free),
                        _ => Granules::ZERO,
                    };
                    let held = self.pool.lock().held();
                    device_limit = held + free;
                    tracing::warn!(%held, %free, error = error.report(), "the device has less memory than the budget");
                    refused = Some(error);
                    attempt += 1;
                }
                Err(error) => return Err(error.context(format!("stepping {} slots", entries.len()))),
            }
        }
        self.counters.steps.bump();
        // What was not at hand should be, the next time.
        self.alert.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// A step in which every slot has the extents that it needs already, of an earlier owner's or mapped
    /// ahead; `false` if it is another, and nothing has happened then.
    ///
    /// Needs no right to move extents: what somebody else is moving has left the books.
    fn step_covered(&self, entries: &[SlotTokens]) -> bool {
        let mut table = self.table.lock();
        let pool = self.pool.lock();
        if table.check_step(entries).is_err() {
            return false;
        }
        let (within, beyond) = split(&table, entries);
        match sketch(&table, &pool, UNKNOWN, &within, &beyond) {
            Ok(sketch) if !sketch.moves => {
                publish(&mut table, &within, &beyond);
                true
            }
            _ => false,
        }
    }

    /// Whether extents may be merged on the path: not on a device that is nearly full.
    fn merging(&self) -> Merging {
        match self.driver.memory_info() {
            Ok(memory) if memory.free.get() < memory.total.get() / FULL_DIVISOR => Merging::Forbidden,
            Ok(_) => Merging::Allowed,
            Err(_) => Merging::Forbidden,
        }
    }

    pub(super) fn fits(&self, entries: &[SlotTokens]) -> Result<Vec<bool>> {
        let mut table = self.table.lock();
        let pool = self.pool.lock();
        let result = table.check_step(entries).map(|()| {
            let mut left = table.left_of(pool.budget());
            entries
                .iter()
                .map(|entry| {
                    let missing = missing(&table, &self.layout, entry);
                    let fits = missing <= left;
                    if fits {
                        left -= missing;
                    }
                    fits
                })
                .collect()
        });
        drop((table, pool));
        self.noted(result)
    }

    pub(super) fn admits(&self, prompts: &[TokenCount]) -> usize {
        let table = self.table.lock();
        let pool = self.pool.lock();
        let mut left = table.left_of(pool.budget());
        prompts
            .iter()
            .take(table.available())
            .take_while(|tokens| {
                let need = self.layout.granules_for(self.layout.round_to_tile(**tokens));
                let fits = **tokens <= self.layout.max_tokens() && need <= left;
                left = left.saturating_sub(need);
                fits
            })
            .count()
    }

    /// Backs the slot that padded batch entries write to: the tokens of one page or tile.
    pub(super) fn back_spare(&self) -> Result<()> {
        let Some(slot) = self.table.lock().spare_slot() else { return Ok(()) };
        let tokens = core::spare_tokens(&self.config);
        self.step(&[SlotTokens::new(slot, tokens)])
            .map_err(|error| error.context("backing the spare slot"))?;
        self.table.lock().seal_spare();
        Ok(())
    }
}

/// Granules beyond what a slot uses that an entry needs.
fn missing(table: &SlotTable, layout: &crate::layout::Layout, entry: &SlotTokens) -> Granules {
    let backed = layout.round_to_tile(entry.tokens);
    layout
        .tensors()
        .iter()
        .enumerate()
        .map(|(tensor, shape)| {
            let run = table.run(Place { slot: entry.slot.index(), tensor });
            shape.granules(backed).saturating_sub(run.frontier())
        })
        .sum()
}

/// The slots that stay within what they need already, and those that go beyond.
fn split(table: &SlotTable, entries: &[SlotTokens]) -> (Vec<SlotTokens>, Vec<SlotTokens>) {
    entries.iter().copied().partition(|entry| table.is_within(entry))
}

/// Publishes the tokens of slots whose memory is there.
fn publish(table: &mut SlotTable, within: &[SlotTokens], beyond: &[SlotTokens]) {
    table.set_tokens_within(within);
    beyond.iter().for_each(|entry| table.set_tokens(entry.slot.index(), entry.tokens));
}

/// What a step comes to, before anything is taken for it.
struct Sketch {
    /// Of each run that has to cover more than it did.
    changes: Vec<(Place, Change)>,
    /// Whether any of them takes extents.
    moves: bool,
    limit: Granules,
    usable: Granules,
    exact: Granules,
}

/// Works out a checked step: of slots that stay within what they need already, and of those that go
/// beyond.
fn sketch(
    table: &SlotTable,
    pool: &Pool,
    device_limit: Granules,
    within: &[SlotTokens],
    beyond: &[SlotTokens],
) -> Result<Sketch> {
    let layout = table.layout();
    let budget = pool.budget();
    let limit = budget.min(device_limit);
    let usable = limit.saturating_sub(table.quarantined());
    let exact: Granules = beyond.iter().map(|entry| missing(table, &layout, entry)).sum();
    let Some(left) = usable.checked_sub(table.frontier() + exact) else {
        let kind = if limit < budget { ErrorKind::OutOfDeviceMemory } else { ErrorKind::OutOfBudget };
        let cure = match kind {
            ErrorKind::OutOfDeviceMemory => "another program holds the rest: free memory on the device",
            _ if table.pinned().is_zero() => "retire or truncate slots, or raise the budget",
            _ => "retire or truncate slots, give up pins, or raise the budget",
        };
        let what = shortage(layout.granule(), table, usable, exact);
        return Err(Error::new(
            kind,
            format!("a step of {} slots does not fit: {what}; {cure}", within.len() + beyond.len()),
        ));
    };

    let mut room = Room::new(left, budget, wide(layout.tensors().len()), table.in_use());
    let mut changes = Vec::new();
    let mut moves = false;
    for entry in beyond {
        let slot = entry.slot.index();
        let (backed, prompt) = (layout.round_to_tile(entry.tokens), layout.round_to_tile(table.prompt(slot)));
        let wish = layout.round_to_tile(table.wished(slot));
        for (tensor, shape) in layout.tensors().iter().enumerate() {
            let place = Place { slot, tensor };
            let need = shape.granules(backed);
            let run = table.run(place);
            if need <= run.frontier() {
                continue;
            }
            let terms = (shape.granules(prompt), shape.granules(wish));
            let change = change(run, need, terms, shape.max_granules(), table.terms(tensor), &mut room);
            moves |= matches!(change, Change::Extend { .. });
            changes.push((place, change));
        }
    }
    Ok(Sketch { changes, moves, limit, usable, exact })
}

/// Plans a checked step.
fn plan(
    table: &mut SlotTable,
    pool: &mut Pool,
    (device_limit, merging): (Granules, Merging),
    within: &[SlotTokens],
    beyond: &[SlotTokens],
) -> Result<Planned> {
    let layout = table.layout();
    let Sketch { changes, moves, limit, usable, exact } = sketch(table, pool, device_limit, within, beyond)?;
    if !moves {
        publish(table, within, beyond);
        return Ok(Planned::Published);
    }
    if exact > VAST && device_limit == UNKNOWN {
        return Ok(Planned::Vast);
    }

    let all = || within.iter().chain(beyond).map(|entry| entry.slot.index());
    all().for_each(|slot| table.set_busy(slot));
    for (place, change) in &changes {
        let (Change::Covered { pieces: needed } | Change::Extend { keep: needed, .. }) = *change;
        table.set_needed(*place, needed);
    }
    beyond.iter().for_each(|entry| table.settle(entry.slot.index()));
    let mut planner = Planner::new(table, pool, limit, merging);
    let mut classes = Vec::new();
    let mut wanted = Wanted::Found;
    for (place, change) in &changes {
        if let Change::Extend { .. } = change {
            planner.clear(*place);
            planner.cut(*place);
        }
    }
    for (place, change) in changes {
        let Change::Extend { to, slack, .. } = change else { continue };
        let mut at = planner.end(place);
        classes.clear();
        cover(Need { from: at, to, slack, cuts: &[] }, &mut classes);
        for class in &classes {
            if wanted == Wanted::Found {
                wanted = planner.want(place, at, *class);
            }
            at += class.granules();
        }
    }
    let work = planner.finish(Vec::new());
    if wanted != Wanted::Found {
        abandon(work, table, pool);
        all().for_each(|slot| table.set_active(slot));
        beyond.iter().for_each(|entry| table.restore_needed(entry.slot.index()));
        if wanted == Wanted::Undecided {
            return Ok(Planned::Undecided);
        }
        return Err(Error::new(
            ErrorKind::Internal,
            format!(
                "no extents were found for a step that fits: {}; please report it",
                shortage(layout.granule(), table, usable, exact)
            ),
        ));
    }
    Ok(Planned::Work(work))
}
