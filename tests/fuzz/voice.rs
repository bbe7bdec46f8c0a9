//! What every call passes: the rules of the last error, the count of what each function came to, and a
//! watch on calls that do not return.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use vattn::ffi::vattn_status::{self, *};
use vattn::ffi::{vattn_driver_fire, vattn_error, vattn_last_error, vattn_last_error_message};

/// Makes a call, and checks what holds for all of them.
macro_rules! call {
    ($world:expr, $name:ident($($arg:expr),* $(,)?)) => {{
        $world.voice.begin(stringify!($name));
        // SAFETY: every pointer is NULL, misaligned and refused for it, or leads to what the function may
        // read and write; a handle, a slot and a string to be destroyed may be any number.
        let status = unsafe { ::vattn::ffi::$name($($crate::fuzz::voice::tell($arg)),*) };
        $world.voice.end(stringify!($name), status);
        status
    }};
}
pub(crate) use call;

/// The streams that are ever named.
pub(crate) const STREAMS: [u64; 6] = [0, 1, 2, 3, 0x7f00_1234_5678, u64::MAX];

/// A call that takes so long is waiting for a stream that is held: all are fired.
const PATIENCE: Duration = Duration::from_millis(3);
/// One that takes so long never returns.
const HANG: Duration = Duration::from_secs(60);

/// How often each function came to each status.
pub(crate) type Tally = BTreeMap<&'static str, BTreeMap<String, u64>>;

/// The seed of what is being played, for whoever has to say so in its last moments.
pub(crate) static SEED: AtomicU64 = AtomicU64::new(0);
/// Counts the times that streams were fired, so that what was held can be known to be held still.
static FIRED: AtomicU64 = AtomicU64::new(0);
static TRACE: AtomicBool = AtomicBool::new(false);

struct Watch {
    start: Instant,
    /// Since when each thread is in a call, in milliseconds; 0 while it is in none.
    calls: Mutex<Vec<Arc<AtomicU64>>>,
    /// Drivers by which streams can be fired.
    keepers: Mutex<Vec<usize>>,
}

fn watch() -> &'static Watch {
    static WATCH: OnceLock<&Watch> = OnceLock::new();
    WATCH.get_or_init(|| {
        TRACE.store(std::env::var_os("VATTN_FUZZ_TRACE").is_some(), SeqCst);
        let watch: &Watch = Box::leak(Box::new(Watch {
            start: Instant::now(),
            calls: Mutex::default(),
            keepers: Mutex::default(),
        }));
        std::thread::Builder::new().name("watch".to_owned()).spawn(move || watch.run()).unwrap();
        watch
    })
}

impl Watch {
    fn now(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_millis()).unwrap() + 1
    }

    fn run(&self) {
        loop {
            std::thread::sleep(Duration::from_millis(1));
            let now = self.now();
            let begun =
                self.calls.lock().unwrap().iter().map(|call| call.load(SeqCst)).filter(|at| *at > 0).min();
            let age = Duration::from_millis(begun.map_or(0, |begun| now.saturating_sub(begun)));
            if age > HANG {
                eprintln!(
                    "a call has not returned for {age:?}: VATTN_FUZZ_SEED={} VATTN_FUZZ_CALLS=1",
                    SEED.load(SeqCst)
                );
                std::process::abort();
            }
            if age > PATIENCE {
                fire_all();
            }
        }
    }
}

/// Fires all streams of all drivers that can.
pub(crate) fn fire_all() {
    let keepers = watch().keepers.lock().unwrap();
    FIRED.fetch_add(1, SeqCst);
    for keeper in keepers.iter() {
        for stream in STREAMS {
            // SAFETY: a handle may be any number.
            let _ = unsafe { vattn_driver_fire(handle(*keeper), pointer(stream)) };
        }
    }
    // What was held meanwhile may have been fired, too.
    FIRED.fetch_add(1, SeqCst);
}

pub(crate) fn note_fire() {
    FIRED.fetch_add(1, SeqCst);
}

pub(crate) fn fired() -> u64 {
    FIRED.load(SeqCst)
}

/// Does something while nobody fires, unless somebody has since `fired` was asked.
pub(crate) fn unless_fired(since: u64, look: impl FnOnce()) {
    let _keepers = watch().keepers.lock().unwrap();
    if fired() == since {
        look();
    }
}

