//! A KV cache for LLM servers: contiguous in virtual memory, backed by physical memory on demand.

pub mod driver;
pub mod error;
pub mod geometry;
pub mod layout;
pub mod stats;
pub(crate) mod sync;
pub mod units;

pub use error::{Error, ErrorKind, Result};
