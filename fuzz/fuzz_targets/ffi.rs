//! Calls of the C ABI that a fuzzer makes up, led by what they reach in the code. The calls and what has to
//! be true of them are those of `tests/ffi_fuzz.rs`.
//!
//! ```sh
//! cargo install cargo-fuzz --version 0.13.2 --locked
//! RUSTC_BOOTSTRAP=1 cargo fuzz run ffi -- -max_len=4096
//! ```

#![no_main]

#[path = "../../tests/fuzz/mod.rs"]
mod fuzz;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    // One thread alone: what was found can be played again.
    fuzz::play(&mut fuzz::Given(bytes), fuzz::Options { threads: false });
});
