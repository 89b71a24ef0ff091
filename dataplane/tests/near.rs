//! Processes of one host that share memory (conformance M1, M3, M5; faults N5, N8, A8, W2; G3, G4, G8): what one may do to the other by it, and what
//! is left when one dies. What they say to each other is in `processes.rs`, over both carriers.

#![allow(clippy::cast_possible_truncation, reason = "numbers are cut to what a record holds on purpose")]

mod support;

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use praas_dataplane::client::Outgoing;
use praas_dataplane::wire::{Code, frame};
use praas_dataplane::{Client, ClientConfig};
use praas_shm::{
    Arena, BlockRef, Body, Descriptor, Identity, Inline, Link, OwnSegment, ParticipantId, PeerSegment, SegmentConfig,
    SegmentFile, handover,
};
use praas_transport::Header;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketType};
use serde_json::{Value, json};
use support::false_peer::False;
use support::nodes::{NAMES, Node, Place};
use support::relay::Relay;
use support::{PATIENCE, Reactor, ask, fds, on_both_reactors, wait_until};

const SMALL: [&str; 7] = [
    "--dial=start",
    "--workers=2",
    "--workers-max=2",
    "--plaintext",
    "--arena-bytes=8388608",
    "--payload-bytes-max=1048576",
    "--mailbox-bytes-max=4194304",
];
/// What both near segments look like then.
const SHAPE: SegmentConfig = SegmentConfig { ring_slots: 256, arena_bytes: 4 << 20 };

fn start(place: &Place, reactor: Reactor, who: usize, told: &[(&str, std::net::SocketAddr)]) -> (Node, Client) {
    let node = place.start_with(reactor, who, told, &SMALL);
    node.wait_ready();
    (node, place.client(who))
}

fn alone(place: &Place, reactor: Reactor, who: usize, other: usize) -> (Node, Client) {
    start(place, reactor, who, &[(NAMES[other], place.address(other)), ("z", place.address(11))])
}

/// How often it has said that it shares memory with this one.
fn shared(node: &Node, peer: &str) -> usize {
    let log = node.log.lock().unwrap();
    log.iter().filter(|line| line.contains(&format!("peer={peer} ")) && line.contains("via=memory")).count()
}

fn wait_shared(node: &Node, peer: &str, times: usize) {
    wait_until("they share memory", PATIENCE, || shared(node, peer) >= times);
}

/// Mappings of memory files.
fn mappings(pid: u32) -> usize {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    maps.lines().filter(|line| line.contains("/memfd:")).count()
}

/// What is there under this key, which has to be the numbers from `from` on, each once and in order. How many.
fn take_in_order(client: &mut Client, sender: &str, from: u64) -> u64 {
    for count in 0.. {
        let reply = client.invoke("recv_for", Outgoing::from_args(&[sender.as_bytes(), b"k", b"0"])).unwrap();
        if reply.status() == 1 {
            return count;
        }
        let expected = [sender.as_bytes(), b" k ", &(from + count).to_le_bytes()].concat();
        assert_eq!(*reply, *expected, "after {count}");
    }
    unreachable!("it ends")
}

/// G3, G8, M5: one of two is killed in the middle of traffic both ways, again and again. The other receives what came once and in order, is told what
/// became of what it sent, and has nothing of the dead ones left.
#[test]
fn g3_g8_m5_a_process_that_is_killed_leaves_nothing_in_the_other() {
    on_both_reactors(|reactor| {
        let place = Place::new();
        let (a, mut client) = start(&place, reactor, 0, &[("b", place.address(1))]);
        let before = (fds(a.pid()), mappings(a.pid()));
        let (mut sent, mut came) = (Vec::new(), 0);
        for round in 1..=6 {
            let (mut b, mut other) = start(&place, reactor, 1, &[("a", place.address(0))]);
            wait_shared(&a, "b", round);
            wait_shared(&b, "a", 1);
            // What was on its way is lost, or was there; what was not goes to this life.
            for error in sent.drain(..).filter_map(|call| client.wait(call).err()) {
                assert!(error.to_string().contains("started anew"), "{error}");
            }
            // Inside a record, and in a block.
            let key = round.to_string();
            let many: [&[u8]; 4] = [b"b", key.as_bytes(), b"0", b"5000"];
            sent.push(client.submit("send_many", Outgoing::from_args(&many)).unwrap());
            let large: [&[u8]; 4] = [b"b", b"large", b"1000000", b"7"];
            sent.push(client.submit("send_loan", Outgoing::from_args(&large)).unwrap());
            let _back = other.submit("send_many", Outgoing::from_args(&[b"a", b"k", b"0", b"5000"])).unwrap();
            for at in 0..20_u64 {
                let reply = other.invoke("recv_payload", Outgoing::from_args(&[b"a", key.as_bytes()])).unwrap();
                assert_eq!(*reply, at.to_le_bytes());
            }
            b.kill();
            wait_until("its death is noticed", PATIENCE, || !a.is_up("b"));
            let came_now = take_in_order(&mut client, "b", 0);
            assert!(came_now > 0, "round {round}");
            came += came_now;
        }
        println!("{came} messages came in six lives");
        wait_until(&format!("nothing is left, of {before:?}"), PATIENCE, || {
            (fds(a.pid()), mappings(a.pid())) == before
        });
    });
}

