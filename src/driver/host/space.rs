//! Where in the file a handle's memory lies.
//!
//! Owns the free ranges of the file. The file is sparse and longer than the capacity where it must
//! be: a handle always gets one range, the lowest that fits, so that what is mapped side by side
//! tends to lie side by side.
//!
//! - Free ranges neither touch each other nor reach the end of the space in use: neighbours merge,
//!   and the last one falls back to the untouched rest.

use std::collections::BTreeMap;

/// The longest file that `off_t` can address.
const FILE_MAX: u64 = i64::MAX.unsigned_abs();

#[derive(Debug, Default)]
pub(super) struct Space {
    /// Start and length of each free range below `end`.
    free: BTreeMap<u64, u64>,
    /// Everything from here on is free.
    end: u64,
    /// No free range below `end` is longer: spares a walk that can't succeed.
    longest: u64,
}

impl Space {
    /// Takes the lowest range of that length; `None` past the longest file.
    pub(super) fn take(&mut self, len: u64) -> Option<u64> {
        if len <= self.longest {
            let found = self.free.iter().find(|(_, free)| **free >= len).map(|(start, free)| (*start, *free));
            if let Some((start, free)) = found {
                self.free.remove(&start);
                if free > len {
                    self.free.insert(start + len, free - len);
                }
                return Some(start);
            }
            self.longest = self.free.values().copied().max().unwrap_or(0);
        }
        let start = self.end;
        self.end = start.checked_add(len).filter(|end| *end <= FILE_MAX)?;
        Some(start)
    }

    /// Gives back a range that was taken.
    pub(super) fn give(&mut self, start: u64, len: u64) {
        let (mut start, mut end) = (start, start + len);
        if let Some((before, free)) = self.free.range(..start).next_back().map(|(at, len)| (*at, *len))
            && before + free == start
        {
            self.free.remove(&before);
            start = before;
        }
        if let Some(free) = self.free.remove(&end) {
            end += free;
        }
        if end == self.end {
            self.end = start;
        } else {
            self.free.insert(start, end - start);
            self.longest = self.longest.max(end - start);
        }
    }

    /// How long the file has to be.
    pub(super) fn end(&self) -> u64 {
        self.end
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_lowest_range_that_fits_is_taken() {
        let mut space = Space::default();
        let starts: Vec<_> = [4, 1, 2, 1].iter().map(|len| space.take(*len).unwrap()).collect();
        assert_eq!(starts, [0, 4, 5, 7]);
        space.give(4, 1);
        space.give(0, 4);
        assert_eq!(space.take(6), Some(8), "six do not fit into the five that are free");
        assert_eq!(space.take(5), Some(0));
        space.give(8, 6);
        space.give(7, 1);
        assert_eq!(space.end(), 7);
        assert_eq!(space.take(u64::MAX), None);
    }

    proptest! {
        #[test]
        fn ranges_never_overlap_and_all_come_back(steps in prop::collection::vec((any::<bool>(), 1_u64..20, any::<prop::sample::Index>()), 1..200)) {
            let mut space = Space::default();
            let mut taken: Vec<(u64, u64)> = Vec::new();
            for (take, len, which) in steps {
                if take || taken.is_empty() {
                    let start = space.take(len).unwrap();
                    prop_assert!(taken.iter().all(|(at, size)| at + size <= start || start + len <= *at));
                    prop_assert!(start + len <= space.end());
                    taken.push((start, len));
                } else {
                    let (start, len) = taken.swap_remove(which.index(taken.len()));
                    space.give(start, len);
                }
            }
            for (start, len) in taken {
                space.give(start, len);
            }
            prop_assert_eq!((space.end(), space.free.len()), (0, 0));
        }
    }
}
