//! Is what a buffer says is committed backed, with its contents, whatever is committed and decommitted, and
//! whichever of the driver's calls fails?
//!
//! Against a plain model, byte by byte; with the n-th call failing, for every n; on a card where there is one.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]
#![allow(unsafe_code, reason = "writes and reads through addresses")]

mod common;

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use common::contents::pointer;
use common::stream;
use proptest::prelude::*;
use vattn::driver::Live;
use vattn::driver::checked::{Checked, CheckedOptions};
use vattn::driver::host::{Host, HostOptions};
use vattn::driver::ledger::{Ledger, LedgerOptions};
use vattn::error::{ErrorKind, Verb};
use vattn::units::Bytes;
use vattn::{Buffer, BufferOptions, Fence, Result};

const GRANULE: u64 = 4096;
const IDLE: &[Fence] = &[Fence::Idle];
const KINDS: [ErrorKind; 4] =
    [ErrorKind::Driver, ErrorKind::OutOfDeviceMemory, ErrorKind::OutOfMappings, ErrorKind::DeviceLost];

fn bytes(count: u64) -> Bytes {
    Bytes::new(count)
}

fn granules(count: u64) -> Bytes {
    bytes(count * GRANULE)
}

/// A buffer over a checked host driver.
struct Scene {
    buffer: Buffer,
    checked: Arc<Checked>,
    host: Arc<Host>,
}

impl Scene {
    fn new(size: u64, largest: u64) -> Self {
        let host = Host::new(HostOptions::new(bytes(GRANULE), Bytes::mib(4))).unwrap();
        let checked = Checked::new(host.clone(), CheckedOptions::TEST);
        let options = BufferOptions { size: granules(size), largest_extent: Some(granules(largest)) };
        let buffer = Buffer::new(checked.clone(), options).unwrap();
        Self { buffer, checked, host }
    }

    /// Sixteen granules of which 0 to 10 lie in extents of 4, 4 and 2, and 12.5 to 14 in two of 1.
    fn with_contents() -> Self {
        let scene = Self::new(16, 4);
        scene.buffer.commit(Bytes::ZERO, granules(10)).unwrap();
        scene.buffer.commit(bytes(GRANULE * 25 / 2), bytes(GRANULE * 3 / 2)).unwrap();
        scene.write(0..10 * GRANULE);
        scene.write(GRANULE * 25 / 2..14 * GRANULE);
        scene
    }

    fn write(&self, range: Range<u64>) {
        for at in range {
            // SAFETY: the byte was committed.
            unsafe { pointer(self.buffer.addr() + bytes(at)).write(pattern(at)) };
        }
    }

    #[track_caller]
    fn find(&self, range: Range<u64>) {
        for at in range {
            // SAFETY: the byte was committed.
            let byte = unsafe { pointer(self.buffer.addr() + bytes(at)).read() };
            assert_eq!(byte, pattern(at), "at {at}");
        }
    }

    /// What is committed, by granules' halves.
    fn committed(&self) -> Vec<bool> {
        let half = GRANULE / 2;
        let halves = 0..self.buffer.size().get() / half;
        halves.map(|at| self.buffer.is_committed(bytes(at * half), bytes(half))).collect()
    }

    /// Drops the buffer, and nothing is left.
    fn end(self) {
        drop(self.buffer);
        assert_eq!(self.checked.live(), Live::default());
        assert_eq!(self.host.live(), Live::default());
    }
}

fn pattern(at: u64) -> u8 {
    u8::try_from(at * 31 / 7 % 251).unwrap()
}

