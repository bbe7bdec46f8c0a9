//! Sizes as people write them: `64GiB`, `512MiB`, plain bytes.

use vattn::units::Bytes;

/// Reads a size. Decimal units are refused, because half of those who write `GB` mean `GiB`.
pub(crate) fn parse(text: &str) -> Result<Bytes, String> {
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (digits, unit) = text.split_at(split);
    let expected = || format!("'{text}' is not a size; write 64GiB, 512MiB or a number of bytes");
    let shift = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "kib" => 10,
        "mib" => 20,
        "gib" => 30,
        "tib" => 40,
        _ => return Err(expected()),
    };
    let count: u64 = digits.parse().map_err(|_| expected())?;
    count.checked_mul(1 << shift).map(Bytes::new).ok_or_else(|| format!("'{text}' is more than 2^64 bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_as_written() {
        for (text, bytes) in [
            ("0", Bytes::ZERO),
            ("17", Bytes::new(17)),
            ("512MiB", Bytes::mib(512)),
            ("64GiB", Bytes::gib(64)),
            ("64 gib", Bytes::gib(64)),
            ("2KiB", Bytes::new(2048)),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
        for text in ["", "GiB", "64GB", "-1", "1.5GiB", "99999999TiB", "64GiBs"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
