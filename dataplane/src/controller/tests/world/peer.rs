//! Links between processes, as `runtime/peers.rs` has them.

use super::link::Frame;
use super::load::Parcel;
use super::*;
use crate::controller::peers::{Action as LinkAction, LinkNumber, PeerNumber};
use crate::controller::post::{Action as PostAction, Arrived, Dispatch, Inbox, Outbox};

/// Frames on a connection beyond which parcels wait in their outbox.
const BACKLOG_MAX: usize = 6;

/// What goes to and comes from one other process.
#[derive(Debug)]
pub(super) struct Target {
    up: Option<LinkNumber>,
    life: u64,
    pub(super) outbox: Outbox<Parcel>,
    pub(super) inbox: Inbox,
}

impl Target {
    pub(super) fn new(plan: &Plan) -> Target {
        Target { up: None, life: 0, outbox: Outbox::new(plan.parcels), inbox: Inbox::new(plan.parcels.window) }
    }
}

impl Process {
    pub(super) fn peers_wake_ns(&self) -> u64 {
        let peering_ns = if self.is_admitted { self.peering.wake_ns() } else { u64::MAX };
        self.targets.iter().map(|target| target.outbox.wake_ns()).fold(peering_ns, u64::min)
    }
}

impl World {
    /// The others, in the order of their numbers.
    pub(super) fn peers_of(&self, node: NodeId) -> impl Iterator<Item = NodeId> + use<> {
        (0..self.nodes.len()).filter(move |other| *other != node)
    }

    pub(super) fn node_of(&self, node: NodeId, peer: PeerNumber) -> NodeId {
        if peer < node { peer } else { peer + 1 }
    }

    /// The peer whose link this connection carries.
    pub(super) fn peer_on(&mut self, node: NodeId, conn: ConnId) -> Option<PeerNumber> {
        let process = self.process(node);
        process.peering.peer_of(*process.link_on.get(&conn)?)
    }

    pub(super) fn tend_peers(&mut self, node: NodeId) {
        let now_ns = self.agenda.now_ns;
        let process = self.process(node);
        if process.is_admitted {
            process.peering.tick(now_ns);
            self.act_links(node);
        }
        for peer in 0..self.process(node).targets.len() {
            self.process(node).targets[peer].outbox.tick(now_ns);
            self.note_ends(node, peer);
        }
    }

    fn act_links(&mut self, node: NodeId) {
        while let Some(action) = self.process(node).peering.action() {
            self.say(|| format!("process {node}: {action:?}"));
            match action {
                LinkAction::Dial { peer, link } => self.dial(node, peer, link),
                LinkAction::Say { link, word } => {
                    if let Some((conn, end)) = self.conn_of(node, link) {
                        self.put(conn, 1 - end, Frame::Word(word));
                    }
                }
                LinkAction::Close { link } => {
                    if let Some((conn, end)) = self.conn_of(node, link) {
                        self.close(conn, end);
                    }
                    let process = self.process(node);
                    if let Some(conn) = process.links.remove(&link) {
                        process.link_on.remove(&conn);
                    }
                }
                LinkAction::Up { peer, link, incarnation } => {
                    let target = &mut self.process(node).targets[peer];
                    let is_reborn = target.life != 0 && target.life != incarnation;
                    (target.life, target.up) = (incarnation, Some(link));
                    target.outbox.up(incarnation);
                    target.inbox.up(incarnation);
                    self.note_ends(node, peer);
                    if is_reborn {
                        self.reborn(node, peer);
                    }
                    self.pump(node, peer);
                }
                LinkAction::Down { peer, .. } => {
                    let target = &mut self.process(node).targets[peer];
                    target.up = None;
                    target.outbox.down();
                    target.inbox.down();
                    self.note_ends(node, peer);
                }
                LinkAction::Failed { .. } | LinkAction::Refused { .. } => {}
            }
        }
    }

    fn conn_of(&mut self, node: NodeId, link: LinkNumber) -> Option<(ConnId, usize)> {
        let party = self.party(node);
        let conn = *self.process(node).links.get(&link)?;
        Some((conn, self.end_of(conn, party)?))
    }

    fn dial(&mut self, node: NodeId, peer: PeerNumber, link: LinkNumber) {
        let (party, other) = (self.party(node), self.node_of(node, peer));
        let there = self.nodes[other].process.as_ref().map(|process| (process.life, process.is_admitted));
        let conn = self.connect([party, Party::Process { node: other, life: there.map_or(0, |(life, _)| life) }]);
        let process = self.process(node);
        process.links.insert(link, conn);
        process.link_on.insert(conn, link);
        match there {
            Some((life, true)) => self.put(conn, 0, Frame::Greeted { life }),
            // Refused, or there is no host to do so.
            _ if self.dice.one_in(3) => self.cut(conn, false),
            _ => self.put(conn, 0, Frame::End),
        }
    }

