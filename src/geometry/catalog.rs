//! What is known by name, as data: models and kernels.
//!
//! Owns no fact: it reads [`Geometry::presets`] and [`Kernel::ALL`], the tables that the library itself uses.

use serde::Serialize;

use super::{Dtype, Evidence, Geometry, Kernel, LayerKind, Tile};
use crate::error::Result;
use crate::units::Bytes;

/// Every model and every kernel that can be named.
#[derive(Clone, PartialEq, Debug, Serialize)]
#[non_exhaustive]
pub struct Catalog {
    /// The models that [`Geometry::preset`] knows, in its order.
    pub presets: Vec<PresetEntry>,
    /// The kernels that [`Kernel::named`] knows, in its order.
    pub kernels: Vec<KernelEntry>,
}

/// A model: whole, all of its layers alike.
#[derive(Clone, PartialEq, Debug, Serialize)]
#[non_exhaustive]
pub struct PresetEntry {
    /// As [`Geometry::preset`] takes it.
    pub name: &'static str,
    /// Whose model it is, and its dimensions in words.
    pub description: &'static str,
    /// Layers.
    pub layers: u32,
    /// KV heads; 0 for layers that keep a latent.
    pub kv_heads: u32,
    /// Elements of a key, or of a latent.
    pub key_dim: u32,
    /// Elements of a value; 0 for a latent.
    pub value_dim: u32,
    /// The type of the elements.
    pub dtype: Dtype,
    /// What one token takes in all layers, with no rounding.
    pub bytes_per_token: Bytes,
}

/// An attention kernel, called in one way.
#[derive(Clone, PartialEq, Debug, Serialize)]
#[non_exhaustive]
pub struct KernelEntry {
    /// As [`Kernel::named`] takes it.
    pub name: &'static str,
    /// How it is called.
    pub summary: &'static str,
    /// How it is known how far it reads.
    pub evidence: Evidence,
    /// Where that can be read.
    pub source: &'static str,
    /// Whether it reads nothing past a length, for any heads: then its tile is one token, and there are no rows.
    pub exact: bool,
    /// What `tile_tokens` has to be a multiple of. The first row counts that has the type and is wide enough for
    /// keys and values; where there is none, it is not known.
    pub tiles: Vec<Tile>,
    /// Latents that it takes, and as heads of which widths it looks them up.
    pub latents: Vec<LatentEntry>,
}

/// A latent as a kernel takes it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[non_exhaustive]
pub struct LatentEntry {
    /// Elements of the latent.
    pub dim: u32,
    /// Those that it takes for a key.
    pub key_dim: u32,
    /// Those that it takes for a value.
    pub value_dim: u32,
}

impl Catalog {
    /// All there is.
    ///
    /// ```
    /// let catalog = vattn::geometry::Catalog::new()?;
    /// assert!(catalog.presets.iter().any(|model| model.name == "llama-3-8b" && model.kv_heads == 8));
    /// # Ok::<(), vattn::Error>(())
    /// ```
    ///
    /// # Errors
    /// None but a defect of the tables.
    pub fn new() -> Result<Self> {
        let presets = Geometry::presets().map(|(name, description)| PresetEntry::new(name, description));
        Ok(Self {
            presets: presets.collect::<Result<_>>()?,
            kernels: Kernel::ALL.iter().map(KernelEntry::new).collect(),
        })
    }

    /// As one JSON object.
    #[must_use]
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("plain data with string keys is always JSON")
    }
}

impl PresetEntry {
    fn new(name: &'static str, description: &'static str) -> Result<Self> {
        let model = Geometry::preset(name)?;
        let (kv_heads, key_dim, value_dim) = match model.groups()[0].kind {
            LayerKind::Kv { kv_heads, key_dim, value_dim } => (kv_heads, key_dim, value_dim),
            LayerKind::Latent { dim } => (0, dim, 0),
        };
        Ok(Self {
            name,
            description,
            layers: model.layers(),
            kv_heads,
            key_dim,
            value_dim,
            dtype: model.dtype(),
            bytes_per_token: model.bytes_per_token(),
        })
    }
}

impl KernelEntry {
    fn new(kernel: &Kernel) -> Self {
        let latent = |(dim, key_dim, value_dim)| LatentEntry { dim, key_dim, value_dim };
        Self {
            name: kernel.name,
            summary: kernel.call,
            evidence: kernel.evidence,
            source: kernel.source(),
            exact: kernel.is_exact(),
            tiles: kernel.tiles().collect(),
            latents: kernel.latent().map(latent).into_iter().collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::LayerGroup;

    /// The tile as whoever has nothing but the data would find it.
    fn looked_up(kernel: &KernelEntry, kind: LayerKind, dtype: Dtype) -> Option<u32> {
        let (key, value) = match kind {
            LayerKind::Kv { .. } if kernel.exact => return Some(1),
            LayerKind::Kv { key_dim, value_dim, .. } => (key_dim, value_dim),
            LayerKind::Latent { dim } => {
                let latent = kernel.latents.iter().find(|latent| latent.dim == dim)?;
                (latent.key_dim, latent.value_dim)
            }
        };
        let fits =
            |tile: &&Tile| tile.dtypes.contains(&dtype) && key <= tile.key_dim && value <= tile.value_dim;
        kernel.tiles.iter().find(fits).map(|tile| tile.tokens)
    }

    #[test]
    fn the_data_say_what_the_library_does() {
        let catalog = Catalog::new().unwrap();
        let widths = [40, 64, 96, 128, 192, 256, 320, 512, 576];
        for (entry, kernel) in catalog.kernels.iter().zip(Kernel::ALL) {
            for dtype in Dtype::ALL {
                for key_dim in widths {
                    let latent = LayerKind::Latent { dim: key_dim };
                    assert_eq!(looked_up(entry, latent, dtype), kernel.tile_tokens(&latent, dtype));
                    for value_dim in widths {
                        let kind = LayerKind::Kv { kv_heads: 8, key_dim, value_dim };
                        assert_eq!(looked_up(entry, kind, dtype), kernel.tile_tokens(&kind, dtype));
                    }
                }
            }
        }
    }

    #[test]
    fn a_model_can_be_made_from_its_entry() {
        for entry in Catalog::new().unwrap().presets {
            let PresetEntry { layers, kv_heads, key_dim, value_dim, .. } = entry;
            let kind = match kv_heads {
                0 => LayerKind::Latent { dim: key_dim },
                _ => LayerKind::Kv { kv_heads, key_dim, value_dim },
            };
            let made = Geometry::new(vec![LayerGroup { layers, kind }], entry.dtype).unwrap();
            assert_eq!(made, Geometry::preset(entry.name).unwrap(), "{}", entry.name);
            assert_eq!(made.bytes_per_token(), entry.bytes_per_token);
        }
    }

    #[test]
    fn the_json_has_plain_numbers_and_names() {
        let json: serde_json::Value = serde_json::from_str(&Catalog::new().unwrap().to_json()).unwrap();
        assert_eq!(json["presets"][1]["name"], "llama-3-8b");
        assert_eq!(json["presets"][1]["dtype"], "bfloat16");
        assert_eq!(json["presets"][1]["bytes_per_token"], 131_072);
        assert_eq!(json["kernels"][0]["name"], "fa3-decode");
        assert_eq!(json["kernels"][0]["evidence"], "measured");
        assert_eq!(json["kernels"][0]["tiles"][0]["tokens"], 192);
        assert_eq!(json["kernels"][0]["latents"][0]["dim"], 576);
        assert_eq!(json["kernels"][3]["exact"], true);
    }
}
