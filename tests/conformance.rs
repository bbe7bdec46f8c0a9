//! One suite for every driver: the contract of the trait `Driver`, check by check.
//!
//! Each check gets a driver of its own, with room for 64 granules, and leaves nothing behind. A new
//! backend is one more line in [`BACKENDS`].

#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]
#![allow(unsafe_code, reason = "the suite calls the unsafe verbs, in order and out of it")]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use vattn::driver::checked::{Checked, CheckedOptions};
use vattn::driver::ledger::{Ledger, LedgerOptions};
use vattn::driver::{Access, Driver, Live, RawEvent, RawHandle, Stream};
use vattn::error::{ErrorKind, Result};
use vattn::units::{Bytes, DeviceAddr};

#[cfg(target_os = "linux")]
use vattn::driver::host::{Host, HostOptions};

#[cfg(feature = "cuda")]
#[path = "common/card.rs"]
#[allow(dead_code, reason = "every test program uses a part of it")]
mod card;

const CAPACITY_IN_GRANULES: u64 = 64;

type Make = Option<fn() -> Option<Subject>>;

/// Every backend, and how to make one; `None` where this build has none, or makes none on this machine.
const BACKENDS: [(&str, Make); 5] = [
    ("host", HOST),
    ("ledger", Some(|| Some(ledger()))),
    ("checked(host)", CHECKED_HOST),
    ("checked(ledger)", Some(|| Some(checked(ledger())))),
    ("cuda", CUDA),
];

#[cfg(target_os = "linux")]
const HOST: Make = Some(|| Some(host()));
#[cfg(target_os = "linux")]
const CHECKED_HOST: Make = Some(|| Some(checked(host())));
#[cfg(not(target_os = "linux"))]
const HOST: Make = None;
#[cfg(not(target_os = "linux"))]
const CHECKED_HOST: Make = None;
#[cfg(feature = "cuda")]
const CUDA: Make = Some(cuda);
#[cfg(not(feature = "cuda"))]
const CUDA: Make = None;

/// How a test holds back a stream's work, where the backend lets it.
struct Controls {
    hold: Box<dyn Fn(Stream)>,
    fire: Box<dyn Fn(Stream)>,
    capture: Box<dyn Fn(Stream, bool)>,
    waiting: Box<dyn Fn() -> u64>,
}

/// A stream by a number of a check's.
fn stream(number: u64) -> Stream {
    // SAFETY: host and ledger know streams by their numbers alone, and the card's numbers are translated to
    // streams of its own.
    unsafe { Stream::new(number) }
}

struct Subject {
    driver: Arc<dyn Driver>,
    live: Box<dyn Fn() -> Live>,
    memory: Memory,
    /// The driver refuses what its callers promise never to do, unknown events among it. A real device's need not:
    /// the callers' conditions are there for that.
    refuses_breaches: bool,
    /// The stream that stands for a number.
    stream: Box<dyn Fn(u64) -> Stream>,
    controls: Controls,
}

/// How a test reads and writes what is mapped.
enum Memory {
    None,
    Processor,
    #[cfg(feature = "cuda")]
    Card(Arc<card::Card>),
}

macro_rules! subject {
    ($driver:ident, $memory:expr) => {{
        let [live, hold, fire, capture, waiting] = [(); 5].map(|()| Arc::clone(&$driver));
        Subject {
            driver: $driver,
            live: Box::new(move || live.live()),
            memory: $memory,
            refuses_breaches: true,
            stream: Box::new(stream),
            controls: Controls {
                hold: Box::new(move |stream| hold.hold(stream)),
                fire: Box::new(move |stream| fire.fire(stream)),
                capture: Box::new(move |stream, capturing| capture.set_capturing(stream, capturing)),
                waiting: Box::new(move || waiting.waiting()),
            },
        }
    }};
}

#[cfg(target_os = "linux")]
fn host() -> Subject {
    let granule = Bytes::new(64 << 10);
    let driver = Host::new(HostOptions::new(granule, granule * CAPACITY_IN_GRANULES)).unwrap();
    subject!(driver, Memory::Processor)
}

