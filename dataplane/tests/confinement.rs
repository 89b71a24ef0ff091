//! Workers that take more than they may: of memory, of processes (faults.md W10, X2), and what the groups that bind them leave (G5, C3).

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use praas_dataplane::confinement::{Version, trial};
use praas_dataplane::{Client, InvokeError};
use support::heard::Heard;
use support::{
    PATIENCE, children, content, lives, process_program, run_process, signal, state, test_worker, wait_until,
};

/// With an arena of 4 MiB, 68 of their own.
const MEMORY: [&str; 2] = ["--worker-memory-max=75497472", "--arena-bytes=4194304"];
const PROCESSES: &str = "--worker-processes-max=40";

/// Whether control groups can be made; says why not.
fn has_groups() -> bool {
    trial().inspect_err(|why| println!("skipped: needs control groups that may be made: {why}")).is_ok()
}

/// The groups of ours that a process is in, as folders.
fn groups(pid: u32) -> Vec<PathBuf> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    let folders = text.lines().filter_map(|line| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (controllers, path) = (parts.next()?, parts.next()?);
        let roots = if controllers.is_empty() {
            vec!["/sys/fs/cgroup".into()]
        } else {
            vec![format!("/sys/fs/cgroup/{controllers}")]
        };
        roots.into_iter().map(|root| PathBuf::from(format!("{root}{path}"))).find(|path| path.is_dir())
    });
    folders.filter(|folder| folder.to_string_lossy().contains("/praas-")).collect()
}

/// The folders that such a process has, beside those of its workers.
fn trees(process: &Heard) -> Vec<PathBuf> {
    groups(children(process.pid())[0]).iter().map(|group| group.parent().expect("below ours").to_owned()).collect()
}

fn number(group: &[PathBuf], file: &str) -> u64 {
    let texts = group.iter().filter_map(|folder| fs::read_to_string(folder.join(file)).ok());
    texts.filter_map(|text| text.trim().parse::<u64>().ok()).sum()
}

/// Calls of somebody else, beside what `client` has running, until that ends.
fn beside(client: &mut Client, neighbour: &mut Client) -> Result<Vec<u8>, InvokeError> {
    let mut calls = 0_u64;
    loop {
        let input = content(calls, [8, 100, 5000][(calls % 3) as usize]);
        assert!(*neighbour.invoke("echo", input.clone()).expect("others are served") == *input);
        calls += 1;
        if let Some((_, ended)) = client.poll() {
            return ended.map(|reply| reply.to_vec());
        }
    }
}

#[test]
fn w10_w4_a_memory_hog_is_killed_at_its_limit_told_why_and_refused_when_it_goes_on() {
    if !has_groups() {
        return;
    }
    let process = Heard::start(2, &MEMORY);
    assert!(process.value("limits").is_some_and(|how| how.starts_with("cgroup")), "{}", process.ready);
    let (mut client, mut neighbour) = (process.connect(), process.connect());
    let trees = trees(&process);
    // What fits is no hog.
    assert_eq!(&*client.invoke("hog", b"30").unwrap(), b"30");
    for round in 0..5 {
        let before = children(process.pid());
        client.submit_within("hog", b"300", Duration::from_secs(20)).unwrap();
        let error = beside(&mut client, &mut neighbour).unwrap_err();
        let told = matches!(&error, InvokeError::WorkerLost { text }
            if text.contains("75497472 bytes") && text.contains("--worker-memory-max") && text.contains("`hog` may have run"));
        assert!(told, "round {round}: {error}");
        wait_until("it is replaced, and nobody else", PATIENCE, || {
            let now = children(process.pid());
            now.len() == 2 && now.iter().filter(|pid| before.contains(pid)).count() == 1
        });
    }
    let error = client.invoke("hog", b"300").unwrap_err();
    assert!(matches!(error, InvokeError::FunctionBroken { .. }), "five in a row: {error}");
    // The same, told to a function that called it.
    let fresh = Heard::start(2, &MEMORY);
    let error = fresh.connect().invoke("relay", b"hog 300").unwrap_err();
    assert!(error.to_string().contains("--worker-memory-max"), "{error}");
    let others = self::trees(&fresh);
    assert!(fresh.end().0.success() && process.end().0.success());
    assert!(trees.iter().chain(&others).all(|tree| !tree.exists()), "left behind: {trees:?} {others:?}");
}

