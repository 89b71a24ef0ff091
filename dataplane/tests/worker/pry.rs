//! A function of the test worker that tries to get at the memory of other processes.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use praas_dataplane::{Failure, Worker};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open, test_kill_process};

/// Descriptors that are tried.
const DESCRIPTORS: i32 = 64;

/// `pry PID`: what a worker that is not it can have of that process: words out of `memory signal descriptor file written cut`.
pub(crate) fn register(worker: Worker) -> Worker {
    worker.function("pry", |context, input| {
        let pid: u32 = String::from_utf8_lossy(&input).parse().map_err(|_| Failure::new(-22, "no number"))?;
        if std::process::id() == pid {
            return Ok(context.invoke("pry", &*input)?.into());
        }
        Ok(pry(pid.cast_signed()).join(" ").into())
    })
}

fn pry(number: i32) -> Vec<&'static str> {
    let pid = Pid::from_raw(number).expect("not zero");
    let mut had = Vec::new();
    let memory = OpenOptions::new().read(true).write(true).open(format!("/proc/{number}/mem"));
    had.extend(memory.is_ok().then_some("memory"));
    had.extend(test_kill_process(pid).is_ok().then_some("signal"));
    if let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) {
        let stolen = (0..DESCRIPTORS).any(|fd| pidfd_getfd(&pidfd, fd, PidfdGetfdFlags::empty()).is_ok());
        had.extend(stolen.then_some("descriptor"));
    }
    let opened: Vec<File> = memory_files(number).into_iter().filter_map(open).collect();
    had.extend((!opened.is_empty()).then_some("file"));
    had.extend(opened.iter().any(|file| file.write_at(b"x", 4096).is_ok()).then_some("written"));
    had.extend(opened.iter().any(|file| file.set_len(1).is_ok()).then_some("cut"));
    had
}

/// Memory files that a process has open, sealed or not.
fn memory_files(pid: i32) -> Vec<PathBuf> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten().map(|entry| entry.path());
    entries.filter(|path| fs::read_link(path).is_ok_and(|link| link.to_string_lossy().starts_with("/memfd:"))).collect()
}

fn open(path: PathBuf) -> Option<File> {
    OpenOptions::new().read(true).write(true).open(path).ok()
}