fn ledger() -> Subject {
    let granule = Bytes::mib(2);
    let capacity = granule * CAPACITY_IN_GRANULES;
    let options = LedgerOptions { granule, capacity, addresses: Some(Bytes::gib(1 << 20)) };
    let driver = Ledger::new(options).unwrap();
    subject!(driver, Memory::None)
}

/// Without assertions, so that the inner driver's refusals show: the assertions have tests of their own.
fn checked(inner: Subject) -> Subject {
    let options = CheckedOptions { assert_contract: false, ..CheckedOptions::TEST };
    let driver = Checked::new(inner.driver, options);
    let books = Arc::clone(&driver);
    let live = move || {
        assert_eq!(books.live(), (inner.live)(), "the wrapper's books are the inner driver's");
        books.live()
    };
    Subject { driver, live: Box::new(live), ..inner }
}

/// Under the checking driver, which keeps the books that CUDA does not show, and gives it a capacity.
#[cfg(feature = "cuda")]
fn cuda() -> Option<Subject> {
    use std::sync::atomic::AtomicU64;

    use vattn::error::Verb;

    let card = card::Card::open()?;
    let capacity = card.cuda.info().granule.bytes() * CAPACITY_IN_GRANULES;
    let options = CheckedOptions { assert_contract: false, budget: Some(capacity), ..CheckedOptions::TEST };
    let driver = Checked::new(card.cuda.clone(), options);
    let waits = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&waits);
    driver.on_call(Box::new(move |verb| {
        if verb == Verb::WaitEvent {
            counted.fetch_add(1, Ordering::SeqCst);
        }
    }));
    let [hold, fire, capture, streams] = [(); 4].map(|()| Arc::clone(&card));
    let books = Arc::clone(&driver);
    Some(Subject {
        driver,
        live: Box::new(move || books.live()),
        memory: Memory::Card(card),
        refuses_breaches: false,
        stream: Box::new(move |number| streams.stream(stream(number))),
        controls: Controls {
            hold: Box::new(move |stream| hold.hold(stream)),
            fire: Box::new(move |stream| fire.fire(stream)),
            capture: Box::new(move |stream, capturing| capture.capture(stream, capturing)),
            waiting: Box::new(move || waits.load(Ordering::SeqCst)),
        },
    })
}

/// The verbs without their `unsafe`. What a check does wrong it does on purpose, to see it refused.
impl Subject {
    fn granules(&self, count: u64) -> Bytes {
        self.driver.info().granule.bytes() * count
    }

    fn reserve(&self, granules: u64) -> DeviceAddr {
        self.driver.reserve(self.granules(granules)).unwrap()
    }

    fn create(&self, granules: u64) -> RawHandle {
        self.driver.create(self.granules(granules)).unwrap()
    }

    fn at(&self, base: DeviceAddr, granules: u64) -> DeviceAddr {
        base + self.granules(granules)
    }

    fn map(&self, addr: DeviceAddr, granules: u64, handle: RawHandle) -> Result<()> {
        // SAFETY: nobody but this check knows the addresses, and a breach of the contract is what it asks about.
        unsafe { self.driver.map(addr, self.granules(granules), handle) }
    }

    fn set_access(&self, addr: DeviceAddr, granules: u64, access: Access) -> Result<()> {
        // SAFETY: as in `map`.
        unsafe { self.driver.set_access(addr, self.granules(granules), access) }
    }

    fn unmap(&self, addr: DeviceAddr, granules: u64) -> Result<()> {
        // SAFETY: as in `map`.
        unsafe { self.driver.unmap(addr, self.granules(granules)) }
    }

    fn free(&self, addr: DeviceAddr, granules: u64) -> Result<()> {
        // SAFETY: as in `map`.
        unsafe { self.driver.free(addr, self.granules(granules)) }
    }

    fn release(&self, handle: RawHandle) -> Result<()> {
        // SAFETY: as in `map`.
        unsafe { self.driver.release(handle) }
    }

    fn query(&self, event: RawEvent) -> Result<bool> {
        // SAFETY: as in `map`.
        unsafe { self.driver.query_event(event) }
    }

    fn follow(&self, event: RawEvent) -> Result<RawEvent> {
        // SAFETY: as in `map`.
        unsafe { self.driver.follow_event(event) }
    }

