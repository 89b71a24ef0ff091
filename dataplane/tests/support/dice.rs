//! Numbers by seed, and bytes that both ends of a call can make for themselves.

/// A seeded sequence of numbers (splitmix64).
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }
}

/// Bytes that say which call they belong to.
pub(crate) fn content(call: u64, bytes: usize) -> Vec<u8> {
    let mut dice = Dice(call);
    let mut content = vec![0; bytes];
    for chunk in content.chunks_mut(8) {
        let word = dice.below(u64::MAX).to_le_bytes();
        chunk.copy_from_slice(&word[..chunk.len()]);
    }
    content
}
