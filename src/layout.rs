//! How a model's layers, keys and values lie in tensors: shapes, strides, addresses and granules.
//!
//! Owns the arithmetic from a [`Geometry`](crate::geometry::Geometry) and a granule to tensors.
//! Everything here is pure: a layout is a table of numbers, made once and only read afterwards.
//! Refuses to know what is mapped, where a reservation starts, and who owns a slot.
//!
//! A tensor is one reservation, `[slot, token, row]`. A token's row holds the pieces of the tensor's
//! layers one after another, packed:
//!
//! ```text
//!            ├──────────── slot stride ────────────┤
//!   tensor:  │ slot 0                              │ slot 1                        │ …
//!            │ token 0 │ token 1 │ … │ (addresses) │ token 0 │ …
//!            │         └─────────────────────────┐
//!            │ layer 0 K │ layer 0 V │ layer 1 K │ …    interleaved
//!            │ layer 0 K │ layer 1 K │ …                apart: the V of the same layers are
//!                                                       in a tensor of their own
//! ```
//!
//! Invariants:
//! - The slot stride is the same number of tokens in all tensors, and in each of them a whole number
//!   of granules and of pages. So a slot can be mapped alone, the tensor can also be read as pages or
//!   as one long row of tokens, and one page table serves all layers. Virtual addresses pay for it:
//!   a row with few factors of two can make the stride several times `max_tokens`.
//! - Pieces never overlap, and a row has no padding: a tensor's row is the packed floor of its part
//!   of a token. So a piece starts at a multiple of its element's size and of whatever power of two
//!   divides all pieces of the tensor up to the granule; [`View::alignment`] says how much that is.
//! - Every number of bytes of the whole layout fits 64 bits, checked when it is made.

use std::ops::Range;

use crate::error::{Error, ErrorKind, Result};
use crate::geometry::{Config, Dtype, KvOrder, LayoutKind, Piece};
use crate::units::{Bytes, Device, GranuleSize, Granules, TokenCount, gcd, index};

pub use crate::geometry::Part;

/// One tensor: its row, its slots, its size.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TensorLayout {
    row: Bytes,
    slot_stride: Bytes,
    size: Bytes,
    max_granules: Granules,
    granule: GranuleSize,
    layers: Range<u32>,
    parts: &'static [Part],
}

impl TensorLayout {
    /// What one token takes in this tensor, without padding.
    #[inline]
    #[must_use]
    pub const fn row(&self) -> Bytes {
        self.row
    }

    /// From one slot to the next: a multiple of the granule.
    #[inline]
    #[must_use]
    pub const fn slot_stride(&self) -> Bytes {
        self.slot_stride
    }

    /// The addresses to reserve: all slots, the spare one included, at their stride.
    #[inline]
    #[must_use]
    pub const fn size(&self) -> Bytes {
        self.size
    }

    /// The model's layers with a piece in this tensor.
    #[must_use]
    pub const fn layers(&self) -> Range<u32> {
        self.layers.start..self.layers.end
    }

    /// Which pieces of its layers it holds, in the row's order.
    #[must_use]
    pub const fn parts(&self) -> &'static [Part] {
        self.parts
    }

    /// The granules that a slot's first tokens lie in, the last perhaps in part.
    ///
    /// # Panics
    /// Past 2^64 bytes, which is far beyond the most tokens of a slot.
    #[inline]
    #[must_use]
    pub fn granules(&self, tokens: TokenCount) -> Granules {
        self.granule.covering(self.row * tokens.get())
    }

    /// The whole tokens that a slot's first granules hold.
    ///
    /// # Panics
    /// Past 2^64 bytes, which is far beyond a slot.
    #[inline]
    #[must_use]
    pub const fn tokens_within(&self, granules: Granules) -> TokenCount {
        TokenCount::new(self.granule.to_bytes(granules).get() / self.row.get())
    }

    /// The granules of a slot at its most tokens.
    #[inline]
    #[must_use]
    pub const fn max_granules(&self) -> Granules {
        self.max_granules
    }

    /// Where a slot starts in this tensor.
    ///
    /// # Panics
    /// Past 2^64 bytes, which is far beyond the last slot.
    #[inline]
    #[must_use]
    pub fn slot_offset(&self, slot: u32) -> Bytes {
        self.slot_stride * u64::from(slot)
    }

    /// How tokens and granules relate, in lowest terms: so many tokens take exactly so many granules.
    #[must_use]
    pub fn tokens_per_granules(&self) -> (TokenCount, Granules) {
        let common = gcd(self.row.get(), self.granule.bytes().get());
        (TokenCount::new(self.granule.bytes().get() / common), Granules::new(self.row.get() / common))
    }
}