/// G8: the quota of payloads refuses before the kernel kills.
#[test]
fn x2_payloads_are_refused_before_the_limit_of_memory_kills() {
    if !has_groups() {
        return;
    }
    let args = ["--worker-memory-max=100663296", "--arena-bytes=67108864", "--payload-bytes-max=67108864"];
    let process = Heard::start(1, &args);
    let mut client = process.connect();
    let worker = children(process.pid());
    for _ in 0..4 {
        let large = client.invoke("large", b"60000000").unwrap();
        assert!(large.len() == 60_000_000 && large.iter().all(|byte| *byte == 7));
    }
    assert_eq!(children(process.pid()), worker, "nobody was killed");
    let output = run_process(&["--worker", &test_worker(), "--worker-memory-max=100663295", "--arena-bytes=67108864"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(2) && said.contains("--arena-bytes"), "{said}");
}

#[test]
fn w10_w8_a_fork_bomb_stays_in_its_group_and_goes_with_its_worker() {
    if !has_groups() {
        return;
    }
    let process = Heard::start(2, &[PROCESSES]);
    let (mut client, mut neighbour) = (process.connect(), process.connect());
    let trees = trees(&process);
    for depth in ["3", "11"] {
        let before = children(process.pid());
        client.invoke("bomb", depth).unwrap();
        let struck =
            || before.iter().map(|pid| (*pid, groups(*pid))).find(|(_, group)| number(group, "pids.current") > 8);
        wait_until("it has begun", PATIENCE, || struck().is_some());
        let (worker, group) = struck().expect("just now");
        if depth == "11" {
            wait_until("it is refused more", PATIENCE, || {
                let events = group.iter().filter_map(|folder| fs::read_to_string(folder.join("pids.events")).ok());
                events.flat_map(|text| text.split_whitespace().last().and_then(|n| n.parse::<u64>().ok())).sum::<u64>()
                    > 0
            });
        }
        for call in 0..200_u8 {
            assert_eq!(&*neighbour.invoke("echo", &[call]).unwrap(), [call], "beside a bomb");
            assert!(number(&group, "pids.current") <= 40);
        }
        let members: Vec<u32> = group
            .iter()
            .flat_map(|folder| {
                fs::read_to_string(folder.join("cgroup.procs"))
                    .unwrap_or_default()
                    .lines()
                    .map(|pid| pid.parse().unwrap())
                    .collect::<Vec<_>>()
            })
            .collect();
        assert!(members.len() > 8);
        signal(worker, 9);
        wait_until("all of it is gone", PATIENCE, || {
            group.iter().all(|folder| !folder.exists()) && members.iter().all(|pid| state(*pid).is_none())
        });
        wait_until("its worker is replaced", PATIENCE, || children(process.pid()).len() == 2);
        assert_eq!(&*client.invoke("echo", b"next").unwrap(), b"next");
    }
    // One that runs when the process is told to end.
    client.invoke("bomb", b"11").unwrap();
    assert!(process.end().0.success());
    wait_until("nothing is left", Duration::from_secs(2), || trees.iter().all(|tree| !tree.exists()));
}

#[test]
fn w10_w4_who_ends_for_want_of_a_thread_has_that_told() {
    if !has_groups() {
        return;
    }
    let process = Heard::start(1, &[PROCESSES]);
    let mut client = process.connect();
    let error = client.invoke("threads", b"200").unwrap_err();
    let told = matches!(&error, InvokeError::WorkerLost { text }
        if text.contains("40 processes and threads") && text.contains("--worker-processes-max"));
    assert!(told, "{error}");
    process.wait_said("stderr: no thread: ");
    // A death of another kind is told as that.
    let error = client.invoke("exit", b"77").unwrap_err();
    assert!(error.to_string().contains("code 77"), "{error}");
}

/// `praas-process` where no control group can be made: there are none, or we may not, or they are hidden from it.
fn without_groups() -> Option<Command> {
    if trial().is_err() {
        return Some(Command::new(process_program()));
    }
    let hide = "mount -t tmpfs none /sys/fs/cgroup";
    let works = Command::new("unshare").args(["-m", "sh", "-c", hide]).stderr(Stdio::null()).status();
    if !works.is_ok_and(|status| status.success()) {
        println!("skipped: needs unshare and mount, to hide control groups");
        return None;
    }
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-c", &format!("{hide} && exec \"$0\" \"$@\""), &process_program()]);
    Some(command)
}

