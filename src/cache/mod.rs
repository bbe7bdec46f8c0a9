//! [`KvCache`]: the public API, and the only place that wires the rooms together.
//!
//! Owns one cache: its tensors, its slot table, its pool, its locks. Every operation has the same
//! shape: check and plan under the locks, call the driver with none, publish or undo under the locks
//! again (`work.rs`).
//!
//! | file | what it answers |
//! |---|---|
//! | `step.rs` | how slots get their tokens; what would fit |
//! | `lifecycle.rs` | acquire, retire, truncate |
//! | `memory.rs` | reclaim, trim, the budget |
//! | `work.rs` | how extents are found, and moved whole or not at all |
//! | `fence.rs` | what is waited for before memory is unmapped |
//! | `views.rs` | addresses, shapes and strides for kernels |
//! | `report.rs` | the walk through everything, and the audit |
//!
//! Locks: rank 0 is held by the one operation that moves extents, over its driver calls; rank 1 is
//! the slot table; rank 2 the pool. A step in which nothing has to be mapped takes rank 1 alone.
//! A background mapper will take rank 0 as any caller does: its place is beside this room.

mod fence;
mod lifecycle;
#[cfg(all(test, loom))]
mod loom_tests;
mod memory;
mod report;
mod step;
mod views;
mod work;

use std::fmt;
use std::sync::Arc;

use crate::cache::work::{Merging, Planner, Work};
use crate::driver::Driver;
use crate::driver::owned::{DriverHandle, PhysicalMemory};
use crate::error::{Error, ErrorKind, Result};
use crate::geometry::{Commit, Config};
use crate::layout::Layout;
use crate::pool::{self, Pool};
use crate::slot::SlotTable;
use crate::stats::{ByteCounts, Counters, Snapshot};
use crate::sync::Ranked;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::tensor::Tensor;
use crate::units::{Bytes, Granules, SizeClass, TokenCount, wide};

pub use crate::slot::SlotTokens;
pub use fence::{Fence, ForeignEvent};
pub use report::{Report, SlotReport};
pub use views::TensorView;

/// Numbers caches, so that a slot of one is refused by another.
static NEXT_CACHE: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(1);

/// The most slots times tensors: their books take about a gigabyte.
const MOST_RUNS: u64 = 1 << 24;

/// Whether a cache can be trusted with more work.
///
/// | call | `Healthy` | `Degraded` | `Failed` |
/// |---|---|---|---|
/// | `step`, `acquire`, `truncate` | yes | yes; a step on a slot with quarantined memory first tries to clear it | no |
/// | `retire`, `reclaim`, `trim`, `set_budget` | yes | yes | no |
/// | `fits`, `admits`, views, `snapshot`, `report` | yes | yes | yes |
/// | drop | yes | yes | yes; what the device took with it counts as given back |
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Health {
    /// All is well.
    Healthy,
    /// The driver failed, and then refused to undo: some extents are quarantined, nothing else is
    /// affected. Ends by itself once the driver lets go of them.
    Degraded,
    /// The device or its context is gone. Drop the cache; nothing on the device can be saved.
    Failed,
}

/// A KV cache in virtual memory: for every layer a tensor `[slot, token, head, dim]` whose addresses
/// never move, with physical memory behind the tokens that there are.
///
/// A request [`acquire`](Self::acquire)s a slot, [`step`](Self::step)s it to ever more tokens, and is
/// [`retire`](Self::retire)d. Kernels read and write through [`view`](Self::view)s with
/// [`SlotId::index`](crate::SlotId::index) as the batch index.
///
/// **Threads.** `Send + Sync`; every method takes `&self`. Different threads may work on different
/// slots at the same time. Of two calls that name the same slot at once one may get
/// [`SlotBusy`](ErrorKind::SlotBusy), or see what the other has done already: a step of a slot that was
/// just retired is [`StaleSlot`](ErrorKind::StaleSlot). A step in which nothing has to be mapped takes one
/// short lock. Calls that move memory queue up behind one another, since the driver serialises them
/// anyway. Until there is a background mapper, a call that unmaps waits for the fences of what it
/// unmaps on the caller's thread.
///
/// **Whole or not at all.** A call that returns an error has changed nothing that a caller can see:
/// slots, tokens and addresses are as before. Parked memory that was reclaimed on the way may have
/// become free memory.
///
/// ```
/// use std::sync::Arc;
/// use vattn::driver::host::{Host, HostOptions};
/// use vattn::units::{Bytes, TokenCount};
/// use vattn::{Config, Fence, Geometry, KvCache, Part, SlotTokens};
///
/// let config = Config::builder(Geometry::preset("llama-3-8b")?)
///     .max_slots(8)
///     .max_tokens(TokenCount::new(8192))
///     .budget(Bytes::gib(1))
///     .build()?;
/// let cache = KvCache::new(config, Host::new(HostOptions::new(Bytes::mib(2), Bytes::gib(1)))?)?;
///
/// let slot = cache.acquire(TokenCount::new(1000), None)?;
/// cache.step(&[SlotTokens::new(slot, TokenCount::new(1000))])?; // the prompt
/// cache.step(&[SlotTokens::new(slot, TokenCount::new(1001))])?; // one more token
/// let keys = cache.view(0, Part::Key)?;
/// assert_eq!(keys.shape, [8, 8192, 8, 128]); // [slot, token, head, dim]
/// cache.retire(slot, &[Fence::Idle])?;
/// # Ok::<(), vattn::Error>(())
/// ```
pub struct KvCache {
    // Dropped in this order: mappings, extents, addresses.
    table: Ranked<SlotTable, 1>,
    pool: Ranked<Pool, 2>,
    tensors: Box<[Tensor]>,
    /// The right to move extents.
    moves: Ranked<(), 0>,
    layout: Arc<Layout>,
    config: Config,
    driver: DriverHandle,
    counters: Arc<Counters>,
    /// Whether the driver holds on to extents.
    degraded: AtomicBool,
}

