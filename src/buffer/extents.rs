//! Which extents lie behind a buffer's addresses.
//!
//! Owns the memory, mapped or not. Refuses to know which bytes are wanted, but for those that it is shown
//! when memory is to be given up. An extent has 2^k granules and lies at a multiple of its own size.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::ranges::{Ranges, Span};
use crate::driver::owned::{DriverHandle, MapError, Mapping, PhysicalMemory, Reservation};
use crate::error::{Error, ErrorKind, Result};
use crate::units::Bytes;

/// From how many extents on the device is asked what it has before any is created.
const MANY: u64 = 64;

#[derive(Debug)]
pub(super) struct Extents {
    // Dropped in this order: mappings, memory, addresses.
    mapped: BTreeMap<Bytes, Extent>,
    /// Memory that is behind no address and that the driver would not take back yet.
    unreleased: Vec<PhysicalMemory>,
    held: Bytes,
    reservation: Arc<Reservation>,
    driver: DriverHandle,
    largest: Bytes,
}

#[derive(Debug)]
struct Extent {
    mapping: Mapping,
    memory: PhysicalMemory,
    /// Not so where the driver gave no access and then would not unmap.
    usable: bool,
}

/// Why memory was not given up.
#[derive(Debug)]
pub(super) struct Refused {
    pub(super) error: Error,
    /// What is backed no more, as it could not be mapped back.
    pub(super) lost: Vec<Span>,
}

/// How large the extent at `gap`'s start is: the largest that its place allows.
fn size_at(gap: &Span, largest: Bytes) -> Bytes {
    let room = 1 << (gap.end - gap.start).get().ilog2();
    let aligned = 1_u64.checked_shl(gap.start.get().trailing_zeros()).unwrap_or(u64::MAX);
    Bytes::new(aligned.min(room).min(largest.get()))
}

impl Extents {
    pub(super) fn new(driver: DriverHandle, reservation: Arc<Reservation>, largest: Bytes) -> Self {
        let (mapped, unreleased, held) = (BTreeMap::new(), Vec::new(), Bytes::ZERO);
        Self { mapped, unreleased, held, reservation, driver, largest }
    }

    /// Bytes that were created and not released.
    pub(super) fn held(&self) -> Bytes {
        self.held
    }

    /// Puts memory behind every granule of a range that has none. Whole or not at all.
    pub(super) fn back(&mut self, span: &Span) -> Result<()> {
        self.clear_unusable(span)?;
        let gaps = self.gaps(span);
        self.ask_first(&gaps)?;
        let mut made = Vec::new();
        for mut gap in gaps {
            while gap.start < gap.end {
                let size = size_at(&gap, self.largest);
                match self.make(gap.start, size) {
                    Ok(extent) => made.push((gap.start, extent)),
                    Err(error) => {
                        self.undo(made);
                        return Err(error);
                    }
                }
                gap.start += size;
            }
        }
        self.mapped.extend(made);
        Ok(())
    }

    /// Gives up the extents in a range in which no byte is `wanted`. Nobody uses them any more.
    ///
    /// Memory is released once all are unmapped. Where one is not, the others are mapped back with what
    /// was in them.
    pub(super) fn give_up(&mut self, span: &Span, wanted: &Ranges) -> Result<(), Refused> {
        let unwanted = self.within(span, |extent| !wanted.touches(extent));
        let mut unmapped = Vec::new();
        for offset in unwanted {
            match self.unmap(offset) {
                Ok(memory) => unmapped.push((offset, memory)),
                Err(error) => return Err(Refused { error, lost: self.map_back(unmapped) }),
            }
        }
        self.release_kept();
        unmapped.into_iter().for_each(|(_, memory)| self.release(memory));
        Ok(())
    }

    /// The extents that lie in a range or reach into it, as far as they are asked for.
    fn within(&self, span: &Span, asked: impl Fn(&Span) -> bool) -> Vec<Bytes> {
        let reaching = self.mapped.range(..span.start).next_back();
        let reaching = reaching.filter(|(offset, extent)| **offset + extent.memory.size() > span.start);
        let extents = reaching.into_iter().chain(self.mapped.range(span.clone()));
        extents
            .filter(|(offset, extent)| asked(&(**offset..**offset + extent.memory.size())))
            .map(|(offset, _)| *offset)
            .collect()
    }

    /// What of a range has nothing behind it.
    fn gaps(&self, span: &Span) -> Vec<Span> {
        let mut gaps = Vec::new();
        let mut at = span.start;
        for offset in self.within(span, |_| true) {
            if at < offset {
                gaps.push(at..offset);
            }
            at = offset + self.mapped[&offset].memory.size();
        }
        if at < span.end {
            gaps.push(at..span.end);
        }
        gaps
    }

