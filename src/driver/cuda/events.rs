//! Events: the library's own in other people's streams, and ones that follow other people's events.

use crate::driver::cuda::api::Api;
use crate::driver::cuda::codes;
use crate::driver::{RawEvent, Stream};
use crate::error::{Error, ErrorKind, Result, Verb};
use crate::sync::Leaf;

/// `CU_EVENT_BLOCKING_SYNC | CU_EVENT_DISABLE_TIMING`: who waits sleeps.
const EVENT_FLAGS: u32 = 1 | 2;
/// `CU_STREAM_NON_BLOCKING`: the legacy default stream does not wait for it, nor it for that.
const NON_BLOCKING: u32 = 1;
/// How many streams the library makes at most. An event of another's that is long in firing holds up
/// those that follow it in the same stream.
const STREAMS: usize = 8;

/// The library's own streams, which wait for the events of others.
#[derive(Debug, Default)]
pub(super) struct Events {
    streams: Leaf<Streams>,
}

#[derive(Debug, Default)]
struct Streams {
    own: Vec<u64>,
    /// Whose turn it is when all are busy.
    next: usize,
}

impl Events {
    /// A new event at the point that a stream has reached.
    pub(super) fn record(&self, api: &Api, stream: Stream) -> Result<RawEvent> {
        refuse_capturing(api, Verb::RecordEvent, stream)?;
        let event = Fresh::new(api, Verb::RecordEvent)?;
        // SAFETY: the event is new; the stream is alive by the promise of `Stream::new`.
        codes::check(api, Verb::RecordEvent, None, unsafe { (api.event_record)(event.event, stream.0) })?;
        Ok(event.keep())
    }

    /// A new event that fires once another has.
    ///
    /// # Safety
    /// - `event` is a living event of this device.
    pub(super) unsafe fn follow(&self, api: &Api, event: RawEvent) -> Result<RawEvent> {
        let verb = Verb::FollowEvent;
        let follower = Fresh::new(api, verb)?;
        // An event that was recorded into a graph is refused here: to wait for it would draw the waiting stream
        // into the capture. An event that was never recorded counts as fired, and so does the follower then.
        // SAFETY: the caller's condition is the callee's.
        if unsafe { query(api, verb, event) }? {
            return Ok(follower.keep());
        }
        let mut streams = self.streams.lock();
        let stream = streams.pick(api)?;
        // SAFETY: the stream is the library's own, and the caller says that the event lives.
        codes::check(api, verb, None, unsafe { (api.stream_wait_event)(stream, event.0, 0) })?;
        // SAFETY: both are the library's own.
        codes::check(api, verb, None, unsafe { (api.event_record)(follower.event, stream) })?;
        Ok(follower.keep())
    }

    /// Gives the library's streams back; work in them ends by itself.
    pub(super) fn destroy_streams(&self, api: &Api) {
        for stream in self.streams.lock().own.drain(..) {
            // SAFETY: made by `pick` and taken out of the list here.
            unsafe { (api.stream_destroy)(stream) };
        }
    }
}

impl Streams {
    /// A stream with nothing in it, a new one, or the next in turn.
    fn pick(&mut self, api: &Api) -> Result<u64> {
        // SAFETY: the streams are the library's own.
        if let Some(idle) = self.own.iter().find(|stream| unsafe { (api.stream_query)(**stream) } == 0) {
            return Ok(*idle);
        }
        if self.own.len() < STREAMS {
            let mut stream = 0;
            // SAFETY: the pointer is to a living integer.
            codes::check(api, Verb::FollowEvent, None, unsafe {
                (api.stream_create)(&raw mut stream, NON_BLOCKING)
            })?;
            self.own.push(stream);
            return Ok(stream);
        }
        self.next = (self.next + 1) % STREAMS;
        Ok(self.own[self.next])
    }
}

/// An event that is destroyed unless it is kept.
struct Fresh<'a> {
    api: &'a Api,
    event: u64,
}

impl<'a> Fresh<'a> {
    fn new(api: &'a Api, verb: Verb) -> Result<Self> {
        let mut event = 0;
        // SAFETY: the pointer is to a living integer.
        codes::check(api, verb, None, unsafe { (api.event_create)(&raw mut event, EVENT_FLAGS) })?;
        Ok(Self { api, event })
    }

    fn keep(self) -> RawEvent {
        let event = RawEvent(self.event);
        std::mem::forget(self);
        event
    }
}

impl Drop for Fresh<'_> {
    fn drop(&mut self) {
        // SAFETY: the event is this one's own.
        unsafe { (self.api.event_destroy)(self.event) };
    }
}

/// Whether an event has fired.
///
/// # Safety
/// - `event` is a living event of this device.
pub(super) unsafe fn query(api: &Api, verb: Verb, event: RawEvent) -> Result<bool> {
    // SAFETY: the caller's condition is CUDA's.
    match unsafe { (api.event_query)(event.0) } {
        codes::NOT_READY => Ok(false),
        code => codes::check(api, verb, None, code).map(|()| true),
    }
}

/// A record or a wait in a stream that is being captured would become part of the graph, in silence.
pub(super) fn refuse_capturing(api: &Api, verb: Verb, stream: Stream) -> Result<()> {
    let mut status = 0;
    // SAFETY: the pointer is to a living integer; the stream is alive by the promise of `Stream::new`.
    codes::check(api, verb, None, unsafe { (api.stream_is_capturing)(stream.0, &raw mut status) })?;
    if status == 0 {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::CapturingStream,
        format!(
            "{verb} on stream {:#x}, which is being captured; end the capture first, or name a stream outside it",
            stream.0
        ),
    ))
}
