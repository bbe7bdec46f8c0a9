//! A driver's calls with nothing of this library around them: no books, no counters, nothing that
//! frees on drop.
//!
//! On a card these are the functions of CUDA's library themselves, called with the context current on
//! the thread as a server has it. On the host the driver is the library's own, so there its verbs are
//! called. A call that fails ends the bench: all that is asked here was granted before.

#![allow(unsafe_code, reason = "calls a driver's verbs, and a C library")]

use std::sync::Arc;

use vattn::driver::{Access, Driver, RawHandle};
use vattn::units::{Bytes, DeviceAddr};

/// See the [module](self). Whoever calls keeps to the conditions of [`Driver`].
pub struct Bare {
    driver: Arc<dyn Driver>,
    #[cfg(feature = "cuda")]
    raw: Option<raw::Raw>,
}

/// Calls the raw function on a card, the verb elsewhere.
macro_rules! call {
    ($self:ident, $($raw:tt)*) => {
        #[cfg(feature = "cuda")]
        if let Some(raw) = &$self.raw {
            return raw.$($raw)*;
        }
    };
}

impl Bare {
    pub fn new(driver: Arc<dyn Driver>) -> Self {
        Self {
            driver,
            #[cfg(feature = "cuda")]
            raw: None,
        }
    }

    /// The functions of CUDA's library. The driver's context becomes current on this thread.
    #[cfg(feature = "cuda")]
    pub fn of_cuda(driver: &Arc<vattn::driver::cuda::Cuda>) -> Self {
        Self { raw: Some(raw::Raw::new(driver)), driver: driver.clone() }
    }

    pub fn reserve(&self, size: Bytes) -> DeviceAddr {
        self.driver.reserve(size).expect("addresses")
    }

    pub fn free(&self, addr: DeviceAddr, size: Bytes) {
        // SAFETY: a bench frees what it reserved, once, with nothing mapped in it.
        unsafe { self.driver.free(addr, size) }.expect("the reservation is the bench's");
    }

    /// `None` if there is no memory left.
    pub fn try_create(&self, size: Bytes) -> Option<RawHandle> {
        call!(self, create(size));
        self.driver.create(size).ok()
    }

    pub fn create(&self, size: Bytes) -> RawHandle {
        self.try_create(size).expect("memory")
    }

    pub fn map(&self, addr: DeviceAddr, size: Bytes, handle: RawHandle) {
        call!(self, map(addr, size, handle));
        // SAFETY: a bench maps whole living handles into free parts of living reservations.
        unsafe { self.driver.map(addr, size, handle) }.expect("the range is free");
    }

    pub fn set_access(&self, addr: DeviceAddr, size: Bytes) {
        call!(self, set_access(addr, size));
        // SAFETY: a bench gives access to whole mappings, and takes none away.
        unsafe { self.driver.set_access(addr, size, Access::ReadWrite) }.expect("the range is mapped");
    }

    pub fn unmap(&self, addr: DeviceAddr, size: Bytes) {
        call!(self, unmap(addr, size));
        // SAFETY: a bench unmaps whole mappings, which nothing uses.
        unsafe { self.driver.unmap(addr, size) }.expect("the range is mapped");
    }

    pub fn release(&self, handle: RawHandle) {
        call!(self, release(handle));
        // SAFETY: a bench releases what it created, once.
        unsafe { self.driver.release(handle) }.expect("the handle is the bench's");
    }
}

#[cfg(feature = "cuda")]
mod raw {
    use std::sync::Arc;

    use cudarc::driver::sys;
    use vattn::driver::cuda::Cuda;
    use vattn::driver::{Driver, RawHandle};
    use vattn::units::{Bytes, Device, DeviceAddr};

    const OUT_OF_MEMORY: u32 = 2;

    /// `CUmemLocation`
    #[repr(C)]
    struct Location {
        kind: u32,
        id: u32,
    }

    /// `CUmemAllocationProp`
    #[repr(C)]
    struct AllocationProp {
        kind: u32,
        handle_types: u32,
        location: Location,
        win32: usize,
        flags: [u8; 8],
    }