    fn destroy(&self, event: RawEvent) -> Result<()> {
        // SAFETY: as in `map`.
        unsafe { self.driver.destroy_event(event) }
    }

    fn stream_wait(&self, stream: u64, event: RawEvent) -> Result<()> {
        // SAFETY: as in `map`.
        unsafe { self.driver.stream_wait((self.stream)(stream), event) }
    }

    /// Maps and gives access.
    fn back(&self, addr: DeviceAddr, granules: u64, handle: RawHandle) {
        self.map(addr, granules, handle).unwrap();
        self.set_access(addr, granules, Access::ReadWrite).unwrap();
    }

    /// Writes a number to the first and the last eight bytes of backed granules.
    fn write(&self, addr: DeviceAddr, granules: u64, value: u64) {
        for end in self.ends(addr, granules) {
            match &self.memory {
                Memory::None => {}
                // SAFETY: the check backed the range for writing, and its ends are aligned.
                Memory::Processor => unsafe { pointer(end).write_volatile(value) },
                #[cfg(feature = "cuda")]
                Memory::Card(card) => card.write(end, &value.to_ne_bytes()),
            }
        }
    }

    /// Asserts that they hold it.
    #[track_caller]
    fn expect(&self, addr: DeviceAddr, granules: u64, value: u64) {
        for end in self.ends(addr, granules) {
            let found = match &self.memory {
                Memory::None => value,
                // SAFETY: the check backed the range, and its ends are aligned.
                Memory::Processor => unsafe { pointer(end).read_volatile() },
                #[cfg(feature = "cuda")]
                Memory::Card(card) => {
                    let mut found = [0; 8];
                    card.read(end, &mut found);
                    u64::from_ne_bytes(found)
                }
            };
            assert_eq!(found, value);
        }
    }

    fn ends(&self, addr: DeviceAddr, granules: u64) -> [DeviceAddr; 2] {
        [addr, addr + (self.granules(granules) - Bytes::new(8))]
    }

    fn record(&self, stream: u64) -> RawEvent {
        self.driver.record_event((self.stream)(stream)).unwrap()
    }

    fn hold(&self, number: u64) {
        (self.controls.hold)(stream(number));
    }

    fn fire(&self, number: u64) {
        (self.controls.fire)(stream(number));
    }

    /// Asserts that a call is refused for a reason of the driver's own and changes nothing.
    #[track_caller]
    fn refuses(&self, call: impl FnOnce() -> Result<()>) {
        let before = ((self.live)(), self.driver.memory_info().unwrap());
        let error = call().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Driver, "{error}");
        let failure = error.driver().expect("a driver's refusal keeps its code");
        assert_ne!(failure.code, 0, "{error}");
        assert_eq!(((self.live)(), self.driver.memory_info().unwrap()), before, "{error}");
    }
}

impl Subject {
    /// The same of a call that breaks a condition of its callers.
    #[track_caller]
    fn refuses_breach(&self, call: impl FnOnce() -> Result<()>) {
        if self.refuses_breaches {
            self.refuses(call);
        }
    }
}

fn pointer(addr: DeviceAddr) -> *mut u64 {
    std::ptr::with_exposed_provenance_mut(usize::try_from(addr.get()).unwrap())
}

