//! The page of `--html`, read as XML.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::process::Output;

use roxmltree::{Document, Node, ParsingOptions};

use super::{code, stderr, stdout, vattn};

/// A folder that is gone with the test.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.0.path()).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }
}

/// Replays a little on the ledger.
fn replay(page: &Path, more: &[&str]) -> Output {
    let args =
        ["replay", "--device", "ledger", "--budget", "16GiB", "--limit", "200", "--max-tokens", "65536"];
    let page = ["--html", page.to_str().unwrap()];
    vattn(&[&args[..], &page[..], more].concat())
}

fn parse(page: &str) -> Document<'_> {
    Document::parse_with_options(page, ParsingOptions { allow_dtd: true, ..ParsingOptions::default() })
        .unwrap()
}

fn named<'a>(page: &'a Document<'_>, tag: &str) -> Vec<Node<'a, 'a>> {
    page.descendants().filter(|node| node.has_tag_name(tag)).collect()
}

fn text(node: Node<'_, '_>) -> String {
    node.descendants().filter_map(|node| if node.is_text() { node.text() } else { None }).collect()
}

/// The cells of a table's rows below its head, by their first.
fn rows(table: Node<'_, '_>) -> Vec<(String, Vec<String>)> {
    let rows = table.descendants().filter(|node| node.has_tag_name("tr"));
    let cells = rows.map(|row| row.children().filter(Node::is_element).map(text).collect::<Vec<_>>());
    cells.skip(1).map(|mut cells| (cells.remove(0), cells)).collect()
}

#[test]
fn the_page_is_well_formed_and_needs_nothing_beside_it() {
    let folder = Folder::new();
    let path = folder.path("page.html");
    let output = replay(&path, &[]);
    assert_eq!((code(&output), stderr(&output).as_str()), (0, ""));
    assert_eq!(folder.names(), ["page.html"]);
    let page = std::fs::read_to_string(&path).unwrap();
    assert!(page.starts_with("<!DOCTYPE html>\n"));
    assert!(page.len() < 1 << 20, "{} bytes", page.len());
    for outside in ["http:", "https:", "@import", "url("] {
        assert!(!page.contains(outside), "{outside}");
    }
    let page = parse(&page);
    let mut ids = HashSet::new();
    for node in page.descendants() {
        for attribute in node.attributes() {
            assert!(!["src", "href", "action"].contains(&attribute.name()), "{attribute:?}");
        }
        if let Some(id) = node.attribute("id") {
            assert!(ids.insert(id.to_owned()), "{id} is there twice");
        }
    }
    let drawings = named(&page, "svg");
    assert_eq!(drawings.len(), 6 * 4, "six rows of four policies");
    for drawing in drawings {
        for id in drawing.attribute("aria-labelledby").unwrap().split(' ') {
            let said = drawing.children().find(|node| node.attribute("id") == Some(id)).unwrap();
            assert!(["title", "desc"].contains(&said.tag_name().name()) && !text(said).is_empty());
        }
    }
    let data = page.descendants().find(|node| node.attribute("id") == Some("data")).unwrap();
    let data: serde_json::Value = serde_json::from_str(data.text().unwrap()).unwrap();
    for panel in data["panels"].as_array().unwrap() {
        assert!(ids.contains(panel["id"].as_str().unwrap()), "{panel}");
    }
}

#[test]
fn the_figures_are_the_reports() {
    let folder = Folder::new();
    let path = folder.path("page.html");
    let output = replay(&path, &["--policy", "vattn,vattention,static"]);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    let page = std::fs::read_to_string(&path).unwrap();
    let (page, report) = (parse(&page), stdout(&output));
    let tables = named(&page, "table");
    let [summary, figures] = tables[..] else { panic!("{} tables", tables.len()) };
    let lines = report.lines().skip_while(|line| !line.starts_with("---"));
    let lines: Vec<&str> =
        lines.take_while(|line| !line.is_empty()).filter(|line| !line.starts_with("---")).collect();
    let printed = |label: &str| -> Vec<String> {
        let line = lines.iter().find_map(|line| line.strip_prefix(label));
        line.unwrap_or_else(|| panic!("{label}")).split_whitespace().map(ToOwned::to_owned).collect()
    };
    let all = rows(figures);
    assert_eq!(all.len(), lines.len(), "{all:?}");
    for (label, cells) in all.iter().chain(&rows(summary)) {
        assert_eq!(*cells, printed(label), "{label}");
        assert_eq!(cells.len(), 3);
    }
    let calls = text(named(&page, "section")[5]);
    let maps = printed("driver calls: map");
    for policy in &maps {
        assert!(calls.contains(&format!("map {policy},")), "{policy}: {calls}");
    }
}

