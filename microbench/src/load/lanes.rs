//! The connections a load goes over, all polled by one thread: ours through `praas_dataplane::Client`, those to raw peers
//! through a socket with nothing around it.
//!
//! A raw lane writes what is to be sent once a round and reads what there is: it shows what this generator costs when the
//! client and the server cost next to nothing.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use praas_dataplane::Client;
use praas_dataplane::client::{CallHandle, RemoteFunction};
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::pace::Target;
use crate::end::{is_stamped, nanoseconds, stamp};
use crate::placement::{SPIN_BUDGET, Wait};
use crate::worker::ECHO;

/// Connections of which one system call tells which are ready.
const EVENTS: usize = 64;

/// Longest sleep without a look around: nothing is lost should an answer come without waking us.
const SLEEP_MAX: Duration = Duration::from_millis(100);

/// One connection.
pub(crate) enum Lane {
    Ours(Box<Ours>),
    Raw(Raw),
}

pub(crate) struct Ours {
    client: Client,
    echo: RemoteFunction,
    /// Answers that came, to be sent again as the next calls: a call allocates nothing and fills nothing.
    spare: Vec<Vec<u8>>,
}

pub(crate) struct Raw {
    stream: TcpStream,
    out: Vec<u8>,
    sent: usize,
    room: Vec<u8>,
    filled: usize,
    /// How much of the room was handed out.
    taken: usize,
    /// Sequence numbers in the order sent, which is the order of the answers.
    flying: VecDeque<u64>,
}

/// Bytes a raw lane reads at a time where messages are small.
const ROOM_BYTES: usize = 64 << 10;

impl Lane {
    pub(crate) fn ours(client: Client) -> Result<Self> {
        let echo = client.function(ECHO)?;
        Ok(Lane::Ours(Box::new(Ours { client, echo, spare: Vec::new() })))
    }

    /// A connection to a peer that takes it for one of messages this long.
    pub(crate) fn raw(stream: TcpStream, bytes: usize) -> Result<Self> {
        stream.set_nonblocking(true)?;
        let room = vec![0; bytes * (ROOM_BYTES / bytes).max(1)];
        let (out, flying) = (Vec::new(), VecDeque::new());
        Ok(Lane::Raw(Raw { stream, out, sent: 0, room, filled: 0, taken: 0, flying }))
    }

    fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Lane::Ours(lane) => lane.client.as_fd(),
            Lane::Raw(lane) => lane.stream.as_fd(),
        }
    }

    fn wants_write(&self) -> bool {
        match self {
            // A client's descriptor becomes readable for that, too.
            Lane::Ours(_) => false,
            Lane::Raw(lane) => lane.sent < lane.out.len(),
        }
    }

    fn send(&mut self, bytes: usize, sequence: u64) -> Result<Option<CallHandle>> {
        match self {
            Lane::Ours(lane) => {
                let mut message = lane.spare.pop().unwrap_or_else(|| vec![0xA5; bytes]);
                stamp(&mut message, sequence);
                lane.client.cork();
                Ok(Some(lane.client.submit(lane.echo, message)?))
            }
            Lane::Raw(lane) => {
                let start = lane.out.len();
                lane.out.resize(start + bytes, 0xA5);
                stamp(&mut lane.out[start..], sequence);
                lane.flying.push_back(sequence);
                Ok(None)
            }
        }
    }

    fn flush(&mut self) -> Result<()> {
        let lane = match self {
            Lane::Ours(lane) => {
                lane.client.flush();
                return Ok(());
            }
            Lane::Raw(lane) => lane,
        };
        while lane.sent < lane.out.len() {
            match lane.stream.write(&lane.out[lane.sent..]) {
                Ok(sent) => lane.sent += sent,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error).context("send to a peer"),
            }
        }
        lane.out.clear();
        lane.sent = 0;
        Ok(())
    }

    /// The sequence number of an answer that came, and the call it answers where answers come in any order.
    fn take(&mut self, bytes: usize) -> Result<Option<(u64, Option<CallHandle>)>> {
        match self {
            Lane::Ours(lane) => {
                let Some((call, reply)) = lane.client.poll() else { return Ok(None) };
                let reply = reply?;
                ensure!(reply.len() == bytes, "wrong answer: {bytes} B came back as {} B", reply.len());
                let sequence = sequence_in(&reply)?;
                lane.spare.push(reply.into_vec());
                Ok(Some((sequence, Some(call))))
            }
            Lane::Raw(lane) => lane.take(bytes),
        }
    }
}

