//! Made-up machines, one for each thing that can be wrong, and the one where nothing is.

use super::*;
use crate::doctor::facts::{Clock, Idle, IdleState, Kernel, Limits, Memory, Space};
use crate::doctor::report::Verdict;

/// A machine on which nothing is left to wish for.
fn good() -> Facts {
    Facts {
        kernel: Kernel { release: "6.18.44".into(), version: (6, 18) },
        cores: Cores { allowed: vec![0, 1, 2, 3], online: Some(4), quota_millicores: None },
        io_uring: UringTrial::Works { deferred: true },
        io_uring_disabled: Some(0),
        seccomp: Seccomp { mode: Some(0), filters: Some(0) },
        queues: Some(QueueLimits {
            rlimit_bytes: Limit::Unlimited,
            messages_max: 10,
            message_bytes_max: 8192,
            queues_max: 256,
            privileged: false,
        }),
        memfd: MemfdTrial::Works,
        shm_mount: Some(Space { total_bytes: 64 << 20, free_bytes: 64 << 20 }),
        memory: Memory { total_bytes: Some(16 << 30), available_bytes: Some(8 << 30), cgroup_bytes: None },
        limits: Limits {
            memlock_bytes: Limit::AtMost(8 << 20),
            open_files: Limit::AtMost(20_000),
            user_processes: Limit::AtMost(96_365),
            cgroup_pids: Limit::Unlimited,
        },
        clock: Clock { source: Some("tsc".into()), read_ns: 25 },
        idle: Idle {
            driver: Some("intel_idle".into()),
            states: vec![IdleState { name: "C6".into(), latency_us: 133 }],
            pm_qos: PmQos::Allowed,
        },
        groups: GroupsTrial::Works { version: 2 },
        shmem_huge_pages: Some("advise".into()),
        tcp: Tcp {
            in_force: Some("cubic".into()),
            available: vec!["reno".into(), "cubic".into(), "bbr".into()],
            allowed: vec!["reno".into(), "cubic".into()],
            usable: vec!["reno".into(), "cubic".into()],
            auto_on_loopback: Some("reno".into()),
        },
        host: Host { virtual_machine: false, product: None, container: None },
    }
}

