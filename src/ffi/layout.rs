//! Where keys and values lie: shapes, strides, sizes.

use super::args::{self, Numbered as _};
use super::cache::vattn_cache;
use super::config::{self, vattn_config};
use super::driver::device;
use super::entry::{enter, on_cache};
use super::geometry::{part, vattn_dtype, vattn_geometry};
use super::handle::GEOMETRIES;
use super::status::vattn_status;
use crate::cache::{KvCache, TensorView};
use crate::error::Result;
use crate::geometry::Config;
use crate::layout::{Layout, Part};
use crate::units::{Bytes, Device, GranuleSize, TokenCount, index};

/// No slot: what `spare_slot` says where there is none.
pub const VATTN_NO_SLOT: u32 = u32::MAX;

/// A layer's keys or values as a strided array of four dimensions, the way kernels and DLPack take it.
///
/// Element `[i, j, h, d]` lies `i * strides[0] + j * strides[1] + h * strides[2] + d` elements behind
/// `data`. It says where tokens are, not that they are backed: touching what no step has asked for is
/// fatal, a segmentation fault on the host and an illegal access on a device.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct vattn_view {
    /// Where element `[0, 0, 0, 0]` is. Never changes while the cache lives.
    pub data: *mut std::ffi::c_void,
    /// Elements along each dimension.
    pub shape: [i64; 4],
    /// From one element to the next along each dimension, in elements. The last is 1.
    pub strides: [i64; 4],
    /// A `vattn_dtype`.
    pub dtype: i32,
    /// Bytes of an element.
    pub element_bytes: u32,
    /// A `vattn_device_type`.
    pub device_type: i32,
    /// The device's number; 0 for the processor.
    pub device_id: i32,
}

/// How a cache's tensors lie, in numbers: the same for its whole life.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct vattn_layout {
    /// `sizeof(vattn_layout)`, set by the caller.
    pub struct_size: usize,
    /// Layers with a view.
    pub layers: u32,
    /// Tensors, each one range of addresses.
    pub tensors: u32,
    /// The first dimension of every tensor: the requests' slots and the spare one.
    pub slots: u32,
    /// The index of the slot that is always backed, or `VATTN_NO_SLOT`.
    pub spare_slot: u32,
    /// Tokens of a page.
    pub page_tokens: u32,
    /// What a step rounds up to.
    pub tile_tokens: u32,
    /// Pages from one slot to the next.
    pub pages_per_slot: u64,
    /// The most tokens that a slot can hold.
    pub max_tokens: u64,
    /// Tokens from one slot to the next, the same in all tensors.
    pub stride_tokens: u64,
    /// Bytes of a granule, the unit of mapping.
    pub granule: u64,
    /// Bytes that one token takes in all tensors, with no rounding.
    pub bytes_per_token: u64,
    /// Bytes of addresses that all tensors reserve together.
    pub virtual_size: u64,
}

/// One tensor: a range of addresses, as whoever registers memory with a network card wants it.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct vattn_tensor {
    /// `sizeof(vattn_tensor)`, set by the caller.
    pub struct_size: usize,
    /// Where it begins. Never changes while the cache lives.
    pub data: *mut std::ffi::c_void,
    /// Bytes of addresses, of all slots together. What no step has asked for has no memory behind it.
    pub size: u64,
    /// Bytes from one slot to the next: a multiple of the granule.
    pub slot_stride: u64,
    /// Bytes that one token takes in it, without padding: what all of its layers keep, one after another.
    pub token_bytes: u64,
    /// The first of the model's layers that lie in it.
    pub first_layer: u32,
    /// How many layers lie in it.
    pub layers: u32,
    /// 1 where it holds keys, or latents.
    pub has_keys: u32,
    /// 1 where it holds values.
    pub has_values: u32,
    /// A `vattn_device_type`.
    pub device_type: i32,
    /// The device's number; 0 for the processor.
    pub device_id: i32,
}

args::sized!(vattn_layout);
args::sized!(vattn_tensor);