#[test]
fn rows_that_share_a_granule_do_not_take_it_from_each_other() {
    let scene = Scene::new(8, 8);
    let row = GRANULE * 3 / 2;
    scene.buffer.commit(bytes(0), bytes(row)).unwrap();
    scene.buffer.commit(bytes(row), bytes(row)).unwrap();
    assert_eq!((scene.buffer.committed(), scene.buffer.held()), (bytes(2 * row), granules(3)));
    scene.write(0..2 * row);
    scene.buffer.decommit(bytes(0), bytes(row), IDLE).unwrap();
    scene.find(row..2 * row);
    // The first two lie in one extent, of which the second granule is still wanted.
    assert_eq!((scene.buffer.committed(), scene.buffer.held()), (bytes(row), granules(3)));
    scene.buffer.commit(bytes(0), bytes(1)).unwrap();
    scene.buffer.decommit(bytes(row), bytes(row), IDLE).unwrap();
    assert_eq!(scene.buffer.held(), granules(2));
    scene.end();
}

#[test]
fn extents_are_the_largest_that_fit_and_what_is_backed_stays() {
    let scene = Scene::new(64, 16);
    let calls = |verb| scene.checked.calls().of(verb);
    scene.buffer.commit(granules(0), granules(64)).unwrap();
    assert_eq!((calls(Verb::Create), calls(Verb::Map), calls(Verb::SetAccess)), (4, 4, 4));
    scene.buffer.commit(granules(3), granules(40)).unwrap();
    scene.buffer.decommit(granules(1), granules(14), IDLE).unwrap();
    assert_eq!((calls(Verb::Create), calls(Verb::Unmap)), (4, 0), "no extent is needed, and none is empty");
    assert_eq!(scene.buffer.committed(), granules(50));
    scene.buffer.decommit(granules(0), granules(1), IDLE).unwrap();
    scene.buffer.decommit(granules(15), granules(1), IDLE).unwrap();
    assert_eq!((calls(Verb::Unmap), calls(Verb::Release)), (1, 1));
    assert_eq!(scene.buffer.held(), granules(48));
    // From granule 3: 1, 4, 8, and 1 before the next.
    scene.buffer.commit(granules(3), granules(14)).unwrap();
    assert_eq!((calls(Verb::Create), scene.buffer.held()), (7, granules(61)));
    scene.end();
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let refused = |result: Result<()>, parts: &[&str]| {
        let error = result.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
        assert!(parts.iter().all(|part| error.to_string().contains(part)), "{error} does not say {parts:?}");
    };
    let scene = Scene::new(4, 4);
    let buffer = &scene.buffer;
    refused(buffer.commit(bytes(5), Bytes::ZERO), &["offset 5 bytes", "0 bytes"]);
    refused(buffer.commit(granules(3), bytes(GRANULE + 1)), &["4097 bytes", "offset 12 KiB", "16 KiB"]);
    refused(buffer.commit(bytes(u64::MAX), bytes(2)), &["reach beyond the buffer"]);
    refused(buffer.decommit(granules(4), bytes(1), IDLE), &["reach beyond the buffer"]);
    refused(buffer.decommit(Bytes::ZERO, Bytes::ZERO, IDLE), &["at least one"]);
    refused(buffer.decommit(Bytes::ZERO, bytes(1), &[]), &["no fence"]);
    assert!(!buffer.is_committed(bytes(u64::MAX), bytes(2)) && !buffer.is_committed(bytes(0), bytes(0)));
    let made = |size, largest| {
        let options = BufferOptions { size, largest_extent: largest };
        Buffer::new(scene.checked.clone(), options).map(drop)
    };
    refused(made(Bytes::ZERO, None), &["0 bytes", "granule of 4 KiB"]);
    refused(made(bytes(u64::MAX), None), &["2^64"]);
    refused(made(granules(1), Some(bytes(GRANULE / 2))), &["2 KiB", "4 KiB"]);
    refused(made(granules(1), Some(bytes(GRANULE * 3))), &["12 KiB", "power of two"]);
    made(bytes(1), Some(bytes(1 << 63))).unwrap();
    scene.end();
}

