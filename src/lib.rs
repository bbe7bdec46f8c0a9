//! A KV cache for LLM servers: contiguous in virtual memory, backed by physical memory on demand.

pub mod cache;
pub mod driver;
pub mod error;
pub mod geometry;
pub mod layout;
pub(crate) mod pool;
pub(crate) mod slot;
pub mod stats;
pub(crate) mod sync;
pub(crate) mod tensor;
pub mod units;

pub use cache::{Fence, Health, KvCache, SlotTokens, TensorView};
pub use error::{Error, ErrorKind, Result};
pub use geometry::{Config, Geometry};
pub use layout::Part;
pub use units::{Bytes, Device, DeviceAddr, SlotId, TokenCount};
