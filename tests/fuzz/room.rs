//! Places for outputs, which are untouched after a failure, and what is wrong with a call.

use vattn::ffi::vattn_status::{self, *};

use super::source::Source;

/// How many arguments are right for one that is wrong.
pub(crate) const WRONG: u64 = 20;

/// What a call may come to for what is wrong with its arguments.
#[derive(Debug, Default)]
pub(crate) struct Expect {
    must: Vec<vattn_status>,
    may: Vec<vattn_status>,
}

impl Expect {
    pub(crate) fn spoil(&mut self, status: vattn_status) {
        self.must.push(status);
    }

    /// An argument is odd: it may be refused so.
    pub(crate) fn may(&mut self, status: vattn_status) {
        self.may.push(status);
    }

    pub(crate) fn is_good(&self) -> bool {
        self.must.is_empty()
    }

    pub(crate) fn allows(&self, status: vattn_status) -> bool {
        self.must.contains(&status) || self.may.contains(&status)
    }
}

const PATTERN: u64 = 0xa5a5_a5a5_a5a5_a5a5;
/// Bytes behind a place that must stay as they are.
const BEHIND: usize = 32;

enum How {
    Good,
    Null,
    Misaligned,
}

/// A place for an output.
pub(crate) struct Room {
    words: Vec<u64>,
    before: Vec<u64>,
    how: How,
    /// Bytes that may be written.
    size: usize,
    /// Bytes of the type.
    known: usize,
    sized: bool,
}

fn words(bytes: usize) -> usize {
    (bytes + BEHIND).div_ceil(8)
}

impl Room {
    /// For a plain output.
    pub(crate) fn new<T>(s: &mut impl Source, expect: &mut Expect) -> Self {
        Self::array::<T>(s, expect, 1)
    }

    /// For an array of outputs.
    pub(crate) fn array<T>(s: &mut impl Source, expect: &mut Expect, count: usize) -> Self {
        let mut how = How::Good;
        if s.one_in(WRONG) {
            how = if align_of::<T>() > 1 && s.one_in(2) { How::Misaligned } else { How::Null };
            if count > 0 {
                expect.spoil(VATTN_INVALID_ARGUMENT);
            }
        }
        let known = size_of::<T>() * count;
        let room = vec![PATTERN; words(known + 8)];
        Self { before: room.clone(), words: room, how, size: known, known, sized: false }
    }

    /// For a struct that begins with its size.
    pub(crate) fn sized<T>(s: &mut impl Source, expect: &mut Expect) -> Self {
        let known = size_of::<T>();
        let mut size = known;
        if s.one_in(WRONG) {
            size = s.pick(&[0, 1, known - 1, known / 2, 65_537, usize::MAX, 1 << 32]);
            expect.spoil(VATTN_INVALID_ARGUMENT);
        } else if s.one_in(8) {
            size = s.pick(&[known + 1, known + 8, known + 100, 65_536]);
        }
        Self::with_size::<T>(s, expect, size)
    }

    /// The same, of a size that somebody else has chosen.
    pub(crate) fn with_size<T>(s: &mut impl Source, expect: &mut Expect, size: usize) -> Self {
        let mut room = Self::new::<T>(s, expect);
        room.sized = true;
        let can_be = size <= 65_536;
        room.size = if can_be { size } else { room.known };
        room.words = vec![PATTERN; words(room.size.max(room.known) + 8)];
        room.words[0] = u64::try_from(size).unwrap();
        room.before = room.words.clone();
        room
    }

    pub(crate) fn at<T>(&mut self) -> *mut T {
        match self.how {
            How::Good => self.words.as_mut_ptr().cast(),
            How::Null => std::ptr::null_mut(),
            How::Misaligned => self.words.as_mut_ptr().cast::<u8>().wrapping_add(1).cast(),
        }
    }

    fn bytes(words: &[u64]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    /// Nothing is written by a failure, and nothing beyond the place by a success.
    pub(crate) fn check(&self, status: vattn_status) {
        if status != VATTN_OK {
            assert_eq!(self.words, self.before, "{status:?} has written an output");
            return;
        }
        let (after, before) = (Self::bytes(&self.words), Self::bytes(&self.before));
        assert_eq!(after[self.size..], before[self.size..], "written beyond the place");
        if self.sized {
            assert_eq!(self.words[0], self.before[0], "struct_size was changed");
            assert!(
                after[self.known.min(self.size)..self.size].iter().all(|byte| *byte == 0),
                "newer fields are not 0"
            );
        }
    }

    /// A struct of zeros behind its size, for one that goes in.
    pub(crate) fn zero(&mut self) {
        self.words[1..].fill(0);
    }

    /// A struct of these numbers behind its size, and zeros behind them.
    pub(crate) fn fill(&mut self, numbers: &[u64]) {
        self.zero();
        self.words[1..=numbers.len()].copy_from_slice(numbers);
    }

    /// What was written there.
    pub(crate) fn get<T: Copy>(&self) -> T {
        assert!(size_of::<T>() <= self.known);
        // SAFETY: the function has succeeded, and so written one; callers name types of plain numbers.
        unsafe { self.words.as_ptr().cast::<T>().read() }
    }

    /// The n-th byte, where there is an array of them.
    pub(crate) fn byte(&self, n: usize) -> u8 {
        Self::bytes(&self.words)[n]
    }
}
