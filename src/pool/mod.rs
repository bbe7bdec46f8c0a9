//! Physical memory in extents: what there is, what of it is free, and what may be made.
//!
//! Owns the extents that are mapped nowhere, by size class, and the budget of all that exist.
//! Refuses to know where an extent is mapped, what it is mapped for, and the driver's calls: it
//! keeps books, and whoever it gives a promise makes the call and reports back. Which classes cover
//! a need is [`plan`]'s answer.
//!
//! ```text
//!              promise ── create ──► added            take
//!   budget ──────────────────────────────────► free ────────► in use (mapped, perhaps at several addresses)
//!              ◄────────── release ─── withdraw     ◄──────── give back: free again with the last reference
//! ```
//!
//! Invariants, checked by [`Pool::audit`]:
//! - held = free + in use + promised + withdrawn. What exists is never above the budget unless the budget was
//!   lowered below what is in use; held can be, by what is withdrawn for the sake of what is promised;
//! - an extent in a free list has exactly one reference.
//!
//! The pool is behind the lock of rank 2. No driver call is made under it.

#[cfg(all(test, loom))]
mod loom_tests;
mod plan;
mod stock;

pub(crate) use plan::{Need, cover, fewest, mix};

use std::sync::Arc;

use crate::driver::owned::PhysicalMemory;
use crate::stats::Counters;
use crate::units::{Bytes, GranuleSize, Granules, SizeClass, wide};

/// One physical allocation of 2^k granules. A clone is another reference to the same memory.
#[derive(Clone, Debug)]
pub(crate) struct Extent(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    class: SizeClass,
    memory: PhysicalMemory,
}

impl Extent {
    pub(crate) fn class(&self) -> SizeClass {
        self.0.class
    }

    pub(crate) fn memory(&self) -> &PhysicalMemory {
        &self.0.memory
    }

    /// Whether the memory is mapped elsewhere too.
    pub(crate) fn is_shared(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }

    /// The memory itself, if this is the only reference to it.
    pub(crate) fn into_memory(self) -> Option<PhysicalMemory> {
        Arc::into_inner(self.0).map(|inner| inner.memory)
    }
}

/// The right to create one extent: its bytes are held already.
#[derive(Debug)]
#[must_use = "a promise is kept or broken, or its bytes are never free again"]
pub(crate) struct Promise {
    class: SizeClass,
}

impl Promise {
    pub(crate) fn class(&self) -> SizeClass {
        self.class
    }
}

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct Pool {
    granule: GranuleSize,
    budget: Granules,
    /// All that exists, with what is promised and what is withdrawn and not yet released.
    held: Granules,
    free: [Vec<Extent>; SizeClass::COUNT],
    free_granules: Granules,
    /// How many free extents of each class are to be kept at hand.
    wanted: [u64; SizeClass::COUNT],
    counters: Arc<Counters>,
}

impl Pool {
    /// An empty pool that may hold the whole granules of `budget`.
    pub(crate) fn new(granule: GranuleSize, budget: Bytes, counters: Arc<Counters>) -> Self {
        let budget = granule.within(budget);
        counters.budget.set(granule.to_bytes(budget).get());
        Self {
            granule,
            budget,
            held: Granules::ZERO,
            free: Default::default(),
            free_granules: Granules::ZERO,
            wanted: [0; SizeClass::COUNT],
            counters,
        }
    }

    pub(crate) fn budget(&self) -> Granules {
        self.budget
    }

    pub(crate) fn held(&self) -> Granules {
        self.held
    }

    pub(crate) fn free_granules(&self) -> Granules {
        self.free_granules
    }

    /// How many extents of that class are free.
    pub(crate) fn count_free(&self, class: SizeClass) -> u64 {
        wide(self.free[class.index()].len())
    }

    pub(crate) fn set_budget(&mut self, budget: Bytes) {
        self.budget = self.granule.within(budget);
        self.counters.budget.set(self.granule.to_bytes(self.budget).get());
    }

    /// A free extent of exactly that class.
    pub(crate) fn take(&mut self, class: SizeClass) -> Option<Extent> {
        let extent = self.free[class.index()].pop()?;
        self.leave_free(class);
        self.counters.mapped_extents[class.index()].add(1);
        Some(extent)
    }

