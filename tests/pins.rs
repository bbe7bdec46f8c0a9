//! Does pinned memory stay where it is, whatever becomes of its slot and its cache, and is it given back
//! once nobody pins it?

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]
#![allow(unsafe_code, reason = "reads through addresses")]

mod common;

use std::sync::{Arc, Barrier};

use common::{Shape, Watch, contents, kind, rig, step, stream, tokens};
use vattn::driver::{Live, Stream};
use vattn::error::{ErrorKind, Verb};
use vattn::geometry::{Background, Reclaim};
use vattn::layout::Part;
use vattn::{Bytes, Fence, Health, KvCache, Pin, SlotId, SlotTokens};

const IDLE: &[Fence] = &[Fence::Idle];
const ONE: Stream = stream(1);

/// Slots of two tensors in which a granule holds 8 tokens, with nobody in the background.
fn shape() -> Shape {
    Shape { background: Background::Off, ..rig::shape() }
}

fn world() -> (Watch, KvCache) {
    rig::cache_of(&shape(), |builder| builder)
}

fn request(cache: &KvCache, count: u64) -> SlotId {
    let slot = cache.acquire(tokens(count), None).unwrap();
    step(cache, slot, count).unwrap();
    slot
}

/// The first keys of a slot, as whoever keeps a pin would find them without the cache.
fn keys(cache: &KvCache, slot: SlotId) -> *mut u8 {
    let view = cache.view(0, Part::Key).unwrap();
    contents::element(&view, [u64::from(slot.index()), 0, 0, 0])
}

fn read(byte: *mut u8) -> u8 {
    // SAFETY: none is claimed for what is not backed: the process is to die of it.
    unsafe { byte.read_volatile() }
}

fn granules(count: u64) -> Bytes {
    shape().granule * count
}

fn is_pin<T: Clone + Send + Sync + 'static>() {}

#[test]
fn a_pin_may_be_cloned_and_dropped_by_any_thread() {
    is_pin::<Pin>();
    let (watch, cache) = world();
    let slot = request(&cache, 20);
    let pin = cache.pin(slot).unwrap();
    let all = Arc::new(Barrier::new(4));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            let (pin, all) = (pin.clone(), Arc::clone(&all));
            scope.spawn(move || {
                all.wait();
                (0..1000).for_each(|_| drop(pin.clone()));
            });
        }
    });
    assert_eq!((cache.snapshot().pins, cache.bytes().pinned), (1, pin.bytes()));
    drop(pin);
    assert_eq!((cache.snapshot().pins, cache.bytes().pinned), (0, Bytes::ZERO));
    drop(cache);
    assert_eq!(watch.checked.live(), Live::default());
}

#[test]
fn what_is_pinned_is_there_through_all_that_happens() {
    let (watch, cache) = world();
    let slot = request(&cache, 64);
    contents::fill(&cache, slot, 1, 0..64);
    let first = keys(&cache, slot);
    let pin = cache.pin(slot).unwrap();
    assert_eq!((pin.tokens(), pin.bytes()), (tokens(64), granules(16)));
    let value = read(first);

    step(&cache, slot, 90).unwrap();
    cache.truncate(slot, tokens(3), IDLE).unwrap();
    cache.retire(slot, IDLE).unwrap();
    cache.reclaim(Bytes::gib(1), IDLE).unwrap();
    cache.trim(Bytes::ZERO, IDLE).unwrap();
    assert_eq!((cache.bytes().held, cache.bytes().parked), (granules(16), Bytes::ZERO));
    cache.set_budget(granules(16)).unwrap();
    contents::find(&cache, slot, 1, 64);
    cache.set_budget(granules(60)).unwrap();

    let next = cache.acquire(tokens(64), None).unwrap();
    assert_eq!((next.index(), cache.snapshot().events.adopted), (slot.index(), 1), "it is adopted");
    let calls = watch.on_the_path();
    step(&cache, next, 64).unwrap();
    assert_eq!(watch.on_the_path(), calls, "and its memory used");
    contents::find(&cache, next, 1, 64);
    step(&cache, next, 80).unwrap();
    cache.retire(next, IDLE).unwrap();
    cache.trim(Bytes::ZERO, IDLE).unwrap();
    contents::find(&cache, next, 1, 64);
    cache.report().unwrap();

    drop(cache);
    assert_eq!(read(first), value);
    assert_eq!(watch.checked.live().bytes, granules(16));
    drop(pin);
    assert_eq!(watch.checked.live(), Live::default());
    assert_eq!(watch.backend.live().unwrap_or_default(), Live::default());
}