/// N8, G3: the connection beside the memory breaks again and again. What was under way is received once, in order, and memory is shared anew.
#[test]
fn g3_n8_messages_survive_the_link_beside_the_memory() {
    on_both_reactors(|reactor| {
        let place = Place::new();
        let relays = [Relay::to(place.address(0)), Relay::to(place.address(1))];
        let (a, mut from_a) = start(&place, reactor, 0, &[("b", relays[1].address)]);
        let (b, mut from_b) = start(&place, reactor, 1, &[("a", relays[0].address)]);
        for round in 1..=5 {
            wait_shared(&a, "b", round);
            wait_shared(&b, "a", round);
            let first = ((round - 1) * 2000).to_string();
            let numbers = |to: &'static [u8]| Outgoing::from_args(&[to, b"k", first.as_bytes(), b"2000"]);
            let there = from_a.submit("send_many", numbers(b"b")).unwrap();
            let back = from_b.submit("send_many", numbers(b"a")).unwrap();
            std::thread::sleep(Duration::from_millis(3));
            relays.iter().for_each(Relay::cut);
            from_a.wait(there).unwrap();
            from_b.wait(back).unwrap();
            for (client, sender) in [(&mut from_a, "b"), (&mut from_b, "a")] {
                assert_eq!(take_in_order(client, sender, (round as u64 - 1) * 2000), 2000, "round {round}");
            }
        }
    });
}

/// A process that we play, and the memory that it shares.
struct Memory {
    peer: False,
    socket: OwnedFd,
    link: Link,
    own: OwnSegment,
    arena: Arena,
}

fn participant(number: u8) -> ParticipantId {
    ParticipantId::new(number).unwrap()
}

fn address(token: &[u8]) -> SocketAddrUnix {
    let name: String = token[..16].iter().map(|byte| format!("{byte:02x}")).collect();
    SocketAddrUnix::new_abstract_name(format!("praas-{name}").as_bytes()).unwrap()
}

fn reach(token: &[u8]) -> OwnedFd {
    let socket = rustix::net::socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
    rustix::net::connect(&socket, &address(token)).unwrap();
    socket
}

/// The token that the leader offers.
fn offered(peer: &mut False) -> Vec<u8> {
    let (header, token, _) = peer.next_with_key();
    assert_eq!((header.kind, header.aux, token.len()), (frame::NEAR_OFFER, 1 << 20, 32));
    token
}

fn hello(secret: &[u8], life: u64) -> Value {
    json!({ "Hello": { "secret": secret, "incarnation": life, "payload_bytes_max": 1 << 20 } })
}

fn hand(socket: &OwnedFd, word: &Value, file: &impl AsFd) {
    handover::send(socket.as_fd(), word.to_string().as_bytes(), &[file.as_fd()]).unwrap();
}

fn segment(token: &[u8], number: u8, life: u64) -> (SegmentFile, OwnSegment) {
    let process = token[..16].try_into().unwrap();
    let file = SegmentFile::create(&SHAPE).unwrap();
    let identity = Identity { participant: participant(number), incarnation: life, process };
    let own = OwnSegment::map(&file, &identity, &SHAPE).unwrap();
    (file, own)
}

fn go() -> Header {
    Header { kind: frame::NEAR_GO, ..Header::default() }
}

