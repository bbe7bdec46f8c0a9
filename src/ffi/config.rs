//! The options of a cache.

use super::args::{self, Numbered as _};
use super::entry::{Failure, enter};
use super::status::vattn_status;
use crate::error::Result;
use crate::geometry::{Background, Commit, Config, Geometry, KvOrder, LayoutChoice, LayoutKind, Reclaim};
use crate::units::{Bytes, SizeClass, TokenCount};

/// An amount that the library chooses, where a field says that it can.
pub const VATTN_AUTO: u64 = u64::MAX;

/// How many layers share a tensor. The more they are, the fewer mappings and the less waste a token costs,
/// and the further apart the tokens of one layer lie.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(i32)]
pub enum vattn_layout_kind {
    /// All layers in one tensor.
    VATTN_LAYOUT_SLICED = 0,
    /// Each layer has tensors of its own: the shape that kernels are written for.
    VATTN_LAYOUT_PER_LAYER = 1,
    /// `layers_per_tensor` successive layers share one; the last may have fewer.
    VATTN_LAYOUT_GROUPED = 2,
}

/// Whether keys and values share a tensor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(i32)]
pub enum vattn_kv_order {
    /// Keys in one tensor, values in another.
    VATTN_KV_APART = 0,
    /// A token's values of a layer follow its keys of that layer.
    VATTN_KV_INTERLEAVED = 1,
}

/// When physical memory is allocated.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(i32)]
pub enum vattn_commit {
    /// When a step needs it.
    VATTN_COMMIT_ON_DEMAND = 0,
    /// All of the budget when the cache is made, in a mix of sizes that suits the layout.
    VATTN_COMMIT_WHOLE = 1,
    /// What `extents` says when the cache is made, the rest when a step needs it.
    VATTN_COMMIT_EXTENTS = 2,
}

/// Who does the work that need not be done on the path of a request: mapping ahead of growth, keeping
/// extents at hand, unmapping what was given up.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(i32)]
pub enum vattn_background {
    /// A thread of the cache's own, the mapper: asleep while there is nothing to do, joined when the cache
    /// is destroyed.
    VATTN_BACKGROUND_THREAD = 0,
    /// Whoever calls `vattn_cache_tend`, once an iteration.
    VATTN_BACKGROUND_CALLER = 1,
    /// Nobody: every call does all of its work before it returns, and waits for the fences of what it
    /// unmaps.
    VATTN_BACKGROUND_OFF = 2,
}

/// When the memory that a request gave up is unmapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(i32)]
pub enum vattn_reclaim {
    /// When somebody else needs it: until then a new request may take it over without a call of the driver.
    VATTN_RECLAIM_DEFERRED = 0,
    /// As soon as its fences have fired.
    VATTN_RECLAIM_EAGER = 1,
}

/// So many extents of one size.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct vattn_extents {
    /// Granules of each: 1, 2, 4 … 256.
    pub granules: u64,
    /// How many.
    pub count: u64,
}

