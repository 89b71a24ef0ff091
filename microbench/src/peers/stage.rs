//! Where an echo server keeps a connection's messages between receiving and returning them.

/// Bytes read at a time where messages are small.
const ROOM_BYTES: usize = 64 << 10;

/// The first bytes of a connection: how long its messages are.
pub(crate) const LENGTH_BYTES: usize = 8;

/// Longest message a server takes.
const BYTES_MAX: u64 = crate::size::BYTES_MAX as u64;

/// Bytes received and not yet returned. Holds whole messages and the beginning of one.
#[derive(Debug)]
pub(crate) struct Stage {
    /// 0 until the length is known.
    message_bytes: usize,
    room: Vec<u8>,
    filled: usize,
}

/// The other side speaks no sense.
#[derive(Debug, thiserror::Error)]
#[error("a connection announced messages of {0} B; 1 to {BYTES_MAX} are served")]
pub(crate) struct WrongLength(u64);

impl From<WrongLength> for std::io::Error {
    fn from(wrong: WrongLength) -> Self {
        std::io::Error::other(wrong)
    }
}

/// How long a connection's messages are, from its first bytes, and how much room they get.
pub(crate) fn sizes(length: [u8; LENGTH_BYTES]) -> Result<(usize, usize), WrongLength> {
    let length = u64::from_le_bytes(length);
    let message_bytes = usize::try_from(length).ok().filter(|_| (1..=BYTES_MAX).contains(&length));
    let message_bytes = message_bytes.ok_or(WrongLength(length))?;
    // A whole number of messages, so that a full room can always be returned.
    Ok((message_bytes, message_bytes * (ROOM_BYTES / message_bytes).max(1)))
}

impl Stage {
    pub(crate) fn new() -> Self {
        Self { message_bytes: 0, room: vec![0; LENGTH_BYTES], filled: 0 }
    }

    /// Where to receive; not empty once what is whole was returned.
    pub(crate) fn room(&mut self) -> &mut [u8] {
        &mut self.room[self.filled..]
    }

    /// So many bytes were received in the room.
    pub(crate) fn received(&mut self, bytes: usize) -> Result<(), WrongLength> {
        self.filled += bytes;
        debug_assert!(self.filled <= self.room.len());
        if self.message_bytes == 0
            && let Some(length) = self.room[..self.filled].first_chunk::<LENGTH_BYTES>()
        {
            let (message_bytes, room_bytes) = sizes(*length)?;
            *self = Self { message_bytes, room: vec![0; room_bytes], filled: 0 };
        }
        Ok(())
    }

    /// How many bytes, from the first, are whole messages.
    pub(crate) fn whole_bytes(&self) -> usize {
        self.filled.checked_div(self.message_bytes).unwrap_or(0) * self.message_bytes
    }

    /// The whole messages, to be returned.
    pub(crate) fn whole(&self) -> &[u8] {
        &self.room[..self.whole_bytes()]
    }

    /// They were returned.
    pub(crate) fn returned(&mut self, bytes: usize) {
        debug_assert!(bytes <= self.filled);
        self.room.copy_within(bytes..self.filled, 0);
        self.filled -= bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Oracle: the same bytes, whatever the cuts, whole messages at a time.
    #[test]
    fn messages_come_back_whole_and_in_order_whatever_the_cuts() {
        for message_bytes in [1, 8, 64, 4096, 70_000] {
            let sent: Vec<u8> = (0..message_bytes * 5).map(|n| u8::try_from(n % 251).unwrap()).collect();
            let mut stream = (message_bytes as u64).to_le_bytes().to_vec();
            stream.extend(&sent);
            for cut in [1, 3, 7, 63, 64, 65, 5000, usize::MAX] {
                let (mut stage, mut back, mut left) = (Stage::new(), Vec::<u8>::new(), &stream[..]);
                while !left.is_empty() {
                    let room = stage.room();
                    assert!(!room.is_empty());
                    let count = left.len().min(room.len()).min(cut);
                    room[..count].copy_from_slice(&left[..count]);
                    left = &left[count..];
                    stage.received(count).unwrap();
                    assert_eq!(stage.whole().len() % message_bytes, 0);
                    back.extend(stage.whole());
                    stage.returned(stage.whole_bytes());
                }
                assert_eq!(back, sent, "{message_bytes} B in pieces of {cut}");
            }
        }
    }

    #[test]
    fn a_length_nobody_serves_is_refused() {
        for length in [0, u64::MAX, BYTES_MAX + 1] {
            let mut stage = Stage::new();
            stage.room().copy_from_slice(&length.to_le_bytes());
            assert!(stage.received(LENGTH_BYTES).is_err(), "{length}");
        }
    }
}
