//! Is `include/vattn.h` what cbindgen makes of `src/ffi`, is all of it documented, and is all of it called
//! by the tests in `tests/c`? Does what is installed beside it speak of the same functions and version?
//!
//! With `VATTN_BLESS=1` in the environment the header and the list of symbols are written anew.

#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The files with declarations for C, in the header's order.
const CHAPTERS: [&str; 12] = [
    "status", "library", "log", "geometry", "driver", "config", "layout", "cache", "pin", "stats", "buffer",
    "testing",
];

fn header() -> PathBuf {
    root().join("include/vattn.h")
}

fn committed() -> String {
    fs::read_to_string(header()).unwrap()
}

/// The header as the sources would have it.
fn made() -> String {
    let config = cbindgen::Config::from_file(root().join("cbindgen.toml")).unwrap();
    let mut made = Vec::new();
    let builder = cbindgen::Builder::new().with_config(config);
    let builder = CHAPTERS.iter().fold(builder, |builder, file| {
        builder.with_src(root().join("src/ffi").join(file).with_extension("rs"))
    });
    builder.generate().unwrap().write(&mut made);
    String::from_utf8(made).unwrap()
}

#[test]
fn the_header_is_what_the_sources_say() {
    let made = made();
    if std::env::var_os("VATTN_BLESS").is_some() {
        fs::write(header(), &made).unwrap();
    }
    let committed = committed();
    let differs = made.lines().zip(committed.lines()).position(|(made, committed)| made != committed);
    assert!(
        made == committed,
        "include/vattn.h is not what src/ffi says, from line {} on; run VATTN_BLESS=1 cargo test --test header",
        differs.map_or(made.lines().count().min(committed.lines().count()), |line| line) + 1
    );
}

/// The sources of the C ABI.
fn sources() -> impl Iterator<Item = (PathBuf, String)> {
    fs::read_dir(root().join("src/ffi")).unwrap().map(|file| {
        let path = file.unwrap().path();
        let text = fs::read_to_string(&path).unwrap();
        (path, text)
    })
}

/// What stands behind each occurrence of `before`, as far as it is a name.
fn names<'a>(text: &'a str, before: &'a str) -> impl Iterator<Item = &'a str> {
    text.match_indices(before).map(move |(at, _)| {
        let name = &text[at + before.len()..];
        &name[..name.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(name.len())]
    })
}

#[test]
fn everything_of_c_is_in_the_header() {
    let header = committed();
    let mut seen = BTreeSet::new();
    for (_, text) in sources() {
        for before in ["extern \"C\" fn ", "pub struct ", "pub enum ", "pub const ", "pub type "] {
            seen.extend(
                names(&text, before)
                    .filter(|name| name.to_lowercase().starts_with("vattn_"))
                    .map(str::to_owned),
            );
        }
    }
    assert!(seen.len() > 80, "only {} names were found: the search is broken", seen.len());
    let words: BTreeSet<_> = header.split(|c: char| !c.is_alphanumeric() && c != '_').collect();
    let missing: Vec<_> = seen.iter().filter(|name| !words.contains(name.as_str())).collect();
    assert!(missing.is_empty(), "not in include/vattn.h: {missing:?}; name enums in cbindgen.toml");
}

/// tests/install/run.sh holds the same list against the shared library that is installed.
#[test]
fn the_list_of_symbols_names_every_function_of_the_header() {
    let path = root().join("include/vattn.symbols");
    let made = made();
    let elsewhere: String = made.split_inclusive('\n').filter(|line| !line.starts_with("static ")).collect();
    let declared: BTreeSet<_> = declared(&elsewhere).into_iter().map(|(_, name)| name).collect();
    let exported: usize = sources().map(|(_, text)| text.matches("#[unsafe(no_mangle)]").count()).sum();
    assert_eq!(declared.len(), exported, "the header declares as many functions as the sources export");
    let list: String = declared.iter().map(|name| format!("{name}\n")).collect();
    if std::env::var_os("VATTN_BLESS").is_some() {
        fs::write(&path, &list).unwrap();
    }
    let committed = fs::read_to_string(&path).unwrap_or_default();
    let committed: BTreeSet<_> = committed.lines().collect();
    assert!(
        committed == declared,
        "include/vattn.symbols lacks {:?} and has {:?} too many; run VATTN_BLESS=1 cargo test --test header",
        declared.difference(&committed).collect::<Vec<_>>(),
        committed.difference(&declared).collect::<Vec<_>>(),
    );
}