/// One layer's keys or values as a strided array, the way kernels take them.
///
/// The last dimension is contiguous. Addresses are relative to the start of the tensor's
/// reservation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct View {
    /// The tensor's number in [`Layout::tensors`].
    pub tensor: usize,
    /// Where element `[0, 0, 0, 0]` lies in the tensor.
    pub offset: Bytes,
    /// Elements along each dimension: the first two as the method that made the view says, then
    /// heads (1 for a latent) and elements of a head.
    pub shape: [u64; 4],
    /// From one element to the next along each dimension, in elements.
    pub strides: [u64; 4],
    /// The type of the elements.
    pub dtype: Dtype,
    /// Where the memory is.
    pub device: Device,
    granule: GranuleSize,
}

impl View {
    /// Where an element lies in the tensor, or `None` outside the shape.
    #[must_use]
    pub fn byte_offset(&self, coordinates: [u64; 4]) -> Option<Bytes> {
        let mut elements = 0;
        for ((at, length), stride) in coordinates.into_iter().zip(self.shape).zip(self.strides) {
            if at >= length {
                return None;
            }
            elements += at * stride;
        }
        Some(self.offset + self.dtype.bytes() * elements)
    }

    /// The largest power of two that divides the address of every head of every token, at most a
    /// granule. Vectorised kernels want 16 bytes, which every preset gives in every layout.
    #[must_use]
    pub fn alignment(&self) -> Bytes {
        let [outer, token, head, _] = self.strides.map(|stride| (self.dtype.bytes() * stride).get());
        let shared = self.offset.get() | outer | token | head | self.granule.bytes().get();
        Bytes::new(1 << shared.trailing_zeros())
    }
}

/// Where a piece lies: in which tensor, and how far into a row.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Place {
    tensor: usize,
    offset: Bytes,
    piece: Piece,
}

/// All tensors of a cache, and where each layer's keys and values lie in them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Layout {
    tensors: Vec<TensorLayout>,
    /// For each layer its keys' and its values' place.
    places: Vec<[Option<Place>; 2]>,
    /// The different rows and how many tensors have each: models have few kinds of layers, so that
    /// sums over hundreds of tensors stay short.
    rows: Vec<(Bytes, u64)>,
    granule: GranuleSize,
    slots: u32,
    max_tokens: TokenCount,
    stride_tokens: TokenCount,
    page_tokens: u32,
    tile_tokens: u32,
    bytes_per_token: Bytes,
    virtual_size: Bytes,
    dtype: Dtype,
    device: Device,
}

impl Layout {
    /// The layout of a cache with those options, on a driver with that granule and device.
    ///
    /// Tensors are in model order; where keys and values are apart, a tensor of keys comes before
    /// that of the same layers' values. A tensor that would hold nothing (the values of latent
    /// layers) is not made.
    ///
    /// # Errors
    /// [`InvalidConfig`](ErrorKind::InvalidConfig): the slot stride or all tensors together need
    /// 2^64 addresses or more.
    pub fn new(config: &Config, granule: GranuleSize, device: Device) -> Result<Self> {
        let drafts = Drafts::new(config);
        let stride = common_stride(config, granule, &drafts.rows)?;
        let slots = u64::from(config.slots());
        let too_large = |what: &str| {
            let widest = drafts.rows.iter().map(|draft| draft.row).max().unwrap_or_default();
            invalid(format!(
                "{what} of {slots} slots at a stride of {stride} tokens (max_tokens {} rounded up to whole \
                 granules of {} and pages of {} tokens; the widest row has {widest}) need 2^64 addresses or \
                 more: use a smaller max_slots or max_tokens",
                config.max_tokens(),
                granule.bytes(),
                config.page_tokens(),
            ))
        };
        let mut tensors = Vec::with_capacity(drafts.rows.len());
        let mut rows: Vec<(Bytes, u64)> = Vec::new();
        let mut virtual_size = Bytes::ZERO;
        for Draft { row, layers, parts } in drafts.rows.iter().cloned() {
            let slot_stride = row.checked_mul(stride.get()).ok_or_else(|| too_large("a tensor"))?;
            let size = slot_stride.checked_mul(slots).ok_or_else(|| too_large("a tensor"))?;
            virtual_size = virtual_size.checked_add(size).ok_or_else(|| too_large("the tensors"))?;
            let max_granules = granule.covering(row * config.max_tokens().get());
            tensors.push(TensorLayout { row, slot_stride, size, max_granules, granule, layers, parts });
            match rows.iter_mut().find(|(known, _)| *known == row) {
                Some((_, count)) => *count += 1,
                None => rows.push((row, 1)),
            }
        }
        Ok(Self {
            tensors,
            places: drafts.places,
            rows,
            granule,
            slots: config.slots(),
            max_tokens: config.max_tokens(),
            stride_tokens: stride,
            page_tokens: config.page_tokens(),
            tile_tokens: config.tile_tokens(),
            bytes_per_token: config.geometry().bytes_per_token(),
            virtual_size,
            dtype: config.geometry().dtype(),
            device,
        })
    }

