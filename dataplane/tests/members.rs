//! Who there is: tables of members from a file and from a control plane, and what they do to messages, calls and links between
//! processes (conformance R4, M5, P8; faults A3, N5; G3, G7). Real processes, which are killed, started anew and moved; the control plane is a few lines here.
#![allow(clippy::cast_possible_truncation, reason = "numbers of members are small")]

mod support;

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use praas_dataplane::client::{CallHandle, Members, Outgoing, UpdateError};
use praas_dataplane::clock::unix_s;
use praas_dataplane::members::{Member, MembersError, State, Table, TableError};
use praas_dataplane::wire::frame;
use praas_dataplane::{Client, ClientConfig, Credential, Role, Secret};
use praas_transport::Header;
use support::nodes::{NAMES, Node, Place};
use support::raw::{Raw, initiator};
use support::{PATIENCE, Reactor, on_both_reactors, run_process, signal, test_worker, wait_until};

const ARGS: [&str; 3] = ["--workers=4", "--workers-max=4", "--plaintext"];

/// A process that was told of nobody, and a client of it.
struct Process {
    node: Node,
    client: Client,
    address: SocketAddr,
}

impl Process {
    /// As the process of this number, at the address of another number.
    fn start(place: &Place, reactor: Reactor, who: usize, at: usize, args: &[&str]) -> Process {
        let node =
            Node::start_with(reactor, NAMES[who], place.address(at), &place.key(1), &[], &[&ARGS[..], args].concat());
        node.wait_ready();
        Process { node, client: place.client(at), address: place.address(at) }
    }

    fn life(&self) -> u64 {
        self.client.welcome().incarnation
    }

    fn member(&self, who: usize) -> Member {
        Member { incarnation: Some(self.life()), ..Member::active(NAMES[who], self.address) }
    }

    fn ask(&mut self, function: &str, arguments: &[&[u8]]) -> String {
        let reply = self.client.invoke(function, Outgoing::from_args(arguments));
        let reply = reply.unwrap_or_else(|error| panic!("{function}: {error}"));
        String::from_utf8_lossy(&reply).into_owned()
    }

    fn refused(&mut self, function: &str, arguments: &[&[u8]]) -> String {
        self.client.invoke(function, Outgoing::from_args(arguments)).expect_err(function).to_string()
    }

    fn submit(&mut self, function: &str, arguments: &[&[u8]]) -> CallHandle {
        self.client.submit(function, Outgoing::from_args(arguments)).expect("it is connected")
    }

    fn listed(&mut self) -> String {
        self.ask("listed", &[])
    }
}

fn config(role: Role, key: u8) -> ClientConfig {
    let credential = Credential::mint(&Secret::new([key; 32]), role, "plane", unix_s() + 600).expect("a name");
    ClientConfig { credential: Some(credential), deadline: PATIENCE, ..ClientConfig::default() }
}

fn control(address: SocketAddr) -> Members {
    Members::connect(address, &config(Role::Control, 1)).expect("it takes the control plane")
}

/// A control plane: the table, and whom it is sent to.
#[derive(Default)]
struct Plane {
    generation: u64,
    members: BTreeMap<String, Member>,
    lines: HashMap<SocketAddr, Members>,
}

impl Plane {
    fn set(&mut self, members: impl IntoIterator<Item = Member>) {
        self.members.extend(members.into_iter().map(|member| (member.name.clone(), member)));
    }

    fn rests(&mut self, who: usize, state: State) {
        let life = self.members[NAMES[who]].incarnation;
        self.set([Member { incarnation: life, ..Member::at_rest(NAMES[who], state) }]);
    }

    fn table(&self) -> Table {
        Table::new(self.generation, self.members.values().cloned().collect()).expect("it makes sense")
    }

    /// The next generation, to all that are active.
    fn tell(&mut self) {
        self.generation += 1;
        let table = self.table();
        let active = self.members.values().filter(|member| member.state == State::Active);
        for address in active.map(|member| member.addresses[0]).collect::<Vec<_>>() {
            let line = self.lines.entry(address).or_insert_with(|| control(address));
            assert_eq!(line.update(&table).expect("it is taken"), self.generation);
        }
    }

    /// Whoever is at an address from now on is another one.
    fn forget(&mut self, address: SocketAddr) {
        self.lines.remove(&address);
    }
}

