//! Is what a request wrote into its slot still there after everything that happens to the others, and
//! does touching what is not backed fault?
//!
//! Every active slot has a pattern of its own, in every byte of every layer's keys and values, written
//! and read through the addresses, shapes and strides that kernels are given. The faults are those of
//! child processes.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]
#![allow(unsafe_code, reason = "writes and reads through addresses")]

mod common;

use std::process::{Command, Stdio};

use common::contents::poke;
use common::{Numbers, Shape, contents, setting, shapes, step, stream, tokens};
use vattn::driver::Live;
use vattn::error::ErrorKind;
use vattn::{Fence, KvCache, Part, SlotId};

struct Request {
    slot: SlotId,
    owner: u64,
    tokens: u64,
}

/// Rounds of random traffic; after each all patterns are looked for.
fn rounds(shape: &Shape, count: u64, seed: u64) {
    println!("{}, seed {seed}", shape.name);
    let watch = shape.watch();
    let cache = shape.cache(&watch);
    let mut numbers = Numbers::new(seed);
    let mut active: Vec<Request> = Vec::new();
    let mut owners = 0;
    let (mut written, mut refused) = (0_u64, 0_u64);
    for _ in 0..count {
        let most = shape.max_tokens;
        let pick = usize::try_from(numbers.below(64)).unwrap();
        match numbers.below(16) {
            0..4 => {
                if let Ok(slot) = cache.acquire(tokens(numbers.below(most)), Some(stream(numbers.below(3)))) {
                    owners += 1;
                    active.push(Request { slot, owner: owners, tokens: 0 });
                }
            }
            4..11 if !active.is_empty() => {
                let place = pick % active.len();
                let request = &mut active[place];
                let more =
                    if numbers.below(2) == 0 { 1 + numbers.below(12) } else { numbers.below(most / 2) };
                let to = (request.tokens + more).min(most);
                match step(&cache, request.slot, to) {
                    Ok(()) => {
                        contents::fill(&cache, request.slot, request.owner, request.tokens..to);
                        written += to - request.tokens;
                        request.tokens = to;
                    }
                    Err(error) => {
                        assert_eq!(error.kind(), ErrorKind::OutOfBudget, "{error}");
                        refused += 1;
                    }
                }
            }
            11..13 if !active.is_empty() => {
                let request = active.swap_remove(pick % active.len());
                cache.retire(request.slot, &[Fence::Stream(stream(numbers.below(3)))]).unwrap();
            }
            13 if !active.is_empty() => {
                let place = pick % active.len();
                let request = &mut active[place];
                let to = numbers.below(request.tokens + 1);
                cache.truncate(request.slot, tokens(to), &[Fence::Idle]).unwrap();
                request.tokens = to;
            }
            14 => {
                let bytes = shape.granule * numbers.below(shape.budget);
                if numbers.below(2) == 0 {
                    cache.reclaim(bytes, &[Fence::Idle]).unwrap();
                } else {
                    cache.trim(bytes, &[Fence::Idle]).unwrap();
                }
            }
            _ => {
                let budget = shape.granule * (shape.budget / 2 + numbers.below(shape.budget));
                drop(cache.set_budget(budget));
            }
        }
        for request in &active {
            contents::find(&cache, request.slot, request.owner, request.tokens);
        }
    }
    cache.report().unwrap();
    let events = cache.snapshot().events;
    assert!(written > 50 && refused > 0, "{written} tokens were written, {refused} steps refused");
    assert!(events.adopted > 10 && events.reclaimed > 10, "{events:?}");
    drop(cache);
    assert_eq!(watch.checked.live(), Live::default());
}

macro_rules! patterns {
    ($($name:ident)*) => {
        $(#[test]
        fn $name() {
            let shape = shapes::$name();
            let count = 300 * setting("VATTN_CONTENTS_ROUNDS", 1);
            let seed = setting("VATTN_CONTENTS_SEED", 1);
            // Short slots and little memory, so that every byte can be looked at every time.
            let most = shape.max_tokens.min(200_000 * shape.times / shape.rows.iter().sum::<u64>());
            let full: u64 = (0..shape.rows.len()).map(|tensor| shape.granules(tensor, most)).sum();
            let spare = if shape.spare {
                (0..shape.rows.len()).map(|tensor| shape.granules(tensor, shape.spare_tokens())).sum()
            } else {
                0
            };
            let rows = u64::try_from(shape.rows.len()).unwrap();
            rounds(&Shape { max_tokens: most, budget: full * 2 + rows + spare, up_front: Vec::new(), ..shape }, count, seed);
        })*
    };
}

