//! A connection: frames both ways over one non-blocking TCP socket, driven by readiness (mio, epoll).
//!
//! The connection owns no memory for payloads. It asks a [`Bodies`] for somewhere to receive them, so that a
//! payload from the network can land where its reader will look at it, and it sends bodies from where they lie.

#![forbid(unsafe_code)]

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use mio::net::TcpStream;
use rustix::net::{RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendFlags, recv, recvmsg, sendmsg};
use socket2::SockRef;

pub use crate::Flush;
pub use crate::congestion::{Congestion, CongestionError, CongestionName};
use crate::frame::{FrameError, Header, Key, Limits, Seal};
use crate::hello::Session;
use crate::inbound::Inbound;
pub use crate::inbound::Scratch;
use crate::outbound::Outbound;

/// Where received payloads live: an arena, or the heap.
pub trait Bodies {
    /// A piece of writable memory. Dropping it without [`Bodies::give_back`] may leak it.
    type Body: AsRef<[u8]> + AsMut<[u8]>;
    /// Memory for a payload, exactly `bytes` long as `as_mut` shows it; `None` when there is no space.
    fn loan(&mut self, bytes: usize) -> Option<Self::Body>;
    /// Takes back a loan that holds nothing any more.
    fn give_back(&mut self, body: Self::Body);
    /// Cuts a loan to its first `bytes` bytes, which keep their content.
    fn truncate(&mut self, body: Self::Body, bytes: usize) -> Self::Body;
}

/// Bodies on the heap, for clients and tests. Allocates for each loan.
#[derive(Debug, Default, Clone, Copy)]
pub struct HeapBodies;

impl Bodies for HeapBodies {
    type Body = Vec<u8>;
    fn loan(&mut self, bytes: usize) -> Option<Vec<u8>> {
        Some(vec![0; bytes])
    }
    fn give_back(&mut self, _: Vec<u8>) {}
    fn truncate(&mut self, mut body: Vec<u8>, bytes: usize) -> Vec<u8> {
        body.truncate(bytes);
        body
    }
}

/// A frame as it was received.
#[derive(Debug)]
pub struct Frame<B> {
    /// The header; its two lengths are those of `key` and of the payload, received or refused.
    pub header: Header,
    /// The key, often empty.
    pub key: Key,
    /// The payload.
    pub body: Received<B>,
}

/// What became of a payload.
#[derive(Debug, PartialEq, Eq)]
pub enum Received<B> {
    /// It is all here.
    Whole(B),
    /// It was read off the stream and thrown away; the stream stays in step, so that the sender can be told.
    Refused {
        /// Its length, as the header states it.
        bytes: u64,
        /// Why it was thrown away.
        why: Refusal,
    },
}

/// Why a payload was thrown away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// Longer than [`Limits::payload_bytes_max`].
    TooLarge,
    /// [`Bodies::loan`] had no memory for it.
    NoSpace,
}

/// Settings of one connection.
#[derive(Debug, Clone, Copy)]
pub struct TcpConfig {
    /// Congestion control. Default [`Congestion::Auto`].
    pub congestion: Congestion,
    /// Frames that may wait to be sent, or wait in `take_sent`. Default 4096: 64 clients' worth of 64 calls.
    pub backlog_frames_max: usize,
    /// Bytes that may wait to be sent; one frame may always wait, however long. Default 64 MiB: one body at the
    /// default limit.
    pub backlog_bytes_max: u64,
    /// Bytes read by one `receive` before it pauses (see [`Connection::unfinished`]). Default 256 MiB: four
    /// bodies at the default limit, so that only a sender of refused terabytes meets it.
    pub read_bytes_per_call_max: u64,
    /// How long sent bytes may stay unacknowledged before the kernel gives up; zero leaves it to the system.
    /// Counts a closed window too, so a slow reader is cut off as a dead one is. Default zero.
    pub user_timeout: Duration,
}