#[test]
fn pinned_memory_is_nobody_elses_to_have() {
    let (_watch, cache) = world();
    cache.set_budget(granules(40)).unwrap();
    let slot = request(&cache, 80);
    let pin = cache.pin(slot).unwrap();
    cache.retire(slot, IDLE).unwrap();
    let other = cache.acquire(tokens(1), None).unwrap();
    let other = if other.index() == slot.index() { cache.acquire(tokens(1), None).unwrap() } else { other };
    assert_eq!(cache.admits(&[tokens(80)]), 1, "20 granules are pinned, and 20 are left");
    assert_eq!(cache.admits(&[tokens(81)]), 0);
    let fits = |count| cache.fits(&[SlotTokens::new(other, tokens(count))]).unwrap();
    assert_eq!((fits(80), fits(81)), (vec![true], vec![false]));
    let error = step(&cache, other, 81).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfBudget);
    for words in ["pinned memory included (80 KiB)", "give up pins"] {
        assert!(error.to_string().contains(words), "{error}");
    }
    let error = cache.set_budget(granules(19)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfBudget);
    for words in ["pinned memory included (80 KiB)", "or give up pins first"] {
        assert!(error.to_string().contains(words), "{error}");
    }
    drop(pin);
    assert_eq!(cache.bytes().pinned, Bytes::ZERO);
    step(&cache, other, 160).unwrap();
    cache.report().unwrap();
}

#[test]
fn the_largest_of_several_pins_counts() {
    let (_watch, cache) = world();
    let slot = request(&cache, 16);
    let small = cache.pin(slot).unwrap();
    step(&cache, slot, 64).unwrap();
    let large = cache.pin(slot).unwrap();
    let again = cache.pin(slot).unwrap();
    cache.retire(slot, IDLE).unwrap();
    assert_eq!((cache.bytes().pinned, cache.snapshot().pins), (large.bytes(), 3));
    drop(large);
    assert_eq!(cache.bytes().pinned, again.bytes());
    drop(again);
    assert_eq!(cache.bytes().pinned, small.bytes());
    cache.trim(Bytes::ZERO, IDLE).unwrap();
    assert_eq!(cache.bytes().held, small.bytes());
    assert_eq!(cache.snapshot().slots.parked, 1);
    drop(small);
    assert_eq!(cache.bytes().parked, cache.bytes().held);
    cache.trim(Bytes::ZERO, IDLE).unwrap();
    assert_eq!((cache.bytes().held, cache.snapshot().slots.parked), (Bytes::ZERO, 0));
    cache.report().unwrap();
}

#[test]
fn a_pin_of_no_tokens_keeps_addresses_alone() {
    let (watch, cache) = world();
    let slot = cache.acquire(tokens(1), None).unwrap();
    let pins = [cache.pin(slot).unwrap(), cache.pin_addresses()];
    assert!(pins.iter().all(|pin| pin.tokens().is_zero() && pin.bytes().is_zero()));
    let (first, size) = (cache.view(0, Part::Key).unwrap().addr, cache.layout().tensors()[0].size());
    assert!(pins[0].contains(first, size) && pins[1].contains(first + size, Bytes::ZERO));
    assert!(!pins[0].contains(first, size + Bytes::new(1)));
    assert!(!pins[0].contains(vattn::DeviceAddr::new(4096), Bytes::new(1)));
    step(&cache, slot, 30).unwrap();
    drop(cache);
    let live = watch.checked.live();
    assert_eq!((live.reservations, live.handles, live.mappings), (2, 0, 0));
    drop(pins);
    assert_eq!(watch.checked.live(), Live::default());
}

