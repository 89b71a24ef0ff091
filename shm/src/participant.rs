//! Who takes part in a process: the controller and its workers, as small numbers.

use std::fmt;

/// How many participants a process may have: one controller and 63 workers.
///
/// A segment reserves one ring and one peer line for each, so the number is part of the layout.
pub const PARTICIPANTS_MAX: usize = 64;

/// One participant of a process. 0 is the controller, 1..=63 are workers.
#[derive(Copy, Clone, Eq, PartialEq, Ord, PartialOrd, Hash, Debug)]
pub struct ParticipantId(u8);

impl ParticipantId {
    /// The participant that owns the process: it starts workers and talks to the network.
    pub const CONTROLLER: Self = Self(0);

    /// `None` unless `number < 64`.
    #[inline]
    pub const fn new(number: u8) -> Option<Self> {
        if (number as usize) < PARTICIPANTS_MAX { Some(Self(number)) } else { None }
    }

    /// From a word a peer wrote: every bit counts, so `256` is not the controller.
    #[inline]
    pub(crate) const fn from_word(word: u64) -> Option<Self> {
        if word < PARTICIPANTS_MAX as u64 { Self::new((word & 0x3F) as u8) } else { None }
    }

    /// The number, `0..64`.
    #[inline]
    pub const fn get(self) -> u8 {
        self.0
    }

    /// The number as an index into a table of [`PARTICIPANTS_MAX`] entries.
    #[inline]
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for ParticipantId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => f.write_str("controller"),
            number => write!(f, "worker {number}"),
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn only_sixty_four_participants_exist() {
        assert_eq!(ParticipantId::new(63).map(ParticipantId::get), Some(63));
        assert_eq!(ParticipantId::new(64), None);
        assert_eq!(ParticipantId::from_word(256), None, "the high bits of a hostile word are not dropped");
        assert_eq!(ParticipantId::from_word(u64::MAX), None);
        assert_eq!(ParticipantId::CONTROLLER.to_string(), "controller");
        assert_eq!(ParticipantId::new(3).unwrap().to_string(), "worker 3");
    }
}
