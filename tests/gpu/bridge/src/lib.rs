//! What the Python programs of `tests/gpu` need of a [`KvCache`], for `ctypes`.
//!
//! Owns the crossing from C types to the public Rust API and back, and the slots of one cache by
//! their index. It is no C ABI: nothing in it is stable, and one thread uses a cache at a time.
//!
//! A call that can fail answers [`FAILED`] or a null pointer, and [`bridge_error`] tells why.

#![expect(unsafe_code, reason = "pointers come from C")]

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char};
use std::sync::Arc;

use vattn::driver::Driver;
use vattn::driver::cuda::{Cuda, CudaOptions};
use vattn::driver::host::{Host, HostOptions};
use vattn::geometry::{Background, Dtype, LayerGroup, LayerKind, LayoutChoice};
use vattn::layout::{Layout, TensorLayout};
use vattn::{
    Bytes, Config, Error, ErrorKind, Fence, Geometry, KvCache, Part, Result, SlotId, SlotTokens, TokenCount,
};

/// A call has done what it was asked for.
pub const DONE: i32 = 0;
/// It has not, and nothing was written.
pub const FAILED: i32 = 1;

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::default();
}

/// One cache and who has its slots.
#[derive(Debug)]
pub struct Bridge {
    cache: KvCache,
    slots: BTreeMap<u32, SlotId>,
    /// What [`bridge_snapshot`] told last.
    snapshot: CString,
}

/// What a cache is made for.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Layers of the model.
    pub layers: u32,
    /// KV heads of a layer.
    pub kv_heads: u32,
    /// Elements of a key.
    pub key_dim: u32,
    /// Elements of a value.
    pub value_dim: u32,
    /// Requests at a time.
    pub slots: u32,
    /// Tokens of a page.
    pub page_tokens: u32,
    /// What a step rounds up to.
    pub tile_tokens: u32,
    /// Whether a mapper works beside the calls; 0 is no.
    pub mapper: u32,
    /// The most tokens of a slot.
    pub max_tokens: u64,
    /// The most bytes held.
    pub budget: u64,
    /// The granule, on the host.
    pub granule: u64,
    /// The bytes there are, on the host.
    pub capacity: u64,
}

/// What all tensors of a cache have in common.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    /// How many tensors there are.
    pub tensors: u64,
    /// Bytes of a granule.
    pub granule: u64,
    /// Tokens from one slot to the next.
    pub stride_tokens: u64,
    /// Pages from one slot to the next.
    pub pages_per_slot: u64,
}

/// One reservation.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct TensorFacts {
    /// Its first address.
    pub addr: u64,
    /// Bytes of a token.
    pub row: u64,
    /// Bytes from one slot to the next.
    pub slot_stride: u64,
    /// Bytes in all.
    pub size: u64,
}

/// A strided array of a layer's keys or values.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ViewFacts {
    /// Where element `[0, 0, 0, 0]` is.
    pub addr: u64,
    /// Elements along each dimension.
    pub shape: [u64; 4],
    /// Elements from one to the next along each dimension.
    pub strides: [u64; 4],
}

/// The text of this thread's last failure. It is valid until the thread's next call.
#[unsafe(no_mangle)]
pub extern "C" fn bridge_error() -> *const c_char {
    LAST_ERROR.with_borrow(|text| text.as_ptr())
}

/// Makes a cache of bf16. `device` is `cuda` (that of the context which is current) or `host`;
/// `layout` is as [`LayoutChoice`] reads it.
///
/// # Safety
/// - `device` and `layout` are strings of C.
/// - `options` points to one [`Options`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bridge_open(
    device: *const c_char,
    layout: *const c_char,
    options: *const Options,
) -> *mut Bridge {
    // SAFETY: both are strings and `options` is valid for reads, as the caller promises.
    let opened = unsafe { text(device).and_then(|device| open(device, text(layout)?, &*options)) };
    noted(opened).map_or(std::ptr::null_mut(), |cache| {
        Box::into_raw(Box::new(Bridge { cache, slots: BTreeMap::new(), snapshot: CString::default() }))
    })
}

/// Gives everything back. The device must be done with it.
///
/// # Safety
/// - `bridge` came from [`bridge_open`] and is not used again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bridge_close(bridge: *mut Bridge) {
    if !bridge.is_null() {
        // SAFETY: made by `Box::into_raw` in `bridge_open`, and given up by the caller.
        drop(unsafe { Box::from_raw(bridge) });
    }
}

