//! Workers that die, hang, crash in loops and leave children behind (faults.md section 1), on both channels.
//!
//! `PRAAS_KILLS` sets the number of kills of the random tests (default 150 a channel), `PRAAS_SEED` their seed.
#![allow(clippy::cast_possible_truncation, reason = "dice and patterns are cut to size on purpose")]

mod support;

use std::collections::VecDeque;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use praas_dataplane::{Client, ClientConfig, Delivery, InvokeError, Ipc, LaunchConfig, LocalProcess};
use support::{
    Dice, PATIENCE, children, connect, connect_with, content, cpu_seconds, fds, kill_workers, kills, launch_config,
    lives, on_both_channels, seed, signal, start_with, start_workers, state, test_worker, wait_until,
};

/// Waits until the process has its workers, all of them answer, and nobody dead is left unburied (W9).
fn settle(process: &LocalProcess, client: &mut Client, workers: usize) {
    wait_until("all workers are back and no zombie is left", PATIENCE, || {
        let children = children(process.pid());
        children.len() == workers && children.iter().all(|pid| lives(*pid))
    });
    let mut seen = std::collections::HashSet::new();
    wait_until("every worker answers", PATIENCE, || {
        let calls: Vec<_> = (0..2 * workers).map(|_| client.submit("pid", b"").expect("submitted")).collect();
        for call in calls {
            let reply = client.wait(call).expect("a settled process answers");
            seen.insert(String::from_utf8_lossy(&reply).into_owned());
        }
        seen.len() >= workers
    });
}

fn pid_of_a_worker(client: &mut Client) -> u32 {
    let reply = client.invoke("pid", b"").unwrap();
    String::from_utf8_lossy(&reply).split(' ').nth(1).unwrap().parse().unwrap()
}

#[test]
fn w1_w9_idle_workers_that_are_killed_are_replaced_and_buried() {
    on_both_channels(|ipc| {
        let (process, mut client) = start_workers(ipc, 2, &[]);
        settle(&process, &mut client, 2);
        let open = fds(process.pid());
        let mut dice = Dice(seed());
        for round in 0..25 {
            let victims = children(process.pid());
            std::thread::sleep(Duration::from_micros(dice.below(3000)));
            for pid in victims.iter().take(1 + round % 2) {
                signal(*pid, 9);
            }
            // A call right into it is answered: it began nowhere. The kernel hands a queue's message to a reader that is
            // about to die, and nobody can tell: there it may have run.
            match (ipc, client.invoke("echo", b"on")) {
                (_, Ok(reply)) => assert_eq!(&*reply, b"on"),
                (Ipc::Queue, Err(InvokeError::WorkerLost { .. })) => {}
                (_, Err(error)) => panic!("round {round}, {ipc}: {error}"),
            }
        }
        settle(&process, &mut client, 2);
        wait_until("descriptors are back", PATIENCE, || fds(process.pid()) == open);
    });
}

#[test]
fn w2_w9_kills_at_any_moment_lose_no_call_deliver_no_wrong_byte_and_leak_nothing() {
    on_both_channels(|ipc| {
        let (process, mut client) = start_workers(ipc, 2, &[]);
        settle(&process, &mut client, 2);
        client.invoke("echo", content(1, 300_000)).unwrap();
        let open = fds(process.pid());
        let stop = AtomicBool::new(false);
        let (mut right, mut lost, mut call) = (0, 0, 0);
        std::thread::scope(|scope| {
            let killer = scope.spawn(|| kill_workers(&process, seed(), kills(), &stop));
            let mut in_flight = VecDeque::new();
            let begun = Instant::now();
            while !killer.is_finished() || !in_flight.is_empty() {
                while in_flight.len() < 16 && !killer.is_finished() {
                    call += 1;
                    let bytes = [0, 8, 40, 41, 4096, 100_000, 300_000][(call % 7) as usize];
                    in_flight.push_back((call, bytes, client.submit("echo", content(call, bytes)).unwrap()));
                }
                let Some((call, bytes, handle)) = in_flight.pop_front() else { continue };
                match client.wait(handle) {
                    Ok(reply) => {
                        assert!(*reply == *content(call, bytes), "call {call} of {bytes} bytes brought wrong ones");
                        right += 1;
                    }
                    Err(InvokeError::WorkerLost { .. }) => lost += 1,
                    Err(error) => {
                        stop.store(true, Ordering::Relaxed);
                        panic!("call {call} of {bytes} bytes: {error}");
                    }
                }
                assert!(begun.elapsed() < Duration::from_secs(60 + kills() / 20), "stuck after {right} calls");
            }
            killer.join().unwrap();
        });
        assert!(right > kills() / 2, "only {right} right answers, {lost} lost");
        settle(&process, &mut client, 2);
        wait_until("descriptors are back", PATIENCE, || fds(process.pid()) == open);
    });
}

