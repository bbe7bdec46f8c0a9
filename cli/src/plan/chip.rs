//! Which chips there are, and what is known of each: its memory, and what a token stride costs on it.
//!
//! Every figure has its source beside it. Where nothing was measured, nothing is guessed.

use clap::ValueEnum;
use vattn::units::Bytes;

/// The most addresses that one reservation had on an H200, driver 580.159.04.
pub(crate) const RESERVATION_LIMIT: Bytes = Bytes::gib(64 << 10);
/// The most that all of a process had there.
pub(crate) const ADDRESS_LIMIT: Bytes = Bytes::gib(112 << 10);

/// A chip by its name. The memory is all that the driver shows; see `--weights`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum Chip {
    /// NVIDIA H200: 143,771 MiB
    H200,
    /// NVIDIA H100 SXM, 80 GB: 81,559 MiB
    H100,
    /// NVIDIA A100, 80 GB: 81,920 MiB
    #[value(name = "a100-80")]
    A100Large,
    /// NVIDIA A100, 40 GB: 40,960 MiB
    #[value(name = "a100-40")]
    A100Small,
    /// NVIDIA L40S, 48 GB: 46,068 MiB
    L40s,
    /// NVIDIA B200, 180 GB: 183,359 MiB
    B200,
    /// NVIDIA GB10 (DGX Spark): 122,548 MiB, shared with the CPU
    Gb10,
}

/// What is known of a chip's token stride.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Stride {
    /// It costs a few per cent at most.
    Cheap,
    /// It is known to cost much.
    Dear,
    /// Nobody measured it.
    Unknown,
}

/// How much longer decoding took at the most, in per cent, with that many pieces from one token of a
/// layer to the next. (A piece is one layer's keys or values of a token.) Ascending.
///
/// FlashAttention-3 (the wheel fa3-fwd 0.0.3) on an H200, four shapes from 128 x 1,024 to 1 x 65,536
/// tokens, 8 KV heads of 128 in bfloat16, against a tensor for each layer; 64 is 32 layers with K and V
/// interleaved. The one shape that 8 pieces did better than 4 counts for both.
const H200_DECODE: [(u64, f64); 6] = [(1, 0.0), (4, 2.5), (8, 2.5), (16, 2.7), (32, 4.3), (64, 6.3)];

/// What was measured, in words.
pub(crate) const H200_STRIDE: &str = "Measured on an H200 with FlashAttention-3, against a tensor for each \
    layer: decode took up to 2.5 % longer with 4 or 8 layers a tensor, 2.7 % with 16, 4.3 % with 32 and 6.3 % \
    with 32 and K and V interleaved; prefill of 2,048 tokens over 8,192 took 8 % longer with 4 and 10 % with 32";
/// The same of a GB10: benchmarks/bench_layout of ovg-project/kvcached.
pub(crate) const GB10_STRIDE: &str = "On a GB10 kvcached reports 31 % less throughput with 28 layers, K and V \
    in one tensor (its attention kernel took 56 % longer)";
/// The same of an H100: benchmarks/bench_layout/H100_results.md of ovg-project/kvcached.
pub(crate) const H100_STRIDE: &str = "On an H100 kvcached reports unchanged throughput (+0.3 %) with 28 layers, \
    K and V in one tensor";

impl Chip {
    /// Its memory.
    pub(crate) const fn memory(self) -> Bytes {
        match self {
            // As measured for `CostModel::H200`.
            Self::H200 => Bytes::mib(143_771),
            // The totals of nvidia-smi, as thundergolfer.com lists them in "nvidia-gpu-memory-capacity".
            Self::H100 => Bytes::mib(81_559),
            Self::A100Large => Bytes::mib(81_920),
            Self::A100Small => Bytes::mib(40_960),
            Self::L40s => Bytes::mib(46_068),
            // The total of nvidia-smi with driver 570.
            Self::B200 => Bytes::mib(183_359),
            // The system's memory, as https://github.com/leptonai/gpud/pull/1170 shows it, in whole MiB.
            Self::Gb10 => Bytes::mib(122_548),
        }
    }

    /// What is known of its token stride.
    pub(crate) const fn stride(self) -> Stride {
        match self {
            Self::H200 | Self::H100 => Stride::Cheap,
            Self::Gb10 => Stride::Dear,
            Self::A100Large | Self::A100Small | Self::L40s | Self::B200 => Stride::Unknown,
        }
    }

    /// How much longer decoding takes at the most, in per cent, with that many pieces from token to
    /// token. What was measured at the next larger number; `None` where nothing was.
    pub(crate) fn slower_decode(self, pieces: u64) -> Option<f64> {
        if pieces == 1 {
            return Some(0.0);
        }
        match self.stride() {
            Stride::Cheap => H200_DECODE.iter().find(|row| pieces <= row.0).map(|row| row.1),
            Stride::Dear | Stride::Unknown => None,
        }
    }

    /// Its name on the command line.
    pub(crate) fn name(self) -> String {
        self.to_possible_value().expect("no chip is hidden").get_name().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_measured_at_the_next_larger_stride_counts() {
        let costs = [1, 2, 4, 9, 28, 32, 64].map(|pieces| Chip::H200.slower_decode(pieces));
        assert_eq!(costs, [0.0, 2.5, 2.5, 2.7, 4.3, 4.3, 6.3].map(Some));
        assert_eq!(Chip::H200.slower_decode(65), None);
        for chip in [Chip::Gb10, Chip::L40s] {
            assert_eq!((chip.slower_decode(1), chip.slower_decode(2)), (Some(0.0), None));
        }
    }

    #[test]
    fn the_help_shows_the_memory_that_is_planned_with() {
        for chip in Chip::value_variants() {
            let value = chip.to_possible_value().unwrap();
            let mib = crate::report::count(chip.memory().get() >> 20);
            assert!(value.get_help().unwrap().to_string().contains(&format!("{mib} MiB")), "{}", chip.name());
        }
    }
}
