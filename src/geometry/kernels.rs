//! How far past a sequence's length an attention kernel reads.
//!
//! Owns one table, [`Kernel::ALL`]. A kernel that is given a whole tensor and lengths may load whole
//! tiles up to the tensor's end, and what lies past a sequence's last tile is perhaps not mapped. So
//! a step has to back whole tiles for it ([`tile_tokens`](crate::geometry::Config::tile_tokens)).
//! Refuses to know layouts, and what a kernel computes.
//!
//! Two things decide a tile: which of its own kernels a library picks for a call, and how wide heads
//! are. FlashAttention-3 has tiles of one length for a single new token, where a causal mask masks
//! nothing and is dropped, and of another under a mask. A multiple of the one is none of the other:
//! whoever calls both over the batch needs a multiple of both, see [`Geometry::tile_tokens`].

use super::{Dtype, Geometry, LayerKind};
use crate::error::{Error, ErrorKind, Result};
use crate::units::gcd;

/// How an entry of the table is known.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, serde::Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Evidence {
    /// Seen on a GPU: with all that lies past the entry's tokens unmapped the kernel ran and was right, and
    /// with less it faulted. `docs/kernels.md` names the widths of heads; others are as the source has them.
    Measured,
    /// Read in the kernel's source code.
    Source,
}

/// An attention kernel, called in one way.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub struct Kernel {
    /// Its name in options, such as `fa3-decode`.
    pub name: &'static str,
    /// How it is called.
    pub call: &'static str,
    /// How the entry is known.
    pub evidence: Evidence,
    reads: Reads,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Reads {
    /// Nothing past the length.
    Exact,
    /// Whole tiles of FlashAttention-3.
    Fa3(Fa3),
}

/// Which of its tiles FlashAttention-3 takes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Fa3 {
    /// One new token: no mask.
    One,
    /// Several new tokens under a causal mask.
    Causal,
    /// A sliding window.
    Window,
}

/// What a kernel loads at once for elements of these types and heads up to these widths.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
#[non_exhaustive]
pub struct Tile {
    /// The types of elements.
    pub dtypes: &'static [Dtype],
    /// The widest key.
    pub key_dim: u32,
    /// The widest value.
    pub value_dim: u32,
    /// Tokens.
    pub tokens: u32,
}

/// The tiles of elements of these types and of heads up to these widths.
struct Tiles {
    dtypes: &'static [Dtype],
    key_dim: u32,
    value_dim: u32,
    /// In the order of [`Fa3`].
    tokens: [u32; 3],
}

const fn tiles(dtypes: &'static [Dtype], key_dim: u32, value_dim: u32, tokens: [u32; 3]) -> Tiles {
    Tiles { dtypes, key_dim, value_dim, tokens }
}

/// The types that FlashAttention-3 takes, by their size.
const WIDE: &[Dtype] = &[Dtype::F16, Dtype::BF16];
const NARROW: &[Dtype] = &[Dtype::F8E4M3];

/// Where FlashAttention-3's tiles were read.
const FA3_SOURCE: &str =
    "kBlockN of tile_size_fwd_sm90 in hopper/tile_size.h of Dao-AILab/flash-attention, commit 07602ad";
/// Where it stands what was seen of the others.
const SEEN: &str = "docs/kernels.md";

/// FlashAttention-3's tiles; the first row that is wide enough counts.
///
/// They are those of [`FA3_SOURCE`], for memory that is not paged. That file has changed: earlier versions have 128 for
/// 64-wide heads under a window, and 96 for values of 256. Since that commit a few query rows of
/// 128-wide 8-bit heads may have 96.
const FA3: [Tiles; 13] = [
    tiles(WIDE, 64, 64, [192, 128, 160]),
    tiles(WIDE, 64, 256, [112, 112, 112]),
    tiles(WIDE, 64, 512, [64, 64, 64]),
    tiles(WIDE, 96, 96, [144, 144, 128]),
    tiles(WIDE, 128, 128, [176, 128, 128]),
    tiles(WIDE, 192, 128, [128, 128, 96]),
    tiles(WIDE, 192, 192, [112, 112, 96]),
    tiles(WIDE, 256, 256, [80, 80, 64]),
    tiles(NARROW, 64, 64, [160, 160, 160]),
    tiles(NARROW, 96, 96, [128, 128, 128]),
    tiles(NARROW, 128, 128, [224, 224, 224]),
    tiles(NARROW, 192, 192, [160, 160, 160]),
    tiles(NARROW, 256, 256, [128, 128, 64]),
];

/// A latent as FlashAttention-3 takes it: its rotary part as keys, the rest as values.
const LATENT: (u32, u32, u32) = (576, 64, 512);

