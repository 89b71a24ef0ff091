//! From facts to findings: pure, so that every machine there is can be tried in a test.

use super::facts::{Cores, Facts, GroupsTrial, Host, Limit, MemfdTrial, PmQos, QueueLimits, Seccomp, Tcp, UringTrial};
use super::report::{Finding, Report};

/// Oldest kernel on which everything the process needs exists: `F_SEAL_FUTURE_WRITE` (5.1), `waitid(P_PIDFD)` (5.4),
/// `close_range` that marks instead of closing (5.11).
const KERNEL_OLDEST: (u32, u32) = (5, 11);

/// A participant of a process is the controller (0) or a worker (1..=63): design of the segment.
const WORKERS_MAX: u64 = 63;

/// The queue channel: two queues a worker, each of ten messages of 8192 bytes.
const QUEUES_PER_WORKER: u64 = 2;
const QUEUE_MESSAGES: u64 = 10;
const QUEUE_MESSAGE_BYTES: u64 = 8192;

/// What the kernel charges for one message besides its bytes: a `struct msg_msg` and a tree node of 48 bytes each on
/// a 64-bit machine; `getrlimit(2)` under `RLIMIT_MSGQUEUE`.
const QUEUE_MESSAGE_OVERHEAD_BYTES: u64 = 48 + 48;

/// What `RLIMIT_MSGQUEUE` is charged for one of our queues.
const QUEUE_CHARGED_BYTES: u64 = QUEUE_MESSAGES * (QUEUE_MESSAGE_BYTES + QUEUE_MESSAGE_OVERHEAD_BYTES);

/// File descriptors of the controller before any worker: standard streams, epoll, signals, listener, its own segment
/// and eventfd, and some room.
const OPEN_FILES_BASE: u64 = 16;

/// And for each worker: segment, eventfd, pidfd, control socket, what it prints (two), the report of its start, two queues in
/// queue mode, two for an exchange page on its way.
const OPEN_FILES_PER_WORKER: u64 = 11;

/// Enough for the controller, two workers and a few clients.
const OPEN_FILES_LEAST: u64 = OPEN_FILES_BASE + 2 * OPEN_FILES_PER_WORKER;

/// Below this, 63 workers and a thousand clients do not fit.
const OPEN_FILES_COMFORT: u64 = OPEN_FILES_BASE + WORKERS_MAX * OPEN_FILES_PER_WORKER + 1000;

/// OS processes: the controller and two workers.
const PIDS_LEAST: u64 = 3;
const PIDS_COMFORT: u64 = 1 + WORKERS_MAX;

/// A controller and two workers, before any page that users touch.
const MEMORY_LEAST_BYTES: u64 = 32 << 20;

/// The default quota of one arena.
const ARENA_BYTES: u64 = 256 << 20;

/// A read of the clock through the vDSO takes about 20-40 ns; a system call several hundred.
const CLOCK_SLOW_NS: u64 = 150;

/// Waking a core from a state this deep costs more than a blocked round trip does.
const IDLE_DEEP_US: u64 = 20;

/// Judges a machine. The order of the findings is the order in which they are printed.
#[must_use]
pub fn judge(facts: &Facts) -> Report {
    Report {
        findings: vec![
            kernel(facts),
            cores(&facts.cores),
            memfd(&facts.memfd),
            io_uring(facts),
            seccomp(facts.seccomp),
            queues(facts.queues),
            shm_mount(facts),
            memory(facts),
            memlock(facts),
            open_files(facts),
            pids(facts),
            worker_limits(&facts.groups),
            clock(facts),
            idle(facts),
            huge_pages(facts),
            congestion(&facts.tcp),
            host(&facts.host),
        ],
    }
}

fn kernel(facts: &Facts) -> Finding {
    let found = Finding::new("kernel", "kernel", &facts.kernel.release);
    let (major, minor) = KERNEL_OLDEST;
    if facts.kernel.version < KERNEL_OLDEST {
        return found
            .problem(format!("nothing: Linux {major}.{minor} is the oldest that has what a worker's start needs"))
            .change(format!("boot Linux {major}.{minor} or newer"));
    }
    found.ok("memfd seals, pidfds and close_range are all there")
}

