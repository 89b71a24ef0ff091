//! A hostile worker (faults.md W11, R1-R3, R7, R10; promise G4): it wastes what is its own and nothing else. Its callers
//! get an error, it is killed when it breaks the protocol, and everybody else is served all along.
#![allow(clippy::cast_possible_truncation, reason = "dice and patterns are cut to size on purpose")]

mod support;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use praas_dataplane::{Client, ClientConfig, InvokeError, Ipc, LaunchConfig, LocalProcess};
use support::{
    PATIENCE, children, connect, cpu_seconds, evil_worker, fds, launch_config, lives, on_both_channels, start_with,
    wait_until,
};

fn start_evil(ipc: Ipc) -> (LocalProcess, Client) {
    let workers = 3;
    start_with(&LaunchConfig { worker: vec![evil_worker()], workers, workers_max: workers, ..launch_config(ipc) })
}

/// What becomes of an attack.
struct Aftermath {
    outcome: Result<Vec<u8>, InvokeError>,
    /// The attacker was killed, nobody else.
    only_it_died: bool,
    nobody_died: bool,
}

/// Calls `evil ATTACK` on worker 1 while another client calls `echo` without a break, and looks who is left.
fn attack(ipc: Ipc, name: &str) -> Aftermath {
    let (process, mut client) = start_evil(ipc);
    let before = children(process.pid());
    let stop = AtomicBool::new(false);
    // Everybody is idle, so worker 1 is asked, who is the attacker; only then do the others begin.
    let first: u32 = String::from_utf8_lossy(&client.invoke("pid", b"").unwrap()).parse().unwrap();
    let call = client.submit_within("evil", name, Duration::from_secs(6)).unwrap();
    let (outcome, beside) = std::thread::scope(|scope| {
        let neighbour = scope.spawn(|| {
            let mut client = connect(&process);
            let mut answered = 0_u64;
            while answered < 20 || !stop.load(Ordering::Relaxed) {
                let call = client.submit_within("echo", &answered.to_le_bytes(), Duration::from_secs(5)).unwrap();
                match client.wait(call) {
                    Ok(reply) => assert_eq!(*reply, answered.to_le_bytes()),
                    // Between its answer and its crime worker 1 may be given one of these, which dies with it.
                    Err(InvokeError::WorkerLost { .. } | InvokeError::Timeout { .. }) => {}
                    Err(error) => panic!("beside `{name}`: {error}"),
                }
                answered += 1;
            }
            answered
        });
        let outcome = client.wait(call).map(|reply| reply.to_vec());
        stop.store(true, Ordering::Relaxed);
        (outcome, neighbour.join().expect("the neighbour is served"))
    });
    assert!(beside > 0, "nobody was served beside `{name}`");
    // Everybody answers again, and nobody dead lies about.
    let mut died = Vec::new();
    wait_until("three workers live", PATIENCE, || {
        let now = children(process.pid());
        died = before.iter().filter(|pid| !now.contains(pid)).copied().collect();
        now.len() == 3 && now.iter().all(|pid| lives(*pid))
    });
    for n in 0..30_u8 {
        assert_eq!(&*client.invoke("echo", &[n]).unwrap(), [n], "after `{name}`");
    }
    println!("{ipc} {name}: {outcome:?}, {} died, {beside} answers beside it", died.len());
    Aftermath { outcome, only_it_died: died == [first], nobody_died: died.is_empty() }
}

#[test]
fn r1_w11_a_worker_that_breaks_the_protocol_is_killed_and_only_it() {
    on_both_channels(|ipc| {
        let mut attacks = vec![
            "unknown kind",
            "another reply",
            "reply to nobody",
            "unknown code",
            "close a stranger's lease",
            "take a lease never granted",
            "forget nobody",
            "release nothing",
            "talk on the control socket",
            "register again",
        ];
        if ipc == Ipc::Ring {
            attacks.extend([
                "block far away",
                "block overflow",
                "block unaligned",
                "block too long",
                "block over the end",
                "release to nobody",
                "map again",
            ]);
        }
        for name in attacks {
            let after = attack(ipc, name);
            let told = matches!(&after.outcome, Err(InvokeError::WorkerLost { text }) if text.contains("protocol") || text.contains("segment"));
            assert!(told, "{ipc} {name}: {:?}", after.outcome);
            assert!(after.only_it_died, "{ipc} {name}");
        }
    });
}

/// A block whose owner is gone is no crime: its giver may not know of the death yet.
#[test]
fn r1_a_block_of_nobody_is_an_error_and_never_anybodys_bytes() {
    for name in ["block of nobody", "block of the controller"] {
        let after = attack(Ipc::Ring, name);
        assert!(matches!(after.outcome, Err(InvokeError::WorkerLost { .. })), "{name}: {:?}", after.outcome);
        assert!(after.only_it_died || after.nobody_died, "{name}");
    }
}