impl Kernel {
    /// The table. FlashAttention-3's tiles over a batch were proved on an H200 for 16-bit heads of 64,
    /// 128, 192 (values of 128) and 256; all others, and those of a window, are read in its source.
    pub const ALL: &[Self] = &[
        Self {
            name: "fa3-decode",
            call: "FlashAttention-3 over the batch with cache_seqlens, one new token",
            evidence: Evidence::Measured,
            reads: Reads::Fa3(Fa3::One),
        },
        Self {
            name: "fa3-causal",
            call: "FlashAttention-3 likewise, several new tokens and causal=True",
            evidence: Evidence::Measured,
            reads: Reads::Fa3(Fa3::Causal),
        },
        Self {
            name: "fa3-window",
            call: "FlashAttention-3 likewise, with a window_size",
            evidence: Evidence::Source,
            reads: Reads::Fa3(Fa3::Window),
        },
        Self {
            name: "fa3-view",
            call: "FlashAttention-3 over one slot's exact view, keys[i:i+1, :length]",
            evidence: Evidence::Measured,
            reads: Reads::Exact,
        },
        Self {
            name: "torch-varlen",
            call: "PyTorch's FlashAttention with variable lengths, seqused_k",
            evidence: Evidence::Measured,
            reads: Reads::Exact,
        },
        Self {
            name: "sdpa-view",
            call: "PyTorch's SDPA over exact views: flash, cuDNN, efficient, math",
            evidence: Evidence::Measured,
            reads: Reads::Exact,
        },
        Self {
            name: "flashinfer",
            call: "FlashInfer over the paged view, its page table counting upward",
            evidence: Evidence::Measured,
            reads: Reads::Exact,
        },
    ];

    /// The kernel of that name.
    ///
    /// # Errors
    /// [`InvalidConfig`](ErrorKind::InvalidConfig) for a name that is not in the table, with those
    /// that are.
    pub fn named(name: &str) -> Result<&'static Self> {
        Self::ALL.iter().find(|kernel| kernel.name == name).ok_or_else(|| {
            let known: Vec<_> = Self::ALL.iter().map(|kernel| kernel.name).collect();
            invalid(format!("no kernel is known as \"{name}\": use one of {}", known.join(", ")))
        })
    }

    /// What the tokens that a step backs must be a multiple of for this kernel and a layer of that
    /// kind; 1 where nothing past the length is read. So up to one token less than this is backed
    /// past the length. `None` where it is not known, or the kernel takes no such layer.
    #[must_use]
    pub fn tile_tokens(&self, kind: &LayerKind, dtype: Dtype) -> Option<u32> {
        let (key, value) = match *kind {
            LayerKind::Kv { .. } if self.is_exact() => return Some(1),
            LayerKind::Kv { key_dim, value_dim, .. } => (key_dim, value_dim),
            LayerKind::Latent { dim } => match self.latent()? {
                (taken, key, value) if taken == dim => (key, value),
                _ => return None,
            },
        };
        let fits = |row: &Tile| row.dtypes.contains(&dtype) && key <= row.key_dim && value <= row.value_dim;
        Some(self.tiles().find(fits)?.tokens)
    }

    /// Its tiles; the first row that has the type and is wide enough counts. None where nothing past the
    /// length is read.
    pub fn tiles(&self) -> impl Iterator<Item = Tile> {
        let rows: &[Tiles] = if self.is_exact() { &[] } else { &FA3 };
        let reads = self.reads;
        rows.iter().map(move |row| {
            let Tiles { dtypes, key_dim, value_dim, tokens: [one, causal, window] } = *row;
            let tokens = match reads {
                Reads::Exact => 1,
                Reads::Fa3(Fa3::One) => one,
                Reads::Fa3(Fa3::Causal) => causal,
                Reads::Fa3(Fa3::Window) => window,
            };
            Tile { dtypes, key_dim, value_dim, tokens }
        })
    }

    /// Whether nothing past the length is read.
    #[must_use]
    pub fn is_exact(&self) -> bool {
        self.reads == Reads::Exact
    }

    /// Where it can be read how far it reads.
    #[must_use]
    pub fn source(&self) -> &'static str {
        if self.is_exact() { SEEN } else { FA3_SOURCE }
    }

    /// The latent that it takes, if any: its elements, and those of them that it takes for keys and values.
    pub(super) fn latent(&self) -> Option<(u32, u32, u32)> {
        (!self.is_exact()).then_some(LATENT)
    }
}

