//! Numbers that carry their unit in their type.
//!
//! Bytes, granules and tokens are all 64-bit counts, and mixing two of them up is the classic bug
//! of an allocator. Here each has a type of its own with a private field and checked arithmetic,
//! and there is one door between bytes and granules: [`GranuleSize`].
//!
//! This module knows no other room.

use std::fmt;

use serde::{Deserialize, Serialize};

#[cfg(not(target_pointer_width = "64"))]
compile_error!("vattn reserves terabytes of addresses and needs a 64-bit target");

/// An index as `usize`, on the 64-bit targets that this crate supports.
pub(crate) const fn index(value: u32) -> usize {
    #[expect(clippy::as_conversions, reason = "u32 always fits a 64-bit usize; `From` is not const")]
    {
        value as usize
    }
}

/// A length as `u64`, on the 64-bit targets that this crate supports.
pub(crate) const fn wide(value: usize) -> u64 {
    #[expect(clippy::as_conversions, reason = "a 64-bit usize is a u64; there is no `From`")]
    {
        value as u64
    }
}

/// The greatest common divisor; 0 counts as a multiple of everything.
pub(crate) const fn gcd(mut a: u64, mut b: u64) -> u64 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

macro_rules! count {
    ($(#[$doc:meta])* $name:ident, $unit:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        #[serde(transparent)]
        #[repr(transparent)]
        pub struct $name(u64);

        impl $name {
            #[doc = concat!("No ", $unit, "s.")]
            pub const ZERO: Self = Self(0);

            #[doc = concat!("That many ", $unit, "s.")]
            #[must_use]
            pub const fn new(count: u64) -> Self {
                Self(count)
            }

            #[doc = concat!("The number of ", $unit, "s.")]
            #[must_use]
            pub const fn get(self) -> u64 {
                self.0
            }

            /// Whether this is none at all.
            #[must_use]
            pub const fn is_zero(self) -> bool {
                self.0 == 0
            }

            /// The sum, or `None` past 2^64.
            #[must_use]
            pub const fn checked_add(self, other: Self) -> Option<Self> {
                match self.0.checked_add(other.0) {
                    Some(sum) => Some(Self(sum)),
                    None => None,
                }
            }

            /// The difference, or `None` below zero.
            #[must_use]
            pub const fn checked_sub(self, other: Self) -> Option<Self> {
                match self.0.checked_sub(other.0) {
                    Some(rest) => Some(Self(rest)),
                    None => None,
                }
            }

            /// The difference, or zero where `other` is the larger.
            #[must_use]
            pub const fn saturating_sub(self, other: Self) -> Self {
                Self(self.0.saturating_sub(other.0))
            }

            /// That many times as many, or `None` past 2^64.
            #[must_use]
            pub const fn checked_mul(self, times: u64) -> Option<Self> {
                match self.0.checked_mul(times) {
                    Some(product) => Some(Self(product)),
                    None => None,
                }
            }
        }

        impl std::ops::Add for $name {
            type Output = Self;
            /// # Panics
            /// Past 2^64, in release builds too: a wrapped size would corrupt memory.
            fn add(self, other: Self) -> Self {
                self.checked_add(other).expect(concat!($unit, " counts stay below 2^64"))
            }
        }

        impl std::ops::Sub for $name {
            type Output = Self;
            /// # Panics
            /// Below zero, in release builds too: a wrapped size would corrupt memory.
            fn sub(self, other: Self) -> Self {
                self.checked_sub(other).expect(concat!("more ", $unit, "s are taken away than there are"))
            }
        }

        impl std::ops::AddAssign for $name {
            fn add_assign(&mut self, other: Self) {
                *self = *self + other;
            }
        }

        impl std::ops::SubAssign for $name {
            fn sub_assign(&mut self, other: Self) {
                *self = *self - other;
            }
        }

        impl std::ops::Mul<u64> for $name {
            type Output = Self;
            fn mul(self, times: u64) -> Self {
                self.checked_mul(times).expect(concat!($unit, " counts stay below 2^64"))
            }
        }

        impl std::iter::Sum for $name {
            fn sum<I: Iterator<Item = Self>>(counts: I) -> Self {
                counts.fold(Self::ZERO, |total, count| total + count)
            }
        }

        impl From<u64> for $name {
            fn from(count: u64) -> Self {
                Self(count)
            }
        }
    };
}

count! {
    /// A number of bytes.
    Bytes, "byte"
}
count! {
    /// A number of granules: the driver's units of allocation.
    Granules, "granule"
}
count! {
    /// A number of tokens.
    TokenCount, "token"
}

impl Bytes {
    /// 2^20 bytes, that many times.
    #[must_use]
    pub const fn mib(count: u64) -> Self {
        Self(count << 20)
    }

    /// 2^30 bytes, that many times.
    #[must_use]
    pub const fn gib(count: u64) -> Self {
        Self(count << 30)
    }

    /// The smallest multiple of `step` that is not less, or `None` past 2^64 or for a step of 0.
    #[must_use]
    pub const fn checked_next_multiple_of(self, step: Self) -> Option<Self> {
        match self.0.checked_next_multiple_of(step.0) {
            Some(rounded) => Some(Self(rounded)),
            None => None,
        }
    }
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} B", self.0)
    }
}