impl Memory {
    /// Joins `a` as the process of this number, and shares memory with it.
    fn join(place: &Place, node: &Node, who: usize, life: u64) -> Memory {
        let mut peer = False::join(place, node, who, life);
        let token = offered(&mut peer);
        let socket = reach(&token);
        let (file, own) = segment(&token, 1, life);
        file.seal_future_write().unwrap();
        hand(&socket, &hello(&token[16..], life), &file.fd());
        let mut word = [0; 512];
        let (bytes, mut fds) = handover::receive(socket.as_fd(), &mut word).unwrap();
        let word: Value = serde_json::from_slice(&word[..bytes]).unwrap();
        let process = token[..16].try_into().unwrap();
        let incarnation = word["Hello"]["incarnation"].as_u64().unwrap();
        let identity = Identity { participant: participant(0), incarnation, process };
        let theirs = PeerSegment::attach(&SegmentFile::from_fd(fds.pop().unwrap()), &identity, &SHAPE).unwrap();
        let (link, arena) = (Link::establish(&own, theirs, socket.try_clone().unwrap()).unwrap(), own.arena().unwrap());
        peer.send(&go(), &[], &[]);
        assert_eq!(peer.next().0.kind, frame::NEAR_GO);
        wait_shared(node, NAMES[who], 1);
        Memory { peer, socket, link, own, arena }
    }

    fn put(&mut self, record: Descriptor) {
        self.link.producer.try_send(&record).unwrap();
        rustix::net::send(&self.socket, b"!", rustix::net::SendFlags::NOSIGNAL).unwrap();
    }

    /// A message of a few bytes, whole in a record.
    fn say(&mut self, number: u64, key: &[u8], payload: &[u8]) {
        self.put(head(frame::MESSAGE | ALONE, number, key.len() as u64, &[payload, key].concat()));
    }

    /// The next record.
    fn next(&mut self) -> Descriptor {
        let mut record = None;
        wait_until("a record comes", PATIENCE, || {
            record = self.link.consumer.poll().unwrap();
            record.is_some()
        });
        record.unwrap()
    }
}

/// Bit of a record's kind: nothing follows.
const ALONE: u8 = 0x80;
const REST: u8 = 32;
const FORGET: u8 = 33;

fn head(kind: u8, number: u64, key_bytes: u64, body: &[u8]) -> Descriptor {
    Descriptor::new(kind, 0, number, key_bytes << 16, Inline::new(body).unwrap())
}

fn rest(segment: u16, body: impl Into<Body>) -> Descriptor {
    Descriptor::new(REST, segment, 0, 0, body)
}

fn block(owner: u8, offset: u64, len: u64) -> BlockRef {
    BlockRef { offset, len, index: 0, generation: 1, owner: participant(owner) }
}