/// On queues, answers that a function had not read yet were taken for its unread request: it was run again, and again.
#[test]
fn w2_g2_a_call_with_unread_answers_is_not_run_twice() {
    on_both_channels(|ipc| {
        let (_process, mut client) = start_workers(ipc, 2, &[]);
        let path = std::env::temp_dir().join(format!("praas-once-{ipc}-{}", std::process::id()));
        let error = client.invoke("once", path.to_str().unwrap()).unwrap_err();
        assert!(matches!(&error, InvokeError::WorkerLost { text } if text.contains("may have run")), "{error}");
        let runs = std::fs::read_to_string(&path).unwrap().lines().count();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(runs, 1, "{ipc}: it ran {runs} times");
    });
}

#[test]
fn w2_idempotent_calls_survive_kills() {
    on_both_channels(|ipc| {
        let (process, mut client) = start_workers(ipc, 2, &[]);
        settle(&process, &mut client, 2);
        let mut client = connect_with(&process, &ClientConfig { delivery: Delivery::Retry, ..ClientConfig::default() });
        for round in 0..10 {
            let call = client.submit("sleep", b"30").unwrap();
            // Once, while it runs; a call is given to four workers before it is given up.
            std::thread::sleep(Duration::from_millis(round));
            for pid in children(process.pid()) {
                signal(pid, 9);
            }
            assert_eq!(&*client.wait(call).unwrap(), b"slept", "round {round}");
        }
    });
}

#[test]
fn w3_payload_memory_comes_back_from_the_dead() {
    on_both_channels(|ipc| {
        let (process, mut client) = start_workers(ipc, 2, &[]);
        let input: Arc<[u8]> = content(3, 64 << 20).into();
        let mut dice = Dice(seed());
        for _ in 0..8 {
            let call = client.submit("echo", Arc::clone(&input)).unwrap();
            // Before, while and after the bytes move.
            let until = Instant::now() + Duration::from_millis(dice.below(120));
            while Instant::now() < until {
                if let Some((_, ended)) = client.poll() {
                    assert!(ended.is_ok_and(|reply| *reply == *input));
                    break;
                }
            }
            children(process.pid()).into_iter().for_each(|pid| signal(pid, 9));
            match client.wait(call) {
                Ok(reply) => assert!(*reply == *input),
                // Waited for above, or lost.
                Err(InvokeError::Protocol { .. } | InvokeError::WorkerLost { .. }) => {}
                Err(error) => panic!("{error}"),
            }
        }
        // A worker that dies half-way through its own 64 MiB.
        for _ in 0..4 {
            assert!(matches!(client.invoke("touch", b"67108864"), Err(InvokeError::WorkerLost { .. })));
        }
        // Of 256 MiB all would be gone by now.
        let calls: Vec<_> = (0..3).map(|_| client.submit("echo", Arc::clone(&input)).unwrap()).collect();
        for call in calls {
            assert!(*client.wait(call).unwrap() == *input);
        }
    });
}

#[test]
fn w4_every_kind_of_death_is_told_by_its_name() {
    on_both_channels(|ipc| {
        let (_process, mut client) = start_workers(ipc, 2, &[]);
        let deaths: [(&str, &str, &str); 7] = [
            ("raise", "11", "signal 11"),
            ("raise", "9", "signal 9"),
            ("raise", "15", "signal 15"),
            ("abort", "", "signal 6"),
            ("exit", "0", "code 0"),
            ("exit", "77", "code 77"),
            ("exec", "", "code 0"),
        ];
        for (function, input, how) in deaths {
            let error = client.invoke(function, input).unwrap_err();
            let right =
                matches!(&error, InvokeError::WorkerLost { text } if text.contains(how) && text.contains(function));
            assert!(right, "{function} {input}: {error}");
            assert_eq!(&*client.invoke("echo", b"next").unwrap(), b"next");
        }
        // The same, told to a function that called it.
        let error = client.invoke("relay", b"exit 78").unwrap_err();
        assert!(error.to_string().contains("code 78"), "{error}");
        assert_eq!(&*client.invoke("relay", b"echo next").unwrap(), b"next");
    });
}

