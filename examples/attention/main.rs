//! Attention over this cache, from end to end: a small server with continuous batching. Its kernels (`kernels.cu`)
//! are compiled when it runs, and write and read the tensors `[slot, token, head, dim]` where they lie.
//!
//! ```text
//! cargo run --release --example attention
//! ```
//!
//! It needs an NVIDIA GPU, its driver, and NVRTC, CUDA's compiler at run time. What it shows:
//!
//! - how a cache lives beside other CUDA code (`serve_all`): `Cuda` and cudarc share the device's primary context, and
//!   the kernels run in a stream of our own, which the cache is told of;
//! - what a server asks of the cache in each round (`scheduler.rs`): `admits` and `acquire` for those who wait, `fits`
//!   and `step` before the kernels, `truncate` for drafts that were rejected, `retire` for those who are done;
//! - how kernels find a token (`View`): by a view's address and strides, which never change, and by a slot's index,
//!   which they read from the device's memory as they do the lengths;
//! - that the host plans a round while the kernels of the last one run. What is retired behind a fence may be adopted
//!   at once, since the next owner's kernels come later in the same stream.
//!
//! There is no model: keys, values and queries are hashes of their places. So the host can work out every output
//! by itself, without a look at the cache (`reference.rs`). It compares them all, and ends with an error where one is
//! off by more than `BOUND`.

#![allow(unsafe_code, reason = "launches kernels, and names a stream to the library")]

mod reference;
mod scheduler;

use std::collections::BTreeMap;
use std::error::Error;
use std::process::ExitCode;
use std::sync::Arc;

use cudarc::driver::{
    CudaContext, CudaEvent, CudaFunction, CudaSlice, CudaStream, DeviceRepr, LaunchConfig, PushKernelArg,
};
use cudarc::nvrtc::{self, CompileError, CompileOptions, Ptx};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use vattn::driver::Stream;
use vattn::driver::cuda::{Cuda, CudaOptions};
use vattn::error::Verb;
use vattn::geometry::Dtype;
use vattn::stats::{CallStats, Snapshot};
use vattn::{Bytes, Config, Geometry, KvCache, Part, TokenCount};

use scheduler::{Request, Scheduler};

/// Llama-3-8B has 32 of these layers, and as many query heads: 4 share one of keys and values.
const LAYERS: u32 = 4;
const HEADS: u32 = 8;
const GROUP: u32 = 4;
const DIM: u32 = 128;
/// What a query gives in one layer: `DIM` numbers for each query head.
const OUTPUT: usize = 32 * 128;

const SLOTS: u32 = 8;
const MAX_TOKENS: u64 = 2048;
/// A token takes 16 KiB, so that eight long requests do not fit.
const BUDGET: Bytes = Bytes::mib(56);
const REQUESTS: u32 = 40;
const SEED: u64 = 1;
/// How far an output may be off. It is a mean of up to 1,100 values, and a wrong one makes ten times as much.
const BOUND: f64 = 1e-5;

/// A layer's keys or values. This and the next two are what `kernels.cu` takes.
#[derive(Clone, Copy)]
#[repr(C)]
struct View {
    addr: u64,
    strides: [u64; 4],
}

/// Tokens of a slot whose keys and values are new.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Span {
    slot: u32,
    first: u32,
    end: u32,
    seed: u32,
}

/// A request's next query.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Query {
    slot: u32,
    tokens: u32,
    seed: u32,
}

// SAFETY: plain numbers, laid out as C does it.
unsafe impl DeviceRepr for View {}
// SAFETY: as above.
unsafe impl DeviceRepr for Span {}
// SAFETY: as above.
unsafe impl DeviceRepr for Query {}

/// What the kernels of a round are given.
#[derive(Default)]
struct Batch {
    spans: Vec<Span>,
    queries: Vec<Query>,
}

/// The kernels, their stream, and what they read and write besides the cache.
struct Gpu {
    stream: Arc<CudaStream>,
    write: CudaFunction,
    ask: CudaFunction,
    attend: CudaFunction,
    spans: CudaSlice<Span>,
    batch: CudaSlice<Query>,
    queries: CudaSlice<f32>,
    /// Of all rounds, one behind the other: nobody has to wait for them in between.
    outputs: CudaSlice<f32>,
    /// Layer and query of each of them so far.
    asked: Vec<(u32, Query)>,
}