#[test]
fn more_than_the_device_has_is_refused_before_any_is_taken() {
    let options = LedgerOptions { granule: Bytes::mib(2), capacity: Bytes::gib(80), addresses: None };
    let checked = Checked::new(Ledger::new(options).unwrap(), CheckedOptions::TEST);
    let buffer = Buffer::new(checked.clone(), BufferOptions::new(Bytes::gib(1 << 16))).unwrap();
    buffer.commit(Bytes::ZERO, Bytes::gib(20)).unwrap();
    let created = checked.calls().of(Verb::Create);
    let error = buffer.commit(Bytes::ZERO, Bytes::gib(81)).unwrap_err();
    assert_eq!((error.kind(), checked.calls().of(Verb::Create)), (ErrorKind::OutOfDeviceMemory, created));
    assert!(
        error.report().contains("61 GiB") && error.report().contains("80 GiB in all"),
        "{}",
        error.report()
    );
    buffer.commit(Bytes::gib(100), Bytes::gib(60)).unwrap();
    assert_eq!(buffer.held(), Bytes::gib(80));
}

#[test]
fn decommit_waits_for_the_fences_and_holds_nobody_up_meanwhile() {
    let scene = Scene::with_contents();
    let seven = stream(7);
    scene.host.hold(seven);
    std::thread::scope(|threads| {
        let waits =
            threads.spawn(|| scene.buffer.decommit(Bytes::ZERO, granules(10), &[Fence::Stream(seven)]));
        common::gate::until(|| scene.host.waiting() == 1);
        scene.buffer.commit(granules(15), granules(1)).unwrap();
        scene.find(0..10 * GRANULE);
        assert!(scene.buffer.is_committed(Bytes::ZERO, granules(10)));
        scene.host.fire(seven);
        waits.join().unwrap().unwrap();
    });
    assert_eq!(scene.buffer.held(), granules(3));
    scene.host.set_capturing(seven, true);
    let error = scene.buffer.decommit(granules(15), granules(1), &[Fence::Stream(seven)]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::CapturingStream);
    scene.host.set_capturing(seven, false);
    scene.end();
}

/// Fails every call of an operation once, in every way. It makes calls of those verbs, and takes the bytes
/// before `gone` away.
fn sweep(name: &str, verbs: &[Verb], gone: u64, operation: impl Fn(&Buffer) -> Result<()>) -> u64 {
    let mut injected = 0;
    for kind in KINDS {
        for nth in 1.. {
            let scene = Scene::with_contents();
            let (before, held) = (scene.committed(), scene.buffer.held());
            scene.checked.reset_counts();
            match kind {
                ErrorKind::DeviceLost => scene.checked.lose_device_at(nth),
                _ => scene.checked.fail_call(nth, kind),
            }
            let result = operation(&scene.buffer);
            let failures = scene.checked.injected();
            if kind == ErrorKind::DeviceLost && failures > 0 {
                // It has taken everything with it, and stays lost until the end.
                injected += 1;
                continue;
            }
            scene.checked.clear_faults();
            if failures == 0 {
                result.unwrap();
                verbs.iter().for_each(|verb| assert!(scene.checked.calls().of(*verb) > 0, "{name}: {verb}"));
                scene.end();
                break;
            }
            injected += 1;
            let what = format!("{name}, call {nth}, {kind}: {result:?}");
            scene.find(if result.is_ok() { gone } else { 0 }..10 * GRANULE);
            scene.find(GRANULE * 25 / 2..14 * GRANULE);
            if let Err(error) = &result {
                assert_eq!(error.kind(), kind, "{what}");
                assert_eq!((scene.committed(), scene.buffer.held()), (before, held), "{what}");
                operation(&scene.buffer).unwrap_or_else(|error| panic!("{what}, and again: {error}"));
            }
            scene.buffer.decommit(Bytes::ZERO, scene.buffer.size(), IDLE).unwrap();
            assert_eq!((scene.buffer.committed(), scene.buffer.held()), (Bytes::ZERO, Bytes::ZERO), "{what}");
            // An event that the driver would not destroy is all that may be left.
            let events = scene.checked.live().events;
            assert!(events == 0 || result.is_ok() && events == 1, "{what}");
            assert_eq!(scene.checked.live(), Live { reservations: 1, events, ..Live::default() }, "{what}");
            drop(scene.buffer);
            assert_eq!(scene.checked.live(), Live { events, ..Live::default() }, "{what}");
        }
    }
    injected
}