#[test]
fn w5_a_hung_worker_costs_its_caller_a_timeout_and_nobody_else_anything() {
    on_both_channels(|ipc| {
        let (process, mut client) = start_workers(ipc, 2, &[]);
        settle(&process, &mut client, 2);
        let mut neighbour = connect(&process);
        for (function, input) in [("hang", ""), ("spin", ""), ("raise", "19")] {
            let before = children(process.pid());
            let deadline = Duration::from_millis(300);
            let begun = Instant::now();
            let call = client.submit_within(function, input, deadline).unwrap();
            for n in 0..50_u8 {
                assert_eq!(&*neighbour.invoke("echo", &[n]).unwrap(), [n], "beside {function}");
            }
            let error = client.wait(call).unwrap_err();
            let took = begun.elapsed();
            assert!(matches!(error, InvokeError::Timeout { .. }), "{function}: {error}");
            // It was 299.5 ms once: the deadline was counted from the beginning of a turn of the controller, which others had kept from its core since.
            assert!(took >= deadline && took < deadline + Duration::from_secs(2), "{function}: {took:?}");
            wait_until("the hung worker is replaced", PATIENCE, || {
                let now = children(process.pid());
                now.len() == 2 && now.iter().filter(|pid| before.contains(pid)).count() == 1
            });
            settle(&process, &mut client, 2);
        }
    });
}

#[test]
fn w5_a_hung_callee_costs_its_caller_a_timeout() {
    on_both_channels(|ipc| {
        let (process, mut client) = start_workers(ipc, 2, &[]);
        // Through the controller, then under a lease that `nested` has by the time it calls `spin`.
        for call in ["relay spin", "relay raise 19"] {
            let (function, input) = call.split_once(' ').unwrap();
            let call = client.submit_within(function, input, Duration::from_millis(300)).unwrap();
            let begun = Instant::now();
            let error = client.wait(call).unwrap_err();
            assert!(matches!(error, InvokeError::Timeout { .. }), "{error}");
            assert!(begun.elapsed() < Duration::from_secs(3));
            settle(&process, &mut client, 2);
        }
        let call = client.submit_within("leased", b"spin", Duration::from_millis(300)).unwrap();
        let error = client.wait(call).unwrap_err();
        assert!(matches!(error, InvokeError::Timeout { .. }), "{error}");
        settle(&process, &mut client, 2);
        assert_eq!(&*client.invoke("relay", b"echo after").unwrap(), b"after");
    });
}

#[test]
fn w2_deaths_of_callee_and_caller_under_leases_of_every_kind() {
    on_both_channels(|ipc| {
        let (process, mut client) = start_workers(ipc, 3, &[]);
        settle(&process, &mut client, 3);
        let modes = if ipc == Ipc::Ring { &["exchange", "ring", "async", "loan"][..] } else { &["exchange", "loan"] };
        for mode in modes {
            let stop = AtomicBool::new(false);
            let ended = AtomicU64::new(0);
            std::thread::scope(|scope| {
                let killer = scope.spawn(|| kill_workers(&process, seed(), kills() / 3, &stop));
                let mut call = 0;
                while !killer.is_finished() {
                    call += 1;
                    let bytes = [8, 41, 5000, 70_000][call % 4];
                    let input = format!("echo 300 {mode} {bytes}");
                    let handle = client.submit_within("nested", input.as_str(), Duration::from_secs(20)).unwrap();
                    let ended_well = match client.wait(handle) {
                        Ok(_) | Err(InvokeError::WorkerLost { .. }) => true,
                        // Its callee died.
                        Err(InvokeError::Failed { text, .. }) if text.contains("worker lost") => true,
                        Err(error) => {
                            println!("{input}: {error}");
                            false
                        }
                    };
                    if !ended_well {
                        stop.store(true, Ordering::Relaxed);
                        panic!("{mode}: a nested call ended as it must not");
                    }
                    ended.fetch_add(1, Ordering::Relaxed);
                }
                killer.join().unwrap();
            });
            assert!(ended.load(Ordering::Relaxed) > 0);
            settle(&process, &mut client, 3);
            let reply = client.invoke("nested", format!("echo 300 {mode} 5000").as_str()).unwrap();
            assert!(!reply.is_empty());
        }
    });
}

/// An answer lies in the memory of the worker that gave it. When that worker died, its reader was killed for naming a
/// block in no worker's segment; or, once the place was used again, handed on bytes of the newcomer.
#[test]
fn w2_a_reply_outlives_the_worker_that_gave_it() {
    on_both_channels(|ipc| {
        let (_process, mut client) = start_workers(ipc, 2, &[]);
        for mode in ["return", "pass"] {
            for _ in 0..5 {
                let call = client.submit_within("survivor", mode, Duration::from_secs(15)).unwrap();
                let reply = client.wait(call).unwrap_or_else(|error| panic!("{mode}: {error}"));
                assert!(
                    reply.len() == 100_000 && reply.iter().all(|byte| *byte == 7),
                    "{mode}: bytes of somebody else"
                );
            }
        }
    });
}

