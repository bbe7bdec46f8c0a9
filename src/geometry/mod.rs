//! What a model keeps for each token, and every option of a cache.
//!
//! Owns the shape of a model's KV cache ([`Geometry`]: which layer keeps how many heads of how many
//! elements), the options that a cache is built from ([`Config`]), and how far kernels read past a
//! sequence ([`Kernel`]). Geometry and options are validated when they are made, so that the rooms
//! above need not ask again. Refuses to know where anything lies in memory (that is `layout`), what a
//! granule is, and which driver there will be.
//!
//! ```text
//!   config.json ──► hf ──┐
//!   "llama-3-8b" ► presets ──► Geometry ──► ConfigBuilder ──► Config ──► layout, cache
//!   Geometry::new ───────┘                    (config)
//! ```
//!
//! Invariants: a geometry has at least one layer, no dimension of it is zero, and a token's bytes
//! over all layers fit 64 bits. Neighbouring groups of one kind are merged, so that two geometries
//! are equal exactly when their layers are.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, ErrorKind, Result};
use crate::units::Bytes;

mod catalog;
mod config;
mod hf;
mod kernels;
mod presets;

pub use catalog::{Catalog, KernelEntry, LatentEntry, PresetEntry};
pub use config::{Background, Commit, Config, ConfigBuilder, KvOrder, LayoutChoice, LayoutKind, Reclaim};
pub use kernels::{Evidence, Kernel, Tile};

/// The type of a cache's elements.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, serde::Serialize)]
#[serde(into = "&'static str")]
pub enum Dtype {
    /// IEEE single precision, 4 bytes.
    F32,
    /// IEEE half precision, 2 bytes.
    F16,
    /// bfloat16, 2 bytes: the default, as nearly every model is published in it.
    #[default]
    BF16,
    /// 8-bit float with 4 bits of exponent and 3 of mantissa (the variant without infinities).
    F8E4M3,
    /// 8-bit float with 5 bits of exponent and 2 of mantissa.
    F8E5M2,
    /// Signed byte.
    I8,
    /// Unsigned byte.
    U8,
}

impl From<Dtype> for &'static str {
    fn from(dtype: Dtype) -> Self {
        dtype.name()
    }
}

impl Dtype {
    /// Every type.
    pub const ALL: [Self; 7] =
        [Self::F32, Self::F16, Self::BF16, Self::F8E4M3, Self::F8E5M2, Self::I8, Self::U8];

    /// The size of one element.
    #[must_use]
    pub const fn bytes(self) -> Bytes {
        Bytes::new(match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::F8E4M3 | Self::F8E5M2 | Self::I8 | Self::U8 => 1,
        })
    }

    /// The name that PyTorch and Hugging Face give it, such as `bfloat16`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::BF16 => "bfloat16",
            Self::F8E4M3 => "float8_e4m3fn",
            Self::F8E5M2 => "float8_e5m2",
            Self::I8 => "int8",
            Self::U8 => "uint8",
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Reads PyTorch's names, with or without `torch.`, and the usual short forms (`bf16`, `fp8`).
impl FromStr for Dtype {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name.strip_prefix("torch.").unwrap_or(name) {
            "float32" | "float" | "fp32" | "f32" => Ok(Self::F32),
            "float16" | "half" | "fp16" | "f16" => Ok(Self::F16),
            "bfloat16" | "bf16" => Ok(Self::BF16),
            "float8_e4m3fn" | "float8_e4m3" | "fp8_e4m3" | "fp8" => Ok(Self::F8E4M3),
            "float8_e5m2" | "fp8_e5m2" => Ok(Self::F8E5M2),
            "int8" => Ok(Self::I8),
            "uint8" => Ok(Self::U8),
            _ => Err(invalid(format!(
                "\"{name}\" is no element type of a cache; use one of {}",
                Self::ALL.map(Self::name).join(", ")
            ))),
        }
    }
}

/// Which of a layer's two pieces.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Part {
    /// The keys, or the latent of a layer that keeps only that.
    Key,
    /// The values. A latent layer has none.
    Value,
}

impl Part {
    /// Both, keys first, as a row has them.
    pub const ALL: [Self; 2] = [Self::Key, Self::Value];
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Key => "key",
            Self::Value => "value",
        })
    }
}

/// What one token's [`Part`] of one layer is: `[heads, dim]` elements, `dim` the fastest.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Piece {
    /// KV heads; 1 for a latent.
    pub heads: u32,
    /// Elements of a head.
    pub dim: u32,
}

impl Piece {
    /// Elements in all.
    #[must_use]
    pub fn elements(self) -> u64 {
        u64::from(self.heads) * u64::from(self.dim)
    }
}

/// What a layer keeps for each token.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum LayerKind {
    /// Keys and values for each KV head. Their widths may differ.
    Kv {
        /// KV heads of this rank (not query heads).
        kv_heads: u32,
        /// Elements of a key.
        key_dim: u32,
        /// Elements of a value.
        value_dim: u32,
    },
    /// One latent vector from which keys and values are computed (MLA), rotary part included.
    Latent {
        /// Elements of the vector.
        dim: u32,
    },
}

