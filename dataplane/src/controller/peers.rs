//! Which connection joins two processes that were told of each other: found, watched and made again. Decides; has no clock and no socket.
//!
//! A peer is dialed when something is to be sent to it, and from then on whenever the connection is lost. Both may dial, so there may be two
//! connections, or three while one of them is dying. They have to agree on one without ever
//! sending anything that matters over another. So one decides: the **leader**, whose name is the smaller one. It confirms a link, one at a
//! time, and the other, the **follower**, takes the link that was confirmed. Nothing but greetings and heartbeats goes over a link that
//! is not, so none holds anything that could be lost with it, and a confirmed one is never given up for another to the same
//! life of the peer unless the other end has given it up before.
//!
//! | what happens | leader | follower |
//! |---|---|---|
//! | no link, and something to be sent or there was a link before; a pause is over | dials | dials |
//! | hello over on its own dial | waits for `Welcome` | waits for `Welcome` and `Confirm` |
//! | hello over on the other's dial | says `Welcome`; the link is ready | says `Welcome`, waits for `Confirm` |
//! | `Welcome` on its own dial | the link is ready | nothing: the leader knows |
//! | a link is ready, none is up | says `Confirm`, **up**, closes all others | |
//! | a link is ready, its own dial is up | holds it, in case the one that is up turns out to be dead | |
//! | `Confirm` | breaks the protocol | **up**, closes all others |
//! | another dial of the peer, same life | closes the earlier one: who dials has given it up | the same |
//! | a peer of a later life | closes all links to the earlier one | the same |
//! | a peer of an earlier life | refuses it: stale | the same |
//! | told that a peer is not active | closes all links to it, dials no more, refuses it | the same |
//! | told that it is elsewhere, or of a later life than the one that is up | closes all links, dials | the same |
//! | silent for 1 s, for 3 s; closed; `Goodbye` | `Ping`; closes it; the link is gone | the same |
//! | not up for 5 s | closes it | the same |
//! | the last link is gone | a pause, then dials | the same |
//!
//! `Welcome` is the responder's: a hello ends with the initiator's proof, which the responder may still refuse. `Confirm` needs no
//! answer: whatever the leader says after it comes after it.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};
use std::fmt;

use crate::client::delivery::BackOff;

/// A peer's number, given when we first hear of it and nobody else's after it.
pub(crate) type PeerNumber = usize;
/// Names a connection to a peer, or the attempt at one. Never used again.
pub(crate) type LinkNumber = u64;

/// How long connecting and the hello may take together.
const DIAL_NS: u64 = 2_000_000_000;
/// How long a link may stay without being confirmed: longer than it takes to find out that the one before is dead.
const CONFIRM_NS: u64 = 5_000_000_000;
/// A link that stood so long was worth having: the pauses begin anew.
const STEADY_NS: u64 = 1_000_000_000;
/// Silence after which a peer is asked whether it is there, and how long it has to answer.
const ASK_NS: u64 = 1_000_000_000;
const ANSWER_NS: u64 = 2_000_000_000;
/// Later than this to a tick, we were away ourselves: that time is not the peer's silence.
const AWAY_NS: u64 = 100_000_000;
/// Heartbeats of many peers are looked at together.
const TOGETHER_NS: u64 = 50_000_000;

/// What one end says to the other while nothing else is said.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Word {
    /// The responder's first: you are let in.
    Welcome,
    /// The leader's: this is the one.
    Confirm,
    Ping,
    Pong,
    /// The last: this connection ends, and why.
    Goodbye(Farewell),
}

/// Why an end closes a link that works.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u16)]
pub(crate) enum Farewell {
    /// The process ends.
    Stopping = 1,
    /// There is another link.
    Spare = 2,
    /// A later life of the process is known.
    Stale = 3,
    /// Nobody told it of this process.
    Unknown = 4,
    /// It was told that this process is not active.
    NotActive = 5,
}

impl Farewell {
    pub(crate) fn from_wire(number: u16) -> Option<Farewell> {
        [Farewell::Stopping, Farewell::Spare, Farewell::Stale, Farewell::Unknown, Farewell::NotActive]
            .into_iter()
            .find(|farewell| *farewell as u16 == number)
    }
}

