//! What the mapper does.
use crate::cache::SlotTokens;
use crate::cache::core::Core;
use crate::error::Result;
use crate::mapper::{Mapper, Turn};
use std::sync::Arc;

pub(super) const NAME: &str = "vattn-mapper";

impl Core {
    pub(super) fn spawn_mapper(self: &Arc<Self>) -> Result<Mapper> {
        Ok(Mapper::spawn(NAME, || Turn::Idle, |_| {}).expect("stub"))
    }
    pub(super) fn take_alert(&self) -> bool {
        false
    }
    pub(super) fn tend(&self) -> Result<bool> {
        Ok(false)
    }
    pub(super) fn flush(&self, mapper: Option<&Mapper>) -> Result<()> {
        if let Some(mapper) = mapper {
            mapper.wait_until_idle();
        }
        Ok(())
    }
    pub(super) fn prefetch(&self, _entries: &[SlotTokens]) -> Result<()> {
        Ok(())
    }
}
