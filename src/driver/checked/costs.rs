//! What each call costs on a GPU.

use std::time::Duration;

use crate::units::Bytes;

/// What the calls on one handle of a size cost.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CostRow {
    /// The handle's size.
    pub size: Bytes,
    /// `cuMemCreate`.
    pub create: Duration,
    /// `cuMemMap`.
    pub map: Duration,
    /// `cuMemSetAccess`, for each mapping in the range.
    pub set_access: Duration,
    /// `cuMemUnmap`, for each mapping in the range.
    pub unmap: Duration,
    /// `cuMemRelease`.
    pub release: Duration,
}

/// What a driver's calls cost, so that a test without a GPU can speak of driver time.
///
/// Between two measured sizes the cost lies on the line between them; below the smallest it is the
/// smallest's; above the largest the line through the two largest goes on. A range of several
/// mappings costs the sum over them, as measured: neither a longer range nor another thread makes it
/// cheaper.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CostModel {
    /// Ascending by size.
    pub rows: [CostRow; 6],
    /// A reservation of any size.
    pub reserve: Duration,
    /// `cuMemGetInfo`.
    pub memory_info: Duration,
}

const fn row(mib: u64, [create, map, set_access, unmap, release]: [u64; 5]) -> CostRow {
    CostRow {
        size: Bytes::mib(mib),
        create: Duration::from_nanos(create),
        map: Duration::from_nanos(map),
        set_access: Duration::from_nanos(set_access),
        unmap: Duration::from_nanos(unmap),
        release: Duration::from_nanos(release),
    }
}

impl CostModel {
    /// One NVIDIA H200, driver 580.159.04, CUDA 13.0: medians of single calls on an idle machine,
    /// measured 2026-11-22.
    ///
    /// A reservation took 2 to 18 µs; 120 of them in a row took 0.5 ms, so each is charged 4.2. Frees
    /// of addresses and calls on events were not measured and are charged nothing.
    pub const H200: Self = Self {
        rows: [
            row(2, [12_100, 1_300, 31_800, 20_900, 14_700]),
            row(8, [12_000, 1_100, 29_600, 20_500, 18_900]),
            row(32, [13_900, 1_000, 29_500, 20_900, 28_400]),
            row(64, [12_000, 1_200, 31_300, 20_000, 48_000]),
            row(128, [13_700, 1_000, 29_700, 19_100, 79_900]),
            row(512, [20_200, 1_100, 54_200, 27_500, 281_000]),
        ],
        reserve: Duration::from_nanos(4_200),
        memory_info: Duration::from_nanos(4_300),
    };

    /// Creating a handle of that size.
    #[must_use]
    pub fn create(&self, size: Bytes) -> Duration {
        self.at(size, |row| row.create)
    }

    /// Mapping it.
    #[must_use]
    pub fn map(&self, size: Bytes) -> Duration {
        self.at(size, |row| row.map)
    }

    /// Setting the access of one mapping of it.
    #[must_use]
    pub fn set_access(&self, size: Bytes) -> Duration {
        self.at(size, |row| row.set_access)
    }

    /// Unmapping one mapping of it.
    #[must_use]
    pub fn unmap(&self, size: Bytes) -> Duration {
        self.at(size, |row| row.unmap)
    }

    /// Releasing it.
    #[must_use]
    pub fn release(&self, size: Bytes) -> Duration {
        self.at(size, |row| row.release)
    }

    fn at(&self, size: Bytes, cost: impl Fn(&CostRow) -> Duration) -> Duration {
        let [smallest, .., largest] = &self.rows;
        let (low, high) = match self.rows.iter().position(|row| row.size >= size) {
            Some(place) if self.rows[place].size == size => return cost(&self.rows[place]),
            Some(0) => return cost(smallest),
            Some(place) => (&self.rows[place - 1], &self.rows[place]),
            None => (&self.rows[self.rows.len() - 2], largest),
        };
        let nanoseconds = |row| i128::try_from(cost(row).as_nanos()).unwrap_or(i128::MAX);
        let bytes = |size: Bytes| i128::from(size.get());
        let rise = nanoseconds(high) - nanoseconds(low);
        let run = bytes(high.size) - bytes(low.size);
        let ns = nanoseconds(low) + rise * (bytes(size) - bytes(low.size)) / run;
        Duration::from_nanos(u64::try_from(ns.max(0)).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measured_sizes_are_met_and_others_lie_between() {
        let costs = CostModel::H200;
        let us = |value: f64| Duration::from_secs_f64(value / 1e6);
        assert_eq!(costs.create(Bytes::mib(2)), us(12.1));
        assert_eq!(costs.create(Bytes::new(4096)), us(12.1));
        assert_eq!(costs.release(Bytes::mib(512)), us(281.0));
        assert_eq!(costs.set_access(Bytes::mib(48)), us(30.4));
        assert_eq!(costs.release(Bytes::mib(896)), us(482.1));
    }
}
