//! Clients' connections in the hands of workers: handed over, taken up again, and what becomes of them when a worker dies.
//!
//! Our descriptor of a lent socket stays open and unread. The kernel counts what is read from it and written to it, whoever does that; so a
//! worker's last words about a connection are checked against what has happened, and a lie costs that connection only.

use praas_shm::LentConnection;
use praas_transport::frame::Key;
use praas_transport::tcp::{Received, Refusal};
use praas_transport::{Bodies, Frame, Header, Moved};

use super::*;
use crate::wire::{Forwarded, Return};

/// How often workers with connections are looked at: for calls past their deadline, and for connections on which nothing came since the last
/// look. Longer than any pause of a program that waits for its answers, and too short for anybody to miss a worker; who needs that one has it in
/// a few us anyway.
const LOOK_NS: u64 = 20_000_000;

/// A connection that a worker has, as it was when it was lent.
#[derive(Debug)]
pub(super) struct Lent {
    lease: u64,
    received: u64,
    sent: u64,
    /// Where the stream was. `None`: the kernel does not say, so that nobody outlives its worker's death.
    moved: Option<Moved>,
    /// What its worker said at the last look.
    said: Option<LentConnection>,
    /// The header of a frame whose payload is to come.
    forwarded: Option<Forwarded>,
}

/// How a dead worker left a connection.
#[derive(Debug, PartialEq, Eq)]
enum Left {
    /// Between two frames.
    AtRest { received: u64, sent: u64 },
    /// With a call that it had begun on, and not to answer it.
    Running { received: u64, sent: u64, call: u64, deadline_ns: u64 },
    /// With part of a frame.
    Broken,
}

impl Lent {
    /// From what a dead worker said last, `said`, and what its holders have moved by now.
    fn left(&self, said: Option<LentConnection>, now: Option<Moved>) -> Left {
        let (Some(then), Some(now)) = (self.moved, now) else { return Left::Broken };
        let begun =
            LentConnection { lease: self.lease, received: self.received, sent: self.sent, ..Default::default() };
        // Nothing yet of this one: it did not come to it.
        let said = said.filter(|said| said.lease == self.lease).unwrap_or(begun);
        let LentConnection { received, sent, read_bytes, written_bytes, call, deadline_ns, .. } = said;
        let is_whole = then.read_bytes.checked_add(read_bytes) == Some(now.read_bytes)
            && then.written_bytes.checked_add(written_bytes) == Some(now.written_bytes);
        if !is_whole || received < self.received || sent < self.sent {
            return Left::Broken;
        }
        match deadline_ns {
            0 => Left::AtRest { received, sent },
            deadline_ns => Left::Running { received, sent, call, deadline_ns },
        }
    }
}

impl Process {
    /// Hands a connection to a worker, if nothing is under way on it.
    pub(super) fn lend(&mut self, now: u64, lease: u64, connection: u64, worker: WorkerId, function: u16) {
        if !self.controller.may_lend(now, lease) {
            return;
        }
        let Some((terms, socket)) = self.clients.lend(connection, &mut self.reactor) else {
            return self.controller.lend_failed(now, lease);
        };
        self.forget(clients::index(connection));
        let (received, sent) = (terms.receive.sequence(), terms.send.sequence());
        let socket = match socket {
            Ok(socket) => socket,
            Err(error) => {
                tracing::warn!(%error, "no descriptor to lend a connection");
                self.take_up(connection, received, sent);
                return self.controller.lend_failed(now, lease);
            }
        };
        let moved = self.clients.moved(connection, &self.reactor);
        // A client of this host waits on the core that brings its bytes. The worker, who is about to spin, keeps off it: ours is free meanwhile.
        if let (Some(home), Some(ours)) = (self.placement.worker(worker), self.placement.controller()) {
            let is_callers = praas_transport::incoming_cpu(socket.as_fd()).is_ok_and(|cpu| cpu == home);
            self.pin(worker, if is_callers { ours } else { home });
        }
        let patience = self.placement.connection_patience(self.core_of(worker));
        let deadline_ns = self.config.deadline_ms * 1_000_000;
        let message = wire::LentConnection::new(lease, function, patience, deadline_ns, &terms);
        self.lent.insert(worker, Lent { lease, received, sent, moved, said: None, forwarded: None });
        self.lent_due_ns = self.lent_due_ns.min(now + LOOK_NS);
        tracing::debug!(connection, worker, lease, "connection lent");
        self.notify(worker, &ToWorker::Connection(Box::new(message)), &[socket.as_fd()]);
    }

    /// A connection is ours again, from these frames on.
    fn take_up(&mut self, connection: u64, received: u64, sent: u64) {
        if !self.clients.take_up(connection, &mut self.reactor, received, sent) {
            self.clients.close(connection);
        }
    }

