//! Do imports point down the list of rooms, and does `unsafe` stay where it may be?
//!
//! Reads every file under `src/`. A path from `crate::`, or from as many `super::` as lead to the
//! root, counts wherever it stands: in a `use`, in the middle of an expression, in a test module.
//! Tests inside the files are not exempt: one that needs a room above its own belongs in `tests/`.
//! Comments and strings do not count.
//!
//! - A file imports from rooms of a lower rank, from its own room, and from `units` and `error`.
//!   `src/lib.rs`, the front door, may name them all.
//! - `unsafe`, and leave to use it, are found in `driver/`, `ffi/` and `fence/mod.rs` alone. The
//!   last wraps an event for which only the caller can vouch.

#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

use std::fs;
use std::path::{Path, PathBuf};

/// The rooms by rank, as `DESIGN.md` lists them. Rooms of one line do not import each other.
const ROOMS: [&[&str]; 9] = [
    &["units", "error", "sync", "stats"],
    &["geometry"],
    &["driver"],
    &["fence", "pool", "layout"],
    &["tensor", "buffer"],
    &["slot"],
    &["mapper"],
    &["cache"],
    &["ffi"],
];
/// What every room may use.
const FOR_ALL: [&str; 2] = ["units", "error"];
/// Where `unsafe` may be: whole rooms, and single files.
const UNSAFE_ROOMS: [&str; 2] = ["driver", "ffi"];
const UNSAFE_FILES: [&str; 1] = ["fence/mod.rs"];

fn rank(room: &str) -> Option<usize> {
    ROOMS.iter().position(|rooms| rooms.contains(&room))
}

/// A word, a `::`, or any other single character, with the line it stands on.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Token {
    line: usize,
    text: String,
}

/// The tokens of a source, without comments, strings and characters.
fn tokens(source: &str) -> Vec<Token> {
    let source: Vec<char> = source.chars().collect();
    let at = |place: usize| source.get(place).copied().unwrap_or('\0');
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let (mut out, mut line, mut place) = (Vec::new(), 1, 0);
    while place < source.len() {
        let start = place;
        match at(place) {
            '/' if at(place + 1) == '/' => {
                while place < source.len() && at(place) != '\n' {
                    place += 1;
                }
            }
            '/' if at(place + 1) == '*' => {
                let mut depth = 0;
                while place < source.len() {
                    match (at(place), at(place + 1)) {
                        ('/', '*') => (depth, place) = (depth + 1, place + 2),
                        ('*', '/') => (depth, place) = (depth - 1, place + 2),
                        _ => place += 1,
                    }
                    if depth == 0 {
                        break;
                    }
                }
            }
            '"' => place = end_of_string(&source, place),
            '\'' if at(place + 1) == '\\' => {
                place += 3;
                while place < source.len() && at(place) != '\'' {
                    place += 1;
                }
                place += 1;
            }
            '\'' if at(place + 2) == '\'' => place += 3,
            c if is_word(c) => {
                while is_word(at(place)) {
                    place += 1;
                }
                let word: String = source[start..place].iter().collect();
                let hashes = (place..).take_while(|place| at(*place) == '#').count();
                if matches!(&*word, "r" | "br" | "cr") && at(place + hashes) == '"' {
                    place = end_of_raw_string(&source, place + hashes + 1, hashes);
                } else if !(matches!(&*word, "b" | "c") && at(place) == '"') {
                    out.push(Token { line, text: word });
                }
            }
            ':' if at(place + 1) == ':' => {
                out.push(Token { line, text: "::".into() });
                place += 2;
            }
            c => {
                if !c.is_whitespace() {
                    out.push(Token { line, text: c.into() });
                }
                place += 1;
            }
        }
        let end = place.min(source.len());
        line += source[start..end].iter().filter(|c| **c == '\n').count();
    }
    out
}

/// Behind the string whose opening quote is at `place`.
fn end_of_string(source: &[char], mut place: usize) -> usize {
    place += 1;
    while place < source.len() && source[place] != '"' {
        place += if source[place] == '\\' { 2 } else { 1 };
    }
    place + 1
}

/// Behind the raw string whose text starts at `place`.
fn end_of_raw_string(source: &[char], mut place: usize, hashes: usize) -> usize {
    while place < source.len() {
        let behind = &source[place + 1..source.len().min(place + 1 + hashes)];
        if source[place] == '"' && behind.len() == hashes && behind.iter().all(|c| *c == '#') {
            return place + 1 + hashes;
        }
        place += 1;
    }
    place
}

