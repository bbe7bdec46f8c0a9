//! What does a whole operation cost a server: a prompt, an adoption, a start, a card that is full?
//!
//! Asked because the goals of this library are set in such operations, beside the bare driver calls of
//! the same plan and beside vAttention, in one run. Each scenario is a module with its question at its
//! head, and prints tables; on a card a goal stands in its row, and whether it was met.
//!
//! ```text
//! cargo bench --bench scenarios                            all scenarios, on all devices that are there
//! cargo bench --bench scenarios -- prompts full            these alone
//! cargo bench --bench scenarios -- --json FILE             the tables as JSON, too
//! cargo bench --bench scenarios -- --runs 51 --strict      so many runs of each row, not as many as the
//!                                                          scenario has; exit code 1 if a goal is missed
//! cargo bench --bench scenarios -- --step-ms 20 lockstep   kernels of an iteration last so long, for
//!                                                          every policy and on every device
//! cargo bench --bench scenarios -- --only vattn lockstep   this row of each layout alone
//! ```
//!
//! `lockstep`, `sync-vs-async` and `churn` serve in real time, with kernels between the steps, and beside
//! them works the mapper. The others time calls for their own sake, on caches without one.
//!
//! `VATTN_BENCH_DEVICE=host|cuda|ledger` names one device, `VATTN_REQUIRE_GPU=1` makes a missing card a
//! failure, and `VATTN_TRACES` is the folder of the request traces (`../shared/traces`). A scenario stops
//! early when its time is up, and then says so. Without `--bench`, which `cargo bench` passes, everything
//! is run once and small, without a card: that shows that it works.

#![allow(clippy::unwrap_used, missing_docs, reason = "a bench may panic, and has no callers")]

mod adopt;
mod churn;
mod commit;
#[path = "../common/mod.rs"]
mod common;
mod full;
mod lockstep;
mod prompts;
mod recorder;
mod reserve;
mod resizes;
mod server;
mod serving;
mod steps;
mod sync_vs_async;
mod table;
mod timing;
mod trace;
mod traces;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use vattn::geometry::{KvOrder, LayoutChoice, LayoutKind};
use vattn::units::{Bytes, TokenCount};
use vattn::{Geometry, KvCache};

use common::devices::{Target, targets};
use common::pause;
use table::Table;
use timing::Limit;

/// What a scenario runs on, and how much of it.
struct Bench<'a> {
    target: &'a Target,
    /// How often each row is measured, where that is not left to the scenario.
    runs: Option<usize>,
    /// How long the kernels of an iteration last, where that is not left to the scenario.
    kernels: Option<Duration>,
    /// The policy whose rows are measured alone, in scenarios with several.
    only: Option<String>,
    /// Once, and small: it is only to be seen that it works.
    test: bool,
    limit: Limit,
}

impl Bench<'_> {
    /// What may be held, of `wanted`: a device that has less keeps a tenth for others.
    fn budget(&self, wanted: Bytes) -> Bytes {
        let free = self.target.driver.memory_info().unwrap().free;
        wanted.min(Bytes::new(free.get() / 10 * 9))
    }

    /// Whether a row that was measured `done` times is measured again: `own` times in all, if the command
    /// line says nothing else, and thrice at least if the time is up.
    fn again(&self, done: usize, own: usize) -> bool {
        done < self.runs.unwrap_or(own) && !(done >= 3 && self.limit.is_over())
    }

    /// How long the kernels of an iteration last: `own` on a card. Where there is none, calls that move
    /// memory take some twentieth of the time, too.
    fn iteration(&self, own: Duration) -> Duration {
        let elsewhere = Duration::from_micros(if self.test { 50 } else { 1_000 });
        self.kernels.unwrap_or(if self.target.is_card() { own } else { own.min(elsewhere) })
    }

    /// The policies to measure.
    fn managers(&self) -> impl Iterator<Item = serving::Manager> {
        let wanted =
            |manager: &serving::Manager| self.only.as_deref().is_none_or(|only| only == manager.name());
        serving::Manager::ALL.into_iter().filter(wanted)
    }

    /// Says in a table that [`settle`](Self::settle) was called.
    fn pauses_noted(&self, table: &mut Table) {
        if self.target.is_card() {
            table.note(pause::NOTE);
        }
    }

    /// Leaves a card alone for a while after so much was released; see [`pause`].
    fn settle(&self, released: Bytes) {
        if self.target.is_card() {
            pause::after_release(released);
        }
    }
}

