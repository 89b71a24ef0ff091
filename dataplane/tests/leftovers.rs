//! The controller dies or is asked to stop: what is left, and when (faults.md section 3).
#![allow(clippy::cast_possible_truncation, reason = "dice and patterns are cut to size on purpose")]

mod support;

use std::time::{Duration, Instant};

use praas_dataplane::{Client, ClientConfig, InvokeError, Ipc};
use support::{
    PATIENCE, children, connect, content, lives, names, on_both_channels, run_process, signal, start_workers, state,
    wait_until,
};

/// What C1 and G5 owe. In 156 kills on two cores that three spinners kept busy, the last worker was gone after 28 ms at most.
const GONE_WITHIN: Duration = Duration::from_millis(100);

fn all_gone(pids: &[u32], since: Instant) {
    wait_until("nobody is left", PATIENCE, || pids.iter().all(|pid| !lives(*pid)));
    assert!(since.elapsed() < GONE_WITHIN, "the last was gone after {:?}", since.elapsed());
}

fn temporary() -> Vec<std::ffi::OsString> {
    let entries = std::fs::read_dir(std::env::temp_dir()).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries.map(|entry| entry.file_name()).collect();
    // Of this run's other tests.
    names.retain(|name| !name.to_string_lossy().starts_with("praas-") && !name.to_string_lossy().starts_with("rustc"));
    names.sort();
    names
}

#[test]
fn c1_c4_a_killed_controller_leaves_no_worker_and_no_name() {
    on_both_channels(|ipc| {
        let before = names();
        for round in 0..6 {
            let (process, mut client) = start_workers(ipc, 4, &[]);
            let workers = children(process.pid());
            assert_eq!(workers.len(), 4);
            // Busy in every way: asleep, spinning, holding large payloads, idle.
            client.submit("sleep", b"30000").unwrap();
            client.submit("spin", b"").unwrap();
            client.submit("echo", content(1, 1 << 20)).unwrap();
            if round % 2 == 0 {
                let _ = client.poll();
            } else {
                wait_until("a function spins", PATIENCE, || {
                    let _ = client.poll();
                    workers.iter().any(|pid| state(*pid) == Some('R'))
                });
            }
            let begun = Instant::now();
            process.kill().unwrap();
            all_gone(&workers, begun);
            let ended = std::iter::from_fn(|| client.wait_any()).last().expect("calls were in flight").1;
            assert!(matches!(ended, Err(InvokeError::ConnectionLost { .. }) | Ok(_)), "{ended:?}");
        }
        assert_eq!(names(), before);
    });
}

#[test]
fn c1_c4_a_controller_killed_while_it_starts_leaves_nobody() {
    use std::process::{Command, Stdio};
    let before = temporary();
    let _queues = support::queues();
    for ipc in ["ring", "mq"] {
        for delay_us in (0..20).map(|round| round * 1500) {
            let mut command = Command::new(support::process_program());
            command.args(["--worker", &support::test_worker(), "--workers", "3", "--ipc", ipc]);
            let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
            // The moment of the kill is the point of the test, not a wait for something.
            std::thread::sleep(Duration::from_micros(delay_us));
            let workers = children(child.id());
            let begun = Instant::now();
            child.kill().unwrap();
            child.wait().unwrap();
            all_gone(&workers, begun);
        }
    }
    let new: Vec<_> = temporary().into_iter().filter(|name| !before.contains(name)).collect();
    assert!(!new.iter().any(|name| name.to_string_lossy().contains("praas")), "{new:?}");
    // Whatever was started after the look at the children is gone as well.
    wait_until("no worker of a dead controller is left", GONE_WITHIN, || orphans().is_empty());
}

/// Workers of ours whose controller is gone.
fn orphans() -> Vec<u32> {
    let pids = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_string_lossy().parse::<u32>().ok());
    pids.filter(|pid| {
        let program = std::fs::read_link(format!("/proc/{pid}/exe"));
        let ours = program.is_ok_and(|program| program.to_string_lossy() == support::test_worker());
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let parent = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(1)?.parse::<u32>().ok());
        ours && lives(*pid) && parent == Some(1)
    })
    .collect()
}

