//! Does `include/vattn.hpp` wrap all of `include/vattn.h`, and is all of it documented?
//!
//! What it does is tested in C++, by `tests/cpp/run.sh`.

#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// What is C's alone, and why.
const NOT_WRAPPED: [(&str, &str); 8] = [
    ("vattn_fence_idle", "Fence::idle makes the struct: inline functions must not call static ones"),
    ("vattn_fence_stream", "as vattn_fence_idle"),
    ("vattn_fence_event", "as vattn_fence_idle"),
    ("vattn_fence_kind", "a fence of C++ is made by name and not by kind"),
    ("vattn_dlpack_capsule_destroy", "for Python alone, which calls it through a capsule"),
    ("VATTN_H", "the guard"),
    ("reserved", "a field that is 0"),
    ("struct_size", "a field that detail::sized sets"),
];

/// A header's text, without its head.
fn header(name: &str) -> String {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("include").join(name)).unwrap();
    text[text.find("#ifndef VATTN_H").unwrap()..].to_owned()
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

fn words(text: &str) -> BTreeSet<&str> {
    text.split(|c| !is_word(c)).filter(|word| !word.is_empty()).collect()
}

fn is_comment(line: &str) -> bool {
    line.trim_start().starts_with("//")
}

fn without_comments(text: &str) -> String {
    let code: Vec<_> = text.lines().filter(|line| !is_comment(line)).map(cut_comment).collect();
    code.join("\n")
}

/// A line up to the comment at its end.
fn cut_comment(line: &str) -> &str {
    line.find("//").map_or(line, |at| &line[..at])
}

/// Names in C's header that C++'s has to have.
fn names_of_c(code: &str) -> BTreeSet<&str> {
    words(code).into_iter().filter(|word| word.to_lowercase().starts_with("vattn_")).collect()
}

/// The fields of a struct.
fn fields<'a>(code: &'a str, name: &str) -> Vec<&'a str> {
    let body = &code[..code.find(&format!("\n}} {name};")).unwrap()];
    let body = &body[body.rfind("typedef struct {").unwrap()..];
    let declared = body.lines().filter_map(|line| line.trim().strip_suffix(';'));
    declared
        .map(|line| {
            let line = line.split('[').next().unwrap();
            &line[line.rfind([' ', '*']).unwrap() + 1..]
        })
        .collect()
}

fn missing<'a>(names: impl IntoIterator<Item = &'a str>, found: &BTreeSet<&str>) -> Vec<&'a str> {
    let excused = |name: &str| NOT_WRAPPED.iter().any(|(known, _)| *known == name);
    names.into_iter().filter(|name| !found.contains(name) && !excused(name)).collect()
}

#[test]
fn every_name_of_c_is_wrapped() {
    let (c, cpp) = (without_comments(&header("vattn.h")), without_comments(&header("vattn.hpp")));
    let names = names_of_c(&c);
    assert!(names.len() > 170, "only {} names were found: the search is broken", names.len());
    let enums: BTreeSet<_> =
        c.split("\nenum ").skip(1).map(|rest| rest.split(['\n', ' ']).next().unwrap()).collect();
    assert!(enums.len() > 10, "only {} enums were found: the search is broken", enums.len());
    // An enum's own name is none that C++ needs: its values have to be there, one by one.
    let names = names.into_iter().filter(|name| !enums.contains(name));
    let missing = missing(names, &words(&cpp));
    assert!(missing.is_empty(), "not in include/vattn.hpp: {missing:?}");
}