fn cores(cores: &Cores) -> Finding {
    let allowed = cores.allowed.len();
    let quota = cores.quota_millicores.filter(|&m| m < 1000 * allowed as u64);
    let mut value = format!("{allowed} allowed ({})", ranges(&cores.allowed));
    if let Some(online) = cores.online.filter(|&online| online != allowed) {
        value += &format!(", {online} online");
    }
    if let Some(quota) = quota {
        value += &format!(", quota {}.{:03} cores", quota / 1000, quota % 1000);
    }
    let found = Finding::new("cores", "cores", value);
    // As the data plane counts them: a started core is a core.
    let usable = quota.map_or(allowed as u64, |m| m.div_ceil(1000));
    match (usable, quota) {
        (0, _) => found.note("nothing is pinned: the affinity mask could not be read, or the quota is zero"),
        (1, Some(_)) => found
            .note("nobody spins: a quota of one core would be spent on waiting; `--wait efficient` says so")
            .change("raise the quota, in Docker: `docker run --cpus 2 ...`"),
        (1, None) => found
            .note("nobody spins: two spinners on one core answer in milliseconds; `--wait efficient` says so")
            .change("give the process two cores: `taskset -c 0,1 praas-process ...`, or a larger machine"),
        (usable, Some(_)) => found
            .note(format!(
                "{usable} participants may spin at a time; a quota also cuts running code, seen as tails of tens of ms"
            ))
            .change("lift the quota and pin instead: `docker run --cpuset-cpus 0,1 ...`"),
        (usable, None) => found.ok(format!("{usable} participants may spin at a time; the others sleep")),
    }
}

/// CPU numbers as `0-3,8`.
fn ranges(cpus: &[usize]) -> String {
    let mut text = String::new();
    for run in cpus.chunk_by(|a, b| a + 1 == *b) {
        if !text.is_empty() {
            text.push(',');
        }
        text += &match run {
            [one] => one.to_string(),
            [first, .., last] => format!("{first}-{last}"),
            [] => continue,
        };
    }
    text
}

fn memfd(trial: &MemfdTrial) -> Finding {
    let found = |value: String| Finding::new("memfd", "memfd with seals", value);
    match *trial {
        MemfdTrial::Works => found("created, sealed, new writers refused".into())
            .ok("every participant's segment: one writer, the others read only"),
        MemfdTrial::Failed { step: "memfd_create", errno } if errno == EACCES => {
            found(format!("memfd_create: {}", errno_text(errno)))
                .problem("nothing: vm.memfd_noexec forbids a memfd without MFD_NOEXEC_SEAL")
                .change("sysctl -w vm.memfd_noexec=1")
        }
        MemfdTrial::Failed { step, errno } => found(format!("{step}: {}", errno_text(errno)))
            .problem("nothing: without sealed segments a worker could hurt the others")
            .change("boot Linux 5.11 or newer with CONFIG_MEMFD_CREATE, and allow memfd_create and fcntl(F_ADD_SEALS) in the seccomp profile"),
        MemfdTrial::NotSealed { step } => found(format!("{step} was not refused"))
            .problem("nothing: this kernel takes seals and does not keep them")
            .change("run on a Linux kernel rather than an emulation of one (gVisor: `docker run --runtime runc ...`)"),
    }
}

fn io_uring(facts: &Facts) -> Finding {
    let found = |value: String| Finding::new("io_uring", "io_uring", value);
    match facts.io_uring {
        UringTrial::Works { deferred: true } => {
            found("a no-op completed, deferred task work".into()).ok("io_uring (--reactor auto)")
        }
        UringTrial::Works { deferred: false } => found("a no-op completed, plain ring only".into())
            .note("epoll (--reactor auto); the io_uring reactor needs deferred task work")
            .change("Linux 6.1 or later"),
        UringTrial::Failed { step, errno } => {
            let (why, change) = why_no_ring(errno, facts.io_uring_disabled, facts.seccomp);
            found(format!("{step}: {}", errno_text(errno)))
                .note(format!("epoll (--reactor auto), which is no slower with few connections; {why}"))
                .change(change)
        }
    }
}

