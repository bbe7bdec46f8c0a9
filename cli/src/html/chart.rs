//! A panel: one policy's picture of one thing, as SVG that stretches to the place it gets.
//!
//! Owns axes, paths and their coordinates. Refuses to know what is drawn. The drawing has no text
//! but its description: labels lie around it as HTML, so that they keep their size and lines their
//! width however wide the panel is.

use std::fmt::Write;

use super::escape::Text;
use super::scale::Scale;
use crate::num::{float, whole};

/// The drawing's own units; the page stretches them.
const WIDTH: u64 = 2400;
const HEIGHT: u64 = 600;

/// Time from left to right, and where each of a policy's columns lies in it.
#[derive(Clone, Debug)]
pub(super) struct Time<'a> {
    pub(super) scale: &'a Scale,
    /// Nanoseconds of a column.
    pub(super) width: u64,
    /// Nanoseconds at which the axis ends.
    pub(super) end: u64,
}

impl Time<'_> {
    /// Where a column begins, and how far the share `part` of 0 to 1 of it reaches.
    fn place(&self, column: usize, part: f64) -> u64 {
        let start = float(crate::num::wide(column)) + part;
        across(self.scale.place((start * float(self.width)).min(float(self.end))))
    }
}

fn across(place: f64) -> u64 {
    whole(place * float(WIDTH))
}

fn down(place: f64) -> u64 {
    HEIGHT - whole(place * float(HEIGHT))
}

/// A path of level pieces, written as short as it can be.
#[derive(Debug, Default)]
struct Steps {
    path: String,
    /// Where the pen is; `None` where it is lifted.
    pen: Option<(u64, u64)>,
    /// How far to the right it has still to go.
    due: u64,
}

impl Steps {
    fn level(&mut self, from: u64, to: u64, y: u64) {
        // Writing to a string never fails.
        match self.pen {
            Some((_, at)) if at == y => {}
            Some((x, at)) => {
                self.flush();
                let _ = write!(self.path, "v{}{}", if y < at { "-" } else { "" }, y.abs_diff(at));
                self.pen = Some((x, y));
            }
            None => {
                let _ = write!(self.path, "M{from} {y}");
                self.pen = Some((from, y));
            }
        }
        if let Some((x, _)) = &mut self.pen {
            self.due += to - *x;
            *x = to;
        }
    }

    fn flush(&mut self) {
        if self.due > 0 {
            let _ = write!(self.path, "h{}", self.due);
            self.due = 0;
        }
    }

    fn lift(&mut self) {
        self.flush();
        self.pen = None;
    }
}

/// The area below each column's value.
pub(super) fn area(
    time: &Time<'_>,
    scale: &Scale,
    values: impl IntoIterator<Item = f64>,
    class: &str,
) -> String {
    let mut steps = Steps::default();
    steps.level(0, 0, HEIGHT);
    for (column, value) in values.into_iter().enumerate() {
        steps.level(time.place(column, 0.0), time.place(column, 1.0), down(scale.place(value)));
    }
    steps.flush();
    format!("<path class=\"{class}\" d=\"{}V{HEIGHT}z\"/>", steps.path)
}

/// A line at the height of each column's value, broken where there is none.
pub(super) fn line(
    time: &Time<'_>,
    scale: &Scale,
    values: impl IntoIterator<Item = Option<f64>>,
    class: &str,
) -> String {
    let mut steps = Steps::default();
    for (column, value) in values.into_iter().enumerate() {
        match value {
            Some(value) => {
                steps.level(time.place(column, 0.0), time.place(column, 1.0), down(scale.place(value)));
            }
            None => steps.lift(),
        }
    }
    steps.flush();
    format!("<path class=\"{class}\" d=\"{}\"/>", steps.path)
}

/// Bars of one colour each, stacked: `stacks` has a column's values, from the foot upwards.
pub(super) fn bars<const N: usize>(
    time: &Time<'_>,
    scale: &Scale,
    stacks: &[[f64; N]],
    classes: [&str; N],
) -> String {
    let mut out = String::new();
    for (part, class) in classes.into_iter().enumerate() {
        let mut path = String::new();
        for (column, stack) in stacks.iter().enumerate() {
            let foot: f64 = stack[..part].iter().sum();
            let (low, high) = (down(scale.place(foot)), down(scale.place(foot + stack[part])));
            let (start, end) = (time.place(column, 0.1), time.place(column, 0.9));
            if low > high && end > start {
                let _ = write!(path, "M{start} {low}V{high}H{end}V{low}z");
            }
        }
        if !path.is_empty() {
            let _ = write!(out, "<path class=\"{class}\" d=\"{path}\"/>");
        }
    }
    out
}

/// A level line across the panel.
pub(super) fn rule(scale: &Scale, value: f64, class: &str) -> String {
    format!("<path class=\"{class}\" d=\"M0 {}H{WIDTH}\"/>", down(scale.place(value)))
}

/// A broken line at the top, where values go beyond the axis.
pub(super) fn ceiling() -> String {
    format!("<path class=\"cut\" d=\"M0 0H{WIDTH}\"/>")
}

