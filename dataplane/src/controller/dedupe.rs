//! Recognises calls that a client sends again, so that none of them runs twice (G2).
//!
//! A client has one *session* for all its connections, and numbers its calls and its connections from one count. Calls that
//! ask for it are remembered under (session, call): while they run, and then with how they ended, until the client says that it
//! knows, until 60 s have passed, or until results take more memory than they may.
//!
//! What is not remembered any more is not run again either. Forgetting a call wholly raises the session's *floor* above it, and
//! whatever lies below the floor is refused. So a lower call that had never arrived would be refused, too, without having run;
//! that needs a result forgotten while an older call is still on its way, which is why a result that is given up for its age
//! leaves its number behind for as long again.
//!
//! Every call costs O(1), amortised. Calls that do not ask for it cost nothing here.

use std::collections::{HashMap, VecDeque};

use super::{CallError, Code, Outcome};
use crate::numbered::NumberMap;

/// Number of a client's session, random.
pub(crate) type SessionId = [u8; 16];

/// Calls of a session that are told apart: a client does not send one that is this far above the oldest it waits for.
pub(crate) const WINDOW_CALLS: u64 = 1 << 16;
/// How long the end of a call is remembered, and a session without a connection.
pub(super) const KEPT_NS: u64 = 60_000_000_000;
/// Old results go in batches, so that the controller is not woken for each.
const COARSE_NS: u64 = 1_000_000_000;
/// What a remembered call is counted with besides its result: its place in two maps and two queues.
pub(super) const CALL_BYTES: usize = 192;
/// Sessions without a connection that are remembered, of which something is known, and of which it is only known that nothing is:
/// those are for calls that were lost on their way. At about 150 bytes each; whoever comes and goes in thousands pushes the longest away out.
pub(super) const AWAY_MAX: [usize; 2] = [1 << 14, 1 << 12];

/// A result that can be kept for whoever asks again.
pub(crate) trait Keep {
    /// How many bytes it holds.
    fn len_bytes(&self) -> usize;
    /// The same result once more. Cheap when this is such a copy already.
    fn copy(&self) -> Self;
}

/// How a request asks to be recognised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Once {
    /// The client has its answers to every such call below this one.
    pub(crate) known_below: u64,
    /// It may have been sent before, on an earlier connection.
    pub(crate) again: bool,
}

/// What a request turned out to be.
#[derive(Debug)]
pub(super) enum Seen<P> {
    New {
        session: u64,
    },
    /// It runs or waits; the session's connection gets the answer.
    Running,
    Ended(Outcome<P>),
    /// It is not known whether it ran.
    Forgotten,
    /// Its connection said nothing of a session.
    Stranger,
}

#[derive(Debug)]
enum Entry<P> {
    Running,
    Ended { outcome: Outcome<P>, bytes: usize },
    Forgotten,
}

#[derive(Debug)]
struct Session<P> {
    name: SessionId,
    /// Who gets its answers.
    connection: Option<u64>,
    /// The number of that connection, or of the last: an older one that comes late is refused.
    number: u64,
    /// When we first heard of it, as the client counts: what it sent before, and we do not know, we have forgotten.
    since: u64,
    /// Calls below are refused.
    floor: u64,
    known: Option<Box<Known<P>>>,
    running: u32,
    away_since_ns: u64,
}

/// The calls of a session that are known. Most clients have none.
#[derive(Debug)]
struct Known<P> {
    calls: HashMap<u64, Entry<P>>,
    /// The keys of `calls`, ascending; some may be gone already.
    order: VecDeque<u64>,
}

impl<P> Session<P> {
    fn entry(&self, call: u64) -> Option<&Entry<P>> {
        self.known.as_ref()?.calls.get(&call)
    }

    fn entry_mut(&mut self, call: u64) -> Option<&mut Entry<P>> {
        self.known.as_mut()?.calls.get_mut(&call)
    }

    fn remove(&mut self, call: u64) -> Option<Entry<P>> {
        self.known.as_mut()?.calls.remove(&call)
    }
}

/// A connection that is older than the one its session has.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Stale;