/// N5, G4: records that are none, and bytes that lie nowhere, close the link of who sends them. That life of it is talked to over TCP from then on.
#[test]
fn n5_g4_a_process_that_lies_in_shared_memory_loses_its_link_only() {
    on_both_reactors(|reactor| {
        let place = Place::new();
        let (node, mut client) = alone(&place, reactor, 0, 1);
        let before = (fds(node.pid()), mappings(node.pid()));
        let message = || head(frame::MESSAGE, 1, 1, b"k");
        let bad: Vec<(&str, Vec<Descriptor>)> = vec![
            ("a kind that there is not", vec![head(77, 1, 0, b"")]),
            ("a frame that is none of these", vec![head(frame::GOODBYE | ALONE, 1, 0, b"")]),
            ("the second half first", vec![rest(0, Inline::empty())]),
            ("two first halves", vec![message(), message()]),
            ("a whole one in between", vec![message(), head(frame::MESSAGE | ALONE, 1, 1, b"k")]),
            ("a key that is longer than its record", vec![head(frame::MESSAGE | ALONE, 1, 41, b"k")]),
            (
                "a key that lies nowhere",
                vec![Descriptor::new(frame::MESSAGE, 0, 1, 1024 << 16, block(1, 4 << 20, 1024))],
            ),
            (
                "a key that is longer than any",
                vec![Descriptor::new(frame::MESSAGE, 0, 1, 1025 << 16, block(1, 0, 1025))],
            ),
            ("bytes past the end", vec![message(), rest(0, block(1, (4 << 20) - 64, 100))]),
            ("bytes far past the end", vec![message(), rest(0, block(1, u64::MAX - 63, 64))]),
            ("bytes that are not aligned", vec![message(), rest(0, block(1, 8, 100))]),
            ("bytes of somebody else", vec![message(), rest(0, block(2, 0, 100))]),
            ("bytes in a segment that was not shown", vec![message(), rest(7, block(1, 0, 100))]),
            ("a number that is not the next", vec![head(frame::MESSAGE | ALONE, 2, 1, b"k")]),
            ("a verdict on nothing", vec![head(frame::VERDICT | ALONE, 1, 0, b"")]),
        ];
        for (life, (name, records)) in bad.into_iter().enumerate() {
            let downs = node.said("peer=b state=down");
            let mut evil = Memory::join(&place, &node, 1, life as u64 + 1);
            records.into_iter().for_each(|record| evil.put(record));
            assert!(evil.peer.is_closed(), "{name}");
            wait_until(name, PATIENCE, || node.said("peer=b state=down") == downs + 1);
            assert_eq!(&*client.invoke("echo", b"here").unwrap(), b"here", "{name}");
        }
        // The same life again: it is not trusted with memory, and is served.
        let mut again = False::join(&place, &node, 1, 15);
        again.parcel(&Header { kind: frame::MESSAGE, ..Header::default() }, b"k", b"by tcp");
        assert_eq!(again.next().0.kind, frame::VERDICT);
        assert_eq!(ask(&mut client, "recv", &[b"b", b"k"]), "b k by tcp");
        drop(again);
        // The next life is.
        let mut good = Memory::join(&place, &node, 1, 99);
        good.say(1, b"k", b"by memory");
        assert_eq!(good.next().kind(), frame::VERDICT | ALONE);
        assert_eq!(ask(&mut client, "recv", &[b"b", b"k"]), "b k by memory");
        drop(good);
        wait_until("nothing is left of them", PATIENCE, || (fds(node.pid()), mappings(node.pid())) == before);
    });
}

/// N5: over the link, and on the socket.
#[test]
fn n5_a_process_that_breaks_the_steps_loses_its_link_only() {
    on_both_reactors(|reactor| {
        let place = Place::new();
        let (node, mut client) = alone(&place, reactor, 0, 1);
        let mut life = 0;
        let mut closes = |name: &str, evil: &dyn Fn(&mut Memory)| {
            life += 1;
            let mut memory = Memory::join(&place, &node, 1, life);
            evil(&mut memory);
            assert!(memory.peer.is_closed(), "{name}");
            assert_eq!(&*client.invoke("echo", b"here").unwrap(), b"here", "{name}");
        };
        let word = |number: u16| {
            json!({ "Segment": { "number": number, "participant": 3, "incarnation": 9, "process": ([7_u8; 16]),
                "ring_slots": SHAPE.ring_slots, "arena_bytes": SHAPE.arena_bytes } })
        };
        let made = |seal: bool| {
            let file = SegmentFile::create(&SHAPE).unwrap();
            let identity = Identity { participant: participant(3), incarnation: 9, process: [7; 16] };
            let own = OwnSegment::map(&file, &identity, &SHAPE).unwrap();
            if seal {
                file.seal_future_write().unwrap();
            }
            (file, own)
        };
        closes("a parcel over the link", &|memory| {
            memory.peer.parcel(&Header { kind: frame::MESSAGE, ..Header::default() }, b"k", b"v");
        });
        // More of it than there is payload memory, were it not given back.
        for _ in 0..10 {
            closes("a long parcel over the link", &|memory| {
                memory.peer.parcel(&Header { kind: frame::MESSAGE, ..Header::default() }, b"k", &vec![1; 1 << 20]);
            });
        }
        closes("twice on its way", &|memory| memory.peer.send(&go(), &[], &[]));
        closes("it does not want what it has", &|memory| {
            memory.peer.send(&Header { kind: frame::NEAR_REFUSED, ..Header::default() }, b"no", &[]);
        });
        closes("it offers what is the leader's to offer", &|memory| {
            memory.peer.send(&Header { kind: frame::NEAR_OFFER, ..Header::default() }, &[1; 32], &[]);
        });
        closes("it closes the socket", &|memory| {
            rustix::net::shutdown(&memory.socket, rustix::net::Shutdown::Both).unwrap();
        });
        closes("no word", &|memory| {
            handover::send(memory.socket.as_fd(), b"{}", &[]).unwrap();
        });
        closes("a segment that can still be cut", &|memory| hand(&memory.socket, &word(1), &made(false).0.fd()));
        closes("a segment of another size", &|memory| {
            let mut word = word(1);
            word["Segment"]["arena_bytes"] = (2 << 20).into();
            hand(&memory.socket, &word, &made(true).0.fd());
        });
        closes("a segment of nobody", &|memory| {
            let mut word = word(1);
            word["Segment"]["participant"] = 64.into();
            hand(&memory.socket, &word, &made(true).0.fd());
        });
        closes("a file that is no memory", &|memory| hand(&memory.socket, &word(1), &std::io::stdin()));
        closes("a number twice", &|memory| (0..2).for_each(|_| hand(&memory.socket, &word(1), &made(true).0.fd())));
        closes("more segments than it has participants", &|memory| {
            let (file, _own) = made(true);
            (1..=65).for_each(|number| hand(&memory.socket, &word(number), &file.fd()));
        });
        assert_eq!(client.invoke("echo", vec![1; 1 << 20]).expect("there is room").len(), 1 << 20);
    });
}

