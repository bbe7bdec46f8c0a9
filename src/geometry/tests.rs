use proptest::prelude::*;

use super::*;

fn refused(result: Result<Geometry>, words: &[&str]) {
    let error = result.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidGeometry, "{error}");
    for word in words {
        assert!(error.report().contains(word), "{} does not name {word}", error.report());
    }
}

fn hf(json: &str) -> Geometry {
    Geometry::from_hf_config(json, 1).unwrap()
}

fn preset(name: &str) -> Geometry {
    Geometry::preset(name).unwrap()
}

const LLAMA_3_8B: &str = r#"{
    "architectures": ["LlamaForCausalLM"], "attention_bias": false, "bos_token_id": 128000,
    "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
    "max_position_embeddings": 8192, "model_type": "llama", "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_scaling": null,
    "rope_theta": 500000.0, "torch_dtype": "bfloat16", "use_cache": true, "vocab_size": 128256
}"#;

const YI_34B: &str = r#"{
    "architectures": ["LlamaForCausalLM"], "hidden_size": 7168, "intermediate_size": 20480,
    "max_position_embeddings": 4096, "model_type": "llama", "num_attention_heads": 56,
    "num_hidden_layers": 60, "num_key_value_heads": 8, "torch_dtype": "bfloat16", "vocab_size": 64000
}"#;

const QWEN3_32B: &str = r#"{
    "architectures": ["Qwen3ForCausalLM"], "head_dim": 128, "hidden_size": 5120,
    "max_window_layers": 64, "model_type": "qwen3", "num_attention_heads": 64,
    "num_hidden_layers": 64, "num_key_value_heads": 8, "sliding_window": null,
    "torch_dtype": "bfloat16", "use_sliding_window": false
}"#;

const MISTRAL_7B: &str = r#"{
    "architectures": ["MistralForCausalLM"], "head_dim": null, "hidden_size": 4096,
    "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "sliding_window": 4096, "dtype": "bfloat16"
}"#;

const GEMMA_3_27B: &str = r#"{
    "architectures": ["Gemma3ForConditionalGeneration"], "mm_tokens_per_image": 256,
    "model_type": "gemma3", "torch_dtype": "bfloat16",
    "text_config": {
        "head_dim": 128, "hidden_size": 5376, "intermediate_size": 21504, "model_type": "gemma3_text",
        "num_attention_heads": 32, "num_hidden_layers": 62, "num_key_value_heads": 16,
        "query_pre_attn_scalar": 168, "sliding_window": 1024
    },
    "vision_config": { "hidden_size": 1152, "num_attention_heads": 16, "num_hidden_layers": 27 }
}"#;

/// The 4B states neither heads nor their size, and means those of its class.
const GEMMA_3_4B: &str = r#"{
    "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
        "num_hidden_layers": 34, "sliding_window": 1024, "torch_dtype": "bfloat16"
    }
}"#;

const DEEPSEEK_V3: &str = r#"{
    "architectures": ["DeepseekV3ForCausalLM"], "hidden_size": 7168, "kv_lora_rank": 512,
    "model_type": "deepseek_v3", "num_attention_heads": 128, "num_hidden_layers": 61,
    "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "torch_dtype": "bfloat16", "v_head_dim": 128
}"#;

const GPT_OSS_20B: &str = r#"{
    "head_dim": 64, "hidden_size": 2880, "model_type": "gpt_oss", "num_attention_heads": 64,
    "num_hidden_layers": 24, "num_key_value_heads": 8, "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
}"#;

#[test]
fn published_configurations_are_the_presets() {
    for (json, name) in [
        (LLAMA_3_8B, "llama-3-8b"),
        (YI_34B, "yi-34b"),
        (QWEN3_32B, "qwen3-32b"),
        (MISTRAL_7B, "mistral-7b"),
        (GEMMA_3_27B, "gemma-3-27b"),
        (DEEPSEEK_V3, "deepseek-v3"),
        (GPT_OSS_20B, "gpt-oss-20b"),
    ] {
        assert_eq!(hf(json), preset(name), "{name}");
    }
    assert_eq!(hf(GEMMA_3_4B), Geometry::uniform(34, 4, 256, Dtype::BF16).unwrap());
}