impl Raw {
    fn take(&mut self, bytes: usize) -> Result<Option<(u64, Option<CallHandle>)>> {
        if self.filled - self.taken < bytes {
            self.room.copy_within(self.taken..self.filled, 0);
            self.filled -= self.taken;
            self.taken = 0;
            match self.stream.read(&mut self.room[self.filled..]) {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof)).context("a peer hung up"),
                Ok(got) => self.filled += got,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error).context("receive from a peer"),
            }
            if self.filled < bytes {
                return Ok(None);
            }
        }
        let sequence = sequence_in(&self.room[self.taken..self.taken + bytes])?;
        self.taken += bytes;
        let expected = self.flying.pop_front();
        ensure!(expected == Some(sequence), "wrong answer: {sequence} came where {expected:?} was next");
        Ok(Some((sequence, None)))
    }
}

/// The sequence number that a message carries at its front and, in part, at its back.
fn sequence_in(message: &[u8]) -> Result<u64> {
    let sequence = u64::from_le_bytes(*message.first_chunk().context("an answer of less than 8 B")?);
    ensure!(is_stamped(message, sequence), "wrong answer: the last byte of call {sequence} came back changed");
    Ok(sequence)
}

/// A call without an answer.
#[derive(Clone, Debug)]
struct Flying {
    sequence: u64,
    due_ns: u64,
    lane: usize,
    call: Option<CallHandle>,
}

/// All connections of a load.
pub(crate) struct Lanes {
    lanes: Vec<Lane>,
    bytes: usize,
    wait: Wait,
    began: Instant,
    /// A lane once for each call that it has room for.
    free: VecDeque<usize>,
    /// Calls in flight, at their sequence number modulo the length.
    flying: Vec<Option<Flying>>,
    in_flight: usize,
    sequence: u64,
    /// Lanes to be flushed at the end of this round.
    unflushed: Vec<usize>,
    /// Lanes that may have an answer.
    ready: VecDeque<usize>,
    /// With more than one lane: who is ready, and whom we told it to watch for writing.
    epoll: Option<OwnedFd>,
    watched_for_writing: Vec<bool>,
    events: Vec<epoll::Event>,
    idle_since: Option<Instant>,
}

impl Lanes {
    pub(crate) fn new(lanes: Vec<Lane>, bytes: usize, wait: Wait) -> Result<Self> {
        let epoll = if lanes.len() > 1 {
            let epoll = epoll::create(CreateFlags::CLOEXEC)?;
            for (at, lane) in lanes.iter().enumerate() {
                epoll::add(&epoll, lane.fd(), EventData::new_u64(at as u64), EventFlags::IN)?;
            }
            Some(epoll)
        } else {
            None
        };
        Ok(Self {
            watched_for_writing: vec![false; lanes.len()],
            lanes,
            bytes,
            wait,
            began: Instant::now(),
            free: VecDeque::new(),
            flying: Vec::new(),
            in_flight: 0,
            sequence: 0,
            unflushed: Vec::new(),
            ready: VecDeque::new(),
            epoll,
            events: Vec::with_capacity(EVENTS),
            idle_since: None,
        })
    }

    /// Begins a load: time zero is now, and each lane has room for so many calls.
    pub(crate) fn begin(&mut self, in_flight: usize) {
        assert_eq!(self.in_flight, 0, "the load before has ended");
        self.free.clear();
        self.free.extend((0..in_flight).flat_map(|_| 0..self.lanes.len()));
        // Room for calls that are overtaken; one that is overtaken by more holds up the next, which then counts as late.
        self.flying = vec![None; (in_flight * self.lanes.len() * 4).next_power_of_two()];
        self.began = Instant::now();
        self.idle_since = None;
    }

    fn slot(&mut self, sequence: u64) -> &mut Option<Flying> {
        let slots = self.flying.len() as u64;
        #[expect(clippy::cast_possible_truncation, reason = "less than the length of a Vec")]
        &mut self.flying[(sequence % slots) as usize]
    }

    /// Marks lanes that have something for us; false when none has.
    fn look_around(&mut self) -> Result<bool> {
        let Some(epoll) = &self.epoll else {
            self.ready.push_back(0);
            return Ok(true);
        };
        for (at, lane) in self.lanes.iter().enumerate() {
            if lane.wants_write() != self.watched_for_writing[at] {
                self.watched_for_writing[at] = lane.wants_write();
                let also = if lane.wants_write() { EventFlags::OUT } else { EventFlags::empty() };
                epoll::modify(epoll, lane.fd(), EventData::new_u64(at as u64), EventFlags::IN | also)?;
            }
        }
        self.events.clear();
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        epoll::wait(epoll, rustix::buffer::spare_capacity(&mut self.events), Some(&at_once))?;
        self.ready.extend(self.events.iter().filter_map(|event| usize::try_from({ event.data }.u64()).ok()));
        Ok(!self.ready.is_empty())
    }

