//! Connections that are lost, processes that stop, and what becomes of calls then: each delivery mode, counted by the
//! function itself.
//!
//! `PRAAS_CUTS` sets the number of random cuts (default 150), `PRAAS_SEED` their seed.

mod support;

use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use praas_dataplane::{CallOptions, Client, ClientConfig, Delivery, InvokeError, Ipc, LocalProcess};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use support::relay::Relay;
use support::{Dice, PATIENCE, fds, launch_config, signal, start_workers, wait_until};

const MODES: [Delivery; 3] = [Delivery::AtMostOnce, Delivery::Retry, Delivery::EffectivelyOnce];

/// The file in which `note` leaves a line for each time it runs.
struct Notes(PathBuf);

impl Notes {
    fn new(name: &str) -> Notes {
        let path = std::env::temp_dir().join(format!("praas-notes-{name}-{}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        Notes(path)
    }

    /// Input for `note`.
    fn call(&self, id: u64, ms: u64) -> Vec<u8> {
        format!("{} {id} {ms} ", self.0.display()).into_bytes()
    }

    /// How often each id ran.
    fn runs(&self) -> HashMap<u64, u32> {
        let text = std::fs::read_to_string(&self.0).unwrap_or_default();
        let mut runs = HashMap::new();
        for line in text.lines() {
            *runs.entry(line.parse().expect("an id")).or_default() += 1;
        }
        runs
    }

    fn of(&self, id: u64) -> u32 {
        self.runs().get(&id).copied().unwrap_or(0)
    }
}

impl Drop for Notes {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn through(relay: &Relay) -> Client {
    Client::connect(relay.address, &ClientConfig::default()).expect("the relay leads to the process")
}

fn mode(delivery: Delivery) -> CallOptions {
    CallOptions { delivery: Some(delivery), ..CallOptions::default() }
}

/// A process that can be found again, at this address or a free one.
fn named(name: &str, listen: Option<std::net::SocketAddr>) -> LocalProcess {
    let mut config = launch_config(Ipc::Ring);
    config.args.push(format!("--process={name}"));
    if let Some(listen) = listen {
        config.args.push(format!("--listen={listen}"));
    }
    // The kernel takes a moment to close what a killed process had its ring accept on.
    let begun = Instant::now();
    loop {
        match LocalProcess::start(&config) {
            Ok(process) => return process,
            Err(error) if error.to_string().contains("in use") && begun.elapsed() < Duration::from_secs(5) => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(error) => panic!("the process does not start: {error}"),
        }
    }
}

#[test]
fn r6_a_connection_cut_while_a_function_runs_ends_each_call_as_its_mode_says() {
    let (process, _client) = start_workers(Ipc::Ring, 4, &[]);
    let relay = Relay::to(process.addr());
    let notes = Notes::new("modes");
    let mut client = through(&relay);
    let calls: Vec<_> = (0..)
        .zip(MODES)
        .map(|(id, delivery)| client.submit_with("note", notes.call(id, 300), mode(delivery)).unwrap())
        .collect();
    wait_until("all run", PATIENCE, || notes.runs().len() == MODES.len());
    relay.cut();
    let begun = Instant::now();
    let results: Vec<_> = calls.into_iter().map(|call| client.wait(call)).collect();
    let lost = results[0].as_ref().unwrap_err();
    assert!(matches!(lost, InvokeError::ConnectionLost { text } if text.contains("may have run")), "{lost}");
    assert_eq!(&*results[1].as_ref().unwrap().to_vec(), &*notes.call(1, 300));
    assert_eq!(&*results[2].as_ref().unwrap().to_vec(), &*notes.call(2, 300));
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    assert_eq!((notes.of(0), notes.of(1), notes.of(2)), (1, 2, 1), "only what may run twice did");
    assert_eq!(&*client.invoke("echo", b"as before").unwrap(), b"as before");
    assert_eq!(relay.connections(), 2);
}

#[test]
fn n8_g2_an_answer_lost_on_its_way_is_given_again_and_the_function_does_not_run_again() {
    let (process, _client) = start_workers(Ipc::Ring, 1, &[]);
    let relay = Relay::to(process.addr());
    let notes = Notes::new("lost-answer");
    let mut client = through(&relay);
    for id in 0..20 {
        relay.lose_answers(true);
        let mut input = notes.call(id, 0);
        input.resize(input.len() + usize::try_from(id).unwrap() * 20_000, b'x');
        let call = client.submit_with("note", input.clone(), mode(Delivery::EffectivelyOnce)).unwrap();
        wait_until("it ran", PATIENCE, || notes.of(id) == 1);
        std::thread::sleep(Duration::from_millis(5));
        relay.cut();
        std::thread::sleep(Duration::from_millis(5));
        relay.lose_answers(false);
        assert!(*client.wait(call).unwrap() == *input, "call {id}");
        assert_eq!(notes.of(id), 1, "call {id} ran again");
    }
}

#[test]
fn p13_two_callers_with_the_same_numbers_each_get_their_own_result() {
    let (process, _client) = start_workers(Ipc::Ring, 2, &[]);
    let config = ClientConfig { delivery: Delivery::EffectivelyOnce, ..ClientConfig::default() };
    // Two clients in step number their calls alike.
    let mut clients = [0, 1].map(|_| Client::connect(process.addr(), &config).unwrap());
    for round in 0..50_u64 {
        let calls = [0, 1].map(|at| clients[at].submit("echo", format!("{at} {round}").as_str()).unwrap());
        for at in [1, 0] {
            assert_eq!(*clients[at].wait(calls[at]).unwrap(), *format!("{at} {round}").as_bytes());
        }
    }
}

#[test]
fn n4_cuts_at_any_byte_lose_nothing_that_may_be_sent_again_and_double_nothing_that_may_not() {
    let cuts: u64 = std::env::var("PRAAS_CUTS").ok().and_then(|text| text.parse().ok()).unwrap_or(150);
    let seed = std::env::var("PRAAS_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(1);
    let (process, _client) = start_workers(Ipc::Ring, 2, &[]);
    let relay = Relay::to(process.addr());
    let notes = Notes::new("cuts");
    let mut client = through(&relay);
    let mut dice = Dice(seed);
    let (mut id, mut ends) = (0, Vec::new());
    for _ in 0..cuts {
        // Greetings and answers are a few hundred bytes, so some cuts strike those, and some a body.
        let within = [300, 3000, 60_000][usize::try_from(dice.below(3)).unwrap()];
        relay.cut_after(i64::try_from(dice.below(within)).unwrap());
        let calls: Vec<_> = (0..6)
            .map(|_| {
                id += 1;
                let delivery = MODES[usize::try_from(dice.below(3)).unwrap()];
                let mut input = notes.call(id, 0);
                let bytes = [0, 50, 20_000][usize::try_from(dice.below(3)).unwrap()];
                input.resize(input.len() + bytes, b'x');
                let call = client.submit_with("note", input.clone(), mode(delivery)).unwrap();
                (id, delivery, input, call)
            })
            .collect();
        for (id, delivery, input, call) in calls {
            let result = client.wait(call);
            if let Ok(reply) = &result {
                assert!(**reply == *input, "call {id} got another's answer");
            }
            ends.push((id, delivery, result.map(drop)));
        }
    }
    relay.cut_after(-1);
    // Whatever still runs unheard ends now: all workers answer.
    for _ in 0..20 {
        client.submit_with("echo", b"", mode(Delivery::Retry)).and_then(|call| client.wait(call)).unwrap();
    }
    let runs = notes.runs();
    let mut lost = 0;
    for (id, delivery, result) in ends {
        let runs = runs.get(&id).copied().unwrap_or(0);
        match (delivery, result) {
            (Delivery::AtMostOnce, Err(InvokeError::ConnectionLost { text })) => {
                assert!(runs <= 1 && text.contains("may have run"), "{id} ran {runs} times: {text}");
                lost += 1;
            }
            (Delivery::AtMostOnce | Delivery::EffectivelyOnce, Ok(())) => assert_eq!(runs, 1, "{id}, {delivery:?}"),
            (Delivery::Retry, Ok(())) => assert!(runs >= 1, "{id}"),
            (delivery, result) => panic!("call {id}, {delivery:?}: {result:?}"),
        }
    }
    println!("{} connections, {id} calls, {lost} lost", relay.connections());
    assert!(relay.connections() > cuts / 2 && lost > 0, "hardly anything was cut");
}

#[test]
fn r6_n4_a_process_killed_under_load_and_started_again_is_found_again() {
    let mut process = named("phoenix", None);
    let address = process.addr();
    let notes = Notes::new("restart");
    let mut client = Client::connect(address, &ClientConfig::default()).unwrap();
    let note = client.function("note").unwrap();
    for round in 0..4_u64 {
        let first = 10 * round;
        let calls: Vec<_> = (first..)
            .zip(MODES)
            .map(|(id, delivery)| (delivery, client.submit_with(note, notes.call(id, 200), mode(delivery)).unwrap()))
            .collect();
        // Two run, one waits.
        wait_until("some run", PATIENCE, || (first..first + 3).filter(|id| notes.of(*id) > 0).count() >= 2);
        process.kill().unwrap();
        let restart = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50 * round));
            named("phoenix", Some(address))
        });
        for (delivery, call) in calls {
            match (delivery, client.wait(call)) {
                (Delivery::Retry, Ok(_)) => {}
                (Delivery::AtMostOnce, Err(InvokeError::ConnectionLost { text })) => {
                    assert!(text.contains("may have run"), "{text}");
                }
                (Delivery::EffectivelyOnce, Err(InvokeError::ConnectionLost { text })) => {
                    assert!(text.contains("restarted") && text.contains("may have run"), "{text}");
                }
                (delivery, result) => panic!("{delivery:?}: {result:?}"),
            }
        }
        assert!(notes.of(first) <= 1 && notes.of(first + 2) <= 1);
        let reply = client.submit_with(note, notes.call(first + 5, 0), CallOptions::default()).unwrap();
        assert!(client.wait(reply).is_ok(), "new calls go to the new life");
        process = restart.join().unwrap();
    }
}