impl KvCache {
    /// Reserves the addresses of all tensors, and commits what the options say.
    ///
    /// # Errors
    /// [`InvalidConfig`](ErrorKind::InvalidConfig) for a budget below one granule for each tensor or
    /// below what the spare slot takes, for one that the memory committed up front exceeds, and for
    /// more than 2^24 slots times tensors;
    /// [`OutOfAddressSpace`](ErrorKind::OutOfAddressSpace) for more virtual memory than can be
    /// reserved; [`OutOfDeviceMemory`](ErrorKind::OutOfDeviceMemory) for what is committed up front.
    pub fn new(config: Config, driver: Arc<dyn Driver>) -> Result<Self> {
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
        let number = NEXT_CACHE.fetch_add(1, Ordering::Relaxed);
        let table = SlotTable::new(
            number,
            Arc::clone(&layout),
            config.slack_divisor(),
            config.spare_index(),
            Arc::clone(&counters),
        );
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

    /// The options it was made with.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// How the model's layers lie in tensors.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// What is counted, at any time and without waiting for anybody.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        self.counters.snapshot()
    }

    /// How much memory is used for what: the part of a [`snapshot`](Self::snapshot) that a server
    /// may want every iteration. It allocates nothing.
    #[must_use]
    pub fn bytes(&self) -> ByteCounts {
        self.counters.bytes()
    }

    /// Whether it can be trusted with more work.
    #[must_use]
    pub fn health(&self) -> Health {
        if self.counters.device_lost() {
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

    /// Refuses calls once the device is gone.
    fn check_health(&self) -> Result<()> {
        if self.health() == Health::Failed {
            return Err(Error::new(
                ErrorKind::Unhealthy,
                "the device or its context is gone, and with it all that was cached; drop this cache and make a new one, in a \
                 new process if a kernel faulted",
            ));
        }
        Ok(())
    }

    /// Counts an error that a caller is given, and notes what it says about the device.
    fn noted<T>(&self, result: Result<T>) -> Result<T> {
        if let Err(error) = &result {
            self.counters.count_failure(error.kind());
            if error.kind() == ErrorKind::DeviceLost {
                tracing::error!(error = error.report(), "the device is gone: the cache has failed");
            }
        }
        result
    }

    /// Carries work out and settles it. `publish` runs under the locks if it succeeded, `undo` if not.
    ///
    /// The caller holds the right to move extents.
    fn perform(
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

    /// Plans and carries out work that maps nothing.
    ///
    /// The caller holds the right to move extents.
    fn give_up_memory(
        &self,
        fences: Vec<crate::slot::Fence>,
        plan: impl FnOnce(&mut Planner<'_>),
        limit: Granules,
    ) -> Result<()> {
        // What the driver would not let go of before is tried again, and stands in nobody's way.
        if !self.table.lock().quarantined().is_zero() {
            let work = self.plan(Vec::new(), |planner| planner.clear_all(), limit);
            if let Err(error) = self.perform(work, |_| {}, |_| {}) {
                tracing::warn!(error = error.report(), "the driver still holds on to quarantined extents");
            }
        }
        let work = self.plan(fences, plan, limit);
        self.perform(work, |_| {}, |_| {})
    }

    fn plan(
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
    fn sweep(&self) {
        let trash = self.table.lock().take_trash();
        drop(trash);
    }
}

/// The tokens that the spare slot backs.
fn spare_tokens(config: &Config) -> TokenCount {
    let tokens = config.page_tokens().max(config.tile_tokens());
    TokenCount::new(u64::from(tokens)).min(config.max_tokens())
}

/// A granule for each tensor, or what the spare slot takes, where that is more.
fn least_budget(config: &Config, layout: &Layout) -> Bytes {
    let one_each = Granules::new(wide(layout.tensors().len()));
    let spare = match config.spare_index() {
        Some(_) => layout.granules_for(layout.round_to_tile(spare_tokens(config))),
        None => Granules::ZERO,
    };
    layout.granule().to_bytes(one_each.max(spare))
}

#[cold]
fn too_small(budget: Bytes, config: &Config, layout: &Layout) -> Error {
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

impl Drop for KvCache {
    fn drop(&mut self) {
        // Kernels may still be reading what is about to be unmapped.
        for fence in self.table.get_mut().all_fences() {
            if let Err(error) = fence.event().wait() {
                tracing::error!(
                    error = error.report(),
                    "a fence could not be waited for before a cache is dropped"
                );
            }
        }
    }
}

impl fmt::Debug for KvCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KvCache")
            .field("driver", self.driver.info())
            .field("health", &self.health())
            .field("bytes", &self.snapshot().bytes)
            .finish_non_exhaustive()
    }
}