/// G8, N5: who cannot show that it is the one, or has no segment to show, shares nothing; the link goes on, and who comes after is let in.
#[test]
fn g8_strangers_at_the_socket_are_sent_away_and_bad_segments_are_refused() {
    on_both_reactors(|reactor| {
        let place = Place::new();
        let (node, mut client) = alone(&place, reactor, 0, 1);
        let mut life = 0;
        let mut refuses = |name: &str, said: &str, evil: &dyn Fn(&[u8], u64) -> OwnedFd| {
            life += 1;
            let mut peer = False::join(&place, &node, 1, life);
            let token = offered(&mut peer);
            let before = node.said(said);
            let _socket = evil(&token, life);
            wait_until(&format!("{name}: {:#?}", node.log.lock().unwrap()), PATIENCE, || node.said(said) > before);
            if said != SENT_AWAY {
                assert_eq!(peer.next().0.kind, frame::NEAR_REFUSED, "{name}");
            }
            peer.parcel(&Header { kind: frame::MESSAGE, ..Header::default() }, b"k", b"v");
            assert_eq!(peer.next().0.kind, frame::VERDICT, "{name}");
            assert_eq!(ask(&mut client, "recv", &[b"b", b"k"]), "b k v", "{name}");
        };
        const SENT_AWAY: &str = "came for its memory and was sent away";
        const ALONE: &str = "peer=b link=";
        let sealed = |token: &[u8], number, life| {
            let (file, own) = segment(token, number, life);
            file.seal_future_write().unwrap();
            (file, own)
        };
        refuses("a wrong secret", SENT_AWAY, &|token, life| {
            let socket = reach(token);
            hand(&socket, &hello(&[0; 16], life), &sealed(token, 1, life).0.fd());
            socket
        });
        refuses("no word", SENT_AWAY, &|token, _| {
            let socket = reach(token);
            handover::send(socket.as_fd(), &[b'x'; 600], &[]).unwrap();
            socket
        });
        refuses("five that say nothing", SENT_AWAY, &|token, _| {
            let sockets: Vec<_> = (0..5).map(|_| reach(token)).collect();
            std::thread::sleep(Duration::from_millis(5));
            sockets.into_iter().next_back().unwrap()
        });
        refuses("a segment that can still be cut", ALONE, &|token, life| {
            let socket = reach(token);
            let file = rustix::fs::memfd_create("bad", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap();
            rustix::fs::ftruncate(&file, SHAPE.segment_bytes()).unwrap();
            hand(&socket, &hello(&token[16..], life), &file);
            socket
        });
        refuses("a segment of another life", ALONE, &|token, life| {
            let socket = reach(token);
            hand(&socket, &hello(&token[16..], life), &sealed(token, 1, life + 1).0.fd());
            socket
        });
        refuses("a segment of the other end", ALONE, &|token, life| {
            let socket = reach(token);
            hand(&socket, &hello(&token[16..], life), &sealed(token, 0, life).0.fd());
            socket
        });
        // Nobody comes: the link goes on alone.
        life = 50;
        let mut peer = False::join(&place, &node, 1, life);
        let token = offered(&mut peer);
        wait_until("it does not wait for ever", PATIENCE, || node.said("did not come in time") == 1);
        let socket = rustix::net::socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
        assert!(rustix::net::connect(&socket, &address(&token)).is_err(), "nobody listens any more");
        // After strangers, the right one.
        let mut peer = False::join(&place, &node, 1, 51);
        let token = offered(&mut peer);
        let stranger = reach(&token);
        hand(&stranger, &hello(&[9; 16], 51), &sealed(&token, 1, 51).0.fd());
        let socket = reach(&token);
        hand(&socket, &hello(&token[16..], 51), &sealed(&token, 1, 51).0.fd());
        let (bytes, fds) = handover::receive(socket.as_fd(), &mut [0; 512]).unwrap();
        assert!(bytes > 0 && fds.len() == 1);
    });
}

/// Of another user nobody comes in, and to another user's socket nobody goes, though the key is the right one.
#[test]
fn g8_another_user_shares_no_memory_and_is_talked_to_over_tcp() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: needs root, to be somebody else");
        return;
    }
    /// Runs this as nobody: of one thread alone, as the kernel has users.
    fn as_nobody<T: Send>(act: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|threads| {
            let thread = threads.spawn(|| {
                let nobody = rustix::process::Uid::from_raw(65534);
                rustix::thread::set_thread_res_uid(nobody, nobody, nobody).unwrap();
                act()
            });
            thread.join().unwrap()
        })
    }
    on_both_reactors(|reactor| {
        let place = Place::new();
        let (leader, mut client) = alone(&place, reactor, 0, 1);
        let mut peer = False::join(&place, &leader, 1, 1);
        let token = offered(&mut peer);
        let _socket = as_nobody(|| reach(&token));
        wait_until("it is sent away", PATIENCE, || leader.said("it is user 65534's, and we are user 0") == 1);
        peer.parcel(&Header { kind: frame::MESSAGE, ..Header::default() }, b"k", b"v");
        assert_eq!(peer.next().0.kind, frame::VERDICT);
        assert_eq!(ask(&mut client, "recv", &[b"b", b"k"]), "b k v");

        let (follower, mut client) = alone(&place, reactor, 2, 1);
        let mut peer = False::join_at(&place, &follower, 2, 1, 1);
        let token = [5; 32];
        let listener = as_nobody(|| {
            let listener = rustix::net::socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
            rustix::net::bind(&listener, &address(&token)).unwrap();
            rustix::net::listen(&listener, 1).unwrap();
            listener
        });
        peer.send(&Header { kind: frame::NEAR_OFFER, aux: 1 << 20, ..Header::default() }, &token, &[]);
        let (header, why, _) = peer.next_with_key();
        assert_eq!((header.kind, &*why), (frame::NEAR_REFUSED, &b"it is user 65534's, and we are user 0"[..]));
        let caller = rustix::net::accept(&listener).unwrap();
        assert_eq!(rustix::io::read(&caller, &mut [0; 8]), Ok(0), "it says nothing there");
        peer.parcel(&Header { kind: frame::MESSAGE, ..Header::default() }, b"k", b"v");
        assert_eq!(peer.next().0.kind, frame::VERDICT);
        assert_eq!(ask(&mut client, "recv", &[b"b", b"k"]), "b k v");
    });
}

