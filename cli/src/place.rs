//! Which device: how the command line names it, which one is taken where it names none, and what the
//! device itself decides.
//!
//! Refuses to know what the memory is for.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use vattn::driver::Driver;
use vattn::driver::cuda::{Cuda, CudaOptions};
use vattn::driver::host::{Host, HostOptions};
use vattn::driver::ledger::{Ledger, LedgerOptions};
use vattn::units::{Bytes, Device};
use vattn::{Error, ErrorKind, Result};

/// The unit of allocation where the device has none of its own: what CUDA has.
const GRANULE: Bytes = Bytes::mib(2);
/// The budget where the device has no memory of its own to take it from.
const BUDGET: Bytes = Bytes::gib(64);

/// A device by its name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum DeviceKind {
    /// This machine's memory, really mapped (Linux).
    Host,
    /// Nowhere: calls are counted and nothing is mapped, so that any size works anywhere.
    Ledger,
    /// An NVIDIA GPU by its number, or the first.
    Cuda(Option<u32>),
}

impl FromStr for DeviceKind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "host" => Ok(Self::Host),
            "ledger" => Ok(Self::Ledger),
            "cuda" => Ok(Self::Cuda(None)),
            _ => match text.strip_prefix("cuda:").map(str::parse) {
                Some(Ok(ordinal)) => Ok(Self::Cuda(Some(ordinal))),
                Some(Err(_)) => {
                    Err(format!("'{text}' names no GPU; write cuda:0 for the first, cuda:1 for the next"))
                }
                None => Err(format!("'{text}' is not a device; write host, ledger, cuda or cuda:N")),
            },
        }
    }
}

impl fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host => f.write_str("host"),
            Self::Ledger => f.write_str("ledger"),
            Self::Cuda(None) => f.write_str("cuda"),
            Self::Cuda(Some(ordinal)) => write!(f, "cuda:{ordinal}"),
        }
    }
}

/// A device that was found and can be used.
#[derive(Clone, Debug)]
pub(crate) enum Place {
    Host,
    Ledger,
    /// The driver is shared by whatever runs on the card, so that its context is made once.
    Cuda {
        driver: Arc<Cuda>,
        name: String,
    },
}

/// What [`open`] found.
#[derive(Clone, Debug)]
pub(crate) struct Opened {
    pub(crate) place: Place,
    /// Why it is not a GPU, where one was looked for and none was asked for.
    pub(crate) no_gpu: Option<String>,
}

/// The device that was asked for; where none was, the first GPU if there is one, and else the host.
///
/// # Errors
/// The library's. A GPU that is there and can't be used now is not passed over in silence.
pub(crate) fn open(asked: Option<DeviceKind>) -> Result<Opened> {
    let found = |place| Opened { place, no_gpu: None };
    match asked {
        Some(DeviceKind::Host) => Ok(found(Place::Host)),
        Some(DeviceKind::Ledger) => Ok(found(Place::Ledger)),
        Some(DeviceKind::Cuda(ordinal)) => gpu(ordinal).map(found),
        None => match gpu(None) {
            Ok(place) => Ok(found(place)),
            Err(error) if error.kind() == ErrorKind::Unsupported => {
                Ok(Opened { place: Place::Host, no_gpu: Some(error.report()) })
            }
            Err(error) => {
                Err(error.context("there is a GPU and it can't be used now; --device host does without it"))
            }
        },
    }
}

fn gpu(ordinal: Option<u32>) -> Result<Place> {
    let driver = Cuda::new(CudaOptions { ordinal, ..CudaOptions::default() })?;
    let name = driver.device()?.name;
    Ok(Place::Cuda { driver, name })
}

impl Place {
    /// Its name on the command line.
    pub(crate) fn kind(&self) -> DeviceKind {
        match self {
            Self::Host => DeviceKind::Host,
            Self::Ledger => DeviceKind::Ledger,
            Self::Cuda { driver, .. } => match driver.info().device {
                Device::Cuda(ordinal) => DeviceKind::Cuda(Some(ordinal)),
                Device::Cpu => DeviceKind::Cuda(None),
            },
        }
    }

    /// A driver for it; a card's own is shared, with all its memory. Any other has twice the budget, so
    /// that it is the budget which is short and not the device, where creating would be slow.
    pub(crate) fn driver(&self, granule: Bytes, budget: Bytes) -> Result<Arc<dyn Driver>> {
        let capacity = budget.checked_add(budget).unwrap_or(budget);
        Ok(match self {
            Self::Host => Host::new(HostOptions::new(granule, capacity))?,
            Self::Ledger => Ledger::new(LedgerOptions { granule, capacity, addresses: None })?,
            Self::Cuda { driver, .. } => driver.clone(),
        })
    }

