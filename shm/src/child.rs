//! Children: OS processes that we start, watch through a pidfd, and that do not outlive us.
//!
//! A child is born into its own process group, with `PR_SET_PDEATHSIG` = SIGKILL, so that it dies with the *thread* that
//! spawned it: spawn from a thread that lives as long as the process. Whatever the child forked goes with it, because
//! reaping a child first kills its group (W8). The pidfd makes its death an event, and its number safe from reuse.
//!
//! Between `fork` and `exec` the child makes system calls and nothing else: other threads may have held any lock at the
//! moment of the fork, the heap's included, so everything that needs memory is made before. What bounds the child (control
//! groups, limits) is in force before its program runs, so that nothing it starts was ever without.

use std::ffi::{CString, OsString, c_char};
use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use rustix::process::{Pid, PidfdFlags, Resource, Rlimit, Signal, WaitId, WaitIdOptions, WaitIdStatus};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Threads of a child that are moved with it: how many it has is its own choice, and whoever moves them waits for it.
const THREADS_MAX: usize = 256;

/// The descriptor on which a child finds its control socket.
pub const CONTROL_FD: i32 = 3;

/// What to start.
#[derive(Debug)]
pub struct Spawn<'a> {
    /// The program's path; `PATH` is not searched.
    pub program: &'a Path,
    /// Its arguments, without its name.
    pub args: &'a [OsString],
    /// Becomes descriptor 3 of the child; 0 is inherited, everything but that and its output is closed.
    pub control: BorrowedFd<'a>,
    /// The cores it may run on, from its first instruction; `None`: those of this thread.
    pub cpus: Option<&'a [usize]>,
    /// The user, and the group of the same number, that it runs as, without supplementary groups; `None`: ours. Needs the right to become
    /// somebody else (CAP_SETUID, CAP_SETGID), and to end it the right to signal them (CAP_KILL).
    pub user: Option<u32>,
    /// Become descriptors 1 and 2 of the child; `None`: ours are inherited.
    pub output: Option<[BorrowedFd<'a>; 2]>,
    /// What keeps it within bounds.
    pub bounds: Bounds<'a>,
}

/// What a child may take of the machine. The default bounds nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Bounds<'a> {
    /// The `cgroup.procs` files, open for writing, of the control groups that it enters. Entering takes the kernel a grace period
    /// of RCU: 11 to 18 ms where it was measured.
    pub groups: &'a [BorrowedFd<'a>],
    /// `RLIMIT_DATA`, bytes: its private writable memory. Shared mappings, as segments are, do not count (`getrlimit(2)`).
    pub data_bytes_max: Option<u64>,
    /// `RLIMIT_NPROC`: processes and threads of its *user*, all over the machine; root is not bound by it.
    pub user_processes_max: Option<u64>,
    /// `oom_score_adj`, -1000 to 1000, higher goes first: whom the kernel kills when memory runs out. Raising it takes no privilege.
    /// Without /proc it stays what it is.
    pub oom_score_adj: Option<i16>,
}

/// How a child ended.
#[derive(Copy, Clone, Eq, PartialEq, Debug)]
pub enum Exit {
    /// It called `exit`.
    Code(i32),
    /// A signal killed it.
    Signal(i32),
}

/// A running or ended child. Dropping it kills it, with its group, and waits for the end.
#[derive(Debug)]
pub struct Child {
    pid: Pid,
    pidfd: OwnedFd,
    exit: Option<Exit>,
    /// Brings the number of the error that kept it from its program; ends with the exec.
    report: OwnedFd,
}

impl<'a> Spawn<'a> {
    /// A child without further wishes: any core, our own user and output, no bounds.
    #[must_use]
    pub fn new(program: &'a Path, args: &'a [OsString], control: BorrowedFd<'a>) -> Self {
        Spawn { program, args, control, cpus: None, user: None, output: None, bounds: Bounds::default() }
    }

    /// Starts the child. When this returns, `exec` has succeeded.
    ///
    /// Blocks for the fork and the exec: about a millisecond, and longer if it enters control groups. Call it from a thread that
    /// lives as long as the process.
    ///
    /// # Errors
    /// As [`Spawn::begin`] and [`Child::exec_error`].
    pub fn spawn(&self) -> io::Result<Child> {
        let child = self.begin()?;
        match child.exec_error() {
            Some(error) => Err(error),
            None => Ok(child),
        }
    }

