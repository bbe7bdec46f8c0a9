//! Calls about buffers, against a set of cells: eighths of a granule.

use vattn::ffi::vattn_status::{self, *};
use vattn::ffi::{vattn_buffer_info, vattn_buffer_options};

use super::pins::{Kept, Pin};
use super::room::{Expect, Room, WRONG};
use super::slots::array;
use super::source::{Given, Source};
use super::voice::{call, handle};
use super::world::{ANYTHING, Crowd, World};

const CELLS: u64 = 8;

#[derive(Clone, Debug)]
pub(crate) struct Buffer {
    pub(crate) handle: usize,
    pub(crate) base: usize,
    pub(crate) layers: Vec<usize>,
    pub(crate) data: usize,
    pub(crate) size: u64,
    granule: u64,
    largest: u64,
    cells: Vec<bool>,
    is_host: bool,
    /// Failures were planned in its driver, or others may have got hold of it: it may be anything.
    pub(crate) is_unknown: bool,
}

impl Buffer {
    fn cell(&self) -> u64 {
        self.granule / CELLS
    }

    fn count(&self) -> u64 {
        u64::try_from(self.cells.iter().filter(|cell| **cell).count()).unwrap()
    }

    /// Granules of extents of at most so many in which something is committed.
    fn touched(&self, extent: u64) -> u64 {
        let cells = usize::try_from(extent / self.cell()).unwrap();
        let touched = self.cells.chunks(cells).filter(|cells| cells.contains(&true)).count();
        u64::try_from(touched).unwrap() * extent
    }

    /// A cell's first byte and its last.
    fn edges(&self, cell: usize) -> [*mut u8; 2] {
        let (bytes, at) = (usize::try_from(self.cell()).unwrap(), self.data);
        [cell * bytes, (cell + 1) * bytes - 1].map(|byte| std::ptr::with_exposed_provenance_mut(at + byte))
    }

    fn write(&self, cell: usize) {
        for edge in self.edges(cell) {
            // SAFETY: the cell is committed, and nobody else touches it.
            unsafe { edge.write(value(cell)) };
        }
    }

    fn check(&self) {
        for (cell, _) in self.cells.iter().enumerate().filter(|(_, committed)| **committed) {
            for edge in self.edges(cell) {
                // SAFETY: likewise.
                assert_eq!(unsafe { edge.read() }, value(cell), "cell {cell} of {self:?}");
            }
        }
    }
}

fn value(cell: usize) -> u8 {
    u8::try_from(cell % 251).unwrap() + 1
}

impl World {
    fn buffer(&self, s: &mut impl Source, expect: &mut Expect) -> (usize, Option<usize>) {
        let alive: Vec<_> = self.buffers.iter().map(|buffer| buffer.handle).collect();
        self.handle_of(s, expect, &alive)
    }

    /// What is known of a buffer, if all is.
    fn known_buffer(&self, at: Option<usize>) -> Option<usize> {
        let is_known = |at: &usize| {
            let of = &self.buffers[*at];
            !of.is_unknown && !self.is_planned(&of.layers)
        };
        at.filter(is_known).filter(|_| self.crowd == Crowd::None)
    }

