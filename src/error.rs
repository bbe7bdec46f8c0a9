//! One error for the whole crate: what went wrong, with which numbers, and what cures it.
//!
//! Callers branch on [`Error::kind`] and show the text to people. A driver's refusal keeps its
//! verb, its code and the size it was asked for ([`Error::driver`]); the cause chain is
//! [`std::error::Error::source`]. This module knows no other room but [`units`](crate::units).

use std::fmt;

use serde::Serialize;

use crate::units::Bytes;

/// What every fallible function of this crate returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, and what to do about it.
///
/// Cheap to move (one pointer), dear to make: none is made on a path that succeeds.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct Error(Box<Inner>);

#[derive(Debug, thiserror::Error)]
#[error("{message}")]
struct Inner {
    kind: ErrorKind,
    message: String,
    driver: Option<DriverFailure>,
    #[source]
    cause: Option<Error>,
}

/// What an engine may branch on.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ErrorKind {
    /// A model's dimensions, or a file that describes them, can't be used as they are.
    InvalidGeometry,
    /// An option of the cache can't be used as it is.
    InvalidConfig,
    /// An argument of a call can't be used as it is.
    InvalidArgument,
    /// The budget is used up by slots that are in use. Retire or truncate some, or raise the budget.
    OutOfBudget,
    /// The device has no memory left. Retiring does not help if another program holds it.
    OutOfDeviceMemory,
    /// The operating system allows no further mapping (host backend: `vm.max_map_count`).
    OutOfMappings,
    /// Not so many addresses can be reserved. Use fewer slots, fewer tokens a slot or a smaller buffer.
    OutOfAddressSpace,
    /// Every slot is in use. Retire one, or create the cache with more.
    NoFreeSlot,
    /// The slot's request has been retired; the id is of the past.
    StaleSlot,
    /// The slot is another cache's.
    ForeignSlot,
    /// Another thread is working on the slot.
    SlotBusy,
    /// One step names a slot twice.
    DuplicateSlot,
    /// More tokens than a slot can hold.
    TooManyTokens,
    /// Fewer tokens than the slot holds. `truncate` is the call for that.
    FewerTokens,
    /// A fence was asked of a stream that is being captured into a graph.
    CapturingStream,
    /// The driver refused for a reason of its own: see [`Error::driver`].
    Driver,
    /// The device or its context is gone. Nothing on it can be used again.
    DeviceLost,
    /// This cache does not work any more, or not in this state of health.
    Unhealthy,
    /// This machine, device or build can't do that.
    Unsupported,
    /// A defect of this library; please report it.
    Internal,
}

impl ErrorKind {
    /// Every kind, in the order of their numbers in the statistics.
    pub const ALL: [Self; 20] = [
        Self::InvalidGeometry,
        Self::InvalidConfig,
        Self::InvalidArgument,
        Self::OutOfBudget,
        Self::OutOfDeviceMemory,
        Self::OutOfMappings,
        Self::OutOfAddressSpace,
        Self::NoFreeSlot,
        Self::StaleSlot,
        Self::ForeignSlot,
        Self::SlotBusy,
        Self::DuplicateSlot,
        Self::TooManyTokens,
        Self::FewerTokens,
        Self::CapturingStream,
        Self::Driver,
        Self::DeviceLost,
        Self::Unhealthy,
        Self::Unsupported,
        Self::Internal,
    ];

    /// The kind as one word in `snake_case`, as the statistics name it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::InvalidGeometry => "invalid_geometry",
            Self::InvalidConfig => "invalid_config",
            Self::InvalidArgument => "invalid_argument",
            Self::OutOfBudget => "out_of_budget",
            Self::OutOfDeviceMemory => "out_of_device_memory",
            Self::OutOfMappings => "out_of_mappings",
            Self::OutOfAddressSpace => "out_of_address_space",
            Self::NoFreeSlot => "no_free_slot",
            Self::StaleSlot => "stale_slot",
            Self::ForeignSlot => "foreign_slot",
            Self::SlotBusy => "slot_busy",
            Self::DuplicateSlot => "duplicate_slot",
            Self::TooManyTokens => "too_many_tokens",
            Self::FewerTokens => "fewer_tokens",
            Self::CapturingStream => "capturing_stream",
            Self::Driver => "driver",
            Self::DeviceLost => "device_lost",
            Self::Unhealthy => "unhealthy",
            Self::Unsupported => "unsupported",
            Self::Internal => "internal",
        }
    }
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The calls of a driver, under CUDA's names.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verb {
    /// `cuMemAddressReserve`
    Reserve,
    /// `cuMemCreate`
    Create,
    /// `cuMemMap`
    Map,
    /// `cuMemSetAccess`
    SetAccess,
    /// `cuMemUnmap`
    Unmap,
    /// `cuMemRelease`
    Release,
    /// `cuMemAddressFree`
    Free,
    /// `cuMemGetInfo`
    MemoryInfo,
    /// `cuEventRecord`, with the creation of the event
    RecordEvent,
    /// `cuStreamWaitEvent` and `cuEventRecord` on a stream of the library's own
    FollowEvent,
    /// `cuEventQuery`
    QueryEvent,
    /// `cuEventSynchronize`
    WaitEvent,
    /// `cuEventDestroy`
    DestroyEvent,
    /// `cuStreamWaitEvent`
    StreamWait,
}

