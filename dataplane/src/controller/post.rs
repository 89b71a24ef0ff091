//! Parcels between this process and one other, each once and in order, over a link that may break at any moment. Decides;
//! has no clock and no socket, and never looks into a parcel.
//!
//! Each end has an [`Outbox`] for what it sends and an [`Inbox`] for what it gets. `peers.rs` says when a link is up, and to
//! which life of the peer.
//!
//! | what happens | sender's outbox | receiver's inbox |
//! |---|---|---|
//! | a parcel is sent for the first time | gets the next number: 1, 2, 3, … in each life of the peer | |
//! | a number arrives | | is the next: new, and gets a verdict; was there before: is not taken again |
//! | a verdict is ready | | is said when the number has arrived on *this* link, in order, once a link |
//! | a verdict arrives | is for the lowest number: that parcel is over | |
//! | `confirmed` arrives with a parcel | | verdicts below it are forgotten |
//! | the link is up again, same life | sends again from the lowest number without a verdict | keeps all |
//! | the sender gives up what was sent, and no link is up | its number carries a blank from then on | is delivered, unless the number was there before |
//! | the peer is gone for good | all ends | |
//! | the peer lives anew | what was sent is lost, or was delivered: nobody knows; the rest is numbered from 1 | expects 1 |
//!
//! So on one link parcels have consecutive numbers, beginning at the lowest without a verdict, and so have verdicts; anything
//! else breaks the protocol, and the link is to be closed. What never was sent has no number: it may end without leaving a gap.
//!
//! Everything is O(log n), except a new life of the peer, which is O(1) for each parcel that is over with it.

pub(crate) mod delay;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::Keep;
use crate::numbered::NumberMap;
use crate::wire::Code;

/// The sender's number for one that it sends, unique among those that have not ended.
pub(crate) type Ticket = u64;

/// Parcels that may be on their way without a verdict, the same at both ends. So many verdicts may be remembered for each
/// peer, at a byte each.
pub(crate) const WINDOW: u64 = 1 << 14;
const _: () = assert!(size_of::<Verdict>() == 1);

/// What the receiver said of a parcel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It is in the receiver's mailbox.
    Stored,
    /// It is not, and this is why.
    Refused(Code),
}

/// How a parcel ended for its sender.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    Said(Verdict),
    /// Its deadline passed. `sent`: it is on its way and may be delivered yet; else it never will be.
    TimedOut {
        sent: bool,
    },
    /// The sender called it off. `sent`: as above.
    Cancelled {
        sent: bool,
    },
    /// The life of the peer that it was sent to is over. It may have been delivered.
    Lost,
    /// The peer is gone for good. `sent`: it may have been delivered; else it never will be.
    Gone {
        sent: bool,
    },
}

/// What is to be done with what was sent.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Action<P> {
    /// Tell the sender. Exactly once for each ticket.
    End { ticket: Ticket, end: End },
    /// It is not sent any more. Exactly once for each parcel; never while a link is up on which it was sent and not answered.
    Discard(P),
}

/// A parcel that was not taken, and why.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Full<P> {
    pub(crate) why: Refusal,
    pub(crate) parcel: P,
}

/// Why a parcel was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    #[error(
        "{has} parcels wait for the peer, and {max} may; send again when some were answered, or let more wait for each peer"
    )]
    Parcels { has: usize, max: usize },
    #[error(
        "{has_bytes} bytes wait for the peer, the parcel has {needs_bytes}, and {max_bytes} may wait; \
         send again when some were answered, or let more wait for each peer"
    )]
    Bytes { has_bytes: usize, needs_bytes: usize, max_bytes: usize },
    #[error(
        "the parcel has {needs_bytes} bytes, and {max_bytes} may wait for a peer; send it in parts, or let more wait for each peer"
    )]
    TooLarge { needs_bytes: usize, max_bytes: usize },
}

