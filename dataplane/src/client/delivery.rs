//! What becomes of a call whose connection is lost, and how long to wait before the next one. Decides; has no socket.

use std::time::Duration;

use crate::wire::frame;

/// What may happen to a call whose connection or worker is lost.
///
/// A call without an answer is [`Client::fire`](super::Client::fire).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Delivery {
    /// It runs once or not at all. Never sent again once a byte of it may have left; then it ends as `ConnectionLost`, or as
    /// `WorkerLost`, and may have run. The default.
    #[default]
    AtMostOnce,
    /// Running it twice does no harm: it is sent again, on the next connection and to the next worker, until its deadline.
    Retry,
    /// As `Retry`, but the process recognises it and keeps its result: it runs again only when a worker died with it. When the
    /// process itself is lost, its memory is, too, and the call ends as `ConnectionLost`.
    EffectivelyOnce,
}

impl Delivery {
    pub(crate) fn flags(self) -> u16 {
        match self {
            Delivery::AtMostOnce => 0,
            Delivery::Retry => frame::FLAG_IDEMPOTENT,
            Delivery::EffectivelyOnce => frame::FLAG_IDEMPOTENT | frame::FLAG_ONCE,
        }
    }

    /// Of a request with these flags.
    fn of(flags: u16) -> Delivery {
        if flags & frame::FLAG_ONCE != 0 {
            Delivery::EffectivelyOnce
        } else if flags & frame::FLAG_IDEMPOTENT != 0 {
            Delivery::Retry
        } else {
            Delivery::AtMostOnce
        }
    }
}

/// How one call differs from what the client's configuration says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CallOptions {
    /// When it is to end; `None` takes [`ClientConfig::deadline`](super::ClientConfig::deadline).
    pub deadline: Option<Duration>,
    /// What may happen to it; `None` takes [`ClientConfig::delivery`](super::ClientConfig::delivery).
    pub delivery: Option<Delivery>,
}

/// What is to be done with a call in flight.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    SendAgain,
    Cancelled,
    /// It ends as `ConnectionLost`, and this is to be said of it.
    Lost(&'static str),
}

/// Of a call whose connection is lost. `written`: a byte of it may have left.
pub(crate) fn after_loss(flags: u16, written: bool, cancelled: bool, reconnects: bool) -> Fate {
    match (Delivery::of(flags), written) {
        _ if cancelled => Fate::Cancelled,
        (_, false) if reconnects => Fate::SendAgain,
        (Delivery::Retry | Delivery::EffectivelyOnce, true) if reconnects => Fate::SendAgain,
        (_, false) => Fate::Lost("the call was not sent"),
        (_, true) => Fate::Lost("the call may have run"),
    }
}

/// Of a call that waits to be sent, when the process turns out to be another life of itself.
pub(crate) fn after_restart(flags: u16, sent_before: bool) -> Fate {
    if sent_before && Delivery::of(flags) == Delivery::EffectivelyOnce {
        Fate::Lost("the process was restarted and remembers no calls; this one may have run")
    } else {
        Fate::SendAgain
    }
}

const FIRST_NS: u64 = 10_000_000;
const LONGEST_NS: u64 = 1_000_000_000;

/// Pauses between attempts to connect: up to 10 ms, then up to twice as long each time, up to a second. Each is drawn from the
/// whole of that, so that clients who lost the same process do not come back at the same moment.
#[derive(Debug, Clone)]
pub(crate) struct BackOff {
    failures: u32,
    seed: u64,
}

impl BackOff {
    pub(crate) fn new(session: [u8; 16]) -> BackOff {
        let [low, high] = [0, 8].map(|at| u64::from_le_bytes(session[at..at + 8].try_into().expect("eight bytes")));
        BackOff { failures: 0, seed: low ^ high.rotate_left(32) }
    }

    pub(super) fn failures(&self) -> u32 {
        self.failures
    }

    /// It worked.
    pub(crate) fn reset(&mut self) {
        self.failures = 0;
    }

    /// The pause after one more failure, ns.
    pub(crate) fn next_ns(&mut self) -> u64 {
        let window_ns = (FIRST_NS << self.failures.min(32)).min(LONGEST_NS);
        self.failures = self.failures.saturating_add(1);
        // splitmix64.
        self.seed = self.seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.seed;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % (window_ns + 1)
    }
}

/// Silence after which the other side is asked whether it is there, and after which it is not; it always has so long to answer.
const ASK_NS: u64 = 1_000_000_000;
const GIVE_UP_NS: u64 = 3_000_000_000;
const ANSWER_NS: u64 = 1_000_000_000;
/// How often bytes are counted while they come.
const COUNT_NS: u64 = 500_000_000;

/// Whether the other side is there, by what has arrived from it; looked at while calls are in flight.
#[derive(Debug, Default)]
pub(super) struct Beat {
    arrived: u64,
    since_ns: u64,
    asked_ns: Option<u64>,
}

