//! The host driver against the kernel: what is not backed faults, memory goes back to the system,
//! and the books agree with the kernel's own list of mappings.
//!
//! A fault kills whoever causes it, so children do the touching. They set the signals back to their
//! default first: the suite then also runs under AddressSanitizer.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]
#![allow(unsafe_code, reason = "calls the unsafe verbs, and touches what must fault")]

use std::sync::Arc;

use vattn::driver::host::{Host, HostOptions};
use vattn::driver::{Access, Driver, Live, RawHandle};
use vattn::error::ErrorKind;
use vattn::units::{Bytes, DeviceAddr};

const GRANULE: Bytes = Bytes::new(64 << 10);

fn host() -> Arc<Host> {
    Host::new(HostOptions::new(GRANULE, Bytes::gib(1))).unwrap()
}

fn pointer(addr: DeviceAddr) -> *mut u8 {
    std::ptr::with_exposed_provenance_mut(usize::try_from(addr.get()).unwrap())
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum Touch {
    Read,
    Write,
}

/// The signal that killed a child that touched an address, or `None` if it went well.
fn touched(addr: DeviceAddr, touch: Touch) -> Option<i32> {
    let pointer = pointer(addr);
    // SAFETY: the child calls only what may be called after a fork of a process with threads: `signal`,
    // `setrlimit`, `_exit`, and one access to memory, which is what it is for.
    unsafe {
        let child = libc::fork();
        assert!(child >= 0, "fork failed");
        if child == 0 {
            libc::signal(libc::SIGSEGV, libc::SIG_DFL);
            libc::signal(libc::SIGBUS, libc::SIG_DFL);
            libc::setrlimit(libc::RLIMIT_CORE, &libc::rlimit { rlim_cur: 0, rlim_max: 0 });
            match touch {
                Touch::Read => drop(pointer.read_volatile()),
                Touch::Write => pointer.write_volatile(1),
            }
            libc::_exit(0);
        }
        let mut status = 0;
        assert_eq!(libc::waitpid(child, &raw mut status, 0), child);
        if libc::WIFSIGNALED(status) {
            return Some(libc::WTERMSIG(status));
        }
        assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0, "status {status}");
        None
    }
}

#[track_caller]
fn faults(addr: DeviceAddr) {
    for touch in [Touch::Read, Touch::Write] {
        assert_eq!(touched(addr, touch), Some(libc::SIGSEGV), "{touch:?} at {addr}");
    }
}

#[track_caller]
fn works(addr: DeviceAddr) {
    for touch in [Touch::Read, Touch::Write] {
        assert_eq!(touched(addr, touch), None, "{touch:?} at {addr}");
    }
}

fn map(host: &Host, addr: DeviceAddr, size: Bytes, handle: RawHandle) {
    // SAFETY: the tests map whole handles at free addresses of their own reservations.
    unsafe { host.map(addr, size, handle) }.unwrap();
}

fn set_access(host: &Host, addr: DeviceAddr, size: Bytes, access: Access) {
    // SAFETY: the tests name whole mappings of their own, which nobody else uses.
    unsafe { host.set_access(addr, size, access) }.unwrap();
}

fn unmap(host: &Host, addr: DeviceAddr, size: Bytes) {
    // SAFETY: the tests name whole mappings of their own, which nobody else uses.
    unsafe { host.unmap(addr, size) }.unwrap();
}

fn release(host: &Host, handle: RawHandle) {
    // SAFETY: the tests release their own handles once.
    unsafe { host.release(handle) }.unwrap();
}

fn free(host: &Host, addr: DeviceAddr, size: Bytes) {
    // SAFETY: the tests free their own reservations once, with nothing mapped.
    unsafe { host.free(addr, size) }.unwrap();
}

/// How many of the kernel's mappings lie in a range, in whole or in part.
///
/// The kernel hands the list out in pieces, while other tests map beside the range: a mapping that
/// merges with a neighbour in between is listed twice, or cut short. So the list is read until two
/// readings agree.
fn in_kernel(addr: DeviceAddr, size: Bytes) -> u64 {
    let (from, to) = (addr.get(), addr.get() + size.get());
    let read = || {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let ranges = maps.lines().map(|line| {
            let (start, end) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
            [start, end].map(|hex| u64::from_str_radix(hex, 16).unwrap().clamp(from, to))
        });
        ranges.filter(|[start, end]| start < end).collect::<Vec<_>>()
    };
    let mut last = read();
    loop {
        let now = read();
        // Side by side and without a gap, as the whole range is reserved.
        let whole = now.windows(2).all(|pair| pair[0][1] == pair[1][0]);
        if whole && now == last {
            return u64::try_from(now.len()).unwrap();
        }
        last = now;
    }
}