/// Writes the cache's facts.
///
/// # Safety
/// - `bridge` came from [`bridge_open`]; `facts` points to room for one [`Facts`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bridge_facts(bridge: *mut Bridge, facts: *mut Facts) -> i32 {
    // SAFETY: the caller promises both.
    unsafe { answer(bridge, facts, |bridge| Ok(bridge.facts())) }
}

/// Writes a tensor's facts.
///
/// # Safety
/// - `bridge` came from [`bridge_open`]; `facts` points to room for one [`TensorFacts`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bridge_tensor(bridge: *mut Bridge, tensor: u32, facts: *mut TensorFacts) -> i32 {
    // SAFETY: the caller promises both.
    unsafe { answer(bridge, facts, |bridge| bridge.tensor_facts(tensor)) }
}

/// Writes a layer's view: of the keys (`part` 0) or values (1), by slot (`kind` 0), by page (1), or as
/// one row of tokens (2).
///
/// # Safety
/// - `bridge` came from [`bridge_open`]; `view` points to room for one [`ViewFacts`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bridge_view(
    bridge: *mut Bridge,
    layer: u32,
    part: u32,
    kind: u32,
    view: *mut ViewFacts,
) -> i32 {
    // SAFETY: the caller promises both.
    unsafe { answer(bridge, view, |bridge| bridge.view(layer, part, kind)) }
}

/// Gives a request a slot and writes its index.
///
/// # Safety
/// - `bridge` came from [`bridge_open`]; `slot` points to room for one number.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bridge_acquire(bridge: *mut Bridge, hint: u64, slot: *mut u32) -> i32 {
    // SAFETY: the caller promises both.
    unsafe { answer(bridge, slot, |bridge| bridge.acquire(TokenCount::new(hint))) }
}

/// One step of several slots, each to so many tokens in all.
///
/// # Safety
/// - `bridge` came from [`bridge_open`]; `slots` and `tokens` point to `count` numbers each, or
///   anywhere where that is 0.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bridge_step(
    bridge: *mut Bridge,
    count: usize,
    slots: *const u32,
    tokens: *const u64,
) -> i32 {
    // SAFETY: the caller promises all three.
    unsafe { done(bridge, |bridge| bridge.cache.step(&bridge.entries(count, slots, tokens)?)) }
}

/// Has memory mapped ahead for several slots, each for so many tokens in all.
///
/// # Safety
/// - As [`bridge_step`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bridge_prefetch(
    bridge: *mut Bridge,
    count: usize,
    slots: *const u32,
    tokens: *const u64,
) -> i32 {
    // SAFETY: the caller promises all three.
    unsafe { done(bridge, |bridge| bridge.cache.prefetch(&bridge.entries(count, slots, tokens)?)) }
}

/// Has memory that holds nobody's tokens unmapped, until so many bytes are free. The device must be done
/// with it.
///
/// # Safety
/// - `bridge` came from [`bridge_open`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bridge_reclaim(bridge: *mut Bridge, bytes: u64) -> i32 {
    // SAFETY: the caller promises it.
    unsafe { done(bridge, |bridge| bridge.cache.reclaim(Bytes::new(bytes), &[Fence::Idle]).map(drop)) }
}

/// Has memory given back to the device, until so many bytes are held. The device must be done with it.
///
/// # Safety
/// - `bridge` came from [`bridge_open`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bridge_trim(bridge: *mut Bridge, keep: u64) -> i32 {
    // SAFETY: the caller promises it.
    unsafe { done(bridge, |bridge| bridge.cache.trim(Bytes::new(keep), &[Fence::Idle]).map(drop)) }
}

/// Waits until the mapper has done what it was asked for.
///
/// # Safety
/// - `bridge` came from [`bridge_open`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bridge_flush(bridge: *mut Bridge) -> i32 {
    // SAFETY: the caller promises it.
    unsafe { done(bridge, |bridge| bridge.cache.flush()) }
}

/// What is counted, as JSON. The text is valid until the next call of this.
///
/// # Safety
/// - `bridge` came from [`bridge_open`] and no other reference to it lives.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bridge_snapshot(bridge: *mut Bridge) -> *const c_char {
    // SAFETY: the caller promises it.
    let bridge = unsafe { &mut *bridge };
    bridge.snapshot = CString::new(bridge.cache.snapshot().to_json()).expect("JSON has no zeros");
    bridge.snapshot.as_ptr()
}

