//! What a network does to bytes on their way (faults.md section 5), through a proxy of ours, on every reactor. All of it goes
//! through `Client` as its users have it, so that hello, frames and bodies are struck alike.
//!
//! `PRAAS_SEED` sets the seed of random tests, `PRAAS_CUTS` the connections that each of them breaks (default 400).
#![allow(clippy::cast_possible_truncation, reason = "dice and patterns are cut to size on purpose")]

mod support;

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use praas_dataplane::client::CallHandle;
use praas_dataplane::wire::frame as wire;
use praas_dataplane::{Client, ClientConfig, InvokeError, Ipc, LocalProcess, WaitMode};
use praas_transport::Header;
use praas_transport::frame::{Seal, Transit};
use support::proxy::{Fault, Lane, Plan, Proxy, Way};
use support::{Dice, PATIENCE, Tally, connect, content, cuts, fds, on_both_reactors, seed, start_with, wait_until};

/// The bodies of a stream of three requests: none, shorter than a header, longer than one.
const BODIES: [usize; 3] = [0, 3, 100];

fn config(wait: WaitMode) -> ClientConfig {
    ClientConfig { wait, deadline: Duration::from_secs(10), ..ClientConfig::default() }
}

/// Connects there, sends three requests before it looks for an answer, and checks all three.
fn three_calls(address: std::net::SocketAddr, wait: WaitMode) {
    let mut client = Client::connect(address, &config(wait)).expect("it connects");
    let calls = BODIES.map(|bytes| client.submit("echo", content(9, bytes)).expect("it takes them"));
    for (call, bytes) in calls.into_iter().zip(BODIES) {
        assert_eq!(&*client.wait(call).expect("an answer"), content(9, bytes), "{bytes} bytes");
    }
}

/// Bytes of a whole connection of `three_calls`, each way.
fn stream_bytes(process: &LocalProcess) -> [u64; 2] {
    let proxy = Proxy::start(process.addr(), 0, |_| Plan::default());
    three_calls(proxy.addr(), WaitMode::Balanced);
    proxy.tape(0).1
}

#[test]
fn r3_n3_a_stream_cut_at_any_byte_gives_the_same_answers() {
    on_both_reactors(|reactor| {
        let (process, _client) = reactor.start(1, &[]);
        let [up, down] = stream_bytes(&process);
        // Three requests and three answers, and what goes before them.
        assert!(up > 3 * 64 + 103 && down > 4 * 64 + 103, "{up} and {down} bytes");
        // Long enough for a reader that waits for bytes to have taken those before.
        let split = |way, at| Plan::on(way, at, Fault::Split(Duration::from_micros(500)));
        let mut streams = 0;
        for (way, bytes, waits) in [
            (Way::Up, up, &[WaitMode::Balanced][..]),
            // Each reads in its own way; `latency` as `balanced` does.
            (Way::Down, down, &[WaitMode::Balanced, WaitMode::Efficient]),
        ] {
            for wait in waits {
                let proxy = Proxy::start(process.addr(), 0, move |number| split(way, number + 1));
                for _ in 1..bytes {
                    three_calls(proxy.addr(), *wait);
                }
                streams += bytes - 1;
                // Each was split where it should: those ends that are still on their way included.
                wait_until("every stream was split", PATIENCE, || proxy.done() == bytes - 1);
            }
        }
        println!("{streams} streams, split once each");
    });
}

#[test]
fn r3_n3_bytes_one_by_one_in_random_pieces_and_all_at_once_give_the_same_answers() {
    on_both_reactors(|reactor| {
        let (process, _client) = reactor.start(1, &[]);
        let pieces = |piece_max, pause| Lane { piece_max, pause: Duration::from_micros(pause), ..Lane::default() };
        for (up, down) in [
            (pieces(1, 100), pieces(1, 100)),
            (pieces(1, 0), pieces(1, 0)),
            (pieces(90, 50), pieces(90, 50)),
            // What comes within 10 ms goes on as one: several frames in one read.
            (pieces(0, 10_000), pieces(0, 10_000)),
        ] {
            let plan = Plan { up, down, narrow: false };
            let proxy = Proxy::start(process.addr(), seed(), move |_| plan.clone());
            for wait in [WaitMode::Balanced, WaitMode::Efficient, WaitMode::Latency] {
                for _ in 0..2 {
                    three_calls(proxy.addr(), wait);
                }
            }
        }
    });
}

