//! Tiny traces with results worked out by hand, and real ones against an independent model.

mod waits;

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::*;
use crate::device::Spent;
use vattn_baselines::Usage;

/// A policy of pure arithmetic: units of so many tokens, and a log of what it was asked.
#[derive(Debug)]
struct Ideal {
    unit: u64,
    unit_bytes: u64,
    units: u64,
    slots: usize,
    requests: Vec<Option<u64>>,
    active: usize,
    used: u64,
    tokens: u64,
    log: Option<Vec<String>>,
}

impl Ideal {
    fn new(unit: u64, unit_bytes: u64, units: u64) -> Self {
        Self {
            unit,
            unit_bytes,
            units,
            slots: 1024,
            requests: Vec::new(),
            active: 0,
            used: 0,
            tokens: 0,
            log: None,
        }
    }

    /// A unit for each token.
    fn logged(units: u64, slots: usize) -> Self {
        Self { slots, log: Some(Vec::new()), ..Self::new(1, 1, units) }
    }

    fn log(&mut self, line: impl FnOnce() -> String) {
        if let Some(log) = &mut self.log {
            log.push(line());
        }
    }
}

impl Policy for Ideal {
    fn name(&self) -> &'static str {
        "ideal"
    }
    fn can_ever_hold(&self, tokens: TokenCount) -> bool {
        tokens.get().div_ceil(self.unit) <= self.units
    }
    fn admit(&mut self, request: RequestId, prompt: TokenCount) -> Result<bool> {
        let need = prompt.get().div_ceil(self.unit);
        if self.used + need > self.units || self.active == self.slots {
            return Ok(false);
        }
        self.log(|| format!("admit {request} {prompt}"));
        if self.requests.len() <= request.index() {
            self.requests.resize(request.index() + 1, None);
        }
        assert!(self.requests[request.index()].replace(prompt.get()).is_none());
        self.used += need;
        self.active += 1;
        self.tokens += prompt.get();
        Ok(true)
    }
    fn step(&mut self, totals: &[(RequestId, TokenCount)]) -> Result<bool> {
        let mut need = self.used;
        for (request, total) in totals {
            let had = self.requests[request.index()].unwrap();
            assert_eq!(total.get(), had + 1);
            need += total.get().div_ceil(self.unit) - had.div_ceil(self.unit);
        }
        let fits = need <= self.units;
        self.log(|| {
            let totals: BTreeMap<u32, u64> =
                totals.iter().map(|(request, total)| (request.get(), total.get())).collect();
            format!("step {totals:?}{}", if fits { "" } else { " does not fit" })
        });
        if fits {
            for (request, total) in totals {
                self.requests[request.index()] = Some(total.get());
            }
            self.tokens += wide(totals.len());
            self.used = need;
        }
        Ok(fits)
    }
    fn retire(&mut self, request: RequestId) -> Result<()> {
        self.log(|| format!("retire {request}"));
        let tokens = self.requests[request.index()].take().unwrap();
        self.tokens -= tokens;
        self.used -= tokens.div_ceil(self.unit);
        self.active -= 1;
        Ok(())
    }
    fn usage(&self) -> Usage {
        Usage {
            needed: Bytes::new(self.tokens * self.unit_bytes / self.unit),
            mapped: Bytes::new(self.used * self.unit_bytes),
            parked: None,
            held: Bytes::new(self.units * self.unit_bytes),
        }
    }
    fn adopted(&self) -> u64 {
        0
    }
    fn reclaimed(&self) -> u64 {
        0
    }
}

const MS: u64 = 1_000_000;
const SETTINGS: Settings = Settings { step: 25 * MS, prefill_tokens: 10, max_tokens: 100 };

/// The clock of a policy that has no driver.
fn nobody() -> Spent {
    Spent::default()
}

fn request(arrival_ms: u64, prompt: u64, output: u64) -> Request {
    Request { arrival: arrival_ms * MS, prompt, output }
}

