//! Clients whose connections are lent to workers (`--lease-connections`), on every reactor: answers stay right while connections change hands, and
//! nobody loses more than what a dead worker had begun on.
//!
//! The function `direct` of the test worker answers with its input, and says by its status whether the client's call came without a hop.
#![allow(clippy::cast_possible_truncation, reason = "dice and patterns are cut to size on purpose")]

mod support;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use praas_dataplane::wire::{Code, frame};
use praas_dataplane::{
    CallOptions, Client, ClientConfig, Credential, Delivery, InvokeError, Ipc, LaunchKey, LocalProcess, Role, Secret,
    WaitMode,
};
use praas_transport::Header;
use support::namespace::Cable;
use support::proxy::{Lane, Plan, Proxy};
use support::raw::Raw;
use support::{
    Dice, PATIENCE, Tally, children, connect, content, cuts, lives, on_both_reactors, run_process, seed, signal,
    start_with, wait_until,
};

const LEASED: &[&str] = &["--lease-connections"];

/// A call of `direct`; whether it came without a hop.
fn direct(client: &mut Client, call: u64, bytes: usize) -> bool {
    let reply = client.invoke("direct", Tally::input(call, bytes)).expect("an answer");
    assert!(*reply == *Tally::input(call, bytes), "call {call} of {bytes} bytes got another's answer");
    reply.status() == 1
}

/// Calls until one comes without a hop.
fn heat(client: &mut Client) {
    let begun = Instant::now();
    while !direct(client, 0, 0) {
        assert!(begun.elapsed() < PATIENCE, "never without a hop");
    }
}

#[test]
fn r1_p3_a_hot_client_talks_to_its_worker_whatever_it_sends() {
    on_both_reactors(|reactor| {
        let (_process, mut client) = reactor.start(2, LEASED);
        let sizes =
            [0, 1, 32, 33, 56, 4087, 4088, 4089, 20_000, (256 << 10) - 8, 256 << 10, (1 << 20) - 8, 1 << 20, 3 << 20];
        let mut without = 0;
        for call in 0..300 {
            without += u32::from(direct(&mut client, call, 64));
        }
        assert!(without > 200, "{without} of 300 calls without a hop");
        let mut dice = Dice(seed());
        let (mut hops, mut without) = (0, 0);
        for call in 0..3000 {
            let bytes =
                sizes[dice.below(sizes.len() as u64) as usize].min(if call % 20 == 0 { usize::MAX } else { 5000 });
            match direct(&mut client, call, bytes) {
                true => without += 1,
                false => hops += 1,
            }
            // Something else, now and then.
            match dice.below(400) {
                0 => assert_eq!(&*client.invoke("args", b"abc").unwrap(), b"3"),
                1 => assert!(matches!(client.invoke("fail", b"-5"), Err(InvokeError::Failed { status: -5, .. }))),
                2 => assert!(matches!(client.invoke("no such", b""), Err(InvokeError::UnknownFunction { .. }))),
                3 => client.fire("empty", b"").unwrap(),
                4 => drop(client.invoke("large", b"5000000").unwrap()),
                5 => {
                    assert!(matches!(client.invoke("echo", vec![0; (64 << 20) + 1]), Err(InvokeError::TooLarge { .. })))
                }
                _ => {}
            }
        }
        println!("{without} calls without a hop, {hops} with");
        assert!(without > 1000 && hops > 100, "{without} without a hop, {hops} with");
    });
}

#[test]
fn r1_several_at_once_in_between_are_answered_each() {
    on_both_reactors(|reactor| {
        let (_process, mut client) = reactor.start(2, LEASED);
        let mut dice = Dice(seed());
        for round in 0..60 {
            heat(&mut client);
            let burst = 2 + dice.below(40);
            let calls: Vec<_> = (0..burst)
                .map(|at| {
                    let bytes = if dice.below(12) == 0 { 300_000 } else { dice.below(3000) as usize };
                    let function = if dice.below(3) == 0 { "echo" } else { "direct" };
                    let input = Tally::input(round * 100 + at, bytes);
                    (client.submit(function, input.clone()).unwrap(), input)
                })
                .collect();
            for (call, input) in calls {
                assert!(*client.wait(call).unwrap() == *input, "round {round}: {} bytes", input.len());
            }
        }
    });
}

