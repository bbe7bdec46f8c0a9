use proptest::prelude::*;

use super::*;
use crate::geometry::{Geometry, LayerGroup, LayerKind, LayoutChoice};

fn granule(bytes: u64) -> GranuleSize {
    GranuleSize::new(Bytes::new(bytes)).unwrap()
}

fn tokens(count: u64) -> TokenCount {
    TokenCount::new(count)
}

fn layout(geometry: Geometry, choice: &str) -> Layout {
    let config = Config::builder(geometry).layout(choice.parse::<LayoutChoice>().unwrap()).build().unwrap();
    Layout::new(&config, granule(2 << 20), Device::Cuda(0)).unwrap()
}

fn llama(choice: &str) -> Layout {
    layout(Geometry::preset("llama-3-8b").unwrap(), choice)
}

#[test]
fn llama_in_every_layout() {
    for (choice, tensors, row) in [
        ("sliced", 2, 65_536),
        ("sliced-interleaved", 1, 131_072),
        ("per-layer", 64, 2048),
        ("per-layer-interleaved", 32, 4096),
        ("grouped:8", 8, 16_384),
        ("grouped:8-interleaved", 4, 32_768),
        ("grouped:100", 2, 65_536),
    ] {
        let layout = llama(choice);
        assert_eq!(layout.tensors().len(), tensors, "{choice}");
        assert!(layout.tensors().iter().all(|tensor| tensor.row() == Bytes::new(row)), "{choice}");
        assert_eq!(layout.stride_tokens(), tokens(131_072));
        assert_eq!(layout.bytes_per_token(), Bytes::new(131_072));
        assert_eq!(layout.virtual_size(), Bytes::gib(16 * 1024));
        assert_eq!((layout.layers(), layout.slots(), layout.pages_per_slot()), (32, 1024, 8192));
        assert_eq!(layout.view(31, Part::Value).unwrap().alignment(), Bytes::new(256));
        check(&layout);
    }
    let sliced = llama("sliced");
    let [keys, values] = sliced.tensors() else { panic!("two tensors") };
    assert_eq!((keys.parts(), values.parts()), (&[Part::Key][..], &[Part::Value][..]));
    assert_eq!(keys.layers(), 0..32);
    assert_eq!(keys.tokens_per_granules(), (tokens(32), Granules::new(1)));
    assert_eq!(keys.granules(tokens(33)), Granules::new(2));
    assert_eq!(keys.max_granules(), Granules::new(4096));
    assert_eq!(keys.slot_offset(3), Bytes::gib(24));
    assert_eq!(sliced.granules_for(tokens(33)), Granules::new(4));
    assert_eq!(sliced.waste(tokens(33)), Bytes::mib(8) - Bytes::new(33 * 131_072));
    let view = sliced.view(5, Part::Value).unwrap();
    assert_eq!((view.tensor, view.offset), (1, Bytes::new(5 * 2048)));
    assert_eq!(view.shape, [1024, 131_072, 8, 128]);
    assert_eq!(view.strides, [131_072 * 32_768, 32_768, 128, 1]);
    assert_eq!((view.dtype, view.device), (Dtype::BF16, Device::Cuda(0)));
    assert_eq!(sliced.view(32, Part::Key), None);
    let pages = sliced.paged_view(5, Part::Value).unwrap();
    assert_eq!(pages.shape, [1024 * 8192, 16, 8, 128]);
    assert_eq!(pages.strides, [16 * 32_768, 32_768, 128, 1]);
    let row = sliced.token_view(5, Part::Value).unwrap();
    assert_eq!(row.shape, [1, 1024 * 131_072, 8, 128]);
}

#[test]
fn a_row_interleaves_layer_by_layer() {
    let groups = vec![
        LayerGroup { layers: 2, kind: LayerKind::Kv { kv_heads: 2, key_dim: 192, value_dim: 128 } },
        LayerGroup { layers: 1, kind: LayerKind::Latent { dim: 576 } },
    ];
    let layout = layout(Geometry::new(groups, Dtype::U8).unwrap(), "sliced-interleaved");
    let offsets = [
        (0, Part::Key, 0),
        (0, Part::Value, 384),
        (1, Part::Key, 640),
        (1, Part::Value, 1024),
        (2, Part::Key, 1280),
    ];
    for (layer, part, offset) in offsets {
        assert_eq!(layout.view(layer, part).unwrap().offset, Bytes::new(offset));
    }
    assert_eq!(layout.tensors()[0].row(), Bytes::new(1856));
    assert_eq!(layout.view(2, Part::Value), None);
    check(&layout);
}

