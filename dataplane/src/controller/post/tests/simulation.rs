//! Two ends joined by links that keep order and lose all that is under way when they break, each direction when it likes; ends
//! that notice late, restart, refuse, call off and lose patience. One seed, one history.
//!
//! Checked all along: what arrives is new to the receiver, and later than all that came before; a ticket ends once, in a way
//! that has a reason; the bounds hold. Checked at the end, when the link stays up: every ticket has ended, nothing is kept.
#![allow(clippy::cast_possible_truncation, reason = "dice are cut to size on purpose")]

use super::*;

/// A splitmix64 generator.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }

    fn one_in(&mut self, chances: u64) -> bool {
        self.below(chances) == 0
    }
}

/// The name of a parcel: in which life of its sender, and as which, it was sent. Ascending.
type Name = (u64, u64);

#[derive(Debug, Clone, Copy)]
enum Packet {
    /// The first to the end that does not lead: this is the link.
    Confirm,
    Parcel {
        number: u64,
        confirmed: u64,
        name: Name,
    },
    Verdict(u64, Verdict),
}

/// A connection. `[0]` is what goes *to* the first end, `[1]` to the second.
#[derive(Debug)]
struct Conn {
    pipes: [VecDeque<Packet>; 2],
    cut: [bool; 2],
}

#[derive(Debug)]
struct Sent {
    name: Name,
    deadline_ns: u64,
    cancelled: bool,
}

struct Side {
    life: u64,
    outbox: Outbox<Parcel>,
    inbox: Inbox,
    /// The connection it believes in.
    conn: Option<usize>,
    tickets: u64,
    open: BTreeMap<Ticket, Sent>,
    /// Parcels in its outbox.
    kept: BTreeMap<Name, usize>,
    /// What arrived and has no verdict yet.
    dues: VecDeque<(Due, Name)>,
    /// What arrived in any of its lives, and what became of it.
    arrived: BTreeMap<Name, Option<Verdict>>,
    /// What must not arrive at it: its sender was told so.
    never: BTreeSet<Name>,
}

impl Side {
    fn new(bounds: Bounds, life: u64) -> Side {
        Side {
            life,
            outbox: Outbox::new(bounds),
            inbox: Inbox::new(bounds.window),
            conn: None,
            tickets: 0,
            open: BTreeMap::new(),
            kept: BTreeMap::new(),
            dues: VecDeque::new(),
            arrived: BTreeMap::new(),
            never: BTreeSet::new(),
        }
    }

    fn down(&mut self) {
        if self.conn.take().is_some() {
            self.outbox.down();
            self.inbox.down();
        }
    }

    fn up(&mut self, conn: usize, life: u64) {
        self.down();
        self.conn = Some(conn);
        self.outbox.up(life);
        self.inbox.up(life);
    }
}

/// What happened how often.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Counts {
    pub(super) stored: u64,
    pub(super) refused: u64,
    pub(super) lost: u64,
    pub(super) timed_out: [u64; 2],
    pub(super) cancelled: [u64; 2],
    pub(super) gone: [u64; 2],
    pub(super) again: u64,
    pub(super) full: u64,
    pub(super) stale_dues: u64,
}

struct World {
    dice: Dice,
    now_ns: u64,
    bounds: Bounds,
    sides: [Side; 2],
    conns: Vec<Conn>,
    restarts: bool,
    counts: Counts,
}

impl World {
    fn new(seed: u64) -> World {
        let mut dice = Dice(seed);
        let bounds = Bounds {
            parcels_max: 1 + dice.below(10) as usize,
            bytes_max: 1 + dice.below(40) as usize,
            window: 1 + dice.below(8),
        };
        let sides = [Side::new(bounds, 1), Side::new(bounds, 1)];
        let restarts = dice.one_in(2);
        World { dice, now_ns: 1, bounds, sides, conns: Vec::new(), restarts, counts: Counts::default() }
    }

    fn put(&mut self, from: usize, packet: Packet) {
        let conn = self.sides[from].conn.expect("nobody speaks without a link");
        let conn = &mut self.conns[conn];
        if !conn.cut[1 - from] {
            conn.pipes[1 - from].push_back(packet);
        }
    }

    fn cut(&mut self, to: usize) {
        if let Some(conn) = self.conns.last_mut() {
            conn.cut[to] = true;
            conn.pipes[to].clear();
        }
    }

    fn is_cut(&self) -> bool {
        self.conns.last().is_none_or(|conn| conn.cut[0] || conn.cut[1])
    }

    /// A new connection. The first end leads: it is up at once, and the other when it hears of it.
    fn connect(&mut self) {
        (0..2).for_each(|to| self.cut(to));
        self.conns.push(Conn { pipes: [VecDeque::new(), VecDeque::new()], cut: [false; 2] });
        let life = self.sides[1].life;
        self.sides[0].up(self.conns.len() - 1, life);
        self.act(0);
        self.put(0, Packet::Confirm);
    }

