//! The context that calls are made in.

use crate::driver::cuda::api::Api;
use crate::driver::cuda::{codes, device};
use crate::error::{Error, ErrorKind, Result, Verb};
use crate::units::Bytes;

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
                let retained = is_primary(api, device, context)?.then_some(device);
                return Ok((Self { api, context, retained }, of_device));
            }
        }
        let ordinal = ordinal.unwrap_or(0);
        let device = device::get(api, ordinal)?;
        let context = retain(api, device)?;
        Ok((Self { api, context, retained: Some(device) }, ordinal))
    }

    pub(super) fn api(&self) -> &'static Api {
        self.api
    }

    pub(super) fn number(&self) -> u64 {
        self.context
    }

    /// What a call of the library answered: zero is success, anything else an error.
    pub(super) fn check(&self, verb: Verb, size: Option<Bytes>, code: u32) -> Result<()> {
        if code == 0 { Ok(()) } else { Err(codes::refused(self.api, verb, size, code)) }
    }

    /// The same of a call that names a stream or an event of the caller's: one that is gone is the
    /// caller's mistake, as long as the context lives.
    pub(super) fn check_of_caller(&self, verb: Verb, code: u32) -> Result<()> {
        if codes::may_be_the_callers(code) && is_alive(self.api, self.context) {
            return Err(codes::refused_of_caller(self.api, verb, code));
        }
        self.check(verb, None, code)
    }

    /// Makes the context current and capture relaxed on this thread, until the answer is dropped.
    pub(super) fn enter(&self, verb: Verb) -> Result<Entered> {
        let api = self.api;
        let mut current = 0;
        // SAFETY: the pointer is to a living integer.
        self.check(verb, None, unsafe { (api.ctx_get_current)(&raw mut current) })?;
        let mut entered = Entered { api, pushed: false, mode: None };
        if current == self.context {
            // A context that was destroyed stays current, and what was made in it must not be touched.
            let mut version = 0;
            // SAFETY: the pointer is to a living integer; CUDA refuses a context that is gone.
            self.check(verb, None, unsafe { (api.ctx_get_api_version)(self.context, &raw mut version) })?;
        } else {
            // SAFETY: the context is retained, or its owner keeps it alive as the module asks.
            self.check(verb, None, unsafe { (api.ctx_push_current)(self.context) })?;
            entered.pushed = true;
        }
        let mut mode = RELAXED;
        // SAFETY: the pointer is to a living mode, which is exchanged for the thread's.
        self.check(verb, None, unsafe { (api.thread_exchange_capture_mode)(&raw mut mode) })?;
        entered.mode = Some(mode);
        Ok(entered)
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // One that somebody reset is not retained by us any more.
        if let Some(device) = self.retained.filter(|_| is_alive(self.api, self.context)) {
            // SAFETY: retained once, released once.
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
    let mut context = 0;
    // SAFETY: the pointer is to a living integer.
    codes::check_set_up(api, unsafe { (api.ctx_get_current)(&raw mut context) })?;
    if context == 0 || !is_alive(api, context) {
        return Ok(None);
    }
    let mut device = 0;
    // SAFETY: the pointer is to a living integer, and a context is current.
    codes::check_set_up(api, unsafe { (api.ctx_get_device)(&raw mut device) })?;
    Ok(Some((context, device)))
}

/// Whether a context has not been destroyed.
fn is_alive(api: &Api, context: u64) -> bool {
    let mut version = 0;
    // SAFETY: the pointer is to a living integer; CUDA refuses a context that is gone.
    unsafe { (api.ctx_get_api_version)(context, &raw mut version) == 0 }
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
