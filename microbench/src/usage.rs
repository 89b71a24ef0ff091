//! What other processes use: processor time, memory, system calls.
//!
//! Processor time comes from `/proc/PID/stat`, in ticks of 10 ms of what the scheduler has counted exactly, so it wants a
//! second or so. System calls are counted by `perf stat`, which hardly disturbs, else by `strace -c`, which slows every
//! one of them; either way in a pass of its own that no time is taken from.

use std::fs::{self, DirBuilder};
use std::io::{BufRead, BufReader};
use std::os::fd::AsFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::process::{Pid, Signal, kill_process};

/// How long a counter may take to attach and to answer.
const PATIENCE: Timespec = Timespec { tv_sec: 5, tv_nsec: 0 };

/// Memory of a process in KiB.
#[derive(Copy, Clone, Debug, Default, PartialEq)]
pub(crate) struct Memory {
    pub(crate) resident_kib: u64,
    pub(crate) proportional_kib: u64,
}

/// A process and its child processes.
pub(crate) fn family(pid: u32) -> Result<Vec<u32>> {
    let mut found = vec![pid];
    for task in fs::read_dir(format!("/proc/{pid}/task")).context("is the process still there?")?.flatten() {
        let text = fs::read_to_string(task.path().join("children")).context("list workers")?;
        found.extend(text.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
    }
    Ok(found)
}

/// User and system time of some processes so far, in seconds.
pub(crate) fn processor_seconds(pids: &[u32]) -> Result<f64> {
    let mut sum = 0;
    for pid in pids {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).with_context(|| format!("process {pid} is gone"))?;
        sum += parse_ticks(&stat).with_context(|| format!("/proc/{pid}/stat makes no sense"))?;
    }
    Ok(sum as f64 / rustix::param::clock_ticks_per_second() as f64)
}

/// User plus system time, fields 14 and 15 of proc_pid_stat(5). The name in field 2 may hold anything, brackets too.
fn parse_ticks(stat: &str) -> Option<u64> {
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    Some(fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?)
}

/// Memory of some processes together.
pub(crate) fn memory(pids: &[u32]) -> Result<Memory> {
    let mut sum = Memory::default();
    for pid in pids {
        let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).context("read a process's memory")?;
        let one = parse_rollup(&rollup).context("a process's memory makes no sense")?;
        sum.resident_kib += one.resident_kib;
        sum.proportional_kib += one.proportional_kib;
    }
    Ok(sum)
}

fn parse_rollup(text: &str) -> Option<Memory> {
    let field = |name: &str| {
        text.lines().find_map(|line| line.strip_prefix(name)?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok())
    };
    Some(Memory { resident_kib: field("Rss:")?, proportional_kib: field("Pss:")? })
}

/// A program that counts system calls here.
#[derive(Copy, Clone, Debug, Eq, PartialEq)]
pub(crate) enum Tool {
    Perf,
    Strace,
}

impl Tool {
    /// The first that works; tried, because a container may have the program and not the right.
    pub(crate) fn find() -> Option<Self> {
        let runs = |program: &str, arguments: &[&str]| {
            let mut command = Command::new(program);
            command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
            command.output().ok().filter(|done| done.status.success())
        };
        let counted = runs("perf", &["stat", "-x,", "-e", PERF_EVENT, "--", "true"]);
        if counted.is_some_and(|done| parse_perf(&String::from_utf8_lossy(&done.stderr)).is_some()) {
            return Some(Tool::Perf);
        }
        runs("strace", &["-c", "-qq", "--", "true"]).map(|_| Tool::Strace)
    }
}

const PERF_EVENT: &str = "raw_syscalls:sys_enter";

/// A running count of system calls.
#[derive(Debug)]
pub(crate) struct SystemCalls {
    tool: Tool,
    child: Child,
    folder: PathBuf,
}

impl SystemCalls {
    /// Counts from now on: all threads of some processes, or one thread.
    pub(crate) fn count(tool: Tool, whom: Whom<'_>) -> Result<Self> {
        let folder = std::env::temp_dir().join(format!("praas-bench-count-{:016x}", getrandom::u64()?));
        DirBuilder::new().mode(0o700).create(&folder).context("a folder to count system calls in")?;
        let ids: Vec<String> = match whom {
            Whom::Processes(pids) => pids.iter().map(u32::to_string).collect(),
            Whom::Thread(tid) => vec![tid.to_string()],
        };
        let out = folder.join("count");
        let mut command = match tool {
            Tool::Perf => {
                for name in ["orders", "acks"] {
                    rustix::fs::mknodat(rustix::fs::CWD, folder.join(name), FileType::Fifo, Mode::RWXU, 0)
                        .context("a pipe for perf")?;
                }
                let mut command = Command::new("perf");
                command.args(["stat", "-x,", "-D", "-1", "-e", PERF_EVENT]);
                command.arg(match whom {
                    Whom::Processes(_) => "-p",
                    Whom::Thread(_) => "-t",
                });
                command.arg(ids.join(","));
                let pipes = [folder.join("orders"), folder.join("acks")];
                command.arg(format!("--control=fifo:{},{}", pipes[0].display(), pipes[1].display()));
                command.arg("-o").arg(&out);
                command
            }
            Tool::Strace => {
                let mut command = Command::new("strace");
                command.args(["-c", "-o"]).arg(&out);
                if matches!(whom, Whom::Processes(_)) {
                    command.arg("-f");
                }
                for id in &ids {
                    command.args(["-p", id]);
                }
                command
            }
        };
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn();
        let child = child.with_context(|| format!("start {tool:?}"))?;
        let mut counting = Self { tool, child, folder };
        match tool {
            Tool::Perf => counting.order("enable\n")?,
            Tool::Strace => counting.wait_for_strace(ids.len())?,
        }
        Ok(counting)
    }