fn run(mut policy: Ideal, requests: &[Request]) -> (Outcome, Vec<String>) {
    let outcome = serve(&mut policy, requests, SETTINGS, &nobody, &mut |_| {}, None).unwrap();
    assert_eq!((policy.active, policy.used, policy.tokens), (0, 0, 0));
    (outcome, policy.log.unwrap())
}

#[test]
fn a_prompt_is_mapped_at_once_and_its_first_token_comes_after_its_prefill() {
    // 11 tokens are two iterations of prefill, then two tokens: four iterations.
    let (outcome, log) = run(Ideal::logged(100, 9), &[request(0, 11, 2)]);
    assert_eq!(log, ["admit 0 11", "step {0: 12}", "step {0: 13}", "retire 0"]);
    assert_eq!((outcome.iterations, outcome.simulated), (4, 100 * MS));
    assert_eq!((outcome.completed, outcome.peak_needed), (1, Bytes::new(13)));
    assert_eq!(outcome.step_ns.len(), 2);
    assert!((outcome.mean_active - 1.0).abs() < 1e-12);
    // 100 held over 11, 11, 12 and 13 needed.
    assert!((outcome.held_over_needed - 400.0 / 47.0).abs() < 1e-12);
}

#[test]
fn prefills_take_turns_in_order_of_admission() {
    let (_, log) = run(Ideal::logged(100, 9), &[request(0, 20, 1), request(0, 5, 3)]);
    // Prefill of 0 in iterations 1 and 2, of 1 in iteration 3, in which 0 gains its token.
    assert_eq!(
        log,
        [
            "admit 0 20",
            "admit 1 5",
            "step {0: 21}",
            "retire 0",
            "step {1: 6}",
            "step {1: 7}",
            "step {1: 8}",
            "retire 1"
        ]
    );
}

#[test]
fn the_queue_waits_for_a_slot_and_keeps_its_order() {
    // The second does not fit beside the first; the third would, and still waits its turn.
    let requests = [request(0, 6, 1), request(0, 5, 1), request(0, 1, 1)];
    let (outcome, log) = run(Ideal::logged(10, 9), &requests);
    assert_eq!(
        log,
        [
            "admit 0 6",
            "step {0: 7}",
            "retire 0",
            "admit 1 5",
            "admit 2 1",
            "step {1: 6}",
            "retire 1",
            "step {2: 2}",
            "retire 2"
        ]
    );
    assert_eq!(outcome.peak_active, 2);
    // The same with room for all, but one slot.
    let (_, log) = run(Ideal::logged(100, 1), &requests[..2]);
    assert_eq!(log, ["admit 0 6", "step {0: 7}", "retire 0", "admit 1 5", "step {1: 6}", "retire 1"]);
}

#[test]
fn the_latest_admitted_is_preempted_and_comes_back_first_with_its_tokens_as_prompt() {
    // Prefill 0, then 1; then both grow from 5 and 4 until 10 units are used up.
    let requests = [request(0, 4, 4), request(0, 4, 2), request(1, 1, 1)];
    let (outcome, log) = run(Ideal::logged(10, 9), &requests);
    assert_eq!(
        log,
        [
            "admit 0 4",
            "admit 1 4",
            // The third arrives during the first iteration and takes a unit.
            "admit 2 1",
            "step {0: 5}",
            "step {0: 6, 1: 5} does not fit",
            // The third, whose prefill has just ended, is the latest: it goes, and it is not enough.
            "retire 2",
            "step {0: 6, 1: 5} does not fit",
            "retire 1",
            "step {0: 6}",
            // At the head again: the one preempted last, with its 4 tokens, which just fit.
            "admit 1 4",
            "step {0: 7} does not fit",
            "retire 1",
            "step {0: 7}",
            "step {0: 8}",
            "retire 0",
            "admit 1 4",
            "admit 2 1",
            "step {1: 5}",
            "step {1: 6, 2: 2}",
            "retire 1",
            "retire 2"
        ]
    );
    assert_eq!((outcome.preempted, outcome.completed), (3, 3));
}