    /// `CUmemAccessDesc`
    #[repr(C)]
    struct AccessDesc {
        location: Location,
        flags: u32,
    }

    type Create = unsafe extern "C" fn(*mut u64, usize, *const AllocationProp, u64) -> u32;
    type Map = unsafe extern "C" fn(u64, usize, usize, u64, u64) -> u32;
    type SetAccess = unsafe extern "C" fn(u64, usize, *const AccessDesc, usize) -> u32;
    type Unmap = unsafe extern "C" fn(u64, usize) -> u32;
    type Release = unsafe extern "C" fn(u64) -> u32;
    type SetCurrent = unsafe extern "C" fn(u64) -> u32;

    pub(super) struct Raw {
        prop: AllocationProp,
        access: AccessDesc,
        create: Create,
        map: Map,
        set_access: SetAccess,
        unmap: Unmap,
        release: Release,
    }

    impl Raw {
        pub(super) fn new(driver: &Arc<Cuda>) -> Self {
            let Device::Cuda(ordinal) = driver.info().device else { unreachable!("it is a CUDA driver") };
            let location = || Location { kind: 1, id: ordinal };
            // SAFETY: the library was found when the driver was made; the types are those of CUDA's header.
            unsafe {
                let set_current: SetCurrent = symbol(b"cuCtxSetCurrent\0");
                check("cuCtxSetCurrent", set_current(driver.context()));
                Self {
                    prop: AllocationProp {
                        kind: 1,
                        handle_types: 0,
                        location: location(),
                        win32: 0,
                        flags: [0; 8],
                    },
                    access: AccessDesc { location: location(), flags: 3 },
                    create: symbol(b"cuMemCreate\0"),
                    map: symbol(b"cuMemMap\0"),
                    set_access: symbol(b"cuMemSetAccess\0"),
                    unmap: symbol(b"cuMemUnmap\0"),
                    release: symbol(b"cuMemRelease\0"),
                }
            }
        }

        pub(super) fn create(&self, bytes: Bytes) -> Option<RawHandle> {
            let mut handle = 0;
            // SAFETY: both pointers are to living values.
            match unsafe { (self.create)(&raw mut handle, size(bytes), &raw const self.prop, 0) } {
                OUT_OF_MEMORY => None,
                code => {
                    check("cuMemCreate", code);
                    Some(RawHandle(handle))
                }
            }
        }

        pub(super) fn map(&self, addr: DeviceAddr, bytes: Bytes, handle: RawHandle) {
            // SAFETY: the caller's conditions are CUDA's.
            check("cuMemMap", unsafe { (self.map)(addr.get(), size(bytes), 0, handle.0, 0) });
        }

        pub(super) fn set_access(&self, addr: DeviceAddr, bytes: Bytes) {
            let access = &raw const self.access;
            // SAFETY: the caller's conditions are CUDA's, and the description lives.
            check("cuMemSetAccess", unsafe { (self.set_access)(addr.get(), size(bytes), access, 1) });
        }

        pub(super) fn unmap(&self, addr: DeviceAddr, bytes: Bytes) {
            // SAFETY: the caller's conditions are CUDA's.
            check("cuMemUnmap", unsafe { (self.unmap)(addr.get(), size(bytes)) });
        }

        pub(super) fn release(&self, handle: RawHandle) {
            // SAFETY: the caller's condition is CUDA's.
            check("cuMemRelease", unsafe { (self.release)(handle.0) });
        }
    }

    /// # Safety
    /// The library is there, and `T` is the function's type.
    unsafe fn symbol<T: Copy>(name: &[u8]) -> T {
        // SAFETY: the caller's conditions.
        unsafe { *sys::culib().get::<T>(name).expect("CUDA 11.4 has it") }
    }

    fn size(bytes: Bytes) -> usize {
        usize::try_from(bytes.get()).expect("a size of a 64-bit machine")
    }

    fn check(what: &str, code: u32) {
        assert_eq!(code, 0, "{what} answers {code}");
    }
}