#[derive(Debug)]
pub(super) struct Dedupe<P> {
    sessions: NumberMap<Session<P>>,
    names: HashMap<SessionId, u64>,
    connections: NumberMap<u64>,
    sessions_made: u64,
    /// Calls that ended, oldest first: when, session, call. Some may be gone already; `ended` are not.
    oldest: VecDeque<(u64, u64, u64)>,
    ended: usize,
    bytes: usize,
    bytes_max: usize,
    /// Sessions that lost their connection, and when. Some may have one again.
    away: [VecDeque<(u64, u64)>; 2],
    now_ns: u64,
}

impl<P: Keep> Dedupe<P> {
    pub(super) fn new(bytes_max: usize) -> Self {
        Dedupe {
            sessions: NumberMap::default(),
            names: HashMap::new(),
            connections: NumberMap::default(),
            sessions_made: 0,
            oldest: VecDeque::new(),
            ended: 0,
            bytes: 0,
            bytes_max,
            away: [VecDeque::new(), VecDeque::new()],
            now_ns: 0,
        }
    }

    /// A connection says whose it is. Gives the one it replaces, which is to be closed, and how many calls it inherits.
    pub(super) fn greeted(
        &mut self,
        connection: u64,
        name: SessionId,
        number: u64,
    ) -> Result<(Option<u64>, u32), Stale> {
        let known = self.names.get(&name).and_then(|serial| Some((*serial, self.sessions.get_mut(serial)?)));
        let Some((serial, session)) = known else {
            self.sessions_made += 1;
            let session = Session {
                name,
                connection: Some(connection),
                number,
                since: number,
                floor: 0,
                known: None,
                running: 0,
                away_since_ns: 0,
            };
            self.sessions.insert(self.sessions_made, session);
            self.names.insert(name, self.sessions_made);
            self.connections.insert(connection, self.sessions_made);
            return Ok((None, 0));
        };
        if number <= session.number {
            return Err(Stale);
        }
        session.number = number;
        let replaced = session.connection.replace(connection);
        let running = session.running;
        if let Some(replaced) = replaced {
            self.connections.remove(&replaced);
        }
        self.connections.insert(connection, serial);
        Ok((replaced, running))
    }

    pub(super) fn disconnected(&mut self, connection: u64) {
        let Some(serial) = self.connections.remove(&connection) else { return };
        let session = self.sessions.get_mut(&serial).expect("a connection's session is there");
        session.connection = None;
        session.away_since_ns = self.now_ns;
        if session.known.as_ref().is_some_and(|known| known.calls.is_empty()) {
            session.known = None;
        }
        let of = usize::from(session.known.is_none());
        self.away[of].push_back((self.now_ns, serial));
        while self.away[of].len() > AWAY_MAX[of] {
            self.end_longest_away(of);
        }
    }

    /// The session of a connection.
    pub(super) fn session_of(&self, connection: u64) -> Option<u64> {
        self.connections.get(&connection).copied()
    }

    /// What is known of a call.
    pub(super) fn look(&mut self, connection: u64, call: u64, once: Once) -> Seen<P> {
        let Some(serial) = self.session_of(connection) else { return Seen::Stranger };
        // Nobody has the answer to what he asks for.
        self.forget_below(serial, once.known_below.min(call));
        let session = &self.sessions[&serial];
        match session.entry(call) {
            Some(Entry::Running) => Seen::Running,
            Some(Entry::Ended { outcome, .. }) => Seen::Ended(outcome.copy()),
            Some(Entry::Forgotten) => Seen::Forgotten,
            None if call < session.floor || (once.again && call < session.since) => Seen::Forgotten,
            None => Seen::New { session: serial },
        }
    }

