//! What this library knows of Python: the end of a capsule that has a DLPack tensor in it, and whether a thread
//! holds the interpreter's lock.
//!
//! A consumer that takes a tensor over renames its capsule. One that failed on the way lets go of the capsule
//! with an exception under way, when no code in Python can run: so the destructor is the library's. Python's
//! functions are looked for in the process that calls, and nothing is linked.

use std::ffi::{CStr, c_char, c_int, c_void};

use super::dlpack;

type IsValid = unsafe extern "C" fn(*mut c_void, *const c_char) -> c_int;
type Check = unsafe extern "C" fn() -> c_int;
type GetPointer = unsafe extern "C" fn(*mut c_void, *const c_char) -> *mut c_void;

/// What a capsule is called until its tensor is taken over, by the tensor's version.
const NAMES: [&CStr; 2] = [c"dltensor", c"dltensor_versioned"];

/// Deletes the tensor of a capsule that nobody took over.
///
/// # Safety
/// - `capsule` is NULL, or Python's and alive, with the interpreter's lock held and a tensor of this library.
pub(super) unsafe fn destroy_capsule(capsule: *mut c_void) {
    if capsule.is_null() {
        return;
    }
    let Some((is_valid, get_pointer)) = capsules() else { return };
    for (version, name) in (0..).zip(NAMES) {
        // SAFETY: the capsule is alive, and a name of one of these is that of a tensor which is still its own.
        unsafe {
            if is_valid(capsule, name.as_ptr()) == 1 {
                // A tensor of a parent's is left to it, and nothing else can be refused.
                let _ = dlpack::destroy(get_pointer(capsule, name.as_ptr()), version);
            }
        }
    }
}

/// Whether this thread holds the lock of an interpreter.
pub(super) fn holds_lock() -> bool {
    // SAFETY: it may be called from any thread, whether it was Python's before or not.
    check().is_some_and(|check| unsafe { check() } == 1)
}

#[cfg(unix)]
fn find(name: &CStr) -> Option<*mut c_void> {
    // SAFETY: the name ends with a NUL.
    let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    (!found.is_null()).then_some(found)
}

#[cfg(not(unix))]
fn find(_: &CStr) -> Option<*mut c_void> {
    None
}

fn capsules() -> Option<(IsValid, GetPointer)> {
    let (is_valid, get_pointer) = (find(c"PyCapsule_IsValid")?, find(c"PyCapsule_GetPointer")?);
    // SAFETY: in every process that has these they are Python's, whose stable ABI declares them so.
    unsafe {
        Some((
            std::mem::transmute::<*mut c_void, IsValid>(is_valid),
            std::mem::transmute::<*mut c_void, GetPointer>(get_pointer),
        ))
    }
}

fn check() -> Option<Check> {
    // SAFETY: as above.
    find(c"PyGILState_Check").map(|check| unsafe { std::mem::transmute::<*mut c_void, Check>(check) })
}