    /// Starts the child and does not wait for its `exec`: when that fails the child ends, and [`Child::exec_error`] says why.
    ///
    /// Blocks for the fork. Call it from a thread that lives as long as the process.
    ///
    /// # Errors
    /// What failed: preparing or `fork`.
    pub fn begin(&self) -> io::Result<Child> {
        let program = c_string(self.program.as_os_str().as_bytes().to_vec())?;
        let mut argv_owned = vec![program.clone()];
        for argument in self.args {
            argv_owned.push(c_string(argument.as_bytes().to_vec())?);
        }
        let envp_owned = std::env::vars_os()
            .map(|(mut name, value)| {
                name.push("=");
                name.push(value);
                c_string(name.into_vec())
            })
            .collect::<io::Result<Vec<_>>>()?;
        let (argv, envp) = (pointers(&argv_owned), pointers(&envp_owned));
        let cpus = self.cpus.map(cpu_set).transpose()?;
        let oom_score_adj = self.bounds.oom_score_adj.map(|score| score.to_string());
        // Out of the way of 1, 2 and 3, which are about to be replaced in the child.
        let above = |fd: BorrowedFd<'_>| rustix::io::fcntl_dupfd_cloexec(fd, CONTROL_FD + 1);
        let output = match self.output {
            Some([out, err]) => Some([above(out)?, above(err)?]),
            None => None,
        };
        let (report, low) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        let report_in_child = above(low.as_fd())?;
        // Or the pipe would never end.
        drop(low);
        let plan = Plan {
            program: program.as_ptr(),
            argv: argv.as_ptr(),
            envp: envp.as_ptr(),
            control: self.control.as_raw_fd(),
            report: report_in_child.as_raw_fd(),
            cpus: cpus.as_ref(),
            user: self.user,
            output: output.as_ref(),
            bounds: &self.bounds,
            oom_score_adj: oom_score_adj.as_deref(),
            parent: rustix::process::getpid(),
        };

        let signals = block_all_signals();
        // SAFETY:
        // - in bounds: no memory is passed.
        // - unshared, unique: the child has a copy of this thread only; `Plan::run` reads what was prepared above, of
        //   which that copy is the child's own, makes system calls and never returns.
        let forked = unsafe { libc::fork() };
        if forked == 0 {
            plan.run();
        }
        let fork_error = io::Error::last_os_error();
        restore_signals(&signals);
        let Some(pid) = Pid::from_raw(forked).filter(|_| forked > 0) else {
            return Err(fork_error);
        };
        drop(report_in_child);
        // As the child does itself, whoever is first: a signal to its group finds it from now on. Refused after the exec, when it is done.
        let _ = rustix::process::setpgid(Some(pid), Some(pid));
        // The child is not reaped before we do it, so the number is still its own. Until it has a pidfd it is a bare
        // number; on failure it must not stay behind.
        let pidfd = match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => pidfd,
            Err(error) => {
                let _ = rustix::process::kill_process(pid, Signal::KILL);
                let _ = rustix::process::waitid(WaitId::Pid(pid), WaitIdOptions::EXITED);
                return Err(error.into());
            }
        };
        Ok(Child { pid, pidfd, exit: None, report })
    }
}

/// What the child does before `exec`: plain words and pointers to what the parent prepared.
struct Plan<'a> {
    program: *const c_char,
    argv: *const *const c_char,
    envp: *const *const c_char,
    control: i32,
    report: i32,
    cpus: Option<&'a CpuSet>,
    user: Option<u32>,
    output: Option<&'a [OwnedFd; 2]>,
    bounds: &'a Bounds<'a>,
    oom_score_adj: Option<&'a str>,
    parent: Pid,
}

