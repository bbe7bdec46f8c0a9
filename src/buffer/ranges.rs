//! An exact set of bytes, as ranges.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::units::Bytes;

/// Bytes from an offset up to another.
pub(super) type Span = Range<Bytes>;

/// Ranges of which none is empty, and no two overlap or touch.
#[derive(Debug, Default)]
pub(super) struct Ranges {
    /// The end of each by its start.
    ends: BTreeMap<Bytes, Bytes>,
    total: Bytes,
}

impl Ranges {
    /// How many bytes are in it.
    pub(super) fn total(&self) -> Bytes {
        self.total
    }

    /// Whether every byte of a range is in it.
    pub(super) fn contains(&self, span: &Span) -> bool {
        self.ends.range(..=span.start).next_back().is_some_and(|(_, end)| span.end <= *end)
    }

    /// Whether any byte of a range is in it.
    pub(super) fn touches(&self, span: &Span) -> bool {
        self.ends.range(..span.end).next_back().is_some_and(|(_, end)| span.start < *end)
    }

    /// Adds a range; what is in it already stays.
    pub(super) fn insert(&mut self, span: &Span) {
        let mut whole = span.clone();
        // From the last backwards, until one ends before the range begins.
        while let Some((&start, &end)) = self.ends.range(..=whole.end).next_back()
            && whole.start <= end
        {
            whole = whole.start.min(start)..whole.end.max(end);
            self.take(start, end);
        }
        self.put(whole);
    }

    /// Takes a range out, and says what of it was in it.
    pub(super) fn remove(&mut self, span: &Span) -> Vec<Span> {
        let mut removed = Vec::new();
        while let Some((&start, &end)) = self.ends.range(..span.end).next_back()
            && span.start < end
        {
            self.take(start, end);
            self.put(start..span.start);
            self.put(span.end..end);
            removed.push(start.max(span.start)..end.min(span.end));
        }
        removed
    }

    fn put(&mut self, span: Span) {
        if span.start < span.end {
            self.total += span.end - span.start;
            self.ends.insert(span.start, span.end);
        }
    }

    fn take(&mut self, start: Bytes, end: Bytes) {
        self.total -= end - start;
        self.ends.remove(&start);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BYTES: u64 = 24;

    fn span() -> impl Strategy<Value = (u64, u64)> {
        (0..BYTES).prop_flat_map(|start| (Just(start), start + 1..=BYTES))
    }

    fn bytes((start, end): (u64, u64)) -> Span {
        Bytes::new(start)..Bytes::new(end)
    }

    proptest! {
        #[test]
        fn a_set_of_ranges_is_a_set_of_bytes(
            changes in prop::collection::vec((any::<bool>(), span()), 0..40),
            asked in span(),
        ) {
            let mut ranges = Ranges::default();
            let mut plain = [false; 24];
            for (add, (start, end)) in changes {
                let part = &mut plain[usize::try_from(start).unwrap()..usize::try_from(end).unwrap()];
                if add {
                    ranges.insert(&bytes((start, end)));
                } else {
                    let had = u64::try_from(part.iter().filter(|byte| **byte).count()).unwrap();
                    let removed = ranges.remove(&bytes((start, end)));
                    prop_assert_eq!(removed.iter().map(|span| span.end - span.start).sum::<Bytes>(), had.into());
                    prop_assert!(removed.iter().all(|span| !ranges.touches(span)));
                }
                part.fill(add);
            }
            let part = &plain[usize::try_from(asked.0).unwrap()..usize::try_from(asked.1).unwrap()];
            prop_assert_eq!(ranges.contains(&bytes(asked)), part.iter().all(|byte| *byte));
            prop_assert_eq!(ranges.touches(&bytes(asked)), part.iter().any(|byte| *byte));
            prop_assert_eq!(ranges.total().get(), u64::try_from(plain.iter().filter(|byte| **byte).count()).unwrap());
            // Coalesced: as many ranges as the plain set has beginnings.
            let begins = (0..plain.len()).filter(|&at| plain[at] && (at == 0 || !plain[at - 1])).count();
            prop_assert_eq!(ranges.ends.len(), begins);
        }
    }
}