impl Gpu {
    fn new(context: &Arc<CudaContext>, ptx: Ptx, outputs: u32) -> Result<Self, Box<dyn Error>> {
        let (module, stream) = (context.load_module(ptx)?, context.new_stream()?);
        let (slots, outputs) = (usize::try_from(SLOTS)?, usize::try_from(outputs)?);
        Ok(Self {
            write: module.load_function("write")?,
            ask: module.load_function("ask")?,
            attend: module.load_function("attend")?,
            spans: stream.clone_htod(&vec![Span::default(); 2 * slots])?,
            batch: stream.clone_htod(&vec![Query::default(); slots])?,
            queries: stream.alloc_zeros(slots * OUTPUT)?,
            outputs: stream.alloc_zeros(outputs * OUTPUT)?,
            asked: Vec::new(),
            stream,
        })
    }

    /// Puts a round into the stream, all layers of it.
    fn launch(&mut self, views: &[[View; 2]], batch: &Batch) -> Result<(), Box<dyn Error>> {
        let stream = &self.stream;
        stream.memcpy_htod(&batch.spans, &mut self.spans)?;
        stream.memcpy_htod(&batch.queries, &mut self.batch)?;
        let (spans, queries) = (u32::try_from(batch.spans.len())?, u32::try_from(batch.queries.len())?);
        let grid = |x, y| LaunchConfig { grid_dim: (x, y, 1), block_dim: (DIM, 1, 1), shared_mem_bytes: 0 };
        for (layer, [keys, values]) in (0..).zip(views) {
            let first = self.asked.len() * OUTPUT;
            let mut outputs = self.outputs.slice_mut(first..first + batch.queries.len() * OUTPUT);
            // SAFETY: the arguments are those of the kernels in `kernels.cu`. A step has backed all tokens that they
            // touch in the cache, nobody else has these slots, and the buffers are made for as many.
            unsafe {
                let mut write = stream.launch_builder(&self.write);
                write.arg(keys).arg(values).arg(&layer).arg(&self.spans).launch(grid(64, spans))?;
                let mut ask = stream.launch_builder(&self.ask);
                ask.arg(&layer)
                    .arg(&self.batch)
                    .arg(&mut self.queries)
                    .launch(grid(queries, HEADS * GROUP))?;
                let mut attend = stream.launch_builder(&self.attend);
                attend.arg(keys).arg(values).arg(&self.batch).arg(&self.queries).arg(&mut outputs);
                attend.launch(grid(queries, HEADS * GROUP))?;
            }
            self.asked.extend(batch.queries.iter().map(|query| (layer, *query)));
        }
        Ok(())
    }
}

/// The kernels for devices of that compute capability.
fn compile((major, minor): (u32, u32)) -> Result<Ptx, Box<dyn Error>> {
    // SAFETY: opening NVRTC runs its initialisers, which is what every program does that uses it.
    if !unsafe { nvrtc::sys::is_culib_present() } {
        return Err("this example needs NVRTC: neither libnvrtc.so nor libnvrtc.so.12 is found; install the CUDA toolkit, \
                    or name the library's folder in LD_LIBRARY_PATH"
            .into());
    }
    let mut options = vec![format!("--gpu-architecture=compute_{major}{minor}")];
    options.extend(
        [("HEADS", HEADS), ("GROUP", GROUP), ("DIM", DIM)].map(|(name, value)| format!("-D{name}={value}")),
    );
    let options = CompileOptions { name: Some("kernels.cu".into()), options, ..Default::default() };
    nvrtc::compile_ptx_with_opts(include_str!("kernels.cu"), options).map_err(|error| match error {
        CompileError::CompileError { log, .. } => {
            format!("NVRTC does not compile kernels.cu for compute_{major}{minor}: {}", log.to_string_lossy())
                .into()
        }
        error => error.into(),
    })
}

/// The same requests in every run.
fn requests() -> Vec<Request> {
    let mut random = ChaCha8Rng::seed_from_u64(SEED);
    let lengths = |seed| Request::new(seed, random.random_range(1..=1000), random.random_range(16..=112));
    (0..REQUESTS).map(lengths).collect()
}

/// All that is not named is at its default: one tensor for the keys of all layers and one for their values, and a
/// thread that maps ahead in the background.
fn config() -> vattn::Result<Config> {
    Config::builder(Geometry::uniform(LAYERS, HEADS, DIM, Dtype::BF16)?)
        .max_slots(SLOTS)
        .max_tokens(TokenCount::new(MAX_TOKENS))
        .budget(BUDGET)
        .build()
}

