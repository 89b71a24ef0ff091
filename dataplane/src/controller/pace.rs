//! How long a function takes, as its answers come in: what a worker may be given ahead is bounded by time.

/// Answers that an estimate is the mean of: older ones count for half, then a quarter.
const ANSWERS: u32 = 32;
/// What one answer may be above four times the estimate: a worker that lost its core for a time slice says nothing about its function.
const SLACK_NS: u64 = 10_000;

/// The recent mean of a function's time. Answers that come together share the time since the one before: only their mean
/// means something.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Pace {
    took_ns: u64,
    answers: u32,
}

impl Pace {
    pub(super) fn answered(&mut self, took_ns: u64) {
        let took_ns = self
            .expected_ns()
            .map_or(took_ns, |expected_ns| took_ns.min(expected_ns.saturating_mul(4).saturating_add(SLACK_NS)));
        if self.answers >= ANSWERS {
            (self.took_ns, self.answers) = (self.took_ns / 2, self.answers / 2);
        }
        self.took_ns = self.took_ns.saturating_add(took_ns);
        self.answers += 1;
    }

    /// How long the next one takes; `None` before there was one.
    pub(super) fn expected_ns(self) -> Option<u64> {
        self.took_ns.checked_div(u64::from(self.answers))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_counts_by_its_mean_and_the_past_fades_and_one_lost_time_slice_says_little() {
        let mut pace = Pace::default();
        assert_eq!(pace.expected_ns(), None);
        pace.answered(1600);
        (0..15).for_each(|_| pace.answered(0));
        assert_eq!(pace.expected_ns(), Some(100));
        (0..300).for_each(|_| pace.answered(5000));
        assert!((4990..=5000).contains(&pace.expected_ns().unwrap()), "{pace:?}");
        pace.answered(3_000_000);
        assert!(pace.expected_ns() < Some(7000), "{pace:?}");
        (0..200).for_each(|_| pace.answered(10_000_000));
        assert!(pace.expected_ns() > Some(9_000_000), "{pace:?}");
        (0..3000).for_each(|_| pace.answered(u64::MAX));
        assert!(pace.expected_ns() > Some(1 << 50));
    }
}
