//! How the two ends of a round trip wait, and on which cores they stand.
//!
//! The wait mode decides the placement: two ends that spin need two cores, two ends that block are fastest on
//! one, where the scheduler hands the core over directly (2.5–4 µs against 85–100 µs across halted cores of a
//! virtual machine).

use std::fmt;
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::thread::CpuSet;
use serde::{Deserialize, Serialize};

/// How an end waits for its peer.
#[derive(Copy, Clone, Debug, Eq, PartialEq, Ord, PartialOrd, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Wait {
    /// Spin for ever, on two cores.
    Latency,
    /// Spin for up to 100 µs, then block; on two cores. (A process under test yields from 5 µs on, towards clients at once, and is not pinned.)
    Balanced,
    /// Block at once; both ends on one core.
    Efficient,
}

/// How long `balanced` spins before it blocks: about the price of waking a halted virtual CPU (85–100 µs), so
/// that waiting never costs more than twice the better choice.
pub(crate) const SPIN_BUDGET: Duration = Duration::from_micros(100);

impl Wait {
    pub(crate) const ALL: [Wait; 3] = [Wait::Latency, Wait::Balanced, Wait::Efficient];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Wait::Latency => "latency",
            Wait::Balanced => "balanced",
            Wait::Efficient => "efficient",
        }
    }
}

impl fmt::Display for Wait {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The cores of the two ends.
#[derive(Copy, Clone, Debug, Eq, PartialEq, Serialize, Deserialize)]
pub(crate) struct Placement {
    pub(crate) ours: usize,
    pub(crate) theirs: usize,
}

impl Placement {
    /// Where the two ends stand in this wait mode: in `latency` on cores that `praas-process --pin auto` uses too; in
    /// `efficient` on the one that a process under test is pinned to; in `balanced` such a process is not pinned.
    pub(crate) fn of(wait: Wait, cores: &[usize]) -> Result<Self> {
        let (Some(&first), Some(&last)) = (cores.first(), cores.last()) else { bail!("no core is allowed") };
        match wait {
            Wait::Efficient => Ok(Self { ours: first, theirs: first }),
            Wait::Latency | Wait::Balanced if first == last => {
                bail!("wait mode {wait} needs two cores and this process may use one: use --wait efficient")
            }
            Wait::Latency | Wait::Balanced => Ok(Self { ours: first, theirs: last }),
        }
    }
}

impl fmt::Display for Placement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.ours == self.theirs {
            write!(f, "one core ({})", self.ours)
        } else {
            write!(f, "two cores ({}, {})", self.ours, self.theirs)
        }
    }
}

/// The cores this process may use, from `sched_getaffinity`: `nproc` counts cores we may not run on.
fn allowed_cores() -> Result<Vec<usize>> {
    let set = rustix::thread::sched_getaffinity(None).context("sched_getaffinity")?;
    Ok((0..CpuSet::MAX_CPU).filter(|&core| set.is_set(core)).collect())
}

/// The cores this process could use when it was first asked, before anything was pinned.
pub(crate) fn startup_cores() -> Result<Vec<usize>> {
    static CORES: OnceLock<Vec<usize>> = OnceLock::new();
    if let Some(cores) = CORES.get() {
        return Ok(cores.clone());
    }
    let cores = allowed_cores()?;
    Ok(CORES.get_or_init(|| cores).clone())
}

/// Pins the calling thread.
pub(crate) fn pin(cores: &[usize]) -> Result<()> {
    let mut set = CpuSet::new();
    cores.iter().for_each(|&core| set.set(core));
    rustix::thread::sched_setaffinity(None, &set).with_context(|| format!("pin to cores {cores:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spinning_ends_stand_on_two_cores_and_blocking_ones_on_one() {
        assert_eq!(Placement::of(Wait::Latency, &[0, 1]).unwrap(), Placement { ours: 0, theirs: 1 });
        assert_eq!(Placement::of(Wait::Efficient, &[2, 3]).unwrap(), Placement { ours: 2, theirs: 2 });
    }

    #[test]
    fn two_spinners_are_never_put_on_one_core() {
        assert!(Placement::of(Wait::Latency, &[0]).unwrap_err().to_string().contains("--wait efficient"));
        assert!(Placement::of(Wait::Balanced, &[0]).is_err());
    }
}
