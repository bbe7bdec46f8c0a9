//! What people see: made to be pasted into an issue as it is.

use std::fmt::Write;

use vattn::units::Bytes;

use crate::num::float;
use crate::probe::Probe;
use crate::probe::addresses::Addresses;
use crate::probe::child::{Ended, Finding};
use crate::probe::handles::{Trial, What};
use crate::probe::latencies::{Call, Latencies, Row, Spread};
use crate::probe::machine::{Card, Claims, Device, Machine, Memory};
use crate::probe::mappings::{Mappings, Stopped};
use crate::report::count;

/// How wide the names on the left are.
const LABEL: usize = 26;

/// All of it. Writing to a string never fails.
pub(super) fn show(probe: &Probe) -> String {
    let mut out = String::new();
    let quick = if probe.quick { " --quick" } else { "" };
    let _ = writeln!(out, "vattn {} probe{quick} on {}\n", probe.vattn, probe.machine.system);
    if let Some(why) = &probe.no_gpu {
        let _ = writeln!(out, "No GPU can be used, so this is the host: {why}.\n");
    }
    machine(&mut out, &probe.machine);
    out.push('\n');
    section(&mut out, "handles", &probe.handles, |out, trials| handles(out, trials, &probe.machine.device));
    section(&mut out, "addresses", &probe.addresses, addresses);
    section(&mut out, "mappings", &probe.mappings, mappings);
    section(&mut out, "latencies", &probe.latencies, latencies);
    out
}

fn line(out: &mut String, label: &str, value: impl std::fmt::Display) {
    let _ = writeln!(out, "{label:LABEL$}{value}");
}

/// What a child found, and how it ended where that was not well.
fn section<T>(out: &mut String, name: &str, finding: &Finding<T>, show: impl FnOnce(&mut String, &T)) {
    if let Some(answer) = &finding.answer {
        show(out, answer);
    }
    let Some(why) = &finding.why else { return };
    let how = match finding.ended {
        Ended::Done => return,
        Ended::Refused => "refused",
        Ended::Died => "DIED",
        Ended::TimedOut => "TIMED OUT",
    };
    line(out, &format!("{name}: {how}"), why);
}

fn machine(out: &mut String, machine: &Machine) {
    match &machine.device {
        Device::Cuda(card) => {
            let Card { ordinal, name, compute_capability, cuda_version, .. } = card;
            line(
                out,
                "device",
                format_args!("{name} (cuda:{ordinal}), compute capability {compute_capability}"),
            );
            let module = card.kernel_module.as_ref().map(|version| format!(", kernel module {version}"));
            line(out, "driver", format_args!("CUDA {cuda_version}{}", module.unwrap_or_default()));
            line(out, "memory", format_args!("{}, {} free", gib(card.memory_bytes), gib(card.free_bytes)));
            line(
                out,
                "granule",
                format_args!("{}, recommended {}", card.granule_bytes, card.recommended_granule_bytes),
            );
        }
        Device::Host(memory) => {
            let Memory { granule_bytes, page_bytes, memfd, max_map_count } = memory;
            line(out, "device", "host: this machine's memory");
            line(out, "memfd", yes(*memfd));
            line(
                out,
                "granule",
                format_args!("{granule_bytes}, as this probe sets it; a page, {page_bytes}, at least"),
            );
            let limit = max_map_count.map_or_else(|| "not told by this system".into(), count);
            line(out, "vm.max_map_count", limit);
        }
    }
}

fn handles(out: &mut String, trials: &[Trial], device: &Device) {
    let claims = match device {
        Device::Cuda(card) => Some(card.claims),
        Device::Host(_) => None,
    };
    for Trial { what, works, refusal } in trials {
        let claim = match claims.and_then(|claims| claimed(claims, *what)) {
            Some(claimed) if claimed != *works => {
                format!(
                    ", although the device says {}",
                    if claimed { "that it can" } else { "that it can't" }
                )
            }
            _ => String::new(),
        };
        let why = refusal.as_ref().map(|why| format!(": {why}")).unwrap_or_default();
        line(out, name(*what), format_args!("{}{claim}{why}", yes(*works)));
    }
}