    /// A call that was [`Seen::New`] is taken in.
    pub(super) fn begin(&mut self, serial: u64, call: u64) {
        let session = self.sessions.get_mut(&serial).expect("seen just now");
        session.running += 1;
        let known =
            session.known.get_or_insert_with(|| Box::new(Known { calls: HashMap::new(), order: VecDeque::new() }));
        known.calls.insert(call, Entry::Running);
        match known.order.back() {
            // A short request that overtook a long one, or one that was refused before.
            Some(last) if *last >= call => {
                let at = known.order.partition_point(|other| *other < call);
                if known.order[at] != call {
                    known.order.insert(at, call);
                }
            }
            _ => known.order.push_back(call),
        }
        self.forget_below(serial, (call + 1).saturating_sub(WINDOW_CALLS));
    }

    /// A call ended. Its answer goes to the connection given back, if the session has one.
    pub(super) fn finish(&mut self, serial: u64, call: u64, outcome: &Outcome<P>) -> Option<u64> {
        let session = self.sessions.get_mut(&serial)?;
        session.running -= 1;
        let connection = session.connection;
        // Gone when the client says that it needs no answer, or has moved on too far.
        if let Some(entry) = session.entry_mut(call) {
            if has_not_run(outcome) {
                // To be tried again, as if it were new.
                session.remove(call);
                return connection;
            }
            let bytes = outcome.len_bytes();
            let keeps = CALL_BYTES + bytes <= self.bytes_max;
            *entry = if keeps { Entry::Ended { outcome: outcome.copy(), bytes } } else { Entry::Forgotten };
            self.bytes += CALL_BYTES + if keeps { bytes } else { 0 };
            self.ended += 1;
            self.oldest.push_back((self.now_ns, serial, call));
            while self.bytes > self.bytes_max && self.forget_oldest() {}
            if self.oldest.len() > 64 + 2 * self.ended {
                let sessions = &self.sessions;
                self.oldest.retain(|(_, serial, call)| {
                    sessions.get(serial).is_some_and(|session| session.entry(*call).is_some())
                });
            }
        }
        connection
    }

    /// Time passes. Gives the time to be told again.
    pub(super) fn expire(&mut self, now_ns: u64) -> u64 {
        self.now_ns = now_ns;
        while let Some((since_ns, serial, call)) = self.oldest.front().copied()
            && since_ns + KEPT_NS <= now_ns
        {
            let entry = self.sessions.get_mut(&serial).and_then(|session| session.entry_mut(call));
            match entry {
                Some(entry @ Entry::Ended { .. }) => {
                    if let Entry::Ended { bytes, .. } = std::mem::replace(entry, Entry::Forgotten) {
                        self.bytes -= bytes;
                    }
                    self.oldest.pop_front();
                    self.oldest.push_back((now_ns, serial, call));
                }
                _ => {
                    self.forget_oldest();
                }
            }
        }
        for of in [0, 1] {
            while self.away[of].front().is_some_and(|(since_ns, _)| since_ns + KEPT_NS <= now_ns) {
                self.end_longest_away(of);
            }
        }
        self.due_ns()
    }

    /// When something is to be forgotten for its age.
    pub(super) fn due_ns(&self) -> u64 {
        let oldest_ns = self.oldest.front().map(|(since_ns, ..)| *since_ns);
        let away_ns = self.away.iter().filter_map(|away| Some(away.front()?.0)).min();
        oldest_ns.into_iter().chain(away_ns).min().map_or(u64::MAX, |since_ns| since_ns + KEPT_NS + COARSE_NS)
    }

    /// Sets the clock that ends and absences are dated by.
    pub(super) fn set_clock(&mut self, now_ns: u64) {
        self.now_ns = now_ns;
    }

    /// The client does not ask again for what lies below `below`, or is not answered if it does.
    fn forget_below(&mut self, serial: u64, below: u64) {
        let session = self.sessions.get_mut(&serial).expect("looked up by the caller");
        session.floor = session.floor.max(below);
        if let Some(Known { calls, order }) = session.known.as_deref_mut() {
            // What runs below a floor that was raised for a forgotten call is known all the same.
            while order.front().is_some_and(|call| *call < below || !calls.contains_key(call)) {
                let call = order.pop_front().expect("seen just now");
                if let Some(entry) = calls.remove(&call) {
                    forgotten(&entry, &mut self.bytes, &mut self.ended);
                }
            }
        }
        while let Some((_, serial, call)) = self.oldest.front()
            && self.sessions.get(serial).is_none_or(|session| session.entry(*call).is_none())
        {
            self.oldest.pop_front();
        }
    }