/// So many, that were told of each other.
fn told(place: &Place, reactor: Reactor, count: usize, args: &[&str]) -> (Vec<Process>, Plane) {
    let processes: Vec<Process> = (0..count).map(|who| Process::start(place, reactor, who, who, args)).collect();
    let mut plane = Plane::default();
    plane.set(processes.iter().enumerate().map(|(who, process)| process.member(who)));
    plane.tell();
    (processes, plane)
}

/// What each has sent to each, counted: what is received has to go on where it was.
#[derive(Default)]
struct Ledger(HashMap<(usize, usize), u64>);

const BURST: u64 = 40;

impl Ledger {
    /// Everybody of these sends to everybody else, and receives it: once, and in order.
    fn exchange(&mut self, processes: &mut [Process], among: &[usize]) {
        let mut calls = Vec::new();
        for &from in among {
            for &to in among.iter().filter(|to| **to != from) {
                calls.push((from, self.begin(processes, from, to)));
            }
        }
        for (from, call) in calls {
            processes[from].client.wait(call).unwrap_or_else(|error| panic!("from {from}: {error}"));
        }
        for &to in among {
            for &from in among.iter().filter(|from| **from != to) {
                self.receive(processes, from, to, 0);
            }
            self.nothing_more(processes, to);
        }
    }

    fn begin(&mut self, processes: &mut [Process], from: usize, to: usize) -> CallHandle {
        let first = self.0.entry((from, to)).or_default();
        let (begin, count) = (first.to_string(), BURST.to_string());
        *first += BURST;
        processes[from].submit("send_many", &[NAMES[to].as_bytes(), b"k", begin.as_bytes(), count.as_bytes()])
    }

    /// What was sent last, but for the last few of it, which nobody is to have.
    fn receive(&self, processes: &mut [Process], from: usize, to: usize, without: u64) {
        let end = self.0[&(from, to)];
        for at in end - BURST..end - without {
            let arguments = Outgoing::from_args(&[NAMES[from].as_bytes(), b"k"]);
            let reply = processes[to].client.invoke("recv_payload", arguments).expect("it was sent");
            assert_eq!(*reply, at.to_le_bytes(), "from {} to {}", NAMES[from], NAMES[to]);
        }
    }

    fn nothing_more(&self, processes: &mut [Process], at: usize) {
        let more = processes[at].client.invoke("recv_for", Outgoing::from_args(&[b"*", b"", b"0"])).unwrap();
        assert_eq!(more.status(), 1, "and no more: {:?}", String::from_utf8_lossy(&more));
    }
}