/// One worker, which the hot client has: everybody else is served all the same, and soon.
#[test]
fn r1_a_worker_that_has_a_client_is_there_for_others() {
    on_both_reactors(|reactor| {
        let (process, mut hot) = reactor.start(1, LEASED);
        let mut others: Vec<_> = (0..3).map(|_| connect(&process)).collect();
        for round in 0..100 {
            heat(&mut hot);
            let begun = Instant::now();
            for (at, other) in others.iter_mut().enumerate() {
                let input = content(round * 10 + at as u64, 100);
                assert_eq!(&*other.invoke("echo", input.clone()).unwrap(), &*input);
            }
            assert!(begun.elapsed() < Duration::from_secs(2), "three short calls took {:?}", begun.elapsed());
        }
        // And while the hot client's function runs: they wait for it, as they would for any.
        heat(&mut hot);
        let options = CallOptions { deadline: Some(Duration::from_secs(10)), ..CallOptions::default() };
        let call = hot.submit_with("direct", [&7_u64.to_le_bytes()[..], b"wait=100"].concat(), options).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(&*others[0].invoke("echo", b"me too").unwrap(), b"me too");
        assert_eq!(hot.wait(call).unwrap().status(), 1);
    });
}

#[test]
fn r1_a_lent_connection_is_given_back_when_nothing_comes() {
    on_both_reactors(|reactor| {
        let (_process, mut client) = reactor.start(1, LEASED);
        for _ in 0..5 {
            heat(&mut client);
            std::thread::sleep(Duration::from_millis(100));
            assert!(!direct(&mut client, 1, 10), "it went back, and has to be earned again");
        }
    });
}

#[test]
fn p14_w5_a_call_past_its_deadline_ends_in_time_and_so_does_its_worker() {
    on_both_reactors(|reactor| {
        let (process, mut client) = reactor.start(1, &["--lease-connections", "--grace-ms=50"]);
        heat(&mut client);
        let workers = children(process.pid());
        let begun = Instant::now();
        // Late, and it answers.
        let wait = |ms: u32| [&7_u64.to_le_bytes()[..], format!("wait={ms}").as_bytes()].concat();
        let options = |ms| CallOptions { deadline: Some(Duration::from_millis(ms)), ..CallOptions::default() };
        let call = client.submit_with("direct", wait(60), options(30)).unwrap();
        assert!(matches!(client.wait(call), Err(InvokeError::Timeout { .. })));
        heat(&mut client);
        assert_eq!(children(process.pid()), workers, "within its grace");
        // It never answers.
        let call = client.submit_with("direct", wait(60_000), options(100)).unwrap();
        assert!(matches!(client.wait(call), Err(InvokeError::Timeout { .. })));
        wait_until("the worker is killed", PATIENCE, || !lives(workers[0]));
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
        heat(&mut client);
    });
}

#[test]
fn p14_a_cancelled_call_hears_of_it() {
    on_both_reactors(|reactor| {
        let (_process, mut client) = reactor.start(1, LEASED);
        heat(&mut client);
        let begun = Instant::now();
        let call = client.submit("direct", [&7_u64.to_le_bytes()[..], b"asks=10000"].concat()).unwrap();
        std::thread::sleep(Duration::from_millis(30));
        client.cancel(call).unwrap();
        assert!(matches!(client.wait(call), Err(InvokeError::Cancelled)));
        assert_eq!(&*client.invoke("echo", b"on").unwrap(), b"on");
        assert!(begun.elapsed() < Duration::from_secs(3), "the function was told: {:?}", begun.elapsed());
    });
}

#[test]
fn p5_a_panic_on_a_lent_connection_is_told_and_the_connection_stays() {
    on_both_reactors(|reactor| {
        let (process, mut client) = reactor.start(1, LEASED);
        for _ in 0..3 {
            heat(&mut client);
            let workers = children(process.pid());
            let panic = client.invoke("direct", [&7_u64.to_le_bytes()[..], b"panic"].concat());
            assert!(matches!(panic, Err(InvokeError::Panicked { .. })), "{panic:?}");
            assert!(client.is_connected());
            wait_until("the worker exits", PATIENCE, || !lives(workers[0]));
        }
        direct(&mut client, 5, 5);
    });
}