#[test]
fn a_latent_has_no_tensor_of_values() {
    let deepseek = Geometry::preset("deepseek-v3").unwrap();
    let sliced = layout(deepseek.clone(), "sliced");
    assert_eq!(sliced.tensors().len(), 1);
    assert_eq!(sliced.tensors()[0].row(), Bytes::new(61 * 1152));
    assert_eq!(sliced.view(60, Part::Key).unwrap().shape[2..], [1, 576]);
    assert_eq!(sliced.view(60, Part::Value), None);
    // 61 × 1,152 bytes have seven factors of two, a granule has 21.
    assert_eq!(sliced.tensors()[0].tokens_per_granules(), (tokens(16_384), Granules::new(549)));
    assert_eq!(layout(deepseek, "per-layer").tensors().len(), 61);
}

#[test]
fn a_thousand_slots_of_a_million_tokens_of_many_layers() {
    for choice in ["sliced", "per-layer", "grouped:7-interleaved"] {
        let config = Config::builder(Geometry::uniform(126, 8, 128, Dtype::BF16).unwrap())
            .layout(choice.parse::<LayoutChoice>().unwrap())
            .max_slots(1000)
            .max_tokens(tokens(1_000_000))
            .spare_slot(true)
            .build()
            .unwrap();
        let layout = Layout::new(&config, granule(2 << 20), Device::Cuda(0)).unwrap();
        assert_eq!(layout.slots(), 1001);
        assert!(layout.virtual_size() >= Bytes::new(1001 * 1_000_000 * 126 * 4096));
        check(&layout);
    }
}

#[test]
fn what_does_not_fit_the_addresses_is_refused_with_its_numbers() {
    // Packed it fits 2^64, but an odd row makes the stride a granule's worth of tokens.
    let config = Config::builder(Geometry::uniform(1, 1, 3, Dtype::U8).unwrap())
        .page_tokens(u32::MAX)
        .max_tokens(tokens(1 << 42))
        .build()
        .unwrap();
    let error = Layout::new(&config, granule(2 << 20), Device::Cpu).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidConfig);
    for word in ["1024 slots", "max_tokens 4398046511104", "2 MiB", "4294967295 tokens", "use a smaller"] {
        assert!(error.to_string().contains(word), "{error} does not name {word}");
    }
    let config = config.to_builder().max_slots(1).max_tokens(tokens(1 << 61)).build().unwrap();
    let error = Layout::new(&config, granule(1 << 62), Device::Cpu).unwrap_err();
    assert!(error.to_string().contains("can't be rounded up"), "{error}");
}

#[test]
fn every_preset_is_aligned_for_vector_loads() {
    for (name, _) in Geometry::presets() {
        for choice in ["sliced", "sliced-interleaved", "per-layer", "grouped:5", "grouped:5-interleaved"] {
            let layout = layout(Geometry::preset(name).unwrap(), choice);
            check(&layout);
            for layer in 0..layout.layers() {
                for view in Part::ALL.into_iter().filter_map(|part| layout.view(layer, part)) {
                    assert!(view.alignment() >= Bytes::new(16), "{name}, {choice}");
                }
            }
        }
    }
}

#[test]
fn tiles_are_whole_up_to_the_slots_end() {
    let config = Config::builder(Geometry::preset("llama-3-8b").unwrap()).tile_tokens(176).build().unwrap();
    let layout = Layout::new(&config, granule(2 << 20), Device::Cpu).unwrap();
    for (need, backed) in [
        (0, 0),
        (1, 176),
        (176, 176),
        (177, 352),
        (131_071, 131_072),
        (131_072, 131_072),
        (u64::MAX, 131_072),
    ] {
        assert_eq!(layout.round_to_tile(tokens(need)), tokens(backed));
    }
    assert_eq!(llama("sliced").round_to_tile(tokens(33)), tokens(33));
}

