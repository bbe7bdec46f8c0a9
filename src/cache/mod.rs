//! [`KvCache`]: the public API, and the only place that wires the rooms together.
//!
//! Owns one cache: its tensors, its slot table, its pool, its locks, its mapper. Every operation has the
//! same shape: check and plan under the locks, call the driver with none, publish or undo under the
//! locks again (`work.rs`).
//!
//! | file | what it answers |
//! |---|---|
//! | `core.rs` | what a cache is made of; how work is carried out and settled |
//! | `step.rs` | how slots get their tokens; what would fit |
//! | `lifecycle.rs` | acquire, retire, truncate |
//! | `memory.rs` | reclaim, trim, the budget |
//! | `work.rs` | how extents are found, and moved whole or not at all |
//! | `background.rs` | what the mapper does, in which order, and how much at a time |
//! | `ahead.rs` | what it maps before tokens need it |
//! | `stock.rs` | which extents it keeps at hand |
//! | `pin.rs` | what keeps memory in place whatever becomes of its slot |
//! | `views.rs` | addresses, shapes and strides for kernels |
//! | `report.rs` | the walk through everything, and the audit |
//!
//! Locks: rank 0 is held by the one operation that moves extents, over its driver calls; rank 1 is
//! the slot table; rank 2 the pool; rank 3 what the mapper was asked for. A step in which nothing has to
//! be mapped takes ranks 1 and 2 alone. The mapper takes rank 0 as any caller does, for a few calls.

mod ahead;
mod background;
mod core;
mod lifecycle;
#[cfg(all(test, loom))]
mod loom_tests;
mod memory;
mod pin;
mod report;
mod step;
mod stock;
mod views;
mod work;

use std::fmt;
use std::sync::Arc;

use crate::cache::core::Core;
use crate::driver::{Driver, Stream};
#[cfg(doc)]
use crate::error::ErrorKind;
use crate::error::Result;
use crate::fence;
use crate::geometry::{Background, Config};
use crate::layout::{Layout, Part};
use crate::mapper::Mapper;
use crate::stats::{ByteCounts, Snapshot};
use crate::units::{Bytes, SlotId, TokenCount};

pub use crate::fence::{Fence, ForeignEvent};
pub use crate::slot::SlotTokens;
pub use pin::Pin;
pub use report::{Report, SlotReport};
pub use views::TensorView;

