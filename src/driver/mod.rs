//! The seam to whatever maps memory: one trait, its contract, and the backends behind it.
//!
//! Owns the contract, the backends and the types that free on drop ([`owned`]). Refuses to know
//! what the memory is for: no tokens, no slots, no budget. It is the one room besides the C ABI in
//! which `unsafe` is allowed.
//!
//! ```text
//!    reserve ──► addresses ── map(handle) ── set_access ──► usable memory
//!    create  ──► handle ───────┘                               │
//!                              ┌──────────── unmap ◄───────────┘
//!    release ◄── handle        addresses ──► free
//! ```
//!
//! | backend | what it is |
//! |---|---|
//! | [`host`] | memory of this machine on one memfd: a product of its own, Linux only |
//! | [`ledger`] | keeps the books and maps nothing: for replays of sizes that no host can map |
//! | [`checked`] | wraps any of them: asserts the contract, counts, fails on demand, charges modelled time |
//! | [`cuda`] | memory of an NVIDIA GPU, found at run time: feature `cuda`, on by default |
//!
//! The checks of arguments live above the seam, once, in [`owned`]; [`checked`] asserts that they
//! do. `tests/conformance.rs` is the suite that every backend passes.
//!
//! Every method may be called from several threads at once.

use std::fmt;

use crate::error::Result;
use crate::units::{Bytes, Device, DeviceAddr, GranuleSize};

#[cfg_attr(not(target_os = "linux"), allow(dead_code, reason = "some of it is for the host driver alone"))]
mod books;
pub mod checked;
#[cfg(feature = "cuda")]
pub mod cuda;
mod events;
pub mod host;
pub mod ledger;
pub mod owned;

pub use books::Live;

/// A physical allocation's handle, as the driver numbers it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(transparent)]
pub struct RawHandle(pub u64);

/// A stream of device work: a `CUstream`'s number. Zero is CUDA's legacy default stream, never
/// "no stream".
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(transparent)]
pub struct Stream(u64);

impl Stream {
    /// CUDA's legacy default stream, which a NULL stream stands for.
    pub const LEGACY: Self = Self(0);
    /// CUDA's per-thread default stream: another stream in each thread.
    pub const PER_THREAD: Self = Self(2);

    /// Names a stream to the library, which tells streams apart by their numbers. CUDA may give a
    /// number again once its stream is destroyed.
    ///
    /// # Safety
    /// - `number` is 0, 1 or 2, which are CUDA's own, or a stream of the context in which the driver
    ///   it is given to works, alive until the last call that names it returns;
    /// - after the last call that names it as a fence, the stream is synchronised before it is
    ///   destroyed.
    #[expect(unsafe_code, reason = "a stream can only be vouched for by whoever made it")]
    #[must_use]
    pub const unsafe fn new(number: u64) -> Self {
        Self(number)
    }

    /// The number, as CUDA has it.
    #[must_use]
    pub const fn number(self) -> u64 {
        self.0
    }

    /// For the unit tests, whose drivers know no streams but by their numbers.
    #[cfg(test)]
    pub(crate) const fn of_test(number: u64) -> Self {
        Self(number)
    }
}

/// A point in a stream: a `CUevent`'s number.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(transparent)]
pub struct RawEvent(pub u64);

/// What a mapping may be used for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Access {
    /// A kernel may read.
    Read,
    /// A kernel may read and write.
    ReadWrite,
}

/// How allocations are made: fixed when a driver is made, so that every handle of it is alike.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct HandleOptions {
    /// Another process can be given the memory through a file descriptor.
    pub exportable: bool,
    /// A network card can read and write the memory directly.
    pub rdma: bool,
}

/// What a driver is and how it allocates; the same for its whole life.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DriverInfo {
    /// The backend's name: `host`, `ledger`, `cuda`.
    pub name: &'static str,
    /// Where its memory lives.
    pub device: Device,
    /// The unit of allocation: sizes, and addresses that are mapped, are multiples of it.
    pub granule: GranuleSize,
    /// What every handle of it can do.
    pub options: HandleOptions,
}

/// Physical memory, as the driver tells it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MemoryInfo {
    /// Bytes that can still be allocated, by anybody.
    pub free: Bytes,
    /// Bytes in all.
    pub total: Bytes,
}

/// About a dozen verbs, under CUDA's names.
///
/// **Whole or not at all.** A call that returns an error has changed nothing.
///
/// **Errors.** Besides what each verb names: [`Driver`](crate::ErrorKind::Driver) for a refusal that
/// has no kind of its own, and [`DeviceLost`](crate::ErrorKind::DeviceLost) once the device or its
/// context is gone.
///
/// # Safety
///
/// Callers rely on an implementation for memory safety:
/// - a range that [`reserve`](Self::reserve) returned overlaps nothing else until it is freed;
/// - memory behind a mapping stays what it is until the range is unmapped, also if the handle is
///   released earlier;
/// - two handles never share memory while either is alive or mapped;
/// - a mapping over one that is there already is refused;
/// - a failed call has changed nothing.
#[expect(unsafe_code, reason = "callers rely on implementations for memory safety")]
pub unsafe trait Driver: fmt::Debug + Send + Sync {
    /// What this driver is.
    fn info(&self) -> &DriverInfo;

