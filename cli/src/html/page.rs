//! The page: head, summary, rows of panels, all figures.
//!
//! Every tag is closed and every attribute quoted, so that it reads as XML too and a test can parse it.

use std::fmt::Write;

use clap::ValueEnum;
use serde::Serialize;

use super::escape::Text;
use super::rows::{Frame, Readout, Row};
use super::{Head, Run};
use crate::num::float;
use crate::policy::PolicyKind;
use crate::report::{self, Report, count};

const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");

/// How long a policy's bar is, beside the others'.
type Size = fn(&Report) -> f64;

/// The rows of the report that stand at the head of the page, with what their bars are as long as.
const SUMMARY: &[(&str, Option<Size>)] = &[
    ("requests completed", None),
    ("time to serve them all, simulated seconds", Some(|report| report.simulated_seconds)),
    ("bytes mapped per byte needed, mean over time", Some(|report| report.mapped_over_needed)),
    ("memory taken from the device, peak GiB", Some(|report| float(report.bytes.peak_held.get()))),
    ("driver calls: map", Some(|report| float(report.driver_calls.map))),
    ("driver time if this were an H200, ms", Some(|report| report.modelled_driver_seconds)),
    ("... that requests waited for, ms", Some(|report| report.driver_seconds_on_path)),
    ("the longest wait for the driver, ms", Some(|report| report.longest_stall_seconds)),
    ("a step here, wall time, 99th percentile µs", Some(|report| float(report.step_ns.p99))),
    ("leaked extents, mappings and reservations", None),
];

const READING: &str = "Policies stand side by side on the same axes; time is the simulated server’s. A \
    column stands for a stretch of time: what was there throughout it has the full colour, what was there \
    only at times a weaker one. Of times a column has the slowest, and the mean or the median. With the \
    pointer on a panel, all of them tell their figures at the end of the stretch there.";

/// What the script is told.
#[derive(Serialize)]
struct Data {
    /// Seconds that the panels show.
    end: f64,
    panels: Vec<Readout>,
}

/// The whole page.
pub(crate) fn page(head: &Head, runs: &[Run]) -> String {
    let frame = Frame::new(runs, head.budget);
    let mut rows = frame.rows();
    let panels = rows.iter_mut().flat_map(|row| std::mem::take(&mut row.readouts)).collect();
    let data = Data { end: float(frame.end) / 1e9, panels };
    let data = serde_json::to_string(&data).expect("plain data with string keys is always JSON");
    let notes = runs.first().map(|run| run.report.notes()).unwrap_or_default();
    let mut out = String::new();
    // Writing to a string never fails.
    let _ = write!(
        out,
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n\
         <meta name=\"color-scheme\" content=\"light dark\"/>\n\
         <meta name=\"generator\" content=\"vattn {}\"/>\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src \
         'unsafe-inline'; script-src 'unsafe-inline'\"/>\n\
         <title>{} on {}: vattn replay</title>\n<style>\n{STYLE}</style>\n</head>\n<body class=\"n{}\">\n",
        env!("CARGO_PKG_VERSION"),
        Text(&head.trace),
        Text(&head.model),
        runs.len()
    );
    write_head(&mut out, head);
    summary(&mut out, runs, &frame);
    out.push_str("<main>\n");
    for row in &rows {
        write_row(&mut out, row);
    }
    out.push_str("</main>\n");
    out.push_str("<div class=\"end\">\n");
    figures(&mut out, runs);
    let _ = write!(
        out,
        "<footer>\n<h2>How to read the panels</h2>\n<p>{READING}</p>\n\
         <h2>What the figures mean</h2>\n<p>{}</p>\n<h2>How requests are served</h2>\n<p>{}</p>\n\
         </footer>\n</div>\n<script type=\"application/json\" id=\"data\">{data}</script>\n\
         <script>\n{SCRIPT}</script>\n</body>\n</html>\n",
        Text(&notes.trim().replace('\n', " ")),
        Text(head.server)
    );
    out
}