/// All options of a cache. `vattn_config_init` fills in the defaults; then change what you like.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct vattn_config {
    /// `sizeof(vattn_config)`, set by `vattn_config_init`.
    pub struct_size: usize,
    /// Bytes of physical memory that the cache may hold. Default `VATTN_AUTO`: what the driver says is free.
    pub budget: u64,
    /// The most tokens that a slot can hold. Costs addresses only. Default 131,072.
    pub max_tokens: u64,
    /// How many requests can have a slot at a time, up to 2^20. Default 1,024.
    pub max_slots: u32,
    /// 1 for one more slot behind the requests' own, always backed: padded entries of a batch write there.
    /// Default 0.
    pub spare_slot: u32,
    /// What a step rounds the tokens it backs up to a multiple of, for kernels that load whole tiles past a
    /// sequence's length; clipped at the slot's end. Default 1: exactly the tokens.
    pub tile_tokens: u32,
    /// Tokens of a page, for kernels that read the tensors as pages. Default 16.
    pub page_tokens: u32,
    /// A `vattn_layout_kind`. Default `VATTN_LAYOUT_SLICED`.
    pub layout: i32,
    /// With `VATTN_LAYOUT_GROUPED`, how many; else 0. Default 0.
    pub layers_per_tensor: u32,
    /// A `vattn_kv_order`. Default `VATTN_KV_APART`.
    pub kv_order: i32,
    /// A plan may round a need up by at most the need divided by this. Default 32.
    pub slack_divisor: u32,
    /// A `vattn_background`. Default `VATTN_BACKGROUND_THREAD`.
    pub background: i32,
    /// A `vattn_reclaim`. Default `VATTN_RECLAIM_DEFERRED`.
    pub reclaim: i32,
    /// With how many tokens to go the memory for a slot's growth is mapped; 0 turns it off. Default 32.
    pub look_ahead: u64,
    /// Bytes that may be mapped ahead at a time, for all slots together. They stand in nobody's way:
    /// whoever needs them takes them. Default `VATTN_AUTO`: an eighth of the budget.
    pub look_ahead_budget: u64,
    /// Bytes that may be kept created and mapped nowhere, ready for the next step; 0 turns it off. Default
    /// `VATTN_AUTO`: a sixty-fourth of the budget.
    pub at_hand: u64,
    /// A `vattn_commit`. Default `VATTN_COMMIT_ON_DEMAND`.
    pub commit: i32,
    /// 0.
    pub reserved: u32,
    /// With `VATTN_COMMIT_EXTENTS`, which; read while the cache is created. Default NULL.
    pub extents: *const vattn_extents,
    /// How many elements `extents` has. Default 0.
    pub extents_count: usize,
}

args::sized!(vattn_config);
args::numbered!(vattn_layout_kind);
args::numbered!(vattn_kv_order);
args::numbered!(vattn_commit);
args::numbered!(vattn_background);
args::numbered!(vattn_reclaim);

use vattn_background::*;
use vattn_commit::*;
use vattn_kv_order::*;
use vattn_layout_kind::*;
use vattn_reclaim::*;

/// Fills in the defaults. Pass `sizeof(vattn_config)` as `size`: a program that was built with an older or
/// a newer header than the library's is served all the same.
///
/// # Safety
/// - `config` is NULL, or `size` bytes can be written there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vattn_config_init(config: *mut vattn_config, size: usize) -> vattn_status {
    enter("vattn_config_init", || {
        // SAFETY: as the caller promises.
        let out = unsafe { args::out_new("config", config, size) }?;
        // Of any model: no default depends on it.
        let defaults = Config::builder(Geometry::preset("llama-3-8b")?).build()?;
        out.set(vattn_config {
            struct_size: size,
            budget: defaults.budget().map_or(VATTN_AUTO, Bytes::get),
            max_tokens: defaults.max_tokens().get(),
            max_slots: defaults.max_slots(),
            spare_slot: defaults.spare_slot().into(),
            tile_tokens: defaults.tile_tokens(),
            page_tokens: defaults.page_tokens(),
            layout: VATTN_LAYOUT_SLICED.number(),
            layers_per_tensor: 0,
            kv_order: VATTN_KV_APART.number(),
            slack_divisor: defaults.slack_divisor(),
            background: VATTN_BACKGROUND_THREAD.number(),
            reclaim: VATTN_RECLAIM_DEFERRED.number(),
            look_ahead: defaults.look_ahead().get(),
            look_ahead_budget: defaults.look_ahead_budget().map_or(VATTN_AUTO, Bytes::get),
            at_hand: defaults.at_hand().map_or(VATTN_AUTO, Bytes::get),
            commit: VATTN_COMMIT_ON_DEMAND.number(),
            reserved: 0,
            extents: std::ptr::null(),
            extents_count: 0,
        });
        Ok(())
    })
}

