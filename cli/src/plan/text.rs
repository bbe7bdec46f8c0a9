//! The plan for people: tables of at most 100 columns.

use std::fmt::Write;

use super::Plan;
use super::advice::in_32_bits;
use super::measure::{Cache, PROMPTS, Row};
use crate::num::float;
use crate::report::count;
use vattn::units::Bytes;

const WIDTH: usize = 100;

const NOTES: &str = "\
Waste is what a request maps beyond its tokens' own bytes, over prompts of every length alike, each alone \
in an empty cache; at least is its mean when memory is short. Milliseconds are what the driver's calls took \
an H200, creating the memory included; a steady server makes hardly any, since requests take over what \
earlier ones left mapped. vattn plan --help says more.";

/// The whole plan.
pub(crate) fn text(plan: &Plan) -> String {
    let parts = [memory(plan), prompts(plan), addresses(plan), kernels(plan)].join("\n");
    let mut out = format!("{}\n{parts}\n{}\n", head(plan), wrapped(NOTES, "", ""));
    for warning in &plan.warnings {
        out.push_str(&wrapped(warning, "- ", "  "));
    }
    let advice = match &plan.recommended {
        Some(chosen) => format!("Recommended: --layout {}, since {}", chosen.layout, chosen.why),
        None => "Recommended: nothing, since no layout can be used.".to_owned(),
    };
    out.push('\n');
    out.push_str(&wrapped(&advice, "", ""));
    out
}

fn head(plan: &Plan) -> String {
    let weights = if plan.weights_bytes.is_zero() {
        " (all of it; --weights takes off what weights and activations need)".to_owned()
    } else {
        format!(" of {} after {} for weights", gib(plan.memory_bytes), gib(plan.weights_bytes))
    };
    let tile = if plan.tile_tokens == 1 {
        String::new()
    } else {
        format!(", whole tiles of {} tokens", count(plan.tile_tokens.into()))
    };
    let lines = [
        format!("{}: {}", plan.model, plan.geometry),
        format!("{}: {} for the cache{weights}", plan.chip, gib(plan.cache_bytes)),
        format!(
            "room for {} tokens with no rounding; {} slots of {} tokens, granules of {}{tile}",
            count(plan.cache_bytes.get() / plan.bytes_per_token.get()),
            count(plan.max_slots.into()),
            count(plan.max_tokens.get()),
            plan.granule_bytes
        ),
    ];
    lines.iter().map(|line| wrapped(line, "", "  ")).collect()
}

fn memory(plan: &Plan) -> String {
    let heads = [
        ["", "layout"],
        ["", "tensors"],
        ["tokens a", "granule"],
        ["waste MiB", "mean"],
        ["waste MiB", "worst"],
        ["waste MiB", "at least"],
        ["full ctx", "at once"],
        ["half ctx", "at once"],
    ];
    let cache = |row: &Row, value: fn(&Cache) -> String| row.cache.as_ref().map_or_else(dash, value);
    let rows = plan.layouts.iter().map(|row| {
        vec![
            row.layout.clone(),
            count(row.tensors),
            format!("{:.1}", row.tokens_per_granule),
            cache(row, |cache| mib(cache.waste.mean_bytes)),
            cache(row, |cache| mib(float(cache.waste.worst_bytes.get()))),
            cache(row, |cache| mib(cache.waste.least_mean_bytes)),
            cache(row, |cache| count(cache.requests.full_context)),
            cache(row, |cache| count(cache.requests.half_context)),
        ]
    });
    table(&heads, rows, false)
}

fn addresses(plan: &Plan) -> String {
    let heads = [
        ["", "layout"],
        ["addresses", "TiB"],
        ["from token", "to token, KiB"],
        ["decode slower", "by up to, %"],
        ["offsets of", "32 bits in a"],
    ];
    let rows = plan.layouts.iter().map(|row| {
        vec![
            row.layout.clone(),
            format!("{:.2}", float(row.virtual_bytes.get()) / float(1 << 40)),
            format!("{:.1}", float(row.token_stride_bytes.get()) / 1024.0),
            row.slower_decode_percent.map_or_else(|| "?".to_owned(), per_cent),
            in_32_bits(row).to_owned(),
        ]
    });
    table(&heads, rows, false)
}