patterns! { sliced per_layer grouped unequal latents large_tokens committed }

/// Kernels of a padded batch write to the slot that nobody has.
#[test]
fn the_spare_slot_takes_writes_from_the_start() {
    let shape = shapes::committed();
    let cache = shape.cache(&shape.watch());
    let spare = u64::from(cache.spare_slot().unwrap());
    for (layer, part) in contents::parts(&cache) {
        let view = cache.view(layer, part).unwrap();
        for token in [0, shape.spare_tokens() - 1] {
            poke(contents::element(&view, [spare, token, view.shape[2] - 1, view.shape[3] - 1]));
        }
    }
}

/// What a child touches. Every one but the first is to kill it.
const TOUCHES: [&str; 7] = [
    "what is backed",
    "the first byte behind what is backed",
    "a slot nobody had",
    "the end of the slot",
    "a slot trimmed to nothing",
    "a slot whose memory another took",
    "a cache that was dropped",
];

fn touch(which: &str) {
    let shape = Shape { budget: 40, ..shapes::sliced() };
    let watch = shape.watch();
    let cache = shape.cache(&watch);
    let slot = cache.acquire(tokens(1), None).unwrap();
    // 8 tokens of 512 bytes fill a granule of 4 KiB.
    step(&cache, slot, 64).unwrap();
    let place = u64::from(slot.index());
    let view = cache.view(0, Part::Value).unwrap();
    let backed = cache.report().unwrap().slots[0].backed;
    let at = |slot: u64, token: u64| contents::element(&view, [slot, token, 0, 0]);
    let (good, bad) = match which {
        "what is backed" => (at(place, 63), at(place, 63)),
        "the first byte behind what is backed" => {
            // Both tensors alike.
            (at(place, 63), at(place, backed.get() / 2 / shape.rows[0]))
        }
        "a slot nobody had" => (at(place, 0), at(place + 1, 0)),
        "the end of the slot" => (at(place, 0), at(place, shape.max_tokens - 1)),
        "a slot trimmed to nothing" => {
            let other = cache.acquire(tokens(1), None).unwrap();
            step(&cache, other, 8).unwrap();
            cache.retire(slot, &[Fence::Idle]).unwrap();
            cache.trim(vattn::Bytes::ZERO, &[Fence::Idle]).unwrap();
            (at(u64::from(other.index()), 7), at(place, 0))
        }
        "a slot whose memory another took" => {
            let other = cache.acquire(tokens(1), None).unwrap();
            cache.retire(slot, &[Fence::Idle]).unwrap();
            step(&cache, other, 160).unwrap();
            (at(u64::from(other.index()), 159), at(place, 0))
        }
        "a cache that was dropped" => {
            let addr = at(place, 0);
            poke(addr);
            drop(cache);
            return poke(addr);
        }
        _ => panic!("\"{which}\" is nothing to touch"),
    };
    poke(good);
    println!("what is backed was written");
    poke(bad);
    keep(&cache);
}

fn keep(cache: &KvCache) {
    assert!(!cache.bytes().held.is_zero());
}

/// Runs in children alone.
#[test]
fn child() {
    let Ok(which) = std::env::var("VATTN_TOUCH") else { return };
    // SAFETY: back to the default, so that a fault ends the process whoever has a handler for it.
    unsafe {
        libc::signal(libc::SIGSEGV, libc::SIG_DFL);
        libc::signal(libc::SIGBUS, libc::SIG_DFL);
        libc::setrlimit(libc::RLIMIT_CORE, &libc::rlimit { rlim_cur: 0, rlim_max: 0 });
    }
    touch(&which);
}

#[test]
fn touching_what_is_not_backed_faults() {
    use std::os::unix::process::ExitStatusExt;
    for (place, which) in TOUCHES.into_iter().enumerate() {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["child", "--exact", "--nocapture", "--test-threads=1"])
            .env("VATTN_TOUCH", which)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        if place == 0 {
            assert!(output.status.success(), "{which}: {:?} {text}", output.status);
        } else {
            let why = String::from_utf8_lossy(&output.stderr);
            let faulted = if common::on_card() {
                why.contains("CUDA_ERROR_ILLEGAL_ADDRESS")
            } else {
                output.status.signal() == Some(libc::SIGSEGV)
            };
            assert!(faulted, "{which}: {:?} {text} {why}", output.status);
        }
        let wrote = text.contains("what is backed was written");
        assert!(wrote || which == "a cache that was dropped", "{which}: {text}");
    }
}