    /// A frame comes from another process.
    pub(super) fn hear_peer(&mut self, node: NodeId, conn: ConnId, frame: Frame) {
        let now_ns = self.agenda.now_ns;
        let party = self.party(node);
        let Some(end) = self.end_of(conn, party) else { return };
        let own_life = self.process(node).life;
        let link = self.process(node).link_on.get(&conn).copied();
        match (frame, link) {
            (Frame::Greeted { life }, Some(link)) => {
                self.put(conn, 1 - end, Frame::Proof { life: own_life });
                self.process(node).peering.dialed(now_ns, link, life);
            }
            (Frame::Proof { life }, None) => {
                let Party::Process { node: other, .. } = self.conns[&conn].ends[1 - end] else {
                    unreachable!("a process")
                };
                let peer = self.peers_of(node).position(|known| known == other).expect("all know all");
                let process = self.process(node);
                let link = process.peering.accepted(now_ns, peer, life);
                process.links.insert(link, conn);
                process.link_on.insert(conn, link);
            }
            (Frame::End, Some(link)) => self.process(node).peering.gone(now_ns, link, String::new()),
            (Frame::Word(word), Some(link)) => {
                let process = self.process(node);
                process.peering.arrived(now_ns, link);
                process.peering.heard(now_ns, link, word);
            }
            (Frame::Parcel { number, confirmed, kind, key, name, bytes }, Some(link)) => {
                let peer = self.on_link_that_is_up(node, link);
                match self.process(node).targets[peer].inbox.arrived(number, confirmed) {
                    Ok(Arrived::New(due)) => {
                        let verdict = self.on_parcel(node, peer, kind.off_the_wire(now_ns), &key, name, bytes);
                        self.process(node).targets[peer].inbox.settled(due, verdict);
                    }
                    Ok(Arrived::Again) => self.checker.counts.again += 1,
                    Err(violation) => panic!("G3: {violation}"),
                }
                self.pump(node, peer);
            }
            (Frame::Verdict { number, verdict }, Some(link)) => {
                let peer = self.on_link_that_is_up(node, link);
                let said = self.process(node).targets[peer].outbox.verdict(number, verdict);
                said.unwrap_or_else(|violation| panic!("G3: {violation}"));
                self.note_ends(node, peer);
                self.pump(node, peer);
            }
            // It was closed meanwhile.
            (_, None) => return,
            (frame, _) => panic!("a process says {frame:?} out of turn"),
        }
        self.act_links(node);
        let delay_ns = self.dice.between(1_000, 50_000);
        self.wake(node, delay_ns);
    }

    /// Only there goes what matters.
    fn on_link_that_is_up(&mut self, node: NodeId, link: LinkNumber) -> PeerNumber {
        let now_ns = self.agenda.now_ns;
        let process = self.process(node);
        process.peering.arrived(now_ns, link);
        let peer = process.peering.peer_of(link).expect("the link of a connection is known");
        assert_eq!(process.targets[peer].up, Some(link), "a parcel on a link that is not agreed on");
        peer
    }

    /// Puts on the link what may go there: verdicts, then parcels.
    pub(super) fn pump(&mut self, node: NodeId, peer: PeerNumber) {
        let now_ns = self.agenda.now_ns;
        let Some(link) = self.process(node).targets[peer].up else { return };
        let Some((conn, end)) = self.conn_of(node, link) else { return };
        let to = 1 - end;
        while self.backlog(conn, to) < BACKLOG_MAX {
            let target = &mut self.process(node).targets[peer];
            let frame = if let Some((number, verdict)) = target.inbox.next_verdict() {
                Frame::Verdict { number, verdict }
            } else if let Some(Dispatch { number, confirmed, parcel }) = target.outbox.next_to_send() {
                let Parcel { kind, key, load } = parcel;
                let kind = kind.on_the_wire(now_ns);
                Frame::Parcel { number, confirmed, kind, key: key.clone(), name: load.name, bytes: load.bytes }
            } else {
                return;
            };
            let before = self.backlog(conn, to);
            self.put(conn, to, frame);
            if self.backlog(conn, to) == before {
                // It is broken, and what is written there nobody reads.
                return;
            }
        }
    }

    /// What an outbox is done with.
    pub(super) fn note_ends(&mut self, node: NodeId, peer: PeerNumber) {
        let books = Rc::clone(&self.process(node).books);
        let blank =
            || Parcel { kind: load::Kind::Cancel { call: 0 }, key: Arc::from([]), load: Load::new(&books, 0, 0, None) };
        self.process(node).targets[peer].outbox.forsake(blank);
        while let Some(action) = self.process(node).targets[peer].outbox.action() {
            match action {
                PostAction::End { ticket, end } => self.on_end(node, ticket, end),
                PostAction::Discard(parcel) => drop(parcel.load.spend()),
            }
        }
    }
}
