//! What only Rust can show: a panic inside, statuses that keep their numbers, structs of other versions,
//! an object that is taken away under a call. What C can show is in `tests/c`.

use std::ffi::{CStr, c_char, c_void};
use std::mem::{MaybeUninit, offset_of};
use std::ptr::{null, null_mut};
use std::sync::mpsc;
use std::sync::{Arc, Barrier};

use super::args::Numbered as _;
use super::driver::{ByHand, DriverObject};
use super::handle::{CACHES, DRIVERS};
use super::*;
use crate::driver::checked::{Checked, CheckedOptions};
use crate::driver::ledger::{Ledger, LedgerOptions};
use crate::error::{ErrorKind, Verb};
use crate::units::Bytes;

fn config() -> vattn_config {
    let mut config = MaybeUninit::<vattn_config>::uninit();
    // SAFETY: the struct is filled before it is used.
    unsafe {
        ok(vattn_config_init(config.as_mut_ptr(), size_of::<vattn_config>()));
        config.assume_init()
    }
}

#[track_caller]
fn ok(status: vattn_status) {
    assert_eq!(status, vattn_status::VATTN_OK, "{}", message());
}

fn message() -> String {
    let mut room = [0; 512];
    // SAFETY: the room has that size.
    unsafe {
        vattn_last_error_message(room.as_mut_ptr(), room.len());
        CStr::from_ptr(room.as_ptr()).to_str().unwrap().to_owned()
    }
}

fn geometry() -> *mut vattn_geometry {
    let layers = vattn_layers { layers: 2, kv_heads: 1, key_dim: 64, value_dim: 64 };
    let mut geometry = null_mut();
    // SAFETY: both pointers are to living values.
    ok(unsafe { vattn_geometry_create(&raw const layers, 1, 1, 0, &raw mut geometry) });
    geometry
}

/// A cache of four slots on a driver that the test can have panic.
struct Rig {
    cache: *mut vattn_cache,
    checked: Arc<Checked>,
}

impl Rig {
    fn new() -> Self {
        let granule = Bytes::new(4096);
        let ledger =
            Ledger::new(LedgerOptions { granule, capacity: Bytes::mib(16), addresses: None }).unwrap();
        let checked = Checked::new(ledger, CheckedOptions::TEST);
        let object =
            DriverObject { driver: checked.clone(), by_hand: ByHand::No, checked: Some(checked.clone()) };
        let driver = DRIVERS.keep(object).unwrap_or_else(|failure| panic!("{failure:?}"));
        let mut config = config();
        config.max_slots = 4;
        config.max_tokens = 1024;
        config.background = vattn_background::VATTN_BACKGROUND_OFF.number();
        let (geometry, mut cache) = (geometry(), null_mut());
        // SAFETY: all pointers are to living values.
        unsafe {
            ok(vattn_cache_create(&raw const config, geometry, driver, &raw mut cache));
            ok(vattn_driver_destroy(driver));
            ok(vattn_geometry_destroy(geometry));
        }
        Self { cache, checked }
    }

    fn acquire(&self) -> vattn_slot {
        let mut slot = vattn_slot { index: 0, cache: 0, generation: 0 };
        // SAFETY: the slot lives.
        ok(unsafe { vattn_cache_acquire(self.cache, 1, &raw mut slot) });
        slot
    }

    fn step(&self, slot: vattn_slot, tokens: u64) -> vattn_status {
        let entry = vattn_slot_tokens { slot, tokens };
        // SAFETY: the entry lives.
        unsafe { vattn_cache_step(self.cache, &raw const entry, 1) }
    }
}

#[test]
fn a_panic_becomes_a_status_and_the_cache_has_failed() {
    let rig = Rig::new();
    let slot = rig.acquire();
    rig.checked.on_call(Box::new(|verb| assert_ne!(verb, Verb::Map, "a defect that was planted")));
    assert_eq!(rig.step(slot, 10), vattn_status::VATTN_PANIC);
    assert!(message().contains("a defect that was planted"), "{}", message());
    rig.checked.clear_on_call();

    assert_eq!(rig.step(slot, 10), vattn_status::VATTN_UNHEALTHY);
    assert!(message().contains("a defect that was planted"), "{}", message());
    let (mut health, mut view) = (-1, MaybeUninit::<vattn_view>::uninit());
    // SAFETY: all pointers are to living values.
    unsafe {
        ok(vattn_cache_health(rig.cache, &raw mut health));
        assert_eq!(health, vattn_health::VATTN_FAILED.number());
        ok(vattn_cache_view(rig.cache, 0, 0, view.as_mut_ptr()));
        ok(vattn_cache_destroy(rig.cache));
    }
}

