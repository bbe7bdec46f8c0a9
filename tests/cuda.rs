//! What is the card's alone: which context and device are used, what a machine without one is told,
//! captures that go on, memory that somebody else takes, and contexts that die under the driver.
//!
//! Each test says SKIP where there is no GPU. What kills a context happens in child processes.

#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]
#![allow(unsafe_code, reason = "calls CUDA beside the library")]

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Command, Stdio};
use std::sync::Arc;

use common::card::{CARD, Card, alone, card_alone, ok, pointer};
use common::kernels::Kernels;
use common::{step, stream, tokens};
use cudarc::driver::sys;
use vattn::cache::ForeignEvent;
use vattn::driver::checked::{Checked, CheckedOptions};
use vattn::driver::cuda::{Cuda, CudaOptions, devices, driver_version};
use vattn::driver::{Driver, HandleOptions, Live, RawEvent, RawHandle, Stream};
use vattn::error::ErrorKind;
use vattn::units::{Bytes, Device, DeviceAddr};
use vattn::{Config, Fence, Geometry, Health, KvCache, Part, SlotId};

const GRANULE: Bytes = Bytes::mib(2);

fn cache(driver: Arc<dyn Driver>, budget: Bytes) -> KvCache {
    let config = Config::builder(Geometry::preset("llama-3-8b").unwrap())
        .max_slots(8)
        .max_tokens(tokens(32_768))
        .background(vattn::geometry::Background::Off)
        .budget(budget);
    KvCache::new(config.build().unwrap(), driver).unwrap()
}

fn admit(cache: &KvCache, count: u64) -> SlotId {
    let slot = cache.acquire(tokens(count), None).unwrap();
    step(cache, slot, count).unwrap();
    slot
}

fn current() -> usize {
    let mut context = std::ptr::null_mut();
    // SAFETY: the pointer is to a living pointer.
    ok(unsafe { sys::cuCtxGetCurrent(&raw mut context) });
    context.addr()
}

/// A context of the test's own on the first device, current on this thread.
fn own_context() -> sys::CUcontext {
    let mut context = std::ptr::null_mut();
    // SAFETY: the pointer is to a living pointer.
    unsafe {
        ok(sys::cuInit(0));
        ok(sys::cuCtxCreate_v2(&raw mut context, 0, 0));
    }
    context
}

#[test]
fn without_a_gpu_every_way_in_says_what_is_missing() {
    let _alone = CARD.lock();
    let Err(error) = Cuda::new(CudaOptions::default()) else { return };
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    assert!(error.to_string().contains("host driver"), "{error}");
    assert_eq!(devices().unwrap_err().to_string(), error.to_string());
    assert_eq!(driver_version().unwrap_err().to_string(), error.to_string());
}

#[test]
fn an_ordinal_that_is_not_there_is_refused_with_those_that_are() {
    let Some((_alone, _cuda)) = alone() else { return };
    let count = devices().unwrap().len();
    let error = Cuda::new(CudaOptions { ordinal: Some(999), ..CudaOptions::default() }).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    assert!(error.to_string().contains(&format!("no CUDA device 999: this process sees {count}")), "{error}");
}

#[test]
fn a_device_is_described_as_it_is() {
    let Some((_alone, cuda)) = alone() else { return };
    let device = devices().unwrap().swap_remove(0);
    let info = cuda.info();
    assert_eq!((info.name, info.device), ("cuda", Device::Cuda(0)));
    assert_eq!(Some(info.granule.bytes()), device.granule);
    let memory = cuda.memory_info().unwrap();
    assert!(memory.free <= memory.total && memory.total <= device.memory, "{memory:?} {device:?}");
    assert!(driver_version().unwrap() >= (11, 4));
}

#[test]
fn without_a_current_context_the_primary_one_is_used_and_none_is_left_behind() {
    let Some((_alone, cuda)) = alone() else { return };
    assert_eq!(current(), 0);
    let mut primary = std::ptr::null_mut();
    // SAFETY: retained and released here.
    unsafe {
        ok(sys::cuDevicePrimaryCtxRetain(&raw mut primary, 0));
        ok(sys::cuDevicePrimaryCtxRelease_v2(0));
    }
    assert_eq!(cuda.context(), u64::try_from(primary.addr()).unwrap());
    let cache = cache(cuda, Bytes::gib(1));
    let slot = admit(&cache, 100);
    cache.retire(slot, &[Fence::Stream(Stream::LEGACY)]).unwrap();
    drop(cache);
    assert_eq!(current(), 0);
}