#[test]
fn what_was_generated_counts_after_a_preemption() {
    // Both decode when memory runs out: the second has 1 of its 2 tokens.
    let (outcome, log) = run(Ideal::logged(7, 9), &[request(0, 2, 4), request(0, 2, 2)]);
    assert_eq!(
        log,
        [
            "admit 0 2",
            "admit 1 2",
            "step {0: 3}",
            "step {0: 4, 1: 3}",
            "step {0: 5, 1: 4} does not fit",
            "retire 1",
            "step {0: 5}",
            "step {0: 6} does not fit"
        ]
        .iter()
        .take(7)
        .copied()
        .chain(["step {0: 6}", "retire 0", "admit 1 3", "step {1: 4}", "retire 1"])
        .collect::<Vec<_>>()
    );
    assert_eq!(outcome.preempted, 1);
}

#[test]
fn time_jumps_when_nobody_is_there() {
    let (outcome, _) = run(Ideal::logged(100, 9), &[request(0, 1, 1), request(1_001, 1, 1)]);
    // Two iterations, a jump from 50 to 1,001 ms, two iterations.
    assert_eq!((outcome.iterations, outcome.simulated), (4, 1_051 * MS));
    assert!((outcome.mean_active - 100.0 / 1051.0).abs() < 1e-12);
    assert!((outcome.mapped_over_needed - 1.0).abs() < 1e-12);
}

#[test]
fn who_watches_hears_of_every_iteration_and_of_the_moment_before_a_jump() {
    let requests = [request(0, 11, 1), request(0, 1, 0), request(1_001, 1, 1)];
    let mut samples = Vec::new();
    let mut watch = |sample: &Sample| samples.push(*sample);
    let mut policy = Ideal { slots: 1, ..Ideal::new(1, 1, 12) };
    let outcome = serve(&mut policy, &requests, SETTINGS, &nobody, &mut |_| {}, Some(&mut watch)).unwrap();
    let seen: Vec<_> = samples
        .iter()
        .map(|sample| {
            let pace = match sample.pace {
                Pace::Idle => "idle",
                Pace::Prefill => "prefill",
                Pace::Step(_) => "step",
            };
            (sample.at / MS, pace, sample.usage.needed.get(), sample.active, sample.waiting)
        })
        .collect();
    assert_eq!(
        seen,
        [
            (0, "prefill", 11, 1, 1),
            (25, "prefill", 11, 1, 1),
            (50, "step", 12, 1, 1),
            (75, "prefill", 1, 1, 0),
            (100, "idle", 0, 0, 0),
            (1_001, "prefill", 1, 1, 0),
            (1_026, "step", 2, 1, 0),
            (1_051, "idle", 0, 0, 0)
        ]
    );
    let mut policy = Ideal { slots: 1, ..Ideal::new(1, 1, 12) };
    let unwatched = serve(&mut policy, &requests, SETTINGS, &nobody, &mut |_| {}, None).unwrap();
    assert_eq!(outcome, Outcome { step_ns: outcome.step_ns.clone(), ..unwatched });
}

#[test]
fn a_clock_that_ends_is_an_error() {
    let settings = Settings { step: u64::MAX / 3, ..SETTINGS };
    let error = serve(&mut Ideal::logged(100, 9), &[request(0, 1, 9)], settings, &nobody, &mut |_| {}, None)
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    assert!(
        error.report().starts_with("4 iterations of ") && error.report().contains("--step-ms"),
        "{error}"
    );
}

#[test]
fn what_can_never_be_held_is_rejected() {
    let requests = [request(0, 99, 2), request(0, 10, 1), request(0, 5, 5), request(500, 11, 0)];
    let (outcome, log) = run(Ideal::logged(10, 9), &requests);
    assert_eq!(log.first().unwrap(), "admit 2 5");
    assert_eq!((outcome.rejected, outcome.completed), (3, 1));
    assert_eq!(outcome.simulated, 500 * MS, "the clock has seen the last arrival");
}