    /// The unit of allocation: the card's own, or what was asked for.
    pub(crate) fn granule(&self, asked: Option<Bytes>) -> Result<Bytes> {
        match self {
            Self::Host | Self::Ledger => Ok(asked.unwrap_or(GRANULE)),
            Self::Cuda { driver, .. } => own_granule(asked, driver.info().granule.bytes(), &self.to_string()),
        }
    }

    /// How much memory may be held: what was asked for, if it is there.
    pub(crate) fn budget(&self, asked: Option<Bytes>) -> Result<Bytes> {
        match self {
            Self::Host | Self::Ledger => Ok(asked.unwrap_or(BUDGET)),
            Self::Cuda { driver, .. } => {
                let granule = driver.info().granule.bytes();
                budget_of(asked, driver.memory_info()?.free, granule, &self.to_string())
            }
        }
    }
}

/// How people call it: `host`, `cuda:0 (NVIDIA H200)`.
impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host | Self::Ledger => self.kind().fmt(f),
            Self::Cuda { name, .. } => write!(f, "{} ({name})", self.kind()),
        }
    }
}

fn own_granule(asked: Option<Bytes>, own: Bytes, device: &str) -> Result<Bytes> {
    match asked {
        Some(asked) if asked != own => Err(Error::new(
            ErrorKind::InvalidConfig,
            format!(
                "--granule is {asked}, and {device} allocates in granules of {own}: leave --granule out, or \
                 choose --device host or ledger, whose granule is yours to set"
            ),
        )),
        _ => Ok(own),
    }
}

/// Without a wish, four fifths of what is free: the rest is for the model, its kernels and others.
fn budget_of(asked: Option<Bytes>, free: Bytes, granule: Bytes, device: &str) -> Result<Bytes> {
    let most = Bytes::new(free.get() / 5 * 4 / granule.get() * granule.get());
    match asked {
        Some(asked) if asked > free => Err(Error::new(
            ErrorKind::InvalidConfig,
            format!(
                "--budget is {asked}, and {device} has {free} free: give --budget {}MiB or less, leave it out \
                 for four fifths of what is free, or see with nvidia-smi who holds the rest",
                free.get() >> 20
            ),
        )),
        Some(asked) => Ok(asked),
        None => Ok(most),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_read_as_written() {
        for (text, kind) in [
            ("host", DeviceKind::Host),
            ("ledger", DeviceKind::Ledger),
            ("cuda", DeviceKind::Cuda(None)),
            ("cuda:0", DeviceKind::Cuda(Some(0))),
            ("cuda:12", DeviceKind::Cuda(Some(12))),
        ] {
            assert_eq!(text.parse(), Ok(kind));
            assert_eq!(kind.to_string(), text);
        }
        for (text, says) in [
            ("cuda:", "write cuda:0"),
            ("cuda:-1", "write cuda:0"),
            ("cuda:one", "'cuda:one' names no GPU"),
            ("cuda:99999999999", "names no GPU"),
            ("CUDA", "write host, ledger, cuda or cuda:N"),
            ("gpu", "'gpu' is not a device"),
            ("host:0", "is not a device"),
            ("", "is not a device"),
        ] {
            assert!(text.parse::<DeviceKind>().unwrap_err().contains(says), "{text}");
        }
    }

    #[test]
    fn a_card_keeps_its_granule() {
        let own = |asked| own_granule(asked, Bytes::mib(2), "cuda:0 (Test)");
        assert_eq!(own(None).unwrap(), Bytes::mib(2));
        assert_eq!(own(Some(Bytes::mib(2))).unwrap(), Bytes::mib(2));
        let refused = own(Some(Bytes::mib(4))).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::InvalidConfig);
        let refused = refused.to_string();
        assert!(
            refused.contains("--granule is 4 MiB, and cuda:0 (Test) allocates in granules of 2 MiB"),
            "{refused}"
        );
    }

    #[test]
    fn a_budget_is_four_fifths_of_a_card_and_never_more_than_is_free() {
        let free = Bytes::mib(1001);
        let of = |asked| budget_of(asked, free, Bytes::mib(2), "cuda:0 (Test)");
        assert_eq!(of(None).unwrap(), Bytes::mib(800));
        assert_eq!(of(Some(free)).unwrap(), free);
        assert_eq!(of(Some(Bytes::ZERO)).unwrap(), Bytes::ZERO);
        let refused = of(Some(Bytes::gib(2))).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::InvalidConfig);
        let refused = refused.to_string();
        for says in ["--budget is 2 GiB", "1001 MiB free", "--budget 1001MiB or less"] {
            assert!(refused.contains(says), "{refused}");
        }
    }

    #[test]
    fn without_a_wish_the_host_keeps_its_defaults() {
        assert_eq!(Place::Host.granule(None).unwrap(), Bytes::mib(2));
        assert_eq!(Place::Host.budget(None).unwrap(), Bytes::gib(64));
        assert_eq!(Place::Ledger.budget(Some(Bytes::gib(1))).unwrap(), Bytes::gib(1));
    }
}
