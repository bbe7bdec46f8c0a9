//! Work of the device that a server waits for each iteration, as a model's kernels are.
//!
//! On a card a kernel that keeps every multiprocessor at it for so long by the card's own clock
//! (`spin.ptx`), in a stream of the serving thread's. Elsewhere nobody works, and the serving thread pauses.

#![allow(unsafe_code, reason = "launches a kernel")]

use std::time::Duration;

use vattn::driver::Stream;

use super::pause;

pub enum Work {
    Pause,
    #[cfg(feature = "cuda")]
    Kernel(Spin),
}

impl Work {
    /// Where a server's kernels are.
    pub fn stream(&self) -> Stream {
        match self {
            Self::Pause => Stream::LEGACY,
            // SAFETY: the stream is destroyed by nobody.
            #[cfg(feature = "cuda")]
            Self::Kernel(spin) => unsafe { Stream::new(spin.stream) },
        }
    }

    /// Has the device work for so long, and waits until it has.
    pub fn run(&self, time: Duration) {
        match self {
            Self::Pause => pause::awake(time),
            #[cfg(feature = "cuda")]
            Self::Kernel(spin) => spin.run(time),
        }
    }
}

#[cfg(feature = "cuda")]
pub use kernel::Spin;

#[cfg(feature = "cuda")]
mod kernel {
    use std::time::{Duration, Instant};

    use cudarc::driver::sys;

    /// Two for each multiprocessor of the largest cards, all of them at once.
    const BLOCKS: u32 = 264;
    const THREADS: u32 = 128;

    pub struct Spin {
        pub(super) stream: u64,
        function: usize,
    }

    impl Spin {
        /// In the context that is current.
        pub fn new() -> Self {
            let (mut module, mut function) = (std::ptr::null_mut(), std::ptr::null_mut());
            let mut stream = std::ptr::null_mut();
            let ptx = concat!(include_str!("spin.ptx"), "\0");
            let non_blocking = 1;
            // SAFETY: the text ends with a zero; module and stream live as long as the process.
            unsafe {
                ok(sys::cuModuleLoadData(&raw mut module, ptx.as_ptr().cast()));
                ok(sys::cuModuleGetFunction(&raw mut function, module, c"spin".as_ptr()));
                ok(sys::cuStreamCreate(&raw mut stream, non_blocking));
            }
            let stream = u64::try_from(stream.expose_provenance()).expect("a pointer of 64 bits");
            let spin = Self { stream, function: function.expose_provenance() };
            let (start, time) = (Instant::now(), Duration::from_millis(5));
            spin.run(time);
            assert!(start.elapsed() > time / 2, "a kernel of {time:?} took {:?}", start.elapsed());
            spin
        }

        pub(super) fn run(&self, time: Duration) {
            let mut nanoseconds = u64::try_from(time.as_nanos()).expect("less than an age");
            let (none, stream) = (std::ptr::null_mut(), pointer(self.stream));
            let function = std::ptr::with_exposed_provenance_mut(self.function);
            let mut arguments = [(&raw mut nanoseconds).cast()];
            // SAFETY: the argument is the kernel's, and function and stream live.
            unsafe {
                let arguments = arguments.as_mut_ptr();
                ok(sys::cuLaunchKernel(function, BLOCKS, 1, 1, THREADS, 1, 1, 0, stream, arguments, none));
                ok(sys::cuStreamSynchronize(stream));
            }
        }
    }

    fn pointer<T>(number: u64) -> *mut T {
        std::ptr::with_exposed_provenance_mut(usize::try_from(number).expect("a pointer of 64 bits"))
    }

    #[track_caller]
    fn ok(result: sys::CUresult) {
        assert_eq!(result, sys::CUresult::CUDA_SUCCESS);
    }
}
