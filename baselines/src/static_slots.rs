//! Every slot at full length, made up front: what a server does that knows no better.
//!
//! Owns as many slots as the budget holds at full length, at most as many as were asked for. Where
//! the budget holds none, nothing is made and every request is one that can never be held.

use vattn::Result;
use vattn::driver::owned::{DriverHandle, Reservation};
use vattn::units::{Bytes, TokenCount};

use crate::paged::{Pinned, admitted_already, fewer_tokens, not_admitted};
use crate::policy::{Policy, RequestId, Usage};
use crate::shape::Shape;

/// The policy. See the module.
#[derive(Debug)]
pub struct StaticSlots {
    _memory: Pinned,
    requests: Vec<Option<TokenCount>>,
    slots: u64,
    active: u64,
    tokens: TokenCount,
    max_tokens: TokenCount,
    bytes_per_token: Bytes,
    slot_bytes: Bytes,
}

impl StaticSlots {
    /// Creates and maps the slots.
    ///
    /// # Errors
    /// The driver's.
    pub fn new(driver: &DriverHandle, shape: &Shape) -> Result<Self> {
        let granule = driver.info().granule;
        let per_slot = shape.full_slot(granule);
        let slots = (granule.within(shape.budget()).get() / per_slot.get()).min(shape.max_slots().into());
        let mut memory = Pinned::new();
        for tensor in shape.tensors() {
            if slots == 0 {
                break;
            }
            let part = granule.covering(tensor.row * shape.max_tokens().get());
            let stride = granule.to_bytes(part);
            let reservation = Reservation::new(driver, stride * slots)?;
            for slot in 0..slots {
                memory.fill(driver, &reservation, stride * slot, part)?;
            }
        }
        Ok(Self {
            _memory: memory,
            requests: Vec::new(),
            slots,
            active: 0,
            tokens: TokenCount::ZERO,
            max_tokens: shape.max_tokens(),
            bytes_per_token: shape.bytes_per_token(),
            slot_bytes: granule.to_bytes(per_slot),
        })
    }

    /// How many slots the budget holds.
    #[must_use]
    pub fn slots(&self) -> u64 {
        self.slots
    }
}

impl Policy for StaticSlots {
    fn name(&self) -> &'static str {
        "static"
    }

    fn can_ever_hold(&self, final_tokens: TokenCount) -> bool {
        final_tokens <= self.max_tokens && self.slots > 0
    }

    fn admit(&mut self, request: RequestId, prompt: TokenCount) -> Result<bool> {
        let index = request.index();
        if index >= self.requests.len() {
            self.requests.resize(index + 1, None);
        }
        if self.requests[index].is_some() {
            return Err(admitted_already(request));
        }
        if self.active == self.slots || prompt > self.max_tokens {
            return Ok(false);
        }
        self.requests[index] = Some(prompt);
        self.active += 1;
        self.tokens += prompt;
        Ok(true)
    }

    fn step(&mut self, totals: &[(RequestId, TokenCount)]) -> Result<bool> {
        for &(request, total) in totals {
            match self.requests.get(request.index()).copied().flatten() {
                None => return Err(not_admitted(request)),
                Some(had) if total < had => return Err(fewer_tokens(request, had, total)),
                Some(_) if total > self.max_tokens => return Ok(false),
                Some(_) => {}
            }
        }
        for &(request, total) in totals {
            let had = self.requests[request.index()].replace(total);
            self.tokens += total - had.unwrap_or(TokenCount::ZERO);
        }
        Ok(true)
    }

    fn retire(&mut self, request: RequestId) -> Result<()> {
        let tokens = self.requests.get_mut(request.index()).and_then(Option::take);
        self.tokens -= tokens.ok_or_else(|| not_admitted(request))?;
        self.active -= 1;
        Ok(())
    }

    fn usage(&self) -> Usage {
        Usage {
            needed: self.bytes_per_token * self.tokens.get(),
            mapped: self.slot_bytes * self.active,
            parked: None,
            held: self.slot_bytes * self.slots,
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
    use crate::testing::{driver, is_empty};

    #[test]
    fn slots_are_whole_and_few() {
        let driver = driver();
        // A slot of 1,024 tokens is 128 MiB.
        let mut policy = StaticSlots::new(&driver.0, &sliced(8, 1024, Bytes::mib(300))).unwrap();
        assert_eq!(policy.slots(), 2);
        let [a, b, c] = [0, 1, 2].map(RequestId::new);
        assert!(policy.admit(a, TokenCount::new(1)).unwrap());
        assert_eq!(policy.usage().mapped, Bytes::mib(128));
        assert_eq!(policy.usage().held, Bytes::mib(256));
        assert!(policy.admit(b, TokenCount::new(1024)).unwrap());
        assert!(!policy.admit(c, TokenCount::new(1)).unwrap());
        assert!(!policy.step(&[(a, TokenCount::new(9)), (b, TokenCount::new(1025))]).unwrap());
        assert_eq!(policy.usage().needed, Bytes::new(1025 * (128 << 10)));
        policy.retire(b).unwrap();
        assert!(policy.admit(c, TokenCount::new(1)).unwrap());
        drop(policy);
        assert!(is_empty(&driver.1));
    }

    #[test]
    fn a_budget_below_one_slot_holds_nothing() {
        let driver = driver();
        let policy = StaticSlots::new(&driver.0, &sliced(8, 1024, Bytes::mib(127))).unwrap();
        assert!(!policy.can_ever_hold(TokenCount::new(1)));
        assert_eq!(policy.usage(), Usage::default());
    }
}