    /// The tensors; there is at least one.
    #[inline]
    #[must_use]
    pub fn tensors(&self) -> &[TensorLayout] {
        &self.tensors
    }

    /// How many layers have a view.
    #[must_use]
    pub fn layers(&self) -> u32 {
        self.tensors.last().map_or(0, |tensor| tensor.layers.end)
    }

    /// From one slot to the next in tokens, the same in all tensors: a multiple of a page.
    #[must_use]
    pub const fn stride_tokens(&self) -> TokenCount {
        self.stride_tokens
    }

    /// The first dimension of every tensor: the requests' slots and the spare one.
    #[must_use]
    pub const fn slots(&self) -> u32 {
        self.slots
    }

    /// The most tokens that a slot can hold; the rest of its stride is addresses only.
    #[must_use]
    pub const fn max_tokens(&self) -> TokenCount {
        self.max_tokens
    }

    /// The unit of mapping that the layout was made for.
    #[must_use]
    pub const fn granule(&self) -> GranuleSize {
        self.granule
    }

    /// What one token takes over all tensors: the packed floor.
    #[inline]
    #[must_use]
    pub const fn bytes_per_token(&self) -> Bytes {
        self.bytes_per_token
    }

    /// The addresses that all tensors reserve together.
    #[must_use]
    pub const fn virtual_size(&self) -> Bytes {
        self.virtual_size
    }

    /// The granules that a slot of so many tokens needs, over all tensors.
    ///
    /// # Panics
    /// Past 2^64 bytes, which is far beyond the most tokens of a slot.
    #[inline]
    #[must_use]
    pub fn granules_for(&self, tokens: TokenCount) -> Granules {
        self.rows.iter().map(|&(row, tensors)| self.granule.covering(row * tokens.get()) * tensors).sum()
    }

    /// What a slot of so many tokens wastes at the least: its granules beyond the packed floor.
    ///
    /// # Panics
    /// Past 2^64 bytes, which is far beyond the most tokens of a slot.
    #[must_use]
    pub fn waste(&self, tokens: TokenCount) -> Bytes {
        self.granule.to_bytes(self.granules_for(tokens)) - self.bytes_per_token * tokens.get()
    }

    /// The tokens that a step backs for so many: whole tiles, clipped at the slot's most tokens, as
    /// that is where the views end.
    #[inline]
    #[must_use]
    pub fn round_to_tile(&self, tokens: TokenCount) -> TokenCount {
        if self.tile_tokens == 1 {
            return tokens.min(self.max_tokens);
        }
        let whole = tokens.get().checked_next_multiple_of(u64::from(self.tile_tokens));
        whole.map_or(self.max_tokens, |whole| TokenCount::new(whole).min(self.max_tokens))
    }

    /// The most tokens whose tiles all end within `tokens`: the inverse of
    /// [`round_to_tile`](Self::round_to_tile).
    #[must_use]
    pub fn tile_floor(&self, tokens: TokenCount) -> TokenCount {
        if tokens >= self.max_tokens {
            return self.max_tokens;
        }
        TokenCount::new(tokens.get() - tokens.get() % u64::from(self.tile_tokens))
    }

    /// A layer's keys or values by slot: `[slots, max_tokens, heads, dim]`.
    ///
    /// The second dimension ends at the most tokens of a slot; its stride leads on to more addresses,
    /// behind which there is never memory of another slot. `None` past the last layer and for the
    /// values of a latent layer.
    #[must_use]
    pub fn view(&self, layer: u32, part: Part) -> Option<View> {
        self.view_of(layer, part, [u64::from(self.slots), self.max_tokens.get()], self.stride_tokens.get())
    }

