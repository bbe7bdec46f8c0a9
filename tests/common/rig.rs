//! A cache with a mapper on a driver that is watched, and what lets everybody go when a test fails.

use std::sync::Arc;

use vattn::driver::Stream;
use vattn::error::Verb;
use vattn::geometry::{Background, ConfigBuilder};
use vattn::{Bytes, KvCache, SlotId};

use super::gate::{Deadline, Gate};
use super::{Shape, Watch, contents, shapes, step, stream, tokens};

const ONE: Stream = stream(1);

/// Slots of two tensors in which a granule holds 8 tokens; the mapper is a thread, and looks far ahead.
pub(crate) struct Rig {
    // First, so that a test that fails lets everybody go.
    pub(crate) lets_go: LetsGo,
    pub(crate) cache: KvCache,
    pub(crate) watch: Watch,
    pub(crate) _deadline: Deadline,
}

/// Slots of two tensors in which a granule holds 8 tokens; what is done in the background is done by `tend`.
pub(crate) fn shape() -> Shape {
    Shape { budget: 400, background: Background::Caller, ..shapes::sliced() }
}

/// A cache that keeps nothing at hand, with what else a test changes.
pub(crate) fn cache_of(
    shape: &Shape,
    change: impl FnOnce(ConfigBuilder) -> ConfigBuilder,
) -> (Watch, KvCache) {
    let watch = shape.watch();
    let builder = shape.config().to_builder().at_hand(Bytes::ZERO);
    let cache = KvCache::new(change(builder).build().unwrap(), watch.driver()).unwrap();
    (watch, cache)
}

/// Fires every stream and opens the gate when it is dropped.
pub(crate) struct LetsGo {
    watch: Watch,
    gate: Option<Arc<Gate>>,
}

impl Drop for LetsGo {
    fn drop(&mut self) {
        self.watch.fire_all();
        if let Some(gate) = &self.gate {
            gate.open();
        }
    }
}

impl Rig {
    pub(crate) fn new(change: impl FnOnce(ConfigBuilder) -> ConfigBuilder) -> Self {
        let deadline = Deadline::new();
        let shape = Shape { background: Background::Thread, ..shape() };
        let (watch, cache) = cache_of(&shape, |builder| {
            change(builder.look_ahead(tokens(64)).look_ahead_budget(shape.granule * 200))
        });
        let lets_go = LetsGo { watch: watch.clone(), gate: None };
        Self { lets_go, cache, watch, _deadline: deadline }
    }

    /// Holds the mapper before its next call of that verb.
    pub(crate) fn gate(&mut self, verb: Verb) -> Arc<Gate> {
        Arc::clone(self.lets_go.gate.insert(Gate::before_mapper(&self.watch, verb)))
    }
}

/// A request of so many tokens, with a pattern of its own in them.
pub(crate) fn request(cache: &KvCache, count: u64, owner: u64) -> SlotId {
    let slot = cache.acquire(tokens(count), Some(ONE)).unwrap();
    step(cache, slot, count).unwrap();
    contents::fill(cache, slot, owner, 0..count);
    slot
}
