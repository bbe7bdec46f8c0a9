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

/// What the thread is at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Doing {
    /// Nothing, until somebody wakes it.
    Resting,
    /// Nothing, for a while: something is left for later.
    Pausing,
    /// A turn, or about to take one.
    Working,
    /// Nothing any more: it was ended, or a turn panicked. Waking it has no effect.
    Gone,
}

#[derive(Debug)]
struct State {
    doing: Doing,
    /// Somebody woke the thread since it last began a turn.
    woken: bool,
    /// How often it went to rest: whatever it was woken for before had been seen to by then.
    rests: u64,
    /// It is to end.
    ended: bool,
}

/// Wakes the thread; once that has ended, nothing.
#[derive(Debug)]
pub(crate) struct Waker(Arc<Monitor<State>>);

impl Waker {
    /// Has it take a turn, now or after the one it is in.
    pub(crate) fn wake(&self) {
        wake(&self.0);
    }
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
        let state = State { doing: Doing::Resting, woken: false, rests: 0, ended: false };
        let state = Arc::new(Monitor::new(state));
        let its = Arc::clone(&state);
        let thread = thread::Builder::new().name(name.into()).spawn(move || {
            if let Err(words) = catch(|| work(&its, turn)) {
                // Should it panic too, nobody is left to be told; but nobody may wait for ever either.
                let _ = catch(|| panicked(words));
            }
            its.lock().doing = Doing::Gone;
            its.notify_all();
        })?;
        Ok(Self { state, thread: Some(thread) })
    }

    /// Has it take a turn, now or after the one it is in.
    pub(crate) fn wake(&self) {
        wake(&self.state);
    }

    /// What wakes it from elsewhere.
    pub(crate) fn waker(&self) -> Waker {
        Waker(Arc::clone(&self.state))
    }

    /// Blocks until it has nothing to do, or is gone. Whoever woke it before waits until that has been
    /// seen to, and not for what others wake it for later.
    pub(crate) fn wait_until_idle(&self) {
        let mut state = self.state.lock();
        let rests = state.rests;
        let idle = |state: &State| match state.doing {
            Doing::Gone => true,
            Doing::Resting if !state.woken => true,
            Doing::Resting | Doing::Pausing | Doing::Working => state.rests != rests,
        };
        while !idle(&state) {
            state = self.state.wait(state);
        }
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

fn wake(monitor: &Monitor<State>) {
    let mut state = monitor.lock();
    state.woken = true;
    let waits = matches!(state.doing, Doing::Resting | Doing::Pausing);
    drop(state);
    if waits {
        monitor.notify_all();
    }
}

/// What the thread does.
fn work(state: &Monitor<State>, mut turn: impl FnMut() -> Turn) {
    let mut next = Turn::Idle;
    loop {
        let mut guard = state.lock();
        match next {
            Turn::Again => {}
            Turn::Later(after) => {
                if !guard.woken && !guard.ended {
                    guard.doing = Doing::Pausing;
                    guard = state.wait_for(guard, after);
                }
            }
            Turn::Idle => {
                if !guard.woken {
                    guard.doing = Doing::Resting;
                    guard.rests += 1;
                    state.notify_all();
                }
                while !guard.woken && !guard.ended {
                    guard = state.wait(guard);
                }
            }
        }
        if guard.ended {
            return;
        }
        guard.doing = Doing::Working;
        guard.woken = false;
        drop(guard);
        next = turn();
    }
}

/// The words of a panic, if there was one.
pub(crate) fn catch(run: impl FnOnce()) -> Result<(), String> {
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
