//! What the baselines are told.

use vattn::Config;
use vattn::driver::DriverInfo;
use vattn::layout::Layout;
use vattn::units::TokenCount;
use vattn_baselines::{Shape, TensorShape};

/// What a policy of the baselines learns of the same cache on that driver.
pub fn shape(config: &Config, info: &DriverInfo) -> Shape {
    let layout = Layout::new(config, info.granule, info.device).unwrap();
    let tensors = layout
        .tensors()
        .iter()
        .map(|tensor| TensorShape { row: tensor.row(), stride: tensor.slot_stride() })
        .collect();
    let budget = config.budget().unwrap();
    Shape::new(tensors, config.max_slots(), config.max_tokens(), TokenCount::new(1), budget).unwrap()
}