impl LayerKind {
    /// The shape of one of the two pieces; `None` for the values of a latent layer.
    #[must_use]
    pub const fn piece(&self, part: Part) -> Option<Piece> {
        match (*self, part) {
            (Self::Kv { kv_heads, key_dim, .. }, Part::Key) => Some(Piece { heads: kv_heads, dim: key_dim }),
            (Self::Kv { kv_heads, value_dim, .. }, Part::Value) => {
                Some(Piece { heads: kv_heads, dim: value_dim })
            }
            (Self::Latent { dim }, Part::Key) => Some(Piece { heads: 1, dim }),
            (Self::Latent { .. }, Part::Value) => None,
        }
    }

    /// The name and the value of each dimension, for the message that refuses one.
    fn dimensions(&self) -> Vec<(&'static str, u32)> {
        match *self {
            Self::Kv { kv_heads, key_dim, value_dim } => {
                vec![("kv_heads", kv_heads), ("key_dim", key_dim), ("value_dim", value_dim)]
            }
            Self::Latent { dim } => vec![("dim", dim)],
        }
    }
}

impl fmt::Display for LayerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Kv { kv_heads, key_dim, value_dim } if key_dim == value_dim => {
                write!(f, "{kv_heads} KV heads of {key_dim}")
            }
            Self::Kv { kv_heads, key_dim, value_dim } => {
                write!(f, "{kv_heads} KV heads, keys of {key_dim}, values of {value_dim}")
            }
            Self::Latent { dim } => write!(f, "a latent of {dim}"),
        }
    }
}

/// Successive layers of one kind.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct LayerGroup {
    /// How many.
    pub layers: u32,
    /// What each of them keeps.
    pub kind: LayerKind,
}

impl fmt::Display for LayerGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plural = if self.layers == 1 { "" } else { "s" };
        write!(f, "{} layer{plural} of {}", self.layers, self.kind)
    }
}

/// What a model (one rank's part of it) keeps for each token: its layers in model order.
///
/// Layers are counted from 0. Layers that keep nothing for a token are not part of it.
///
/// ```
/// use vattn::geometry::{Dtype, Geometry};
/// use vattn::units::Bytes;
///
/// let llama = Geometry::uniform(32, 8, 128, Dtype::BF16)?;
/// assert_eq!(llama, Geometry::preset("llama-3-8b")?);
/// assert_eq!(llama.bytes_per_token(), Bytes::new(131_072));
/// # Ok::<(), vattn::Error>(())
/// ```
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Geometry {
    groups: Vec<LayerGroup>,
    dtype: Dtype,
    layers: u32,
    bytes_per_token: Bytes,
}

impl Geometry {
    /// The most layers, far beyond any model: a slip of the pen in a file must not become gigabytes
    /// of bookkeeping.
    pub const MAX_LAYERS: u32 = 65_536;

    /// A model of those layers, in model order.
    ///
    /// # Errors
    /// [`InvalidGeometry`](ErrorKind::InvalidGeometry): no layer at all, more than
    /// [`MAX_LAYERS`](Self::MAX_LAYERS), a dimension of zero, or a token of 2^64 bytes or more.
    pub fn new(groups: Vec<LayerGroup>, dtype: Dtype) -> Result<Self> {
        let mut merged: Vec<LayerGroup> = Vec::with_capacity(groups.len());
        let mut layers = 0_u32;
        let mut total = Bytes::ZERO;
        for (number, group) in groups.into_iter().enumerate() {
            if group.layers == 0 {
                return Err(invalid(format!(
                    "layer group {number} has 0 layers; at least 1 is needed: leave the group out"
                )));
            }
            if let Some((name, _)) = group.kind.dimensions().into_iter().find(|&(_, value)| value == 0) {
                let cure = match name {
                    "value_dim" => "describe layers that keep no values as latent",
                    _ => "use the model's own number",
                };
                return Err(invalid(format!(
                    "{name} of layer group {number} is 0; at least 1 is needed: {cure}"
                )));
            }
            layers = layers
                .checked_add(group.layers)
                .filter(|&layers| layers <= Self::MAX_LAYERS)
                .ok_or_else(|| too_many_layers(u64::from(layers) + u64::from(group.layers)))?;
            total =
                group_bytes(group, dtype).and_then(|bytes| total.checked_add(bytes)).ok_or_else(|| {
                    invalid(format!(
                        "a token would take 2^64 bytes or more with layer group {number} ({group}, {dtype}): use \
                     smaller dimensions"
                ))
                })?;
            match merged.last_mut() {
                Some(last) if last.kind == group.kind => last.layers += group.layers,
                _ => merged.push(group),
            }
        }
        if merged.is_empty() {
            return Err(invalid("a model without layers keeps nothing; at least 1 layer is needed"));
        }
        Ok(Self { groups: merged, dtype, layers, bytes_per_token: total })
    }