/// A8, G8: a process that takes nothing and gives no verdict keeps what it was lent, up to what may wait for a process, and all of it comes back with
/// its death.
#[test]
fn a8_g8_a_process_that_gives_nothing_back_starves_nobody() {
    on_both_reactors(|reactor| {
        let place = Place::new();
        let (node, mut client) = alone(&place, reactor, 0, 1);
        let config = ClientConfig { deadline: Duration::from_millis(100), ..ClientConfig::default() };
        let mut impatient = Client::connect(place.address(0), &config).unwrap();
        for life in 1..=3 {
            let greedy = Memory::join(&place, &node, 1, life);
            let mut busy = false;
            for _ in 0..8 {
                let error =
                    impatient.invoke("send_loan", Outgoing::from_args(&[b"b", b"k", b"1000000", b"1"])).unwrap_err();
                busy |= error.to_string().contains("busy");
                assert!(busy || error.to_string().contains("timeout"), "{error}");
            }
            assert!(busy, "it was told");
            // As many short ones as the ring has no room for.
            for _ in 0..3 {
                let many = Outgoing::from_args(&[b"b", b"k", b"0", b"10"]);
                impatient.invoke("send_many", many).unwrap_err();
            }
            assert_eq!(client.invoke("echo", vec![1; 1 << 20]).expect("there is room").len(), 1 << 20);
            drop(greedy);
            wait_until("it is away", PATIENCE, || node.said("peer=b state=down") == life as usize);
        }
        // All that was lent is back: more than a worker has, were it not.
        for _ in 0..12 {
            ask(&mut client, "send_loan", &[b"", b"own", b"1000000", b"2"]);
            assert_eq!(client.invoke("recv_payload", Outgoing::from_args(&[b"", b"own"])).unwrap().len(), 1_000_000);
        }
    });
}