/// The likely reason for a refused ring, and its cure. Sources: `io_uring_setup(2)`, `sysctl/kernel.rst`.
fn why_no_ring(errno: i32, disabled: Option<u32>, seccomp: Seccomp) -> (String, &'static str) {
    const UNCONFINED: &str = "docker run --security-opt seccomp=unconfined ... (or a profile that allows io_uring_setup, io_uring_enter and io_uring_register)";
    let filtered = seccomp.mode == Some(2);
    match (errno, disabled) {
        (EPERM, Some(2)) => {
            ("kernel.io_uring_disabled=2 forbids it to everybody".into(), "sysctl -w kernel.io_uring_disabled=0")
        }
        (EPERM, Some(1)) => (
            "kernel.io_uring_disabled=1 forbids it outside kernel.io_uring_group".into(),
            "sysctl -w kernel.io_uring_disabled=0 (or join the group that kernel.io_uring_group names)",
        ),
        (EPERM | EACCES | ENOSYS, _) if filtered => {
            ("a seccomp filter refuses it, as Docker's and containerd's default profiles do".into(), UNCONFINED)
        }
        (EPERM | EACCES, _) => (
            "a security module (SELinux, AppArmor) or an outer sandbox refuses it".into(),
            "look for the refusal: journalctl -k -g 'avc|apparmor'",
        ),
        (ENOSYS, _) => ("this kernel was built without CONFIG_IO_URING".into(), "boot a kernel with CONFIG_IO_URING=y"),
        (ENOMEM, _) => ("kernels before 5.12 charge rings to the locked-memory limit".into(), "ulimit -l unlimited"),
        (EMFILE | ENFILE, _) => ("no file descriptor was left for it".into(), "ulimit -n 4096"),
        (errno, _) => (format!("the kernel answered {}", errno_text(errno)), "boot Linux 6.1 or newer"),
    }
}

fn seccomp(seccomp: Seccomp) -> Finding {
    let found = |value: &str| Finding::new("seccomp", "seccomp", value);
    match seccomp.mode {
        Some(0) => found("off").ok("all system calls"),
        Some(1) => found("strict mode")
            .problem("nothing: only read, write and exit are left")
            .change("start it outside the strict sandbox"),
        Some(2) => {
            let filters = seccomp.filters.map_or("filtered".into(), |n| format!("{n} filter(s)"));
            found(&filters).ok("what the filter allows; memfd and io_uring above were really tried under it")
        }
        Some(other) => found(&format!("mode {other}")).note("what it allows is not known here"),
        None => {
            found("not reported").note("/proc/self/status has no such line; memfd and io_uring above were really tried")
        }
    }
}

/// How many workers the queue channel can serve, and the limit that says so.
#[must_use]
pub fn queue_workers(limits: &QueueLimits) -> (u64, &'static str) {
    if !limits.privileged {
        if limits.messages_max < QUEUE_MESSAGES {
            return (0, "fs.mqueue.msg_max");
        }
        if limits.message_bytes_max < QUEUE_MESSAGE_BYTES {
            return (0, "fs.mqueue.msgsize_max");
        }
    }
    let by_bytes = limits.rlimit_bytes.holds(QUEUE_CHARGED_BYTES * QUEUES_PER_WORKER, WORKERS_MAX);
    let by_count = if limits.privileged {
        WORKERS_MAX
    } else {
        Limit::AtMost(limits.queues_max).holds(QUEUES_PER_WORKER, WORKERS_MAX)
    };
    if by_bytes <= by_count { (by_bytes, "RLIMIT_MSGQUEUE") } else { (by_count, "fs.mqueue.queues_max") }
}