impl Plan<'_> {
    /// Runs in the child. Allocates nothing, takes no lock, does not return.
    fn run(&self) -> ! {
        let error = self.exec();
        // SAFETY: in bounds: four bytes of a local. Unshared, unique: it is ours.
        unsafe { libc::write(self.report, (&raw const error).cast(), size_of::<i32>()) };
        // SAFETY: ends this process without running anybody's exit handlers.
        unsafe { libc::_exit(127) }
    }

    /// Returns the error number if it returns.
    #[allow(clippy::multiple_unsafe_ops_per_block, reason = "one chain of system calls, one argument for all")]
    fn exec(&self) -> i32 {
        // SAFETY: system calls of a single-threaded process.
        // - in bounds: all pointers are to locals here or to what `spawn` prepared, null-terminated, alive in this copy.
        // - unshared, unique: after the fork this address space is ours alone.
        unsafe {
            if libc::setpgid(0, 0) != 0 {
                return errno();
            }
            // While we may: another user may not.
            if let Err(error) = self.enter_bounds() {
                return error.raw_os_error();
            }
            // Not by glibc's functions, which ask all threads they know of, and wait for their locks. Before the next step: who becomes
            // somebody else loses its death signal.
            if let Some(user) = self.user {
                let no_groups = std::ptr::null::<libc::gid_t>();
                if libc::syscall(libc::SYS_setgroups, 0, no_groups) != 0
                    || libc::syscall(libc::SYS_setresgid, user, user, user) != 0
                    || libc::syscall(libc::SYS_setresuid, user, user, user) != 0
                {
                    return errno();
                }
            }
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                return errno();
            }
            // The parent may have died before the line above: then nobody will kill us, and we must not live (C4).
            if libc::getppid() != self.parent.as_raw_nonzero().get() {
                return libc::ESRCH;
            }
            if let Some(cpus) = self.cpus
                && let Err(error) = sched_setaffinity(None, cpus)
            {
                return error.raw_os_error();
            }
            if self.control == CONTROL_FD {
                if libc::fcntl(CONTROL_FD, libc::F_SETFD, 0) != 0 {
                    return errno();
                }
            } else if libc::dup2(self.control, CONTROL_FD) != CONTROL_FD {
                return errno();
            }
            // After the control socket: where our own output is closed, that may have its number.
            for (to, from) in (1..).zip(self.output.into_iter().flatten()) {
                if libc::dup2(from.as_raw_fd(), to) != to {
                    return errno();
                }
            }
            // Closed by the exec, not now: the report pipe is among them and must tell of a failing exec.
            if libc::syscall(libc::SYS_close_range, CONTROL_FD + 1, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) != 0 {
                return errno();
            }
            // Dispositions of the parent end here, ignored signals included (Rust ignores SIGPIPE).
            let mut default: libc::sigaction = MaybeUninit::zeroed().assume_init();
            default.sa_sigaction = libc::SIG_DFL;
            for signal in 1..=64 {
                // Fails for SIGKILL, SIGSTOP and the two that glibc keeps; rightly.
                libc::sigaction(signal, &raw const default, std::ptr::null_mut());
            }
            let mut none: libc::sigset_t = MaybeUninit::zeroed().assume_init();
            libc::sigemptyset(&raw mut none);
            if libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut()) != 0 {
                return errno();
            }
            libc::execve(self.program, self.argv, self.envp);
            errno()
        }
    }
}

impl Plan<'_> {
    /// System calls only, as all of the plan.
    fn enter_bounds(&self) -> rustix::io::Result<()> {
        for group in self.bounds.groups {
            // Zero is whoever writes it.
            rustix::io::write(group, b"0")?;
        }
        if let Some(score) = self.oom_score_adj {
            let flags = rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::CLOEXEC;
            if let Ok(file) = rustix::fs::open(c"/proc/self/oom_score_adj", flags, rustix::fs::Mode::empty()) {
                // Where that is forbidden it stays what it is.
                let _ = rustix::io::write(&file, score.as_bytes());
            }
        }
        let Bounds { data_bytes_max, user_processes_max, .. } = *self.bounds;
        for (resource, most) in [(Resource::Data, data_bytes_max), (Resource::Nproc, user_processes_max)] {
            if most.is_some() {
                // Never above what we are bound by ourselves, which takes a privilege.
                let ours = rustix::process::getrlimit(resource).maximum;
                let most = ours.map_or(most, |ours| most.map(|most| most.min(ours)));
                rustix::process::setrlimit(resource, Rlimit { current: most, maximum: most })?;
            }
        }
        Ok(())
    }
}

/// The calling thread's error number, without `io::Error`.
fn errno() -> i32 {
    // SAFETY: no memory is passed.
    let location = unsafe { libc::__errno_location() };
    // SAFETY: in bounds, unshared, unique: glibc gives the address of this thread's own number.
    unsafe { *location }
}