impl fmt::Display for Farewell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Farewell::Stopping => "it stops",
            Farewell::Spare => "it has another connection with us",
            Farewell::Stale => "it knows a later life of us; end this one",
            Farewell::Unknown => "it was not told of us; give it --peer with our name, or a table of members with us",
            Farewell::NotActive => {
                "it was told that we are not active; a newer table of members has to say that we are"
            }
        })
    }
}

/// Why a link is gone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Loss {
    /// The connection ended, or was never made.
    Closed(String),
    /// Nothing came from it for so long.
    Silent { silent_ms: u64 },
    /// It said so.
    Said(Farewell),
    /// It dialed again, so it has given this one up.
    Redialed,
    /// It lives anew.
    Restarted,
    /// It said something out of turn.
    OutOfTurn(Word),
    /// It took too long.
    Late { waited_ms: u64 },
    /// It is an earlier life of the peer than one we met or were told of, or one that is over.
    Stale { found: u64, known: u64 },
    /// We were told that it is not active.
    NotActive,
    /// We were told that it is elsewhere, or of a later life of it.
    Moved,
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Loss::Closed(text) => f.write_str(text),
            Loss::Silent { silent_ms } => write!(f, "nothing came from it for {silent_ms} ms"),
            Loss::Said(farewell) => write!(f, "{farewell}"),
            Loss::Redialed => f.write_str("it has connected again"),
            Loss::Restarted => f.write_str("it was started anew"),
            Loss::OutOfTurn(word) => write!(f, "it said {word:?} out of turn"),
            Loss::Late { waited_ms } => write!(f, "it was not ready within {waited_ms} ms"),
            Loss::Stale { found, known } => {
                write!(f, "this is its life {found}, and none before {known} is let in; end whichever is the older one")
            }
            Loss::NotActive => f.write_str("we were told that it is not active"),
            Loss::Moved => f.write_str("we were told that it is elsewhere now, or of a later life of it"),
        }
    }
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Action {
    /// Connect to it and say hello; then [`Peering::dialed`] or [`Peering::gone`].
    Dial { peer: PeerNumber, link: LinkNumber },
    /// Say this on a link whose hello is over.
    Say { link: LinkNumber, word: Word },
    /// Close it; what was said on it before still goes out. It is not heard of again.
    Close { link: LinkNumber },
    /// From here on this is the connection with the peer.
    Up { peer: PeerNumber, link: LinkNumber, incarnation: u64 },
    /// From here on there is none.
    Down { peer: PeerNumber, link: LinkNumber, loss: Loss },
    /// There was none, and this is why there still is none.
    Failed { peer: PeerNumber, loss: Loss },
    /// Somebody who has its key, and is not it, was sent away.
    Refused { peer: PeerNumber, loss: Loss },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Connecting, or in the hello.
    Dialing,
    /// The hello is over, and we have not heard that they let us in.
    Greeted,
    /// Both know each other.
    Ready,
    Up {
        since_ns: u64,
    },
}

#[derive(Debug, Clone)]
struct Link {
    number: LinkNumber,
    /// We dialed it.
    ours: bool,
    stage: Stage,
    /// Until when it may stay in its stage, from when on.
    since_ns: u64,
    until_ns: u64,
    /// When something last came from it, and when it was asked for something.
    heard_ns: u64,
    asked_ns: Option<u64>,
}

#[derive(Debug, Clone)]
struct Peer {
    /// Our name is the smaller one.
    leads: bool,
    /// We may be connected with it.
    active: bool,
    /// There was something to be sent to it, or a connection with it.
    wanted: bool,
    /// The latest life of it that proved itself; 0 before the first.
    incarnation: u64,
    /// Earlier ones are refused.
    least: u64,
    /// Few: a dial, what it dialed, and the one that is up.
    links: Vec<Link>,
    back_off: BackOff,
    /// Not dialed before.
    pause_ns: u64,
}

/// All peers of a process.
#[derive(Debug, Clone)]
pub(crate) struct Peering {
    name: String,
    seed: [u8; 16],
    peers: Vec<Peer>,
    peer_of: BTreeMap<LinkNumber, PeerNumber>,
    links: LinkNumber,
    actions: VecDeque<Action>,
    wake_ns: u64,
    stopping: bool,
}