#[test]
fn numbers_are_for_good() {
    // A number that changes breaks every program that was built before.
    let numbers: Vec<_> = ErrorKind::ALL.into_iter().map(|kind| vattn_status::from(kind).number()).collect();
    assert_eq!(numbers, (1..=20).collect::<Vec<_>>());
    let later = [
        (vattn_status::VATTN_INVALID_HANDLE, 101),
        (vattn_status::VATTN_FORKED, 102),
        (vattn_status::VATTN_PANIC, 103),
        (vattn_status::VATTN_IN_CALLBACK, 104),
    ];
    assert!(later.iter().all(|(status, number)| status.number() == *number));
    let verbs: Vec<_> = Verb::ALL.into_iter().map(|verb| vattn_verb::from(verb).number()).collect();
    assert_eq!(verbs, (0..14).collect::<Vec<_>>());
    for kind in ErrorKind::ALL {
        let status = vattn_status::from(kind).number();
        // SAFETY: the name is a constant string.
        let name = unsafe { CStr::from_ptr(vattn_status_name(status)) };
        assert_eq!(name.to_str().unwrap(), kind.as_str());
        assert_eq!(vattn_status::kind_of(status), Some(kind));
    }
    assert_eq!(size_of::<vattn_config>(), 112);
    assert_eq!(offset_of!(vattn_config, extents_count), 104);
    assert_eq!(size_of::<vattn_view>(), 88);
    assert_eq!(size_of::<vattn_stats>(), 184);
    assert_eq!((size_of::<vattn_pin_info>(), size_of::<vattn_array>()), (24, 40));
}

/// A config as a later header would have it.
#[repr(C)]
struct Later {
    config: vattn_config,
    more: u64,
}

#[test]
fn a_program_that_is_newer_than_the_library_is_served_and_told() {
    let mut later = Later { config: config(), more: u64::MAX };
    let size = size_of::<Later>();
    let (geometry, mut layout) = (geometry(), MaybeUninit::<vattn_layout>::zeroed());
    let place = (&raw mut later).cast::<vattn_config>();
    // SAFETY: the struct has the size that is stated, and all pointers are to living values.
    unsafe {
        ok(vattn_config_init(place, size));
        assert_eq!((later.config.struct_size, later.more), (size, 0));
        (*layout.as_mut_ptr()).struct_size = size_of::<vattn_layout>();
        ok(vattn_layout_plan(place, geometry, 4096, layout.as_mut_ptr()));
        (*place.cast::<Later>()).more = 7;
        let status = vattn_layout_plan(place, geometry, 4096, layout.as_mut_ptr());
        assert_eq!(status, vattn_status::VATTN_INVALID_ARGUMENT);
        assert!(message().contains("older than the header"), "{}", message());
        ok(vattn_geometry_destroy(geometry));
    }
}

#[test]
fn a_place_is_used_again_and_its_old_handle_is_refused() {
    let old = geometry();
    let mut info = vattn_geometry_info { struct_size: 24, layers: 0, dtype: 0, bytes_per_token: 0 };
    // SAFETY: any handle may be passed, and the struct lives.
    unsafe {
        ok(vattn_geometry_destroy(old));
        // As many as it takes until the place comes up again: others run beside this test.
        for _ in 0..1_000 {
            let new = geometry();
            assert_ne!(old, new);
            assert_eq!(vattn_geometry_describe(old, &raw mut info), vattn_status::VATTN_INVALID_HANDLE);
            assert_eq!(vattn_geometry_destroy(old), vattn_status::VATTN_INVALID_HANDLE);
            ok(vattn_geometry_describe(new, &raw mut info));
            ok(vattn_geometry_destroy(new));
        }
        assert_eq!(vattn_cache_flush(old.cast()), vattn_status::VATTN_INVALID_HANDLE);
        assert!(message().contains("is no vattn_cache"), "{}", message());
    }
}

