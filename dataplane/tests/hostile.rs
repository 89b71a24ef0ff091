//! A hostile worker (faults.md W11, R1-R3, R7, R10; promise G4): it wastes what is its own and nothing else. Its callers
//! get an error, it is killed when it breaks the protocol, and everybody else is served all along.
#![allow(clippy::cast_possible_truncation, reason = "dice and patterns are cut to size on purpose")]

mod support;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use praas_dataplane::client::Outgoing;
use praas_dataplane::{Client, ClientConfig, InvokeError, Ipc, LaunchConfig, LocalProcess};
use support::{
    PATIENCE, children, connect, content, cpu_seconds, evil_worker, fds, launch_config, lives, memory_kib,
    on_both_channels, queues, start_with, wait_until,
};

fn start_evil(ipc: Ipc) -> (LocalProcess, Client) {
    start_evil_with(ipc, &[])
}

fn start_evil_with(ipc: Ipc, args: &[&str]) -> (LocalProcess, Client) {
    let workers = 3;
    let mut config = LaunchConfig { worker: vec![evil_worker()], workers, workers_max: workers, ..launch_config(ipc) };
    config.args.extend(args.iter().map(|arg| (*arg).to_owned()));
    start_with(&config)
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
    attack_beside(ipc, &[], name, |client, number| {
        let call = client.submit_within("echo", &number.to_le_bytes(), Duration::from_secs(5))?;
        assert_eq!(*client.wait(call)?, number.to_le_bytes());
        Ok(())
    })
}

/// The same, while another client writes and reads three keys: what was written is read.
fn attack_state(ipc: Ipc, args: &[&str], name: &str) -> Aftermath {
    let written = std::sync::Mutex::new([const { None }; 3]);
    attack_beside(ipc, args, name, |client, number| {
        let key = [b'h', (number % 3) as u8];
        let value = content(number, [5, 60, 20_000][(number % 3) as usize]);
        // Unknown, until this is acknowledged.
        let mut written = written.lock().unwrap();
        let last = written[number as usize % 3].take();
        if let Some(last) = last {
            let read = call(client, "get", key)?;
            assert!(read == content(last, read.len()), "beside `{name}` key {} is not what was written", key[1]);
        }
        call_with(client, "put", || Outgoing::from_args(&[&key, &value]))?;
        written[number as usize % 3] = Some(number);
        Ok(())
    })
}

/// A call of one of the honest workers' functions, which may be done twice: the attacker says who it is.
fn call(client: &mut Client, function: &str, input: impl AsRef<[u8]>) -> Result<Vec<u8>, InvokeError> {
    call_with(client, function, || Outgoing::from(input.as_ref()))
}

fn call_with(client: &mut Client, function: &str, input: impl Fn() -> Outgoing) -> Result<Vec<u8>, InvokeError> {
    for calls in (0..100).map(|round| 1 + round.min(1)) {
        let within = Duration::from_secs(5);
        let calls: Vec<_> = (0..calls).map(|_| client.submit_within(function, input(), within)).collect();
        let mut ended: Vec<_> = calls.into_iter().map(|call| client.wait(call?)).collect();
        ended.retain(|ended| !matches!(ended, Err(InvokeError::Failed { text, .. }) if text == "evil"));
        if let Some(ended) = ended.pop() {
            return ended.map(|reply| reply.to_vec());
        }
    }
    panic!("no honest worker was given `{function}`")
}