#[test]
fn the_current_context_is_used_and_other_threads_may_have_another() {
    let Some((_alone, _cuda)) = alone() else { return };
    let own = own_context();
    let cuda = Cuda::new(CudaOptions::default()).unwrap();
    assert_eq!(cuda.context(), u64::try_from(own.addr()).unwrap());
    let cache = cache(cuda, Bytes::gib(1));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let slot = admit(&cache, 100);
            cache.retire(slot, &[Fence::Stream(Stream::PER_THREAD)]).unwrap();
            assert_eq!(current(), 0);
        });
    });
    drop(cache);
    assert_eq!(current(), own.addr());
    // SAFETY: made here, and nothing uses it any more.
    ok(unsafe { sys::cuCtxDestroy_v2(own) });
}

#[test]
fn an_exported_handle_shows_the_same_memory_to_whoever_imports_it() {
    use std::os::fd::AsRawFd;
    let Some((_alone, plain)) = alone() else { return };
    let handle = plain.create(GRANULE).unwrap();
    // SAFETY: the handle is alive, and released once.
    unsafe {
        assert_eq!(plain.export(handle).unwrap_err().kind(), ErrorKind::Unsupported);
        plain.release(handle).unwrap();
    }

    let handles = HandleOptions { exportable: true, rdma: false };
    let cuda = Cuda::new(CudaOptions { ordinal: None, handles }).unwrap();
    let card = Card::new(cuda.clone());
    let base = cuda.reserve(GRANULE * 2).unwrap();
    let handle = cuda.create(GRANULE).unwrap();
    let other = base + GRANULE;
    // SAFETY: the reservation is this test's; each handle is mapped once, and released once.
    unsafe {
        let fd = cuda.export(handle).unwrap();
        let mut imported = 0;
        let kind = sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
        let number = usize::try_from(fd.as_raw_fd()).unwrap();
        let number = std::ptr::without_provenance_mut(number);
        ok(sys::cuMemImportFromShareableHandle(&raw mut imported, number, kind));
        let imported = RawHandle(imported);
        for (addr, handle) in [(base, handle), (other, imported)] {
            cuda.map(addr, GRANULE, handle).unwrap();
            cuda.set_access(addr, GRANULE, vattn::driver::Access::ReadWrite).unwrap();
        }
        card.write(base, b"one memory");
        let mut found = [0; 10];
        card.read(other, &mut found);
        assert_eq!(&found, b"one memory");
        cuda.unmap(base, GRANULE * 2).unwrap();
        cuda.release(handle).unwrap();
        cuda.release(imported).unwrap();
        cuda.free(base, GRANULE * 2).unwrap();
    }
}

#[test]
fn handles_for_network_cards_are_made_or_refused_with_a_reason() {
    let Some((_alone, _cuda)) = alone() else { return };
    let handles = HandleOptions { exportable: false, rdma: true };
    let can = devices().unwrap()[0].rdma;
    match Cuda::new(CudaOptions { ordinal: None, handles }) {
        Ok(cuda) => {
            assert!(can);
            admit(&cache(cuda, Bytes::gib(1)), 1000);
        }
        Err(error) => {
            assert!(!can);
            assert_eq!(error.kind(), ErrorKind::Unsupported);
            assert!(error.to_string().contains("RDMA"), "{error}");
        }
    }
}

#[test]
fn a_capture_goes_on_while_another_thread_works_on_the_cache() {
    let Some((_alone, card)) = card_alone() else { return };
    let cache = cache(card.cuda.clone(), Bytes::gib(4));
    let slot = admit(&cache, 1000);
    let captured = stream(1);
    // Before the capture: making a stream is forbidden during one.
    let [stream, another] = [captured, stream(2)].map(|stream| card.stream(stream));
    card.capture(captured, true);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // On a thread whose own calls a capture in global mode would forbid.
            step(&cache, slot, 5000).unwrap();
            let other = admit(&cache, 3000);
            cache.retire(other, &[Fence::Stream(another)]).unwrap();
            cache.trim(Bytes::ZERO, &[Fence::Idle]).unwrap();
        });
    });
    // On the capturing thread itself.
    step(&cache, slot, 9000).unwrap();
    let refused = cache.retire(slot, &[Fence::Stream(stream)]).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::CapturingStream, "{refused}");
    step(&cache, slot, 9100).unwrap();
    card.capture(captured, false);
    cache.retire(slot, &[Fence::Stream(stream)]).unwrap();
}

