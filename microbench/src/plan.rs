//! How many samples a cell of the experiment gets: what was asked for, unless that takes too long.

use std::time::Duration;

use anyhow::Result;
use clap::Args;

/// Never fewer samples than this, however slow they are: the paper's own count.
pub(crate) const SAMPLES_MIN: usize = 100;

/// Samples thrown away first, in time: enough for caches, branch predictors and the kernel's buffers.
pub(crate) const WARM_UP: Duration = Duration::from_millis(30);

/// The same at the start of each turn, when somebody else had the caches.
const TURN_WARM_UP: Duration = Duration::from_millis(2);

/// Calls made, and not recorded, at the start of a turn of calls that take so long: 2 ms of them, at least two.
pub(crate) fn turn_warm_up(call_ns: u64, most: usize) -> usize {
    let calls = TURN_WARM_UP.as_nanos() / u128::from(call_ns.max(1));
    usize::try_from(calls).unwrap_or(usize::MAX).clamp(2, most)
}

/// How many samples a command takes, as it is asked.
#[derive(Args, Clone, Debug)]
pub(crate) struct PlanArgs {
    /// Samples of one run of one cell.
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    repetitions: u32,
    /// Runs of each cell; the spread between them is reported.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
    /// Seconds after which a run of a cell has enough samples.
    #[arg(long, default_value_t = 0.5)]
    run_limit: f64,
}

impl PlanArgs {
    /// # Errors
    /// The limit is no time.
    pub(crate) fn plan(&self) -> Result<Plan> {
        Ok(Plan {
            repetitions: self.repetitions as usize,
            runs: self.runs as usize,
            run_limit: Duration::try_from_secs_f64(self.run_limit)?,
        })
    }
}

#[derive(Copy, Clone, Debug)]
pub(crate) struct Plan {
    /// Samples per run.
    pub(crate) repetitions: usize,
    pub(crate) runs: usize,
    /// Longest time one run of one cell may take.
    pub(crate) run_limit: Duration,
}

impl Plan {
    /// Samples of one run, given what one sample takes.
    pub(crate) fn samples(&self, sample_ns: u64) -> usize {
        let affordable = self.run_limit.as_nanos() / u128::from(sample_ns.max(1));
        let affordable = usize::try_from(affordable).unwrap_or(usize::MAX);
        self.repetitions.min(affordable.max(SAMPLES_MIN))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slow_cells_get_fewer_samples_but_never_fewer_than_the_paper() {
        let plan = Plan { repetitions: 100_000, runs: 3, run_limit: Duration::from_secs(1) };
        assert_eq!(plan.samples(300), 100_000);
        assert_eq!(plan.samples(100_000), 10_000);
        assert_eq!(plan.samples(50_000_000), SAMPLES_MIN);
        let asked_for_few = Plan { repetitions: 10, ..plan };
        assert_eq!(asked_for_few.samples(50_000_000), 10);
    }
}