#[test]
fn a_slot_that_is_nobodys_is_not_pinned() {
    let (watch, cache) = world();
    let slot = request(&cache, 20);
    cache.retire(slot, IDLE).unwrap();
    assert_eq!(kind(cache.pin(slot)), ErrorKind::StaleSlot);
    let (_, other) = world();
    assert_eq!(kind(other.pin(slot)), ErrorKind::ForeignSlot);

    // A slot is busy while a step maps for it, and a pin that is dropped meanwhile is not forgotten.
    let slot = request(&cache, 20);
    let pin = Arc::new(parking_lot::Mutex::new(Some(cache.pin(slot).unwrap())));
    let cache = Arc::new(cache);
    let (its_pin, its_cache) = (Arc::clone(&pin), Arc::downgrade(&cache));
    watch.checked.on_call(Box::new(move |verb| {
        if verb == Verb::Create {
            // With no lock held but the right to move extents, which neither takes.
            let cache = its_cache.upgrade().unwrap();
            assert_eq!(kind(cache.pin(slot)), ErrorKind::SlotBusy);
            its_pin.lock().take();
        }
    }));
    step(&cache, slot, 200).unwrap();
    watch.checked.clear_on_call();
    assert!(pin.lock().is_none() && cache.bytes().pinned.is_zero());
    cache.report().unwrap();
    cache.retire(slot, IDLE).unwrap();
    assert_eq!(cache.bytes().mapped, Bytes::ZERO);
    cache.report().unwrap();
}

#[test]
fn a_slot_beside_one_that_grows_may_lose_its_pin_meanwhile() {
    let (watch, cache) = world();
    let (still, grows) = (request(&cache, 20), request(&cache, 20));
    step(&cache, still, 80).unwrap();
    let pin = Arc::new(parking_lot::Mutex::new(Some(cache.pin(still).unwrap())));
    let pinned = cache.bytes().pinned;
    cache.truncate(still, tokens(10), IDLE).unwrap();
    let its_pin = Arc::clone(&pin);
    watch.checked.on_call(Box::new(move |verb| {
        if verb == Verb::Create {
            its_pin.lock().take();
        }
    }));
    // 30 is within what its pin keeps, so that its own runs are not looked at.
    cache.step(&[SlotTokens::new(still, tokens(30)), SlotTokens::new(grows, tokens(300))]).unwrap();
    watch.checked.clear_on_call();
    assert!(pin.lock().is_none());
    let report = cache.report().unwrap();
    let told = report.slots.iter().find(|slot| slot.index == still.index()).unwrap();
    assert!(told.mapped < pinned, "{told:?} needs no more than its tokens do");
    contents::fill(&cache, still, 1, 0..30);
    cache.trim(Bytes::ZERO, IDLE).unwrap();
    contents::find(&cache, still, 1, 30);
}

#[test]
fn a_request_that_adopts_pinned_memory_is_mapped_ahead_for() {
    let (_watch, cache) = rig::cache_of(&rig::shape(), |builder| builder.look_ahead(tokens(32)));
    let slot = request(&cache, 64);
    let pin = cache.pin(slot).unwrap();
    cache.retire(slot, IDLE).unwrap();
    cache.trim(Bytes::ZERO, IDLE).unwrap();
    cache.flush().unwrap();
    let next = cache.acquire(tokens(64), None).unwrap();
    assert_eq!((next.index(), cache.bytes().held), (slot.index(), pin.bytes()));
    step(&cache, next, 60).unwrap();
    cache.flush().unwrap();
    assert!(cache.snapshot().events.mapped_ahead > 0, "its first step is one, though all of it was there");
}

#[test]
fn what_a_pin_kept_waits_for_the_slots_fences() {
    let (watch, cache) = world();
    let slot = request(&cache, 40);
    let pin = cache.pin(slot).unwrap();
    watch.hold(ONE);
    cache.retire(slot, &[Fence::Stream(ONE)]).unwrap();
    watch.used_by(&cache, slot.index(), ONE);
    drop(pin);
    let held = cache.bytes().held;
    let late = watch.clone();
    watch.checked.on_call(Box::new(move |verb| {
        if verb == Verb::WaitEvent {
            late.fire(ONE);
        }
    }));
    cache.trim(Bytes::ZERO, IDLE).unwrap();
    assert!(cache.bytes().held < held);
    assert_eq!(watch.violations(), Vec::<String>::new());
    // It holds the driver that holds it.
    watch.checked.clear_on_call();
}

