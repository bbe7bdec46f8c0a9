//! The card in tests: whether there is one, its memory, and streams whose work a test holds back.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use cudarc::driver::sys;
use parking_lot::{Mutex, MutexGuard};
use vattn::driver::Stream;
use vattn::driver::cuda::{Cuda, CudaOptions};
use vattn::units::DeviceAddr;

/// The driver of the first device; `None`, said aloud, where there is none. With
/// `VATTN_REQUIRE_GPU=1` that is a failure.
pub(crate) fn cuda() -> Option<Arc<Cuda>> {
    match Cuda::new(CudaOptions::default()) {
        Ok(cuda) => Some(cuda),
        Err(error) => {
            println!("SKIP cuda: {}", error.report());
            let required = std::env::var("VATTN_REQUIRE_GPU").is_ok_and(|value| value == "1");
            assert!(!required, "VATTN_REQUIRE_GPU=1, and there is no GPU: {}", error.report());
            None
        }
    }
}

/// One test of a program at a time uses the card: some fill it, and some compare what is free.
pub(crate) static CARD: Mutex<()> = Mutex::new(());

pub(crate) type Alone = MutexGuard<'static, ()>;

/// The driver of the first device for this test alone, where there is one.
pub(crate) fn alone() -> Option<(Alone, Arc<Cuda>)> {
    let alone = CARD.lock();
    Some((alone, cuda()?))
}

/// The same with what tests need of a card.
pub(crate) fn card_alone() -> Option<(Alone, Arc<Card>)> {
    let alone = CARD.lock();
    Some((alone, Card::open()?))
}

/// Panics with the driver's name of what went wrong.
#[track_caller]
pub(crate) fn ok(result: sys::CUresult) {
    assert_eq!(result, sys::CUresult::CUDA_SUCCESS);
}

/// A card, and what tests need of it beside the driver's own verbs.
#[derive(Debug)]
pub(crate) struct Card {
    pub(crate) cuda: Arc<Cuda>,
    streams: Mutex<BTreeMap<Stream, Held>>,
    /// For copies and kernels of the test itself.
    pub(crate) own: u64,
    /// Streams and words are left to the process.
    forgotten: AtomicBool,
}

/// A stream that waits for a number in the processor's memory to grow.
#[derive(Debug)]
struct Held {
    stream: u64,
    /// One word of pinned memory.
    opened: usize,
    holds: u32,
}

/// `cuStreamWaitValue32`: waits until the word is at least the value. The bindings of CUDA 11.4 have an
/// older one, which today's driver refuses.
type WaitValue = unsafe extern "C" fn(u64, u64, u32, u32) -> u32;

impl Card {
    /// The card, where there is one.
    pub(crate) fn open() -> Option<Arc<Self>> {
        cuda().map(Self::new)
    }

    pub(crate) fn new(cuda: Arc<Cuda>) -> Arc<Self> {
        enter(&cuda);
        Arc::new(Self {
            cuda,
            streams: Mutex::default(),
            own: new_stream(),
            forgotten: AtomicBool::new(false),
        })
    }

    /// Makes the driver's context current on this thread.
    pub(crate) fn enter(&self) {
        enter(&self.cuda);
    }

    /// The stream that stands for a number of a test's.
    pub(crate) fn stream(&self, stream: Stream) -> Stream {
        // SAFETY: the stream lives as long as this card, whose drop synchronises it before it destroys it.
        self.with(stream, |held| unsafe { Stream::new(held.stream) })
    }

    fn with<T>(&self, stream: Stream, then: impl FnOnce(&mut Held) -> T) -> T {
        self.enter();
        let mut streams = self.streams.lock();
        then(streams.entry(stream).or_insert_with(|| {
            let mut opened = std::ptr::null_mut();
            // SAFETY: one word, freed in the drop.
            ok(unsafe { sys::cuMemHostAlloc(&raw mut opened, 4, 0) });
            let held = Held { stream: new_stream(), opened: opened.expose_provenance(), holds: 0 };
            held.open().store(0, Ordering::SeqCst);
            held
        }))
    }

    /// Work of the stream stays undone from now on, until it is fired.
    pub(crate) fn hold(&self, stream: Stream) {
        self.with(stream, |held| {
            held.holds += 1;
            // SAFETY: the signature is that of CUDA's header; the word lives until the stream has been
            // synchronised.
            let result = unsafe {
                let wait = sys::culib().get::<WaitValue>(b"cuStreamWaitValue32_v2\0").unwrap();
                wait(held.stream, wide(held.opened), held.holds, 0)
            };
            assert_eq!(result, 0);
        });
    }

    /// Ends the stream's holds, and waits until it has noticed.
    pub(crate) fn fire(&self, stream: Stream) {
        self.with(stream, Held::fire);
        self.synchronize(stream);
    }

    pub(crate) fn fire_all(&self) {
        self.streams.lock().values_mut().for_each(Held::fire);
    }

    /// Leaves the streams to the process, and nothing else: their context is about to die.
    pub(crate) fn forget_streams(&self) {
        self.forgotten.store(true, Ordering::SeqCst);
    }

    fn synchronize(&self, stream: Stream) {
        let stream = self.stream(stream).number();
        let waits_for_another = {
            let streams = self.streams.lock();
            streams.values().any(|held| held.open().load(Ordering::SeqCst) < held.holds)
        };
        // A stream that waits for another, which is still held, would not end.
        if !waits_for_another {
            // SAFETY: the stream is this card's.
            ok(unsafe { sys::cuStreamSynchronize(pointer(stream)) });
        }
    }