    /// How much memory there is and how much of it is free now.
    fn memory_info(&self) -> Result<MemoryInfo>;

    /// Takes `size` bytes of addresses with nothing behind them, starting on a granule. Touching
    /// them is fatal to whoever does.
    ///
    /// `size` is a positive multiple of the granule.
    ///
    /// # Errors
    /// [`OutOfAddressSpace`](crate::ErrorKind::OutOfAddressSpace).
    fn reserve(&self, size: Bytes) -> Result<DeviceAddr>;

    /// Gives addresses back.
    ///
    /// # Safety
    /// - `addr` and `size` are those of one reservation that has not been freed;
    /// - nothing is mapped in it;
    /// - nobody uses the addresses any more.
    unsafe fn free(&self, addr: DeviceAddr, size: Bytes) -> Result<()>;

    /// Allocates `size` bytes of physical memory. Its contents are not defined.
    ///
    /// `size` is a positive multiple of the granule.
    ///
    /// # Errors
    /// [`OutOfDeviceMemory`](crate::ErrorKind::OutOfDeviceMemory).
    fn create(&self, size: Bytes) -> Result<RawHandle>;

    /// Puts the whole of a handle's memory behind addresses. They can't be touched until
    /// [`set_access`](Self::set_access).
    ///
    /// # Safety
    /// - `addr` starts on a granule and `size` is exactly the size that `handle` was created with;
    /// - the range lies in one reservation and nothing is mapped in it;
    /// - `handle` has not been released.
    ///
    /// # Errors
    /// [`OutOfMappings`](crate::ErrorKind::OutOfMappings).
    unsafe fn map(&self, addr: DeviceAddr, size: Bytes, handle: RawHandle) -> Result<()>;

    /// Says what a range may be used for.
    ///
    /// # Safety
    /// - the range is made of whole mappings, without a gap;
    /// - where access is taken away, nobody still uses it.
    unsafe fn set_access(&self, addr: DeviceAddr, size: Bytes, access: Access) -> Result<()>;

    /// Takes the memory from behind addresses, which stay reserved.
    ///
    /// # Safety
    /// - the range is made of whole mappings, without a gap;
    /// - nobody uses the addresses any more, kernels that are still running included.
    ///
    /// # Errors
    /// [`OutOfMappings`](crate::ErrorKind::OutOfMappings): a hole in the middle can cost a mapping
    /// more than it frees. The range is mapped as before.
    unsafe fn unmap(&self, addr: DeviceAddr, size: Bytes) -> Result<()>;

    /// Gives up a handle. Its memory is free again as soon as it is mapped nowhere.
    ///
    /// # Safety
    /// - `handle` came from [`create`](Self::create) of this driver and has not been released.
    unsafe fn release(&self, handle: RawHandle) -> Result<()>;

    /// Marks the point that a stream has reached: a new event, which has fired once all work that
    /// was in the stream before it is done. The stream is alive: that is the promise of
    /// [`Stream::new`].
    ///
    /// # Errors
    /// [`CapturingStream`](crate::ErrorKind::CapturingStream) where the stream is being captured.
    fn record_event(&self, stream: Stream) -> Result<RawEvent>;

    /// A new event that fires once `event` has, so that `event`, which is somebody else's, need not
    /// outlive the call. Never blocks.
    ///
    /// # Safety
    /// - `event` is a living event of this device.
    unsafe fn follow_event(&self, event: RawEvent) -> Result<RawEvent>;

    /// Whether an event has fired. Never blocks.
    ///
    /// # Safety
    /// - `event` is a living event of this device.
    unsafe fn query_event(&self, event: RawEvent) -> Result<bool>;

    /// Blocks the calling thread until an event has fired.
    ///
    /// # Safety
    /// - `event` is a living event of this device.
    unsafe fn wait_event(&self, event: RawEvent) -> Result<()>;

    /// Makes later work of a stream, alive by the promise of [`Stream::new`], wait for an event. Never
    /// blocks the calling thread.
    ///
    /// # Safety
    /// - `event` is a living event of this device.
    ///
    /// # Errors
    /// [`CapturingStream`](crate::ErrorKind::CapturingStream) where the stream is being captured.
    unsafe fn stream_wait(&self, stream: Stream, event: RawEvent) -> Result<()>;

    /// Destroys an event, fired or not.
    ///
    /// # Safety
    /// - `event` came from [`record_event`](Self::record_event) or
    ///   [`follow_event`](Self::follow_event) of this driver and has not been destroyed.
    unsafe fn destroy_event(&self, event: RawEvent) -> Result<()>;
}
