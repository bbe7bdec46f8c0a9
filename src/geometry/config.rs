//! Which options a cache is built with.

use std::fmt;
use std::str::FromStr;

use super::Geometry;
use crate::error::{Error, ErrorKind, Result};
use crate::units::{Bytes, SizeClass, TokenCount};

/// How many layers share a tensor.
///
/// The more they are, the fewer mappings and the less waste a token costs, and the further apart the
/// tokens of one layer lie.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum LayoutKind {
    /// Each layer has tensors of its own: the shape that kernels are written for.
    PerLayer,
    /// All layers in one tensor: the papers' tensor slicing.
    #[default]
    Sliced,
    /// That many successive layers share a tensor; the last tensor may have fewer.
    Grouped(u32),
}

/// Whether keys and values share a tensor.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum KvOrder {
    /// Keys in one tensor, values in another.
    #[default]
    Apart,
    /// A token's values of a layer follow its keys of that layer, in one tensor.
    Interleaved,
}

/// How a model's layers, keys and values become tensors.
///
/// As text: `per-layer`, `sliced` (the default) or `grouped:N`, and `-interleaved` after it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct LayoutChoice {
    /// How many layers share a tensor.
    pub kind: LayoutKind,
    /// Whether keys and values share one.
    pub order: KvOrder,
}

impl From<LayoutKind> for LayoutChoice {
    fn from(kind: LayoutKind) -> Self {
        Self { kind, order: KvOrder::default() }
    }
}

impl fmt::Display for LayoutChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            LayoutKind::PerLayer => f.write_str("per-layer")?,
            LayoutKind::Sliced => f.write_str("sliced")?,
            LayoutKind::Grouped(layers) => write!(f, "grouped:{layers}")?,
        }
        match self.order {
            KvOrder::Apart => Ok(()),
            KvOrder::Interleaved => f.write_str("-interleaved"),
        }
    }
}

impl FromStr for LayoutChoice {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (kind, order) = match text.strip_suffix("-interleaved") {
            Some(kind) => (kind, KvOrder::Interleaved),
            None => (text, KvOrder::Apart),
        };
        let kind = match kind {
            "per-layer" => Some(LayoutKind::PerLayer),
            "sliced" => Some(LayoutKind::Sliced),
            _ => kind
                .strip_prefix("grouped:")
                .and_then(|layers| layers.parse().ok())
                .filter(|&layers| layers > 0)
                .map(LayoutKind::Grouped),
        };
        kind.map(|kind| Self { kind, order }).ok_or_else(|| {
            invalid(format!(
                "\"{text}\" is no layout; use per-layer, sliced or grouped:N with N layers a tensor from 1, \
                 and -interleaved after it where K and V share a tensor"
            ))
        })
    }
}

/// When physical memory is allocated.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum Commit {
    /// When a step needs it.
    #[default]
    OnDemand,
    /// All of the budget when the cache is made, in a mix of classes that suits the layout: a part in
    /// the size in which sequences grow, the rest in all larger ones alike.
    Whole,
    /// So many extents of each class when the cache is made, the rest when a step needs it.
    UpFront(Vec<(SizeClass, u64)>),
}

/// Who does the work that need not be done on the path of a request: mapping ahead of growth, keeping
/// extents at hand, unmapping what was given up.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Background {
    /// A thread of the cache's own, the mapper: asleep while there is nothing to do, joined on drop.
    #[default]
    Thread,
    /// Whoever calls [`KvCache::tend`](crate::KvCache::tend): a server with threads of its own, or a
    /// simulation that has to come out the same in every run.
    Caller,
    /// Nobody: every call does all of its work before it returns, and waits for the fences of what it
    /// unmaps. Nothing is mapped ahead or kept at hand.
    Off,
}

/// When the memory of a retired slot, and the tail of a truncated one, is unmapped.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Reclaim {
    /// When somebody else needs it: until then a new request may adopt it, which costs no driver call.
    #[default]
    Deferred,
    /// As soon as its fences have fired.
    Eager,
}

/// All options of a cache, validated as far as that needs no driver.
///
/// ```
/// use vattn::geometry::{Config, Geometry};
/// use vattn::units::{Bytes, TokenCount};
///
/// let config = Config::builder(Geometry::preset("llama-3-8b")?)
///     .max_slots(256)
///     .max_tokens(TokenCount::new(1_000_000))
///     .budget(Bytes::gib(64))
///     .build()?;
/// assert_eq!(config.slots(), 256);
/// # Ok::<(), vattn::Error>(())
/// ```
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Config {
    geometry: Geometry,
    layout: LayoutChoice,
    max_slots: u32,
    max_tokens: TokenCount,
    page_tokens: u32,
    tile_tokens: u32,
    budget: Option<Bytes>,
    commit: Commit,
    spare_slot: bool,
    slack_divisor: u32,
    background: Background,
    reclaim: Reclaim,
    look_ahead: TokenCount,
    look_ahead_budget: Option<Bytes>,
    at_hand: Option<Bytes>,
}

