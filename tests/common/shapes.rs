//! Caches of many shapes, each with the rows of its tensors worked out by hand.

use vattn::geometry::{Background, Dtype, Geometry, LayerGroup, LayerKind};
use vattn::units::Bytes;
use vattn::{Config, KvCache};

use super::{Backend, Watch, configure, kv, latent, model, on_card};

/// One kind of cache and the driver it runs on.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    pub(crate) name: &'static str,
    pub(crate) geometry: Geometry,
    pub(crate) layout: &'static str,
    /// The bytes of a token in each tensor.
    pub(crate) rows: Vec<u64>,
    pub(crate) on_host: bool,
    /// How much larger its tokens and granules are than they are written here: on a card.
    pub(crate) times: u64,
    pub(crate) granule: Bytes,
    pub(crate) slots: u32,
    pub(crate) max_tokens: u64,
    pub(crate) tile: u32,
    /// In granules.
    pub(crate) budget: u64,
    /// What the device has, in granules, where that is less than the budget may be.
    pub(crate) device_has: Option<u64>,
    pub(crate) spare: bool,
    /// Exponents and counts.
    pub(crate) up_front: Vec<(u8, u64)>,
    /// Nobody, so that calls can be counted, unless a test says otherwise.
    pub(crate) background: Background,
}

impl Shape {
    pub(crate) fn config(&self) -> Config {
        configure(self)
    }

    pub(crate) fn watch(&self) -> Watch {
        Watch::new(self.backend(), self.device_has.map(|granules| self.granule * granules))
    }

    /// What is watched: for a test that would rather nobody did.
    pub(crate) fn backend(&self) -> Backend {
        let capacity = self.granule * (self.budget * 4 + 64);
        if on_card() {
            Backend::card()
        } else if self.on_host {
            Backend::host(self.granule, capacity)
        } else {
            Backend::ledger(self.granule, capacity)
        }
    }

    /// A card's granules are given: there the model's heads grow with them, so that the shape is the
    /// same in granules.
    fn scaled(self) -> Self {
        let granule = if on_card() { Bytes::mib(2) } else { self.granule };
        let times = u32::try_from(granule.get() / self.granule.get()).unwrap();
        let groups = self.geometry.groups().iter().map(|group| LayerGroup {
            kind: match group.kind {
                LayerKind::Kv { kv_heads, key_dim, value_dim } => {
                    LayerKind::Kv { kv_heads: kv_heads * times, key_dim, value_dim }
                }
                LayerKind::Latent { dim } => LayerKind::Latent { dim: dim * times },
            },
            ..*group
        });
        Self {
            geometry: Geometry::new(groups.collect(), self.geometry.dtype()).unwrap(),
            rows: self.rows.iter().map(|row| row * u64::from(times)).collect(),
            granule,
            times: u64::from(times),
            ..self
        }
    }

    pub(crate) fn cache(&self, watch: &Watch) -> KvCache {
        KvCache::new(self.config(), watch.driver()).unwrap()
    }

    /// A tile or a page, whichever is more.
    pub(crate) fn spare_tokens(&self) -> u64 {
        u64::from(self.tile.max(16)).min(self.max_tokens)
    }

    /// The tokens that are backed for so many.
    pub(crate) fn tiled(&self, tokens: u64) -> u64 {
        (tokens.div_ceil(u64::from(self.tile)) * u64::from(self.tile)).min(self.max_tokens)
    }

    /// The granules that so many tokens lie in, in one tensor.
    pub(crate) fn granules(&self, tensor: usize, tokens: u64) -> u64 {
        (self.tiled(tokens) * self.rows[tensor]).div_ceil(self.granule.get())
    }
}

/// A shape for the host driver with granules of so many bytes.
fn host(
    granule: u64,
    name: &'static str,
    geometry: Geometry,
    layout: &'static str,
    rows: &[u64],
    max_tokens: u64,
    budget: u64,
) -> Shape {
    let shape = full_size(name, geometry, layout, rows, max_tokens, budget);
    Shape { on_host: true, granule: Bytes::new(granule), slots: 6, ..shape }.scaled()
}

/// A shape at the sizes that it has anyhow.
fn full_size(
    name: &'static str,
    geometry: Geometry,
    layout: &'static str,
    rows: &[u64],
    max_tokens: u64,
    budget: u64,
) -> Shape {
    Shape {
        name,
        geometry,
        layout,
        rows: rows.to_vec(),
        on_host: false,
        times: 1,
        granule: Bytes::mib(2),
        slots: 12,
        max_tokens,
        tile: 1,
        budget,
        device_has: None,
        spare: false,
        up_front: Vec::new(),
        background: Background::Off,
    }
}