/// The finding that should notice, and what is done to a good machine.
type Spoiler = (&'static str, fn(&mut Facts));

/// The finding `id` on a good machine after `spoil`.
fn after(id: &str, spoil: impl FnOnce(&mut Facts)) -> Finding {
    let mut facts = good();
    spoil(&mut facts);
    judge(&facts).finding(id).expect("every subject is judged").clone()
}

#[test]
fn nothing_is_said_against_a_good_machine() {
    let report = judge(&good());
    assert!(report.can_run());
    for found in &report.findings {
        assert_eq!(found.verdict, Verdict::Ok, "{found:?}");
        assert!(!found.value.is_empty() && !found.uses.is_empty(), "{found:?}");
        assert_eq!(found.change, None, "{found:?}");
    }
}

#[test]
fn every_problem_stops_the_data_plane_and_says_what_to_do() {
    let spoilers: [Spoiler; 9] = [
        ("kernel", |f| f.kernel = Kernel { release: "4.19.0".into(), version: (4, 19) }),
        ("memfd", |f| f.memfd = MemfdTrial::Failed { step: "memfd_create", errno: EACCES }),
        ("memfd", |f| f.memfd = MemfdTrial::Failed { step: "fallocate", errno: ENOSYS }),
        ("memfd", |f| f.memfd = MemfdTrial::NotSealed { step: "a new writable map" }),
        ("seccomp", |f| f.seccomp.mode = Some(1)),
        ("memory", |f| f.memory.cgroup_bytes = Some(16 << 20)),
        ("open_files", |f| f.limits.open_files = Limit::AtMost(OPEN_FILES_LEAST - 1)),
        ("pids", |f| f.limits.cgroup_pids = Limit::AtMost(2)),
        ("pids", |f| f.limits.user_processes = Limit::AtMost(1)),
    ];
    for (id, spoil) in spoilers {
        let mut facts = good();
        spoil(&mut facts);
        let report = judge(&facts);
        let found = report.finding(id).expect("judged");
        assert_eq!(found.verdict, Verdict::Problem, "{found:?}");
        assert!(found.change.is_some(), "{found:?}");
        assert!(!report.can_run(), "{id}");
    }
}

#[test]
fn every_note_lets_it_run_and_says_what_to_do() {
    let spoilers: [Spoiler; 15] = [
        ("cores", |f| f.cores.allowed = vec![3]),
        ("cores", |f| f.cores.quota_millicores = Some(1000)),
        ("cores", |f| f.cores.quota_millicores = Some(2500)),
        ("io_uring", |f| f.io_uring = UringTrial::Failed { step: "io_uring_setup", errno: EPERM }),
        ("queues", |f| f.queues = None),
        ("queues", |f| f.queues.as_mut().unwrap().messages_max = 5),
        ("queues", |f| f.queues.as_mut().unwrap().message_bytes_max = 4096),
        ("queues", |f| f.queues.as_mut().unwrap().rlimit_bytes = Limit::AtMost(100_000)),
        ("queues", |f| f.queues.as_mut().unwrap().queues_max = 3),
        ("memory", |f| f.memory.cgroup_bytes = Some(256 << 20)),
        ("open_files", |f| f.limits.open_files = Limit::AtMost(256)),
        ("pids", |f| f.limits.cgroup_pids = Limit::AtMost(20)),
        ("worker_limits", |f| f.groups = GroupsTrial::Failed { why: "read-only".into(), is_root: true }),
        ("clock", |f| f.clock = Clock { source: Some("hpet".into()), read_ns: 900 }),
        ("idle", |f| f.idle.pm_qos = PmQos::Refused(EACCES)),
    ];
    for (id, spoil) in spoilers {
        let mut facts = good();
        spoil(&mut facts);
        let report = judge(&facts);
        let found = report.finding(id).expect("judged");
        assert_eq!(found.verdict, Verdict::Note, "{found:?}");
        assert!(found.change.is_some(), "{found:?}");
        assert!(report.can_run(), "{id}");
    }
}

#[test]
fn cores_are_counted_by_mask_and_quota() {
    let found = after("cores", |f| {
        f.cores = Cores { allowed: vec![0, 1, 2, 7], online: Some(8), quota_millicores: Some(1500) };
    });
    assert_eq!(found.value, "4 allowed (0-2,7), 8 online, quota 1.500 cores");
    assert!(found.uses.starts_with("2 participants"), "{}", found.uses);
    let loose = after("cores", |f| f.cores.quota_millicores = Some(8000));
    assert_eq!(loose.verdict, Verdict::Ok, "a quota above the mask binds nobody");
}

#[test]
fn a_refused_ring_is_blamed_on_what_refused_it() {
    let blame = |errno, disabled, mode| {
        let found = after("io_uring", |f| {
            f.io_uring = UringTrial::Failed { step: "io_uring_setup", errno };
            f.io_uring_disabled = disabled;
            f.seccomp.mode = Some(mode);
        });
        (found.uses, found.change.expect("a refused ring has a cure"))
    };
    let cases = [
        (EPERM, Some(2), 0, "io_uring_disabled=2", "sysctl -w"),
        (EPERM, Some(1), 2, "io_uring_group", "sysctl -w"),
        (EPERM, Some(0), 2, "seccomp", "--security-opt"),
        (ENOSYS, None, 2, "seccomp", "--security-opt"),
        (ENOSYS, None, 0, "CONFIG_IO_URING", "CONFIG_IO_URING"),
        (EACCES, Some(0), 0, "security module", "journalctl"),
        (ENOMEM, None, 0, "locked-memory", "ulimit -l"),
        (EMFILE, Some(0), 0, "file descriptor", "ulimit -n"),
        (22, Some(0), 0, "Invalid argument", "6.1"),
    ];
    for (errno, disabled, mode, why, cure) in cases {
        let (uses, change) = blame(errno, disabled, mode);
        assert!(uses.starts_with("epoll") && uses.contains(why), "{errno}: {uses}");
        assert!(change.contains(cure), "{errno}: {change}");
    }
}

/// The limit that binds is the one that is named, and the count is what the kernel really grants: on a default
/// Linux (819 200 bytes) nine queues, so four workers.
#[test]
fn queue_workers_are_counted_as_the_kernel_charges() {
    let limits = |rlimit_bytes, queues_max, privileged| QueueLimits {
        rlimit_bytes,
        messages_max: 10,
        message_bytes_max: 8192,
        queues_max,
        privileged,
    };
    assert_eq!(QUEUE_CHARGED_BYTES, 82_880);
    assert_eq!(queue_workers(&limits(Limit::AtMost(819_200), 256, false)), (4, "RLIMIT_MSGQUEUE"));
    assert_eq!(queue_workers(&limits(Limit::Unlimited, 5, false)), (2, "fs.mqueue.queues_max"));
    assert_eq!(queue_workers(&limits(Limit::Unlimited, 5, true)), (63, "RLIMIT_MSGQUEUE"));
    assert_eq!(queue_workers(&limits(Limit::AtMost(0), 256, true)).0, 0);
    let small = QueueLimits { messages_max: 9, ..limits(Limit::Unlimited, 256, false) };
    assert_eq!(queue_workers(&small), (0, "fs.mqueue.msg_max"));
}

#[test]
fn unknown_facts_are_said_to_be_unknown() {
    let memory =
        after("memory", |f| f.memory = Memory { total_bytes: None, available_bytes: None, cgroup_bytes: None });
    assert_eq!((memory.value.as_str(), memory.verdict), ("not reported", Verdict::Note));
    let seccomp = after("seccomp", |f| f.seccomp.mode = None);
    assert_eq!(seccomp.value, "not reported");
    let cores = after("cores", |f| f.cores.allowed.clear());
    assert_eq!(cores.verdict, Verdict::Note);
}

#[test]
fn bytes_are_printed_with_binary_units_rounded_down() {
    for (count, text) in
        [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (1_599, "1.5 KiB"), (64 << 20, "64 MiB"), (3 << 40, "3 TiB")]
    {
        assert_eq!(bytes(count), text);
    }
}

#[test]
fn which_congestion_control_would_be_taken_and_which_may_be_named_is_said() {
    let found = after("congestion", |_| {});
    assert!(found.value.contains("cubic in force") && found.value.contains("reno cubic bbr"), "{found:?}");
    assert!(found.uses.contains("reno between ends on this host, cubic with other hosts"), "{found:?}");
    assert!(found.uses.ends_with("may be reno, cubic"), "{found:?}");
    let paced = after("congestion", |facts| facts.tcp.in_force = Some("bbr".into()));
    assert!(paced.uses.contains("pace") && paced.verdict == Verdict::Ok, "{paced:?}");
    let none = after("congestion", |facts| facts.tcp.auto_on_loopback = None);
    assert!(none.verdict == Verdict::Note && none.change.is_some_and(|change| change.contains("system")));
}
