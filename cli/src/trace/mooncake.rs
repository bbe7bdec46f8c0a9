//! Mooncake's traces (FAST 2025): one JSON object a line. Which prompts share a prefix
//! (`hash_ids`) is not used.

use serde::Deserialize;

use crate::num::{float, whole};
use crate::trace::{MOST_TOKENS, Problem, Request, Wrong, lines};

/// What a line must have, for messages.
pub(crate) const FIELDS: &str = "timestamp, input_length, output_length";

/// What nanoseconds can say; how far apart times may be is another, lower limit.
const MOST_MILLISECONDS: u64 = u64::MAX / 1_000_000;

#[derive(Deserialize)]
struct Line {
    timestamp: serde_json::Number,
    input_length: u64,
    output_length: u64,
}

pub(crate) fn parse(bytes: &[u8]) -> Result<Vec<(u64, Request)>, Problem> {
    let mut requests = Vec::new();
    for (line, text) in lines(bytes) {
        requests.push((line, request(&text).map_err(|wrong| Problem::Line(line, wrong))?));
    }
    Ok(requests)
}

fn request(text: &str) -> Result<Request, Wrong> {
    let expected = format!("a JSON object with whole {FIELDS}");
    let line: Line = serde_json::from_str(text).map_err(|error| Wrong::new(expected, error.to_string()))?;
    let milliseconds = &line.timestamp;
    let arrival = match (milliseconds.as_u64(), milliseconds.as_f64()) {
        (Some(whole), _) => whole.checked_mul(1_000_000),
        (None, Some(part)) if (0.0..=float(MOST_MILLISECONDS)).contains(&part) => Some(whole(part * 1e6)),
        _ => None,
    };
    let arrival = arrival.ok_or_else(|| {
        let expected = format!("timestamp to be milliseconds from 0 to {MOST_MILLISECONDS}");
        Wrong::new(expected, milliseconds.to_string())
    })?;
    if !(1..=MOST_TOKENS).contains(&line.input_length) || line.output_length > MOST_TOKENS {
        return Err(Wrong::new(
            format!("input_length from 1 and output_length from 0 to {MOST_TOKENS}"),
            format!("{} and {}", line.input_length, line.output_length),
        ));
    }
    Ok(Request { arrival, prompt: line.input_length, output: line.output_length })
}
