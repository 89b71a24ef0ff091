//! Maps keyed by numbers that we hand out ourselves. Nobody can choose colliding ones, so they need no SipHash, which
//! costs 20 ns a look and more when the caches are cold, a few times a call.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// A map whose keys this program counts up.
pub(crate) type NumberMap<V> = HashMap<u64, V, BuildHasherDefault<Spread>>;

/// One multiplication by the golden ratio (Knuth, vol. 3, 6.4): neighbours land far apart, in the low bits and the high.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Spread(u64);

impl Hasher for Spread {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u64(&mut self, number: u64) {
        let product = u128::from(self.0 ^ number) * 0x9e37_79b9_7f4a_7c15;
        #[expect(clippy::cast_possible_truncation, reason = "both halves are folded into one")]
        let folded = (product >> 64) as u64 ^ product as u64;
        self.0 = folded;
    }
}