/// A newcomer learns of everyone and everyone of the newcomer; swapped, back elsewhere as a later life, stopped and deleted are seen by all; and across
/// all of it what is sent is received once and in order, or its sender is told that it was not.
#[test]
fn r4_m5_newcomers_and_those_who_leave_and_return_are_seen_by_all_and_nothing_is_lost() {
    on_both_reactors(|reactor| {
        let place = Place::new();
        let mut ledger = Ledger::default();
        let (mut processes, mut plane) = told(&place, reactor, 3, &[]);
        for process in &mut processes {
            assert_eq!(process.listed(), "a b c/");
        }
        ledger.exchange(&mut processes, &[0, 1, 2]);

        // A newcomer.
        let unknown = processes[0].refused("send", &[b"d", b"k", b"v"]);
        assert!(unknown.contains("unknown process `d`"), "{unknown}");
        processes.push(Process::start(&place, reactor, 3, 3, &[]));
        assert_eq!(processes[3].listed(), "d/");
        plane.set([processes[3].member(3)]);
        plane.tell();
        for process in &mut processes {
            assert_eq!(process.listed(), "a b c d/");
        }
        ledger.exchange(&mut processes, &[0, 1, 2, 3]);

        // Swapped: it ends, and what is sent to it waits.
        plane.rests(2, State::Swapped);
        plane.tell();
        signal(processes[2].node.pid(), 15);
        assert!(processes[2].node.child.wait().expect("it ends").success());
        for who in [0, 1, 3] {
            assert_eq!(processes[who].listed(), "a b d/c");
        }
        let waiting = [0, 1, 3].map(|from| (from, ledger.begin(&mut processes, from, 2)));
        std::thread::sleep(Duration::from_millis(100));
        ledger.exchange(&mut processes, &[0, 1, 3]);

        // Back: elsewhere, and a later life.
        let life = processes[2].life();
        processes[2] = Process::start(&place, reactor, 2, 4, &[]);
        assert!(processes[2].life() > life);
        plane.set([processes[2].member(2)]);
        plane.tell();
        for process in &mut processes {
            assert_eq!(process.listed(), "a b c d/");
        }
        for (from, call) in waiting {
            processes[from].client.wait(call).unwrap_or_else(|error| panic!("from {from}: {error}"));
            ledger.receive(&mut processes, from, 2, 0);
        }
        ledger.nothing_more(&mut processes, 2);
        ledger.exchange(&mut processes, &[0, 1, 2, 3]);

        // Stopped: what waits for it ends at once, as do a call that it has and whatever is sent from then on.
        let call = processes[1].submit("call_at", &[b"d", b"sleep", b"60000"]);
        wait_until("it has the call", PATIENCE, || processes[3].node.said("peer=b state=up") > 0);
        std::thread::sleep(Duration::from_millis(50));
        processes[3].node.kill();
        let waiting = processes[0].submit("send", &[b"d", b"k", b"v"]);
        std::thread::sleep(Duration::from_millis(100));
        plane.rests(3, State::Stopped);
        plane.tell();
        let begun = Instant::now();
        let gone = processes[0].client.wait(waiting).expect_err("nobody has it").to_string();
        assert!(gone.contains("process lost"), "{gone}");
        let gone = processes[1].client.wait(call).expect_err("nobody answers it").to_string();
        assert!(gone.contains("process lost: the other process was stopped or deleted"), "{gone}");
        for process in &mut processes[..3] {
            assert_eq!(process.listed(), "a b c/");
            let gone = process.refused("send", &[b"d", b"k", b"v"]);
            assert!(gone.contains("process d has stopped; it was not sent"), "{gone}");
        }
        // Deleted: nobody waits for it any more.
        let receiving = processes[1].submit("recv", &[b"d", b"k"]);
        std::thread::sleep(Duration::from_millis(100));
        plane.rests(3, State::Deleted);
        plane.tell();
        let gone = processes[1].client.wait(receiving).expect_err("nothing more comes").to_string();
        assert!(gone.contains("unknown process `d`"), "{gone}");
        for process in &mut processes[..3] {
            assert_eq!(process.listed(), "a b c/");
            for (function, arguments) in
                [("send", [&b"d"[..], b"k", b"v"]), ("call_at", [b"d", b"echo", b"x"]), ("recv", [b"d", b"k", b""])]
            {
                let arguments = if function == "recv" { &arguments[..2] } else { &arguments[..] };
                let gone = process.refused(function, arguments);
                assert!(gone.contains("unknown process"), "{function}: {gone}");
            }
        }
        assert!(begun.elapsed() < Duration::from_secs(10), "none of it waits for a deadline: {:?}", begun.elapsed());

        // The name comes back, where it was, as a later life.
        processes[3] = Process::start(&place, reactor, 3, 3, &[]);
        plane.forget(place.address(3));
        plane.set([processes[3].member(3)]);
        plane.tell();
        ledger.exchange(&mut processes, &[0, 1, 2, 3]);

        // Not mentioned is deleted, and links are closed.
        plane.members.remove("d");
        plane.tell();
        assert_eq!(processes[0].listed(), "a b c/");
        wait_until("its link is closed", PATIENCE, || !processes[0].node.is_up("d"));
    });
}

/// One invocation sees another process active, swapped, back and deleted.
#[test]
fn p8_r4_one_invocation_sees_the_lists_change() {
    on_both_reactors(|reactor| {
        let place = Place::new();
        let (mut processes, mut plane) = told(&place, reactor, 2, &[]);
        let watching = processes[0].submit("watch_listed", &[b"a/", b"20000"]);
        let sees = |a: &mut Process, lists: &str| assert_eq!(a.ask("recv", &[b"", b"seen"]), format!("a seen {lists}"));
        sees(&mut processes[0], "a b/");
        plane.rests(1, State::Swapped);
        plane.tell();
        sees(&mut processes[0], "a/b");
        plane.set([processes[1].member(1)]);
        plane.tell();
        sees(&mut processes[0], "a b/");
        plane.rests(1, State::Deleted);
        plane.tell();
        let seen = processes[0].client.wait(watching).unwrap();
        assert_eq!(String::from_utf8_lossy(&seen), "a b/|a/b|a b/|a/");
    });
}

