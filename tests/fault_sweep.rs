//! What is left of an operation when the driver refuses its n-th call, for every n?
//!
//! The state from before, books that agree, and an operation that succeeds the next time. After a
//! drop nothing is left at the driver. A sweep that injects nothing is a failure itself.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]
#![allow(unsafe_code, reason = "writes and reads through addresses")]

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;

use common::{Shape, Watch, contents, shapes, step, stream, tokens};
use vattn::driver::checked::Checked;
use vattn::driver::{Live, Stream};
use vattn::error::{ErrorKind, Verb};
use vattn::units::Bytes;
use vattn::{Fence, Health, KvCache, Pin, Result, SlotId, SlotTokens};

const KINDS: [ErrorKind; 4] =
    [ErrorKind::Driver, ErrorKind::OutOfDeviceMemory, ErrorKind::OutOfMappings, ErrorKind::DeviceLost];
const ONE: Stream = stream(1);
const TWO: Stream = stream(2);

/// A cache with two requests under way, and memory of two that are done.
struct Scene {
    watch: Watch,
    cache: KvCache,
    /// Slots with tokens that hold a pattern: of the number of tokens they start with.
    written: BTreeMap<u64, (SlotId, u64)>,
    /// A third request, without tokens.
    fresh: SlotId,
    /// Behind the cache, which is dropped before them.
    pins: Vec<Pin>,
}

/// What a caller can see.
#[derive(PartialEq, Debug)]
struct Visible {
    slots: Vec<(u32, u64)>,
    keys: u64,
    budget: Bytes,
}

impl Scene {
    fn new() -> Self {
        let shape = Shape { budget: 400, ..shapes::sliced() };
        let watch = shape.watch();
        watch.fire_when_waited_for();
        let cache = shape.cache(&watch);
        let mut given = [100, 60, 150, 40].map(|count| {
            let slot = cache.acquire(tokens(count), None).unwrap();
            step(&cache, slot, count).unwrap();
            (slot, count)
        });
        let [first, second, third, fourth] = &mut given;
        // The first has grown, so that it has extents of several sizes.
        first.1 = 110;
        step(&cache, first.0, first.1).unwrap();
        cache.retire(third.0, &[Fence::Stream(ONE)]).unwrap();
        cache.retire(fourth.0, &[Fence::Idle]).unwrap();
        let fresh = {
            // An empty slot, not a parked one: parked memory is adopted by whoever asks for some.
            let parked = [cache.acquire(tokens(150), Some(ONE)), cache.acquire(tokens(40), Some(ONE))];
            let fresh = cache.acquire(tokens(1), None).unwrap();
            for slot in parked {
                cache.retire(slot.unwrap(), &[Fence::Stream(ONE)]).unwrap();
            }
            fresh
        };
        let written = BTreeMap::from([(1, *first), (2, *second)]);
        for (owner, (slot, count)) in &written {
            contents::fill(&cache, *slot, *owner, 0..*count);
        }
        Self { watch, cache, written, fresh, pins: Vec::new() }
    }

    /// With parked memory only to take: nothing is free and no more may be held.
    fn tight() -> Self {
        let scene = Self::new();
        scene.cache.set_budget(scene.cache.bytes().held).unwrap();
        scene
    }

    /// With memory that is free in extents of other sizes than are asked for.
    fn of_wrong_sizes() -> Self {
        let scene = Self::new();
        scene.cache.reclaim(Bytes::gib(1), &[Fence::Idle]).unwrap();
        scene.cache.set_budget(scene.cache.bytes().held).unwrap();
        scene
    }

    /// With nothing but what is in use.
    fn trimmed() -> Self {
        let scene = Self::new();
        scene.cache.trim(Bytes::ZERO, &[Fence::Idle]).unwrap();
        scene
    }

    /// The fresh slot has adopted an extent that reaches far beyond what it will need.
    fn overshooting() -> Self {
        let scene = Self::new();
        let adopted = scene.cache.acquire(tokens(150), Some(ONE)).unwrap();
        let bytes = scene.cache.bytes();
        scene.cache.set_budget(bytes.mapped + bytes.parked).unwrap();
        Self { fresh: adopted, ..scene }
    }