    /// Forgets the call that ended first, number and all. False when none is left.
    fn forget_oldest(&mut self) -> bool {
        let Some((_, serial, call)) = self.oldest.pop_front() else { return false };
        if let Some(session) = self.sessions.get_mut(&serial)
            && let Some(entry) = session.remove(call)
        {
            forgotten(&entry, &mut self.bytes, &mut self.ended);
            session.floor = session.floor.max(call + 1);
            if let Some(Known { calls, order }) = session.known.as_deref_mut() {
                while order.front().is_some_and(|call| !calls.contains_key(call)) {
                    order.pop_front();
                }
            }
        }
        true
    }

    fn end_longest_away(&mut self, of: usize) {
        let Some((since_ns, serial)) = self.away[of].pop_front() else { return };
        let Some(session) = self.sessions.get(&serial) else { return };
        if session.connection.is_some() || session.away_since_ns != since_ns {
            return;
        }
        if session.running > 0 && self.away[of].len() < AWAY_MAX[of] {
            // It may still come back for what runs.
            self.sessions.get_mut(&serial).expect("seen just now").away_since_ns = self.now_ns;
            self.away[of].push_back((self.now_ns, serial));
            return;
        }
        let session = self.sessions.remove(&serial).expect("seen just now");
        self.names.remove(&session.name);
        for entry in session.known.iter().flat_map(|known| known.calls.values()) {
            forgotten(entry, &mut self.bytes, &mut self.ended);
        }
    }

    #[cfg(test)]
    pub(super) fn kept(&self) -> (usize, usize, usize) {
        let counted = |entry: &&Entry<P>| !matches!(entry, Entry::Running);
        let calls = self
            .sessions
            .values()
            .filter_map(|session| session.known.as_ref())
            .flat_map(|known| known.calls.values())
            .filter(counted)
            .count();
        assert_eq!(calls, self.ended, "ended calls are counted wrongly");
        let bytes = self
            .sessions
            .values()
            .filter_map(|session| session.known.as_ref())
            .flat_map(|known| known.calls.values())
            .map(|entry| match entry {
                Entry::Running => 0,
                Entry::Ended { bytes, .. } => CALL_BYTES + bytes,
                Entry::Forgotten => CALL_BYTES,
            });
        assert_eq!(bytes.sum::<usize>(), self.bytes, "bytes are counted wrongly");
        assert!(self.oldest.len() <= 65 + 2 * self.ended, "{} records of {} calls", self.oldest.len(), self.ended);
        (self.sessions.len(), calls, self.bytes)
    }
}

fn forgotten<P>(entry: &Entry<P>, total_bytes: &mut usize, ended: &mut usize) {
    match entry {
        Entry::Running => {}
        Entry::Ended { bytes, .. } => {
            *total_bytes -= CALL_BYTES + bytes;
            *ended -= 1;
        }
        Entry::Forgotten => {
            *total_bytes -= CALL_BYTES;
            *ended -= 1;
        }
    }
}

impl<P: Keep> Outcome<P> {
    fn copy(&self) -> Outcome<P> {
        match self {
            Outcome::Done { status, payload } => Outcome::Done { status: *status, payload: payload.copy() },
            Outcome::Failed(error) => Outcome::Failed(error.clone()),
        }
    }

    fn len_bytes(&self) -> usize {
        match self {
            Outcome::Done { payload, .. } => payload.len_bytes(),
            Outcome::Failed(error) => error.text.len(),
        }
    }
}

/// Whether the answer says that the function has not run, and the call may be tried again.
fn has_not_run<P>(outcome: &Outcome<P>) -> bool {
    let Outcome::Failed(CallError { code, .. }) = outcome else { return false };
    matches!(
        code,
        Code::Busy | Code::NoSpace | Code::FunctionBroken | Code::Draining | Code::TooLarge | Code::UnknownFunction
    )
}
