//! Messages inside a process (conformance M1-M4, faults W2): over rings, over rings with `--isolate`, and over queues.

mod support;

use std::time::{Duration, Instant};

use praas_dataplane::client::Outgoing;
use praas_dataplane::{Client, ClientConfig, InvokeError, Ipc, LaunchConfig, LocalProcess};
use support::{PATIENCE, launch_config, queues, signal, start_with, wait_until};

fn in_all_modes(test: impl Fn(&dyn Fn(u8, &[&str]) -> (LocalProcess, Client))) {
    let start = |ipc, isolate: bool| {
        move |workers: u8, args: &[&str]| {
            let mut config = LaunchConfig { workers, workers_max: workers, ..launch_config(ipc) };
            config.args.extend(args.iter().map(|arg| (*arg).to_owned()));
            config.args.push("--process=me".into());
            config.args.extend(isolate.then(|| "--isolate".to_owned()));
            start_with(&config)
        }
    };
    println!("rings");
    test(&start(Ipc::Ring, false));
    println!("rings, isolated");
    test(&start(Ipc::Ring, true));
    println!("queues");
    let _alone = queues();
    test(&start(Ipc::Queue, false));
}

fn ask(client: &mut Client, function: &str, arguments: &[&[u8]]) -> (i32, String) {
    let reply = client.invoke(function, Outgoing::from_args(arguments));
    let reply = reply.unwrap_or_else(|error| panic!("{function}: {error}"));
    (reply.status(), String::from_utf8_lossy(&reply).into_owned())
}

fn got(text: &str) -> (i32, String) {
    (0, text.to_owned())
}

/// Kills all workers, and waits until there are others: a call in between may be given to one that is dead and not known to be.
fn kill_workers(process: &LocalProcess) {
    let before = support::children(process.pid());
    before.iter().for_each(|pid| signal(*pid, 9));
    wait_until("they are replaced", PATIENCE, || {
        let now = support::children(process.pid());
        now.len() == before.len() && now.iter().all(|pid| !before.contains(pid))
    });
}

const NONE: (i32, String) = (1, String::new());

#[test]
fn m1_m2_messages_to_self_are_received_once_whichever_comes_first() {
    in_all_modes(|start| {
        let (_process, mut client) = start(2, &[]);
        assert_eq!(ask(&mut client, "recv_for", &[b"*", b"k", b"0"]), NONE);
        ask(&mut client, "send", &[b"", b"k", b"one"]);
        ask(&mut client, "send", &[b"me", b"k", b"two"]);
        assert_eq!(ask(&mut client, "recv_for", &[b"", b"other", b"0"]), NONE);
        assert_eq!(ask(&mut client, "recv", &[b"", b"k"]), got("me k one"));
        assert_eq!(ask(&mut client, "recv", &[b"me", b"k"]), got("me k two"));
        assert_eq!(ask(&mut client, "recv_for", &[b"*", b"", b"20"]), NONE, "consumed once");
        // The receive comes first.
        let waiting = client.submit("recv", Outgoing::from_args(&[b"*", b"late"])).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        ask(&mut client, "send", &[b"", b"late", b"three"]);
        assert_eq!(*client.wait(waiting).unwrap(), *b"me late three");
        // Any key, with keys and payloads of all lengths around what a record holds.
        for (key, bytes) in [(1, 0), (1, 39), (1, 40), (20, 20), (20, 21), (40, 0), (41, 0), (1024, 1), (1024, 100_000)]
        {
            let (key, payload) = (vec![b'k'; key], vec![b'p'; bytes]);
            ask(&mut client, "send", &[b"", &key, &payload]);
            let reply = client.invoke("recv", Outgoing::from_args(&[b"*", b""])).unwrap();
            assert_eq!(*reply, *[b"me ", &key[..], b" ", &payload].concat(), "{} {bytes}", key.len());
            ask(&mut client, "send", &[b"", &key, &payload]);
            let reply = client.invoke("recv_payload", Outgoing::from_args(&[b"*", &key])).unwrap();
            assert_eq!(*reply, *payload, "{} {bytes}", key.len());
        }
    });
}

