//! A kernel that refuses io_uring (X7), as Docker's and Fargate's do: a seccomp filter on one thread and on all that it starts.
#![allow(dead_code, reason = "the launcher uses its part")]

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch, apply_filter};

/// Runs `work` in a thread of its own that gets `errno` from `io_uring_setup`; so does every process it starts.
pub(crate) fn without_io_uring<T: Send>(errno: i32, work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            refuse_io_uring(errno);
            work()
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// From here on this thread, and what it starts, gets `errno` from `io_uring_setup`.
pub(crate) fn refuse_io_uring(errno: i32) {
    let errno = u32::try_from(errno).expect("an errno is above zero");
    let rules = [(libc::SYS_io_uring_setup, vec![])].into();
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, SeccompAction::Errno(errno), TargetArch::x86_64);
    let program: BpfProgram = filter.expect("one rule").try_into().expect("a filter");
    apply_filter(&program).expect("every kernel that runs a process has seccomp");
}