fn write_head(out: &mut String, head: &Head) {
    let _ = write!(
        out,
        "<header>\n<h1>{} request{} (<bdi>{}</bdi>) on <bdi>{}</bdi></h1>\n",
        count(head.requests),
        if head.requests == 1 { "" } else { "s" },
        Text(&head.trace),
        Text(&head.model)
    );
    out.push_str("<dl>");
    for (name, value) in &head.facts {
        let _ = write!(out, "<div><dt>{}</dt> <dd>{}</dd></div> ", Text(name), Text(value));
    }
    out.push_str("</dl>\n");
    if let Some(source) = &head.source {
        let _ = writeln!(out, "<p>The trace is generated: {}.</p>", Text(source));
    }
    out.push_str("</header>\n");
}

/// The policies' names, in a first row with an empty corner.
fn names(out: &mut String, runs: &[Run], explained: bool) {
    out.push_str("<thead><tr><td></td>");
    for run in runs {
        let _ = write!(out, "<th scope=\"col\">{}", Text(run.report.policy));
        let kind = PolicyKind::from_str(run.report.policy, false).ok();
        let value = kind.as_ref().and_then(ValueEnum::to_possible_value);
        if let Some(help) = value.as_ref().and_then(|value| value.get_help()).filter(|_| explained) {
            let _ = write!(out, "<small>{}</small>", Text(&help.to_string()));
        }
        out.push_str("</th>");
    }
    out.push_str("</tr></thead>\n");
}

/// The figures that matter most, as bars too.
fn summary(out: &mut String, runs: &[Run], frame: &Frame<'_>) {
    out.push_str("<table class=\"summary\">\n");
    names(out, runs, true);
    out.push_str("<tbody>\n");
    for (label, size) in SUMMARY {
        let Some(figure) = report::ROWS.iter().copied().flatten().find(|row| row.0 == *label) else {
            continue;
        };
        // There is nothing to compare one with.
        let size = size.filter(|_| runs.len() > 1);
        let most = size.map_or(0.0, |size| runs.iter().map(|run| size(&run.report)).fold(0.0, f64::max));
        let _ = write!(out, "<tr><th scope=\"row\">{}</th>", Text(label));
        for run in runs {
            let text = figure.1(&run.report);
            match size {
                Some(size) if most > 0.0 => {
                    let share = size(&run.report) / most * 100.0;
                    let _ = write!(out, "<td class=\"bar\" style=\"--share:{share:.1}%\">{text}</td>");
                }
                _ => {
                    let _ = write!(out, "<td>{text}</td>");
                }
            }
        }
        out.push_str("</tr>\n");
    }
    out.push_str("</tbody>\n</table>\n");
    for run in runs.iter().filter(|run| frame.cuts(run)) {
        let _ = writeln!(
            out,
            "<p class=\"note\">{} serves until {} s; its panels show as much of that as the others take.</p>",
            Text(run.report.policy),
            run.seconds()
        );
    }
}

fn write_row(out: &mut String, row: &Row) {
    let _ = write!(out, "<section class=\"{}\">\n<h2>{}</h2><p>", row.height, Text(row.title));
    if !row.note.is_empty() {
        let _ = write!(out, "<span>{}</span>", Text(&row.note));
    }
    for (class, name) in &row.legend {
        let _ = write!(out, " <span><i class=\"{class}\"></i>{}</span>", Text(name));
    }
    let _ = write!(out, "</p>\n<div class=\"panels\">\n{}</div>\n</section>\n", row.panels);
}

/// The report as it is printed.
fn figures(out: &mut String, runs: &[Run]) {
    out.push_str("<table class=\"figures\">\n<caption>All figures</caption>\n");
    names(out, runs, false);
    for group in runs.iter().take(1).flat_map(|run| run.report.rows()) {
        out.push_str("<tbody>\n");
        for (label, figure) in group {
            let _ = write!(out, "<tr><th scope=\"row\">{}</th>", Text(label));
            for run in runs {
                let _ = write!(out, "<td>{}</td>", Text(&figure(&run.report)));
            }
            out.push_str("</tr>\n");
        }
        out.push_str("</tbody>\n");
    }
    out.push_str("</table>\n");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_is_made_of_the_reports_rows() {
        let rows: Vec<&str> = report::ROWS.iter().copied().flatten().map(|row| row.0).collect();
        for (label, _) in SUMMARY {
            assert!(rows.contains(label), "{label}");
        }
    }
}
