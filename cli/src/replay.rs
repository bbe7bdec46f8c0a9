//! `vattn replay`: wires trace, model, driver, policy and server together.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressStyle};
use vattn::units::{Bytes, TokenCount};

use crate::Failure;
use crate::device::Bench;
use crate::html::{self, Head, PageFile, Run};
use crate::mapper::Mapper;
use crate::model::{self, Plan, Wanted};
use crate::num::{float, whole, wide};
use crate::place::{self, DeviceKind, Place};
use crate::policy::PolicyKind;
use crate::report::{self, Free, Report, Used, count};
use crate::series::Series;
use crate::server::{Sample, Settings, Watch, serve};
use crate::size;
use crate::trace::{self, Trace, description};

/// How the result is shown.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum Format {
    /// A table for people
    Text,
    /// One JSON object a policy, each on a line of its own
    Json,
}

const MODEL_OF_THE_SERVER: &str = "The server: an iteration lasts --step-ms. In it, arrivals up to now are \
    queued in order; the head of the queue is admitted while a slot is free and its whole prompt fits; the \
    earliest admitted request that is not done with its prefill advances it by one (a prefill takes \
    ceil(prompt / --prefill-tokens) iterations); every request that was past its prefill gains a token; one \
    that has all its tokens is retired. While the model runs, after the step, a policy does what it does \
    beside the path of requests (--background); what of that takes longer than an iteration, the next call \
    waits for. When growth does not fit, the latest admitted is preempted and queued \
    again at the head, its tokens so far being its prompt. With nobody there, time jumps to the next arrival. \
    A request whose final length exceeds --max-tokens, or needs more than the budget, is rejected.";

/// The long help's head: what is replayed, and the model of the server.
pub(crate) fn long_about() -> String {
    format!(
        "Serve a trace of requests from a KV cache and report what its memory did.\n\n\
         Without --trace, requests are generated: {}.\n\n{MODEL_OF_THE_SERVER}",
        description(None)
    )
}

/// The options of `vattn replay`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A trace of Azure, vAttention or Mooncake, told apart by content; generated if left out
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// The model: a preset's name or the path of a Hugging Face config.json
    #[arg(long, default_value = "llama-3-8b", value_name = "NAME|FILE")]
    model: String,
    /// Over how many devices the KV heads are split; the replay is one device's
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    tp: u32,
    /// Who manages the memory; several are compared. Without it vattn is compared with its
    /// baselines, but in JSON alone, which is vattn's then
    #[arg(long, value_enum, value_delimiter = ',', value_name = "NAME,...")]
    policy: Vec<PolicyKind>,
    /// How layers become tensors: sliced, per-layer or grouped:N, and -interleaved after it
    /// where K and V share a tensor
    #[arg(long, default_value = "sliced", value_name = "LAYOUT")]
    layout: String,
    /// How many requests can be active at once
    #[arg(long, default_value_t = 1024, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_slots: u32,
    /// How many tokens a request can have
    #[arg(long, default_value_t = 131_072, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    max_tokens: u64,
    /// How much physical memory may be held [default: 64GiB; on cuda 80 % of what is free]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    budget: Option<Bytes>,
    /// Tokens to which a step rounds up what it backs, for kernels that load whole tiles
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    tile_tokens: u32,
    /// Replay the first N requests only
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    limit: Option<u64>,
    /// What the generated trace grows from
    #[arg(long, default_value_t = 1, value_name = "N")]
    seed: u64,
    /// Where the memory is: cuda or cuda:N, an NVIDIA GPU; host, this machine's memory (Linux); or
    /// ledger, nowhere: calls are counted and nothing is mapped, so that any size works anywhere
    /// [default: cuda where there is a GPU, else host]
    #[arg(long, value_name = "DEVICE")]
    device: Option<DeviceKind>,
    /// The driver's unit of allocation, a power of two; a GPU has its own [default: 2MiB]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    granule: Option<Bytes>,
    /// How the result is shown
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
    /// Also draw the policies side by side on a page of its own, for a browser: memory, requests,
    /// latency and driver calls over time
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    #[command(flatten)]
    mapper: Mapper,
    /// How long an iteration of the server lasts, in milliseconds
    #[arg(long, default_value = "25", value_name = "MS", value_parser = step_length)]
    step_ms: u64,
    /// How many tokens of a prompt an iteration processes
    #[arg(long, default_value_t = 8192, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    prefill_tokens: u64,
}