impl Refusal {
    /// What the sender is told.
    pub(crate) fn code(&self) -> Code {
        match self {
            Refusal::Parcels { .. } | Refusal::Bytes { .. } => Code::Busy,
            Refusal::TooLarge { .. } => Code::TooLarge,
        }
    }
}

/// How the other end broke the protocol. The link is to be closed; the numbers go to the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Violation {
    #[error("it sent parcel {found} where {expected} was to come; run the same version on both sides")]
    Parcel { found: u64, expected: u64 },
    #[error(
        "with parcel {parcel} it confirmed all below {found}, and {lowest} to {highest} made sense; \
         run the same version on both sides"
    )]
    Confirmed { parcel: u64, found: u64, lowest: u64, highest: u64 },
    #[error(
        "it sent parcel {found} with only those below {confirmed} confirmed, and {window} may be on their way; \
         run the same version on both sides"
    )]
    Window { found: u64, confirmed: u64, window: u64 },
    #[error(
        "it gave a verdict on parcel {found}, and {}; run the same version on both sides",
        .expected.map_or("none was to come".to_owned(), |number| format!("one on {number} was to come"))
    )]
    Verdict { found: u64, expected: Option<u64> },
}

// ---- sending ----------------------------------------------------------------------------------------------------

/// How much may wait for a peer, sent or not.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bounds {
    pub(crate) parcels_max: usize,
    pub(crate) bytes_max: usize,
    /// [`WINDOW`], but in tests.
    pub(crate) window: u64,
}

/// A parcel to be put on the link now.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Dispatch<'a, P> {
    pub(crate) number: u64,
    /// The verdicts on all below have come.
    pub(crate) confirmed: u64,
    pub(crate) parcel: &'a P,
}

#[derive(Debug)]
struct Outgoing<P> {
    /// Who waits for its end; `None` when that was told.
    ticket: Option<Ticket>,
    deadline_ns: u64,
    /// Since it was sent for the first time.
    number: Option<u64>,
    parcel: P,
}

/// What is sent to one peer.
#[derive(Debug)]
pub(crate) struct Outbox<P> {
    bounds: Bounds,
    /// The latest life of the peer that we heard of; 0 before the first.
    life: u64,
    is_up: bool,
    /// By place, in the order they were given. Those with a number come first.
    parcels: BTreeMap<u64, Outgoing<P>>,
    bytes: usize,
    /// Parcels given so far: the next place.
    places: u64,
    /// Numbers given so far in this life of the peer.
    numbers: u64,
    /// On this link, all places below were sent.
    cursor: u64,
    place_of: NumberMap<u64>,
    /// Deadlines and places of those whose end somebody waits for.
    deadlines: BTreeSet<(u64, u64)>,
    /// Places of those that were sent, that nobody waits for any more, and that still have what they carry.
    forsaken: BTreeSet<u64>,
    actions: VecDeque<Action<P>>,
}

impl<P: Keep> Outbox<P> {
    /// Nothing to send, to a peer that is not up.
    pub(crate) fn new(bounds: Bounds) -> Self {
        Outbox {
            bounds,
            life: 0,
            is_up: false,
            parcels: BTreeMap::new(),
            bytes: 0,
            places: 0,
            numbers: 0,
            cursor: 0,
            place_of: NumberMap::default(),
            deadlines: BTreeSet::new(),
            forsaken: BTreeSet::new(),
            actions: VecDeque::new(),
        }
    }

    /// The next thing to do, in order.
    pub(crate) fn action(&mut self) -> Option<Action<P>> {
        self.actions.pop_front()
    }

    /// Something is to be sent, by `deadline_ns` (`u64::MAX`: whenever), and may wait for a link.
    ///
    /// # Errors
    /// Too many parcels or bytes wait already. Nothing has changed, and the ticket has not begun.
    pub(crate) fn send(&mut self, ticket: Ticket, parcel: P, deadline_ns: u64) -> Result<(), Full<P>> {
        let needs_bytes = parcel.len_bytes();
        if let Err(why) = self.check_room(needs_bytes) {
            return Err(Full { why, parcel });
        }
        let place = self.places;
        self.places += 1;
        let before = self.place_of.insert(ticket, place);
        assert!(before.is_none(), "ticket {ticket} has not ended");
        self.deadlines.insert((deadline_ns, place));
        self.bytes += needs_bytes;
        self.parcels.insert(place, Outgoing { ticket: Some(ticket), deadline_ns, number: None, parcel });
        Ok(())
    }

