//! A kernel that refuses io_uring (X7), as Docker's and Fargate's do: a seccomp filter on one thread and on all that it starts.
#![allow(dead_code, reason = "the launcher uses its part")]

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, apply_filter,
};

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
    refuse(errno, [(libc::SYS_io_uring_setup, vec![])].into());
}

/// A kernel that makes a ring and refuses what comes after: the mapping of its memory, the registering of buffers, or its use.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Step {
    Map,
    Register,
    Enter,
}

/// Runs `work` in a thread of its own that gets `errno` from a later step of io_uring; so does every process it starts.
pub(crate) fn without_step<T: Send>(step: Step, errno: i32, work: impl FnOnce() -> T + Send) -> T {
    // Nobody else here populates shared memory while it maps it.
    let populate = (libc::MAP_SHARED | libc::MAP_POPULATE) as u64;
    let flags = SeccompCondition::new(3, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(populate), populate);
    let of_rings = SeccompRule::new(vec![flags.expect("a sixth argument or less")]).expect("one condition");
    let rules = match step {
        Step::Map => (libc::SYS_mmap, vec![of_rings]),
        Step::Register => (libc::SYS_io_uring_register, vec![]),
        Step::Enter => (libc::SYS_io_uring_enter, vec![]),
    };
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            refuse(errno, [rules].into());
            work()
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn refuse(errno: i32, rules: BTreeMap<i64, Vec<SeccompRule>>) {
    let errno = u32::try_from(errno).expect("an errno is above zero");
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, SeccompAction::Errno(errno), TargetArch::x86_64);
    let program: BpfProgram = filter.expect("sound rules").try_into().expect("a filter");
    apply_filter(&program).expect("every kernel that runs a process has seccomp");
}
