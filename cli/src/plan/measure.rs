//! What a layout comes to: read off a real cache on a driver that keeps books and maps nothing.
//!
//! The numbers of mappings are those that the cache makes, so they change with its policy. Each prompt
//! comes alone into an empty cache.

use std::time::Duration;

use serde::Serialize;
use vattn::error::Verb;
use vattn::geometry::{Background, Config, LayoutChoice};
use vattn::layout::{Layout, Part, TensorLayout, View};
use vattn::units::{Bytes, Device, TokenCount};
use vattn::{Error, ErrorKind, Fence, KvCache, Result, SlotTokens};

use super::chip::{ADDRESS_LIMIT, Chip, RESERVATION_LIMIT};
use crate::device::Bench;
use crate::model;
use crate::num::{float, wide};
use crate::place::Place;

/// Up to so many different numbers of granules are all looked at for the waste,
pub(crate) const RANGES: u64 = 8192;
/// and beyond so many lengths,
pub(crate) const SAMPLE: u64 = 1024;
/// or as many as take so many mappings, but a sixteenth of them at least.
const MAPPINGS: u64 = 1 << 17;
/// The prompts of the table.
pub(crate) const PROMPTS: [u64; 4] = [1 << 10, 8 << 10, 32 << 10, 128 << 10];
/// What layouts are compared by.
pub(crate) const REFERENCE: u64 = PROMPTS[1];

/// One layout. The names are the JSON's.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) layout: String,
    #[serde(skip)]
    pub(crate) choice: LayoutChoice,
    pub(crate) tensors: u64,
    /// In the tensor that has the fewest.
    pub(crate) tokens_per_granule: f64,
    /// From one token to the next, the widest.
    pub(crate) token_stride_bytes: Bytes,
    /// The same in pieces of the layer that is read.
    pub(crate) token_stride_pieces: u64,
    /// At the most, as far as it was measured.
    pub(crate) slower_decode_percent: Option<f64>,
    pub(crate) virtual_bytes: Bytes,
    pub(crate) last_element: LastElement,
    /// Why it can't be used, if it can't.
    pub(crate) obstacle: Option<String>,
    /// What a cache does, if one can be made.
    pub(crate) cache: Option<Cache>,
}

/// The largest offset of an element from the start of a layer's view, in elements.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub(crate) struct LastElement {
    /// In the view of all slots.
    pub(crate) view: u64,
    /// In the view of one slot.
    pub(crate) slot: u64,
}

/// What a cache does.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Cache {
    pub(crate) waste: Waste,
    /// Those of the table that fit.
    pub(crate) prompts: Vec<Prompt>,
    /// What layouts are compared by: 8,192 tokens, or the longest prompt if that is shorter.
    pub(crate) reference: Prompt,
    pub(crate) requests: Requests,
}

/// What is mapped for a request beyond its tokens' bytes, over all lengths alike.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub(crate) struct Waste {
    pub(crate) mean_bytes: f64,
    pub(crate) worst_bytes: Bytes,
    /// The mean when memory is short: whole granules and tiles, and no more than that.
    pub(crate) least_mean_bytes: f64,
    /// How many lengths that is from: all that there are, or a sample.
    pub(crate) lengths: u64,
}

/// A prompt in an empty cache.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub(crate) struct Prompt {
    pub(crate) tokens: TokenCount,
    pub(crate) mappings: u64,
    /// Modelled for an H200, the memory being there.
    pub(crate) map_seconds: f64,
    /// The same, the memory being created first.
    pub(crate) create_and_map_seconds: f64,
    #[serde(skip)]
    wasted: Bytes,
}

/// How many requests have room at once.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub(crate) struct Requests {
    pub(crate) full_context: u64,
    pub(crate) half_context: u64,
    /// The longest that has room alone.
    pub(crate) longest_tokens: TokenCount,
}

impl Row {
    /// Measures a layout with everything else as in `config`.
    ///
    /// # Errors
    /// Options with which no layout can be made; one that only this layout can't serve is its obstacle.
    pub(crate) fn measure(config: &Config, choice: LayoutChoice, granule: Bytes, chip: Chip) -> Result<Self> {
        let config = config.to_builder().layout(choice).build()?;
        let layout = Layout::new(&config, model::granule_size(granule)?, Device::Cpu)?;
        let stride = layout.tensors().iter().map(TensorLayout::row).max().unwrap_or_default();
        let pieces = pieces_apart(&layout);
        let mut obstacle = too_many_addresses(&layout);
        let cache = match open(&config, granule).and_then(|cache| cache.measure()) {
            Ok(cache) => Some(cache),
            // It is about this layout, and says what to do.
            Err(error) if error.kind() == ErrorKind::InvalidConfig => {
                obstacle = Some(error.report());
                None
            }
            Err(error) => return Err(error),
        };
        Ok(Self {
            layout: choice.to_string(),
            choice,
            tensors: wide(layout.tensors().len()),
            tokens_per_granule: float(granule.get()) / float(stride.get()),
            token_stride_bytes: stride,
            token_stride_pieces: pieces,
            slower_decode_percent: chip.slower_decode(pieces),
            virtual_bytes: layout.virtual_size(),
            last_element: last_element(&layout),
            obstacle,
            cache,
        })
    }