    pub(crate) fn buffer_create(&mut self, s: &mut impl Source) {
        let mut expect = Expect::default();
        let (driver, driver_at) = self.driver(s, &mut expect);
        let object = driver_at.map(|at| self.drivers[at].clone());
        let base = object.as_ref().map(|driver| self.bases[driver.base].clone()).unwrap_or_default();
        let granule = base.granule.max(64);
        let size = granule * (1 + s.below(40));
        let mut given = [size - s.below(granule), granule << s.below(4)];
        match s.below(24) {
            0 => {
                given[0] = s.pick(&[0, u64::MAX]);
                expect.spoil(VATTN_INVALID_ARGUMENT);
            }
            1 => {
                given[1] = s.pick(&[1, granule / 2, granule * 3, u64::MAX]);
                expect.spoil(VATTN_INVALID_ARGUMENT);
            }
            _ => {}
        }
        let mut options = Room::sized::<vattn_buffer_options>(s, &mut expect);
        options.fill(&given);
        let mut room = Room::new::<usize>(s, &mut expect);
        let status = call!(self, vattn_buffer_create(options.at(), handle(driver), room.at()));
        room.check(status);
        let is_planned = object.as_ref().is_some_and(|driver| self.is_planned(&driver.layers));
        let refused = [VATTN_OK, VATTN_OUT_OF_ADDRESS_SPACE, VATTN_OUT_OF_MAPPINGS];
        let natural = match () {
            () if is_planned || self.crowd != Crowd::None => &ANYTHING[..],
            () if base.is_ample => &refused[..1],
            () => &refused,
        };
        self.judge(status, &expect, natural);
        let (VATTN_OK, Some(driver)) = (status, object) else { return };
        let number = room.get();
        let Some(info) = self.buffer_info(number) else { return };
        assert_eq!((info.size, info.granule, info.held), (size, granule, 0), "{given:?}");
        self.buffers.push(Buffer {
            handle: number,
            base: driver.base,
            layers: driver.layers,
            data: info.data.expose_provenance(),
            size,
            granule,
            largest: given[1],
            cells: vec![false; usize::try_from(size / granule * CELLS).unwrap()],
            is_host: base.is_host,
            is_unknown: is_planned || self.crowd != Crowd::None,
        });
    }

    fn buffer_info(&mut self, buffer: usize) -> Option<vattn_buffer_info> {
        let size = size_of::<vattn_buffer_info>();
        let mut room = Room::with_size::<vattn_buffer_info>(&mut Given(&[1]), &mut Expect::default(), size);
        let status = call!(self, vattn_buffer_describe(handle(buffer), room.at()));
        // Others may have ended it already.
        assert!(status == VATTN_OK || self.crowd != Crowd::None, "{status:?}");
        (status == VATTN_OK).then(|| room.get())
    }

    /// A range of cells, or one that is none.
    fn range(&self, s: &mut impl Source, expect: &mut Expect, at: Option<usize>) -> (u64, u64) {
        let Some(of) = at.map(|at| &self.buffers[at]) else { return (0, 1) };
        if s.one_in(WRONG) {
            expect.spoil(VATTN_INVALID_ARGUMENT);
            return s.pick(&[(0, 0), (of.size, 1), (0, of.size + 1), (u64::MAX, 2), (1, u64::MAX)]);
        }
        let cells = of.size / of.cell();
        let first = s.below(cells);
        let most = if s.one_in(3) { cells - first } else { (cells - first).min(2 * CELLS) };
        (first * of.cell(), (1 + s.below(most)) * of.cell())
    }

    pub(crate) fn buffer_commit(&mut self, s: &mut impl Source) {
        let mut expect = Expect::default();
        let (buffer, at) = self.buffer(s, &mut expect);
        let (offset, size) = self.range(s, &mut expect, at);
        let status = call!(self, vattn_buffer_commit(handle(buffer), offset, size));
        let short = [VATTN_OK, VATTN_OUT_OF_DEVICE_MEMORY, VATTN_OUT_OF_MAPPINGS];
        let known = self.known_buffer(at);
        self.judge(status, &expect, if known.is_some() || at.is_none() { &short } else { &ANYTHING });
        self.settle_buffer(known, status, (offset, size), true);
    }

