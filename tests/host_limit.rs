//! The kernel's own limit on mappings: refused in time, with room left for everybody else, and all
//! of it can be undone. Alone in its program, because all host drivers of a process share the limit.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]
#![allow(unsafe_code, reason = "calls the unsafe verbs")]

use vattn::driver::host::{Host, HostOptions};
use vattn::driver::{Access, Driver, Live};
use vattn::error::ErrorKind;
use vattn::units::Bytes;

#[test]
fn the_kernels_limit_is_never_met() {
    let limit: u64 = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap().trim().parse().unwrap();
    if limit > 200_000 {
        println!("SKIP: vm.max_map_count is {limit}, too many to map here");
        return;
    }
    let page = Bytes::new(64 << 10);
    let count = (limit + 1_000) / 2 * 2 + 1;
    let host = Host::new(HostOptions::new(page, page * count)).unwrap();
    let other = Host::new(HostOptions::new(page, page)).unwrap();
    let base = host.reserve(page * count).unwrap();
    // Steps of two never join neighbours, and an odd count makes them visit every place.
    let at = |nth: u64| base + page * (nth * 2 % count);
    let mut handles = Vec::new();
    let refused = (0..count).find_map(|nth| {
        let handle = host.create(page).unwrap();
        handles.push(handle);
        // SAFETY: a whole handle at a free granule of the test's reservation, which nobody uses.
        unsafe {
            host.map(at(nth), page, handle).err().or_else(|| {
                host.set_access(at(nth), page, Access::ReadWrite).unwrap();
                None
            })
        }
    });
    let refused = refused.expect("the kernel would have refused");
    assert_eq!(refused.kind(), ErrorKind::OutOfMappings, "{refused}");
    let mapped = host.live().mappings;
    println!("{mapped} mappings in {} of the kernel's {limit}", host.kernel_mappings());
    assert_eq!(other.reserve(page).unwrap_err().kind(), ErrorKind::OutOfMappings, "all drivers share it");
    let listed = std::fs::read_to_string("/proc/self/maps").unwrap().lines().count();
    assert!(u64::try_from(listed).unwrap() + 5_000 < limit, "{listed} leave too little to the process");

    // Taking out every third first makes holes, some of which cost a mapping.
    let order = (0..mapped).step_by(3).chain((0..mapped).filter(|nth| nth % 3 != 0));
    for nth in order {
        // SAFETY: one whole mapping, which nobody uses.
        unsafe { host.unmap(at(nth), page) }.unwrap();
    }
    for handle in handles {
        // SAFETY: the test's own handle, released once.
        unsafe { host.release(handle) }.unwrap();
    }
    assert_eq!(host.kernel_mappings(), 1);
    // SAFETY: the reservation is empty and nobody uses it.
    unsafe { host.free(base, page * count) }.unwrap();
    assert_eq!(host.live(), Live::default());
    other.reserve(page).unwrap();
}