impl Default for TcpConfig {
    fn default() -> Self {
        TcpConfig {
            congestion: Congestion::Auto,
            backlog_frames_max: 4096,
            backlog_bytes_max: 64 << 20,
            read_bytes_per_call_max: 256 << 20,
            user_timeout: Duration::ZERO,
        }
    }
}

/// What the two ends of a connection agreed on before their first frame. The default is plaintext between nobody in particular.
#[derive(Debug, Clone, Default)]
pub struct Terms {
    /// Of the headers we write.
    pub send: Seal,
    /// Of the headers we read.
    pub receive: Seal,
    /// Payloads carry a checksum, both ways. TCP has one of 16 bits, which lets one damaged segment in 65536 pass.
    pub payload_checksums: bool,
    /// Goes with every frame we write.
    pub incarnation: u64,
    /// Comes with every frame we read, or the connection ends.
    pub peer_incarnation: u64,
}

impl ConnectionError {
    /// What went wrong, with what the system or the frame said.
    #[must_use]
    pub fn with_cause(&self) -> String {
        match std::error::Error::source(self) {
            Some(source) => format!("{self}: {source}"),
            None => self.to_string(),
        }
    }
}

/// Whether an address is of this host's loopback, also when an IPv4 address comes as IPv6.
#[must_use]
pub fn on_loopback(address: SocketAddr) -> bool {
    address.ip().to_canonical().is_loopback()
}

/// Whether a connect that did not block is through.
///
/// # Errors
/// The connect's.
pub fn is_connected(stream: &impl AsFd) -> io::Result<bool> {
    let socket = SockRef::from(stream);
    if let Some(error) = socket.take_error()? {
        return Err(error);
    }
    match socket.peer_addr() {
        // A port of the range that clients are given, connected to itself (RFC 9293 3.5, simultaneous open).
        Ok(peer) if socket.local_addr()? == peer => Err(io::ErrorKind::ConnectionRefused.into()),
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(false),
        Err(error) => Err(error),
    }
}

impl Terms {
    /// What follows from a hello for the end that is `incarnation`. Where payloads have checksums headers are keyed, too.
    #[must_use]
    pub fn of(session: &Session, incarnation: u64) -> Terms {
        let seal = |key: Option<[u8; 32]>| match key {
            Some(key) if session.payload_checksums => Seal::keyed(key),
            _ => Seal::default(),
        };
        Terms {
            send: seal(session.send_key),
            receive: seal(session.receive_key),
            payload_checksums: session.payload_checksums,
            incarnation,
            peer_incarnation: session.peer.incarnation,
        }
    }
}

/// Why a connection is of no more use.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectionError {
    /// The peer sends no more.
    #[error("the peer closed the connection{}", if *mid_frame { " in the middle of a frame" } else { "" })]
    Closed {
        /// Bytes of an unfinished frame were lost.
        mid_frame: bool,
    },
    /// The peer sent something that is not a frame of ours.
    #[error("the stream is not one of frames")]
    Frame(#[from] FrameError),
    /// The socket failed.
    #[error("the socket failed")]
    Io(#[from] io::Error),
}

/// Why a frame was not taken. Every variant gives the body back.
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum SendError<Out> {
    /// Too much waits already; see [`Connection::backlog`]. Flush, take what was sent, try again.
    #[error("the connection's backlog is full")]
    Backlogged(Out),
    /// The connection failed, now or before; `receive` or `flush` says how.
    #[error("the connection is closed")]
    Closed(Out),
    /// The key is longer than [`crate::KEY_BYTES_MAX`].
    #[error("the key is longer than {} bytes", crate::KEY_BYTES_MAX)]
    KeyTooLong(Out),
    /// The body is longer than [`crate::frame::PAYLOAD_CEILING_BYTES`].
    #[error("the payload is longer than {} bytes", crate::frame::PAYLOAD_CEILING_BYTES)]
    PayloadTooLong(Out),
}

impl<Out> SendError<Out> {
    /// The body, which is the caller's again.
    pub fn into_body(self) -> Out {
        match self {
            SendError::Backlogged(body)
            | SendError::Closed(body)
            | SendError::KeyTooLong(body)
            | SendError::PayloadTooLong(body) => body,
        }
    }
}

impl<Out> core::fmt::Debug for SendError<Out> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            SendError::Backlogged(_) => "Backlogged",
            SendError::Closed(_) => "Closed",
            SendError::KeyTooLong(_) => "KeyTooLong",
            SendError::PayloadTooLong(_) => "PayloadTooLong",
        })
    }
}