#[test]
fn the_last_pin_of_a_dropped_cache_waits_for_fences() {
    let (watch, cache) = world();
    let slots = [request(&cache, 40), request(&cache, 40)];
    let pins = slots.map(|slot| cache.pin(slot).unwrap());
    let late = watch.clone();
    watch.checked.on_call(Box::new(move |verb| {
        if verb == Verb::WaitEvent {
            late.fire(ONE);
        }
    }));
    watch.hold(ONE);
    for slot in slots {
        cache.retire(slot, &[Fence::Stream(ONE)]).unwrap();
        watch.used_by(&cache, slot.index(), ONE);
    }
    drop(cache);
    let [first, second] = pins;
    let both = watch.checked.live().bytes;
    assert_eq!(both, first.bytes() + second.bytes());
    let bytes = second.bytes();
    drop(first);
    assert_eq!(watch.checked.live().bytes, bytes, "what one keeps goes before the other");
    drop(second);
    assert_eq!(watch.checked.live(), Live::default());
    assert_eq!(watch.violations(), Vec::<String>::new());
    // It holds the driver that holds it.
    watch.checked.clear_on_call();
}

#[test]
fn a_trim_under_way_holds_up_the_pins_of_a_dropped_cache_though_a_wait_failed() {
    let (watch, cache) = rig::cache_of(&rig::shape(), |builder| builder);
    let slots = [request(&cache, 40), request(&cache, 40)];
    let pins = slots.map(|slot| cache.pin(slot).unwrap());
    watch.hold(ONE);
    for slot in slots {
        cache.retire(slot, IDLE).unwrap();
        watch.used_by(&cache, slot.index(), ONE);
    }
    cache.trim(Bytes::ZERO, &[Fence::Stream(ONE)]).unwrap();
    watch.checked.fail_call_of(Verb::WaitEvent, 1, ErrorKind::Driver);
    drop(cache);
    assert_eq!(watch.checked.injected(), 1);
    let late = watch.clone();
    watch.checked.on_call(Box::new(move |verb| {
        if verb == Verb::WaitEvent {
            late.fire(ONE);
        }
    }));
    drop(pins);
    assert_eq!(watch.checked.live(), Live::default());
    assert_eq!(watch.violations(), Vec::<String>::new());
    // It holds the driver that holds it.
    watch.checked.clear_on_call();
}

#[test]
fn what_is_given_up_goes_at_once_where_that_is_the_option() {
    for background in [Background::Off, Background::Thread] {
        let shape = Shape { background, ..shape() };
        let (_watch, cache) = rig::cache_of(&shape, |builder| builder.reclaim(Reclaim::Eager));
        let slot = request(&cache, 40);
        let pin = cache.pin(slot).unwrap();
        cache.retire(slot, IDLE).unwrap();
        cache.flush().unwrap();
        assert_eq!((cache.bytes().mapped, cache.bytes().parked), (pin.bytes(), Bytes::ZERO));
        drop(pin);
        // Nobody calls the cache: the mapper was woken.
        let began = std::time::Instant::now();
        while !cache.bytes().parked.is_zero() || !cache.bytes().mapped.is_zero() {
            assert!(began.elapsed().as_secs() < 60, "{background:?}: {:?}", cache.bytes());
            std::thread::yield_now();
        }
        cache.report().unwrap();
    }
}

#[test]
fn what_a_pin_gives_up_while_its_slot_is_busy_goes_at_once_as_well() {
    let eager = || rig::cache_of(&shape(), |builder| builder.reclaim(Reclaim::Eager));
    let drop_at = |watch: &Watch, verb, pin| {
        let (pin, late) = (parking_lot::Mutex::new(Some(pin)), watch.clone());
        watch.checked.on_call(Box::new(move |called| {
            if called == verb {
                pin.lock().take();
                late.fire(ONE);
            }
        }));
    };
    let (watch, cache) = eager();
    let (still, grows) = (request(&cache, 20), request(&cache, 20));
    step(&cache, still, 80).unwrap();
    drop_at(&watch, Verb::Create, cache.pin(still).unwrap());
    cache.truncate(still, tokens(10), IDLE).unwrap();
    cache.step(&[SlotTokens::new(still, tokens(30)), SlotTokens::new(grows, tokens(300))]).unwrap();
    let report = cache.report().unwrap();
    let told = report.slots.iter().find(|slot| slot.index == still.index()).unwrap();
    assert_eq!((told.backed, report.snapshot.pins), (told.mapped, 0), "{told:?}");
    watch.checked.clear_on_call();

    let (watch, cache) = eager();
    let slot = request(&cache, 80);
    drop_at(&watch, Verb::WaitEvent, cache.pin(slot).unwrap());
    watch.hold(ONE);
    cache.retire(slot, &[Fence::Stream(ONE)]).unwrap();
    let next = cache.acquire(tokens(80), None).unwrap();
    assert_eq!((next.index(), cache.snapshot().pins), (slot.index(), 0));
    assert_eq!((cache.bytes().mapped, cache.bytes().parked), (Bytes::ZERO, Bytes::ZERO));
    // It holds the driver that holds it.
    watch.checked.clear_on_call();
}

