//! Can two threads make extents at once and exceed the budget, or lose one?
//!
//! Every order in which two threads can take the pool's lock, with the driver's calls made between
//! its critical sections, as the cache makes them. Run with
//!
//! ```text
//! RUSTFLAGS="--cfg loom" cargo test -p vattn --release --lib loom
//! ```

use std::sync::Arc;

use loom::thread;

use crate::driver::ledger::{Ledger, LedgerOptions};
use crate::driver::owned::{DriverHandle, PhysicalMemory};
use crate::pool::{Extent, Pool};
use crate::stats::Counters;
use crate::sync::Ranked;
use crate::units::{Bytes, Granules, SizeClass};

const GRANULE: Bytes = Bytes::mib(2);

struct Shared {
    pool: Ranked<Pool, 2>,
    driver: DriverHandle,
}

impl Shared {
    /// A pool that may hold that many granules, on a device that has as many.
    fn new(granules: u64) -> Arc<Self> {
        let budget = GRANULE * granules;
        let counters = Arc::new(Counters::default());
        let ledger =
            Ledger::new(LedgerOptions { granule: GRANULE, capacity: budget, addresses: None }).unwrap();
        let driver = DriverHandle::new(ledger, Arc::clone(&counters));
        Arc::new(Self { pool: Ranked::new(Pool::new(driver.info().granule, budget, counters)), driver })
    }

    /// An extent that is there or is made; `None` where the budget has no room for it. The device has
    /// room whenever the budget has: a creation that fails shows that a promise was worth nothing.
    fn get(&self, class: SizeClass) -> Option<Extent> {
        let promise = {
            let mut pool = self.pool.lock();
            if let Some(extent) = pool.take(class) {
                return Some(extent);
            }
            let budget = pool.budget();
            let promise = pool.promise(class, budget)?;
            assert!(pool.held() <= budget, "{} granules are held", pool.held());
            promise
        };
        let size = self.driver.info().granule.to_bytes(class.granules());
        let memory = PhysicalMemory::new(&self.driver, size).expect("a promise is worth its bytes");
        Some(self.pool.lock().keep(promise, memory))
    }

    /// Gives up a free extent of any class, so that another can be made.
    fn release_one(&self) -> bool {
        let Some(withdrawn) = self.pool.lock().withdraw(Granules::new(1)) else { return false };
        let class = withdrawn.class();
        withdrawn.into_memory().release().expect("the ledger takes back what it gave");
        self.pool.lock().released(class);
        true
    }
}

fn class(exponent: u8) -> SizeClass {
    SizeClass::new(exponent).unwrap()
}

#[test]
fn taking_and_giving_back_keeps_the_budget_and_loses_nothing() {
    loom::model(|| {
        let shared = Shared::new(3);
        let other = {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                let extent = shared.get(class(1));
                let got = extent.is_some();
                if let Some(extent) = extent {
                    shared.pool.lock().give_back(extent);
                }
                got
            })
        };
        // Two of two granules do not fit into three.
        let extent = shared.get(class(1));
        let got = extent.is_some();
        if let Some(extent) = extent {
            shared.pool.lock().give_back(extent);
        }
        assert!(other.join().unwrap() || got, "one of the two had room");
        let pool = shared.pool.lock();
        assert_eq!(pool.held(), Granules::new(2));
        pool.audit(Granules::ZERO).unwrap();
    });
}

#[test]
fn a_broken_promise_is_room_for_somebody_else() {
    loom::model(|| {
        let shared = Shared::new(1);
        let other = {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                let promise = shared.pool.lock().promise(class(0), Granules::new(1));
                if let Some(promise) = promise {
                    shared.pool.lock().break_promise(promise);
                }
            })
        };
        let early = shared.get(class(0));
        other.join().unwrap();
        let extent = early.or_else(|| shared.get(class(0))).expect("the promise was broken by now");
        let mut pool = shared.pool.lock();
        pool.audit(Granules::new(1)).unwrap();
        pool.give_back(extent);
        pool.audit(Granules::ZERO).unwrap();
    });
}

#[test]
fn an_extent_is_released_once_for_whoever_needs_its_bytes() {
    loom::model(|| {
        let shared = Shared::new(2);
        let old = shared.get(class(1)).unwrap();
        shared.pool.lock().give_back(old);
        let small = |shared: &Shared| {
            shared.get(class(0)).or_else(|| {
                shared.release_one();
                shared.get(class(0))
            })
        };
        let other = {
            let shared = Arc::clone(&shared);
            thread::spawn(move || small(&shared))
        };
        let one = small(&shared);
        let two = other.join().unwrap();
        // Whoever came while the other was between withdrawing and releasing found nothing; later it does.
        let (one, two) = (one.or_else(|| small(&shared)), two.or_else(|| small(&shared)));
        let (one, two) = (one.expect("two granules"), two.expect("hold two of one"));
        let mut pool = shared.pool.lock();
        pool.audit(Granules::new(2)).unwrap();
        pool.give_back(one);
        pool.give_back(two);
        pool.audit(Granules::ZERO).unwrap();
    });
}