    /// The fresh slot has adopted memory that is pinned, and nothing else is there to take but parked memory.
    fn pinned() -> Self {
        let scene = Self::new();
        let slot = scene.cache.acquire(tokens(40), Some(ONE)).unwrap();
        step(&scene.cache, slot, 40).unwrap();
        let pins = vec![scene.cache.pin(slot).unwrap()];
        scene.cache.retire(slot, &[Fence::Stream(ONE)]).unwrap();
        let adopted = scene.cache.acquire(tokens(40), Some(ONE)).unwrap();
        assert_eq!(adopted.index(), slot.index());
        scene.cache.set_budget(scene.cache.bytes().held).unwrap();
        Self { fresh: adopted, pins, ..scene }
    }

    fn granules(&self, count: u64) -> Bytes {
        self.cache.layout().granule().bytes() * count
    }

    fn slot(&self, owner: u64) -> SlotId {
        self.written[&owner].0
    }

    fn visible(&self) -> Visible {
        let report = self.cache.report().unwrap();
        let active = report.slots.iter().filter(|slot| slot.active);
        Visible {
            slots: active.map(|slot| (slot.index, slot.tokens.get())).collect(),
            keys: self.cache.view(0, vattn::Part::Key).unwrap().addr.get(),
            budget: self.cache.budget(),
        }
    }

    fn find(&self, but: Option<u64>) {
        for (owner, (slot, count)) in &self.written {
            if Some(*owner) != but {
                contents::find(&self.cache, *slot, *owner, *count);
            }
        }
    }

    fn checked(&self) -> Arc<Checked> {
        Arc::clone(&self.watch.checked)
    }

    /// Drops the cache and expects what the driver refused to take, events alone, to be all that is left.
    fn end(self, refused_before: u64) {
        let checked = self.checked();
        assert_eq!(self.watch.violations(), Vec::<String>::new());
        drop((self.cache, self.pins));
        assert_eq!(checked.live(), Live { events: refused_before, ..Live::default() });
    }
}

/// Fails every call of an operation once, in every way; returns how many failures there were.
///
/// `verbs` are calls that the operation is there to make. `loses` is an owner whose tokens it may
/// take away.
fn sweep(
    name: &str,
    verbs: &[Verb],
    scene: impl Fn() -> Scene,
    loses: Option<u64>,
    operation: impl Fn(&Scene) -> Result<()>,
) -> u64 {
    let mut injected = 0;
    for kind in KINDS {
        for nth in 1.. {
            let scene = scene();
            let before = scene.visible();
            let checked = scene.checked();
            checked.reset_counts();
            match kind {
                ErrorKind::DeviceLost => checked.lose_device_at(nth),
                _ => checked.fail_call(nth, kind),
            }
            let result = operation(&scene);
            let failures = checked.injected();
            if failures == 0 {
                result.unwrap_or_else(|error| panic!("{name} without a failure: {error}"));
                for verb in verbs {
                    assert!(checked.calls().of(*verb) > 0, "{name} makes no call of {verb}");
                }
                checked.clear_faults();
                scene.find(loses);
                scene.cache.report().unwrap();
                scene.end(0);
                break;
            }
            injected += 1;
            let what = format!("{name}, call {nth}, {kind}: {result:?}");
            scene.find(if result.is_ok() { loses } else { None });
            match &result {
                Err(error) => {
                    assert_eq!(error.kind(), kind, "{what}");
                    assert_eq!(scene.visible(), before, "{what}");
                }
                Ok(()) => drop(scene.cache.report().unwrap()),
            }
            if kind == ErrorKind::DeviceLost {
                if result.is_err() {
                    has_failed(&scene);
                }
                drop((scene.cache, scene.pins));
                checked.clear_faults();
                continue;
            }
            assert_eq!(scene.cache.health(), Health::Healthy, "{what}");
            checked.clear_faults();
            if result.is_err() {
                operation(&scene).unwrap_or_else(|error| panic!("{what}, and again: {error}"));
            }
            scene.find(loses);
            scene.cache.report().unwrap();
            let refused = scene.cache.snapshot().events.refused_drops;
            scene.end(refused);
        }
    }
    println!("{name}: {injected} failures");
    injected
}