/// What a connection did so far. Ever-growing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stats {
    /// Bytes read from the socket.
    pub received_bytes: u64,
    /// Bytes the kernel took.
    pub sent_bytes: u64,
    /// Of them, those of payloads in pieces.
    pub received_piece_bytes: u64,
    /// Frames received, refused ones included.
    pub received_frames: u64,
    /// Frames the kernel took whole.
    pub sent_frames: u64,
    /// System calls that read, those that found nothing included.
    pub reads: u64,
    /// System calls that wrote, those that were turned away included.
    pub writes: u64,
    /// Payload bytes moved in user space by the connection.
    pub copied_bytes: u64,
    /// Frames whose payload was refused.
    pub refused_frames: u64,
    /// Payload bytes read only to be thrown away.
    pub discarded_bytes: u64,
}

/// Frames both ways over one socket. `In` is what payloads are received into, `Out` what they are sent from.
///
/// Nothing here blocks. The owner registers [`Connection::source`] with its poll and, because mio's readiness
/// is edge-triggered, calls `receive` until it gives `None`, and `flush` when told writable.
///
/// ```
/// use praas_transport::tcp::{Connection, HeapBodies, Received, Scratch, TcpConfig, Terms};
/// use praas_transport::{Header, Limits};
/// # fn connect(to: std::net::SocketAddr) -> std::io::Result<mio::net::TcpStream> {
/// let stream = std::net::TcpStream::connect(to)?; // connected first: `new` asks who the peer is
/// stream.set_nonblocking(true)?;
/// let stream = mio::net::TcpStream::from_std(stream);
/// # Ok(stream) }
/// # let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
/// # let client = connect(listener.local_addr()?)?;
/// # let (server, _) = listener.accept()?;
/// # server.set_nonblocking(true)?;
/// # let server = mio::net::TcpStream::from_std(server);
/// let (limits, config) = (Limits::default(), TcpConfig::default());
/// let mut client: Connection<Vec<u8>, Vec<u8>> = Connection::new(client, limits, config, Terms::default())?;
/// let mut server: Connection<Vec<u8>, Vec<u8>> = Connection::new(server, limits, config, Terms::default())?;
/// let mut scratch = Scratch::default(); // one for all connections of a thread
/// client.send(&Header { kind: 1, ..Header::default() }, b"key", b"payload".to_vec())?;
/// let frame = loop {
///     if let Some(frame) = server.receive(&mut scratch, &mut HeapBodies)? {
///         break frame;
///     }
/// };
/// assert_eq!((&*frame.key, frame.body), (&b"key"[..], Received::Whole(b"payload".to_vec())));
/// assert_eq!(client.take_sent(), Some(b"payload".to_vec())); // ours again
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Connection<In, Out> {
    inbound: Inbound<In>,
    outbound: Outbound<Out>,
    peer_addr: SocketAddr,
    stream: TcpStream,
    /// Somebody else reads and writes the socket.
    lent: bool,
}

/// What another holder of a connection's socket needs to go on with it, between two frames.
pub(crate) fn terms_of<In, Out: AsRef<[u8]>>(inbound: &Inbound<In>, outbound: &Outbound<Out>) -> Terms
where
    In: AsRef<[u8]> + AsMut<[u8]>,
{
    let (payload_checksums, incarnation) = outbound.marks();
    Terms {
        send: outbound.seal_state().clone(),
        receive: inbound.seal().clone(),
        payload_checksums,
        incarnation,
        peer_incarnation: inbound.peer_incarnation(),
    }
}

