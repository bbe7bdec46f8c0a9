//! The model of the server that drives a policy.
//!
//! Owns time, the queue and who is active. Refuses to know memory: it asks a [`Policy`] and goes by
//! the answer. Everything but the wall time of steps is the same in every run.
//!
//! An iteration lasts [`Settings::step`]. In it, in this order:
//! 1. Requests that have arrived by the iteration's start are queued in order; one whose final
//!    length is more than a slot holds, or needs more than the budget under the policy, is rejected.
//! 2. The head of the queue is admitted, its prompt mapped, for as long as there is a slot and room.
//! 3. The earliest admitted request that is not done with its prefill advances it by one; a prefill
//!    takes ceil(prompt / [`Settings::prefill_tokens`]) iterations.
//! 4. Every request that was past its prefill when the iteration began gains a token: one step of
//!    the policy over all of them, in order of admission. Where that does not fit, the latest
//!    admitted is preempted (queued again at the head, its tokens so far being its prompt) and the
//!    step is tried again.
//! 5. Memory and active requests are sampled; who watches is told when the iteration is over.
//! 6. The model runs, and the policy is tended meanwhile.
//! 7. Requests that have all their tokens are retired.
//!
//! With nothing active or queued, time jumps to the next arrival, to the nanosecond. Such a jump
//! counts in the mean of active slots, as none, and not in the ratios of memory.
//!
//! Prefill is first come, first served, so the active requests that are past it are always the
//! first ones: [`Server::decoding`] is the prefix that a step is handed, kept from iteration to
//! iteration so that one costs no allocation.

use std::collections::VecDeque;
use std::time::Duration;

use vattn::units::{Bytes, TokenCount};
use vattn::{Error, ErrorKind, Result};
use vattn_baselines::{Policy, RequestId, Usage};

use crate::meter::{Clock, Meter, Split};
use crate::num::{float, float_wide, wide};
use crate::trace::Request;

/// What the model can be told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Settings {
    /// Nanoseconds of an iteration, at least one.
    pub(crate) step: u64,
    /// Tokens of a prompt that an iteration processes, at least one.
    pub(crate) prefill_tokens: u64,
    /// Tokens that a request may have.
    pub(crate) max_tokens: u64,
}

/// What happened.
#[derive(Clone, PartialEq, Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) completed: u64,
    pub(crate) rejected: u64,
    pub(crate) preempted: u64,
    pub(crate) iterations: u64,
    /// Nanoseconds from the first arrival to the end of the last iteration.
    pub(crate) simulated: u64,
    pub(crate) peak_needed: Bytes,
    pub(crate) peak_mapped: Bytes,
    pub(crate) peak_held: Bytes,
    pub(crate) mapped_over_needed: f64,
    pub(crate) held_over_needed: f64,
    pub(crate) mean_active: f64,
    pub(crate) peak_active: u64,
    /// Wall nanoseconds of the policy's step in each iteration that has one, in order; preemptions
    /// on the way are part of it.
    pub(crate) step_ns: Vec<u64>,
    /// Which of the driver's time requests waited for, while they were served.
    pub(crate) split: Split,
}

/// What who watches is told of an iteration, or of the moment from which nobody is there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Sample {
    /// Nanoseconds from the first arrival to the start of the iteration.
    pub(crate) at: u64,
    pub(crate) pace: Pace,
    pub(crate) usage: Usage,
    /// Requests that have a slot.
    pub(crate) active: u64,
    /// Requests that have arrived and have none.
    pub(crate) waiting: u64,
}

/// What kind of moment it was.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Pace {
    /// No iteration: nobody is there.
    Idle,
    /// An iteration in which nobody was past the prefill.
    Prefill,
    /// An iteration with a step of the policy, and its wall nanoseconds.
    Step(u64),
}

/// Who watches.
pub(crate) type Watch<'a> = &'a mut dyn FnMut(&Sample);

/// An admitted request that is not done.
#[derive(Clone, Copy, Debug)]
struct Active {
    id: RequestId,
    tokens: u64,
    /// Tokens still to be generated.
    left: u64,
    /// Iterations of prefill still to be done.
    prefill: u64,
}

/// A request that waits: fresh, or preempted with its tokens so far as its prompt.
#[derive(Clone, Copy, Debug)]
struct Waiting {
    id: RequestId,
    prompt: u64,
    left: u64,
}