fn describe(config: &Config, layout: &Layout) -> vattn_layout {
    vattn_layout {
        struct_size: 0,
        layers: layout.layers(),
        tensors: u32::try_from(layout.tensors().len()).unwrap_or(u32::MAX),
        slots: layout.slots(),
        spare_slot: config.spare_index().unwrap_or(VATTN_NO_SLOT),
        page_tokens: config.page_tokens(),
        tile_tokens: config.tile_tokens(),
        pages_per_slot: layout.pages_per_slot(),
        max_tokens: layout.max_tokens().get(),
        stride_tokens: layout.stride_tokens().get(),
        granule: layout.granule().bytes().get(),
        bytes_per_token: layout.bytes_per_token().get(),
        virtual_size: layout.virtual_size().get(),
    }
}

/// How the tensors of a cache with those options would lie, without making one: for sizing. `granule` is
/// the driver's unit of allocation in bytes: 2 MiB on every NVIDIA GPU so far.
///
/// Fails with `VATTN_INVALID_CONFIG` for options that `vattn_cache_create` would refuse, as far as that
/// needs no driver.
///
/// # Safety
/// - `config` is NULL, or filled by `vattn_config_init`;
/// - `out` is NULL, or points to a `vattn_layout` of which `struct_size` is set.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_layout_plan(
    config: *const vattn_config,
    geometry: *const vattn_geometry,
    granule: u64,
    out: *mut vattn_layout,
) -> vattn_status {
    enter("vattn_layout_plan", || {
        let geometry = GEOMETRIES.get(geometry)?;
        // SAFETY: as the caller promises.
        let (config, out) =
            unsafe { (config::read(config, geometry.clone())?, args::out_sized("out", out)?) };
        let granule = GranuleSize::new(Bytes::new(granule)).ok_or_else(|| {
            args::invalid(format!("granule is {granule}; use a power of two, such as 2097152"))
        })?;
        out.set(describe(&config, &Layout::new(&config, granule, Device::Cpu)?));
        Ok(())
    })
}

/// How a cache's tensors lie.
///
/// # Safety
/// - `out` is NULL, or points to a `vattn_layout` of which `struct_size` is set.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_cache_layout(
    cache: *const vattn_cache,
    out: *mut vattn_layout,
) -> vattn_status {
    on_cache("vattn_cache_layout", cache, |cache| {
        // SAFETY: as the caller promises.
        let out = unsafe { args::out_sized("out", out) }?;
        out.set(describe(cache.config(), cache.layout()));
        Ok(())
    })
}

/// One of the tensors, counted from 0 to `vattn_layout.tensors`.
///
/// # Safety
/// - `out` is NULL, or points to a `vattn_tensor` of which `struct_size` is set.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_cache_tensor(
    cache: *const vattn_cache,
    tensor: u32,
    out: *mut vattn_tensor,
) -> vattn_status {
    on_cache("vattn_cache_tensor", cache, |cache| {
        // SAFETY: as the caller promises.
        let out = unsafe { args::out_sized("out", out) }?;
        out.set(self::tensor(cache, tensor)?);
        Ok(())
    })
}

fn tensor(cache: &KvCache, number: u32) -> Result<vattn_tensor> {
    let layout = cache.layout();
    let Some(tensor) = layout.tensors().get(index(number)) else {
        return Err(args::invalid(format!(
            "tensor is {number}, and there are {}, numbered from 0",
            layout.tensors().len()
        )));
    };
    let (layers, parts) = (tensor.layers(), tensor.parts());
    // Some layer's keys or values lie in it, and where in it is known.
    let piece = layers.clone().flat_map(|layer| parts.iter().map(move |part| (layer, *part)));
    let piece = piece.filter_map(|(layer, part)| Some((layer, part, layout.view(layer, part)?))).next();
    let (layer, part, place) = piece.expect("a tensor that would hold nothing is not made");
    let view = cache.view(layer, part)?;
    let (device_type, device_id) = device(view.device);
    Ok(vattn_tensor {
        struct_size: 0,
        data: pointer(view.addr.get() - place.offset.get()),
        size: tensor.size().get(),
        slot_stride: tensor.slot_stride().get(),
        token_bytes: tensor.row().get(),
        first_layer: layers.start,
        layers: layers.end - layers.start,
        has_keys: parts.contains(&Part::Key).into(),
        has_values: parts.contains(&Part::Value).into(),
        device_type,
        device_id,
    })
}