/// The one checker of a layout's invariants, for the tables above and the properties below.
fn check(layout: &Layout) {
    let stride = layout.stride_tokens();
    assert!(stride >= layout.max_tokens());
    assert_eq!(layout.pages_per_slot() * u64::from(layout.page_tokens), stride.get());
    let mut floor = Bytes::ZERO;
    let mut size = Bytes::ZERO;
    for tensor in layout.tensors() {
        assert!(layout.granule().divides(tensor.slot_stride()));
        assert_eq!(tensor.slot_stride(), tensor.row() * stride.get());
        assert_eq!(tensor.size(), tensor.slot_stride() * u64::from(layout.slots()));
        assert_eq!(tensor.slot_offset(layout.slots()), tensor.size());
        assert!(layout.granule().to_bytes(tensor.max_granules()) <= tensor.slot_stride());
        assert_eq!(tensor.max_granules(), tensor.granules(layout.max_tokens()));
        let (whole, granules) = tensor.tokens_per_granules();
        assert_eq!(tensor.row() * whole.get(), layout.granule().to_bytes(granules));
        floor += tensor.row();
        size += tensor.size();
    }
    assert_eq!(floor, layout.bytes_per_token());
    assert_eq!(size, layout.virtual_size());

    // The pieces of each row are packed without overlap: laid end to end they are the row.
    let mut pieces = vec![Vec::new(); layout.tensors().len()];
    for layer in 0..layout.layers() {
        for part in Part::ALL {
            let Some(view) = layout.view(layer, part) else { continue };
            let tensor = &layout.tensors()[view.tensor];
            assert!(tensor.layers().contains(&layer) && tensor.parts().contains(&part));
            let element = view.dtype.bytes().get();
            assert_eq!(view.offset.get() % element, 0);
            assert_eq!(view.strides[0] * element, tensor.slot_stride().get());
            assert_eq!(view.strides[1] * element, tensor.row().get());
            assert_eq!(view.strides[2..], [view.shape[3], 1]);
            assert_eq!(view.shape[..2], [u64::from(layout.slots()), layout.max_tokens().get()]);
            let end = view.offset.get() + view.shape[2] * view.shape[3] * element;
            pieces[view.tensor].push((view.offset.get(), end));
            assert!(view.alignment() >= view.dtype.bytes().min(layout.granule().bytes()));
            let last = view.shape.map(|length| length - 1);
            assert!(view.byte_offset(last).unwrap() + view.dtype.bytes() <= tensor.size());
            assert_eq!(view.byte_offset(view.shape), None);
        }
    }
    for (tensor, mut pieces) in layout.tensors().iter().zip(pieces) {
        pieces.sort_unstable();
        let end = pieces.into_iter().fold(0, |end, piece| {
            assert_eq!(piece.0, end, "pieces overlap or leave a gap");
            piece.1
        });
        assert_eq!(end, tensor.row().get());
    }
}

fn kinds() -> impl Strategy<Value = LayerKind> {
    let dim = || prop_oneof![Just(64_u32), Just(80), Just(128), 1..700_u32];
    prop_oneof![
        3 => (1..33_u32, dim(), dim())
            .prop_map(|(kv_heads, key_dim, value_dim)| LayerKind::Kv { kv_heads, key_dim, value_dim }),
        // Tokens larger than a granule.
        1 => (1..5_u32, 1..200_000_u32)
            .prop_map(|(kv_heads, dim)| LayerKind::Kv { kv_heads, key_dim: dim, value_dim: 64 }),
        1 => dim().prop_map(|dim| LayerKind::Latent { dim }),
    ]
}

fn geometries() -> impl Strategy<Value = Geometry> {
    let groups = prop::collection::vec(
        (1..60_u32, kinds()).prop_map(|(layers, kind)| LayerGroup { layers, kind }),
        1..5,
    );
    (groups, prop::sample::select(&Dtype::ALL[..]))
        .prop_map(|(groups, dtype)| Geometry::new(groups, dtype).unwrap())
}

fn choices() -> impl Strategy<Value = LayoutChoice> {
    let kind = prop_oneof![
        Just(LayoutKind::PerLayer),
        Just(LayoutKind::Sliced),
        (1..100_u32).prop_map(LayoutKind::Grouped),
    ];
    let order = prop_oneof![Just(KvOrder::Apart), Just(KvOrder::Interleaved)];
    (kind, order).prop_map(|(kind, order)| LayoutChoice { kind, order })
}

fn layouts() -> impl Strategy<Value = Layout> {
    let max_tokens = prop_oneof![1..40_u64, 1..1_000_001_u64, Just(1_000_000)];
    let page = prop_oneof![Just(16_u32), Just(1), 1..300_u32];
    (geometries(), choices(), 1..1001_u32, any::<bool>(), max_tokens, page, 12..22_u32).prop_filter_map(
        "all tensors fit 64 bits of addresses",
        |(geometry, choice, slots, spare, max_tokens, page, shift)| {
            let config = Config::builder(geometry)
                .layout(choice)
                .max_slots(slots)
                .spare_slot(spare)
                .max_tokens(tokens(max_tokens))
                .page_tokens(page)
                .build()
                .unwrap();
            Layout::new(&config, granule(1 << shift), Device::Cpu).ok()
        },
    )
}

/// A point of the shape, from four fractions.
fn within(shape: [u64; 4], at: [prop::sample::Index; 4]) -> [u64; 4] {
    std::array::from_fn(|dimension| {
        let length = usize::try_from(shape[dimension]).unwrap();
        u64::try_from(at[dimension].index(length)).unwrap()
    })
}

type Point = (prop::sample::Index, Part, [prop::sample::Index; 4]);

fn points() -> impl Strategy<Value = Vec<Point>> {
    let part = prop_oneof![Just(Part::Key), Just(Part::Value)];
    prop::collection::vec((any::<prop::sample::Index>(), part, any::<[prop::sample::Index; 4]>()), 2..40)
}