#[test]
fn m5_to_a_swapped_process_messages_wait_up_to_a_bound_or_are_refused_as_was_said() {
    on_both_reactors(|reactor| {
        let place = Place::new();
        let (mut processes, mut plane) = told(&place, reactor, 2, &["--mailbox-messages-max=2"]);
        plane.rests(1, State::Swapped);
        plane.tell();
        // Its time passes, and it is not sent.
        let hurried = ClientConfig { deadline: Duration::from_millis(300), ..ClientConfig::default() };
        let mut hurried = Client::connect(place.address(0), &hurried).unwrap();
        let late = hurried.invoke("send", Outgoing::from_args(&[b"b", b"k", b"late"])).unwrap_err().to_string();
        assert!(late.contains("it was not sent") || late.contains("timeout"), "{late}");
        // Two may wait, and the third is told so.
        let mut waiting: Vec<_> = (1..=3).map(|_| processes[0].submit("send", &[b"b", b"k", b"v"])).collect();
        let (third, full) = processes[0].client.wait_any().expect("three are in flight");
        let full = full.expect_err("there is room for two").to_string();
        assert!(full.contains("busy: 2 parcels wait for the peer, and 2 may"), "{full}");
        waiting.retain(|call| *call != third);
        // The same life is active again: the swap was called off.
        plane.set([processes[1].member(1)]);
        plane.tell();
        for call in waiting {
            processes[0].client.wait(call).expect("it has waited");
        }
        for expected in ["a k v", "a k v", ""] {
            assert_eq!(processes[1].ask("recv_for", &[b"a", b"k", b"0"]), expected);
        }
        drop(processes);

        let (mut processes, mut plane) = told(&place, reactor, 2, &["--when-swapped=refuse"]);
        processes[0].ask("send", &[b"b", b"k", b"v"]);
        plane.rests(1, State::Swapped);
        plane.tell();
        let begun = Instant::now();
        for (function, arguments) in [("send", [&b"b"[..], b"k", b"v"]), ("call_at", [b"b", b"echo", b"x"])] {
            let refused = processes[0].refused(function, &arguments);
            assert!(refused.contains("swapped out: process b is swapped out"), "{refused}");
        }
        assert!(begun.elapsed() < Duration::from_secs(10), "at once: {:?}", begun.elapsed());
    });
}

/// G7: an earlier life of a process, cut off while the next one was started elsewhere, is let in by nobody who was told.
#[test]
fn r4_g7_an_earlier_life_that_wakes_up_is_kept_out() {
    on_both_reactors(|reactor| {
        let place = Place::new();
        let (mut processes, mut plane) = told(&place, reactor, 2, &[]);
        processes[0].ask("send", &[b"b", b"k", b"v"]);
        processes[1].ask("send", &[b"a", b"k", b"first life"]);
        assert_eq!(processes[0].ask("recv", &[b"b", b"k"]), "b k first life");
        signal(processes[1].node.pid(), 19);
        // The next life is on its way; nobody has met it yet.
        let next = Member { incarnation: Some(processes[1].life() + 1), ..Member::active("b", place.address(2)) };
        plane.generation += 1;
        plane.set([next]);
        let table = plane.table();
        plane.lines.get_mut(&place.address(0)).unwrap().update(&table).unwrap();
        let a_said = |processes: &[Process], words: &str| processes[0].node.said(words);
        wait_until("the earlier one is given up", PATIENCE, || a_said(&processes, "peer=b state=down") == 1);
        signal(processes[1].node.pid(), 18);
        let hurried = ClientConfig { deadline: Duration::from_millis(1500), ..ClientConfig::default() };
        let mut of_earlier = Client::connect(processes[1].address, &hurried).unwrap();
        of_earlier.invoke("send", Outgoing::from_args(&[b"a", b"k", b"stale"])).expect_err("it is not let in");
        let earlier = &processes[1].node;
        wait_until("it hears why", PATIENCE, || earlier.said("it knows a later life of us") > 0);
        wait_until("it is said here, too", PATIENCE, || a_said(&processes, "this is its life") > 0);
        // The one that was announced is let in, and has what is sent to that name.
        let later = Process::start(&place, reactor, 1, 2, &[]);
        let _earlier = std::mem::replace(&mut processes[1], later);
        plane.set([processes[1].member(1)]);
        plane.tell();
        processes[0].ask("send", &[b"b", b"k", b"to the later"]);
        assert_eq!(processes[1].ask("recv", &[b"a", b"k"]), "a k to the later");
        processes[1].ask("send", &[b"a", b"k", b"of the later"]);
        assert_eq!(
            processes[0].ask("recv", &[b"*", b"k"]),
            "b k of the later",
            "and nothing of the earlier one before it"
        );
    });
}