/// The options that C gives, for that model.
///
/// # Safety
/// - `config` is NULL, or points to a `vattn_config` of which `struct_size` is set;
/// - its `extents` are NULL, or `extents_count` of them can be read there.
pub(super) unsafe fn read(config: *const vattn_config, geometry: Geometry) -> Result<Config, Failure> {
    // SAFETY: as the caller promises.
    let given: vattn_config = unsafe { args::sized_in("config", config) }?;
    let mut builder = Config::builder(geometry)
        .max_slots(given.max_slots)
        .max_tokens(TokenCount::new(given.max_tokens))
        .tile_tokens(given.tile_tokens)
        .page_tokens(given.page_tokens)
        .slack_divisor(given.slack_divisor)
        .spare_slot(args::flag("config->spare_slot", given.spare_slot)?)
        .look_ahead(TokenCount::new(given.look_ahead))
        .layout(layout(&given)?)
        .background(args::choice(
            "config->background",
            given.background,
            &[
                (VATTN_BACKGROUND_THREAD, Background::Thread),
                (VATTN_BACKGROUND_CALLER, Background::Caller),
                (VATTN_BACKGROUND_OFF, Background::Off),
            ],
        )?)
        .reclaim(args::choice(
            "config->reclaim",
            given.reclaim,
            &[(VATTN_RECLAIM_DEFERRED, Reclaim::Deferred), (VATTN_RECLAIM_EAGER, Reclaim::Eager)],
        )?)
        // SAFETY: as the caller promises.
        .commit(unsafe { commit(&given) }?);
    args::unused("config->reserved", given.reserved)?;
    if given.budget != VATTN_AUTO {
        builder = builder.budget(Bytes::new(given.budget));
    }
    if given.look_ahead_budget != VATTN_AUTO {
        builder = builder.look_ahead_budget(Bytes::new(given.look_ahead_budget));
    }
    if given.at_hand != VATTN_AUTO {
        builder = builder.at_hand(Bytes::new(given.at_hand));
    }
    Ok(builder.build()?)
}

fn layout(given: &vattn_config) -> Result<LayoutChoice> {
    let grouped = LayoutKind::Grouped(given.layers_per_tensor);
    let kinds = [
        (VATTN_LAYOUT_SLICED, LayoutKind::Sliced),
        (VATTN_LAYOUT_PER_LAYER, LayoutKind::PerLayer),
        (VATTN_LAYOUT_GROUPED, grouped),
    ];
    let kind = args::choice("config->layout", given.layout, &kinds)?;
    if kind != grouped && given.layers_per_tensor != 0 {
        return Err(args::invalid(format!(
            "config->layers_per_tensor is {} and config->layout is not VATTN_LAYOUT_GROUPED; leave it 0, or choose that",
            given.layers_per_tensor
        )));
    }
    let order = args::choice(
        "config->kv_order",
        given.kv_order,
        &[(VATTN_KV_APART, KvOrder::Apart), (VATTN_KV_INTERLEAVED, KvOrder::Interleaved)],
    )?;
    Ok(LayoutChoice { kind, order })
}

/// # Safety
/// - `extents` is NULL, or `extents_count` of them can be read there.
unsafe fn commit(given: &vattn_config) -> Result<Commit> {
    // SAFETY: as the caller promises.
    let extents = unsafe { args::slice("config->extents", given.extents, given.extents_count) }?;
    let named = extents.iter().map(|extents| {
        let class = SizeClass::all().find(|class| class.granules().get() == extents.granules);
        let class = class.ok_or_else(|| {
            args::invalid(format!(
                "an extent of config->extents has {} granules; use 1, 2, 4, 8, 16, 32, 64, 128 or 256",
                extents.granules
            ))
        })?;
        Ok((class, extents.count))
    });
    let named = named.collect::<Result<Vec<_>>>()?;
    let up_front = !named.is_empty();
    let commit = args::choice(
        "config->commit",
        given.commit,
        &[
            (VATTN_COMMIT_ON_DEMAND, None),
            (VATTN_COMMIT_WHOLE, Some(false)),
            (VATTN_COMMIT_EXTENTS, Some(true)),
        ],
    )?;
    match commit {
        Some(true) => Ok(Commit::UpFront(named)),
        _ if up_front => Err(args::invalid(format!(
            "config->extents_count is {} and config->commit is not VATTN_COMMIT_EXTENTS; leave it 0, or choose that",
            given.extents_count
        ))),
        Some(false) => Ok(Commit::Whole),
        None => Ok(Commit::OnDemand),
    }
}
