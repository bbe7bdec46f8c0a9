//! Who manages the memory: the names on the command line and what they stand for.

use clap::ValueEnum;
use vattn::cache::{Fence, KvCache, SlotTokens};
use vattn::geometry::Background;
use vattn::units::{SlotId, TokenCount};
use vattn::{Error, ErrorKind, Result};
use vattn_baselines::{Mapping, Paged, Policy, RequestId, StaticSlots, Usage, Vattention};

use crate::device::Bench;
use crate::model::Plan;

/// A policy by its name.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum PolicyKind {
    /// This project's cache: extents of many sizes, parked and adopted
    Vattn,
    /// vAttention's: one granule a mapping, all handles created up front
    Vattention,
    /// The same with the thread that maps ahead of each step
    VattentionAhead,
    /// Blocks of 16 tokens out of one preallocated pool
    Paged,
    /// Every slot at full length, as many as fit
    Static,
}

impl PolicyKind {
    /// What a table shows where nobody says which: vattn and its three baselines.
    pub(crate) const COMPARED: [Self; 4] = [Self::Vattn, Self::Vattention, Self::Paged, Self::Static];

    /// Makes the policy on a driver.
    pub(crate) fn build(self, bench: &Bench, plan: &Plan) -> Result<Box<dyn Policy>> {
        let (driver, shape) = (bench.handle(), &plan.shape);
        Ok(match self {
            Self::Vattn => Box::new(Vattn::new(KvCache::new(plan.config.clone(), bench.driver())?)),
            Self::Vattention => Box::new(Vattention::new(driver, shape, Mapping::Synchronous)?),
            Self::VattentionAhead => Box::new(Vattention::new(driver, shape, Mapping::Tended)?),
            Self::Paged => Box::new(Paged::new(driver, shape)?),
            Self::Static => Box::new(StaticSlots::new(driver, shape)?),
        })
    }
}

/// This project's cache as a policy.
#[derive(Debug)]
struct Vattn {
    cache: KvCache,
    /// The slot of each admitted request.
    slots: Vec<Option<SlotId>>,
    /// What a step names; kept so that a step allocates nothing.
    entries: Vec<SlotTokens>,
}

impl Vattn {
    fn new(cache: KvCache) -> Self {
        Self { cache, slots: Vec::new(), entries: Vec::new() }
    }

    fn slot(&self, request: RequestId) -> Result<SlotId> {
        self.slots.get(request.index()).copied().flatten().ok_or_else(|| {
            Error::new(
                ErrorKind::InvalidArgument,
                format!("request {request} is not admitted; admit it first"),
            )
        })
    }
}

impl Policy for Vattn {
    fn name(&self) -> &'static str {
        "vattn"
    }

    fn can_ever_hold(&self, final_tokens: TokenCount) -> bool {
        let layout = self.cache.layout();
        final_tokens <= layout.max_tokens()
            && layout.granule().to_bytes(layout.granules_for(layout.round_to_tile(final_tokens)))
                <= self.cache.budget()
    }

    fn admit(&mut self, request: RequestId, prompt: TokenCount) -> Result<bool> {
        if self.slot(request).is_ok() {
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                format!("request {request} is admitted already; retire it before it is admitted again"),
            ));
        }
        if self.cache.admits(&[prompt]) == 0 {
            return Ok(false);
        }
        let slot = self.cache.acquire(prompt, None)?;
        self.cache.step(&[SlotTokens::new(slot, prompt)])?;
        if self.slots.len() <= request.index() {
            self.slots.resize(request.index() + 1, None);
        }
        self.slots[request.index()] = Some(slot);
        Ok(true)
    }

    fn step(&mut self, totals: &[(RequestId, TokenCount)]) -> Result<bool> {
        let mut entries = std::mem::take(&mut self.entries);
        entries.clear();
        for (request, tokens) in totals {
            entries.push(SlotTokens::new(self.slot(*request)?, *tokens));
        }
        let result = self.cache.step(&entries);
        self.entries = entries;
        match result {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::OutOfBudget => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn retire(&mut self, request: RequestId) -> Result<()> {
        // Nothing runs on a device in a replay, so nothing has to be waited for.
        self.cache.retire(self.slot(request)?, &[Fence::Idle])?;
        self.slots[request.index()] = None;
        Ok(())
    }

    fn tend(&mut self) -> Result<()> {
        if self.cache.config().background() == Background::Caller {
            // What is left for later is left for the next iteration.
            self.cache.tend()?;
        }
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

#[cfg(test)]
mod tests {
    use vattn::error::Verb;
    use vattn::units::Bytes;

    use super::*;
    use crate::mapper::Mapper;
    use crate::model::{self, Wanted};
    use crate::place::Place;
    use crate::server::{Settings, serve};
    use crate::trace::Request;

    #[test]
    fn what_is_off_the_path_is_what_the_cache_counts_in_the_background() {
        let (granule, budget) = (Bytes::mib(2), Bytes::gib(1));
        let plan = model::plan(&Wanted {
            model: "llama-3-8b",
            tensor_parallel: 1,
            layout: "sliced",
            max_slots: 16,
            max_tokens: TokenCount::new(4096),
            tile_tokens: 1,
            budget,
            granule,
            mapper: Mapper::default(),
        });
        let bench = Bench::open(&Place::Ledger, granule, budget).unwrap();
        let mut policy = Vattn::new(KvCache::new(plan.unwrap().config, bench.driver()).unwrap());
        let settings = Settings { step: 25_000_000, prefill_tokens: 8192, max_tokens: 4096 };
        let requests: Vec<_> = (0..40)
            .map(|number| Request { arrival: number, prompt: 100 * (1 + number % 7), output: 300 })
            .collect();
        let clock = || bench.spent();
        let outcome = serve(&mut policy, &requests, settings, &clock, &mut |_| {}, None).unwrap();
        let background = policy.cache.snapshot().background;
        let counted = |verb| background.get(&verb).map_or(0, |calls| calls.calls);
        let seen = outcome.split.calls_off_path;
        assert_eq!(
            [seen.create, seen.map, seen.unmap, seen.release],
            [Verb::Create, Verb::Map, Verb::Unmap, Verb::Release].map(counted)
        );
        assert!(seen.map > 0 && seen.map < bench.spent().calls.map, "{seen:?}");
    }
}
