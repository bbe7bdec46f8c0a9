//! Kernels of the tests, on the first device.

use std::ffi::{CStr, c_void};
use std::marker::PhantomData;
use std::sync::{Arc, OnceLock};

use cudarc::driver::sys;
use parking_lot::Mutex;
use vattn::driver::Stream;

use super::card::{Card, ok, pointer};
use super::contents::Place;

/// Kernels that write patterns and look for them, in the first device's primary context.
///
/// What names a stream is only put into it. The stream is one of CUDA's, not a test's number.
#[derive(Debug)]
pub(crate) struct Kernels {
    card: Arc<Card>,
    fill: usize,
    find: usize,
    fill_told: usize,
    find_told: usize,
    dwell: usize,
    poke: usize,
    /// For those who wait for what they asked.
    mismatches: Counter,
}

/// Which tokens, and whose: what kernels of a graph look up when they run.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Told {
    pub(crate) first: u64,
    pub(crate) tokens: u64,
    pub(crate) owner: u64,
}

/// Values in the device's memory, in a row.
#[derive(Debug)]
pub(crate) struct Row<T> {
    card: Arc<Card>,
    addr: u64,
    count: usize,
    of: PhantomData<fn(T)>,
}

/// A number on the device that kernels count in.
#[derive(Debug)]
pub(crate) struct Counter(Row<u64>);

/// Blocks of a kernel that goes through tokens; their threads share all of the bytes.
const BLOCKS: u32 = 1024;
const THREADS: u32 = 256;

impl Kernels {
    /// Loaded once in a process.
    pub(crate) fn get() -> &'static Self {
        static KERNELS: OnceLock<Kernels> = OnceLock::new();
        KERNELS.get_or_init(|| {
            let card = Card::open().expect("kernels need a card");
            let mut module = std::ptr::null_mut();
            let ptx = concat!(include_str!("pattern.ptx"), "\0");
            // SAFETY: the text ends with a zero, and the module lives as long as the process.
            ok(unsafe { sys::cuModuleLoadData(&raw mut module, ptx.as_ptr().cast()) });
            let function = |name: &CStr| {
                let mut function = std::ptr::null_mut();
                // SAFETY: the module is loaded.
                ok(unsafe { sys::cuModuleGetFunction(&raw mut function, module, name.as_ptr()) });
                function.expose_provenance()
            };
            let kernels = Kernels {
                fill: function(c"fill"),
                find: function(c"find"),
                fill_told: function(c"fill_told"),
                find_told: function(c"find_told"),
                dwell: function(c"dwell"),
                poke: function(c"poke"),
                mismatches: Counter::new(&card),
                card,
            };
            kernels.load();
            kernels
        })
    }

    /// Runs each kernel over nothing: CUDA loads it when it is first launched, which may wait for the whole
    /// device, and is forbidden during a capture.
    fn load(&self) {
        let own = self.own();
        let nothing = Place::NOTHING;
        let told = Row::new(&self.card, &[Told { first: 0, tokens: 0, owner: 0 }]);
        self.fill_in(own, nothing);
        self.find_in(own, nothing, &self.mismatches);
        self.fill_told(own, nothing, &told, 0);
        self.find_told(own, nothing, &told, 0, &self.mismatches);
        self.dwell(own, &Row::new(&self.card, &[nothing]), 0, &self.mismatches);
        assert_eq!(self.mismatches.read(own), 0);
    }

    /// The stream of those who wait.
    fn own(&self) -> Stream {
        // SAFETY: the stream lives as long as the card.
        unsafe { Stream::new(self.card.own) }
    }

    /// Writes the pattern, and waits until it is there.
    pub(crate) fn fill(&self, place: Place) {
        self.fill_in(self.own(), place);
        self.wait(self.own());
    }

    /// Counts bytes that are not the pattern's.
    pub(crate) fn find(&self, place: Place) -> u64 {
        // Tests of a program run side by side, and there is one counter.
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        let _alone = ONE_AT_A_TIME.lock();
        let before = self.mismatches.read(self.own());
        self.find_in(self.own(), place, &self.mismatches);
        self.mismatches.read(self.own()) - before
    }

    /// Writes one byte, and waits until it is there.
    pub(crate) fn poke(&self, mut byte: *mut u8) {
        self.launch(self.own(), self.poke, ([1, 1], 1), &mut [(&raw mut byte).cast()]);
        self.wait(self.own());
    }

    /// Writes the pattern.
    pub(crate) fn fill_in(&self, stream: Stream, mut place: Place) {
        self.launch(stream, self.fill, ([BLOCKS, 1], THREADS), &mut [(&raw mut place).cast()]);
    }

    /// Counts bytes that are not the pattern's.
    pub(crate) fn find_in(&self, stream: Stream, mut place: Place, counter: &Counter) {
        let mut counter = counter.0.addr;
        let arguments = &mut [(&raw mut place).cast(), (&raw mut counter).cast()];
        self.launch(stream, self.find, ([BLOCKS, 1], THREADS), arguments);
    }

    /// Writes the pattern into the tokens that are told when it runs, in the place's layer.
    pub(crate) fn fill_told(&self, stream: Stream, mut place: Place, told: &Row<Told>, which: usize) {
        let mut told = told.at(which);
        let arguments = &mut [(&raw mut place).cast(), (&raw mut told).cast()];
        self.launch(stream, self.fill_told, ([BLOCKS, 1], THREADS), arguments);
    }

    /// Counts bytes that are not the pattern's in the tokens that are told when it runs.
    pub(crate) fn find_told(
        &self,
        stream: Stream,
        mut place: Place,
        told: &Row<Told>,
        which: usize,
        counter: &Counter,
    ) {
        let (mut told, mut counter) = (told.at(which), counter.0.addr);
        let arguments = &mut [(&raw mut place).cast(), (&raw mut told).cast(), (&raw mut counter).cast()];
        self.launch(stream, self.find_told, ([BLOCKS, 1], THREADS), arguments);
    }

    /// Reads all of the places over and over for so long, and counts bytes that are not the pattern's.
    pub(crate) fn dwell(&self, stream: Stream, places: &Row<Place>, milliseconds: u64, counter: &Counter) {
        // Few enough that all blocks run at once.
        let (blocks, each) = (4, u32::try_from(places.count).unwrap());
        let (mut places, mut counter) = (places.addr, counter.0.addr);
        let mut nanoseconds = milliseconds * 1_000_000;
        let arguments =
            &mut [(&raw mut places).cast(), (&raw mut nanoseconds).cast(), (&raw mut counter).cast()];
        self.launch(stream, self.dwell, ([blocks, each], THREADS), arguments);
    }

    fn launch(
        &self,
        stream: Stream,
        function: usize,
        (blocks, threads): ([u32; 2], u32),
        arguments: &mut [*mut c_void],
    ) {
        self.card.enter();
        let function = std::ptr::with_exposed_provenance_mut(function);
        let ([x, y], stream) = (blocks, pointer(stream.number()));
        // SAFETY: the arguments are those of the kernel in `pattern.cu`; the stream's owner keeps it alive.
        ok(unsafe {
            let (arguments, none) = (arguments.as_mut_ptr(), std::ptr::null_mut());
            sys::cuLaunchKernel(function, x, y, 1, threads, 1, 1, 0, stream, arguments, none)
        });
    }

    fn wait(&self, stream: Stream) {
        // SAFETY: the stream's owner keeps it alive.
        ok(unsafe { sys::cuStreamSynchronize(pointer(stream.number())) });
    }
}

