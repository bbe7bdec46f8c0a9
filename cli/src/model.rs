//! From a model and a layout to the tensors that policies manage.

use vattn::units::{Bytes, TokenCount};
use vattn::{Error, ErrorKind, Result};
use vattn_baselines::{Shape, TensorShape};

/// What was asked for.
#[derive(Clone, Debug)]
pub(crate) struct Wanted<'a> {
    /// A preset's name or the path of a `config.json`.
    pub(crate) model: &'a str,
    pub(crate) tensor_parallel: u32,
    pub(crate) layout: &'a str,
    pub(crate) max_slots: u32,
    pub(crate) max_tokens: TokenCount,
    pub(crate) tile_tokens: u32,
    pub(crate) budget: Bytes,
    pub(crate) granule: Bytes,
}

/// The model's cache.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// The model's name in reports.
    pub(crate) model: String,
    /// The layout's name in reports.
    pub(crate) layout: String,
    /// What the baselines manage.
    pub(crate) shape: Shape,
}

/// Plans the tensors.
pub(crate) fn plan(wanted: &Wanted<'_>) -> Result<Plan> {
    let invalid = |message: String| Error::new(ErrorKind::InvalidGeometry, message);
    if wanted.model != "llama-3-8b" {
        return Err(invalid(format!("there is no preset '{}'; use llama-3-8b", wanted.model)));
    }
    let heads = 8 / u64::from(wanted.tensor_parallel.clamp(1, 8));
    let piece = Bytes::new(heads * 128 * 2);
    let (tensors, row) = match wanted.layout {
        "sliced" => (2, piece * 32),
        "sliced-interleaved" => (1, piece * 64),
        "per-layer" => (64, piece),
        other => return Err(invalid(format!("there is no layout '{other}'; use sliced or per-layer"))),
    };
    let stride = row
        .checked_mul(wanted.max_tokens.get())
        .and_then(|size| size.checked_next_multiple_of(wanted.granule));
    let Some(stride) = stride else {
        return Err(invalid(format!(
            "{} tokens of {row} are more than 2^64 bytes; use fewer",
            wanted.max_tokens
        )));
    };
    let shape = Shape::new(
        vec![TensorShape { row, stride }; tensors],
        wanted.max_slots,
        wanted.max_tokens,
        TokenCount::new(wanted.tile_tokens.into()),
        wanted.budget,
    )?;
    Ok(Plan { model: wanted.model.into(), layout: wanted.layout.into(), shape })
}
