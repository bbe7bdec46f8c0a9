//! What the tests of the cache share: a driver that watches, shapes of caches, and small helpers.

#![allow(dead_code, reason = "every test program uses a part of it")]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use parking_lot::Mutex;
use vattn::cache::ForeignEvent;
use vattn::driver::checked::{Checked, CheckedOptions};
use vattn::driver::host::{Host, HostOptions};
use vattn::driver::ledger::{Ledger, LedgerOptions};
use vattn::driver::{Access, Driver, DriverInfo, Live, MemoryInfo, RawEvent, RawHandle, Stream};
use vattn::error::{ErrorKind, Result, Verb};
use vattn::geometry::{Commit, Config, Dtype, Geometry, LayerGroup, LayerKind};
use vattn::units::{Bytes, DeviceAddr, SizeClass};
use vattn::{Fence, KvCache, SlotId, SlotTokens, TokenCount};

#[cfg(feature = "cuda")]
pub(crate) mod card;
pub(crate) mod contents;
pub(crate) mod gate;
#[cfg(feature = "cuda")]
pub(crate) mod kernels;
pub(crate) mod rig;
pub(crate) mod shapes;

pub(crate) use shapes::Shape;

/// The driver under the checks.
#[derive(Clone, Debug)]
pub(crate) enum Backend {
    Host(Arc<Host>),
    Ledger(Arc<Ledger>),
    #[cfg(feature = "cuda")]
    Card(Arc<card::Card>),
}

/// Whether tests of the cache run on the first GPU: `VATTN_TEST_DEVICE=cuda`. They run on the host and
/// on books otherwise.
pub(crate) fn on_card() -> bool {
    match std::env::var("VATTN_TEST_DEVICE").as_deref() {
        Ok("cuda") => true,
        Ok("host") | Err(_) => false,
        Ok(other) => panic!("VATTN_TEST_DEVICE is \"{other}\"; host or cuda is wanted"),
    }
}

impl Backend {
    /// The card, which this test was asked to run on.
    #[cfg(feature = "cuda")]
    pub(crate) fn card() -> Self {
        Self::Card(card::Card::open().expect("VATTN_TEST_DEVICE is cuda, and there is no GPU"))
    }

    #[cfg(not(feature = "cuda"))]
    pub(crate) fn card() -> Self {
        panic!("VATTN_TEST_DEVICE is cuda, and this build is without the feature `cuda`");
    }

    pub(crate) fn host(granule: Bytes, capacity: Bytes) -> Self {
        Self::Host(Host::new(HostOptions::new(granule, capacity)).unwrap())
    }

    pub(crate) fn ledger(granule: Bytes, capacity: Bytes) -> Self {
        Self::Ledger(Ledger::new(LedgerOptions { granule, capacity, addresses: None }).unwrap())
    }

    pub(crate) fn driver(&self) -> Arc<dyn Driver> {
        match self {
            Self::Host(host) => host.clone(),
            Self::Ledger(ledger) => ledger.clone(),
            #[cfg(feature = "cuda")]
            Self::Card(card) => card.cuda.clone(),
        }
    }

    /// What the backend's own books say; a card shows none.
    pub(crate) fn live(&self) -> Option<Live> {
        match self {
            Self::Host(host) => Some(host.live()),
            Self::Ledger(ledger) => Some(ledger.live()),
            #[cfg(feature = "cuda")]
            Self::Card(_) => None,
        }
    }

    /// How many threads block on an event.
    pub(crate) fn waiting(&self) -> u64 {
        match self {
            Self::Host(host) => host.waiting(),
            Self::Ledger(ledger) => ledger.waiting(),
            #[cfg(feature = "cuda")]
            Self::Card(_) => panic!("a card does not tell who waits"),
        }
    }

    pub(crate) fn set_capturing(&self, stream: Stream, capturing: bool) {
        match self {
            Self::Host(host) => host.set_capturing(stream, capturing),
            Self::Ledger(ledger) => ledger.set_capturing(stream, capturing),
            #[cfg(feature = "cuda")]
            Self::Card(card) => card.capture(stream, capturing),
        }
    }

    pub(crate) fn hold(&self, stream: Stream) {
        match self {
            Self::Host(host) => host.hold(stream),
            Self::Ledger(ledger) => ledger.hold(stream),
            #[cfg(feature = "cuda")]
            Self::Card(card) => card.hold(stream),
        }
    }