/// A cache without a device refuses everything but to be read and dropped.
fn has_failed(scene: &Scene) {
    let cache = &scene.cache;
    let (slot, count) = scene.written[&1];
    assert_eq!(cache.health(), Health::Failed);
    let idle = &[Fence::Idle];
    let refused = [
        cache.acquire(tokens(1), None).map(drop),
        step(cache, slot, count),
        step(cache, slot, count + 80),
        cache.retire(slot, idle),
        cache.truncate(slot, tokens(0), idle),
        cache.reclaim(Bytes::gib(1), idle).map(drop),
        cache.trim(Bytes::ZERO, idle).map(drop),
        cache.set_budget(Bytes::gib(1)),
    ];
    for (place, result) in refused.into_iter().enumerate() {
        assert_eq!(result.map_err(|error| error.kind()), Err(ErrorKind::Unhealthy), "call {place}");
    }
    cache.fits(&[SlotTokens::new(slot, tokens(count))]).unwrap();
    cache.report().unwrap();
}

#[test]
fn steps() {
    let maps = &[Verb::Map, Verb::SetAccess];
    let moves = &[Verb::Map, Verb::SetAccess, Verb::Unmap];
    let resizes = &[Verb::Create, Verb::Map, Verb::SetAccess, Verb::Release];
    let injected = sweep("a prompt", maps, Scene::trimmed, None, |scene| step(&scene.cache, scene.fresh, 77))
        + sweep("growth", maps, Scene::trimmed, None, |scene| step(&scene.cache, scene.slot(1), 200))
        + sweep("two slots", maps, Scene::trimmed, None, |scene| {
            let entries = [(scene.fresh, 50), (scene.slot(2), 100)];
            scene.cache.step(&entries.map(|(slot, count)| SlotTokens::new(slot, tokens(count))))
        })
        + sweep("growth that reclaims", moves, Scene::tight, None, |scene| {
            step(&scene.cache, scene.slot(1), 200)
        })
        + sweep("growth that resizes", resizes, Scene::of_wrong_sizes, None, |scene| {
            step(&scene.cache, scene.slot(2), 200)
        })
        + sweep("a prompt in less than was adopted", moves, Scene::overshooting, None, |scene| {
            step(&scene.cache, scene.fresh, 20)
        })
        + sweep("growth beyond what is pinned", moves, Scene::pinned, None, |scene| {
            step(&scene.cache, scene.fresh, 200)
        });
    assert!(injected >= 200, "{injected} failures");
}

#[test]
fn lives_of_slots() {
    let injected =
        sweep("adoption on another stream", &[Verb::StreamWait], Scene::new, None, |scene| {
            scene.cache.acquire(tokens(150), Some(TWO)).map(drop)
        }) + sweep("adoption on no stream", &[Verb::WaitEvent], Scene::new, None, |scene| {
            scene.cache.acquire(tokens(150), None).map(drop)
        }) + sweep("retiring after a stream", &[Verb::RecordEvent], Scene::new, Some(1), |scene| {
            scene.cache.retire(scene.slot(1), &[Fence::Stream(TWO)])
        }) + sweep("retiring after two streams", &[Verb::RecordEvent], Scene::new, Some(1), |scene| {
            scene.cache.retire(scene.slot(1), &[Fence::Stream(ONE), Fence::Stream(TWO)])
        }) + sweep("truncating after a stream", &[Verb::RecordEvent], Scene::new, Some(1), |scene| {
            scene.cache.truncate(scene.slot(1), tokens(30), &[Fence::Stream(TWO)])
        });
    assert!(injected >= 20, "{injected} failures");
}

