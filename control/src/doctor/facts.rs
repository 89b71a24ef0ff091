//! What the doctor knows about a machine: plain data, no judgement.
//!
//! `None` always means "could not be read", never "default" and never "unlimited"; a limit that may be absent is a
//! [`Limit`]. Everything here serialises, because `praas doctor --json` prints the facts beside the findings.

use serde::Serialize;

/// Everything [`judge`](super::judge) looks at.
#[derive(Debug, Clone, Serialize)]
pub struct Facts {
    /// The running kernel.
    pub kernel: Kernel,
    /// Which CPUs we may use, and how much of them.
    pub cores: Cores,
    /// Whether a ring could be set up and did complete a no-op.
    pub io_uring: UringTrial,
    /// `kernel.io_uring_disabled`: 0 allowed, 1 only for a group, 2 for nobody. `None` before Linux 6.6.
    pub io_uring_disabled: Option<u32>,
    /// System call filtering in force for this OS process.
    pub seccomp: Seccomp,
    /// POSIX message queue limits. `None`: the kernel has no message queues.
    pub queues: Option<QueueLimits>,
    /// Whether a memfd could be created, sealed and then refused a new writable map.
    pub memfd: MemfdTrial,
    /// The file system at `/dev/shm`, if one is mounted.
    pub shm_mount: Option<Space>,
    /// Memory of the machine and of our cgroup.
    pub memory: Memory,
    /// Per-process limits.
    pub limits: Limits,
    /// How time is read.
    pub clock: Clock,
    /// What a core does when nobody runs on it.
    pub idle: Idle,
    /// Whether a control group could be made for a worker.
    pub groups: GroupsTrial,
    /// The chosen word of `transparent_hugepage/shmem_enabled`.
    pub shmem_huge_pages: Option<String>,
    /// TCP congestion control.
    pub tcp: Tcp,
    /// Virtual machine and container, as far as they show.
    pub host: Host,
}

/// A bound that may be absent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Limit {
    /// At most this many.
    AtMost(u64),
    /// Not bounded here.
    Unlimited,
}

impl Limit {
    /// Whether `need` fits.
    #[must_use]
    pub fn allows(self, need: u64) -> bool {
        match self {
            Self::AtMost(most) => need <= most,
            Self::Unlimited => true,
        }
    }

    /// How many times `each` fits, at most `most`.
    #[must_use]
    pub fn holds(self, each: u64, most: u64) -> u64 {
        match self {
            Self::AtMost(have) => (have / each.max(1)).min(most),
            Self::Unlimited => most,
        }
    }
}

/// Kernel release, as `uname -r` prints it, and its first two numbers.
#[derive(Debug, Clone, Serialize)]
pub struct Kernel {
    /// For example `6.18.44`.
    pub release: String,
    /// For example `(6, 18)`.
    pub version: (u32, u32),
}

/// CPUs.
#[derive(Debug, Clone, Serialize)]
pub struct Cores {
    /// Numbers of the CPUs in our affinity mask (`sched_getaffinity`), ascending.
    pub allowed: Vec<usize>,
    /// CPUs online in the machine.
    pub online: Option<usize>,
    /// The tightest cgroup CPU quota above us, in thousandths of a core. `None`: no quota.
    pub quota_millicores: Option<u64>,
}

/// What became of the io_uring trial.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "result")]
pub enum UringTrial {
    /// A no-op went in and its completion came out.
    Works {
        /// Set up with `SINGLE_ISSUER | DEFER_TASKRUN` (Linux 6.1).
        deferred: bool,
    },
    /// It did not.
    Failed {
        /// The step that failed: `io_uring_setup`, `io_uring_enter` or `completion`.
        step: &'static str,
        /// `errno` of that step.
        errno: i32,
    },
}

/// What became of the control group trial, for the limits of a worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "result")]
pub enum GroupsTrial {
    /// One with bounds on memory and processes can be made below ours, in a hierarchy of this version.
    Works {
        /// 1 or 2.
        version: u8,
    },
    /// None can.
    Failed {
        /// Why, in words.
        why: String,
        /// We run as root, whom `RLIMIT_NPROC` does not bind.
        is_root: bool,
    },
}

