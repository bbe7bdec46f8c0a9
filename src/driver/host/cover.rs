//! What the kernel shows at which address: how many mappings that takes, and which system calls make
//! it so. Pure.
//!
//! A reservation is a row of covers: nothing (`PROT_NONE`), or a piece of the file with an access.
//! The kernel merges neighbours that go on where the other ends: nothing with nothing, and the file
//! with the file at the next offset under the same access. What is left between two neighbours is a
//! seam; a reservation takes one mapping and one more for each seam inside it.

use crate::driver::Access;
use crate::driver::books::{Mapped, Reserved};
use crate::units::{Bytes, DeviceAddr};

/// Which state of the books is looked at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum View {
    /// What the kernel shows now: a mapping without access is nothing.
    Now,
    /// What it shows once every mapping has been given access.
    Promised,
}

/// What lies at a range.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Cover {
    Nothing,
    File { place: u64, access: Access },
}

/// A system call to be made: one range, one cover.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Run {
    pub(super) addr: DeviceAddr,
    pub(super) size: Bytes,
    pub(super) cover: Cover,
}

fn cover(mapped: &Mapped, view: View) -> Cover {
    let access = match view {
        View::Now => mapped.access,
        View::Promised => Some(mapped.access.unwrap_or(Access::ReadWrite)),
    };
    match access {
        Some(access) => Cover::File { place: mapped.place, access },
        None => Cover::Nothing,
    }
}

/// Whether `right` goes on where `left`, of `size` bytes, ends.
fn goes_on(left: Cover, size: Bytes, right: Cover) -> bool {
    match (left, right) {
        (Cover::Nothing, Cover::Nothing) => true,
        (Cover::File { place, access }, Cover::File { place: next, access: other }) => {
            access == other && place + size.get() == next
        }
        _ => false,
    }
}

/// The seams of a reservation that lie in `from..=to`, its own two ends not counted.
pub(super) fn seams(base: u64, reserved: &Reserved, from: u64, to: u64, view: View) -> u64 {
    let end_of_all = base + reserved.size.get();
    let mut seams = 0;
    let mut count = |at: u64, seam: bool| {
        if seam && at >= from && at <= to && at != base && at != end_of_all {
            seams += 1;
        }
    };
    let mut left: Option<(u64, Cover, Bytes)> = None;
    let reaching_in = reserved.mappings.range(..from).next_back();
    for (start, mapped) in reaching_in.into_iter().chain(reserved.mappings.range(from..=to)) {
        let right = cover(mapped, view);
        match left.take() {
            Some((end, before, size)) if end == *start => count(*start, !goes_on(before, size, right)),
            gap => {
                if let Some((end, before, _)) = gap {
                    count(end, before != Cover::Nothing);
                }
                count(*start, right != Cover::Nothing);
            }
        }
        left = Some((start + mapped.size.get(), right, mapped.size));
    }
    if let Some((end, before, _)) = left {
        count(end, before != Cover::Nothing);
    }
    seams
}

/// The fewest runs that show those covers, which lie side by side.
pub(super) fn runs(pieces: impl Iterator<Item = (u64, Bytes, Cover)>) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for (addr, size, cover) in pieces {
        match runs.last_mut() {
            Some(last) if goes_on(last.cover, last.size, cover) => last.size += size,
            _ => runs.push(Run { addr: DeviceAddr::new(addr), size, cover }),
        }
    }
    runs
}

/// What mappings show now.
pub(super) fn shown<'a>(
    mappings: impl Iterator<Item = (u64, &'a Mapped)>,
) -> impl Iterator<Item = (u64, Bytes, Cover)> {
    mappings.map(|(addr, mapped)| (addr, mapped.size, cover(mapped, View::Now)))
}

/// What they are to show under that access.
pub(super) fn shown_with<'a>(
    mappings: impl Iterator<Item = (u64, &'a Mapped)>,
    access: Access,
) -> impl Iterator<Item = (u64, Bytes, Cover)> {
    mappings.map(move |(addr, mapped)| (addr, mapped.size, Cover::File { place: mapped.place, access }))
}
