//! What is recommended and why, and what to beware of.

use serde::Serialize;
use vattn::geometry::KvOrder;

use super::Plan;
use super::chip::{self, Chip, Stride};
use super::measure::{Cache, LastElement, Row};
use super::text::{mib, ms, per_cent};
use crate::num::{float, wide};
use crate::report::count;

/// Where a token stride is cheap, this much longer decoding is worth fewer mappings.
const CHEAP_PERCENT: f64 = 5.0;
/// Where it is not known, this share of a request may be wasted beyond the least, for a shorter stride.
const WASTE_PERCENT: f64 = 5.0;
/// Where an offset no longer fits 32 bits with a sign.
const INDEX_LIMIT: u64 = 1 << 31;

/// The layout to take.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Recommendation {
    pub(crate) layout: String,
    pub(crate) why: String,
}

/// How [`recommend`] chooses, for the help.
pub(crate) const RULE: &str = "Recommended is, of the layouts that can be used and hold a request \
    of the full context if any does: where a token stride is cheap (h200, \
    h100), the one with the fewest mappings for a prompt of 8,192 tokens among those that slow decoding by at most \
    5 %; where it is dear (gb10), the one with the shortest stride; elsewhere the one with the shortest stride whose \
    waste, at least, is within 5 % of such a prompt of what the best layout has. Keys and values in tensors of their \
    own come first: sharing one doubles the stride to save one mapping in two.";

/// Chooses among the layouts that can be used, by [`RULE`].
pub(crate) fn recommend(plan: &Plan) -> Option<Recommendation> {
    let mut usable: Vec<(&Row, &Cache)> =
        plan.layouts.iter().filter_map(|row| Some((row, row.usable()?))).collect();
    if usable.iter().any(|(_, cache)| cache.requests.full_context > 0) {
        usable.retain(|(_, cache)| cache.requests.full_context > 0);
    }
    let least_waste = usable.iter().map(|(_, cache)| cache.waste.least_mean_bytes).reduce(f64::min)?;
    let fits = |(row, cache): &&(&Row, &Cache)| match plan.stride() {
        Stride::Cheap => row.slower_decode_percent.is_some_and(|slower| slower <= CHEAP_PERCENT),
        Stride::Dear => true,
        Stride::Unknown => {
            let request = float((plan.bytes_per_token * cache.reference.tokens.get()).get());
            cache.waste.least_mean_bytes - least_waste <= request * WASTE_PERCENT / 100.0
        }
    };
    let order = |(row, cache): &&(&Row, &Cache)| {
        let mappings = cache.reference.mappings;
        let (first, second) = match plan.stride() {
            Stride::Cheap => (mappings, row.token_stride_pieces),
            Stride::Dear | Stride::Unknown => (row.token_stride_pieces, mappings),
        };
        (row.choice.order == KvOrder::Interleaved, first, second)
    };
    // Of the layouts that somebody asked for, none may be within the bound. What has the least waste
    // always is, so the bound is that of strides.
    let within = usable.iter().filter(fits).min_by_key(order);
    let (row, cache) = within.or_else(|| usable.iter().min_by_key(|(row, _)| row.token_stride_pieces))?;
    let reason = if within.is_none() {
        format!(
            "none of these is known to decode at most {CHEAP_PERCENT} % slower, and it has the shortest stride"
        )
    } else {
        reason(plan, row)
    };
    let why = format!(
        "{reason}. A prompt of {} tokens takes {} mapping{} ({} ms if its memory is created first), and a request \
         wastes {} MiB on average, or {} when memory is short.",
        count(cache.reference.tokens.get()),
        count(cache.reference.mappings),
        if cache.reference.mappings == 1 { "" } else { "s" },
        ms(cache.reference.create_and_map_seconds),
        mib(cache.waste.mean_bytes),
        mib(cache.waste.least_mean_bytes),
    );
    Some(Recommendation { layout: row.layout.clone(), why })
}