    pub(crate) fn fire(&self, stream: Stream) {
        match self {
            Self::Host(host) => host.fire(stream),
            Self::Ledger(ledger) => ledger.fire(stream),
            #[cfg(feature = "cuda")]
            Self::Card(card) => card.fire(stream),
        }
    }

    pub(crate) fn fire_all(&self) {
        match self {
            Self::Host(host) => host.fire_all(),
            Self::Ledger(ledger) => ledger.fire_all(),
            #[cfg(feature = "cuda")]
            Self::Card(card) => card.fire_all(),
        }
    }

    /// The stream that stands for a number of a test's.
    pub(crate) fn stream(&self, stream: Stream) -> Stream {
        match self {
            Self::Host(_) | Self::Ledger(_) => stream,
            #[cfg(feature = "cuda")]
            Self::Card(card) => card.stream(stream),
        }
    }
}

#[derive(Debug, Default)]
struct Seen {
    reservations: Vec<(u64, u64)>,
    mappings: BTreeMap<u64, u64>,
    held: BTreeSet<Stream>,
    /// For each mapping the held streams whose work may still use it.
    used_by: BTreeMap<u64, BTreeSet<Stream>>,
    /// Streams that must be done before anything is unmapped.
    before_any: BTreeSet<Stream>,
    violations: Vec<String>,
}

/// A checked driver that remembers what is mapped where, and complains when memory is unmapped that
/// work of a held stream may still use.
#[derive(Clone, Debug)]
pub(crate) struct Watch {
    pub(crate) checked: Arc<Checked>,
    pub(crate) backend: Backend,
    seen: Arc<Mutex<Seen>>,
    on_the_path: Arc<AtomicU64>,
}

impl Watch {
    pub(crate) fn new(backend: Backend, device_has: Option<Bytes>) -> Self {
        let options = CheckedOptions { budget: device_has, ..CheckedOptions::TEST };
        let checked = Checked::new(backend.driver(), options);
        Self { checked, backend, seen: Arc::default(), on_the_path: Arc::default() }
    }

    /// As the cache takes it.
    pub(crate) fn driver(&self) -> Arc<dyn Driver> {
        Arc::new(self.clone())
    }

    /// Calls that move memory, by others than a mapper.
    pub(crate) fn on_the_path(&self) -> u64 {
        self.on_the_path.load(Relaxed)
    }

    fn count(&self) {
        if !gate::is_mapper() {
            self.on_the_path.fetch_add(1, Relaxed);
        }
    }

    /// Has every stream's work end as soon as anybody waits for any: a lone thread never hangs.
    pub(crate) fn fire_when_waited_for(&self) {
        let watch = self.backend.clone();
        let seen = Arc::clone(&self.seen);
        self.checked.on_call(Box::new(move |verb| {
            if verb == Verb::WaitEvent {
                fire_all(&watch, &seen);
            }
        }));
    }

    pub(crate) fn hold(&self, stream: Stream) {
        self.backend.hold(stream);
        self.seen.lock().held.insert(stream);
    }

    pub(crate) fn fire(&self, stream: Stream) {
        {
            let mut seen = self.seen.lock();
            seen.held.remove(&stream);
            seen.before_any.remove(&stream);
            for streams in seen.used_by.values_mut() {
                streams.remove(&stream);
            }
        }
        self.backend.fire(stream);
    }

    pub(crate) fn fire_all(&self) {
        fire_all(&self.backend, &self.seen);
    }

    /// From now on a slot's memory is used by that stream until it is fired, if it is held.
    pub(crate) fn used_by(&self, cache: &KvCache, slot: u32, stream: Stream) {
        let mut seen = self.seen.lock();
        if !seen.held.contains(&stream) {
            return;
        }
        for tensor in 0..seen.reservations.len() {
            let start = start_of(cache, &seen, slot, tensor);
            let end = start + cache.layout().tensors()[tensor].slot_stride().get();
            let inside: Vec<u64> = seen.mappings.range(start..end).map(|(addr, _)| *addr).collect();
            for addr in inside {
                seen.used_by.entry(addr).or_default().insert(stream);
            }
        }
    }

    /// Nothing may be unmapped until the stream is fired, if it is held.
    pub(crate) fn before_any(&self, streams: &[Stream]) {
        let mut seen = self.seen.lock();
        let held: Vec<_> = streams.iter().copied().filter(|stream| seen.held.contains(stream)).collect();
        seen.before_any = held.into_iter().collect();
    }