/// Calls `evil ATTACK` on worker 1 while another client does something else without a break, and looks who is left.
fn attack_beside(
    ipc: Ipc,
    args: &[&str],
    name: &str,
    beside: impl Fn(&mut Client, u64) -> Result<(), InvokeError> + Sync,
) -> Aftermath {
    let (process, mut client) = start_evil_with(ipc, args);
    let before = children(process.pid());
    let stop = AtomicBool::new(false);
    // Everybody is idle, so worker 1 is asked, who is the attacker; only then do the others begin.
    let first: u32 = String::from_utf8_lossy(&client.invoke("pid", b"").unwrap()).parse().unwrap();
    let call = client.submit_within("evil", name, Duration::from_secs(6)).unwrap();
    let (outcome, served) = std::thread::scope(|scope| {
        let neighbour = scope.spawn(|| {
            let mut client = connect(&process);
            let mut done = 0_u64;
            while done < 20 || !stop.load(Ordering::Relaxed) {
                match beside(&mut client, done) {
                    // Between its answer and its crime worker 1 may be given one of these, which dies with it.
                    Ok(()) | Err(InvokeError::WorkerLost { .. } | InvokeError::Timeout { .. }) => {}
                    Err(error) => panic!("beside `{name}`: {error}"),
                }
                done += 1;
            }
            done
        });
        let outcome = client.wait(call).map(|reply| reply.to_vec());
        stop.store(true, Ordering::Relaxed);
        (outcome, neighbour.join().expect("the neighbour is served"))
    });
    assert!(served > 0, "nobody was served beside `{name}`");
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
    println!("{ipc} {name}: {outcome:?}, {} died, {served} answers beside it", died.len());
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

// ---- the state --------------------------------------------------------------------------------------------------

const ISOLATE: &str = "--isolate";

#[test]
fn r1_w11_who_breaks_the_protocol_of_the_state_is_killed_and_only_it() {
    let mut attacks: Vec<(Ipc, &[&str], &str)> = Vec::new();
    for name in ["an unknown question", "delete a key of 1025 bytes", "delete no key", "delete a key of a megabyte"] {
        attacks.extend([(Ipc::Ring, &[] as &[&str], name), (Ipc::Queue, &[], name)]);
    }
    for name in ["map the controller", "map nobody", "map a number too large", "a flood of puts"] {
        attacks.extend([(Ipc::Ring, &[] as &[&str], name), (Ipc::Queue, &[], name)]);
    }
    for name in [
        "a block far away",
        "a block too long",
        "a block unaligned",
        "a neighbour's block",
        "the controller's block",
        "nobody's block",
        "get over rings",
        "keys over rings",
        "a flood of puts",
    ] {
        attacks.extend([(Ipc::Ring, &[] as &[&str], name), (Ipc::Ring, &[ISOLATE], name)]);
    }
    attacks.push((Ipc::Ring, &[ISOLATE], "maps that lead nowhere"));
    let _alone = queues();
    for (ipc, args, name) in attacks {
        let after = attack_state(ipc, args, &format!("state: {name}"));
        let told = matches!(&after.outcome, Err(InvokeError::WorkerLost { text }) if text.contains("protocol"));
        assert!(told, "{ipc} {args:?} {name}: {:?}", after.outcome);
        assert!(after.only_it_died, "{ipc} {args:?} {name}");
    }
}

/// Answers to questions nobody waited for piled up in the controller, a copy of the object each: 4000 of 8 MB.
#[test]
fn g4_g8_a_flood_of_reads_takes_no_memory() {
    let _alone = queues();
    let (process, mut client) = start_evil(Ipc::Queue);
    let evil = client.submit_within("evil", "state: a flood of gets", Duration::from_secs(10)).unwrap();
    let mut most = 0;
    while client.poll().is_none_or(|(call, ended)| {
        assert!(call == evil && matches!(ended, Err(InvokeError::WorkerLost { .. })), "it is killed");
        false
    }) {
        most = most.max(memory_kib(process.pid()));
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(most < 150_000, "{most} KiB");
}

/// What is written may be no object, or be everybody's at once, or change while it is looked at: it is an answer, or the writer's own loss.
#[test]
fn r3_r4_objects_that_are_none_hurt_their_writer_only() {
    let over_queues: &[&str] = &["objects that are none", "a flood of maps"];
    let over_rings: &[&str] =
        &["objects that are none", "one block under many keys", "a header that flips", "maps that lead nowhere"];
    let _alone = queues();
    for (ipc, args, names) in [
        (Ipc::Ring, &[] as &[&str], over_rings),
        (Ipc::Ring, &[ISOLATE], &over_rings[..3]),
        (Ipc::Queue, &[], &over_queues[..1]),
    ] {
        for name in names {
            let after = attack_state(ipc, args, &format!("state: {name}"));
            assert_eq!(after.outcome, Ok(b"done".to_vec()), "{ipc} {args:?} {name}");
            assert!(after.nobody_died, "{ipc} {args:?} {name}");
        }
    }
    for ipc in [Ipc::Ring, Ipc::Queue] {
        let after = attack_state(ipc, &[], "state: a flood of maps");
        assert!(after.only_it_died || after.nobody_died, "{ipc}");
    }
}

/// The text of each refusal stayed lent to who never gave one back: enough of them, and no call's input found room.
#[test]
fn g4_texts_that_are_never_given_back_take_no_memory() {
    let args = ["--state-bytes-max=1000", "--arena-bytes=2097152"];
    for name in ["state: texts never given back", "texts of calls never given back"] {
        let (_process, mut client) = start_evil_with(Ipc::Ring, &args);
        let evil = client.submit_within("evil", name, Duration::from_secs(20)).unwrap();
        assert_eq!(&*client.wait(evil).unwrap(), b"done");
        // Two of it at a time.
        let input = content(1, 700_000);
        assert!(call(&mut client, "copy", &input).unwrap_or_else(|error| panic!("{name}: {error}")) == input);
    }
}

/// A worker filled the state, and with `--isolate` (or by dying) the memory that calls need.
#[test]
fn g4_g8_a_full_state_stops_no_call() {
    for args in [&["--arena-bytes=8388608"] as &[&str], &["--arena-bytes=8388608", ISOLATE]] {
        let (process, mut client) = start_evil_with(Ipc::Ring, args);
        let input = content(1, 1_000_000);
        for round in 0..4 {
            let evil = client.submit_within("evil", "state: fill it", Duration::from_secs(10)).unwrap();
            assert_eq!(&*client.wait(evil).unwrap(), b"done");
            assert!(call(&mut client, "copy", &input).unwrap() == input, "{args:?} round {round}");
            // What it wrote is still there, and is moved to us as far as there is room.
            for pid in children(process.pid()) {
                support::signal(pid, 9);
            }
            for _ in 0..10 {
                assert!(call(&mut client, "copy", &input).unwrap() == input, "{args:?} round {round}");
            }
        }
        let keys: u32 = String::from_utf8_lossy(&call(&mut client, "keys", b"").unwrap()).parse().unwrap();
        assert!(keys >= 25, "{args:?}: {keys} objects");
    }
}

/// Who says that it reads everything keeps 255 objects from being freed, and nobody from writing.
#[test]
fn g4_g8_pins_that_lie_keep_a_bounded_amount_of_memory() {
    for args in [&[] as &[&str], &[ISOLATE]] {
        let (process, mut client) = start_evil_with(Ipc::Ring, args);
        let evil = client.submit_within("evil", "state: pins that lie", Duration::from_secs(10)).unwrap();
        let mut other = connect(&process);
        let (mut most, mut longest, mut written) = (0, Duration::ZERO, 0);
        loop {
            let begun = Instant::now();
            assert_eq!(call(&mut other, "overwrite", b"40"), Ok(b"40".to_vec()), "{args:?}");
            longest = longest.max(begun.elapsed());
            written += 40;
            most =
                most.max(memory_kib(process.pid()) + children(process.pid()).into_iter().map(memory_kib).sum::<u64>());
            if let Some((call, ended)) = client.poll() {
                assert!(call == evil && ended.is_ok_and(|reply| *reply == *b"done"), "{args:?}");
                break;
            }
        }
        println!("{args:?}: {written} written, {most} KiB at most, 40 in {longest:?} at most");
        // 255 of 100 kB are 25 MB; what a process of four takes without any is 10.
        assert!(written > 500 && most < 80_000, "{args:?}: {most} KiB");
        assert!(longest < Duration::from_secs(2), "{args:?}: {longest:?}");
    }
}

/// R4, S5: with `--isolate` a reader's object is nobody's to change. Without, its writer can show it wrong bytes.
#[test]
fn r4_s5_an_object_that_its_writer_scribbles_over_stays_as_it_was_with_isolate() {
    let reads = std::sync::atomic::AtomicU64::new(0);
    let after = attack_beside(Ipc::Ring, &[ISOLATE], "state: scribble over an object", |client, _| {
        // Empty, as long as it is not there.
        let reply = call(client, "model", b"typed")?;
        reads.fetch_add(String::from_utf8_lossy(&reply).parse().unwrap_or(0), Ordering::Relaxed);
        Ok(())
    });
    assert_eq!(after.outcome, Ok(b"done".to_vec()));
    assert!(after.nobody_died && reads.into_inner() > 20);
    // Without it the controller and the others are served all the same.
    let after = attack_state(Ipc::Ring, &[], "state: scribble over an object");
    assert!(after.nobody_died, "{:?}", after.outcome);
}

// ---- messages ---------------------------------------------------------------------------------------------------

/// The same as `attack`, while another client has messages sent and received.
fn attack_mail(ipc: Ipc, args: &[&str], name: &str) -> Aftermath {
    attack_beside(ipc, args, name, |client, number| {
        let key = [&b"honest"[..], &number.to_le_bytes()].concat();
        let value = content(number, [5, 60, 20_000][(number % 3) as usize]);
        let received = call_with(client, "mail", || Outgoing::from_args(&[&key, &value]))?;
        assert!(received == value, "beside `{name}` a message is not what was sent");
        Ok(())
    })
}

#[test]
fn r1_w11_who_breaks_the_protocol_of_messages_is_killed_and_only_it() {
    let mut attacks: Vec<(Ipc, &[&str], &str)> = Vec::new();
    for name in [
        "an unknown question",
        "a key of no bytes",
        "a key of 1025 bytes",
        "a key of a megabyte",
        "a receive under a megabyte",
        "a name of a megabyte",
        "no key",
        "a key that was used",
        "a key longer than its message",
        "the longest key there is",
        "a key at the end of a long message",
        "to nobody",
        "to anybody",
        "a call of itself",
        "a call of nobody",
        "a call of no name",
        "two receives at once",
        "a message while it receives",
        "a flood",
        "a flood of long ones",
    ] {
        attacks.extend([(Ipc::Ring, &[] as &[&str], name), (Ipc::Queue, &[], name)]);
    }
    for name in ["a block far away", "a block of the controller", "a block too long"] {
        attacks.extend([(Ipc::Ring, &[] as &[&str], name), (Ipc::Ring, &[ISOLATE], name)]);
    }
    let _alone = queues();
    for (ipc, args, name) in attacks {
        let after = attack_mail(ipc, args, &format!("mail: {name}"));
        let told = matches!(&after.outcome, Err(InvokeError::WorkerLost { text }) if text.contains("protocol"));
        assert!(told, "{ipc} {args:?} {name}: {:?}", after.outcome);
        assert!(after.only_it_died, "{ipc} {args:?} {name}");
    }
}

/// Odd questions have answers, and what a worker forgets or shares is its own loss.
#[test]
fn g4_odd_questions_about_messages_are_answered_and_harm_nobody() {
    let _alone = queues();
    for (ipc, args, names) in [
        (Ipc::Ring, &[] as &[&str], &["odd questions", "blocks that are nobody's", "one block for many"] as &[&str]),
        (Ipc::Ring, &[ISOLATE], &["odd questions", "one block for many"]),
        (Ipc::Queue, &[], &["odd questions"]),
    ] {
        for name in names {
            let after = attack_mail(ipc, args, &format!("mail: {name}"));
            assert_eq!(after.outcome, Ok(b"done".to_vec()), "{ipc} {args:?} {name}");
            assert!(after.nobody_died, "{ipc} {args:?} {name}");
        }
        let after = attack_mail(ipc, args, "mail: a receive that it forgets");
        assert_eq!(after.outcome, Ok(b"done".to_vec()), "{ipc} {args:?}");
        assert!(after.only_it_died || after.nobody_died, "{ipc} {args:?}");
    }
}

#[test]
fn g4_keys_of_messages_that_are_never_given_back_take_no_memory() {
    let (_process, mut client) = start_evil_with(Ipc::Ring, &["--arena-bytes=4194304"]);
    let evil = client.submit_within("evil", "mail: texts never given back", Duration::from_secs(20)).unwrap();
    assert_eq!(&*client.wait(evil).unwrap(), b"done");
    let input = content(1, 700_000);
    assert!(call(&mut client, "copy", &input).unwrap() == input);
}

/// Answers to calls that run together: as many as there are, each to its own, in their order.
#[test]
fn r1_w11_a_worker_that_answers_a_batch_wrongly_is_killed_and_only_it() {
    on_both_channels(|ipc| {
        // What each attack leaves answered of the three.
        for (name, answered) in [
            ("one too many", 3),
            ("one that is none", 3),
            ("the second first", 0),
            ("the first twice", 1),
            ("the last only", 0),
            ("a number of nobody", 0),
        ] {
            let (process, mut client) = start_evil(ipc);
            let before = children(process.pid());
            let first: u32 = String::from_utf8_lossy(&client.invoke("pid", b"").unwrap()).parse().unwrap();
            let calls = [(); 3].map(|()| client.submit("together", name).unwrap());
            for (at, call) in calls.into_iter().enumerate() {
                match client.wait(call) {
                    Ok(reply) => assert!(at < answered && *reply == *b"done", "{ipc} {name}: {at}"),
                    Err(InvokeError::WorkerLost { text }) => {
                        assert!(at >= answered && text.contains("protocol"), "{ipc} {name}: {at} {text}");
                    }
                    Err(error) => panic!("{ipc} {name}: {error}"),
                }
            }
            wait_until("only it has died", PATIENCE, || {
                let now = children(process.pid());
                let died: Vec<_> = before.iter().filter(|pid| !now.contains(pid)).collect();
                died == [&first] && now.len() == 3
            });
            for n in 0..30_u8 {
                assert_eq!(&*client.invoke("echo", &[n]).unwrap(), [n], "after `{name}`");
            }
        }
        // One that gives no answer is in nobody's way for longer than its callers wait.
        let (_process, mut client) = start_evil(ipc);
        let calls = [(); 3]
            .map(|()| client.submit_within("together", "none, and the next", Duration::from_millis(500)).unwrap());
        for call in calls {
            assert!(matches!(client.wait(call), Err(InvokeError::Timeout { .. })));
        }
        assert_eq!(&*client.invoke("echo", b"x").unwrap(), b"x");
    });
}
