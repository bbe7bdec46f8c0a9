//! A fence as the library keeps it, until its memory is unmapped or used by another.

use std::sync::Arc;

use crate::driver::Stream;
use crate::driver::owned::Event;

/// An event of the library's, and where and when it was recorded.
#[derive(Clone, Debug)]
pub(crate) struct Kept {
    event: Arc<Event>,
    stream: Option<Stream>,
    started: u64,
    ended: u64,
}

impl Kept {
    /// An event, the stream that it was recorded in, and the moments before and after that on one
    /// clock that all fences share.
    pub(crate) fn new(event: Event, stream: Option<Stream>, started: u64, ended: u64) -> Self {
        Self { event: Arc::new(event), stream, started, ended }
    }

    pub(crate) fn event(&self) -> &Event {
        &self.event
    }

    /// Whether work that is submitted to `stream` from now on comes after the event anyway.
    ///
    /// CUDA's per-thread default stream has one number and is another stream in each thread.
    pub(crate) fn is_of(&self, stream: Stream) -> bool {
        self.stream == Some(stream) && stream != Stream::PER_THREAD
    }

    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.event, &other.event)
    }

    /// Whether this fence fires only after the other has: both are of one stream, and this one was
    /// recorded later. Of two that were recorded at the same time, neither says so.
    fn implies(&self, other: &Self) -> bool {
        self.is(other)
            || (other.stream.is_some_and(|stream| self.is_of(stream)) && self.started > other.ended)
    }
}

/// Adds fences to those that are kept, and returns those that others imply.
#[must_use = "events are destroyed where no lock is held"]
pub(crate) fn add(kept: &mut Vec<Kept>, fences: Vec<Kept>) -> Vec<Kept> {
    let mut implied = Vec::new();
    for fence in fences {
        if kept.iter().any(|other| other.implies(&fence)) {
            implied.push(fence);
        } else {
            implied.extend(kept.extract_if(.., |other| fence.implies(other)));
            kept.push(fence);
        }
    }
    implied
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::ledger::{Ledger, LedgerOptions};
    use crate::driver::owned::DriverHandle;
    use crate::stats::Counters;
    use crate::units::Bytes;

    fn left(fences: &[(Option<Stream>, u64, u64)]) -> Vec<u64> {
        let options = LedgerOptions { granule: Bytes::mib(2), capacity: Bytes::mib(2), addresses: None };
        let driver = DriverHandle::new(Ledger::new(options).unwrap(), Arc::new(Counters::default()));
        let mut kept = Vec::new();
        for (stream, started, ended) in fences {
            let event = Event::record(&driver, Stream::of_test(7)).unwrap();
            let _implied = add(&mut kept, vec![Kept::new(event, *stream, *started, *ended)]);
        }
        kept.iter().map(|fence| fence.started).collect()
    }

    #[test]
    fn a_later_fence_of_one_stream_stands_for_the_earlier_whichever_is_published_first() {
        let stream = Some(Stream::of_test(7));
        assert_eq!(left(&[(stream, 1, 2), (stream, 3, 4)]), [3]);
        assert_eq!(left(&[(stream, 3, 4), (stream, 1, 2)]), [3]);
    }

    #[test]
    fn fences_that_say_different_things_are_all_kept() {
        let stream = Some(Stream::of_test(7));
        assert_eq!(left(&[(stream, 1, 3), (stream, 2, 4)]), [1, 2], "recorded at the same time");
        assert_eq!(left(&[(stream, 1, 2), (Some(Stream::of_test(8)), 3, 4)]), [1, 3]);
        assert_eq!(left(&[(None, 1, 2), (None, 3, 4)]), [1, 3]);
        let per_thread = Some(Stream::PER_THREAD);
        assert_eq!(left(&[(per_thread, 1, 2), (per_thread, 3, 4)]), [1, 3]);
    }
}