#[test]
fn m1_a_receive_ends_in_time_when_nobody_answers() {
    in_all_modes(|start| {
        let (process, _) = start(1, &[]);
        let config = ClientConfig { deadline: Duration::from_millis(150), ..ClientConfig::default() };
        let mut client = support::connect_with(&process, &config);
        let begun = Instant::now();
        assert_eq!(ask(&mut client, "recv_for", &[b"*", b"k", b"30"]), NONE);
        assert!((30..140).contains(&begun.elapsed().as_millis()), "{:?}", begun.elapsed());
        // As long as the invocation may take: then it is told, or is too late with its answer.
        let error = client.invoke("recv", Outgoing::from_args(&[b"*", b"k"])).unwrap_err();
        assert!(error.to_string().contains("timeout"), "{error}");
        assert!(begun.elapsed() < Duration::from_secs(5));
        // A message that comes after it waits for the next.
        ask(&mut client, "send", &[b"", b"k", b"v"]);
        assert_eq!(ask(&mut client, "recv", &[b"*", b"k"]), got("me k v"));
    });
}

/// P12: who is called off does not go on waiting.
#[test]
fn p12_a_receive_ends_when_its_invocation_is_called_off() {
    in_all_modes(|start| {
        let (_process, mut client) = start(1, &[]);
        let waiting = client.submit("recv", Outgoing::from_args(&[b"*", b"k"])).unwrap();
        std::thread::sleep(Duration::from_millis(30));
        let begun = Instant::now();
        client.cancel(waiting).unwrap();
        // Its only worker is free again.
        ask(&mut client, "send", &[b"", b"k", b"v"]);
        assert_eq!(ask(&mut client, "recv", &[b"*", b"k"]), got("me k v"));
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    });
}

#[test]
fn m3_messages_of_one_sender_and_key_come_in_order() {
    in_all_modes(|start| {
        let (_process, mut client) = start(2, &[]);
        ask(&mut client, "send_many", &[b"", b"a", b"0", b"500"]);
        ask(&mut client, "send_many", &[b"", b"b", b"1000", b"3"]);
        for at in 0..3_u64 {
            let reply = client.invoke("recv_payload", Outgoing::from_args(&[b"", b"b"])).unwrap();
            assert_eq!(*reply, (1000 + at).to_le_bytes());
        }
        for at in 0..500_u64 {
            let reply = client.invoke("recv_payload", Outgoing::from_args(&[b"*", b""])).unwrap();
            assert_eq!(*reply, at.to_le_bytes());
        }
    });
}

#[test]
fn m4_state_and_messages_never_meet() {
    in_all_modes(|start| {
        let (_process, mut client) = start(2, &[]);
        ask(&mut client, "put", &[b"k", b"state"]);
        assert_eq!(ask(&mut client, "recv_for", &[b"*", b"k", b"0"]), NONE);
        assert_eq!(ask(&mut client, "recv_for", &[b"*", b"", b"0"]), NONE);
        ask(&mut client, "send", &[b"", b"k", b"message"]);
        assert_eq!(&*client.invoke("get", b"k").unwrap(), b"state");
        ask(&mut client, "delete", &[b"k"]);
        assert_eq!(ask(&mut client, "recv", &[b"*", b"k"]), got("me k message"));
    });
}