impl Peering {
    /// For a process of this name, which has no peers yet. `seed`: random, so that no two processes keep step.
    pub(crate) fn new(name: &str, seed: [u8; 16]) -> Peering {
        Peering {
            name: name.to_owned(),
            seed,
            peers: Vec::new(),
            peer_of: BTreeMap::new(),
            links: 0,
            actions: VecDeque::new(),
            wake_ns: 0,
            stopping: false,
        }
    }

    /// One more peer, of this name and the next number, which is not active yet.
    pub(crate) fn add(&mut self, name: &str) -> PeerNumber {
        let number = self.peers.len();
        let mut seed = self.seed;
        seed.iter_mut().zip((number as u64).to_le_bytes()).for_each(|(byte, with)| *byte ^= with);
        self.peers.push(Peer {
            leads: *self.name < *name,
            active: false,
            wanted: false,
            incarnation: 0,
            least: 0,
            links: Vec::new(),
            back_off: BackOff::new(seed),
            pause_ns: 0,
        });
        number
    }

    /// The next thing to do, in order.
    pub(crate) fn action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// When [`Peering::tick`] has to be called next, ns.
    pub(crate) fn wake_ns(&self) -> u64 {
        self.wake_ns
    }

    /// The peer of a link; `None` once it is closed.
    pub(crate) fn peer_of(&self, link: LinkNumber) -> Option<PeerNumber> {
        self.peer_of.get(&link).copied()
    }

    // ---- events -----------------------------------------------------------------------------------------------

    /// Time passes.
    pub(crate) fn tick(&mut self, now_ns: u64) {
        if now_ns < self.wake_ns {
            return;
        }
        let away_ns = Some(now_ns - self.wake_ns).filter(|late_ns| *late_ns > AWAY_NS);
        for peer in 0..self.peers.len() {
            if let Some(away_ns) = away_ns {
                self.peers[peer].links.iter_mut().for_each(|link| link.was_not_listened_to(now_ns, away_ns));
            }
            self.look_at_links(now_ns, peer);
            self.dial_when_due(now_ns, peer);
        }
        self.wake_ns = self.peers.iter().map(Peer::due_ns).min().unwrap_or(u64::MAX);
    }

    /// The hello on a link that we dialed is over: the peer has proved its name, and says which life of it this is.
    pub(crate) fn dialed(&mut self, now_ns: u64, link: LinkNumber, incarnation: u64) {
        let Some(peer) = self.peer_of(link) else { return };
        let known = self.peers[peer].least;
        if incarnation < known {
            self.say(link, Word::Goodbye(Farewell::Stale));
            return self.lose(now_ns, peer, link, Loss::Stale { found: incarnation, known });
        }
        self.meet(now_ns, peer, link, incarnation);
        self.link(peer, link).expect("the link of a peer").enter(now_ns, Stage::Greeted);
        self.wake_by(self.peers[peer].due_ns());
    }

    /// A peer has dialed us and proved its name. Names the link, which may be closed at once.
    pub(crate) fn accepted(&mut self, now_ns: u64, peer: PeerNumber, incarnation: u64) -> LinkNumber {
        let Peer { active, least: known, .. } = self.peers[peer];
        let refusal = match (self.stopping, active) {
            (true, _) => Some((Farewell::Stopping, None)),
            (_, false) => Some((Farewell::NotActive, Some(Loss::NotActive))),
            _ if incarnation < known => Some((Farewell::Stale, Some(Loss::Stale { found: incarnation, known }))),
            _ => None,
        };
        if let Some((farewell, loss)) = refusal {
            // Never one of its links: it does not disturb those, or the pause before the next dial.
            let link = self.refused(farewell);
            self.actions.extend(loss.map(|loss| Action::Refused { peer, loss }));
            return link;
        }
        let number = self.name_link(peer);
        let mut link = Link::new(number, false);
        link.enter(now_ns, Stage::Ready);
        self.peers[peer].links.push(link);
        // Before it can be confirmed.
        self.say(number, Word::Welcome);
        self.meet(now_ns, peer, number, incarnation);
        let earlier = |link: &&Link| !link.ours && link.number != number;
        while let Some(link) = self.peers[peer].links.iter().find(earlier).map(|link| link.number) {
            self.lose(now_ns, peer, link, Loss::Redialed);
        }
        self.settle(now_ns, peer);
        self.wake_by(self.peers[peer].due_ns());
        number
    }

