//! What every function of the C ABI passes, and the last error of a thread.
//!
//! Every `extern "C" fn` of this room is one call of [`enter`], [`on_cache`] or, where nothing can be
//! refused, [`plain`]: a test reads the sources and fails on one that is not.

use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::cache::vattn_cache;
use super::handle::CACHES;
use super::status::vattn_status;
use crate::cache::KvCache;
use crate::error::{DriverFailure, Error};

/// Why a call failed, as the caller can ask for it afterwards.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) status: vattn_status,
    pub(super) message: String,
    pub(super) driver: Option<DriverFailure>,
}

impl Failure {
    #[cold]
    pub(super) fn new(status: vattn_status, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), driver: None }
    }

    /// What a panic said. What it carried is not dropped unless it is a text, since its drop may panic.
    #[cold]
    fn panicked(payload: Box<dyn Any + Send>) -> Self {
        let words = match payload.downcast::<String>() {
            Ok(words) => *words,
            Err(payload) => match payload.downcast::<&str>() {
                Ok(words) => (*words).to_owned(),
                Err(payload) => {
                    std::mem::forget(payload);
                    "something that is no text".to_owned()
                }
            },
        };
        Self::new(
            vattn_status::VATTN_PANIC,
            format!(
                "the library panicked: {words}; please report it. Destroy the objects it was called with"
            ),
        )
    }
}

impl From<Error> for Failure {
    #[cold]
    fn from(error: Error) -> Self {
        Self { status: error.kind().into(), driver: error.driver().cloned(), message: error.report() }
    }
}

thread_local! {
    static LAST: Cell<Option<Failure>> = const { Cell::new(None) };
    /// Whether this thread is inside a callback of the program's.
    static IN_CALLBACK: Cell<bool> = const { Cell::new(false) };
}

/// Looks at the last failure of this thread. A thread that is ending has none.
pub(super) fn last<T>(look: impl FnOnce(Option<&Failure>) -> T) -> T {
    let taken = LAST.try_with(Cell::take).ok().flatten();
    let seen = look(taken.as_ref());
    let _ = LAST.try_with(|last| last.set(taken));
    seen
}

/// A call that may fail: it becomes a status, and what it says the thread's last error.
#[inline]
pub(super) fn enter(name: &str, call: impl FnOnce() -> Result<(), Failure>) -> vattn_status {
    let call = || {
        if in_callback() {
            return Err(from_callback());
        }
        call()
    };
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(())) => vattn_status::VATTN_OK,
        Ok(Err(failure)) => note(name, failure),
        Err(payload) => note(name, Failure::panicked(payload)),
    }
}

/// A call on a cache. A panic in it makes the cache a failed one.
#[inline]
pub(super) fn on_cache(
    name: &str,
    handle: *const vattn_cache,
    call: impl FnOnce(&KvCache) -> Result<(), Failure>,
) -> vattn_status {
    enter(name, || {
        let cache = CACHES.get(handle)?;
        match catch_unwind(AssertUnwindSafe(|| call(&cache))) {
            Ok(result) => result,
            Err(payload) => {
                let failure = Failure::panicked(payload);
                cache.fail(&failure.message);
                Err(failure)
            }
        }
    })
}

/// A call that refuses nothing and touches no object. `otherwise` is for a defect alone.
pub(super) fn plain<T>(otherwise: T, call: impl FnOnce() -> T) -> T {
    catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|payload| {
        std::mem::forget(payload);
        otherwise
    })
}

/// Calls out into the program. Until it returns, this thread's calls of the library are refused: locks
/// may be held that they would wait for.
pub(super) fn call_back(call: impl FnOnce()) {
    // A thread that is ending has no storage left, and then nobody is told.
    let inside = IN_CALLBACK.try_with(|inside| inside.replace(true));
    if inside == Ok(false) {
        call();
        let _ = IN_CALLBACK.try_with(|inside| inside.set(false));
    }
}

/// Whether this thread is inside a callback of the program's.
pub(super) fn in_callback() -> bool {
    IN_CALLBACK.try_with(Cell::get).unwrap_or(false)
}

#[cold]
fn from_callback() -> Failure {
    Failure::new(
        vattn_status::VATTN_IN_CALLBACK,
        "called from inside a log callback, where locks of the library may be held; call after it has returned",
    )
}

#[cold]
fn note(name: &str, mut failure: Failure) -> vattn_status {
    failure.message.insert_str(0, ": ");
    failure.message.insert_str(0, name);
    let status = failure.status;
    let _ = LAST.try_with(|last| last.set(Some(failure)));
    status
}
