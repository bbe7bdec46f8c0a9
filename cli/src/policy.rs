//! Who manages the memory: the names on the command line and what they stand for.

use clap::ValueEnum;
use vattn::driver::owned::DriverHandle;
use vattn::{Error, ErrorKind, Result};
use vattn_baselines::{Mapping, Paged, Policy, StaticSlots, Vattention};

use crate::model::Plan;

/// A policy by its name.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum PolicyKind {
    /// This project's cache: extents of many sizes, parked and adopted
    Vattn,
    /// vAttention's: one granule a mapping, all handles created up front
    Vattention,
    /// The same with the thread that maps ahead of each step
    VattentionAhead,
    /// Blocks of 16 tokens out of one preallocated pool
    Paged,
    /// Every slot at full length, as many as fit
    Static,
}

impl PolicyKind {
    /// What a table shows where nobody says which: vattn and its three baselines.
    pub(crate) const COMPARED: [Self; 4] = [Self::Vattn, Self::Vattention, Self::Paged, Self::Static];

    /// Makes the policy on a driver.
    pub(crate) fn build(self, driver: &DriverHandle, plan: &Plan) -> Result<Box<dyn Policy>> {
        let shape = &plan.shape;
        Ok(match self {
            Self::Vattn => {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    "this build has no vattn policy; use --policy",
                ));
            }
            Self::Vattention => Box::new(Vattention::new(driver, shape, Mapping::Synchronous)?),
            Self::VattentionAhead => Box::new(Vattention::new(driver, shape, Mapping::Ahead)?),
            Self::Paged => Box::new(Paged::new(driver, shape)?),
            Self::Static => Box::new(StaticSlots::new(driver, shape)?),
        })
    }
}