    /// Somebody has dialed us whom we do not want. Names the link, which is closed at once.
    pub(crate) fn refused(&mut self, farewell: Farewell) -> LinkNumber {
        self.links += 1;
        self.say(self.links, Word::Goodbye(farewell));
        self.actions.push_back(Action::Close { link: self.links });
        self.links
    }

    /// Bytes came over a link.
    pub(crate) fn arrived(&mut self, now_ns: u64, link: LinkNumber) {
        let Some(peer) = self.peer_of(link) else { return };
        let link = self.link(peer, link).expect("the link of a peer");
        let was_asked = link.asked_ns.is_some();
        link.heard(now_ns);
        if was_asked {
            // Sooner than it would have been given up.
            let due_ns = link.due_ns();
            self.wake_by(due_ns);
        }
    }

    /// The other end says this on a link whose hello is over.
    pub(crate) fn heard(&mut self, now_ns: u64, link: LinkNumber, word: Word) {
        let Some(peer) = self.peer_of(link) else { return };
        let leads = self.peers[peer].leads;
        let stage = self.link(peer, link).expect("the link of a peer").stage;
        match (word, stage) {
            (Word::Goodbye(farewell), _) => self.lose(now_ns, peer, link, Loss::Said(farewell)),
            (Word::Welcome, Stage::Greeted) => {
                self.link(peer, link).expect("found above").stage = Stage::Ready;
                self.settle(now_ns, peer);
            }
            (Word::Confirm, Stage::Ready) if !leads => self.raise(now_ns, peer, link),
            (Word::Ping, Stage::Ready | Stage::Up { .. }) => self.say(link, Word::Pong),
            (Word::Pong, Stage::Ready | Stage::Up { .. }) => {}
            (word, _) => self.lose(now_ns, peer, link, Loss::OutOfTurn(word)),
        }
    }

    /// A link has ended: closed by the other end or broken, or its dial or hello has failed.
    pub(crate) fn gone(&mut self, now_ns: u64, link: LinkNumber, text: String) {
        if let Some(peer) = self.peer_of(link) {
            self.lose(now_ns, peer, link, Loss::Closed(text));
        }
    }

    /// The process ends: whoever is connected is told, and nobody is dialed any more.
    pub(crate) fn stop(&mut self) {
        self.stopping = true;
        for peer in &mut self.peers {
            peer.wanted = false;
            for link in peer.links.iter().filter(|link| link.stage != Stage::Dialing) {
                self.actions.push_back(Action::Say { link: link.number, word: Word::Goodbye(Farewell::Stopping) });
            }
        }
    }

    /// Something is to be sent to a peer: it is dialed when it is active, unless there is a link already.
    pub(crate) fn want(&mut self, peer: PeerNumber) {
        let found = &mut self.peers[peer];
        if !found.wanted && found.active && !self.stopping {
            found.wanted = true;
            let due_ns = found.due_ns();
            self.wake_by(due_ns);
        }
    }

    /// A peer may be connected with. `life`: which life of it that is, if we were told. `moved`: it is elsewhere than before, or of a later life; what
    /// is connected is given up then, unless it is that life.
    pub(crate) fn activate(&mut self, now_ns: u64, peer: PeerNumber, life: Option<u64>, moved: bool) {
        let found = &mut self.peers[peer];
        (found.active, found.least) = (true, found.least.max(life.unwrap_or(0)));
        let is_met = life.is_some_and(|life| found.incarnation >= life);
        let given_up = |link: &&Link| moved && (link.stage == Stage::Dialing || !is_met);
        if moved {
            // Why it could not be reached is no reason any more.
            found.back_off.reset();
            found.pause_ns = now_ns;
        }
        while let Some(link) = self.peers[peer].links.iter().find(given_up).map(|link| link.number) {
            self.give_up(peer, link, Farewell::Spare, Loss::Moved);
        }
        self.settle(now_ns, peer);
        self.wake_by(self.peers[peer].due_ns());
    }