#[test]
fn destroying_waits_for_the_call_under_way() {
    let rig = Rig::new();
    let slot = rig.acquire();
    let (arrived, go) = (Arc::new(Barrier::new(2)), Arc::new(Barrier::new(2)));
    let (its_arrived, its_go) = (Arc::clone(&arrived), Arc::clone(&go));
    let once = std::sync::Once::new();
    rig.checked.on_call(Box::new(move |verb| {
        if verb == Verb::Map {
            once.call_once(|| {
                its_arrived.wait();
                its_go.wait();
            });
        }
    }));
    let token = rig.cache.addr();
    let (told, tells) = mpsc::channel();
    std::thread::scope(|scope| {
        let rig = &rig;
        let handle = token;
        let stepping = scope.spawn(move || {
            let entry = vattn_slot_tokens { slot, tokens: 10 };
            // SAFETY: the entry lives.
            unsafe { vattn_cache_step(std::ptr::without_provenance(handle), &raw const entry, 1) }
        });
        arrived.wait();
        let destroying = scope.spawn(move || {
            // SAFETY: any handle may be passed.
            let status = unsafe { vattn_cache_destroy(std::ptr::without_provenance_mut(handle)) };
            told.send(()).unwrap();
            status
        });
        assert!(tells.try_recv().is_err(), "a cache went away under a call");
        go.wait();
        assert_eq!(stepping.join().unwrap(), vattn_status::VATTN_OK);
        assert_eq!(destroying.join().unwrap(), vattn_status::VATTN_OK);
        assert_eq!(rig.checked.live().mappings, 0);
    });
    assert_eq!(rig.step(slot, 20), vattn_status::VATTN_INVALID_HANDLE);
}

#[test]
fn a_panic_elsewhere_touches_no_cache() {
    let rig = Rig::new();
    rig.checked.on_call(Box::new(|_| panic!("a defect that was planted")));
    let (mut free, mut total) = (0, 0);
    let object =
        DriverObject { driver: rig.checked.clone(), by_hand: ByHand::No, checked: Some(rig.checked.clone()) };
    let driver = DRIVERS.keep(object).unwrap_or_else(|failure| panic!("{failure:?}"));
    // SAFETY: all pointers are to living values.
    unsafe {
        let status = vattn_driver_memory(driver, &raw mut free, &raw mut total);
        assert_eq!(status, vattn_status::VATTN_PANIC);
        rig.checked.clear_on_call();
        ok(vattn_driver_memory(driver, &raw mut free, &raw mut total));
        ok(vattn_driver_destroy(driver));
    }
    ok(rig.step(rig.acquire(), 10));
    assert!(CACHES.get(rig.cache).is_ok());
    // SAFETY: any handle may be passed.
    ok(unsafe { vattn_cache_destroy(rig.cache) });
}

#[test]
fn the_log_is_told_and_may_not_call_back() {
    unsafe extern "C" fn listen(user: *mut c_void, level: i32, target: *const c_char, text: *const c_char) {
        // SAFETY: the test's own list, and two strings.
        let (told, target, text) = unsafe {
            (&*user.cast::<crate::sync::Leaf<Vec<_>>>(), CStr::from_ptr(target), CStr::from_ptr(text))
        };
        // SAFETY: NULL may be destroyed.
        let inside = unsafe { vattn_cache_destroy(null_mut()) };
        let words = (level, target.to_str().unwrap().to_owned(), text.to_str().unwrap().to_owned(), inside);
        told.lock().push(words);
    }
    let told = crate::sync::Leaf::new(Vec::<(i32, String, String, vattn_status)>::new());
    // SAFETY: the list outlives the callback, which is taken away below.
    unsafe {
        let info = vattn_log_level::VATTN_LOG_INFO.number();
        ok(vattn_log_set(Some(listen), (&raw const told).cast_mut().cast(), info));
        let rig = Rig::new();
        ok(vattn_cache_destroy(rig.cache));
        // It is not kept to be told nothing: an event that was let in before could still be told to it.
        ok(vattn_log_set(Some(listen), null_mut(), vattn_log_level::VATTN_LOG_OFF.number()));
        assert!(super::log::LISTENER.read().is_none());
        ok(vattn_log_set(None, null_mut(), info));
        let rig = Rig::new();
        ok(vattn_cache_destroy(rig.cache));
    }
    let told = told.into_inner();
    // Caches of other tests may be told of, too.
    let is_ready = |(level, target, text, _): &(i32, String, String, vattn_status)| {
        *level == vattn_log_level::VATTN_LOG_INFO.number()
            && target.starts_with("vattn::cache")
            && text.starts_with("a KV cache is ready")
            && text.contains(" slots=4")
    };
    assert!(told.iter().any(is_ready), "{told:?}");
    assert!(told.iter().all(|(.., inside)| *inside == vattn_status::VATTN_IN_CALLBACK));
    // SAFETY: nothing is passed.
    assert_eq!(unsafe { vattn_log_set(None, null_mut(), 9) }, vattn_status::VATTN_INVALID_ARGUMENT);
}