    /// How much is mapped that holds a slot's first tokens, in all tensors, by what the driver was called with.
    pub(crate) fn mapped(&self, cache: &KvCache, slot: u32, tokens: u64) -> Bytes {
        let seen = self.seen.lock();
        let of_tensor = |tensor: usize| -> u64 {
            let start = start_of(cache, &seen, slot, tensor);
            let end = start + cache.layout().tensors()[tensor].row().get() * tokens;
            seen.mappings.range(start..end).map(|(_, size)| size).sum()
        };
        Bytes::new((0..seen.reservations.len()).map(of_tensor).sum())
    }

    /// Where a slot's mappings in a tensor end, in granules from the slot's start, in order.
    pub(crate) fn boundaries(&self, cache: &KvCache, slot: u32, tensor: usize) -> Vec<u64> {
        let seen = self.seen.lock();
        let granule = cache.layout().granule().bytes().get();
        let start = start_of(cache, &seen, slot, tensor);
        let end = start + cache.layout().tensors()[tensor].slot_stride().get();
        let mut at = start;
        let pieces = seen.mappings.range(start..end).map(|(addr, size)| {
            assert_eq!(*addr, at, "slot {slot} of tensor {tensor} has a gap");
            at = addr + size;
            (at - start) / granule
        });
        pieces.collect()
    }

    pub(crate) fn violations(&self) -> Vec<String> {
        self.seen.lock().violations.clone()
    }

    /// A foreign event in a stream, and what to destroy it with.
    pub(crate) fn foreign(&self, stream: Stream) -> (Fence, RawEvent) {
        let event = self.checked.record_event(self.backend.stream(stream)).unwrap();
        // SAFETY: the event lives until the test destroys it, after the call that takes the fence.
        (Fence::Event(unsafe { ForeignEvent::new(event) }), event)
    }

    pub(crate) fn destroy(&self, event: RawEvent) {
        // SAFETY: the event is one of `foreign`, destroyed once.
        unsafe { self.checked.destroy_event(event) }.unwrap();
    }
}

fn start_of(cache: &KvCache, seen: &Seen, slot: u32, tensor: usize) -> u64 {
    seen.reservations[tensor].0 + cache.layout().tensors()[tensor].slot_stride().get() * u64::from(slot)
}

fn fire_all(backend: &Backend, seen: &Mutex<Seen>) {
    {
        let mut seen = seen.lock();
        seen.held.clear();
        seen.before_any.clear();
        seen.used_by.clear();
    }
    backend.fire_all();
}

// SAFETY: every verb is the checked driver's; beside it only books are kept.
unsafe impl Driver for Watch {
    fn info(&self) -> &DriverInfo {
        self.checked.info()
    }

    fn memory_info(&self) -> Result<MemoryInfo> {
        self.count();
        self.checked.memory_info()
    }

    fn reserve(&self, size: Bytes) -> Result<DeviceAddr> {
        self.checked
            .reserve(size)
            .inspect(|addr| self.seen.lock().reservations.push((addr.get(), size.get())))
    }

    unsafe fn free(&self, addr: DeviceAddr, size: Bytes) -> Result<()> {
        // SAFETY: the caller's conditions are the callee's.
        unsafe { self.checked.free(addr, size) }
    }

    fn create(&self, size: Bytes) -> Result<RawHandle> {
        self.count();
        self.checked.create(size)
    }

    unsafe fn map(&self, addr: DeviceAddr, size: Bytes, handle: RawHandle) -> Result<()> {
        self.count();
        // SAFETY: the caller's conditions are the callee's.
        unsafe { self.checked.map(addr, size, handle) }.inspect(|()| {
            self.seen.lock().mappings.insert(addr.get(), size.get());
        })
    }

    unsafe fn set_access(&self, addr: DeviceAddr, size: Bytes, access: Access) -> Result<()> {
        self.count();
        // SAFETY: the caller's conditions are the callee's.
        unsafe { self.checked.set_access(addr, size, access) }
    }

