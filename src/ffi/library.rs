//! The library itself: its versions, what this machine offers, the strings that it gives out.

use std::collections::BTreeMap;
use std::ffi::{CString, c_char};

use super::args;
use super::entry::{Failure, enter, plain};
use super::status::vattn_status::{self, VATTN_INVALID_HANDLE};
use crate::geometry::Catalog;
use crate::sync::Leaf;

/// The version of the ABI that this header describes. It changes where a program that was built with an
/// earlier header would no longer work; fields and functions are added without.
pub const VATTN_ABI_VERSION: u32 = 1;

/// The version of the ABI that the library has: compare it with `VATTN_ABI_VERSION`.
#[unsafe(no_mangle)]
pub extern "C" fn vattn_abi_version() -> u32 {
    plain(0, || VATTN_ABI_VERSION)
}

/// The version of the library, such as `0.1.0`. The string is the library's and lives as long as it.
#[unsafe(no_mangle)]
pub extern "C" fn vattn_version() -> *const c_char {
    plain(c"".as_ptr(), || concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast())
}

/// What this library finds on this machine, as one JSON object: its version, CUDA's version and devices,
/// or why there are none, and whether the host driver works. The text is the caller's:
/// `vattn_string_destroy` gives it up.
///
/// # Safety
/// - `out` is NULL, or a pointer can be written there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_probe_json(out: *mut *mut c_char) -> vattn_status {
    enter("vattn_probe_json", || {
        super::fork::watch()?;
        // SAFETY: as the caller promises.
        let out = unsafe { args::out("out", out) }?;
        let probe = serde_json::json!({
            "version": env!("CARGO_PKG_VERSION"),
            "abi_version": VATTN_ABI_VERSION,
            "cuda": cuda(),
            "host": cfg!(target_os = "linux"),
        });
        out.set(keep_text(probe.to_string()));
        Ok(())
    })
}

/// The models and the kernels that can be named, as one JSON object with two arrays.
///
/// `presets`: `name`, `description`, `layers`, `kv_heads`, `key_dim`, `value_dim`, `dtype`, `bytes_per_token`.
/// Where layers keep a latent, `key_dim` is its elements, and `kv_heads` and `value_dim` are 0.
///
/// `kernels`: `name`, `summary`, `evidence` (`measured` or `source`), `source`, `exact`, `tiles`, `latents`. One
/// that is exact reads nothing past a length. Of any other the first of its `tiles` counts that has the type
/// and is wide enough: each has `dtypes`, `key_dim`, `value_dim`, `tokens`, of which `tile_tokens` is to be a
/// multiple. `latents` says as heads of which `key_dim` and `value_dim` one of `dim` is looked up.
///
/// Types have PyTorch's names. The text is the caller's: `vattn_string_destroy` gives it up.
///
/// # Safety
/// - `out` is NULL, or a pointer can be written there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_catalog_json(out: *mut *mut c_char) -> vattn_status {
    enter("vattn_catalog_json", || {
        super::fork::watch()?;
        // SAFETY: as the caller promises.
        let out = unsafe { args::out("out", out) }?;
        out.set(keep_text(Catalog::new()?.to_json()));
        Ok(())
    })
}

#[cfg(feature = "cuda")]
fn cuda() -> serde_json::Value {
    use crate::driver::cuda::{devices, driver_version};
    match devices().and_then(|devices| Ok((devices, driver_version()?))) {
        Ok((devices, (major, minor))) => {
            serde_json::json!({ "version": format!("{major}.{minor}"), "devices": devices })
        }
        Err(error) => serde_json::json!({ "error": error.report() }),
    }
}

#[cfg(not(feature = "cuda"))]
fn cuda() -> serde_json::Value {
    serde_json::json!({ "error": "this library was built without the driver for GPUs" })
}

/// The strings that C has, by their addresses: one that is given back twice is known for it.
pub(super) static STRINGS: Leaf<BTreeMap<usize, CString>> = Leaf::new(BTreeMap::new());

/// Keeps a text for C.
pub(super) fn keep_text(mut text: String) -> *mut c_char {
    text.retain(|character| character != '\0');
    let text = CString::new(text).expect("what would end it early was just taken out");
    let first = text.as_ptr().cast_mut();
    STRINGS.lock().insert(first.addr(), text);
    first
}

/// Gives up a string that the library gave out. NULL is no error.
///
/// # Safety
/// - any pointer may be passed; one to anything else is refused.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_string_destroy(string: *mut c_char) -> vattn_status {
    enter("vattn_string_destroy", || {
        if string.is_null() || STRINGS.lock().remove(&string.addr()).is_some() {
            return Ok(());
        }
        Err(Failure::new(
            VATTN_INVALID_HANDLE,
            format!("{string:p} is no string of this library, or no more; pass each one once"),
        ))
    })
}