impl Child {
    /// The number of the process. It stays the child's own until it is reaped.
    pub fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// Has the child's first thread run on these cores only, from now on, and those of its threads that had the same cores: they inherited
    /// them. A thread that starts meanwhile may stay where the others were, and so do all beyond 256. Reads /proc: tens of
    /// microseconds, and a microsecond more a thread.
    ///
    /// # Errors
    /// As [`pin_current`].
    pub fn pin(&self, cpus: &[usize]) -> io::Result<()> {
        let cpus = cpu_set(cpus)?;
        let were = sched_getaffinity(Some(self.pid))?;
        sched_setaffinity(Some(self.pid), &cpus)?;
        // Without /proc it has to do with its first thread.
        let threads = fs::read_dir(format!("/proc/{}/task", self.pid())).into_iter().flatten().flatten();
        for thread in threads.take(THREADS_MAX) {
            let thread = thread.file_name().to_str().and_then(|name| Pid::from_raw(name.parse().ok()?));
            if sched_getaffinity(thread).is_ok_and(|are| thread.is_some() && are == were) {
                // It may have ended.
                let _ = sched_setaffinity(thread, &cpus);
            }
        }
        Ok(())
    }

    /// Why it never ran its program, by the number of the error: of its bounds, user, affinity, descriptors or `exec`. `None`: it does, or did.
    /// Waits for the exec; does not block when the child is known to have ended.
    pub fn exec_error(&self) -> Option<io::Error> {
        let mut errno = [0; 4];
        loop {
            match rustix::io::read(&self.report, &mut errno) {
                // The pipe closed with the exec: it runs.
                Ok(0) => return None,
                Ok(_) => return Some(io::Error::from_raw_os_error(i32::from_ne_bytes(errno))),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Some(error.into()),
            }
        }
    }

    /// Readable when the child has ended.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Sends a signal to the child alone.
    ///
    /// # Errors
    /// `ESRCH` when it is reaped, `InvalidInput` for no signal.
    pub fn signal(&self, signal: i32) -> io::Result<()> {
        Ok(rustix::process::pidfd_send_signal(&self.pidfd, named(signal)?)?)
    }

    /// Sends a signal to the child and to what it forked, as far as that stayed in its group.
    ///
    /// # Errors
    /// `ESRCH` when it is reaped (its group is gone, and the number may be another's), `InvalidInput` for no signal.
    pub fn signal_group(&self, signal: i32) -> io::Result<()> {
        let signal = named(signal)?;
        if self.exit.is_some() {
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        Ok(rustix::process::kill_process_group(self.pid, signal)?)
    }

    /// How it ended, if it has; never blocks. The first time it kills what is left of the child's group, while the
    /// number cannot be anybody else's, and then reaps the child. Later calls repeat the answer.
    ///
    /// # Errors
    /// `ECHILD` if somebody else has reaped it.
    pub fn try_reap(&mut self) -> io::Result<Option<Exit>> {
        self.reap(WaitIdOptions::NOHANG)
    }

    /// As [`Child::try_reap`], but waits for the end.
    ///
    /// # Errors
    /// As [`Child::try_reap`].
    pub fn reap_blocking(&mut self) -> io::Result<Exit> {
        loop {
            if let Some(exit) = self.reap(WaitIdOptions::empty())? {
                return Ok(exit);
            }
        }
    }

    fn reap(&mut self, options: WaitIdOptions) -> io::Result<Option<Exit>> {
        if self.exit.is_some() {
            return Ok(self.exit);
        }
        // Look first, without reaping: while the leader is a zombie the group's number is taken.
        let look = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT | options;
        if wait(WaitId::PidFd(self.pidfd.as_fd()), look)?.is_none() {
            return Ok(None);
        }
        // ESRCH when the child was alone in it, as most are.
        let _ = rustix::process::kill_process_group(self.pid, Signal::KILL);
        self.exit = wait(WaitId::PidFd(self.pidfd.as_fd()), WaitIdOptions::EXITED)?;
        Ok(self.exit)
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if self.exit.is_none() {
            let _ = rustix::process::kill_process_group(self.pid, Signal::KILL);
            let _ = self.signal(libc::SIGKILL);
            let _ = self.reap_blocking();
        }
    }
}

/// Keeps others of this process's user from its memory: it can no longer be traced, and leaves no core dump. Who may trace everybody, as root
/// may on most machines, still can. Ends with the next exec.
///
/// # Errors
/// What `prctl` says.
pub fn hide_memory() -> io::Result<()> {
    Ok(rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)?)
}

/// Makes this process the new parent of orphans among its descendants, so that they can be found and reaped.
///
/// # Errors
/// What `prctl` says.
pub fn become_subreaper() -> io::Result<()> {
    Ok(rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?)
}

