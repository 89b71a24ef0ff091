//! Who runs where, and who may spin there: decided once at start, from counts alone.
//!
//! Measured on two-core virtual machines (design §4): a spinning peer on another core answers in 0.3 us, a sleeping one
//! on the same core in 2.5-4 us, a sleeping one on another, halted core in 85-100 us, and two spinners that share a
//! core in 8 ms. So nobody spins for a peer on its own core; those that cannot have a core each yield it to each other,
//! for a while, and sleep.

use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::cgroup;
use crate::clock::now_ns;
use crate::config::{Pin, WaitMode};

/// How one participant waits for one peer: polls without pause for `spin`, then polls and yields up to `linger`, then sleeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Patience {
    /// Polling without a system call, ns.
    pub spin_ns: u64,
    /// Polling with `sched_yield` in between, ns, counted from the start of the wait.
    pub linger_ns: u64,
}

impl Patience {
    /// Sleeps at once.
    pub const NONE: Patience = Patience { spin_ns: 0, linger_ns: 0 };

    /// Keeps nobody from the core: yields between polls, then sleeps. Two that share a core hand it to each other in about a
    /// microsecond and without a bell, where a ring and a sleep take 2.5-4.
    pub const YIELDING: Patience = Patience { spin_ns: 0, linger_ns: BALANCED_LINGER_NS };
}

/// Longest spin in `balanced` mode: about what a sleeping core takes to wake (design §4), so that a wait costs at most twice the best choice.
const BALANCED_LINGER_NS: u64 = 100_000;
/// Spin without yielding in `balanced` mode: nobody is pinned, so the peer may be waiting for this very core.
const BALANCED_SPIN_NS: u64 = 5_000;
/// Spin without yielding in `latency` mode. Longer than any small function, shorter than harm to one who shares the core.
const LATENCY_SPIN_NS: u64 = 50_000;
/// Spin of a controller beside a leased worker that sleeps on its core: a worker that stores one object after the other comes back in less.
const BESIDE_LEASE_SPIN_NS: u64 = 2_000;
/// How long an unused lease keeps its core in `latency` mode before it sleeps.
const LATENCY_LINGER_NS: u64 = 20_000_000;
/// A yield this long, ns, was taken for a time slice, not for a call: sleeping would have had the core back with the bell.
const YIELD_LOST_NS: u64 = 200_000;
/// Waits that do not yield after one that lost a time slice.
const YIELD_PAUSE: u32 = 64;

/// Handing one's core over, as long as it comes back soon.
#[derive(Debug, Default)]
pub(crate) struct Yields {
    /// Waits to come that do not yield: the last yield lost a time slice.
    paused: u32,
}

impl Yields {
    /// Whether a wait may yield now.
    pub(crate) fn allowed(&self) -> bool {
        self.paused == 0
    }

    /// One wait less to go without.
    pub(crate) fn count_wait(&mut self) {
        self.paused = self.paused.saturating_sub(1);
    }

    /// Lets another run. The time before it goes in, the time after it comes out, ns.
    pub(crate) fn yield_core(&mut self, now: u64) -> u64 {
        rustix::thread::sched_yield();
        let after = now_ns();
        if after.saturating_sub(now) > YIELD_LOST_NS {
            self.paused = YIELD_PAUSE;
        }
        after
    }
}

/// Where the controller and each worker run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    wait: WaitMode,
    /// Cores to choose from; empty when nobody is pinned.
    cores: Vec<usize>,
    /// Cores that exist, pinned or not.
    cores_count: usize,
}

impl Placement {
    /// Decides for `allowed` cores (from `sched_getaffinity`) with a quota of `quota_cores`.
    #[must_use]
    pub fn new(pin: &Pin, wait: WaitMode, allowed: &[usize], quota_cores: usize) -> Placement {
        let cores_count = allowed.len().min(quota_cores.max(1));
        let cores = match pin {
            Pin::None => Vec::new(),
            Pin::Auto if wait == WaitMode::Latency => allowed.iter().rev().copied().take(cores_count).collect(),
            Pin::Auto => Vec::new(),
            Pin::Cores(cores) => cores.clone(),
        };
        Placement { wait, cores, cores_count }
    }

    /// The controller's core, when pinned.
    #[must_use]
    pub fn controller(&self) -> Option<usize> {
        self.cores.first().copied()
    }

    /// The core of worker `number` (from 1), when pinned: the controller's is taken last. With two cores the first worker has the one
    /// where callers of this host run, who yield while they wait: measured, the controller then need not hand its core over at each call.
    #[must_use]
    pub fn worker(&self, number: u8) -> Option<usize> {
        let cores = self.cores.len();
        (cores > 0).then(|| self.cores[usize::from(number) % cores])
    }

    /// How a worker waits for the controller, and how two workers under a lease wait for each other, given their cores.
    #[must_use]
    pub fn patience(&self, mine: Option<usize>, theirs: Option<usize>, leased: bool, participants: usize) -> Patience {
        let apart = match (mine, theirs) {
            (Some(mine), Some(theirs)) => mine != theirs,
            // Unpinned: the scheduler spreads spinners over cores as long as there is one for each that may be awake.
            _ => self.cores_count >= if leased { 2 } else { participants + 1 },
        };
        match self.wait {
            WaitMode::Efficient => Patience::NONE,
            _ if self.cores_count < 2 => Patience::NONE,
            WaitMode::Balanced if apart => Patience { spin_ns: BALANCED_SPIN_NS, linger_ns: BALANCED_LINGER_NS },
            WaitMode::Latency if apart && leased => Patience { spin_ns: LATENCY_SPIN_NS, linger_ns: LATENCY_LINGER_NS },
            // A worker that nobody leased spins only where a core is left over for whoever calls us.
            WaitMode::Latency if apart && self.cores_count > participants => {
                Patience { spin_ns: LATENCY_SPIN_NS, linger_ns: u64::MAX }
            }
            WaitMode::Balanced | WaitMode::Latency => Patience::YIELDING,
        }
    }

