//! Who is served in which round: continuous batching over a cache.
//!
//! Owns the requests and their slots. Refuses to know about kernels and devices: it says what the kernels of a round
//! are to do, and is told when they are in the stream. They need not have run.

use std::collections::VecDeque;

use vattn::driver::Stream;
use vattn::{Bytes, Fence, KvCache, SlotId, SlotTokens, TokenCount};

use crate::{Batch, Query, Span};

/// Tokens that a draft model guesses for a request now and then, and that are rejected.
const DRAFTS: u32 = 4;

/// A prompt, and how many tokens are decoded after it.
pub(crate) struct Request {
    /// What its content is made from.
    seed: u32,
    pub(crate) prompt: u32,
    pub(crate) outputs: u32,
    decoded: u32,
}

impl Request {
    pub(crate) fn new(seed: u32, prompt: u32, outputs: u32) -> Self {
        Self { seed, prompt, outputs, decoded: 0 }
    }

    fn tokens(&self) -> u32 {
        self.prompt + self.decoded
    }
}

/// A request that has a slot.
struct Running {
    request: Request,
    slot: SlotId,
    /// Tokens whose keys and values are in the cache.
    written: u32,
    /// Guesses behind its tokens in this round.
    drafts: u32,
}

fn count(tokens: u32) -> TokenCount {
    TokenCount::new(u64::from(tokens))
}

pub(crate) struct Scheduler {
    pub(crate) cache: KvCache,
    /// Where the kernels run.
    stream: Stream,
    waiting: VecDeque<Request>,
    /// The oldest first.
    running: Vec<Running>,
    rounds: u32,
    pub(crate) preempted: u32,
    pub(crate) truncated: u32,
    pub(crate) peak: Bytes,
}

impl Scheduler {
    pub(crate) fn new(cache: KvCache, stream: Stream, requests: Vec<Request>) -> Self {
        let (waiting, running, peak) = (requests.into(), Vec::new(), Bytes::ZERO);
        Self { cache, stream, waiting, running, rounds: 0, preempted: 0, truncated: 0, peak }
    }

    /// Memory for another round, or `None` where nobody is left.
    pub(crate) fn begin(&mut self) -> vattn::Result<Option<Batch>> {
        self.rounds += 1;
        self.admit()?;
        for running in &mut self.running {
            let guesses = (self.rounds + running.request.seed).is_multiple_of(8);
            running.drafts = if guesses { DRAFTS } else { 0 };
        }
        let entries = self.fitting()?;
        self.cache.step(&entries)?;
        self.peak = self.peak.max(self.cache.bytes().held);
        Ok((!self.running.is_empty()).then(|| self.batch()))
    }

    /// Those who wait get slots, as far as there is memory for them.
    fn admit(&mut self) -> vattn::Result<()> {
        let prompts: Vec<_> = self.waiting.iter().map(|request| count(request.tokens())).collect();
        for request in self.waiting.drain(..self.cache.admits(&prompts)) {
            // The slot whose memory suits the prompt best. Kernels of an earlier owner may still read it; ours come
            // after them in the stream.
            let slot = self.cache.acquire(count(request.tokens()), Some(self.stream))?;
            self.running.push(Running { request, slot, written: 0, drafts: 0 });
        }
        Ok(())
    }

    /// What all are to hold now. The youngest have to wait again, and start over, until the others fit.
    fn fitting(&mut self) -> vattn::Result<Vec<SlotTokens>> {
        loop {
            let entry = |of: &Running| SlotTokens::new(of.slot, count(of.request.tokens() + of.drafts));
            let entries: Vec<_> = self.running.iter().map(entry).collect();
            if self.cache.fits(&entries)?.into_iter().all(|fits| fits) {
                return Ok(entries);
            }
            if let Some(youngest) = self.running.pop() {
                self.retire(&youngest)?;
                self.waiting.push_front(youngest.request);
                self.preempted += 1;
            }
        }
    }

    fn batch(&mut self) -> Batch {
        let mut batch = Batch::default();
        for Running { request, slot, written, drafts } in &mut self.running {
            let (slot, tokens, seed) = (slot.index(), request.tokens(), request.seed);
            batch.spans.push(Span { slot, first: *written, end: tokens, seed });
            if *drafts > 0 {
                // Not what will be there once the tokens are decoded.
                batch.spans.push(Span { slot, first: tokens, end: tokens + *drafts, seed: !seed });
            }
            batch.queries.push(Query { slot, tokens, seed });
            *written = tokens;
        }
        batch
    }

    /// To be called when the kernels of the round are in the stream. They need not have run.
    pub(crate) fn end(&mut self) -> vattn::Result<()> {
        for running in &mut self.running {
            running.request.decoded += 1;
            if running.drafts > 0 {
                self.cache.truncate(running.slot, count(running.written), &[Fence::Stream(self.stream)])?;
                self.truncated += 1;
            }
        }
        let is_done = |running: &mut Running| running.request.decoded == running.request.outputs;
        let done: Vec<_> = self.running.extract_if(.., is_done).collect();
        done.iter().try_for_each(|running| self.retire(running))
    }

    fn retire(&self, running: &Running) -> vattn::Result<()> {
        self.cache.retire(running.slot, &[Fence::Stream(self.stream)])
    }
}

#[cfg(test)]
mod tests {
    use vattn::driver::ledger::{Ledger, LedgerOptions};
    use vattn::error::Verb;

    use super::*;
    use crate::{BUDGET, REQUESTS, SLOTS, config, requests};

    #[test]
    fn every_query_is_asked_once_of_tokens_that_are_written_and_slots_are_adopted_and_given_up() {
        let options = LedgerOptions { granule: Bytes::mib(2), capacity: BUDGET, addresses: None };
        let cache = KvCache::new(config().unwrap(), Ledger::new(options).unwrap()).unwrap();
        let mut scheduler = Scheduler::new(cache, Stream::LEGACY, requests());
        let mut asked = vec![Vec::new(); requests().len()];
        while let Some(Batch { spans, queries }) = scheduler.begin().unwrap() {
            assert!(queries.len() <= usize::try_from(SLOTS).unwrap() && spans.len() <= 2 * queries.len());
            for query in queries {
                let span = spans.iter().find(|span| span.seed == query.seed).unwrap();
                assert_eq!((span.slot, span.end), (query.slot, query.tokens));
                asked[usize::try_from(query.seed).unwrap()].push(query.tokens);
            }
            scheduler.end().unwrap();
        }
        for (asked, request) in asked.iter().zip(requests()) {
            assert!(asked.iter().copied().eq(request.prompt..request.prompt + request.outputs));
        }
        let snapshot = scheduler.cache.report().unwrap().snapshot;
        let events = snapshot.events;
        let (preempted, truncated) = (scheduler.preempted, scheduler.truncated);
        println!("{preempted} preempted, {truncated} truncated, {} held, {events:?}", scheduler.peak);
        assert!(events.adopted > u64::from(REQUESTS) / 2 && preempted > 0 && truncated > 0);
        assert_eq!(snapshot.driver[&Verb::Create].failed, 0, "no more than the budget is ever created");
    }
}
