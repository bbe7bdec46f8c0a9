//! What a policy learns of the model: tensors of rows, and the limits.
//!
//! Pure. Refuses to know layers, heads and data types; whoever plans a layout turns them into rows.

use vattn::units::{Bytes, GranuleSize, Granules, TokenCount};
use vattn::{Error, ErrorKind, Result};

/// One tensor, `[slot, token, row]`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TensorShape {
    /// Bytes of one token.
    pub row: Bytes,
    /// Bytes from one slot's first token to the next slot's; whole granules.
    pub stride: Bytes,
}

/// The tensors of a cache and its limits. Everything is positive, and a slot's part of a tensor
/// holds [`max_tokens`](Self::max_tokens).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Shape {
    tensors: Vec<TensorShape>,
    max_slots: u32,
    max_tokens: TokenCount,
    tile_tokens: TokenCount,
    budget: Bytes,
}

impl Shape {
    /// Checks and keeps a shape.
    ///
    /// # Errors
    /// [`InvalidGeometry`](ErrorKind::InvalidGeometry) for tensors that can't be,
    /// [`InvalidConfig`](ErrorKind::InvalidConfig) for limits that can't be.
    pub fn new(
        tensors: Vec<TensorShape>,
        max_slots: u32,
        max_tokens: TokenCount,
        tile_tokens: TokenCount,
        budget: Bytes,
    ) -> Result<Self> {
        let config = |message: String| Err(Error::new(ErrorKind::InvalidConfig, message));
        if max_slots == 0 {
            return config("a cache of 0 slots serves nobody; ask for at least 1".into());
        }
        if max_tokens.is_zero() {
            return config("slots of 0 tokens serve nobody; ask for at least 1".into());
        }
        if tile_tokens.is_zero() {
            return config("a tile of 0 tokens rounds up to nothing; 1 means no rounding".into());
        }
        if tensors.is_empty() {
            return Err(Error::new(ErrorKind::InvalidGeometry, "a cache without tensors holds nothing"));
        }
        for (index, tensor) in tensors.iter().enumerate() {
            let length = tensor.row.checked_mul(max_tokens.get());
            if tensor.row.is_zero() || length.is_none_or(|length| length > tensor.stride) {
                return Err(Error::new(
                    ErrorKind::InvalidGeometry,
                    format!(
                        "tensor {index} has {max_tokens} tokens of {} in a slot of {}; the slot must hold them",
                        tensor.row, tensor.stride
                    ),
                ));
            }
            if tensor.stride.checked_mul(max_slots.into()).is_none() {
                return Err(Error::new(
                    ErrorKind::OutOfAddressSpace,
                    format!(
                        "tensor {index} has {max_slots} slots of {}: more than 2^64 bytes; use fewer slots or tokens",
                        tensor.stride
                    ),
                ));
            }
        }
        Ok(Self { tensors, max_slots, max_tokens, tile_tokens, budget })
    }

    /// The tensors.
    #[must_use]
    pub fn tensors(&self) -> &[TensorShape] {
        &self.tensors
    }

    /// How many requests can be admitted at once.
    #[must_use]
    pub fn max_slots(&self) -> u32 {
        self.max_slots
    }

    /// How many tokens a request can have.
    #[must_use]
    pub fn max_tokens(&self) -> TokenCount {
        self.max_tokens
    }

    /// The budget.
    #[must_use]
    pub fn budget(&self) -> Bytes {
        self.budget
    }

    /// Bytes of one token in all tensors together.
    #[must_use]
    pub fn bytes_per_token(&self) -> Bytes {
        self.tensors.iter().map(|tensor| tensor.row).sum()
    }

    /// The largest row of any tensor.
    #[must_use]
    pub fn largest_row(&self) -> Bytes {
        self.tensors.iter().map(|tensor| tensor.row).max().unwrap_or(Bytes::ZERO)
    }

    /// How many tokens must be backed so that a kernel that loads whole tiles can read `tokens`.
    #[must_use]
    pub fn tiled(&self, tokens: TokenCount) -> TokenCount {
        if self.tile_tokens.get() == 1 {
            return tokens;
        }
        let rounded = tokens.get().div_ceil(self.tile_tokens.get()).saturating_mul(self.tile_tokens.get());
        TokenCount::new(rounded).min(self.max_tokens)
    }

    /// What a slot at full length takes, in all tensors together.
    #[must_use]
    pub fn full_slot(&self, granule: GranuleSize) -> Granules {
        self.tensors.iter().map(|tensor| granule.covering(tensor.row * self.max_tokens.get())).sum()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Two tensors with rows of 64 KiB: Llama-3-8B, all layers in one, K and V apart.
    pub(crate) fn sliced(max_slots: u32, max_tokens: u64, budget: Bytes) -> Shape {
        let tensor = TensorShape {
            row: Bytes::new(64 << 10),
            stride: Bytes::new(max_tokens * (64 << 10)).checked_next_multiple_of(Bytes::mib(2)).unwrap(),
        };
        let tokens = TokenCount::new(max_tokens);
        Shape::new(vec![tensor; 2], max_slots, tokens, TokenCount::new(1), budget).unwrap()
    }

    #[test]
    fn a_shape_that_cannot_be_is_refused_with_its_numbers() {
        let tensor = TensorShape { row: Bytes::new(100), stride: Bytes::new(999) };
        let one = TokenCount::new(1);
        let error = Shape::new(vec![tensor], 1, TokenCount::new(10), one, Bytes::gib(1)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidGeometry);
        assert!(error.report().contains("10 tokens of 100 bytes in a slot of 999 bytes"), "{error}");
        let error = Shape::new(vec![tensor], 0, one, one, Bytes::gib(1)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidConfig);
    }

    #[test]
    fn tiles_round_up_and_stop_at_the_end() {
        let mut shape = sliced(1, 1000, Bytes::gib(1));
        assert_eq!(shape.tiled(TokenCount::new(129)), TokenCount::new(129));
        shape.tile_tokens = TokenCount::new(128);
        assert_eq!(shape.tiled(TokenCount::new(0)), TokenCount::new(0));
        assert_eq!(shape.tiled(TokenCount::new(129)), TokenCount::new(256));
        assert_eq!(shape.tiled(TokenCount::new(990)), TokenCount::new(1000));
        assert_eq!(shape.full_slot(GranuleSize::new(Bytes::mib(2)).unwrap()), Granules::new(64));
    }
}
