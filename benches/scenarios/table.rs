//! Tables, as text that is Markdown too, and as JSON.

use std::fmt;
use std::time::Duration;

use serde_json::{Map, Value, json};
use vattn::units::Bytes;

/// What stands in a row. Times are in microseconds, as the heads of their columns say.
#[derive(Clone, Debug)]
pub(crate) enum Cell {
    Text(String),
    Count(u64),
    Time(Duration),
    Number(f64),
    Size(Bytes),
    /// A goal, and whether it is met.
    Goal {
        text: String,
        met: bool,
    },
    Nothing,
}

impl Cell {
    pub(crate) fn text(text: impl Into<String>) -> Self {
        Self::Text(text.into())
    }

    /// A goal that is asked for if `asked`.
    pub(crate) fn goal(asked: bool, text: impl Into<String>, met: bool) -> Self {
        if asked { Self::Goal { text: text.into(), met } } else { Self::Nothing }
    }

    fn to_json(&self) -> Value {
        match self {
            Self::Text(text) => json!(text),
            Self::Count(count) => json!(count),
            Self::Time(time) => json!(micros(*time)),
            Self::Number(number) => json!(number),
            Self::Size(size) => json!(size.get()),
            Self::Goal { text, met } => json!({ "goal": text, "met": met }),
            Self::Nothing => Value::Null,
        }
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(text) => f.write_str(text),
            Self::Count(count) => write!(f, "{count}"),
            Self::Time(time) if micros(*time) < 100.0 => write!(f, "{:.2}", micros(*time)),
            Self::Time(time) => write!(f, "{:.0}", micros(*time)),
            Self::Number(number) if *number < 10.0 => write!(f, "{number:.3}"),
            Self::Number(number) => write!(f, "{number:.1}"),
            Self::Size(size) => write!(f, "{}", size.to_string().split(" (").next().unwrap_or_default()),
            Self::Goal { text, met } => write!(f, "{text}: {}", if *met { "met" } else { "MISSED" }),
            Self::Nothing => f.write_str("–"),
        }
    }
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

/// A table with what is to be said about it.
#[derive(Debug)]
pub(crate) struct Table {
    title: String,
    columns: Vec<&'static str>,
    rows: Vec<Vec<Cell>>,
    notes: Vec<String>,
}

impl Table {
    pub(crate) fn new(title: impl Into<String>, columns: &[&'static str]) -> Self {
        Self { title: title.into(), columns: columns.to_vec(), rows: Vec::new(), notes: Vec::new() }
    }

    /// Adds a row of as many cells as there are columns.
    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = Cell>) {
        let row: Vec<_> = cells.into_iter().collect();
        assert_eq!(row.len(), self.columns.len(), "a cell for each column of {}", self.title);
        self.rows.push(row);
    }

    pub(crate) fn note(&mut self, note: impl Into<String>) {
        self.notes.push(note.into());
    }

    /// How many goals are missed.
    pub(crate) fn missed(&self) -> usize {
        self.rows.iter().flatten().filter(|cell| matches!(cell, Cell::Goal { met: false, .. })).count()
    }

    pub(crate) fn to_json(&self, device: &str, scenario: &str) -> Value {
        let rows: Vec<Value> = self
            .rows
            .iter()
            .map(|row| {
                let cells = self.columns.iter().zip(row);
                Value::Object(
                    cells.map(|(name, cell)| ((*name).to_owned(), cell.to_json())).collect::<Map<_, _>>(),
                )
            })
            .collect();
        json!({ "device": device, "scenario": scenario, "title": self.title, "notes": self.notes, "rows": rows })
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rows: Vec<Vec<String>> =
            self.rows.iter().map(|row| row.iter().map(Cell::to_string).collect()).collect();
        let width = |column: usize| {
            let cells = rows.iter().map(|row| row[column].chars().count());
            cells.chain([self.columns[column].chars().count()]).max().unwrap_or_default()
        };
        let line = |f: &mut fmt::Formatter<'_>, cells: &mut dyn Iterator<Item = &str>| {
            for (column, cell) in cells.enumerate() {
                write!(f, "| {cell:>0$} ", width(column))?;
            }
            writeln!(f, "|")
        };
        writeln!(f, "**{}**\n", self.title)?;
        line(f, &mut self.columns.iter().copied())?;
        for column in 0..self.columns.len() {
            write!(f, "|{}:", "-".repeat(width(column) + 1))?;
        }
        writeln!(f, "|")?;
        for row in &rows {
            line(f, &mut row.iter().map(String::as_str))?;
        }
        self.notes.iter().try_for_each(|note| writeln!(f, "\n{note}"))
    }
}
