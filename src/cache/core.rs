//! What a cache is made of, and how every operation is carried out and settled.

use std::sync::{Arc, OnceLock};

use crate::cache::Health;
use crate::cache::background::{Goals, Pace};
use crate::cache::work::{self, Merging, Planner, Work};
use crate::driver::Driver;
use crate::driver::owned::{DriverHandle, PhysicalMemory};
use crate::error::{Error, ErrorKind, Result};
use crate::geometry::{Background, Commit, Config};
use crate::layout::Layout;
use crate::mapper::Waker;
use crate::pool::{self, Pool};
use crate::slot::{self, SlotTable};
use crate::stats::{ByteCounts, Counters, Snapshot};
use crate::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use crate::sync::{Leaf, Ranked};
use crate::tensor::Tensor;
use crate::units::{Bytes, Granules, SizeClass, TokenCount, wide};

/// Numbers caches, so that a slot of one is refused by another.
static NEXT_CACHE: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(1);

/// The most slots times tensors: their books take about a gigabyte.
const MOST_RUNS: u64 = 1 << 24;

/// Everything of a cache but the thread that works in its background.
#[derive(Debug)]
pub(super) struct Core {
    // Dropped in this order: mappings, extents, addresses.
    pub(super) table: Ranked<SlotTable, 1>,
    pub(super) pool: Ranked<Pool, 2>,
    pub(super) tensors: Box<[Tensor]>,
    /// The right to move extents.
    pub(super) moves: Ranked<(), 0>,
    pub(super) layout: Arc<Layout>,
    pub(super) config: Config,
    pub(super) driver: DriverHandle,
    pub(super) counters: Arc<Counters>,
    /// Whether the driver holds on to extents.
    pub(super) degraded: AtomicBool,
    /// Why the cache has failed, if it has: the first cause.
    pub(super) failure: OnceLock<String>,
    /// What the mapper was asked for, besides the growth that the slot table knows of.
    pub(super) goals: Ranked<Goals, 3>,
    /// Whether something was left to the mapper since it was last woken.
    pub(super) alert: Arc<AtomicBool>,
    /// How much of a step's share of background work is spent; held by whoever does that work.
    pub(super) pace: Leaf<Pace>,
    /// How many callers wait until the background is done.
    pub(super) hurry: AtomicUsize,
    /// Wakes the mapper, for pins, which do not have it.
    pub(super) waker: OnceLock<Waker>,
    /// Whether the cache was dropped, and pins alone keep this.
    pub(super) closed: AtomicBool,
}

impl Core {
    pub(super) fn new(config: Config, driver: Arc<dyn Driver>) -> Result<Self> {
        let counters = Arc::new(Counters::default());
        let driver = DriverHandle::new(driver, Arc::clone(&counters));
        let granule = driver.info().granule;
        let layout = Arc::new(Layout::new(&config, granule, driver.info().device)?);
        let budget = match config.budget() {
            Some(budget) => budget,
            None => driver.memory_info()?.free,
        };
        if budget < least_budget(&config, &layout) {
            return Err(too_small(budget, &config, &layout));
        }
        let runs = u64::from(layout.slots()) * wide(layout.tensors().len());
        if runs > MOST_RUNS {
            return Err(Error::new(
                ErrorKind::InvalidConfig,
                format!(
                    "{} slots in {} tensors are {runs} places to keep books of, and {MOST_RUNS} is the limit; use fewer \
                     slots, or a layout with fewer tensors",
                    layout.slots(),
                    layout.tensors().len(),
                ),
            ));
        }
        let tensors = layout
            .tensors()
            .iter()
            .map(|tensor| Tensor::reserve(&driver, tensor))
            .collect::<Result<Box<[_]>>>()
            .map_err(|error| {
                error.context(format!(
                    "reserving {} of addresses for {} slots of {} tokens; use fewer slots or fewer tokens a slot",
                    layout.virtual_size(),
                    layout.slots(),
                    layout.stride_tokens(),
                ))
            })?;
        let number = NEXT_CACHE.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let alert = Arc::new(AtomicBool::new(false));
        let options = slot::Options {
            slack_divisor: config.slack_divisor(),
            spare: config.spare_index(),
            look_ahead: match config.background() {
                Background::Off => TokenCount::ZERO,
                Background::Thread | Background::Caller => config.look_ahead(),
            },
            alert: Arc::clone(&alert),
        };
        let table = SlotTable::new(number, Arc::clone(&layout), options, Arc::clone(&counters));
        let cache = Self {
            table: Ranked::new(table),
            pool: Ranked::new(Pool::new(granule, budget, Arc::clone(&counters))),
            tensors,
            moves: Ranked::new(()),
            layout,
            config,
            driver,
            counters,
            degraded: AtomicBool::new(false),
            failure: OnceLock::new(),
            goals: Ranked::new(Goals::default()),
            alert,
            pace: Leaf::new(Pace::default()),
            hurry: AtomicUsize::new(0),
            waker: OnceLock::new(),
            closed: AtomicBool::new(false),
        };
        match cache.config.commit() {
            Commit::OnDemand => {}
            Commit::UpFront(mix) => cache.commit(mix)?,
            Commit::Whole => {
                let growth = cache.table.lock().growth_class();
                let budget = cache.pool.lock().budget();
                cache.commit(&pool::mix(budget, growth))?;
            }
        }
        cache.back_spare()?;
        tracing::info!(
            driver = cache.driver.info().name,
            tensors = cache.tensors.len(),
            slots = cache.layout.slots(),
            addresses = %cache.layout.virtual_size(),
            %budget,
            "a KV cache is ready"
        );
        Ok(cache)
    }