    /// The next parcel for the link; whoever asks sends it. `None`: all were sent, or as many as may be without a verdict, or
    /// no link is up.
    pub(crate) fn next_to_send(&mut self) -> Option<Dispatch<'_, P>> {
        if !self.is_up {
            return None;
        }
        let lowest = self.first_number();
        let (place, outgoing) = self.parcels.range_mut(self.cursor..).next()?;
        let number = outgoing.number.unwrap_or(self.numbers + 1);
        let confirmed = lowest.unwrap_or(number);
        if number - confirmed >= self.bounds.window {
            return None;
        }
        outgoing.number = Some(number);
        self.numbers = self.numbers.max(number);
        self.cursor = place + 1;
        Some(Dispatch { number, confirmed, parcel: &outgoing.parcel })
    }

    /// A verdict has come.
    ///
    /// # Errors
    /// It is not on the lowest number that was sent on this link and has none. Nothing has changed.
    pub(crate) fn verdict(&mut self, number: u64, verdict: Verdict) -> Result<(), Violation> {
        let first = self.parcels.first_key_value().filter(|(place, _)| **place < self.cursor);
        let expected = first.and_then(|(place, outgoing)| Some((*place, outgoing.number?)));
        match expected {
            Some((place, expected)) if expected == number => {
                self.end(place, End::Said(verdict));
                self.discard(place);
                Ok(())
            }
            _ => Err(Violation::Verdict { found: number, expected: expected.map(|(_, number)| number) }),
        }
    }

    /// A link to this life of the peer is up. Lives only ever get later.
    pub(crate) fn up(&mut self, life: u64) {
        assert!(life >= self.life, "life {life} of a peer after {}: those are kept away", self.life);
        self.is_up = true;
        self.cursor = 0;
        if life > self.life {
            self.life = life;
            self.numbers = 0;
            while self.first_number().is_some() {
                let (place, _) = self.parcels.first_key_value().expect("one has a number");
                let place = *place;
                self.end(place, End::Lost);
                self.discard(place);
            }
        }
    }

    /// No link is up any more.
    pub(crate) fn down(&mut self) {
        self.is_up = false;
        self.cursor = 0;
    }

    /// The peer is gone for good, or until a later life of it is up: nothing that is kept here will be sent to it.
    pub(crate) fn close(&mut self) {
        self.down();
        while let Some((place, outgoing)) = self.parcels.first_key_value() {
            let (place, sent) = (*place, outgoing.number.is_some());
            self.end(place, End::Gone { sent });
            self.discard(place);
        }
    }

    /// Nobody waits for its end any more. If it was not sent yet, it is not; else it may still be delivered, and keeps its place.
    /// False when it has ended before.
    pub(crate) fn cancel(&mut self, ticket: Ticket) -> bool {
        let Some(place) = self.place_of.get(&ticket).copied() else { return false };
        self.give_up(place, |sent| End::Cancelled { sent });
        true
    }

    /// Time passes: as if each whose deadline it was had been cancelled.
    pub(crate) fn tick(&mut self, now_ns: u64) {
        while let Some((deadline_ns, place)) = self.deadlines.first().copied()
            && deadline_ns <= now_ns
        {
            self.give_up(place, |sent| End::TimedOut { sent });
        }
    }

    /// While no link is up: what was sent and nobody waits for gives its memory back, as the peer may never return. Its number is sent again with
    /// a blank, which is delivered instead if it has not been.
    pub(crate) fn forsake(&mut self, blank: impl Fn() -> P) {
        if self.is_up {
            return;
        }
        for place in std::mem::take(&mut self.forsaken) {
            let outgoing = self.parcels.get_mut(&place).expect("what is over is not forsaken");
            let parcel = std::mem::replace(&mut outgoing.parcel, blank());
            self.bytes = self.bytes - parcel.len_bytes() + outgoing.parcel.len_bytes();
            self.actions.push_back(Action::Discard(parcel));
        }
    }

    /// When [`Outbox::tick`] has to be called next, ns.
    pub(crate) fn wake_ns(&self) -> u64 {
        self.deadlines.first().map_or(u64::MAX, |(deadline_ns, _)| *deadline_ns)
    }

    /// All that is kept, to be replaced by the same in another place.
    pub(crate) fn parcels_mut(&mut self) -> impl Iterator<Item = &mut P> {
        self.parcels.values_mut().map(|outgoing| &mut outgoing.parcel)
    }

    /// Parcels that are kept, and their bytes.
    pub(crate) fn holds(&self) -> (usize, usize) {
        (self.parcels.len(), self.bytes)
    }

    fn check_room(&self, needs_bytes: usize) -> Result<(), Refusal> {
        let Bounds { parcels_max: max, bytes_max: max_bytes, .. } = self.bounds;
        let (has, has_bytes) = self.holds();
        if needs_bytes > max_bytes {
            return Err(Refusal::TooLarge { needs_bytes, max_bytes });
        }
        if has >= max {
            return Err(Refusal::Parcels { has, max });
        }
        if has_bytes > max_bytes - needs_bytes {
            return Err(Refusal::Bytes { has_bytes, needs_bytes, max_bytes });
        }
        Ok(())
    }

    /// The lowest number without a verdict.
    fn first_number(&self) -> Option<u64> {
        self.parcels.first_key_value()?.1.number
    }

    /// Ends it for its sender before it is over.
    fn give_up(&mut self, place: u64, end: fn(bool) -> End) {
        let sent = self.parcels[&place].number.is_some();
        self.end(place, end(sent));
        if sent {
            self.forsaken.insert(place);
        } else {
            self.discard(place);
        }
    }

    /// Tells its sender, if that was not told before.
    fn end(&mut self, place: u64, end: End) {
        let outgoing = self.parcels.get_mut(&place).expect("found by the caller");
        if let Some(ticket) = outgoing.ticket.take() {
            self.place_of.remove(&ticket);
            self.deadlines.remove(&(outgoing.deadline_ns, place));
            self.actions.push_back(Action::End { ticket, end });
        }
    }

    fn discard(&mut self, place: u64) {
        let outgoing = self.parcels.remove(&place).expect("found by the caller");
        self.forsaken.remove(&place);
        self.bytes -= outgoing.parcel.len_bytes();
        self.actions.push_back(Action::Discard(outgoing.parcel));
    }
}