#[test]
fn what_is_not_backed_faults() {
    let host = host();
    let base = host.reserve(GRANULE * 8).unwrap();
    let handle = host.create(GRANULE * 2).unwrap();
    let middle = base + GRANULE * 2;
    faults(middle);
    map(&host, middle, GRANULE * 2, handle);
    faults(middle);
    set_access(&host, middle, GRANULE * 2, Access::ReadWrite);
    let last = middle + (GRANULE * 2 - Bytes::new(1));
    works(middle);
    works(last);
    faults(base + (GRANULE * 2 - Bytes::new(1)));
    faults(last + Bytes::new(1));
    set_access(&host, middle, GRANULE * 2, Access::Read);
    assert_eq!(touched(middle, Touch::Read), None);
    assert_eq!(touched(middle, Touch::Write), Some(libc::SIGSEGV));
    unmap(&host, middle, GRANULE * 2);
    faults(middle);
    // Mapped again, it cannot be touched until access is given again.
    map(&host, middle, GRANULE * 2, handle);
    faults(middle);
    unmap(&host, middle, GRANULE * 2);
    free(&host, base, GRANULE * 8);
    faults(middle);
    release(&host, handle);
    assert_eq!(host.live(), Live::default());
}

#[test]
fn memory_goes_back_to_the_system_once_nobody_holds_it() {
    let host = host();
    let size = Bytes::mib(8);
    let base = host.reserve(size * 2).unwrap();
    let (first, second) = (host.create(size).unwrap(), host.create(size).unwrap());
    assert_eq!(host.resident().unwrap(), Bytes::ZERO, "nothing is taken before it is touched");
    for (addr, handle) in [(base, first), (base + size, second)] {
        map(&host, addr, size, handle);
        set_access(&host, addr, size, Access::ReadWrite);
        // SAFETY: the range was just backed for writing.
        unsafe { pointer(addr).write_bytes(7, usize::try_from(size.get()).unwrap()) };
    }
    assert_eq!(host.resident().unwrap(), size * 2);
    unmap(&host, base, size);
    assert_eq!(host.resident().unwrap(), size * 2, "its handle lives");
    release(&host, first);
    assert_eq!(host.resident().unwrap(), size);
    release(&host, second);
    assert_eq!(host.resident().unwrap(), size, "it is still mapped");
    // SAFETY: the range is backed, also after the release.
    assert_eq!(unsafe { pointer(base + size).read_volatile() }, 7);
    unmap(&host, base + size, size);
    assert_eq!(host.resident().unwrap(), Bytes::ZERO);
    free(&host, base, size * 2);
}

#[test]
fn sixteen_tebibytes_can_be_reserved() {
    let host = host();
    let size = Bytes::gib(16 << 10);
    let base = host.reserve(size).unwrap();
    let handle = host.create(GRANULE).unwrap();
    let last = base + (size - GRANULE);
    map(&host, last, GRANULE, handle);
    set_access(&host, last, GRANULE, Access::ReadWrite);
    works(last);
    faults(base + (size - GRANULE - Bytes::new(1)));
    unmap(&host, last, GRANULE);
    free(&host, base, size);
    release(&host, handle);
}

#[test]
fn reservations_are_aligned_to_large_granules() {
    let granule = Bytes::gib(1);
    let host = Host::new(HostOptions::new(granule, Bytes::gib(8))).unwrap();
    let bases: Vec<_> = (0..8).map(|_| host.reserve(granule * 2).unwrap()).collect();
    assert!(bases.iter().all(|base| base.get() % granule.get() == 0));
    assert_eq!(host.kernel_mappings(), 8);
}

#[test]
fn granules_that_the_kernel_cannot_map_are_refused() {
    for granule in [Bytes::ZERO, Bytes::new(512), Bytes::new(3 << 20)] {
        let error = Host::new(HostOptions::new(granule, Bytes::gib(1))).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidConfig);
    }
}

