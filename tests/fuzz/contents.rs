//! What is in memory: every token's bytes say whose they are, so that a stale or misplaced one is found.

use vattn::ffi::{vattn_slot, vattn_view};

/// A layer's keys or values.
#[derive(Clone, Debug)]
pub(crate) struct View {
    number: u64,
    data: usize,
    shape: [usize; 4],
    strides: [usize; 4],
    element: usize,
}

fn sizes(numbers: [i64; 4]) -> [usize; 4] {
    numbers.map(|number| usize::try_from(number).unwrap())
}

impl View {
    pub(crate) fn new(number: u64, view: &vattn_view) -> Self {
        Self {
            number,
            data: view.data.expose_provenance(),
            shape: sizes(view.shape),
            strides: sizes(view.strides),
            element: usize::try_from(view.element_bytes).unwrap(),
        }
    }

    fn row(&self, slot: vattn_slot, token: u64, head: usize) -> (usize, usize, [u8; 8]) {
        let (index, token) = (usize::try_from(slot.index).unwrap(), usize::try_from(token).unwrap());
        assert!(index < self.shape[0] && token < self.shape[1] && self.strides[3] == 1, "{self:?}");
        let elements = index * self.strides[0] + token * self.strides[1] + head * self.strides[2];
        let mut hash = slot.generation ^ self.number.rotate_left(40);
        for part in [slot.index.into(), u64::try_from(token).unwrap(), u64::try_from(head).unwrap()] {
            hash = (hash ^ part).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            hash ^= hash >> 29;
        }
        (self.data + elements * self.element, self.shape[3] * self.element, hash.to_ne_bytes())
    }

    fn write(&self, slot: vattn_slot, token: u64) {
        for head in 0..self.shape[2] {
            let (start, length, hash) = self.row(slot, token, head);
            // SAFETY: the slot holds the token, so that it is backed, and nobody else touches it.
            let bytes = unsafe {
                std::slice::from_raw_parts_mut(std::ptr::with_exposed_provenance_mut::<u8>(start), length)
            };
            for (byte, value) in bytes.iter_mut().zip(hash.iter().cycle()) {
                *byte = *value;
            }
        }
    }

    /// Where a slot's first tokens are, the bytes of an element, the shape and the strides.
    pub(crate) fn array(&self, slot: vattn_slot, tokens: u64) -> (usize, usize, [i64; 3], [i64; 3]) {
        let (start, ..) = self.row(slot, 0, 0);
        let [_, _, heads, dim] = self.shape.map(|along| i64::try_from(along).unwrap());
        let [_, token, head, one] = self.strides.map(|stride| i64::try_from(stride).unwrap());
        (start, self.element, [i64::try_from(tokens).unwrap(), heads, dim], [token, head, one])
    }

    fn touch(&self, slot: vattn_slot, token: u64) {
        for head in 0..self.shape[2] {
            let (start, ..) = self.row(slot, token, head);
            // SAFETY: none is claimed for what is not backed: the process is to die of it.
            unsafe { std::ptr::with_exposed_provenance::<u8>(start).read_volatile() };
        }
    }

    fn check(&self, slot: vattn_slot, token: u64) {
        for head in 0..self.shape[2] {
            let (start, length, hash) = self.row(slot, token, head);
            // SAFETY: likewise.
            let bytes =
                unsafe { std::slice::from_raw_parts(std::ptr::with_exposed_provenance::<u8>(start), length) };
            assert!(
                bytes.iter().zip(hash.iter().cycle()).all(|(byte, value)| byte == value),
                "token {token}, head {head} of {slot:?} in view {} holds {bytes:?} and not {hash:?}",
                self.number
            );
        }
    }
}

pub(crate) fn write(views: &[View], slot: vattn_slot, tokens: std::ops::Range<u64>) {
    for token in tokens {
        views.iter().for_each(|view| view.write(slot, token));
    }
}

/// Reads a little of each of a slot's first tokens.
pub(crate) fn touch(views: &[View], slot: vattn_slot, tokens: u64) {
    for token in 0..tokens {
        views.iter().for_each(|view| view.touch(slot, token));
    }
}

pub(crate) fn check(views: &[View], slot: vattn_slot, tokens: impl IntoIterator<Item = u64>) {
    for token in tokens {
        views.iter().for_each(|view| view.check(slot, token));
    }
}