type Check = (&'static str, fn(&Subject));

const CHECKS: &[Check] = &[
    ("reservations start on granules and lie apart", |subject| {
        let bases: Vec<_> = (1..6).map(|granules| (subject.reserve(granules), granules)).collect();
        for (place, (base, granules)) in bases.iter().enumerate() {
            assert!(subject.driver.info().granule.divides(Bytes::new(base.get())));
            for (other, more) in &bases[place + 1..] {
                assert!(subject.at(*base, *granules) <= *other || subject.at(*other, *more) <= *base);
            }
        }
        for (base, granules) in bases {
            subject.free(base, granules).unwrap();
        }
    }),
    ("sizes that are not whole granules are refused", |subject| {
        for size in [Bytes::ZERO, Bytes::new(1), subject.granules(1) + Bytes::new(1)] {
            subject.refuses(|| subject.driver.reserve(size).map(drop));
            subject.refuses(|| subject.driver.create(size).map(drop));
        }
    }),
    ("more addresses than there are is an error of its own kind", |subject| {
        for size in [Bytes::new(1 << 62), subject.granules(u64::MAX / subject.granules(1).get())] {
            let before = (subject.live)();
            let error = subject.driver.reserve(size).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::OutOfAddressSpace, "{error}");
            assert_eq!((subject.live)(), before);
        }
    }),
    ("a reservation is freed once, whole, and empty", |subject| {
        let base = subject.reserve(4);
        let handle = subject.create(1);
        subject.refuses_breach(|| subject.free(base, 2));
        subject.refuses_breach(|| subject.free(subject.at(base, 1), 3));
        subject.map(subject.at(base, 2), 1, handle).unwrap();
        subject.refuses_breach(|| subject.free(base, 4));
        subject.unmap(subject.at(base, 2), 1).unwrap();
        subject.free(base, 4).unwrap();
        subject.refuses_breach(|| subject.free(base, 4));
        subject.release(handle).unwrap();
    }),
    ("a handle maps whole and on granules", |subject| {
        let (base, handle) = (subject.reserve(8), subject.create(2));
        subject.refuses_breach(|| subject.map(base, 1, handle));
        subject.refuses_breach(|| subject.map(base, 4, handle));
        subject.refuses_breach(|| subject.map(base + Bytes::new(4096), 2, handle));
        subject.refuses_breach(|| subject.map(base, 2, RawHandle(u64::MAX)));
        subject.map(base, 2, handle).unwrap();
        subject.unmap(base, 2).unwrap();
        subject.release(handle).unwrap();
        subject.refuses_breach(|| subject.map(base, 2, handle));
        subject.refuses_breach(|| subject.release(handle));
        subject.free(base, 8).unwrap();
    }),
    ("a mapping lies in one reservation", |subject| {
        let (base, handle) = (subject.reserve(2), subject.create(2));
        subject.refuses_breach(|| subject.map(subject.at(base, 1), 2, handle));
        subject.refuses_breach(|| subject.map(DeviceAddr::new(subject.granules(1).get()), 2, handle));
        let top = subject.granules(u64::MAX / subject.granules(1).get());
        subject.refuses_breach(|| subject.map(DeviceAddr::new(top.get()), 2, handle));
        subject.release(handle).unwrap();
        subject.free(base, 2).unwrap();
    }),
    ("an overlap is refused and the memory stays", |subject| {
        let (base, [first, second]) = (subject.reserve(8), [subject.create(2), subject.create(2)]);
        subject.back(subject.at(base, 2), 2, first);
        subject.write(subject.at(base, 2), 2, 11);
        for place in [1, 2, 3] {
            subject.refuses(|| subject.map(subject.at(base, place), 2, second));
        }
        subject.expect(subject.at(base, 2), 2, 11);
        subject.map(subject.at(base, 4), 2, second).unwrap();
        subject.map(base, 2, second).unwrap();
        subject.unmap(base, 6).unwrap();
        for handle in [first, second] {
            subject.release(handle).unwrap();
        }
        subject.free(base, 8).unwrap();
    }),
    ("an unmap that cuts a mapping or spans a gap is refused", |subject| {
        let base = subject.reserve(16);
        let handles: Vec<_> = (0..3).map(|_| subject.create(4)).collect();
        for (place, handle) in [0, 4, 12].into_iter().zip(&handles) {
            subject.back(subject.at(base, place), 4, *handle);
            subject.write(subject.at(base, place), 4, place);
        }
        for (place, granules) in [(0, 2), (2, 2), (2, 4), (0, 6), (0, 16), (4, 12), (8, 4), (12, 8), (0, 0)] {
            subject.refuses_breach(|| subject.unmap(subject.at(base, place), granules));
            subject.refuses_breach(|| subject.set_access(subject.at(base, place), granules, Access::Read));
        }
        for place in [0, 4, 12] {
            subject.expect(subject.at(base, place), 4, place);
            subject.write(subject.at(base, place), 4, place + 1);
        }
        subject.unmap(base, 8).unwrap();
        subject.unmap(subject.at(base, 12), 4).unwrap();
        for handle in handles {
            subject.release(handle).unwrap();
        }
        subject.free(base, 16).unwrap();
    }),
    ("many whole mappings are unmapped at once and can be mapped again", |subject| {
        let base = subject.reserve(32);
        let handles: Vec<_> = (0..32).map(|_| subject.create(1)).collect();
        for round in 0..2 {
            // In an order in which neighbours are not neighbours in the memory.
            for (place, handle) in (0..32).map(|place| (place * 5 + round) % 32).zip(&handles) {
                subject.map(subject.at(base, place), 1, *handle).unwrap();
            }
            subject.set_access(base, 32, Access::ReadWrite).unwrap();
            for place in 0..32 {
                subject.write(subject.at(base, place), 1, place);
            }
            for place in 0..32 {
                subject.expect(subject.at(base, place), 1, place);
            }
            subject.unmap(base, 32).unwrap();
        }
        for handle in handles {
            subject.release(handle).unwrap();
        }
        subject.free(base, 32).unwrap();
    }),
    ("one handle is mapped at two addresses and shows the same memory", |subject| {
        let (base, other, handle) = (subject.reserve(4), subject.reserve(2), subject.create(2));
        subject.back(base, 2, handle);
        subject.back(subject.at(base, 2), 2, handle);
        subject.map(other, 2, handle).unwrap();
        subject.set_access(other, 2, Access::Read).unwrap();
        subject.write(base, 2, 21);
        subject.expect(subject.at(base, 2), 2, 21);
        subject.expect(other, 2, 21);
        subject.write(subject.at(base, 2), 2, 22);
        subject.unmap(subject.at(base, 2), 2).unwrap();
        subject.expect(base, 2, 22);
        subject.expect(other, 2, 22);
        subject.unmap(base, 2).unwrap();
        subject.unmap(other, 2).unwrap();
        subject.release(handle).unwrap();
        subject.free(base, 4).unwrap();
        subject.free(other, 2).unwrap();
    }),
    ("access can be taken away, given back and given twice", |subject| {
        let (base, handle) = (subject.reserve(2), subject.create(2));
        subject.back(base, 2, handle);
        subject.write(base, 2, 31);
        subject.set_access(base, 2, Access::Read).unwrap();
        subject.expect(base, 2, 31);
        subject.set_access(base, 2, Access::Read).unwrap();
        subject.set_access(base, 2, Access::ReadWrite).unwrap();
        subject.write(base, 2, 32);
        subject.expect(base, 2, 32);
        subject.unmap(base, 2).unwrap();
        subject.refuses_breach(|| subject.set_access(base, 2, Access::ReadWrite));
        subject.release(handle).unwrap();
        subject.free(base, 2).unwrap();
    }),
    ("memory that is released while mapped lives on, and is free when it is unmapped", |subject| {
        let (base, handle) = (subject.reserve(4), subject.create(2));
        let free = subject.driver.memory_info().unwrap().free;
        subject.back(base, 2, handle);
        subject.write(base, 2, 41);
        subject.release(handle).unwrap();
        let others: Vec<_> = (2..CAPACITY_IN_GRANULES).map(|_| subject.create(1)).collect();
        subject.back(subject.at(base, 2), 1, others[0]);
        subject.write(subject.at(base, 2), 1, 42);
        subject.expect(base, 2, 41);
        for handle in others {
            subject.release(handle).unwrap();
        }
        subject.unmap(subject.at(base, 2), 1).unwrap();
        assert_eq!(subject.driver.memory_info().unwrap().free, free, "two granules are still mapped");
        subject.unmap(base, 2).unwrap();
        assert_eq!(subject.driver.memory_info().unwrap().free, free + subject.granules(2));
        subject.free(base, 4).unwrap();
    }),
    ("the capacity runs out with an error of its own kind and comes back", |subject| {
        let total = subject.driver.memory_info().unwrap();
        assert_eq!((total.free, total.total), (subject.granules(64), subject.granules(64)));
        let sizes = [1, 32, 2, 16, 4, 8];
        let handles: Vec<_> = sizes.into_iter().map(|granules| subject.create(granules)).collect();
        assert_eq!(subject.driver.memory_info().unwrap().free, subject.granules(1));
        for granules in [2, 64, u64::MAX / subject.granules(1).get()] {
            let before = (subject.live)();
            let error = subject.driver.create(subject.granules(granules)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::OutOfDeviceMemory, "{error}");
            assert_eq!((subject.live)(), before);
        }
        let last = subject.create(1);
        assert_eq!(subject.driver.memory_info().unwrap().free, Bytes::ZERO);
        // Scattered free memory is as good as whole: 2 + 4 granules that do not lie side by side.
        subject.release(handles[2]).unwrap();
        subject.release(handles[4]).unwrap();
        let scattered = subject.create(6);
        for handle in [handles[0], handles[1], handles[3], handles[5], last, scattered] {
            subject.release(handle).unwrap();
        }
        assert_eq!(subject.driver.memory_info().unwrap(), total);
        let all = subject.create(64);
        subject.release(all).unwrap();
    }),
    ("calls from several threads keep the books", |subject| {
        let driver = &subject.driver;
        let base = subject.reserve(32);
        let granule = subject.granules(1);
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let stream = (subject.stream)(thread);
                scope.spawn(move || {
                    for round in 0..50 {
                        let addr = base + granule * (thread * 8 + round % 8);
                        let handle = driver.create(granule).unwrap();
                        // SAFETY: eight granules of the reservation are this thread's alone.
                        unsafe {
                            driver.map(addr, granule, handle).unwrap();
                            driver.set_access(addr, granule, Access::ReadWrite).unwrap();
                            driver.release(handle).unwrap();
                            driver.unmap(addr, granule).unwrap();
                        }
                        let event = driver.record_event(stream).unwrap();
                        // SAFETY: the event was just recorded.
                        unsafe { driver.destroy_event(event) }.unwrap();
                    }
                });
            }
        });
        subject.free(base, 32).unwrap();
    }),
    ("an event of a stream without work has fired", |subject| {
        let event = subject.record(0);
        // SAFETY: the event was just recorded.
        unsafe { subject.driver.wait_event(event) }.unwrap();
        assert!(subject.query(event).unwrap());
        let follower = subject.follow(event).unwrap();
        assert!(subject.query(follower).unwrap());
        subject.stream_wait(1, event).unwrap();
        subject.destroy(event).unwrap();
        subject.destroy(follower).unwrap();
    }),
    ("events that are not there are refused", |subject| {
        if !subject.refuses_breaches {
            return;
        }
        let event = subject.record(0);
        subject.destroy(event).unwrap();
        for unknown in [event, RawEvent(u64::MAX)] {
            subject.refuses_breach(|| subject.query(unknown).map(drop));
            subject.refuses_breach(|| subject.follow(unknown).map(drop));
            subject.refuses_breach(|| subject.stream_wait(0, unknown));
            subject.refuses_breach(|| subject.destroy(unknown));
            // SAFETY: breaks the contract on purpose.
            subject.refuses_breach(|| unsafe { subject.driver.wait_event(unknown) });
        }
    }),
    ("events of a held stream fire with it, in order and through others", |subject| {
        let [one, two, three] = [1, 2, 3];
        let early = subject.record(one);
        // SAFETY: the event was just recorded.
        unsafe { subject.driver.wait_event(early) }.unwrap();
        subject.hold(one);
        let held = subject.record(one);
        let follower = subject.follow(held).unwrap();
        let free = subject.record(two);
        // SAFETY: the event was just recorded.
        unsafe { subject.driver.wait_event(free) }.unwrap();
        subject.stream_wait(two, held).unwrap();
        let after = subject.record(two);
        subject.hold(three);
        subject.stream_wait(three, held).unwrap();
        let both = subject.record(three);
        let fired = |events: &[RawEvent]| {
            events.iter().map(|event| subject.query(*event).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(
            fired(&[early, held, follower, free, after, both]),
            [true, false, false, true, false, false]
        );
        // Those that wait for it need it no longer.
        subject.destroy(held).unwrap();
        assert_eq!(fired(&[follower, after, both]), [false; 3]);
        subject.fire(one);
        for event in [follower, after] {
            // SAFETY: the events live; their streams are held no longer.
            unsafe { subject.driver.wait_event(event) }.unwrap();
        }
        assert_eq!(fired(&[follower, after, both]), [true, true, false]);
        subject.fire(three);
        let later = subject.record(one);
        for event in [both, later] {
            // SAFETY: as before.
            unsafe { subject.driver.wait_event(event) }.unwrap();
        }
        assert_eq!(fired(&[both, later]), [true, true]);
        for event in [early, follower, free, after, both, later] {
            subject.destroy(event).unwrap();
        }
    }),
    ("a wait ends when the event fires", |subject| {
        let before = (subject.controls.waiting)();
        subject.hold(7);
        let event = subject.record(7);
        let driver = &subject.driver;
        let firing = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| {
                // SAFETY: the event lives until the scope has ended.
                unsafe { driver.wait_event(event) }.unwrap();
                assert!(firing.load(Ordering::SeqCst), "the wait ended before the event fired");
            });
            while (subject.controls.waiting)() == before {
                std::thread::yield_now();
            }
            // A card's waits count before they begin: this is time for one that does not block to end.
            std::thread::sleep(Duration::from_millis(20));
            firing.store(true, Ordering::SeqCst);
            subject.fire(7);
            waiter.join().unwrap();
        });
        subject.destroy(event).unwrap();
    }),
    ("a stream that is being captured takes no event", |subject| {
        let event = subject.record(1);
        (subject.controls.capture)(stream(1), true);
        let before = (subject.live)();
        let refused = subject.driver.record_event((subject.stream)(1)).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::CapturingStream);
        let refused = subject.stream_wait(1, event).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::CapturingStream);
        assert_eq!((subject.live)(), before);
        // The capture goes on beside calls that have nothing to do with the stream.
        let (base, handle) = (subject.reserve(1), subject.create(1));
        subject.back(base, 1, handle);
        subject.unmap(base, 1).unwrap();
        subject.release(handle).unwrap();
        subject.free(base, 1).unwrap();
        assert!(subject.query(event).is_ok());
        (subject.controls.capture)(stream(1), false);
        subject.stream_wait(1, event).unwrap();
        subject.destroy(event).unwrap();
    }),
];

