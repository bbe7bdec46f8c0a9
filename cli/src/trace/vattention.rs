//! The traces of vAttention's artifact (ASPLOS 2025): no times, so all requests are there at the
//! start.

use crate::trace::{Request, Wrong, tokens};

pub(crate) const COLUMNS: [&str; 2] = ["num_prefill_tokens", "num_decode_tokens"];

pub(crate) fn request([prefill, decode]: [&str; 2]) -> Result<Request, Wrong> {
    Ok(Request {
        arrival: 0,
        prompt: tokens(COLUMNS[0], prefill, 1)?,
        output: tokens(COLUMNS[1], decode, 0)?,
    })
}