#[test]
fn p10_a_leased_call_calls_others() {
    on_both_reactors(|reactor| {
        let (_process, mut client) = reactor.start(2, LEASED);
        for round in 0..20 {
            heat(&mut client);
            for _ in 0..40 {
                let reply = client.invoke("direct", [&7_u64.to_le_bytes()[..], b"nest"].concat()).unwrap();
                assert_eq!(&*reply, b"nested", "round {round}");
            }
        }
    });
}

#[test]
fn a_drain_in_the_middle_answers_or_refuses_each_call() {
    on_both_reactors(|reactor| {
        for round in 0..8 {
            let (process, mut client) = reactor.start(1 + round % 2, LEASED);
            heat(&mut client);
            let pid = process.pid();
            let drain = std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(5 + u64::from(round)));
                signal(pid, 15);
            });
            let ended = loop {
                let input = content(u64::from(round), 500);
                match client.invoke("direct", input.clone()) {
                    Ok(reply) => assert_eq!(&*reply, &*input),
                    Err(error) => break error,
                }
            };
            assert!(matches!(ended, InvokeError::Draining | InvokeError::ConnectionLost { .. }), "{ended}");
            drain.join().unwrap();
            let begun = Instant::now();
            wait_until("the process ends", Duration::from_secs(4), || !lives(pid));
            println!("round {round}: ended after {:?} with {ended}", begun.elapsed());
        }
    });
}

#[derive(Default)]
struct Ends {
    ok: HashSet<u64>,
    by_error: HashMap<String, u64>,
}

/// W1, W2, G1, G3: SIGKILL in any phase of a connection's life with its worker, as often as PRAAS_CUTS says. Each call ends once; what was
/// answered ran once, nothing ran twice, and nobody waits for the clock.
#[test]
fn w1_w2_g1_g3_workers_killed_at_any_moment_cost_only_what_they_had_begun() {
    on_both_reactors(|reactor| {
        let mut config = reactor.config(Ipc::Ring, 2, LEASED);
        let tally = Tally::keep(&mut config);
        let (process, mut client) = start_with(&config);
        let (pid, done) = (process.pid(), Arc::new(AtomicBool::new(false)));
        let killer = std::thread::spawn({
            let (done, mut dice) = (Arc::clone(&done), Dice(seed()));
            move || {
                let mut kills = 0;
                while kills < cuts() / 2 {
                    std::thread::sleep(Duration::from_micros(2000 + dice.below(20_000)));
                    let workers = children(pid);
                    if let Some(worker) = workers.get(dice.below(workers.len().max(1) as u64) as usize) {
                        signal(*worker, 9);
                        kills += 1;
                    }
                }
                done.store(true, Ordering::Relaxed);
                kills
            }
        });
        let (mut ends, mut dice, mut call, mut without) = (Ends::default(), Dice(seed() + 1), 0, 0_u64);
        let mut retried = HashSet::new();
        while !done.load(Ordering::Relaxed) {
            call += 1;
            let bytes = match dice.below(30) {
                0 => dice.below(1 << 20),
                1..4 => dice.below(60_000),
                _ => dice.below(300),
            } as usize;
            let begun = Instant::now();
            let delivery = if dice.below(500) < 2 { Delivery::Retry } else { Delivery::AtMostOnce };
            if delivery == Delivery::Retry {
                retried.insert(call);
            }
            let options = CallOptions { deadline: Some(Duration::from_secs(10)), delivery: Some(delivery) };
            let ended =
                client.submit_with("direct", Tally::input(call, bytes), options).and_then(|call| client.wait(call));
            match ended {
                Ok(reply) => {
                    assert!(*reply == *Tally::input(call, bytes), "call {call} of {bytes} bytes got another's answer");
                    without += u64::from(reply.status() == 1);
                    ends.ok.insert(call);
                }
                Err(error @ (InvokeError::WorkerLost { .. } | InvokeError::ConnectionLost { .. })) => {
                    let kind = format!("{error:?}");
                    *ends.by_error.entry(kind.split([' ', '{']).next().unwrap().to_owned()).or_default() += 1;
                }
                Err(error) => panic!("call {call}: {error}"),
            }
            assert!(begun.elapsed() < Duration::from_secs(9), "call {call} took {:?}", begun.elapsed());
        }
        let kills = killer.join().unwrap();
        let runs = tally.runs();
        let twice: Vec<_> = runs.iter().filter(|(call, runs)| **runs > 1 && !retried.contains(call)).collect();
        assert!(twice.is_empty(), "ran more than once: {twice:?}");
        let lost: Vec<_> = ends.ok.iter().filter(|call| !runs.contains_key(call)).collect();
        assert!(lost.is_empty(), "answered, and did not run: {lost:?}");
        println!(
            "{kills} kills, {call} calls, {without} without a hop, {} answered; {:?}",
            ends.ok.len(),
            ends.by_error
        );
        assert!(without > 100, "{without} calls without a hop");
    });
}