#[test]
fn m5_g8_a_full_mailbox_is_told_and_unknown_processes_and_keys_are_errors() {
    in_all_modes(|start| {
        let (_process, mut client) = start(2, &["--mailbox-messages-max=3", "--mailbox-bytes-max=100000"]);
        let mut refused = |arguments: &[&[u8]], what: &str| {
            let error = client.invoke("send", Outgoing::from_args(arguments)).unwrap_err();
            assert!(matches!(&error, InvokeError::Failed { text, .. } if text.contains(what)), "{error}");
        };
        refused(&[b"stranger", b"k", b"v"], "unknown process `stranger`");
        refused(&[b"", b"", b"v"], "keys have 1 to 1024");
        refused(&[b"", &[b'k'; 1025], b"v"], "keys have 1 to 1024");
        refused(&[b"", b"k", &[1; 100_000]], "too large");
        for _ in 0..3 {
            ask(&mut client, "send", &[b"", b"k", &[2; 20_000]]);
        }
        let mut refused = |what: &str| {
            let error = client.invoke("send", Outgoing::from_args(&[b"", b"k", &[3; 60_000]])).unwrap_err();
            assert!(error.to_string().contains(what), "{error}");
        };
        refused("busy: the mailbox holds 3 messages");
        assert_eq!(ask(&mut client, "recv", &[b"*", b"k"]).0, 0);
        let error = client.invoke("send", Outgoing::from_args(&[b"", b"k", &[3; 60_000]])).unwrap_err();
        assert!(error.to_string().contains("busy: the mailbox holds 40002 bytes"), "{error}");
        for _ in 0..2 {
            assert_eq!(ask(&mut client, "recv", &[b"*", b"k"]).0, 0);
        }
        ask(&mut client, "send", &[b"", b"k", &[3; 60_000]]);
        assert_eq!(ask(&mut client, "recv", &[b"*", b"k"]).0, 0);
        assert_eq!(ask(&mut client, "recv_for", &[b"*", b"", b"0"]), NONE);
    });
}

/// W2: whoever sent it may die, and whoever was to have it: it is received once by somebody who lives.
#[test]
fn w2_a_stored_message_survives_its_sender_and_a_receiver_that_dies_waiting() {
    in_all_modes(|start| {
        let (process, mut client) = start(2, &[]);
        for bytes in [3, 100_000] {
            let payload = vec![b'x'; bytes];
            ask(&mut client, "send", &[b"", b"k", &payload]);
            ask(&mut client, "send_loan", &[b"", b"loan", bytes.to_string().as_bytes(), b"7"]);
            kill_workers(&process);
            let reply = client.invoke("recv_payload", Outgoing::from_args(&[b"*", b"k"])).unwrap();
            assert!(*reply == *payload, "{bytes}");
            let reply = client.invoke("recv_payload", Outgoing::from_args(&[b"*", b"loan"])).unwrap();
            assert!(reply.len() == bytes && reply.iter().all(|byte| *byte == 7), "{bytes}");
            // Who waits is killed; what comes then is for the next.
            let waiting = client.submit("recv", Outgoing::from_args(&[b"*", b"k"])).unwrap();
            std::thread::sleep(Duration::from_millis(30));
            kill_workers(&process);
            let error = client.wait(waiting).unwrap_err();
            assert!(matches!(error, InvokeError::WorkerLost { .. }), "{error}");
            ask(&mut client, "send", &[b"", b"k", &payload]);
            let reply = client.invoke("recv_payload", Outgoing::from_args(&[b"*", b"k"])).unwrap();
            assert!(*reply == *payload, "{bytes}");
            // One that has it, and dies of something else, has had it.
            ask(&mut client, "send", &[b"", b"k", &payload]);
            client.invoke("recv_and_die", Outgoing::from_args(&[b"*", b"k"])).unwrap_err();
            assert_eq!(ask(&mut client, "recv_for", &[b"*", b"", b"0"]), NONE, "{bytes}");
        }
    });
}

