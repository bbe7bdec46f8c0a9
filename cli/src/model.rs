//! From a model and a layout to the tensors that policies manage.

use std::path::Path;

use vattn::geometry::{Config, Geometry, LayoutChoice};
use vattn::layout::Layout;
use vattn::units::{Bytes, Device, GranuleSize, TokenCount};
use vattn::{Error, ErrorKind, Result};
use vattn_baselines::{Shape, TensorShape};

use crate::mapper::Mapper;
use crate::num::wide;

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
    pub(crate) mapper: Mapper,
}

/// The model's cache.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// The model's name in reports.
    pub(crate) model: String,
    /// What a cache is made from.
    pub(crate) config: Config,
    /// What the baselines manage.
    pub(crate) shape: Shape,
}

/// Plans the tensors.
pub(crate) fn plan(wanted: &Wanted<'_>) -> Result<Plan> {
    let (model, geometry) = geometry(wanted.model, wanted.tensor_parallel)?;
    let layout: LayoutChoice = wanted.layout.parse()?;
    let config = wanted
        .mapper
        .of(Config::builder(geometry))
        .layout(layout)
        .max_slots(wanted.max_slots)
        .max_tokens(wanted.max_tokens)
        .tile_tokens(wanted.tile_tokens)
        // A cache refuses 0, with a cure that the command line does not have. What is asked for instead
        // depends on the layout, so that is planned first.
        .budget(wanted.budget.max(Bytes::new(1)))
        .build()?;
    let granule = granule_size(wanted.granule)?;
    let tensors: Vec<_> = Layout::new(&config, granule, Device::Cpu)?
        .tensors()
        .iter()
        .map(|tensor| TensorShape { row: tensor.row(), stride: tensor.slot_stride() })
        .collect();
    if wanted.budget.is_zero() {
        let count = wide(tensors.len());
        return Err(Error::new(
            ErrorKind::InvalidConfig,
            format!(
                "--budget is 0 bytes; a granule of {} for each of the layout's tensors ({count}), {} in all, is \
                 the least: give --budget that or more, or leave it out",
                granule.bytes(),
                granule.bytes() * count
            ),
        ));
    }
    let tile = TokenCount::new(wanted.tile_tokens.into());
    let shape = Shape::new(tensors, wanted.max_slots, wanted.max_tokens, tile, wanted.budget)?;
    Ok(Plan { model, config, shape })
}

/// `--granule` as the unit that layouts are made for.
pub(crate) fn granule_size(granule: Bytes) -> Result<GranuleSize> {
    GranuleSize::new(granule).ok_or_else(|| {
        Error::new(
            ErrorKind::InvalidConfig,
            format!(
                "--granule is {granule}; a power of two of at least 1 byte is needed: use 2MiB, which CUDA has"
            ),
        )
    })
}

/// A preset's geometry, or that of a configuration file: whatever looks like a path is one.
pub(crate) fn geometry(model: &str, ranks: u32) -> Result<(String, Geometry)> {
    let path = Path::new(model);
    let is_file = path.components().count() > 1 || path.extension().is_some_and(|end| end == "json");
    if !is_file {
        return Ok((model.to_ascii_lowercase(), Geometry::preset(model)?.with_tensor_parallel(ranks)?));
    }
    let json = std::fs::read_to_string(path).map_err(|error| {
        Error::new(
            ErrorKind::InvalidArgument,
            format!("{model}: {error}; give a model's config.json or a preset's name"),
        )
    })?;
    let geometry = Geometry::from_hf_config(&json, ranks).map_err(|error| error.context(model))?;
    Ok((model.into(), geometry))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(layout: &str) -> Wanted<'_> {
        Wanted {
            model: "llama-3-8b",
            tensor_parallel: 1,
            layout,
            max_slots: 4,
            max_tokens: TokenCount::new(1000),
            tile_tokens: 1,
            budget: Bytes::gib(1),
            granule: Bytes::mib(2),
            mapper: Mapper::default(),
        }
    }

    #[test]
    fn layouts_become_tensors() {
        for (layout, tensors, row) in [
            ("sliced", 2, 64 << 10),
            ("sliced-interleaved", 1, 128 << 10),
            ("per-layer", 64, 2 << 10),
            ("grouped:8", 8, 16 << 10),
        ] {
            let plan = plan(&wanted(layout)).unwrap();
            assert_eq!(plan.shape.tensors().len(), tensors, "{layout}");
            assert!(plan.shape.tensors().iter().all(|tensor| tensor.row == Bytes::new(row)), "{layout}");
            assert_eq!(plan.shape.bytes_per_token(), Bytes::new(128 << 10));
            assert_eq!(plan.config.layout().to_string(), layout);
        }
    }

    #[test]
    fn ranks_share_the_heads() {
        let plan = plan(&Wanted { tensor_parallel: 4, ..wanted("sliced") }).unwrap();
        assert_eq!(plan.shape.bytes_per_token(), Bytes::new(32 << 10));
    }

    #[test]
    fn a_file_that_is_not_there_is_named() {
        let error = plan(&Wanted { model: "no/such/config.json", ..wanted("sliced") }).unwrap_err();
        assert!(error.report().starts_with("no/such/config.json: "), "{error}");
    }
}
