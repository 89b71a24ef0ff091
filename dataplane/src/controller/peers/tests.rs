//! Two state machines joined by pipes that keep order, lose nothing while they stand, and may be as slow as they like.
//!
//! Checked all along: an end is up on one link at a time; what is said over a link that is up arrives at an end that is up
//! on it, too, unless that end has closed it. Checked at the end, when the pipes are quick again: one connection, the same at both.
#![allow(clippy::cast_possible_truncation, reason = "dice are cut to size on purpose")]

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};

use proptest::prelude::*;

use super::*;

const S: u64 = 1_000_000_000;

#[derive(Debug, Clone, Copy)]
enum Packet {
    Hello,
    Challenge {
        life: u64,
    },
    Proof {
        life: u64,
    },
    Said(Word),
    /// What issue 4 will send, as soon as a link is up.
    Matter,
    Fin,
}

/// A connection. `[0]` is what concerns the first end, `[1]` the second.
#[derive(Debug, Clone)]
struct Conn {
    links: [Option<LinkNumber>; 2],
    /// On their way *to* that end.
    pipes: [VecDeque<Packet>; 2],
    closed: [bool; 2],
    /// Cut without a word: nothing arrives any more.
    cut: bool,
}

#[derive(Debug, Clone)]
struct End {
    peering: Peering,
    now_ns: u64,
    life: u64,
    started: bool,
    up: Option<LinkNumber>,
}

#[derive(Debug, Clone)]
struct World {
    ends: [End; 2],
    conns: Vec<Conn>,
    downs: u32,
}

/// What may happen next.
#[derive(Debug, Clone, Copy)]
enum Step {
    Deliver {
        conn: usize,
        to: usize,
    },
    /// Time passes at one end until it has something to do.
    Timer(usize),
    /// Killed and started anew.
    Crash(usize),
    Cut(usize),
    /// An end is told that the other is not active, or is again: where, and maybe which life of it.
    Told {
        who: usize,
        active: bool,
        life: bool,
    },
    /// Something is to be sent.
    Want(usize),
}

/// A machine with one peer.
fn acquainted(name: &str, peer: &str, seed: [u8; 16]) -> Peering {
    let mut peering = Peering::new(name, seed);
    assert_eq!(peering.add(peer), 0);
    peering.activate(0, 0, None, true);
    peering
}

/// The same, and something is to be sent to it.
fn told(name: &str, peer: &str, seed: [u8; 16]) -> Peering {
    let mut peering = acquainted(name, peer, seed);
    peering.want(0);
    peering
}

fn end(who: usize, life: u64) -> End {
    let names = ["a", "b"];
    let mut seed = [who as u8 + 1; 16];
    seed[8] = life as u8;
    let peering = told(names[who], names[1 - who], seed);
    End { peering, now_ns: 0, life, started: false, up: None }
}

impl World {
    fn new() -> World {
        World { ends: [end(0, 1), end(1, 1)], conns: Vec::new(), downs: 0 }
    }

    fn send(&mut self, conn: usize, to: usize, packet: Packet) {
        let conn = &mut self.conns[conn];
        if !conn.cut && !conn.closed[to] {
            conn.pipes[to].push_back(packet);
        }
    }

    fn conn_of(&self, who: usize, link: LinkNumber) -> Option<usize> {
        self.conns.iter().position(|conn| conn.links[who] == Some(link) && !conn.closed[who])
    }

