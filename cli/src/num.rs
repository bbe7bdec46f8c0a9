//! The few conversions between kinds of numbers that have no `From`.

/// The nearest float.
pub(crate) fn float(count: u64) -> f64 {
    #[expect(clippy::as_conversions, reason = "rounds to the nearest float, as wanted; there is no `From`")]
    {
        count as f64
    }
}

/// The nearest float.
pub(crate) fn float_wide(count: u128) -> f64 {
    #[expect(clippy::as_conversions, reason = "rounds to the nearest float, as wanted; there is no `From`")]
    {
        count as f64
    }
}

/// The nearest whole number; negatives and NaN are 0, what is too large is the largest.
pub(crate) fn whole(number: f64) -> u64 {
    #[expect(clippy::as_conversions, reason = "saturates, as wanted; there is no `From`")]
    {
        number.round() as u64
    }
}

/// A length as `u64`.
pub(crate) fn wide(len: usize) -> u64 {
    u64::try_from(len).expect("a 64-bit usize is a u64")
}

/// The percentile of ascending samples, by nearest rank; 0 where there is none.
pub(crate) fn percentile(sorted: &[u64], percent: usize) -> u64 {
    let rank = (sorted.len() * percent).div_ceil(100);
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or(0)
}
