//! Where locks and atomics come from, chosen here and nowhere else: parking_lot and, for waits, the standard
//! library, or loom under `--cfg loom`.
//!
//! Locks are ranked. A thread that holds a lock may only take locks of a higher rank, and holds
//! none but that of rank 0 while it calls the driver; debug builds assert both.
//!
//! | rank | lock | owner |
//! |---|---|---|
//! | 0 | the right to move extents, one operation at a time | `cache`, `buffer` |
//! | 1 | slot table | `cache` |
//! | 2 | pool | `cache` |
//! | 3 | what the mapper was asked for | `cache` |
//!
//! A driver's own books sit behind a [`Leaf`]: no rank, because nothing but system calls is called
//! under one. A [`Monitor`] has none either: it guards a few flags, and nothing is called under it. The
//! turn at background work is a [`Leaf`] that is held over all of these, and taken with none of them held.

#[cfg(loom)]
pub(crate) use loom::{sync::atomic, thread};
#[cfg(not(loom))]
pub(crate) use std::{sync::atomic, thread};

use std::time::Duration;

pub(crate) use parking_lot::{Condvar, Mutex as Leaf};
/// What those are made of, for what has to be set up anew after `fork`.
#[cfg(all(unix, not(loom)))]
pub(crate) use parking_lot::{
    RawMutex as RawLeaf, RawRwLock as RawReadWrite,
    lock_api::{RawMutex as RawLock, RawRwLock as RawSharedLock},
};
/// What many read and few change: the tables of the objects that C has. Held over all of the others.
#[cfg(not(loom))]
pub(crate) use parking_lot::{RwLock as ReadWrite, RwLockReadGuard as ReadGuard};

#[cfg(all(debug_assertions, not(loom)))]
thread_local! {
    /// The ranks of the locks that this thread holds, in the order they were taken.
    static HELD: std::cell::RefCell<Vec<u8>> = const { std::cell::RefCell::new(Vec::new()) };
}

// Loom runs all of a model's threads on one.
#[cfg(all(debug_assertions, loom))]
loom::thread_local! {
    static HELD: std::cell::RefCell<Vec<u8>> = std::cell::RefCell::new(Vec::new());
}

/// A mutual exclusion lock with a place in the order of all locks.
#[derive(Debug)]
pub(crate) struct Ranked<T, const RANK: u8> {
    #[cfg(not(loom))]
    inner: parking_lot::Mutex<T>,
    #[cfg(loom)]
    inner: loom::sync::Mutex<T>,
}

/// Holds the lock until it is dropped.
#[derive(Debug)]
pub(crate) struct Guard<'a, T, const RANK: u8> {
    #[cfg(not(loom))]
    inner: parking_lot::MutexGuard<'a, T>,
    #[cfg(loom)]
    inner: loom::sync::MutexGuard<'a, T>,
    // Behind the lock: it is off the list once it is given up.
    _listed: Listed<RANK>,
}

/// An entry in the list of the locks that this thread holds: in debug builds.
#[derive(Debug)]
struct Listed<const RANK: u8>;

impl<T, const RANK: u8> Ranked<T, RANK> {
    pub(crate) fn new(value: T) -> Self {
        Self {
            #[cfg(not(loom))]
            inner: parking_lot::Mutex::new(value),
            #[cfg(loom)]
            inner: loom::sync::Mutex::new(value),
        }
    }

    /// Takes the lock.
    ///
    /// # Panics
    /// In debug builds, if this thread holds a lock of the same rank or a higher one.
    pub(crate) fn lock(&self) -> Guard<'_, T, RANK> {
        let listed = Listed::new();
        Guard {
            #[cfg(not(loom))]
            inner: self.inner.lock(),
            #[cfg(loom)]
            inner: self.inner.lock().expect("loom locks are not poisoned"),
            _listed: listed,
        }
    }

    /// Gives the lock up, to whoever has waited for it longest where somebody does.
    pub(crate) fn unlock_fair(guard: Guard<'_, T, RANK>) {
        #[cfg(not(loom))]
        parking_lot::MutexGuard::unlock_fair(guard.inner);
        #[cfg(loom)]
        drop(guard);
    }

    pub(crate) fn get_mut(&mut self) -> &mut T {
        #[cfg(not(loom))]
        {
            self.inner.get_mut()
        }
        #[cfg(loom)]
        {
            self.inner.get_mut().expect("loom locks are not poisoned")
        }
    }
}

impl<T, const RANK: u8> std::ops::Deref for Guard<'_, T, RANK> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.inner
    }
}

impl<T, const RANK: u8> std::ops::DerefMut for Guard<'_, T, RANK> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.inner
    }
}

impl<const RANK: u8> Listed<RANK> {
    fn new() -> Self {
        #[cfg(debug_assertions)]
        // During a thread's end the list may be gone already; then nothing can be checked.
        let _ = HELD.try_with(|held| {
            let mut held = held.borrow_mut();
            assert!(
                held.last().is_none_or(|last| *last < RANK),
                "a lock of rank {RANK} is taken while {held:?} are held"
            );
            held.push(RANK);
        });
        Self
    }
}

#[cfg(debug_assertions)]
impl<const RANK: u8> Drop for Listed<RANK> {
    fn drop(&mut self) {
        // During a thread's end the list may be gone already; then there is nothing left to check.
        let _ = HELD.try_with(|held| {
            let mut held = held.borrow_mut();
            if let Some(place) = held.iter().rposition(|rank| *rank == RANK) {
                held.remove(place);
            }
        });
    }
}