/// Of each layer. They are the same as long as the cache lives.
fn views(cache: &KvCache) -> vattn::Result<Vec<[View; 2]>> {
    let of = |layer, part| {
        cache.view(layer, part).map(|view| View { addr: view.addr.get(), strides: view.strides })
    };
    (0..LAYERS).map(|layer| Ok([of(layer, Part::Key)?, of(layer, Part::Value)?])).collect()
}

fn serve(scheduler: &mut Scheduler, gpu: &mut Gpu) -> Result<(), Box<dyn Error>> {
    let views = views(&scheduler.cache)?;
    // One round ahead of the device, as a server may be that samples its tokens there.
    let mut before: Option<CudaEvent> = None;
    while let Some(batch) = scheduler.begin()? {
        gpu.launch(&views, &batch)?;
        scheduler.end()?;
        if let Some(before) = before.replace(gpu.stream.record_event(None)?) {
            before.synchronize()?;
        }
    }
    Ok(())
}

fn serve_all() -> Result<(), Box<dyn Error>> {
    // Before anything of cudarc's, which panics where there is no driver. The primary context is retained by both.
    let cuda = Cuda::new(CudaOptions::default())
        .map_err(|error| format!("this example needs an NVIDIA GPU: {}", error.report()))?;
    let device = cuda.device()?;
    let ptx = compile(device.compute_capability)?;
    let context = CudaContext::new(usize::try_from(device.ordinal)?)?;

    let requests = requests();
    let (prompts, outputs) = requests.iter().fold((0, 0), |sum, of| (sum.0 + of.prompt, sum.1 + of.outputs));
    let mut gpu = Gpu::new(&context, ptx, outputs * LAYERS)?;
    let number = u64::try_from(gpu.stream.cu_stream().expose_provenance())?;
    // SAFETY: the stream is of the primary context, in which `cuda` works. It is destroyed after the cache, which is
    // made later, and synchronised below, when no call names it any more.
    let stream = unsafe { Stream::new(number) };

    let mut scheduler = Scheduler::new(KvCache::new(config()?, cuda)?, stream, requests);
    let served = serve(&mut scheduler, &mut gpu);
    // After a failure, too: a cache must not be dropped under kernels that use it.
    gpu.stream.synchronize()?;
    served?;
    // The one tells what went wrong in the background, and the other if the books do not agree.
    scheduler.cache.flush()?;
    let Snapshot { driver, background, events, .. } = scheduler.cache.report()?.snapshot;
    let moves = [Verb::Create, Verb::Map, Verb::SetAccess, Verb::Unmap, Verb::Release];
    let count = |calls: BTreeMap<_, CallStats>| moves.map(|verb| calls[&verb].calls).iter().sum::<u64>();
    let (all, beside) = (count(driver), count(background));
    let (asked, found) = (gpu.asked.len() * OUTPUT, gpu.stream.clone_dtoh(&gpu.outputs)?);
    let error = reference::compare(&gpu.asked, &found);

    println!("{}; {}", device.name, scheduler.cache.config().geometry());
    println!("requests   {REQUESTS}, with prompts of {prompts} tokens; {outputs} tokens decoded");
    println!(
        "rounds     {}; {} preemptions, {} truncations",
        events.steps, scheduler.preempted, scheduler.truncated
    );
    println!("slots      {SLOTS}; {} times one was adopted, of {}", events.adopted, events.acquired);
    println!(
        "driver     {} calls that move memory on the path of requests, {beside} beside it",
        all - beside
    );
    println!("memory     {} held at the peak, of a budget of {BUDGET}", scheduler.peak);
    println!("outputs    {asked} numbers compared; the largest error is {error:.1e}, of {BOUND:.0e} allowed");
    if asked != found.len() {
        return Err(format!("{asked} outputs were asked for, of {}", found.len()).into());
    }
    // So that what is not a number counts as an error.
    if error.total_cmp(&BOUND).is_gt() {
        return Err(format!("an output is off by {error:.1e}, more than {BOUND:.0e}").into());
    }
    Ok(())
}

fn main() -> ExitCode {
    match serve_all() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let report = error.downcast_ref().map_or_else(|| error.to_string(), vattn::Error::report);
            eprintln!("attention: {report}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_compile_where_there_is_nvrtc() {
        for capability in [(7, 5), (8, 0), (9, 0), (10, 0)] {
            match compile(capability) {
                Ok(ptx) => assert!(ptx.to_src().contains(".entry attend(")),
                Err(error) if error.to_string().contains("needs NVRTC") => println!("SKIP: {error}"),
                Err(error) => panic!("{error}"),
            }
        }
    }
}