/// What the device says of it, where it says something.
fn claimed(claims: Claims, what: What) -> Option<bool> {
    match what {
        What::FileDescriptor => Some(claims.file_descriptor),
        What::Rdma => Some(claims.rdma),
        What::Fabric => Some(claims.fabric),
        What::Plain | What::MapReadWrite | What::MapReadOnly | What::MapTwice => None,
    }
}

fn name(what: What) -> &'static str {
    match what {
        What::Plain => "memory: plain",
        What::FileDescriptor => "memory: file descriptor",
        What::Rdma => "memory: RDMA",
        What::Fabric => "memory: fabric",
        What::MapReadWrite => "map: read and write",
        What::MapReadOnly => "map: read only",
        What::MapTwice => "map: twice, once to read",
    }
}

fn addresses(out: &mut String, found: &Addresses) {
    let Addresses { largest_bytes, largest_us, refusal, all } = found;
    let more = if refusal.is_none() { ", and no more was asked for" } else { "" };
    line(
        out,
        "largest reservation",
        format_args!("{} in {} µs{more}", tib(*largest_bytes), micros(*largest_us)),
    );
    let Some(all) = all else { return };
    let cut = if all.cut_short { "; more might have been had with more time" } else { "" };
    let in_all = format!("{} in {} reservations{cut}", tib(all.total_bytes), count(all.reservations));
    line(out, "reservations in all", in_all);
}

fn mappings(out: &mut String, found: &Mappings) {
    let Mappings { handle_bytes, mappings, seconds, first_us, last_us, stopped, refusal } = found;
    let end = match stopped {
        Some(Stopped::Refused) => "refused then",
        Some(Stopped::Enough) => "none refused, and no more were asked for",
        Some(Stopped::TimeUp) => "none refused when the time was up",
        None => "and then no answer",
    };
    line(
        out,
        "mappings of one handle",
        format_args!("{} of {handle_bytes} in {seconds:.1} s; {end}", count(*mappings)),
    );
    line(
        out,
        "  the first, the last",
        format_args!("{} µs, {} µs each, with access", micros(*first_us), micros(*last_us)),
    );
    if let Some(refusal) = refusal {
        line(out, "  refusal", refusal);
    }
}

fn latencies(out: &mut String, found: &Latencies) {
    out.push_str("\nLatencies in µs, median and 99th percentile:\n\n");
    let _ = write!(out, "{:>10}  {:>6}", "handle", "times");
    for verb in ["create", "map", "set_access", "unmap", "release"] {
        let _ = write!(out, "  {verb:>16}");
    }
    out.push('\n');
    for Row { size_bytes, times, create, map, set_access, unmap, release } in &found.by_size {
        let _ = write!(out, "{:>10}  {:>6}", size_bytes.to_string(), count(*times));
        for spread in [create, map, set_access, unmap, release] {
            let _ = write!(out, "  {:>16}", both(spread));
        }
        out.push('\n');
    }
    if let Some(refusal) = &found.refusal {
        let _ = writeln!(out, "Larger ones were refused: {refusal}");
    }
    out.push('\n');
    for (name, call) in [
        ("reserve a granule", found.reserve),
        ("free it", found.free),
        ("memory_info", found.memory_info),
        ("record an event", found.record_event),
        ("query it", found.query_event),
        ("destroy it", found.destroy_event),
    ] {
        if let Some(Call { times, us }) = call {
            let _ = writeln!(out, "{name:>18}  {:>6}  {:>16}", count(times), both(&us));
        }
    }
}

fn both(spread: &Spread) -> String {
    format!("{} {:>8}", micros(spread.median), micros(spread.p99))
}

/// Below ten to the hundredth, which is where a clock's own cost ends.
fn micros(us: f64) -> String {
    if us < 10.0 { format!("{us:.2}") } else { format!("{us:.1}") }
}

fn yes(works: bool) -> &'static str {
    if works { "yes" } else { "no" }
}

fn gib(bytes: Bytes) -> String {
    format!("{:.2} GiB", float(bytes.get()) / float(1 << 30))
}

fn tib(bytes: Bytes) -> String {
    if bytes < Bytes::gib(1 << 10) {
        return gib(bytes);
    }
    format!("{:.2} TiB", float(bytes.get()) / float(1 << 40))
}