/// Asserts, in debug builds, that this thread holds no lock above rank 0: called where the driver is.
pub(crate) fn assert_unlocked() {
    #[cfg(debug_assertions)]
    let _ = HELD.try_with(|held| {
        let held = held.borrow();
        assert!(
            held.iter().all(|rank| *rank == 0),
            "the driver is called while locks of rank {held:?} are held"
        );
    });
}

/// A lock and who waits for what it guards to change.
///
/// Its waits are not parking_lot's, which leave a waiting thread in a table of the process: after `fork`,
/// where that thread is not there and another may get its memory, the table is broken. The standard
/// library's leave it with the kernel.
#[derive(Debug)]
pub(crate) struct Monitor<T> {
    #[cfg(not(loom))]
    inner: Leaf<T>,
    /// How often it was notified.
    #[cfg(not(loom))]
    notified: atomic::AtomicU64,
    #[cfg(not(loom))]
    gate: std::sync::Mutex<()>,
    #[cfg(not(loom))]
    changed: std::sync::Condvar,
    #[cfg(loom)]
    inner: loom::sync::Mutex<T>,
    #[cfg(loom)]
    changed: loom::sync::Condvar,
}

#[cfg(not(loom))]
pub(crate) type MonitorGuard<'a, T> = parking_lot::MutexGuard<'a, T>;
#[cfg(loom)]
pub(crate) type MonitorGuard<'a, T> = loom::sync::MutexGuard<'a, T>;

#[cfg(not(loom))]
impl<T> Monitor<T> {
    pub(crate) fn new(value: T) -> Self {
        Self {
            inner: Leaf::new(value),
            notified: atomic::AtomicU64::new(0),
            gate: std::sync::Mutex::new(()),
            changed: std::sync::Condvar::new(),
        }
    }

    pub(crate) fn lock(&self) -> MonitorGuard<'_, T> {
        self.inner.lock()
    }

    pub(crate) fn notify_all(&self) {
        let gate = self.gate();
        self.notified.fetch_add(1, atomic::Ordering::Relaxed);
        drop(gate);
        self.changed.notify_all();
    }

    /// Waits, with the lock given up, until it is notified.
    pub(crate) fn wait<'a>(&'a self, guard: MonitorGuard<'a, T>) -> MonitorGuard<'a, T> {
        self.wait_for(guard, Duration::MAX)
    }

    /// The same, but not for longer than that.
    pub(crate) fn wait_for<'a>(&'a self, guard: MonitorGuard<'a, T>, most: Duration) -> MonitorGuard<'a, T> {
        // Before the lock is given up: whoever changes something after that notifies after that.
        let before = self.notified.load(atomic::Ordering::Relaxed);
        drop(guard);
        let unchanged = |(): &mut ()| self.notified.load(atomic::Ordering::Relaxed) == before;
        drop(self.changed.wait_timeout_while(self.gate(), most, unchanged));
        self.inner.lock()
    }

    fn gate(&self) -> std::sync::MutexGuard<'_, ()> {
        self.gate.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

#[cfg(loom)]
impl<T> Monitor<T> {
    pub(crate) fn new(value: T) -> Self {
        Self { inner: loom::sync::Mutex::new(value), changed: loom::sync::Condvar::new() }
    }

    pub(crate) fn lock(&self) -> MonitorGuard<'_, T> {
        self.inner.lock().expect("loom locks are not poisoned")
    }

    pub(crate) fn notify_all(&self) {
        self.changed.notify_all();
    }

    pub(crate) fn wait<'a>(&'a self, guard: MonitorGuard<'a, T>) -> MonitorGuard<'a, T> {
        self.changed.wait(guard).expect("loom locks are not poisoned")
    }

    /// Loom knows no time: a wait that may end early may end at once.
    pub(crate) fn wait_for<'a>(&'a self, guard: MonitorGuard<'a, T>, _most: Duration) -> MonitorGuard<'a, T> {
        drop(guard);
        thread::yield_now();
        self.lock()
    }
}

#[cfg(all(test, not(loom), debug_assertions))]
mod tests {
    use super::*;

    #[test]
    fn ascending_ranks_are_fine() {
        let (low, high) = (Ranked::<_, 1>::new(()), Ranked::<_, 2>::new(()));
        {
            let _low = low.lock();
            let _high = high.lock();
        }
        assert_unlocked();
        drop(high.lock());
        drop(low.lock());
    }

    #[test]
    fn a_thread_that_is_ending_may_take_locks() {
        struct Last(Ranked<(), 1>, std::sync::mpsc::Sender<()>);
        impl Drop for Last {
            fn drop(&mut self) {
                drop(self.0.lock());
                assert_unlocked();
                self.1.send(()).unwrap();
            }
        }
        std::thread_local! {
            static LAST: std::cell::RefCell<Option<Last>> = const { std::cell::RefCell::new(None) };
        }
        let (done, ended) = std::sync::mpsc::channel();
        // The list of locks is made after `LAST`, and so is gone before it.
        let thread = std::thread::spawn(|| {
            LAST.with(|last| *last.borrow_mut() = Some(Last(Ranked::new(()), done)));
            drop(Ranked::<_, 1>::new(()).lock());
        });
        thread.join().unwrap();
        ended.recv().unwrap();
    }

    #[test]
    #[should_panic(expected = "a lock of rank 1 is taken while [2] are held")]
    fn a_descent_is_caught() {
        let (low, high) = (Ranked::<_, 1>::new(()), Ranked::<_, 2>::new(()));
        let _high = high.lock();
        let _low = low.lock();
    }

    #[test]
    #[should_panic(expected = "the driver is called while locks of rank [1] are held")]
    fn a_driver_call_under_a_lock_is_caught() {
        let lock = Ranked::<_, 1>::new(());
        let _guard = lock.lock();
        assert_unlocked();
    }
}
