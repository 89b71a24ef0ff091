//! When the verdict on a parcel goes out: at once, or in one write with a parcel that is about to go the same way, as a delayed acknowledgement
//! does (RFC 1122, 4.2.3.2). Decides; has no clock.
//!
//! A verdict waits only where the last ones need not have been alone: a sender that is never answered is told at once, always.

/// Longest wait for company, ns: a function that was handed a message answers within some microseconds, or after a computation.
pub(crate) const DELAY_NS: u64 = 20_000;
/// Parcels in a row that were answered within [`DELAY_NS`], from which on a verdict waits. One that waited in vain starts the count again, so
/// that who is answered sometimes waits for one in so many at most.
const PROMPT_MIN: u8 = 4;
/// No verdict is owed.
pub(crate) const NEVER: u64 = u64::MAX;

/// Towards one peer.
#[derive(Debug)]
pub(crate) struct Delay {
    /// Parcels in a row that were answered in time.
    prompt: u8,
    /// When the parcel came after which none of ours went out.
    unanswered_ns: Option<u64>,
    due_ns: u64,
}

impl Delay {
    /// Nothing has come yet.
    pub(crate) const fn new() -> Delay {
        Delay { prompt: 0, unanswered_ns: None, due_ns: NEVER }
    }

    /// When verdicts have to be said; [`NEVER`] when none is owed.
    pub(crate) fn due_ns(&self) -> u64 {
        self.due_ns
    }

    /// Whether a verdict is owed that waits for company.
    pub(crate) fn waits(&self, now_ns: u64) -> bool {
        self.due_ns != NEVER && self.due_ns > now_ns
    }

    /// A parcel was settled: a verdict is owed.
    pub(crate) fn settled(&mut self, now_ns: u64) {
        if self.unanswered_ns.is_some() {
            // One came before the last was answered: they do not take turns.
            self.prompt = 0;
        }
        let since_ns = *self.unanswered_ns.get_or_insert(now_ns);
        self.due_ns = if self.prompt < PROMPT_MIN { 0 } else { since_ns.saturating_add(DELAY_NS) };
    }

    /// The same, and it does not wait.
    pub(crate) fn settled_apart(&mut self) {
        self.due_ns = 0;
    }

    /// Verdicts go out, and `with` a parcel or alone.
    pub(crate) fn said(&mut self, now_ns: u64, with_parcel: bool) {
        let waited = std::mem::replace(&mut self.due_ns, NEVER);
        if with_parcel {
            let in_time = |since_ns: u64| now_ns.saturating_sub(since_ns) <= DELAY_NS;
            match self.unanswered_ns.take() {
                Some(since_ns) if in_time(since_ns) => self.prompt = (self.prompt + 1).min(PROMPT_MIN),
                Some(_) => self.prompt = 0,
                None => {}
            }
        } else if waited != NEVER && waited != 0 {
            self.prompt = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Parcels that are answered after so long each; gives which of their verdicts waited.
    fn exchange(delay: &mut Delay, now_ns: &mut u64, answered_after_ns: &[u64]) -> Vec<bool> {
        answered_after_ns
            .iter()
            .map(|after_ns| {
                *now_ns += 1_000_000;
                delay.settled(*now_ns);
                let waits = delay.due_ns() > *now_ns;
                assert!(delay.due_ns() <= *now_ns + DELAY_NS, "no verdict waits longer");
                if *after_ns > delay.due_ns().saturating_sub(*now_ns) {
                    delay.said(*now_ns + DELAY_NS, false);
                }
                delay.said(*now_ns + after_ns, true);
                waits
            })
            .collect()
    }

    #[test]
    fn m3_a_verdict_waits_where_the_last_ones_had_company_and_nowhere_else() {
        let (mut delay, mut now_ns) = (Delay::new(), 0);
        assert_eq!(delay.due_ns(), NEVER);
        let waited = exchange(&mut delay, &mut now_ns, &[3_000; 8]);
        assert_eq!(waited, [false, false, false, false, true, true, true, true]);
        // One that is answered late was waited for once.
        assert_eq!(exchange(&mut delay, &mut now_ns, &[90_000, 90_000, 3_000]), [true, false, false]);
        let waited = exchange(&mut delay, &mut now_ns, &[3_000, 3_000, 3_000, 3_000]);
        assert_eq!(waited, [false, false, false, true]);
    }

    #[test]
    fn m3_verdicts_to_who_is_not_answered_never_wait() {
        let mut delay = Delay::new();
        for now_ns in (0..100).map(|at| at * 7_000) {
            delay.settled(now_ns);
            assert_eq!(delay.due_ns(), 0);
            delay.said(now_ns, false);
            assert_eq!(delay.due_ns(), NEVER);
        }
    }

    #[test]
    fn m3_who_sends_again_before_the_answer_is_told_at_once() {
        let (mut delay, mut now_ns) = (Delay::new(), 0);
        exchange(&mut delay, &mut now_ns, &[1_000; 5]);
        delay.settled(now_ns + 50_000);
        assert_eq!(delay.due_ns(), now_ns + 50_000 + DELAY_NS);
        delay.settled(now_ns + 51_000);
        assert_eq!(delay.due_ns(), 0, "two came, and no answer");
    }
}