/// What a look at the beat says, and when to look again.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Pulse {
    Fine { next_ns: u64 },
    Ask { next_ns: u64 },
    Lost { silent_ms: u64 },
}

impl Beat {
    /// Something is expected from now on. `arrived` counts what has come so far.
    pub(super) fn begin(&mut self, now_ns: u64, arrived: u64) -> u64 {
        *self = Beat { arrived, since_ns: now_ns, asked_ns: None };
        now_ns + ASK_NS
    }

    /// Nobody is given up before having been asked: we may have been away ourselves.
    pub(super) fn look(&mut self, now_ns: u64, arrived: u64) -> Pulse {
        if arrived != self.arrived {
            self.begin(now_ns, arrived);
            return Pulse::Fine { next_ns: now_ns + COUNT_NS };
        }
        let asked_ns = match self.asked_ns {
            Some(asked_ns) => asked_ns,
            None if now_ns < self.since_ns + ASK_NS => return Pulse::Fine { next_ns: self.since_ns + ASK_NS },
            None => now_ns,
        };
        let until_ns = (self.since_ns + GIVE_UP_NS).max(asked_ns + ANSWER_NS);
        if now_ns >= until_ns {
            return Pulse::Lost { silent_ms: (now_ns - self.since_ns) / 1_000_000 };
        }
        match self.asked_ns.replace(asked_ns) {
            Some(_) => Pulse::Fine { next_ns: until_ns },
            None => Pulse::Ask { next_ns: until_ns },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    #[test]
    fn r6_each_mode_has_its_fate() {
        let [once, retry, most] =
            [Delivery::EffectivelyOnce, Delivery::Retry, Delivery::AtMostOnce].map(Delivery::flags);
        let args = frame::FLAG_ARGS;
        for (flags, written, fate) in [
            (once, true, Fate::SendAgain),
            (retry | args, true, Fate::SendAgain),
            (most | args, true, Fate::Lost("the call may have run")),
            (most, false, Fate::SendAgain),
            (once, false, Fate::SendAgain),
        ] {
            assert_eq!(after_loss(flags, written, false, true), fate, "{flags} {written}");
            assert_eq!(after_loss(flags, written, true, true), Fate::Cancelled);
            let lost = if written { "the call may have run" } else { "the call was not sent" };
            assert_eq!(after_loss(flags, written, false, false), Fate::Lost(lost));
        }
        assert!(matches!(after_restart(once, true), Fate::Lost(_)));
        for (flags, sent_before) in [(once, false), (retry, true), (most, false)] {
            assert_eq!(after_restart(flags, sent_before), Fate::SendAgain);
        }
    }

    #[test]
    fn n11_pauses_grow_to_a_second_and_no_two_clients_keep_step() {
        let (mut sum, mut all) = ([0; 12], std::collections::HashSet::new());
        for client in 0..1000_u64 {
            let mut session = [7; 16];
            session[..8].copy_from_slice(&client.to_le_bytes());
            let mut back_off = BackOff::new(session);
            for (failures, sum) in (0..).zip(&mut sum) {
                assert_eq!(back_off.failures(), failures);
                let pause_ns = back_off.next_ns();
                assert!(pause_ns <= ((10 * MS) << failures).min(1000 * MS), "{pause_ns} ns after {failures}");
                *sum += pause_ns / 1000;
                all.insert(pause_ns);
            }
            back_off.reset();
            assert!(back_off.next_ns() <= 10 * MS);
        }
        assert!(all.len() > 11_900, "{} different pauses of 12000", all.len());
        for (failures, sum) in (0..).zip(sum) {
            // Uniform: half the window on average.
            let (mean_ns, window_ns) = (sum, ((10 * MS) << failures).min(1000 * MS));
            assert!(mean_ns.abs_diff(window_ns / 2) < window_ns / 20, "{mean_ns} ns of {window_ns}");
        }
    }

    #[test]
    fn n1_silence_is_asked_about_and_then_given_up() {
        let mut beat = Beat::default();
        assert_eq!(beat.begin(0, 10), 1000 * MS);
        assert_eq!(beat.look(700 * MS, 10), Pulse::Fine { next_ns: 1000 * MS });
        assert_eq!(beat.look(1000 * MS, 10), Pulse::Ask { next_ns: 3000 * MS });
        assert_eq!(beat.look(2000 * MS, 10), Pulse::Fine { next_ns: 3000 * MS });
        assert_eq!(beat.look(3000 * MS, 10), Pulse::Lost { silent_ms: 3000 });
        assert_eq!(beat.look(3001 * MS, 11), Pulse::Fine { next_ns: 3501 * MS });
        // We were away for an hour: that says nothing of the other side.
        assert_eq!(beat.look(3_600_000 * MS, 11), Pulse::Ask { next_ns: 3_601_000 * MS });
        assert!(matches!(beat.look(3_601_000 * MS, 11), Pulse::Lost { .. }));
    }
}
