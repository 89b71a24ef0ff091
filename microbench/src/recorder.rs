//! Samples in, percentiles out.
//!
//! Samples are kept as nanoseconds while a run is hot (one store each) and summarised afterwards: through an
//! hdrhistogram of three significant digits, so that a row of 100 samples and a row of ten million cost and read
//! the same. Minimum, mean and maximum are exact.

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

/// Longest sample the histogram holds; anything above is recorded as this and shows in `max_us` exactly.
const SAMPLE_MAX_NS: u64 = 600_000_000_000;

/// One experiment's samples, run by run.
#[derive(Debug)]
pub(crate) struct Recorder {
    all: Histogram<u64>,
    total_ns: u128,
    min_ns: u64,
    max_ns: u64,
    run_medians_ns: Vec<u64>,
}

/// What a table or a plot needs to know about a set of samples. Times in microseconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Summary {
    pub(crate) count: u64,
    pub(crate) min_us: f64,
    pub(crate) p50_us: f64,
    pub(crate) mean_us: f64,
    pub(crate) p95_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) p999_us: f64,
    pub(crate) max_us: f64,
    /// How many runs the samples come from.
    pub(crate) runs: u64,
    /// (largest − smallest) median of a run, divided by the median of all; 0 with one run.
    pub(crate) run_p50_spread: f64,
}

impl Recorder {
    pub(crate) fn new() -> Self {
        let all =
            Histogram::new_with_bounds(1, SAMPLE_MAX_NS, 3).expect("three digits over 1 ns .. 10 min is a valid shape");
        Self { all, total_ns: 0, min_ns: u64::MAX, max_ns: 0, run_medians_ns: Vec::new() }
    }

    /// Adds one run. An empty run is nothing.
    pub(crate) fn add_run(&mut self, samples_ns: &[u64]) {
        if samples_ns.is_empty() {
            return;
        }
        let mut run = Histogram::<u64>::new_from(&self.all);
        for &sample in samples_ns {
            run.saturating_record(sample.max(1));
            self.total_ns += u128::from(sample);
            self.min_ns = self.min_ns.min(sample);
            self.max_ns = self.max_ns.max(sample);
        }
        self.run_medians_ns.push(run.value_at_quantile(0.5));
        self.all.add(&run).expect("both histograms have one shape");
    }

    pub(crate) fn summary(&self) -> Summary {
        if self.all.is_empty() {
            return Summary::default();
        }
        let at = |quantile: f64| microseconds(self.all.value_at_quantile(quantile).clamp(self.min_ns, self.max_ns));
        let p50_us = at(0.5);
        let smallest = self.run_medians_ns.iter().min().copied().unwrap_or(0);
        let largest = self.run_medians_ns.iter().max().copied().unwrap_or(0);
        Summary {
            count: self.all.len(),
            min_us: microseconds(self.min_ns),
            p50_us,
            mean_us: self.total_ns as f64 / self.all.len() as f64 / 1e3,
            p95_us: at(0.95),
            p99_us: at(0.99),
            p999_us: at(0.999),
            max_us: microseconds(self.max_ns),
            runs: self.run_medians_ns.len() as u64,
            run_p50_spread: if p50_us > 0.0 { microseconds(largest - smallest) / p50_us } else { 0.0 },
        }
    }

    /// Points `(µs, share of samples at or below)` of the cumulative distribution, dense towards the tail.
    pub(crate) fn distribution(&self) -> Vec<(f64, f64)> {
        if self.all.is_empty() {
            return Vec::new();
        }
        let mut shares: Vec<f64> = (0..50).map(|step| f64::from(step) / 50.0).collect();
        shares.extend([0.98, 0.985, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9999, 1.0]);
        shares
            .into_iter()
            .map(|share| (microseconds(self.all.value_at_quantile(share).clamp(self.min_ns, self.max_ns)), share))
            .collect()
    }
}