#[test]
fn a_limit_on_mappings_refuses_and_changes_nothing() {
    let options = HostOptions { max_mappings: Some(9), ..HostOptions::new(GRANULE, Bytes::gib(1)) };
    let host = Host::new(options).unwrap();
    let size = GRANULE * 64;
    let base = host.reserve(size).unwrap();
    let handles: Vec<_> = (0..64).map(|_| host.create(GRANULE).unwrap()).collect();
    // Every other granule: two of the kernel's mappings more for each.
    for place in 0..4 {
        let addr = base + GRANULE * (place * 2 + 1);
        map(&host, addr, GRANULE, handles[usize::try_from(place).unwrap() * 2]);
        set_access(&host, addr, GRANULE, Access::ReadWrite);
    }
    assert_eq!((host.kernel_mappings(), in_kernel(base, size)), (9, 9));
    let before = host.live();
    // SAFETY: a whole handle at a free granule.
    let error = unsafe { host.map(base + GRANULE * 20, GRANULE, handles[40]) }.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfMappings);
    let text = error.to_string();
    assert!(text.contains("to 11, above 9") && text.contains("vm.max_map_count"), "{text}");
    assert_eq!(host.reserve(size).unwrap_err().kind(), ErrorKind::OutOfMappings);
    assert_eq!((host.kernel_mappings(), in_kernel(base, size), host.live()), (9, 9, before));
    // What merges with its neighbours is no further mapping: between offsets 0 and 2 lies 1.
    map(&host, base + GRANULE * 2, GRANULE, handles[1]);
    set_access(&host, base + GRANULE * 2, GRANULE, Access::ReadWrite);
    assert_eq!((host.kernel_mappings(), in_kernel(base, size)), (7, 7));
    // Giving back may pass the limit.
    unmap(&host, base + GRANULE * 2, GRANULE);
    unmap(&host, base + GRANULE * 3, GRANULE);
    assert_eq!((host.kernel_mappings(), in_kernel(base, size)), (7, 7));
}

#[test]
fn shuffled_mappings_and_a_comb_of_holes_are_counted_as_the_kernel_does() {
    const COUNT: u64 = 1024;
    let host = host();
    let size = GRANULE * COUNT;
    let base = host.reserve(size).unwrap();
    let at = |place: u64| base + GRANULE * place;
    let handles: Vec<_> = (0..COUNT).map(|_| host.create(GRANULE).unwrap()).collect();
    let handle = |place: u64| handles[usize::try_from(place).unwrap()];

    for place in 0..COUNT {
        map(&host, at(place), GRANULE, handle(place));
    }
    set_access(&host, base, size, Access::ReadWrite);
    assert_eq!((host.kernel_mappings(), in_kernel(base, size)), (1, 1), "in order they are one");
    for place in (0..COUNT).step_by(2) {
        unmap(&host, at(place), GRANULE);
    }
    assert_eq!((host.kernel_mappings(), in_kernel(base, size)), (COUNT, COUNT));
    for place in (1..COUNT).step_by(2) {
        unmap(&host, at(place), GRANULE);
    }
    assert_eq!((host.kernel_mappings(), in_kernel(base, size)), (1, 1));

    // 5 and 1024 have no common divisor, and no step of 5 joins neighbours.
    for place in 0..COUNT {
        map(&host, at(place * 5 % COUNT), GRANULE, handle(place));
    }
    set_access(&host, base, size, Access::ReadWrite);
    assert_eq!((host.kernel_mappings(), in_kernel(base, size)), (COUNT, COUNT));
    for place in 0..COUNT {
        // SAFETY: the granule was just backed.
        unsafe { pointer(at(place * 5 % COUNT)).cast::<u64>().write_volatile(place) };
    }
    for place in (0..COUNT).step_by(2) {
        unmap(&host, at(place), GRANULE);
    }
    for place in (0..COUNT).filter(|place| place * 5 % COUNT % 2 == 1) {
        // SAFETY: odd granules are still backed.
        assert_eq!(unsafe { pointer(at(place * 5 % COUNT)).cast::<u64>().read_volatile() }, place);
    }
    for place in (1..COUNT).step_by(2) {
        unmap(&host, at(place), GRANULE);
    }
    assert_eq!((host.kernel_mappings(), in_kernel(base, size)), (1, 1));
    for handle in handles {
        release(&host, handle);
    }
    free(&host, base, size);
    assert_eq!((host.live(), host.kernel_mappings()), (Live::default(), 0));
}