#[test]
fn an_event_of_a_capture_is_no_fence() {
    let Some((_alone, card)) = card_alone() else { return };
    let cache = cache(card.cuda.clone(), Bytes::gib(1));
    let slot = admit(&cache, 100);
    card.capture(stream(1), true);
    let stream = card.stream(stream(1));
    let mut event = std::ptr::null_mut();
    // SAFETY: the event is made, recorded into the capture, and destroyed here.
    unsafe {
        ok(sys::cuEventCreate(&raw mut event, 2));
        ok(sys::cuEventRecord(event, pointer(stream.number())));
        let raw = RawEvent(u64::try_from(event.addr()).unwrap());
        let refused = cache.retire(slot, &[Fence::Event(ForeignEvent::new(raw))]).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::CapturingStream, "{refused}");
        ok(sys::cuEventDestroy_v2(event));
        // Asking for such an event ends the capture: that is CUDA's rule, and the caller's mistake.
        let mut graph = std::ptr::null_mut();
        println!(
            "the capture ends with {:?}",
            sys::cuStreamEndCapture(pointer(stream.number()), &raw mut graph)
        );
    }
    step(&cache, slot, 200).unwrap();
    cache.retire(slot, &[Fence::Idle]).unwrap();
}

#[test]
fn memory_that_another_takes_is_an_error_and_what_it_gives_back_is_used() {
    let Some((_alone, card)) = card_alone() else { return };
    // Loaded now, so that what they take is not looked for at the end.
    let _kernels = Kernels::get();
    let cuda = &card.cuda;
    let start = cuda.memory_info().unwrap().free;
    let driver = Checked::new(cuda.clone(), CheckedOptions::TEST);
    let cache = cache(driver.clone(), Bytes::gib(8));
    let slot = admit(&cache, 1000);
    common::contents::fill(&cache, slot, 7, 0..1000);
    // Somebody takes the rest of the card.
    let mut taken = Vec::new();
    for size in [Bytes::gib(4), Bytes::mib(512), Bytes::mib(64), Bytes::mib(2)] {
        while let Ok(handle) = cuda.create(size) {
            taken.push(handle);
        }
    }
    let before = cache.report().unwrap().slots;
    let error = step(&cache, slot, 20_000).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfDeviceMemory, "{error}");
    assert_eq!(error.driver().unwrap().name, "CUDA_ERROR_OUT_OF_MEMORY");
    assert_eq!(cache.report().unwrap().slots, before);
    assert_eq!(cache.health(), Health::Healthy);
    for handle in taken {
        // SAFETY: created above, released once.
        unsafe { cuda.release(handle) }.unwrap();
    }
    step(&cache, slot, 20_000).unwrap();
    common::contents::find(&cache, slot, 7, 1000);
    drop(cache);
    assert_eq!(driver.live(), Live::default());
    assert_eq!(cuda.memory_info().unwrap().free, start);
}

#[test]
fn more_up_front_than_is_free_leaves_nothing_behind() {
    let Some((_alone, cuda)) = alone() else { return };
    let start = cuda.memory_info().unwrap();
    let config = Config::builder(Geometry::preset("llama-3-8b").unwrap())
        .budget(start.total)
        .commit(vattn::geometry::Commit::Whole);
    let error = KvCache::new(config.build().unwrap(), cuda.clone()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfDeviceMemory, "{error}");
    assert_eq!(cuda.memory_info().unwrap(), start);
}

#[test]
fn every_device_has_a_driver_of_its_own() {
    let Some((_alone, _cuda)) = alone() else { return };
    let devices = devices().unwrap();
    if devices.len() < 2 {
        println!("SKIP: one device is too few to tell two apart");
        return;
    }
    let caches: Vec<_> = devices
        .iter()
        .map(|device| {
            let options = CudaOptions { ordinal: Some(device.ordinal), ..CudaOptions::default() };
            let cuda = Cuda::new(options).unwrap();
            let free = cuda.memory_info().unwrap().free;
            let cache = cache(cuda.clone(), Bytes::gib(2));
            let slot = admit(&cache, 8192);
            assert_eq!(cuda.memory_info().unwrap().free, free - cache.bytes().held);
            cache.retire(slot, &[Fence::Stream(Stream::LEGACY)]).unwrap();
            assert_eq!(cache.view(0, Part::Key).unwrap().device, Device::Cuda(device.ordinal));
            cache
        })
        .collect();
    assert_eq!(caches.len(), devices.len());
}