#[test]
fn every_field_that_is_translated_is() {
    let (c, cpp) = (without_comments(&header("vattn.h")), without_comments(&header("vattn.hpp")));
    for (name, through, least) in [
        ("vattn_config", "of_c.", 18),
        ("vattn_config", "defaults.", 15),
        ("vattn_host_options", "of_c.", 3),
        ("vattn_cuda_options", "of_c.", 3),
        ("vattn_ledger_options", "of_c.", 3),
        ("vattn_geometry_info", "info.", 3),
        ("vattn_driver_info", "info.", 6),
        ("vattn_cuda_device", "device.", 10),
        ("vattn_error", "failure->", 4),
        ("vattn_view", "view_.", 6),
        ("vattn_array", "array.", 5),
        ("vattn_buffer_options", "of_c.", 3),
    ] {
        let fields = fields(&c, name);
        assert!(fields.len() >= least, "only {fields:?} were found of {name}: the search is broken");
        let found: BTreeSet<_> =
            cpp.split(through).skip(1).map(|rest| rest.split(|c| !is_word(c)).next().unwrap()).collect();
        let mut missing = missing(fields, &found);
        // The default is none; a thread's last error is compared with the status that came back.
        missing.retain(|field| {
            !(through == "defaults." && field.starts_with("extents")
                || name == "vattn_error" && *field == "status")
        });
        assert!(missing.is_empty(), "{name}: {missing:?} in include/vattn.hpp, behind {through}");
    }
}

#[test]
fn a_name_that_is_not_wrapped_is_seen() {
    let found = words("vattn_one(vattn_two)");
    assert_eq!(
        missing(["vattn_one", "vattn_three", "VATTN_H", "vattn_tw"], &found),
        ["vattn_three", "vattn_tw"]
    );
    let c = "typedef struct {\n    size_t a;\n    const void *b;\n    char c[3];\n} vattn_x;\n";
    assert_eq!(fields(c, "vattn_x"), ["a", "b", "c"]);
}

#[test]
fn every_exception_is_still_one() {
    let (c, cpp) = (without_comments(&header("vattn.h")), without_comments(&header("vattn.hpp")));
    for (name, reason) in NOT_WRAPPED {
        assert!(words(&c).contains(name), "{name} is not in vattn.h any more ({reason})");
        let plain = ["reserved", "struct_size"].contains(&name);
        assert!(plain || !words(&cpp).contains(name), "{name} is in vattn.hpp after all ({reason})");
    }
}

/// The lines that declare something for the program: not indented, or in the public part of a class.
fn declarations(text: &str) -> Vec<(usize, &str)> {
    let mut found = Vec::new();
    let (mut public, mut detail) = (false, false);
    for (number, line) in text.lines().enumerate() {
        match line {
            "namespace detail {" => detail = true,
            "} // namespace detail" => detail = false,
            "private:" | "protected:" => public = false,
            "public:" => public = true,
            _ if line.starts_with("class ") || line == "};" => public = false,
            _ if line.starts_with("struct ") || line.starts_with("enum class ") => public = true,
            _ => {}
        }
        let code = cut_comment(line).trim_end();
        let indent = line.len() - line.trim_start().len();
        let begins = line.trim_start().starts_with(is_word) || line.trim_start().starts_with(['[', '~']);
        let opens = ["class ", "struct ", "enum class ", "using ", "inline ", "[[nodiscard]] inline "];
        let top = indent == 0 && opens.iter().any(|open| line.starts_with(open));
        let member = indent == 4 && public && begins && code.ends_with([';', '{', '}', ',', '(']);
        if !detail && (top || member) {
            found.push((number, line));
        }
    }
    found
}

#[test]
fn every_declaration_is_documented() {
    let text = header("vattn.hpp");
    let lines: Vec<_> = text.lines().collect();
    let mut bare = Vec::new();
    let declarations = declarations(&text);
    for &(number, line) in &declarations {
        let above = lines[..number].iter().rev().find(|line| {
            let line = line.trim_start();
            !line.starts_with("template <") && !line.starts_with("class = ")
        });
        let excused = ["= delete;", "using Error::Error;", "static_assert"];
        let documented =
            line.contains("///<") || above.is_some_and(|line| line.trim_start().starts_with("///"));
        if !documented && !excused.iter().any(|word| line.contains(word)) {
            bare.push(line);
        }
    }
    assert!(declarations.len() > 250, "only {} were found: the search is broken", declarations.len());
    assert!(bare.is_empty(), "not documented: {bare:#?}");
}