    /// Sleeps until an answer may be there, something can be sent, or it is time.
    fn sleep(&self, longest: Duration) {
        let longest = longest.min(SLEEP_MAX);
        let timeout = Timespec { tv_sec: 0, tv_nsec: longest.subsec_nanos().into() };
        let mut fds = [match (&self.epoll, &self.lanes[..]) {
            (Some(epoll), _) => PollFd::from_borrowed_fd(epoll.as_fd(), PollFlags::IN),
            (None, lanes) => {
                let also = if lanes[0].wants_write() { PollFlags::OUT } else { PollFlags::empty() };
                PollFd::from_borrowed_fd(lanes[0].fd(), PollFlags::IN | also)
            }
        }];
        // Interrupted or not: the caller looks again.
        let _ = poll(&mut fds, Some(&timeout));
    }
}

impl Target for Lanes {
    fn now_ns(&mut self) -> u64 {
        nanoseconds(self.began, Instant::now())
    }

    fn place(&mut self, due_ns: u64) -> Result<bool> {
        let sequence = self.sequence + 1;
        if self.slot(sequence).is_some() {
            return Ok(false);
        }
        let Some(lane) = self.free.pop_front() else { return Ok(false) };
        let call = self.lanes[lane].send(self.bytes, sequence)?;
        self.sequence = sequence;
        *self.slot(sequence) = Some(Flying { sequence, due_ns, lane, call });
        self.in_flight += 1;
        if self.unflushed.last() != Some(&lane) {
            self.unflushed.push(lane);
        }
        Ok(true)
    }

    fn flush(&mut self) -> Result<()> {
        while let Some(lane) = self.unflushed.pop() {
            self.lanes[lane].flush()?;
        }
        Ok(())
    }

    fn answered(&mut self) -> Result<Option<u64>> {
        if self.ready.is_empty() && !self.look_around()? {
            return Ok(None);
        }
        while let Some(&lane) = self.ready.front() {
            self.lanes[lane].flush()?;
            let Some((sequence, call)) = self.lanes[lane].take(self.bytes)? else {
                self.ready.pop_front();
                continue;
            };
            let flying = self.slot(sequence).take();
            let flying = flying.filter(|flying| (flying.sequence, flying.lane, flying.call) == (sequence, lane, call));
            let flying =
                flying.with_context(|| format!("wrong answer: {sequence} answers another call than its own"))?;
            self.in_flight -= 1;
            self.free.push_back(lane);
            self.idle_since = None;
            return Ok(Some(flying.due_ns));
        }
        Ok(None)
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn pause(&mut self, until_ns: Option<u64>) -> Result<()> {
        let now = Instant::now();
        let idle = now.duration_since(*self.idle_since.get_or_insert(now));
        let until = until_ns.map_or(SLEEP_MAX, Duration::from_nanos);
        let left = if until_ns.is_some() { until.saturating_sub(now.duration_since(self.began)) } else { until };
        match self.wait {
            // A raw peer has the other core, and nobody waits for this one.
            Wait::Latency if matches!(self.lanes[0], Lane::Raw(_)) => std::hint::spin_loop(),
            Wait::Latency => rustix::thread::sched_yield(),
            // The process may be waiting for this very core.
            Wait::Balanced if idle < SPIN_BUDGET => rustix::thread::sched_yield(),
            Wait::Balanced | Wait::Efficient => self.sleep(left),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(sequence: u64) -> Vec<u8> {
        let mut message = vec![0xA5; 64];
        stamp(&mut message, sequence);
        message
    }

    /// B2: what comes back is checked against what was asked, not only against itself.
    #[test]
    fn b2_answers_that_are_swapped_or_changed_are_found() {
        let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
        for wrong in [false, true] {
            let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (mut peer, _) = listener.accept().unwrap();
            let mut lanes = Lanes::new(vec![Lane::raw(stream, 64).unwrap()], 64, Wait::Efficient).unwrap();
            lanes.begin(2);
            assert!(lanes.place(11).unwrap() && lanes.place(12).unwrap() && !lanes.place(13).unwrap());
            lanes.flush().unwrap();
            let mut asked = [0; 128];
            peer.read_exact(&mut asked).unwrap();
            assert_eq!(asked[..], [message(1), message(2)].concat());
            let answers = if wrong { [message(2), message(1)] } else { [message(1), message(2)] };
            peer.write_all(&answers.concat()).unwrap();
            lanes.pause(None).unwrap();
            let first = lanes.answered();
            if wrong {
                assert!(first.unwrap_err().to_string().starts_with("wrong answer"));
            } else {
                assert_eq!((first.unwrap(), lanes.answered().unwrap()), (Some(11), Some(12)));
                assert_eq!((lanes.answered().unwrap(), lanes.in_flight()), (None, 0));
            }
        }
        let mut changed = message(5);
        changed[63] ^= 1;
        assert!(sequence_in(&changed).is_err() && sequence_in(&changed[..4]).is_err());
    }
}
