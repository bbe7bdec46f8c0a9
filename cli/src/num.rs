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