    fn restart(&mut self, who: usize) {
        (0..2).for_each(|to| self.cut(to));
        let life = self.sides[who].life + 1;
        let old = std::mem::replace(&mut self.sides[who], Side::new(self.bounds, life));
        // What arrived, arrived; a verdict that was not given never is.
        self.sides[who].arrived = old.arrived;
        self.sides[who].never = old.never;
        // What it had to send died with it.
        let other = &mut self.sides[1 - who];
        other.never.extend(old.kept.into_keys().filter(|name| !other.arrived.contains_key(name)));
        if self.dice.one_in(2) {
            // The other end is told that this one was stopped, before it is started anew.
            other.down();
            other.outbox.close();
            assert_eq!(other.outbox.holds(), (0, 0));
            self.act(1 - who);
        }
    }

    /// It closes a connection that is broken. What it sent before may still arrive.
    fn notice(&mut self, who: usize) {
        let has_last = self.sides[who].conn == Some(self.conns.len().wrapping_sub(1));
        if has_last && self.is_cut() {
            self.cut(who);
        }
        if !has_last || self.is_cut() {
            self.sides[who].down();
        }
    }

    fn send(&mut self, who: usize) {
        let bytes = self.dice.below(12) as usize;
        let deadline_ns = if self.dice.one_in(3) { self.now_ns + self.dice.below(60) } else { u64::MAX };
        let side = &mut self.sides[who];
        side.tickets += 1;
        let (ticket, name) = (side.tickets, (side.life, side.tickets));
        let (has, has_bytes) = (side.kept.len(), side.kept.values().sum::<usize>());
        let Bounds { parcels_max, bytes_max, .. } = self.bounds;
        let fits = has < parcels_max && has_bytes + bytes <= bytes_max;
        match side.outbox.send(ticket, Parcel { name, bytes }, deadline_ns) {
            Ok(()) => {
                assert!(fits, "{has} parcels, {has_bytes} + {bytes} bytes");
                side.open.insert(ticket, Sent { name, deadline_ns, cancelled: false });
                side.kept.insert(name, bytes);
            }
            Err(Full { parcel, .. }) => {
                assert!(!fits && parcel.name == name, "{has} parcels, {has_bytes} + {bytes} bytes");
                self.counts.full += 1;
            }
        }
    }

    /// Puts on the link what there is.
    fn pump(&mut self, who: usize, packets: u64) {
        for _ in 0..packets {
            let side = &mut self.sides[who];
            let verdict = side.inbox.next_verdict().map(|(number, verdict)| Packet::Verdict(number, verdict));
            let packet = verdict.or_else(|| {
                let Dispatch { number, confirmed, parcel } = side.outbox.next_to_send()?;
                assert!(number - confirmed < self.bounds.window);
                Some(Packet::Parcel { number, confirmed, name: parcel.name })
            });
            let Some(packet) = packet else { return };
            self.put(who, packet);
        }
    }

    fn deliver(&mut self, to: usize) {
        let Some(conn) = self.conns.last_mut() else { return };
        let Some(packet) = conn.pipes[to].pop_front() else { return };
        let (life, last) = (self.sides[1 - to].life, self.conns.len() - 1);
        let side = &mut self.sides[to];
        match packet {
            Packet::Confirm => side.up(last, life),
            Packet::Parcel { number, confirmed, name } => match side.inbox.arrived(number, confirmed) {
                Ok(Arrived::New(due)) => {
                    let before = side.arrived.last_key_value().map(|(name, _)| *name);
                    assert!(before < Some(name), "{name:?} arrived after {before:?}");
                    assert!(
                        !side.never.contains(&name),
                        "{name:?} arrived, and its sender was told that it never will"
                    );
                    side.arrived.insert(name, None);
                    side.dues.push_back((due, name));
                }
                Ok(Arrived::Again) => {
                    assert!(side.arrived.contains_key(&name));
                    self.counts.again += 1;
                }
                Err(violation) => panic!("{violation}"),
            },
            Packet::Verdict(number, verdict) => side.outbox.verdict(number, verdict).expect("it was to come"),
        }
        assert!(side.inbox.remembers() as u64 <= self.bounds.window);
        self.act(to);
    }

    fn settle(&mut self, who: usize) {
        let verdict = match self.dice.below(4) {
            0 => Verdict::Refused(if self.dice.one_in(2) { Code::Busy } else { Code::TooLarge }),
            _ => Verdict::Stored,
        };
        let side = &mut self.sides[who];
        let Some((due, name)) = side.dues.pop_front() else { return };
        self.counts.stale_dues += u64::from(due.life < self.sides[1 - who].life);
        self.sides[who].inbox.settled(due, verdict);
        self.sides[who].arrived.insert(name, Some(verdict));
    }

