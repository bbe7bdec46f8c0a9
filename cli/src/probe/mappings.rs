//! How many mappings there can be: one handle is mapped again and again, side by side.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use vattn::driver::owned::{PhysicalMemory, Reservation};
use vattn::units::Bytes;
use vattn::{Error, Result};

use crate::Failure;
use crate::num::{float, wide};
use crate::probe::Subject;
use crate::probe::child::Teller;

/// Nobody needs more: 2 TB in granules of 2 MiB.
const MOST: u64 = 1_000_000;
/// Over how many the first and the last are averaged, and how many pass between two looks at the clock.
const STRETCH: u64 = 1_000;

#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub(super) struct Mappings {
    pub(super) handle_bytes: Bytes,
    pub(super) mappings: u64,
    pub(super) seconds: f64,
    /// The mean of map and set_access together, over the first thousand.
    pub(super) first_us: f64,
    /// The same over the last thousand.
    pub(super) last_us: f64,
    /// What kept it from more; `None` while that is not known.
    pub(super) stopped: Option<Stopped>,
    pub(super) refusal: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Stopped {
    /// The driver would not map more.
    Refused,
    /// More were not asked for.
    Enough,
    /// There was no more time.
    TimeUp,
}

pub(super) fn answer(subject: &Subject, time: Duration, teller: &mut Teller<'_>) -> Result<(), Failure> {
    let size = subject.granule();
    let memory = PhysicalMemory::new(&subject.driver, size)?;
    let (addresses, most) = addresses(subject, size)?;
    let mut found = Mappings { handle_bytes: size, ..Mappings::default() };
    // Reserved beforehand, so that growing is no part of what is measured.
    let mut mapped = Vec::with_capacity(usize::try_from(most).unwrap_or_default());
    let start = Instant::now();
    while found.stopped.is_none() {
        let stretch = Instant::now();
        let before = wide(mapped.len());
        while wide(mapped.len()) < most && wide(mapped.len()) - before < STRETCH {
            match addresses.map(size * wide(mapped.len()), &memory) {
                Ok(mapping) => mapped.push(mapping),
                Err(error) => {
                    found.stopped = Some(Stopped::Refused);
                    found.refusal = Some(Error::from(error).report());
                    break;
                }
            }
        }
        found.mappings = wide(mapped.len());
        found.seconds = start.elapsed().as_secs_f64();
        let new = found.mappings - before;
        // A stretch that ends early ends with a refusal, which takes another time; the first is all there may be.
        if new == STRETCH || (before == 0 && new > 0) {
            found.last_us = stretch.elapsed().as_secs_f64() * 1e6 / float(new);
        }
        if before == 0 {
            found.first_us = found.last_us;
        }
        if found.stopped.is_none() && found.mappings == most {
            found.stopped = Some(Stopped::Enough);
        } else if found.stopped.is_none() && start.elapsed() > time {
            found.stopped = Some(Stopped::TimeUp);
        }
        teller.so_far(&found)?;
    }
    teller.done(&found)?;
    // The process ends here, and with it all of them, faster than one by one.
    std::mem::forget((mapped, memory, addresses));
    Ok(())
}

/// Addresses for as many mappings as are wanted, or as there are addresses for.
fn addresses(subject: &Subject, size: Bytes) -> Result<(Arc<Reservation>, u64)> {
    let mut most = MOST;
    loop {
        match Reservation::new(&subject.driver, size * most) {
            Ok(reservation) => return Ok((reservation, most)),
            Err(_) if most > 1 => most /= 2,
            Err(error) => return Err(error),
        }
    }
}