    /// A worker read a frame that is not its own to serve.
    pub(super) fn on_forwarded(&mut self, now: u64, worker: WorkerId, record: &Descriptor) -> Result<(), Violation> {
        let head = Forwarded::from_record(record).ok_or(Violation("a malformed frame forwarded"))?;
        let Some(lent) = self.lent.get_mut(&worker) else {
            return Err(Violation("it forwarded a frame of a connection that it does not have"));
        };
        if lent.forwarded.is_some() {
            return Err(Violation("it forwarded a frame without its payload"));
        }
        if head.has_body {
            lent.forwarded = Some(head);
            return Ok(());
        }
        let body = match head.refused {
            Some((Code::NoSpace, bytes)) => Received::Refused { bytes, why: Refusal::NoSpace },
            Some((_, bytes)) => Received::Refused { bytes, why: Refusal::TooLarge },
            None => Received::Whole(self.store.loan(0).expect("nothing always fits")),
        };
        self.take_forwarded(now, worker, &head, body);
        Ok(())
    }

    /// Its payload. It is copied out of the worker's memory: what comes from a client is checked where no worker can write.
    pub(super) fn on_forwarded_body(&mut self, now: u64, worker: WorkerId, body: Body) -> Result<(), Violation> {
        let head = self.lent.get_mut(&worker).and_then(|lent| lent.forwarded.take());
        let head = head.ok_or(Violation("it forwarded a payload without its frame"))?;
        let Some(bytes) = self.bytes_of(worker, body, None)? else {
            return Err(Violation("it forwarded a payload of another worker's"));
        };
        let payload: &[u8] = bytes.as_ref();
        let received = match self.store.loan(payload.len()) {
            Some(mut landing) => {
                landing.as_mut().copy_from_slice(payload);
                Received::Whole(landing)
            }
            None => Received::Refused { bytes: payload.len() as u64, why: Refusal::NoSpace },
        };
        self.release(bytes);
        self.take_forwarded(now, worker, &head, received);
        Ok(())
    }

    fn take_forwarded(&mut self, now: u64, worker: WorkerId, head: &Forwarded, body: Received<body::Landing>) {
        let Some((_, connection, true)) = self.controller.connection_of(worker) else {
            if let Received::Whole(landing) = body {
                self.store.give_back(landing);
            }
            return;
        };
        let Forwarded { kind, flags, function, call, budget_ns, aux, .. } = *head;
        let header = Header { kind, flags, function, call, budget_ns, aux, ..Header::default() };
        let frame = Frame { header, key: Key::EMPTY, body };
        let mut arrived = std::mem::take(&mut self.arrived);
        self.clients.take_forwarded(connection, frame, &mut self.store, &self.welcome, &mut arrived);
        self.take_in(now, clients::index(connection), &mut arrived);
        self.arrived = arrived;
    }

    /// A worker gives its connection back.
    pub(super) fn on_returned(&mut self, now: u64, worker: WorkerId, record: &Descriptor) -> Result<(), Violation> {
        let how = Return::from_wire(record.tag()).ok_or(Violation("it returned a connection in no known way"))?;
        let inline = record.inline();
        let sent = inline.as_ref().and_then(|inline| inline.as_slice().try_into().ok()).map(u64::from_le_bytes);
        let (received, sent) = (record.aux(), sent.ok_or(Violation("a malformed return of a connection"))?);
        let in_order = matches!(how, Return::AtRest | Return::Panicked);
        let panicked = how == Return::Panicked;
        let connection = self.controller.connection_returned(now, worker, record.id(), in_order, panicked)?;
        let lent = self.lent.remove(&worker).ok_or(Violation("it returned a connection that it does not have"))?;
        self.send_home(worker);
        let counts = self.controller.lease_counts();
        tracing::debug!(connection, worker, ?how, ?counts, "connection returned");
        let Some(connection) = connection else { return Ok(()) };
        // No frame is read or written twice. Other lies show with the next frame.
        if in_order && received >= lent.received && sent >= lent.sent {
            self.take_up(connection, received, sent);
            return Ok(());
        }
        match how {
            Return::AtRest | Return::Panicked => {
                tracing::warn!(connection, "closed: a worker lost count of its frames");
            }
            Return::Closed => {}
            Return::Lost => tracing::info!(connection, "connection lost"),
            Return::NotFrames => {
                tracing::info!(connection, error = "the stream is not one of frames", "connection lost")
            }
            Return::Stalled => tracing::info!(connection, "closed: it stalls in the middle of a frame"),
            Return::Deaf => tracing::info!(connection, "closed: it does not read its answers"),
        }
        self.clients.close(connection);
        Ok(())
    }