#[test]
fn n13_a_stranger_at_the_old_address_gets_no_calls() {
    let process = named("first", None);
    let address = process.addr();
    let mut client = Client::connect(address, &ClientConfig::default()).unwrap();
    process.kill().unwrap();
    let _other = named("second", Some(address));
    let options = CallOptions { deadline: Some(Duration::from_millis(700)), delivery: Some(Delivery::Retry) };
    let call = client.submit_with("echo", b"for the first", options).unwrap();
    let error = client.wait(call).unwrap_err();
    let text = error.to_string();
    assert!(
        matches!(error, InvokeError::Timeout { .. }) && text.contains("`second`") && text.contains("`first`"),
        "{text}"
    );
}

#[test]
fn n1_a_process_that_falls_silent_is_given_up_within_5_s_and_found_again() {
    let (process, mut client) = start_workers(Ipc::Ring, 1, &[]);
    let call = client.submit("sleep", b"10000").unwrap();
    signal(process.pid(), 19);
    let begun = Instant::now();
    let error = client.wait(call).unwrap_err();
    assert!(matches!(&error, InvokeError::ConnectionLost { text } if text.contains("silent")), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    assert!(begun.elapsed() > Duration::from_secs(2), "{:?}", begun.elapsed());
    // What waits for it now is answered when it goes on.
    let call = client.submit("echo", b"patience").unwrap();
    let pid = process.pid();
    let wakes = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(1500));
        signal(pid, 18);
    });
    assert_eq!(&*client.wait(call).unwrap(), b"patience");
    wakes.join().unwrap();
}

