//! Processes that are told of each other: one connection between any two, found, watched, and made again (faults N1, N10, N11, A2, A3).
//!
//! Who is connected with whom is read from the processes' logs and from the kernel's list of sockets.
//! `PRAAS_SEED` sets the seed, `PRAAS_ROUNDS` how often two processes find each other (default 50 on each reactor), `PRAAS_PARTITIONS`
//! in how many ways a network parts (default 2, at most 3).
#![allow(clippy::cast_possible_truncation, reason = "dice are cut to size on purpose")]

mod support;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use praas_dataplane::clock::{unix_ns, unix_s};
use praas_dataplane::wire::{VERSIONS, frame};
use praas_dataplane::{Credential, Role, Secret};
use praas_transport::Header;
use praas_transport::hello::{HelloError, Initiator, InitiatorConfig, Purpose};
use support::namespace::{Cable, End};
use support::nodes::{NAMES, Node, Place};
use support::raw::Raw;
use support::{Dice, PATIENCE, cpu_seconds, fds, memory_kib, on_both_reactors, seed, setting, signal, wait_until};

/// Silence is asked about after a second and given up after three; and a little for the machine.
const FOUND_OUT: Duration = Duration::from_secs(5);

/// TCP connections to these addresses that stand, as the network of `pid` has them. Each has one end that dialed.
fn connections(pid: u32, addresses: &[SocketAddr]) -> usize {
    let list = std::fs::read_to_string(format!("/proc/{pid}/net/tcp")).expect("a process that is there");
    let shown = |address: &SocketAddr| match address {
        SocketAddr::V4(v4) => format!("{:08X}:{:04X}", u32::from_le_bytes(v4.ip().octets()), v4.port()),
        SocketAddr::V6(_) => unreachable!("the tests' addresses are IPv4"),
    };
    let addresses: Vec<String> = addresses.iter().map(shown).collect();
    let stands = |line: &&str| {
        let mut fields = line.split_whitespace().skip(2);
        fields.next().is_some_and(|remote| addresses.iter().any(|address| address == remote))
            && fields.next() == Some("01")
    };
    list.lines().filter(stands).count()
}

/// All of them are up with each other, by one connection for any two.
fn wait_joined(nodes: &[Node], place: &Place) {
    for (who, node) in nodes.iter().enumerate() {
        for other in (0..nodes.len()).filter(|other| *other != who) {
            node.wait_up(NAMES[other]);
        }
    }
    let addresses: Vec<_> = (0..nodes.len()).map(|who| place.address(who)).collect();
    let expected = nodes.len() * (nodes.len() - 1) / 2;
    // What was closed may take a moment to go.
    wait_until("one connection for any two", PATIENCE, || connections(nodes[0].pid(), &addresses) == expected);
}

#[test]
fn n11_two_processes_that_dial_at_once_keep_one_connection() {
    on_both_reactors(|reactor| {
        let place = Place::new();
        let addresses = [place.address(0), place.address(1)];
        let mut dice = Dice(seed());
        let (mut dialed, mut longest) = ([0; 2], Duration::ZERO);
        for round in 0..setting("PRAAS_ROUNDS", 50) {
            let delay = Duration::from_micros(dice.below(4) * dice.below(20_000));
            let first = dice.below(2) as usize;
            let begun = Instant::now();
            let early = place.start_of(reactor, first, 2);
            std::thread::sleep(delay);
            let late = place.start_of(reactor, 1 - first, 2);
            let nodes = if first == 0 { [early, late] } else { [late, early] };
            wait_joined(&nodes, &place);
            longest = longest.max(begun.elapsed());
            std::thread::sleep(Duration::from_millis(20));
            assert_eq!(connections(nodes[0].pid(), &addresses), 1, "round {round}");
            for (who, node) in nodes.iter().enumerate() {
                assert_eq!(node.said("state=up"), 1, "round {round}: {} was up once", NAMES[who]);
                assert_eq!(node.said("state=down"), 0, "round {round}: what stands is not given up");
            }
            dialed[usize::from(connections(nodes[0].pid(), &addresses[..1]) == 1)] += 1;
        }
        println!("{} connections dialed by a, {} by b; joined within {longest:?}", dialed[0], dialed[1]);
    });
}