/// W1: the worker of an idle lent connection dies: the client does not notice.
#[test]
fn w1_a_connection_outlives_its_idle_worker() {
    on_both_reactors(|reactor| {
        let (process, mut client) = reactor.start(1, LEASED);
        for call in 0..20 {
            heat(&mut client);
            // Until it has said that it is done with the answer.
            std::thread::sleep(Duration::from_millis(2));
            let worker = children(process.pid())[0];
            signal(worker, 9);
            wait_until("it is dead", PATIENCE, || !lives(worker));
            // It would end as `ConnectionLost`: it is not sent again.
            direct(&mut client, call, 100);
        }
    });
}

/// Where a function is when its worker dies is told; what it had not answered is lost with it, and the connection is not.
#[test]
fn w2_a_connection_outlives_the_worker_that_ran_its_call() {
    on_both_reactors(|reactor| {
        let (process, mut client) = reactor.start(1, LEASED);
        for round in 0..10 {
            heat(&mut client);
            let worker = children(process.pid())[0];
            let call = client.submit("direct", [&7_u64.to_le_bytes()[..], b"wait=10000"].concat()).unwrap();
            std::thread::sleep(Duration::from_millis(10));
            signal(worker, 9);
            let error = client.wait(call).expect_err("it died");
            assert!(matches!(error, InvokeError::WorkerLost { .. }), "round {round}: {error}");
            assert!(error.to_string().contains("signal 9"), "{error}");
        }
    });
}

fn request(call: u64, function: u16, payload: &[u8]) -> Header {
    let payload_bytes = payload.len() as u64;
    Header { kind: frame::REQUEST, call, function, payload_bytes, ..Header::default() }
}

/// N2, N4, N5: clients that end, stall or send garbage on a connection that a worker has: the worker is free again, and others are served.
#[test]
fn n2_n4_n5_clients_that_break_a_lent_connection_free_its_worker() {
    on_both_reactors(|reactor| {
        let (process, mut other) = reactor.start(1, LEASED);
        let function = other.welcome().functions.iter().position(|name| name == "direct").unwrap() as u16;
        let payload = Tally::input(1, 100);
        let mut dice = Dice(seed());
        for round in 0..60 {
            let mut raw = Raw::greet(process.addr());
            let mut call = 0;
            loop {
                call += 1;
                raw.send(&request(call, function, &payload), &payload);
                let (header, body) = raw.receive();
                assert_eq!((header.call, header.flags, &body), (call, Code::Ok as u16, &payload));
                if header.status == 1 {
                    break;
                }
                assert!(call < 10_000, "never without a hop");
            }
            // A PING is answered by whoever is there.
            raw.send(&Header { kind: frame::PING, ..Header::default() }, &[]);
            assert_eq!(raw.receive().0.kind, frame::PONG);
            let header = raw.seal(&request(call + 1, function, &payload));
            let whole = [&header[..], &payload].concat();
            use std::io::Write;
            match round % 5 {
                // Ends at any byte of a frame.
                0 => raw.0.write_all(&whole[..dice.below(whole.len() as u64) as usize]).unwrap(),
                1 => drop(raw.0.shutdown(std::net::Shutdown::Write)),
                // Garbage; a frame again; a frame of no known kind.
                2 => raw.0.write_all(&[0x55; 200]).unwrap(),
                3 => raw.0.write_all(&[&whole[..], &whole[..]].concat()).unwrap(),
                _ => raw.send(&Header { kind: 200, ..Header::default() }, &[]),
            }
            if round % 5 == 0 {
                drop(raw);
            } else if round % 5 > 1 {
                assert!(raw.is_closed(), "round {round}");
            }
            let begun = Instant::now();
            assert_eq!(&*other.invoke("echo", b"next").unwrap(), b"next");
            assert!(begun.elapsed() < Duration::from_secs(1), "round {round}: {:?}", begun.elapsed());
        }
        // In the middle of a frame, and silent: cut off after two seconds, and told so.
        let mut raw = Raw::greet(process.addr());
        for call in 1..60 {
            raw.send(&request(call, function, &payload), &payload);
            raw.receive();
        }
        let header = raw.seal(&request(99, function, &payload));
        std::io::Write::write_all(&mut raw.0, &header[..40]).unwrap();
        let begun = Instant::now();
        assert!(raw.is_closed());
        assert!((1..5).contains(&begun.elapsed().as_secs()), "{:?}", begun.elapsed());
        assert_eq!(&*other.invoke("echo", b"on").unwrap(), b"on");
    });
}