#[test]
fn a_call_that_fails_anywhere_has_changed_nothing() {
    let makes = &[Verb::Create, Verb::Map, Verb::SetAccess];
    let gives = &[Verb::Unmap, Verb::Release];
    let fence = &[Fence::Stream(stream(7))];
    let injected = sweep("committing", makes, 0, |buffer| buffer.commit(granules(9), granules(7)))
        + sweep("decommitting", gives, 9 * GRANULE, |buffer| buffer.decommit(bytes(0), granules(9), IDLE))
        + sweep("after a stream", &[Verb::RecordEvent, Verb::WaitEvent], 10 * GRANULE, |buffer| {
            buffer.decommit(bytes(0), granules(10), fence)
        });
    assert!(injected >= 70, "{injected} failures");
}

#[test]
fn what_cannot_be_mapped_back_is_named_and_no_longer_committed() {
    for verb in [Verb::Map, Verb::SetAccess] {
        let scene = Scene::with_contents();
        // The third extent is not unmapped, and the second is not mapped back.
        scene.checked.fail_call_of(Verb::Unmap, 3, ErrorKind::Driver);
        scene.checked.fail_call_of(verb, 1, ErrorKind::OutOfMappings);
        let error = scene.buffer.decommit(Bytes::ZERO, granules(10), IDLE).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unhealthy);
        assert!(error.to_string().contains("would not map back 16 KiB at offset 16 KiB,"), "{error}");
        assert_eq!(error.driver().map(|failure| failure.verb), Some(Verb::Unmap));
        assert!(scene.buffer.is_committed(Bytes::ZERO, granules(4)));
        assert!(scene.buffer.is_committed(granules(8), granules(2)));
        assert_eq!((scene.buffer.committed(), scene.buffer.held()), (bytes(GRANULE * 15 / 2), granules(8)));
        assert!(!scene.buffer.is_committed(granules(4), bytes(1)));
        scene.find(0..4 * GRANULE);
        scene.find(8 * GRANULE..10 * GRANULE);
        scene.buffer.commit(Bytes::ZERO, granules(10)).unwrap();
        scene.write(0..10 * GRANULE);
        scene.end();
    }
}

#[test]
fn what_was_never_committed_is_not_named_as_lost() {
    let scene = Scene::new(8, 4);
    // The first extent stays behind, with nothing in it that is wanted.
    scene.checked.fail_call_of(Verb::Create, 2, ErrorKind::OutOfDeviceMemory);
    scene.checked.fail_call_of(Verb::Unmap, 1, ErrorKind::Driver);
    scene.buffer.commit(Bytes::ZERO, granules(8)).unwrap_err();
    scene.buffer.commit(granules(4), granules(4)).unwrap();
    scene.checked.fail_call_of(Verb::Unmap, 2, ErrorKind::Driver);
    scene.checked.fail_call_of(Verb::Map, 1, ErrorKind::OutOfMappings);
    let error = scene.buffer.decommit(Bytes::ZERO, granules(8), IDLE).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Driver, "{error}");
    assert!(error.to_string().contains("nothing was changed"), "{error}");
    assert!(scene.buffer.is_committed(granules(4), granules(4)));
    assert_eq!(scene.buffer.held(), granules(4));
    scene.end();
}

#[test]
fn memory_that_is_stuck_without_access_is_never_handed_out() {
    let scene = Scene::new(4, 4);
    scene.checked.fail_call_of(Verb::SetAccess, 1, ErrorKind::Driver);
    scene.checked.fail_call_of(Verb::Unmap, 1, ErrorKind::Driver);
    assert_eq!(scene.buffer.commit(Bytes::ZERO, granules(4)).unwrap_err().kind(), ErrorKind::Driver);
    assert_eq!((scene.buffer.committed(), scene.buffer.held()), (Bytes::ZERO, granules(4)));
    scene.checked.fail_call_of(Verb::Unmap, 1, ErrorKind::Driver);
    let error = scene.buffer.commit(granules(1), granules(1)).unwrap_err();
    assert!(error.report().contains("without access lies at offset 0 bytes"), "{}", error.report());
    scene.buffer.commit(granules(1), granules(1)).unwrap();
    assert_eq!(scene.buffer.held(), granules(1));
    scene.write(GRANULE..2 * GRANULE);
    scene.end();
}