    /// What it does, if it can be used.
    pub(crate) fn usable(&self) -> Option<&Cache> {
        self.cache.as_ref().filter(|_| self.obstacle.is_none())
    }
}

/// From one token to the next in pieces of the same layer: the most of any layer.
fn pieces_apart(layout: &Layout) -> u64 {
    views(layout).map(|view| view.strides[1].div_ceil(view.shape[2] * view.shape[3])).max().unwrap_or(1)
}

fn last_element(layout: &Layout) -> LastElement {
    let offset = |view: &View, first: usize| {
        let last = view.shape.iter().zip(view.strides).skip(first);
        last.map(|(length, stride)| (length - 1) * stride).sum()
    };
    let most = |first| views(layout).map(|view| offset(&view, first)).max().unwrap_or(0);
    LastElement { view: most(0), slot: most(1) }
}

fn views(layout: &Layout) -> impl Iterator<Item = View> + '_ {
    (0..layout.layers())
        .flat_map(move |layer| Part::ALL.into_iter().filter_map(move |part| layout.view(layer, part)))
}

fn too_many_addresses(layout: &Layout) -> Option<String> {
    let largest = layout.tensors().iter().map(TensorLayout::size).max().unwrap_or_default();
    let (what, need, limit) = if layout.virtual_size() > ADDRESS_LIMIT {
        ("all tensors together", layout.virtual_size(), ADDRESS_LIMIT)
    } else if largest > RESERVATION_LIMIT {
        ("the largest tensor", largest, RESERVATION_LIMIT)
    } else {
        return None;
    };
    let slots = u64::from(layout.slots());
    let cure = match limit.get() / (need.get() / slots) {
        0 => "use fewer --max-tokens".to_owned(),
        fitting => format!("use --max-slots {fitting} or fewer, or fewer --max-tokens"),
    };
    let tib = |bytes: Bytes| format!("{:.1}", float(bytes.get()) / float(1 << 40));
    Some(format!(
        "{what} would need {} TiB of addresses, and {} TiB is the most that an H200 gave; {cure}",
        tib(need),
        tib(limit)
    ))
}

/// A cache on its own ledger.
struct Probe {
    cache: KvCache,
    bench: Bench,
}

fn open(config: &Config, granule: Bytes) -> Result<Probe> {
    let budget = config.budget().unwrap_or_default();
    let bench = Bench::open(&Place::Ledger, granule, budget)?;
    // Nobody maps ahead of a prompt that comes alone.
    let config = config.to_builder().background(Background::Off).build()?;
    let cache = KvCache::new(config, bench.driver())?;
    Ok(Probe { cache, bench })
}

impl Probe {
    fn measure(&self) -> Result<Cache> {
        let most = self.cache.layout().max_tokens();
        let longest = self.longest();
        if longest.is_zero() {
            return Err(Error::new(
                ErrorKind::InvalidConfig,
                format!(
                    "a request of 1 token does not fit {}; use more memory, or a layout with fewer tensors",
                    self.cache.budget()
                ),
            ));
        }
        let reference = self.prompt(TokenCount::new(REFERENCE).min(longest))?;
        let fitting = PROMPTS.into_iter().map(TokenCount::new).filter(|tokens| *tokens <= longest);
        let prompts = fitting.map(|tokens| self.prompt(tokens)).collect::<Result<_>>()?;
        let half = TokenCount::new(most.get().div_ceil(2));
        Ok(Cache {
            waste: self.waste(longest)?,
            prompts,
            reference,
            requests: Requests {
                full_context: self.at_once(most),
                half_context: self.at_once(half),
                longest_tokens: longest,
            },
        })
    }

    /// How many requests of that length the cache admits.
    fn at_once(&self, tokens: TokenCount) -> u64 {
        let slots = usize::try_from(self.cache.config().max_slots()).expect("a 64-bit usize holds a u32");
        wide(self.cache.admits(&vec![tokens; slots]))
    }