fn prompts(plan: &Plan) -> String {
    let tokens = PROMPTS.map(count);
    let mut heads = vec![["", "layout"]];
    for tokens in &tokens {
        heads.extend([[tokens.as_str(), "maps"], ["tokens", "ms"]]);
    }
    let rows = plan.layouts.iter().map(|row| {
        let mut cells = vec![row.layout.clone()];
        for tokens in PROMPTS {
            let mut prompts = row.cache.iter().flat_map(|cache| &cache.prompts);
            match prompts.find(|prompt| prompt.tokens.get() == tokens) {
                Some(prompt) => {
                    cells.extend([count(prompt.mappings), ms(prompt.create_and_map_seconds)]);
                }
                None => cells.extend([dash(), dash()]),
            }
        }
        cells
    });
    table(&heads, rows, false)
}

fn kernels(plan: &Plan) -> String {
    let heads = [["kernel"], ["tile"], ["known by"], ["call"]];
    let rows = plan.kernels.iter().map(|kernel| {
        let tile = kernel.tile_tokens.map_or_else(dash, |tokens| count(tokens.into()));
        let known = if kernel.tile_tokens.is_some() { kernel.known() } else { "" };
        vec![kernel.name.to_owned(), tile, known.to_owned(), kernel.call.to_owned()]
    });
    table(&heads, rows, true)
}

/// Columns: the first to the left, the others to the right; the last to the left if it is `prose`.
fn table<const LINES: usize>(
    heads: &[[&str; LINES]],
    rows: impl Iterator<Item = Vec<String>>,
    prose: bool,
) -> String {
    let rows: Vec<Vec<String>> = rows.collect();
    let width = |column: usize| {
        let heads = heads[column].iter().map(|head| head.chars().count());
        heads.chain(rows.iter().map(|row| row[column].chars().count())).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..heads.len()).map(width).collect();
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let mut text = String::new();
        for (column, (cell, width)) in cells.zip(&widths).enumerate() {
            // Writing to a string never fails.
            let _ = match column {
                0 => write!(text, "{cell:width$}"),
                last if prose && last + 1 == widths.len() => write!(text, "  {cell}"),
                _ => write!(text, "  {cell:>width$}"),
            };
        }
        text.trim_end().to_owned() + "\n"
    };
    let mut out: String = (0..LINES).map(|number| line(&mut heads.iter().map(|head| head[number]))).collect();
    out.push_str(&"-".repeat(widths.iter().sum::<usize>() + 2 * (widths.len() - 1)));
    out.push('\n');
    out.extend(rows.iter().map(|row| line(&mut row.iter().map(String::as_str))));
    out
}

/// Lines of at most [`WIDTH`] columns; a word that is longer stands alone, and a number keeps its `%`.
fn wrapped(text: &str, first: &str, others: &str) -> String {
    let glued = text.replace(" %", "\u{a0}%");
    let mut lines = vec![first.to_owned()];
    let mut empty = true;
    for word in glued.split(' ') {
        let line = lines.last_mut().expect("there is a first");
        if !empty && line.chars().count() + 1 + word.chars().count() > WIDTH {
            lines.push(others.to_owned() + word);
            continue;
        }
        if !empty {
            line.push(' ');
        }
        line.push_str(word);
        empty = false;
    }
    lines.join("\n").replace('\u{a0}', " ") + "\n"
}

fn dash() -> String {
    "–".to_owned()
}

fn gib(bytes: Bytes) -> String {
    format!("{:.1} GiB", float(bytes.get()) / float(1 << 30))
}

pub(crate) fn mib(bytes: f64) -> String {
    format!("{:.1}", bytes / float(1 << 20))
}

pub(crate) fn ms(seconds: f64) -> String {
    format!("{:.2}", seconds * 1e3)
}

pub(crate) fn per_cent(percent: f64) -> String {
    format!("{percent:.1}")
}