fn reason(plan: &Plan, row: &Row) -> String {
    match (plan.stride(), row.slower_decode_percent) {
        (Stride::Cheap, Some(slower)) if slower > 0.0 => format!(
            "it maps least of what decodes at most {CHEAP_PERCENT} % slower; its stride cost an H200 up to {} %",
            per_cent(slower)
        ),
        (Stride::Cheap, _) => "it maps least, and its tokens lie side by side".to_owned(),
        (Stride::Dear, _) => {
            format!("strides are dear on the {}, and its tokens lie closest together", plan.chip)
        }
        (Stride::Unknown, _) => format!(
            "what a stride costs on the {} was not measured, so it has the shortest that keeps waste within \
             {WASTE_PERCENT} % of a prompt of 8,192 tokens",
            plan.chip
        ),
    }
}

/// What to beware of, a sentence or two each.
pub(crate) fn warnings(plan: &Plan) -> Vec<String> {
    let mut out = obstacles(plan);
    out.extend(too_long(plan));
    out.extend(stride(plan));
    out.extend(offsets(plan));
    out.extend(plan.tile_note.clone());
    out
}

/// Why layouts can't be used, those with one reason together.
fn obstacles(plan: &Plan) -> Vec<String> {
    let mut reasons: Vec<(&str, Vec<&str>)> = Vec::new();
    for row in &plan.layouts {
        let Some(reason) = &row.obstacle else { continue };
        match reasons.iter_mut().find(|known| known.0 == reason) {
            Some((_, layouts)) => layouts.push(&row.layout),
            None => reasons.push((reason, vec![&row.layout])),
        }
    }
    let sentence = |(reason, layouts): (&str, Vec<&str>)| match layouts.len() == plan.layouts.len() {
        true => format!("No layout can be used: {reason}."),
        false => format!("{} can't be used: {reason}.", layouts.join(", ")),
    };
    reasons.into_iter().map(sentence).collect()
}

/// A context that is longer than memory.
fn too_long(plan: &Plan) -> Option<String> {
    let longest = plan.layouts.iter().filter_map(|row| Some(row.usable()?.requests.longest_tokens)).max()?;
    (longest < plan.max_tokens).then(|| {
        format!(
            "A request of {} tokens has no room; the longest that has is {} tokens: plan with --max-tokens {longest} \
             or with more memory.",
            count(plan.max_tokens.get()),
            count(longest.get()),
        )
    })
}

fn stride(plan: &Plan) -> Option<String> {
    plan.layouts.iter().any(|row| row.token_stride_pieces > 1).then(|| match plan.stride() {
        Stride::Cheap if plan.on == Chip::H100 => format!("{}. {}.", chip::H200_STRIDE, chip::H100_STRIDE),
        Stride::Cheap => format!("{}.", chip::H200_STRIDE),
        Stride::Dear => format!("{}. Every layout but one tensor for each layer may be as slow.", chip::GB10_STRIDE),
        Stride::Unknown => format!(
            "What a token stride costs was not measured on the {}: measure before you take more than one layer a \
             tensor. {}. {}.",
            plan.chip, chip::H200_STRIDE, chip::GB10_STRIDE
        ),
    })
}

/// Layouts whose offsets pass 32 bits, in the view of all slots and in that of one.
fn offsets(plan: &Plan) -> Option<String> {
    let past = |offset: fn(&Row) -> u64| -> Vec<&str> {
        plan.layouts.iter().filter(|row| offset(row) >= INDEX_LIMIT).map(|row| &*row.layout).collect()
    };
    let view = past(|row| row.last_element.view);
    let slot = past(|row| row.last_element.slot);
    if view.is_empty() {
        return None;
    }
    let which = if view.len() == plan.layouts.len() { "all layouts".to_owned() } else { view.join(", ") };
    let alone = match wide(slot.len()) {
        0 => "Views of one slot stay below it.".to_owned(),
        _ => format!("Even views of one slot do in {}.", slot.join(", ")),
    };
    Some(format!(
        "Offsets of elements pass 2^31 in the view of all slots of {which}: a kernel that computes offsets in 32 bits \
         goes wrong there. {alone}"
    ))
}

/// The largest view of a layer whose offsets stay within 32 bits.
pub(crate) fn in_32_bits(row: &Row) -> &'static str {
    match row.last_element {
        LastElement { view, .. } if view < INDEX_LIMIT => "whole view",
        LastElement { slot, .. } if slot < INDEX_LIMIT => "slot",
        LastElement { .. } => "part of a slot",
    }
}