    fn longest(&self) -> TokenCount {
        let (mut fits, mut beyond) = (0, self.cache.layout().max_tokens().get() + 1);
        while beyond - fits > 1 {
            let middle = fits + (beyond - fits) / 2;
            if self.cache.admits(&[TokenCount::new(middle)]) == 1 { fits = middle } else { beyond = middle }
        }
        TokenCount::new(fits)
    }

    /// Has a request of that length come and go.
    fn prompt(&self, tokens: TokenCount) -> Result<Prompt> {
        let spent = || [Verb::Create, Verb::Map, Verb::SetAccess].map(|verb| self.bench.spent_on(verb));
        let before = spent();
        let slot = self.cache.acquire(tokens, None)?;
        self.cache.step(&[SlotTokens::new(slot, tokens)])?;
        let after = spent();
        let bytes = self.cache.bytes();
        self.cache.retire(slot, &[Fence::Idle])?;
        self.cache.trim(Bytes::ZERO, &[Fence::Idle])?;
        let [create, map, access] = [0, 1, 2].map(|verb| after[verb].1 - before[verb].1);
        let seconds = |time: Duration| time.as_secs_f64();
        Ok(Prompt {
            tokens,
            mappings: after[1].0 - before[1].0,
            map_seconds: seconds(map + access),
            create_and_map_seconds: seconds(create + map + access),
            wasted: bytes.mapped - bytes.needed,
        })
    }

    /// Over all lengths from 1 to `longest`, or over a sample where they need too many different
    /// numbers of granules.
    fn waste(&self, longest: TokenCount) -> Result<Waste> {
        let mut ranges = Vec::new();
        let mut first = 1;
        while first <= longest.get() && wide(ranges.len()) <= RANGES {
            let last = self.last_alike(TokenCount::new(first)).min(longest).get();
            ranges.push((first, last));
            first = last + 1;
        }
        if wide(ranges.len()) > RANGES { self.sampled_waste(longest) } else { self.exact_waste(&ranges) }
    }

    /// What a prompt maps depends on the granules that it needs: one look at each number of them.
    fn exact_waste(&self, ranges: &[(u64, u64)]) -> Result<Waste> {
        let mut sum = Sum::default();
        for &(first, last) in ranges {
            let wasted = self.prompt(TokenCount::new(first))?.wasted;
            let fewer = self.cache.layout().bytes_per_token() * (last - first);
            // Each token more wastes its own bytes less.
            let mean = |first: Bytes| float(first.get()) - float(fewer.get()) / 2.0;
            let least = self.least_waste(TokenCount::new(first));
            sum.add(last - first + 1, mean(wasted), mean(least), wasted);
        }
        Ok(sum.waste())
    }

    /// One length in each of equal parts, at places that repeat with no power of two: the fractions of
    /// multiples of the golden ratio.
    fn sampled_waste(&self, longest: TokenCount) -> Result<Waste> {
        let sample = (MAPPINGS / self.prompt(longest)?.mappings).clamp(SAMPLE / 16, SAMPLE);
        let mut sum = Sum::default();
        let mut fraction = 0_u64;
        for part in 0..sample {
            fraction = fraction.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let place = (u128::from(part) << 32) + u128::from(fraction >> 32);
            let scaled = u128::from(longest.get()) * place / (u128::from(sample) << 32);
            let length = TokenCount::new(u64::try_from(scaled).expect("below the longest, a u64") + 1);
            let wasted = self.prompt(length)?.wasted;
            sum.add(1, float(wasted.get()), float(self.least_waste(length).get()), wasted);
        }
        Ok(sum.waste())
    }

    /// Of whole granules and tiles.
    fn least_waste(&self, tokens: TokenCount) -> Bytes {
        let layout = self.cache.layout();
        let granules = layout.granules_for(layout.round_to_tile(tokens));
        layout.granule().to_bytes(granules) - layout.bytes_per_token() * tokens.get()
    }

    /// The most tokens that need the same granules as these.
    fn last_alike(&self, tokens: TokenCount) -> TokenCount {
        let layout = self.cache.layout();
        let backed = layout.round_to_tile(tokens);
        let ends = layout.tensors().iter().map(|tensor| tensor.tokens_within(tensor.granules(backed)));
        layout.tile_floor(ends.min().unwrap_or(backed))
    }
}

/// Waste so far.
#[derive(Default)]
struct Sum {
    lengths: u64,
    wasted: f64,
    least: f64,
    worst: Bytes,
}

impl Sum {
    fn add(&mut self, lengths: u64, mean: f64, least_mean: f64, worst: Bytes) {
        self.lengths += lengths;
        self.wasted += mean * float(lengths);
        self.least += least_mean * float(lengths);
        self.worst = self.worst.max(worst);
    }

