//! What the tests of all policies stand on: the bookkeeping driver under the checked one.

use std::sync::Arc;

use vattn::driver::checked::{Checked, CheckedOptions};
use vattn::driver::ledger::{Ledger, LedgerOptions};
use vattn::driver::owned::DriverHandle;
use vattn::error::Verb;
use vattn::stats::Counters;
use vattn::units::Bytes;

/// A driver with granules of 2 MiB, and its books.
pub(crate) fn driver() -> (DriverHandle, Arc<Checked>) {
    let options = LedgerOptions { granule: Bytes::mib(2), capacity: Bytes::gib(1), addresses: None };
    let checked = Checked::new(Ledger::new(options).unwrap(), CheckedOptions::TEST);
    (DriverHandle::new(checked.clone(), Arc::new(Counters::default())), checked)
}

/// How often a verb was called.
pub(crate) fn calls(driver: &Checked, verb: Verb) -> u64 {
    driver.calls().of(verb)
}

/// Nothing is left.
pub(crate) fn is_empty(driver: &Checked) -> bool {
    let live = driver.live();
    live.handles == 0 && live.mappings == 0 && live.reservations == 0
}
