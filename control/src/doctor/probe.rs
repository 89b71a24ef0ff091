//! Fills [`Facts`] from the machine. Reads files and limits; what must be tried to be believed is in [`trial`].
//!
//! Nothing here fails: what cannot be read is `None`, and the judge says so.

use super::facts::{
    Clock, Cores, Facts, GroupsTrial, Host, Idle, IdleState, Kernel, Limit, Limits, Memory, PmQos, QueueLimits,
    Seccomp, Space, Tcp,
};
use super::trial;
use praas_dataplane::{Congestion, cgroup, confinement};
use rustix::fs::{Mode, OFlags};
use rustix::process::Resource;
use rustix::time::ClockId;
use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Looks at the machine we run on. Takes some milliseconds; changes nothing that stays.
#[must_use]
pub fn probe() -> Facts {
    let machine = Machine::at("/");
    Facts {
        kernel: kernel(),
        cores: cores(&machine),
        io_uring: trial::io_uring(),
        io_uring_disabled: machine.number("/proc/sys/kernel/io_uring_disabled"),
        seccomp: Seccomp { mode: machine.status("Seccomp"), filters: machine.status("Seccomp_filters") },
        queues: queues(&machine),
        memfd: trial::memfd(),
        shm_mount: shm_mount(),
        memory: Memory {
            total_bytes: machine.meminfo_bytes("MemTotal"),
            available_bytes: machine.meminfo_bytes("MemAvailable"),
            cgroup_bytes: cgroup::tightest(&machine.root, cgroup::MEMORY_BYTES),
        },
        limits: Limits {
            memlock_bytes: rlimit(Resource::Memlock),
            open_files: rlimit(Resource::Nofile),
            user_processes: rlimit(Resource::Nproc),
            cgroup_pids: cgroup::tightest(&machine.root, cgroup::PIDS).map_or(Limit::Unlimited, Limit::AtMost),
        },
        clock: clock(&machine),
        idle: idle(&machine),
        groups: groups(),
        shmem_huge_pages: machine
            .text("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
            .and_then(|text| chosen(&text)),
        tcp: tcp(&machine),
        host: host(&machine),
    }
}

/// A file tree to read facts from.
#[derive(Debug, Clone)]
struct Machine {
    root: PathBuf,
}

impl Machine {
    fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    fn path(&self, absolute: impl AsRef<Path>) -> PathBuf {
        let absolute = absolute.as_ref();
        self.root.join(absolute.strip_prefix("/").unwrap_or(absolute))
    }

    /// The file without surrounding white space; `None` when it cannot be read.
    fn text(&self, file: impl AsRef<Path>) -> Option<String> {
        let text = fs::read_to_string(self.path(file)).ok()?;
        Some(text.trim().to_owned())
    }

    fn number<N: FromStr>(&self, file: impl AsRef<Path>) -> Option<N> {
        self.text(file)?.parse().ok()
    }

    fn words(&self, file: impl AsRef<Path>) -> Vec<String> {
        let text = self.text(file).unwrap_or_default();
        text.split_whitespace().map(str::to_owned).collect()
    }

    /// The first word after `name:` in a file of such lines.
    fn field(&self, file: &str, name: &str) -> Option<String> {
        self.text(file)?.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            (key.trim() == name).then(|| value.split_whitespace().next().map(str::to_owned))?
        })
    }

    fn status(&self, name: &str) -> Option<u32> {
        self.field("/proc/self/status", name)?.parse().ok()
    }

    fn meminfo_bytes(&self, name: &str) -> Option<u64> {
        let kib: u64 = self.field("/proc/meminfo", name)?.parse().ok()?;
        Some(kib * 1024)
    }
}

fn tcp(machine: &Machine) -> Tcp {
    let available = machine.words("/proc/sys/net/ipv4/tcp_available_congestion_control");
    let is_usable = |name: &&String| name.parse().is_ok_and(|congestion: Congestion| congestion.check().is_ok());
    let auto = || {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        Congestion::Auto.apply(&listener, true)?;
        Congestion::of(&listener)
    };
    Tcp {
        in_force: machine.text("/proc/sys/net/ipv4/tcp_congestion_control"),
        usable: available.iter().filter(is_usable).cloned().collect(),
        available,
        allowed: machine.words("/proc/sys/net/ipv4/tcp_allowed_congestion_control"),
        auto_on_loopback: auto().ok(),
    }
}

/// The word in brackets: `always [madvise] never`.
fn chosen(text: &str) -> Option<String> {
    let (_, rest) = text.split_once('[')?;
    let (word, _) = rest.split_once(']')?;
    Some(word.to_owned())
}

fn kernel() -> Kernel {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    Kernel { version: version(&release), release }
}