struct Scenario {
    name: &'static str,
    seconds: u64,
    run: fn(&Bench<'_>) -> Vec<Table>,
}

const SCENARIOS: [Scenario; 10] = [
    Scenario { name: "prompts", seconds: 80, run: prompts::run },
    Scenario { name: "adopt", seconds: 5, run: adopt::run },
    Scenario { name: "reserve", seconds: 5, run: reserve::run },
    Scenario { name: "steps", seconds: 10, run: steps::run },
    Scenario { name: "commit", seconds: 35, run: commit::run },
    Scenario { name: "traces", seconds: 25, run: traces::run },
    Scenario { name: "full", seconds: 58, run: full::run },
    Scenario { name: "lockstep", seconds: 240, run: lockstep::run },
    Scenario { name: "sync-vs-async", seconds: 120, run: sync_vs_async::run },
    Scenario { name: "churn", seconds: 90, run: churn::run },
];

/// Layers and parts that share a tensor, by the names that tables use.
const LAYOUTS: [(&str, LayoutChoice); 3] = [
    ("one tensor", LayoutChoice { kind: LayoutKind::Sliced, order: KvOrder::Interleaved }),
    ("K and V", LayoutChoice { kind: LayoutKind::Sliced, order: KvOrder::Apart }),
    ("per layer", LayoutChoice { kind: LayoutKind::PerLayer, order: KvOrder::Apart }),
];

fn llama() -> Geometry {
    Geometry::preset("llama-3-8b").unwrap()
}

fn tokens(count: u64) -> TokenCount {
    TokenCount::new(count)
}

fn wide(count: usize) -> u64 {
    u64::try_from(count).unwrap()
}

/// Calls of a verb so far.
fn calls(cache: &KvCache, verb: vattn::error::Verb) -> u64 {
    cache.snapshot().driver[&verb].calls
}

struct Args {
    names: Vec<String>,
    json: Option<String>,
    runs: Option<usize>,
    kernels: Option<Duration>,
    only: Option<String>,
    strict: bool,
    test: bool,
}

fn arguments() -> Result<Args, String> {
    let mut args = Args {
        names: Vec::new(),
        json: None,
        runs: None,
        kernels: None,
        only: None,
        strict: false,
        test: true,
    };
    let mut given = std::env::args().skip(1);
    while let Some(argument) = given.next() {
        let mut value = |what: &str| given.next().ok_or(format!("{argument} needs {what} after it"));
        match argument.as_str() {
            "--bench" => args.test = false,
            "--test" => {}
            "--strict" => args.strict = true,
            "--only" => {
                let name = value("a policy")?;
                let known = serving::Manager::ALL.map(serving::Manager::name);
                if !known.contains(&name.as_str()) {
                    return Err(format!("--only {name} is no policy; use one of {}", known.join(", ")));
                }
                args.only = Some(name);
            }
            "--json" => args.json = Some(value("a file")?),
            "--runs" => {
                let runs = value("a number")?;
                let number = runs.parse().ok().filter(|runs| *runs > 0);
                args.runs = Some(number.ok_or(format!(
                    "--runs {runs} is no number of runs; use 1 or more, or leave it out for what each row needs"
                ))?);
            }
            "--step-ms" => {
                let step = value("a number")?;
                let number = step.parse().ok().filter(|step| (0.01..=1e6).contains(step));
                args.kernels = Some(number.map(|step: f64| Duration::from_secs_f64(step / 1e3)).ok_or(format!(
                    "--step-ms {step} is no time from 0.01 to 1,000,000 ms; leave it out for what each scenario has"
                ))?);
            }
            name if SCENARIOS.iter().any(|scenario| scenario.name == name) => args.names.push(name.into()),
            other => {
                let known: Vec<_> = SCENARIOS.iter().map(|scenario| scenario.name).collect();
                return Err(format!(
                    "\"{other}\" is no scenario; use some of {}, or none for all",
                    known.join(", ")
                ));
            }
        }
    }
    // `--test` is what criterion's benches understand, too.
    args.test |= std::env::args().any(|argument| argument == "--test");
    if args.test {
        args.runs = Some(1);
    }
    Ok(args)
}

fn main() -> ExitCode {
    let args = match arguments() {
        Ok(args) => args,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::from(2);
        }
    };
    if args.test {
        println!("a test, once and small; --bench measures");
    }
    let (mut tables, mut missed) = (Vec::new(), 0);
    for target in targets(args.test) {
        println!("\n## {}: {}", target.name, target.what);
        let chosen = SCENARIOS
            .iter()
            .filter(|scenario| args.names.is_empty() || args.names.iter().any(|name| name == scenario.name));
        for scenario in chosen {
            let limit = Limit::seconds(scenario.seconds);
            let Args { runs, kernels, test, .. } = args;
            let bench = Bench { target: &target, runs, kernels, only: args.only.clone(), test, limit };
            let done = (scenario.run)(&bench);
            println!("\n### {}\n", scenario.name);
            for table in done {
                println!("{table}");
                missed += table.missed();
                tables.push(table.to_json(target.name, scenario.name));
            }
            println!("{}: {:.1} s", scenario.name, bench.limit.elapsed().as_secs_f64());
        }
    }
    if let Some(file) = args.json {
        let text = serde_json::to_string_pretty(&tables).unwrap();
        if let Err(error) = std::fs::write(&file, text + "\n") {
            eprintln!("{file}: {error}");
            return ExitCode::FAILURE;
        }
    }
    match missed {
        0 => ExitCode::SUCCESS,
        _ => {
            println!("\n{missed} goals are missed");
            if args.strict { ExitCode::FAILURE } else { ExitCode::SUCCESS }
        }
    }
}