#[test]
fn a_request_without_output_ends_with_its_prefill() {
    let (outcome, log) = run(Ideal::logged(10, 9), &[request(0, 3, 0), request(0, 3, 1)]);
    assert_eq!(log, ["admit 0 3", "admit 1 3", "retire 0", "step {1: 4}", "retire 1"]);
    assert_eq!(outcome.iterations, 3);
}

#[test]
fn a_policy_that_breaks_its_word_ends_the_run() {
    #[derive(Debug)]
    struct Liar(Ideal);
    impl Policy for Liar {
        fn name(&self) -> &'static str {
            "liar"
        }
        fn can_ever_hold(&self, _: TokenCount) -> bool {
            true
        }
        fn admit(&mut self, request: RequestId, prompt: TokenCount) -> Result<bool> {
            self.0.admit(request, prompt)
        }
        fn step(&mut self, totals: &[(RequestId, TokenCount)]) -> Result<bool> {
            self.0.step(totals)
        }
        fn retire(&mut self, request: RequestId) -> Result<()> {
            self.0.retire(request)
        }
        fn usage(&self) -> Usage {
            self.0.usage()
        }
        fn adopted(&self) -> u64 {
            0
        }
        fn reclaimed(&self) -> u64 {
            0
        }
    }
    for requests in [[request(0, 11, 1)], [request(0, 10, 1)]] {
        let error = serve(&mut Liar(Ideal::logged(10, 9)), &requests, SETTINGS, &nobody, &mut |_| {}, None)
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Internal);
        assert!(error.report().contains("liar"), "{error}");
    }
}

fn azure() -> Option<Vec<Request>> {
    let directory = std::env::var_os("VATTN_TRACES").map_or_else(
        || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/traces")),
        PathBuf::from,
    );
    let path = directory.join("azure_llm_2023_conv.csv");
    if !path.exists() {
        eprintln!("SKIP: {} is not there; set VATTN_TRACES", path.display());
        return None;
    }
    Some(crate::trace::read(&path).unwrap().requests)
}

const KIB: u64 = 1 << 10;
const REAL: Settings = Settings { step: 25 * MS, prefill_tokens: 8192, max_tokens: 131_072 };

/// Tokens of a unit and its bytes: blocks of 16 tokens; a granule in each of two tensors; a granule
/// in each of 64.
const UNITS: [(u64, u64); 3] = [(16, 16 * 128 * KIB), (32, 2 * 2048 * KIB), (1024, 64 * 2048 * KIB)];

#[test]
fn six_thousand_real_requests_in_3_gib_take_as_long_as_an_independent_model_says() {
    let Some(requests) = azure() else { return };
    for ((unit, bytes), seconds) in UNITS.into_iter().zip([2065.0, 2078.0, 3152.0]) {
        let mut policy = Ideal::new(unit, bytes, (3 << 30) / bytes);
        let outcome = serve(&mut policy, &requests[..6000], REAL, &nobody, &mut |_| {}, None).unwrap();
        let simulated = float(outcome.simulated) / 1e9;
        eprintln!(
            "units of {unit} tokens: {simulated} s, {} iterations, {} preempted",
            outcome.iterations, outcome.preempted
        );
        assert!((simulated / seconds - 1.0).abs() < 0.001, "{simulated} for {seconds}");
        assert_eq!((outcome.completed, outcome.rejected), (6000, 0));
    }
}

#[test]
fn an_hour_of_real_requests_wastes_what_an_independent_model_says() {
    let Some(requests) = azure() else { return };
    for ((unit, bytes), waste) in UNITS.into_iter().zip([1.006, 1.0125, 1.57]) {
        let mut policy = Ideal::new(unit, bytes, (64 << 30) / bytes);
        let outcome = serve(&mut policy, &requests, REAL, &nobody, &mut |_| {}, None).unwrap();
        eprintln!(
            "units of {unit} tokens: {}, {} iterations, mean {} active",
            outcome.mapped_over_needed, outcome.iterations, outcome.mean_active
        );
        assert!((outcome.mapped_over_needed / waste - 1.0).abs() < 0.002, "{}", outcome.mapped_over_needed);
        assert_eq!(outcome.completed, 19_366);
    }
}
