//! `vattn plan`: what each layout costs on a chip, before anything is served.
//!
//! | room | question |
//! |---|---|
//! | [`chip`] | how much memory a chip has, and what is known of its token stride |
//! | [`measure`] | what a cache in a layout does |
//! | [`advice`] | what to beware of, and what to take |
//! | [`text`] | what people are shown |

mod advice;
mod chip;
mod measure;
#[cfg(test)]
mod tests;
mod text;

use std::io::Write;

use serde::Serialize;
use vattn::geometry::{Config, Dtype, Evidence, Geometry, Kernel, KvOrder, LayoutChoice, LayoutKind, Part};
use vattn::units::{Bytes, TokenCount};

use crate::{Failure, model, size};
use advice::Recommendation;
use chip::{Chip, Stride};
use measure::Row;

/// The options of `vattn plan`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The model: a preset's name or the path of a Hugging Face config.json
    #[arg(long, default_value = "llama-3-8b", value_name = "NAME|FILE")]
    model: String,
    /// Over how many devices the KV heads are split; the plan is one device's
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    tp: u32,
    /// The type of the cache's elements, such as fp8; the model's own if left out
    #[arg(long, value_name = "TYPE")]
    dtype: Option<Dtype>,
    /// The chip that the cache is on
    #[arg(long, value_enum, default_value_t = Chip::H200, value_name = "CHIP")]
    chip: Chip,
    /// The memory in all, where that is not what the chip has
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    memory: Option<Bytes>,
    /// What of the memory is not the cache's: weights, activations, the driver's own
    #[arg(long, default_value = "0", value_name = "SIZE", value_parser = size::parse)]
    weights: Bytes,
    /// The context: how many tokens a request can have
    #[arg(long, default_value_t = 131_072, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    max_tokens: u64,
    /// How many requests can be active at once
    #[arg(long, visible_alias = "slots", default_value_t = 1024, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_slots: u32,
    /// The driver's unit of allocation, a power of two
    #[arg(long, default_value = "2MiB", value_name = "SIZE", value_parser = size::parse)]
    granule: Bytes,
    /// Tokens to which a step rounds up what it backs, for kernels that load whole tiles
    #[arg(long, value_name = "N", conflicts_with = "kernel", value_parser = clap::value_parser!(u32).range(1..))]
    tile_tokens: Option<u32>,
    /// The kernels that read the cache, which say what a step rounds up to: names as in the plan
    #[arg(long, value_delimiter = ',', value_name = "NAME,...")]
    kernel: Vec<String>,
    /// Plan these layouts only: sliced, per-layer or grouped:N, and -interleaved after it where K and V
    /// share a tensor
    #[arg(long, value_delimiter = ',', value_name = "LAYOUT,...")]
    layout: Vec<LayoutChoice>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// A plan. The names are the JSON's.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Plan {
    model: String,
    geometry: String,
    bytes_per_token: Bytes,
    chip: String,
    memory_bytes: Bytes,
    weights_bytes: Bytes,
    cache_bytes: Bytes,
    granule_bytes: Bytes,
    max_slots: u32,
    max_tokens: TokenCount,
    tile_tokens: u32,
    layouts: Vec<Row>,
    kernels: Vec<KernelRow>,
    warnings: Vec<String>,
    recommended: Option<Recommendation>,
    #[serde(skip)]
    tile_note: Option<String>,
    #[serde(skip)]
    on: Chip,
}

/// What a kernel needs for this model.
#[derive(Clone, Copy, Debug, Serialize)]
struct KernelRow {
    name: &'static str,
    /// `None` where it is not known, or the kernel does not take such layers.
    tile_tokens: Option<u32>,
    evidence: Evidence,
    call: &'static str,
}

impl KernelRow {
    fn known(&self) -> &'static str {
        match self.evidence {
            Evidence::Measured => "measured",
            _ => "source",
        }
    }
}

impl Plan {
    fn stride(&self) -> Stride {
        self.on.stride()
    }
}

/// The long help's head: what the numbers are.
pub(crate) fn long_about() -> String {
    format!(
        "Tell what each layout of a model's cache costs on a chip: waste, mappings and their time, what fits, and \
         which to take.\n\n\
         Mappings are those that a cache makes: one in that layout, on a driver that keeps books and maps nothing, is \
         given one prompt at a time while it is empty. Milliseconds are modelled with what each call took an H200.\n\n\
         Waste is bytes mapped less bytes that the tokens fill. The mean and the worst are over all lengths from 1 to \
         --max-tokens, or to the longest that has room, each counting alike; where those need more than {ranges} \
         different numbers of granules, over {sample} or fewer of them, spread evenly. \"At least\" is the mean of whole \
         granules and tiles alone, to which the cache falls back when memory is short.\n\n\
         At once is how many requests of --max-tokens, and of half of that, an empty cache admits, up to \
         --max-slots. A layout of which a tensor needs more than 64 TiB of addresses, or all together more than 112 TiB, \
         can't be used: an H200 gave no more.\n\n\
         Decode slower is what was measured at the next larger token stride with FlashAttention-3 on an H200, the worst \
         of four shapes of batch, for h200 and h100; a ? is what nobody measured. A tile is what a step rounds up to so \
         that the kernel finds all memory that it loads; it counts only if --kernel or --tile-tokens says so.\n\n\
         {rule}\n\n\
         Layers with a sliding window are kept at full length, by the cache as by the plan.",
        ranges = crate::report::count(measure::RANGES),
        sample = crate::report::count(measure::SAMPLE),
        rule = advice::RULE,
    )
}