impl Config {
    /// The most slots, beyond any batch: room for the slot table itself must be out of question.
    pub const MAX_SLOTS: u32 = 1 << 20;

    /// Options for that model, all at their defaults.
    pub fn builder(geometry: Geometry) -> ConfigBuilder {
        ConfigBuilder {
            config: Self {
                geometry,
                layout: LayoutChoice::default(),
                max_slots: 1024,
                max_tokens: TokenCount::new(131_072),
                page_tokens: 16,
                tile_tokens: 1,
                budget: None,
                commit: Commit::default(),
                spare_slot: false,
                slack_divisor: 32,
                background: Background::default(),
                reclaim: Reclaim::default(),
                look_ahead: TokenCount::new(32),
                look_ahead_budget: None,
                at_hand: None,
            },
        }
    }

    /// The same options as a builder, to change some.
    pub fn to_builder(&self) -> ConfigBuilder {
        ConfigBuilder { config: self.clone() }
    }

    /// What the model keeps for each token.
    #[must_use]
    pub const fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// How layers, keys and values become tensors.
    #[must_use]
    pub const fn layout(&self) -> LayoutChoice {
        self.layout
    }

    /// How many requests can have a slot at a time.
    #[must_use]
    pub const fn max_slots(&self) -> u32 {
        self.max_slots
    }

    /// The first dimension of every tensor: the requests' slots and the spare one.
    #[must_use]
    pub const fn slots(&self) -> u32 {
        if self.spare_slot { self.max_slots + 1 } else { self.max_slots }
    }

    /// The index of the slot that is always backed, the last one, if there is one.
    #[must_use]
    pub const fn spare_index(&self) -> Option<u32> {
        if self.spare_slot { Some(self.max_slots) } else { None }
    }

    /// The most tokens that a slot can hold.
    #[must_use]
    pub const fn max_tokens(&self) -> TokenCount {
        self.max_tokens
    }

    /// Tokens of a page, where the tensors are read as pages.
    #[must_use]
    pub const fn page_tokens(&self) -> u32 {
        self.page_tokens
    }

    /// What the tokens that a step backs are rounded up to a multiple of.
    #[must_use]
    pub const fn tile_tokens(&self) -> u32 {
        self.tile_tokens
    }

    /// The most physical memory the cache may hold; `None` is what the driver says is free.
    #[must_use]
    pub const fn budget(&self) -> Option<Bytes> {
        self.budget
    }

    /// When physical memory is allocated.
    #[must_use]
    pub const fn commit(&self) -> &Commit {
        &self.commit
    }

    /// Whether there is one more slot, always backed.
    #[must_use]
    pub const fn spare_slot(&self) -> bool {
        self.spare_slot
    }

    /// A plan may round a need up by at most the need divided by this.
    #[must_use]
    pub const fn slack_divisor(&self) -> u32 {
        self.slack_divisor
    }

    /// Who does the work that need not be done on the path of a request.
    #[must_use]
    pub const fn background(&self) -> Background {
        self.background
    }

    /// When the memory that requests gave up is unmapped.
    #[must_use]
    pub const fn reclaim(&self) -> Reclaim {
        self.reclaim
    }

    /// With how many tokens to go the memory for a slot's growth is mapped.
    #[must_use]
    pub const fn look_ahead(&self) -> TokenCount {
        self.look_ahead
    }

    /// How much may be mapped ahead at a time, for all slots together; `None` is an eighth of the
    /// budget.
    #[must_use]
    pub const fn look_ahead_budget(&self) -> Option<Bytes> {
        self.look_ahead_budget
    }

    /// How much may be kept created and mapped nowhere; `None` is a sixty-fourth of the budget.
    #[must_use]
    pub const fn at_hand(&self) -> Option<Bytes> {
        self.at_hand
    }
}

/// Builds a [`Config`]. Every method replaces one option; [`build`](Self::build) checks them all.
#[derive(Clone, Debug)]
#[must_use = "nothing is checked or made before build"]
pub struct ConfigBuilder {
    config: Config,
}