/// A socket used for one call as if it did not block, though it may. `recvmsg` and `sendmsg` besides cost 50 to 100 ns less than `readv` and
/// `writev`, which go by way of the file.
pub(crate) struct AtOnce<'a>(pub(crate) BorrowedFd<'a>);

impl Read for AtOnce<'_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        Ok(recv(self.0, room, RecvFlags::DONTWAIT)?.0)
    }

    fn read_vectored(&mut self, rooms: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        Ok(recvmsg(self.0, rooms, &mut RecvAncillaryBuffer::default(), RecvFlags::DONTWAIT)?.bytes)
    }
}

impl Write for AtOnce<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        Ok(sendmsg(self.0, pieces, &mut SendAncillaryBuffer::default(), flags)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A socket that blocks, up to the time it was given; a signal ends the wait as that time does.
struct Waiting<'a>(&'a TcpStream);

impl Waiting<'_> {
    fn wait<T>(read: io::Result<T>) -> io::Result<T> {
        read.map_err(
            |error| if error.kind() == io::ErrorKind::Interrupted { io::ErrorKind::WouldBlock.into() } else { error },
        )
    }
}

impl Read for Waiting<'_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        Self::wait(recv(self.0, room, RecvFlags::empty()).map(|(count, _)| count).map_err(io::Error::from))
    }

    fn read_vectored(&mut self, rooms: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        let read = recvmsg(self.0, rooms, &mut RecvAncillaryBuffer::default(), RecvFlags::empty());
        Self::wait(read.map(|message| message.bytes).map_err(io::Error::from))
    }
}

impl<In: AsRef<[u8]> + AsMut<[u8]>, Out: AsRef<[u8]>> Connection<In, Out> {
    /// Takes over a *connected*, non-blocking stream: no delay (Nagle off), congestion control as configured.
    ///
    /// # Errors
    /// The socket's; `NotConnected` while a connect is still under way; `NotFound` for a congestion control
    /// that this kernel does not offer.
    pub fn new(stream: TcpStream, limits: Limits, config: TcpConfig, terms: Terms) -> io::Result<Self> {
        let peer_addr = stream.peer_addr()?;
        stream.set_nodelay(true)?;
        let on_this_host = on_loopback(peer_addr) || peer_addr.ip() == stream.local_addr()?.ip();
        config.congestion.apply(&stream, on_this_host)?;
        if !config.user_timeout.is_zero() {
            SockRef::from(&stream).set_tcp_user_timeout(Some(config.user_timeout))?;
        }
        Ok(Connection {
            inbound: Inbound::new(
                limits,
                config.read_bytes_per_call_max,
                terms.receive,
                terms.payload_checksums,
                terms.peer_incarnation,
            ),
            outbound: Outbound::new(
                config.backlog_frames_max,
                config.backlog_bytes_max,
                terms.send,
                terms.payload_checksums,
                terms.incarnation,
            ),
            peer_addr,
            stream,
            lent: false,
        })
    }

    /// The next frame, or `None` when the socket has no more for now. Never blocks.
    ///
    /// One system call for a frame with a payload of up to 4 KiB, and no copy in user space; see `Stats`.
    ///
    /// # Errors
    /// Every error is final. The bodies still held come back through [`Connection::abandon`].
    #[inline]
    pub fn receive<B: Bodies<Body = In>>(
        &mut self,
        scratch: &mut Scratch<In>,
        bodies: &mut B,
    ) -> Result<Option<Frame<In>>, ConnectionError> {
        if self.lent {
            return Ok(None);
        }
        self.inbound.receive(&mut AtOnce(self.stream.as_fd()), scratch, bodies)
    }

    /// Lets [`Connection::receive_waiting`] wait, up to `longest`. Nothing else blocks because of it.
    ///
    /// # Errors
    /// The socket's.
    pub fn wait_in_reads(&mut self, longest: Duration) -> io::Result<()> {
        let socket = SockRef::from(&self.stream);
        socket.set_read_timeout(Some(longest))?;
        socket.set_nonblocking(false)?;
        Ok(())
    }

