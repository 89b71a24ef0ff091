//! When calls are due, and how late their answers are. Pure: time is a number that the caller brings.
//!
//! In an open loop calls are due whether or not earlier ones were answered, as they are when many clients know nothing of each
//! other. What counts is the time from when a call was *due*: a generator that waits for a slow server and then times from when
//! it got to send leaves out exactly the calls that suffered ("coordinated omission", Tene 2013).

use std::fmt;
use std::str::FromStr;

use anyhow::{Context, Result, ensure};

/// How calls of an open loop follow each other.
#[derive(Copy, Clone, Debug, Eq, PartialEq, clap::ValueEnum)]
pub(crate) enum Arrivals {
    /// At random, as from many clients that know nothing of each other.
    Poisson,
    /// One after the other at the same distance, as wrk2 does.
    Steady,
}

/// The times at which the calls of an open loop are due, in nanoseconds from its start.
#[derive(Clone, Debug)]
pub(crate) struct Schedule {
    gap_ns: f64,
    arrivals: Arrivals,
    random: u64,
    next_ns: f64,
    end_ns: f64,
}

impl Schedule {
    /// Calls at a mean rate until `end_ns`; the same seed gives the same times.
    pub(crate) fn new(calls_per_second: f64, arrivals: Arrivals, seed: u64, end_ns: u64) -> Self {
        let mut schedule =
            Self { gap_ns: 1e9 / calls_per_second, arrivals, random: seed, next_ns: 0.0, end_ns: end_ns as f64 };
        schedule.next_ns = schedule.gap();
        schedule
    }

    fn gap(&mut self) -> f64 {
        match self.arrivals {
            Arrivals::Steady => self.gap_ns,
            // The time to the next of many independent arrivals; 1 - x is never zero.
            Arrivals::Poisson => -(1.0 - self.uniform()).ln() * self.gap_ns,
        }
    }

    /// In [0, 1), by splitmix64 (Steele et al., OOPSLA 2014).
    fn uniform(&mut self) -> f64 {
        self.random = self.random.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.random;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^= mixed >> 31;
        (mixed >> 11) as f64 / (1u64 << 53) as f64
    }

    /// When the next call is due; `None` when there are no more.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a time between 0 and the end")]
    pub(crate) fn next(&self) -> Option<u64> {
        (self.next_ns < self.end_ns).then_some(self.next_ns as u64)
    }

    /// The next call was made, or given up.
    pub(crate) fn advance(&mut self) {
        self.next_ns += self.gap();
    }
}

/// What decides that a call is due.
#[derive(Clone, Debug)]
pub(crate) enum Pace {
    /// As soon as there is room for it: an answer makes room for the next call.
    Closed { end_ns: u64 },
    /// At times of its own.
    Open { schedule: Schedule, end_ns: u64 },
}

impl Pace {
    /// Since when a call is due that can be made now.
    pub(crate) fn due(&self, now_ns: u64) -> Option<u64> {
        match self {
            Pace::Closed { end_ns } => (now_ns < *end_ns).then_some(now_ns),
            Pace::Open { schedule, .. } => schedule.next().filter(|due_ns| *due_ns <= now_ns),
        }
    }

    /// When to look again if nothing comes before; `None` when only answers can bring anything.
    pub(crate) fn next(&self) -> Option<u64> {
        match self {
            Pace::Closed { .. } => None,
            Pace::Open { schedule, .. } => schedule.next(),
        }
    }

    pub(crate) fn advance(&mut self) {
        if let Pace::Open { schedule, .. } = self {
            schedule.advance();
        }
    }

    pub(crate) fn end_ns(&self) -> u64 {
        match self {
            Pace::Closed { end_ns } | Pace::Open { end_ns, .. } => *end_ns,
        }
    }

    /// Nothing will be due any more.
    pub(crate) fn is_over(&self, now_ns: u64) -> bool {
        match self {
            Pace::Closed { end_ns } => now_ns >= *end_ns,
            Pace::Open { schedule, .. } => schedule.next().is_none(),
        }
    }
}

