//! What `fork` leaves to a child.
//!
//! Owns the number of forks that lie before this process, and sees to it that no lock of this room is held
//! by a thread that is not there in the child: a fork waits until each is free. Locks of caches and drivers
//! are none of its business, as the child is refused its parent's.

#[cfg(not(unix))]
pub(super) use none::{count, watch};
#[cfg(unix)]
pub(super) use unix::{count, watch};

#[cfg(unix)]
mod unix {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU8, Ordering};

    use crate::ffi::entry::Failure;
    use crate::ffi::handle::{BUFFERS, CACHES, DRIVERS, GEOMETRIES, PINS};
    use crate::ffi::library::STRINGS;
    use crate::ffi::log;
    use crate::ffi::status::vattn_status::VATTN_UNSUPPORTED;
    use crate::sync::{Leaf, RawLeaf, RawLock as _};

    static COUNT: AtomicU8 = AtomicU8::new(0);

    /// How many forks lie between the process that first loaded this library and this one.
    #[inline]
    pub(in crate::ffi) fn count() -> u8 {
        COUNT.load(Ordering::Relaxed)
    }

    /// Sees to it that a child knows that it is one, and finds these locks free.
    pub(in crate::ffi) fn watch() -> Result<(), Failure> {
        static WATCHED: OnceLock<i32> = OnceLock::new();
        let watch = || {
            // SAFETY: the functions take and give up locks under which nobody forks.
            unsafe { libc::pthread_atfork(Some(before), Some(in_parent), Some(in_child)) }
        };
        if *WATCHED.get_or_init(watch) == 0 {
            return Ok(());
        }
        Err(Failure::new(VATTN_UNSUPPORTED, "pthread_atfork has no memory left; free some"))
    }

    unsafe extern "C" fn before() {
        std::mem::forget(BUFFERS.free.lock());
        std::mem::forget(CACHES.free.lock());
        std::mem::forget(DRIVERS.free.lock());
        std::mem::forget(GEOMETRIES.free.lock());
        std::mem::forget(PINS.free.lock());
        std::mem::forget(STRINGS.lock());
        std::mem::forget(log::CHANGING.lock());
    }

    unsafe extern "C" fn in_parent() {
        // SAFETY: `before` took each of them on this thread.
        unsafe {
            log::CHANGING.force_unlock();
            STRINGS.force_unlock();
            PINS.free.force_unlock();
            GEOMETRIES.free.force_unlock();
            DRIVERS.free.force_unlock();
            CACHES.free.force_unlock();
            BUFFERS.free.force_unlock();
        }
    }

    unsafe extern "C" fn in_child() {
        COUNT.fetch_add(1, Ordering::Relaxed);
        // SAFETY: this is the only thread, and what `before` took is whole.
        unsafe {
            anew(&log::CHANGING);
            anew(&STRINGS);
            anew(&PINS.free);
            anew(&GEOMETRIES.free);
            anew(&DRIVERS.free);
            anew(&CACHES.free);
            anew(&BUFFERS.free);
            log::in_child();
        }
    }

    /// Frees a lock. Giving it up would hand it to a thread that waits for it, and none is there any more.
    ///
    /// # Safety
    /// - there is no other thread.
    unsafe fn anew<T>(lock: &Leaf<T>) {
        // SAFETY: nobody else uses it, and what it is made of may change behind a shared reference.
        unsafe { std::ptr::from_ref(lock.raw()).cast_mut().write(RawLeaf::INIT) }
    }
}

#[cfg(not(unix))]
mod none {
    use crate::ffi::entry::Failure;

    pub(in crate::ffi) fn count() -> u8 {
        0
    }

    pub(in crate::ffi) fn watch() -> Result<(), Failure> {
        Ok(())
    }
}
