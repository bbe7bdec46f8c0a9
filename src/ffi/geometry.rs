//! A model's geometry.

use std::ffi::c_char;

use super::args::{self, Numbered as _};
use super::entry::enter;
use super::handle::GEOMETRIES;
use super::status::vattn_status;
use crate::error::Result;
use crate::geometry::{Dtype, Geometry, Kernel, LayerGroup, LayerKind, Part};

/// What a model (one rank's part of it) keeps for each token: its layers in model order. Never changes.
#[derive(Debug)]
pub struct vattn_geometry {
    _opaque: [u8; 0],
}

/// The type of a cache's elements.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(i32)]
pub enum vattn_dtype {
    /// As the model says; bfloat16 where nothing says otherwise. Never found in an output.
    VATTN_DTYPE_MODEL = 0,
    /// IEEE single precision, 4 bytes.
    VATTN_DTYPE_F32 = 1,
    /// IEEE half precision, 2 bytes.
    VATTN_DTYPE_F16 = 2,
    /// bfloat16, 2 bytes.
    VATTN_DTYPE_BF16 = 3,
    /// 8-bit float, 4 bits of exponent and 3 of mantissa, without infinities (PyTorch's float8_e4m3fn).
    VATTN_DTYPE_F8_E4M3 = 4,
    /// 8-bit float, 5 bits of exponent and 2 of mantissa (PyTorch's float8_e5m2).
    VATTN_DTYPE_F8_E5M2 = 5,
    /// Signed byte.
    VATTN_DTYPE_I8 = 6,
    /// Unsigned byte.
    VATTN_DTYPE_U8 = 7,
}

args::numbered!(vattn_dtype);

use vattn_dtype::*;

const DTYPES: [(vattn_dtype, Dtype); 7] = [
    (VATTN_DTYPE_F32, Dtype::F32),
    (VATTN_DTYPE_F16, Dtype::F16),
    (VATTN_DTYPE_BF16, Dtype::BF16),
    (VATTN_DTYPE_F8_E4M3, Dtype::F8E4M3),
    (VATTN_DTYPE_F8_E5M2, Dtype::F8E5M2),
    (VATTN_DTYPE_I8, Dtype::I8),
    (VATTN_DTYPE_U8, Dtype::U8),
];

/// The type that a number stands for; `None` for the model's own.
fn dtype(value: i32) -> Result<Option<Dtype>> {
    let model = (VATTN_DTYPE_MODEL, None);
    let known = DTYPES.map(|(number, dtype)| (number, Some(dtype)));
    let choices: Vec<_> = std::iter::once(model).chain(known).collect();
    args::choice("dtype", value, &choices)
}

/// The type of an array's elements that a number stands for.
pub(super) fn element(name: &str, value: i32) -> Result<Dtype> {
    args::choice(name, value, &DTYPES)
}

impl From<Dtype> for vattn_dtype {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => VATTN_DTYPE_F32,
            Dtype::F16 => VATTN_DTYPE_F16,
            Dtype::BF16 => VATTN_DTYPE_BF16,
            Dtype::F8E4M3 => VATTN_DTYPE_F8_E4M3,
            Dtype::F8E5M2 => VATTN_DTYPE_F8_E5M2,
            Dtype::I8 => VATTN_DTYPE_I8,
            Dtype::U8 => VATTN_DTYPE_U8,
        }
    }
}

/// Successive layers that keep the same. Layers that keep nothing for a token are left out.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct vattn_layers {
    /// How many layers, from 1.
    pub layers: u32,
    /// KV heads of this rank (not query heads). 0 for layers that keep one latent vector of `key_dim`
    /// elements from which keys and values are computed (MLA), its rotary part included.
    pub kv_heads: u32,
    /// Elements of a key, or of the latent.
    pub key_dim: u32,
    /// Elements of a value; 0 for a latent.
    pub value_dim: u32,
}