#[test]
fn w7_a_function_that_always_aborts_is_refused_and_costs_next_to_nothing() {
    on_both_channels(|ipc| {
        let (process, mut client) = start_workers(ipc, 2, &[]);
        settle(&process, &mut client, 2);
        // All at once: those that wait are refused with those to come.
        let calls: Vec<_> = (0..200).map(|_| client.submit("abort", b"").unwrap()).collect();
        let (mut deaths, mut refused) = (0, 0);
        let mut count = |ended: Result<_, InvokeError>| match ended {
            Err(InvokeError::WorkerLost { .. }) => deaths += 1,
            Err(InvokeError::FunctionBroken { text }) => {
                assert!(text.contains("abort"), "{text}");
                refused += 1;
            }
            other => panic!("{other:?}"),
        };
        for call in calls {
            count(client.wait(call).map(drop));
        }
        let (begun, cpu) = (Instant::now(), cpu_seconds(process.pid()));
        while begun.elapsed() < Duration::from_secs(3) {
            count(client.invoke("abort", b"").map(drop));
            assert_eq!(&*client.invoke("echo", b"others go on").unwrap(), b"others go on");
            std::thread::sleep(Duration::from_millis(10));
        }
        // Five to break it, one more for each worker that was at it then, and one after each pause.
        assert!(deaths <= 12, "{deaths} workers died in three seconds");
        assert!(refused > 200, "{refused}");
        let cpu = cpu_seconds(process.pid()) - cpu;
        assert!(cpu < 1.5, "{cpu} s of CPU in 3 s");
    });
}

#[test]
fn w7_a_worker_program_that_breaks_later_is_tried_ever_more_rarely_and_found_again_when_mended() {
    let folder = std::env::temp_dir().join(format!("praas-w7-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let path = |name: &str| folder.join(name);
    let (program, starts) = (path("worker"), path("starts"));
    std::fs::copy(test_worker(), &program).unwrap();
    let config =
        LaunchConfig { worker: vec![program.display().to_string()], workers_max: 2, ..launch_config(Ipc::Ring) };
    let (process, mut client) = start_with(&config);
    // The program is replaced by one that only leaves a mark.
    std::fs::write(path("broken"), format!("#!/bin/sh\necho >> {}\nexit 3\n", starts.display())).unwrap();
    std::fs::set_permissions(path("broken"), std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::rename(path("broken"), &program).unwrap();
    signal(pid_of_a_worker(&mut client), 9);
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(3) {
        assert_eq!(&*client.invoke("echo", b"the other one").unwrap(), b"the other one");
        std::thread::sleep(Duration::from_millis(5));
    }
    let count = std::fs::read_to_string(&starts).unwrap().lines().count();
    assert!((3..=12).contains(&count), "{count} starts in three seconds");
    std::fs::copy(test_worker(), path("mended")).unwrap();
    std::fs::rename(path("mended"), &program).unwrap();
    settle(&process, &mut client, 2);
    drop(process);
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn w8_what_workers_forked_goes_with_them_and_with_the_process() {
    on_both_channels(|ipc| {
        let (process, mut client) = start_workers(ipc, 2, &[]);
        let grandchild = |client: &mut Client, session: &str| -> u32 {
            String::from_utf8_lossy(&client.invoke("fork", session).unwrap()).parse().unwrap()
        };
        // Worker 1 has the first call of an idle process. With its death the same group's and the runaways go.
        for session in ["", "setsid"] {
            let child = grandchild(&mut client, session);
            assert!(lives(child));
            let worker = parent(child);
            signal(worker, 9);
            wait_until("what a dead worker forked is gone", PATIENCE, || state(child).is_none_or(|state| state == 'Z'));
            settle(&process, &mut client, 2);
        }
        let left: Vec<u32> = ["", "setsid"].iter().map(|session| grandchild(&mut client, session)).collect();
        let workers = children(process.pid());
        assert!(process.stop().unwrap().success());
        let begun = Instant::now();
        wait_until("nobody is left after a stop", PATIENCE, || left.iter().chain(&workers).all(|pid| !lives(*pid)));
        assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    });
}

fn parent(pid: u32) -> u32 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    stat.rsplit_once(')').unwrap().1.split_whitespace().nth(1).unwrap().parse().unwrap()
}