    /// Begins a capture of the stream into a graph, or ends it, and expects it to have survived.
    pub(crate) fn capture(&self, stream: Stream, capturing: bool) {
        if capturing {
            let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL;
            // SAFETY: the stream is this card's.
            ok(unsafe { sys::cuStreamBeginCapture_v2(pointer(self.stream(stream).number()), mode) });
        } else {
            // SAFETY: nobody else has the graph.
            ok(unsafe { sys::cuGraphDestroy(self.end_capture(stream)) });
        }
    }

    /// Ends a capture that survived, with what was captured. The caller destroys it.
    fn end_capture(&self, stream: Stream) -> sys::CUgraph {
        let mut graph = std::ptr::null_mut();
        // SAFETY: the stream is this card's.
        ok(unsafe { sys::cuStreamEndCapture(pointer(self.stream(stream).number()), &raw mut graph) });
        graph
    }

    /// Ends a capture with what was captured, ready to run.
    pub(crate) fn captured(&self, stream: Stream) -> Graph {
        let (graph, mut exec) = (self.end_capture(stream), std::ptr::null_mut());
        // SAFETY: the graph is the test's own; what is made of it lives on without it.
        unsafe {
            ok(sys::cuGraphInstantiateWithFlags(&raw mut exec, graph, 0));
            ok(sys::cuGraphDestroy(graph));
        }
        Graph(exec.expose_provenance())
    }

    /// Whether a stream still has work to do.
    pub(crate) fn is_busy(&self, stream: Stream) -> bool {
        let stream = pointer(self.stream(stream).number());
        // SAFETY: the stream is this card's.
        match unsafe { sys::cuStreamQuery(stream) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => true,
            done => {
                ok(done);
                false
            }
        }
    }

    /// Writes bytes to backed memory.
    pub(crate) fn write(&self, addr: DeviceAddr, bytes: &[u8]) {
        self.enter();
        // SAFETY: the check backed the range for writing.
        unsafe {
            ok(sys::cuMemcpyHtoDAsync_v2(addr.get(), bytes.as_ptr().cast(), bytes.len(), pointer(self.own)));
            ok(sys::cuStreamSynchronize(pointer(self.own)));
        }
    }

    /// Reads bytes from backed memory.
    pub(crate) fn read(&self, addr: DeviceAddr, bytes: &mut [u8]) {
        self.enter();
        // SAFETY: the check backed the range.
        unsafe {
            ok(sys::cuMemcpyDtoHAsync_v2(
                bytes.as_mut_ptr().cast(),
                addr.get(),
                bytes.len(),
                pointer(self.own),
            ));
            ok(sys::cuStreamSynchronize(pointer(self.own)));
        }
    }
}

/// Captured work.
#[derive(Debug)]
pub(crate) struct Graph(usize);

impl Graph {
    pub(crate) fn launch(&self, card: &Card, stream: Stream) {
        let stream = pointer(card.stream(stream).number());
        // SAFETY: the graph is this one's, and the stream is the card's.
        ok(unsafe { sys::cuGraphLaunch(std::ptr::with_exposed_provenance_mut(self.0), stream) });
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            // SAFETY: the graph is this one's; CUDA keeps what is still running.
            ok(unsafe { sys::cuGraphExecDestroy(std::ptr::with_exposed_provenance_mut(self.0)) });
        }
    }
}

impl Held {
    fn open(&self) -> &AtomicU32 {
        // SAFETY: the word was allocated for this and lives as long as this.
        unsafe { AtomicU32::from_ptr(std::ptr::with_exposed_provenance_mut(self.opened)) }
    }

    fn fire(&mut self) {
        self.open().store(self.holds, Ordering::SeqCst);
    }
}

impl Drop for Card {
    fn drop(&mut self) {
        if self.forgotten.load(Ordering::SeqCst) {
            return;
        }
        self.fire_all();
        // What has failed is told already, and an assertion here would end all tests of the program.
        if std::thread::panicking() {
            return;
        }
        self.enter();
        for held in self.streams.lock().values() {
            // SAFETY: made by this card, and nothing waits for the word any more once the stream is done.
            unsafe {
                ok(sys::cuStreamSynchronize(pointer(held.stream)));
                ok(sys::cuStreamDestroy_v2(pointer(held.stream)));
                ok(sys::cuMemFreeHost(std::ptr::with_exposed_provenance_mut(held.opened)));
            }
        }
        // SAFETY: made by this card.
        ok(unsafe { sys::cuStreamDestroy_v2(pointer(self.own)) });
    }
}

fn enter(cuda: &Cuda) {
    // SAFETY: the driver keeps the context alive.
    ok(unsafe { sys::cuCtxSetCurrent(pointer(cuda.context())) });
}

fn new_stream() -> u64 {
    let mut stream = std::ptr::null_mut();
    let non_blocking = 1;
    // SAFETY: a context is current.
    ok(unsafe { sys::cuStreamCreate(&raw mut stream, non_blocking) });
    wide(stream.expose_provenance())
}

pub(crate) fn pointer<T>(number: u64) -> *mut T {
    std::ptr::with_exposed_provenance_mut(usize::try_from(number).unwrap())
}

fn wide(number: usize) -> u64 {
    u64::try_from(number).unwrap()
}