    pub(crate) fn buffer_decommit(&mut self, s: &mut impl Source) {
        let mut expect = Expect::default();
        let (buffer, at) = self.buffer(s, &mut expect);
        let (offset, size) = self.range(s, &mut expect, at);
        let fences = self.fences_of(s, &mut expect, at.map(|at| self.buffers[at].base));
        let (first, count) = array(s, &mut expect, &fences.all);
        let status = call!(self, vattn_buffer_decommit(handle(buffer), offset, size, first, count));
        // A hole in the middle of the kernel's mappings costs one more.
        let short = [VATTN_OK, VATTN_OUT_OF_MAPPINGS];
        let known = self.known_buffer(at);
        self.judge(status, &expect, if known.is_some() || at.is_none() { &short } else { &ANYTHING });
        self.settle_buffer(known, status, (offset, size), false);
    }

    /// What a call has come to, in the model and in memory.
    fn settle_buffer(
        &mut self,
        known: Option<usize>,
        status: vattn_status,
        (offset, size): (u64, u64),
        committed: bool,
    ) {
        let Some(at) = known else { return };
        let of = &mut self.buffers[at];
        if status == VATTN_OK {
            let cells = [offset, offset + size].map(|at| usize::try_from(at / of.cell()).unwrap());
            for cell in cells[0]..cells[1] {
                if committed && !of.cells[cell] && of.is_host {
                    of.write(cell);
                }
                of.cells[cell] = committed;
            }
        }
        if of.is_host {
            of.check();
        }
        self.look_over_buffer(at);
    }

    /// The books of a buffer are those of the model.
    fn look_over_buffer(&mut self, at: usize) {
        let Some(info) = self.buffer_info(self.buffers[at].handle) else { return };
        let of = &self.buffers[at];
        assert_eq!(info.committed, of.count() * of.cell(), "{of:?}");
        let (least, most) = (of.touched(of.granule), of.touched(of.largest));
        assert!((least..=most).contains(&info.held), "{} of {least} to {most}: {of:?}", info.held);
    }

    pub(crate) fn buffer_describe(&mut self, s: &mut impl Source) {
        let mut expect = Expect::default();
        let (buffer, at) = self.buffer(s, &mut expect);
        let mut room = Room::sized::<vattn_buffer_info>(s, &mut expect);
        let status = call!(self, vattn_buffer_describe(handle(buffer), room.at()));
        room.check(status);
        self.judge(status, &expect, &[VATTN_OK]);
        if let Some(at) = self.known_buffer(at) {
            self.look_over_buffer(at);
        }
    }

    pub(crate) fn buffer_pin(&mut self, s: &mut impl Source) {
        let mut expect = Expect::default();
        let (buffer, at) = self.buffer(s, &mut expect);
        let mut room = Room::new::<usize>(s, &mut expect);
        let status = call!(self, vattn_pin_create_buffer(handle(buffer), room.at()));
        room.check(status);
        self.judge(status, &expect, &[VATTN_OK]);
        if let (VATTN_OK, Some(at)) = (status, at) {
            self.pins.push(Pin { handle: room.get(), kept: Kept::of_buffer(&self.buffers[at]) });
        }
    }

    pub(crate) fn buffer_destroy(&mut self, s: &mut impl Source) {
        let mut expect = Expect::default();
        let (buffer, at) = self.buffer(s, &mut expect);
        let status = call!(self, vattn_buffer_destroy(handle(buffer)));
        let expect = if buffer == 0 { Expect::default() } else { expect };
        self.judge(status, &expect, &[VATTN_OK]);
        if let Some(at) = at {
            self.buffers.swap_remove(at);
            self.dead.push(buffer);
        }
    }

    /// Gives up all buffers.
    pub(crate) fn end_buffers(&mut self) {
        for at in 0..self.buffers.len() {
            if let Some(at) = self.known_buffer(Some(at)) {
                self.look_over_buffer(at);
            }
        }
        for buffer in std::mem::take(&mut self.buffers) {
            let status = call!(self, vattn_buffer_destroy(handle(buffer.handle)));
            let gone = buffer.is_unknown && status == VATTN_INVALID_HANDLE;
            assert!(status == VATTN_OK || gone, "{status:?}: {}", self.voice.last());
            self.dead.push(buffer.handle);
        }
    }
}