/// What calls are made to. The real one has sockets and a clock; in tests both are numbers.
pub(crate) trait Target {
    /// Nanoseconds since the load began.
    fn now_ns(&mut self) -> u64;
    /// Makes a call that is due since `due_ns`; false when there is no room for one more.
    fn place(&mut self, due_ns: u64) -> Result<bool>;
    /// Hands over what was placed.
    fn flush(&mut self) -> Result<()>;
    /// Since when a call was due that is answered now; `None` when there is no further answer at the moment.
    fn answered(&mut self) -> Result<Option<u64>>;
    /// Calls without an answer.
    fn in_flight(&self) -> usize;
    /// Nothing to do before `until_ns`, or before an answer where that is `None`.
    fn pause(&mut self, until_ns: Option<u64>) -> Result<()>;
}

/// What came of a load.
#[derive(Clone, Debug, Default)]
pub(crate) struct Outcome {
    /// From when each call was due to when its answer was checked.
    pub(crate) samples_ns: Vec<u64>,
    /// Answers in time: before the end for a closed loop, all for an open one.
    pub(crate) answers: u64,
    /// The time these answers took.
    pub(crate) elapsed_ns: u64,
    /// Calls that were due and never made; each is in the samples with the time it had waited.
    pub(crate) unsent: u64,
}

impl Outcome {
    pub(crate) fn rate(&self) -> f64 {
        self.answers as f64 / (self.elapsed_ns.max(1) as f64 / 1e9)
    }
}

/// Answers taken before it is looked again which calls are due.
const ANSWERS_AT_ONCE: usize = 32;

/// How long after its end an open loop may go on making calls that were due before, as a part of its length: a server that
/// has not caught up by then does not keep up.
const OVERTIME: u64 = 2;

/// Offers a load, and waits for the answers to all calls made.
pub(crate) fn offer(target: &mut impl Target, pace: &mut Pace, mut samples_ns: Vec<u64>) -> Result<Outcome> {
    samples_ns.clear();
    let mut outcome = Outcome { samples_ns, ..Outcome::default() };
    let end_ns = pace.end_ns();
    let given_up_ns = end_ns + end_ns / OVERTIME;
    loop {
        let now_ns = target.now_ns();
        let given_up = now_ns >= given_up_ns;
        let (mut placed, mut has_room) = (false, true);
        while has_room
            && !given_up
            && let Some(due_ns) = pace.due(now_ns)
        {
            has_room = target.place(due_ns)?;
            if has_room {
                pace.advance();
                placed = true;
            }
        }
        if placed {
            target.flush()?;
        }
        let mut answers = 0;
        while answers < ANSWERS_AT_ONCE
            && let Some(due_ns) = target.answered()?
        {
            answers += 1;
            let now_ns = target.now_ns();
            outcome.samples_ns.push(now_ns - due_ns);
            if now_ns < end_ns || matches!(pace, Pace::Open { .. }) {
                outcome.answers += 1;
                outcome.elapsed_ns = now_ns;
            }
        }
        if target.in_flight() == 0 {
            if given_up {
                while let Some(due_ns) = pace.due(end_ns) {
                    outcome.samples_ns.push(now_ns - due_ns);
                    outcome.unsent += 1;
                    pace.advance();
                }
            }
            if pace.is_over(now_ns) {
                break;
            }
        }
        if answers == 0 && !placed {
            // What is due and has no room waits for answers.
            target.pause(if has_room && !given_up { pace.next() } else { None })?;
        }
    }
    if matches!(pace, Pace::Closed { .. }) || outcome.elapsed_ns < end_ns {
        outcome.elapsed_ns = end_ns;
    }
    Ok(outcome)
}

/// A part of a closed-loop peak, as people write it: `50%`.
#[derive(Copy, Clone, Debug, PartialEq, PartialOrd)]
pub(crate) struct Share(pub(crate) f64);

impl FromStr for Share {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let number = text.strip_suffix('%').with_context(|| format!("{text:?} is not a share such as 50%"))?;
        let percent: f64 = number.parse().with_context(|| format!("{text:?} is not a share such as 50%"))?;
        ensure!((1.0..=150.0).contains(&percent), "{text} is outside 1% .. 150% of the closed-loop peak");
        Ok(Self(percent / 100.0))
    }
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.0}%", self.0 * 100.0)
    }
}