#[test]
fn w10_without_control_groups_memory_is_bound_by_limits_and_payloads_are_not_counted() {
    let Some(command) = without_groups() else { return };
    let process = Heard::of(command, 2, &["--worker-memory-max=369098752"]);
    assert_eq!(process.value("limits"), Some("rlimits"), "{}", process.ready);
    process.wait_said("instead of control groups");
    assert!(
        process.said().iter().any(|line| line.contains("control group") && line.contains("reason=")),
        "{:?}",
        process.said()
    );
    let (mut client, mut neighbour) = (process.connect(), process.connect());
    let worker = children(process.pid())[0];
    let limits = fs::read_to_string(format!("/proc/{worker}/limits")).unwrap();
    let data = limits.lines().find(|line| line.starts_with("Max data size")).unwrap();
    assert!(data.contains("100663296"), "96 MiB beside an arena of 256: {data}");
    // Payloads lie in shared memory, which has a bound of its own.
    let input = content(1, 60 << 20);
    for _ in 0..3 {
        assert!(*client.invoke("echo", input.clone()).unwrap() == *input);
    }
    client.submit_within("hog", b"300", Duration::from_secs(20)).unwrap();
    let error = beside(&mut client, &mut neighbour).unwrap_err();
    let told = matches!(&error, InvokeError::WorkerLost { text }
        if text.contains("100663296 bytes") && text.contains("--worker-memory-max"));
    assert!(told, "{error}");
    process.wait_said("stderr: memory allocation of");
    assert_eq!(&*client.invoke("hog", b"30").unwrap(), b"30");
}

/// Root is not bound by `RLIMIT_NPROC`; others are, all their processes together.
#[test]
fn w10_without_control_groups_threads_are_bound_by_the_user() {
    let mut command = Command::new("setpriv");
    let nobody = ["--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all"];
    let runs =
        Command::new("setpriv").args(nobody).args([&process_program(), "--version"]).stdout(Stdio::null()).status();
    let reads = Command::new("setpriv").args(nobody).args(["test", "-x", &test_worker()]).status();
    if ![runs, reads].into_iter().all(|status| status.is_ok_and(|status| status.success())) {
        return println!("skipped: needs root, setpriv, and programs that everybody may run");
    }
    command.args(nobody).arg(process_program());
    let process = Heard::of(command, 1, &[PROCESSES]);
    assert_eq!(process.value("limits"), Some("rlimits"), "{}", process.ready);
    let mut client = process.connect();
    let error = client.invoke("threads", b"2000").unwrap_err();
    assert!(matches!(&error, InvokeError::WorkerLost { text } if text.contains("code 1")), "{error}");
    process.wait_said("stderr: no thread: ");
    client.invoke("threads", b"10").unwrap();
}

