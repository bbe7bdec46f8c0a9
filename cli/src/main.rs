//! `vattn`: plans a KV cache in virtual memory, replays LLM traffic on it, and probes the memory's driver.
//!
//! Owns the arguments' frame, errors on stderr and exit codes. Each subcommand is a module of its
//! own and returns what is printed.
//!
//! | room | question |
//! |---|---|
//! | [`replay`] | what is replayed, on what, and in which order |
//! | [`plan`] | what each layout costs, before anything is served |
//! | [`trace`] | which requests |
//! | [`server`] | what a server does with them, iteration by iteration |
//! | [`model`] | which tensors the model's cache has |
//! | [`policy`] | who manages their memory |
//! | [`mapper`] | what this project's cache does beside the path of requests |
//! | [`place`] | which device, by name or by what there is |
//! | [`device`] | which driver is called, and what it counted |
//! | [`meter`] | what of that requests wait for |
//! | [`series`] | what was seen over time |
//! | [`report`] | what is shown |
//! | [`html`] | what is shown as a page |
//! | [`probe`] | what a device's driver can do, and what its calls cost |

mod device;
mod html;
mod mapper;
mod meter;
mod model;
mod num;
mod place;
mod plan;
mod policy;
mod probe;
mod replay;
mod report;
mod series;
mod server;
mod size;
mod trace;

use std::fmt;
use std::io::{ErrorKind as IoKind, Write};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use vattn::ErrorKind;

const EXIT_CODES: &str = "Exit codes:
  0  it worked
  1  it failed on the way (memory, the driver, a defect)
  2  a wrong argument or bad input: the message names value, limit and cure;
     more addresses than there are, too, since slots and tokens ask for them
  3  it worked, and memory, mappings or addresses leaked";

/// A KV cache for LLM servers: contiguous in virtual memory, physical memory on demand.
#[derive(Debug, Parser)]
#[command(name = "vattn", version, after_help = EXIT_CODES, after_long_help = EXIT_CODES)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve a trace of requests from a KV cache and report what its memory did
    #[command(long_about = replay::long_about(), after_help = EXIT_CODES, after_long_help = EXIT_CODES)]
    Replay(replay::Args),
    /// Find out what the device's driver can do and what its calls cost
    #[command(long_about = probe::LONG_ABOUT, after_help = EXIT_CODES, after_long_help = EXIT_CODES)]
    Probe(probe::Args),
    /// Answer one question of a probe, in a process of its own
    #[command(hide = true)]
    ProbeChild(probe::ChildArgs),
    /// Tell what each layout costs on a chip: waste, mappings and their time, what fits
    #[command(long_about = plan::long_about(), after_help = EXIT_CODES, after_long_help = EXIT_CODES)]
    Plan(plan::Args),
}

/// Why the program ends with something else than 0.
#[derive(Debug)]
pub(crate) enum Failure {
    /// What the user gave can't be used.
    Input(String),
    /// It went wrong on the way.
    Run(vattn::Error),
    /// A process that was to do a part of the work could not be started.
    Child(String),
    /// The output could not be written.
    Output(std::io::Error),
    /// Something was not given back; the report is printed all the same.
    Leaked(String),
}

impl From<vattn::Error> for Failure {
    fn from(error: vattn::Error) -> Self {
        match error.kind() {
            ErrorKind::InvalidGeometry
            | ErrorKind::InvalidConfig
            | ErrorKind::InvalidArgument
            // How many addresses are reserved follows from the arguments alone, before anything is served.
            | ErrorKind::OutOfAddressSpace => Self::Input(error.report()),
            _ => Self::Run(error),
        }
    }
}

impl From<trace::TraceError> for Failure {
    fn from(error: trace::TraceError) -> Self {
        Self::Input(error.to_string())
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Input(message) | Self::Child(message) | Self::Leaked(message) => f.write_str(message),
            Self::Run(error) => f.write_str(&error.report()),
            Self::Output(error) => write!(f, "writing the report: {error}"),
        }
    }
}

impl Failure {
    fn exit_code(&self) -> ExitCode {
        match self {
            Self::Run(_) | Self::Child(_) | Self::Output(_) => ExitCode::from(1),
            Self::Input(_) => ExitCode::from(2),
            Self::Leaked(_) => ExitCode::from(3),
        }
    }
}

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "warn".into()),
        )
        .with_writer(std::io::stderr)
        .init();
    let mut out = std::io::stdout().lock();
    let result = match Args::parse().command {
        Command::Replay(args) => replay::run(&args, &mut out),
        Command::Probe(args) => probe::run(&args, &mut out),
        Command::ProbeChild(args) => probe::answer(&args, &mut out),
        Command::Plan(args) => plan::run(&args, &mut out),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever reads the output has seen enough of it.
        Err(Failure::Output(error)) if error.kind() == IoKind::BrokenPipe => ExitCode::SUCCESS,
        Err(failure) => {
            // Nobody is left to tell where stderr is closed.
            let _ = writeln!(std::io::stderr(), "error: {failure}");
            failure.exit_code()
        }
    }
}
