//! How many mappings the kernel still allows this process.
//!
//! Owns the one count that all host drivers of the process share. The kernel refuses at
//! `vm.max_map_count` whatever the call, undoing included; so `map` stops well below it.
//!
//! ```text
//!   0 ────────────── map may use ──────────────┬─ UNDO ─┬──── PROCESS ────┐ vm.max_map_count
//! ```

use std::fs;
use std::sync::OnceLock;

use crate::error::{Error, ErrorKind, Result};
use crate::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Left to the rest of the process: libraries, thread stacks, heaps, pinned buffers. A Python server
/// with PyTorch has some thousands.
pub(super) const PROCESS_HEADROOM: u64 = 8_192;

/// Left to what gives back and undoes: unmapping in the middle of a run leaves two runs and a gap, and
/// one system call splits at most two mappings on its way.
pub(super) const UNDO_HEADROOM: u64 = 1_024;

/// Linux's default, for a system that does not say.
const DEFAULT_LIMIT: u64 = 65_530;

static IN_USE: AtomicU64 = AtomicU64::new(0);

/// The kernel's limit, read once.
fn kernel_limit() -> u64 {
    static LIMIT: OnceLock<u64> = OnceLock::new();
    *LIMIT.get_or_init(|| {
        fs::read_to_string("/proc/sys/vm/max_map_count")
            .ok()
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or(DEFAULT_LIMIT)
    })
}

/// What a call wants more mappings for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Purpose {
    /// Something new.
    Grow,
    /// Something that was mapped already: the headroom for undoing is there for it.
    Change,
}

/// One driver's share of the count.
#[derive(Debug)]
pub(super) struct Share {
    used: u64,
    /// The driver's own limit for [`Purpose::Grow`].
    own_limit: Option<u64>,
}

impl Share {
    pub(super) fn new(own_limit: Option<u64>) -> Self {
        Self { used: 0, own_limit }
    }

    pub(super) fn used(&self) -> u64 {
        self.used
    }

    /// Makes the share `wanted`, or changes nothing.
    pub(super) fn resize(&mut self, wanted: u64, purpose: Purpose) -> Result<()> {
        let Some(more) = wanted.checked_sub(self.used).filter(|more| *more > 0) else {
            IN_USE.fetch_sub(self.used - wanted, Relaxed);
            self.used = wanted;
            return Ok(());
        };
        let undo = match purpose {
            Purpose::Grow => 0,
            Purpose::Change => UNDO_HEADROOM,
        };
        if let Some(limit) = self.own_limit
            && wanted > limit.saturating_add(undo)
        {
            return Err(refusal(wanted, limit.saturating_add(undo), "this driver's max_mappings"));
        }
        let limit = kernel_limit().saturating_sub(PROCESS_HEADROOM + UNDO_HEADROOM) + undo;
        match IN_USE.fetch_update(Relaxed, Relaxed, |all| all.checked_add(more).filter(|all| *all <= limit)) {
            Ok(_) => {
                self.used = wanted;
                Ok(())
            }
            Err(all) => Err(refusal(all + more, limit, "what vm.max_map_count leaves with headroom")),
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        IN_USE.fetch_sub(self.used, Relaxed);
    }
}

#[cold]
fn refusal(wanted: u64, limit: u64, whose: &str) -> Error {
    Error::new(
        ErrorKind::OutOfMappings,
        format!(
            "the call would bring the kernel's mappings to {wanted}, above {limit}: {whose} (the kernel's limit is {}); \
             use larger extents or granules, or raise the limit with `sysctl vm.max_map_count`",
            kernel_limit()
        ),
    )
}
