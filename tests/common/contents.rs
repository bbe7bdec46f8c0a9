//! Patterns in slots: written through addresses, and found again; on a card by kernels.

use std::ops::Range;

use vattn::cache::TensorView;
use vattn::layout::Part;
#[cfg(feature = "cuda")]
use vattn::units::Device;
use vattn::units::DeviceAddr;
use vattn::{KvCache, SlotId};

pub(crate) fn pointer(addr: DeviceAddr) -> *mut u8 {
    std::ptr::with_exposed_provenance_mut(usize::try_from(addr.get()).unwrap())
}

/// Every layer's keys and values that there are.
pub(crate) fn parts(cache: &KvCache) -> impl Iterator<Item = (u32, Part)> {
    let all = (0..cache.layout().layers()).flat_map(|layer| Part::ALL.map(|part| (layer, part)));
    all.filter(|(layer, part)| cache.view(*layer, *part).is_ok())
}

/// Where an element is, by a view's own strides.
pub(crate) fn element(view: &TensorView, at: [u64; 4]) -> *mut u8 {
    for (place, length) in at.iter().zip(view.shape) {
        assert!(*place < length, "{at:?} is outside {:?}", view.shape);
    }
    let elements: u64 = at.iter().zip(view.strides).map(|(place, stride)| place * stride).sum();
    pointer(view.addr + view.dtype.bytes() * elements)
}

/// Tokens of a slot in one layer's keys or values, and whose pattern they have.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Place {
    start: *mut u8,
    token_stride: u64,
    head_stride: u64,
    heads: u64,
    head_bytes: u64,
    first: u64,
    tokens: u64,
    owner: u64,
    salt: u64,
}

impl Place {
    /// No tokens of nobody.
    pub(crate) const NOTHING: Self = Self {
        start: std::ptr::null_mut(),
        token_stride: 0,
        head_stride: 0,
        heads: 0,
        head_bytes: 0,
        first: 0,
        tokens: 0,
        owner: 0,
        salt: 0,
    };

    fn new(
        view: &TensorView,
        slot: SlotId,
        owner: u64,
        tokens: &Range<u64>,
        (layer, part): (u32, Part),
    ) -> Self {
        let bytes = view.dtype.bytes().get();
        Self {
            start: element(view, [u64::from(slot.index()), 0, 0, 0]),
            token_stride: view.strides[1] * bytes,
            head_stride: view.strides[2] * bytes,
            heads: view.shape[2],
            head_bytes: view.shape[3] * bytes,
            first: tokens.start,
            tokens: tokens.end.saturating_sub(tokens.start),
            owner,
            salt: u64::from(layer) << 40 | u64::from(part == Part::Value) << 32,
        }
    }

    fn expected(&self, token: u64, head: u64, byte: u64) -> u8 {
        let mut mixed = self
            .owner
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .wrapping_add(self.salt | head << 24)
            .wrapping_add(token)
            .wrapping_add((byte / 8) << 48);
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)).to_le_bytes()[usize::try_from(byte % 8).unwrap()]
    }

    /// Every byte with where it is and what it should be.
    fn each(&self, visit: impl Fn(*mut u8, u8)) {
        for token in self.first..self.first + self.tokens {
            for head in 0..self.heads {
                for byte in 0..self.head_bytes {
                    let offset = token * self.token_stride + head * self.head_stride + byte;
                    let place = self.start.wrapping_add(usize::try_from(offset).unwrap());
                    visit(place, self.expected(token, head, byte));
                }
            }
        }
    }
}

/// The same tokens of a slot in every layer's keys and values.
pub(crate) fn places(
    cache: &KvCache,
    slot: SlotId,
    owner: u64,
    tokens: Range<u64>,
) -> impl Iterator<Item = Place> {
    parts(cache).map(move |of| Place::new(&cache.view(of.0, of.1).unwrap(), slot, owner, &tokens, of))
}

/// Writes the owner's pattern into tokens of a slot, in every layer, every byte.
pub(crate) fn fill(cache: &KvCache, slot: SlotId, owner: u64, tokens: Range<u64>) {
    for of in parts(cache) {
        let view = cache.view(of.0, of.1).unwrap();
        let place = Place::new(&view, slot, owner, &tokens, of);
        #[cfg(feature = "cuda")]
        if view.device != Device::Cpu {
            super::kernels::Kernels::get().fill(place);
            continue;
        }
        // SAFETY: a step has backed these tokens, and the test alone uses the slot.
        place.each(|byte, value| unsafe { byte.write_volatile(value) });
    }
}

/// Finds the owner's pattern again in the slot's first tokens.
#[track_caller]
pub(crate) fn find(cache: &KvCache, slot: SlotId, owner: u64, tokens: u64) {
    for of in parts(cache) {
        let view = cache.view(of.0, of.1).unwrap();
        addresses_agree(cache, slot, of, &view, tokens);
        let place = Place::new(&view, slot, owner, &(0..tokens), of);
        #[cfg(feature = "cuda")]
        if view.device != Device::Cpu {
            let wrong = super::kernels::Kernels::get().find(place);
            assert_eq!(wrong, 0, "{slot:?}, layer {} {}: bytes of {tokens} tokens", of.0, of.1);
            continue;
        }
        place.each(|byte, value| {
            // SAFETY: a step has backed these tokens, and the test alone uses the slot.
            let found = unsafe { byte.read_volatile() };
            assert_eq!(found, value, "{slot:?}, layer {} {}, at {byte:?}", of.0, of.1);
        });
    }
}

/// A token lies in the same place by slot, by page and in the long row.
#[track_caller]
fn addresses_agree(
    cache: &KvCache,
    slot: SlotId,
    (layer, part): (u32, Part),
    by_slot: &TensorView,
    tokens: u64,
) {
    let layout = cache.layout();
    let page = u64::from(cache.config().page_tokens());
    let index = u64::from(slot.index());
    let by_page = cache.paged_view(layer, part).unwrap();
    let in_row = cache.token_view(layer, part).unwrap();
    for token in 0..tokens {
        for head in [0, by_slot.shape[2] - 1] {
            let start = element(by_slot, [index, token, head, 0]);
            let of_page = index * layout.pages_per_slot() + token / page;
            assert_eq!(start, element(&by_page, [of_page, token % page, head, 0]));
            let of_row = index * layout.stride_tokens().get() + token;
            assert_eq!(start, element(&in_row, [0, of_row, head, 0]));
        }
    }
}

/// Writes one byte, wherever that is: it kills the process, or the card's context, unless it is backed.
pub(crate) fn poke(byte: *mut u8) {
    #[cfg(feature = "cuda")]
    if super::on_card() {
        return super::kernels::Kernels::get().poke(byte);
    }
    // SAFETY: none is claimed for what is not backed: the process is to die of it.
    unsafe { byte.write_volatile(1) };
}