fn conforms(name: &str) {
    let (_, make) = BACKENDS.iter().find(|(backend, _)| *backend == name).expect("a backend of the list");
    let Some(make) = make else {
        println!("SKIP {name}: no driver of it in this build");
        return;
    };
    let mut failed = Vec::new();
    for (check, run) in CHECKS {
        let Some(subject) = make() else { return };
        println!("{name}: {check}");
        let run = AssertUnwindSafe(|| {
            run(&subject);
            assert_eq!((subject.live)(), Live::default(), "something is left");
        });
        if catch_unwind(run).is_err() {
            failed.push(check);
        }
    }
    assert!(failed.is_empty(), "{name}: {failed:#?}");
}

#[test]
fn host_conforms() {
    conforms("host");
}

#[test]
fn ledger_conforms() {
    conforms("ledger");
}

#[test]
fn checked_host_conforms() {
    conforms("checked(host)");
}

#[test]
fn checked_ledger_conforms() {
    conforms("checked(ledger)");
}

#[test]
fn cuda_conforms() {
    conforms("cuda");
}

mod random {
    use std::collections::BTreeMap;

    use proptest::prelude::*;
    use proptest::sample::Index;

    use super::*;

    #[derive(Clone, Debug)]
    enum Op {
        Create(u64),
        Map(Index, u64),
        Unmap(u64, u64),
        Access(u64, u64, bool),
        Release(Index),
    }