/// Milliseconds, perhaps with a fraction, as nanoseconds.
fn step_length(text: &str) -> Result<u64, String> {
    match text.parse::<f64>() {
        Ok(ms) if (1e-6..=1e9).contains(&ms) => Ok(whole(ms * 1e6)),
        _ => Err(format!("'{text}' is not a time; write milliseconds from 0.000001 to 1000000000")),
    }
}

impl Args {
    fn policies(&self) -> Vec<PolicyKind> {
        let mut kinds = match (self.policy.is_empty(), self.format, &self.html) {
            (false, ..) => self.policy.clone(),
            (true, Format::Json, None) => vec![PolicyKind::Vattn],
            (true, ..) => PolicyKind::COMPARED.into(),
        };
        let mut seen = Vec::new();
        kinds.retain(|kind| {
            let new = !seen.contains(kind);
            seen.push(*kind);
            new
        });
        kinds
    }

    fn trace(&self) -> Result<Trace, Failure> {
        let mut trace = match &self.trace {
            Some(path) => trace::read(path)?,
            None => trace::generate(self.seed),
        };
        if let Some(limit) = self.limit {
            trace.limit(usize::try_from(limit).unwrap_or(usize::MAX));
        }
        Ok(trace)
    }
}

/// Replays and prints. JSON is printed policy by policy, as each is done.
pub(crate) fn run(args: &Args, out: &mut dyn Write) -> Result<(), Failure> {
    let trace = args.trace()?;
    let place = place::open(args.device)?.place;
    let (granule, budget) = (place.granule(args.granule)?, place.budget(args.budget)?);
    let plan = model::plan(&Wanted {
        model: &args.model,
        tensor_parallel: args.tp,
        layout: &args.layout,
        max_slots: args.max_slots,
        max_tokens: TokenCount::new(args.max_tokens),
        tile_tokens: args.tile_tokens,
        budget,
        granule,
        mapper: args.mapper,
    })?;
    let on = Setup { args, place, granule, plan, trace };
    let page = args.html.as_deref().map(open_page).transpose()?;
    let source = args.trace.is_none().then(|| description(Some(on.trace.requests.len())));
    let (mut reports, mut runs) = (Vec::new(), Vec::new());
    for kind in args.policies() {
        let (report, series) = on.replay(kind, page.is_some())?;
        if args.format == Format::Json {
            writeln!(out, "{}", report.to_json()).map_err(Failure::Output)?;
        }
        runs.extend(series.map(|series| Run { report: report.clone(), series }));
        reports.push(report);
    }
    if let Some(page) = page {
        page.finish(&html::page(&on.head(source.clone()), &runs)).map_err(Failure::Output)?;
    }
    if args.format == Format::Text {
        out.write_all(report::text(&reports, source.as_deref()).as_bytes()).map_err(Failure::Output)?;
    }
    out.flush().map_err(Failure::Output)?;
    let leaks: Vec<String> = reports.iter().filter_map(Report::leak).collect();
    if leaks.is_empty() { Ok(()) } else { Err(Failure::Leaked(leaks.join("; "))) }
}

fn open_page(path: &Path) -> Result<PageFile, Failure> {
    PageFile::open(path).map_err(|error| {
        Failure::Input(format!(
            "--html {}: {error}; name a file in a folder that is there and can be written",
            path.display()
        ))
    })
}

/// What every policy replays, and on what.
struct Setup<'a> {
    args: &'a Args,
    place: Place,
    granule: Bytes,
    plan: Plan,
    trace: Trace,
}