    fn waste(&self) -> Waste {
        let lengths = float(self.lengths);
        Waste {
            mean_bytes: self.wasted / lengths,
            worst_bytes: self.worst,
            least_mean_bytes: self.least / lengths,
            lengths: self.lengths,
        }
    }
}

#[cfg(test)]
mod tests {
    use vattn::Geometry;
    use vattn::driver::ledger::{Ledger, LedgerOptions};

    use super::*;

    fn config(layout: &str, most: u64, tile: u32) -> Config {
        Config::builder(Geometry::preset("llama-3-8b").unwrap())
            .layout(layout.parse::<LayoutChoice>().unwrap())
            .max_slots(16)
            .max_tokens(TokenCount::new(most))
            .tile_tokens(tile)
            .budget(Bytes::gib(32))
            .build()
            .unwrap()
    }

    fn probe(layout: &str, most: u64, tile: u32) -> Probe {
        open(&config(layout, most, tile), Bytes::mib(2)).unwrap()
    }

    #[test]
    fn mappings_are_those_of_a_fresh_cache() {
        for layout in ["per-layer", "grouped:8", "sliced", "sliced-interleaved"] {
            let probe = probe(layout, 131_072, 176);
            // Some that the table has, and others, in an order that would show what stays behind.
            for tokens in [131_072, 1000, 1024, 40_000, 1, 8192] {
                let tokens = TokenCount::new(tokens);
                let ledger =
                    LedgerOptions { granule: Bytes::mib(2), capacity: Bytes::gib(32), addresses: None };
                let fresh = KvCache::new(config(layout, 131_072, 176), Ledger::new(ledger).unwrap()).unwrap();
                let slot = fresh.acquire(tokens, None).unwrap();
                fresh.step(&[SlotTokens::new(slot, tokens)]).unwrap();
                let prompt = probe.prompt(tokens).unwrap();
                assert_eq!(prompt.mappings, fresh.snapshot().driver[&Verb::Map].calls, "{layout} {tokens}");
                assert_eq!(prompt.wasted, fresh.bytes().mapped - fresh.bytes().needed, "{layout} {tokens}");
            }
        }
    }

    #[test]
    fn waste_is_that_of_every_length() {
        for (layout, tile) in
            [("sliced", 1), ("sliced", 48), ("grouped:4", 176), ("per-layer-interleaved", 1)]
        {
            let probe = probe(layout, 1500, tile);
            let lengths = (1..=1500).map(TokenCount::new);
            let each: Vec<Bytes> =
                lengths.clone().map(|tokens| probe.prompt(tokens).unwrap().wasted).collect();
            let least: Bytes = lengths.map(|tokens| probe.least_waste(tokens)).sum();
            let waste = probe.waste(TokenCount::new(1500)).unwrap();
            let mean = |sum: Bytes| float(sum.get()) / 1500.0;
            assert!((waste.mean_bytes - mean(each.iter().copied().sum())).abs() < 1.0, "{layout} {tile}");
            assert!((waste.least_mean_bytes - mean(least)).abs() < 1.0, "{layout} {tile}");
            assert_eq!((Some(waste.worst_bytes), waste.lengths), (each.into_iter().max(), 1500));
        }
    }

    #[test]
    fn a_sample_comes_close_to_every_length() {
        let probe = probe("sliced", 131_072, 1);
        let longest = TokenCount::new(131_072);
        let (exact, sampled) = (probe.waste(longest).unwrap(), probe.sampled_waste(longest).unwrap());
        assert_eq!((exact.lengths, sampled.lengths), (131_072, SAMPLE));
        assert!((sampled.mean_bytes / exact.mean_bytes - 1.0).abs() < 0.01, "{exact:?} {sampled:?}");
        assert!(
            (sampled.least_mean_bytes / exact.least_mean_bytes - 1.0).abs() < 0.02,
            "{exact:?} {sampled:?}"
        );
        assert!(sampled.worst_bytes <= exact.worst_bytes);
    }

    #[test]
    fn as_many_requests_have_room_as_the_cache_admits() {
        let probe = probe("grouped:16", 131_072, 1);
        let requests = probe.measure().unwrap().requests;
        // 16 GiB each, of 32.
        assert_eq!((requests.full_context, requests.half_context), (2, 4));
        let tokens = TokenCount::new(65_536);
        for number in 0..=requests.half_context {
            let slot = probe.cache.acquire(tokens, None).unwrap();
            let stepped = probe.cache.step(&[SlotTokens::new(slot, tokens)]);
            assert_eq!(stepped.is_ok(), number < requests.half_context, "{number}");
        }
    }
}