/// What a panel shows.
#[derive(Debug, Default)]
pub(super) struct Drawn {
    /// The figure that matters most, beside the policy's name.
    pub(super) fact: String,
    /// Paths.
    pub(super) drawing: String,
    /// What the drawing is called and what it shows, for those who don't see it.
    pub(super) title: String,
    pub(super) description: String,
    /// What to say where there is nothing to draw.
    pub(super) none: Option<&'static str>,
    /// A line below the panel.
    pub(super) foot: Option<String>,
}

/// A panel of a policy.
#[derive(Debug)]
pub(super) struct Panel<'a> {
    /// Unique in the page.
    pub(super) id: &'a str,
    pub(super) name: &'a str,
    /// What to say where the run goes on beyond the axis.
    pub(super) cut: Option<String>,
    pub(super) drawn: Drawn,
}

/// The panel as HTML.
pub(super) fn panel(panel: &Panel<'_>, time: &Scale, scale: &Scale) -> String {
    let mut out = String::new();
    let Panel { id, name, cut, drawn } = panel;
    let Drawn { fact, drawing, title, description, none, foot } = drawn;
    let (name, fact) = (Text(name), Text(fact));
    let _ = write!(out, "<figure><figcaption><b>{name}</b> <span>{fact}</span></figcaption>");
    let _ = write!(out, "<div class=\"plot\" id=\"{id}\"><div class=\"y\" aria-hidden=\"true\">");
    let mut grid = String::new();
    for (value, label) in &scale.ticks {
        let place = scale.place(*value);
        let _ = write!(grid, "M0 {}H{WIDTH}", down(place));
        if !label.is_empty() {
            let _ = write!(out, "<span style=\"bottom:{:.1}%\">{label}</span>", place * 100.0);
        }
    }
    let _ = write!(
        out,
        "</div><svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" preserveAspectRatio=\"none\" role=\"img\" \
         aria-labelledby=\"{id}t {id}d\"><title id=\"{id}t\">{}</title><desc id=\"{id}d\">{}</desc>\
         <path class=\"grid\" d=\"{grid}\"/>{drawing}",
        Text(title),
        Text(description)
    );
    let _ = write!(out, "<path class=\"foot\" d=\"M0 {HEIGHT}H{WIDTH}\"/>");
    if cut.is_some() {
        let _ = write!(out, "<path class=\"cut\" d=\"M{WIDTH} 0V{HEIGHT}\"/>");
    }
    out.push_str("</svg>");
    if let Some(none) = none {
        let _ = write!(out, "<span class=\"none\">{none}</span>");
    }
    out.push_str("<div class=\"x\" aria-hidden=\"true\">");
    for (value, label) in &time.ticks {
        let place = time.place(*value);
        // The end is needed for the word that says when the run ends.
        if cut.is_some() && place > 0.35 {
            continue;
        }
        let side = match place {
            start if start < 0.02 => " class=\"first\"",
            end if end > 0.93 => " class=\"last\"",
            _ => "",
        };
        let _ = write!(out, "<span{side} style=\"left:{:.1}%\">{label}</span>", place * 100.0);
    }
    if let Some(cut) = cut {
        let _ = write!(out, "<span class=\"last goes-on\" style=\"left:100%\">{}</span>", Text(cut));
    }
    out.push_str("</div></div>");
    if let Some(foot) = foot {
        let _ = write!(out, "<p>{}</p>", Text(foot));
    }
    out.push_str("</figure>\n");
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn level_pieces_are_joined_and_gaps_lift_the_pen() {
        let scale = Scale::counts(100.0);
        let axis = Scale::time(4_000_000_000, 4);
        let time = Time { scale: &axis, width: 1_000_000_000, end: 4_000_000_000 };
        let drawn = line(&time, &scale, [Some(0.0), Some(0.0), None, Some(104.0)], "l");
        assert_eq!(drawn, "<path class=\"l\" d=\"M0 600h1200M1800 0h600\"/>");
        let drawn = area(&time, &scale, [0.0, 52.0, 52.0], "a");
        assert_eq!(drawn, "<path class=\"a\" d=\"M0 600h600v-300h1200V600z\"/>");
    }

    #[test]
    fn the_last_column_ends_with_the_axis() {
        let scale = Scale::counts(100.0);
        let axis = Scale::time(1_500_000_000, 4);
        let time = Time { scale: &axis, width: 1_000_000_000, end: 1_500_000_000 };
        let drawn = line(&time, &scale, [None, Some(0.0), Some(0.0)], "l");
        assert_eq!(drawn, "<path class=\"l\" d=\"M1600 600h800\"/>");
    }

    #[test]
    fn bars_stand_on_each_other() {
        let scale = Scale::counts(100.0);
        let axis = Scale::time(2_000_000_000, 4);
        let time = Time { scale: &axis, width: 1_000_000_000, end: 2_000_000_000 };
        let drawn = bars(&time, &scale, &[[52.0, 26.0], [0.0, 26.0]], ["one", "two"]);
        assert_eq!(
            drawn,
            "<path class=\"one\" d=\"M120 600V300H1080V600z\"/>\
             <path class=\"two\" d=\"M120 300V150H1080V300zM1320 600V450H2280V600z\"/>"
        );
    }
}