    /// A peer is not to be connected with, until it is [active](Peering::activate) again, and then not with a life before `least`.
    pub(crate) fn deactivate(&mut self, peer: PeerNumber, least: u64) {
        let found = &mut self.peers[peer];
        (found.active, found.wanted, found.least) = (false, false, found.least.max(least));
        while let Some(link) = self.peers[peer].links.first().map(|link| link.number) {
            self.give_up(peer, link, Farewell::NotActive, Loss::NotActive);
        }
    }

    // ---- decisions --------------------------------------------------------------------------------------------

    /// A life of a peer, none earlier than those before, has proved itself on this link. All links to an earlier one are over.
    fn meet(&mut self, now_ns: u64, peer: PeerNumber, link: LinkNumber, incarnation: u64) {
        if incarnation == self.peers[peer].incarnation {
            return;
        }
        (self.peers[peer].incarnation, self.peers[peer].least) = (incarnation, incarnation);
        // A dial may lead to any of its lives.
        let earlier = |other: &&Link| other.number != link && other.stage != Stage::Dialing;
        while let Some(link) = self.peers[peer].links.iter().find(earlier).map(|link| link.number) {
            self.lose(now_ns, peer, link, Loss::Restarted);
        }
    }

    /// The leader confirms a link when one is ready and none is up.
    fn settle(&mut self, now_ns: u64, peer: PeerNumber) {
        let Peer { leads, links, .. } = &self.peers[peer];
        if !leads || self.stopping || links.iter().any(|link| link.is_up()) {
            return;
        }
        let ready = |ours| links.iter().find(|link| link.stage == Stage::Ready && link.ours == ours);
        if let Some(link) = ready(true).or(ready(false)).map(|link| link.number) {
            self.say(link, Word::Confirm);
            self.raise(now_ns, peer, link);
        }
    }

    /// This is the connection now; all others are closed.
    fn raise(&mut self, now_ns: u64, peer: PeerNumber, link: LinkNumber) {
        let others = |other: &&Link| other.number != link;
        while let Some(other) = self.peers[peer].links.iter().find(others).map(|link| link.number) {
            // An end that confirms another has given up the one that was up.
            self.give_up(peer, other, Farewell::Spare, Loss::Redialed);
        }
        let found = self.link(peer, link).expect("a link that is ready");
        found.stage = Stage::Up { since_ns: now_ns };
        found.until_ns = u64::MAX;
        let incarnation = self.peers[peer].incarnation;
        self.peers[peer].wanted = true;
        self.actions.push_back(Action::Up { peer, link, incarnation });
    }

    /// Closes a link that may be a good one; the other end is told why.
    fn give_up(&mut self, peer: PeerNumber, link: LinkNumber, farewell: Farewell, loss: Loss) {
        let stage = self.link(peer, link).expect("the link of a peer").stage;
        if stage != Stage::Dialing {
            self.say(link, Word::Goodbye(farewell));
        }
        self.remove(peer, link, loss);
    }

    /// Closes a link, forgets it and says so when it was the connection. What it was.
    fn remove(&mut self, peer: PeerNumber, link: LinkNumber, loss: Loss) -> Stage {
        let links = &mut self.peers[peer].links;
        let at = links.iter().position(|other| other.number == link).expect("the link of a peer");
        let removed = links.swap_remove(at);
        self.peer_of.remove(&link);
        self.actions.push_back(Action::Close { link });
        match removed.stage {
            Stage::Up { .. } => self.actions.push_back(Action::Down { peer, link, loss }),
            _ if links.is_empty() => self.actions.push_back(Action::Failed { peer, loss }),
            _ => {}
        }
        removed.stage
    }

    /// A link is gone: another takes its place, or one is dialed after a pause.
    fn lose(&mut self, now_ns: u64, peer: PeerNumber, link: LinkNumber, loss: Loss) {
        let stage = self.remove(peer, link, loss);
        let found = &mut self.peers[peer];
        if matches!(stage, Stage::Up { since_ns } if now_ns >= since_ns + STEADY_NS) {
            found.back_off.reset();
        }
        if found.links.is_empty() && !self.stopping {
            found.pause_ns = now_ns + found.back_off.next_ns();
            let due_ns = found.due_ns();
            self.wake_by(due_ns);
        }
        self.settle(now_ns, peer);
    }

