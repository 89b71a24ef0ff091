//! Ends the process under test when we no longer can: a process of its own that sleeps until this one is gone, however it went.
//!
//! A signal that ends us runs no destructor, and a process under test that is left alone keeps its port, its memory and, between
//! namespaces, those too.

use std::io::Read;
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// Name of the hidden subcommand.
pub(crate) const SUBCOMMAND: &str = "keeper";

/// How long the process may take to end by itself: as long as it is given to finish calls, and a little.
const PATIENCE: Timespec = Timespec { tv_sec: 6, tv_nsec: 0 };

/// Dropping it tells that its process has ended.
#[derive(Debug)]
pub(crate) struct Keeper {
    child: Child,
}

impl Keeper {
    pub(crate) fn of(pid: u32) -> Result<Self> {
        let program = std::env::current_exe().context("where is praas-bench?")?;
        let mut command = Command::new(program);
        command.args([SUBCOMMAND, &pid.to_string()]).stdin(Stdio::piped()).stdout(Stdio::null());
        Ok(Self { child: command.spawn().context("start the keeper of the process under test")? })
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

/// The hidden subcommand: sleeps until its standard input ends, then makes the process end.
pub(crate) fn run(pid: u32) -> Result<()> {
    let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { bail!("{pid} is no pid") };
    // Already gone is fine: there is nothing to keep.
    let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else { return Ok(()) };
    let mut nothing = [0];
    let _ = std::io::stdin().read(&mut nothing);
    if pidfd_send_signal(&process, Signal::TERM).is_err() {
        return Ok(());
    }
    let mut fds = [PollFd::from_borrowed_fd(process.as_fd(), PollFlags::IN)];
    if poll(&mut fds, Some(&PATIENCE))? == 0 {
        let _ = pidfd_send_signal(&process, Signal::KILL);
    }
    Ok(())
}