    fn act(&mut self, who: usize) {
        while let Some(action) = self.ends[who].peering.action() {
            match action {
                Action::Dial { link, .. } => {
                    let mut links = [None; 2];
                    links[who] = Some(link);
                    let pipes = [VecDeque::new(), VecDeque::new()];
                    self.conns.push(Conn { links, pipes, closed: [false; 2], cut: false });
                    self.send(self.conns.len() - 1, 1 - who, Packet::Hello);
                }
                Action::Say { link, word } => {
                    let conn = self.conn_of(who, link).expect("nothing is said on a link that is closed");
                    self.send(conn, 1 - who, Packet::Said(word));
                }
                Action::Close { link } => {
                    // It may have been the other end that closed it.
                    if let Some(conn) = self.conn_of(who, link) {
                        self.close(conn, who);
                    }
                }
                Action::Up { link, incarnation, .. } => {
                    assert_eq!(self.ends[who].up.replace(link), None, "up twice");
                    let conn = self.conn_of(who, link).expect("up on a link that is open");
                    assert!(incarnation <= self.ends[1 - who].life);
                    self.send(conn, 1 - who, Packet::Matter);
                }
                Action::Down { link, .. } => {
                    assert_eq!(self.ends[who].up.take(), Some(link), "down without up");
                    self.downs += 1;
                }
                Action::Failed { .. } => assert_eq!(self.ends[who].up, None),
                Action::Refused { .. } => {}
            }
        }
        let Peer { links: stages, active, .. } = &self.ends[who].peering.peers[0];
        assert!(*active || stages.is_empty(), "no link with whom is not active: {stages:?}");
        assert!(stages.len() <= 3, "bounded: {stages:?}");
        assert_eq!(self.ends[who].up, stages.iter().find(|link| link.is_up()).map(|link| link.number));
        assert_eq!(stages.len(), self.ends[who].peering.peer_of.len());
    }

    fn close(&mut self, conn: usize, who: usize) {
        self.send(conn, 1 - who, Packet::Fin);
        self.conns[conn].closed[who] = true;
        self.conns[conn].pipes[who].clear();
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Timer(who) => {
                let End { peering, now_ns, started, .. } = &mut self.ends[who];
                *started = true;
                // Whoever waits for nothing lets no time pass.
                *now_ns = (*now_ns).max(Some(peering.wake_ns()).filter(|at_ns| *at_ns < u64::MAX).unwrap_or(0));
                peering.tick(*now_ns);
                self.act(who);
            }
            Step::Crash(who) => {
                for conn in 0..self.conns.len() {
                    if !self.conns[conn].closed[who] {
                        self.close(conn, who);
                    }
                }
                self.ends[who] = end(who, self.ends[who].life + 1);
            }
            Step::Cut(conn) => {
                self.conns[conn].cut = true;
                self.conns[conn].pipes.iter_mut().for_each(VecDeque::clear);
            }
            Step::Deliver { conn, to } => self.deliver(conn, to),
            Step::Told { who, active, life } => {
                let other = self.ends[1 - who].life;
                let End { peering, now_ns, .. } = &mut self.ends[who];
                if active {
                    peering.activate(*now_ns, 0, life.then_some(other), true);
                } else {
                    peering.deactivate(0, 0);
                }
                self.act(who);
            }
            Step::Want(who) => self.ends[who].peering.want(0),
        }
    }

    fn deliver(&mut self, conn: usize, to: usize) {
        let packet = self.conns[conn].pipes[to].pop_front().expect("something is on its way");
        let link = self.conns[conn].links[to];
        let End { peering, now_ns, life, up, .. } = &mut self.ends[to];
        let (now_ns, life) = (*now_ns, *life);
        match packet {
            Packet::Hello => self.send(conn, 1 - to, Packet::Challenge { life }),
            Packet::Challenge { life: theirs } => {
                // With its answer, before anything that follows from it.
                peering.dialed(now_ns, link.expect("it dialed"), theirs);
                self.send(conn, 1 - to, Packet::Proof { life });
            }
            Packet::Proof { life: theirs } => self.conns[conn].links[to] = Some(peering.accepted(now_ns, 0, theirs)),
            Packet::Said(word) => {
                peering.arrived(now_ns, link.expect("the hello is over"));
                peering.heard(now_ns, link.expect("the hello is over"), word);
            }
            Packet::Matter => assert_eq!(*up, link, "it comes over the link that is up"),
            Packet::Fin => {
                self.conns[conn].closed[to] = true;
                if let Some(link) = link {
                    peering.gone(now_ns, link, "closed".into());
                }
            }
        }
        self.act(to);
    }

    fn on_their_way(&self) -> Vec<Step> {
        let conns = (0..self.conns.len()).flat_map(|conn| [0, 1].map(|to| (conn, to)));
        conns
            .filter(|&(conn, to)| !self.conns[conn].pipes[to].is_empty())
            .map(|(conn, to)| Step::Deliver { conn, to })
            .collect()
    }

    /// The one connection, when there is one, and it is the same at both ends.
    fn joined(&self) -> Option<usize> {
        let [a, b] = [0, 1].map(|who| self.ends[who].up.and_then(|link| self.conn_of(who, link)));
        // One whose hello never came is closed by its deadline, where hellos are read.
        let is_open = |conn: &&Conn| [0, 1].iter().any(|&who| conn.links[who].is_some() && !conn.closed[who]);
        let open = self.conns.iter().filter(is_open).count();
        let lives = [0, 1].iter().all(|&who| self.ends[who].peering.peers[0].incarnation == self.ends[1 - who].life);
        (a.is_some() && a == b && open == 1 && lives).then(|| a.expect("seen above"))
    }

    /// From here on all is quick, and both ends find to each other.
    fn converge(mut self) {
        let begun = self.clone();
        for _ in 0..300 {
            while let Some(step) = self.on_their_way().first().copied() {
                self.step(step);
            }
            if self.joined().is_some_and(|conn| !self.conns[conn].cut) {
                return;
            }
            let who = usize::from(self.ends[1].peering.wake_ns() < self.ends[0].peering.wake_ns());
            self.step(Step::Timer(who));
        }
        panic!("they do not find to each other: {self:?}\nfrom {begun:?}");
    }

    fn key(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        format!("{self:?}").hash(&mut hasher);
        hasher.finish()
    }
}

