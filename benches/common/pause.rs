//! Pauses of a card after memory was released, before creating is timed.
//!
//! Memory that was released a moment ago is at times created ten and more times more slowly than other
//! memory, whoever asks for it, most likely because the driver scrubs it first and a create waits for
//! that. A release costs some 0.5 µs a MiB; the pauses are many times that.

use std::time::{Duration, Instant};

use vattn::units::Bytes;

const A_MIB: Duration = Duration::from_micros(8);
const LONGEST: Duration = Duration::from_millis(200);

/// What a table says where there were pauses.
pub const NOTE: &str = "Between a release and the next create that is timed, ours and bare alike, the card had a \
     pause off the clock: 8 µs for each MiB released, 200 ms at the most.";

/// Waits until so much memory, just released, is as good as any.
pub fn after_release(released: Bytes) {
    awake((A_MIB * u32::try_from(released.get() >> 20).unwrap_or(u32::MAX)).min(LONGEST));
}

/// Waits. Awake, since a sleeper wakes to a slow clock and cold caches.
pub fn awake(pause: Duration) {
    let start = Instant::now();
    while start.elapsed() < pause {
        std::hint::spin_loop();
    }
}