impl<T: Copy> Row<T> {
    pub(crate) fn new(card: &Arc<Card>, values: &[T]) -> Self {
        card.enter();
        let mut addr = 0;
        // SAFETY: the pointer is to a living integer, and the values are read before the call returns.
        unsafe {
            ok(sys::cuMemAlloc_v2(&raw mut addr, size_of_val(values)));
            ok(sys::cuMemcpyHtoD_v2(addr, values.as_ptr().cast(), size_of_val(values)));
        }
        Self { card: Arc::clone(card), addr, count: values.len(), of: PhantomData }
    }

    /// Other values, from this point of a stream on.
    pub(crate) fn write(&self, stream: Stream, values: &[T]) {
        assert_eq!(values.len(), self.count);
        self.card.enter();
        let (from, size) = (values.as_ptr().cast(), size_of_val(values));
        // SAFETY: the row is as long; CUDA copies what is pageable before the call returns.
        ok(unsafe { sys::cuMemcpyHtoDAsync_v2(self.addr, from, size, pointer(stream.number())) });
    }

    fn at(&self, which: usize) -> u64 {
        assert!(which < self.count);
        self.addr + u64::try_from(which * size_of::<T>()).unwrap()
    }
}

impl<T> Drop for Row<T> {
    fn drop(&mut self) {
        // What has failed is told already.
        if std::thread::panicking() {
            return;
        }
        self.card.enter();
        // SAFETY: allocated by this, and freed once; CUDA waits for kernels that use it.
        ok(unsafe { sys::cuMemFree_v2(self.addr) });
    }
}

impl Counter {
    pub(crate) fn new(card: &Arc<Card>) -> Self {
        Self(Row::new(card, &[0]))
    }

    /// What it has come to at this point of a stream, which is waited for.
    pub(crate) fn read(&self, stream: Stream) -> u64 {
        self.0.card.enter();
        let mut count = 0_u64;
        let stream = pointer(stream.number());
        // SAFETY: the number is alive until the stream has been waited for.
        unsafe {
            ok(sys::cuMemcpyDtoHAsync_v2((&raw mut count).cast(), self.0.addr, 8, stream));
            ok(sys::cuStreamSynchronize(stream));
        }
        count
    }
}
