//! Whether a client stalls in the middle of a frame and holds memory for nothing (N2): one judge for whoever has its connection, the
//! controller or a worker.

use praas_transport::tcp::Stats;

/// Whoever is in the middle of a frame sends at least [`STALL_BYTES`] in this time.
pub(crate) const STALL_NS: u64 = 2_000_000_000;
const STALL_BYTES: u64 = 128 << 10;

/// What had come of a frame, and since when there is no progress.
#[derive(Debug, Default)]
pub(crate) struct Stall(Option<Mark>);

#[derive(Debug, Clone, Copy)]
struct Mark {
    since_ns: u64,
    frames: u64,
    bytes: u64,
    in_pieces: bool,
}

impl Stall {
    /// It is in the middle of nothing, or may not go on.
    pub(crate) fn clear(&mut self) {
        self.0 = None;
    }

    /// Looks at a connection in the middle of a frame, or of payloads in pieces. Whether that takes too long.
    pub(crate) fn is_over(&mut self, now_ns: u64, in_pieces: bool, stats: &Stats) -> bool {
        // Of a payload in pieces only its pieces are progress: whole frames between them are no reason to hold its memory.
        let (frames, bytes) = match in_pieces {
            true => (0, stats.received_piece_bytes),
            false => (stats.received_frames, stats.received_bytes),
        };
        let now = Mark { since_ns: now_ns, frames, bytes, in_pieces };
        self.0.take_if(|mark| mark.in_pieces != in_pieces);
        let mark = self.0.get_or_insert(now);
        if frames > mark.frames || bytes >= mark.bytes + STALL_BYTES {
            *mark = now;
            return false;
        }
        now_ns > mark.since_ns + STALL_NS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn n2_bytes_and_frames_are_progress_and_in_pieces_only_pieces() {
        let stats = |received_frames, received_bytes, received_piece_bytes| Stats {
            received_frames,
            received_bytes,
            received_piece_bytes,
            ..Stats::default()
        };
        let mut stall = Stall::default();
        assert!(!stall.is_over(0, false, &stats(1, 100, 0)));
        assert!(!stall.is_over(STALL_NS, false, &stats(1, 200, 0)), "not yet");
        assert!(stall.is_over(STALL_NS + 1, false, &stats(1, 300, 0)), "a byte now and then is none");
        assert!(!stall.is_over(STALL_NS + 1, false, &stats(2, 300, 0)), "a whole frame is");
        assert!(!stall.is_over(2 * STALL_NS, false, &stats(2, 300 + STALL_BYTES, 0)));
        // Pieces have their own time, and frames between them do not lengthen it.
        assert!(!stall.is_over(3 * STALL_NS, true, &stats(3, 1 << 20, 10)));
        assert!(stall.is_over(4 * STALL_NS + 1, true, &stats(900, 2 << 20, 20)));
        stall.clear();
        assert!(!stall.is_over(9 * STALL_NS, true, &stats(900, 2 << 20, 20)));
    }
}