#[test]
fn c2_a_first_signal_drains_and_exits_with_0() {
    on_both_channels(|ipc| {
        for number in [15, 2, 1] {
            let (process, mut client) = start_workers(ipc, 2, &[]);
            let workers = children(process.pid());
            let running: Vec<_> = (0..4).map(|_| client.submit("sleep", b"150").unwrap()).collect();
            // In the process's hands, not in a socket's, before the signal comes.
            let mut other = connect(&process);
            wait_until("a function runs", PATIENCE, || is_busy(&mut other));
            signal(process.pid(), number);
            let mut late = connect_late(&process);
            for call in running {
                assert_eq!(&*client.wait(call).unwrap(), b"slept", "signal {number}");
            }
            if let Some(late) = &mut late {
                let error = late.invoke("echo", b"late").unwrap_err();
                // It may be gone before the call leaves: then the client looks for it until the deadline.
                let refused = matches!(
                    error,
                    InvokeError::Draining | InvokeError::ConnectionLost { .. } | InvokeError::Timeout { .. }
                );
                assert!(refused, "{error}");
            }
            let (pid, begun) = (process.pid(), Instant::now());
            assert_eq!(process.stop().unwrap().code(), Some(0), "signal {number}");
            assert!(begun.elapsed() < Duration::from_secs(5), "{pid} took {:?}", begun.elapsed());
            all_gone(&workers, Instant::now());
        }
    });
}

/// Whether every worker is at something: then a call with a short deadline ends before it is begun.
fn is_busy(client: &mut Client) -> bool {
    let call = client.submit_within("echo", b"", Duration::from_millis(5)).expect("submitted");
    matches!(client.wait(call), Err(InvokeError::Timeout { .. }))
}

fn connect_late(process: &praas_dataplane::LocalProcess) -> Option<Client> {
    let second = Duration::from_secs(1);
    let config = ClientConfig { connect_within: second, deadline: second, ..ClientConfig::default() };
    Client::connect(process.addr(), &config).ok()
}

#[test]
fn c2_a_second_signal_ends_at_once_and_so_does_the_end_of_patience() {
    on_both_channels(|ipc| {
        for patient in [true, false] {
            let drain = if patient { "60000" } else { "300" };
            let (process, mut client) = start_workers(ipc, 2, &["--drain-ms", drain]);
            let workers = children(process.pid());
            let call = client.submit("sleep", b"30000").unwrap();
            let mut other = connect(&process);
            wait_until("it runs", PATIENCE, || &*other.invoke("echo", b"x").unwrap() == b"x");
            signal(process.pid(), 15);
            let begun = Instant::now();
            if patient {
                wait_until("the first signal is taken", PATIENCE, || {
                    other.invoke("echo", b"").err() == Some(InvokeError::Draining)
                });
                assert!(lives(process.pid()));
                signal(process.pid(), 15);
            }
            // Waits without another signal of its own only when the process has gone already.
            let pid = process.pid();
            wait_until("it has ended", PATIENCE, || !lives(pid));
            assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
            assert_eq!(process.stop().unwrap().code(), Some(0));
            assert!(matches!(client.wait(call), Err(InvokeError::ConnectionLost { .. })));
            all_gone(&workers, Instant::now());
        }
    });
}

#[test]
fn c6_a_second_process_on_the_same_port_is_refused_and_the_first_serves_on() {
    let (process, mut client) = start_workers(Ipc::Ring, 1, &[]);
    let address = process.addr().to_string();
    let output = run_process(&["--worker", &support::test_worker(), "--listen", &address]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(5), "{said}");
    assert!(said.contains(&address) && said.contains("--listen") && said.trim().lines().count() == 1, "{said}");
    assert_eq!(&*client.invoke("echo", b"mine").unwrap(), b"mine");
}
