//! Bits that flip on their way (N6), between a process with a key and clients that come back, with `--checks always`: header tags
//! are keyed and payloads have checksums on loopback, too, as between hosts.
//!
//! Oracles: each answer is compared with what was sent; the function compares what it was given with what it makes from the number of
//! the call itself, and leaves that number, so that what ran is known. `PRAAS_FLIPS` sets how many bits flip on each reactor.
#![allow(clippy::cast_possible_truncation, reason = "dice and patterns are cut to size on purpose")]

mod support;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use praas_dataplane::client::CallOptions;
use praas_dataplane::clock::unix_s;
use praas_dataplane::{
    Client, ClientConfig, Credential, Delivery, InvokeError, Ipc, LaunchKey, LocalProcess, Role, Secret,
};
use support::proxy::{Fault, Lane, Plan, Proxy};
use support::{Dice, PATIENCE, Tally, content, fds, on_both_reactors, seed, setting, wait_until};

/// Flips of one process, so that what is kept of calls stays small.
const FLIPS_PER_PROCESS: u64 = 20_000;
/// Clients at once, each with a relay of its own: they sleep most of the time, before they connect again.
const CLIENTS: u64 = 8;
/// Where in its stream a bit flips at the latest, bytes; a power of two.
const LATEST_FLIP: u64 = 1 << 19;
/// One connection in six is left alone for so long, bytes: what is sent until it arrives has to arrive one day.
const LEFT_ALONE: u64 = 400_000;
/// Whoever waits so long hangs.
const DEADLINE: Duration = Duration::from_secs(15);
/// Calls that pass over one connection until it is clear that its flip went unnoticed: many times `LATEST_FLIP` in bytes.
const UNNOTICED_CALLS: u64 = 4000;

fn flips() -> u64 {
    setting("PRAAS_FLIPS", 2000)
}

/// How the calls of one client ended, by number.
#[derive(Default)]
struct Ends {
    /// Answered, and how they were sent.
    answered: HashMap<u64, Delivery>,
    lost: u64,
    /// Bits that flipped, each on a connection of its own.
    flips: u64,
}

/// Places are as likely in the hello and the first headers as in long bodies.
fn place(dice: &mut Dice) -> u64 {
    let magnitude = dice.below(u64::from(LATEST_FLIP.ilog2()));
    dice.below(2 << magnitude)
}

/// One bit, either way, in every connection; some come in pieces of any size.
fn flip(seed: u64, number: u64) -> Plan {
    let mut dice = Dice(seed ^ number << 20);
    let mut lane = || {
        let piece_max = if dice.below(4) == 0 { 1 << (6 + dice.below(10)) } else { 0 };
        Lane { piece_max, ..Lane::default() }
    };
    let mut plan = Plan { up: lane(), down: lane(), narrow: false };
    let struck = if dice.below(2) == 0 { &mut plan.up } else { &mut plan.down };
    let at = if number % 6 == 5 { LEFT_ALONE } else { 0 } + place(&mut dice);
    struck.faults = [(at, Fault::Flip(dice.below(8) as u8))].into();
    plan
}

fn bytes(dice: &mut Dice) -> usize {
    let longest = match dice.below(32) {
        // Longer than one piece of a payload (256 KiB).
        0 => 300_000,
        1..4 => 60_000,
        4..12 => 5000,
        _ => 200,
    };
    dice.below(longest) as usize
}