#[test]
fn a_stream_of_another_context_is_never_the_devices_end() {
    let Some((_alone, card)) = card_alone() else { return };
    let cache = cache(card.cuda.clone(), Bytes::gib(1));
    let slot = admit(&cache, 100);
    let other = own_context();
    let foreign = Card::new(Cuda::new(CudaOptions::default()).unwrap());
    let theirs = foreign.stream(stream(1));
    // A stream of a living context that is another's: CUDA takes it or not, and nothing is lost.
    let answer = cache.retire(slot, &[Fence::Stream(theirs)]);
    println!("a stream of another context: {answer:?}");
    assert_eq!(cache.health(), Health::Healthy);
    drop(foreign);
    // SAFETY: made here, and nothing uses it any more.
    ok(unsafe { sys::cuCtxDestroy_v2(other) });
    admit(&cache, 50);
}

/// What a child does to its context, with a cache that lives through it. Destroying one that is lent to the
/// driver is not among it: CUDA would follow a pointer to what was freed.
const DEATHS: [&str; 2] = ["a kernel faults", "the primary context is reset"];

fn die(how: &str) {
    let card = Card::open().unwrap();
    // The test's own cleanup would fail; the driver's own has to bear it.
    card.forget_streams();
    let cache = cache(card.cuda.clone(), Bytes::gib(2));
    let slot = admit(&cache, 1000);
    let parked = admit(&cache, 1000);
    cache.retire(parked, &[Fence::Stream(card.stream(stream(1)))]).unwrap();
    match how {
        "a kernel faults" => {
            let kernels = Kernels::get();
            let view = cache.view(0, Part::Key).unwrap();
            let unbacked = pointer(view.addr.get() + view.strides[1] * 2 * 30_000);
            let faulted = catch_unwind(AssertUnwindSafe(|| kernels.poke(unbacked)));
            assert!(faulted.is_err());
        }
        // SAFETY: what becomes of whoever still uses the context is what this test is about.
        "the primary context is reset" => ok(unsafe { sys::cuDevicePrimaryCtxReset_v2(0) }),
        _ => panic!("\"{how}\" is no death"),
    }
    // CUDA maps memory on behalf of a context in which a kernel faulted. Its events tell.
    let first = step(&cache, slot, 8_000);
    assert!(first.is_err() || how == "a kernel faults");
    let error = first.and_then(|()| cache.retire(slot, &[Fence::Stream(Stream::LEGACY)])).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::DeviceLost, "{error}");
    println!("{}", error.report());
    assert_eq!(cache.health(), Health::Failed);
    assert_eq!(step(&cache, slot, 9_000).unwrap_err().kind(), ErrorKind::Unhealthy);
    drop(cache);
    assert_eq!(Arc::strong_count(&card.cuda), 1, "the driver is dropped here");
    drop(card);
    println!("cache and driver outlived the context");
}

/// Runs in children alone.
#[test]
fn child() {
    if let Ok(how) = std::env::var("VATTN_DIE") {
        die(&how);
        // What CUDA does at its own end with such a context is no business of this test.
        std::process::exit(0);
    }
}

#[test]
fn a_context_that_dies_is_an_error_and_never_the_end_of_the_process() {
    let Some((_alone, _cuda)) = alone() else { return };
    for how in DEATHS {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["child", "--exact", "--nocapture", "--test-threads=1"])
            .env("VATTN_DIE", how)
            .env("VATTN_TEST_DEVICE", "cuda")
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let [text, why] = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text));
        println!("{how}: {text}");
        assert!(output.status.success(), "{how}: {:?} {text} {why}", output.status);
        assert!(text.contains("cache and driver outlived the context"), "{how}: {text}");
    }
}

/// An address that nobody may use is known to be one: the reservation is larger than memory.
#[test]
fn twelve_tebibytes_of_addresses_are_reserved_and_given_back() {
    let Some((_alone, cuda)) = alone() else { return };
    let size = Bytes::gib(12 << 10);
    let bases: Vec<DeviceAddr> = (0..3).map(|_| cuda.reserve(size).unwrap()).collect();
    for base in bases {
        // SAFETY: reserved above, with nothing in it.
        unsafe { cuda.free(base, size) }.unwrap();
    }
}
