//! The program as its users meet it: output, errors and exit codes.

#![expect(clippy::unwrap_used, reason = "a failure to start or to read is a failure of the test")]

mod html;

use std::path::PathBuf;
use std::process::{Command, Output};

fn vattn(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vattn")).args(args).output().unwrap()
}

fn code(output: &Output) -> i32 {
    output.status.code().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// A trace file that is gone with the test.
struct Trace(PathBuf);

impl Trace {
    fn new(name: &str, text: &str) -> Self {
        let path = std::env::temp_dir().join(format!("vattn-{}-{name}", std::process::id()));
        std::fs::write(&path, text).unwrap();
        Self(path)
    }

    fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

const POLICIES: &str = "vattn,vattention,vattention-ahead,paged,static";

/// Small enough to be served in a blink.
fn json(policies: &str, more: &[&str]) -> Vec<serde_json::Value> {
    let args = [
        "replay",
        "--device",
        "ledger",
        "--format",
        "json",
        "--policy",
        policies,
        "--limit",
        "300",
        "--budget",
        "16GiB",
        "--max-tokens",
        "65536",
    ];
    let output = vattn(&[&args[..], more].concat());
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    assert_eq!(stderr(&output), "");
    stdout(&output).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn json_has_the_promised_fields_and_nothing_else() {
    let keys = |value: &serde_json::Value| -> Vec<String> {
        value.as_object().unwrap().keys().map(ToOwned::to_owned).collect()
    };
    let sorted = |names: &[&str]| -> Vec<String> {
        let mut names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        names.sort_unstable();
        names
    };
    let reports = json(POLICIES, &[]);
    assert_eq!(reports.len(), POLICIES.split(',').count());
    for report in &reports {
        assert_eq!(
            keys(report),
            sorted(&[
                "driver",
                "policy",
                "model",
                "layout",
                "trace",
                "requests",
                "completed",
                "rejected",
                "preempted",
                "steps",
                "simulated_seconds",
                "driver_calls",
                "modelled_driver_seconds",
                "step_ns",
                "bytes",
                "mapped_over_needed",
                "held_over_needed",
                "active_slots",
                "adopted",
                "reclaimed",
                "leaked",
                "device",
                "budget_bytes",
                "device_free_bytes",
                "driver_seconds_on_path",
                "driver_seconds_off_path",
                "driver_seconds_start_and_end",
                "longest_stall_seconds",
                "driver_calls_off_path"
            ])
        );
        let calls = ["reserve", "create", "map", "set_access", "unmap", "release"];
        assert_eq!(keys(&report["driver_calls"]), sorted(&calls));
        assert_eq!(keys(&report["driver_calls_off_path"]), sorted(&calls));
        assert_eq!(keys(&report["step_ns"]), sorted(&["p50", "p99", "max"]));
        assert_eq!(keys(&report["bytes"]), sorted(&["peak_needed", "peak_mapped", "peak_held"]));
        assert_eq!(keys(&report["active_slots"]), sorted(&["mean", "peak"]));
        assert_eq!(keys(&report["leaked"]), sorted(&["extents", "mappings", "reservations"]));
        assert_eq!(keys(&report["device_free_bytes"]), sorted(&["before", "after"]));
        assert_eq!(report["device"], "ledger");
        assert_eq!(report["budget_bytes"], 16_u64 << 30);
        let free = &report["device_free_bytes"];
        assert_eq!(free["after"], free["before"], "{report}");
        assert!(free["before"].as_u64() >= report["budget_bytes"].as_u64(), "{report}");
        assert_eq!(report["requests"], 300);
        assert_eq!(report["completed"].as_u64().unwrap() + report["rejected"].as_u64().unwrap(), 300);
        for what in ["extents", "mappings", "reservations"] {
            assert_eq!(report["leaked"][what], 0, "{report}");
        }
    }
}

fn seconds(report: &serde_json::Value, name: &str) -> f64 {
    report[name].as_f64().unwrap_or_else(|| panic!("{name}: {report}"))
}

#[test]
fn driver_time_is_told_by_who_waits_for_it() {
    for report in json(POLICIES, &[]) {
        let [on, off, other] = ["on_path", "off_path", "start_and_end"]
            .map(|part| seconds(&report, &format!("driver_seconds_{part}")));
        let all = seconds(&report, "modelled_driver_seconds");
        assert!((on + off + other - all).abs() < 1e-9, "{report}");
        let longest = seconds(&report, "longest_stall_seconds");
        assert!(other > 0.0 && (0.0..=on).contains(&longest), "{report}");
        let beside = report["driver_calls_off_path"]["map"].as_u64().unwrap();
        assert!(beside <= report["driver_calls"]["map"].as_u64().unwrap(), "{report}");
        match report["policy"].as_str().unwrap() {
            "paged" | "static" => assert!(on <= 0.0 && off <= 0.0 && beside == 0, "{report}"),
            "vattention" => assert!(on > 0.0 && longest > 0.0 && off <= 0.0 && beside == 0, "{report}"),
            "vattention-ahead" => assert!(on > 0.0 && off > 0.0 && beside > 0, "{report}"),
            _ => assert!(on > 0.0 && longest > 0.0 && off > 0.0 && beside > 0, "{report}"),
        }
    }
}

#[test]
fn without_a_background_vattn_does_everything_on_the_path() {
    let reports = json("vattn", &["--background", "off"]);
    assert!(seconds(&reports[0], "driver_seconds_off_path") <= 0.0, "{}", reports[0]);
    assert_eq!(reports[0]["driver_calls_off_path"]["map"], 0);
}

#[test]
fn the_same_arguments_give_the_same_numbers() {
    let without_times = || -> Vec<serde_json::Value> {
        let mut reports = json(POLICIES, &[]);
        for report in &mut reports {
            report.as_object_mut().unwrap().remove("step_ns");
        }
        reports
    };
    assert_eq!(without_times(), without_times());
}

#[test]
fn a_table_has_a_column_for_each_policy() {
    let output =
        vattn(&["replay", "--device", "ledger", "--policy", "paged", "--policy", "static", "--limit", "50"]);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    let text = stdout(&output);
    let header: Vec<&str> =
        text.lines().find(|line| line.contains("paged")).unwrap().split_whitespace().collect();
    assert_eq!(header, ["paged", "static"]);
    assert!(text.contains("requests completed"), "{text}");
    assert!(text.contains("generated: 2,000 requests, of which the first 50 are served; Poisson"), "{text}");
}

#[test]
fn bad_arguments_are_code_2() {
    for (args, says) in [
        (vec!["replay", "--budget", "64GB"], "'64GB' is not a size; write 64GiB"),
        (vec!["replay", "--max-slots", "0"], "0 is not in 1.."),
        (vec!["replay", "--step-ms", "0"], "is not a time"),
        (vec!["replay", "--policy", "best"], "possible values: vattn, vattention"),
        (vec!["replay", "--background", "thread"], "possible values: caller, off"),
        (vec!["replay", "--reclaim", "never"], "possible values: deferred, eager"),
        (vec!["replay", "--look-ahead", "-1"], "unexpected argument '-1'"),
        (vec!["replay", "--look-ahead", "64GiB"], "invalid value '64GiB' for '--look-ahead <TOKENS>'"),
        (vec!["replay", "--device", "gpu"], "'gpu' is not a device; write host, ledger, cuda or cuda:N"),
        (vec!["replay", "--device", "cuda:x"], "'cuda:x' names no GPU; write cuda:0"),
        (vec!["replay", "--device", "host", "--granule", "3MiB"], "--granule is 3 MiB; a power of two"),
        (
            vec!["replay", "--device", "host", "--granule", "0"],
            "--granule is 0 bytes; a power of two of at least 1 byte",
        ),
        (
            vec!["replay", "--budget", "0"],
            "--budget is 0 bytes; a granule of 2 MiB for each of the layout's tensors (2), 4 MiB in all, is the least",
        ),
        (
            vec!["replay", "--policy", "vattention", "--budget", "2MiB"],
            "budget of 2 MiB is below one granule",
        ),
        (
            vec!["replay", "--policy", "vattention", "--budget", "1000TiB", "--device", "ledger"],
            "524288000 handles of one granule of 2 MiB, above the limit of 16777216; lower the budget",
        ),
        (
            vec!["replay", "--max-slots", "1048576", "--max-tokens", "100000000", "--device", "ledger"],
            "use fewer slots or fewer tokens",
        ),
        (
            vec!["replay", "--max-slots", "1048576", "--max-tokens", "100000000"],
            "use fewer slots or fewer tokens a slot",
        ),
        (vec!["replay", "--model", "no-such-model", "--policy", "paged"], "no-such-model"),
        (vec!["replay", "--layout", "round", "--policy", "paged"], "round"),
        (vec!["replay", "--trace", "/no/such/file", "--policy", "paged"], "/no/such/file: No such file"),
        (vec!["dance"], "unrecognized subcommand"),
    ] {
        let output = vattn(&args);
        assert_eq!(code(&output), 2, "{args:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(says), "{args:?}: {}", stderr(&output));
        assert_eq!(stdout(&output), "", "{args:?}");
    }
}

#[test]
fn a_malformed_trace_is_code_2_and_names_the_line() {
    let trace = Trace::new(
        "bad.csv",
        "TIMESTAMP,ContextTokens,GeneratedTokens\r\n\r\n2023-11-16 18:15:46,many,1\r\n",
    );
    let output = vattn(&["replay", "--trace", trace.path(), "--policy", "paged"]);
    assert_eq!(code(&output), 2);
    let expected = format!(
        "error: {}:3: expected ContextTokens to be a whole number from 1 to 1099511627776, found 'many'; \
         correct the line or take it out\n",
        trace.path()
    );
    assert_eq!(stderr(&output), expected);
    let other = Trace::new("other", "hello\n");
    let output = vattn(&["replay", "--trace", other.path(), "--policy", "paged"]);
    assert_eq!(code(&output), 2);
    assert!(
        stderr(&output).contains("not a trace") && stderr(&output).contains("'hello'"),
        "{}",
        stderr(&output)
    );
    let empty = Trace::new("empty", "num_prefill_tokens,num_decode_tokens\n");
    let output = vattn(&["replay", "--trace", empty.path(), "--policy", "paged"]);
    assert_eq!(code(&output), 2);
    assert!(stderr(&output).contains("there is no request in it"), "{}", stderr(&output));
}

#[test]
fn help_states_distributions_and_exit_codes() {
    let output = vattn(&["replay", "--help"]);
    assert_eq!(code(&output), 0);
    let text = stdout(&output);
    for says in ["Poisson", "log-normal", "Exit codes", "leaked", "[default: 64GiB;"] {
        assert!(text.contains(says), "{says}: {text}");
    }
}

#[test]
fn without_a_policy_vattn_stands_beside_its_baselines() {
    let output = vattn(&["replay", "--limit", "300"]);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    let text = stdout(&output);
    let header: Vec<&str> =
        text.lines().find(|line| line.contains("paged")).unwrap().split_whitespace().collect();
    assert_eq!(header, ["vattn", "vattention", "paged", "static"]);
}

#[test]
fn the_published_traces_are_served_without_a_leak() {
    let directory = std::env::var_os("VATTN_TRACES").map_or_else(
        || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/traces")),
        PathBuf::from,
    );
    for (file, limit, budget) in [
        ("azure_llm_2023_conv.csv", "3000", "64GiB"),
        // Memory is short all the time.
        ("azure_llm_2023_conv.csv", "2000", "3GiB"),
        ("arxiv_long_offline.csv", "40", "64GiB"),
        ("mooncake_conversation.jsonl", "500", "64GiB"),
        ("sync_vs_async.csv", "300", "64GiB"),
    ] {
        let path = directory.join(file);
        if !path.exists() {
            eprintln!("SKIP: {} is not there; set VATTN_TRACES", path.display());
            continue;
        }
        let output = vattn(&[
            "replay",
            "--device",
            "ledger",
            "--format",
            "json",
            "--policy",
            POLICIES,
            "--max-tokens",
            "262144",
            "--limit",
            limit,
            "--budget",
            budget,
            "--trace",
            path.to_str().unwrap(),
        ]);
        assert_eq!(code(&output), 0, "{file}: {}", stderr(&output));
        assert_eq!(stdout(&output).lines().count(), POLICIES.split(',').count());
    }
}