    unsafe fn unmap(&self, addr: DeviceAddr, size: Bytes) -> Result<()> {
        self.count();
        {
            let mut seen = self.seen.lock();
            let users = seen.used_by.get(&addr.get()).filter(|users| !users.is_empty()).cloned();
            if let Some(users) = users {
                seen.violations.push(format!("{addr} is unmapped while {users:?} may use it"));
            }
            if !seen.before_any.is_empty() {
                let waits = seen.before_any.clone();
                seen.violations.push(format!("{addr} is unmapped before {waits:?}, the caller's fences"));
            }
        }
        // SAFETY: the caller's conditions are the callee's.
        unsafe { self.checked.unmap(addr, size) }.inspect(|()| {
            let mut seen = self.seen.lock();
            seen.mappings.remove(&addr.get());
            seen.used_by.remove(&addr.get());
        })
    }

    unsafe fn release(&self, handle: RawHandle) -> Result<()> {
        self.count();
        // SAFETY: the caller's condition is the callee's.
        unsafe { self.checked.release(handle) }
    }

    fn record_event(&self, stream: Stream) -> Result<RawEvent> {
        self.checked.record_event(self.backend.stream(stream))
    }

    unsafe fn follow_event(&self, event: RawEvent) -> Result<RawEvent> {
        // SAFETY: the caller's condition is the callee's.
        unsafe { self.checked.follow_event(event) }
    }

    unsafe fn query_event(&self, event: RawEvent) -> Result<bool> {
        // SAFETY: the caller's condition is the callee's.
        unsafe { self.checked.query_event(event) }
    }

    unsafe fn wait_event(&self, event: RawEvent) -> Result<()> {
        // SAFETY: the caller's condition is the callee's.
        unsafe { self.checked.wait_event(event) }
    }

    unsafe fn stream_wait(&self, stream: Stream, event: RawEvent) -> Result<()> {
        // SAFETY: the caller's condition is the callee's.
        unsafe { self.checked.stream_wait(self.backend.stream(stream), event) }
    }

    unsafe fn destroy_event(&self, event: RawEvent) -> Result<()> {
        // SAFETY: the caller's condition is the callee's.
        unsafe { self.checked.destroy_event(event) }
    }
}

/// A generator of numbers that needs no crate: SplitMix64.
#[derive(Clone, Debug)]
pub(crate) struct Numbers(u64);

impl Numbers {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `limit`.
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// A stream by a number of a test's.
pub(crate) const fn stream(number: u64) -> Stream {
    // SAFETY: the host and the ledger know streams by their numbers alone, and a card's tests have each
    // number translated to a stream of the card's own.
    unsafe { Stream::new(number) }
}

pub(crate) fn tokens(count: u64) -> TokenCount {
    TokenCount::new(count)
}

pub(crate) fn step(cache: &KvCache, slot: SlotId, count: u64) -> Result<()> {
    cache.step(&[SlotTokens::new(slot, tokens(count))])
}

/// What kind of error something came to.
pub(crate) fn kind<T: std::fmt::Debug>(result: Result<T>) -> ErrorKind {
    result.unwrap_err().kind()
}

/// A number from the environment, or the default.
pub(crate) fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| {
        text.parse().unwrap_or_else(|_| panic!("{name} is \"{text}\"; a whole number is wanted"))
    })
}

fn class(exponent: u8) -> SizeClass {
    SizeClass::new(exponent).unwrap()
}

fn kv(layers: u32, kv_heads: u32, key_dim: u32, value_dim: u32) -> LayerGroup {
    LayerGroup { layers, kind: LayerKind::Kv { kv_heads, key_dim, value_dim } }
}

fn latent(layers: u32, dim: u32) -> LayerGroup {
    LayerGroup { layers, kind: LayerKind::Latent { dim } }
}

fn model(groups: Vec<LayerGroup>, dtype: Dtype) -> Geometry {
    Geometry::new(groups, dtype).unwrap()
}

fn commit(extents: &[(u8, u64)]) -> Commit {
    if extents.is_empty() {
        return Commit::OnDemand;
    }
    Commit::UpFront(extents.iter().map(|(exponent, count)| (class(*exponent), *count)).collect())
}

fn configure(shape: &Shape) -> Config {
    let layout: vattn::geometry::LayoutChoice = shape.layout.parse().unwrap();
    Config::builder(shape.geometry.clone())
        .layout(layout)
        .max_slots(shape.slots)
        .max_tokens(tokens(shape.max_tokens))
        .page_tokens(16)
        .tile_tokens(shape.tile)
        .budget(shape.granule * shape.budget)
        .spare_slot(shape.spare)
        .commit(commit(&shape.up_front))
        .background(shape.background)
        .build()
        .unwrap()
}