struct Server<'a, 'w> {
    policy: &'a mut dyn Policy,
    settings: Settings,
    meter: Meter<'a>,
    queue: VecDeque<Waiting>,
    active: Vec<Active>,
    /// The first of `active`, those past their prefill, with the totals of the next step.
    decoding: Vec<(RequestId, TokenCount)>,
    outcome: Outcome,
    watch: Option<Watch<'w>>,
    /// Sums over iterations, of bytes and of requests.
    needed: u128,
    mapped: u128,
    held: u128,
    active_sum: u128,
}

/// Serves all requests, which are sorted by arrival. `clock` says what the policy's driver has counted;
/// `progress` hears how many are done with, whenever that changes; `watch`, if there is one, hears of
/// every iteration.
///
/// # Errors
/// The policy's, or its breach of contract: a request that it says it can hold does not fit alone.
pub(crate) fn serve(
    policy: &mut dyn Policy,
    requests: &[Request],
    settings: Settings,
    clock: Clock<'_>,
    progress: &mut dyn FnMut(u64),
    watch: Option<Watch<'_>>,
) -> Result<Outcome> {
    let mut server = Server {
        policy,
        settings,
        meter: Meter::new(clock, Duration::from_nanos(settings.step)),
        queue: VecDeque::new(),
        active: Vec::new(),
        decoding: Vec::new(),
        outcome: Outcome::default(),
        watch,
        needed: 0,
        mapped: 0,
        held: 0,
        active_sum: 0,
    };
    let mut now = 0;
    let mut next = 0;
    let mut done = 0;
    loop {
        if server.active.is_empty() && server.queue.is_empty() {
            let request = requests.get(next);
            if request.is_none_or(|request| request.arrival > now) {
                let seen = server.seen(now, Pace::Idle);
                server.tell(seen);
            }
            let Some(request) = request else { break };
            now = now.max(request.arrival);
        }
        while let Some(request) = requests.get(next).filter(|request| request.arrival <= now) {
            let number = u32::try_from(next).map_err(|_| {
                Error::new(ErrorKind::InvalidArgument, "a trace has at most 2^32 requests; use --limit")
            })?;
            server.arrive(RequestId::new(number), request);
            next += 1;
        }
        server.admit()?;
        // Everything that had arrived may have been rejected.
        if !server.active.is_empty() {
            server.iterate(now)?;
            now = now.checked_add(settings.step).ok_or_else(|| server.too_long())?;
        }
        let ended = server.outcome.completed + server.outcome.rejected;
        if ended != done {
            done = ended;
            progress(done);
        }
    }
    Ok(server.finish(now))
}

impl Server<'_, '_> {
    fn arrive(&mut self, id: RequestId, request: &Request) {
        let total = request.prompt + request.output;
        if total > self.settings.max_tokens || !self.policy.can_ever_hold(TokenCount::new(total)) {
            self.outcome.rejected += 1;
        } else {
            self.queue.push_back(Waiting { id, prompt: request.prompt, left: request.output });
        }
    }

    fn admit(&mut self) -> Result<()> {
        while let Some(&Waiting { id, prompt, left }) = self.queue.front() {
            let prompted = TokenCount::new(prompt);
            let (admitted, _) = self.meter.on_path(|| self.policy.admit(id, prompted))?;
            if !admitted {
                if self.active.is_empty() {
                    return Err(self.broken(id, prompt));
                }
                break;
            }
            self.queue.pop_front();
            let prefill = prompt.div_ceil(self.settings.prefill_tokens);
            self.active.push(Active { id, tokens: prompt, left, prefill });
        }
        Ok(())
    }

    fn iterate(&mut self, now: u64) -> Result<()> {
        let past = self.decoding.len();
        // A token must not come to a request whose prefill ends now, so it joins after the step.
        let mut joins = false;
        if let Some(active) = self.active.get_mut(past) {
            active.prefill -= 1;
            joins = active.prefill == 0;
        }
        let pace = if past > 0 { Pace::Step(self.grow()?) } else { Pace::Prefill };
        let past = self.decoding.len();
        let mut finished = false;
        for active in &mut self.active[..past] {
            active.tokens += 1;
            active.left -= 1;
            finished |= active.left == 0;
        }
        self.sample();
        let seen = self.seen(now, pace);
        self.meter.off_path(|| self.policy.tend())?;
        // A preemption may have taken the one whose prefill ended.
        if joins && let Some(active) = self.active.get(past).filter(|active| active.prefill == 0) {
            self.decoding.push((active.id, TokenCount::new(active.tokens + 1)));
            finished |= active.left == 0;
        }
        for (_, total) in &mut self.decoding[..past] {
            *total += TokenCount::new(1);
        }
        if finished {
            self.retire_finished()?;
        }
        self.outcome.iterations += 1;
        self.tell(seen);
        Ok(())
    }

