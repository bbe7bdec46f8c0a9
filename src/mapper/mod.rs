//! The background thread: one, named, asleep while there is nothing to do.
//!
//! Owns the thread and how it is woken, waited for and ended. Refuses to know what it does: it is given
//! a function that does one turn of work and says what comes next. What is to be done is kept by whoever
//! gave the function, so waking is one flag, and a thousand wake-ups before a turn are one.
//!
//! ```text
//!            wake                        Again, or Later after a while
//!   resting ─────► working ── a turn ──┬────────────► working
//!      ▲                               │ Idle, and nobody has woken it since
//!      └───────────────────────────────┘
//! ```
//!
//! A turn that panics ends the thread; whoever made it is told in what words. Dropping a [`Mapper`] ends
//! the thread after the turn it is in, and joins it.

#[cfg(all(test, loom))]
mod loom_tests;
#[cfg(all(test, not(loom)))]
mod tests;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use crate::sync::{Monitor, thread};

/// What comes after a turn of work.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Turn {
    /// Another turn, at once.
    Again,
    /// Another turn after so long, or as soon as somebody wakes the thread.
    Later(Duration),
    /// Nothing, until somebody wakes the thread.
    Idle,
}

#[derive(Debug, Default)]
struct State {
    /// Somebody woke the thread since it last began a turn.
    woken: bool,
    /// The thread has nothing to do, or is no more.
    resting: bool,
    ended: bool,
}

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct Mapper {
    state: Arc<Monitor<State>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Mapper {
    /// Starts the thread. It takes turns when woken, and tells `panicked` if one panics.
    pub(crate) fn spawn(
        name: &str,
        turn: impl FnMut() -> Turn + Send + 'static,
        panicked: impl FnOnce(String) + Send + 'static,
    ) -> io::Result<Self> {
        let state = Arc::new(Monitor::new(State { resting: true, ..State::default() }));
        let its = Arc::clone(&state);
        let thread = thread::Builder::new().name(name.into()).spawn(move || {
            if let Err(words) = catch(|| work(&its, turn)) {
                panicked(words);
            }
            its.lock().resting = true;
            its.notify_all();
        })?;
        Ok(Self { state, thread: Some(thread) })
    }

    /// Has it take a turn, now or after the one it is in.
    pub(crate) fn wake(&self) {
        let mut state = self.state.lock();
        state.woken = true;
        let resting = state.resting;
        drop(state);
        if resting {
            self.state.notify_all();
        }
    }

    /// Blocks until it has nothing to do. Whoever woke it before waits until that has been seen to.
    pub(crate) fn wait_until_idle(&self) {
        let mut state = self.state.lock();
        while !(state.resting && (!state.woken || self.is_gone())) {
            state = self.state.wait(state);
        }
    }

    fn is_gone(&self) -> bool {
        self.thread.as_ref().is_none_or(thread::JoinHandle::is_finished)
    }
}

impl Drop for Mapper {
    fn drop(&mut self) {
        self.state.lock().ended = true;
        self.state.notify_all();
        if let Some(thread) = self.thread.take() {
            // A turn that panicked was caught in the thread.
            let _ = thread.join();
        }
    }
}

/// What the thread does.
fn work(state: &Monitor<State>, mut turn: impl FnMut() -> Turn) {
    let mut next = Turn::Idle;
    loop {
        let mut guard = state.lock();
        match next {
            Turn::Again => {}
            Turn::Later(after) if !guard.woken && !guard.ended => guard = state.wait_for(guard, after),
            Turn::Later(_) => {}
            Turn::Idle => {
                while !guard.woken && !guard.ended {
                    guard.resting = true;
                    state.notify_all();
                    guard = state.wait(guard);
                }
            }
        }
        if guard.ended {
            return;
        }
        guard.resting = false;
        guard.woken = false;
        drop(guard);
        next = turn();
    }
}

/// The words of a panic, if there was one.
fn catch(run: impl FnOnce()) -> Result<(), String> {
    // Loom ends a model that fails by a panic of its own.
    #[cfg(loom)]
    {
        run();
        Ok(())
    }
    #[cfg(not(loom))]
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).map_err(|panic| {
        let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
        text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no words".to_owned())
    })
}