// ---- receiving --------------------------------------------------------------------------------------------------

/// What a parcel turned out to be.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Arrived {
    /// It is to be stored or refused, and then [settled](Inbox::settled), in the order of arrival.
    New(Due),
    /// It was there before, and is to be dropped. Its verdict is or will be among the [next](Inbox::next_verdict).
    Again,
}

/// A verdict that is owed. Not to be copied, as it is owed once.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "the sender waits for a verdict"]
pub(crate) struct Due {
    life: u64,
    number: u64,
}

/// Numbers on the link that is up.
#[derive(Debug, Clone, Copy)]
struct Link {
    /// All below have arrived on it.
    heard_below: u64,
    /// The verdicts on all below were said on it.
    said_below: u64,
}

/// What comes from one peer.
#[derive(Debug)]
pub(crate) struct Inbox {
    window: u64,
    /// The latest life of the peer that we heard of; 0 before the first.
    life: u64,
    is_up: bool,
    /// `None` until something has arrived on it.
    link: Option<Link>,
    /// The lowest number that never arrived.
    expected: u64,
    /// Those on the numbers from `confirmed` on.
    verdicts: VecDeque<Verdict>,
    /// The sender has the verdicts on all below.
    confirmed: u64,
    /// The verdicts on all below were said on some link.
    ever_said_below: u64,
}