    /// One step of everybody who decodes, with as many preemptions as it takes, and its wall time.
    fn grow(&mut self) -> Result<u64> {
        let mut wall = Duration::ZERO;
        while !self.decoding.is_empty() {
            let (fits, took) = self.meter.on_path(|| self.policy.step(&self.decoding))?;
            wall += took;
            if fits {
                break;
            }
            let last = self.active.pop().expect("those who decode are active");
            if self.active.is_empty() {
                return Err(self.broken(last.id, last.tokens + 1));
            }
            self.decoding.truncate(self.active.len());
            let ((), took) = self.meter.on_path(|| self.policy.retire(last.id))?;
            wall += took;
            self.queue.push_front(Waiting { id: last.id, prompt: last.tokens, left: last.left });
            self.outcome.preempted += 1;
        }
        let ns = u64::try_from(wall.as_nanos()).unwrap_or(u64::MAX);
        self.outcome.step_ns.push(ns);
        Ok(ns)
    }

    /// What there is to tell, if somebody watches.
    fn seen(&self, at: u64, pace: Pace) -> Option<Sample> {
        self.watch.is_some().then(|| Sample {
            at,
            pace,
            usage: self.policy.usage(),
            active: wide(self.active.len()),
            waiting: wide(self.queue.len()),
        })
    }

    fn tell(&mut self, seen: Option<Sample>) {
        if let (Some(watch), Some(seen)) = (&mut self.watch, seen) {
            watch(&seen);
        }
    }

    fn sample(&mut self) {
        let usage = self.policy.usage();
        let outcome = &mut self.outcome;
        outcome.peak_needed = outcome.peak_needed.max(usage.needed);
        outcome.peak_mapped = outcome.peak_mapped.max(usage.mapped);
        outcome.peak_held = outcome.peak_held.max(usage.held);
        outcome.peak_active = outcome.peak_active.max(wide(self.active.len()));
        self.needed += u128::from(usage.needed.get());
        self.mapped += u128::from(usage.mapped.get());
        self.held += u128::from(usage.held.get());
        self.active_sum += u128::from(wide(self.active.len()));
    }

    /// Retires whoever decodes and has nothing left, and closes the gaps in order.
    fn retire_finished(&mut self) -> Result<()> {
        let mut kept = 0;
        let past = self.decoding.len();
        for index in 0..past {
            if self.active[index].left == 0 {
                self.meter.on_path(|| self.policy.retire(self.active[index].id))?;
                self.outcome.completed += 1;
            } else {
                self.active[kept] = self.active[index];
                self.decoding[kept] = self.decoding[index];
                kept += 1;
            }
        }
        self.decoding.truncate(kept);
        self.active.drain(kept..past);
        Ok(())
    }

    #[cold]
    fn broken(&self, id: RequestId, tokens: u64) -> Error {
        Error::new(
            ErrorKind::Internal,
            format!(
                "policy {} said that it can hold request {id} and has no room for its {tokens} tokens, \
                 with nobody else admitted",
                self.policy.name()
            ),
        )
    }

    #[cold]
    fn too_long(&self) -> Error {
        Error::new(
            ErrorKind::InvalidArgument,
            format!(
                "{} iterations of {} ms take longer than the clock's 584 years; use a shorter --step-ms",
                self.outcome.iterations,
                float(self.settings.step) / 1e6
            ),
        )
    }

    fn finish(mut self, now: u64) -> Outcome {
        let ratio =
            |over: u128| if self.needed == 0 { 1.0 } else { float_wide(over) / float_wide(self.needed) };
        self.outcome.mapped_over_needed = ratio(self.mapped);
        self.outcome.held_over_needed = ratio(self.held);
        self.outcome.simulated = now;
        self.outcome.split = self.meter.finish();
        if now > 0 {
            self.outcome.mean_active =
                float_wide(self.active_sum * u128::from(self.settings.step)) / float(now);
        }
        self.outcome
    }
}

#[cfg(test)]
mod tests;