/// C3, G5: groups are names that outlive a process that is killed. The next start takes them away, and what still lives in them, and nobody else's.
#[test]
fn c3_g5_groups_of_the_killed_are_taken_away_by_the_next_start_and_those_of_the_living_are_not() {
    if !has_groups() {
        return;
    }
    let args = [PROCESSES, MEMORY[0], MEMORY[1]];
    let (killed, alive) = (Heard::start(2, &args), Heard::start(1, &args));
    let (of_killed, of_alive) = (trees(&killed), trees(&alive));
    assert!(!of_killed.is_empty());
    killed.connect().invoke("bomb", b"2").unwrap();
    let workers = children(killed.pid());
    let members = |trees: &[PathBuf]| -> Vec<u32> {
        let groups = trees.iter().filter_map(|tree| fs::read_dir(tree).ok()).flatten().flatten();
        let lists = groups.filter_map(|group| fs::read_to_string(group.path().join("cgroup.procs")).ok());
        lists.flat_map(|list| list.lines().map(|pid| pid.parse().unwrap()).collect::<Vec<_>>()).collect()
    };
    wait_until("it has begun", PATIENCE, || members(&of_killed).len() > 6);
    killed.kill();
    wait_until("its workers are gone", PATIENCE, || workers.iter().all(|pid| !lives(*pid)));
    let orphans = members(&of_killed);
    assert!(!orphans.is_empty(), "what left its worker's process group is told nothing");
    let third = Heard::start(1, &args);
    assert!(of_killed.iter().all(|tree| !tree.exists()) && orphans.iter().all(|pid| !lives(*pid)), "{of_killed:?}");
    assert!(of_alive.iter().all(|tree| tree.exists()));
    for process in [&third, &alive] {
        assert_eq!(&*process.connect().invoke("echo", b"lives").unwrap(), b"lives");
    }
    let of_third = trees(&third);
    assert!(third.end().0.success() && alive.end().0.success());
    assert!(of_third.iter().chain(&of_alive).all(|tree| !tree.exists()));
}

fn oom_score_adj(pid: u32) -> i64 {
    fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap().trim().parse().unwrap()
}

#[test]
fn x2_workers_go_before_the_controller_when_memory_runs_out() {
    let process = Heard::start(2, &[]);
    assert_eq!(process.value("limits"), None);
    let ours = oom_score_adj(process.pid());
    assert_eq!(ours, oom_score_adj(std::process::id()), "the controller's is as it was");
    for worker in children(process.pid()) {
        wait_until("it is past its exec", PATIENCE, || oom_score_adj(worker) == (ours + 500).min(1000));
    }
}

/// X2: a process in a group of 64 MiB, whose workers have no limits of their own.
#[test]
fn x2_the_kernel_short_of_memory_takes_a_worker_and_never_the_controller() {
    if trial() != Ok(Version::V1) {
        return println!("skipped: needs control groups of version 1");
    }
    struct Group(PathBuf);
    impl Drop for Group {
        fn drop(&mut self) {
            wait_until("nobody is in it", PATIENCE, || fs::remove_dir(&self.0).is_ok() || !self.0.exists());
        }
    }
    let text = fs::read_to_string("/proc/self/cgroup").unwrap();
    let own = text.lines().find_map(|line| line.split_once(":memory:")).expect("version 1").1;
    let group = Group(
        Path::new("/sys/fs/cgroup/memory")
            .join(own.trim_start_matches('/'))
            .join(format!("test-of-praas-{}", std::process::id())),
    );
    fs::create_dir(&group.0).unwrap();
    fs::write(group.0.join("memory.limit_in_bytes"), "67108864").unwrap();
    let mut command = Command::new("sh");
    let enter = format!("echo $$ > {}/cgroup.procs && exec \"$0\" \"$@\"", group.0.display());
    command.args(["-c", &enter, &process_program()]);
    let process = Heard::of(command, 2, &[]);
    for round in 0..support::setting("PRAAS_OOM_KILLS", 10) {
        // Each a client of its own: one that breaks a function does so for everybody, but SIGKILL does not count.
        let (mut client, mut neighbour) = (process.connect(), process.connect());
        client.submit_within("hog", b"300", Duration::from_secs(20)).unwrap();
        // Others may be the larger ones for a moment, and are workers as well.
        let error = loop {
            let _ = neighbour.invoke("echo", b"on");
            if let Some((_, ended)) = client.poll() {
                break ended.expect_err("there is no room for it");
            }
        };
        assert!(
            matches!(&error, InvokeError::WorkerLost { text } if text.contains("signal 9")),
            "round {round}: {error}"
        );
        wait_until("it serves on", PATIENCE, || neighbour.invoke("echo", b"on").is_ok());
        assert!(lives(process.pid()));
    }
    assert!(process.end().0.success());
}
