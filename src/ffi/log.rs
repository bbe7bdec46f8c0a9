//! Who is told what the library logs.
//!
//! A subscriber of `tracing` for the whole process, installed when a callback is first set. Where the
//! program has one of its own, which only a Rust program can, that one is told already.

use std::ffi::{CString, c_char, c_void};
use std::fmt::{self, Write as _};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, Ordering};

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::subscriber::Interest;
use tracing::{Event, Level, Metadata, Subscriber};

use super::args::{self, Numbered as _};
#[cfg(unix)]
use super::entry::in_callback;
use super::entry::{Failure, call_back, enter};
use super::status::vattn_status::{self, VATTN_UNSUPPORTED};
use crate::sync::{Leaf, ReadWrite};
#[cfg(unix)]
use crate::sync::{RawReadWrite, RawSharedLock as _};

/// How much a message matters.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(i32)]
pub enum vattn_log_level {
    /// Nothing at all.
    VATTN_LOG_OFF = 0,
    /// Something is lost: a failed cache, memory that could not be given back.
    VATTN_LOG_ERROR = 1,
    /// Something is worse than it should be: quarantined memory, failed work in the background.
    VATTN_LOG_WARN = 2,
    /// What happens rarely: a cache is made, the budget is changed.
    VATTN_LOG_INFO = 3,
    /// What happens often.
    VATTN_LOG_DEBUG = 4,
    /// Everything.
    VATTN_LOG_TRACE = 5,
}

args::numbered!(vattn_log_level);

use vattn_log_level::*;

const LEVELS: [vattn_log_level; 6] =
    [VATTN_LOG_OFF, VATTN_LOG_ERROR, VATTN_LOG_WARN, VATTN_LOG_INFO, VATTN_LOG_DEBUG, VATTN_LOG_TRACE];

/// Is told of a message: a `vattn_log_level`, the part of the library that speaks, and the text. Both
/// strings end with a NUL and live until it returns. It may be called by any thread, the mapper among
/// them, by several at once, and while locks are held, so it must not call the library
/// (`VATTN_IN_CALLBACK`), not throw, and not take long.
pub type vattn_log_callback =
    Option<unsafe extern "C" fn(user: *mut c_void, level: i32, target: *const c_char, text: *const c_char)>;

#[derive(Clone, Copy)]
pub(super) struct Listener {
    call: unsafe extern "C" fn(*mut c_void, i32, *const c_char, *const c_char),
    user: *mut c_void,
    /// The least important level that it is told.
    level: i32,
}

// SAFETY: `vattn_log_set` asks for a function and a pointer that every thread may use.
unsafe impl Send for Listener {}
// SAFETY: likewise.
unsafe impl Sync for Listener {}

pub(super) static LISTENER: ReadWrite<Option<Listener>> = ReadWrite::new(None);
/// Held while it is written, and nowhere else: a fork waits for this, so a child finds a whole one. It can't
/// wait for the other, which is held while a callback runs, and a callback may fork.
pub(super) static CHANGING: Leaf<()> = Leaf::new(());
/// The listener's level, for those who would tell it nothing.
static LEVEL: AtomicI32 = AtomicI32::new(0);

/// Whether anybody is told anything.
pub(super) fn is_heard() -> bool {
    LEVEL.load(Ordering::Relaxed) != 0
}

/// Has the process's messages told to `callback`, those of `level` and of more importance. It replaces the
/// one before; NULL, or `VATTN_LOG_OFF`, tells nobody. When it returns, the one before is not running and
/// will not be called again.
///
/// Fails with `VATTN_UNSUPPORTED` where the program has a subscriber of its own for Rust's `tracing`.
///
/// # Safety
/// - `callback` is NULL, or may be called with `user` from any thread until another is set; set NULL before
///   the program ends what it uses.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_log_set(
    callback: vattn_log_callback,
    user: *mut c_void,
    level: i32,
) -> vattn_status {
    enter("vattn_log_set", || {
        let level = args::choice("level", level, &LEVELS.map(|level| (level, level)))?;
        super::fork::watch()?;
        let callback = callback.filter(|_| level != VATTN_LOG_OFF);
        let listener = callback.map(|call| Listener { call, user, level: level.number() });
        if listener.is_some() {
            install()?;
        }
        let mut current = LISTENER.write();
        let _whole = CHANGING.lock();
        LEVEL.store(listener.map_or(0, |listener| listener.level), Ordering::Relaxed);
        *current = listener;
        Ok(())
    })
}

/// Frees the lock of those who were told while `fork` was called: they are not there in the child. Where a
/// callback called it, this thread goes on to hold it.
///
/// # Safety
/// - there is no other thread, and none was changing the listener.
#[cfg(unix)]
pub(super) unsafe fn in_child() {
    // SAFETY: nobody else uses it, and what it is made of may change behind a shared reference.
    unsafe { std::ptr::from_ref(LISTENER.raw()).cast_mut().write(RawReadWrite::INIT) };
    if in_callback() {
        std::mem::forget(LISTENER.read_recursive());
    }
}

fn install() -> Result<(), Failure> {
    static INSTALLED: OnceLock<bool> = OnceLock::new();
    if *INSTALLED.get_or_init(|| tracing::subscriber::set_global_default(Teller).is_ok()) {
        return Ok(());
    }
    Err(Failure::new(
        VATTN_UNSUPPORTED,
        "this program has a subscriber for tracing already, which is told everything; set none here",
    ))
}

/// Hands events on to the callback.
struct Teller;

fn number(level: Level) -> i32 {
    match level {
        Level::ERROR => VATTN_LOG_ERROR,
        Level::WARN => VATTN_LOG_WARN,
        Level::INFO => VATTN_LOG_INFO,
        Level::DEBUG => VATTN_LOG_DEBUG,
        Level::TRACE => VATTN_LOG_TRACE,
    }
    .number()
}

impl Subscriber for Teller {
    fn register_callsite(&self, _metadata: &'static Metadata<'static>) -> Interest {
        // The level may change at any time.
        Interest::sometimes()
    }

    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        number(*metadata.level()) <= LEVEL.load(Ordering::Relaxed) && metadata.is_event()
    }

    fn event(&self, event: &Event<'_>) {
        let metadata = event.metadata();
        let mut words = Words::default();
        event.record(&mut words);
        let (Ok(target), Ok(text)) = (CString::new(metadata.target()), CString::new(words.text())) else {
            return;
        };
        let level = number(*metadata.level());
        // Not behind a writer that waits: this thread may be inside of another event.
        let listener = LISTENER.read_recursive();
        // Another one than at the time that the event was let in, perhaps.
        if let Some(Listener { call, user, .. }) = listener.filter(|listener| level <= listener.level) {
            // SAFETY: `vattn_log_set` asked for a function that may be called with this pointer until
            // another is set, which waits for this lock; both strings live until it returns.
            call_back(|| unsafe { call(user, level, target.as_ptr(), text.as_ptr()) });
        }
    }

    fn new_span(&self, _span: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _span: &Id, _values: &Record<'_>) {}

    fn record_follows_from(&self, _span: &Id, _follows: &Id) {}

    fn enter(&self, _span: &Id) {}

    fn exit(&self, _span: &Id) {}
}

/// An event as text: what it says, and `name=value` for every field behind it.
#[derive(Default)]
struct Words {
    message: String,
    fields: String,
}

impl Words {
    fn text(self) -> String {
        let mut text = self.message + &self.fields;
        text.retain(|character| character != '\0');
        text
    }
}

impl Visit for Words {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, " {name}={value:?}"),
        };
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.record_debug(field, &format_args!("{value}"));
    }
}