/// In a network of its own whose only link is taken away: no FIN, no RST, no answer, for answers under way and for none.
#[test]
fn n1_a_host_that_is_gone_is_noticed_on_both_sides_within_5_s() {
    let ip = |args: &[&str]| Command::new("ip").args(args).status().is_ok_and(|status| status.success());
    // Of this thread and the children it starts.
    #[expect(deprecated, reason = "its successor is unsafe for flags that are not used here")]
    let unshared = rustix::thread::unshare(rustix::thread::UnshareFlags::NEWNET);
    if unshared.is_err() || !ip(&["link", "set", "lo", "up"]) {
        println!("skipped: needs root, to have a network of its own, and `ip`");
        return;
    }
    let (process, mut busy) = start_workers(Ipc::Ring, 1, &[]);
    let alone = fds(process.pid());
    // One is idle; one waits for an answer that comes when nobody is there any more.
    let mut idle = support::connect(&process);
    idle.invoke("echo", b"").unwrap();
    let call = busy.submit("sleep", b"500").unwrap();
    wait_until("both are connected", PATIENCE, || fds(process.pid()) == alone + 1);
    std::thread::sleep(Duration::from_millis(100));
    assert!(ip(&["link", "set", "lo", "down"]));
    let begun = Instant::now();
    let error = busy.wait(call).unwrap_err();
    assert!(matches!(error, InvokeError::ConnectionLost { .. }), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(5), "the client took {:?}", begun.elapsed());
    wait_until("the process has let both go", Duration::from_secs(6), || fds(process.pid()) < alone);
    assert!(begun.elapsed() < Duration::from_millis(5500), "the process took {:?}", begun.elapsed());
    wait_until("the idle client has noticed", Duration::from_secs(2), || {
        idle.poll();
        !idle.is_connected()
    });
    assert!(ip(&["link", "set", "lo", "up"]));
    assert_eq!(&*idle.invoke("echo", b"back").unwrap(), b"back");
    assert_eq!(&*busy.invoke("echo", b"back").unwrap(), b"back");
}