#[test]
fn r3_n3_large_bodies_in_pieces_of_any_size_arrive_whole() {
    on_both_reactors(|reactor| {
        let (process, _client) = reactor.start(2, &[]);
        let seed = seed();
        let proxy = Proxy::start(process.addr(), seed, move |number| {
            let mut dice = Dice(seed + number);
            let mut lane = || Lane { piece_max: 1 << (8 + dice.below(8)), ..Lane::default() };
            Plan { up: lane(), down: lane(), narrow: number % 2 == 1 }
        });
        for round in 0..4 {
            let mut client = Client::connect(proxy.addr(), &config(WaitMode::Balanced)).unwrap();
            let sizes = [70_000, 5, 1 << 20, 0, 4095, 300_000];
            let calls = sizes.map(|bytes| client.submit("echo", content(round, bytes)).unwrap());
            for (call, bytes) in calls.into_iter().zip(sizes).rev() {
                let reply = client.wait(call).unwrap();
                assert!(*reply == *content(round, bytes), "round {round}: {bytes} bytes, {} came", reply.len());
            }
        }
    });
}

/// Each end has more to send than the way holds: whoever does not read while it writes locks both up.
#[test]
fn r3_n3_n9_short_writes_both_ways_at_once_neither_lock_up_nor_mix_up() {
    on_both_reactors(|reactor| {
        let (process, _client) = reactor.start(2, &[]);
        let proxy = Proxy::start(process.addr(), 0, |_| Plan { narrow: true, ..Plan::default() });
        for wait in [WaitMode::Balanced, WaitMode::Efficient] {
            let begun = Instant::now();
            let mut client = Client::connect(proxy.addr(), &config(wait)).unwrap();
            let calls: Vec<_> = (0..12).map(|call| client.submit("echo", content(call, 2 << 20)).unwrap()).collect();
            for (call, handle) in (0..).zip(calls) {
                assert!(*client.wait(handle).unwrap() == *content(call, 2 << 20), "call {call}");
            }
            println!("24 MiB there and back in {:?}", begun.elapsed());
        }
    });
}

#[test]
fn r1_calls_in_flight_from_many_clients_in_any_order_all_find_their_callers() {
    on_both_reactors(|reactor| {
        let (process, _client) = reactor.start(2, &[]);
        std::thread::scope(|scope| {
            for client in 0..6 {
                let address = process.addr();
                scope.spawn(move || {
                    let mut dice = Dice(seed() ^ (client + 1) << 40);
                    let waits = [WaitMode::Balanced, WaitMode::Efficient];
                    let config =
                        ClientConfig { deadline: Duration::from_secs(60), ..config(waits[client as usize % 2]) };
                    let mut client_of_ours = Client::connect(address, &config).unwrap();
                    let mut open = Vec::new();
                    for call in 0..120 {
                        let call = client << 32 | call;
                        let bytes = match dice.below(8) {
                            0 => dice.below(2 << 20),
                            1..3 => dice.below(100_000),
                            _ => dice.below(200),
                        };
                        loop {
                            let input = content(call, bytes as usize);
                            match client_of_ours.submit("echo", input) {
                                Ok(handle) => break open.push((call, bytes, handle)),
                                // All payload memory is out just now.
                                Err(InvokeError::Busy { .. }) => check_one(&mut client_of_ours, &mut open, &mut dice),
                                Err(error) => panic!("{error}"),
                            }
                        }
                        while open.len() > 24 {
                            check_one(&mut client_of_ours, &mut open, &mut dice);
                        }
                    }
                    while !open.is_empty() {
                        check_one(&mut client_of_ours, &mut open, &mut dice);
                    }
                });
            }
        });
    });
}