    /// As [`Connection::receive`], but waits for bytes in the one read it makes, as long as [`Connection::wait_in_reads`] said:
    /// one system call where `poll` and a read are two. `None` when that time is over, a signal came, or a frame is not whole yet.
    ///
    /// # Errors
    /// As `receive`.
    #[inline]
    pub fn receive_waiting<B: Bodies<Body = In>>(
        &mut self,
        scratch: &mut Scratch<In>,
        bodies: &mut B,
    ) -> Result<Option<Frame<In>>, ConnectionError> {
        // One read: a peer that sends a byte now and then must not hold the caller past a deadline of its own.
        self.inbound.receive_within(1, &mut Waiting(&self.stream), scratch, bodies)
    }

    /// Sends a frame: written at once when nothing waits before it, else queued. Never blocks.
    ///
    /// The header's two lengths are filled in here. The body comes back through [`Connection::take_sent`] or
    /// [`Connection::flush`] when the kernel has all of it.
    ///
    /// # Errors
    /// [`SendError`], with the body. `Backlogged` is an answer: frames in the backlog plus sent bodies nobody
    /// took stay within [`TcpConfig::backlog_frames_max`].
    #[inline]
    pub fn send(&mut self, header: &Header, key: &[u8], body: Out) -> Result<(), SendError<Out>> {
        if self.lent {
            self.outbound.send(None, header, key, body)
        } else {
            self.outbound.send(Some(&mut AtOnce(self.stream.as_fd())), header, key, body)
        }
    }

    /// Like [`Connection::send`], without the system call: several frames queued leave in one at the next flush.
    ///
    /// # Errors
    /// As `send`.
    #[inline]
    pub fn queue(&mut self, header: &Header, key: &[u8], body: Out) -> Result<(), SendError<Out>> {
        self.outbound.send(None, header, key, body)
    }

    /// Writes what waits, up to 64 frames a system call, and gives each body that the kernel has taken to `done`.
    ///
    /// # Errors
    /// Every error is final. The bodies still held come back through [`Connection::abandon`].
    pub fn flush(&mut self, done: &mut dyn FnMut(Out)) -> Result<Flush, ConnectionError> {
        if self.lent {
            return Ok(if self.wants_write() { Flush::Blocked } else { Flush::Done });
        }
        self.outbound.flush(&mut AtOnce(self.stream.as_fd()), done)
    }

    /// Takes a frame back of which nothing is written yet, by its kind and call: its body.
    pub fn withdraw(&mut self, kind: u8, call: u64) -> Option<Out> {
        self.outbound.withdraw(kind, call)
    }

    /// A body that the kernel has taken whole, to be released by its owner.
    #[inline]
    pub fn take_sent(&mut self) -> Option<Out> {
        self.outbound.take_sent()
    }

    /// Gives back every body still held, both ways. To be called before a failed connection is dropped, when a
    /// dropped body would leak.
    pub fn abandon<B: Bodies<Body = In>>(&mut self, bodies: &mut B, done: &mut dyn FnMut(Out)) {
        self.inbound.abandon(bodies);
        self.outbound.abandon(done);
    }

    /// The socket, to be registered and deregistered.
    pub fn source(&mut self) -> &mut TcpStream {
        &mut self.stream
    }

    /// The other end.
    #[must_use]
    pub fn peer_addr(&self) -> SocketAddr {
        self.peer_addr
    }

    /// Something waits to be written: ask the poll for writability, then flush.
    #[inline]
    #[must_use]
    pub fn wants_write(&self) -> bool {
        !self.outbound.is_empty()
    }

    /// Frames and bytes that wait for the kernel.
    #[must_use]
    pub fn backlog(&self) -> (usize, u64) {
        self.outbound.backlog()
    }

    /// A payload in pieces waits to be sent or is under way: a short frame sent now arrives before it.
    #[must_use]
    pub fn sends_pieces(&self) -> bool {
        self.outbound.sends_pieces()
    }