    /// The right to create an extent, if `limit` leaves room for it.
    pub(crate) fn promise(&mut self, class: SizeClass, limit: Granules) -> Option<Promise> {
        let held = self.held.checked_add(class.granules())?;
        if held > limit {
            return None;
        }
        self.hold(class);
        Some(Promise { class })
    }

    /// What was promised has been created, and is in use from the start.
    pub(crate) fn keep(&mut self, promise: Promise, memory: PhysicalMemory) -> Extent {
        self.counters.mapped_extents[promise.class.index()].add(1);
        Extent(Arc::new(Inner { class: promise.class, memory }))
    }

    /// What was promised will not be created.
    pub(crate) fn break_promise(&mut self, promise: Promise) {
        self.unhold(promise.class);
    }

    /// One reference less; with the last one the extent is free.
    pub(crate) fn give_back(&mut self, extent: Extent) {
        if Arc::strong_count(&extent.0) > 1 {
            return;
        }
        let class = extent.class();
        self.counters.mapped_extents[class.index()].sub(1);
        self.counters.free_extents[class.index()].add(1);
        self.counters.free.add(self.granule.to_bytes(class.granules()).get());
        self.free_granules += class.granules();
        self.free[class.index()].push(extent);
    }

    /// A free extent to be released, so that something of another size can be made: the smallest
    /// that is large enough, else the largest there is.
    pub(crate) fn withdraw(&mut self, granules: Granules) -> Option<Withdrawn> {
        let class = SizeClass::all()
            .find(|class| class.granules() >= granules && !self.free[class.index()].is_empty())
            .or_else(|| SizeClass::all().rev().find(|class| !self.free[class.index()].is_empty()))?;
        Some(Withdrawn { class, extent: self.take(class)? })
    }

    /// What was withdrawn, or was in use, has been released.
    pub(crate) fn released(&mut self, class: SizeClass) {
        self.counters.mapped_extents[class.index()].sub(1);
        self.unhold(class);
    }

    /// What was withdrawn is wanted after all.
    pub(crate) fn put_back(&mut self, withdrawn: Withdrawn) {
        self.give_back(withdrawn.extent);
    }

    /// What was to be released could not be.
    pub(crate) fn put_back_memory(&mut self, class: SizeClass, memory: PhysicalMemory) {
        self.give_back(Extent(Arc::new(Inner { class, memory })));
    }

    /// Compares the books with what the walker of everything else found in use.
    pub(crate) fn audit(&self, in_use: Granules) -> Result<(), String> {
        let listed: Granules = SizeClass::all().map(|class| class.granules() * self.count_free(class)).sum();
        if listed != self.free_granules {
            return Err(format!("{listed} granules are listed as free, {} are counted", self.free_granules));
        }
        if self.held != self.free_granules + in_use {
            return Err(format!(
                "{} granules are held, but {} are free and {in_use} in use",
                self.held, self.free_granules
            ));
        }
        let shared = self.free.iter().flatten().filter(|extent| Arc::strong_count(&extent.0) != 1).count();
        if shared > 0 {
            return Err(format!("{shared} free extents are referenced from elsewhere"));
        }
        let counted = Bytes::new(self.counters.held.get());
        if self.granule.to_bytes(self.held) != counted {
            return Err(format!("{} granules are held, {counted} are counted", self.held));
        }
        Ok(())
    }

    fn leave_free(&mut self, class: SizeClass) {
        self.counters.free_extents[class.index()].sub(1);
        self.counters.free.sub(self.granule.to_bytes(class.granules()).get());
        self.free_granules -= class.granules();
    }

    fn hold(&mut self, class: SizeClass) {
        self.held += class.granules();
        self.counters.held.add(self.granule.to_bytes(class.granules()).get());
    }

    fn unhold(&mut self, class: SizeClass) {
        self.held -= class.granules();
        self.counters.held.sub(self.granule.to_bytes(class.granules()).get());
    }
}

/// A free extent that is about to be released. Its bytes are held until it is.
#[derive(Debug)]
#[must_use = "it is released or put back, or its bytes are never free again"]
pub(crate) struct Withdrawn {
    class: SizeClass,
    extent: Extent,
}

impl Withdrawn {
    pub(crate) fn class(&self) -> SizeClass {
        self.class
    }

    pub(crate) fn into_memory(self) -> PhysicalMemory {
        self.extent.into_memory().expect("a free extent has one reference")
    }
}
