//! Slots that C makes up by itself are refused.

#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]
#![allow(unsafe_code, reason = "C's functions are called as C calls them")]

use std::mem::MaybeUninit;

use vattn::ffi::vattn_status::*;
use vattn::ffi::*;

/// A cache with a spare slot, its one request's slot, and an end to both.
fn with_cache(look: impl FnOnce(*mut vattn_cache, vattn_slot)) {
    let layers = vattn_layers { layers: 1, kv_heads: 1, key_dim: 8, value_dim: 8 };
    let options = vattn_ledger_options { struct_size: 32, granule: 4096, capacity: 1 << 22, addresses: 0 };
    let (mut geometry, mut driver, mut cache) =
        (std::ptr::null_mut(), std::ptr::null_mut(), std::ptr::null_mut());
    let mut config = MaybeUninit::<vattn_config>::uninit();
    let mut slot = vattn_slot { index: 0, cache: 0, generation: 0 };
    // SAFETY: every pointer leads to what the function reads or writes.
    unsafe {
        assert_eq!(vattn_geometry_create(&raw const layers, 1, 1, 2, &raw mut geometry), VATTN_OK);
        assert_eq!(vattn_driver_create_ledger(&raw const options, &raw mut driver), VATTN_OK);
        assert_eq!(vattn_config_init(config.as_mut_ptr(), size_of::<vattn_config>()), VATTN_OK);
        let mut config = config.assume_init();
        (config.max_slots, config.max_tokens, config.spare_slot) = (2, 100, 1);
        assert_eq!(vattn_cache_create(&raw const config, geometry, driver, &raw mut cache), VATTN_OK);
        assert_eq!(vattn_cache_acquire(cache, 1, &raw mut slot), VATTN_OK);
    }
    look(cache, slot);
    // SAFETY: handles may be any number.
    unsafe {
        assert_eq!(vattn_cache_destroy(cache), VATTN_OK);
        assert_eq!(vattn_driver_destroy(driver), VATTN_OK);
        assert_eq!(vattn_geometry_destroy(geometry), VATTN_OK);
    }
}

fn step(cache: *mut vattn_cache, slot: vattn_slot, tokens: u64) -> vattn_status {
    let entry = vattn_slot_tokens { slot, tokens };
    // SAFETY: one entry can be read there.
    unsafe { vattn_cache_step(cache, &raw const entry, 1) }
}

#[test]
fn the_spare_slot_is_nobodys_to_name() {
    with_cache(|cache, slot| {
        let idle = vattn_fence { kind: 0, reserved: 0, handle: std::ptr::null_mut() };
        for generation in 1..3 {
            let spare = vattn_slot { index: 2, generation, ..slot };
            assert_eq!(step(cache, spare, 0), VATTN_STALE_SLOT);
            assert_eq!(step(cache, spare, 100), VATTN_STALE_SLOT);
            // SAFETY: one fence can be read there.
            let retired = unsafe { vattn_cache_retire(cache, spare, &raw const idle, 1) };
            assert_eq!(retired, VATTN_STALE_SLOT);
        }
        assert_eq!(step(cache, slot, 50), VATTN_OK);
    });
}

#[test]
fn no_request_has_generation_0() {
    with_cache(|cache, slot| {
        for index in 0..3 {
            let none = vattn_slot { index, generation: 0, ..slot };
            assert_eq!(step(cache, none, 0), VATTN_STALE_SLOT);
        }
        assert_eq!(step(cache, slot, 0), VATTN_OK);
    });
}

/// Later calls are refused at once, however many there are.
#[test]
fn destroying_waits_for_no_call_that_comes_later() {
    use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
    let stop = AtomicBool::new(false);
    let start = std::time::Instant::now();
    std::thread::scope(|scope| {
        with_cache(|cache, _| {
            let number = cache.addr();
            for _ in 0..6 {
                let stop = &stop;
                scope.spawn(move || {
                    while !stop.load(SeqCst) {
                        let mut string = std::ptr::null_mut();
                        // SAFETY: a pointer can be written there; a handle may be any number.
                        unsafe {
                            let cache = std::ptr::without_provenance(number);
                            let _ = vattn_cache_report_json(cache, &raw mut string);
                            let _ = vattn_string_destroy(string);
                        }
                        if start.elapsed().as_secs() > 20 {
                            break;
                        }
                    }
                });
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
        });
        stop.store(true, SeqCst);
    });
    assert!(start.elapsed().as_secs() < 5, "it took {:?}", start.elapsed());
}
