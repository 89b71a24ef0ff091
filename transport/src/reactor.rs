//! One wait for everything a thread waits for: connections, a listener, and whatever else has a descriptor.
//!
//! Two kinds, one meaning. [`Kind::Uring`] hands reads and writes to the kernel and is told when they are done; [`Kind::Epoll`] is told
//! that a socket is ready and reads and writes itself. An owner sees neither: it waits, looks at each [`Event`], and calls
//! [`Socket::receive`] and [`Socket::flush`] where there is something to do.
//!
//! Events are edges: one may come though nothing is left to do, and none comes twice for the same bytes. So an owner receives until
//! there is nothing, or remembers that it did not.

#[allow(unsafe_code, reason = "buffers that the kernel writes to")]
mod buffers;
mod epoll;
#[allow(unsafe_code, reason = "requests that point to memory")]
mod uring;
mod zero_copy;

use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::BorrowedFd;
use std::str::FromStr;
use std::time::Duration;

use crate::Flush;
use crate::frame::{Header, Limits};
use crate::tcp::{Bodies, Connection, ConnectionError, Frame, Scratch, SendError, Stats, TcpConfig, Terms};
use epoll::Epoll;
pub use uring::Owned;
use uring::Uring;
pub use zero_copy::{ZeroCopy, ZeroCopyStats};

/// Which reactor to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Choice {
    /// The faster of those that work here (`docs/decisions/0016`): see [`choose`]. The default.
    #[default]
    Auto,
    /// io_uring, or an error that says why not.
    Uring,
    /// epoll.
    Epoll,
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Choice::Auto => "auto",
            Choice::Uring => "uring",
            Choice::Epoll => "epoll",
        })
    }
}

impl FromStr for Choice {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Choice::Auto),
            "uring" => Ok(Choice::Uring),
            "epoll" => Ok(Choice::Epoll),
            _ => Err(format!("`{text}` is not a reactor: use one of `auto`, `uring`, `epoll`")),
        }
    }
}

/// What a reactor is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// io_uring.
    Uring,
    /// epoll, through mio.
    Epoll,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Uring => "uring",
            Kind::Epoll => "epoll",
        })
    }
}

/// Why a reactor is not what it might be.
#[derive(Debug, thiserror::Error)]
#[error("io_uring cannot be used here: {what} failed: {source}{}", advice(source))]
pub struct NoUring {
    /// What was tried.
    pub what: &'static str,
    /// What the system said.
    pub source: io::Error,
}

/// What an error number most often means here.
fn advice(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => {
            " (a seccomp filter, as container engines have it, or kernel.io_uring_disabled forbids it)"
        }
        Some(libc::ENOSYS) => " (this kernel has none, or a seccomp filter says so)",
        Some(libc::ENOMEM) => " (RLIMIT_MEMLOCK, see `ulimit -l`, or memory)",
        Some(libc::EINVAL) => " (a kernel before 6.1 lacks a part that is needed)",
        _ => "",
    }
}

/// Makes a ring, completes a no-op in it and receives through a socket pair as a connection would.
///
/// # Errors
/// The first part that does not work.
pub fn probe() -> Result<(), NoUring> {
    uring::probe()
}

/// What `choice` comes to here, and why. A ring where one works: it is as fast as epoll with one connection, which its owner may have
/// read without it ([`Socket::heat`]), and faster with many (`docs/decisions/0025`).
///
/// # Errors
/// [`Choice::Uring`] where there is no io_uring.
pub fn choose(choice: Choice) -> Result<(Kind, String), NoUring> {
    match choice {
        Choice::Epoll => Ok((Kind::Epoll, "as asked".into())),
        Choice::Uring => probe().map(|()| (Kind::Uring, "as asked, and a ring works".into())),
        Choice::Auto => Ok(match probe() {
            Ok(()) => (Kind::Uring, "a ring works".into()),
            Err(error) => (Kind::Epoll, error.to_string()),
        }),
    }
}