/// Children of this process other than `known`: orphans that a worker left. Reads `/proc`; for seldom use.
pub fn stray_children(known: &[i32]) -> Vec<i32> {
    let Ok(tasks) = fs::read_dir("/proc/self/task") else {
        return Vec::new();
    };
    tasks
        .flatten()
        .filter_map(|task| fs::read_to_string(task.path().join("children")).ok())
        .flat_map(|children| children.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<i32>>())
        .filter(|pid| !known.contains(pid))
        .collect()
}

/// Reaps one child by its number, if it has ended; never blocks. For strays: a [`Child`] reaps itself.
///
/// # Errors
/// `ECHILD` if it is no child of ours, `InvalidInput` if `pid` is no process number.
pub fn reap_pid(pid: i32) -> io::Result<Option<Exit>> {
    let pid = Pid::from_raw(pid).filter(|_| pid > 0).ok_or(io::ErrorKind::InvalidInput)?;
    wait(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOHANG)
}

/// Lets the calling thread run on these cores only, and on one of them from now on.
///
/// # Errors
/// `InvalidInput` for a core that cannot be; what `sched_setaffinity` says.
pub fn pin_current(cpus: &[usize]) -> io::Result<()> {
    Ok(sched_setaffinity(None, &cpu_set(cpus)?)?)
}

/// The cores that the calling thread may run on, ascending. The machine may have more, or allow less time on them.
pub fn allowed_cpus() -> Vec<usize> {
    let Ok(set) = rustix::thread::sched_getaffinity(None) else {
        return Vec::new();
    };
    (0..CpuSet::MAX_CPU).filter(|&cpu| set.is_set(cpu)).collect()
}

fn cpu_set(cpus: &[usize]) -> io::Result<CpuSet> {
    let mut set = CpuSet::new();
    for &cpu in cpus {
        if cpu >= CpuSet::MAX_CPU {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "no such core"));
        }
        set.set(cpu);
    }
    Ok(set)
}

fn wait(whom: WaitId<'_>, options: WaitIdOptions) -> io::Result<Option<Exit>> {
    loop {
        match rustix::process::waitid(whom.clone(), options) {
            Err(rustix::io::Errno::INTR) => {}
            ended => return Ok(ended?.and_then(|status| exit_of(&status))),
        }
    }
}

fn exit_of(status: &WaitIdStatus) -> Option<Exit> {
    status.exit_status().map(Exit::Code).or_else(|| status.terminating_signal().map(Exit::Signal))
}

fn named(signal: i32) -> io::Result<Signal> {
    Signal::from_named_raw(signal).ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

fn c_string(bytes: Vec<u8>) -> io::Result<CString> {
    CString::new(bytes).map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "a zero byte in a path or argument"))
}

fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings.iter().map(|string| string.as_ptr()).chain([std::ptr::null()]).collect()
}

/// Blocks every signal of this thread, so that no handler of ours runs in the child.
fn block_all_signals() -> libc::sigset_t {
    let mut all = MaybeUninit::<libc::sigset_t>::zeroed();
    let mut before = MaybeUninit::<libc::sigset_t>::zeroed();
    // SAFETY: in bounds: a local. Unshared, unique: ours.
    unsafe { libc::sigfillset(all.as_mut_ptr()) };
    // SAFETY: in bounds: two locals, the first one filled above. Unshared, unique: ours.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr()) };
    // SAFETY: a `sigset_t` is an array of integers: zero is a value, and the call above overwrote it.
    unsafe { before.assume_init() }
}

fn restore_signals(before: &libc::sigset_t) {
    // SAFETY: in bounds: a reference. Unshared, unique: ours; it is only read.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, before, std::ptr::null_mut()) };
}

/// The control socket in a child that [`Spawn`] started: descriptor [`CONTROL_FD`], if it is a socket. To be called once,
/// early, in `main`; the descriptor is closed on a later exec.
///
/// # Errors
/// `NotConnected` if descriptor 3 is not a socket: the program was not started by us.
pub fn inherited_control() -> io::Result<OwnedFd> {
    // SAFETY: a borrow of a number for one `fstat`; if it is not open the call says so.
    let control = unsafe { BorrowedFd::borrow_raw(CONTROL_FD) };
    let is_socket = rustix::fs::fstat(control)
        .is_ok_and(|stat| rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::Socket);
    if !is_socket {
        return Err(io::ErrorKind::NotConnected.into());
    }
    rustix::io::fcntl_setfd(control, rustix::io::FdFlags::CLOEXEC)?;
    // SAFETY: the descriptor is open (above) and nobody else's: `Spawn` put it there for this call.
    Ok(unsafe { OwnedFd::from_raw_fd(CONTROL_FD) })
}