#[test]
fn what_a_failed_commit_could_not_unmap_is_used_or_given_back_later() {
    for later in [Buffer::commit, |buffer: &Buffer, offset, size| buffer.decommit(offset, size, IDLE)] {
        let scene = Scene::new(8, 4);
        scene.checked.fail_call_of(Verb::Create, 2, ErrorKind::OutOfDeviceMemory);
        scene.checked.fail_call_of(Verb::Unmap, 1, ErrorKind::Driver);
        let error = scene.buffer.commit(Bytes::ZERO, granules(8)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfDeviceMemory);
        assert_eq!((scene.buffer.committed(), scene.buffer.held()), (Bytes::ZERO, granules(4)));
        later(&scene.buffer, Bytes::ZERO, granules(8)).unwrap();
        let all = scene.buffer.is_committed(Bytes::ZERO, granules(8));
        assert_eq!(scene.buffer.held(), granules(if all { 8 } else { 0 }));
        scene.end();
    }
}

#[test]
fn memory_that_is_not_taken_back_is_held_and_used_again() {
    let scene = Scene::with_contents();
    scene.checked.fail_from_of(Verb::Release, 1, ErrorKind::Driver);
    scene.buffer.decommit(Bytes::ZERO, granules(10), IDLE).unwrap();
    assert_eq!((scene.buffer.committed(), scene.buffer.held()), (bytes(GRANULE * 3 / 2), granules(12)));
    let created = scene.checked.calls().of(Verb::Create);
    scene.buffer.commit(Bytes::ZERO, granules(4)).unwrap();
    assert_eq!((scene.checked.calls().of(Verb::Create), scene.buffer.held()), (created, granules(12)));
    scene.checked.clear_faults();
    scene.buffer.decommit(granules(12), granules(4), IDLE).unwrap();
    assert_eq!(scene.buffer.held(), granules(4));
    scene.end();
}

#[test]
fn after_a_panic_of_the_driver_nothing_is_handed_out() {
    let scene = Scene::with_contents();
    scene.checked.on_call(Box::new(|verb| assert!(verb != Verb::Map, "a defect of the driver")));
    let commit = || scene.buffer.commit(Bytes::ZERO, granules(16));
    catch_unwind(AssertUnwindSafe(commit)).unwrap_err();
    scene.checked.clear_on_call();
    assert_eq!(commit().unwrap_err().kind(), ErrorKind::Unhealthy);
    let error = scene.buffer.decommit(Bytes::ZERO, granules(16), IDLE).unwrap_err();
    assert!(error.to_string().contains("the driver panicked in an earlier call"), "{error}");
    assert!(!scene.buffer.is_committed(Bytes::ZERO, granules(1)));
    scene.end();
}

#[test]
fn threads_with_rows_of_their_own_share_granules() {
    const ROW: u64 = 3000;
    let scene = Scene::new(32, 8);
    std::thread::scope(|threads| {
        for row in 0..8 {
            let scene = &scene;
            threads.spawn(move || {
                for round in 0..200_u64 {
                    let start = row * ROW * 5 + round % 5 * ROW;
                    scene.buffer.commit(bytes(start), bytes(ROW)).unwrap();
                    scene.write(start..start + ROW);
                    std::thread::yield_now();
                    scene.find(start..start + ROW);
                    scene.buffer.decommit(bytes(start), bytes(ROW), IDLE).unwrap();
                }
            });
        }
    });
    assert_eq!((scene.buffer.committed(), scene.buffer.held()), (Bytes::ZERO, Bytes::ZERO));
    scene.end();
}

