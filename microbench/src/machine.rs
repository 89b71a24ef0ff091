//! What a number was measured on. No number stands without this beside it.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;
use std::time::Instant;

use anyhow::Result;
use serde::Serialize;

/// Contents of `machine.json`. Holds nothing that names the machine or a directory on it.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Machine {
    pub(crate) cpu_model: String,
    pub(crate) cores_online: usize,
    pub(crate) cores_allowed: Vec<usize>,
    /// Threads that share a core, 1 without SMT; a virtual machine may not tell the truth.
    pub(crate) threads_per_core: usize,
    pub(crate) cgroup_cpu_quota: String,
    pub(crate) governor: String,
    pub(crate) memory_mib: u64,
    pub(crate) kernel: String,
    pub(crate) mitigations: BTreeMap<String, String>,
    pub(crate) virtualised: bool,
    pub(crate) clock_source: String,
    /// What reading the clock costs; each sample contains one read.
    pub(crate) clock_read_ns: f64,
    pub(crate) queue_limits: String,
    pub(crate) tcp_congestion_default: String,
    pub(crate) tcp_congestion_used: String,
    pub(crate) rustc: String,
    pub(crate) build_profile: String,
    pub(crate) git_revision: String,
    /// Whether the work tree had uncommitted changes.
    pub(crate) git_dirty: Option<bool>,
    pub(crate) measured_on: String,
    pub(crate) command_lines: Vec<String>,
}

impl Machine {
    pub(crate) fn look(command_lines: Vec<String>) -> Result<Self> {
        let cpuinfo = read("/proc/cpuinfo");
        let field = |name: &str| {
            cpuinfo
                .lines()
                .find_map(|line| line.strip_prefix(name)?.trim_start().strip_prefix(':').map(str::trim))
                .unwrap_or("unknown")
                .to_owned()
        };
        let siblings: usize = field("siblings").parse().unwrap_or(1);
        let cores: usize = field("cpu cores").parse().unwrap_or(1);
        let mut mitigations = BTreeMap::new();
        if let Ok(entries) = fs::read_dir("/sys/devices/system/cpu/vulnerabilities") {
            for entry in entries.flatten() {
                let state = fs::read_to_string(entry.path()).unwrap_or_default();
                mitigations.insert(entry.file_name().to_string_lossy().into_owned(), state.trim().to_owned());
            }
        }
        let memory_kib = read("/proc/meminfo")
            .lines()
            .find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
        let mqueue = |name: &str| one_line(&format!("/proc/sys/fs/mqueue/{name}"));
        Ok(Self {
            cpu_model: field("model name"),
            cores_online: cpuinfo.lines().filter(|line| line.starts_with("processor")).count(),
            cores_allowed: crate::placement::startup_cores()?,
            threads_per_core: (siblings / cores.max(1)).max(1),
            cgroup_cpu_quota: one_line("/sys/fs/cgroup/cpu.max"),
            governor: one_line("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
            memory_mib: memory_kib.unwrap_or(0) / 1024,
            kernel: format!("{} {}", one_line("/proc/sys/kernel/ostype"), one_line("/proc/sys/kernel/osrelease")),
            mitigations,
            virtualised: cpuinfo.lines().any(|line| line.starts_with("flags") && line.contains(" hypervisor")),
            clock_source: one_line("/sys/devices/system/clocksource/clocksource0/current_clocksource"),
            clock_read_ns: clock_read_ns(),
            queue_limits: format!(
                "{} messages of {} B, {} queues",
                mqueue("msg_max"),
                mqueue("msgsize_max"),
                mqueue("queues_max")
            ),
            tcp_congestion_default: one_line("/proc/sys/net/ipv4/tcp_congestion_control"),
            tcp_congestion_used: crate::stream::CONGESTION_CONTROL.to_owned(),
            rustc: env!("PRAAS_RUSTC").to_owned(),
            build_profile: env!("PRAAS_PROFILE").to_owned(),
            git_revision: git(&["rev-parse", "HEAD"]).unwrap_or_else(|| "unknown".to_owned()),
            git_dirty: git(&["status", "--porcelain", "--untracked-files=no"]).map(|changes| !changes.is_empty()),
            measured_on: today(),
            command_lines,
        })
    }

    /// One line for the head of a report.
    pub(crate) fn sentence(&self) -> String {
        format!(
            "{}{}, {} of {} cores, {} MiB, {}, clock {} ({:.0} ns a read)",
            self.cpu_model,
            if self.virtualised { " (virtual machine)" } else { "" },
            self.cores_allowed.len(),
            self.cores_online,
            self.memory_mib,
            self.kernel,
            self.clock_source,
            self.clock_read_ns
        )
    }

    /// Short enough for a CSV column: no commas.
    pub(crate) fn platform(&self) -> String {
        let kind = if self.virtualised { "virtual machine" } else { "bare metal" };
        format!("{} {kind} {} cores", self.cpu_model.replace(',', " "), self.cores_allowed.len())
    }
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn one_line(path: &str) -> String {
    match fs::read_to_string(path) {
        Ok(text) => text.trim().to_owned(),
        Err(_) => "not shown by this machine".to_owned(),
    }
}

fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8(output.stdout).ok()?.trim().to_owned())
}

/// Date of today in UTC, year first.
pub(crate) fn today() -> String {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let (year, month, day) = civil(since.as_secs() / 86_400);
    format!("{year:04}-{month:02}-{day:02}")
}

/// Days since 1970-01-01 to a Gregorian date (the era-based algorithm of Hinnant, "chrono-Compatible Low-Level
/// Date Algorithms").
fn civil(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    (year_of_era + era * 400 + u64::from(month <= 2), month, day)
}

fn clock_read_ns() -> f64 {
    const READS: u32 = 200_000;
    let before = Instant::now();
    for _ in 0..READS {
        std::hint::black_box(Instant::now());
    }
    before.elapsed().as_nanos() as f64 / f64::from(READS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_become_dates_also_around_leap_days() {
        for (days, date) in [
            (0, (1970, 1, 1)),
            (11_016, (2000, 2, 29)),
            (11_017, (2000, 3, 1)),
            (19_782, (2024, 2, 29)),
            (20_453, (2025, 12, 31)),
        ] {
            assert_eq!(civil(days), date);
        }
    }

    #[test]
    fn the_machine_says_what_it_is_and_no_path_of_ours() {
        let machine = Machine::look(vec!["praas-bench floors".into()]).unwrap();
        let json = serde_json::to_string(&machine).unwrap();
        let here = std::env::current_dir().unwrap();
        assert!(!json.contains(here.to_str().unwrap()));
        assert!(!machine.cores_allowed.is_empty() && machine.clock_read_ns > 0.0);
    }
}