/// Nobody dials before something is to be sent, and one that sends is enough, whichever it is.
#[test]
fn n11_one_that_has_something_to_send_finds_one_that_has_not_in_every_order() {
    for sends in 0..2 {
        let mut world = World::new();
        let names = ["a", "b"];
        world.ends.iter_mut().zip(0..).for_each(|(end, who)| {
            end.peering = acquainted(names[who], names[1 - who], [who as u8 + 1; 16]);
        });
        for who in [0, 1] {
            world.step(Step::Timer(who));
            assert_eq!(world.ends[who].peering.wake_ns(), u64::MAX);
        }
        assert!(world.conns.is_empty());
        world.step(Step::Want(sends));
        let (mut seen, mut open) = (HashSet::new(), vec![world]);
        while let Some(world) = open.pop() {
            if !seen.insert(world.key()) {
                continue;
            }
            world.clone().converge();
            let mut next = world.on_their_way();
            next.extend((world.conns.is_empty()).then_some(Step::Timer(sends)));
            for step in next {
                let mut world = world.clone();
                world.step(step);
                assert_eq!(world.conns.len(), 1);
                open.push(world);
            }
        }
        assert!(seen.len() > 5, "{} states", seen.len());
    }
}

/// How often what may happen in a history.
#[derive(Debug, Clone, Copy)]
struct Budget {
    timers: u32,
    crashes: u32,
    cuts: u32,
}

/// Every history within the budget, each state once. How many states.
fn explore(budget: Budget) -> usize {
    let (mut seen, mut open) = (HashSet::new(), vec![(World::new(), budget)]);
    while let Some((world, budget)) = open.pop() {
        if !seen.insert((world.key(), budget.timers, budget.crashes, budget.cuts)) {
            continue;
        }
        let mut next = world.on_their_way();
        world.clone().converge();
        let mut push = |step: Step, budget: Budget| {
            let mut world = world.clone();
            world.step(step);
            open.push((world, budget));
        };
        for step in next.drain(..) {
            push(step, budget);
        }
        for who in 0..2 {
            if !world.ends[who].started {
                push(Step::Timer(who), budget);
            } else if budget.timers > 0 {
                push(Step::Timer(who), Budget { timers: budget.timers - 1, ..budget });
            }
            if budget.crashes > 0 && world.ends[who].started {
                push(Step::Crash(who), Budget { crashes: budget.crashes - 1, ..budget });
            }
        }
        if budget.cuts > 0 {
            for conn in
                (0..world.conns.len()).filter(|&conn| !world.conns[conn].cut && world.conns[conn].closed != [true; 2])
            {
                push(Step::Cut(conn), Budget { cuts: budget.cuts - 1, ..budget });
            }
        }
    }
    seen.len()
}

