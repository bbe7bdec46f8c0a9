//! Kernels of the tests, on the first device.

use std::ffi::c_void;
use std::sync::{Arc, OnceLock};

use cudarc::driver::sys;
use parking_lot::Mutex;
use vattn::units::DeviceAddr;

use super::card::{Card, ok, pointer};
use super::contents::Place;

/// Kernels that write patterns and look for them, in the first device's primary context.
#[derive(Debug)]
pub(crate) struct Kernels {
    card: Arc<Card>,
    fill: usize,
    find: usize,
    poke: usize,
    /// What `find` counts in, on the device.
    mismatches: u64,
}

impl Kernels {
    /// Loaded once in a process.
    pub(crate) fn get() -> &'static Self {
        static KERNELS: OnceLock<Kernels> = OnceLock::new();
        KERNELS.get_or_init(|| {
            let card = Card::open().expect("kernels need a card");
            let (mut module, mut mismatches) = (std::ptr::null_mut(), 0);
            let ptx = concat!(include_str!("pattern.ptx"), "\0");
            // SAFETY: the text ends with a zero, and module and memory live as long as the process.
            unsafe {
                ok(sys::cuModuleLoadData(&raw mut module, ptx.as_ptr().cast()));
                ok(sys::cuMemAlloc_v2(&raw mut mismatches, 8));
            }
            let [fill, find, poke] = [c"fill", c"find", c"poke"].map(|name| {
                let mut function = std::ptr::null_mut();
                // SAFETY: the module is loaded.
                ok(unsafe { sys::cuModuleGetFunction(&raw mut function, module, name.as_ptr()) });
                function.expose_provenance()
            });
            Kernels { card, fill, find, poke, mismatches }
        })
    }

    /// Writes the pattern.
    pub(crate) fn fill(&self, mut place: Place) {
        self.launch(self.fill, 1024, &mut [(&raw mut place).cast()]);
    }

    /// Counts bytes that are not the pattern's.
    pub(crate) fn find(&self, mut place: Place) -> u64 {
        // Tests of a program run side by side, and there is one counter.
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        let _alone = ONE_AT_A_TIME.lock();
        let mut counter = self.mismatches;
        self.card.write(DeviceAddr::new(counter), &[0; 8]);
        self.launch(self.find, 1024, &mut [(&raw mut place).cast(), (&raw mut counter).cast()]);
        let mut count = [0; 8];
        self.card.read(DeviceAddr::new(counter), &mut count);
        u64::from_ne_bytes(count)
    }

    /// Writes one byte.
    pub(crate) fn poke(&self, mut byte: *mut u8) {
        self.launch(self.poke, 1, &mut [(&raw mut byte).cast()]);
    }

    fn launch(&self, function: usize, blocks: u32, arguments: &mut [*mut c_void]) {
        self.card.enter();
        let (function, stream) = (std::ptr::with_exposed_provenance_mut(function), pointer(self.card.own));
        let threads = if blocks == 1 { 1 } else { 256 };
        // SAFETY: the arguments are those of the kernel in `pattern.cu`.
        unsafe {
            let arguments = arguments.as_mut_ptr();
            let none = std::ptr::null_mut();
            ok(sys::cuLaunchKernel(function, blocks, 1, 1, threads, 1, 1, 0, stream, arguments, none));
            ok(sys::cuStreamSynchronize(stream));
        }
    }
}