#[test]
fn n11_three_processes_told_of_each_other_keep_three_connections() {
    on_both_reactors(|reactor| {
        let place = Place::new();
        for _ in 0..3 {
            let nodes = [0, 1, 2].map(|who| place.start_of(reactor, who, 3));
            wait_joined(&nodes, &place);
            assert!(nodes.iter().all(|node| node.said("state=down") == 0));
        }
    });
}

/// Sixty-six pairs at the same moment, on however few cores.
#[test]
fn n11_a_dozen_processes_started_at_once_keep_one_connection_for_any_two() {
    on_both_reactors(|reactor| {
        let place = Place::new();
        let begun = Instant::now();
        let nodes: Vec<_> = (0..NAMES.len()).map(|who| place.start_of(reactor, who, NAMES.len())).collect();
        wait_joined(&nodes, &place);
        println!("66 pairs joined {:?} after the first was started", begun.elapsed());
        let (ups, downs) = nodes
            .iter()
            .fold((0, 0), |(ups, downs), node| (ups + node.said("state=up"), downs + node.said("state=down")));
        assert_eq!((ups, downs), (132, 0));
    });
}

#[test]
fn n11_a_process_that_is_killed_and_started_anew_is_found_again() {
    on_both_reactors(|reactor| {
        let place = Place::new();
        let mut nodes = [0, 1].map(|who| place.start_of(reactor, who, 2));
        wait_joined(&nodes, &place);
        for round in 0..6 {
            let dies = round % 2;
            nodes[dies].kill();
            let stays = &nodes[1 - dies];
            wait_until("its peer hears of it", Duration::from_secs(1), || !stays.is_up(NAMES[dies]));
            std::thread::sleep(Duration::from_millis([0, 300, 1500][round / 2]));
            let begun = Instant::now();
            nodes[dies] = place.start_of(reactor, dies, 2);
            wait_joined(&nodes, &place);
            println!("round {round}: joined again {:?} after it was started", begun.elapsed());
        }
        // Who stops says so.
        signal(nodes[0].pid(), 15);
        wait_until("it has said goodbye", PATIENCE, || nodes[1].said("it stops") == 1);
        assert!(nodes[0].child.wait().unwrap().success());
    });
}

#[test]
fn n1_a_process_that_is_stopped_is_given_up_and_found_again() {
    on_both_reactors(|reactor| {
        let place = Place::new();
        let nodes = [0, 1].map(|who| place.start_of(reactor, who, 2));
        wait_joined(&nodes, &place);
        for stopped in [0, 1] {
            let begun = Instant::now();
            signal(nodes[stopped].pid(), 19);
            wait_until("its peer gives it up", FOUND_OUT, || !nodes[1 - stopped].is_up(NAMES[stopped]));
            println!("{} was given up after {:?}", NAMES[stopped], begun.elapsed());
            assert!(nodes[1 - stopped].said("nothing came from it") >= 1);
            signal(nodes[stopped].pid(), 18);
            wait_until("it hears of that", PATIENCE, || nodes[stopped].said("state=down") >= 1);
            wait_joined(&nodes, &place);
        }
        // A short stop is nobody's loss, and an idle link stands.
        let downs = nodes[0].said("state=down");
        signal(nodes[1].pid(), 19);
        std::thread::sleep(Duration::from_millis(1500));
        signal(nodes[1].pid(), 18);
        std::thread::sleep(Duration::from_secs(4));
        assert_eq!(nodes[0].said("state=down"), downs);
    });
}

