//! Patterns in slots: written through addresses, and found again.

use vattn::cache::TensorView;
use vattn::layout::Part;
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

/// One head of one token, whole: its first byte and its length.
fn head(view: &TensorView, at: [u64; 3]) -> (*mut u8, usize) {
    let length = view.dtype.bytes().get() * view.shape[3];
    (element(view, [at[0], at[1], at[2], 0]), usize::try_from(length).unwrap())
}

fn expected(owner: u64, layer: u32, part: Part, token: u64, head: u64, byte: usize) -> u8 {
    let part = u64::from(part == Part::Value);
    let mut mixed = owner
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
        .wrapping_add(u64::from(layer) << 40 | part << 32 | head << 24)
        .wrapping_add(token)
        .wrapping_add(u64::try_from(byte / 8).unwrap() << 48);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed.to_le_bytes()[byte % 8]
}

/// Writes the owner's pattern into tokens of a slot, in every layer, every byte.
pub(crate) fn fill(cache: &KvCache, slot: SlotId, owner: u64, tokens: std::ops::Range<u64>) {
    for (layer, part) in parts(cache) {
        let view = cache.view(layer, part).unwrap();
        for token in tokens.clone() {
            for place in 0..view.shape[2] {
                let (start, length) = head(&view, [u64::from(slot.index()), token, place]);
                for byte in 0..length {
                    // SAFETY: a step has backed these tokens, and the test alone uses the slot.
                    unsafe {
                        start.add(byte).write_volatile(expected(owner, layer, part, token, place, byte))
                    };
                }
            }
        }
    }
}

/// Finds the owner's pattern again in the slot's first tokens, by slot, by page and in the long row.
#[track_caller]
pub(crate) fn find(cache: &KvCache, slot: SlotId, owner: u64, tokens: u64) {
    let layout = cache.layout();
    let page = u64::from(cache.config().page_tokens());
    let index = u64::from(slot.index());
    for (layer, part) in parts(cache) {
        let by_slot = cache.view(layer, part).unwrap();
        let by_page = cache.paged_view(layer, part).unwrap();
        let in_row = cache.token_view(layer, part).unwrap();
        for token in 0..tokens {
            for place in 0..by_slot.shape[2] {
                let (start, length) = head(&by_slot, [index, token, place]);
                let of_page = index * layout.pages_per_slot() + token / page;
                assert_eq!(start, head(&by_page, [of_page, token % page, place]).0);
                let of_row = index * layout.stride_tokens().get() + token;
                assert_eq!(start, head(&in_row, [0, of_row, place]).0);
                for byte in 0..length {
                    // SAFETY: a step has backed these tokens, and the test alone uses the slot.
                    let found = unsafe { start.add(byte).read_volatile() };
                    assert_eq!(
                        found,
                        expected(owner, layer, part, token, place, byte),
                        "{slot:?}, layer {layer} {part}, token {token}, head {place}, byte {byte}"
                    );
                }
            }
        }
    }
}
