//! Which devices are there to run on.
//!
//! The host where there is one (Linux), and the card where there is one; what is missing says SKIP
//! aloud. `VATTN_BENCH_DEVICE` names one alone: `host`, `cuda`, or `ledger`, which keeps books and
//! maps nothing. With `VATTN_REQUIRE_GPU=1` a missing card is a failure.

use std::process::exit;
use std::sync::Arc;

use vattn::driver::Driver;
use vattn::driver::ledger::{Ledger, LedgerOptions};
use vattn::units::Bytes;

use super::bare::Bare;
use super::work::Work;

const GRANULE: Bytes = Bytes::mib(2);
/// As on a card. What is mapped and not touched takes no memory of the host.
const CAPACITY: Bytes = Bytes::gib(139);

/// A driver, and its calls without this library.
pub struct Target {
    pub name: &'static str,
    /// For the head of a record.
    pub what: String,
    pub driver: Arc<dyn Driver>,
    pub bare: Bare,
    pub work: Work,
}

impl Target {
    fn new(name: &'static str, what: String, driver: Arc<dyn Driver>) -> Self {
        Self { name, what, bare: Bare::new(Arc::clone(&driver)), driver, work: Work::Pause }
    }

    /// Whether the goals, which are figures of a card, are asked of it.
    pub fn is_card(&self) -> bool {
        self.name == "cuda"
    }
}

/// The devices to run on; those that map nothing real if it is only a test that the bench runs.
pub fn targets(test: bool) -> Vec<Target> {
    let wanted = std::env::var("VATTN_BENCH_DEVICE").ok().filter(|name| !name.is_empty());
    match wanted.as_deref() {
        None if test => [Some(ledger()), host()].into_iter().flatten().collect(),
        None => [host(), cuda()].into_iter().flatten().collect(),
        Some("host") => host().into_iter().collect(),
        Some("cuda") => cuda().into_iter().collect(),
        Some("ledger") => vec![ledger()],
        Some(other) => {
            eprintln!("VATTN_BENCH_DEVICE is \"{other}\"; use host, cuda or ledger, or leave it unset");
            exit(2);
        }
    }
}

fn ledger() -> Target {
    let options = LedgerOptions { granule: GRANULE, capacity: CAPACITY, addresses: None };
    let driver = Ledger::new(options).expect("the options are valid");
    Target::new("ledger", "books alone, nothing is mapped".into(), driver)
}

#[cfg(target_os = "linux")]
fn host() -> Option<Target> {
    use vattn::driver::host::{Host, HostOptions};
    match Host::new(HostOptions::new(GRANULE, CAPACITY)) {
        Ok(driver) => {
            Some(Target::new("host", "memory of this machine, mapped and not touched".into(), driver))
        }
        Err(error) => {
            println!("SKIP host: {error}");
            None
        }
    }
}

#[cfg(not(target_os = "linux"))]
fn host() -> Option<Target> {
    println!("SKIP host: it needs Linux");
    None
}

#[cfg(feature = "cuda")]
fn cuda() -> Option<Target> {
    use vattn::driver::cuda::{Cuda, CudaOptions, devices, driver_version};
    let driver = match Cuda::new(CudaOptions::default()) {
        Ok(driver) => driver,
        Err(error) => return missing(&error.to_string()),
    };
    let device = driver.info().device;
    let name = devices().ok().and_then(|found| found.into_iter().next()).map(|first| first.name);
    let version = driver_version().map_or("?".into(), |(major, minor)| format!("{major}.{minor}"));
    let what = format!("{} ({device}), CUDA {version} by its driver", name.unwrap_or_default());
    let bare = Bare::of_cuda(&driver);
    // In the context that is current since then.
    let work = Work::Kernel(super::work::Spin::new());
    Some(Target { name: "cuda", what, driver, bare, work })
}

#[cfg(not(feature = "cuda"))]
fn cuda() -> Option<Target> {
    missing("built without the feature `cuda`")
}

fn missing(why: &str) -> Option<Target> {
    if std::env::var("VATTN_REQUIRE_GPU").is_ok_and(|value| value == "1") {
        eprintln!("FAIL cuda: {why}; VATTN_REQUIRE_GPU=1 asks for a card");
        exit(1);
    }
    println!("SKIP cuda: {why}");
    None
}