    pub(super) fn config(&self) -> &Config {
        &self.config
    }

    pub(super) fn layout(&self) -> &Layout {
        &self.layout
    }

    pub(super) fn snapshot(&self) -> Snapshot {
        self.counters.snapshot()
    }

    pub(super) fn bytes(&self) -> ByteCounts {
        self.counters.bytes()
    }

    pub(super) fn health(&self) -> Health {
        if self.why_failed().is_some() {
            Health::Failed
        } else if self.degraded.load(Ordering::Relaxed) {
            Health::Degraded
        } else {
            Health::Healthy
        }
    }

    /// Creates the extents that the options say should be there from the start.
    fn commit(&self, mix: &[(SizeClass, u64)]) -> Result<()> {
        let granule = self.driver.info().granule;
        let total = mix.iter().try_fold(Granules::ZERO, |total, (class, count)| {
            total.checked_add(class.granules().checked_mul(*count)?)
        });
        let budget = self.pool.lock().budget();
        if total.is_none_or(|total| total > budget) {
            return Err(Error::new(
                ErrorKind::InvalidConfig,
                format!(
                    "{} granules are to be committed up front, and the budget is {}, {budget} granules; commit less or \
                     raise it",
                    total.map_or("more than 2^64".to_owned(), |total| total.to_string()),
                    granule.to_bytes(budget),
                ),
            ));
        }
        for (class, count) in mix {
            for _ in 0..*count {
                let promise = self.pool.lock().promise(*class, budget);
                let promise = promise.expect("the mix was just found to fit the budget");
                match PhysicalMemory::new(&self.driver, granule.to_bytes(class.granules())) {
                    Ok(memory) => {
                        let mut pool = self.pool.lock();
                        let extent = pool.keep(promise, memory);
                        pool.give_back(extent);
                    }
                    Err(error) => {
                        self.pool.lock().break_promise(promise);
                        return Err(error.context("committing memory up front"));
                    }
                }
            }
        }
        Ok(())
    }

    /// Refuses calls once the cache has failed.
    pub(super) fn check_health(&self) -> Result<()> {
        if self.health() != Health::Failed {
            return Ok(());
        }
        let error = Error::new(
            ErrorKind::Unhealthy,
            "the cache has failed, and all that it held is gone: give it up and make a new one, in a new process if a kernel \
             faulted or the device was lost",
        );
        Err(match self.why_failed() {
            Some(why) => error.caused_by(Error::new(ErrorKind::DeviceLost, why)),
            None => error,
        })
    }

    /// What the cache has failed of: in the words of the operation that noticed, or else of the driver.
    fn why_failed(&self) -> Option<&str> {
        self.failure.get().map(String::as_str).or_else(|| self.counters.device_lost())
    }

    /// Counts an error that a caller is given, and notes what it says about the device.
    pub(super) fn noted<T>(&self, result: Result<T>) -> Result<T> {
        if let Err(error) = &result {
            self.counters.count_failure(error.kind());
            self.note_loss(error);
        }
        result
    }

    /// Notes that a call panicked.
    pub(super) fn fail(&self, why: &str) {
        if self.failure.set(why.to_owned()).is_ok() {
            tracing::error!(why, "a call panicked: the cache has failed");
        }
    }

    /// Notes that the device is gone, if that is what an error says.
    pub(super) fn note_loss(&self, error: &Error) {
        if error.kind() == ErrorKind::DeviceLost && self.failure.set(error.report()).is_ok() {
            tracing::error!(error = error.report(), "the device is gone: the cache has failed");
        }
    }