impl ConfigBuilder {
    /// How layers, keys and values become tensors: a [`LayoutChoice`], or a [`LayoutKind`] with keys
    /// and values apart. Default: all layers in one tensor, K and V apart.
    pub fn layout(mut self, layout: impl Into<LayoutChoice>) -> Self {
        self.config.layout = layout.into();
        self
    }

    /// How many requests can have a slot at a time. Default 1,024.
    pub const fn max_slots(mut self, slots: u32) -> Self {
        self.config.max_slots = slots;
        self
    }

    /// The most tokens that a slot can hold. Costs addresses only. Default 131,072.
    pub const fn max_tokens(mut self, tokens: TokenCount) -> Self {
        self.config.max_tokens = tokens;
        self
    }

    /// Tokens of a page, for kernels that read the tensors as pages. Default 16.
    pub const fn page_tokens(mut self, tokens: u32) -> Self {
        self.config.page_tokens = tokens;
        self
    }

    /// What a step rounds the tokens it backs up to a multiple of, for kernels that load whole tiles
    /// past a sequence's length. Clipped at the slot's end. Default 1: exactly the tokens.
    pub const fn tile_tokens(mut self, tokens: u32) -> Self {
        self.config.tile_tokens = tokens;
        self
    }

    /// The most physical memory the cache may hold. Default: what the driver says is free.
    pub const fn budget(mut self, budget: Bytes) -> Self {
        self.config.budget = Some(budget);
        self
    }

    /// When physical memory is allocated. Default: on demand.
    pub fn commit(mut self, commit: Commit) -> Self {
        self.config.commit = commit;
        self
    }

    /// Whether there is one more slot behind the requests' own, always backed: padded entries of a
    /// batch write there. Default: no.
    pub const fn spare_slot(mut self, spare: bool) -> Self {
        self.config.spare_slot = spare;
        self
    }

    /// A plan may round a need up by at most the need divided by this. Default 32.
    pub const fn slack_divisor(mut self, divisor: u32) -> Self {
        self.config.slack_divisor = divisor;
        self
    }

    /// Who does the work that need not be done on the path of a request. Default: a thread of the
    /// cache's own.
    pub const fn background(mut self, background: Background) -> Self {
        self.config.background = background;
        self
    }

    /// When the memory that requests gave up is unmapped. Default: when somebody else needs it.
    pub const fn reclaim(mut self, reclaim: Reclaim) -> Self {
        self.config.reclaim = reclaim;
        self
    }

    /// With how many tokens to go the memory for a slot's growth is mapped; slots begin at different
    /// points between this and half of it, so that those that grow in step don't ask at once. 0 turns
    /// it off. Default 32.
    pub const fn look_ahead(mut self, tokens: TokenCount) -> Self {
        self.config.look_ahead = tokens;
        self
    }

    /// How much may be mapped ahead at a time, for all slots together. It counts as parked: whoever
    /// needs it may take it, so it never stands in the way of a step or of an admission. Default: an
    /// eighth of the budget.
    pub const fn look_ahead_budget(mut self, bytes: Bytes) -> Self {
        self.config.look_ahead_budget = Some(bytes);
        self
    }

    /// How much may be kept created and mapped nowhere, ready for the next step. Only sizes of extents that
    /// steps have lacked before are kept, and none after a trim: a cache that nobody uses holds nothing
    /// back. Default: a sixty-fourth of the budget. 0 turns it off.
    pub const fn at_hand(mut self, bytes: Bytes) -> Self {
        self.config.at_hand = Some(bytes);
        self
    }

