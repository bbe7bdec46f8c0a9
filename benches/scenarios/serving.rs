//! A serving thread in real time: each iteration it lets requests go and come, has every one's next token
//! backed, and waits for the kernels, as an engine does.
//!
//! Nobody waits for an arrival: while there are requests, as many are served at once as there is room for.
//! The memory of each [`Manager`] is watched by a driver of the bench's own ([`Recorder`]), which tells what
//! is called on the serving thread from what is called elsewhere.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use vattn::driver::owned::DriverHandle;
use vattn::error::Verb;
use vattn::geometry::Background;
use vattn::stats::{CallStats, Counters};
use vattn::units::TokenCount;
use vattn::{Config, KvCache, Result};
use vattn_baselines::{Mapping, Policy, RequestId, Vattention};

use crate::common::baseline;
use crate::recorder::{Made, Recorder};
use crate::server::Vattn;
use crate::timing::Samples;
use crate::trace::Request;
use crate::{Arc, Bench, tokens};

/// How long kernels last behind a manager without a thread, by default. It has done all of its work before
/// they begin.
const SHORT: Duration = Duration::from_millis(2);

/// Who manages the memory.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Manager {
    Mapper,
    NoMapper,
    Vattention,
    VattentionAhead,
}

/// A policy that may be told of a request an iteration before it is admitted.
trait Announced: Policy {
    fn announce(&mut self, _request: RequestId, _prompt: TokenCount) -> Result<()> {
        Ok(())
    }
}

impl Announced for Vattention {}

impl Announced for Vattn<'_> {
    fn announce(&mut self, request: RequestId, prompt: TokenCount) -> Result<()> {
        Vattn::announce(self, request, prompt)
    }
}

/// What is served.
pub(crate) struct Load<'a> {
    pub(crate) requests: &'a [Request],
    /// How many at once, by iteration.
    pub(crate) batch: fn(usize) -> usize,
    /// Whether a request is announced an iteration before it is admitted.
    pub(crate) announced: bool,
    /// How long an iteration's kernels last, where a thread works beside them.
    pub(crate) kernels: Duration,
    /// From the iteration after so many admissions on it is measured.
    pub(crate) warm_up: usize,
}

/// What was measured.
#[derive(Default)]
pub(crate) struct Served {
    /// Each step of all that decode.
    pub(crate) steps: Samples,
    /// Of each iteration the time in the manager's calls: to let go, to admit, to step.
    pub(crate) calls: Samples,
    pub(crate) made: Made,
    pub(crate) admitted: usize,
    /// Calls that move memory, on any thread, by thousands of admissions.
    pub(crate) by_thousands: Vec<u64>,
    /// Admissions for which no memory had to be moved on the serving thread.
    pub(crate) ready: usize,
    pub(crate) most_at_once: usize,
    /// How long the kernels were.
    pub(crate) kernels: Duration,
}

struct Active {
    id: RequestId,
    total: TokenCount,
    left: u64,
}

impl Manager {
    /// What a table with several of them says about its kernels.
    pub(crate) const NOTE: &str = "A policy without a thread has done all of its work before the kernels begin, so \
        that it runs behind shorter ones. `--step-ms` gives everybody the same.";
    pub(crate) const ALL: [Self; 4] = [Self::Mapper, Self::NoMapper, Self::Vattention, Self::VattentionAhead];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Mapper => "vattn",
            Self::NoMapper => "vattn without its mapper",
            Self::Vattention => "vattention",
            Self::VattentionAhead => "vattention with its thread",
        }
    }

    fn has_thread(self) -> bool {
        matches!(self, Self::Mapper | Self::VattentionAhead)
    }

    /// Serves until everybody is done, or the scenario's time is up.
    pub(crate) fn serve(self, bench: &Bench<'_>, config: &Config, load: &Load<'_>) -> Served {
        let watch = Recorder::new(Arc::clone(&bench.target.driver));
        let kernels = bench.iteration(if self.has_thread() { load.kernels } else { load.kernels.min(SHORT) });
        let mapping = match self {
            Self::Mapper | Self::NoMapper => {
                let background = if self.has_thread() { Background::Thread } else { Background::Off };
                let config = config.to_builder().background(background).build().unwrap();
                let cache = KvCache::new(config, watch.clone()).unwrap();
                let mut policy = Vattn::on(&cache, bench.target.work.stream());
                let served = serve(bench, &mut policy, &watch, load, kernels);
                agree(&cache, &watch);
                return served;
            }
            Self::Vattention => Mapping::Synchronous,
            Self::VattentionAhead => Mapping::Ahead,
        };
        let shape = baseline::shape(config, bench.target.driver.info());
        let handle = DriverHandle::new(watch.clone(), Arc::new(Counters::default()));
        let mut policy = Vattention::new(&handle, &shape, mapping).unwrap();
        serve(bench, &mut policy, &watch, load, kernels)
    }
}