/// Prints the plan.
pub(crate) fn run(args: &Args, out: &mut dyn Write) -> Result<(), Failure> {
    let plan = plan(args)?;
    let shown = if args.json {
        serde_json::to_string(&plan).expect("plain data with string keys is always JSON") + "\n"
    } else {
        text::text(&plan)
    };
    out.write_all(shown.as_bytes()).and_then(|()| out.flush()).map_err(Failure::Output)
}

fn plan(args: &Args) -> Result<Plan, Failure> {
    let (model, mut geometry) = model::geometry(&args.model, args.tp)?;
    if let Some(dtype) = args.dtype {
        geometry = geometry.with_dtype(dtype)?;
    }
    let kernels = args.kernel.iter().map(|name| Kernel::named(name)).collect::<vattn::Result<Vec<_>>>()?;
    if let Some(kernel) = kernels.iter().find(|kernel| geometry.tile_tokens(&[kernel]).is_err()) {
        return Err(Failure::Input(format!(
            "--kernel {}: how far it reads is not known for {geometry}; leave it out, and give --tile-tokens if you know",
            kernel.name
        )));
    }
    let tile_tokens = args.tile_tokens.map_or_else(|| geometry.tile_tokens(&kernels), Ok)?;
    let memory = args.memory.unwrap_or(args.chip.memory());
    let cache = memory.checked_sub(args.weights).filter(|left| !left.is_zero()).ok_or_else(|| {
        Failure::Input(format!(
            "--weights is {}, and the memory is {memory}: nothing is left for a cache; give less, or more --memory",
            args.weights
        ))
    })?;
    let config = Config::builder(geometry.clone())
        .max_slots(args.max_slots)
        .max_tokens(TokenCount::new(args.max_tokens))
        .tile_tokens(tile_tokens)
        .budget(cache)
        .build()?;
    let layouts = choices(args, &geometry)
        .into_iter()
        .map(|choice| Row::measure(&config, choice, args.granule, args.chip))
        .collect::<vattn::Result<Vec<_>>>()?;
    if layouts.iter().all(|row| row.cache.is_none())
        && let Some(least) = layouts.iter().min_by_key(|row| row.tensors)
    {
        let why = least.obstacle.as_deref().unwrap_or_default();
        return Err(Failure::Input(format!("no layout can be used, not even {}: {why}", least.layout)));
    }
    let mut plan = Plan {
        model,
        geometry: geometry.to_string(),
        bytes_per_token: geometry.bytes_per_token(),
        chip: args.chip.name(),
        memory_bytes: memory,
        weights_bytes: args.weights,
        cache_bytes: cache,
        granule_bytes: args.granule,
        max_slots: args.max_slots,
        max_tokens: TokenCount::new(args.max_tokens),
        tile_tokens,
        layouts,
        kernels: Kernel::ALL.iter().map(|kernel| kernel_row(kernel, &geometry)).collect(),
        warnings: Vec::new(),
        recommended: None,
        tile_note: tile_note(&geometry, &kernels, tile_tokens),
        on: args.chip,
    };
    plan.warnings = advice::warnings(&plan);
    plan.recommended = advice::recommend(&plan);
    Ok(plan)
}

/// The layouts to look at: those asked for, or the usual ones that differ for this model.
fn choices(args: &Args, geometry: &Geometry) -> Vec<LayoutChoice> {
    let mut choices = args.layout.clone();
    if choices.is_empty() {
        let groups = [4, 8, 16, 32].into_iter().filter(|layers| *layers < geometry.layers());
        let kinds = std::iter::once(LayoutKind::PerLayer).chain(groups.map(LayoutKind::Grouped));
        choices.extend(kinds.map(LayoutChoice::from));
        choices.push(LayoutKind::Sliced.into());
        // Latents have nothing to interleave.
        if geometry.layer_kinds().any(|kind| kind.piece(Part::Value).is_some()) {
            let interleaved = |kind| LayoutChoice { kind, order: KvOrder::Interleaved };
            choices.insert(1, interleaved(LayoutKind::PerLayer));
            choices.push(interleaved(LayoutKind::Sliced));
        }
    }
    let mut seen = Vec::new();
    choices.retain(|choice| {
        let new = !seen.contains(choice);
        seen.push(*choice);
        new
    });
    choices
}

fn kernel_row(kernel: &'static Kernel, geometry: &Geometry) -> KernelRow {
    KernelRow {
        name: kernel.name,
        tile_tokens: geometry.tile_tokens(&[kernel]).ok(),
        evidence: kernel.evidence,
        call: kernel.call,
    }
}

/// Says so where kernels have tiles that are no multiples of each other.
fn tile_note(geometry: &Geometry, kernels: &[&'static Kernel], together: u32) -> Option<String> {
    let alone: Vec<_> = kernels
        .iter()
        .filter_map(|kernel| Some((kernel.name, geometry.tile_tokens(&[kernel]).ok()?)))
        .collect();
    alone.iter().all(|(_, tile)| *tile < together).then_some(())?;
    let each: Vec<_> = alone.iter().map(|(name, tile)| format!("{name} {tile}")).collect();
    (!each.is_empty()).then(|| {
        format!(
            "Together these kernels need whole tiles of {together} tokens, the common multiple of theirs ({}). Give \
             all but one of them exact views instead, as fa3-view reads.",
            each.join(", ")
        )
    })
}