#[test]
fn the_cmake_package_has_the_version_of_the_crate() {
    let path = root().join("cmake/vattnConfigVersion.cmake");
    let version = format!("\nset(PACKAGE_VERSION {})\n", env!("CARGO_PKG_VERSION"));
    let text = fs::read_to_string(path).unwrap();
    assert!(text.contains(&version), "cmake/vattnConfigVersion.cmake does not say{version}");
}

#[test]
fn every_item_of_the_header_is_documented() {
    let header = committed();
    let lines: Vec<_> = header.lines().collect();
    let mut bare = Vec::new();
    let mut items = 0;
    for (number, line) in lines.iter().enumerate() {
        let trimmed = line.trim_start();
        let indented = line.starts_with("    ") && !line.starts_with("     ");
        let member = indented && (trimmed.starts_with("VATTN_") || trimmed.ends_with(';'));
        let item = [
            "#define VATTN_",
            "enum vattn_",
            "typedef struct vattn_",
            "vattn_status vattn_",
            "static inline ",
        ]
        .iter()
        .any(|start| line.starts_with(start))
            && !line.starts_with("#define VATTN_H");
        let in_function = lines[..number]
            .iter()
            .rev()
            .find(|line| !line.starts_with(' '))
            .is_some_and(|line| line.starts_with("static"));
        // A type is declared before it is described where another needs it.
        let forward = line
            .ends_with(&format!(" {};", trimmed.trim_end_matches(';').rsplit(' ').next().unwrap()))
            && line.starts_with("typedef struct")
            && !line.contains('{')
            && header.contains(&format!("}} {};", trimmed.trim_end_matches(';').rsplit(' ').next().unwrap()));
        if (member && !in_function) || (item && !forward) {
            items += 1;
            if !lines[number - 1].trim_start().starts_with("///") {
                bare.push(format!("{}: {line}", number + 1));
            }
        }
    }
    assert!(items > 250, "only {items} items were found: the search is broken");
    assert!(bare.is_empty(), "not documented: {bare:#?}");
}

/// A function of the C ABI as it stands in the sources: its name, and what its body begins with.
fn entries(text: &str) -> Vec<(&str, &str)> {
    let mut entries = Vec::new();
    for (at, start) in text.match_indices("extern \"C\" fn vattn_") {
        let rest = &text[at + start.len() - "vattn_".len()..];
        let name = &rest[..rest.find('(').unwrap()];
        let body = &rest[rest.find(" {\n").unwrap() + 3..];
        entries.push((name, &body[..body.find("\n}\n").unwrap()]));
    }
    entries
}

/// What is wrong with an entry, if anything: its body has to be one call of a wrapper, under its own name.
fn outside_the_wrapper(name: &str, body: &str) -> Option<&'static str> {
    let body = body.trim_start();
    let wrappers = [format!("enter(\"{name}\", "), format!("on_cache(\"{name}\", cache, ")];
    let fallible = wrappers.iter().any(|wrapper| body.starts_with(wrapper.as_str()));
    if !fallible && !body.starts_with("plain(") {
        return Some("does not begin with a wrapper under its own name");
    }
    // One call and nothing else: its closing bracket is the last character.
    let mut depth = 0_i32;
    for (at, c) in body.char_indices() {
        depth += i32::from(c == '(') - i32::from(c == ')');
        if depth == 0 && c == ')' {
            return (at + 1 != body.len()).then_some("does something outside of the wrapper");
        }
    }
    Some("has no end that this test can see")
}

#[test]
fn every_entry_passes_the_wrapper() {
    let mut count = 0;
    for (path, text) in sources() {
        for (name, body) in entries(&text) {
            count += 1;
            assert_eq!(outside_the_wrapper(name, body), None, "{name} in {}", path.display());
        }
        let exported = text.matches("#[unsafe(no_mangle)]").count();
        assert_eq!(exported, entries(&text).len(), "in {}", path.display());
    }
    assert!(count > 50, "only {count} functions were found: the search is broken");
}

