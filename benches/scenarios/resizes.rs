//! What became of the memory that a call released: was it made larger, or smaller?

use std::ops::AddAssign;

use vattn::units::Bytes;

/// Extents that took the place of released memory of another size.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Resizes {
    /// Created out of smaller ones.
    pub(crate) merged: u64,
    /// Created out of a larger one.
    pub(crate) split: u64,
}

impl AddAssign for Resizes {
    fn add_assign(&mut self, more: Self) {
        self.merged += more.merged;
        self.split += more.split;
    }
}

/// What a call that released these and created those has resized, the budget having had so much room.
///
/// The largest comes first, out of a release that is at least as large, or else out of the room. One that
/// has neither is made of what is smaller.
pub(crate) fn resizes(released: Vec<Bytes>, mut created: Vec<Bytes>, mut room: Bytes) -> Resizes {
    let mut resizes = Resizes::default();
    // What is left of each, and what it was.
    let mut released: Vec<_> = released.into_iter().map(|size| (size, size)).collect();
    created.sort_unstable();
    while let Some(size) = created.pop() {
        released.sort_unstable();
        let large_enough = released.partition_point(|(left, _)| *left < size);
        if let Some((left, whole)) = released.get_mut(large_enough) {
            resizes.split += u64::from(*whole > size);
            *left -= size;
        } else if size <= room {
            room -= size;
        } else {
            resizes.merged += 1;
            while room < size {
                room += released.pop().expect("what is created has room").0;
            }
            room -= size;
        }
    }
    resizes
}

/// Looks at calls of which it is known.
pub(crate) fn check() {
    for (released, created, room, merged, split) in [
        (&[][..], &[64, 2][..], 66, 0, 0),
        (&[64], &[64], 0, 0, 0),
        (&[64], &[32, 16, 16], 0, 0, 3),
        (&[64, 2], &[64], 0, 0, 0),
        (&[2, 32], &[64, 32], 64, 0, 0),
        (&[32, 32], &[64], 0, 1, 0),
        (&[32, 16], &[64], 16, 1, 0),
        (&[64, 16, 16], &[32, 64], 0, 1, 0),
        (&[128, 2, 2], &[64, 64, 4], 0, 1, 2),
    ] {
        let sizes = |of: &[u64]| of.iter().copied().map(Bytes::mib).collect();
        let found = resizes(sizes(released), sizes(created), Bytes::mib(room));
        assert_eq!(found, Resizes { merged, split }, "{created:?} out of {released:?} and {room}");
    }
}