    /// A model whose layers are all alike, with keys and values of one width.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn uniform(layers: u32, kv_heads: u32, head_dim: u32, dtype: Dtype) -> Result<Self> {
        let kind = LayerKind::Kv { kv_heads, key_dim: head_dim, value_dim: head_dim };
        Self::new(vec![LayerGroup { layers, kind }], dtype)
    }

    /// A model with multi-head latent attention: one vector of `latent_dim` elements a token and
    /// layer, its rotary part included.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn mla(layers: u32, latent_dim: u32, dtype: Dtype) -> Result<Self> {
        Self::new(vec![LayerGroup { layers, kind: LayerKind::Latent { dim: latent_dim } }], dtype)
    }

    /// One rank's part of this model among `ranks` that split the heads between them.
    ///
    /// KV heads are divided. Where there are fewer heads than ranks each rank keeps one, so that
    /// several ranks keep the same. A latent belongs to all heads and is kept whole by every rank.
    ///
    /// # Errors
    /// [`InvalidGeometry`](ErrorKind::InvalidGeometry): no rank, or a number of ranks of which the
    /// heads are neither a multiple nor a divisor.
    pub fn with_tensor_parallel(&self, ranks: u32) -> Result<Self> {
        if ranks == 0 {
            return Err(invalid(
                "a tensor-parallel degree of 0 leaves no rank; use 1 for a model in one piece",
            ));
        }
        let groups = self.groups.iter().map(|&group| {
            let kind = match group.kind {
                LayerKind::Kv { kv_heads, key_dim, value_dim } => {
                    let kv_heads = heads_of_a_rank(kv_heads, ranks)?;
                    LayerKind::Kv { kv_heads, key_dim, value_dim }
                }
                latent @ LayerKind::Latent { .. } => latent,
            };
            Ok(LayerGroup { kind, ..group })
        });
        Self::new(groups.collect::<Result<_>>()?, self.dtype)
    }

    /// The same model with elements of another type: a cache is often kept in 8 bits.
    ///
    /// # Errors
    /// [`InvalidGeometry`](ErrorKind::InvalidGeometry): a token of 2^64 bytes or more.
    pub fn with_dtype(&self, dtype: Dtype) -> Result<Self> {
        Self::new(self.groups.clone(), dtype)
    }

    /// The layers in model order. Neighbours differ in kind.
    #[must_use]
    pub fn groups(&self) -> &[LayerGroup] {
        &self.groups
    }

    /// What a layer keeps, or `None` past the last.
    #[must_use]
    pub fn layer_kind(&self, layer: u32) -> Option<&LayerKind> {
        let mut before = 0;
        self.groups.iter().find_map(|group| {
            before += group.layers;
            (layer < before).then_some(&group.kind)
        })
    }

    /// What each layer keeps, in model order.
    pub fn layer_kinds(&self) -> impl Iterator<Item = &LayerKind> {
        self.groups
            .iter()
            .flat_map(|group| std::iter::repeat_n(&group.kind, crate::units::index(group.layers)))
    }

    /// How many layers keep something.
    #[must_use]
    pub const fn layers(&self) -> u32 {
        self.layers
    }

    /// The type of the elements, the same in all layers.
    #[must_use]
    pub const fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// The packed floor of one token: its pieces in all layers, with no rounding at all.
    #[must_use]
    pub const fn bytes_per_token(&self) -> Bytes {
        self.bytes_per_token
    }
}

impl fmt::Display for Geometry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, group) in self.groups.iter().enumerate() {
            let comma = if number == 0 { "" } else { ", " };
            write!(f, "{comma}{group}")?;
        }
        write!(f, ", {}: {} a token", self.dtype, self.bytes_per_token)
    }
}

/// What a group's layers keep for one token, or `None` past 2^64.
fn group_bytes(group: LayerGroup, dtype: Dtype) -> Option<Bytes> {
    let elements = Part::ALL
        .into_iter()
        .filter_map(|part| group.kind.piece(part))
        .try_fold(0_u64, |sum, piece| sum.checked_add(piece.elements()))?;
    dtype.bytes().checked_mul(elements)?.checked_mul(u64::from(group.layers))
}

fn heads_of_a_rank(kv_heads: u32, ranks: u32) -> Result<u32> {
    if kv_heads.is_multiple_of(ranks) {
        Ok(kv_heads / ranks)
    } else if ranks.is_multiple_of(kv_heads) {
        Ok(1)
    } else {
        Err(invalid(format!(
            "{kv_heads} KV heads can't be split over a tensor-parallel degree of {ranks}: use a degree that \
             divides {kv_heads}, or a multiple of {kv_heads}"
        )))
    }
}

#[cold]
fn too_many_layers(layers: u64) -> Error {
    invalid(format!(
        "{layers} layers are more than the limit of {}: check the number of layers",
        Geometry::MAX_LAYERS
    ))
}

#[cold]
fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidGeometry, message)
}

#[cfg(test)]
mod tests;