pub(crate) fn sliced() -> Shape {
    let geometry = Geometry::uniform(4, 2, 32, Dtype::BF16).unwrap();
    host(4096, "sliced", geometry, "sliced", &[512, 512], 300, 120)
}

pub(crate) fn per_layer() -> Shape {
    let geometry = Geometry::uniform(3, 2, 32, Dtype::BF16).unwrap();
    host(4096, "per layer", geometry, "per-layer", &[128; 6], 500, 80)
}

pub(crate) fn grouped() -> Shape {
    let geometry = Geometry::uniform(5, 1, 24, Dtype::F16).unwrap();
    let shape = host(4096, "grouped", geometry, "grouped:2", &[96, 96, 96, 96, 48, 48], 700, 150);
    Shape { tile: 128, ..shape }
}

pub(crate) fn unequal() -> Shape {
    let geometry = model(vec![kv(3, 3, 24, 16)], Dtype::I8);
    let shape = host(4096, "unequal widths, interleaved", geometry, "sliced-interleaved", &[360], 600, 110);
    Shape { tile: 100, ..shape }
}

pub(crate) fn latents() -> Shape {
    host(4096, "latents", Geometry::mla(4, 72, Dtype::BF16).unwrap(), "sliced", &[576], 400, 100)
}

pub(crate) fn large_tokens() -> Shape {
    let geometry = Geometry::uniform(4, 8, 128, Dtype::F32).unwrap();
    let shape = host(4096, "tokens larger than a granule", geometry, "sliced", &[16384, 16384], 40, 420);
    Shape { spare: true, ..shape }
}

pub(crate) fn small_slots() -> Shape {
    let geometry = Geometry::uniform(1, 1, 8, Dtype::F16).unwrap();
    let shape = host(64 << 10, "slots smaller than a granule", geometry, "sliced", &[16, 16], 100, 10);
    Shape { spare: true, slots: 8, ..shape }
}

pub(crate) fn committed() -> Shape {
    let geometry = Geometry::uniform(2, 4, 64, Dtype::BF16).unwrap();
    let shape =
        host(64 << 10, "committed up front", geometry, "per-layer-interleaved", &[1024, 1024], 900, 60);
    Shape { tile: 128, spare: true, up_front: vec![(0, 4), (2, 3), (4, 1)], ..shape }
}

pub(crate) fn llama() -> Shape {
    let geometry = Geometry::preset("llama-3-8b").unwrap();
    let shape = full_size("Llama, sliced", geometry, "sliced", &[65536, 65536], 8192, 900);
    Shape { up_front: vec![(0, 16), (3, 4), (5, 2)], tile: 128, ..shape }
}

pub(crate) fn llama_per_layer() -> Shape {
    let geometry = Geometry::preset("llama-3-8b").unwrap();
    Shape { slots: 8, ..full_size("Llama, per layer", geometry, "per-layer", &[2048; 64], 4096, 700) }
}

pub(crate) fn mixed() -> Shape {
    let geometry = model(vec![kv(2, 4, 128, 64), latent(3, 576)], Dtype::BF16);
    let shape = full_size("mixed layers", geometry, "grouped:2", &[2048, 1024, 2304, 1152], 20_000, 150);
    Shape { spare: true, tile: 176, ..shape }
}

pub(crate) fn small_device() -> Shape {
    let geometry = Geometry::preset("llama-3-8b").unwrap();
    let shape =
        full_size("a device with less than the budget", geometry, "sliced", &[65536, 65536], 8192, 700);
    Shape { device_has: Some(400), ..shape }
}

/// Never a sixteenth of the device is free once the budget is held: extents are not merged.
pub(crate) fn full_device() -> Shape {
    let geometry = Geometry::preset("llama-3-8b").unwrap();
    let shape = full_size(
        "a device with hardly more than the budget",
        geometry,
        "sliced",
        &[65536, 65536],
        8192,
        700,
    );
    Shape { device_has: Some(710), ..shape }
}

pub(crate) fn all() -> Vec<Shape> {
    vec![
        sliced(),
        per_layer(),
        grouped(),
        unequal(),
        latents(),
        large_tokens(),
        small_slots(),
        committed(),
        llama(),
        llama_per_layer(),
        mixed(),
        small_device(),
        full_device(),
    ]
}