#[test]
fn a_fence_of_the_callers() {
    for kind in KINDS {
        let scene = Scene::new();
        let before = scene.visible();
        let (fence, event) = scene.watch.foreign(TWO);
        scene.watch.checked.fail_call_of(Verb::FollowEvent, 1, kind);
        let error = scene.cache.retire(scene.slot(1), &[fence]).unwrap_err();
        assert_eq!((error.kind(), scene.visible()), (kind, before));
        scene.find(None);
        if kind != ErrorKind::DeviceLost {
            scene.cache.retire(scene.slot(1), &[fence]).unwrap();
        }
        scene.watch.destroy(event);
        scene.end(0);
    }
}

#[test]
fn giving_memory_up() {
    let fences = &[Fence::Stream(TWO)];
    let both = &[Verb::Unmap, Verb::Release];
    let injected = sweep("reclaiming", &[Verb::Unmap], Scene::new, None, |scene| {
        scene.cache.reclaim(Bytes::gib(1), fences).map(drop)
    }) + sweep("trimming", both, Scene::new, None, |scene| {
        scene.cache.trim(Bytes::ZERO, fences).map(drop)
    }) + sweep("a smaller budget", both, Scene::new, None, |scene| {
        scene.cache.set_budget(scene.cache.bytes().mapped)
    });
    assert!(injected >= 60, "{injected} failures");
}

#[test]
fn creation() {
    let mut injected = 0;
    for shape in [shapes::committed(), shapes::small_slots(), shapes::per_layer()] {
        for kind in KINDS {
            for nth in 1.. {
                let watch = shape.watch();
                match kind {
                    ErrorKind::DeviceLost => watch.checked.lose_device_at(nth),
                    _ => watch.checked.fail_call(nth, kind),
                }
                let result = KvCache::new(shape.config(), watch.driver());
                let failures = watch.checked.injected();
                watch.checked.clear_faults();
                match result {
                    Ok(cache) if failures == 0 => {
                        cache.report().unwrap();
                        drop(cache);
                        assert_eq!(watch.checked.live(), Live::default());
                        break;
                    }
                    // A step that backs the spare slot asks again when the device has no memory.
                    Ok(cache) => assert_eq!(cache.health(), Health::Healthy, "{kind} at call {nth}"),
                    Err(error) => assert_eq!(error.kind(), kind, "{}, call {nth}: {error}", shape.name),
                }
                injected += 1;
                if kind != ErrorKind::DeviceLost {
                    assert_eq!(watch.checked.live(), Live::default(), "{}, {kind} at call {nth}", shape.name);
                }
            }
        }
    }
    assert!(injected >= 60, "{injected} failures");
}

#[test]
fn drop_in_any_state() {
    let mut injected = 0;
    for kind in KINDS {
        for nth in 1.. {
            let scene = Scene::new();
            let checked = scene.checked();
            match kind {
                ErrorKind::DeviceLost => checked.lose_device_at(nth),
                _ => checked.fail_call(nth, kind),
            }
            drop((scene.cache, scene.pins));
            if checked.injected() == 0 {
                assert_eq!(checked.live(), Live::default());
                break;
            }
            injected += 1;
            checked.clear_faults();
            if kind == ErrorKind::DeviceLost {
                continue;
            }
            // Only what was refused is left: an event, a handle, addresses, or a mapping and the addresses
            // it lies in.
            let live = checked.live();
            assert!(
                live.reservations <= 1 && live.mappings <= 1 && live.handles <= 1,
                "call {nth}: {live:?}"
            );
            assert!(
                live.events + live.handles + live.reservations.max(live.mappings) <= 1,
                "call {nth}: {live:?}"
            );
        }
    }
    assert!(injected >= 60, "{injected} failures");
}

