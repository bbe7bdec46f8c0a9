//! The probe as its users meet it, and both subcommands on a GPU where there is one.

#![expect(clippy::unwrap_used, reason = "a failure to start or to read is a failure of the test")]

use std::process::Command;
use std::sync::{Mutex, PoisonError};

use serde_json::Value;

/// Exit code, stdout and stderr.
fn vattn(args: &[&str]) -> (i32, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_vattn")).args(args).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

fn json(args: &[&str]) -> Vec<Value> {
    let (code, out, err) = vattn(args);
    assert_eq!(code, 0, "{args:?}: {err}");
    out.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Why there is no GPU; `None` where there is one.
fn no_gpu() -> Option<String> {
    vattn::driver::cuda::devices().err().map(|error| error.report())
}

/// Whoever uses the card is alone on it, since its free memory is told for all.
static CARD: Mutex<()> = Mutex::new(());

/// Says that a test is skipped, which is a failure where a GPU is required.
fn skip(why: &str) {
    println!("SKIP: no GPU: {why}");
    let required = std::env::var("VATTN_REQUIRE_GPU").is_ok_and(|value| value == "1");
    assert!(!required, "VATTN_REQUIRE_GPU=1: {why}");
}

fn number(value: &Value, pointer: &str) -> f64 {
    value.pointer(pointer).and_then(Value::as_f64).unwrap_or_else(|| panic!("no {pointer} in {value}"))
}

/// What holds of every device.
fn is_sane(probe: &Value) {
    for part in ["handles", "addresses", "mappings", "latencies"] {
        assert_eq!(probe[part]["ended"], "done", "{part}: {probe}");
        assert_eq!(probe[part]["why"], Value::Null, "{part}");
    }
    for trial in &probe["handles"]["answer"].as_array().unwrap()[..4] {
        assert_eq!(trial["works"], true, "{trial}");
    }
    let largest = number(probe, "/addresses/answer/largest_bytes");
    let in_all = number(probe, "/addresses/answer/all/total_bytes");
    assert!((2_f64.powi(21)..=2_f64.powi(47)).contains(&largest) && in_all >= largest, "{largest} {in_all}");
    assert!(number(probe, "/mappings/answer/mappings") >= 1000.0, "{probe}");
    assert!(number(probe, "/mappings/answer/first_us") > 0.0, "{probe}");
    let rows = probe["latencies"]["answer"]["by_size"].as_array().unwrap();
    assert!(rows.len() >= 6, "{probe}");
    for (exponent, row) in (0..).zip(rows) {
        assert_eq!(number(row, "/size_bytes"), 2_f64.powi(21 + exponent), "{row}");
        for verb in ["create", "map", "set_access", "unmap", "release"] {
            let [median, p99] = ["median", "p99"].map(|name| number(row, &format!("/{verb}/{name}_us")));
            assert!(median >= 0.0 && p99 >= median && p99 < 1e7, "{verb}: {row}");
        }
        assert!(number(row, "/set_access/median_us") > 0.0, "{row}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_probe_of_the_host_gives_sane_figures() {
    let probe = &json(&["probe", "--device", "host", "--quick", "--json"])[0];
    is_sane(probe);
    assert_eq!(probe["no_gpu"], Value::Null);
    assert_eq!(probe["machine"]["device"]["kind"], "host");
    let limit = number(probe, "/machine/device/max_map_count");
    let mapped = number(probe, "/mappings/answer/mappings");
    assert!(mapped < limit, "{mapped} mappings, and the kernel's limit is {limit}");
    assert_ne!(probe["mappings"]["answer"]["stopped"], Value::Null);
}

#[cfg(target_os = "linux")]
#[test]
fn without_a_wish_it_says_what_it_probes_and_why() {
    let _alone = CARD.lock().unwrap_or_else(PoisonError::into_inner);
    let (code, out, err) = vattn(&["probe", "--quick"]);
    assert_eq!(code, 0, "{err}");
    assert_eq!(err, "");
    assert!(out.contains("Latencies in µs") && out.contains("set_access"), "{out}");
    match no_gpu() {
        Some(why) => {
            assert!(out.contains(&format!("No GPU can be used, so this is the host: {why}")), "{out}");
            assert!(out.contains("vm.max_map_count"), "{out}");
        }
        None => assert!(out.contains("compute capability"), "{out}"),
    }
}

#[test]
fn what_maps_nothing_or_is_not_there_is_refused() {
    let (code, _, err) = vattn(&["probe", "--device", "ledger"]);
    assert!(code == 2 && err.contains("the ledger maps nothing"), "{err}");
    let (code, _, err) = vattn(&["probe", "--device", "cuda:4000"]);
    match no_gpu() {
        Some(why) => assert_eq!((code, err), (1, format!("error: {why}\n"))),
        None => assert!(code == 2 && err.contains("there is no CUDA device 4000"), "{err}"),
    }
}

#[test]
fn a_replay_on_a_card_needs_one() {
    let Some(why) = no_gpu() else { return };
    assert_eq!(vattn(&["replay", "--device", "cuda"]), (1, String::new(), format!("error: {why}\n")));
}

#[test]
fn a_probe_of_a_card_gives_sane_figures() {
    if let Some(why) = no_gpu() {
        return skip(&why);
    }
    let _alone = CARD.lock().unwrap_or_else(PoisonError::into_inner);
    let probe = &json(&["probe", "--device", "cuda", "--quick", "--json"])[0];
    is_sane(probe);
    assert_eq!(probe["machine"]["device"]["kind"], "cuda");
    assert!(number(probe, "/machine/device/free_bytes") > 0.0);
}

#[test]
fn a_replay_gives_a_card_everything_back() {
    if let Some(why) = no_gpu() {
        return skip(&why);
    }
    let _alone = CARD.lock().unwrap_or_else(PoisonError::into_inner);
    let policies = "vattn,vattention,vattention-ahead,paged,static";
    let args = [
        "--device",
        "cuda",
        "--format",
        "json",
        "--limit",
        "200",
        "--budget",
        "8GiB",
        "--max-tokens",
        "8192",
    ];
    let reports = json(&[&["replay", "--policy", policies], &args[..]].concat());
    assert_eq!(reports.len(), 5);
    for report in reports {
        assert_eq!(report["driver"], "cuda");
        assert_eq!(report["leaked"]["extents"], 0, "{report}");
        assert_eq!(report["leaked"]["mappings"], 0, "{report}");
        assert_eq!(report["leaked"]["reservations"], 0, "{report}");
        assert_eq!(report["device_free_bytes"]["before"], report["device_free_bytes"]["after"], "{report}");
    }
    let (code, _, err) = vattn(&["replay", "--device", "cuda", "--granule", "64MiB"]);
    assert!(code == 2 && err.contains("--granule is 64 MiB, and cuda:"), "{err}");
    let (code, _, err) = vattn(&["replay", "--device", "cuda", "--budget", "900TiB"]);
    assert!(code == 2 && err.contains("--budget is 900 TiB, and cuda:"), "{err}");
}
