//! Which shape a Hugging Face `config.json` describes.
//!
//! Reads the fields that decide what a layer keeps for a token and passes over the rest. A model of
//! several modes has them one level down, in `text_config`. A file that leaves a field out means
//! the default of its model's configuration class in `transformers`; the classes whose published
//! files do so are in [`ClassDefaults`]. Whatever would make layers keep something else than the
//! common fields say is an error, never a guess.

use serde_json::{Map, Value};

use super::{Dtype, Geometry, LayerGroup, LayerKind, invalid};
use crate::error::{Error, Result};

/// Kinds of layers that keep keys and values of every token. Sliding and chunked layers read only
/// the latest of them; they are kept all the same, as a tensor has one length for all its layers.
const KEEPING: [&str; 4] = ["full_attention", "sliding_attention", "chunked_attention", "attention"];

/// Fields that change what layers keep in ways that the common fields don't tell.
const RESHAPING: [(&str, &str); 14] = [
    ("layers_block_type", "it mixes attention with layers that keep no KV cache"),
    ("hybrid_override_pattern", "it mixes attention with layers that keep no KV cache"),
    ("attn_layer_period", "it mixes attention with layers that keep no KV cache"),
    ("attn_layer_indices", "it mixes attention with layers that keep no KV cache"),
    ("attn_type_list", "it mixes attention with layers that keep no KV cache"),
    ("full_attention_interval", "it mixes attention with layers that keep no KV cache"),
    ("linear_attn_config", "it mixes attention with layers that keep no KV cache"),
    ("num_kv_shared_layers", "some layers use the KV cache of others"),
    ("use_cla", "some layers use the KV cache of others"),
    ("cross_attention_layers", "some layers keep keys and values of images, not of tokens"),
    ("is_encoder_decoder", "an encoder and a decoder keep caches of different lengths"),
    ("block_configs", "each layer has a shape of its own"),
    ("global_head_dim", "layers of full and of sliding attention have different shapes"),
    ("swa_num_key_value_heads", "layers of full and of sliding attention have different shapes"),
];

impl Geometry {
    /// One rank's part of the model that a Hugging Face `config.json` describes. `json` is the
    /// file's text, `tensor_parallel` the number of ranks: see
    /// [`with_tensor_parallel`](Self::with_tensor_parallel).
    ///
    /// Knows Llama, Qwen, Mistral, Yi, Gemma, DeepSeek V2 and V3, and whatever describes itself in
    /// the same fields, at the top or in `text_config`: `num_hidden_layers`; `num_attention_heads`
    /// and `num_key_value_heads` (absent: as many; `multi_query`: one); `head_dim` (absent:
    /// `hidden_size` / `num_attention_heads`) and `v_head_dim` (absent: as wide); or, for a latent,
    /// `kv_lora_rank` + `qk_rope_head_dim`; `dtype` or `torch_dtype` (absent: bfloat16). Sliding
    /// layers are kept at full length. What a model keeps beside keys, values and latents (the keys
    /// of a sparse-attention indexer, the state of a prediction head) is not counted.
    ///
    /// # Errors
    /// [`InvalidGeometry`](crate::ErrorKind::InvalidGeometry): text that is not JSON, a missing or
    /// malformed field (which, and where it was looked for), layers that keep no KV cache or share
    /// it, dimensions that [`new`](Self::new) refuses, or heads that can't be split over the ranks.
    pub fn from_hf_config(json: &str, tensor_parallel: u32) -> Result<Self> {
        let value: Value = serde_json::from_str(json)
            .map_err(|error| invalid(format!("the model configuration is not JSON: {error}")))?;
        let Value::Object(top) = &value else {
            return Err(invalid("the model configuration is not a JSON object: give a model's config.json"));
        };
        let text = match top.get("text_config") {
            None | Some(Value::Null) => None,
            Some(Value::Object(text)) => Some(text),
            Some(_) => return Err(invalid("text_config in the model configuration is not a JSON object")),
        };
        let fields = Fields { top, text };
        let layers = fields.required("num_hidden_layers")?;
        fields.refuse_other_layers(layers)?;
        let kind = fields.layer_kind()?;
        Self::new(vec![LayerGroup { layers, kind }], fields.dtype()?)?.with_tensor_parallel(tensor_parallel)
    }
}

/// What a model's configuration class in `transformers` takes for a field that the file leaves out.
#[derive(Default)]
struct ClassDefaults {
    heads: Option<u32>,
    kv_heads: Option<u32>,
    head_dim: Option<u32>,
}

impl ClassDefaults {
    fn of(model_type: Option<&str>) -> Self {
        match model_type {
            // Gemma 3 4B states none of the three, 12B no head_dim, which is not hidden_size / heads.
            Some("gemma3" | "gemma3_text") => Self { heads: Some(8), kv_heads: Some(4), head_dim: Some(256) },
            Some("gemma" | "gemma2") => Self { head_dim: Some(256), ..Self::default() },
            Some("qwen3") => Self { head_dim: Some(128), ..Self::default() },
            _ => Self::default(),
        }
    }
}

/// A configuration's fields: those of the text model first, then those at the top.
struct Fields<'json> {
    top: &'json Map<String, Value>,
    text: Option<&'json Map<String, Value>>,
}