/// Waits for any of the calls in flight, and checks that the answer is its own.
fn check_one(client: &mut Client, open: &mut Vec<(u64, u64, CallHandle)>, dice: &mut Dice) {
    let (call, bytes, handle) = open.swap_remove(dice.below(open.len() as u64) as usize);
    let reply = client.wait(handle).unwrap_or_else(|error| panic!("call {call:#x} of {bytes} bytes: {error}"));
    assert!(*reply == *content(call, bytes as usize), "call {call:#x} of {bytes} bytes got {} others", reply.len());
}

/// Whether a call that ended with this error has surely not run.
fn has_not_run(error: &InvokeError) -> bool {
    matches!(
        error,
        InvokeError::UnknownFunction { .. }
            | InvokeError::TooLarge { .. }
            | InvokeError::Busy { .. }
            | InvokeError::NoSpace { .. }
            | InvokeError::Draining
    )
}

/// How the calls of broken connections ended.
#[derive(Default)]
struct Ends {
    ok: HashSet<u64>,
    not_run: HashSet<u64>,
    unconnected: u64,
    by_error: HashMap<String, u64>,
}

/// Long, so that whoever hangs is told from whoever is slow.
const DEADLINE: Duration = Duration::from_secs(4);

/// Some calls over one connection, which may break at any byte. None may outlive its deadline, or get another's answer.
fn calls_over(address: std::net::SocketAddr, first: u64, dice: &mut Dice, ends: &mut Ends) {
    let wait = [WaitMode::Balanced, WaitMode::Efficient][dice.below(2) as usize];
    let config = ClientConfig { wait, deadline: DEADLINE, connect_within: DEADLINE, ..ClientConfig::default() };
    let begun = Instant::now();
    let connected = Client::connect(address, &config);
    assert!(begun.elapsed() < DEADLINE, "connecting took {:?}: {:?}", begun.elapsed(), connected.err());
    let Ok(mut client) = connected else { return ends.unconnected += 1 };
    let begun = Instant::now();
    let mut open = Vec::new();
    for call in first..first + 1 + dice.below(6) {
        let bytes = match dice.below(16) {
            0 => dice.below(3 << 20),
            1..4 => dice.below(60_000),
            4 => 0,
            _ => dice.below(300),
        } as usize;
        match client.submit("tally", Tally::input(call, bytes)) {
            Ok(handle) => open.push((call, bytes, handle)),
            Err(error) => count(ends, call, &error),
        }
    }
    for (call, bytes, handle) in open {
        match client.wait(handle) {
            Ok(reply) => {
                assert!(*reply == *Tally::input(call, bytes), "call {call} of {bytes} bytes got another's answer");
                ends.ok.insert(call);
            }
            Err(error) => count(ends, call, &error),
        }
        assert!(begun.elapsed() < DEADLINE + Duration::from_millis(200), "call {call}: {:?}", begun.elapsed());
    }
}

fn count(ends: &mut Ends, call: u64, error: &InvokeError) {
    let kind = format!("{error:?}");
    let kind = kind.split([' ', '{']).next().unwrap_or_default().to_owned();
    // Both ends of the connection were told that it is gone: nobody has to wait for the clock to learn it. Unless each of its successors
    // was struck in its hello, which two in five are: once in a few thousand calls that goes on until the deadline.
    let hung = matches!(error, InvokeError::Timeout { text } if !text.contains("attempts to connect again failed"));
    assert!(!hung, "call {call} hung: {error}");
    if has_not_run(error) {
        ends.not_run.insert(call);
    }
    *ends.by_error.entry(kind).or_default() += 1;
}