#[test]
fn the_facts_are_those_that_were_used_where_none_were_given() {
    let folder = Folder::new();
    let path = folder.path("page.html");
    let page = ["--format", "json", "--html", path.to_str().unwrap()];
    let output = vattn(&[&["replay", "--device", "ledger", "--limit", "50"][..], &page[..]].concat());
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    let report: serde_json::Value = serde_json::from_str(stdout(&output).lines().next().unwrap()).unwrap();
    let page = std::fs::read_to_string(&path).unwrap();
    let page = parse(&page);
    let facts: Vec<String> = named(&page, "dl")[0].children().map(text).collect();
    assert_eq!(report["budget_bytes"], 64_u64 << 30);
    for fact in ["budget 64 GiB", "granule 2 MiB", &format!("device {}", report["device"].as_str().unwrap())]
    {
        assert!(facts.iter().any(|shown| shown == fact), "{fact}: {facts:?}");
    }
}

#[test]
fn what_others_wrote_is_text_and_no_path_is_shown() {
    let folder = Folder::new();
    // A slash can't be in a file's name.
    let name = "<∕h1><script>alert('1')<∕script>&amp;\"\u{7}.csv";
    let trace = "num_prefill_tokens,num_decode_tokens\n100,5\n";
    std::fs::write(folder.path(name), trace).unwrap();
    let config =
        r#"{"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 256, "torch_dtype": "float16"}"#;
    std::fs::write(folder.path("<i>config.json"), config).unwrap();
    let path = folder.path("page.html");
    let (trace, model) = (folder.path(name), folder.path("<i>config.json"));
    let more = ["--policy", "vattn", "--trace", trace.to_str().unwrap(), "--model", model.to_str().unwrap()];
    let output = replay(&path, &more);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    let page = std::fs::read_to_string(&path).unwrap();
    assert!(!page.contains(folder.0.path().to_str().unwrap()), "a path of this machine");
    let page = parse(&page);
    assert_eq!(named(&page, "script").len(), 2, "the page's own");
    let shown: Vec<String> = named(&page, "bdi").into_iter().map(text).collect();
    assert_eq!(shown, [name.replace('\u{7}', "\u{fffd}"), "<i>config.json".to_owned()]);
}

#[test]
fn without_a_policy_all_that_are_compared_are_on_the_page_and_in_the_json() {
    let folder = Folder::new();
    let path = folder.path("page.html");
    let output = replay(&path, &["--format", "json"]);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    let policies: Vec<String> = stdout(&output)
        .lines()
        .map(|line| {
            serde_json::from_str::<serde_json::Value>(line).unwrap()["policy"].as_str().unwrap().into()
        })
        .collect();
    assert_eq!(policies, ["vattn", "vattention", "paged", "static"]);
    let page = std::fs::read_to_string(&path).unwrap();
    let page = parse(&page);
    let head = named(&page, "thead")[1];
    let names: Vec<String> = head.descendants().filter(|node| node.has_tag_name("th")).map(text).collect();
    assert_eq!(names, policies);
}

#[test]
fn a_place_where_no_page_can_be_is_code_2_and_nothing_is_replayed() {
    let folder = Folder::new();
    for path in [folder.path("no/page.html"), folder.path(""), "/dev/null".into()] {
        let output = replay(&path, &[]);
        assert_eq!(code(&output), 2, "{}", stderr(&output));
        let says = format!("error: --html {}: ", path.display());
        assert!(stderr(&output).starts_with(&says), "{}", stderr(&output));
        assert_eq!(stdout(&output), "");
    }
}

#[test]
fn a_replay_that_fails_leaves_the_page_that_was_there_and_no_other() {
    let folder = Folder::new();
    let path = folder.path("page.html");
    std::fs::write(&path, "old").unwrap();
    let output = replay(&path, &["--policy", "vattn,vattention", "--granule", "16GiB"]);
    assert_eq!(code(&output), 2, "{}", stderr(&output));
    assert_eq!(folder.names(), ["page.html"]);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "old");
}

#[test]
fn requests_that_are_all_rejected_make_a_page_too() {
    let folder = Folder::new();
    let (path, trace) = (folder.path("page.html"), folder.path("trace.csv"));
    std::fs::write(&trace, "num_prefill_tokens,num_decode_tokens\n100000,5\n").unwrap();
    let output = replay(&path, &["--trace", trace.to_str().unwrap()]);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    let page = std::fs::read_to_string(&path).unwrap();
    assert!(text(named(&parse(&page), "h1")[0]).starts_with("1 request ("));
}