    /// Looks at what workers with connections say: a call past its deadline is theirs to answer for.
    pub(super) fn look_at_lent(&mut self, now: u64) {
        if now < self.lent_due_ns {
            return;
        }
        self.lent_due_ns = if self.lent.is_empty() { u64::MAX } else { now + LOOK_NS };
        for at in 0..self.seated.len() {
            let worker = self.seated[at];
            let Some(lent) = self.lent.get_mut(&worker) else { continue };
            // Changing just now: it is alive and well.
            let said = self.seats[usize::from(worker)].as_ref().and_then(Seat::connection);
            let before = std::mem::replace(&mut lent.said, said);
            let runs = said.filter(|said| said.lease == lent.lease && said.deadline_ns > 0);
            let is_idle = said.is_some() && said == before && runs.is_none();
            self.controller.connection_looked_at(now, worker, runs.map(|said| said.deadline_ns), is_idle);
        }
    }

    /// A worker died, and what it published is taken in. If it had a connection, that goes on as the worker left it, or ends.
    pub(super) fn outlive(&mut self, now: u64, worker: WorkerId, cause: Cause, said: Option<LentConnection>) {
        let Some(lent) = self.lent.remove(&worker) else { return };
        let Some((_, connection, is_there)) = self.controller.connection_of(worker) else { return };
        let moved = if is_there { self.clients.moved(connection, &self.reactor) } else { None };
        // Something it forwarded, and not all of it, is lost with it.
        let left = if lent.forwarded.is_some() { Left::Broken } else { lent.left(said, moved) };
        tracing::debug!(connection, worker, ?left, "a worker died with a connection");
        let running = match left {
            Left::Running { call, deadline_ns, .. } => Some((call, deadline_ns)),
            Left::AtRest { .. } | Left::Broken => None,
        };
        match left {
            Left::AtRest { received, sent } | Left::Running { received, sent, .. } => {
                self.take_up(connection, received, sent);
            }
            Left::Broken if is_there => {
                tracing::info!(connection, "closed: its worker died in the middle of a frame");
                self.clients.close(connection);
            }
            Left::Broken => {}
        }
        // Half an answer is no reason to think that the function lived.
        let runs = said.filter(|said| said.lease == lent.lease && said.deadline_ns > 0);
        let running = running.or(runs.filter(|_| left == Left::Broken).map(|said| (said.call, said.deadline_ns)));
        self.controller.connection_outlived(now, worker, cause, left != Left::Broken, running);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// W1, N4: what a dead worker said counts only if the kernel counted the same.
    #[test]
    fn w1_n4_last_words_are_held_against_what_the_kernel_counted() {
        let moved = |read_bytes, written_bytes| Moved { read_bytes, written_bytes };
        let lent =
            Lent { lease: 5, received: 10, sent: 20, moved: Some(moved(1000, 2000)), said: None, forwarded: None };
        let said = |lease, received, sent, read_bytes, written_bytes, deadline_ns| {
            Some(LentConnection { lease, received, sent, read_bytes, written_bytes, call: 7, deadline_ns })
        };
        let at = |read: u64, written: u64| Some(moved(1000 + read, 2000 + written));
        let (rest, running) = (
            |received, sent| Left::AtRest { received, sent },
            |received, sent| Left::Running { received, sent, call: 7, deadline_ns: 99 },
        );
        let cases = [
            (said(5, 12, 22, 256, 128, 0), at(256, 128), rest(12, 22)),
            (said(5, 13, 22, 384, 128, 99), at(384, 128), running(13, 22)),
            // It read something, wrote something, of which it said nothing.
            (said(5, 12, 22, 256, 128, 0), at(257, 128), Left::Broken),
            (said(5, 13, 22, 384, 128, 99), at(384, 129), Left::Broken),
            // It read beyond the frame.
            (said(5, 13, 22, u64::MAX, 128, 99), at(384, 128), Left::Broken),
            (said(5, 12, 22, u64::MAX - 999, 128, 0), at(0, 128), Left::Broken),
            // It did not come to the connection; or to say so, having read.
            (None, at(0, 0), rest(10, 20)),
            (said(4, 90, 90, 640, 640, 99), at(0, 0), rest(10, 20)),
            (None, at(1, 0), Left::Broken),
            // Frames again that there were before.
            (said(5, 9, 22, 0, 0, 0), at(0, 0), Left::Broken),
            (said(5, 12, 19, 0, 0, 0), at(0, 0), Left::Broken),
            (said(5, 12, 22, 256, 128, 0), None, Left::Broken),
        ];
        for (said, now, expected) in cases {
            assert_eq!(lent.left(said, now), expected, "{said:?} {now:?}");
        }
        let unknown = Lent { moved: None, ..lent };
        assert_eq!(unknown.left(said(5, 12, 22, 0, 0, 0), at(0, 0)), Left::Broken);
    }
}
