//! Where threads are held, seen to arrive and let go; and an end for what takes longer than it may.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use vattn::error::Verb;

use super::Watch;

/// Longer than any test takes that has one.
const DEADLINE: Duration = Duration::from_secs(100);

/// Whether this is the thread that works in a cache's background.
pub(crate) fn is_mapper() -> bool {
    thread::current().name() == Some("vattn-mapper")
}

/// Waits for something that is sure to come; a [`Deadline`] tells where it does not.
pub(crate) fn until(mut come: impl FnMut() -> bool) {
    while !come() {
        thread::yield_now();
    }
}

/// Holds the first caller that comes.
#[derive(Default)]
pub(crate) struct Gate {
    state: Mutex<(u64, bool)>,
    moved: Condvar,
}

impl Gate {
    /// In the driver, before the next call of that verb.
    pub(crate) fn before(watch: &Watch, verb: Verb) -> Arc<Self> {
        Self::place(watch, verb, || true)
    }

    /// In the driver, before the mapper's next call of that verb.
    pub(crate) fn before_mapper(watch: &Watch, verb: Verb) -> Arc<Self> {
        Self::place(watch, verb, is_mapper)
    }

    fn place(watch: &Watch, verb: Verb, holds: fn() -> bool) -> Arc<Self> {
        let gate = Arc::new(Self::default());
        let (here, armed) = (Arc::clone(&gate), AtomicBool::new(true));
        watch.checked.on_call(Box::new(move |called| {
            if called == verb && holds() && armed.swap(false, Ordering::SeqCst) {
                here.pass();
            }
        }));
        gate
    }

    pub(crate) fn pass(&self) {
        let mut state = self.state.lock();
        state.0 += 1;
        while !state.1 {
            self.moved.wait(&mut state);
        }
    }

    fn is_reached(&self) -> bool {
        self.state.lock().0 > 0
    }

    /// Waits for a caller who must come: one that ends without is a failure, not a hang.
    pub(crate) fn wait_for_arrival<T>(&self, caller: &thread::ScopedJoinHandle<'_, T>) {
        until(|| {
            assert!(self.is_reached() || !caller.is_finished(), "it made no such call");
            self.is_reached()
        });
    }

    /// Waits for whoever comes.
    pub(crate) fn wait(&self) {
        until(|| self.is_reached());
    }

    pub(crate) fn open(&self) {
        self.state.lock().1 = true;
        self.moved.notify_all();
    }
}

/// Ends the process if it is not dropped in time: whoever hangs can't fail by himself.
pub(crate) struct Deadline {
    over: Arc<(Mutex<bool>, Condvar)>,
    watch: Option<thread::JoinHandle<()>>,
}

impl Deadline {
    pub(crate) fn new() -> Self {
        let name = thread::current().name().unwrap_or("a test").to_owned();
        let over = Arc::new((Mutex::new(false), Condvar::new()));
        let shared = Arc::clone(&over);
        let watch = thread::spawn(move || {
            let (over, changed) = &*shared;
            let mut over = over.lock();
            if changed.wait_while_for(&mut over, |over| !*over, DEADLINE).timed_out() {
                eprintln!("{name} hangs: it is not over after {DEADLINE:?}");
                std::process::abort();
            }
        });
        Self { over, watch: Some(watch) }
    }
}

impl Drop for Deadline {
    fn drop(&mut self) {
        *self.over.0.lock() = true;
        self.over.1.notify_all();
        if let Some(watch) = self.watch.take() {
            watch.join().expect("it only waits");
        }
    }
}