    /// The last `receive` gave `None` because it had read enough for one call, not because nothing was left:
    /// call it again before sleeping, there may be no further edge.
    #[inline]
    #[must_use]
    pub fn unfinished(&self) -> bool {
        self.inbound.unfinished()
    }

    /// The last read came back short and nothing is carried over: a further `receive` would most likely find
    /// nothing. An owner that also watches `is_read_closed` of the event may save that system call.
    #[inline]
    #[must_use]
    pub fn drained(&self) -> bool {
        self.inbound.drained()
    }

    /// Part of a frame has arrived and the rest has not: what a deadline per frame looks at.
    #[must_use]
    pub fn mid_frame(&self) -> bool {
        self.inbound.mid_frame()
    }

    /// Nothing is under way: no part of a frame was read that was not handed out, and nothing waits to be written.
    #[inline]
    #[must_use]
    pub fn is_at_rest(&self) -> bool {
        !self.inbound.mid_frame() && self.outbound.is_at_rest()
    }

    /// From here on no read goes beyond the frame it is for, so that a connection that is to be given back comes to rest.
    pub fn read_no_further(&mut self) {
        self.inbound.read_no_further();
    }

    /// The next frame's number each way, received and sent.
    #[must_use]
    pub fn sequences(&self) -> (u64, u64) {
        (self.inbound.seal().sequence(), self.outbound.seal_state().sequence())
    }

    /// What another holder of the socket needs to go on with the connection, when it is at rest. From then on this one neither reads nor
    /// writes; frames may be queued. [`Connection::resume`] takes it up again.
    pub fn lend(&mut self) -> Option<Terms> {
        if self.lent || !self.is_at_rest() {
            return None;
        }
        self.lent = true;
        Some(terms_of(&self.inbound, &self.outbound))
    }

    /// Goes on with a connection that was lent, from the frames of these numbers on: those that its other holder ended at.
    pub fn resume(&mut self, received: u64, sent: u64) {
        if std::mem::take(&mut self.lent) {
            self.inbound.resume(received);
            self.outbound.resume(sent);
        }
    }

    /// How much of the stream was read and written by its holders. Some system calls.
    ///
    /// # Errors
    /// The system's.
    pub fn moved(&self) -> io::Result<crate::Moved> {
        crate::acknowledged::moved(self.stream.as_fd())
    }

    /// Whether the other end's kernel still answers ours. One system call.
    ///
    /// # Errors
    /// The system's.
    pub fn acknowledged(&self) -> io::Result<crate::Acknowledged> {
        crate::acknowledged::acknowledged(self.stream.as_fd())
    }

    /// A payload in pieces is under way.
    #[must_use]
    pub fn in_pieces(&self) -> bool {
        self.inbound.in_pieces()
    }

    /// The congestion control in force, as the kernel names it.
    ///
    /// # Errors
    /// The socket's.
    pub fn congestion_control(&self) -> io::Result<String> {
        Congestion::of(&self.stream)
    }

    /// What the connection did so far.
    #[must_use]
    pub fn stats(&self) -> Stats {
        stats(&self.inbound, &self.outbound)
    }

    /// The socket and the two halves, for a reactor that drives them in its own way.
    pub(crate) fn into_parts(self) -> (TcpStream, Inbound<In>, Outbound<Out>, SocketAddr) {
        (self.stream, self.inbound, self.outbound, self.peer_addr)
    }
}

pub(crate) fn stats<In, Out>(inbound: &Inbound<In>, outbound: &Outbound<Out>) -> Stats {
    let (inbound, outbound) = (&inbound.stats, &outbound.stats);
    Stats {
        received_bytes: inbound.bytes,
        received_piece_bytes: inbound.piece_bytes,
        sent_bytes: outbound.bytes,
        received_frames: inbound.frames,
        sent_frames: outbound.frames,
        reads: inbound.reads,
        writes: outbound.writes,
        copied_bytes: inbound.copied_bytes,
        refused_frames: inbound.refused_frames,
        discarded_bytes: inbound.discarded_bytes,
    }
}

impl<In, Out> AsFd for Connection<In, Out> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
