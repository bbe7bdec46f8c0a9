//! `vattn probe`: what a device's driver can do, and what its calls cost.
//!
//! Asks each question in a process of its own, the same program again, so that a driver that crashes,
//! hangs or runs out of something takes an answer with it and not the probe. While a child works,
//! this process holds nothing on the device, so that a device of one process at a time is probed too.
//!
//! ```text
//!   probe ──► the device's own description
//!     ├────► child: handles       which kinds of memory and of access there are
//!     ├────► child: addresses     how much can be reserved
//!     ├────► child: mappings      how many there can be
//!     └────► child: latencies     what each call costs, by size
//! ```
//!
//! | file | question |
//! |---|---|
//! | [`machine`] | which device, driver and system this is |
//! | [`child`] | how a child is asked, and what became of it |
//! | [`handles`], [`addresses`], [`mappings`], [`latencies`] | one question each, answered in the child |
//! | [`text`] | what people see |
//!
//! The names in the JSON are a contract; a field is never renamed, and its name ends in its unit. A
//! row of `latencies` has what a [`CostRow`](vattn::driver::checked::CostRow) has: the medians of six
//! sizes, with those of `reserve` and `memory_info`, are a
//! [`CostModel`](vattn::driver::checked::CostModel).

mod addresses;
mod child;
mod handles;
mod latencies;
mod machine;
mod mappings;
mod text;

use std::io::{IsTerminal, Write};
use std::sync::Arc;
use std::time::Duration;

use clap::ValueEnum;
use indicatif::ProgressBar;
use serde::Serialize;
use serde::de::DeserializeOwned;
use vattn::driver::owned::DriverHandle;
use vattn::stats::Counters;
use vattn::units::Bytes;

use crate::Failure;
use crate::place::{self, DeviceKind, Place};
use child::{Finding, Teller};
use machine::Machine;

pub(crate) const LONG_ABOUT: &str = "Find out what the device's driver can do and what its calls cost.\n\n\
    Each question is asked in a process of its own, so a driver that crashes or hangs is a finding and not the \
    end of the probe. It takes about half a minute, and a few seconds with --quick. Nothing of anybody else's is \
    touched; the addresses and mappings that are tried are the probe's own, and gone with it. Latencies are of \
    an idle device, so let nothing else run on it.";

/// What may be created at once where the device itself sets no limit.
const CAPACITY: Bytes = Bytes::gib(1);

/// The options of `vattn probe`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// What is probed: cuda or cuda:N, an NVIDIA GPU; or host, this machine's memory (Linux)
    /// [default: cuda where there is a GPU, else host]
    #[arg(long, value_name = "DEVICE", value_parser = mapped)]
    device: Option<DeviceKind>,
    /// One JSON object instead of tables
    #[arg(long)]
    json: bool,
    /// Fewer calls and shorter limits: a few seconds in all
    #[arg(long)]
    quick: bool,
}

/// The options of a child.
#[derive(Debug, clap::Args)]
pub(crate) struct ChildArgs {
    #[arg(long, value_parser = mapped)]
    device: DeviceKind,
    #[arg(long, value_enum)]
    question: Question,
    #[arg(long)]
    quick: bool,
}

/// What a child is asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Question {
    Handles,
    Addresses,
    Mappings,
    Latencies,
}

/// A device that really maps memory.
fn mapped(text: &str) -> Result<DeviceKind, String> {
    match text.parse()? {
        DeviceKind::Ledger => {
            Err("the ledger maps nothing, so there is nothing to probe; write host, cuda or cuda:N".into())
        }
        kind => Ok(kind),
    }
}

impl Question {
    fn name(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }

    /// How long the child looks for an answer of which more is better.
    fn time(self, quick: bool) -> Duration {
        let seconds = match (self, quick) {
            (Self::Handles | Self::Addresses, _) => 5,
            (Self::Mappings, false) => 20,
            (Self::Latencies, false) => 10,
            (Self::Mappings | Self::Latencies, true) => 2,
        };
        Duration::from_secs(seconds)
    }

    /// How long the parent waits for the child's end: setting a device up and leaving it take time too.
    fn limit(self, quick: bool) -> Duration {
        self.time(quick) + Duration::from_secs(40)
    }
}