/// The modules that a file's own module lies in, itself included: `driver/host/mmap.rs` is
/// `driver::host::mmap`.
fn module_of(file: &str) -> Vec<String> {
    let mut parts: Vec<_> = file.trim_end_matches(".rs").split('/').map(str::to_owned).collect();
    if matches!(parts.last().map(String::as_str), Some("mod" | "lib")) {
        parts.pop();
    }
    parts
}

/// Every first word of a path from the crate's root, with its line.
fn imports(file: &str, tokens: &[Token]) -> Vec<(usize, String)> {
    let text = |place: usize| tokens.get(place).map_or("", |token| token.text.as_str());
    let depth_of_file = module_of(file).len();
    // For each open brace, whether a module's.
    let mut braces: Vec<bool> = Vec::new();
    let mut found = Vec::new();
    let mut place = 0;
    while place < tokens.len() {
        match text(place) {
            "{" => braces.push(place >= 2 && text(place - 2) == "mod"),
            "}" => drop(braces.pop()),
            word @ ("crate" | "super" | "self") if text(place + 1) == "::" => {
                let mut up = usize::from(word == "super");
                let mut next = place + 2;
                while matches!(text(next), "super" | "self") && text(next + 1) == "::" {
                    up += usize::from(text(next) == "super");
                    next += 2;
                }
                let depth = depth_of_file + braces.iter().filter(|of_module| **of_module).count();
                if word == "crate" || (depth > 0 && up >= depth) {
                    found.extend(first_words(tokens, next));
                }
                place = next;
                continue;
            }
            _ => {}
        }
        place += 1;
    }
    found
}

/// The first word of a path, or of each path in a group.
fn first_words(tokens: &[Token], place: usize) -> Vec<(usize, String)> {
    let Some(first) = tokens.get(place) else { return Vec::new() };
    if first.text != "{" {
        return vec![(first.line, first.text.clone())];
    }
    let (mut depth, mut expected, mut words) = (0, false, Vec::new());
    for token in &tokens[place..] {
        match token.text.as_str() {
            "{" => (depth, expected) = (depth + 1, depth == 0),
            "}" => depth -= 1,
            "," => expected = depth == 1,
            _ if expected => {
                words.push((token.line, token.text.clone()));
                expected = false;
            }
            _ => {}
        }
        if depth == 0 {
            break;
        }
    }
    words
}

/// What is wrong with one file, whose path is given from `src/` on.
fn violations(file: &str, source: &str) -> Vec<String> {
    let tokens = tokens(source);
    let mut wrong = Vec::new();
    let Some(room) = module_of(file).into_iter().next() else {
        return unsafe_violations(file, "", &tokens);
    };
    let Some(rank_of_room) = rank(&room) else {
        return vec![format!(
            "src/{file}: {room} is no room; give it a place in DESIGN.md's list and in tests/rooms.rs"
        )];
    };
    for (line, target) in imports(file, &tokens) {
        let here = format!("src/{file}:{line}: {room} (rank {rank_of_room})");
        match rank(&target) {
            _ if target == room => {}
            None => wrong.push(format!(
                "{here} imports crate::{target}, which is no room; import from the room that has it, not from \
                 the front door, or give a new room its place in tests/rooms.rs"
            )),
            Some(rank) if rank < rank_of_room => {}
            Some(0) if FOR_ALL.contains(&target.as_str()) => {}
            Some(rank) if rank == rank_of_room => {
                wrong.push(format!("{here} imports {target}, its neighbour; rooms of one rank stay apart"));
            }
            Some(rank) => wrong.push(format!("{here} imports {target} (rank {rank}): uphill")),
        }
    }
    wrong.extend(unsafe_violations(file, &room, &tokens));
    wrong
}

fn unsafe_violations(file: &str, room: &str, tokens: &[Token]) -> Vec<String> {
    if UNSAFE_ROOMS.contains(&room) || UNSAFE_FILES.contains(&file) {
        return Vec::new();
    }
    tokens
        .iter()
        .filter(|token| matches!(token.text.as_str(), "unsafe" | "unsafe_code"))
        .map(|token| {
            format!(
                "src/{file}:{}: {} outside driver/ and ffi/; put what needs it there, behind a safe face",
                token.line, token.text
            )
        })
        .collect()
}

fn sources(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}