impl Setup<'_> {
    /// What the page says was replayed; no path is in it.
    fn head(&self, source: Option<String>) -> Head {
        let Self { args, place, granule, plan, trace } = self;
        let model = Path::new(&plan.model).file_name().unwrap_or(plan.model.as_ref()).to_string_lossy();
        let budget = plan.shape.budget();
        let mut facts = vec![
            ("budget", budget.to_string()),
            ("token", plan.shape.bytes_per_token().to_string()),
            ("layout", plan.config.layout().to_string()),
            ("device", place.to_string()),
            ("granule", granule.to_string()),
            ("slots", count(args.max_slots.into())),
            ("tokens a slot", count(args.max_tokens)),
            ("iteration", format!("{} ms", float(args.step_ms) / 1e6)),
            ("prefill", format!("{} tokens an iteration", count(args.prefill_tokens))),
        ];
        if args.tp > 1 {
            facts.push(("heads split over", format!("{} devices", args.tp)));
        }
        if args.tile_tokens > 1 {
            facts.push(("tile", format!("{} tokens", args.tile_tokens)));
        }
        if args.policies().contains(&PolicyKind::Vattn) {
            facts.push(("vattn's background", args.mapper.to_string()));
        }
        Head {
            trace: trace.name.clone(),
            requests: wide(trace.requests.len()),
            model: model.into_owned(),
            budget,
            facts,
            source,
            server: MODEL_OF_THE_SERVER,
        }
    }

    /// Replays under one policy, and keeps what it looked like over time where that is wanted.
    fn replay(&self, kind: PolicyKind, watched: bool) -> Result<(Report, Option<Series>), Failure> {
        let Self { args, place, granule, plan, trace } = self;
        let start = Instant::now();
        let budget = plan.shape.budget();
        let bench = Bench::open(place, *granule, budget)?;
        let before = bench.free()?;
        let mut policy = kind.build(&bench, plan)?;
        let bar = progress(policy.name(), wide(trace.requests.len()));
        let settings =
            Settings { step: args.step_ms, prefill_tokens: args.prefill_tokens, max_tokens: args.max_tokens };
        let mut series = watched.then(|| Series::new(args.step_ms, bench.spent()));
        let clock = || bench.spent();
        let mut record = series.as_mut().map(|series| |sample: &Sample| series.record(sample, bench.spent()));
        let watch = record.as_mut().map(|record| -> Watch<'_> { record });
        let mut progress = |done| bar.set_position(done);
        let served = serve(policy.as_mut(), &trace.requests, settings, &clock, &mut progress, watch);
        bar.finish_and_clear();
        let mut outcome = served?;
        let (name, adopted, reclaimed) = (policy.name(), policy.adopted(), policy.reclaimed());
        drop(policy);
        // Only now: what is given back at the end is part of what a policy asks of the driver, and what
        // is still alive has leaked.
        let books = bench.books();
        tracing::debug!(policy = name, seconds = start.elapsed().as_secs_f64(), "replayed");
        let used = Used {
            driver: bench.handle().info().name,
            device: place.to_string(),
            budget,
            free: Free { before, after: bench.free()? },
        };
        let report = Report::new(used, name, plan, trace, &mut outcome, &books, (adopted, reclaimed));
        Ok((report, series))
    }
}

/// A bar on a terminal, nothing elsewhere.
fn progress(policy: &'static str, requests: u64) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style =
        ProgressStyle::with_template("{msg:>16} [{bar:40}] {human_pos}/{human_len} requests, {eta} left")
            .expect("the template is a constant that a test parses")
            .progress_chars("=> ");
    ProgressBar::new(requests).with_style(style).with_message(policy)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_milliseconds() {
        assert_eq!(step_length("25"), Ok(25_000_000));
        assert_eq!(step_length("0.5"), Ok(500_000));
        for text in ["0", "-1", "x", "inf", "NaN"] {
            assert!(step_length(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_progress_template_is_one() {
        assert!(
            ProgressStyle::with_template("{msg:>16} [{bar:40}] {human_pos}/{human_len} requests, {eta} left")
                .is_ok()
        );
    }
}