/// Nothing is dialed before it is needed, and one that is not there is nobody's concern until then.
#[test]
fn r4_links_are_made_when_something_is_sent() {
    on_both_reactors(|reactor| {
        let place = Place::new();
        let (mut processes, mut plane) = told(&place, reactor, 2, &[]);
        // Nobody is there.
        plane.set([Member::active("c", place.address(2))]);
        plane.generation += 1;
        let table = plane.table();
        plane.lines.get_mut(&place.address(0)).unwrap().update(&table).unwrap();
        std::thread::sleep(Duration::from_millis(500));
        let said = |processes: &[Process], words: &str| [0, 1].map(|who| processes[who].node.said(words));
        assert_eq!((said(&processes, "state=up"), said(&processes, "state=absent")), ([0; 2], [0; 2]));
        processes[0].ask("send", &[b"b", b"k", b"v"]);
        wait_until("one link, and both say so", PATIENCE, || said(&processes, "state=up") == [1, 1]);
        let hurried = ClientConfig { deadline: Duration::from_millis(300), ..ClientConfig::default() };
        let mut hurried = Client::connect(place.address(0), &hurried).unwrap();
        hurried.invoke("send", Outgoing::from_args(&[b"c", b"k", b"v"])).expect_err("nobody is there");
        wait_until("it is said", PATIENCE, || processes[0].node.said("peer=c state=absent") == 1);
        // It is active, as we were told; a broadcast reaches who is there, within the time of the invocation.
        assert_eq!(processes[0].listed(), "a b c/");
        let hurried = ClientConfig { deadline: Duration::from_secs(3), ..ClientConfig::default() };
        let mut hurried = Client::connect(place.address(0), &hurried).unwrap();
        let told = hurried.invoke("broadcast", Outgoing::from_args(&[b"news", b"hello"])).expect("it ends in time");
        assert!(told.starts_with(b"b, missed c timeout"), "{}", String::from_utf8_lossy(&told));
    });
}

fn text(lines: &str) -> String {
    format!("praas-members 1\n{lines}")
}

/// Sends bytes as a table, over a connection of this role. The answer: whether it was taken, and what came with it.
fn send(raw: &mut Raw, call: u64, body: &[u8]) -> Result<u64, MembersError> {
    raw.send(&Header { kind: frame::MEMBERS, call, payload_bytes: body.len() as u64, ..Header::default() }, body);
    let (header, answer) = raw.receive();
    assert_eq!((header.kind, header.call), (frame::MEMBERS_TAKEN, call));
    match header.flags {
        0 => Ok(header.aux),
        _ => Err(serde_json::from_slice(&answer).expect("a reason")),
    }
}

fn raw(address: SocketAddr, role: Role) -> Raw {
    let mut raw = Raw::connect(address);
    let said = raw.say_hello(initiator(config(role, 1).credential.as_ref()));
    said.expect("it has the key");
    assert_eq!(raw.receive().0.kind, frame::WELCOME);
    raw
}