/// Whether a cache can be trusted with more work.
///
/// | call | `Healthy` | `Degraded` | `Failed` |
/// |---|---|---|---|
/// | `step`, `acquire`, `truncate`, `prefetch`, `pin` | yes | yes; a step on a slot with quarantined memory first tries to clear it | no |
/// | `retire`, `reclaim`, `trim`, `set_budget`, `tend`, `flush` | yes | yes | no |
/// | `fits`, `admits`, views, `pin_addresses`, `snapshot`, `report` | yes | yes | yes |
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
    /// The device or its context is gone, or the mapper panicked. Drop the cache; nothing in it can be
    /// saved.
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
/// anyway. What can be done beside the path of a request is left to a thread of the cache's own, the
/// mapper ([`Background`]): it maps ahead of growth, keeps extents at hand, waits for fences and
/// unmaps. It moves a few extents at a time, and a call that has to move some itself goes in between.
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
    // Ended before what it works on is closed.
    mapper: Option<Mapper>,
    core: Arc<Core>,
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
        let core = Arc::new(Core::new(config, driver)?);
        let mapper = match core.config().background() {
            Background::Thread => Some(core.spawn_mapper()?),
            Background::Caller | Background::Off => None,
        };
        Ok(Self { mapper, core })
    }

    /// The options it was made with.
    #[must_use]
    pub fn config(&self) -> &Config {
        self.core.config()
    }

    /// How the model's layers lie in tensors.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        self.core.layout()
    }

    /// Gives a new request a slot, of no tokens yet.
    ///
    /// `hint` is how many tokens it will soon hold, its prompt's for example: of the parked slots the
    /// one is adopted whose memory suits that best, so that its first step maps little or nothing.
    /// `stream` is where the request's work will run; it is alive, as [`Stream::new`] asks. What an earlier
    /// owner of the memory left running on another stream is waited for there, on the device; with `None`
    /// the calling thread waits.
    ///
    /// # Errors
    /// [`NoFreeSlot`](ErrorKind::NoFreeSlot), or the driver's refusal of a wait, among them
    /// [`CapturingStream`](ErrorKind::CapturingStream). Nothing is changed.
    pub fn acquire(&self, hint: TokenCount, stream: Option<Stream>) -> Result<SlotId> {
        self.then_wake(self.core.acquire(hint, stream))
    }

    /// One iteration of the server: these slots now hold this many tokens in all. Slots that are not
    /// named are untouched.
    ///
    /// On return every token is backed, in every tensor, and so is what `tile_tokens` adds to it. New
    /// memory holds whatever it held before: kernels write before they read.
    ///
    /// # Errors
    /// Nothing is changed by a step that fails.
    /// - [`StaleSlot`](ErrorKind::StaleSlot), [`ForeignSlot`](ErrorKind::ForeignSlot),
    ///   [`SlotBusy`](ErrorKind::SlotBusy), [`DuplicateSlot`](ErrorKind::DuplicateSlot);
    /// - [`TooManyTokens`](ErrorKind::TooManyTokens), [`FewerTokens`](ErrorKind::FewerTokens);
    /// - [`OutOfBudget`](ErrorKind::OutOfBudget): cured by retiring or truncating slots, or by a
    ///   larger budget; [`fits`](Self::fits) tells beforehand;
    /// - [`OutOfDeviceMemory`](ErrorKind::OutOfDeviceMemory): the budget has room but the device has
    ///   not;
    /// - [`OutOfMappings`](ErrorKind::OutOfMappings) and the driver's other refusals.
    pub fn step(&self, entries: &[SlotTokens]) -> Result<()> {
        self.then_wake(self.core.step(entries))
    }

    /// Which of these would succeed now, each together with those before it that would.
    ///
    /// One step of exactly those that are `true` succeeds unless the driver refuses or another thread
    /// takes the memory first. Steps one after another need not: while there is room, each may round
    /// its memory up.
    ///
    /// # Errors
    /// As [`step`](Self::step), for anything but memory.
    pub fn fits(&self, entries: &[SlotTokens]) -> Result<Vec<bool>> {
        self.core.fits(entries)
    }

    /// How many of these new requests, in order, could each be given a slot and stepped to so many
    /// tokens now. Counting ends at the first that could not, as a queue does.
    #[must_use]
    pub fn admits(&self, prompts: &[TokenCount]) -> usize {
        self.core.admits(prompts)
    }

    /// Has memory mapped for tokens that these slots will soon hold: for a request that was given a slot
    /// and still waits for its turn, or a prompt that comes in parts. The memory counts as parked, so
    /// whoever needs it first may take it, and it never stands in the way of a step or an admission.
    ///
    /// Returns at once; with [`Background::Off`] it maps on the calling thread. The last call for a slot
    /// counts, so one with the tokens that it holds takes the wish back, and retiring the slot gives the
    /// memory up. Where it does not fit, less is mapped, and more once memory is given up: that is no
    /// error.
    ///
    /// # Errors
    /// [`StaleSlot`](ErrorKind::StaleSlot), [`ForeignSlot`](ErrorKind::ForeignSlot),
    /// [`SlotBusy`](ErrorKind::SlotBusy), [`TooManyTokens`](ErrorKind::TooManyTokens). Nothing is
    /// changed.
    pub fn prefetch(&self, entries: &[SlotTokens]) -> Result<()> {
        self.then_wake(self.core.prefetch(entries))
    }

    /// Takes tokens away: the slot now holds that many. What held the others stays mapped, as spare
    /// memory of the slot; `fences` say when the device is done with it.
    ///
    /// # Errors
    /// As [`retire`](Self::retire), and [`InvalidArgument`](ErrorKind::InvalidArgument) for more
    /// tokens than the slot holds. Nothing is changed.
    pub fn truncate(&self, slot: SlotId, tokens: TokenCount, fences: &[Fence]) -> Result<()> {
        self.then_wake(self.core.truncate(slot, tokens, fences))
    }

    /// The request is done. Its extents stay mapped until another request adopts them or memory is
    /// short; `fences` say when the device is done with them.
    ///
    /// # Errors
    /// [`StaleSlot`](ErrorKind::StaleSlot), [`ForeignSlot`](ErrorKind::ForeignSlot),
    /// [`SlotBusy`](ErrorKind::SlotBusy), [`InvalidArgument`](ErrorKind::InvalidArgument) for no
    /// fence, [`CapturingStream`](ErrorKind::CapturingStream), and the driver's. Nothing is changed.
    pub fn retire(&self, slot: SlotId, fences: &[Fence]) -> Result<()> {
        self.then_wake(self.core.retire(slot, fences))
    }

    /// The index that padded batch entries may write to, if the cache was made with one. The tokens
    /// of one page or tile are always backed there, whichever is more.
    #[must_use]
    pub fn spare_slot(&self) -> Option<u32> {
        self.core.config().spare_index()
    }

    /// Unmaps memory that holds nobody's tokens, the one of least use first, until so many bytes more
    /// are free in the pool or nothing is left to unmap. What is unmapped are mappings there are now,
    /// once their fences and `fences` have fired.
    ///
    /// Returns at once, with what is free in the pool now; [`flush`](Self::flush) waits until it is
    /// done. With [`Background::Off`] it is done on return.
    ///
    /// # Errors
    /// [`InvalidArgument`](ErrorKind::InvalidArgument) for no fence,
    /// [`CapturingStream`](ErrorKind::CapturingStream), and the driver's.
    pub fn reclaim(&self, bytes: Bytes, fences: &[Fence]) -> Result<Bytes> {
        self.then_wake(self.core.reclaim(bytes, fences))
    }

    /// Gives memory back to the device until no more than `keep` is held, or until all is given back
    /// that holds nobody's tokens now. Mappings go once their fences and `fences` have fired. What is
    /// mapped ahead for slots in use is left to them: it would only be mapped again.
    ///
    /// Returns at once, with what is held now; [`flush`](Self::flush) waits until it is done: then more
    /// than `keep` is held only where slots in use need it, or went on growing. With
    /// [`Background::Off`] it is done on return.
    ///
    /// # Errors
    /// [`InvalidArgument`](ErrorKind::InvalidArgument) for no fence,
    /// [`CapturingStream`](ErrorKind::CapturingStream), and the driver's.
    pub fn trim(&self, keep: Bytes, fences: &[Fence]) -> Result<Bytes> {
        self.then_wake(self.core.trim(keep, fences))
    }

    /// Changes what may be held. With a smaller budget memory is given back before it returns:
    /// it waits for the fences of what is unmapped.
    ///
    /// # Errors
    /// [`InvalidConfig`](ErrorKind::InvalidConfig) for a budget that [`new`](Self::new) would refuse,
    /// [`OutOfBudget`](ErrorKind::OutOfBudget) where slots in use and pins need more than `budget`, and the
    /// driver's. The old budget stays.
    pub fn set_budget(&self, budget: Bytes) -> Result<()> {
        self.then_wake(self.core.set_budget(budget))
    }

    /// What may be held at most.
    #[must_use]
    pub fn budget(&self) -> Bytes {
        self.core.budget()
    }

    /// Does, on the calling thread, what the mapper would do by now: for [`Background::Caller`], once an
    /// iteration. Growth gets a share of each step, so that a burst of it is spread over the steps that
    /// are left before it is needed; what was asked for (a trim, a prefetch) is done as far as fences
    /// allow. Others get their turn after every few extents. Never waits for a fence, nor for another
    /// thread that is in this call.
    ///
    /// Returns whether something is left that it will do later: not before the next step, or not before a
    /// fence has fired.
    ///
    /// # Errors
    /// [`InvalidArgument`](ErrorKind::InvalidArgument) with another choice of [`Background`].
    pub fn tend(&self) -> Result<bool> {
        self.core.tend()
    }

    /// Blocks until all is done that the mapper was asked for before: memory is mapped ahead, trims and
    /// reclaims have come to their end, and so has what waits for a fence, which therefore has to fire.
    /// With [`Background::Caller`] it does that work itself, and with [`Background::Off`] there is none.
    ///
    /// # Errors
    /// What a call of the driver in the background failed with since the last flush, the first where
    /// there are several. Nothing is lost by it: what could not be mapped ahead is mapped when it is
    /// needed, and what could not be given back is still there.
    pub fn flush(&self) -> Result<()> {
        self.core.flush(self.mapper.as_ref())
    }

    /// Keeps what backs the slot's tokens now mapped where it is, until the pin and its clones are dropped:
    /// through retire, truncate, reclaim, trim, a smaller budget, adoption of the slot by another request, and
    /// the end of the cache. See [`Pin`].
    ///
    /// # Errors
    /// [`StaleSlot`](ErrorKind::StaleSlot), [`ForeignSlot`](ErrorKind::ForeignSlot),
    /// [`SlotBusy`](ErrorKind::SlotBusy), [`Unhealthy`](ErrorKind::Unhealthy). Nothing is changed.
    pub fn pin(&self, slot: SlotId) -> Result<Pin> {
        self.core.pin(slot)
    }

    /// Keeps the addresses of all tensors reserved, and no memory, until the pin and its clones are dropped.
    #[must_use]
    pub fn pin_addresses(&self) -> Pin {
        self.core.pin_addresses()
    }

    /// A layer's keys or values by slot: `[slot, token, head, dim]`. A latent layer has keys alone,
    /// of one head.
    ///
    /// # Errors
    /// [`InvalidArgument`](ErrorKind::InvalidArgument) past the last layer and for the values of a
    /// latent layer.
    pub fn view(&self, layer: u32, part: Part) -> Result<TensorView> {
        self.core.view(layer, part)
    }

    /// The same memory by page: `[page, token of the page, head, dim]`. Page i of slot s is
    /// s × [`pages_per_slot`](crate::layout::Layout::pages_per_slot) + i, in every layer alike, so a
    /// paged kernel reads a slot through a page table that counts upward.
    ///
    /// # Errors
    /// As [`view`](Self::view).
    pub fn paged_view(&self, layer: u32, part: Part) -> Result<TensorView> {
        self.core.paged_view(layer, part)
    }

    /// The same memory as one long row of tokens: `[1, token, head, dim]`. Token t of slot s is
    /// s × [`stride_tokens`](crate::layout::Layout::stride_tokens) + t.
    ///
    /// # Errors
    /// As [`view`](Self::view).
    pub fn token_view(&self, layer: u32, part: Part) -> Result<TensorView> {
        self.core.token_view(layer, part)
    }

    /// Whether it can be trusted with more work.
    #[must_use]
    pub fn health(&self) -> Health {
        self.core.health()
    }

    /// What is counted, at any time and without waiting for anybody.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        self.core.snapshot()
    }

    /// How much memory is used for what: the part of a [`snapshot`](Self::snapshot) that a server
    /// may want every iteration. It allocates nothing.
    #[must_use]
    pub fn bytes(&self) -> ByteCounts {
        self.core.bytes()
    }

    /// Walks through all slots and extents and compares the books: every total with the sum of its
    /// parts, every extent held with the place where it is. Waits for operations under way.
    ///
    /// # Errors
    /// [`Internal`](ErrorKind::Internal) where the books disagree, which is a defect of this library.
    pub fn report(&self) -> Result<Report> {
        self.core.report()
    }

    /// The cache has failed from now on, since a call of it panicked: what it left half done can't be known.
    #[cfg(not(loom))]
    pub(crate) fn fail(&self, why: &str) {
        self.core.fail(why);
    }

    /// Wakes the mapper if what was just done left it something to do.
    fn then_wake<T>(&self, result: T) -> T {
        if let Some(mapper) = &self.mapper
            && self.core.take_alert()
        {
            mapper.wake();
        }
        result
    }
}

impl Drop for KvCache {
    fn drop(&mut self) {
        self.mapper = None;
        self.core.close();
    }
}

impl fmt::Debug for KvCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KvCache")
            .field("driver", self.core.driver.info())
            .field("health", &self.health())
            .field("bytes", &self.snapshot().bytes)
            .finish_non_exhaustive()
    }
}