pub(crate) fn keep(keeper: usize) {
    watch().keepers.lock().unwrap().push(keeper);
}

pub(crate) fn forget(keeper: usize) {
    watch().keepers.lock().unwrap().retain(|kept| *kept != keeper);
}

/// A handle from its number.
pub(crate) fn handle<T>(number: usize) -> *mut T {
    std::ptr::without_provenance_mut(number)
}

/// A stream or an event from its number.
pub(crate) fn pointer(number: u64) -> *mut std::ffi::c_void {
    std::ptr::without_provenance_mut(usize::try_from(number).unwrap())
}

/// Hands an argument on, and tells it where that is wanted.
pub(crate) fn tell<T: std::fmt::Debug>(argument: T) -> T {
    if TRACE.load(SeqCst) {
        eprint!(" {argument:?}");
    }
    argument
}

/// One thread's calls.
pub(crate) struct Voice {
    last: String,
    clock: Arc<AtomicU64>,
    pub(crate) tally: Tally,
    pub(crate) calls: u64,
}

impl Voice {
    /// Of the thread that makes it.
    pub(crate) fn new() -> Self {
        let clock = Arc::new(AtomicU64::new(0));
        watch().calls.lock().unwrap().push(Arc::clone(&clock));
        Self { last: last_text(), clock, tally: Tally::new(), calls: 0 }
    }

    pub(crate) fn last(&self) -> &str {
        &self.last
    }

    pub(crate) fn begin(&self, name: &str) {
        if TRACE.load(SeqCst) {
            eprint!("{:?} {name}", std::thread::current().id());
        }
        self.clock.store(watch().now(), SeqCst);
    }

    pub(crate) fn end(&mut self, name: &'static str, status: vattn_status) {
        self.clock.store(0, SeqCst);
        self.count(name, &format!("{status:?}"));
        let text = last_text();
        if TRACE.load(SeqCst) {
            eprintln!(" -> {status:?} {}", if status == VATTN_OK { "" } else { &text });
        }
        // The log callback's own mistake, which the call had made.
        if text.starts_with("vattn_driver_describe: called from inside a log callback") && status == VATTN_OK
        {
            self.last = text;
            return;
        }
        if status == VATTN_OK {
            assert_eq!(text, self.last, "{name} succeeded, and the last error is another");
            return;
        }
        assert!(text.len() > name.len() + 4, "{name} came to {status:?} and says \"{text}\"");
        assert!(text.starts_with(&format!("{name}: ")), "{name} came to {status:?} and says \"{text}\"");
        assert_eq!(last_status(), status_number(status), "{name} came to {status:?}: \"{text}\"");
        self.last = text;
    }

    pub(crate) fn count(&mut self, name: &'static str, status: &str) {
        self.calls += 1;
        let by_status = self.tally.entry(name).or_default();
        match by_status.get_mut(status) {
            Some(count) => *count += 1,
            None => drop(by_status.insert(status.to_owned(), 1)),
        }
    }
}

impl Drop for Voice {
    fn drop(&mut self) {
        if let Ok(mut calls) = watch().calls.lock() {
            calls.retain(|clock| !Arc::ptr_eq(clock, &self.clock));
        }
    }
}

/// What a C program sees of a status.
pub(crate) fn status_number(status: vattn_status) -> i32 {
    #[expect(clippy::as_conversions, reason = "an enum of that representation")]
    {
        status as i32
    }
}

fn last_text() -> String {
    let mut room = [0_u8; 8192];
    // SAFETY: as many bytes can be written there.
    let length = unsafe { vattn_last_error_message(room.as_mut_ptr().cast(), room.len()) };
    let kept = length.min(room.len() - 1);
    assert_eq!(room[kept], 0, "a text ends with a NUL");
    String::from_utf8_lossy(&room[..kept]).into_owned()
}

fn last_status() -> i32 {
    let mut error = vattn_error {
        struct_size: size_of::<vattn_error>(),
        status: -1,
        verb: 0,
        driver_code: 0,
        driver_bytes: 0,
        driver_name: [0; 64],
    };
    // SAFETY: a struct with its size.
    let status = unsafe { vattn_last_error(&raw mut error) };
    assert_eq!(status, VATTN_OK);
    error.status
}
