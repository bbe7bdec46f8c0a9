//! A small server: requests come in when their time is, gain a token an iteration of 25 ms, and leave.
//!
//! It is the model of the server that `vattn replay` has, without its prefills and its figures of waste:
//! here the time of calls is what is asked for.

use std::collections::VecDeque;
use std::time::Duration;

use vattn::driver::Stream;
use vattn::units::TokenCount;
use vattn::{ErrorKind, Fence, KvCache, Result, SlotId, SlotTokens};
use vattn_baselines::{Policy, RequestId, Usage};

use crate::timing::{Limit, Samples};
use crate::tokens;
use crate::trace::Request;

const ITERATION: Duration = Duration::from_millis(25);

/// What happened.
#[derive(Default)]
pub(crate) struct Served {
    /// Each admission, its prompt mapped.
    pub(crate) admissions: Samples,
    /// Each step of all that decode.
    pub(crate) steps: Samples,
    pub(crate) most_at_once: usize,
    pub(crate) completed: usize,
    pub(crate) preempted: u64,
}

struct Active {
    id: RequestId,
    total: TokenCount,
    left: u64,
}

/// Serves the requests, or as many as `limit` has time for. All of them can be held alone.
pub(crate) fn serve(policy: &mut dyn Policy, requests: &[Request], limit: &Limit) -> Served {
    let mut arrivals = (0..).zip(requests).peekable();
    let (mut queue, mut active) = (VecDeque::<Active>::new(), Vec::<Active>::new());
    let (mut served, mut now) = (Served::default(), Duration::ZERO);
    while !limit.is_over() {
        if active.is_empty() && queue.is_empty() {
            let Some((_, next)) = arrivals.peek() else { break };
            now = now.max(next.arrival);
        }
        while let Some((number, next)) = arrivals.next_if(|(_, next)| next.arrival <= now) {
            queue.push_back(Active {
                id: RequestId::new(number),
                total: tokens(next.prompt),
                left: next.output,
            });
        }
        while let Some(next) = queue.pop_front() {
            if !served.admissions.time(|| policy.admit(next.id, next.total)).unwrap() {
                assert!(!active.is_empty(), "one request alone fits");
                queue.push_front(next);
                break;
            }
            active.push(next);
        }
        served.most_at_once = served.most_at_once.max(active.len());
        step(policy, &mut active, &mut queue, &mut served);
        for done in active.extract_if(.., |request| request.left == 0) {
            policy.retire(done.id).unwrap();
            served.completed += 1;
        }
        now += ITERATION;
    }
    served
}

/// A token for everybody; the latest are queued again where it does not fit.
fn step(
    policy: &mut dyn Policy,
    active: &mut Vec<Active>,
    queue: &mut VecDeque<Active>,
    served: &mut Served,
) {
    let mut totals: Vec<_> = active.iter().map(|request| (request.id, request.total + tokens(1))).collect();
    while !served.steps.time(|| policy.step(&totals)).unwrap() {
        let latest = active.pop().expect("one request alone fits");
        policy.retire(latest.id).unwrap();
        queue.push_front(latest);
        totals.pop();
        served.preempted += 1;
    }
    for request in active {
        request.total += tokens(1);
        request.left = request.left.saturating_sub(1);
    }
}

/// This project's cache as a policy.
#[derive(Debug)]
pub(crate) struct Vattn<'a> {
    cache: &'a KvCache,
    /// Where the kernels run that use the memory; `None`: there are none.
    stream: Option<Stream>,
    slots: Vec<Option<SlotId>>,
    entries: Vec<SlotTokens>,
}

impl<'a> Vattn<'a> {
    pub(crate) fn new(cache: &'a KvCache) -> Self {
        Self { cache, stream: None, slots: Vec::new(), entries: Vec::new() }
    }

    pub(crate) fn on(cache: &'a KvCache, stream: Stream) -> Self {
        Self { stream: Some(stream), ..Self::new(cache) }
    }

    /// Gives a request a slot and has its prompt mapped by the time when it is admitted.
    pub(crate) fn announce(&mut self, request: RequestId, prompt: TokenCount) -> Result<()> {
        let slot = self.acquire(request, prompt)?;
        self.cache.prefetch(&[SlotTokens::new(slot, prompt)])
    }

    fn acquire(&mut self, request: RequestId, prompt: TokenCount) -> Result<SlotId> {
        let slot = self.cache.acquire(prompt, self.stream)?;
        self.slots.resize(self.slots.len().max(request.index() + 1), None);
        self.slots[request.index()] = Some(slot);
        Ok(slot)
    }

    fn has_slot(&self, request: RequestId) -> bool {
        self.slots.get(request.index()).is_some_and(Option::is_some)
    }

    fn slot(&self, request: RequestId) -> SlotId {
        self.slots[request.index()].expect("it is admitted")
    }
}

impl Policy for Vattn<'_> {
    fn name(&self) -> &'static str {
        "vattn"
    }

    fn can_ever_hold(&self, final_tokens: TokenCount) -> bool {
        self.cache.admits(&[final_tokens]) == 1
    }

    fn admit(&mut self, request: RequestId, prompt: TokenCount) -> Result<bool> {
        if !self.has_slot(request) {
            if self.cache.admits(&[prompt]) == 0 {
                return Ok(false);
            }
            self.acquire(request, prompt)?;
        }
        self.step(&[(request, prompt)])
    }

    fn step(&mut self, totals: &[(RequestId, TokenCount)]) -> Result<bool> {
        let mut entries = std::mem::take(&mut self.entries);
        entries.clear();
        entries.extend(totals.iter().map(|(request, total)| SlotTokens::new(self.slot(*request), *total)));
        let result = self.cache.step(&entries);
        self.entries = entries;
        match result {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::OutOfBudget => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn retire(&mut self, request: RequestId) -> Result<()> {
        self.cache.retire(self.slot(request), &[self.stream.map_or(Fence::Idle, Fence::Stream)])?;
        self.slots[request.index()] = None;
        Ok(())
    }

    fn usage(&self) -> Usage {
        let bytes = self.cache.bytes();
        Usage { needed: bytes.needed, mapped: bytes.mapped, parked: Some(bytes.parked), held: bytes.held }
    }

    fn adopted(&self) -> u64 {
        self.cache.snapshot().events.adopted
    }

    fn reclaimed(&self) -> u64 {
        self.cache.snapshot().events.reclaimed
    }
}