impl From<vattn_layers> for LayerGroup {
    fn from(group: vattn_layers) -> Self {
        let vattn_layers { layers, kv_heads, key_dim, value_dim } = group;
        let kind = match (kv_heads, value_dim) {
            (0, 0) => LayerKind::Latent { dim: key_dim },
            _ => LayerKind::Kv { kv_heads, key_dim, value_dim },
        };
        Self { layers, kind }
    }
}

/// A geometry in numbers.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct vattn_geometry_info {
    /// `sizeof(vattn_geometry_info)`, set by the caller.
    pub struct_size: usize,
    /// How many layers keep something.
    pub layers: u32,
    /// A `vattn_dtype`, the same in all layers.
    pub dtype: i32,
    /// Bytes that one token takes in all layers, with no rounding: the packed floor.
    pub bytes_per_token: u64,
}

args::sized!(vattn_geometry_info);

/// One rank's part of a model, with elements of that type.
fn rank_of(geometry: Geometry, tensor_parallel: u32, dtype: Option<Dtype>) -> Result<Geometry> {
    let rank =
        if tensor_parallel == 1 { geometry } else { geometry.with_tensor_parallel(tensor_parallel)? };
    match dtype {
        Some(dtype) => rank.with_dtype(dtype),
        None => Ok(rank),
    }
}

/// A model of those layers, in model order, split over `tensor_parallel` ranks.
///
/// KV heads are divided between the ranks. Where there are fewer heads than ranks each rank keeps one,
/// and a latent is kept whole by every rank. 1 for a model in one piece, or for numbers that are a
/// rank's already. `dtype` is a `vattn_dtype`.
///
/// Fails with `VATTN_INVALID_GEOMETRY` for no layers, more than 65,536, a dimension of zero, a token of
/// 2^64 bytes, or heads that can't be split so.
///
/// # Safety
/// - `groups` is NULL, or `count` of them can be read there;
/// - `out` is NULL, or a pointer can be written there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_geometry_create(
    groups: *const vattn_layers,
    count: usize,
    tensor_parallel: u32,
    dtype: i32,
    out: *mut *mut vattn_geometry,
) -> vattn_status {
    enter("vattn_geometry_create", || {
        // SAFETY: as the caller promises.
        let (groups, out) = unsafe { (args::slice("groups", groups, count)?, args::out("out", out)?) };
        let dtype = self::dtype(dtype)?;
        let groups = groups.iter().copied().map(LayerGroup::from).collect();
        let geometry = Geometry::new(groups, dtype.unwrap_or_default())?;
        out.set(GEOMETRIES.keep(rank_of(geometry, tensor_parallel, None)?)?);
        Ok(())
    })
}

/// A model by name, such as `llama-3-8b`; a name that is not known fails with a text that lists those
/// that are. Otherwise as `vattn_geometry_create`.
///
/// # Safety
/// - `name` is NULL, or ends with a NUL;
/// - `out` is NULL, or a pointer can be written there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_geometry_create_preset(
    name: *const c_char,
    tensor_parallel: u32,
    dtype: i32,
    out: *mut *mut vattn_geometry,
) -> vattn_status {
    enter("vattn_geometry_create_preset", || {
        // SAFETY: as the caller promises.
        let (name, out) = unsafe { (args::text("name", name)?, args::out("out", out)?) };
        let dtype = self::dtype(dtype)?;
        out.set(GEOMETRIES.keep(rank_of(Geometry::preset(name)?, tensor_parallel, dtype)?)?);
        Ok(())
    })
}

/// The model that a Hugging Face `config.json` describes; `json` is the file's text.
///
/// Knows Llama, Qwen, Mistral, Yi, Gemma, DeepSeek V2 and V3, and whatever describes itself in the same
/// fields, at the top or in `text_config`. What would make layers keep something else than the common
/// fields say fails with `VATTN_INVALID_GEOMETRY` and a text that names the field: it is never guessed.
/// Otherwise as `vattn_geometry_create`.
///
/// # Safety
/// - `json` is NULL, or ends with a NUL;
/// - `out` is NULL, or a pointer can be written there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_geometry_create_from_hf_config(
    json: *const c_char,
    tensor_parallel: u32,
    dtype: i32,
    out: *mut *mut vattn_geometry,
) -> vattn_status {
    enter("vattn_geometry_create_from_hf_config", || {
        // SAFETY: as the caller promises.
        let (json, out) = unsafe { (args::text("json", json)?, args::out("out", out)?) };
        let dtype = self::dtype(dtype)?;
        let geometry = rank_of(Geometry::from_hf_config(json, tensor_parallel)?, 1, dtype)?;
        out.set(GEOMETRIES.keep(geometry)?);
        Ok(())
    })
}

