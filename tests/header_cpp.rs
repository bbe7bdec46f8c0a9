//! Does `include/vattn.hpp` wrap all of `include/vattn.h`, and say what all of it does?
//!
//! What it does is tested in C++: `tests/cpp/run.sh`.

#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

fn text(name: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("include").join(name)).unwrap()
}

/// What is C's alone, and why.
const NOT_WRAPPED: [(&str, &str); 9] = [
    ("vattn_fence_idle", "Fence::idle makes the struct itself: inline functions must not call static ones"),
    ("vattn_fence_stream", "likewise"),
    ("vattn_fence_event", "likewise"),
    ("VATTN_H", "the guard"),
    ("__cplusplus", "the compiler's"),
    ("vattn_status_name_of", "no such function"),
    ("vattn_verb", "an enum: its values are named"),
    ("vattn_part", "likewise"),
    ("vattn_dtype", "likewise"),
];

fn words(text: &str) -> BTreeSet<&str> {
    text.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|word| !word.is_empty()).collect()
}