/// Exact: the largest binary unit that divides the number, or two decimals and the exact bytes.
impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [(u32, &str); 4] = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
        for (shift, unit) in UNITS {
            let whole = self.0 >> shift;
            if whole == 0 {
                continue;
            }
            let rest = self.0 & ((1 << shift) - 1);
            if rest == 0 {
                return write!(f, "{whole} {unit}");
            }
            let hundredths = (u128::from(rest) * 100) >> shift;
            return write!(f, "{whole}.{hundredths:02} {unit} ({} bytes)", self.0);
        }
        write!(f, "{} bytes", self.0)
    }
}

impl fmt::Debug for Granules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} granules", self.0)
    }
}

impl fmt::Display for Granules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl fmt::Debug for TokenCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} tokens", self.0)
    }
}

impl fmt::Display for TokenCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// The size of a driver's granule, a power of two; the only door between [`Bytes`] and [`Granules`].
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct GranuleSize {
    shift: u32,
}

impl GranuleSize {
    /// A granule of that many bytes; `None` unless it is a power of two.
    #[must_use]
    pub const fn new(size: Bytes) -> Option<Self> {
        if size.get().is_power_of_two() { Some(Self { shift: size.get().trailing_zeros() }) } else { None }
    }

    /// One granule in bytes.
    #[must_use]
    pub const fn bytes(self) -> Bytes {
        Bytes(1 << self.shift)
    }

    /// The granules that hold that many bytes, the last perhaps in part.
    #[must_use]
    pub const fn covering(self, bytes: Bytes) -> Granules {
        let whole = bytes.0 >> self.shift;
        let rest = bytes.0 & ((1 << self.shift) - 1);
        Granules(if rest == 0 { whole } else { whole + 1 })
    }

    /// The whole granules that fit into that many bytes.
    #[must_use]
    pub const fn within(self, bytes: Bytes) -> Granules {
        Granules(bytes.0 >> self.shift)
    }

    /// Whether that many bytes are whole granules.
    #[must_use]
    pub const fn divides(self, bytes: Bytes) -> bool {
        bytes.0 & ((1 << self.shift) - 1) == 0
    }

    /// That many granules in bytes.
    ///
    /// # Panics
    /// Past 2^64 bytes.
    #[must_use]
    pub const fn to_bytes(self, granules: Granules) -> Bytes {
        assert!(granules.0 <= u64::MAX >> self.shift, "granules stay below 2^64 bytes");
        Bytes(granules.0 << self.shift)
    }
}

impl fmt::Debug for GranuleSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GranuleSize({})", self.bytes())
    }
}

/// How large an extent is: 2^k granules, k from 0 to 8.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SizeClass(u8);

impl SizeClass {
    /// How many classes there are.
    pub const COUNT: usize = 9;
    /// One granule.
    pub const SMALLEST: Self = Self(0);
    /// 256 granules: 512 MiB where a granule is 2 MiB.
    pub const LARGEST: Self = Self(8);

    /// The class of 2^k granules; `None` past the largest.
    #[must_use]
    pub const fn new(exponent: u8) -> Option<Self> {
        if exponent <= Self::LARGEST.0 { Some(Self(exponent)) } else { None }
    }

    /// The largest class of at most that many granules; `None` for none at all.
    #[must_use]
    pub const fn at_most(granules: Granules) -> Option<Self> {
        match granules.get().checked_ilog2() {
            None => None,
            #[expect(clippy::as_conversions, reason = "a number below 8; `try_from` is not const")]
            Some(log) if log < 8 => Some(Self(log as u8)),
            Some(_) => Some(Self::LARGEST),
        }
    }

    /// Every class, smallest first.
    pub fn all() -> impl DoubleEndedIterator<Item = Self> + ExactSizeIterator {
        (0..=Self::LARGEST.0).map(Self)
    }

    /// How many granules an extent of this class has.
    #[must_use]
    pub const fn granules(self) -> Granules {
        Granules(1 << self.0)
    }

    /// The class's number, from 0.
    #[must_use]
    pub const fn index(self) -> usize {
        #[expect(clippy::as_conversions, reason = "widening; `From` is not const")]
        {
            self.0 as usize
        }
    }
}

/// An address that a kernel running on the device understands. For the host backend it is an
/// ordinary pointer's number.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
#[repr(transparent)]
pub struct DeviceAddr(u64);

impl DeviceAddr {
    /// The address with that number.
    #[must_use]
    pub const fn new(addr: u64) -> Self {
        Self(addr)
    }