/// A client that computes for long with more answers under way than sockets hold is slow, not gone.
#[test]
fn n9_a_client_that_does_not_read_for_8_s_keeps_its_connection() {
    let (_process, mut client) = start_workers(Ipc::Ring, 1, &[]);
    let calls: Vec<_> = (0..4).map(|_| client.submit("large", b"16000000").unwrap()).collect();
    std::thread::sleep(Duration::from_secs(8));
    for call in calls {
        assert_eq!(client.wait(call).unwrap().len(), 16_000_000);
    }
}

#[test]
fn n1_a_function_that_takes_long_is_not_a_process_that_is_silent() {
    let (_process, mut client) = start_workers(Ipc::Ring, 1, &[]);
    assert_eq!(&*client.invoke("sleep", b"4500").unwrap(), b"slept");
}

#[test]
fn g1_every_call_ends_by_its_deadline_whatever_happens_to_its_connection() {
    let (process, _client) = start_workers(Ipc::Ring, 1, &[]);
    let relay = Relay::to(process.addr());
    type Trouble = fn(&Relay);
    let troubles: [(&str, Trouble); 3] = [
        ("silence", |relay| relay.hold()),
        ("nobody there", |relay| {
            relay.close(true);
            relay.cut();
        }),
        ("a cut", |relay| relay.cut()),
    ];
    for (name, trouble) in troubles {
        for delivery in MODES {
            // The best of three: a busy machine may be late, too.
            let late = (0..3).map(|_| {
                let mut client = through(&relay);
                client.invoke("echo", b"").unwrap();
                let options = CallOptions { deadline: Some(Duration::from_millis(200)), delivery: Some(delivery) };
                let begun = Instant::now();
                let call = client.submit_with("sleep", b"5000", options).unwrap();
                std::thread::sleep(Duration::from_millis(30));
                trouble(&relay);
                let error = client.wait(call).unwrap_err();
                assert!(matches!(error, InvokeError::Timeout { .. } | InvokeError::ConnectionLost { .. }), "{error}");
                let took = begun.elapsed();
                relay.close(false);
                relay.release();
                relay.cut();
                took.saturating_sub(Duration::from_millis(200))
            });
            let late = late.min().expect("three");
            assert!(late < Duration::from_millis(100), "{name}, {delivery:?}: {late:?} past the deadline");
        }
    }
}