#[test]
fn r4_n5_a_table_that_is_none_or_contradicts_itself_is_refused_with_its_line_and_changes_nothing() {
    on_both_reactors(|reactor| {
        let place = Place::new();
        let args = ["--peers-max=3", "--payload-bytes-max=1048576"];
        let (mut processes, plane) = told(&place, reactor, 2, &args);
        let (a, b) = (processes[0].life(), processes[1].life());
        let b_at = processes[1].address;
        let mut line = raw(processes[0].address, Role::Control);
        let bad = [
            // Itself.
            ("", "line 1: `` is not `praas-members 1`"),
            ("+generation 2\nb active", "line 3: `b` is active and has no address"),
            ("+generation 2\nb active 10.0.0.1:1\nb swapped", "line 4: `b` is in line 3 already"),
            ("+generation 2\nb active 10.0.0.1:1\nc active 10.0.0.1:1", "line 4: 10.0.0.1:1 is where `b` is"),
            ("+generation 2\nb asleep", "line 3: `asleep` is not a state"),
            ("+generation 2\nb/c swapped", "line 3: `b/c` is not a name"),
            // What it replaces.
            ("+generation 1\nb deleted", "generation 1 is not newer than 1"),
            ("+generation 0\nb deleted", "generation 0 is not newer than 1"),
            ("+generation 2\na deleted", "line 3: `a`, which got this table, is deleted"),
            ("+generation 2\na active 10.0.0.1:1 incarnation=1", "line 3: `a` is of incarnation 1 here, and this is"),
            ("+generation 2\nb active 10.0.0.1:1 incarnation=1", "line 3: `b` is of incarnation 1 here, and"),
            (
                "+generation 2\nb swapped\nc swapped\nd swapped\ne swapped",
                "the table has 4 other members, and this process knows 3",
            ),
        ];
        for (call, (body, words)) in (1..).zip(bad) {
            let body = body.strip_prefix('+').map_or(String::new(), text);
            let said = send(&mut line, call, body.as_bytes()).expect_err(words).to_string();
            assert!(said.starts_with(words), "{said}");
            assert_eq!(processes[0].listed(), "a b/", "{words}");
        }
        // Longer than a payload may be; and every truncation of a good one, as it is on its way.
        let long = vec![b'#'; 2 << 20];
        let expected = TableError::TooLong { found_bytes: 2 << 20, max_bytes: 1 << 20 };
        assert_eq!(send(&mut line, 50, &long), Err(expected.into()));
        let good = text(&format!("generation 2\na active 127.0.0.1:1 incarnation={a}\nb swapped incarnation={b}"));
        for bytes in 0..text("generation").len() {
            assert!(
                matches!(send(&mut line, 51, &good.as_bytes()[..bytes]), Err(MembersError::Table(_))),
                "{bytes} bytes"
            );
        }
        assert_eq!(processes[0].listed(), "a b/");
        processes[0].ask("send", &[b"b", b"k", b"v"]);
        // The same connection brings one that is good; the other process goes by what it was told.
        assert_eq!(send(&mut line, 52, good.as_bytes()), Ok(2));
        assert_eq!((processes[0].listed(), processes[1].listed()), ("a/b".into(), "a b/".into()));
        // By the library: typed, and the connection stays.
        let mut members = control(processes[0].address);
        let stale = members.update(&plane.table());
        assert!(matches!(stale, Err(UpdateError::Refused(MembersError::Stale { found: 1, known: 2 }))), "{stale:?}");
        let now = Member { incarnation: Some(b), ..Member::active("b", b_at) };
        assert_eq!(members.update(&Table::new(3, vec![now]).unwrap()).unwrap(), 3);
        assert_eq!(processes[0].listed(), "a b/");
        let refusals = || processes[0].node.said("a table of members was refused: ");
        wait_until("each is in the log", PATIENCE, || refusals() >= 12);
    });
}

#[test]
fn r4_a3_who_is_not_the_control_plane_changes_nothing() {
    on_both_reactors(|reactor| {
        let place = Place::new();
        let (mut processes, plane) = told(&place, reactor, 2, &[]);
        let address = processes[0].address;
        let nobody = text("generation 9\n");
        for role in [Role::Client, Role::Process] {
            let mut line = raw(address, role);
            let refused = MembersError::Role { role: role.to_string() };
            assert_eq!(send(&mut line, 1, nobody.as_bytes()), Err(refused.clone()));
            assert_eq!(send(&mut line, 2, &vec![0; 70 << 20]), Err(refused));
            let mut members = Members::connect(address, &config(role, 1)).unwrap();
            let error = members.update(&Table::new(9, vec![]).unwrap()).unwrap_err().to_string();
            assert!(error.contains("praas token --role control"), "{error}");
        }
        // In plain text nobody proves to be anything, and with another key neither.
        let mut members = Members::connect(address, &ClientConfig::default()).unwrap();
        let error = members.update(&Table::new(9, vec![]).unwrap()).unwrap_err().to_string();
        assert!(error.contains("role `client` may not"), "{error}");
        Members::connect(address, &config(Role::Control, 2)).expect_err("another key");
        // Not over the connection between two processes either, whichever of the two says it.
        processes[1].ask("send", &[b"a", b"k", b"v"]);
        assert_eq!((processes[0].listed(), processes[1].listed()), ("a b/".into(), "a b/".into()));
        let stale = control(address).update(&plane.table()).unwrap_err();
        assert!(matches!(stale, UpdateError::Refused(MembersError::Stale { found: 1, known: 1 })), "still 1: {stale}");
    });
}