/// Gives a slot up. The device must be done with it.
///
/// # Safety
/// - `bridge` came from [`bridge_open`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bridge_retire(bridge: *mut Bridge, slot: u32) -> i32 {
    // SAFETY: the caller promises it.
    unsafe { done(bridge, |bridge| bridge.retire(slot)) }
}

/// Changes what may be held.
///
/// # Safety
/// - `bridge` came from [`bridge_open`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bridge_set_budget(bridge: *mut Bridge, budget: u64) -> i32 {
    // SAFETY: the caller promises it.
    unsafe { done(bridge, |bridge| bridge.cache.set_budget(Bytes::new(budget))) }
}

/// Writes the bytes that a slot of so many tokens needs over all tensors: whole tiles, whole granules.
///
/// # Safety
/// - `bridge` came from [`bridge_open`]; `bytes` points to room for one number.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bridge_need(bridge: *mut Bridge, tokens: u64, bytes: *mut u64) -> i32 {
    // SAFETY: the caller promises both.
    unsafe { answer(bridge, bytes, |bridge| Ok(bridge.need(TokenCount::new(tokens)).get())) }
}

/// Writes how many bytes from a slot's start in a tensor are mapped. Fails where that is not exactly
/// what the slot's tokens need.
///
/// # Safety
/// - `bridge` came from [`bridge_open`]; `bytes` points to room for one number.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bridge_backed(bridge: *mut Bridge, slot: u32, tensor: u32, bytes: *mut u64) -> i32 {
    // SAFETY: the caller promises both.
    unsafe { answer(bridge, bytes, |bridge| bridge.backed(slot, tensor)) }
}

impl Bridge {
    fn layout(&self) -> &Layout {
        self.cache.layout()
    }

    fn facts(&self) -> Facts {
        let layout = self.layout();
        Facts {
            tensors: u64::try_from(layout.tensors().len()).expect("a length fits 64 bits"),
            granule: layout.granule().bytes().get(),
            stride_tokens: layout.stride_tokens().get(),
            pages_per_slot: layout.pages_per_slot(),
        }
    }

    fn tensor(&self, number: u32) -> Result<&TensorLayout> {
        let place = usize::try_from(number).ok();
        place.and_then(|place| self.layout().tensors().get(place)).ok_or_else(|| {
            wrong(format!("there is no tensor {number}; there are {}", self.layout().tensors().len()))
        })
    }

    fn tensor_facts(&self, number: u32) -> Result<TensorFacts> {
        let tensor = self.tensor(number)?;
        let (layer, part) = (tensor.layers().start, tensor.parts()[0]);
        let place = self.layout().view(layer, part).expect("a tensor's first piece has a view");
        let addr = self.cache.view(layer, part)?.addr.get() - place.offset.get();
        Ok(TensorFacts {
            addr,
            row: tensor.row().get(),
            slot_stride: tensor.slot_stride().get(),
            size: tensor.size().get(),
        })
    }

    fn view(&self, layer: u32, part: u32, kind: u32) -> Result<ViewFacts> {
        let part = match part {
            0 => Part::Key,
            1 => Part::Value,
            _ => return Err(wrong(format!("part {part} is neither keys (0) nor values (1)"))),
        };
        let view = match kind {
            0 => self.cache.view(layer, part),
            1 => self.cache.paged_view(layer, part),
            2 => self.cache.token_view(layer, part),
            _ => Err(wrong(format!("view {kind} is neither by slot (0) nor by page (1) nor by token (2)"))),
        }?;
        Ok(ViewFacts { addr: view.addr.get(), shape: view.shape, strides: view.strides })
    }

    fn acquire(&mut self, hint: TokenCount) -> Result<u32> {
        let slot = self.cache.acquire(hint, None)?;
        self.slots.insert(slot.index(), slot);
        Ok(slot.index())
    }

    fn id(&self, slot: u32) -> Result<SlotId> {
        self.slots
            .get(&slot)
            .copied()
            .ok_or_else(|| wrong(format!("nobody has slot {slot}; acquire it first")))
    }