#[test]
fn n10_what_a_partition_held_back_does_not_run_again_when_it_heals() {
    let (process, _client) = start_workers(Ipc::Ring, 1, &[]);
    let relay = Relay::to(process.addr());
    let notes = Notes::new("partition");
    let mut client = through(&relay);
    client.invoke("echo", b"").unwrap();
    // The old connection holds the request; the client gives it up and sends it on a new one.
    relay.hold();
    let begun = Instant::now();
    let call = client.submit_with("note", notes.call(1, 0), mode(Delivery::EffectivelyOnce)).unwrap();
    assert!(client.wait(call).is_ok());
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    relay.release();
    std::thread::sleep(Duration::from_millis(100));
    client.invoke("echo", b"").unwrap();
    assert_eq!((notes.of(1), relay.connections()), (1, 2));
}

#[test]
fn r6_one_descriptor_serves_a_foreign_loop_across_connections() {
    let (process, _client) = start_workers(Ipc::Ring, 2, &[]);
    let relay = Relay::to(process.addr());
    let mut client = through(&relay);
    let fd = client.as_fd().as_raw_fd();
    let mut answered = 0;
    for round in 0..30_u64 {
        for _ in 0..4 {
            client.submit_with("sleep", b"3", mode(Delivery::Retry)).unwrap();
        }
        if round % 3 == 0 {
            relay.cut();
        }
        let begun = Instant::now();
        while client.in_flight() > 0 {
            // Nothing but the descriptor says when to call.
            let mut fds = [PollFd::new(&client, PollFlags::IN)];
            let ready = poll(&mut fds, Some(&Timespec { tv_sec: 10, tv_nsec: 0 })).unwrap();
            assert_eq!(ready, 1, "round {round}: nothing happened for ten seconds");
            answered += client.drain(&mut |_, result| assert!(result.is_ok(), "{result:?}"));
            assert!(begun.elapsed() < PATIENCE, "round {round} is stuck");
        }
    }
    assert_eq!((answered, client.as_fd().as_raw_fd()), (120, fd));
    assert!(relay.connections() >= 10);
    // Deadlines, too, come by way of it.
    let begun = Instant::now();
    client.submit_within("sleep", b"5000", Duration::from_millis(100)).unwrap();
    relay.hold();
    let mut ended = 0;
    while ended == 0 {
        poll(&mut [PollFd::new(&client, PollFlags::IN)], Some(&Timespec { tv_sec: 10, tv_nsec: 0 })).unwrap();
        ended =
            client.drain(&mut |_, result| assert!(matches!(result, Err(InvokeError::Timeout { .. })), "{result:?}"));
    }
    assert!(begun.elapsed() < Duration::from_millis(400), "{:?}", begun.elapsed());
}

#[test]
fn r6_a_client_with_nothing_to_do_is_not_woken() {
    let (_process, mut client) = start_workers(Ipc::Ring, 1, &[]);
    client.invoke("echo", b"").unwrap();
    while client.poll().is_some() {}
    let begun = Instant::now();
    let mut woken = 0;
    while begun.elapsed() < Duration::from_millis(2500) {
        woken += poll(&mut [PollFd::new(&client, PollFlags::IN)], Some(&Timespec { tv_sec: 0, tv_nsec: 100_000_000 }))
            .unwrap();
        assert!(client.poll().is_none());
    }
    // Once for the alarm that the last call had set.
    assert!(woken <= 1, "woken {woken} times");
}

#[test]
fn r6_what_is_fired_runs_without_an_answer_also_when_its_client_leaves() {
    let (process, mut client) = start_workers(Ipc::Ring, 1, &[]);
    let notes = Notes::new("fire");
    for id in 0..50 {
        client.fire("note", notes.call(id, 0)).unwrap();
    }
    assert_eq!(client.in_flight(), 0);
    assert!(client.wait_any().is_none());
    let mut leaving = support::connect(&process);
    leaving.fire("note", notes.call(50, 20)).unwrap();
    drop(leaving);
    wait_until("all ran", PATIENCE, || notes.runs().len() == 51);
    // It is written when the function begins; give a second run the time to show itself.
    client.invoke("echo", b"").unwrap();
    assert!(notes.runs().values().all(|runs| *runs == 1));
}