    /// Gives perf an order and waits until it is carried out.
    fn order(&self, text: &str) -> Result<()> {
        // Both ends at once: opening one alone would wait for perf.
        let open = |name: &str| {
            rustix::fs::open(self.folder.join(name), OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
                .context("open a pipe to perf")
        };
        let (orders, acks) = (open("orders")?, open("acks")?);
        rustix::io::write(&orders, text.as_bytes()).context("tell perf")?;
        let mut fds = [PollFd::from_borrowed_fd(acks.as_fd(), PollFlags::IN)];
        ensure!(poll(&mut fds, Some(&PATIENCE))? == 1, "perf does not answer `{}` within 5 s", text.trim());
        let mut ack = [0; 16];
        let got = rustix::io::read(&acks, &mut ack)?;
        ensure!(ack[..got].starts_with(b"ack"), "perf answers {:?}", String::from_utf8_lossy(&ack[..got]));
        Ok(())
    }

    fn wait_for_strace(&mut self, targets: usize) -> Result<()> {
        let mut said = BufReader::new(self.child.stderr.take().context("strace has no stderr")?);
        let mut line = String::new();
        for _ in 0..targets {
            line.clear();
            said.read_line(&mut line)?;
            ensure!(line.contains("attached"), "strace: {}", line.trim());
        }
        // Held open: strace writes a line for each process it lets go.
        self.child.stderr = Some(said.into_inner());
        Ok(())
    }

    /// Ends the count; how many there were.
    pub(crate) fn end(mut self) -> Result<u64> {
        if self.tool == Tool::Perf {
            self.order("disable\n")?;
        }
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).context("a pid")?;
        kill_process(pid, Signal::INT)?;
        self.child.wait()?;
        let text = fs::read_to_string(self.folder.join("count")).context("read the count")?;
        match self.tool {
            Tool::Perf => parse_perf(&text),
            Tool::Strace => parse_strace(&text),
        }
        .with_context(|| format!("{:?} counted nothing: {}", self.tool, text.trim()))
    }
}

impl Drop for SystemCalls {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// Whose system calls.
#[derive(Copy, Clone, Debug)]
pub(crate) enum Whom<'a> {
    Processes(&'a [u32]),
    Thread(u32),
}

/// The first field of the line of our event, of `perf stat -x,`.
fn parse_perf(text: &str) -> Option<u64> {
    text.lines().find(|line| line.contains(PERF_EVENT))?.split(',').next()?.parse().ok()
}

/// The number of calls in the last line of `strace -c`: `100.00 0.001234 12 100 3 total`, errors only if there were any.
fn parse_strace(text: &str) -> Option<u64> {
    let line = text.lines().rev().find(|line| line.trim_end().ends_with("total"))?;
    line.split_whitespace().nth(3)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_found_behind_a_name_with_brackets() {
        let stat = "7 (a) b) S 1 7 7 0 -1 0 1 2 3 4 150 25 0 0 20 0 1 0 5 6 7";
        assert_eq!(parse_ticks(stat), Some(175));
        assert_eq!(parse_ticks("nonsense"), None);
    }

    #[test]
    fn memory_is_read_with_and_without_sharing() {
        let text = "0000-1111 ---p [rollup]\nRss:    2048 kB\nPss:     512 kB\nPss_Dirty: 1 kB\n";
        assert_eq!(parse_rollup(text), Some(Memory { resident_kib: 2048, proportional_kib: 512 }));
    }

    #[test]
    fn counts_are_read_as_the_tools_write_them() {
        assert_eq!(parse_perf("# started on\n\n144,,raw_syscalls:sys_enter,1443557,100.00,,\n"), Some(144));
        assert_eq!(parse_perf("<not counted>,,raw_syscalls:sys_enter,0,0.00,,\n"), None);
        let strace = "% time seconds usecs/call calls errors syscall\n 60.00 0.1 1 30 2 read\n------ ----\n100.00 0.10 1 39 2 total\n";
        assert_eq!(parse_strace(strace), Some(39));
    }

    /// Oracle: a thread that makes a known number of them.
    #[test]
    fn as_many_calls_are_counted_as_are_made() {
        let Some(tool) = Tool::find() else { return println!("skipped: needs perf or strace") };
        let tid = rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned();
        let counting = match SystemCalls::count(tool, Whom::Thread(tid)) {
            Ok(counting) => counting,
            Err(error) => return println!("skipped: needs the right to count ({error:#})"),
        };
        for _ in 0..5_000 {
            rustix::thread::sched_yield();
        }
        let counted = counting.end().unwrap();
        assert!((5_000..5_100).contains(&counted), "{counted}");
    }
}