    /// The address as a number.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The address that many bytes on, or `None` past 2^64.
    #[must_use]
    pub const fn checked_add(self, offset: Bytes) -> Option<Self> {
        match self.0.checked_add(offset.0) {
            Some(addr) => Some(Self(addr)),
            None => None,
        }
    }

    /// How far this address lies behind `base`, or `None` if it lies before it.
    #[must_use]
    pub const fn checked_offset_from(self, base: Self) -> Option<Bytes> {
        match self.0.checked_sub(base.0) {
            Some(offset) => Some(Bytes(offset)),
            None => None,
        }
    }
}

impl std::ops::Add<Bytes> for DeviceAddr {
    type Output = Self;
    /// # Panics
    /// Past 2^64.
    fn add(self, offset: Bytes) -> Self {
        self.checked_add(offset).expect("addresses inside a reservation stay below 2^64")
    }
}

impl fmt::Debug for DeviceAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Display for DeviceAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A request's place in every tensor, together with the proof that it is this request's: a number
/// that is never given twice in one cache, and the cache it belongs to.
///
/// [`index`](Self::index) is the number that kernels take (`cache_batch_idx`). An id that outlives
/// its request is refused with [`ErrorKind::StaleSlot`](crate::ErrorKind::StaleSlot), one of another
/// cache with [`ErrorKind::ForeignSlot`](crate::ErrorKind::ForeignSlot).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C)]
pub struct SlotId {
    index: u32,
    cache: u32,
    generation: u64,
}

impl SlotId {
    pub(crate) const fn new(index: u32, cache: u32, generation: u64) -> Self {
        Self { index, cache, generation }
    }

    /// The first dimension's index in every tensor: the number that kernels take.
    #[must_use]
    pub const fn index(self) -> u32 {
        self.index
    }

    /// Which of the index's successive requests this is: 1 for the first.
    #[must_use]
    pub const fn generation(self) -> u64 {
        self.generation
    }

    pub(crate) const fn cache(self) -> u32 {
        self.cache
    }
}

impl fmt::Debug for SlotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "slot {} (generation {}, cache {})", self.index, self.generation, self.cache)
    }
}

impl fmt::Display for SlotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.index)
    }
}

/// Where memory lives, as DLPack and PyTorch name it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Device {
    /// The processor's memory.
    Cpu,
    /// A CUDA device by its ordinal.
    Cuda(u32),
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn granules_and_bytes_meet_at_one_door() {
        let granule = GranuleSize::new(Bytes::mib(2)).unwrap();
        assert_eq!(granule.covering(Bytes::ZERO), Granules::ZERO);
        assert_eq!(granule.covering(Bytes::new(1)), Granules::new(1));
        assert_eq!(granule.covering(Bytes::mib(2)), Granules::new(1));
        assert_eq!(granule.within(Bytes::mib(3)), Granules::new(1));
        assert_eq!(granule.to_bytes(Granules::new(3)), Bytes::mib(6));
        assert_eq!(granule.covering(Bytes::new(u64::MAX)), Granules::new(1 << 43));
        assert!(granule.divides(Bytes::mib(4)) && !granule.divides(Bytes::mib(3)));
        assert_eq!(GranuleSize::new(Bytes::mib(3)), None);
        assert_eq!(GranuleSize::new(Bytes::ZERO), None);
    }

    #[test]
    fn arithmetic_is_checked() {
        let most = Bytes::new(u64::MAX);
        assert_eq!(most.checked_add(Bytes::new(1)), None);
        assert_eq!(most.checked_mul(2), None);
        assert_eq!(Bytes::ZERO.checked_sub(Bytes::new(1)), None);
        assert_eq!(Bytes::ZERO.saturating_sub(Bytes::new(1)), Bytes::ZERO);
        assert_eq!(DeviceAddr::new(u64::MAX).checked_add(Bytes::new(1)), None);
    }

    #[test]
    #[should_panic(expected = "more granules are taken away than there are")]
    fn a_count_below_zero_panics_in_release_too() {
        let _ = Granules::new(1) - Granules::new(2);
    }

    #[test]
    fn classes_are_powers_of_two() {
        assert_eq!(SizeClass::all().count(), SizeClass::COUNT);
        assert_eq!(SizeClass::at_most(Granules::ZERO), None);
        for (granules, expected) in [(1, 1), (3, 2), (4, 4), (255, 128), (256, 256), (1 << 40, 256)] {
            let class = SizeClass::at_most(Granules::new(granules)).unwrap();
            assert_eq!(class.granules(), Granules::new(expected));
        }
        assert_eq!(SizeClass::new(9), None);
    }

    #[test]
    fn bytes_read_exactly() {
        assert_eq!(Bytes::new(17).to_string(), "17 bytes");
        assert_eq!(Bytes::gib(64).to_string(), "64 GiB");
        assert_eq!(Bytes::new(1536).to_string(), "1.50 KiB (1536 bytes)");
        assert_eq!(Bytes::mib(3 << 10).to_string(), "3 GiB");
    }
}