    /// The same memory as pages: `[slots * pages_per_slot, page_tokens, heads, dim]`.
    ///
    /// Its page table only counts: page `i` of slot `s` is `s * pages_per_slot + i`, for all layers
    /// alike.
    #[must_use]
    pub fn paged_view(&self, layer: u32, part: Part) -> Option<View> {
        let page = u64::from(self.page_tokens);
        self.view_of(layer, part, [u64::from(self.slots) * self.pages_per_slot(), page], page)
    }

    /// The same memory as one long row of tokens: `[1, slots * stride_tokens, heads, dim]`.
    ///
    /// Token `t` of slot `s` is `s * stride_tokens + t`, for all layers alike.
    #[must_use]
    pub fn token_view(&self, layer: u32, part: Part) -> Option<View> {
        let tokens = u64::from(self.slots) * self.stride_tokens.get();
        self.view_of(layer, part, [1, tokens], tokens)
    }

    /// How many pages a slot's stride has.
    #[must_use]
    pub fn pages_per_slot(&self) -> u64 {
        self.stride_tokens.get() / u64::from(self.page_tokens)
    }

    fn view_of(&self, layer: u32, part: Part, [outer, tokens]: [u64; 2], step: u64) -> Option<View> {
        let place = (*self.places.get(index(layer))?)[number(part)]?;
        let row = self.tensors[place.tensor].row.get() / self.dtype.bytes().get();
        let Piece { heads, dim } = place.piece;
        Some(View {
            tensor: place.tensor,
            offset: place.offset,
            shape: [outer, tokens, u64::from(heads), u64::from(dim)],
            strides: [step * row, row, u64::from(dim), 1],
            dtype: self.dtype,
            device: self.device,
            granule: self.granule,
        })
    }
}

/// A tensor of which only the row is known yet.
#[derive(Clone)]
struct Draft {
    row: Bytes,
    layers: Range<u32>,
    parts: &'static [Part],
}

/// Which piece goes into which row, and where.
struct Drafts {
    rows: Vec<Draft>,
    places: Vec<[Option<Place>; 2]>,
}

impl Drafts {
    fn new(config: &Config) -> Self {
        let geometry = config.geometry();
        let together = match config.layout().kind {
            LayoutKind::PerLayer => 1,
            LayoutKind::Sliced => geometry.layers(),
            LayoutKind::Grouped(layers) => layers.min(geometry.layers()),
        };
        let sets: &[&'static [Part]] = match config.layout().order {
            KvOrder::Apart => &[&[Part::Key], &[Part::Value]],
            KvOrder::Interleaved => &[&Part::ALL],
        };
        let kinds: Vec<_> = geometry.layer_kinds().collect();
        let mut rows = Vec::new();
        let mut places = vec![[None; 2]; kinds.len()];
        let mut first = 0;
        while first < geometry.layers() {
            let layers = first..geometry.layers().min(first.saturating_add(together));
            for &parts in sets {
                let mut row = Bytes::ZERO;
                for layer in layers.clone().map(index) {
                    for &part in parts {
                        let Some(piece) = kinds[layer].piece(part) else { continue };
                        places[layer][number(part)] = Some(Place { tensor: rows.len(), offset: row, piece });
                        // Part of the geometry's bytes per token, which were checked to fit.
                        row += geometry.dtype().bytes() * piece.elements();
                    }
                }
                if !row.is_zero() {
                    rows.push(Draft { row, layers: layers.clone(), parts });
                }
            }
            first = layers.end;
        }
        Self { rows, places }
    }
}

/// The fewest tokens from `max_tokens` on that are whole pages and, in every tensor, whole granules.
fn common_stride(config: &Config, granule: GranuleSize, drafts: &[Draft]) -> Result<TokenCount> {
    let size = granule.bytes().get();
    let page = u64::from(config.page_tokens());
    // Powers of two, as the granule is one: their least common multiple is the largest.
    let whole = drafts.iter().map(|draft| size / gcd(size, draft.row.get())).max().unwrap_or(1);
    let unit = (page / gcd(page, whole)).checked_mul(whole);
    let stride = unit.and_then(|unit| config.max_tokens().get().checked_next_multiple_of(unit));
    stride.map(TokenCount::new).ok_or_else(|| {
        invalid(format!(
            "max_tokens {} can't be rounded up to whole pages of {page} tokens and whole granules of {} (every \
             {whole} tokens) below 2^64: use a smaller page_tokens or max_tokens",
            config.max_tokens(),
            granule.bytes(),
        ))
    })
}

const fn number(part: Part) -> usize {
    match part {
        Part::Key => 0,
        Part::Value => 1,
    }
}

#[cold]
fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidConfig, message)
}

#[cfg(test)]
mod tests;