    /// How a worker on this core waits for a client whose connection it has. The client may be anywhere; the controller sleeps.
    #[must_use]
    pub fn connection_patience(&self, mine: Option<usize>) -> Patience {
        self.patience(mine, None, true, 2)
    }

    /// How the controller waits while no worker on its own core is busy.
    #[must_use]
    pub fn controller_patience(&self) -> Patience {
        match self.wait {
            WaitMode::Efficient => Patience::NONE,
            _ if self.cores_count < 2 => Patience::NONE,
            // A client of this host may be waiting for this very core: unpinned, the scheduler often puts all of us on one.
            WaitMode::Balanced => Patience::YIELDING,
            WaitMode::Latency => Patience { spin_ns: LATENCY_SPIN_NS, linger_ns: u64::MAX },
        }
    }

    /// How the controller waits for a worker on its own core, having just handed it a call.
    #[must_use]
    pub fn patience_after_hand_over(&self) -> Patience {
        if self.controller_patience() == Patience::NONE { Patience::NONE } else { Patience::YIELDING }
    }

    /// How the controller waits while a leased worker sleeps on its core, whom its caller may ring for at any moment: a caller that
    /// asks us something else meanwhile, such as to store an object, asks again within [`BESIDE_LEASE_SPIN_NS`].
    #[must_use]
    pub fn patience_beside_lease(&self) -> Patience {
        match self.controller_patience() {
            Patience { linger_ns: 0, .. } => Patience::NONE,
            _ => Patience { spin_ns: BESIDE_LEASE_SPIN_NS, ..Patience::YIELDING },
        }
    }

    /// Whether there is a core for each of so many, and one to spare.
    #[must_use]
    pub fn has_more_cores_than(&self, participants: usize) -> bool {
        self.cores_count > participants
    }

    /// The mode all of this follows from.
    #[must_use]
    pub fn wait(&self) -> WaitMode {
        self.wait
    }
}

/// Cores that the CPU quota of our control groups is worth, rounded up; `usize::MAX` without one.
#[must_use]
pub fn quota_cores() -> usize {
    match cgroup::tightest(Path::new("/"), cgroup::CPU_MILLICORES) {
        Some(millicores) => usize::try_from(millicores.div_ceil(1000)).unwrap_or(usize::MAX),
        None => usize::MAX,
    }
}

/// A deadline or pause as nanoseconds, saturating.
pub(crate) fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn on_two_cores_leased_workers_are_apart_and_the_second_shares_with_the_controller() {
        let placement = Placement::new(&Pin::Auto, WaitMode::Latency, &[0, 1], usize::MAX);
        assert_eq!(placement.controller(), Some(1));
        assert_eq!((placement.worker(1), placement.worker(2)), (Some(0), Some(1)));
        let leased = placement.patience(Some(0), Some(1), true, 3);
        assert!(leased.spin_ns > 0 && leased.linger_ns < u64::MAX);
        assert_eq!(placement.patience(Some(1), Some(1), false, 3), Patience::YIELDING);
        assert_eq!(placement.patience(Some(0), Some(1), false, 3), Patience::YIELDING);
    }

    #[test]
    fn with_cores_to_spare_everybody_has_its_own_and_spins() {
        let placement = Placement::new(&Pin::Auto, WaitMode::Latency, &[0, 1, 2, 3], usize::MAX);
        let cores = [placement.controller(), placement.worker(1), placement.worker(2)];
        assert_eq!(cores, [Some(3), Some(2), Some(1)]);
        assert_eq!(placement.patience(Some(2), Some(3), false, 3).linger_ns, u64::MAX);
    }

    #[test]
    fn nobody_spins_on_a_core_shared_with_the_peer_or_under_a_quota_of_one() {
        for wait in [WaitMode::Latency, WaitMode::Balanced] {
            let shared = Placement::new(&Pin::Cores(vec![0]), wait, &[0, 1], usize::MAX);
            assert_eq!(shared.patience(Some(0), Some(0), true, 3), Patience::YIELDING);
            assert_eq!(Patience::YIELDING.spin_ns, 0);
            let quota = Placement::new(&Pin::None, wait, &[0, 1], 1);
            assert_eq!(quota.patience(None, None, true, 3), Patience::NONE);
            assert_eq!(quota.controller_patience(), Patience::NONE);
        }
    }

    #[test]
    fn efficient_never_spins_and_balanced_is_bounded() {
        let efficient = Placement::new(&Pin::None, WaitMode::Efficient, &[0, 1, 2, 3], usize::MAX);
        assert_eq!(efficient.patience(None, None, true, 3), Patience::NONE);
        let balanced = Placement::new(&Pin::None, WaitMode::Balanced, &[0, 1, 2, 3], usize::MAX);
        assert!(balanced.patience(None, None, true, 3).linger_ns <= 100_000);
    }
}