    /// # Safety
    /// - `slots` and `tokens` point to `count` numbers each, or anywhere where that is 0.
    unsafe fn entries(&self, count: usize, slots: *const u32, tokens: *const u64) -> Result<Vec<SlotTokens>> {
        if count == 0 {
            return Ok(Vec::new());
        }
        // SAFETY: the caller promises both.
        let (slots, tokens) =
            unsafe { (std::slice::from_raw_parts(slots, count), std::slice::from_raw_parts(tokens, count)) };
        let entry =
            |(slot, tokens): (&u32, &u64)| Ok(SlotTokens::new(self.id(*slot)?, TokenCount::new(*tokens)));
        slots.iter().zip(tokens).map(entry).collect()
    }

    fn retire(&mut self, slot: u32) -> Result<()> {
        self.cache.retire(self.id(slot)?, &[Fence::Idle])?;
        self.slots.remove(&slot);
        Ok(())
    }

    fn need(&self, tokens: TokenCount) -> Bytes {
        let layout = self.layout();
        layout.granule().to_bytes(layout.granules_for(layout.round_to_tile(tokens)))
    }

    /// A step backs every tensor for at least the slot's tokens. So where the sum over all tensors is
    /// just that, each of them has just its part.
    fn backed(&self, slot: u32, tensor: u32) -> Result<u64> {
        let report = self.cache.report()?;
        let slot = report
            .slots
            .iter()
            .find(|of| of.index == slot && of.active)
            .ok_or_else(|| wrong(format!("nobody has slot {slot}; acquire it first")))?;
        let need = self.need(slot.tokens);
        if slot.backed != need {
            return Err(wrong(format!(
                "slot {} has {} mapped and needs {need}; set the budget to what is needed before the step",
                slot.index, slot.backed
            )));
        }
        let granules = self.tensor(tensor)?.granules(self.layout().round_to_tile(slot.tokens));
        Ok(self.layout().granule().to_bytes(granules).get())
    }
}

fn open(device: &str, layout: &str, options: &Options) -> Result<KvCache> {
    let kind =
        LayerKind::Kv { kv_heads: options.kv_heads, key_dim: options.key_dim, value_dim: options.value_dim };
    let geometry = Geometry::new(vec![LayerGroup { layers: options.layers, kind }], Dtype::BF16)?;
    let config = Config::builder(geometry)
        .layout(layout.parse::<LayoutChoice>()?)
        .max_slots(options.slots)
        .max_tokens(TokenCount::new(options.max_tokens))
        .page_tokens(options.page_tokens)
        .tile_tokens(options.tile_tokens)
        .budget(Bytes::new(options.budget))
        .background(if options.mapper == 0 { Background::Off } else { Background::Thread })
        .build()?;
    let driver: Arc<dyn Driver> = match device {
        "cuda" => Cuda::new(CudaOptions::default())?,
        "host" => Host::new(HostOptions::new(Bytes::new(options.granule), Bytes::new(options.capacity)))?,
        _ => return Err(wrong(format!("\"{device}\" is no device; use cuda or host"))),
    };
    KvCache::new(config, driver)
}

#[cold]
fn wrong(message: String) -> Error {
    Error::new(ErrorKind::InvalidArgument, message)
}

/// The value, or `None` once the error is where [`bridge_error`] finds it.
fn noted<T>(result: Result<T>) -> Option<T> {
    result
        .map_err(|error| {
            let text = CString::new(error.report().replace('\0', " ")).expect("zeros were replaced");
            LAST_ERROR.set(text);
        })
        .ok()
}

/// # Safety
/// - `text` is a string of C that outlives the answer.
unsafe fn text<'a>(text: *const c_char) -> Result<&'a str> {
    // SAFETY: the caller promises it.
    let text = unsafe { CStr::from_ptr(text) };
    text.to_str().map_err(|_| wrong(format!("{text:?} is no UTF-8")))
}

/// # Safety
/// - `bridge` came from [`bridge_open`] and no other reference to it lives.
unsafe fn done(bridge: *mut Bridge, work: impl FnOnce(&mut Bridge) -> Result<()>) -> i32 {
    // SAFETY: the caller promises it.
    let bridge = unsafe { &mut *bridge };
    noted(work(bridge)).map_or(FAILED, |()| DONE)
}

/// # Safety
/// - `bridge` came from [`bridge_open`] and no other reference to it lives.
/// - `out` is valid for a write.
unsafe fn answer<T>(bridge: *mut Bridge, out: *mut T, work: impl FnOnce(&mut Bridge) -> Result<T>) -> i32 {
    // SAFETY: the caller promises the first; writing is the second.
    unsafe {
        done(bridge, |bridge| {
            out.write(work(bridge)?);
            Ok(())
        })
    }
}
