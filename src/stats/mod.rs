//! What the cache counts: at any time a snapshot of atomics, and the plain data that reports are
//! made of.
//!
//! Owns the counters ([`Counters`]) and their plain form ([`Snapshot`]), which serde turns into
//! JSON. Refuses to know any other room: others count here, in the function that changes what is
//! counted.
//!
//! Counters are relaxed atomics: a snapshot taken while others work may see one of two counts that
//! change together and not yet the other. A [`Report`](crate::cache::Report) walks under the locks
//! and is exact.

mod counters;
mod snapshot;

pub use counters::{Counters, Gauge, Tally, beside_the_path};
pub use snapshot::{ByteCounts, CallStats, ClassStats, Events, SlotCounts, Snapshot};