/// G3, W2: receivers are killed at random moments. No message is received twice; lost is at most the one that a killed worker had in hand.
#[test]
fn g3_w2_receivers_that_are_killed_lose_no_message_but_the_one_they_had() {
    in_all_modes(|start| {
        let (process, mut client) = start(2, &[]);
        let (mut seen, mut killed) = (Vec::new(), 0_u64);
        let mut dice = support::Dice(support::seed());
        for round in 0..40_u64 {
            let payload = round.to_le_bytes();
            ask(&mut client, "send", &[b"", b"k", &payload]);
            let waiting = client.submit("recv_payload", Outgoing::from_args(&[b"*", b"k"])).unwrap();
            if dice.below(2) == 0 {
                std::thread::sleep(Duration::from_micros(dice.below(300)));
                kill_workers(&process);
                killed += 1;
            }
            if let Ok(reply) = client.wait(waiting) {
                seen.push(u64::from_le_bytes((*reply).try_into().unwrap()));
            }
        }
        while let (0, text) = ask(&mut client, "recv_for", &[b"*", b"k", b"0"]) {
            seen.push(u64::from_le_bytes(text.as_bytes()[5..13].try_into().unwrap_or_default()));
        }
        let count = seen.len() as u64;
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len() as u64, count, "twice");
        assert!(count + killed >= 40, "{count} of 40 with {killed} kills");
    });
}

/// G3: a message whose sender is dead lies on the heap while there is no room for it where functions read. A receive that could not be given it
/// then took it away all the same.
#[test]
fn g3_a_message_that_cannot_be_given_now_is_not_lost() {
    let mut config = LaunchConfig { workers: 1, workers_max: 1, ..launch_config(Ipc::Ring) };
    config.args.push("--arena-bytes=2097152".into());
    let (process, mut client) = start_with(&config);
    ask(&mut client, "send_loan", &[b"", b"k", b"500000", b"7"]);
    let killed = client.submit("sleep", b"10000").unwrap();
    // Each call's input takes a part of that room until it is answered.
    let input = vec![1; 600_000];
    let submit =
        |client: &mut Client, input: &[u8]| client.submit("recv", Outgoing::from_args(&[b"*", b"k", input])).unwrap();
    let waiting = [(); 2].map(|()| submit(&mut client, &input));
    let last = client.submit("echo", input.clone()).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    kill_workers(&process);
    client.wait(killed).unwrap_err();
    let [first, second] = waiting.map(|call| client.wait(call));
    let error = first.unwrap_err();
    assert!(
        matches!(&error, InvokeError::Failed { text, .. } if text.contains("no memory for the message")),
        "{error}"
    );
    assert!(second.unwrap().ends_with(&[7; 500_000]));
    client.wait(last).unwrap();
}

/// A payload is handed over where it lies, and its memory comes back: many times what the payload memory holds.
#[test]
fn messages_give_their_memory_back() {
    in_all_modes(|start| {
        let (_process, mut client) = start(2, &["--arena-bytes=8388608"]);
        for round in 0..60_u8 {
            ask(&mut client, "send_loan", &[b"", b"k", b"1000000", round.to_string().as_bytes()]);
            let reply = client.invoke("recv_payload", Outgoing::from_args(&[b"", b"k"])).unwrap();
            assert!(reply.len() == 1_000_000 && reply.iter().all(|byte| *byte == round), "round {round}");
            let input = vec![round; 500_000];
            client.invoke("send_input", input.clone()).unwrap();
            let reply = client.invoke("recv_payload", Outgoing::from_args(&[b"", b"input"])).unwrap();
            assert!(*reply == *input, "round {round}");
        }
    });
}

/// P10: functions that wait for messages do not keep a process from running those that send them.
#[test]
fn p10_waiting_for_messages_starts_more_workers() {
    let config = LaunchConfig { workers: 1, workers_max: 3, ..launch_config(Ipc::Ring) };
    let (_process, mut client) = start_with(&config);
    let waiting: Vec<_> =
        (0..2).map(|_| client.submit("recv_payload", Outgoing::from_args(&[b"*", b"k"])).unwrap()).collect();
    wait_until("both are answered", PATIENCE, || ask(&mut client, "send", &[b"", b"k", b"v"]).0 == 0);
    ask(&mut client, "send", &[b"", b"k", b"v"]);
    for call in waiting {
        assert_eq!(&*client.wait(call).unwrap(), b"v");
    }
}