#[test]
fn a3_a_process_with_another_key_or_another_name_is_no_peer() {
    on_both_reactors(|reactor| {
        let place = Place::new();
        let (a, b) = (place.address(0), place.address(1));
        let with_key = |who: usize, key: u8, told: &[(&str, SocketAddr)]| {
            Node::start(reactor, NAMES[who], place.address(who), &place.key(key), told)
        };
        // Another key.
        let nodes = [with_key(0, 1, &[("b", b)]), with_key(1, 2, &[("a", a)])];
        for node in &nodes {
            wait_until("it says why", PATIENCE, || node.said("the same --key-file") >= 1);
        }
        std::thread::sleep(Duration::from_millis(300));
        assert!(nodes.iter().all(|node| node.said("state=up") == 0));
        drop(nodes);
        // Another name than it was told of.
        let nodes = [with_key(0, 1, &[("c", b)]), with_key(1, 1, &[("a", a)])];
        wait_until("it says why", PATIENCE, || nodes[0].said("the responder is process `b`, expected was `c`") >= 1);
        wait_until("it says why", PATIENCE, || nodes[1].said("it was not told of us") >= 1);
        wait_until("it says why", PATIENCE, || nodes[0].said("of which we were not told: give --peer b=") >= 1);
        assert!(nodes.iter().all(|node| node.said("state=up") == 0));
        // Told so often in seconds, it does not fill the log.
        std::thread::sleep(Duration::from_secs(2));
        assert!(nodes.iter().all(|node| node.log.lock().unwrap().len() < 20));
    });
}

/// A peer `b` of our own, at this life of it.
fn peer(address: SocketAddr, subject: &str, role: Role, incarnation: u64) -> (Raw, Result<(), HelloError>) {
    let credential = Credential::mint(&Secret::new([1; 32]), role, subject, unix_s() + 60).expect("a name");
    let config = InitiatorConfig {
        versions: VERSIONS,
        purpose: Purpose::Peer,
        session_id: [9; 16],
        incarnation,
        payload_checksums: false,
        expect_process: Some("a".into()),
    };
    let mut raw = Raw::connect(address);
    let said = raw.say_hello(Initiator::new(config, Some(&credential)).expect("random numbers"));
    (raw, said.map(drop))
}

fn send(raw: &mut Raw, kind: u8, incarnation: u64) {
    raw.send(&Header { kind, incarnation, ..Header::default() }, &[]);
}

/// The next frame that is no question.
fn next(raw: &mut Raw, incarnation: u64) -> (u8, u16) {
    loop {
        let (header, _) = raw.receive();
        if header.kind != frame::PING {
            return (header.kind, header.flags);
        }
        send(raw, frame::PONG, incarnation);
    }
}

