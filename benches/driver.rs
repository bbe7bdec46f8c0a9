//! What does each call of a driver cost, by the size of its handle?
//!
//! Asked because every plan follows from the answer: on a card a call costs per mapping and hardly per
//! byte, so few large extents are cheap and many granules are dear. `create`, `map`, `set access`,
//! `unmap` and `release` are timed each on its own in the cycle of one handle; `map and set access` is
//! the pair that a warm mapping takes, bare and through the library's driver, which finds its context
//! and keeps other threads' captures going. On a card `create` follows upon the release of the cycle
//! before, as on a server that gives memory back and takes it again; `create after a pause` does not.
//!
//! `VATTN_BENCH_DEVICE` names one device; see `common/devices.rs`. Sizes end at 512 MiB, the largest
//! extent. Nothing is touched, so the host takes no memory either.

#![allow(clippy::unwrap_used, missing_docs, reason = "a bench may panic, and has no callers")]
#![allow(unsafe_code, reason = "calls a driver's verbs")]

mod common;

use std::time::{Duration, Instant};

use common::bare::Bare;
use common::devices::{Target, targets};
use common::pause;
use criterion::{BenchmarkId, Criterion};
use vattn::driver::{Access, RawHandle};
use vattn::units::{Bytes, DeviceAddr};

const SIZES: [u64; 6] = [2, 8, 32, 64, 128, 512];

/// One part of the cycle.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Timed {
    Create,
    CreateAfterAPause,
    Map,
    SetAccess,
    MapAndSetAccess,
    ThroughTheDriver,
    Unmap,
    Release,
}

const ALL: [(&str, Timed); 8] = [
    ("create", Timed::Create),
    ("create after a pause", Timed::CreateAfterAPause),
    ("map", Timed::Map),
    ("set access", Timed::SetAccess),
    ("map and set access", Timed::MapAndSetAccess),
    ("map and set access through the driver", Timed::ThroughTheDriver),
    ("unmap", Timed::Unmap),
    ("release", Timed::Release),
];

/// One cycle of a handle; how long the part in question took.
fn cycle(target: &Target, addr: DeviceAddr, size: Bytes, part: Timed) -> Duration {
    let bare = &target.bare;
    let mut took = Duration::ZERO;
    let mut timed = |which: &[Timed], call: &mut dyn FnMut()| {
        let start = Instant::now();
        call();
        let elapsed = start.elapsed();
        if which.contains(&part) {
            took += elapsed;
        }
    };
    let mut handle = RawHandle(0);
    if part == Timed::CreateAfterAPause {
        pause::after_release(size);
    }
    timed(&[Timed::Create, Timed::CreateAfterAPause], &mut || handle = bare.create(size));
    match part {
        Timed::MapAndSetAccess => timed(&[part], &mut || usable(bare, addr, size, handle)),
        Timed::ThroughTheDriver => timed(&[part], &mut || {
            // SAFETY: a free reservation of that size and a new handle of that size.
            unsafe {
                target.driver.map(addr, size, handle).unwrap();
                target.driver.set_access(addr, size, Access::ReadWrite).unwrap();
            }
        }),
        _ => {
            timed(&[Timed::Map], &mut || bare.map(addr, size, handle));
            timed(&[Timed::SetAccess], &mut || bare.set_access(addr, size));
        }
    }
    timed(&[Timed::Unmap], &mut || bare.unmap(addr, size));
    timed(&[Timed::Release], &mut || bare.release(handle));
    took
}

fn usable(bare: &Bare, addr: DeviceAddr, size: Bytes, handle: RawHandle) {
    bare.map(addr, size, handle);
    bare.set_access(addr, size);
}

fn driver_calls(c: &mut Criterion, target: &Target) {
    for (name, part) in ALL {
        if part == Timed::CreateAfterAPause && !target.is_card() {
            continue;
        }
        let mut group = c.benchmark_group(format!("{}/{name}", target.name));
        for size in SIZES.map(Bytes::mib) {
            let addr = target.bare.reserve(size);
            group.bench_function(BenchmarkId::from_parameter(size), |b| {
                b.iter_custom(|times| (0..times).map(|_| cycle(target, addr, size, part)).sum());
            });
            target.bare.free(addr, size);
        }
        group.finish();
    }
}

fn main() {
    let test = !std::env::args().any(|argument| argument == "--bench");
    let mut criterion = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(100))
        .measurement_time(Duration::from_millis(500))
        .nresamples(10_000)
        .without_plots()
        .configure_from_args();
    for target in targets(test) {
        println!("{}: {}", target.name, target.what);
        driver_calls(&mut criterion, &target);
    }
    criterion.final_summary();
}