pub(super) fn pointer(addr: u64) -> *mut std::ffi::c_void {
    std::ptr::with_exposed_provenance_mut(usize::from_le_bytes(addr.to_le_bytes()))
}

/// Bytes that a slot of so many tokens takes at the least, in whole granules over all tensors, tiles
/// included: for schedulers.
///
/// # Safety
/// - `out` is NULL, or a `uint64_t` can be written there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_cache_bytes_for(
    cache: *const vattn_cache,
    tokens: u64,
    out: *mut u64,
) -> vattn_status {
    on_cache("vattn_cache_bytes_for", cache, |cache| {
        // SAFETY: as the caller promises.
        let out = unsafe { args::out("out", out) }?;
        let layout = cache.layout();
        if tokens > layout.max_tokens().get() {
            return Err(args::invalid(format!(
                "tokens is {tokens}, and a slot holds {}; ask for no more",
                layout.max_tokens()
            ))
            .into());
        }
        let backed = layout.round_to_tile(TokenCount::new(tokens));
        out.set(layout.granule().to_bytes(layout.granules_for(backed)).get());
        Ok(())
    })
}

/// A layer's keys or values by slot: `[slot, token, head, dim]`. `part` is a `vattn_part`. Use
/// `slot.index` as the batch index. A latent layer has keys alone, of one head.
///
/// # Safety
/// - `out` is NULL, or a `vattn_view` can be written there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_cache_view(
    cache: *const vattn_cache,
    layer: u32,
    part: i32,
    out: *mut vattn_view,
) -> vattn_status {
    on_cache("vattn_cache_view", cache, |cache| {
        // SAFETY: as the caller promises.
        unsafe { view(cache, KvCache::view, layer, part, out) }
    })
}

/// The same memory by page: `[page, token of the page, head, dim]`. Page p of slot s is
/// `s * pages_per_slot + p`, in every layer alike, so a paged kernel reads a slot through a table that
/// counts upward.
///
/// # Safety
/// - `out` is NULL, or a `vattn_view` can be written there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_cache_paged_view(
    cache: *const vattn_cache,
    layer: u32,
    part: i32,
    out: *mut vattn_view,
) -> vattn_status {
    on_cache("vattn_cache_paged_view", cache, |cache| {
        // SAFETY: as the caller promises.
        unsafe { view(cache, KvCache::paged_view, layer, part, out) }
    })
}

/// The same memory as one long row of tokens: `[1, token, head, dim]`. Token t of slot s is
/// `s * stride_tokens + t`, in every layer alike: for kernels with variable lengths.
///
/// # Safety
/// - `out` is NULL, or a `vattn_view` can be written there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_cache_token_view(
    cache: *const vattn_cache,
    layer: u32,
    part: i32,
    out: *mut vattn_view,
) -> vattn_status {
    on_cache("vattn_cache_token_view", cache, |cache| {
        // SAFETY: as the caller promises.
        unsafe { view(cache, KvCache::token_view, layer, part, out) }
    })
}

/// # Safety
/// - `out` is NULL, or a `vattn_view` can be written there.
unsafe fn view(
    cache: &KvCache,
    seen: impl FnOnce(&KvCache, u32, Part) -> Result<TensorView>,
    layer: u32,
    part: i32,
    out: *mut vattn_view,
) -> Result<(), super::entry::Failure> {
    // SAFETY: as the caller promises.
    let out = unsafe { args::out("out", out) }?;
    let view = seen(cache, layer, self::part(part)?)?;
    let (device_type, device_id) = device(view.device);
    // Addresses, and so counts of elements, have fewer than 63 bits.
    let signed = |numbers: [u64; 4]| numbers.map(|number| i64::try_from(number).unwrap_or(i64::MAX));
    out.set(vattn_view {
        data: pointer(view.addr.get()),
        shape: signed(view.shape),
        strides: signed(view.strides),
        dtype: vattn_dtype::from(view.dtype).number(),
        element_bytes: u32::try_from(view.dtype.bytes().get()).unwrap_or(u32::MAX),
        device_type,
        device_id,
    });
    Ok(())
}