impl Geometry {
    /// What the tokens that a step backs must be a multiple of so that all these kernels can read
    /// all layers: the least common multiple of their tiles, for
    /// [`tile_tokens`](super::ConfigBuilder::tile_tokens). 1 for no kernel.
    ///
    /// ```
    /// use vattn::geometry::{Geometry, Kernel};
    ///
    /// let llama = Geometry::preset("llama-3-8b")?;
    /// let decode = Kernel::named("fa3-decode")?;
    /// assert_eq!(llama.tile_tokens(&[decode, Kernel::named("fa3-view")?])?, 176);
    /// assert_eq!(llama.tile_tokens(&[decode, Kernel::named("fa3-causal")?])?, 1408);
    /// # Ok::<(), vattn::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`InvalidConfig`](ErrorKind::InvalidConfig) for a kernel whose tile is not known for a layer of
    /// this model.
    pub fn tile_tokens(&self, kernels: &[&Kernel]) -> Result<u32> {
        let mut common = 1_u32;
        for kernel in kernels {
            for group in self.groups() {
                let tile = kernel.tile_tokens(&group.kind, self.dtype()).ok_or_else(|| {
                    invalid(format!(
                        "how far {} reads is not known for {} in {}: use another kernel, or give tile_tokens itself",
                        kernel.name,
                        group.kind,
                        self.dtype()
                    ))
                })?;
                let step = u64::from(tile) / gcd(common.into(), tile.into());
                common = u32::try_from(u64::from(common) * step).map_err(|_| {
                    invalid(
                        "the tiles of these kernels have no common multiple below 2^32: use fewer kernels",
                    )
                })?;
            }
        }
        Ok(common)
    }
}

#[cold]
fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidConfig, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tile_of(name: &str, kind: LayerKind, dtype: Dtype) -> Option<u32> {
        Kernel::named(name).unwrap().tile_tokens(&kind, dtype)
    }

    fn kv(key_dim: u32, value_dim: u32) -> LayerKind {
        LayerKind::Kv { kv_heads: 8, key_dim, value_dim }
    }

    #[test]
    fn a_tile_depends_on_the_call_the_width_and_the_elements() {
        for (name, kind, dtype, tokens) in [
            ("fa3-decode", kv(128, 128), Dtype::BF16, Some(176)),
            ("fa3-causal", kv(128, 128), Dtype::F16, Some(128)),
            ("fa3-decode", kv(128, 128), Dtype::F8E4M3, Some(224)),
            ("fa3-decode", kv(80, 80), Dtype::BF16, Some(144)),
            ("fa3-decode", kv(192, 128), Dtype::BF16, Some(128)),
            ("fa3-decode", kv(192, 192), Dtype::BF16, Some(112)),
            ("fa3-window", kv(64, 64), Dtype::BF16, Some(160)),
            ("fa3-decode", LayerKind::Latent { dim: 576 }, Dtype::BF16, Some(64)),
            ("fa3-view", kv(128, 128), Dtype::BF16, Some(1)),
            ("flashinfer", kv(256, 256), Dtype::F8E5M2, Some(1)),
            // Not known, or not taken.
            ("fa3-decode", kv(512, 512), Dtype::BF16, None),
            ("fa3-decode", kv(128, 128), Dtype::F32, None),
            ("fa3-decode", kv(128, 128), Dtype::F8E5M2, None),
            ("fa3-decode", LayerKind::Latent { dim: 320 }, Dtype::BF16, None),
            ("flashinfer", LayerKind::Latent { dim: 576 }, Dtype::BF16, None),
        ] {
            assert_eq!(tile_of(name, kind, dtype), tokens, "{name} {kind} {dtype}");
        }
    }

    #[test]
    fn several_kernels_need_a_multiple_of_every_tile() {
        let llama = Geometry::preset("llama-3-8b").unwrap();
        let named = |name| Kernel::named(name).unwrap();
        assert_eq!(llama.tile_tokens(&[]).unwrap(), 1);
        assert_eq!(llama.tile_tokens(&[named("fa3-view"), named("fa3-causal")]).unwrap(), 128);
        let both = llama.tile_tokens(&[named("fa3-decode"), named("fa3-causal")]).unwrap();
        assert_eq!((both, both % 176, both % 128), (1408, 0, 0));
        let kinds = [64, 128].map(|dim| super::super::LayerGroup { layers: 1, kind: kv(dim, dim) });
        let mixed = Geometry::new(kinds.into(), Dtype::BF16).unwrap();
        assert_eq!(mixed.tile_tokens(&[named("fa3-decode")]).unwrap(), 2112);
    }

    #[test]
    fn what_is_not_known_is_refused_by_name() {
        let error = Kernel::named("fa4").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidConfig);
        assert!(
            error.to_string().contains("\"fa4\"") && error.to_string().contains("fa3-decode, "),
            "{error}"
        );
        let deepseek = Geometry::preset("deepseek-v3").unwrap();
        let error = deepseek.tile_tokens(&[Kernel::named("flashinfer").unwrap()]).unwrap_err();
        assert!(error.to_string().contains("flashinfer reads is not known for a latent of 576"), "{error}");
    }
}