/// Both dial at once, and nothing else happens: whatever comes first, one connection, and it is never taken away again.
#[test]
fn n11_of_two_connections_made_at_once_one_is_left_in_every_order() {
    let (mut seen, mut open, mut ends) = (HashSet::new(), vec![World::new()], 0);
    while let Some(world) = open.pop() {
        if !seen.insert(world.key()) {
            continue;
        }
        assert_eq!(world.downs, 0, "a connection that stood is not given up");
        let mut next = world.on_their_way();
        next.extend((0..2).filter(|&who| !world.ends[who].started).map(Step::Timer));
        if next.is_empty() {
            assert!(world.joined().is_some(), "{world:#?}");
            ends += 1;
        }
        for step in next {
            let mut world = world.clone();
            world.step(step);
            open.push(world);
        }
    }
    println!("{} states, {ends} ends", seen.len());
    assert!(ends > 1 && seen.len() > 50, "{} states, {ends} ends", seen.len());
}

#[test]
fn n11_n10_in_every_order_with_late_timers_they_find_to_one_connection() {
    println!("{} states", explore(Budget { timers: 2, crashes: 0, cuts: 0 }));
}

#[test]
fn n11_n10_in_every_order_with_a_crash_they_find_to_one_connection() {
    println!("{} states", explore(Budget { timers: 1, crashes: 1, cuts: 0 }));
}

#[test]
fn n1_n10_in_every_order_with_a_cut_they_find_to_one_connection() {
    println!("{} states", explore(Budget { timers: 1, crashes: 0, cuts: 1 }));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    /// Longer than what can be tried in every order.
    #[test]
    fn n11_n10_n1_crashes_cuts_and_slowness_at_random_end_in_one_connection(
        steps in prop::collection::vec((0_u8..22, any::<u16>()), 0..150)
    ) {
        let mut world = World::new();
        for (what, which) in steps {
            let on_their_way = world.on_their_way();
            let which = usize::from(which);
            let step = match what {
                0 => Step::Crash(which % 2),
                1 if !world.conns.is_empty() => Step::Cut(which % world.conns.len()),
                2..=5 => Step::Timer(which % 2),
                20 => Step::Told { who: which % 2, active: which & 2 == 0, life: which & 4 == 0 },
                21 => Step::Want(which % 2),
                _ if !on_their_way.is_empty() => on_their_way[which % on_their_way.len()],
                _ => Step::Timer(which % 2),
            };
            world.step(step);
        }
        // Whatever they were told: in the end both are active, and something is to be sent.
        for who in [0, 1] {
            world.step(Step::Told { who, active: true, life: false });
            world.step(Step::Want(who));
        }
        world.converge();
    }
}

/// A leader with one peer, `b`, at a virtual time.
fn leader() -> Peering {
    told("a", "b", [1; 16])
}

fn actions(peering: &mut Peering) -> Vec<Action> {
    std::iter::from_fn(|| peering.action()).collect()
}

#[test]
fn n11_an_earlier_life_is_refused_and_a_later_one_takes_over() {
    let mut a = leader();
    a.tick(0);
    assert_eq!(actions(&mut a), [Action::Dial { peer: 0, link: 1 }]);
    let link = a.accepted(0, 0, 10);
    let up = |link, incarnation| Action::Up { peer: 0, link, incarnation };
    assert_eq!(
        actions(&mut a),
        [
            Action::Say { link, word: Word::Welcome },
            Action::Say { link, word: Word::Confirm },
            Action::Close { link: 1 },
            up(link, 10)
        ]
    );
    let stale = a.accepted(0, 0, 9);
    assert_eq!(
        actions(&mut a),
        [
            Action::Say { link: stale, word: Word::Goodbye(Farewell::Stale) },
            Action::Close { link: stale },
            Action::Refused { peer: 0, loss: Loss::Stale { found: 9, known: 10 } }
        ]
    );
    let later = a.accepted(0, 0, 11);
    let done = actions(&mut a);
    assert!(done.contains(&Action::Down { peer: 0, link, loss: Loss::Restarted }), "{done:?}");
    assert_eq!(done.last(), Some(&up(later, 11)));
    // Nothing that a link which is gone still says is listened to.
    a.heard(0, link, Word::Confirm);
    a.gone(0, link, String::new());
    assert_eq!(actions(&mut a), []);
}