/// Percentiles of a small set of samples as the paper's scripts compute them: sorted, linear interpolation
/// (numpy's default). For rows of 100 repetitions, so that they stand beside the published ones.
pub(crate) fn interpolated(samples_ns: &[u64]) -> Summary {
    if samples_ns.is_empty() {
        return Summary::default();
    }
    let mut sorted = samples_ns.to_vec();
    sorted.sort_unstable();
    let at = |quantile: f64| {
        let position = quantile * (sorted.len() - 1) as f64;
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 <= position < len")]
        let below = position as usize;
        let above = (below + 1).min(sorted.len() - 1);
        let low = microseconds(sorted[below]);
        low + (microseconds(sorted[above]) - low) * (position - below as f64)
    };
    Summary {
        count: sorted.len() as u64,
        min_us: at(0.0),
        p50_us: at(0.5),
        mean_us: sorted.iter().map(|&sample| microseconds(sample)).sum::<f64>() / sorted.len() as f64,
        p95_us: at(0.95),
        p99_us: at(0.99),
        p999_us: at(0.999),
        max_us: at(1.0),
        runs: 1,
        run_p50_spread: 0.0,
    }
}

/// The middle one of some samples, which it reorders.
pub(crate) fn median(samples_ns: &mut [u64]) -> u64 {
    let middle = samples_ns.len() / 2;
    *samples_ns.select_nth_unstable(middle).1
}

fn microseconds(nanoseconds: u64) -> f64 {
    nanoseconds as f64 / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Oracle: percentiles of the sorted samples.
    #[test]
    fn percentiles_agree_with_sorting_to_three_digits() {
        let samples: Vec<u64> = (1..=100_000).map(|n| (n * 7919) % 100_003 + 150).collect();
        let mut recorder = Recorder::new();
        recorder.add_run(&samples);
        let summary = recorder.summary();
        let mut sorted = samples.clone();
        sorted.sort_unstable();
        for (quantile, seen) in
            [(0.5, summary.p50_us), (0.95, summary.p95_us), (0.99, summary.p99_us), (0.999, summary.p999_us)]
        {
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rank within the samples")]
            let rank = (quantile * sorted.len() as f64).ceil() as usize - 1;
            let expected = sorted[rank] as f64 / 1e3;
            assert!((seen - expected).abs() / expected < 2e-3, "p{quantile}: {seen} against {expected}");
        }
        assert_eq!(summary.count, 100_000);
        assert_eq!(summary.min_us, sorted[0] as f64 / 1e3);
        assert_eq!(summary.max_us, *sorted.last().unwrap() as f64 / 1e3);
        let mean = sorted.iter().sum::<u64>() as f64 / sorted.len() as f64 / 1e3;
        assert!((summary.mean_us - mean).abs() < 1e-9);
    }

    #[test]
    fn the_tail_of_one_slow_sample_is_not_lost() {
        let mut recorder = Recorder::new();
        let mut samples = vec![300; 9_999];
        samples.push(8_000_000);
        recorder.add_run(&samples);
        let summary = recorder.summary();
        assert_eq!(summary.p50_us, 0.3);
        assert_eq!(summary.p999_us, 0.3);
        assert_eq!(summary.max_us, 8_000.0);
    }

    #[test]
    fn spread_is_between_runs_and_not_within() {
        let mut recorder = Recorder::new();
        recorder.add_run(&[100, 200, 300]);
        recorder.add_run(&[200, 300, 400]);
        let summary = recorder.summary();
        assert_eq!(summary.runs, 2);
        assert!((summary.run_p50_spread - 0.5).abs() < 0.01, "{}", summary.run_p50_spread);
    }

    #[test]
    fn a_sample_longer_than_the_histogram_saturates_and_max_stays_exact() {
        let mut recorder = Recorder::new();
        recorder.add_run(&[SAMPLE_MAX_NS * 2]);
        assert_eq!(recorder.summary().max_us, SAMPLE_MAX_NS as f64 * 2.0 / 1e3);
    }

    #[test]
    fn nothing_recorded_is_a_row_of_zeros() {
        assert_eq!(Recorder::new().summary(), Summary::default());
        assert_eq!(interpolated(&[]), Summary::default());
    }

    #[test]
    fn interpolated_percentiles_are_those_of_numpy() {
        // numpy.percentile([1000, 2000, 3000, 4000], [50, 95, 99]) = 2500, 3850, 3970
        let summary = interpolated(&[4000, 1000, 3000, 2000]);
        assert_eq!((summary.p50_us, summary.min_us, summary.max_us, summary.mean_us), (2.5, 1.0, 4.0, 2.5));
        assert!((summary.p95_us - 3.85).abs() < 1e-9 && (summary.p99_us - 3.97).abs() < 1e-9);
    }

    #[test]
    fn the_distribution_ends_at_the_maximum() {
        let mut recorder = Recorder::new();
        recorder.add_run(&[100, 200, 300]);
        assert_eq!(recorder.distribution().last(), Some(&(0.3, 1.0)));
    }
}