/// Which readiness of a descriptor is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interest {
    /// Something to read, or the end.
    Read,
    /// Room to write.
    Write,
    /// Either.
    Both,
}

/// Something happened to what was registered with this token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event {
    /// As registered.
    pub token: usize,
    /// Something may be there to read, or to accept.
    pub readable: bool,
    /// The peer sends no more, or the descriptor failed: what is there should be read now.
    pub closing: bool,
}

/// Waits for descriptors and carries the bytes of connections. Belongs to the thread that first waits.
#[derive(Debug)]
pub struct Reactor<In, Out>(Inner<In, Out>);

#[derive(Debug)]
enum Inner<In, Out> {
    Epoll(Epoll),
    Uring(Box<Uring<In, Out>>),
}

impl<In: Owned + AsMut<[u8]>, Out: Owned> Reactor<In, Out> {
    /// A reactor of this kind.
    ///
    /// # Errors
    /// The system's.
    pub fn new(kind: Kind) -> io::Result<Self> {
        Ok(Reactor(match kind {
            Kind::Epoll => Inner::Epoll(Epoll::new()?),
            Kind::Uring => Inner::Uring(Box::new(Uring::new().map_err(|error| error.source)?)),
        }))
    }

    /// What it is made of.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match &self.0 {
            Inner::Epoll(_) => Kind::Epoll,
            Inner::Uring(_) => Kind::Uring,
        }
    }

    /// Whether connections adopted from now on send long bodies without a copy. epoll never does.
    pub fn set_zero_copy(&mut self, zero_copy: ZeroCopy) {
        if let Inner::Uring(uring) = &mut self.0 {
            uring.zero_copy = zero_copy;
        }
    }

    /// What came of zero-copy sends, of all connections.
    #[must_use]
    pub fn zero_copy_stats(&self) -> ZeroCopyStats {
        match &self.0 {
            Inner::Epoll(_) => ZeroCopyStats::default(),
            Inner::Uring(uring) => uring.zero_copy_stats,
        }
    }

    /// Tells of this descriptor's readiness from now on. The descriptor stays its owner's, who calls [`Reactor::unwatch`] before it
    /// closes it.
    ///
    /// # Errors
    /// The system's.
    pub fn watch(&mut self, fd: BorrowedFd<'_>, token: usize, interest: Interest) -> io::Result<()> {
        match &mut self.0 {
            Inner::Epoll(epoll) => epoll.watch(fd, token, interest),
            Inner::Uring(uring) => {
                uring.watch(fd, token, interest);
                Ok(())
            }
        }
    }

    /// Tells no more of what was watched with this token.
    pub fn unwatch(&mut self, fd: BorrowedFd<'_>, token: usize) {
        match &mut self.0 {
            Inner::Epoll(epoll) => epoll.unwatch(fd),
            Inner::Uring(uring) => uring.unwatch(token),
        }
    }

    /// Accepts connections at a listener, which is non-blocking.
    ///
    /// # Errors
    /// The system's.
    pub fn listen(&mut self, listener: &TcpListener, token: usize) -> io::Result<()> {
        match &mut self.0 {
            Inner::Epoll(epoll) => epoll.watch(std::os::fd::AsFd::as_fd(listener), token, Interest::Read),
            Inner::Uring(uring) => {
                uring.listen(listener, token);
                Ok(())
            }
        }
    }

    /// The next connection that came, non-blocking; `None` when there is none for now.
    ///
    /// # Errors
    /// The system's: of one connection (`ECONNABORTED`), or for lack of descriptors or memory.
    pub fn accept(&mut self, listener: &TcpListener, token: usize) -> io::Result<Option<TcpStream>> {
        match &mut self.0 {
            Inner::Epoll(_) => match listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(true)?;
                    Ok(Some(stream))
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
                Err(error) => Err(error),
            },
            Inner::Uring(uring) => uring.accept(token),
        }
    }

    /// Takes over a connected stream.
    ///
    /// # Errors
    /// As [`Connection::new`].
    pub fn adopt(
        &mut self,
        stream: TcpStream,
        token: usize,
        limits: Limits,
        config: TcpConfig,
        terms: Terms,
    ) -> io::Result<Socket<In, Out>> {
        stream.set_nonblocking(true)?;
        Ok(Socket(match &mut self.0 {
            Inner::Epoll(epoll) => {
                let mut connection = Connection::new(mio::net::TcpStream::from_std(stream), limits, config, terms)?;
                epoll.register(connection.source(), token)?;
                Driven::Epoll(connection)
            }
            Inner::Uring(uring) => Driven::Uring(uring.adopt(stream, token, limits, config, terms)?),
        }))
    }

    /// Waits until something happens, at most so long; `None` waits for ever. Zero looks and does not wait: with io_uring a look at
    /// memory, and a system call only when there is something.
    ///
    /// # Errors
    /// The system's; never because of a signal.
    pub fn wait(&mut self, events: &mut Vec<Event>, timeout: Option<Duration>) -> io::Result<()> {
        events.clear();
        match &mut self.0 {
            Inner::Epoll(epoll) => epoll.wait(events, timeout),
            Inner::Uring(uring) => uring.wait(events, timeout),
        }
    }

    /// What was asked for waits for the next [`Reactor::wait`] to begin. Never with epoll.
    pub fn has_requests(&mut self) -> bool {
        match &mut self.0 {
            Inner::Epoll(_) => false,
            Inner::Uring(uring) => uring.has_requests(),
        }
    }

    /// Takes back the bodies of sockets that were closed while the kernel still had them.
    pub fn reclaim<B: Bodies<Body = In>>(&mut self, bodies: &mut B, done: &mut dyn FnMut(Out)) {
        if let Inner::Uring(uring) = &mut self.0 {
            uring.reclaim(bodies, done);
        }
    }
}