fn queues(limits: Option<QueueLimits>) -> Finding {
    let found = |value: String| Finding::new("queues", "POSIX queues", value);
    let Some(limits) = limits else {
        return found("none".into())
            .note("`--ipc ring` only: this kernel has no POSIX queues")
            .change("boot a kernel with CONFIG_POSIX_MQUEUE=y, if you want `--ipc mq`");
    };
    let found = found(format!(
        "{} x {}, {} queues, {}",
        limits.messages_max,
        bytes(limits.message_bytes_max),
        limits.queues_max,
        limit_bytes(limits.rlimit_bytes),
    ));
    let (workers, limit) = queue_workers(&limits);
    let fits = format!("`--ipc mq` with up to {workers} workers, if nobody else of this user holds queues ({limit})");
    if workers >= WORKERS_MAX {
        return found.ok(format!("`--ipc mq` with up to {workers} workers"));
    }
    let change = match limit {
        "RLIMIT_MSGQUEUE" => "ulimit -q unlimited (in Docker: `docker run --ulimit msgqueue=-1 ...`)",
        "fs.mqueue.queues_max" => "sysctl -w fs.mqueue.queues_max=256",
        "fs.mqueue.msg_max" => "sysctl -w fs.mqueue.msg_max=10",
        _ => "sysctl -w fs.mqueue.msgsize_max=8192",
    };
    match workers {
        0 => found.note(format!("`--ipc ring` only: {limit} leaves no room for a worker's two queues")).change(change),
        1..4 => found.note(fits).change(change),
        _ => found.ok(fits),
    }
}

fn shm_mount(facts: &Facts) -> Finding {
    match facts.shm_mount {
        Some(space) => Finding::new(
            "dev_shm",
            "/dev/shm",
            format!("{} free of {}", bytes(space.free_bytes), bytes(space.total_bytes)),
        ),
        None => Finding::new("dev_shm", "/dev/shm", "not mounted"),
    }
    .ok("not used: segments are memfds, so its size does not limit them")
}

fn memory(facts: &Facts) -> Finding {
    let memory = facts.memory;
    let limit = match (memory.cgroup_bytes, memory.total_bytes) {
        (Some(limit), Some(total)) => Some(limit.min(total)),
        (limit, total) => limit.or(total),
    };
    let Some(limit) = limit else {
        return Finding::new("memory", "memory", "not reported").note("arenas grow to their quota, whatever there is");
    };
    let mut value = match memory.cgroup_bytes.filter(|&bytes| bytes == limit) {
        Some(limit) => format!("{} (cgroup limit)", bytes(limit)),
        None => bytes(limit),
    };
    if let Some(available) = memory.available_bytes {
        value += &format!(", {} available", bytes(available.min(limit)));
    }
    let found = Finding::new("memory", "memory", value);
    if limit < MEMORY_LEAST_BYTES {
        return found
            .problem(format!("nothing: a controller and two workers need {}", bytes(MEMORY_LEAST_BYTES)))
            .change("raise the memory limit, in Docker: `docker run --memory 256m ...`");
    }
    if limit < 2 * ARENA_BYTES {
        return found
            .note(format!(
                "segments grow as they are used; {} is less than two arenas filled to the default quota of {}",
                bytes(limit),
                bytes(ARENA_BYTES)
            ))
            .change("start with a smaller quota per participant: `--arena-bytes 67108864`");
    }
    found.ok(format!("arenas of up to {} each, taken only as they are touched", bytes(ARENA_BYTES)))
}

fn memlock(facts: &Facts) -> Finding {
    Finding::new("memlock", "locked memory", limit_bytes(facts.limits.memlock_bytes))
        .ok("not used: nothing is locked or registered with the kernel")
}