/// Nothing lost, nothing doubled: what was answered ran once, what was refused did not, what was cut off at most once.
fn judge(process: &LocalProcess, tally: &Tally, ends: &Ends) {
    // Calls whose clients are gone may still wait their turn; those that come after them come last.
    let mut client = connect(process);
    for _ in 0..2 {
        let last: Vec<_> = (0..2).map(|_| client.submit("sleep", b"50").unwrap()).collect();
        last.into_iter().for_each(|call| drop(client.wait(call).unwrap()));
    }
    let runs = tally.runs();
    let twice: Vec<_> = runs.iter().filter(|(_, runs)| **runs > 1).collect();
    assert!(twice.is_empty(), "ran more than once: {twice:?}");
    let lost: Vec<_> = ends.ok.iter().filter(|call| !runs.contains_key(call)).collect();
    assert!(lost.is_empty(), "answered, and did not run: {lost:?}");
    let ran: Vec<_> = ends.not_run.iter().filter(|call| runs.contains_key(call)).collect();
    assert!(ran.is_empty(), "refused, and ran: {ran:?}");
    let unsure = runs.len() - ends.ok.len();
    println!(
        "{} answered, {unsure} ran unheard of, {} refused, {} connections not made; {:?}",
        ends.ok.len(),
        ends.not_run.len(),
        ends.unconnected,
        ends.by_error
    );
}

/// A place in a stream: small places, where hello and headers are, as likely as large ones.
fn place(dice: &mut Dice) -> u64 {
    let magnitude = dice.below(22);
    dice.below(2 << magnitude)
}

#[test]
fn r6_n4_connections_reset_or_cut_anywhere_lose_and_double_nothing() {
    on_both_reactors(|reactor| {
        let mut config = reactor.config(Ipc::Ring, 2, &["--arena-bytes", "134217728"]);
        let tally = Tally::keep(&mut config);
        let (process, mut client) = start_with(&config);
        let open = fds(process.pid());
        let seed = seed();
        let proxy = Proxy::start(process.addr(), seed, move |number| {
            let mut dice = Dice(seed ^ number << 20);
            let way = [Way::Up, Way::Down][dice.below(2) as usize];
            let fault = if dice.below(4) == 0 { Fault::Cut } else { Fault::Reset };
            Plan::on(way, place(&mut dice), fault)
        });
        let (mut dice, mut ends) = (Dice(seed), Ends::default());
        let mut connections = 0;
        // Some end before their place comes: a connection that does not break is not shown to survive it.
        while proxy.done() < cuts() {
            calls_over(proxy.addr(), connections * 8, &mut dice, &mut ends);
            connections += 1;
            assert!(connections < 3 * cuts(), "{} connections of {connections} were struck", proxy.done());
        }
        println!("{} of {connections} connections struck", proxy.done());
        judge(&process, &tally, &ends);
        assert!(ends.ok.len() as u64 > cuts() / 2);
        drop(proxy);
        wait_until("no descriptor stays", PATIENCE, || fds(process.pid()) == open);
        let input = content(1, 64 << 20);
        assert!(*client.invoke("echo", input.clone()).unwrap() == *input, "all payload memory is back");
    });
}

/// The bytes of a connection's first header.
fn seal(header: &Header) -> [u8; 64] {
    header.seal(Transit::default(), &mut Seal::default())
}