/// A connection of a reactor: frames both ways. As [`Connection`], whose words are explained there.
#[derive(Debug)]
pub struct Socket<In, Out>(Driven<In, Out>);

#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "a reactor has all of one kind")]
enum Driven<In, Out> {
    Epoll(Connection<In, Out>),
    Uring(uring::Socket<In, Out>),
}

impl<In: Owned + AsMut<[u8]>, Out: Owned> Socket<In, Out> {
    /// The next frame, or `None` when there is no more for now. Never blocks.
    ///
    /// # Errors
    /// Every error is final: close it.
    #[inline]
    pub fn receive<B: Bodies<Body = In>>(
        &mut self,
        reactor: &mut Reactor<In, Out>,
        scratch: &mut Scratch<In>,
        bodies: &mut B,
    ) -> Result<Option<Frame<In>>, ConnectionError> {
        match (&mut self.0, &mut reactor.0) {
            (Driven::Epoll(connection), _) => connection.receive(scratch, bodies),
            (Driven::Uring(socket), Inner::Uring(uring)) => socket.receive(uring, scratch, bodies),
            (Driven::Uring(_), Inner::Epoll(_)) => unreachable!("{}", OTHER_REACTOR),
        }
    }

    /// From now on [`Socket::receive`] reads the socket itself, and no event need tell that there is something to read: for an owner who
    /// looks again and again, which brings one connection's bytes sooner than a ring does. Call [`Socket::cool`] before waiting for events.
    /// Nothing with epoll, which reads like that anyway.
    pub fn heat(&mut self, reactor: &mut Reactor<In, Out>) {
        if let (Driven::Uring(socket), Inner::Uring(uring)) = (&mut self.0, &mut reactor.0) {
            socket.heat(uring);
        }
    }