impl Inbox {
    /// Nothing came yet, and the peer is not up. `window`: [`WINDOW`], but in tests.
    pub(crate) fn new(window: u64) -> Self {
        Inbox {
            window,
            life: 0,
            is_up: false,
            link: None,
            expected: 1,
            verdicts: VecDeque::new(),
            confirmed: 1,
            ever_said_below: 1,
        }
    }

    /// A link to this life of the peer is up. Lives only ever get later.
    pub(crate) fn up(&mut self, life: u64) {
        assert!(life >= self.life, "life {life} of a peer after {}: those are kept away", self.life);
        if life > self.life {
            *self = Inbox { life, ..Inbox::new(self.window) };
        }
        self.is_up = true;
        self.link = None;
    }

    /// No link is up any more.
    pub(crate) fn down(&mut self) {
        self.is_up = false;
        self.link = None;
    }

    /// A parcel has arrived on the link that is up. What its sender said with it makes room.
    ///
    /// # Errors
    /// It is not what was to come. Nothing has changed, and the parcel is to be dropped.
    pub(crate) fn arrived(&mut self, number: u64, confirmed: u64) -> Result<Arrived, Violation> {
        assert!(self.is_up, "parcel {number} arrived on no link");
        let link = match self.link {
            Some(link) => link,
            // On each link it begins anew, with the lowest number whose verdict it has not heard.
            None => Link { heard_below: confirmed, said_below: confirmed.min(self.ever_said_below) },
        };
        if number != link.heard_below || number > self.expected {
            return Err(Violation::Parcel { found: number, expected: link.heard_below.min(self.expected) });
        }
        if !(self.confirmed..=link.said_below).contains(&confirmed) {
            let (lowest, highest) = (self.confirmed, link.said_below);
            return Err(Violation::Confirmed { parcel: number, found: confirmed, lowest, highest });
        }
        if number - confirmed >= self.window {
            return Err(Violation::Window { found: number, confirmed, window: self.window });
        }
        while self.confirmed < confirmed {
            self.verdicts.pop_front().expect("what was said is remembered until it is confirmed");
            self.confirmed += 1;
        }
        self.link = Some(Link { heard_below: number + 1, ..link });
        if number < self.expected {
            return Ok(Arrived::Again);
        }
        self.expected += 1;
        Ok(Arrived::New(Due { life: self.life, number }))
    }

    /// What became of a parcel that was new. Of an earlier life's, nobody wants to know.
    pub(crate) fn settled(&mut self, due: Due, verdict: Verdict) {
        if due.life == self.life {
            let next = self.settled_below();
            assert_eq!(due.number, next, "parcels are settled in the order they came");
            self.verdicts.push_back(verdict);
        }
    }

    /// The next verdict for the link, and the number of its parcel; whoever asks sends it. `None`: no parcel that has arrived
    /// on this link and is settled waits for one.
    pub(crate) fn next_verdict(&mut self) -> Option<(u64, Verdict)> {
        let settled_below = self.settled_below();
        let link = self.link.as_mut()?;
        let number = link.said_below;
        if number >= link.heard_below.min(settled_below) {
            return None;
        }
        link.said_below += 1;
        self.ever_said_below = self.ever_said_below.max(link.said_below);
        // What is not said on this link is not confirmed on it, nor was it before.
        #[expect(clippy::cast_possible_truncation, reason = "less than the window")]
        let at = (number - self.confirmed) as usize;
        Some((number, self.verdicts[at]))
    }

    /// Verdicts that are remembered.
    #[cfg(test)]
    pub(crate) fn remembers(&self) -> usize {
        self.verdicts.len()
    }

    fn settled_below(&self) -> u64 {
        self.confirmed + self.verdicts.len() as u64
    }
}
