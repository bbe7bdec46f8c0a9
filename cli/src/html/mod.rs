//! `--html`: a replay as one page that needs nothing beside it.
//!
//! Owns how figures and series become a page: HTML with SVG in it, written here; a sheet of style and
//! a short script, included. Refuses to know the replay: it is handed reports, series, and a head with
//! what was replayed. Nothing in the page names a place outside it, a path of this machine or a date;
//! text of others is escaped in [`escape`] and nowhere else.
//!
//! ```text
//!   Report, Series ──► rows: what is drawn ──► chart: a panel ◄── scale: axes
//!                        │
//!                        ▼
//!                      page: head, summary, rows, all figures ──► file
//! ```
//!
//! Colours stand for what is drawn and not for policies: these stand side by side, on the same axes.

mod chart;
mod escape;
mod file;
mod page;
mod rows;
mod scale;

pub(crate) use file::PageFile;
pub(crate) use page::page;

use vattn::units::Bytes;

use crate::report::Report;
use crate::series::Series;

/// What was replayed.
#[derive(Clone, Debug)]
pub(crate) struct Head {
    /// The trace's name.
    pub(crate) trace: String,
    pub(crate) requests: u64,
    /// The model's name, without a path.
    pub(crate) model: String,
    pub(crate) budget: Bytes,
    /// What else was chosen: names and values.
    pub(crate) facts: Vec<(&'static str, String)>,
    /// Where the requests come from, where they are generated.
    pub(crate) source: Option<String>,
    /// The model of the server.
    pub(crate) server: &'static str,
}

/// One policy's replay.
#[derive(Clone, Debug)]
pub(crate) struct Run {
    pub(crate) report: Report,
    pub(crate) series: Series,
}
