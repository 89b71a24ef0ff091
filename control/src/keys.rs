//! Making keys and credentials: files with mode 0600, never overwritten, never printed.

use std::path::Path;
use std::str::FromStr;

use praas_dataplane::clock::unix_s;
use praas_dataplane::{Credential, Role, Secret, SecretError};

/// How long a credential is good, from now on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lifetime {
    seconds: u64,
}

/// Longest lifetime, 100 years: beyond is a typing error.
const SECONDS_MAX: u64 = 100 * 365 * 86_400;

impl FromStr for Lifetime {
    type Err = String;
    fn from_str(text: &str) -> Result<Lifetime, String> {
        let units = [('s', 1), ('m', 60), ('h', 3600), ('d', 86_400)];
        let parsed = units.iter().find_map(|(unit, seconds)| {
            let digits = text.strip_suffix(*unit).filter(|digits| digits.bytes().all(|byte| byte.is_ascii_digit()))?;
            digits.parse::<u64>().ok()?.checked_mul(*seconds)
        });
        let bad = || format!("`{text}` is not a time: use a number and s, m, h or d, such as 30d, up to 36500d");
        parsed.filter(|seconds| (1..=SECONDS_MAX).contains(seconds)).map(|seconds| Lifetime { seconds }).ok_or_else(bad)
    }
}

/// Writes a new random key to a file that must not exist.
///
/// # Errors
/// [`SecretError`].
pub fn new_key(file: &Path) -> Result<(), SecretError> {
    Secret::random()?.write_new(file)
}

/// Writes a credential made from the key in `key_file` to a file that must not exist.
///
/// # Errors
/// [`SecretError`].
pub fn new_token(
    key_file: &Path,
    role: Role,
    subject: &str,
    lifetime: Lifetime,
    out: &Path,
) -> Result<(), SecretError> {
    let key = Secret::from_file(key_file)?;
    Credential::mint(&key, role, subject, unix_s() + lifetime.seconds)?.write_new(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lifetime_is_a_number_and_a_unit() {
        for (text, seconds) in [("1s", 1), ("5m", 300), ("2h", 7200), ("30d", 2_592_000), ("36500d", SECONDS_MAX)] {
            assert_eq!(text.parse(), Ok(Lifetime { seconds }));
        }
        for text in ["", "d", "30", "0d", "-1d", "+1d", "1.5h", "36501d", "99999999999999999999d", "1w", "1 d"] {
            assert!(text.parse::<Lifetime>().is_err(), "{text}");
        }
    }
}
