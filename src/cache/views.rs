//! Addresses, shapes and strides for kernels.

use serde::Serialize;

use crate::cache::core::Core;
use crate::error::{Error, ErrorKind, Result};
use crate::geometry::Dtype;
use crate::layout::{Part, View};
use crate::units::{Device, DeviceAddr};

/// A layer's keys or values as a strided array in memory, the way kernels and DLPack take it.
///
/// It says where tokens are, not that they are backed: touching what no step has asked for is fatal,
/// a segmentation fault on the host and an illegal access on a device.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[non_exhaustive]
pub struct TensorView {
    /// Where element `[0, 0, 0, 0]` is. It never changes while the cache lives.
    pub addr: DeviceAddr,
    /// Elements along each dimension.
    pub shape: [u64; 4],
    /// From one element to the next along each dimension, in elements.
    pub strides: [u64; 4],
    /// The type of the elements.
    pub dtype: Dtype,
    /// Where the memory is.
    pub device: Device,
}

impl Core {
    pub(super) fn view(&self, layer: u32, part: Part) -> Result<TensorView> {
        self.located(layer, part, self.layout.view(layer, part))
    }

    pub(super) fn paged_view(&self, layer: u32, part: Part) -> Result<TensorView> {
        self.located(layer, part, self.layout.paged_view(layer, part))
    }

    pub(super) fn token_view(&self, layer: u32, part: Part) -> Result<TensorView> {
        self.located(layer, part, self.layout.token_view(layer, part))
    }

    fn located(&self, layer: u32, part: Part, view: Option<View>) -> Result<TensorView> {
        let Some(view) = view else {
            let layers = self.layout.layers();
            let error = if layer < layers {
                format!("layer {layer} keeps a latent and has no values; its keys are the latent")
            } else {
                format!("layer {layer} has no {part}s: the model has {layers} layers, numbered from 0")
            };
            return self.noted(Err(Error::new(ErrorKind::InvalidArgument, error)));
        };
        Ok(TensorView {
            addr: self.tensors[view.tensor].addr() + view.offset,
            shape: view.shape,
            strides: view.strides,
            dtype: view.dtype,
            device: view.device,
        })
    }
}
