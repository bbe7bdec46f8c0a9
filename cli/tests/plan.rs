//! `vattn plan` as its users meet it: output, errors and exit codes.

#![expect(clippy::unwrap_used, reason = "a failure to start or to read is a failure of the test")]

use std::process::Command;

/// The exit code, and what was printed on stdout and stderr.
fn plan(options: &str) -> (i32, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_vattn"))
        .arg("plan")
        .args(options.split_whitespace())
        .output()
        .unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

fn keys(value: &serde_json::Value) -> Vec<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

fn sorted(names: &str) -> Vec<&str> {
    let mut names: Vec<_> = names.split_whitespace().collect();
    names.sort_unstable();
    names
}

#[test]
fn json_has_the_promised_fields_and_nothing_else() {
    let (code, out, err) = plan("--json --max-tokens 40000 --weights 16GiB");
    assert_eq!((code, err.as_str()), (0, ""));
    let plan: serde_json::Value = serde_json::from_str(&out).unwrap();
    let fields = "model geometry bytes_per_token chip memory_bytes weights_bytes cache_bytes granule_bytes max_slots \
                  max_tokens tile_tokens layouts kernels warnings recommended";
    assert_eq!(keys(&plan), sorted(fields));
    assert_eq!(plan["cache_bytes"].as_u64().unwrap(), (143_771 << 20) - (16 << 30));
    let layouts = plan["layouts"].as_array().unwrap();
    for layout in layouts {
        let fields = "layout tensors tokens_per_granule token_stride_bytes token_stride_pieces slower_decode_percent \
                      virtual_bytes last_element obstacle cache";
        assert_eq!(keys(layout), sorted(fields));
        let cache = &layout["cache"];
        assert_eq!(keys(cache), ["prompts", "reference", "requests", "waste"]);
        let prompts: Vec<_> =
            cache["prompts"].as_array().unwrap().iter().map(|prompt| &prompt["tokens"]).collect();
        assert_eq!(prompts, [1024, 8192, 32_768]);
        assert!(cache["waste"]["mean_bytes"].as_f64().unwrap() > 0.0);
    }
    let recommended = plan["recommended"]["layout"].as_str().unwrap();
    assert!(layouts.iter().any(|layout| layout["layout"] == recommended));
    assert_eq!(keys(&plan["kernels"][0]), ["call", "evidence", "name", "tile_tokens"]);
}

#[test]
fn tables_have_a_line_for_each_layout() {
    let (code, out, err) = plan("--max-tokens 9000 --layout sliced,per-layer --weights 100GiB");
    assert_eq!((code, err.as_str()), (0, ""));
    for layout in ["sliced ", "per-layer "] {
        assert_eq!(out.lines().filter(|line| line.starts_with(layout)).count(), 3, "{out}");
    }
    assert!(out.contains("Recommended: --layout sliced, since"), "{out}");
    assert!(out.contains("40.4 GiB for the cache of 140.4 GiB after 100.0 GiB for weights"), "{out}");
}

#[test]
fn bad_arguments_are_code_2() {
    for (options, says) in [
        ("--weights 200GiB", "--weights is 200 GiB, and the memory is 140.40 GiB"),
        ("--memory 141GB", "'141GB' is not a size; write 64GiB"),
        ("--memory 1MiB", "no layout can be used, not even sliced-interleaved: the budget is 1 MiB"),
        ("--chip v100", "possible values: h200, h100"),
        ("--model no-such-model", "no model is known as \"no-such-model\""),
        ("--granule 3MiB", "--granule is 3 MiB; a power of two"),
        ("--layout round", "\"round\" is no layout; use per-layer"),
        ("--kernel fa4", "no kernel is known as \"fa4\": use one of fa3-decode"),
        (
            "--kernel flashinfer --model deepseek-v3",
            "--kernel flashinfer: how far it reads is not known for 61 layers",
        ),
        ("--kernel fa3-view --tile-tokens 3", "cannot be used with"),
        ("--dtype int3", "\"int3\" is no element type"),
        ("--max-tokens 0", "0 is not in 1.."),
        ("--max-tokens 99999999999999", "need 2^64 addresses or more"),
    ] {
        let (code, out, err) = plan(options);
        assert_eq!((code, out.as_str()), (2, ""), "{options}: {err}");
        assert!(err.contains(says), "{options}: {err}");
    }
}

#[test]
fn help_defines_the_numbers() {
    let (code, out, _) = plan("--help");
    assert_eq!(code, 0);
    for says in ["bytes mapped less bytes that the tokens fill", "112 TiB", "fewest mappings", "143,771 MiB"]
    {
        assert!(out.contains(says), "{says}: {out}");
    }
}
