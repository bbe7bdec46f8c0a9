//! The C ABI: what `include/vattn.h` declares. Rust programs have no use for it.
//!
//! Owns the translation between C and the Rust API, and nothing else: no logic, no defaults of its own.
//! Refuses to let bad input further than a status and a text. The header is made from this room by
//! cbindgen (`cbindgen.toml` holds its first chapters), and `tests/header.rs` compares the two.
//!
//! ```text
//!   C ──► extern "C" fn ──► entry (fork, panic, last error) ──► handles (is it alive?) ──► args ──► crate
//! ```
//!
//! | file | what it answers |
//! |---|---|
//! | `entry.rs` | what every function passes: a panic stops here, a failure becomes a status |
//! | `handle.rs` | which objects there are, and whether a handle is one of them |
//! | `fork.rs` | what a child of `fork` finds |
//! | `args.rs` | how pointers, arrays, strings, numbers and sized structs are read and written |
//! | `status.rs` | which statuses there are; the last error |
//! | `library.rs` | versions, what this machine offers, strings |
//! | `log.rs` | who is told what the library logs |
//! | `geometry.rs`, `driver.rs`, `config.rs`, `cache.rs`, `pin.rs`, `buffer.rs` | one object of C each |
//! | `dlpack.rs` | arrays over pinned memory, as other libraries take them |
//! | `python.rs` | Python's capsules of them, and whether a thread has its lock |
//! | `layout.rs`, `stats.rs` | structs that are filled for C |
//! | `testing.rs` | drivers that fail on demand, fences that are fired by hand |
//!
//! A handle is a number and not an address: it names a place in a table and that place's generation, so
//! one that was destroyed, is of another kind or was never given is refused, and nothing is ever read
//! through it. A call holds its objects for reading, so destroying one waits for the calls under way.

#![expect(unsafe_code, reason = "C's pointers have to be read and written")]
#![expect(non_camel_case_types, reason = "the names are those of C")]

mod args;
mod buffer;
mod cache;
mod config;
mod dlpack;
mod driver;
mod entry;
mod fork;
mod geometry;
mod handle;
mod layout;
mod library;
mod log;
mod pin;
mod python;
mod stats;
mod status;
mod testing;
#[cfg(test)]
mod tests;

pub use buffer::*;
pub use cache::*;
pub use config::*;
pub use driver::*;
pub use geometry::*;
pub use layout::*;
pub use library::*;
pub use log::*;
pub use pin::*;
pub use stats::*;
pub use status::*;
pub use testing::*;