#[test]
fn r3_n3_in_pieces_of_any_size_and_late_the_answers_are_the_same() {
    on_both_reactors(|reactor| {
        let (process, _client) = reactor.start(2, LEASED);
        let seed = seed();
        let proxy = Proxy::start(process.addr(), seed, move |number| {
            let mut dice = Dice(seed + number);
            let mut lane = || Lane {
                piece_max: 1 << (8 + dice.below(8)),
                pause: Duration::from_micros(dice.below(60)),
                ..Lane::default()
            };
            Plan { up: lane(), down: lane(), narrow: number % 2 == 1 }
        });
        let mut without = 0;
        for round in 0..4 {
            let wait = [WaitMode::Balanced, WaitMode::Efficient][round % 2];
            let config = ClientConfig { wait, deadline: Duration::from_secs(20), ..ClientConfig::default() };
            let mut client = Client::connect(proxy.addr(), &config).unwrap();
            let mut dice = Dice(seed + round as u64);
            for call in 0..200 {
                let bytes = if call % 50 == 49 { 300_000 } else { dice.below(2000) as usize };
                without += u32::from(direct(&mut client, call, bytes));
            }
        }
        assert!(without > 100, "{without} calls without a hop");
    });
}

/// A3, N5: sessions with keys and checksums change hands like any.
#[test]
fn a3_keyed_sessions_are_lent_with_their_seals() {
    let Some(cable) = Cable::lay() else { return };
    on_both_reactors(|reactor| {
        let key = Secret::new([7; 32]);
        let expires = praas_dataplane::clock::unix_s() + 3600;
        let credential = Credential::mint(&key, Role::Client, "far", expires).expect("a name");
        let mut config = reactor.config(Ipc::Ring, 1, LEASED);
        config.key = Some(LaunchKey::Pipe(Arc::new(key)));
        config.args.push(format!("--listen={}", std::net::SocketAddr::from((cable.far.address(), 0))));
        let process: LocalProcess = cable.far.run(|| LocalProcess::start(&config).expect("it starts"));
        let client_config = ClientConfig { credential: Some(credential), ..ClientConfig::default() };
        let connect = || cable.near.run(|| Client::connect(process.addr(), &client_config).expect("it connects"));
        let (mut client, mut other) = (connect(), connect());
        assert!(client.session().payload_checksums && client.session().send_key.is_some());
        let mut dice = Dice(seed());
        let mut without = 0;
        for call in 0..1500 {
            let bytes = if call % 60 == 0 { 400_000 } else { dice.below(6000) as usize };
            without += u32::from(direct(&mut client, call, bytes));
            if call % 100 == 99 {
                assert_eq!(&*other.invoke("echo", b"me").unwrap(), b"me");
            }
        }
        assert!(without > 500, "{without} calls without a hop");
    });
}

#[test]
fn queues_lend_no_connections_and_say_so() {
    let output = run_process(&["--worker", &support::test_worker(), "--ipc=mq", "--lease-connections"]);
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("--ipc ring"), "{said}");
}

/// Without the option nothing is lent.
#[test]
fn off_is_the_default() {
    on_both_reactors(|reactor| {
        let (_process, mut client) = reactor.start(1, &[]);
        for call in 0..200 {
            assert!(!direct(&mut client, call, 10));
        }
    });
}