#[test]
fn an_entry_beside_the_wrapper_is_seen() {
    for (body, wrong) in [
        ("    enter(\"vattn_x\", || Ok(()))", false),
        ("    on_cache(\"vattn_x\", cache, |cache| f(cache))", false),
        ("    plain(0, || 1)", false),
        ("    VATTN_OK", true),
        ("    enter(\"vattn_y\", || Ok(()))", true),
        ("    enter(\"vattn_x\", || Ok(())).max(f())", true),
        ("    let x = f();\n    enter(\"vattn_x\", || x)", true),
    ] {
        assert_eq!(outside_the_wrapper("vattn_x", body).is_some(), wrong, "{body}");
    }
}

/// What the header declares: whether each function returns a status, and its name.
fn declared(header: &str) -> Vec<(bool, &str)> {
    let lines = header.lines().filter(|line| line.starts_with(|c: char| c.is_ascii_lowercase()));
    lines
        .filter(|line| !line.starts_with("typedef"))
        .filter_map(|line| {
            let before = &line[..line.find('(')?];
            let name = before.rsplit([' ', '*']).next()?;
            name.starts_with("vattn_").then_some((line.starts_with("vattn_status "), name))
        })
        .collect()
}

/// What stands between the brackets of the calls of a macro, or of several whose names begin alike.
fn arguments<'a>(text: &'a str, start: &'a str) -> impl Iterator<Item = &'a str> {
    text.match_indices(start).map(move |(at, _)| {
        let call = &text[at..];
        let (mut depth, mut quoted, mut escaped) = (0_i32, false, false);
        let end = call.find(|c| {
            quoted ^= c == '"' && !escaped;
            escaped = c == '\\' && !escaped;
            depth += if quoted { 0 } else { i32::from(c == '(') - i32::from(c == ')') };
            depth == 0 && c == ')'
        });
        &call[..end.unwrap_or(call.len())]
    })
}

/// What of the header's functions the tests in C leave out: a call that succeeds, one that fails.
fn untested(header: &str, tests: &str) -> Vec<String> {
    let called = |within: &[&str], name: &str| within.iter().any(|text| text.contains(&format!("{name}(")));
    let succeed: Vec<_> = arguments(tests, "CHECK_OK(").collect();
    let fail: Vec<_> = arguments(tests, "CHECK_FAILS").collect();
    let anywhere = [tests];
    let mut missing = Vec::new();
    for (fallible, name) in declared(header) {
        if !called(if fallible { &succeed } else { &anywhere }, name) {
            missing.push(format!("{name} succeeds"));
        }
        if fallible && !called(&fail, name) {
            missing.push(format!("{name} fails"));
        }
    }
    missing
}

#[test]
fn every_function_is_called_by_the_tests_in_c() {
    let header = committed();
    let count = declared(&header).len();
    assert!(count > 60, "only {count} functions were found: the search is broken");
    let files = fs::read_dir(root().join("tests/c")).unwrap().map(|file| file.unwrap().path());
    let files = files.filter(|path| path.extension().is_some_and(|end| end == "c" || end == "h"));
    let tests: String = files.map(|path| fs::read_to_string(path).unwrap()).collect();
    assert_eq!(untested(&header, &tests), Vec::<String>::new());
}

#[test]
fn a_function_without_a_test_in_c_is_seen() {
    let header =
        "vattn_status vattn_a(int32_t x);\nconst char *vattn_b(void);\ntypedef void (*vattn_c)(void);\n";
    let missing = |tests| untested(header, tests);
    assert_eq!(missing("vattn_a();"), ["vattn_a succeeds", "vattn_a fails", "vattn_b succeeds"]);
    assert_eq!(missing("CHECK_OK(f(\")\", vattn_a(1))); vattn_b();"), ["vattn_a fails"]);
    assert_eq!(missing("CHECK_FAILS_OUT(1, \"\\\")\", vattn_a(1)); vattn_b()"), ["vattn_a succeeds"]);
    assert_eq!(missing("CHECK_OK(1); vattn_a(); CHECK_FAILS(2); vattn_b()").len(), 2);
}
