//! The trace that is made up where none is given.
//!
//! A chat service with documents: prompts of a few thousand tokens, some of tens of thousands, and
//! answers of a few hundred. At 7 requests a second a request stays about 10 simulated seconds, so
//! some 70 are there at once with about 8,000 tokens each, which is what 64 GiB hold of Llama-3-8B
//! (524,288 tokens): sometimes there is room and sometimes requests wait.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Exp, LogNormal};

use crate::num::{whole, wide};
use crate::report::count;
use crate::trace::{Request, Trace};

/// How many requests are made.
const REQUESTS: usize = 2_000;
/// Arrivals a second.
const RATE: f64 = 7.0;
/// Median, sigma, least and most.
const PROMPT: (f64, f64, u64, u64) = (4_096.0, 1.1, 16, 65_536);
const OUTPUT: (f64, f64, u64, u64) = (256.0, 0.9, 1, 4_096);

const DISTRIBUTIONS: &str = "Poisson arrivals at 7 a second; prompts log-normal, median 4,096 tokens, \
    sigma 1.1, from 16 to 65,536; outputs log-normal, median 256 tokens, sigma 0.9, from 1 to 4,096";

/// How many requests there are and how they are distributed, for people. Says so where only the first
/// few of them are `served`.
pub(crate) fn description(served: Option<usize>) -> String {
    let part = match served {
        Some(1) => ", of which the first is served".into(),
        Some(few) if few < REQUESTS => format!(", of which the first {} are served", count(wide(few))),
        _ => String::new(),
    };
    format!("{} requests{part}; {DISTRIBUTIONS}", count(wide(REQUESTS)))
}

/// The same requests for the same seed.
pub(crate) fn generate(seed: u64) -> Trace {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let gaps = Exp::new(RATE).expect("the rate is positive");
    let lengths = |(median, sigma, _, _): (f64, f64, u64, u64)| {
        LogNormal::new(median.ln(), sigma).expect("the sigma is finite")
    };
    let (prompts, outputs) = (lengths(PROMPT), lengths(OUTPUT));
    let mut seconds = 0.0;
    let requests = (0..REQUESTS)
        .map(|_| {
            seconds += gaps.sample(&mut random);
            Request {
                arrival: whole(seconds * 1e9),
                prompt: whole(prompts.sample(&mut random)).clamp(PROMPT.2, PROMPT.3),
                output: whole(outputs.sample(&mut random)).clamp(OUTPUT.2, OUTPUT.3),
            }
        })
        .collect();
    Trace::new(format!("generated, seed {seed}"), requests)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_description_says_how_many_are_served() {
        let starts = |served, start| assert!(description(served).starts_with(start), "{served:?}: {start}");
        starts(None, "2,000 requests; Poisson");
        starts(Some(REQUESTS), "2,000 requests; Poisson");
        starts(Some(1_999), "2,000 requests, of which the first 1,999 are served; Poisson");
        starts(Some(1), "2,000 requests, of which the first is served; Poisson");
    }

    #[test]
    fn a_seed_makes_one_trace_with_the_stated_medians() {
        let trace = generate(1);
        assert_eq!(trace, generate(1));
        assert_ne!(trace, generate(2));
        assert_eq!(trace.requests.len(), REQUESTS);
        let median = |length: fn(&Request) -> u64| {
            let mut lengths: Vec<u64> = trace.requests.iter().map(length).collect();
            lengths.sort_unstable();
            lengths[REQUESTS / 2]
        };
        assert!((3_800..4_400).contains(&median(|request| request.prompt)));
        assert!((235..280).contains(&median(|request| request.output)));
        let end = trace.requests[REQUESTS - 1].arrival / 1_000_000_000;
        assert!((260..310).contains(&end), "2,000 at 7 a second take about 286 s: {end}");
    }
}
