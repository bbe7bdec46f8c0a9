//! How the peers of vattn manage a KV cache's memory, in our own words, so that one run on one
//! driver gives ratios.
//!
//! Owns the trait that a server drives ([`Policy`]) and three policies behind it. Refuses to know
//! the server, the trace and vattn's own cache: what a policy learns of the model is a [`Shape`],
//! and all memory goes through [`vattn::driver::owned`].
//!
//! | policy | unit | made | given back |
//! |---|---|---|---|
//! | [`vattention`] | one granule in every tensor at once | all handles up front, mapped on demand | when another slot needs it |
//! | [`paged`] | a block of 16 tokens of all layers | one pool, up front | at retire |
//! | [`static_slots`] | a slot at full length | as many as fit, up front | at retire |

pub mod paged;
pub mod policy;
pub mod shape;
pub mod static_slots;
#[cfg(test)]
mod testing;
pub mod vattention;

pub use paged::Paged;
pub use policy::{Policy, RequestId, Usage};
pub use shape::{Shape, TensorShape};
pub use static_slots::StaticSlots;
pub use vattention::{MOST_HANDLES, Mapping, Vattention};

/// A length as `u64`.
pub(crate) fn wide(len: usize) -> u64 {
    u64::try_from(len).expect("a 64-bit usize is a u64")
}

/// A count that indexes memory, as `usize`.
pub(crate) fn narrow(count: u64) -> usize {
    usize::try_from(count).expect("a 64-bit usize is a u64")
}