/// W2, G3: what a worker sent stays where it lies when it dies, until the other process has read it.
#[test]
fn w2_g3_a_message_of_a_dead_worker_is_read_where_it_lies() {
    on_both_reactors(|reactor| {
        let place = Place::new();
        let (node, mut client) = alone(&place, reactor, 0, 1);
        let mut b = Memory::join(&place, &node, 1, 5);
        let send = |client: &mut Client, byte: &[u8]| {
            client.submit("send_loan", Outgoing::from_args(&[b"b", b"k", b"100000", byte])).unwrap()
        };
        let sending = send(&mut client, b"7");
        let (first, second) = (b.next(), b.next());
        assert_eq!((first.kind(), first.id(), first.inline().unwrap().as_slice()), (frame::MESSAGE, 1, &b"k"[..]));
        assert_eq!((second.kind(), second.tag()), (REST, 1));
        support::children(node.pid()).into_iter().for_each(|pid| support::signal(pid, 9));
        client.wait(sending).unwrap_err();
        // The others work where there is room.
        let again = send(&mut client, b"8");
        let (mut word, place_of) = ([0; 512], second.block().unwrap());
        let mut shown = |memory: &Memory| {
            let (bytes, mut fds) = handover::receive(memory.socket.as_fd(), &mut word).unwrap();
            let word: Value = serde_json::from_slice(&word[..bytes]).unwrap();
            let of = |name: &str| word["Segment"][name].as_u64().unwrap();
            let process: [u8; 16] = serde_json::from_value(word["Segment"]["process"].clone()).unwrap();
            let participant = participant(of("participant") as u8);
            let identity = Identity { participant, incarnation: of("incarnation"), process };
            let config = SegmentConfig { ring_slots: of("ring_slots") as u32, arena_bytes: of("arena_bytes") };
            let file = SegmentFile::from_fd(fds.pop().unwrap());
            (of("number"), PeerSegment::attach(&file, &identity, &config).unwrap())
        };
        let (number, frozen) = shown(&b);
        assert_eq!(number, 1);
        assert!(frozen.bytes(&place_of).unwrap().iter().all(|byte| *byte == 7));
        let mut records = Vec::new();
        while records.last().is_none_or(|record: &Descriptor| record.kind() != REST) {
            records.push(b.next());
        }
        assert!(records.iter().any(|record| (record.kind(), record.tag()) == (FORGET, 1)), "{records:?}");
        let (number, alive) = shown(&b);
        let last = records.last().unwrap();
        assert_eq!(u64::from(last.tag()), number);
        assert!(alive.bytes(&last.block().unwrap()).unwrap().iter().all(|byte| *byte == 8));
        // The first is still as it was.
        assert!(frozen.bytes(&place_of).unwrap().iter().all(|byte| *byte == 7));
        for number in 1..=2 {
            let verdict =
                Descriptor::new(frame::VERDICT | ALONE, 0, number, u64::from(Code::Ok as u16), Inline::empty());
            b.put(verdict);
        }
        client.wait(again).unwrap();
        // Long keys, and what comes from elsewhere, lie in the sender's near segment.
        let own = b.arena.loan(2000).unwrap();
        let place_of = b.arena.lend(own, 2000, participant(0));
        b.put(Descriptor::new(frame::MESSAGE, 0, 1, 1000 << 16, BlockRef { len: 1000, ..place_of }));
        b.put(rest(0, place_of));
        assert_eq!((b.next().kind(), b.own.identity().participant.get()), (frame::VERDICT | ALONE, 1));
        assert_eq!(ask(&mut client, "recv", &[b"b", b""]).len(), 1000 + 2000 + 3);
    });
}
