//! What does a step cost more through the C ABI than through Rust?

#![allow(unsafe_code, reason = "calls the C ABI")]

use std::ffi::{CStr, c_void};
use std::hint::black_box;
use std::ptr::null_mut;

use criterion::{BenchmarkId, Criterion};
use vattn::Bytes;
use vattn::ffi::{
    VATTN_AUTO, vattn_background, vattn_cache, vattn_cache_acquire, vattn_cache_create, vattn_cache_destroy,
    vattn_cache_step, vattn_config, vattn_config_init, vattn_driver, vattn_driver_create_ledger,
    vattn_geometry, vattn_geometry_create_preset, vattn_ledger_options, vattn_slot, vattn_slot_tokens,
    vattn_status,
};

use crate::{GRANULE, active, cache};

/// Slots in a step.
const SLOTS: [u32; 6] = [1, 4, 16, 64, 256, 1024];
const BUDGET: Bytes = Bytes::gib(64);

type Init = unsafe extern "C" fn(*mut vattn_config, usize) -> vattn_status;
type Preset =
    unsafe extern "C" fn(*const std::ffi::c_char, u32, i32, *mut *mut vattn_geometry) -> vattn_status;
type Ledger = unsafe extern "C" fn(*const vattn_ledger_options, *mut *mut vattn_driver) -> vattn_status;
type Create = unsafe extern "C" fn(
    *const vattn_config,
    *const vattn_geometry,
    *const vattn_driver,
    *mut *mut vattn_cache,
) -> vattn_status;
type Destroy = unsafe extern "C" fn(*mut vattn_cache) -> vattn_status;
type Acquire = unsafe extern "C" fn(*const vattn_cache, u64, *mut vattn_slot) -> vattn_status;
type Step = unsafe extern "C" fn(*const vattn_cache, *const vattn_slot_tokens, usize) -> vattn_status;

/// The functions, wherever they are.
#[derive(Clone, Copy)]
struct Api {
    init: Init,
    preset: Preset,
    ledger: Ledger,
    create: Create,
    destroy: Destroy,
    acquire: Acquire,
    step: Step,
}

impl Api {
    /// Those that are linked into this program.
    fn linked() -> Self {
        black_box(Self {
            init: vattn_config_init,
            preset: vattn_geometry_create_preset,
            ledger: vattn_driver_create_ledger,
            create: vattn_cache_create,
            destroy: vattn_cache_destroy,
            acquire: vattn_cache_acquire,
            step: vattn_cache_step,
        })
    }

    /// Those of the shared library that `VATTN_LIBRARY` names.
    #[cfg(unix)]
    fn shared() -> Option<Self> {
        let path = std::env::var("VATTN_LIBRARY").ok()?;
        let name = std::ffi::CString::new(path.clone()).unwrap();
        // SAFETY: a library of this project's own, which does nothing when it is loaded.
        let library = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        assert!(!library.is_null(), "VATTN_LIBRARY is {path}, and no library can be loaded from there");
        /// # Safety
        /// - `F` is the type of that function.
        unsafe fn find<F>(library: *mut c_void, name: &CStr) -> F {
            // SAFETY: the library is never closed.
            let symbol = unsafe { libc::dlsym(library, name.as_ptr()) };
            assert!(!symbol.is_null(), "the library lacks {name:?}");
            // SAFETY: as the caller promises.
            unsafe { std::mem::transmute_copy(&symbol) }
        }
        // SAFETY: the types are those of the header.
        Some(unsafe {
            Self {
                init: find::<Init>(library, c"vattn_config_init"),
                preset: find::<Preset>(library, c"vattn_geometry_create_preset"),
                ledger: find::<Ledger>(library, c"vattn_driver_create_ledger"),
                create: find::<Create>(library, c"vattn_cache_create"),
                destroy: find::<Destroy>(library, c"vattn_cache_destroy"),
                acquire: find::<Acquire>(library, c"vattn_cache_acquire"),
                step: find::<Step>(library, c"vattn_cache_step"),
            }
        })
    }

    #[cfg(not(unix))]
    fn shared() -> Option<Self> {
        None
    }
}

/// A cache of C's, with requests of one token each.
struct Served {
    api: Api,
    cache: *mut vattn_cache,
    entries: Vec<vattn_slot_tokens>,
}

impl Served {
    fn new(api: Api, slots: u32) -> Self {
        let (mut geometry, mut driver, mut cache) = (null_mut(), null_mut(), null_mut());
        let options = vattn_ledger_options {
            struct_size: size_of::<vattn_ledger_options>(),
            granule: GRANULE.get(),
            capacity: Bytes::gib(1 << 20).get(),
            addresses: 0,
        };
        let mut config = std::mem::MaybeUninit::<vattn_config>::uninit();
        // SAFETY: all pointers are to living values, and the config is used once it was filled.
        let entries = unsafe {
            ok((api.init)(config.as_mut_ptr(), size_of::<vattn_config>()));
            let mut config = config.assume_init();
            assert_eq!(config.budget, VATTN_AUTO);
            (config.max_slots, config.max_tokens, config.budget) = (slots, 32_768, BUDGET.get());
            #[expect(clippy::as_conversions, reason = "the enum's number")]
            {
                config.background = vattn_background::VATTN_BACKGROUND_OFF as i32;
            }
            ok((api.preset)(c"llama-3-8b".as_ptr(), 1, 0, &raw mut geometry));
            ok((api.ledger)(&raw const options, &raw mut driver));
            ok((api.create)(&raw const config, geometry, driver, &raw mut cache));
            let admit = |_| {
                let slot = vattn_slot { index: 0, cache: 0, generation: 0 };
                let mut entry = vattn_slot_tokens { slot, tokens: 1 };
                ok((api.acquire)(cache, 1, &raw mut entry.slot));
                ok((api.step)(cache, &raw const entry, 1));
                entry
            };
            (0..slots).map(admit).collect()
        };
        Self { api, cache, entries }
    }

    fn step(&self) {
        // SAFETY: the array lives.
        ok(unsafe { (self.api.step)(self.cache, self.entries.as_ptr(), self.entries.len()) });
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // SAFETY: any handle may be passed.
        ok(unsafe { (self.api.destroy)(self.cache) });
    }
}

#[track_caller]
fn ok(status: vattn_status) {
    assert_eq!(status, vattn_status::VATTN_OK);
}

/// The same step again and again, so that nothing is timed but the call: how a program writes its pairs is
/// its own.
pub(crate) fn step_through_c(c: &mut Criterion) {
    let mut group = c.benchmark_group("step through C");
    for slots in SLOTS {
        let cache = cache(slots, BUDGET);
        let entries = active(&cache, slots);
        group.bench_function(BenchmarkId::new("Rust", slots), |b| {
            b.iter(|| black_box(&cache).step(black_box(&entries)).unwrap());
        });
        let mut through = |name: &str, api: Api| {
            let served = Served::new(api, slots);
            group.bench_function(BenchmarkId::new(name, slots), |b| b.iter(|| black_box(&served).step()));
        };
        through("C", Api::linked());
        if let Some(api) = Api::shared() {
            through("C, the shared library", api);
        }
    }
    group.finish();
}
