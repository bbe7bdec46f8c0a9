//! Does an operator who listens to `tracing` hear of what matters?

#![allow(clippy::unwrap_used, reason = "a test may panic, in its helpers too")]

use std::io::Write;
use std::sync::{Arc, Mutex};

use vattn::driver::checked::{Checked, CheckedOptions};
use vattn::driver::ledger::{Ledger, LedgerOptions};
use vattn::error::Verb;
use vattn::geometry::{Background, Dtype};
use vattn::{Bytes, Config, ErrorKind, Fence, Geometry, KvCache, SlotTokens, TokenCount};

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Log {
    /// What has been said since the last time.
    fn take(&self) -> String {
        String::from_utf8(std::mem::take(&mut self.0.lock().unwrap())).unwrap()
    }
}

#[test]
fn an_operator_is_told() {
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_ansi(false)
        .with_max_level(tracing::Level::DEBUG)
        .with_writer(move || writer.clone())
        .finish();
    tracing::subscriber::with_default(subscriber, || {
        let options = LedgerOptions { granule: Bytes::new(4096), capacity: Bytes::mib(4), addresses: None };
        let driver = Checked::new(Ledger::new(options).unwrap(), CheckedOptions::TEST);
        let geometry = Geometry::uniform(2, 2, 64, Dtype::BF16).unwrap();
        let config = Config::builder(geometry)
            .max_slots(4)
            .max_tokens(TokenCount::new(1000))
            .background(Background::Off);
        let cache = KvCache::new(config.budget(Bytes::mib(1)).build().unwrap(), driver.clone()).unwrap();
        let told = log.take();
        assert!(
            told.contains("INFO") && told.contains("a KV cache is ready") && told.contains("1 MiB"),
            "{told}"
        );

        let slot = cache.acquire(TokenCount::new(100), None).unwrap();
        let step = |tokens| cache.step(&[SlotTokens::new(slot, TokenCount::new(tokens))]);
        driver.fail_call_of(Verb::SetAccess, 1, ErrorKind::Driver);
        driver.fail_call_of(Verb::Unmap, 1, ErrorKind::Driver);
        step(100).unwrap_err();
        let told = log.take();
        assert!(told.contains("WARN") && told.contains("extents are quarantined"), "{told}");

        driver.clear_faults();
        driver.fail_call_of(Verb::Create, 1, ErrorKind::OutOfDeviceMemory);
        step(100).unwrap();
        let told = log.take();
        assert!(told.contains("the device has less memory than the budget"), "{told}");

        cache.retire(slot, &[Fence::Idle]).unwrap();
        cache.trim(Bytes::ZERO, &[Fence::Idle]).unwrap();
        let told = log.take();
        assert!(
            told.contains("parked extents were taken") && told.contains("memory was given back"),
            "{told}"
        );

        driver.lose_device_at(1);
        let other = cache.acquire(TokenCount::new(1), None).unwrap();
        cache.step(&[SlotTokens::new(other, TokenCount::new(100))]).unwrap_err();
        let told = log.take();
        assert!(told.contains("ERROR") && told.contains("the device is gone"), "{told}");
    });
}
