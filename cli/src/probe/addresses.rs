//! How many addresses can be reserved, at once and in all.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use vattn::Result;
use vattn::driver::owned::Reservation;
use vattn::error::Verb;
use vattn::units::{Bytes, GranuleSize, Granules};

use crate::Failure;
use crate::num::float;
use crate::probe::Subject;
use crate::probe::child::Teller;

/// More than any system with 48 bits of virtual addresses gives a process.
const MOST: Bytes = Bytes::gib(1 << 17);
/// What is left in pieces smaller than that is not counted, unless the largest is small itself.
const SMALLEST: Bytes = Bytes::gib(1);
/// Enough to fill the addresses with the largest pieces.
const RESERVATIONS: usize = 65_536;

#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub(super) struct Addresses {
    pub(super) largest_bytes: Bytes,
    /// How long the call took that reserved the largest.
    pub(super) largest_us: f64,
    /// Why one granule more was refused; `None` where nothing larger was asked for.
    pub(super) refusal: Option<String>,
    /// Largest first, until none of at least a GiB was left; `None` while that is not known.
    pub(super) all: Option<All>,
}

#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub(super) struct All {
    pub(super) total_bytes: Bytes,
    pub(super) reservations: u64,
    /// The time was up before the addresses were.
    pub(super) cut_short: bool,
}

pub(super) fn answer(subject: &Subject, time: Duration, teller: &mut Teller<'_>) -> Result<(), Failure> {
    let deadline = Instant::now() + time;
    let granule = subject.driver.info().granule;
    let (most, refusal) = largest(granule, |size| Reservation::new(&subject.driver, size).map(drop))?;
    let (first, took) = timed(subject, most)?;
    let mut found = Addresses {
        largest_bytes: most,
        largest_us: float(took) / 1e3,
        refusal: refusal.map(|error| error.report()),
        all: None,
    };
    teller.so_far(&found)?;
    found.all = Some(in_all(subject, first, granule, deadline));
    teller.done(&found)
}

/// The most that `reserve` gives in one piece, to the granule, and its refusal of more.
fn largest(
    granule: GranuleSize,
    mut reserve: impl FnMut(Bytes) -> Result<()>,
) -> Result<(Bytes, Option<vattn::Error>)> {
    let mut given = granule.bytes();
    reserve(given)?;
    let mut refused = loop {
        let Some(next) = given.checked_mul(2).filter(|next| *next <= MOST) else { return Ok((given, None)) };
        match reserve(next) {
            Ok(()) => given = next,
            Err(error) => break (next, error),
        }
    };
    loop {
        let between = granule.within(refused.0 - given).get() / 2;
        if between == 0 {
            return Ok((given, Some(refused.1)));
        }
        let next = given + granule.to_bytes(Granules::new(between));
        match reserve(next) {
            Ok(()) => given = next,
            Err(error) => refused = (next, error),
        }
    }
}

/// A reservation, and the nanoseconds that the driver took for it.
fn timed(subject: &Subject, size: Bytes) -> Result<(Arc<Reservation>, u64)> {
    let spent = || subject.counters.snapshot().driver[&Verb::Reserve].nanoseconds;
    let before = spent();
    let reservation = Reservation::new(&subject.driver, size)?;
    Ok((reservation, spent() - before))
}

/// Goes on reserving beside the first, ever smaller pieces.
fn in_all(subject: &Subject, first: Arc<Reservation>, granule: GranuleSize, deadline: Instant) -> All {
    let mut size = first.size();
    let least = SMALLEST.min(Bytes::new(size.get() >> 10)).max(granule.bytes());
    let mut held = vec![first];
    let mut cut_short = false;
    while size >= least && !cut_short {
        match Reservation::new(&subject.driver, size) {
            Ok(reservation) => held.push(reservation),
            Err(_) => size = granule.to_bytes(Granules::new(granule.within(size).get() / 2)),
        }
        cut_short = held.len() >= RESERVATIONS || Instant::now() >= deadline;
    }
    let total_bytes = held.iter().map(|reservation| reservation.size()).sum();
    All { total_bytes, reservations: crate::num::wide(held.len()), cut_short }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vattn::{Error, ErrorKind};

    fn found(limit: u64) -> Option<(u64, bool)> {
        let granule = GranuleSize::new(Bytes::mib(2)).unwrap();
        let reserve = |size: Bytes| {
            if size <= Bytes::mib(limit) {
                return Ok(());
            }
            Err(Error::new(ErrorKind::OutOfAddressSpace, "no"))
        };
        largest(granule, reserve).ok().map(|(size, refusal)| (size.get() >> 20, refusal.is_some()))
    }

    #[test]
    fn the_largest_reservation_is_found_to_the_granule() {
        assert_eq!(found(1), None);
        for limit in [2, 4, 6, 1000, 1022, 1024, 1026, 123_456_788] {
            assert_eq!(found(limit), Some((limit, true)), "{limit}");
        }
        assert_eq!(found(7), Some((6, true)));
        assert_eq!(found(u64::MAX >> 20), Some((1 << 27, false)));
    }
}