    fn dial_when_due(&mut self, now_ns: u64, peer: PeerNumber) {
        if now_ns < self.peers[peer].dial_ns() || self.stopping {
            return;
        }
        let number = self.name_link(peer);
        let mut link = Link::new(number, true);
        link.enter(now_ns, Stage::Dialing);
        self.peers[peer].links.push(link);
        self.actions.push_back(Action::Dial { peer, link: number });
    }

    /// Gives up what takes too long, asks the silent and gives up the deaf.
    fn look_at_links(&mut self, now_ns: u64, peer: PeerNumber) {
        let numbers: Vec<LinkNumber> =
            self.peers[peer].links.iter().filter(|link| link.due_ns() <= now_ns).map(|link| link.number).collect();
        for number in numbers {
            let Some(link) = self.link(peer, number) else { continue };
            if now_ns >= link.until_ns {
                let waited_ms = (now_ns - link.since_ns) / 1_000_000;
                self.lose(now_ns, peer, number, Loss::Late { waited_ms });
                continue;
            }
            match link.asked_ns {
                Some(_) => {
                    let silent_ms = (now_ns - link.heard_ns) / 1_000_000;
                    self.lose(now_ns, peer, number, Loss::Silent { silent_ms });
                }
                None => {
                    link.asked_ns = Some(now_ns);
                    // Whoever has not let us in yet owes us a word anyway.
                    if link.stage != Stage::Greeted {
                        self.say(number, Word::Ping);
                    }
                }
            }
        }
    }

    fn say(&mut self, link: LinkNumber, word: Word) {
        self.actions.push_back(Action::Say { link, word });
    }

    fn name_link(&mut self, peer: PeerNumber) -> LinkNumber {
        self.links += 1;
        self.peer_of.insert(self.links, peer);
        self.links
    }

    fn link(&mut self, peer: PeerNumber, number: LinkNumber) -> Option<&mut Link> {
        self.peers[peer].links.iter_mut().find(|link| link.number == number)
    }

    fn wake_by(&mut self, at_ns: u64) {
        self.wake_ns = self.wake_ns.min(at_ns);
    }
}

impl Peer {
    /// When to dial.
    fn dial_ns(&self) -> u64 {
        if self.active && self.wanted && self.links.is_empty() { self.pause_ns } else { u64::MAX }
    }

    fn due_ns(&self) -> u64 {
        self.links.iter().map(Link::due_ns).fold(self.dial_ns(), u64::min)
    }
}

impl Link {
    fn new(number: LinkNumber, ours: bool) -> Link {
        Link { number, ours, stage: Stage::Dialing, since_ns: 0, until_ns: 0, heard_ns: 0, asked_ns: None }
    }

    fn enter(&mut self, now_ns: u64, stage: Stage) {
        (self.stage, self.since_ns) = (stage, now_ns);
        self.until_ns = now_ns + if stage == Stage::Dialing { DIAL_NS } else { CONFIRM_NS };
        self.heard(now_ns);
    }

    fn heard(&mut self, now_ns: u64) {
        (self.heard_ns, self.asked_ns) = (now_ns, None);
    }

    fn was_not_listened_to(&mut self, now_ns: u64, away_ns: u64) {
        // And a moment to read what came meanwhile.
        let later = |at_ns: u64| (at_ns + away_ns + AWAY_NS).min(now_ns);
        (self.heard_ns, self.asked_ns) = (later(self.heard_ns), self.asked_ns.map(later));
    }

    fn is_up(&self) -> bool {
        matches!(self.stage, Stage::Up { .. })
    }

    fn due_ns(&self) -> u64 {
        let silence_ns = match (self.stage, self.asked_ns) {
            (Stage::Dialing, _) => u64::MAX,
            (_, None) => (self.heard_ns + ASK_NS).next_multiple_of(TOGETHER_NS),
            (_, Some(asked_ns)) => (asked_ns + ANSWER_NS).next_multiple_of(TOGETHER_NS),
        };
        self.until_ns.min(silence_ns)
    }
}