proptest! {
    #[test]
    fn any_layout_keeps_its_invariants(layout in layouts()) {
        check(&layout);
    }

    #[test]
    fn every_byte_of_a_small_cache_belongs_to_one_element(
        groups in prop::collection::vec((1..4_u32, 1..4_u32, 1..6_u32, 1..6_u32, any::<bool>()), 1..3),
        dtype in prop::sample::select(&Dtype::ALL[..]),
        choice in choices(),
        (slots, most, page, shift) in (1..4_u32, 1..6_u64, 1..5_u32, 0..8_u32),
    ) {
        let groups = groups.into_iter().map(|(layers, kv_heads, key_dim, value_dim, latent)| {
            let kv = LayerKind::Kv { kv_heads, key_dim, value_dim };
            LayerGroup { layers, kind: if latent { LayerKind::Latent { dim: key_dim } } else { kv } }
        });
        let config = Config::builder(Geometry::new(groups.collect(), dtype).unwrap())
            .layout(choice)
            .max_slots(slots)
            .max_tokens(tokens(most))
            .page_tokens(page)
            .build()
            .unwrap();
        let layout = Layout::new(&config, granule(1 << shift), Device::Cpu).unwrap();
        check(&layout);
        let mut seen = std::collections::HashSet::new();
        for layer in 0..layout.layers() {
            for view in Part::ALL.into_iter().filter_map(|part| layout.view(layer, part)) {
                let [_, tokens, heads, dims] = view.shape;
                for slot in 0..u64::from(slots) {
                    for place in 0..tokens * heads * dims {
                        let at = [slot, place / dims / heads, place / dims % heads, place % dims];
                        let offset = view.byte_offset(at).unwrap().get();
                        for byte in offset..offset + dtype.bytes().get() {
                            prop_assert!(seen.insert((view.tensor, byte)));
                        }
                    }
                }
            }
        }
        let packed = layout.bytes_per_token() * most * u64::from(slots);
        prop_assert_eq!(Bytes::new(crate::units::wide(seen.len())), packed);
    }

    #[test]
    fn distinct_elements_lie_apart_and_every_reading_agrees(layout in layouts(), points in points()) {
        let mut seen = std::collections::HashMap::new();
        let layers = usize::try_from(layout.layers()).unwrap();
        for (layer, part, at) in points {
            let layer = u32::try_from(layer.index(layers)).unwrap();
            let Some(view) = layout.view(layer, part) else { continue };
            let at @ [slot, token, head, dim] = within(view.shape, at);
            let offset = view.byte_offset(at).unwrap();
            for byte in 0..view.dtype.bytes().get() {
                let owner = seen.insert((view.tensor, offset.get() + byte), (layer, part, at));
                prop_assert!(owner.is_none_or(|owner| owner == (layer, part, at)));
            }
            let tensor = &layout.tensors()[view.tensor];
            let start = tensor.slot_offset(u32::try_from(slot).unwrap());
            prop_assert!(offset >= start && offset < start + tensor.slot_stride());
            let backed = layout.granule().to_bytes(tensor.granules(tokens(token + 1)));
            prop_assert!(offset + view.dtype.bytes() <= start + backed);
            let first = view.byte_offset([slot, token, head, 0]).unwrap();
            prop_assert_eq!(first.get() % view.alignment().get(), 0);

            let pages = layout.paged_view(layer, part).unwrap();
            let page_tokens = pages.shape[1];
            let page = slot * layout.pages_per_slot() + token / page_tokens;
            prop_assert_eq!(pages.byte_offset([page, token % page_tokens, head, dim]), Some(offset));
            let row = layout.token_view(layer, part).unwrap();
            let nth = slot * layout.stride_tokens().get() + token;
            prop_assert_eq!(row.byte_offset([0, nth, head, dim]), Some(offset));
        }
    }

    #[test]
    fn granules_and_tokens_answer_each_other(layout in layouts(), at in any::<prop::sample::Index>()) {
        let most = usize::try_from(layout.max_tokens().get()).unwrap();
        let need = tokens(u64::try_from(at.index(most + 1)).unwrap());
        for tensor in layout.tensors() {
            let granules = tensor.granules(need);
            prop_assert!(tensor.tokens_within(granules) >= need);
            prop_assert!(need.is_zero() || tensor.tokens_within(granules - Granules::new(1)) < need);
            prop_assert!(tensor.granules(tensor.tokens_within(granules)) <= granules);
        }
        let total: Granules = layout.tensors().iter().map(|tensor| tensor.granules(need)).sum();
        prop_assert_eq!(layout.granules_for(need), total);
        let held = layout.granule().to_bytes(total);
        prop_assert_eq!(layout.waste(need), held - layout.bytes_per_token() * need.get());
    }
}