/// The process dies in between: the sender hears of it, and what it then sends to the next life is taken.
#[test]
fn r4_who_sends_a_table_hears_whether_it_was_taken() {
    on_both_reactors(|reactor| {
        let place = Place::new();
        let mut process = Process::start(&place, reactor, 0, 0, &[]);
        let mut members = control(process.address);
        assert_eq!(members.update(&Table::new(1, vec![]).unwrap()).unwrap(), 1);
        signal(process.node.pid(), 19);
        let hurried = ClientConfig { deadline: Duration::from_millis(300), ..config(Role::Control, 1) };
        let mut late =
            Members::connect(process.address, &ClientConfig { connect_within: Duration::from_millis(300), ..hurried });
        assert!(late.is_err(), "it cannot even greet");
        process.node.kill();
        let lost = members.update(&Table::new(2, vec![]).unwrap());
        assert!(matches!(lost, Err(UpdateError::ConnectionLost { .. })), "{lost:?}");
        let lost = members.update(&Table::new(2, vec![]).unwrap());
        assert!(matches!(lost, Err(UpdateError::ConnectionLost { .. })), "and stays so: {lost:?}");
        process = Process::start(&place, reactor, 0, 0, &[]);
        late = Members::connect(process.address, &config(Role::Control, 1));
        assert_eq!(late.unwrap().update(&Table::new(2, vec![]).unwrap()).unwrap(), 2);
    });
}

#[test]
fn r4_a_file_may_say_who_there_is_and_the_next_table_replaces_it() {
    on_both_reactors(|reactor| {
        let place = Place::new();
        let file = place.folder.join("members");
        let of_file = format!("--members={}", file.display());
        let (a, b) = (place.address(0), place.address(1));
        std::fs::write(
            &file,
            text(&format!("generation 4\n# both have the same file\na active {a}\nb active {b}\nc swapped\n")),
        )
        .unwrap();
        let mut processes = [0, 1].map(|who| Process::start(&place, reactor, who, who, &[&of_file]));
        assert_eq!((processes[0].listed(), processes[1].listed()), ("a b/c".into(), "a b/c".into()));
        assert_eq!(processes[0].node.said(" peers=2"), 1, "the ready line counts them");
        processes[0].ask("send", &[b"b", b"k", b"v"]);
        assert_eq!(processes[1].ask("recv", &[b"a", b"k"]), "a k v");
        let stale = control(a).update(&Table::new(4, vec![]).unwrap()).unwrap_err().to_string();
        assert!(stale.contains("generation 4 is not newer than 4"), "{stale}");
        control(a).update(&Table::new(5, vec![Member::at_rest("b", State::Stopped)]).unwrap()).unwrap();
        assert_eq!(processes[0].listed(), "a/");
    });
}

#[test]
fn r4_a_bad_file_of_members_is_said_at_the_start() {
    let place = Place::new();
    let file = place.folder.join("members");
    let (path, key, worker) = (file.display().to_string(), place.key(1), test_worker());
    let start = |extra: &[&str]| {
        let args = ["--worker", &worker, "--process", "a", "--key-file", &key, "--members", &path];
        let output = run_process(&[&args[..], extra].concat());
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (code, said) = start(&[]);
    assert!(code == Some(2) && said.contains("check the path given to --members"), "{said}");
    for (lines, words) in [
        ("generation 1\nb active", "line 3: `b` is active and has no address"),
        ("generation 1\na stopped", "line 3: `a`, which got this table, is stopped"),
        ("generation 1\nb swapped\nb deleted", "line 4: `b` is in line 3 already"),
    ] {
        std::fs::write(&file, text(lines)).unwrap();
        let (code, said) = start(&[]);
        assert!(code == Some(2) && said.contains(words) && said.contains(&path), "{said}");
    }
    std::fs::write(&file, text("generation 1\n")).unwrap();
    let (code, said) = start(&["--peer=b=127.0.0.1:1"]);
    assert!(code == Some(2) && said.contains("--members"), "{said}");
}