#[test]
fn r6_a_client_that_shall_not_reconnect_does_not() {
    let (process, _client) = start_workers(Ipc::Ring, 1, &[]);
    let relay = Relay::to(process.addr());
    let config = ClientConfig { reconnect: false, delivery: Delivery::Retry, ..ClientConfig::default() };
    let mut client = Client::connect(relay.address, &config).unwrap();
    let call = client.submit("sleep", b"1000").unwrap();
    std::thread::sleep(Duration::from_millis(20));
    relay.cut();
    assert!(matches!(client.wait(call), Err(InvokeError::ConnectionLost { .. })));
    assert!(matches!(client.invoke("echo", b""), Err(InvokeError::ConnectionLost { .. })));
    assert!(!client.is_connected());
}

#[test]
fn a8_results_beyond_the_memory_for_them_are_refused_and_not_run_again() {
    let (process, _client) = start_workers(Ipc::Ring, 1, &["--results-bytes-max", "10000"]);
    let relay = Relay::to(process.addr());
    let notes = Notes::new("memory");
    let mut client = through(&relay);
    relay.lose_answers(true);
    let mut input = notes.call(1, 0);
    input.resize(20_000, b'x');
    let call = client.submit_with("note", input, mode(Delivery::EffectivelyOnce)).unwrap();
    wait_until("it ran", PATIENCE, || notes.of(1) == 1);
    std::thread::sleep(Duration::from_millis(20));
    relay.cut();
    relay.lose_answers(false);
    let error = client.wait(call).unwrap_err();
    assert!(matches!(&error, InvokeError::Expired { text } if text.contains("may have run")), "{error}");
    assert_eq!(notes.of(1), 1);
}

fn is_readable(client: &Client, within: Duration) -> bool {
    let within = Timespec { tv_sec: i64::try_from(within.as_secs()).unwrap(), tv_nsec: within.subsec_nanos().into() };
    poll(&mut [PollFd::new(client, PollFlags::IN)], Some(&within)).unwrap() == 1
}

#[test]
fn r6_requests_are_held_until_a_flush_and_the_descriptor_may_be_asked_for_late() {
    let (_process, mut client) = start_workers(Ipc::Ring, 2, &[]);
    let calls: Vec<_> = (0..3_u8).map(|n| client.submit("echo", vec![n]).unwrap()).collect();
    std::thread::sleep(Duration::from_millis(50));
    assert!(is_readable(&client, Duration::from_secs(5)), "answers came before anybody asked for the descriptor");
    for (n, call) in (0..).zip(calls) {
        assert_eq!(&*client.wait(call).unwrap(), [n]);
    }

    client.cork();
    for n in 0..200_u64 {
        client.submit("echo", n.to_le_bytes().to_vec()).unwrap();
    }
    assert!(!is_readable(&client, Duration::from_millis(100)), "a held request was answered");
    client.flush();
    let mut answers = 0;
    while client.in_flight() > 0 {
        assert!(is_readable(&client, Duration::from_secs(5)), "{answers} of 200 answers");
        answers += client.drain(&mut |_, result| assert!(result.is_ok(), "{result:?}"));
    }
    assert_eq!(answers, 200);

    // Whoever asks for an answer has its request sent, and much is not held at all.
    client.cork();
    let call = client.submit("echo", b"held").unwrap();
    assert_eq!(&*client.wait(call).unwrap(), b"held");
    client.submit("echo", vec![7; 100_000]).unwrap();
    assert!(is_readable(&client, Duration::from_secs(5)));
    client.flush();
    while client.in_flight() > 0 {
        client.drain(&mut |_, result| assert!(result.is_ok(), "{result:?}"));
    }
}
