//! How long a function takes, as its answers come in: what a worker may be given ahead is bounded by time.

/// Answers that an estimate is the mean of: older ones count for half, then a quarter.
const ANSWERS: u32 = 32;
/// An answer that takes longer than four times the estimate and this is a surprise. Alone it counts for no more than that: a worker that
/// lost its core for a time slice says nothing about its function. The next one is believed.
const SURPRISE_NS: u64 = 10_000;

/// The recent mean of a function's time. Answers that come together share the time since the one before: only their mean
/// means something.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Pace {
    took_ns: u64,
    answers: u32,
    surprised: bool,
}

impl Pace {
    pub(super) fn answered(&mut self, took_ns: u64) {
        let usual_ns = self.expected_ns().map_or(u64::MAX, |ns| ns.saturating_mul(4).saturating_add(SURPRISE_NS));
        let was_surprised = std::mem::replace(&mut self.surprised, took_ns > usual_ns);
        let took_ns = if was_surprised { took_ns } else { took_ns.min(usual_ns) };
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
        (0..100).for_each(|_| pace.answered(5000));
        (0..4).for_each(|_| pace.answered(5_000_000));
        assert!(pace.expected_ns() > Some(300_000), "four in a row are no accident: {pace:?}");
        (0..4).for_each(|_| pace.answered(u64::MAX));
        assert!(pace.expected_ns() > Some(1 << 50));
    }
}