#[test]
fn w11_a_second_reply_is_dropped_and_its_worker_killed() {
    on_both_channels(|ipc| {
        let after = attack(ipc, "reply twice");
        assert_eq!(after.outcome, Ok(Vec::new()), "the first counts");
        assert!(after.only_it_died);
    });
}

#[test]
fn r1_an_echo_of_more_than_was_lent_is_refused() {
    let (process, mut client) = start_evil(Ipc::Ring);
    let before = children(process.pid());
    let error = client.invoke("evil", vec![7; 1000]).unwrap_err();
    assert!(matches!(&error, InvokeError::WorkerLost { text } if text.contains("more than it was lent")), "{error}");
    wait_until("it is replaced", PATIENCE, || {
        let now = children(process.pid());
        now.len() == 3 && now.iter().filter(|pid| before.contains(pid)).count() == 2
    });
}

#[test]
fn g4_lies_that_are_no_crime_change_nothing() {
    on_both_channels(|ipc| {
        for name in ["harmless lies", "requests that fail"] {
            let after = attack(ipc, name);
            // It may be killed for what it is; nobody else may.
            assert!(after.only_it_died || after.nobody_died, "{ipc} {name}");
        }
    });
}

#[test]
fn r10_a_worker_that_floods_and_never_reads_hurts_itself_only() {
    on_both_channels(|ipc| {
        let after = attack(ipc, "flood of requests");
        assert!(after.only_it_died || after.nobody_died, "{ipc}");
    });
}

/// RELEASE records for another worker were passed on without a bound: their flood got the other one killed as deaf.
#[test]
fn g4_a_flood_of_releases_does_not_kill_a_busy_neighbour() {
    let (process, mut client) = start_evil(Ipc::Ring);
    let evil = client.submit("sleep", b"0").unwrap();
    client.wait(evil).unwrap();
    // Worker 1 is asked first, so the two sleepers are the honest ones.
    let evil = client.submit_within("evil", b"flood of releases", Duration::from_secs(10)).unwrap();
    let sleepers: Vec<_> = (0..2).map(|_| client.submit("sleep", b"1500").unwrap()).collect();
    for sleeper in sleepers {
        let reply = client.wait(sleeper).unwrap_or_else(|error| panic!("an innocent worker was harmed: {error}"));
        assert_eq!(&*reply, b"slept");
    }
    let _ = client.wait(evil);
    assert_eq!(children(process.pid()).len(), 3);
}

/// A lease taken up at a position far outside the ring made its callee exit: a caller could kill its callees.
#[test]
fn g4_a_lease_taken_up_at_an_impossible_position_harms_its_taker_only() {
    let after = attack(Ipc::Ring, "a lease from far away");
    assert!(after.only_it_died || after.nobody_died);
}

/// The controller's end of the control socket blocked: a worker that did not read its own stopped the whole process.
#[test]
fn g4_a_worker_that_does_not_read_its_control_socket_stops_nobody() {
    let (process, mut client) = start_evil(Ipc::Ring);
    let evil = client.submit_within("evil", b"deaf on the control socket", Duration::from_secs(10)).unwrap();
    let mut other = Client::connect(process.addr(), &ClientConfig::default()).unwrap();
    while client.in_flight() > 0 {
        let call = other.submit_within("echo", b"on", Duration::from_secs(5)).unwrap();
        assert_eq!(&*other.wait(call).expect("the process goes on"), b"on");
        if let Some((call, ended)) = client.poll() {
            assert_eq!(call, evil);
            println!("the deaf one: {ended:?}");
        }
    }
}

#[test]
fn r3_a_worker_that_scribbles_over_its_whole_segment_is_survived() {
    for _ in 0..3 {
        let after = attack(Ipc::Ring, "scribble");
        assert!(after.only_it_died || after.nobody_died, "{:?}", after.outcome);
    }
}

#[test]
fn r7_a_storm_of_wake_ups_leaves_others_served() {
    let (process, mut client) = start_evil(Ipc::Ring);
    let open = fds(process.pid());
    let evil = client.submit("evil", b"bell").unwrap();
    let cpu = cpu_seconds(process.pid());
    let mut other = connect(&process);
    while client.in_flight() > 0 {
        assert_eq!(&*other.invoke("echo", b"on").unwrap(), b"on");
        if client.poll().is_some() {
            break;
        }
    }
    println!("{:.2} s of CPU in a storm of 2 s", cpu_seconds(process.pid()) - cpu);
    let _ = evil;
    drop(other);
    wait_until("descriptors are back", PATIENCE, || fds(process.pid()) <= open);
}
