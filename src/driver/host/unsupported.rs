//! The twin for systems that are not Linux: nobody can have one.

#![allow(unsafe_code, reason = "the seam's contract is an unsafe trait")]

use std::convert::Infallible;
use std::sync::Arc;

use crate::driver::books::Live;
use crate::driver::host::HostOptions;
use crate::driver::{Access, Driver, DriverInfo, MemoryInfo, RawEvent, RawHandle, Stream};
use crate::error::{Error, ErrorKind, Result};
use crate::units::{Bytes, DeviceAddr};

/// Memory of this machine, which this system can't give. See the [module](super).
#[derive(Debug)]
pub struct Host(Infallible);

#[allow(missing_docs, reason = "each is the method of the same name on Linux, documented there")]
impl Host {
    /// Says that it is Linux only.
    ///
    /// # Errors
    /// [`Unsupported`](ErrorKind::Unsupported), always.
    pub fn new(_options: HostOptions) -> Result<Arc<Self>> {
        Err(Error::new(
            ErrorKind::Unsupported,
            "the host driver is Linux only: it needs memfd_create and sparse files; use the ledger driver to \
             replay without memory",
        ))
    }

    pub fn live(&self) -> Live {
        match self.0 {}
    }

    pub fn resident(&self) -> Result<Bytes> {
        match self.0 {}
    }

    pub fn kernel_mappings(&self) -> u64 {
        match self.0 {}
    }

    pub fn hold(&self, _stream: Stream) {
        match self.0 {}
    }

    pub fn fire(&self, _stream: Stream) {
        match self.0 {}
    }

    pub fn fire_all(&self) {
        match self.0 {}
    }

    pub fn set_capturing(&self, _stream: Stream, _capturing: bool) {
        match self.0 {}
    }

    pub fn waiting(&self) -> u64 {
        match self.0 {}
    }
}

// SAFETY: no value of the type exists.
unsafe impl Driver for Host {
    fn info(&self) -> &DriverInfo {
        match self.0 {}
    }

    fn memory_info(&self) -> Result<MemoryInfo> {
        match self.0 {}
    }

    fn reserve(&self, _size: Bytes) -> Result<DeviceAddr> {
        match self.0 {}
    }

    unsafe fn free(&self, _addr: DeviceAddr, _size: Bytes) -> Result<()> {
        match self.0 {}
    }

    fn create(&self, _size: Bytes) -> Result<RawHandle> {
        match self.0 {}
    }

    unsafe fn map(&self, _addr: DeviceAddr, _size: Bytes, _handle: RawHandle) -> Result<()> {
        match self.0 {}
    }

    unsafe fn set_access(&self, _addr: DeviceAddr, _size: Bytes, _access: Access) -> Result<()> {
        match self.0 {}
    }

    unsafe fn unmap(&self, _addr: DeviceAddr, _size: Bytes) -> Result<()> {
        match self.0 {}
    }

    unsafe fn release(&self, _handle: RawHandle) -> Result<()> {
        match self.0 {}
    }

    fn record_event(&self, _stream: Stream) -> Result<RawEvent> {
        match self.0 {}
    }

    unsafe fn follow_event(&self, _event: RawEvent) -> Result<RawEvent> {
        match self.0 {}
    }

    unsafe fn query_event(&self, _event: RawEvent) -> Result<bool> {
        match self.0 {}
    }

    unsafe fn wait_event(&self, _event: RawEvent) -> Result<()> {
        match self.0 {}
    }

    unsafe fn stream_wait(&self, _stream: Stream, _event: RawEvent) -> Result<()> {
        match self.0 {}
    }

    unsafe fn destroy_event(&self, _event: RawEvent) -> Result<()> {
        match self.0 {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_systems_are_told_so() {
        let error = Host::new(HostOptions::new(Bytes::mib(2), Bytes::gib(1))).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains("Linux only"));
    }
}