/// Gives a geometry up. Caches that were made from it keep what they need. NULL is no error.
///
/// # Safety
/// - any handle may be passed; one that is not alive is refused.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_geometry_destroy(geometry: *mut vattn_geometry) -> vattn_status {
    enter("vattn_geometry_destroy", || GEOMETRIES.destroy(geometry))
}

/// A geometry in numbers.
///
/// # Safety
/// - `out` is NULL, or points to a `vattn_geometry_info` of which `struct_size` is set.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_geometry_describe(
    geometry: *const vattn_geometry,
    out: *mut vattn_geometry_info,
) -> vattn_status {
    enter("vattn_geometry_describe", || {
        let geometry = GEOMETRIES.get(geometry)?;
        // SAFETY: as the caller promises.
        let out = unsafe { args::out_sized("out", out) }?;
        out.set(vattn_geometry_info {
            struct_size: 0,
            layers: geometry.layers(),
            dtype: vattn_dtype::from(geometry.dtype()).number(),
            bytes_per_token: geometry.bytes_per_token().get(),
        });
        Ok(())
    })
}

/// What one layer keeps, `layers` set to 1.
///
/// # Safety
/// - `out` is NULL, or a `vattn_layers` can be written there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_geometry_layer(
    geometry: *const vattn_geometry,
    layer: u32,
    out: *mut vattn_layers,
) -> vattn_status {
    enter("vattn_geometry_layer", || {
        let geometry = GEOMETRIES.get(geometry)?;
        // SAFETY: as the caller promises.
        let out = unsafe { args::out("out", out) }?;
        let kind = geometry.layer_kind(layer).ok_or_else(|| {
            args::invalid(format!(
                "layer is {layer}, and the model has {}, numbered from 0",
                geometry.layers()
            ))
        })?;
        out.set(match *kind {
            LayerKind::Kv { kv_heads, key_dim, value_dim } => {
                vattn_layers { layers: 1, kv_heads, key_dim, value_dim }
            }
            LayerKind::Latent { dim } => vattn_layers { layers: 1, kv_heads: 0, key_dim: dim, value_dim: 0 },
        });
        Ok(())
    })
}

/// The `tile_tokens` that a cache of this model needs for a kernel by name, in all of its layers: see
/// "Which kernel needs which tile" above. For several kernels take the least common multiple. A name that
/// is not known fails with a text that lists those that are, and so does one of which it is not known how
/// far it reads for this model, both with `VATTN_INVALID_CONFIG`.
///
/// # Safety
/// - `kernel` is NULL, or ends with a NUL;
/// - `out` is NULL, or a `uint32_t` can be written there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_geometry_tile_tokens(
    geometry: *const vattn_geometry,
    kernel: *const c_char,
    out: *mut u32,
) -> vattn_status {
    enter("vattn_geometry_tile_tokens", || {
        let geometry = GEOMETRIES.get(geometry)?;
        // SAFETY: as the caller promises.
        let (kernel, out) = unsafe { (args::text("kernel", kernel)?, args::out("out", out)?) };
        out.set(geometry.tile_tokens(&[Kernel::named(kernel)?])?);
        Ok(())
    })
}

/// Keys or values.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(i32)]
pub enum vattn_part {
    /// The keys, or the latent of a layer that keeps only that.
    VATTN_KEY = 0,
    /// The values. A latent layer has none.
    VATTN_VALUE = 1,
}

args::numbered!(vattn_part);

pub(super) fn part(value: i32) -> Result<Part> {
    args::choice("part", value, &[(vattn_part::VATTN_KEY, Part::Key), (vattn_part::VATTN_VALUE, Part::Value)])
}