    /// Carries work out and settles it. `publish` runs under the locks if it succeeded, `undo` if not.
    ///
    /// The caller holds the right to move extents.
    pub(super) fn perform(
        &self,
        work: Work,
        publish: impl FnOnce(&mut SlotTable),
        undo: impl FnOnce(&mut SlotTable),
    ) -> Result<()> {
        let keep = |promise, memory| self.pool.lock().keep(promise, memory);
        let (done, result) = work::carry_out(work, &self.driver, &self.tensors, keep);
        self.counters.reclaimed.add(done.reclaimed);
        self.counters.resized.add(done.resized);
        if done.reclaimed + done.resized > 0 {
            tracing::debug!(reclaimed = done.reclaimed, resized = done.resized, "parked extents were taken");
        }
        {
            let mut table = self.table.lock();
            let mut pool = self.pool.lock();
            done.settle(&mut table, &mut pool);
            match &result {
                Ok(()) => publish(&mut table),
                Err(_) => {
                    self.counters.rolled_back.bump();
                    undo(&mut table);
                }
            }
            let degraded = !table.quarantined().is_zero();
            if !self.degraded.swap(degraded, Ordering::Relaxed) && degraded {
                tracing::warn!(granules = %table.quarantined(), "the driver would not undo: extents are quarantined");
            }
        }
        self.sweep();
        result
    }

    /// What the driver would not let go of before is tried again, and stands in nobody's way.
    ///
    /// The caller holds the right to move extents.
    pub(super) fn clear_quarantined(&self, clear: impl FnOnce(&mut Planner<'_>)) {
        let limit = self.pool.lock().budget();
        if self.table.lock().quarantined().is_zero() {
            return;
        }
        let work = self.plan(Vec::new(), clear, limit);
        if let Err(error) = self.perform(work, |_| {}, |_| {}) {
            tracing::warn!(error = error.report(), "the driver still holds on to quarantined extents");
        }
    }

    /// Plans and carries out work that maps nothing.
    ///
    /// The caller holds the right to move extents.
    pub(super) fn give_up_memory(
        &self,
        fences: Vec<crate::slot::Fence>,
        plan: impl FnOnce(&mut Planner<'_>),
        limit: Granules,
    ) -> Result<()> {
        self.clear_quarantined(|planner| planner.clear_all());
        let work = self.plan(fences, plan, limit);
        self.perform(work, |_| {}, |_| {})
    }

    /// Whether somebody works beside the path of requests.
    pub(super) fn has_background(&self) -> bool {
        self.config.background() != Background::Off
    }

    pub(super) fn plan(
        &self,
        fences: Vec<crate::slot::Fence>,
        plan: impl FnOnce(&mut Planner<'_>),
        limit: Granules,
    ) -> Work {
        let mut table = self.table.lock();
        let mut pool = self.pool.lock();
        let mut planner = Planner::new(&mut table, &mut pool, limit, Merging::Forbidden);
        plan(&mut planner);
        planner.finish(fences)
    }

    /// Destroys the fences that nobody needs any more, with no lock held.
    pub(super) fn sweep(&self) {
        let trash = self.table.lock().take_trash();
        drop(trash);
    }
}

/// The tokens that the spare slot backs.
pub(super) fn spare_tokens(config: &Config) -> TokenCount {
    let tokens = config.page_tokens().max(config.tile_tokens());
    TokenCount::new(u64::from(tokens)).min(config.max_tokens())
}

/// A granule for each tensor, or what the spare slot takes, where that is more.
pub(super) fn least_budget(config: &Config, layout: &Layout) -> Bytes {
    let one_each = Granules::new(wide(layout.tensors().len()));
    let spare = match config.spare_index() {
        Some(_) => layout.granules_for(layout.round_to_tile(spare_tokens(config))),
        None => Granules::ZERO,
    };
    layout.granule().to_bytes(one_each.max(spare))
}

#[cold]
pub(super) fn too_small(budget: Bytes, config: &Config, layout: &Layout) -> Error {
    let spare = match config.spare_index() {
        Some(_) => format!(" and the spare slot {} tokens", spare_tokens(config)),
        None => String::new(),
    };
    Error::new(
        ErrorKind::InvalidConfig,
        format!(
            "the budget is {budget}, and {} tensors need a granule of {} each{spare}, {} in all; raise it, or choose a \
             layout with fewer tensors",
            layout.tensors().len(),
            layout.granule().bytes(),
            least_budget(config, layout),
        ),
    )
}

impl Drop for Core {
    fn drop(&mut self) {
        // Kernels may still be reading what is about to be unmapped.
        let asked = self.goals.get_mut().take_fences();
        for fence in self.table.get_mut().all_fences().into_iter().chain(asked) {
            if let Err(error) = fence.event().wait() {
                tracing::error!(
                    error = error.report(),
                    "a fence could not be waited for before a cache is dropped"
                );
            }
        }
    }
}