impl Verb {
    /// Every verb, in the order of their numbers in the statistics.
    pub const ALL: [Self; 14] = [
        Self::Reserve,
        Self::Create,
        Self::Map,
        Self::SetAccess,
        Self::Unmap,
        Self::Release,
        Self::Free,
        Self::MemoryInfo,
        Self::RecordEvent,
        Self::FollowEvent,
        Self::QueryEvent,
        Self::WaitEvent,
        Self::DestroyEvent,
        Self::StreamWait,
    ];

    /// The verb as one word in `snake_case`, as the statistics name it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Reserve => "reserve",
            Self::Create => "create",
            Self::Map => "map",
            Self::SetAccess => "set_access",
            Self::Unmap => "unmap",
            Self::Release => "release",
            Self::Free => "free",
            Self::MemoryInfo => "memory_info",
            Self::RecordEvent => "record_event",
            Self::FollowEvent => "follow_event",
            Self::QueryEvent => "query_event",
            Self::WaitEvent => "wait_event",
            Self::DestroyEvent => "destroy_event",
            Self::StreamWait => "stream_wait",
        }
    }
}

impl fmt::Display for Verb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What the driver was asked and what it answered.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DriverFailure {
    /// The call.
    pub verb: Verb,
    /// The driver's own number: a `CUresult`, or an `errno` on the host.
    pub code: i64,
    /// The number's name, such as `CUDA_ERROR_OUT_OF_MEMORY` or `ENOMEM`.
    pub name: &'static str,
    /// The size the call was about, where it has one.
    pub size: Option<Bytes>,
}

impl Error {
    /// An error of that kind. The message names the value, the limit and the cure.
    #[cold]
    #[must_use]
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self(Box::new(Inner { kind, message: message.into(), driver: None, cause: None }))
    }

    /// The driver's refusal of a call, of the kind that its code stands for.
    #[cold]
    #[must_use]
    pub fn from_driver(kind: ErrorKind, failure: DriverFailure, cure: &str) -> Self {
        let size = failure.size.map(|size| format!(" of {size}")).unwrap_or_default();
        let message =
            format!("driver call {}{size} failed: {} ({}); {cure}", failure.verb, failure.name, failure.code);
        Self(Box::new(Inner { kind, message, driver: Some(failure), cause: None }))
    }

    /// The same error, with what led to it.
    #[cold]
    #[must_use]
    pub fn caused_by(mut self, cause: Self) -> Self {
        self.0.cause = Some(cause);
        self
    }

    /// This error as the cause of one that says what was being done; the kind stays.
    #[cold]
    #[must_use]
    pub fn context(self, doing: impl Into<String>) -> Self {
        Self::new(self.kind(), doing).caused_by(self)
    }

    /// What an engine may branch on.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The driver's refusal at the root of this error, if there is one.
    #[must_use]
    pub fn driver(&self) -> Option<&DriverFailure> {
        self.0.driver.as_ref().or_else(|| self.0.cause.as_ref().and_then(Self::driver))
    }

    /// The message with those of its causes, on one line.
    #[must_use]
    pub fn report(&self) -> String {
        match &self.0.cause {
            Some(cause) => format!("{}: {}", self.0.message, cause.report()),
            None => self.0.message.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_failure_survives_its_contexts() {
        let failure = DriverFailure {
            verb: Verb::Create,
            code: 2,
            name: "CUDA_ERROR_OUT_OF_MEMORY",
            size: Some(Bytes::mib(2)),
        };
        let error = Error::from_driver(ErrorKind::OutOfDeviceMemory, failure.clone(), "free some")
            .context("growing slot 3 to 100 tokens");
        assert_eq!(error.kind(), ErrorKind::OutOfDeviceMemory);
        assert_eq!(error.driver(), Some(&failure));
        assert_eq!(
            error.report(),
            "growing slot 3 to 100 tokens: driver call create of 2 MiB failed: \
             CUDA_ERROR_OUT_OF_MEMORY (2); free some"
        );
        assert!(std::error::Error::source(&error).is_some());
    }

    #[test]
    fn kinds_and_verbs_are_listed_in_order() {
        assert!(ErrorKind::ALL.windows(2).all(|pair| pair[0] < pair[1]));
        assert!(Verb::ALL.windows(2).all(|pair| pair[0] < pair[1]));
        assert_eq!(std::mem::size_of::<Error>(), std::mem::size_of::<usize>());
    }
}