/// It dials only when it has no link left, so that what we have of it is dead: no need to wait until it is silent for long enough.
#[test]
fn n11_a_peer_that_dials_again_has_given_up_what_it_had() {
    for (name, up) in [("a", true), ("c", false)] {
        let mut peering = told(name, "b", [1; 16]);
        let first = peering.accepted(0, 0, 7);
        peering.heard(0, first, if up { Word::Pong } else { Word::Confirm });
        actions(&mut peering);
        let second = peering.accepted(0, 0, 7);
        let done = actions(&mut peering);
        assert!(done.contains(&Action::Close { link: first }), "{done:?}");
        assert!(done.contains(&Action::Down { peer: 0, link: first, loss: Loss::Redialed }), "{done:?}");
        assert_eq!(done.contains(&Action::Up { peer: 0, link: second, incarnation: 7 }), up, "{done:?}");
    }
}

/// G7: the table says which life of a peer is there. An earlier one, still connected, is given up, and refused from then on; that life itself, met before
/// we were told of it, is kept.
#[test]
fn r4_g7_who_is_told_of_a_later_life_gives_up_the_earlier_one() {
    let mut a = leader();
    let link = a.accepted(0, 0, 10);
    actions(&mut a);
    a.activate(S, 0, Some(12), true);
    let goodbye = |link, farewell| Action::Say { link, word: Word::Goodbye(farewell) };
    assert_eq!(
        actions(&mut a),
        [goodbye(link, Farewell::Spare), Action::Close { link }, Action::Down { peer: 0, link, loss: Loss::Moved }]
    );
    let earlier = a.accepted(S, 0, 10);
    assert!(actions(&mut a).contains(&goodbye(earlier, Farewell::Stale)));
    // It is dialed at once, without a pause.
    a.tick(S);
    assert!(matches!(actions(&mut a)[..], [Action::Dial { .. }]));
    let met = a.accepted(S, 0, 13);
    assert!(actions(&mut a).contains(&Action::Up { peer: 0, link: met, incarnation: 13 }));
    a.activate(2 * S, 0, Some(13), true);
    assert_eq!(actions(&mut a), [], "that life is up already");
    // Elsewhere, and nobody says which life that is: the one that is up may be an earlier one.
    a.activate(2 * S, 0, None, true);
    assert!(actions(&mut a).contains(&Action::Down { peer: 0, link: met, loss: Loss::Moved }));
}

#[test]
fn r4_who_is_not_active_is_not_dialed_and_not_let_in() {
    let mut a = leader();
    let link = a.accepted(0, 0, 10);
    actions(&mut a);
    a.deactivate(0, 11);
    let done = actions(&mut a);
    assert!(done.contains(&Action::Down { peer: 0, link, loss: Loss::NotActive }), "{done:?}");
    a.want(0);
    a.tick(S);
    assert_eq!((actions(&mut a), a.wake_ns()), (vec![], u64::MAX));
    let refused = a.accepted(S, 0, 12);
    assert!(actions(&mut a).contains(&Action::Say { link: refused, word: Word::Goodbye(Farewell::NotActive) }));
    // Active again, a life that is over is not let in, and the next one is.
    a.activate(2 * S, 0, None, false);
    assert_eq!(actions(&mut a), []);
    let stale = a.accepted(2 * S, 0, 10);
    assert!(actions(&mut a).contains(&Action::Say { link: stale, word: Word::Goodbye(Farewell::Stale) }));
    let up = a.accepted(2 * S, 0, 11);
    assert!(actions(&mut a).contains(&Action::Up { peer: 0, link: up, incarnation: 11 }));
}