    /// Refuses what the device can't have, before all that it does have is taken.
    fn ask_first(&self, gaps: &[Span]) -> Result<()> {
        let needed: Bytes = gaps.iter().map(|gap| gap.end - gap.start).sum();
        if needed.get() / self.largest.get() < MANY {
            return Ok(());
        }
        let total = self.driver.memory_info()?.total;
        if self.held.checked_add(needed).is_some_and(|all| all <= total) {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::OutOfDeviceMemory,
            format!(
                "{needed} are to be created, {} are held already, and the device has {total} in all; commit less",
                self.held
            ),
        ))
    }

    fn make(&mut self, offset: Bytes, size: Bytes) -> Result<Extent> {
        let memory = self.memory(size)?;
        match self.reservation.map(offset, &memory) {
            Ok(mapping) => Ok(Extent { mapping, memory, usable: true }),
            Err(failed) => Err(self.settle(offset, memory, failed)),
        }
    }

    /// Memory that could not be mapped is given back, unless it is stuck where it is.
    fn settle(&mut self, offset: Bytes, memory: PhysicalMemory, failed: MapError) -> Error {
        match failed.stuck {
            Some(mapping) => drop(self.mapped.insert(offset, Extent { mapping, memory, usable: false })),
            None => self.release(memory),
        }
        failed.error
    }

    fn memory(&mut self, size: Bytes) -> Result<PhysicalMemory> {
        if let Some(fits) = self.unreleased.iter().position(|memory| memory.size() == size) {
            return Ok(self.unreleased.swap_remove(fits));
        }
        self.release_kept();
        let memory = PhysicalMemory::new(&self.driver, size)?;
        self.held += size;
        Ok(memory)
    }

    /// What the driver will not unmap stays an extent like any other, with nothing in it that is wanted.
    fn undo(&mut self, made: Vec<(Bytes, Extent)>) {
        for (offset, Extent { mapping, memory, usable }) in made.into_iter().rev() {
            match mapping.unmap() {
                Ok(()) => self.release(memory),
                Err((mapping, error)) => {
                    tracing::warn!(
                        error = error.report(),
                        "the driver would not undo: memory stays behind a buffer"
                    );
                    self.mapped.insert(offset, Extent { mapping, memory, usable });
                }
            }
        }
    }

    /// Unmaps an extent, or leaves it where it is.
    fn unmap(&mut self, offset: Bytes) -> Result<PhysicalMemory> {
        let Extent { mapping, memory, usable } =
            self.mapped.remove(&offset).expect("it was found in the books under the same lock");
        match mapping.unmap() {
            Ok(()) => Ok(memory),
            Err((mapping, error)) => {
                self.mapped.insert(offset, Extent { mapping, memory, usable });
                Err(error)
            }
        }
    }

    /// Undoes an unmapping, and says where that was not possible.
    fn map_back(&mut self, unmapped: Vec<(Bytes, PhysicalMemory)>) -> Vec<Span> {
        let mut lost = Vec::new();
        for (offset, memory) in unmapped.into_iter().rev() {
            let span = offset..offset + memory.size();
            match self.reservation.map(offset, &memory) {
                Ok(mapping) => drop(self.mapped.insert(offset, Extent { mapping, memory, usable: true })),
                Err(failed) => {
                    let error = self.settle(offset, memory, failed);
                    tracing::error!(
                        error = error.report(),
                        ?span,
                        "a buffer's memory could not be mapped back"
                    );
                    lost.push(span);
                }
            }
        }
        lost
    }

    /// What could neither be used nor taken away lies in the way, and is tried again.
    fn clear_unusable(&mut self, span: &Span) -> Result<()> {
        for offset in self.within(span, |extent| !self.mapped[&extent.start].usable) {
            match self.unmap(offset) {
                Ok(memory) => self.release(memory),
                Err(error) => {
                    return Err(error.context(format!(
                        "memory without access lies at offset {offset}, and the driver will not unmap it; commit again"
                    )));
                }
            }
        }
        Ok(())
    }

    fn release(&mut self, memory: PhysicalMemory) {
        let size = memory.size();
        match memory.release() {
            Ok(()) => self.held -= size,
            Err((memory, error)) => {
                tracing::warn!(
                    error = error.report(),
                    "the driver would not take memory back; it will be asked again"
                );
                self.unreleased.push(memory);
            }
        }
    }

    /// Tries again to give back what the driver would not take.
    fn release_kept(&mut self) {
        std::mem::take(&mut self.unreleased).into_iter().for_each(|memory| self.release(memory));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_extent_is_as_large_as_its_place_allows() {
        let sizes = |start: u64, end: u64, largest| {
            let mut gap = Bytes::new(start)..Bytes::new(end);
            let mut sizes = Vec::new();
            while gap.start < gap.end {
                let size = size_at(&gap, Bytes::new(largest));
                gap.start += size;
                sizes.push(size.get());
            }
            sizes
        };
        assert_eq!(sizes(0, 16, 16), [16]);
        assert_eq!(sizes(0, 16, 4), [4, 4, 4, 4]);
        assert_eq!(sizes(0, 15, 64), [8, 4, 2, 1]);
        assert_eq!(sizes(1, 16, 64), [1, 2, 4, 8]);
        assert_eq!(sizes(3, 21, 8), [1, 4, 8, 4, 1]);
    }
}