    fn act(&mut self, who: usize) {
        while let Some(action) = self.sides[who].outbox.action() {
            match action {
                Action::End { ticket, end } => {
                    let sent = self.sides[who].open.remove(&ticket).expect("a ticket ends once");
                    self.ended(who, &sent, end);
                }
                Action::Discard(parcel) => {
                    let kept = self.sides[who].kept.remove(&parcel.name);
                    assert_eq!(kept, Some(parcel.bytes), "discarded once");
                }
            }
        }
        let kept = &self.sides[who].kept;
        assert_eq!(self.sides[who].outbox.holds(), (kept.len(), kept.values().sum()));
    }

    fn ended(&mut self, from: usize, sent: &Sent, end: End) {
        let to = &mut self.sides[1 - from];
        let arrived = to.arrived.get(&sent.name).copied();
        let mut not_sent = || {
            assert_eq!(arrived, None, "{:?} was not sent", sent.name);
            to.never.insert(sent.name);
        };
        match end {
            End::Said(verdict) => {
                assert_eq!(arrived, Some(Some(verdict)), "{:?} was said to be {verdict:?}", sent.name);
                *(if verdict == Verdict::Stored { &mut self.counts.stored } else { &mut self.counts.refused }) += 1;
            }
            End::TimedOut { sent: was_sent } => {
                assert!(sent.deadline_ns <= self.now_ns);
                self.counts.timed_out[usize::from(was_sent)] += 1;
                if !was_sent {
                    not_sent();
                }
            }
            End::Cancelled { sent: was_sent } => {
                assert!(sent.cancelled);
                self.counts.cancelled[usize::from(was_sent)] += 1;
                if !was_sent {
                    not_sent();
                }
            }
            End::Gone { sent: was_sent } => {
                assert!(self.sides[1 - from].life > 1, "gone, and the peer never restarted");
                self.counts.gone[usize::from(was_sent)] += 1;
                if !was_sent {
                    self.sides[1 - from].never.insert(sent.name);
                    assert_eq!(arrived, None, "{:?} was not sent", sent.name);
                }
            }
            End::Lost => {
                assert!(self.sides[1 - from].life > 1, "lost, and the peer never restarted");
                self.counts.lost += 1;
            }
        }
    }

    fn cancel(&mut self, who: usize) {
        let side = &mut self.sides[who];
        let ticket = self.dice.below(side.tickets + 1);
        if let Some(sent) = side.open.get_mut(&ticket) {
            sent.cancelled = true;
            assert!(side.outbox.cancel(ticket));
        } else {
            assert!(!side.outbox.cancel(ticket));
        }
        self.act(who);
    }

    fn tick(&mut self, who: usize) {
        self.sides[who].outbox.tick(self.now_ns);
        self.act(who);
        let due_ns = self.sides[who].open.values().map(|sent| sent.deadline_ns).min();
        assert_eq!(self.sides[who].outbox.wake_ns(), due_ns.unwrap_or(u64::MAX));
    }

    fn step(&mut self) {
        let who = self.dice.below(2) as usize;
        match self.dice.below(100) {
            0..20 => self.send(who),
            20..40 if self.sides[who].conn.is_some() => {
                let packets = self.dice.below(6);
                self.pump(who, packets);
            }
            40..70 => self.deliver(who),
            70..82 => self.settle(who),
            82..86 => self.cancel(who),
            86..90 => {
                self.now_ns += self.dice.below(20);
                self.tick(who);
            }
            90..92 => self.cut(who),
            92..95 => self.notice(who),
            95..99 if self.is_cut() => self.connect(),
            99 if self.restarts && self.dice.one_in(3) => self.restart(who),
            _ => {}
        }
    }

    /// The link stays up, and everybody does what there is to do.
    fn settle_down(&mut self) {
        if self.is_cut() {
            self.connect();
        }
        for _ in 0..1000 {
            for who in 0..2 {
                self.deliver(who);
                self.settle(who);
                if self.sides[who].conn == Some(self.conns.len() - 1) {
                    self.pump(who, 2);
                }
            }
            let idle = |side: &Side| side.open.is_empty() && side.kept.is_empty() && side.dues.is_empty();
            if self.sides.iter().all(idle) {
                break;
            }
        }
        for side in &self.sides {
            assert!(side.open.is_empty(), "tickets that have not ended: {:?}", side.open);
            assert_eq!(side.outbox.holds(), (0, 0));
            assert!(side.outbox.place_of.is_empty() && side.outbox.deadlines.is_empty() && side.dues.is_empty());
        }
    }
}

pub(super) fn simulate(seed: u64, steps: u32) -> Counts {
    let mut world = World::new(seed);
    for _ in 0..steps {
        world.step();
    }
    world.settle_down();
    world.counts
}