/// Whether to commit or decommit, and what.
fn change() -> impl Strategy<Value = (bool, Range<u64>)> {
    let most = 24 * GRANULE;
    let edge = prop_oneof![0..=most, (0..=24_u64).prop_map(|granule| granule * GRANULE)];
    (any::<bool>(), edge.clone(), edge)
        .prop_map(|(commit, one, other)| (commit, one.min(other)..one.max(other)))
        .prop_filter("a range has a byte", |(_, range)| !range.is_empty())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(48) })]
    #[test]
    fn a_buffer_is_what_a_plain_model_says(
        largest in 0_u32..5,
        changes in prop::collection::vec(change(), 1..24),
    ) {
        let scene = Scene::new(24, 1 << largest);
        let mut model = vec![false; usize::try_from(24 * GRANULE).unwrap()];
        for (commit, range) in changes {
            let (offset, size) = (bytes(range.start), bytes(range.end - range.start));
            if commit {
                scene.buffer.commit(offset, size).unwrap();
                scene.write(range.clone());
            } else {
                scene.buffer.decommit(offset, size, IDLE).unwrap();
            }
            let part = usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
            model[part].fill(commit);
            let wanted = model.iter().filter(|byte| **byte).count();
            prop_assert_eq!(scene.buffer.committed().get(), u64::try_from(wanted).unwrap());
            let granule = usize::try_from(GRANULE).unwrap();
            let touched = model.chunks(granule).filter(|granule| granule.contains(&true)).count();
            let most = model.chunks(granule << largest).filter(|extent| extent.contains(&true)).count() << largest;
            let held = usize::try_from(scene.buffer.held().get() / GRANULE).unwrap();
            prop_assert!(touched <= held && held <= most, "{touched} <= {held} <= {most} granules");
            for (at, _) in model.iter().enumerate().filter(|(_, committed)| **committed) {
                let at = u64::try_from(at).unwrap();
                // SAFETY: the byte is committed.
                prop_assert_eq!(unsafe { pointer(scene.buffer.addr() + bytes(at)).read() }, pattern(at));
            }
        }
        scene.end();
    }
}

#[cfg(feature = "cuda")]
mod card {
    use super::*;
    use crate::common::card::card_alone;

    #[test]
    fn a_buffer_on_the_card_keeps_what_is_committed() {
        let Some((_alone, card)) = card_alone() else { return };
        let checked = Checked::new(card.cuda.clone(), CheckedOptions::TEST);
        let buffer = Buffer::new(checked.clone(), BufferOptions::new(Bytes::gib(64))).unwrap();
        // Rows of 40 MiB and a third: each shares granules with its neighbours.
        let row = (40 << 20) + (1 << 20) / 3;
        let rows: Vec<u64> = (0..6).map(|number| number * row).collect();
        let contents = |at: u64| -> Vec<u8> { (at..at + row).map(pattern).collect() };
        let seven = stream(7);
        for at in &rows {
            buffer.commit(bytes(*at), bytes(row)).unwrap();
            card.write(buffer.addr() + bytes(*at), &contents(*at));
        }
        let held = buffer.held();
        for at in rows.iter().skip(1).step_by(2) {
            card.hold(seven);
            std::thread::scope(|threads| {
                let fence = [Fence::Stream(card.stream(seven))];
                let buffer = &buffer;
                let waits = threads.spawn(move || buffer.decommit(bytes(*at), bytes(row), &fence));
                assert!(card.is_busy(seven) && buffer.is_committed(bytes(*at), bytes(row)));
                card.fire(seven);
                waits.join().unwrap().unwrap();
            });
        }
        assert_eq!(buffer.committed(), bytes(3 * row));
        assert!(buffer.held() < held, "{} of {held} are held", buffer.held());
        for at in rows.iter().step_by(2) {
            let mut found = vec![0; usize::try_from(row).unwrap()];
            card.read(buffer.addr() + bytes(*at), &mut found);
            assert!(found == contents(*at), "the row at {at} is another");
        }
        buffer.commit(Bytes::ZERO, bytes(6 * row)).unwrap();
        card.write(buffer.addr() + bytes(rows[1]), &contents(rows[1]));
        drop(buffer);
        assert_eq!(checked.live(), Live::default());
    }
}