/// The n-th call fails, and then the driver will not undo either.
fn double_faults(name: &str, scene: impl Fn() -> Scene, operation: impl Fn(&Scene) -> Result<()>) -> u64 {
    let mut degraded = 0;
    for nth in 1.. {
        let scene = scene();
        let before = scene.visible();
        let checked = scene.checked();
        checked.fail_call(nth, ErrorKind::Driver);
        checked.fail_from_of(Verb::Unmap, 1, ErrorKind::Driver);
        let result = operation(&scene);
        let failed = result.is_err();
        let quarantined = scene.cache.bytes().quarantined;
        scene.find(None);
        let report = scene.cache.report().unwrap();
        let expected = if quarantined.is_zero() { Health::Healthy } else { Health::Degraded };
        assert_eq!((scene.cache.health(), report.health), (expected, expected), "{name}, call {nth}");
        let bytes = scene.cache.bytes();
        assert_eq!(bytes.held, bytes.mapped + bytes.parked + bytes.free + bytes.quarantined);
        assert_eq!(bytes.held, checked.live().bytes);
        if failed {
            assert_eq!(scene.visible(), before, "{name}, call {nth}");
        }
        if expected == Health::Degraded {
            degraded += 1;
            // Everything else works.
            let cache = &scene.cache;
            step(cache, scene.slot(2), 60).unwrap();
            let other = cache.acquire(tokens(1), Some(ONE)).unwrap();
            cache.truncate(scene.slot(2), tokens(60), &[Fence::Stream(ONE)]).unwrap();
            cache.retire(other, &[Fence::Stream(ONE)]).unwrap();
            cache.set_budget(cache.bytes().budget + scene.granules(256)).unwrap();
            assert!(cache.fits(&[SlotTokens::new(scene.slot(2), tokens(300))]).unwrap()[0]);
            step(cache, scene.slot(2), 300).unwrap();
            cache.report().unwrap();
            assert_eq!((cache.health(), cache.bytes().quarantined), (Health::Degraded, quarantined));
            scene.find(None);
        }
        checked.clear_faults();
        if failed {
            operation(&scene).unwrap();
        }
        assert_eq!(scene.cache.health(), Health::Healthy, "{name}, call {nth}: it heals");
        assert_eq!(scene.cache.bytes().quarantined, Bytes::ZERO);
        scene.find(None);
        scene.cache.report().unwrap();
        let refused = scene.cache.snapshot().events.refused_drops;
        scene.end(refused);
        if !failed && nth > 3 {
            break;
        }
    }
    println!("{name}: {degraded} times degraded");
    degraded
}

#[test]
fn undoing_fails_too() {
    let degraded = double_faults("a prompt", Scene::trimmed, |scene| step(&scene.cache, scene.fresh, 77))
        + double_faults("growth", Scene::trimmed, |scene| step(&scene.cache, scene.slot(1), 200))
        + double_faults("growth from free memory", Scene::of_wrong_sizes, |scene| {
            step(&scene.cache, scene.slot(1), 200)
        });
    assert!(degraded >= 10, "{degraded} times degraded");
}

#[test]
fn quarantined_memory_outlives_its_request() {
    let scene = Scene::trimmed();
    scene.watch.checked.fail_call_of(Verb::SetAccess, 2, ErrorKind::Driver);
    scene.watch.checked.fail_from_of(Verb::Unmap, 1, ErrorKind::Driver);
    step(&scene.cache, scene.fresh, 77).unwrap_err();
    let quarantined = scene.cache.bytes().quarantined;
    assert!(!quarantined.is_zero());
    scene.cache.retire(scene.fresh, &[Fence::Idle]).unwrap();
    scene.cache.report().unwrap();
    scene.watch.checked.clear_faults();
    // Whoever is given the slot next clears it.
    let next = loop {
        let slot = scene.cache.acquire(tokens(1), None).unwrap();
        if slot.index() == scene.fresh.index() {
            break slot;
        }
    };
    step(&scene.cache, next, 77).unwrap();
    assert_eq!((scene.cache.health(), scene.cache.bytes().quarantined), (Health::Healthy, Bytes::ZERO));
    scene.find(None);
    scene.end(0);
}