#[test]
fn presets_say_what_they_are() {
    assert_eq!(preset("llama-3-8b").bytes_per_token(), Bytes::new(131_072));
    assert_eq!(preset("deepseek-v3").bytes_per_token(), Bytes::new(61 * 576 * 2));
    assert_eq!(preset("Yi-6B").to_string(), "32 layers of 4 KV heads of 128, bfloat16: 64 KiB a token");
    for (name, description) in Geometry::presets() {
        let geometry = preset(name);
        let LayerGroup { layers, kind } = geometry.groups()[0];
        let dims = match kind {
            LayerKind::Kv { kv_heads, key_dim, .. } => format!("{kv_heads} KV heads of {key_dim}"),
            LayerKind::Latent { .. } => "a latent of 512 + 64".to_owned(),
        };
        assert!(description.ends_with(&format!(": {layers} layers, {dims}")), "{description}");
        assert_eq!(name, name.to_lowercase());
    }
    refused(Geometry::preset("gpt-5"), &["\"gpt-5\"", "llama-3-8b", "deepseek-v3"]);
}

#[test]
fn fields_left_out_have_their_meaning() {
    let base = r#""num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4"#;
    assert_eq!(hf(&format!("{{{base}}}")), Geometry::uniform(2, 4, 16, Dtype::BF16).unwrap());
    for (extra, expected) in [
        (r#""multi_query": true, "num_kv_heads": 4"#, Geometry::uniform(2, 1, 16, Dtype::BF16)),
        (r#""num_kv_heads": 2"#, Geometry::uniform(2, 2, 16, Dtype::BF16)),
        (r#""torch_dtype": "float32""#, Geometry::uniform(2, 4, 16, Dtype::F32)),
        (r#""torch_dtype": "float32", "dtype": "torch.float16""#, Geometry::uniform(2, 4, 16, Dtype::F16)),
        (r#""kv_lora_rank": null, "text_config": null"#, Geometry::uniform(2, 4, 16, Dtype::BF16)),
        (r#""text_config": {"num_hidden_layers": 7}"#, Geometry::uniform(7, 4, 16, Dtype::BF16)),
        (
            r#""is_encoder_decoder": false, "num_kv_shared_layers": 0"#,
            Geometry::uniform(2, 4, 16, Dtype::BF16),
        ),
    ] {
        assert_eq!(hf(&format!("{{{base}, {extra}}}")), expected.unwrap(), "{extra}");
    }
    let wider = hf(&format!(r#"{{{base}, "head_dim": 192, "v_head_dim": 128}}"#));
    assert_eq!(wider.layer_kind(1), Some(&LayerKind::Kv { kv_heads: 4, key_dim: 192, value_dim: 128 }));
}

#[test]
fn a_configuration_that_cannot_be_read_says_what_it_lacks() {
    for (json, words) in [
        ("", &["not JSON"][..]),
        ("[1]", &["not a JSON object"]),
        (r#"{"text_config": 3}"#, &["text_config"]),
        ("{}", &["lacks num_hidden_layers"]),
        (r#"{"text_config": {}}"#, &["lacks num_hidden_layers", "neither in text_config nor at the top"]),
        (r#"{"num_hidden_layers": 1}"#, &["lacks num_attention_heads"]),
        (r#"{"num_hidden_layers": 1, "num_attention_heads": 4}"#, &["lacks head_dim or hidden_size"]),
        (r#"{"num_hidden_layers": 1, "kv_lora_rank": 4}"#, &["lacks qk_rope_head_dim"]),
        (r#"{"num_hidden_layers": 0}"#, &["num_hidden_layers", "is 0", "from 1 to"]),
        (r#"{"text_config": {"num_hidden_layers": "2"}}"#, &["text_config.num_hidden_layers", "\"2\""]),
        (r#"{"num_hidden_layers": 5000000000}"#, &["5000000000"]),
        (
            r#"{"num_hidden_layers": 1, "num_attention_heads": 3, "hidden_size": 64}"#,
            &["hidden_size 64", "num_attention_heads 3", "head_dim"],
        ),
        (
            r#"{"num_hidden_layers": 1, "num_attention_heads": 1, "head_dim": 8, "torch_dtype": "int4"}"#,
            &["torch_dtype", "\"int4\"", "bfloat16"],
        ),
        (
            r#"{"num_hidden_layers": 2, "layer_types": ["full_attention", "linear_attention"]}"#,
            &["layer 1", "\"linear_attention\"", "by their dimensions"],
        ),
        (
            r#"{"num_hidden_layers": 2, "text_config": {"num_kv_shared_layers": 1}}"#,
            &["num_kv_shared_layers"],
        ),
        (r#"{"num_hidden_layers": 2, "global_head_dim": 512}"#, &["global_head_dim"]),
    ] {
        refused(Geometry::from_hf_config(json, 1), words);
    }
}

#[test]
fn heads_are_divided_or_replicated() {
    let llama = preset("llama-3-8b");
    for (ranks, heads) in [(1, 8), (2, 4), (8, 1), (16, 1), (64, 1)] {
        let expected = Geometry::uniform(32, heads, 128, Dtype::BF16).unwrap();
        assert_eq!(llama.with_tensor_parallel(ranks).unwrap(), expected);
        assert_eq!(Geometry::from_hf_config(LLAMA_3_8B, ranks).unwrap(), expected);
    }
    for ranks in [3, 6, 12] {
        refused(llama.with_tensor_parallel(ranks), &["8 KV heads", &ranks.to_string(), "multiple"]);
    }
    refused(llama.with_tensor_parallel(0), &["degree of 0"]);
    let deepseek = preset("deepseek-v3");
    assert_eq!(deepseek.with_tensor_parallel(7).unwrap(), deepseek);
}

#[test]
fn dimensions_that_cannot_be_are_refused_by_name() {
    let dtype = Dtype::F32;
    refused(Geometry::new(Vec::new(), dtype), &["without layers"]);
    refused(Geometry::uniform(0, 8, 128, dtype), &["group 0", "0 layers"]);
    refused(Geometry::uniform(1, 0, 128, dtype), &["kv_heads", "group 0"]);
    refused(Geometry::uniform(1, 8, 0, dtype), &["key_dim"]);
    refused(Geometry::mla(1, 0, dtype), &["dim of layer group 0"]);
    let keys_only = LayerKind::Kv { kv_heads: 1, key_dim: 1, value_dim: 0 };
    refused(Geometry::new(vec![LayerGroup { layers: 1, kind: keys_only }], dtype), &["value_dim", "latent"]);
    refused(Geometry::uniform(u32::MAX, 8, 128, dtype), &["4294967295 layers", "65536"]);
    refused(Geometry::uniform(1, u32::MAX, u32::MAX, dtype), &["2^64", "4294967295 KV heads"]);
    // 2^61 bytes and a little in each layer.
    let heavy = LayerKind::Kv { kv_heads: 1 << 29, key_dim: 1 << 30, value_dim: 1 };
    let groups = [7, 1].map(|layers| LayerGroup { layers, kind: heavy });
    refused(Geometry::new(groups.to_vec(), dtype), &["2^64", "group 1", "1 layer of", "float32"]);
}

#[test]
fn dtypes_read_back() {
    for dtype in Dtype::ALL {
        assert_eq!(dtype.to_string().parse::<Dtype>().unwrap(), dtype);
        assert_eq!(format!("torch.{dtype}").parse::<Dtype>().unwrap(), dtype);
    }
    assert_eq!(Dtype::ALL.map(|dtype| dtype.bytes().get()), [4, 2, 2, 1, 1, 1, 1]);
}

proptest! {
    #[test]
    fn the_packed_floor_is_the_sum_of_all_pieces(
        groups in prop::collection::vec((1..150_u32, 1..65_u32, 1..600_u32, 1..600_u32, any::<bool>()), 1..6),
        dtype in prop::sample::select(&Dtype::ALL[..]),
    ) {
        let groups: Vec<_> = groups
            .into_iter()
            .map(|(layers, kv_heads, key_dim, value_dim, latent)| {
                let kind = if latent {
                    LayerKind::Latent { dim: key_dim }
                } else {
                    LayerKind::Kv { kv_heads, key_dim, value_dim }
                };
                LayerGroup { layers, kind }
            })
            .collect();
        let geometry = Geometry::new(groups.clone(), dtype).unwrap();
        prop_assert_eq!(geometry.layers(), groups.iter().map(|group| group.layers).sum::<u32>());
        let mut floor = 0;
        let mut kinds = geometry.layer_kinds();
        for layer in 0..geometry.layers() {
            let kind = geometry.layer_kind(layer).unwrap();
            prop_assert_eq!(kinds.next(), Some(kind));
            let pieces = Part::ALL.into_iter().filter_map(|part| kind.piece(part));
            floor += pieces.map(Piece::elements).sum::<u64>() * dtype.bytes().get();
        }
        prop_assert_eq!(kinds.next(), None);
        prop_assert_eq!(geometry.layer_kind(geometry.layers()), None);
        prop_assert_eq!(geometry.bytes_per_token(), Bytes::new(floor));
        // Cut into single layers it is the same model.
        let single: Vec<_> = geometry.layer_kinds().map(|&kind| LayerGroup { layers: 1, kind }).collect();
        prop_assert_eq!(&Geometry::new(single, dtype).unwrap(), &geometry);
    }
}