fn open_files(facts: &Facts) -> Finding {
    let limit = facts.limits.open_files;
    let found = Finding::new("open_files", "open files", limit_count(limit));
    if !limit.allows(OPEN_FILES_LEAST) {
        return found
            .problem(format!("nothing: a controller with two workers needs {OPEN_FILES_LEAST}"))
            .change("ulimit -n 4096");
    }
    if limit.allows(OPEN_FILES_COMFORT) {
        return found.ok(format!("{WORKERS_MAX} workers and a thousand clients fit"));
    }
    let Limit::AtMost(files) = limit else {
        return found.ok("no limit");
    };
    let workers = ((files - OPEN_FILES_BASE) / OPEN_FILES_PER_WORKER).min(WORKERS_MAX);
    found
        .note(format!("workers and clients share them: {workers} workers and no client, or fewer and more"))
        .change("ulimit -n 4096")
}

fn pids(facts: &Facts) -> Finding {
    let (limit, change) = if facts.limits.cgroup_pids <= facts.limits.user_processes {
        (facts.limits.cgroup_pids, "raise the cgroup's pids.max, in Docker: `docker run --pids-limit 256 ...`")
    } else {
        (facts.limits.user_processes, "ulimit -u 4096")
    };
    let found = Finding::new("pids", "OS processes", limit_count(limit));
    if !limit.allows(PIDS_LEAST) {
        found.problem(format!("nothing: a controller and two workers are {PIDS_LEAST}")).change(change)
    } else if !limit.allows(PIDS_COMFORT) {
        found.note(format!("fewer than {WORKERS_MAX} workers, what else runs here counted in")).change(change)
    } else {
        found.ok(format!("{WORKERS_MAX} workers fit"))
    }
}

fn worker_limits(trial: &GroupsTrial) -> Finding {
    let found = |value: String| Finding::new("worker_limits", "limits of workers", value);
    match trial {
        GroupsTrial::Works { version } => found(format!("control groups, version {version}"))
            .ok("a group a worker, for --worker-memory-max and --worker-processes-max"),
        GroupsTrial::Failed { why, is_root } => {
            let processes = if *is_root {
                "none of the processes of root, unless --worker-uids gives workers users of their own"
            } else {
                "one of all processes of this user"
            };
            found(why.clone())
                .note(format!("limits of each OS process instead: one of its private memory, and {processes}"))
                .change("systemd-run --user --scope -p Delegate=yes praas-process ... (in a container: have /sys/fs/cgroup writable)")
        }
    }
}

fn clock(facts: &Facts) -> Finding {
    let clock = &facts.clock;
    let source = clock.source.as_deref().unwrap_or("not reported");
    let found = Finding::new("clock", "clock", format!("{source}, {} ns a read", clock.read_ns));
    if clock.read_ns <= CLOCK_SLOW_NS {
        return found.ok("CLOCK_MONOTONIC for every deadline, read without a system call");
    }
    found
        .note("deadlines still hold; each read is a system call and shows in every latency measured")
        .change("echo tsc > /sys/devices/system/clocksource/clocksource0/current_clocksource (if available_clocksource lists it)")
}

fn idle(facts: &Facts) -> Finding {
    let idle = &facts.idle;
    let deepest = idle.states.iter().max_by_key(|state| state.latency_us);
    let value = match deepest {
        Some(state) => format!(
            "{}, deepest {} ({} us)",
            idle.driver.as_deref().unwrap_or("no driver"),
            state.name,
            state.latency_us
        ),
        None => "no states reported".into(),
    };
    let qos = match idle.pm_qos {
        PmQos::Allowed => "/dev/cpu_dma_latency writable".to_owned(),
        PmQos::Refused(errno) => format!("/dev/cpu_dma_latency: {}", errno_text(errno)),
        PmQos::Absent => "no /dev/cpu_dma_latency".to_owned(),
    };
    let found = Finding::new("idle", "idle states", format!("{value}; {qos}"));
    let halts = facts.host.virtual_machine || deepest.is_some_and(|s| s.latency_us >= IDLE_DEEP_US);
    match (idle.pm_qos, halts) {
        (PmQos::Allowed, _) => found.ok("held at 0 in `--wait latency`, so that a sleeping core wakes quickly"),
        (_, false) => found.ok("cores that wake quickly as they are"),
        (PmQos::Refused(_), true) => found
            .note("a blocked participant on another core wakes slowly; put those that talk on one core, or spin (`--wait latency`)")
            .change("chmod o+w /dev/cpu_dma_latency (in Docker: `docker run --device /dev/cpu_dma_latency ...`)"),
        (PmQos::Absent, true) => found
            .note("a blocked participant on another core wakes slowly; put those that talk on one core, or spin (`--wait latency`)")
            .change("boot with cpuidle.off=1 idle=poll on machines of your own; in a container: `docker run --device /dev/cpu_dma_latency ...`"),
    }
}