fn version(release: &str) -> (u32, u32) {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

fn cores(machine: &Machine) -> Cores {
    let allowed = rustix::thread::sched_getaffinity(None)
        .map(|set| (0..rustix::thread::CpuSet::MAX_CPU).filter(|&cpu| set.is_set(cpu)).collect())
        .unwrap_or_default();
    Cores {
        allowed,
        online: machine.text("/sys/devices/system/cpu/online").and_then(|list| count_cpus(&list)),
        quota_millicores: cgroup::tightest(&machine.root, cgroup::CPU_MILLICORES),
    }
}

/// Counts a CPU list such as `0-3,8`.
fn count_cpus(list: &str) -> Option<usize> {
    list.split(',')
        .map(|range| {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            let (first, last) = (first.parse::<usize>().ok()?, last.parse::<usize>().ok()?);
            Some(last.checked_sub(first)? + 1)
        })
        .sum()
}

fn rlimit(resource: Resource) -> Limit {
    rustix::process::getrlimit(resource).current.map_or(Limit::Unlimited, Limit::AtMost)
}

/// Bit 24 of a capability mask: `CAP_SYS_RESOURCE`, `capability.h`.
const CAP_SYS_RESOURCE: u64 = 1 << 24;

fn queues(machine: &Machine) -> Option<QueueLimits> {
    let effective =
        machine.field("/proc/self/status", "CapEff").and_then(|mask| u64::from_str_radix(&mask, 16).ok()).unwrap_or(0);
    Some(QueueLimits {
        rlimit_bytes: rlimit(Resource::Msgqueue),
        messages_max: machine.number("/proc/sys/fs/mqueue/msg_max")?,
        message_bytes_max: machine.number("/proc/sys/fs/mqueue/msgsize_max")?,
        queues_max: machine.number("/proc/sys/fs/mqueue/queues_max")?,
        privileged: effective & CAP_SYS_RESOURCE != 0,
    })
}

fn shm_mount() -> Option<Space> {
    let stat = rustix::fs::statvfs("/dev/shm").ok()?;
    Some(Space { total_bytes: stat.f_blocks * stat.f_frsize, free_bytes: stat.f_bavail * stat.f_frsize })
}

fn clock(machine: &Machine) -> Clock {
    const READS: u64 = 1000;
    let now_ns = || {
        let now = rustix::time::clock_gettime(ClockId::Monotonic);
        // Monotonic time is never negative: it starts at boot.
        u64::try_from(now.tv_sec * 1_000_000_000 + now.tv_nsec).unwrap_or(0)
    };
    let start_ns = now_ns();
    let mut last_ns = start_ns;
    for _ in 0..READS {
        last_ns = std::hint::black_box(now_ns());
    }
    Clock {
        source: machine.text("/sys/devices/system/clocksource/clocksource0/current_clocksource"),
        read_ns: last_ns.saturating_sub(start_ns) / READS,
    }
}

fn groups() -> GroupsTrial {
    match confinement::trial() {
        Ok(confinement::Version::V1) => GroupsTrial::Works { version: 1 },
        Ok(confinement::Version::V2) => GroupsTrial::Works { version: 2 },
        Err(why) => GroupsTrial::Failed { why, is_root: rustix::process::geteuid().is_root() },
    }
}

fn idle(machine: &Machine) -> Idle {
    let states = (0..)
        .map_while(|state| {
            let folder = PathBuf::from(format!("/sys/devices/system/cpu/cpu0/cpuidle/state{state}"));
            Some(IdleState {
                name: machine.text(folder.join("name"))?,
                latency_us: machine.number(folder.join("latency"))?,
            })
        })
        .collect();
    // Opening asks for nothing yet: only a write sets a bound, and closing takes it back.
    let pm_qos = match rustix::fs::open("/dev/cpu_dma_latency", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty()) {
        Ok(_) => PmQos::Allowed,
        Err(rustix::io::Errno::NOENT) => PmQos::Absent,
        Err(errno) => PmQos::Refused(errno.raw_os_error()),
    };
    Idle { driver: machine.text("/sys/devices/system/cpu/cpuidle/current_driver"), states, pm_qos }
}

fn host(machine: &Machine) -> Host {
    let flags = machine.text("/proc/cpuinfo").unwrap_or_default();
    let product = ["sys_vendor", "product_name"]
        .iter()
        .filter_map(|name| machine.text(format!("/sys/class/dmi/id/{name}")))
        .filter(|word| !word.is_empty())
        .reduce(|all, word| format!("{all} {word}"));
    let container = [("/.dockerenv", "Docker"), ("/run/.containerenv", "Podman")]
        .iter()
        .find(|(file, _)| machine.path(file).exists())
        .map(|(_, name)| (*name).to_owned());
    Host {
        virtual_machine: machine.path("/sys/hypervisor/type").exists()
            || flags.lines().any(|line| line.starts_with("flags") && line.split(' ').any(|f| f == "hypervisor")),
        product,
        container,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn release_strings_give_two_numbers() {
        assert_eq!(version("6.18.44-custom-v657"), (6, 18));
        assert_eq!(version("5.4-rc1"), (5, 4));
        assert_eq!(version("unknown"), (0, 0));
    }

    #[test]
    fn cpu_lists_are_counted() {
        assert_eq!(count_cpus("0-1"), Some(2));
        assert_eq!(count_cpus("0,2-3,8"), Some(4));
        assert_eq!(count_cpus("3-1"), None);
        assert_eq!(count_cpus(""), None);
    }

    #[test]
    fn the_chosen_word_stands_in_brackets() {
        assert_eq!(chosen("always [never] deny").as_deref(), Some("never"));
        assert_eq!(chosen("always never"), None);
    }

    #[test]
    fn this_machine_has_at_least_one_core_and_a_kernel() {
        let facts = probe();
        assert!(!facts.cores.allowed.is_empty());
        assert!(facts.kernel.version > (2, 6));
    }
}