#[test]
fn imports_point_down_and_unsafe_stays_in_its_rooms() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&root, &mut files);
    assert!(files.len() > 20, "only {} files were found under {}", files.len(), root.display());
    let wrong: Vec<_> = files
        .iter()
        .flat_map(|path| {
            let file = path.strip_prefix(&root).unwrap().to_str().unwrap().replace('\\', "/");
            violations(&file, &fs::read_to_string(path).unwrap())
        })
        .collect();
    assert!(wrong.is_empty(), "{} violations:\n{}", wrong.len(), wrong.join("\n"));
}

/// Asserts that a made-up source is refused once, in these words.
#[track_caller]
fn refused(file: &str, source: &str, words: &str) {
    let wrong = violations(file, source);
    assert_eq!(wrong.len(), 1, "{wrong:?}");
    assert!(wrong[0].contains(words), "{} does not say {words:?}", wrong[0]);
}

#[track_caller]
fn accepted(file: &str, source: &str) {
    assert_eq!(violations(file, source), Vec::<String>::new());
}

#[test]
fn downhill_is_fine() {
    accepted("cache/mod.rs", "use crate::slot::SlotTable;\nuse crate::{pool::Pool, tensor::{Run, Piece}};");
    accepted("slot/mod.rs", "pub(crate) mod fit; use crate::slot::fit::Wish; use crate::stats::Counters;");
    accepted("stats/counters.rs", "use crate::error::Verb; use crate::units::Bytes; use super::snapshot::S;");
    accepted("units.rs", "use crate::error::Error; mod tests { use super::*; }");
    accepted("lib.rs", "pub mod cache; pub use cache::KvCache; pub use crate::ffi::x;");
    accepted(
        "driver/host/mmap.rs",
        "use super::super::Access; use crate::driver::books; fn f() { self::g() }",
    );
}

#[test]
fn uphill_is_caught_wherever_it_stands() {
    refused(
        "pool/mod.rs",
        "use crate::tensor::Run;",
        "src/pool/mod.rs:1: pool (rank 3) imports tensor (rank 4)",
    );
    refused("pool/mod.rs", "\n\nfn f(x: &crate::cache::KvCache) {}", "src/pool/mod.rs:3");
    refused("tensor/mod.rs", "use crate::{\n  units::{self, index},\n  slot::State,\n};", "mod.rs:3: tensor");
    refused("driver/mod.rs", "mod a { mod b { use super::super::super::slot::State; } }", "imports slot");
    refused("layout.rs", "#[cfg(test)] mod tests { use super::super::cache::KvCache; }", "imports cache");
    refused("driver/host/linux.rs", "use super::super::super::pool::Extent;", "imports pool");
    refused("cache/mod.rs", "use crate::ffi::Status;", "imports ffi (rank 8): uphill");
    refused(
        "slot/mod.rs",
        "let a = 'x'; let b: &'static str = \"\\\"\"; use crate::cache::K;",
        "imports cache",
    );
}

#[test]
fn neighbours_stay_apart_but_for_units_and_error() {
    refused("pool/plan.rs", "use crate::layout::Layout;", "imports layout, its neighbour");
    refused("stats/mod.rs", "use crate::sync::atomic;", "imports sync, its neighbour");
    accepted("sync.rs", "use crate::units::Bytes; use crate::error::Error;");
}

#[test]
fn what_is_no_room_is_named() {
    refused("attic/mod.rs", "", "attic is no room");
    refused("slot/mod.rs", "use crate::Error;", "imports crate::Error, which is no room");
}

#[test]
fn comments_and_strings_do_not_count() {
    accepted(
        "units.rs",
        "/// [`x`](crate::cache::x)\n//! crate::ffi\n/* crate::slot /* unsafe */ crate::ffi */",
    );
    accepted(
        "units.rs",
        "const A: &str = \"crate::cache \\\" unsafe\"; const B: &str = r#\"\"unsafe\" crate::ffi\"#;",
    );
}

#[test]
fn unsafe_elsewhere_is_caught() {
    accepted("driver/owned.rs", "#![allow(unsafe_code)] unsafe { f() }");
    accepted("ffi/mod.rs", "unsafe extern \"C\" fn f() {}");
    accepted("fence/mod.rs", "unsafe fn new() {}");
    accepted("cache/mod.rs", "#![deny(unsafe_op_in_unsafe_fn)] // unsafe");
    refused("cache/mod.rs", "\nfn f() { unsafe { g() } }", "src/cache/mod.rs:2: unsafe outside");
    refused("lib.rs", "#![allow(unsafe_code, reason = \"\")]", "unsafe_code outside");
}
