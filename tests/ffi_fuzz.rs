//! Does the C ABI hold whatever it is called with, and in whatever order?
//!
//! Random sequences of calls of every function, right and wrong, checked against a plain model.
//! `VATTN_FUZZ_CALLS` says how many calls there are in all, `VATTN_FUZZ_SEED` where to begin,
//! `VATTN_FUZZ_TABLE` prints what each function came to. A failure names the seed of its sequence, and
//! `VATTN_FUZZ_SEED=that VATTN_FUZZ_CALLS=1` plays that one alone; `VATTN_FUZZ_TRACE` prints its calls.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]
#![allow(unsafe_code, reason = "C's functions are called as C calls them")]

mod fuzz;

use std::sync::atomic::Ordering::SeqCst;

use fuzz::voice::SEED;
use fuzz::{Options, Seeded, Source, Tally, play};

fn setting(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).ok().map_or(otherwise, |text| text.parse().unwrap())
}

/// Open descriptors, threads, and kernel mappings: of memory files, and of all sorts.
fn process() -> [usize; 4] {
    let count = |folder: &str| std::fs::read_dir(folder).unwrap().count();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let files = maps.lines().filter(|line| line.contains("memfd:")).count();
    [count("/proc/self/fd"), count("/proc/self/task"), files, maps.lines().count()]
}

/// Says whose fault it was where nothing else is said any more.
extern "C" fn on_signal(signal: i32) {
    let mut text = *b"\nVATTN_FUZZ_SEED=00000000000000000000 VATTN_FUZZ_CALLS=1\n";
    let mut seed = SEED.load(SeqCst);
    for place in (17..37).rev() {
        text[place] = b'0' + u8::try_from(seed % 10).unwrap();
        seed /= 10;
    }
    // SAFETY: both may be called in a handler.
    unsafe {
        libc::write(2, text.as_ptr().cast(), text.len());
        libc::signal(signal, libc::SIG_DFL);
        libc::raise(signal);
    }
}

fn functions() -> Vec<String> {
    let header = include_str!("../include/vattn.h");
    let declared = header.lines().filter_map(|line| {
        let name = line.split_once('(')?.0.rsplit([' ', '*']).next()?;
        let is_one = line.starts_with("vattn_")
            || line.starts_with("size_t ")
            || line.starts_with("uint32_t ")
            || line.starts_with("const char ");
        (is_one && name.starts_with("vattn_")).then(|| name.to_owned())
    });
    declared.collect()
}

fn table(tally: &Tally) {
    for (name, by_status) in tally {
        let good = by_status.get("VATTN_OK").copied().unwrap_or_default();
        let bad: u64 = by_status.values().sum::<u64>() - good;
        let kinds: Vec<_> = by_status
            .iter()
            .filter(|(status, _)| *status != "VATTN_OK")
            .map(|(status, count)| format!("{} {count}", status.trim_start_matches("VATTN_").to_lowercase()))
            .collect();
        println!("{name:38} {good:8} ok {bad:8} not   {}", kinds.join(", "));
    }
}

#[test]
fn nothing_that_c_can_ask_for_ends_badly() {
    let amount = setting("VATTN_FUZZ_CALLS", 60_000);
    let first = setting("VATTN_FUZZ_SEED", 0);
    for signal in [libc::SIGSEGV, libc::SIGBUS, libc::SIGABRT] {
        let handler: extern "C" fn(i32) = on_signal;
        // SAFETY: the handler does nothing that a handler may not do.
        unsafe { libc::signal(signal, std::ptr::from_ref(&handler).cast::<usize>().read()) };
    }
    // What is made once and kept is there before the count.
    play(&mut Seeded::new(first, 2000), Options { threads: true });
    let before = process();
    let start = std::time::Instant::now();
    let (mut tally, mut calls, mut sequences) = (Tally::new(), 0, 0);
    while calls < amount {
        let seed = first.wrapping_add(sequences);
        SEED.store(seed, SeqCst);
        let begun = std::time::Instant::now();
        let mut source = Seeded::new(seed, 0);
        let length = 200 + source.below(8) * source.below(1000);
        let played =
            std::panic::catch_unwind(|| play(&mut Seeded::new(seed, length), Options { threads: true }));
        if begun.elapsed().as_secs() > 1 {
            println!("VATTN_FUZZ_SEED={seed} took {:.1} s", begun.elapsed().as_secs_f64());
        }
        let Ok((played, count)) = played else {
            panic!("play it alone: VATTN_FUZZ_SEED={seed} VATTN_FUZZ_CALLS=1");
        };
        calls += count;
        sequences += 1;
        for (name, by_status) in played {
            for (status, count) in by_status {
                *tally.entry(name).or_default().entry(status).or_default() += count;
            }
        }
    }
    println!("{calls} calls in {sequences} sequences, {:.1} s", start.elapsed().as_secs_f64());
    if std::env::var_os("VATTN_FUZZ_TABLE").is_some() {
        table(&tally);
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        status.lines().filter(|line| line.starts_with("VmHWM")).for_each(|line| println!("{line}"));
        println!(
            "descriptors, threads, mappings of memory files, mappings: {before:?}, then {:?}",
            process()
        );
    }
    // A thread that was joined may still be on its way out.
    for _ in 0..100 {
        if process()[1] <= before[1] {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    let after = process();
    assert_eq!(after[..3], before[..3], "descriptors, threads, mappings of memory files");
    // The allocator and a sanitizer keep some for themselves.
    assert!(after[3] <= before[3] + 256, "kernel mappings: {before:?}, then {after:?}");
    if calls >= 50_000 {
        let known = functions();
        assert!(known.len() >= 55, "{} functions were found in the header", known.len());
        let missed: Vec<_> = known.iter().filter(|name| !tally.contains_key(name.as_str())).collect();
        assert!(missed.is_empty(), "never called: {missed:?}");
    }
}