/// All that was found.
#[derive(Debug, Serialize)]
struct Probe {
    vattn: &'static str,
    quick: bool,
    machine: Machine,
    /// Why it is not a GPU that was probed, where one was looked for.
    no_gpu: Option<String>,
    handles: Finding<Vec<handles::Trial>>,
    addresses: Finding<addresses::Addresses>,
    mappings: Finding<mappings::Mappings>,
    latencies: Finding<latencies::Latencies>,
}

/// Probes and prints.
pub(crate) fn run(args: &Args, out: &mut dyn Write) -> Result<(), Failure> {
    let opened = place::open(args.device)?;
    let machine = Machine::of(&opened.place)?;
    let asker = Asker { device: opened.place.kind().to_string(), quick: args.quick };
    // Its context goes before the children come.
    drop(opened.place);
    let probe = Probe {
        vattn: env!("CARGO_PKG_VERSION"),
        quick: args.quick,
        machine,
        no_gpu: opened.no_gpu,
        handles: asker.ask(Question::Handles)?,
        addresses: asker.ask(Question::Addresses)?,
        mappings: asker.ask(Question::Mappings)?,
        latencies: asker.ask(Question::Latencies)?,
    };
    let shown = if args.json {
        serde_json::to_string(&probe).expect("plain data with string keys is always JSON") + "\n"
    } else {
        text::show(&probe)
    };
    out.write_all(shown.as_bytes()).and_then(|()| out.flush()).map_err(Failure::Output)
}

struct Asker {
    device: String,
    quick: bool,
}

impl Asker {
    fn ask<T: DeserializeOwned>(&self, question: Question) -> Result<Finding<T>, Failure> {
        let bar =
            if std::io::stderr().is_terminal() { ProgressBar::new_spinner() } else { ProgressBar::hidden() };
        bar.set_message(format!("probing {}: {}", self.device, question.name()));
        bar.enable_steady_tick(Duration::from_millis(100));
        let program = std::env::current_exe().map_err(|error| {
            Failure::Child(format!("this program can't find itself to start a child: {error}"))
        })?;
        let mut command = std::process::Command::new(program);
        command.args(["probe-child", "--device", &self.device, "--question", &question.name()]);
        if self.quick {
            command.arg("--quick");
        }
        let finding = child::ask(&mut command, question.limit(self.quick));
        bar.finish_and_clear();
        finding.map_err(|error| Failure::Child(format!("a child could not be started: {error}")))
    }
}

/// Answers one question, in the child.
pub(crate) fn answer(args: &ChildArgs, out: &mut dyn Write) -> Result<(), Failure> {
    let mut teller = Teller::new(out);
    let time = args.question.time(args.quick);
    let answered =
        Subject::open(args.device).map_err(Failure::from).and_then(|subject| match args.question {
            Question::Handles => handles::answer(&subject, &mut teller),
            Question::Addresses => addresses::answer(&subject, time, &mut teller),
            Question::Mappings => mappings::answer(&subject, time, &mut teller),
            Question::Latencies => latencies::answer(&subject, time, args.quick, &mut teller),
        });
    match answered {
        Err(Failure::Output(error)) => Err(Failure::Output(error)),
        Err(failure) => teller.refused(&failure.to_string()),
        Ok(()) => Ok(()),
    }
}

/// What a child works on.
#[derive(Debug)]
struct Subject {
    place: Place,
    driver: DriverHandle,
    counters: Arc<Counters>,
}

impl Subject {
    fn open(kind: DeviceKind) -> vattn::Result<Self> {
        let place = place::open(Some(kind))?.place;
        let counters = Arc::new(Counters::default());
        let driver = DriverHandle::new(place.driver(place.granule(None)?, CAPACITY)?, counters.clone());
        Ok(Self { place, driver, counters })
    }

    fn granule(&self) -> Bytes {
        self.driver.info().granule.bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_maps_nothing_is_not_probed() {
        assert_eq!(mapped("host"), Ok(DeviceKind::Host));
        assert_eq!(mapped("cuda:1"), Ok(DeviceKind::Cuda(Some(1))));
        assert!(mapped("ledger").unwrap_err().contains("nothing to probe"));
        assert!(mapped("gpu").is_err());
    }
}