/// Bytes that nobody sent, between two frames and in the middle of one, each way: the connection ends, and nobody waits
/// for what will not come.
#[test]
fn n5_n6_bytes_that_nobody_sent_end_a_connection() {
    on_both_reactors(|reactor| {
        let (process, mut client) = reactor.start(1, &[]);
        let open = fds(process.pid());
        let [up, down] = stream_bytes(&process);
        let request = Header { kind: wire::REQUEST, call: 1 << 40, ..Header::default() };
        let frames = [
            vec![0; 64],
            vec![0xff; 200],
            content(5, 64),
            b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec(),
            // A frame that might be, cut short, and one that claims more than there is memory.
            seal(&request)[..40].to_vec(),
            seal(&Header { payload_bytes: 1 << 62, ..request }).to_vec(),
        ];
        for (way, bytes) in [(Way::Up, up), (Way::Down, down)] {
            // Before the last frame; in its header; in what precedes the first.
            for at in [bytes - 164, bytes - 154, 20] {
                for garbage in &frames {
                    let garbage = garbage.clone();
                    let plan = Plan::on(way, at, Fault::Insert(garbage.clone()));
                    let proxy = Proxy::start(process.addr(), 0, move |_| plan.clone());
                    let quick =
                        ClientConfig { deadline: DEADLINE, connect_within: DEADLINE, ..ClientConfig::default() };
                    let begun = Instant::now();
                    let Ok(mut client) = Client::connect(proxy.addr(), &quick) else { continue };
                    let ended = BODIES.map(|bytes| {
                        let input = content(9, bytes);
                        client.invoke("echo", input.clone()).map(|reply| *reply == *input)
                    });
                    let what = format!("{} bytes {way:?} at {at}", garbage.len());
                    let wrong = ended.iter().any(|ended| matches!(ended, Ok(false)));
                    assert!(!wrong, "{what}: a wrong answer");
                    let hung = ended.iter().any(|ended| matches!(ended, Err(InvokeError::Timeout { .. })));
                    assert!(!hung && begun.elapsed() < DEADLINE, "{what}: {ended:?} after {:?}", begun.elapsed());
                }
            }
        }
        assert_eq!(&*client.invoke("echo", b"others").unwrap(), b"others");
        wait_until("no descriptor stays", PATIENCE, || fds(process.pid()) == open);
    });
}

/// Bits of hello and of headers: no call here has a body, but for the greeting of the process.
#[test]
fn n6_a_flipped_bit_is_refused_or_harmless() {
    on_both_reactors(|reactor| {
        let (process, mut client) = reactor.start(1, &[]);
        let open = fds(process.pid());
        let probe = Proxy::start(process.addr(), 0, |_| Plan::default());
        let calls = |address| -> Result<u64, InvokeError> {
            let quick = ClientConfig { deadline: DEADLINE, connect_within: DEADLINE, ..ClientConfig::default() };
            let Ok(mut client) = Client::connect(address, &quick) else { return Ok(0) };
            let mut right = 0;
            for (function, status) in [("empty", 0), ("echo", 0), ("status", 0)] {
                let reply = client.invoke(function, b"")?;
                let expected: &[u8] = if function == "status" { b"status" } else { b"" };
                assert!(*reply == *expected && reply.status() == status, "{function} answered {reply:?}");
                right += 1;
            }
            Ok(right)
        };
        assert_eq!(calls(probe.addr()).unwrap(), 3);
        // The bytes of the one body, which nothing covers without payload checksums, are left out.
        let [up, down] = probe.tape(0).1;
        let (seed, down) = (seed(), down - 6);
        let proxy = Proxy::start(process.addr(), seed, move |number| {
            let mut dice = Dice(seed ^ number << 20);
            let (way, bytes) = if dice.below(2) == 0 { (Way::Up, up) } else { (Way::Down, down) };
            Plan::on(way, dice.below(bytes), Fault::Flip(dice.below(8) as u8))
        });
        let (mut harmless, mut refused) = (0, 0);
        for round in 0..cuts() {
            let begun = Instant::now();
            match calls(proxy.addr()) {
                Ok(3) => harmless += 1,
                Ok(_) => refused += 1,
                Err(error) => {
                    assert!(!matches!(error, InvokeError::Timeout { .. }), "flip {round} hung: {error}");
                    refused += 1;
                }
            }
            assert!(begun.elapsed() < DEADLINE, "flip {round} took {:?}", begun.elapsed());
        }
        println!("{} bits flipped: {refused} refused, {harmless} harmless", proxy.done());
        assert!(refused > cuts() / 2, "{refused} of {} flips were noticed", cuts());
        drop((proxy, probe));
        assert_eq!(&*client.invoke("echo", b"others").unwrap(), b"others");
        wait_until("no descriptor stays", PATIENCE, || fds(process.pid()) == open);
    });
}

