//! The context that calls are made in.

use crate::driver::cuda::api::Api;
use crate::driver::cuda::{codes, device};
use crate::error::{Error, ErrorKind, Result, Verb};

/// `CU_STREAM_CAPTURE_MODE_RELAXED`
const RELAXED: u32 = 2;

/// A context that the library uses: retained where it is the device's primary one, borrowed where it
/// is somebody else's.
#[derive(Debug)]
pub(super) struct Context {
    api: &'static Api,
    context: u64,
    /// The device whose primary context is retained.
    retained: Option<i32>,
}

impl Context {
    /// The context to use, and the ordinal of its device.
    pub(super) fn choose(api: &'static Api, ordinal: Option<u32>) -> Result<(Self, u32)> {
        let current = current(api)?;
        if let Some((context, device)) = current {
            // On this driver's ABI a device's handle is its ordinal.
            let of_device = u32::try_from(device).unwrap_or_default();
            if ordinal.is_none_or(|ordinal| ordinal == of_device) {
                let retained = match is_primary(api, device, context)? {
                    true => Some(device),
                    false => None,
                };
                return Ok((Self { api, context, retained }, of_device));
            }
        }
        let ordinal = ordinal.unwrap_or(0);
        let device = device::get(api, ordinal)?;
        let context = retain(api, device)?;
        Ok((Self { api, context, retained: Some(device) }, ordinal))
    }

    pub(super) fn number(&self) -> u64 {
        self.context
    }

    /// Makes the context current and capture relaxed on this thread, until the answer is dropped.
    pub(super) fn enter(&self, verb: Verb) -> Result<Entered> {
        let api = self.api;
        let mut current = 0;
        // SAFETY: the pointer is to a living integer.
        codes::check(api, verb, None, unsafe { (api.ctx_get_current)(&raw mut current) })?;
        let pushed = current != self.context;
        if pushed {
            // SAFETY: the context is retained, or its owner keeps it alive as the module asks.
            codes::check(api, verb, None, unsafe { (api.ctx_push_current)(self.context) })?;
        }
        let mut entered = Entered { api, pushed, mode: None };
        let mut mode = RELAXED;
        // SAFETY: the pointer is to a living mode, which is exchanged for the thread's.
        codes::check(api, verb, None, unsafe { (api.thread_exchange_capture_mode)(&raw mut mode) })?;
        entered.mode = Some(mode);
        Ok(entered)
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        if let Some(device) = self.retained {
            // SAFETY: retained once, released once. Where CUDA is gone already, it says so and that is that.
            unsafe { (self.api.primary_ctx_release)(device) };
        }
    }
}

/// A thread on which the context is current; its drop puts back what was there.
#[derive(Debug)]
#[must_use]
pub(super) struct Entered {
    api: &'static Api,
    pushed: bool,
    mode: Option<u32>,
}

impl Drop for Entered {
    fn drop(&mut self) {
        if let Some(mode) = &mut self.mode {
            // SAFETY: the pointer is to the mode that the thread had.
            unsafe { (self.api.thread_exchange_capture_mode)(mode) };
        }
        if self.pushed {
            let mut popped = 0;
            // SAFETY: the context on top is the one that `enter` pushed.
            unsafe { (self.api.ctx_pop_current)(&raw mut popped) };
        }
    }
}

/// The context that is current on this thread, with its device. One that was destroyed stays current
/// until another is set, and counts as none.
fn current(api: &Api) -> Result<Option<(u64, i32)>> {
    let (mut context, mut version) = (0, 0);
    // SAFETY: the pointer is to a living integer.
    codes::check_set_up(api, unsafe { (api.ctx_get_current)(&raw mut context) })?;
    // SAFETY: as before; CUDA refuses a context that is gone.
    if context == 0 || unsafe { (api.ctx_get_api_version)(context, &raw mut version) } != 0 {
        return Ok(None);
    }
    let mut device = 0;
    // SAFETY: the pointer is to a living integer, and a context is current.
    codes::check_set_up(api, unsafe { (api.ctx_get_device)(&raw mut device) })?;
    Ok(Some((context, device)))
}

/// Whether a context is the device's primary one; if so it is retained.
fn is_primary(api: &Api, device: i32, context: u64) -> Result<bool> {
    let (mut flags, mut active) = (0, 0);
    // SAFETY: both pointers are to living integers.
    codes::check_set_up(api, unsafe {
        (api.primary_ctx_get_state)(device, &raw mut flags, &raw mut active)
    })?;
    if active == 0 {
        return Ok(false);
    }
    if retain(api, device)? == context {
        return Ok(true);
    }
    // SAFETY: retained the line before.
    unsafe { (api.primary_ctx_release)(device) };
    Ok(false)
}

fn retain(api: &Api, device: i32) -> Result<u64> {
    let mut context = 0;
    // SAFETY: the pointer is to a living integer.
    codes::check_set_up(api, unsafe { (api.primary_ctx_retain)(&raw mut context, device) }).map_err(
        |error| {
            let kind = error.kind();
            Error::new(kind, "the device's primary context can't be had").caused_by(error)
        },
    )?;
    if context == 0 {
        return Err(Error::new(ErrorKind::Internal, "CUDA gave a null context"));
    }
    Ok(context)
}