    /// Events tell of this socket again. If the last [`Socket::receive`] gave a frame, call it until it gives none.
    pub fn cool(&mut self, reactor: &mut Reactor<In, Out>) {
        if let (Driven::Uring(socket), Inner::Uring(uring)) = (&mut self.0, &mut reactor.0) {
            socket.cool(uring);
        }
    }

    /// Queues a frame for the next flush.
    ///
    /// # Errors
    /// As [`Connection::queue`].
    #[inline]
    pub fn queue(&mut self, header: &Header, key: &[u8], body: Out) -> Result<(), SendError<Out>> {
        match &mut self.0 {
            Driven::Epoll(connection) => connection.queue(header, key, body),
            Driven::Uring(socket) => socket.queue(header, key, body),
        }
    }

    /// Writes what waits, or sees to it that it is written, and gives each body that the kernel is done with to `done`. `Done` when all
    /// of them are.
    ///
    /// # Errors
    /// Every error is final: close it.
    #[inline]
    pub fn flush(
        &mut self,
        reactor: &mut Reactor<In, Out>,
        done: &mut dyn FnMut(Out),
    ) -> Result<Flush, ConnectionError> {
        match (&mut self.0, &mut reactor.0) {
            (Driven::Epoll(connection), _) => connection.flush(done),
            (Driven::Uring(socket), Inner::Uring(uring)) => socket.flush(uring, done),
            (Driven::Uring(_), Inner::Epoll(_)) => unreachable!("{}", OTHER_REACTOR),
        }
    }

    /// Closes it. Bodies come back at once, or by [`Reactor::reclaim`] when the kernel lets go of them.
    pub fn close<B: Bodies<Body = In>>(
        self,
        reactor: &mut Reactor<In, Out>,
        bodies: &mut B,
        done: &mut dyn FnMut(Out),
    ) {
        match (self.0, &mut reactor.0) {
            (Driven::Epoll(mut connection), _) => connection.abandon(bodies, done),
            (Driven::Uring(socket), Inner::Uring(uring)) => socket.close(uring, bodies, done),
            (Driven::Uring(_), Inner::Epoll(_)) => unreachable!("{}", OTHER_REACTOR),
        }
    }

    /// The other end.
    #[must_use]
    pub fn peer_addr(&self) -> SocketAddr {
        match &self.0 {
            Driven::Epoll(connection) => connection.peer_addr(),
            Driven::Uring(socket) => socket.peer_addr(),
        }
    }

    /// Something waits to be written, or to be let go of.
    #[inline]
    #[must_use]
    pub fn wants_write(&self) -> bool {
        self.backlog().0 > 0
    }

    /// Frames and bytes that wait for the kernel: to be taken, or, sent without a copy, to be let go of.
    #[inline]
    #[must_use]
    pub fn backlog(&self) -> (usize, u64) {
        match &self.0 {
            Driven::Epoll(connection) => connection.backlog(),
            Driven::Uring(socket) => socket.backlog(),
        }
    }

    /// The last `receive` gave `None` because it had done enough, not because nothing was left.
    #[inline]
    #[must_use]
    pub fn unfinished(&self) -> bool {
        match &self.0 {
            Driven::Epoll(connection) => connection.unfinished(),
            Driven::Uring(socket) => socket.unfinished(),
        }
    }

    /// A further `receive` would most likely find nothing.
    #[inline]
    #[must_use]
    pub fn drained(&self) -> bool {
        match &self.0 {
            Driven::Epoll(connection) => connection.drained(),
            Driven::Uring(socket) => socket.drained(),
        }
    }

    /// Part of a frame has arrived and the rest has not.
    #[must_use]
    pub fn mid_frame(&self) -> bool {
        match &self.0 {
            Driven::Epoll(connection) => connection.mid_frame(),
            Driven::Uring(socket) => socket.mid_frame(),
        }
    }