#[test]
fn n1_a_silent_peer_is_asked_after_a_second_and_given_up_after_three() {
    let mut a = leader();
    let link = a.accepted(0, 0, 1);
    actions(&mut a);
    let (mut asked, mut lost) = (None, None);
    for now_ns in (0..8 * S).step_by(10_000_000) {
        a.tick(now_ns);
        for action in actions(&mut a) {
            match action {
                Action::Say { word: Word::Ping, .. } => asked = asked.or(Some(now_ns)),
                Action::Down { .. } => lost = lost.or(Some(now_ns)),
                _ => {}
            }
        }
    }
    assert_eq!((asked, lost), (Some(S), Some(3 * S)));
    // One that answers stays, for as long as it likes.
    let kept = a.accepted(8 * S, 0, 1);
    assert_ne!(kept, link);
    actions(&mut a);
    let mut pings = 0;
    for now_ns in (8 * S..60 * S).step_by(10_000_000) {
        a.tick(now_ns);
        for action in actions(&mut a) {
            assert_eq!(action, Action::Say { link: kept, word: Word::Ping });
            a.arrived(now_ns, kept);
            a.heard(now_ns, kept, Word::Pong);
            pings += 1;
        }
    }
    assert!((30..=52).contains(&pings), "{pings} in 52 s");
    // We were away ourselves: that is not the peer's silence, even if it had just been asked.
    a.tick(61 * S);
    a.tick(90 * S);
    let done = actions(&mut a);
    assert!(done.iter().all(|action| matches!(action, Action::Say { word: Word::Ping, .. })), "{done:?}");
}

#[test]
fn n11_a_peer_that_is_not_there_is_dialed_about_twice_a_second() {
    let mut a = leader();
    let (mut dials, mut now_ns) = (Vec::new(), 0);
    while now_ns < 100 * S {
        a.tick(now_ns);
        for action in actions(&mut a) {
            if let Action::Dial { link, .. } = action {
                dials.push(now_ns);
                a.gone(now_ns, link, "connection refused".into());
            }
        }
        now_ns = now_ns.max(a.wake_ns());
    }
    let early = dials.iter().filter(|at_ns| **at_ns < S).count();
    assert!((5..=40).contains(&early), "{early} in the first second");
    assert!((150..=300).contains(&dials.len()), "{} in 100 s", dials.len());
}

/// A peer that lets us in and falls over each time is not dialed the faster for it.
#[test]
fn n11_a_link_that_does_not_last_does_not_shorten_the_pause() {
    let mut a = leader();
    let (mut ups, mut now_ns) = (0, 0);
    while now_ns < 20 * S {
        a.tick(now_ns);
        while let Some(action) = a.action() {
            match action {
                Action::Dial { link, .. } => {
                    a.dialed(now_ns, link, 1);
                    a.heard(now_ns, link, Word::Welcome);
                }
                Action::Up { link, .. } => {
                    ups += 1;
                    a.gone(now_ns, link, "closed".into());
                }
                _ => {}
            }
        }
        now_ns = now_ns.max(a.wake_ns());
    }
    assert!((20..=80).contains(&ups), "{ups} in 20 s");
}

#[test]
fn n11_words_out_of_turn_end_a_link() {
    for (words, ours) in [
        (&[Word::Confirm][..], false),
        (&[Word::Welcome], false),
        (&[Word::Ping], true),
        (&[Word::Confirm], true),
        (&[Word::Welcome, Word::Welcome], true),
        (&[Word::Welcome, Word::Confirm], true),
    ] {
        let mut a = leader();
        a.tick(0);
        let link = if ours { 1 } else { a.accepted(0, 0, 1) };
        if ours {
            a.dialed(0, link, 1);
        }
        for word in words {
            a.heard(0, link, *word);
        }
        assert_eq!(a.peer_of(link), None, "{words:?}");
    }
}

#[test]
fn n11_who_stops_says_so_and_dials_no_more() {
    let mut a = leader();
    let link = a.accepted(0, 0, 1);
    actions(&mut a);
    a.stop();
    assert_eq!(actions(&mut a), [Action::Say { link, word: Word::Goodbye(Farewell::Stopping) }]);
    a.gone(0, link, "closed".into());
    a.tick(100 * S);
    a.accepted(100 * S, 0, 2);
    let done = actions(&mut a);
    assert!(!done.iter().any(|action| matches!(action, Action::Dial { .. } | Action::Up { .. })), "{done:?}");
    // The other one hears it, and looks for the next life.
    let mut b = told("b", "a", [2; 16]);
    let link = b.accepted(0, 0, 1);
    b.heard(0, link, Word::Confirm);
    b.heard(0, link, Word::Goodbye(Farewell::Stopping));
    let done = actions(&mut b);
    assert!(done.contains(&Action::Down { peer: 0, link, loss: Loss::Said(Farewell::Stopping) }), "{done:?}");
    b.tick(S);
    assert!(matches!(actions(&mut b)[..], [Action::Dial { .. }]));
}