#[test]
fn counts_that_overflow_are_refused() {
    let rig = Rig::new();
    let entry = vattn_slot_tokens { slot: rig.acquire(), tokens: 1 };
    // SAFETY: none of these are read: what is wrong with them is seen first.
    unsafe {
        let status = vattn_cache_step(rig.cache, &raw const entry, usize::MAX / 8);
        assert_eq!(status, vattn_status::VATTN_INVALID_ARGUMENT);
        assert!(message().contains("an array can have 2^63 bytes"), "{}", message());
        let status = vattn_cache_step(rig.cache, null(), 3);
        assert_eq!(status, vattn_status::VATTN_INVALID_ARGUMENT);
        let status = vattn_cache_step(rig.cache, std::ptr::without_provenance(4), 1);
        assert_eq!(status, vattn_status::VATTN_INVALID_ARGUMENT);
        ok(vattn_cache_step(rig.cache, null(), 0));
        ok(vattn_cache_destroy(rig.cache));
    }
}

#[test]
fn no_text_for_c_has_words_of_rust() {
    // Refusals of all kinds that the library words itself, as far as they need no device.
    let rig = Rig::new();
    let slot = rig.acquire();
    let mut more = false;
    let mut view = MaybeUninit::<vattn_view>::uninit();
    let mut other = null_mut();
    let hybrid = c"{\"num_hidden_layers\": 2, \"num_attention_heads\": 1, \"head_dim\": 64, \
                   \"layer_types\": [\"linear_attention\", \"full_attention\"]}";
    let mut texts = Vec::new();
    let mut refused = |status: vattn_status| {
        assert_ne!(status, vattn_status::VATTN_OK);
        texts.push(message());
    };
    // SAFETY: all pointers are to living values.
    unsafe {
        refused(vattn_cache_retire(rig.cache, slot, null(), 0));
        refused(vattn_cache_tend(rig.cache, &raw mut more));
        refused(vattn_cache_truncate(rig.cache, slot, 7, null(), 0));
        refused(vattn_cache_view(rig.cache, 9, 0, view.as_mut_ptr()));
        refused(vattn_cache_view(rig.cache, 9, 1, view.as_mut_ptr()));
        refused(vattn_geometry_create_from_hf_config(hybrid.as_ptr(), 1, 0, &raw mut other));
        for (slots, layout) in
            [(0, vattn_layout_kind::VATTN_LAYOUT_SLICED), (1, vattn_layout_kind::VATTN_LAYOUT_GROUPED)]
        {
            let mut config = config();
            (config.max_slots, config.layout) = (slots, layout.number());
            let (geometry, mut layout) = (geometry(), MaybeUninit::<vattn_layout>::zeroed());
            (*layout.as_mut_ptr()).struct_size = size_of::<vattn_layout>();
            refused(vattn_layout_plan(&raw const config, geometry, 4096, layout.as_mut_ptr()));
            ok(vattn_geometry_destroy(geometry));
        }
        rig.checked.fail_call(1, ErrorKind::DeviceLost);
        refused(rig.step(slot, 100));
        refused(rig.step(slot, 100));
        ok(vattn_cache_destroy(rig.cache));
    }
    let rust = |text: &&String| text.contains("::") || text.contains("drop it") || text.contains("Some(");
    assert_eq!(texts.iter().find(rust), None);
}