#[test]
fn neighbours_with_another_access_are_mappings_of_their_own() {
    let host = host();
    let base = host.reserve(GRANULE * 4).unwrap();
    for place in 0..4 {
        let handle = host.create(GRANULE).unwrap();
        map(&host, base + GRANULE * place, GRANULE, handle);
    }
    let counts = || (host.kernel_mappings(), in_kernel(base, GRANULE * 4));
    set_access(&host, base, GRANULE * 4, Access::ReadWrite);
    assert_eq!(counts(), (1, 1));
    set_access(&host, base + GRANULE, GRANULE, Access::Read);
    assert_eq!(counts(), (3, 3));
    set_access(&host, base, GRANULE * 2, Access::Read);
    assert_eq!(counts(), (2, 2));
    set_access(&host, base, GRANULE * 4, Access::Read);
    assert_eq!(counts(), (1, 1));
    // Given back by dropping the driver.
}

/// The limit is a whole process's, so the test starts itself again and the child lowers its own.
#[test]
fn a_limit_on_the_length_of_files_is_an_error_and_no_signal() {
    const CHILD: &str = "VATTN_TEST_FILE_LIMIT";
    if std::env::var_os(CHILD).is_none() {
        let child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "a_limit_on_the_length_of_files_is_an_error_and_no_signal"])
            .env(CHILD, "1")
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&child.stdout);
        assert!(child.status.success() && text.contains("1 passed"), "{}: {text}", child.status);
        return;
    }
    let limit = |bytes: Option<Bytes>| {
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: both calls are handed one `rlimit`. Only the soft limit changes, of this process alone.
        unsafe {
            assert_eq!(libc::getrlimit(libc::RLIMIT_FSIZE, &raw mut limit), 0);
            limit.rlim_cur = bytes.map_or(limit.rlim_max, Bytes::get);
            assert_eq!(libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit), 0);
        }
    };
    let host = host();
    limit(Some(GRANULE * 4));
    let handle = host.create(GRANULE * 4).unwrap();
    let before = (host.live(), host.memory_info().unwrap());
    let error = host.create(GRANULE).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("EFBIG") && text.contains("raise `ulimit -f`"), "{text}");
    assert_eq!((host.live(), host.memory_info().unwrap()), before);
    // What comes back is within the limit.
    release(&host, handle);
    let handle = host.create(GRANULE * 4).unwrap();
    limit(None);
    let other = host.create(GRANULE).unwrap();
    release(&host, handle);
    release(&host, other);
    assert_eq!(host.live(), Live::default());
}

mod random {
    use proptest::prelude::*;

    use super::*;

    const PLACES: u64 = 24;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(64) })]
        /// Where every mapping has access, the count is the kernel's; where some have none yet, it is no less.
        #[test]
        fn the_count_is_the_kernels(
            ops in prop::collection::vec((0..PLACES, 0_u64..8, 0_u8..4), 1..60),
        ) {
            let host = host();
            let size = GRANULE * PLACES;
            let base = host.reserve(size).unwrap();
            let handles: Vec<_> = (0..8).map(|_| host.create(GRANULE).unwrap()).collect();
            for (place, which, what) in ops {
                let addr = base + GRANULE * place;
                let handle = handles[usize::try_from(which).unwrap()];
                // SAFETY: what the contract forbids here the driver refuses, and that is wanted; nobody uses the memory.
                let _ = unsafe {
                    match what {
                        0 => host.map(addr, GRANULE, handle),
                        1 => host.map(addr, GRANULE, handle).and_then(|()| host.set_access(addr, GRANULE, Access::ReadWrite)),
                        2 => host.set_access(addr, GRANULE, if which % 2 == 0 { Access::Read } else { Access::ReadWrite }),
                        _ => host.unmap(addr, GRANULE),
                    }
                };
                prop_assert!(in_kernel(base, size) <= host.kernel_mappings());
            }
            for place in 0..PLACES {
                // SAFETY: as above.
                let _ = unsafe { host.set_access(base + GRANULE * place, GRANULE, Access::ReadWrite) };
            }
            prop_assert_eq!(in_kernel(base, size), host.kernel_mappings());
        }
    }
}
