//! Pins: what keeps memory in place whatever becomes of its slot, and of the cache.
//!
//! A pin keeps the cache's [`Core`], so that addresses stay reserved, and pieces of one slot, which the slot
//! table then counts as needed. When a cache is dropped under living pins, what they do not keep is given
//! back at once, and the rest as they go.

use std::fmt;
use std::sync::Arc;

use crate::cache::Health;
use crate::cache::core::Core;
use crate::error::Result;
use crate::mapper;
use crate::stats::Counters;
use crate::sync::atomic::Ordering;
use crate::units::{Bytes, Device, DeviceAddr, Granules, SlotId, TokenCount};

/// Keeps memory of a cache mapped at its addresses, and the addresses of all its tensors reserved, until it
/// and its clones are dropped.
///
/// It is what an array over a slot's keys and values holds on to, so that the array outlives the request
/// and the cache. What it does not keep are the contents: a request that adopts the slot writes its own tokens
/// there, and so may the one that has it.
///
/// Pinned memory counts as mapped and against the budget: neither [`fits`](crate::KvCache::fits) nor
/// [`admits`](crate::KvCache::admits) takes it for free. Several pins of a slot keep what the largest of them
/// does. Once dropped, it is parked where nobody's tokens need it, and is unmapped after the fences that the
/// slot's owners gave. So a pin is dropped once the device is done with what was launched on its memory, unless
/// a fence that is given later, when the slot is retired or truncated, covers it.
///
/// **Threads.** `Send + Sync`; any thread may drop it, but not inside a subscriber of `tracing`'s, where the
/// cache's locks may be held. That takes a short lock, or with
/// [`Reclaim::Eager`](crate::geometry::Reclaim::Eager) and no background, and where the cache is gone, waits for
/// fences and unmaps.
///
/// ```
/// # use vattn::driver::host::{Host, HostOptions};
/// # use vattn::units::{Bytes, TokenCount};
/// # use vattn::{Config, Fence, Geometry, KvCache, SlotTokens};
/// # let config = Config::builder(Geometry::preset("llama-3-8b")?).max_slots(8).budget(Bytes::gib(1)).build()?;
/// # let cache = KvCache::new(config, Host::new(HostOptions::new(Bytes::mib(2), Bytes::gib(1)))?)?;
/// let slot = cache.acquire(TokenCount::new(1000), None)?;
/// cache.step(&[SlotTokens::new(slot, TokenCount::new(1000))])?;
/// let pin = cache.pin(slot)?;
/// cache.retire(slot, &[Fence::Idle])?;
/// cache.trim(Bytes::ZERO, &[Fence::Idle])?;
/// cache.flush()?;
/// assert_eq!(cache.bytes().pinned, pin.bytes()); // still there
/// drop(cache);
/// drop(pin); // the last memory is given back
/// # Ok::<(), vattn::Error>(())
/// ```
pub struct Pin(Arc<Kept>);

/// What a pin and its clones keep.
struct Kept {
    core: Arc<Core>,
    slot: u32,
    tokens: TokenCount,
    granules: Granules,
}

impl Pin {
    fn new(core: &Arc<Core>, slot: u32, (tokens, granules): (TokenCount, Granules)) -> Self {
        core.counters.pins.add(1);
        Self(Arc::new(Kept { core: Arc::clone(core), slot, tokens, granules }))
    }

    /// The tokens that it keeps backed: those of the slot when it was pinned, and what `tile_tokens` adds.
    #[must_use]
    pub fn tokens(&self) -> TokenCount {
        self.0.tokens
    }

    /// The physical memory that it keeps in place, in all tensors together. Other pins may keep the same.
    #[must_use]
    pub fn bytes(&self) -> Bytes {
        self.0.core.layout.granule().to_bytes(self.0.granules)
    }

    /// Where the memory is.
    #[must_use]
    pub fn device(&self) -> Device {
        self.0.core.driver.info().device
    }

    /// Whether so many bytes from `addr` on lie in one of the cache's tensors: whether their addresses stay
    /// reserved, not whether there is memory behind them.
    #[must_use]
    pub fn contains(&self, addr: DeviceAddr, size: Bytes) -> bool {
        self.0.core.tensors.iter().any(|tensor| tensor.contains(addr, size))
    }

    fn counters(&self) -> &Counters {
        &self.0.core.counters
    }
}

impl Clone for Pin {
    fn clone(&self) -> Self {
        self.counters().pins.add(1);
        Self(Arc::clone(&self.0))
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        self.counters().pins.sub(1);
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        // Whoever drops it may be no caller of this library's, and takes no panic of a driver's.
        if let Err(words) = mapper::catch(|| self.core.unpin(self.slot, self.tokens)) {
            self.core.fail(&format!("dropping a pin panicked: {words}"));
        }
    }
}

impl fmt::Debug for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pin")
            .field("tokens", &self.tokens())
            .field("bytes", &self.bytes())
            .finish_non_exhaustive()
    }
}

impl Core {
    pub(super) fn pin(self: &Arc<Self>, slot: SlotId) -> Result<Pin> {
        self.noted(self.check_health().and_then(|()| {
            let mut table = self.table.lock();
            let index = table.check(slot)?;
            Ok(Pin::new(self, index, table.pin(index)))
        }))
    }

    pub(super) fn pin_addresses(self: &Arc<Self>) -> Pin {
        Pin::new(self, 0, (TokenCount::ZERO, Granules::ZERO))
    }

    fn unpin(&self, slot: u32, tokens: TokenCount) {
        let spare = self.table.lock().unpin(slot, tokens);
        let Some(id) = spare else { return };
        if self.health() == Health::Failed {
            return;
        }
        if self.closed.load(Ordering::Relaxed) {
            return self.give_back_unpinned();
        }
        self.let_go(id);
        if let Some(waker) = self.waker.get()
            && self.take_alert()
        {
            waker.wake();
        }
    }

    /// Lets go of what pins gave up while the caller kept their slots busy. He holds no lock any more.
    pub(super) fn let_go_unpinned(&self) {
        let slots = self.table.lock().take_unpinned();
        slots.into_iter().for_each(|slot| self.let_go(slot));
    }

    /// The cache is dropped, and nobody works in its background any more. What no pin keeps is given back.
    pub(super) fn close(&self) {
        let pins = self.counters.pins.get();
        if pins == 0 {
            return;
        }
        self.closed.store(true, Ordering::Relaxed);
        let pinned = self.bytes().pinned;
        tracing::warn!(pins, %pinned, "a cache is dropped under living pins, which keep its addresses and their memory");
        // Of a cache that has failed some slots may be busy for good, and no call of the driver is of use.
        if self.check_health().is_ok() {
            self.table.lock().retire_all();
            self.give_back_unpinned();
        }
    }

    fn give_back_unpinned(&self) {
        let _moves = self.moves.lock();
        // They stay: of several who give memory back each waits for them, and again where a wait failed.
        let fences = self.goals.lock().fences();
        if let Err(error) = self.give_up_memory(fences, |planner| planner.shrink(usize::MAX), Granules::ZERO)
        {
            tracing::error!(
                error = error.report(),
                "memory of a dropped cache stays until its last pin is dropped"
            );
        }
    }
}