#[test]
fn a_device_with_less_than_the_budget() {
    let shape = Shape { budget: 400, device_has: Some(64), ..shapes::sliced() };
    let watch = shape.watch();
    let cache = shape.cache(&watch);
    // 32 granules of each tensor are 256 tokens.
    let first = cache.acquire(tokens(128), None).unwrap();
    step(&cache, first, 128).unwrap();
    let second = cache.acquire(tokens(96), None).unwrap();
    step(&cache, second, 96).unwrap();
    cache.retire(second, &[Fence::Idle]).unwrap();
    contents::fill(&cache, first, 1, 0..128);
    let third = cache.acquire(tokens(1), None).unwrap();
    step(&cache, third, 120).unwrap();
    contents::find(&cache, first, 1, 128);
    let before = cache.report().unwrap().slots;
    let error = step(&cache, first, 160).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfDeviceMemory, "{error}");
    assert!(error.report().contains("free memory on the device"), "{}", error.report());
    assert!(error.report().contains("can't be created"), "the device's own words: {}", error.report());
    let after = cache.report().unwrap();
    let active = |slots: &[vattn::cache::SlotReport]| -> Vec<_> {
        slots.iter().filter(|slot| slot.active).map(|slot| (slot.index, slot.tokens)).collect()
    };
    assert_eq!(active(&after.slots), active(&before));
    contents::find(&cache, first, 1, 128);
    cache.retire(third, &[Fence::Idle]).unwrap();
    step(&cache, first, 250).unwrap();
    contents::find(&cache, first, 1, 128);
    drop(cache);
    assert_eq!(watch.checked.live(), Live::default());
}

#[test]
fn a_device_that_gets_memory_back_is_asked_again() {
    let shape = Shape { budget: 400, ..shapes::sliced() };
    let watch = shape.watch();
    let cache = shape.cache(&watch);
    let slot = cache.acquire(tokens(1), None).unwrap();
    // Another program takes all memory, and then gives it back.
    watch.checked.fail_from_of(Verb::Create, 1, ErrorKind::OutOfDeviceMemory);
    assert_eq!(step(&cache, slot, 100).unwrap_err().kind(), ErrorKind::OutOfDeviceMemory);
    watch.checked.clear_faults();
    step(&cache, slot, 100).unwrap();
}

#[test]
fn giving_memory_up_tries_quarantined_memory_again() {
    let give_up: [fn(&KvCache); 3] = [
        |cache| _ = cache.trim(Bytes::ZERO, &[Fence::Idle]).unwrap(),
        |cache| _ = cache.reclaim(Bytes::mib(1), &[Fence::Idle]).unwrap(),
        |cache| cache.set_budget(cache.budget()).unwrap(),
    ];
    for give_up in give_up {
        let scene = Scene::trimmed();
        scene.watch.checked.fail_call_of(Verb::SetAccess, 2, ErrorKind::Driver);
        scene.watch.checked.fail_from_of(Verb::Unmap, 1, ErrorKind::Driver);
        step(&scene.cache, scene.fresh, 77).unwrap_err();
        assert_eq!(scene.cache.health(), Health::Degraded);
        scene.watch.checked.clear_faults();
        give_up(&scene.cache);
        assert_eq!((scene.cache.health(), scene.cache.bytes().quarantined), (Health::Healthy, Bytes::ZERO));
        scene.find(None);
        scene.end(0);
    }
}

#[test]
fn a_device_that_is_lost_while_memory_is_given_up_is_noticed() {
    let mut nothing_to_report = 0;
    for nth in 1.. {
        let scene = Scene::new();
        scene.cache.retire(scene.slot(1), &[Fence::Idle]).unwrap();
        scene.watch.checked.lose_device_at(nth);
        // What the device took with it counts as given back, so a trim may well succeed.
        match scene.cache.trim(Bytes::ZERO, &[Fence::Idle]) {
            Ok(_) => nothing_to_report += 1,
            Err(error) => assert_eq!(error.kind(), ErrorKind::DeviceLost, "{error}"),
        }
        if scene.watch.checked.injected() == 0 {
            nothing_to_report -= 1;
            break;
        }
        assert_eq!(scene.cache.health(), Health::Failed, "call {nth}");
        assert_eq!(step(&scene.cache, scene.slot(2), 60).unwrap_err().kind(), ErrorKind::Unhealthy);
    }
    assert!(nothing_to_report > 0, "the case that this test is for");
}