#[test]
fn n11_a3_earlier_lives_strangers_and_clients_are_refused_and_a_later_life_takes_over() {
    on_both_reactors(|reactor| {
        let place = Place::new();
        let a = place.address(0);
        // Nobody is where `b` should be.
        let told = [("b", place.address(1))];
        let node = place.start_with(reactor, 0, &told, &["--workers=1", "--near=false"]);
        node.wait_ready();
        let open = fds(node.pid());
        let (mut now, said) = peer(a, "b", Role::Process, 20);
        said.unwrap();
        assert_eq!((next(&mut now, 20).0, next(&mut now, 20).0), (frame::WELCOME, frame::CONFIRM));
        node.wait_up("b");
        // An earlier life: told so, and closed.
        let (mut earlier, said) = peer(a, "b", Role::Process, 19);
        said.unwrap();
        assert_eq!(next(&mut earlier, 19), (frame::GOODBYE, 3));
        assert!(earlier.is_closed());
        // A process that it was not told of.
        let (mut stranger, said) = peer(a, "d", Role::Process, 30);
        said.unwrap();
        assert_eq!(next(&mut stranger, 30), (frame::GOODBYE, 4));
        assert!(stranger.is_closed());
        // Clients, whatever they are called.
        for role in [Role::Client, Role::Control] {
            let (mut client, _) = peer(a, "b", role, 30);
            let mut answer = Vec::new();
            let _ = client.0.read_to_end(&mut answer);
            assert_eq!(answer.len(), 16, "refused");
        }
        send(&mut now, frame::PING, 20);
        assert_eq!(next(&mut now, 20).0, frame::PONG);
        assert_eq!(node.said("state=down"), 0, "none of them is noticed by who is there");
        // A later one.
        let (mut later, said) = peer(a, "b", Role::Process, 21);
        said.unwrap();
        assert_eq!((next(&mut later, 21).0, next(&mut later, 21).0), (frame::WELCOME, frame::CONFIRM));
        assert!(now.is_closed());
        wait_until("both are said", PATIENCE, || node.said("started anew") == 1 && node.said("state=up") == 2);
        // A second connection of the same life: it has given the first up.
        let (mut again, said) = peer(a, "b", Role::Process, 21);
        said.unwrap();
        assert_eq!((next(&mut again, 21).0, next(&mut again, 21).0), (frame::WELCOME, frame::CONFIRM));
        assert!(later.is_closed());
        // A frame of another life over the connection, and words out of turn.
        send(&mut again, frame::PING, 20);
        assert!(again.is_closed());
        for kind in [frame::CONFIRM, frame::WELCOME, frame::REQUEST, 99] {
            let (mut raw, said) = peer(a, "b", Role::Process, 21);
            said.unwrap();
            assert_eq!((next(&mut raw, 21).0, next(&mut raw, 21).0), (frame::WELCOME, frame::CONFIRM));
            send(&mut raw, kind, 21);
            assert!(raw.is_closed(), "kind {kind}");
        }
        wait_until("no descriptor stays", PATIENCE, || fds(node.pid()) <= open + 1);
    });
}

/// What one peer says to another is no use to whoever has heard it.
#[test]
fn a2_what_was_said_between_peers_cannot_be_said_again() {
    let place = Place::new();
    on_both_reactors(|reactor| {
        // `b` dials a listener of ours, which passes all on to `a` and keeps it.
        let relay = TcpListener::bind(place.address(2)).unwrap();
        let node = place.start(reactor, 0, &[("b", place.address(3))]);
        node.wait_ready();
        let dialer = place.start(reactor, 1, &[("a", place.address(2))]);
        let (mut from_b, _) = relay.accept().unwrap();
        let mut to_a = TcpStream::connect(place.address(0)).unwrap();
        let (mut from_a, mut to_b) = (to_a.try_clone().unwrap(), from_b.try_clone().unwrap());
        std::thread::spawn(move || std::io::copy(&mut from_a, &mut to_b));
        let heard: Arc<Mutex<Vec<u8>>> = Arc::default();
        let keep = Arc::clone(&heard);
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(1..) = from_b.read(&mut bytes).inspect(|count| {
                keep.lock().unwrap().extend_from_slice(&bytes[..*count]);
                let _ = to_a.write_all(&bytes[..*count]);
            }) {}
        });
        node.wait_up("b");
        dialer.wait_up("a");
        // Hello, proof and a heartbeat.
        wait_until("it has said something", PATIENCE, || heard.lock().unwrap().len() > 160 + 40);
        let heard = heard.lock().unwrap().clone();
        for in_step in [false, true] {
            let mut raw = Raw::connect(place.address(0));
            let _ = raw.0.write_all(if in_step { &heard[..160] } else { &heard });
            if in_step {
                raw.0.read_exact(&mut [0; 160]).unwrap();
                let _ = raw.0.write_all(&heard[160..]);
            }
            assert!(raw.is_closed());
        }
        assert_eq!((node.said("state=up"), node.said("state=down")), (1, 0));
    });
}