fn huge_pages(facts: &Facts) -> Finding {
    let found = |value: &str| Finding::new("huge_pages", "huge pages for memfds", value);
    match facts.shmem_huge_pages.as_deref() {
        Some(word @ ("always" | "within_size" | "advise" | "force")) => {
            found(word).ok("2 MiB pages where the kernel gives them")
        }
        Some(word) => found(word)
            .note("4 KiB pages: the first touch of large payloads costs more, recycled blocks do not")
            .change("echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled"),
        None => found("not compiled in").ok("4 KiB pages"),
    }
}

fn congestion(tcp: &Tcp) -> Finding {
    let in_force = tcp.in_force.as_deref().unwrap_or("not reported");
    let found = Finding::new(
        "congestion",
        "TCP congestion control",
        format!("{in_force} in force; available: {}", tcp.available.join(" ")),
    );
    let names = format!("`--congestion NAME` may be {}", tcp.usable.join(", "));
    let Some(here) = &tcp.auto_on_loopback else {
        return found
            .note(format!("no socket on loopback takes what `--congestion auto` gives it; {names}"))
            .change("praas-process --congestion system");
    };
    let why = if in_force == "bbr" { " (bbr would pace loopback)" } else { "" };
    found.ok(format!("{here} between ends on this host{why}, {in_force} with other hosts; {names}"))
}

fn host(host: &Host) -> Finding {
    let mut value = if host.virtual_machine { "virtual machine" } else { "no hypervisor seen" }.to_owned();
    if let Some(product) = &host.product {
        value += &format!(" ({product})");
    }
    if let Some(container) = &host.container {
        value += &format!(", in {container}");
    }
    let found = Finding::new("host", "host", value);
    if host.virtual_machine {
        return found.note("waking a halted virtual core costs tens of microseconds, and neighbours steal time: compare only figures of one run");
    }
    found.ok("measured figures are the machine's own")
}

/// `errno` values the reasoning above distinguishes: `errno(3)`, the same on every Linux architecture we build for.
const EPERM: i32 = 1;
const ENOMEM: i32 = 12;
const EACCES: i32 = 13;
const ENFILE: i32 = 23;
const EMFILE: i32 = 24;
const ENOSYS: i32 = 38;

fn errno_text(errno: i32) -> String {
    std::io::Error::from_raw_os_error(errno).to_string()
}

fn limit_bytes(limit: Limit) -> String {
    match limit {
        Limit::AtMost(most) => bytes(most),
        Limit::Unlimited => "unlimited".into(),
    }
}

fn limit_count(limit: Limit) -> String {
    match limit {
        Limit::AtMost(most) => most.to_string(),
        Limit::Unlimited => "unlimited".into(),
    }
}

/// Bytes with a binary unit, rounded down to one decimal where it is not whole.
fn bytes(count: u64) -> String {
    let (mut unit_bytes, mut unit) = (1_u64, "B");
    for next in ["KiB", "MiB", "GiB", "TiB"] {
        if count < unit_bytes * 1024 {
            break;
        }
        (unit_bytes, unit) = (unit_bytes * 1024, next);
    }
    let whole = count / unit_bytes;
    match count % unit_bytes * 10 / unit_bytes {
        0 => format!("{whole} {unit}"),
        tenths => format!("{whole}.{tenths} {unit}"),
    }
}

#[cfg(test)]
#[path = "judge_tests.rs"]
mod tests;
