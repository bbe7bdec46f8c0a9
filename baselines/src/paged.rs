//! Blocks of 16 tokens out of one preallocated pool, as paged attention has them.
//!
//! Owns the pool and who has how many blocks of it. The driver is asked only when the pool is made
//! and when it is dropped. Which block a request has is a list in plain memory, kept as a server
//! keeps it, since that is what a step costs here.

use std::sync::Arc;

use vattn::driver::owned::{DriverHandle, Mapping, PhysicalMemory, Reservation};
use vattn::units::{Bytes, Granules, SizeClass, TokenCount};
use vattn::{Error, ErrorKind, Result};

use crate::policy::{Policy, RequestId, Usage};
use crate::shape::Shape;
use crate::{narrow, wide};

/// Tokens of a block: what servers run.
pub const BLOCK_TOKENS: u64 = 16;

/// Memory that is created and mapped once and stays so.
#[derive(Debug)]
pub(crate) struct Pinned {
    // Fields drop in this order: addresses before the memory behind them.
    mappings: Vec<Mapping>,
    memory: Vec<PhysicalMemory>,
}

impl Pinned {
    pub(crate) fn new() -> Self {
        Self { mappings: Vec::new(), memory: Vec::new() }
    }

    /// Backs `granules` from `offset` on, largest extents first.
    pub(crate) fn fill(
        &mut self,
        driver: &DriverHandle,
        reservation: &Arc<Reservation>,
        mut offset: Bytes,
        mut granules: Granules,
    ) -> Result<()> {
        let granule = driver.info().granule;
        while let Some(class) = SizeClass::at_most(granules) {
            let size = granule.to_bytes(class.granules());
            let memory = PhysicalMemory::new(driver, size)?;
            self.mappings.push(reservation.map(offset, &memory)?);
            self.memory.push(memory);
            offset += size;
            granules -= class.granules();
        }
        Ok(())
    }
}

/// The policy. See the module.
#[derive(Debug)]
pub struct Paged {
    _pool: Pinned,
    requests: Vec<Option<Holding>>,
    /// Lists of retired requests, to be filled again.
    spare: Vec<Vec<u32>>,
    free: Vec<u32>,
    blocks: u64,
    active: u32,
    tokens: TokenCount,
    max_slots: u32,
    max_tokens: TokenCount,
    bytes_per_token: Bytes,
    held: Bytes,
}

#[derive(Debug)]
struct Holding {
    tokens: TokenCount,
    blocks: Vec<u32>,
}

impl Paged {
    /// Creates and maps the pool: as many whole granules as the budget has.
    ///
    /// # Errors
    /// The driver's; [`InvalidConfig`](ErrorKind::InvalidConfig) for a budget below one block.
    pub fn new(driver: &DriverHandle, shape: &Shape) -> Result<Self> {
        let granule = driver.info().granule;
        let granules = granule.within(shape.budget());
        let held = granule.to_bytes(granules);
        let bytes_per_token = shape.bytes_per_token();
        let block = bytes_per_token * BLOCK_TOKENS;
        let blocks = held.get() / block.get();
        if blocks == 0 {
            return Err(Error::new(
                ErrorKind::InvalidConfig,
                format!("a budget of {} holds no block of {block}; raise it", shape.budget()),
            ));
        }
        let Ok(count) = u32::try_from(blocks) else {
            return Err(Error::new(
                ErrorKind::InvalidConfig,
                format!("{blocks} blocks of {block} are more than 2^32; lower the budget of {held}"),
            ));
        };
        let mut pool = Pinned::new();
        let reservation = Reservation::new(driver, held)?;
        pool.fill(driver, &reservation, Bytes::ZERO, granules)?;
        Ok(Self {
            _pool: pool,
            requests: Vec::new(),
            spare: Vec::new(),
            free: (0..count).rev().collect(),
            blocks,
            active: 0,
            tokens: TokenCount::ZERO,
            max_slots: shape.max_slots(),
            max_tokens: shape.max_tokens(),
            bytes_per_token,
            held,
        })
    }

    fn holding(&mut self, request: RequestId) -> Result<&mut Holding> {
        self.requests.get_mut(request.index()).and_then(Option::as_mut).ok_or_else(|| not_admitted(request))
    }
}

#[cold]
pub(crate) fn not_admitted(request: RequestId) -> Error {
    Error::new(ErrorKind::InvalidArgument, format!("request {request} is not admitted; admit it first"))
}

#[cold]
pub(crate) fn admitted_already(request: RequestId) -> Error {
    Error::new(ErrorKind::InvalidArgument, format!("request {request} is admitted already; retire it first"))
}

#[cold]
pub(crate) fn fewer_tokens(request: RequestId, had: TokenCount, asked: TokenCount) -> Error {
    Error::new(
        ErrorKind::FewerTokens,
        format!("request {request} has {had} tokens and is stepped to {asked}; a step only grows"),
    )
}