/// The rates that shares of a peak are, lowest first, each once.
pub(crate) fn rates_of(shares: &[Share], peak: f64) -> Vec<f64> {
    let mut rates: Vec<f64> = shares.iter().map(|share| share.0 * peak).collect();
    rates.sort_by(f64::total_cmp);
    rates.dedup();
    rates
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn times(rate: f64, arrivals: Arrivals, seed: u64) -> Vec<u64> {
        let mut schedule = Schedule::new(rate, arrivals, seed, SECOND);
        std::iter::from_fn(|| schedule.next().inspect(|_| schedule.advance())).collect()
    }

    #[test]
    fn steady_calls_are_due_at_the_same_distance() {
        let times = times(1000.0, Arrivals::Steady, 1);
        assert_eq!(times.len(), 999); // the thousandth is due when the second is over
        assert!(times.iter().zip(1..).all(|(time, n)| time.abs_diff(n * 1_000_000) <= 1), "{:?}", &times[..3]);
    }

    /// Of a Poisson process: the mean gap is that of the rate, and the gaps' deviation is their mean.
    #[test]
    fn random_calls_have_the_rate_and_the_spread_of_independent_clients() {
        let times = times(100_000.0, Arrivals::Poisson, 7);
        assert!(times.is_sorted());
        assert!((99_000..101_000).contains(&times.len()), "{}", times.len());
        let gaps: Vec<f64> = times.windows(2).map(|pair| (pair[1] - pair[0]) as f64).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let deviation = (gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64).sqrt();
        assert!((deviation / mean - 1.0).abs() < 0.02, "{deviation} by {mean}");
        assert_eq!(times, self::times(100_000.0, Arrivals::Poisson, 7), "a seed is a seed");
        assert_ne!(times, self::times(100_000.0, Arrivals::Poisson, 8));
    }

    /// How long who waits for an answer sleeps when none is to come.
    const SLEEP_MAX_NS: u64 = 100_000_000;

    /// One server, first come first served, in virtual time: serves each call for `service_ns`, and not at all while it stalls.
    struct Simulated {
        now_ns: u64,
        service_ns: u64,
        stall: std::ops::Range<u64>,
        room: usize,
        /// What reading the clock takes.
        clock_read_ns: u64,
        free_at_ns: u64,
        /// When each call is answered, when it was due, and when it was made.
        flying: VecDeque<(u64, u64, u64)>,
        from_sending_ns: Vec<u64>,
    }

    impl Simulated {
        fn new(service_ns: u64, stall: std::ops::Range<u64>, room: usize) -> Self {
            let (flying, from_sending_ns) = (VecDeque::new(), Vec::new());
            Self { now_ns: 0, service_ns, stall, room, clock_read_ns: 0, free_at_ns: 0, flying, from_sending_ns }
        }

        fn serve(&self, from_ns: u64) -> u64 {
            let start = if self.stall.contains(&from_ns) { self.stall.end } else { from_ns };
            start + self.service_ns
        }
    }

    impl Target for Simulated {
        fn now_ns(&mut self) -> u64 {
            self.now_ns += self.clock_read_ns;
            self.now_ns
        }
        fn place(&mut self, due_ns: u64) -> Result<bool> {
            if self.flying.len() == self.room {
                return Ok(false);
            }
            self.free_at_ns = self.serve(self.now_ns.max(self.free_at_ns));
            self.flying.push_back((self.free_at_ns, due_ns, self.now_ns));
            Ok(true)
        }
        fn flush(&mut self) -> Result<()> {
            Ok(())
        }
        fn answered(&mut self) -> Result<Option<u64>> {
            let Some((done_ns, due_ns, sent_ns)) = self.flying.front().copied() else { return Ok(None) };
            if done_ns > self.now_ns {
                return Ok(None);
            }
            self.flying.pop_front();
            self.from_sending_ns.push(done_ns - sent_ns);
            Ok(Some(due_ns))
        }
        fn in_flight(&self) -> usize {
            self.flying.len()
        }
        fn pause(&mut self, until_ns: Option<u64>) -> Result<()> {
            let answer_ns = self.flying.front().map(|(done_ns, ..)| *done_ns);
            let next_ns = [answer_ns, until_ns].into_iter().flatten().min().unwrap_or(self.now_ns + SLEEP_MAX_NS);
            self.now_ns = self.now_ns.max(next_ns);
            Ok(())
        }
    }

    /// What clients that know nothing of each other see of such a server: each call waits for those due before it.
    fn oracle(times: &[u64], service_ns: u64, stall: &std::ops::Range<u64>) -> Vec<u64> {
        let mut free_ns = 0;
        times
            .iter()
            .map(|&due_ns| {
                let from_ns = due_ns.max(free_ns);
                free_ns = if stall.contains(&from_ns) { stall.end } else { from_ns } + service_ns;
                free_ns - due_ns
            })
            .collect()
    }

    fn percentile(samples_ns: &[u64], percent: usize) -> u64 {
        let mut sorted = samples_ns.to_vec();
        sorted.sort_unstable();
        sorted[(sorted.len() - 1) * percent / 100]
    }

    /// However few calls fit in flight, the times are those of clients that wait for nobody; timed from sending, the stall
    /// of 200 ms would show in one sample of a hundred thousand.
    #[test]
    fn times_count_from_when_a_call_was_due_and_so_omit_nothing() {
        let (rate, service_ns, stall) = (50_000.0, 5_000, 300_000_000..500_000_000);
        for arrivals in [Arrivals::Steady, Arrivals::Poisson] {
            let expected = oracle(&times(rate, arrivals, 3), service_ns, &stall);
            for room in [1, 7, 100_000] {
                let mut server = Simulated::new(service_ns, stall.clone(), room);
                let schedule = Schedule::new(rate, arrivals, 3, SECOND);
                let mut pace = Pace::Open { schedule, end_ns: SECOND };
                let outcome = offer(&mut server, &mut pace, Vec::new()).unwrap();
                assert_eq!(outcome.unsent, 0);
                assert_eq!(outcome.samples_ns, expected, "{arrivals:?}, {room} in flight");
                assert!(percentile(&outcome.samples_ns, 90) > 100_000_000, "the stall is in one call of five");
                if room == 1 {
                    assert_eq!(percentile(&server.from_sending_ns, 99), service_ns, "timed from sending it hides");
                }
            }
        }
    }

    /// A call that became due while the generator looked for answers was taken for one without room, and waited, with nothing
    /// in flight, for an answer: up to the longest sleep, 100 ms.
    #[test]
    fn a_call_that_becomes_due_while_others_are_looked_after_is_made_at_once() {
        let mut server = Simulated { clock_read_ns: 50, ..Simulated::new(5_000, 0..0, 100) };
        let schedule = Schedule::new(50_000.0, Arrivals::Poisson, 5, SECOND);
        let outcome = offer(&mut server, &mut Pace::Open { schedule, end_ns: SECOND }, Vec::new()).unwrap();
        assert!(percentile(&outcome.samples_ns, 100) < 1_000_000, "{}", percentile(&outcome.samples_ns, 100));
    }

    #[test]
    fn a_server_that_cannot_keep_up_is_given_up_and_what_waited_counts() {
        // 10 000 calls a second for one that serves 1000: it gets half as long again, 1500 calls.
        let mut server = Simulated::new(1_000_000, 0..0, 4);
        let schedule = Schedule::new(10_000.0, Arrivals::Steady, 1, SECOND);
        let outcome = offer(&mut server, &mut Pace::Open { schedule, end_ns: SECOND }, Vec::new()).unwrap();
        assert!((1_500..1_510).contains(&outcome.answers), "{}", outcome.answers);
        assert_eq!(outcome.answers + outcome.unsent, 9_999);
        assert_eq!(outcome.samples_ns.len(), 9_999, "no call is left out");
        assert!((990.0..1010.0).contains(&outcome.rate()), "{}", outcome.rate());
    }

    #[test]
    fn a_closed_loop_makes_a_call_for_each_answer_and_counts_those_in_time() {
        for room in [1, 8] {
            let mut server = Simulated::new(10_000, 0..0, room);
            let outcome = offer(&mut server, &mut Pace::Closed { end_ns: SECOND }, Vec::new()).unwrap();
            assert!((99_990.0..=100_000.0).contains(&outcome.rate()), "{}", outcome.rate());
            assert_eq!(percentile(&outcome.samples_ns, 50), 10_000 * room as u64, "a full line is waited for");
            assert_eq!((outcome.unsent, server.flying.len()), (0, 0));
        }
    }

    #[test]
    fn shares_read_as_written_and_become_rates_of_the_peak() {
        let shares: Vec<Share> = ["90%", "10%", "50%", "50%"].iter().map(|text| text.parse().unwrap()).collect();
        assert_eq!(shares[0].to_string(), "90%");
        assert_eq!(rates_of(&shares, 200_000.0), [20_000.0, 100_000.0, 180_000.0]);
        for wrong in ["50", "0%", "151%", "half", "%"] {
            assert!(wrong.parse::<Share>().is_err(), "{wrong}");
        }
    }
}
