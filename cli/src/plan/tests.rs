use clap::Parser;

use super::*;
use vattn::layout::Layout;
use vattn::units::{Device, GranuleSize};

#[derive(Debug, Parser)]
struct Line {
    #[command(flatten)]
    args: Args,
}

fn planned(options: &str) -> Plan {
    let line = std::iter::once("plan").chain(options.split_whitespace());
    plan(&Line::try_parse_from(line).unwrap().args).unwrap()
}

fn recommended(options: &str) -> String {
    planned(options).recommended.unwrap().layout
}

fn warned_of_offsets(plan: &Plan) -> bool {
    plan.warnings.iter().any(|warning| warning.contains("2^31"))
}

#[test]
fn addresses_and_strides_are_the_layouts() {
    for model in ["llama-3-8b", "yi-34b", "deepseek-v3"] {
        let plan = planned(&format!("--model {model} --max-slots 64 --max-tokens 40000"));
        for row in &plan.layouts {
            let config = Config::builder(Geometry::preset(model).unwrap())
                .layout(row.choice)
                .max_slots(64)
                .max_tokens(TokenCount::new(40_000))
                .build()
                .unwrap();
            let granule = GranuleSize::new(Bytes::mib(2)).unwrap();
            let layout = Layout::new(&config, granule, Device::Cpu).unwrap();
            assert_eq!(row.virtual_bytes, layout.virtual_size(), "{model} {}", row.layout);
            let view = layout.view(0, Part::Key).unwrap();
            assert_eq!(
                row.token_stride_bytes,
                view.dtype.bytes() * view.strides[1],
                "{model} {}",
                row.layout
            );
        }
    }
    // Latents have no values to interleave.
    let deepseek = planned("--model deepseek-v3 --max-tokens 10000");
    assert!(deepseek.layouts.iter().all(|row| row.choice.order == KvOrder::Apart));
    let pieces: Vec<u64> = deepseek.layouts.iter().map(|row| row.token_stride_pieces).collect();
    assert_eq!(pieces, [1, 4, 8, 16, 32, 61]);
}

#[test]
fn the_warning_of_offsets_appears_just_where_they_pass_31_bits() {
    // A token of a layer is 1,024 elements, so the last of 2^21 tokens ends with element 2^31 - 1.
    let options = "--layout per-layer --memory 1GiB --max-slots";
    assert!(!warned_of_offsets(&planned(&format!("{options} 1 --max-tokens 2097152"))));
    let beyond = planned(&format!("{options} 1 --max-tokens 2097153"));
    assert!(warned_of_offsets(&beyond));
    assert_eq!(beyond.layouts[0].last_element.slot, (1 << 31) + 1023);
    // Two slots share a view, and each stays below in its own.
    let both = planned(&format!("{options} 2 --max-tokens 2097152"));
    assert!(both.warnings.iter().any(|warning| warning.contains("Views of one slot stay below it")));
}

#[test]
fn the_chip_decides_between_short_strides_and_few_mappings() {
    let short = |options: &str| recommended(&format!("{options} --max-tokens 10000"));
    assert_eq!(short("--chip h200"), "sliced");
    assert_eq!(short("--chip gb10"), "per-layer");
    assert_eq!(short("--chip l40s"), "grouped:4");
    // All 61 layers in one tensor would map less, and decode more than 5 % slower.
    assert_eq!(short("--model deepseek-v3"), "grouped:32");
    // Of what was asked for, the shortest stride where none is short enough.
    assert_eq!(short("--layout per-layer-interleaved"), "per-layer-interleaved");
    assert_eq!(short("--model yi-34b --layout sliced-interleaved,sliced"), "sliced");
    // One tensor for each layer rounds a full context up beyond this memory.
    let tight = "--chip gb10 --max-tokens 1025 --memory 200MiB --layout per-layer,sliced";
    assert_eq!(recommended(tight), "sliced");
}

#[test]
fn what_cannot_be_used_is_not_recommended() {
    // Four tensors of 40 TiB, or one of 80: too many in all, or in one.
    let plan = planned("--layout sliced,sliced-interleaved --max-slots 5120");
    assert_eq!(plan.recommended.unwrap().layout, "sliced");
    assert!(
        plan.warnings[0].starts_with("sliced-interleaved can't be used: the largest tensor"),
        "{:?}",
        plan.warnings
    );
    let none = planned("--max-slots 8192 --layout sliced,per-layer");
    assert!(none.recommended.is_none());
    assert!(none.warnings[0].contains("No layout can be used: all tensors"), "{:?}", none.warnings);
    assert!(none.warnings[0].contains("--max-slots 7168 or fewer"), "{:?}", none.warnings);
    assert!(planned("--max-slots 7168 --layout per-layer").recommended.is_some());
    // Memory for one tensor, not for sixty-four.
    let small = planned("--memory 8MiB");
    assert!(small.layouts[0].cache.is_none() && small.layouts[0].obstacle.is_some());
    assert_eq!(small.recommended.unwrap().layout, "sliced");
}

#[test]
fn a_context_longer_than_memory_is_told() {
    let plan = planned("--memory 1GiB --layout sliced");
    let cache = plan.layouts[0].cache.as_ref().unwrap();
    assert_eq!((cache.requests.full_context, cache.requests.longest_tokens), (0, TokenCount::new(8192)));
    assert_eq!(cache.prompts.len(), 2);
    assert!(plan.warnings[0].contains("plan with --max-tokens 8192 "), "{:?}", plan.warnings);
    assert_eq!(
        planned("--memory 1GiB --layout sliced --max-tokens 8192").layouts[0]
            .cache
            .as_ref()
            .unwrap()
            .requests
            .full_context,
        1
    );
}

#[test]
fn kernels_say_what_a_step_rounds_up_to() {
    assert_eq!(planned("--max-tokens 3000").tile_tokens, 1);
    let decode = planned("--max-tokens 3000 --kernel fa3-decode,fa3-view");
    assert_eq!((decode.tile_tokens, decode.tile_note), (176, None));
    let both = planned("--max-tokens 3000 --kernel fa3-decode,fa3-causal");
    assert_eq!(both.tile_tokens, 1408);
    assert!(both.warnings.iter().any(|warning| warning.contains("fa3-decode 176, fa3-causal 128")));
    let waste = |plan: &Plan| plan.layouts[0].cache.as_ref().unwrap().waste.least_mean_bytes;
    assert!(waste(&both) > waste(&planned("--max-tokens 3000 --tile-tokens 176")));
}

#[test]
fn lines_are_no_longer_than_a_terminal() {
    for (model, _) in Geometry::presets() {
        let text = text::text(&planned(&format!(
            "--model {model} --kernel fa3-decode --chip l40s --max-tokens 2000"
        )));
        for line in text.lines() {
            assert!(line.chars().count() <= 100, "{model}: {line}");
        }
    }
}