    const PLACES: u64 = 24;

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            2 => (1_u64..5).prop_map(Op::Create),
            4 => (any::<Index>(), 0..PLACES).prop_map(|(handle, place)| Op::Map(handle, place)),
            2 => (0..PLACES, 1_u64..10).prop_map(|(place, granules)| Op::Unmap(place, granules)),
            2 => (0..PLACES, 1_u64..10, any::<bool>())
                .prop_map(|(place, granules, write)| Op::Access(place, granules, write)),
            1 => any::<Index>().prop_map(Op::Release),
        ]
    }

    /// The plain model: places of one reservation, in granules.
    #[derive(Default)]
    struct Model {
        /// Living handles and their sizes.
        handles: Vec<(RawHandle, u64)>,
        /// Size, handle, and whether it may be written.
        mappings: BTreeMap<u64, (u64, RawHandle, bool)>,
    }

    impl Model {
        fn is_whole(&self, place: u64, granules: u64) -> bool {
            let mut at = place;
            while at < place + granules {
                match self.mappings.get(&at) {
                    Some((size, ..)) => at += size,
                    None => return false,
                }
            }
            at == place + granules
        }

        fn is_empty(&self, place: u64, granules: u64) -> bool {
            self.mappings.iter().all(|(at, (size, ..))| at + size <= place || place + granules <= *at)
        }
    }

    fn apply(subject: &Subject, base: DeviceAddr, model: &mut Model, op: &Op) {
        match op {
            Op::Create(granules) => {
                if let Ok(handle) = subject.driver.create(subject.granules(*granules)) {
                    model.handles.push((handle, *granules));
                }
            }
            Op::Map(which, place) if !model.handles.is_empty() => {
                let (handle, granules) = *which.get(&model.handles);
                let inside = place + granules <= PLACES;
                let allowed = inside && model.is_empty(*place, granules);
                if !inside && !subject.refuses_breaches {
                    return;
                }
                let result = subject.map(subject.at(base, *place), granules, handle);
                assert_eq!(result.is_ok(), allowed, "map {granules} at {place}");
                if allowed {
                    model.mappings.insert(*place, (granules, handle, false));
                }
            }
            Op::Unmap(place, granules) => {
                let allowed = model.is_whole(*place, *granules);
                if !allowed && !subject.refuses_breaches {
                    return;
                }
                let result = subject.unmap(subject.at(base, *place), *granules);
                assert_eq!(result.is_ok(), allowed, "unmap {granules} at {place}");
                if allowed {
                    model.mappings.retain(|at, _| *at < *place || *at >= place + granules);
                }
            }
            Op::Access(place, granules, write) => {
                let allowed = model.is_whole(*place, *granules);
                if !allowed && !subject.refuses_breaches {
                    return;
                }
                let access = if *write { Access::ReadWrite } else { Access::Read };
                let result = subject.set_access(subject.at(base, *place), *granules, access);
                assert_eq!(result.is_ok(), allowed, "access to {granules} at {place}");
                if allowed {
                    for (_, (.., writable)) in model.mappings.range_mut(*place..place + granules) {
                        *writable = *write;
                    }
                }
            }
            Op::Release(which) if !model.handles.is_empty() => {
                let (handle, _) = model.handles.swap_remove(which.index(model.handles.len()));
                subject.release(handle).unwrap();
            }
            Op::Map(..) | Op::Release(_) => {}
        }
    }

    fn run(subject: &Subject, ops: &[Op]) {
        let base = subject.reserve(PLACES);
        let mut model = Model::default();
        let wide = |len: usize| u64::try_from(len).unwrap();
        for op in ops {
            apply(subject, base, &mut model, op);
            let live = (subject.live)();
            assert_eq!(live.mappings, wide(model.mappings.len()));
            assert_eq!(live.handles, wide(model.handles.len()));
            let mut held: BTreeMap<RawHandle, u64> = model.handles.iter().copied().collect();
            held.extend(model.mappings.values().map(|(granules, handle, _)| (*handle, *granules)));
            assert_eq!(live.bytes, subject.granules(held.values().sum()));
        }
        // A handle's number, written through every mapping of it, is nobody else's.
        let writable = || model.mappings.iter().filter(|(_, (.., writable))| *writable);
        for (at, (granules, handle, _)) in writable() {
            subject.write(subject.at(base, *at), *granules, handle.0);
        }
        for (at, (granules, handle, _)) in writable() {
            subject.expect(subject.at(base, *at), *granules, handle.0);
        }
        for (at, (granules, ..)) in &model.mappings {
            subject.unmap(subject.at(base, *at), *granules).unwrap();
        }
        for (handle, _) in model.handles {
            subject.release(handle).unwrap();
        }
        subject.free(base, PLACES).unwrap();
        assert_eq!((subject.live)(), Live::default());
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(128) })]
        #[test]
        fn random_calls_do_what_a_plain_model_says(ops in prop::collection::vec(op(), 1..80)) {
            for subject in BACKENDS.into_iter().filter_map(|(_, make)| make?()) {
                run(&subject, &ops);
            }
        }
    }
}