/// The library's own counters say the same.
fn agree(cache: &KvCache, watch: &Recorder) {
    cache.flush().unwrap();
    let (counted, made) = (cache.snapshot(), watch.made());
    let moves = [Verb::Create, Verb::Map, Verb::SetAccess, Verb::Unmap, Verb::Release];
    let sum = |calls: &BTreeMap<Verb, CallStats>| -> u64 {
        moves.iter().map(|verb| calls[verb].calls - calls[verb].failed).sum()
    };
    let (all, beside) = (sum(&counted.driver), sum(&counted.background));
    assert_eq!((all - beside, beside), (made.moves, made.moves_beside), "calls on the path, and beside it");
}

/// Calls, and adds the time that it took.
fn timed<T>(took: &mut Duration, call: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = call();
    *took += start.elapsed();
    result
}

fn serve(
    bench: &Bench<'_>,
    policy: &mut dyn Announced,
    watch: &Recorder,
    load: &Load<'_>,
    kernels: Duration,
) -> Served {
    let mut to_come = (0..).zip(load.requests).map(|(number, request)| Active {
        id: RequestId::new(number),
        total: tokens(request.prompt),
        left: request.output,
    });
    let (mut announced, mut active) = (Vec::<Active>::new(), Vec::<Active>::new());
    let (mut served, mut before, mut measuring) = (Served::default(), watch.made(), false);
    for iteration in 0.. {
        if !measuring && served.admitted >= load.warm_up {
            (served, before, measuring) = (Served::default(), watch.made(), true);
        }
        let mut took = Duration::ZERO;
        for done in active.extract_if(.., |request| request.left == 0) {
            timed(&mut took, || policy.retire(done.id)).unwrap();
        }
        let mut coming = std::mem::take(&mut announced);
        let room = (load.batch)(iteration).saturating_sub(active.len() + coming.len());
        for request in to_come.by_ref().take(room) {
            if load.announced {
                timed(&mut took, || policy.announce(request.id, request.total)).unwrap();
                announced.push(request);
            } else {
                coming.push(request);
            }
        }
        for request in coming {
            let moves = watch.made().moves;
            assert!(
                timed(&mut took, || policy.admit(request.id, request.total)).unwrap(),
                "memory is not short"
            );
            served.ready += usize::from(watch.made().moves == moves);
            served.admitted += 1;
            if served.admitted % 1_000 == 0 {
                let made = watch.made() - before;
                let so_far = served.by_thousands.iter().sum::<u64>();
                served.by_thousands.push(made.moves + made.moves_beside - so_far);
            }
            active.push(request);
        }
        if (active.is_empty() && announced.is_empty()) || bench.limit.is_over() {
            break;
        }
        active.iter_mut().for_each(|request| request.total += tokens(1));
        active.iter_mut().for_each(|request| request.left = request.left.saturating_sub(1));
        let totals: Vec<_> = active.iter().map(|request| (request.id, request.total)).collect();
        if !totals.is_empty() {
            assert!(served.steps.time(|| policy.step(&totals)).unwrap(), "memory is not short");
            served.calls.push(took + served.steps.last());
        }
        served.most_at_once = served.most_at_once.max(active.len());
        bench.target.work.run(kernels);
    }
    Served { made: watch.made() - before, kernels, ..served }
}