impl Policy for Paged {
    fn name(&self) -> &'static str {
        "paged"
    }

    fn can_ever_hold(&self, final_tokens: TokenCount) -> bool {
        final_tokens <= self.max_tokens && final_tokens.get().div_ceil(BLOCK_TOKENS) <= self.blocks
    }

    fn admit(&mut self, request: RequestId, prompt: TokenCount) -> Result<bool> {
        let index = request.index();
        if index >= self.requests.len() {
            self.requests.resize_with(index + 1, || None);
        }
        if self.requests[index].is_some() {
            return Err(admitted_already(request));
        }
        let need = narrow(prompt.get().div_ceil(BLOCK_TOKENS));
        if self.active == self.max_slots || prompt > self.max_tokens || need > self.free.len() {
            return Ok(false);
        }
        let mut blocks = self.spare.pop().unwrap_or_default();
        blocks.extend(self.free.drain(self.free.len() - need..).rev());
        self.requests[index] = Some(Holding { tokens: prompt, blocks });
        self.active += 1;
        self.tokens += prompt;
        Ok(true)
    }

    fn step(&mut self, totals: &[(RequestId, TokenCount)]) -> Result<bool> {
        let mut need = 0;
        let max_tokens = self.max_tokens;
        for &(request, total) in totals {
            let holding = self.holding(request)?;
            if total < holding.tokens {
                return Err(fewer_tokens(request, holding.tokens, total));
            }
            if total > max_tokens {
                return Ok(false);
            }
            need += total.get().div_ceil(BLOCK_TOKENS) - wide(holding.blocks.len());
        }
        if need > wide(self.free.len()) {
            return Ok(false);
        }
        for &(request, total) in totals {
            let Self { requests, free, tokens, .. } = self;
            let holding = requests[request.index()].as_mut().expect("the first pass found it");
            *tokens += total - holding.tokens;
            holding.tokens = total;
            while wide(holding.blocks.len()) * BLOCK_TOKENS < total.get() {
                holding.blocks.push(free.pop().expect("the first pass counted what is needed"));
            }
        }
        Ok(true)
    }

    fn retire(&mut self, request: RequestId) -> Result<()> {
        let holding = self.requests.get_mut(request.index()).and_then(Option::take);
        let mut holding = holding.ok_or_else(|| not_admitted(request))?;
        self.tokens -= holding.tokens;
        self.active -= 1;
        self.free.extend(holding.blocks.drain(..).rev());
        self.spare.push(holding.blocks);
        Ok(())
    }

    fn usage(&self) -> Usage {
        let used = self.blocks - wide(self.free.len());
        Usage {
            needed: self.bytes_per_token * self.tokens.get(),
            mapped: self.bytes_per_token * BLOCK_TOKENS * used,
            parked: None,
            held: self.held,
        }
    }

    fn adopted(&self) -> u64 {
        0
    }

    fn reclaimed(&self) -> u64 {
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shape::tests::sliced;
    use crate::testing::{calls, driver, is_empty};
    use vattn::error::Verb;

    const A: RequestId = RequestId::new(0);
    const B: RequestId = RequestId::new(1);

    #[test]
    fn blocks_are_taken_and_given_back() {
        let driver = driver();
        // 16 tokens of 128 KiB are 2 MiB: a budget of 8 MiB has 4 blocks.
        let mut paged = Paged::new(&driver.0, &sliced(8, 1000, Bytes::mib(9))).unwrap();
        assert_eq!(calls(&driver.1, Verb::Map), 1);
        assert!(paged.can_ever_hold(TokenCount::new(64)) && !paged.can_ever_hold(TokenCount::new(65)));
        assert!(paged.admit(A, TokenCount::new(17)).unwrap());
        assert!(!paged.admit(B, TokenCount::new(33)).unwrap());
        assert!(paged.admit(B, TokenCount::new(32)).unwrap());
        let usage = paged.usage();
        assert_eq!(usage.mapped, Bytes::mib(8));
        assert_eq!(usage.held, Bytes::mib(8));
        assert_eq!(usage.needed, Bytes::new(49 * (128 << 10)));
        assert!(!paged.step(&[(A, TokenCount::new(18)), (B, TokenCount::new(33))]).unwrap());
        assert_eq!(paged.usage(), usage, "a step that does not fit changes nothing");
        paged.retire(B).unwrap();
        assert!(paged.step(&[(A, TokenCount::new(64))]).unwrap());
        assert_eq!(paged.step(&[(A, TokenCount::new(63))]).unwrap_err().kind(), ErrorKind::FewerTokens);
        assert!(paged.retire(B).is_err());
        drop(paged);
        assert!(is_empty(&driver.1));
    }
}