    /// Whether the other end's kernel still answers ours. One system call.
    ///
    /// # Errors
    /// The system's.
    pub fn acknowledged(&self, reactor: &Reactor<In, Out>) -> io::Result<crate::Acknowledged> {
        match (&self.0, &reactor.0) {
            (Driven::Epoll(connection), _) => connection.acknowledged(),
            (Driven::Uring(socket), Inner::Uring(uring)) => crate::acknowledged::acknowledged(socket.fd(uring)),
            (Driven::Uring(_), Inner::Epoll(_)) => unreachable!("{}", OTHER_REACTOR),
        }
    }

    /// As [`Connection::lend`], when nothing is under way in the reactor either. No event tells of it until [`Socket::resume`].
    pub fn lend(&mut self, reactor: &mut Reactor<In, Out>) -> Option<Terms> {
        match (&mut self.0, &mut reactor.0) {
            (Driven::Epoll(connection), Inner::Epoll(epoll)) => {
                if !connection.is_at_rest() {
                    return None;
                }
                epoll.deregister(connection.source()).ok()?;
                connection.lend()
            }
            (Driven::Uring(socket), Inner::Uring(uring)) => socket.lend(uring),
            _ => unreachable!("{}", OTHER_REACTOR),
        }
    }

    /// As [`Connection::resume`]; events tell of it again. What has arrived meanwhile is told as well.
    ///
    /// # Errors
    /// The system's: close it.
    pub fn resume(&mut self, reactor: &mut Reactor<In, Out>, token: usize, received: u64, sent: u64) -> io::Result<()> {
        match (&mut self.0, &mut reactor.0) {
            (Driven::Epoll(connection), Inner::Epoll(epoll)) => {
                connection.resume(received, sent);
                epoll.register(connection.source(), token)
            }
            (Driven::Uring(socket), Inner::Uring(uring)) => {
                socket.resume(uring, received, sent);
                Ok(())
            }
            _ => unreachable!("{}", OTHER_REACTOR),
        }
    }

    /// The socket, to be handed over when it was lent.
    #[must_use]
    pub fn fd<'a>(&'a self, reactor: &'a Reactor<In, Out>) -> BorrowedFd<'a> {
        match (&self.0, &reactor.0) {
            (Driven::Epoll(connection), _) => std::os::fd::AsFd::as_fd(connection),
            (Driven::Uring(socket), Inner::Uring(uring)) => socket.fd(uring),
            (Driven::Uring(_), Inner::Epoll(_)) => unreachable!("{}", OTHER_REACTOR),
        }
    }

    /// How far its holders have moved the stream. Some system calls.
    ///
    /// # Errors
    /// The system's.
    pub fn moved(&self, reactor: &Reactor<In, Out>) -> io::Result<crate::Moved> {
        crate::acknowledged::moved(self.fd(reactor))
    }

    /// Ends the connection for everybody who holds it, at once.
    pub fn shut_down(&self, reactor: &Reactor<In, Out>) {
        // Not connected any more: it has ended.
        let _ = rustix::net::shutdown(self.fd(reactor), rustix::net::Shutdown::Both);
    }

    /// A payload in pieces is under way.
    #[must_use]
    pub fn in_pieces(&self) -> bool {
        match &self.0 {
            Driven::Epoll(connection) => connection.in_pieces(),
            Driven::Uring(socket) => socket.in_pieces(),
        }
    }

    /// A payload in pieces waits to be sent or is under way: a short frame sent now arrives before it.
    #[must_use]
    pub fn sends_pieces(&self) -> bool {
        match &self.0 {
            Driven::Epoll(connection) => connection.sends_pieces(),
            Driven::Uring(socket) => socket.sends_pieces(),
        }
    }

    /// What it did so far. With io_uring `reads` and `writes` are completions.
    #[must_use]
    pub fn stats(&self) -> Stats {
        match &self.0 {
            Driven::Epoll(connection) => connection.stats(),
            Driven::Uring(socket) => socket.stats(),
        }
    }
}

const OTHER_REACTOR: &str = "a socket is used with the reactor that adopted it";