/// From `/proc/self/status`.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Seccomp {
    /// 0 off, 1 strict, 2 filter. `None`: the kernel does not say.
    pub mode: Option<u32>,
    /// Number of filters attached.
    pub filters: Option<u32>,
}

/// Limits on POSIX message queues: `mq_overview(7)`.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct QueueLimits {
    /// `RLIMIT_MSGQUEUE`, soft: bytes in queues, summed over one user.
    pub rlimit_bytes: Limit,
    /// `fs.mqueue.msg_max`: messages in one queue.
    pub messages_max: u64,
    /// `fs.mqueue.msgsize_max`: bytes in one message.
    pub message_bytes_max: u64,
    /// `fs.mqueue.queues_max`: queues in one IPC namespace.
    pub queues_max: u64,
    /// We hold `CAP_SYS_RESOURCE`, for which the kernel waives the last three.
    pub privileged: bool,
}

/// What became of the memfd trial.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "result")]
pub enum MemfdTrial {
    /// Created, mapped, sealed; a new writable map and a truncation were refused and the old map still wrote.
    Works,
    /// A step failed that should have worked.
    Failed {
        /// Which one.
        step: &'static str,
        /// Its `errno`.
        errno: i32,
    },
    /// A step worked that the seals should have refused.
    NotSealed {
        /// Which one.
        step: &'static str,
    },
}

/// Room in a file system.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Space {
    /// Size, bytes.
    pub total_bytes: u64,
    /// Available to us, bytes.
    pub free_bytes: u64,
}

/// Memory.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Memory {
    /// `MemTotal`, bytes.
    pub total_bytes: Option<u64>,
    /// `MemAvailable`, bytes.
    pub available_bytes: Option<u64>,
    /// The tightest cgroup memory limit above us, bytes. `None`: no limit.
    pub cgroup_bytes: Option<u64>,
}

/// Resource limits, soft values.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Limits {
    /// `RLIMIT_MEMLOCK`, bytes.
    pub memlock_bytes: Limit,
    /// `RLIMIT_NOFILE`.
    pub open_files: Limit,
    /// `RLIMIT_NPROC`.
    pub user_processes: Limit,
    /// The tightest cgroup `pids.max` above us.
    pub cgroup_pids: Limit,
}

/// Clock.
#[derive(Debug, Clone, Serialize)]
pub struct Clock {
    /// `current_clocksource`.
    pub source: Option<String>,
    /// What one read of `CLOCK_MONOTONIC` cost just now, mean of a thousand, nanoseconds.
    pub read_ns: u64,
}

/// Idle behaviour.
#[derive(Debug, Clone, Serialize)]
pub struct Idle {
    /// `cpuidle/current_driver`.
    pub driver: Option<String>,
    /// States of CPU 0, shallow first.
    pub states: Vec<IdleState>,
    /// Whether we may hold wake-up latency down.
    pub pm_qos: PmQos,
}

/// One C-state.
#[derive(Debug, Clone, Serialize)]
pub struct IdleState {
    /// For example `C1`.
    pub name: String,
    /// Exit latency, microseconds, as the driver declares it.
    pub latency_us: u64,
}

/// `/dev/cpu_dma_latency`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PmQos {
    /// Could be opened for writing.
    Allowed,
    /// Is there, cannot be opened; `errno`.
    Refused(i32),
    /// Is not there.
    Absent,
}

/// TCP congestion control.
#[derive(Debug, Clone, Serialize)]
pub struct Tcp {
    /// The default for new sockets.
    pub in_force: Option<String>,
    /// Built in or loaded.
    pub available: Vec<String>,
    /// Usable without privilege.
    pub allowed: Vec<String>,
    /// Of those available, the ones that a socket of ours takes: tried.
    pub usable: Vec<String>,
    /// What a socket on loopback has when `praas-process --congestion auto` has set it: tried.
    pub auto_on_loopback: Option<String>,
}

/// Where we run.
#[derive(Debug, Clone, Serialize)]
pub struct Host {
    /// A hypervisor is below us (CPUID flag or firmware).
    pub virtual_machine: bool,
    /// What the firmware calls the machine.
    pub product: Option<String>,
    /// A container runtime is around us, as far as it shows.
    pub container: Option<String>,
}
