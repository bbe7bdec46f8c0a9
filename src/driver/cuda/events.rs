//! Events: the library's own in other people's streams, and ones that follow other people's events.

use std::collections::VecDeque;

use crate::driver::cuda::codes;
use crate::driver::cuda::context::Context;
use crate::driver::events::capturing;
use crate::driver::{RawEvent, Stream};
use crate::error::{Result, Verb};
use crate::sync::Leaf;

/// `CU_EVENT_BLOCKING_SYNC | CU_EVENT_DISABLE_TIMING`: who waits sleeps.
const EVENT_FLAGS: u32 = 1 | 2;
/// `CU_STREAM_NON_BLOCKING`: the legacy default stream does not wait for it, nor it for that.
const NON_BLOCKING: u32 = 1;
/// How many streams the library makes, but for threads that need one at the same moment. An event of
/// another's that is long in firing holds up those that follow it in the same stream.
const STREAMS: usize = 8;

/// The library's own streams, which wait for the events of others.
#[derive(Debug, Default)]
pub(super) struct Events {
    streams: Leaf<Streams>,
}

#[derive(Debug, Default)]
struct Streams {
    /// Those that no thread is using now, the one used longest ago first.
    unused: VecDeque<u64>,
    made: usize,
}

impl Events {
    /// A new event at the point that a stream has reached.
    pub(super) fn record(&self, context: &Context, stream: Stream) -> Result<RawEvent> {
        let verb = Verb::RecordEvent;
        refuse_capturing(context, verb, stream)?;
        let event = Fresh::new(context, verb)?;
        // SAFETY: the event is new; the stream is alive by the promise of `Stream::new`.
        let code = unsafe { (context.api().event_record)(event.event, stream.0) };
        context.check_of_caller(verb, code)?;
        Ok(event.keep())
    }

    /// A new event that fires once another has.
    ///
    /// # Safety
    /// - `event` is a living event of this device.
    pub(super) unsafe fn follow(&self, context: &Context, event: RawEvent) -> Result<RawEvent> {
        let verb = Verb::FollowEvent;
        let follower = Fresh::new(context, verb)?;
        // An event that was recorded into a graph is refused here: to wait for it would draw the waiting stream
        // into the capture. An event that was never recorded counts as fired, and so does the follower then.
        // SAFETY: the caller's condition is the callee's.
        if unsafe { query(context, verb, event) }? {
            return Ok(follower.keep());
        }
        let stream = self.take(context)?;
        // SAFETY: the stream is the library's own and this thread's for now, and the caller says that the event lives.
        let waited = unsafe { (context.api().stream_wait_event)(stream, event.0, 0) };
        let recorded = context.check_of_caller(verb, waited).and_then(|()| {
            // SAFETY: both are the library's own.
            context.check(verb, None, unsafe { (context.api().event_record)(follower.event, stream) })
        });
        self.streams.lock().unused.push_back(stream);
        recorded.map(|()| follower.keep())
    }

    /// A stream with nothing in it, or a new one, or the one that was used longest ago.
    fn take(&self, context: &Context) -> Result<u64> {
        let unused = self.streams.lock().unused.len();
        for _ in 0..unused {
            let Some(stream) = self.streams.lock().unused.pop_front() else { break };
            // SAFETY: the stream is the library's own.
            if unsafe { (context.api().stream_query)(stream) } == 0 {
                return Ok(stream);
            }
            self.streams.lock().unused.push_back(stream);
        }
        {
            let mut streams = self.streams.lock();
            if streams.made >= STREAMS
                && let Some(stream) = streams.unused.pop_front()
            {
                return Ok(stream);
            }
            streams.made += 1;
        }
        let mut stream = 0;
        // SAFETY: the pointer is to a living integer.
        let code = unsafe { (context.api().stream_create)(&raw mut stream, NON_BLOCKING) };
        context
            .check(Verb::FollowEvent, None, code)
            .inspect_err(|_| self.streams.lock().made -= 1)
            .map(|()| stream)
    }

    /// Gives the library's streams back; work in them ends by itself.
    pub(super) fn destroy_streams(&self, context: &Context) {
        for stream in self.streams.lock().unused.drain(..) {
            // SAFETY: made by `take`, used by no thread any more, and taken out of the list here.
            unsafe { (context.api().stream_destroy)(stream) };
        }
    }
}

/// An event that is destroyed unless it is kept.
struct Fresh<'a> {
    context: &'a Context,
    event: u64,
}

impl<'a> Fresh<'a> {
    fn new(context: &'a Context, verb: Verb) -> Result<Self> {
        let mut event = 0;
        // SAFETY: the pointer is to a living integer.
        let code = unsafe { (context.api().event_create)(&raw mut event, EVENT_FLAGS) };
        context.check(verb, None, code)?;
        Ok(Self { context, event })
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
        unsafe { (self.context.api().event_destroy)(self.event) };
    }
}

/// Whether an event has fired.
///
/// # Safety
/// - `event` is a living event of this device.
pub(super) unsafe fn query(context: &Context, verb: Verb, event: RawEvent) -> Result<bool> {
    // SAFETY: the caller's condition is CUDA's.
    match unsafe { (context.api().event_query)(event.0) } {
        codes::NOT_READY => Ok(false),
        code => context.check_of_caller(verb, code).map(|()| true),
    }
}

/// A record or a wait in a stream that is being captured would become part of the graph, in silence.
pub(super) fn refuse_capturing(context: &Context, verb: Verb, stream: Stream) -> Result<()> {
    let mut status = 0;
    // SAFETY: the pointer is to a living integer; the stream is alive by the promise of `Stream::new`.
    let code = unsafe { (context.api().stream_is_capturing)(stream.0, &raw mut status) };
    context.check_of_caller(verb, code)?;
    if status == 0 {
        return Ok(());
    }
    Err(capturing(verb, stream))
}
