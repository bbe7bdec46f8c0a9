//! Text of others, safe between tags and inside quoted attributes.

use std::fmt;

/// Shown as it reads: what HTML would take for a tag or an entity is escaped, and what HTML may not
/// contain is replaced.
#[derive(Clone, Copy, Debug)]
pub(super) struct Text<'a>(pub(super) &'a str);

impl fmt::Display for Text<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for character in self.0.chars() {
            match character {
                '&' => f.write_str("&amp;")?,
                '<' => f.write_str("&lt;")?,
                '>' => f.write_str("&gt;")?,
                '"' => f.write_str("&quot;")?,
                '\'' => f.write_str("&#39;")?,
                control if control.is_control() => f.write_str("\u{fffd}")?,
                '\u{fffe}' | '\u{ffff}' => f.write_str("\u{fffd}")?,
                other => write!(f, "{other}")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_of_html_is_left() {
        let text = "<b onclick=\"x('&')\">\0\n\u{9b}\u{ffff}é";
        assert_eq!(
            Text(text).to_string(),
            "&lt;b onclick=&quot;x(&#39;&amp;&#39;)&quot;&gt;\u{fffd}\u{fffd}\u{fffd}\u{fffd}é"
        );
    }
}
