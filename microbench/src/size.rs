//! Payload sizes as people write them: `10`, `1KiB`, `5MiB`.

use std::fmt;
use std::str::FromStr;

use anyhow::{Context, Result, bail};

/// A payload's length.
#[derive(Copy, Clone, Debug, Eq, PartialEq, Ord, PartialOrd)]
pub(crate) struct Size(pub(crate) usize);

/// 10 B, 64 B and the published sizes: 1 KiB, 100 KiB, 1 MiB, 5 MiB.
pub(crate) const DEFAULT: &str = "10,64,1KiB,100KiB,1MiB,5MiB";

/// The largest payload both channels carry.
pub(crate) const BYTES_MAX: usize = 64 << 20;

/// The smallest message that can carry a sequence number to check.
pub(crate) const BYTES_MIN: usize = 8;

impl FromStr for Size {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let unit = match &text[digits.len()..] {
            "" | "B" => 1,
            "K" | "k" | "KiB" => 1 << 10,
            "M" | "MiB" => 1 << 20,
            other => bail!("unknown unit {other:?}: write B, KiB or MiB"),
        };
        let number: usize =
            digits.trim().parse().with_context(|| format!("{text:?} is not a size such as 64 or 1KiB"))?;
        match number.checked_mul(unit) {
            Some(bytes) if (BYTES_MIN..=BYTES_MAX).contains(&bytes) => Ok(Self(bytes)),
            _ => bail!("{text} is outside 8 B (a sequence number to check) .. 64 MiB"),
        }
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            bytes if bytes >= 1 << 20 && bytes.is_multiple_of(1 << 20) => {
                write!(f, "{} MiB", bytes >> 20)
            }
            bytes if bytes >= 1 << 10 && bytes.is_multiple_of(1 << 10) => {
                write!(f, "{} KiB", bytes >> 10)
            }
            bytes => write!(f, "{bytes} B"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_as_written_and_write_as_read() {
        for (text, bytes, shown) in
            [("10", 10, "10 B"), ("1KiB", 1024, "1 KiB"), ("5MiB", 5 << 20, "5 MiB"), ("100k", 102_400, "100 KiB")]
        {
            let size: Size = text.parse().unwrap();
            assert_eq!((size.0, size.to_string().as_str()), (bytes, shown));
        }
    }

    #[test]
    fn a_size_that_cannot_be_checked_or_carried_is_refused() {
        for text in ["7", "0", "65MiB", "1GB", "ten", "", "99999999999999999999"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
    }
}
