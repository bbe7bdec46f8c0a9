//! Where choices come from: a seed, or bytes that a fuzzer made up.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// A stream of bytes that becomes choices.
pub(crate) trait Source {
    fn byte(&mut self) -> u8;

    /// Whether no more is to be chosen.
    fn is_over(&self) -> bool;

    fn word(&mut self) -> u64 {
        u64::from_le_bytes(std::array::from_fn(|_| self.byte()))
    }

    /// A number below `limit`, which is not 0.
    fn below(&mut self, limit: u64) -> u64 {
        let drawn = match limit {
            0..=0x100 => u64::from(self.byte()),
            0x101..=0x1_0000 => u64::from(u16::from_le_bytes([self.byte(), self.byte()])),
            _ => self.word(),
        };
        drawn % limit
    }

    fn index(&mut self, length: usize) -> usize {
        usize::try_from(self.below(u64::try_from(length).unwrap())).unwrap()
    }

    fn one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.index(of.len())]
    }

    fn small(&mut self, limit: u32) -> u32 {
        u32::try_from(self.below(limit.into())).unwrap()
    }

    /// Any number, those at the edges more often.
    fn any_number(&mut self) -> u64 {
        match self.below(4) {
            0 => self.below(64),
            1 => self.pick(&[0, 1, 2, 4096, 1 << 21, 1 << 32, 1 << 48, 1 << 62, 1 << 63, (1 << 63) - 1]),
            2 => u64::MAX - self.below(4),
            _ => self.word(),
        }
    }

    /// A number that no enum of the ABI has.
    fn no_choice(&mut self) -> i32 {
        self.pick(&[i32::MIN, -2, 64, 99, 255, 1000, i32::MAX])
    }
}

/// Choices of a seed, so many bytes of them at the least.
pub(crate) struct Seeded {
    random: ChaCha8Rng,
    left: u64,
}

impl Seeded {
    pub(crate) fn new(seed: u64, bytes: u64) -> Self {
        Self { random: ChaCha8Rng::seed_from_u64(seed), left: bytes }
    }
}

impl Source for Seeded {
    fn byte(&mut self) -> u8 {
        self.left = self.left.saturating_sub(1);
        let mut byte = [0];
        self.random.fill_bytes(&mut byte);
        byte[0]
    }

    fn is_over(&self) -> bool {
        self.left == 0
    }
}

/// Choices of bytes; zeros once they are used up.
#[allow(dead_code, reason = "for the coverage-guided target")]
pub(crate) struct Given<'a>(pub(crate) &'a [u8]);

impl Source for Given<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    fn is_over(&self) -> bool {
        self.0.is_empty()
    }
}