    /// The options, if they can be used.
    ///
    /// # Errors
    /// [`InvalidConfig`](ErrorKind::InvalidConfig): a zero, more than [`Config::MAX_SLOTS`] slots, or
    /// slots × tokens × bytes a token past 2^64.
    pub fn build(self) -> Result<Config> {
        let config = self.config;
        let floors = [
            ("max_slots", u64::from(config.max_slots), "the number of requests served at a time"),
            ("max_tokens", config.max_tokens.get(), "the model's longest context"),
            ("page_tokens", u64::from(config.page_tokens), "16"),
            ("tile_tokens", u64::from(config.tile_tokens), "1 where kernels keep to the lengths"),
            ("slack_divisor", u64::from(config.slack_divisor), "32, or a large number for no slack"),
            (
                "budget",
                config.budget.map_or(1, Bytes::get),
                "no number of your own for what the driver says is free",
            ),
        ];
        if let Some((name, _, cure)) = floors.into_iter().find(|&(_, value, _)| value == 0) {
            return Err(invalid(format!("{name} is 0; at least 1 is needed: use {cure}")));
        }
        if config.layout.kind == LayoutKind::Grouped(0) {
            return Err(invalid(
                "a layout of 0 layers a tensor holds nothing; at least 1 is needed: use 1, or a layout per layer",
            ));
        }
        if config.max_slots > Config::MAX_SLOTS {
            return Err(invalid(format!(
                "max_slots is {}, more than the limit of {}: use fewer slots",
                config.max_slots,
                Config::MAX_SLOTS
            )));
        }
        let token = config.geometry.bytes_per_token();
        let slots = u64::from(config.slots());
        if token.checked_mul(config.max_tokens.get()).and_then(|slot| slot.checked_mul(slots)).is_none() {
            return Err(invalid(format!(
                "{slots} slots of {} tokens of {token} need 2^64 addresses or more: use a smaller max_slots or \
                 max_tokens",
                config.max_tokens
            )));
        }
        if let Commit::UpFront(extents) = &config.commit {
            let granules = extents.iter().try_fold(0_u64, |sum, (class, count)| {
                class.granules().get().checked_mul(*count).and_then(|granules| sum.checked_add(granules))
            });
            match granules {
                Some(0) => {
                    return Err(invalid(
                        "0 extents are committed up front; at least 1 is needed: commit on demand",
                    ));
                }
                Some(_) => {}
                None => {
                    return Err(invalid(
                        "the extents to commit up front have 2^64 granules or more: commit at most the budget",
                    ));
                }
            }
        }
        Ok(config)
    }
}

#[cold]
fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidConfig, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn builder() -> ConfigBuilder {
        Config::builder(Geometry::preset("llama-3-8b").unwrap())
    }

    #[test]
    fn layouts_read_back_as_they_are_written() {
        for text in [
            "per-layer",
            "sliced",
            "grouped:8",
            "per-layer-interleaved",
            "sliced-interleaved",
            "grouped:8-interleaved",
        ] {
            assert_eq!(text.parse::<LayoutChoice>().unwrap().to_string(), text);
        }
        assert_eq!("sliced".parse::<LayoutChoice>().unwrap(), LayoutChoice::default());
        assert_eq!(LayoutChoice::from(LayoutKind::PerLayer), "per-layer".parse().unwrap());
        for text in
            ["", "grouped", "grouped:", "grouped:0", "grouped:-1", "slices", "interleaved", "-interleaved"]
        {
            let error = text.parse::<LayoutChoice>().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidConfig);
            assert!(error.to_string().contains("grouped:N"), "{error}");
        }
    }

    #[test]
    fn the_defaults_are_those_documented() {
        let config = builder().build().unwrap();
        assert_eq!((config.max_slots(), config.slots(), config.spare_index()), (1024, 1024, None));
        assert_eq!(config.max_tokens(), TokenCount::new(131_072));
        assert_eq!((config.page_tokens(), config.tile_tokens(), config.slack_divisor()), (16, 1, 32));
        assert_eq!((config.budget(), config.commit()), (None, &Commit::OnDemand));
        assert_eq!(config.layout(), LayoutChoice { kind: LayoutKind::Sliced, order: KvOrder::Apart });
        assert_eq!((config.background(), config.reclaim()), (Background::Thread, Reclaim::Deferred));
        assert_eq!((config.look_ahead(), config.look_ahead_budget()), (TokenCount::new(32), None));
        assert_eq!(config.at_hand(), None);
        let spare = config.to_builder().spare_slot(true).build().unwrap();
        assert_eq!((spare.slots(), spare.spare_index()), (1025, Some(1024)));
    }

    #[test]
    fn what_cannot_be_used_is_refused_by_name() {
        let class = SizeClass::LARGEST;
        for (builder, word) in [
            (builder().max_slots(0), "max_slots"),
            (builder().max_slots(u32::MAX).spare_slot(true), "max_slots"),
            (builder().max_tokens(TokenCount::ZERO), "max_tokens"),
            (builder().max_tokens(TokenCount::new(u64::MAX)), "18446744073709551615 tokens"),
            (builder().page_tokens(0), "page_tokens"),
            (builder().tile_tokens(0), "tile_tokens"),
            (builder().slack_divisor(0), "slack_divisor"),
            (builder().budget(Bytes::ZERO), "budget"),
            (builder().layout(LayoutKind::Grouped(0)), "per layer"),
            (builder().commit(Commit::UpFront(Vec::new())), "0 extents"),
            (builder().commit(Commit::UpFront(vec![(class, u64::MAX)])), "2^64 granules"),
        ] {
            let error = builder.build().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidConfig, "{error}");
            assert!(error.to_string().contains(word), "{error} does not name {word}");
        }
    }
}