/// Calls through a relay until `flips` bits have flipped on the way.
fn call_until(flips: u64, address: SocketAddr, seed: u64, first: u64, config: &ClientConfig) -> Ends {
    let proxy = Proxy::start(address, seed, move |number| flip(seed, number));
    let (mut dice, mut ends, mut call) = (Dice(seed), Ends::default(), first);
    let mut client = loop {
        let begun = Instant::now();
        match Client::connect(proxy.addr(), config) {
            Ok(client) => break client,
            Err(error) => assert!(begun.elapsed() < DEADLINE / 3, "{error} after {:?}", begun.elapsed()),
        }
    };
    let (mut done, mut since) = (proxy.done(), call);
    while done < flips {
        let mut open = Vec::new();
        for _ in 0..1 + dice.below(6) {
            let delivery = [Delivery::AtMostOnce, Delivery::Retry, Delivery::EffectivelyOnce][dice.below(3) as usize];
            let input = Tally::input(call, bytes(&mut dice));
            let options = CallOptions { delivery: Some(delivery), ..CallOptions::default() };
            let handle =
                client.submit_with("witness", input.clone(), options).expect("it takes calls while it reconnects");
            open.push((call, delivery, input, handle));
            call += 1;
        }
        let begun = Instant::now();
        for (call, delivery, input, handle) in open {
            match (client.wait(handle), delivery) {
                (Ok(reply), _) => {
                    assert!(*reply == *input, "call {call} of {} bytes: a corrupted answer", input.len());
                    ends.answered.insert(call, delivery);
                }
                (Err(InvokeError::ConnectionLost { .. }), Delivery::AtMostOnce) => ends.lost += 1,
                (Err(error), _) => panic!("call {call} of {} bytes, {delivery:?}: {error}", input.len()),
            }
            assert!(begun.elapsed() < DEADLINE, "call {call} took {:?}", begun.elapsed());
        }
        if proxy.done() != done {
            (done, since) = (proxy.done(), call);
        }
        assert!(call - since < UNNOTICED_CALLS, "a flipped bit did not end its connection");
    }
    ends.flips = done;
    ends
}

/// A bit that flips anywhere, hello, header, key or payload, either way: nothing corrupted is delivered, to a function or to a client;
/// the connection ends, the client comes back, and each call ends as its delivery says.
#[test]
fn n6_a_bit_flipped_anywhere_ends_its_connection_and_is_never_delivered() {
    on_both_reactors(|reactor| {
        let (mut left, mut round) = (flips(), 0);
        while left > 0 {
            let flips = left.min(FLIPS_PER_PROCESS);
            let key = Secret::new([6; 32]);
            let credential = Credential::mint(&key, Role::Client, "n6", unix_s() + 86_400).expect("a name");
            let mut launch = reactor.config(Ipc::Ring, 2, &["--checks", "always"]);
            launch.key = Some(LaunchKey::Pipe(Arc::new(key)));
            let tally = Tally::keep(&mut launch);
            let process = LocalProcess::start(&launch).expect("it starts");
            let config = ClientConfig { credential: Some(credential), deadline: DEADLINE, ..ClientConfig::default() };
            let mut steady = Client::connect(process.addr(), &config).expect("it connects");
            let (open, begun) = (fds(process.pid()), Instant::now());
            let all: Vec<Ends> = std::thread::scope(|scope| {
                let clients: Vec<_> = (0..CLIENTS)
                    .map(|client| {
                        let (address, config) = (process.addr(), &config);
                        let seed = seed() ^ (round << 8 | client) << 40;
                        scope.spawn(move || call_until(flips.div_ceil(CLIENTS), address, seed, client << 40, config))
                    })
                    .collect();
                clients
                    .into_iter()
                    .map(|client| client.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
                    .collect()
            });
            let flipped: u64 = all.iter().map(|ends| ends.flips).sum();
            let (answered, lost): (usize, u64) =
                all.iter().fold((0, 0), |(answered, lost), ends| (answered + ends.answered.len(), lost + ends.lost));
            println!("{flipped} bits flipped in {:?}: {answered} calls answered, {lost} lost", begun.elapsed());
            assert!(flipped >= flips && lost > 0 && answered > lost as usize);
            // The process has closed what was struck, kept who was not, and runs nothing any more.
            wait_until("all have left", PATIENCE, || fds(process.pid()) == open);
            let input = content(1, 4 << 20);
            assert!(*steady.invoke("echo", input.clone()).expect("who was not struck is served") == *input);
            let runs = tally.runs();
            assert!(!runs.contains_key(&u64::MAX), "a function was given what nobody sent");
            for (call, delivery) in all.iter().flat_map(|ends| &ends.answered) {
                let times = runs.get(call).copied().unwrap_or(0);
                let right = if *delivery == Delivery::Retry { times >= 1 } else { times == 1 };
                assert!(right, "call {call:#x}, {delivery:?}, was answered and ran {times} times");
            }
            let twice = |(call, times): (&u64, &u64)| {
                *times > 1 && all.iter().all(|ends| ends.answered.get(call) != Some(&Delivery::Retry))
            };
            assert!(!runs.iter().any(twice), "what was not to be sent again ran twice");
            (left, round) = (left - flips, round + 1);
        }
    });
}