#[test]
fn n11_peers_that_are_not_there_or_never_answer_cost_next_to_nothing() {
    on_both_reactors(|reactor| {
        let place = Place::new();
        // Takes connections and says nothing; takes none at all.
        let silent = TcpListener::bind(place.address(1)).unwrap();
        let deaf = TcpListener::bind(place.address(2)).unwrap();
        rustix::net::listen(&deaf, 0).unwrap();
        let fill: Vec<_> = (0..4).map(|_| socket_that_connects(place.address(2))).collect();
        let told = [("b", place.address(1)), ("c", place.address(2)), ("d", place.address(3))];
        let node = place.start(reactor, 0, &told);
        node.wait_ready();
        std::thread::sleep(Duration::from_millis(500));
        let (cpu, memory, open) = (cpu_seconds(node.pid()), memory_kib(node.pid()), fds(node.pid()));
        std::thread::sleep(Duration::from_secs(8));
        let (cpu, open_now) = (cpu_seconds(node.pid()) - cpu, fds(node.pid()));
        let grown = memory_kib(node.pid()).saturating_sub(memory);
        println!("{cpu:.2} s of CPU in 8 s, {grown} KiB more, {open_now} descriptors");
        assert!(memory > 0, "it can be measured");
        assert!(cpu < 0.1, "{cpu} s of CPU in 8 s");
        assert!(grown < 512, "{grown} KiB more");
        assert!(open_now <= open + 3);
        let log = node.log.lock().unwrap().len();
        assert!(log < 20, "{log} lines");
        drop((silent, fill));
    });
}

/// A connect that nobody waits for.
fn socket_that_connects(address: SocketAddr) -> rustix::fd::OwnedFd {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with};
    let socket = socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::NONBLOCK, None).unwrap();
    let _ = connect(&socket, &address);
    socket
}

/// Two processes at the ends of a cable.
#[test]
fn n10_a_network_that_parts_and_heals_leaves_one_connection() {
    let Some(cable) = Cable::lay() else { return };
    let place = Place::new();
    let address = |end: &End| SocketAddr::from((end.address(), 4000));
    let (near, far) = (address(&cable.near), address(&cable.far));
    on_both_reactors(|reactor| {
        let start = |end: &End, who: usize, told: (&str, SocketAddr)| {
            end.run(|| Node::start(reactor, NAMES[who], address(end), &place.key(1), &[told]))
        };
        let nodes = [start(&cable.near, 0, ("b", far)), start(&cable.far, 1, ("a", near))];
        let joined = || {
            nodes[0].is_up("b")
                && nodes[1].is_up("a")
                && connections(nodes[0].pid(), &[near, far]) + connections(nodes[1].pid(), &[near, far]) == 1
        };
        wait_until("they are joined", PATIENCE, joined);
        for parts in 0..setting("PRAAS_PARTITIONS", 2).min(3) {
            let parted = Instant::now();
            match parts {
                0 => cable.pull(),
                1 => cable.near.loses(&cable.far),
                _ => cable.far.loses(&cable.near),
            }
            wait_until("both find out", FOUND_OUT, || !nodes[0].is_up("b") && !nodes[1].is_up("a"));
            println!("way {parts}: found out after {:?}", parted.elapsed());
            cable.mend();
            let healed = Instant::now();
            wait_until("they are joined again", PATIENCE, joined);
            println!("way {parts}: joined {:?} after the network healed", healed.elapsed());
        }
    });
}

/// An incarnation is the time of the start, so that the later life has the higher one on whichever host.
#[test]
fn n11_the_life_of_a_process_is_numbered_by_the_calendar() {
    let place = Place::new();
    let begun = unix_ns();
    on_both_reactors(|reactor| {
        let nodes = [0, 1].map(|who| place.start_of(reactor, who, 2));
        wait_joined(&nodes, &place);
        let log = nodes[0].log.lock().unwrap();
        let up = log.iter().find_map(|line| line.split_once("state=up incarnation=")).unwrap().1;
        let incarnation: u64 = up.split(' ').next().unwrap().parse().unwrap();
        assert!((begun..unix_ns()).contains(&incarnation), "{incarnation}");
    });
}