impl<'json> Fields<'json> {
    /// A field and where it was found. A null counts as absent.
    fn get(&self, name: &str) -> Option<(&'json Value, &'static str)> {
        let text = self.text.and_then(|text| text.get(name)).map(|value| (value, "text_config."));
        let top = || self.top.get(name).map(|value| (value, ""));
        text.filter(|(value, _)| !value.is_null()).or_else(top).filter(|(value, _)| !value.is_null())
    }

    fn number(&self, name: &str) -> Result<Option<u32>> {
        let Some((value, place)) = self.get(name) else { return Ok(None) };
        let number =
            value.as_u64().and_then(|number| u32::try_from(number).ok()).filter(|&number| number > 0);
        number.map(Some).ok_or_else(|| {
            invalid(format!(
                "{place}{name} in the model configuration is {value}; a whole number from 1 to {} is expected",
                u32::MAX
            ))
        })
    }

    fn required(&self, name: &str) -> Result<u32> {
        self.number(name)?.ok_or_else(|| self.missing(name))
    }

    #[cold]
    fn missing(&self, name: &str) -> Error {
        let place = if self.text.is_some() { ": it is neither in text_config nor at the top" } else { "" };
        invalid(format!(
            "the model configuration lacks {name}{place}; add the field, or describe the model by its dimensions"
        ))
    }

    fn string(&self, name: &str) -> Result<Option<&'json str>> {
        let Some((value, place)) = self.get(name) else { return Ok(None) };
        let text = value.as_str();
        text.map(Some).ok_or_else(|| {
            invalid(format!("{place}{name} in the model configuration is {value}; a string is expected"))
        })
    }

    fn is_true(&self, name: &str) -> bool {
        matches!(self.get(name), Some((Value::Bool(true), _)))
    }

    fn dtype(&self) -> Result<Dtype> {
        let (name, value) = match self.string("dtype")? {
            Some(dtype) => ("dtype", Some(dtype)),
            None => ("torch_dtype", self.string("torch_dtype")?),
        };
        value.map_or(Ok(Dtype::default()), |value| {
            value.parse().map_err(|error: Error| error.context(format!("{name} in the model configuration")))
        })
    }

    fn layer_kind(&self) -> Result<LayerKind> {
        if let Some(rank) = self.number("kv_lora_rank")? {
            let rotary = self.required("qk_rope_head_dim")?;
            let dim = rank.checked_add(rotary).ok_or_else(|| {
                invalid(format!(
                    "kv_lora_rank {rank} + qk_rope_head_dim {rotary} in the model configuration exceed {}",
                    u32::MAX
                ))
            })?;
            return Ok(LayerKind::Latent { dim });
        }
        let defaults = ClassDefaults::of(self.string("model_type")?);
        let heads = self.number("num_attention_heads")?.or(defaults.heads);
        // Falcon 7B states as many KV heads as heads and multi_query, and means the latter.
        let kv_heads = if self.is_true("multi_query") && !self.is_true("new_decoder_architecture") {
            1
        } else {
            let stated = match self.number("num_key_value_heads")? {
                None => self.number("num_kv_heads")?,
                stated => stated,
            };
            stated.or(defaults.kv_heads).or(heads).ok_or_else(|| self.missing("num_attention_heads"))?
        };
        let key_dim = match self.number("head_dim")?.or(defaults.head_dim) {
            Some(head_dim) => head_dim,
            None => {
                let heads = heads.ok_or_else(|| self.missing("num_attention_heads"))?;
                let hidden =
                    self.number("hidden_size")?.ok_or_else(|| self.missing("head_dim or hidden_size"))?;
                if !hidden.is_multiple_of(heads) {
                    return Err(invalid(format!(
                        "hidden_size {hidden} in the model configuration is not a multiple of \
                         num_attention_heads {heads}: add head_dim"
                    )));
                }
                hidden / heads
            }
        };
        let value_dim = self.number("v_head_dim")?.unwrap_or(key_dim);
        Ok(LayerKind::Kv { kv_heads, key_dim, value_dim })
    }

    /// Refuses a model of which some layers keep something else than the common fields say.
    fn refuse_other_layers(&self, layers: u32) -> Result<()> {
        const CURE: &str = "describe the layers that keep one by their dimensions";
        let kinds = match self.get("layer_types") {
            Some((Value::Array(kinds), _)) => kinds.as_slice(),
            _ => &[],
        };
        let other = kinds
            .iter()
            .take(crate::units::index(layers))
            .enumerate()
            .find(|(_, kind)| !kind.as_str().is_some_and(|kind| KEEPING.contains(&kind)));
        if let Some((layer, kind)) = other {
            return Err(invalid(format!(
                "layer_types in the model configuration makes layer {layer} {kind}, which keeps no KV cache of \
                 tokens: {CURE}"
            )));
        }
        for (name, why) in RESHAPING {
            let Some((value, place)) = self.get(name) else { continue };
            let unused = match value {
                Value::Bool(used) => !used,
                Value::Number(number) => number.as_u64() == Some(0),
                Value::Array(items) => items.is_empty(),
                _ => false,
            };
            if !unused {
                return Err(invalid(format!("{place}{name} in the model configuration: {why}; {CURE}")));
            }
        }
        Ok(())
    }
}