/// With checksums over payloads no flip anywhere passes for an answer, or runs as a request.
#[test]
fn n6_a_bit_flipped_in_a_payload_is_refused_where_payloads_have_checksums() {
    on_both_reactors(|reactor| {
        let (process, _client) = reactor.start(1, &["--checks", "always"]);
        let seed = seed();
        let proxy = Proxy::start(process.addr(), seed, move |number| {
            let mut dice = Dice(seed ^ number << 20);
            let way = [Way::Up, Way::Down][dice.below(2) as usize];
            Plan::on(way, dice.below(200_000), Fault::Flip(dice.below(8) as u8))
        });
        let mut refused = 0;
        for round in 0..cuts() {
            let quick = ClientConfig { deadline: DEADLINE, connect_within: DEADLINE, ..ClientConfig::default() };
            let ended = Client::connect(proxy.addr(), &quick).map(|mut client| {
                [100, 150_000, 20_000].map(|bytes| {
                    let input = content(round, bytes);
                    client
                        .invoke("echo", input.clone())
                        .map(|reply| assert!(*reply == *input, "flip {round} was accepted"))
                })
            });
            refused += u64::from(ended.is_err() || ended.is_ok_and(|calls| calls.iter().any(Result::is_err)));
        }
        println!("{} bits flipped: {refused} refused", proxy.done());
        assert!(refused > cuts() / 2);
    });
}

/// Bytes that come twice: from the same connection, or a whole one of somebody else's.
#[test]
fn a2_repeated_bytes_run_nothing_twice() {
    on_both_reactors(|reactor| {
        let mut config = reactor.config(Ipc::Ring, 1, &[]);
        let tally = Tally::keep(&mut config);
        let (process, _client) = start_with(&config);
        // How far a connection is when its first request has gone, and how long that request is.
        let probe = Proxy::start(process.addr(), 0, |_| Plan::default());
        let bytes_of = |calls: u64| {
            let mut client = connect_to(&probe);
            (0..calls)
                .for_each(|call| drop(client.invoke("tally", Tally::input(1 << 32 | calls << 8 | call, 10)).unwrap()));
        };
        (0..3).for_each(bytes_of);
        let [none, one, two] = [0, 1, 2].map(|number| probe.tape(number).1[0]);
        assert_eq!(two - one, one - none, "requests of one size");
        let request = (one - none) as usize;
        let proxy = Proxy::start(process.addr(), seed(), move |number| {
            // All of the first request, or of the first two, or all there was, hello included.
            let (at, bytes) =
                [(one, request), (two, 2 * request), (two, two as usize), (two, request)][number as usize % 4];
            Plan::on(Way::Up, at, Fault::Repeat(bytes))
        });
        let mut ends = Ends::default();
        for round in 0..40 {
            let mut client = connect_to(&proxy);
            for call in round * 8..round * 8 + 4 {
                match client.invoke("tally", Tally::input(call, 10)) {
                    Ok(reply) => {
                        assert_eq!(&*reply, Tally::input(call, 10), "call {call} got another's answer");
                        ends.ok.insert(call);
                    }
                    Err(error) => count(&mut ends, call, &error),
                }
            }
        }
        // Lost connections come back, and are struck again.
        assert!(proxy.done() >= 40);
        judge(&process, &tally, &ends);
    });
}

fn connect_to(proxy: &Proxy) -> Client {
    // One connection each, which is what is struck.
    let config = ClientConfig { deadline: DEADLINE, reconnect: false, ..ClientConfig::default() };
    Client::connect(proxy.addr(), &config).expect("it connects")
}
