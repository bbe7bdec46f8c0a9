//! A KV cache for LLM servers: contiguous in virtual memory, backed by physical memory on demand.
//!
//! An attention kernel that is written for a plain tensor `[slot, token, head, dim]` reads this
//! cache unmodified, since every slot has addresses for its most tokens from the start. Physical
//! memory comes behind those addresses when a token needs it. The way in is [`KvCache`]: a request
//! [`acquire`](KvCache::acquire)s a slot, [`step`](KvCache::step)s it to ever more tokens, and is
//! [`retire`](KvCache::retire)d; kernels take their addresses from [`view`](KvCache::view)s.
//!
//! `README.md` shows it at work, `DESIGN.md` says why it is as it is.
//!
//! # Words
//!
//! | word | meaning |
//! |---|---|
//! | granule | the driver's unit of allocation: 2 MiB on CUDA, set by the user on the host |
//! | extent | one physical allocation of 2^k granules, one driver handle. Counted by reference: it may be mapped at several addresses |
//! | class | an extent's k ([`units::SizeClass`]) |
//! | reservation | a range of virtual addresses with nothing behind it |
//! | tensor | one reservation seen as `[slot, token, row]`; a row is what one token has in it |
//! | layout | how a model's layers, keys and values become tensors ([`layout`]) |
//! | slot | a request's index into every tensor. Its id ([`SlotId`]) carries a generation, so that an old id is refused |
//! | run | the extents mapped into one slot's part of one tensor, side by side from its start |
//! | piece | one extent in a run |
//! | frontier | the end of the last piece of a run that holds a byte of its owner's tokens, or that a pin keeps |
//! | step | one iteration of the server: "these slots now hold this many tokens in all" |
//! | retire | the request is done with its slot; its extents stay mapped |
//! | pin | keeps the memory of a slot's tokens mapped, whoever has the slot ([`Pin`]); pinned memory counts as mapped |
//! | parked | mapped, not pinned, and holding nobody's tokens: a retired slot's extents, and what lies beyond the frontier of a slot in use |
//! | ahead | parked, and mapped before the tokens of the slot in use came to need it |
//! | adopt | a new request takes over a parked slot with the extents in it |
//! | reclaim | parked extents are unmapped, and are free or go to another slot |
//! | trim | memory is given back to the device |
//! | mapper | the background thread: it maps ahead, keeps extents at hand, waits for fences and unmaps |
//! | fence | what tells that device work submitted earlier is done ([`Fence`]) |
//! | needed | bytes that the live tokens fill with no rounding at all: the packed floor |
//! | mapped | extents of slots in use, up to the frontier, and those that pins keep |
//! | free | created and mapped nowhere |
//! | quarantined | extents that the driver would not let go of after a failure |
//! | held | all that was created and not released: mapped + parked + free + quarantined |
//! | tile | what a kernel loads at once; a step rounds up to it what it backs (`tile_tokens`) |
//!
//! Calls of the driver keep CUDA's names: reserve, create, map, set_access, unmap, release, free.
//!
//! # Rooms
//!
//! | room | question |
//! |---|---|
//! | [`units`], [`error`] | which numbers and which failures there are |
//! | `sync` | where locks come from, and in which order they are taken |
//! | [`stats`] | what is counted |
//! | [`geometry`] | what a model keeps for each token, and with which options a cache is made |
//! | [`driver`] | who maps memory: the contract, the host, the ledger, the checker |
//! | [`fence`] | what is waited for before memory is unmapped |
//! | `pool` | which extents there are, and which of them cover a need |
//! | [`layout`] | where each layer's keys and values lie |
//! | `tensor` | what is mapped where in one reservation |
//! | [`buffer`] | which bytes of one range of addresses are wanted, and what is mapped for them |
//! | `slot` | who has a slot, which parked one is adopted, how much a run grows |
//! | `mapper` | the background thread: how it is woken, waited for and ended |
//! | [`cache`] | how an operation is planned, carried out, and published or undone |
//! | [`ffi`] | what C sees: `include/vattn.h` |
//!
//! Imports point up this table and never down.

pub mod buffer;
pub mod cache;
pub mod driver;
pub mod error;
pub mod fence;
#[cfg(not(loom))]
pub mod ffi;
pub mod geometry;
pub mod layout;
pub(crate) mod mapper;
pub(crate) mod pool;
pub(crate) mod slot;
pub mod stats;
pub(crate) mod sync;
pub(crate) mod tensor;
pub mod units;

pub use buffer::{Buffer, BufferOptions};
pub use cache::{Fence, Health, KvCache, Pin, SlotTokens, TensorView};
pub use error::{Error, ErrorKind, Result};
pub use geometry::{Config, Geometry};
pub use layout::Part;
pub use units::{Bytes, Device, DeviceAddr, SlotId, TokenCount};

// The snippets of the documents are run with the doctests.
#[cfg(doctest)]
mod documents {
    #[doc = include_str!("../README.md")]
    struct Readme;
    #[doc = include_str!("../DESIGN.md")]
    struct Design;
}
