//! Memory of this machine behind the driver's contract: one memfd and `mmap`. Linux only.
//!
//! A product of its own (inference on the CPU, machines without a GPU), not a stand-in. Owns the
//! file whose space is the physical memory, and what the kernel has mapped of it. Refuses to know
//! what the memory is for.
//!
//! ```text
//!   reservation   ░░░░░░░░████████░░░░████░░░░    ░ PROT_NONE: touching it faults
//!                         │ │ │ │     │  │        █ MAP_SHARED of the file
//!   memfd         ────────┴─┴─┴─┴─────┴──┴───     a handle is one range of it, lowest first
//! ```
//!
//! | file | question |
//! |---|---|
//! | `linux.rs` | what each verb does, and how a half-done one is undone |
//! | `space.rs` | where in the file a handle's memory lies |
//! | `cover.rs` | what the kernel shows at which address: how many mappings it needs, which calls make it so |
//! | `budget.rs` | how many mappings the kernel still allows this process |
//! | `mmap.rs` | the system calls |
//! | `unsupported.rs` | the twin for other systems: [`Host::new`] says that it is Linux only |
//!
//! - `map` only enters the books; `set_access` asks the kernel. So nothing can be touched before.
//! - Neighbours at ascending file offsets are one mapping to the kernel. Handles therefore take the
//!   lowest place that fits, and calls of the kernel cover runs, not handles.
//! - The kernel limits the mappings of a process (`vm.max_map_count`). They are counted from the
//!   books, and `map` refuses before the kernel would, while there is room left to undo.
//! - One lock, a leaf, covers books and system calls.
//! - If undoing fails too, the driver answers [`DeviceLost`](crate::ErrorKind::DeviceLost) from then
//!   on: what is mapped where is not known any more.
//!
//! There is no device work: events fire at once, unless a test holds their stream
//! ([`Host::hold`]).

use crate::units::Bytes;

#[cfg(target_os = "linux")]
mod budget;
#[cfg(target_os = "linux")]
mod cover;
#[cfg(target_os = "linux")]
mod linux;
#[cfg(target_os = "linux")]
mod mmap;
#[cfg(target_os = "linux")]
mod space;
#[cfg(any(not(target_os = "linux"), test))]
#[cfg_attr(
    target_os = "linux",
    allow(unreachable_pub, dead_code, reason = "built in tests so that it keeps building")
)]
mod unsupported;

#[cfg(target_os = "linux")]
pub use linux::Host;
#[cfg(not(target_os = "linux"))]
pub use unsupported::Host;

/// How a [`Host`] allocates.
#[derive(Clone, Copy, Debug)]
pub struct HostOptions {
    /// The unit of allocation: a power of two and a multiple of the page size. Larger granules need
    /// fewer of the kernel's mappings.
    pub granule: Bytes,
    /// Bytes that can be created in all. They are taken from the system when they are first touched,
    /// so a capacity above what the machine has ends in `SIGBUS` or the kernel's OOM killer.
    pub capacity: Bytes,
    /// How many of the kernel's mappings this driver may use for mapping, one for each reservation
    /// included; `None` for what `vm.max_map_count` leaves. That limit holds in any case, for all
    /// drivers of the process together.
    pub max_mappings: Option<u64>,
}

impl HostOptions {
    /// Granules and a capacity of those sizes, and the kernel's own limit on mappings.
    #[must_use]
    pub const fn new(granule: Bytes, capacity: Bytes) -> Self {
        Self { granule, capacity, max_mappings: None }
    }
}
