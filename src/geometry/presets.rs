//! Which shapes are known by name.
//!
//! The dimensions are those of the `config.json` that each model's makers publish with its weights
//! on Hugging Face; the first three are the models that the vAttention paper (arXiv 2405.04437)
//! measures. Its 200K variants of Yi have the same shape.

use super::{Dtype, Geometry, invalid};
use crate::error::Result;

enum Shape {
    Uniform { layers: u32, kv_heads: u32, head_dim: u32 },
    Mla { layers: u32, latent_dim: u32 },
}

struct Preset {
    name: &'static str,
    description: &'static str,
    shape: Shape,
}

const fn uniform(
    name: &'static str,
    description: &'static str,
    layers: u32,
    kv_heads: u32,
    head_dim: u32,
) -> Preset {
    Preset { name, description, shape: Shape::Uniform { layers, kv_heads, head_dim } }
}

const fn mla(name: &'static str, description: &'static str, layers: u32, latent_dim: u32) -> Preset {
    Preset { name, description, shape: Shape::Mla { layers, latent_dim } }
}

/// All in bfloat16.
const PRESETS: [Preset; 20] = [
    uniform("yi-6b", "01.AI Yi 6B, also 200K: 32 layers, 4 KV heads of 128", 32, 4, 128),
    uniform("llama-3-8b", "Meta Llama 3 and 3.1 8B: 32 layers, 8 KV heads of 128", 32, 8, 128),
    uniform("yi-34b", "01.AI Yi 34B, also 200K: 60 layers, 8 KV heads of 128", 60, 8, 128),
    uniform("llama-3.2-1b", "Meta Llama 3.2 1B: 16 layers, 8 KV heads of 64", 16, 8, 64),
    uniform("llama-3.2-3b", "Meta Llama 3.2 3B: 28 layers, 8 KV heads of 128", 28, 8, 128),
    uniform("llama-3-70b", "Meta Llama 3, 3.1 and 3.3 70B: 80 layers, 8 KV heads of 128", 80, 8, 128),
    uniform("llama-3.1-405b", "Meta Llama 3.1 405B: 126 layers, 8 KV heads of 128", 126, 8, 128),
    uniform("mistral-7b", "Mistral 7B: 32 layers, 8 KV heads of 128", 32, 8, 128),
    uniform("mixtral-8x7b", "Mistral Mixtral 8x7B: 32 layers, 8 KV heads of 128", 32, 8, 128),
    uniform("qwen2.5-7b", "Qwen 2.5 7B: 28 layers, 4 KV heads of 128", 28, 4, 128),
    uniform("qwen2.5-72b", "Qwen 2.5 72B: 80 layers, 8 KV heads of 128", 80, 8, 128),
    uniform("qwen3-8b", "Qwen 3 8B: 36 layers, 8 KV heads of 128", 36, 8, 128),
    uniform("qwen3-32b", "Qwen 3 32B: 64 layers, 8 KV heads of 128", 64, 8, 128),
    uniform("qwen3-30b-a3b", "Qwen 3 30B-A3B: 48 layers, 4 KV heads of 128", 48, 4, 128),
    uniform("qwen3-235b-a22b", "Qwen 3 235B-A22B: 94 layers, 4 KV heads of 128", 94, 4, 128),
    uniform("gemma-3-27b", "Google Gemma 3 27B: 62 layers, 16 KV heads of 128", 62, 16, 128),
    uniform("gpt-oss-20b", "OpenAI gpt-oss 20B: 24 layers, 8 KV heads of 64", 24, 8, 64),
    uniform("gpt-oss-120b", "OpenAI gpt-oss 120B: 36 layers, 8 KV heads of 64", 36, 8, 64),
    mla("deepseek-v2-lite", "DeepSeek V2 Lite: 27 layers, a latent of 512 + 64", 27, 576),
    mla("deepseek-v3", "DeepSeek V3 and R1: 61 layers, a latent of 512 + 64", 61, 576),
];

impl Geometry {
    /// A known model, whole (one rank), in bfloat16. Names are lower-case, such as `llama-3-8b`;
    /// [`presets`](Self::presets) lists them.
    ///
    /// The dimensions come from the `config.json` that the model's makers publish.
    ///
    /// # Errors
    /// [`InvalidGeometry`](crate::ErrorKind::InvalidGeometry) for a name that is not known, with
    /// those that are.
    pub fn preset(name: &str) -> Result<Self> {
        let preset = PRESETS.iter().find(|preset| preset.name.eq_ignore_ascii_case(name));
        match preset.map(|preset| &preset.shape) {
            Some(&Shape::Uniform { layers, kv_heads, head_dim }) => {
                Self::uniform(layers, kv_heads, head_dim, Dtype::BF16)
            }
            Some(&Shape::Mla { layers, latent_dim }) => Self::mla(layers, latent_dim, Dtype::BF16),
            None => {
                let known: Vec<_> = Self::presets().map(|(name, _)| name).collect();
                Err(invalid(format!(
                    "no model is known as \"{name}\": give its config.json, or use one of {}",
                    known.join(", ")
                )))
            }
        }
    }

    /// The models that [`preset`](Self::preset) knows: name and description.
    pub fn presets() -> impl ExactSizeIterator<Item = (&'static str, &'static str)> {
        PRESETS.iter().map(|preset| (preset.name, preset.description))
    }
}