/// Every call of the driver that dropping a pin, or a cache under pins, comes to is refused once.
#[test]
fn a_driver_that_refuses_loses_nothing_but_what_it_keeps() {
    let scene = || {
        let (watch, cache) = rig::cache_of(&shape(), |builder| builder.reclaim(Reclaim::Eager));
        watch.fire_when_waited_for();
        let slots = [request(&cache, 40), request(&cache, 70)];
        slots.iter().for_each(|slot| step(&cache, *slot, 150).unwrap());
        let pins = slots.map(|slot| cache.pin(slot).unwrap());
        for slot in slots {
            cache.retire(slot, &[Fence::Stream(ONE)]).unwrap();
        }
        (watch, cache, pins)
    };
    let mut injected = 0;
    for nth in 1.. {
        let (watch, cache, [first, second]) = scene();
        watch.checked.fail_call(nth, ErrorKind::Driver);
        drop(first);
        let failed = watch.checked.injected() > 0;
        watch.checked.clear_faults();
        cache.report().unwrap();
        assert_eq!(cache.health(), Health::Healthy);
        assert_eq!(cache.bytes().pinned, second.bytes());
        cache.trim(Bytes::ZERO, IDLE).unwrap();
        assert_eq!((cache.bytes().held, cache.health()), (second.bytes(), Health::Healthy));
        drop((cache, second));
        let live = watch.checked.live();
        assert_eq!(Live { events: 0, ..live }, Live::default());
        injected += u64::from(failed);
        if !failed {
            break;
        }
    }
    assert!(injected > 4, "{injected} calls were refused");

    let mut injected = 0;
    for nth in 1.. {
        let (watch, cache, [first, second]) = scene();
        let slot = request(&cache, 100);
        let byte = keys(&cache, slot);
        let pin = cache.pin(slot).unwrap();
        watch.checked.fail_call(nth, ErrorKind::Driver);
        drop(first);
        drop(cache);
        let failed = watch.checked.injected() > 0;
        watch.checked.clear_faults();
        read(byte);
        drop((second, pin));
        let live = watch.checked.live();
        assert_eq!(Live { events: 0, ..live }, Live::default(), "after the {nth}th call");
        injected += u64::from(failed);
        if !failed {
            break;
        }
    }
    assert!(injected > 8, "{injected} calls were refused");
}

#[test]
fn a_panic_in_the_driver_fails_the_cache_and_not_whoever_drops_a_pin() {
    for is_closed in [false, true] {
        let (watch, cache) = rig::cache_of(&shape(), |builder| builder.reclaim(Reclaim::Eager));
        let slots = [request(&cache, 40), request(&cache, 40)];
        let [first, second] = slots.map(|slot| cache.pin(slot).unwrap());
        slots.iter().for_each(|slot| cache.retire(*slot, IDLE).unwrap());
        let cache = (!is_closed).then_some(cache);
        watch.checked.on_call(Box::new(|verb| assert!(verb != Verb::Unmap, "a defect of the driver")));
        drop(first);
        watch.checked.clear_on_call();
        if let Some(cache) = &cache {
            assert_eq!(cache.health(), Health::Failed);
            let error = cache.trim(Bytes::ZERO, IDLE).unwrap_err();
            assert!(error.report().contains("dropping a pin panicked: a defect"), "{}", error.report());
        }
        let calls = watch.checked.calls().total();
        drop(second);
        assert_eq!(watch.checked.calls().total() > calls, is_closed, "the last pin ends the cache, no other");
    }
}
