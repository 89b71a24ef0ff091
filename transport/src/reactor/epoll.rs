//! Readiness through mio: the reactor that works everywhere.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

use mio::unix::SourceFd;
use mio::{Events, Poll, Token};

use super::{Event, Interest};

/// Events taken from the kernel by one call; more come with the next.
const EVENTS_MAX: usize = 1024;

#[derive(Debug)]
pub(crate) struct Epoll {
    poll: Poll,
    events: Events,
}

impl Epoll {
    pub(crate) fn new() -> io::Result<Epoll> {
        Ok(Epoll { poll: Poll::new()?, events: Events::with_capacity(EVENTS_MAX) })
    }

    pub(crate) fn watch(&mut self, fd: BorrowedFd<'_>, token: usize, interest: Interest) -> io::Result<()> {
        let interest = match interest {
            Interest::Read => mio::Interest::READABLE,
            Interest::Write => mio::Interest::WRITABLE,
            Interest::Both => mio::Interest::READABLE | mio::Interest::WRITABLE,
        };
        self.poll.registry().register(&mut SourceFd(&fd.as_raw_fd()), Token(token), interest)
    }

    pub(crate) fn unwatch(&mut self, fd: BorrowedFd<'_>) {
        // Not watched, or closed elsewhere: there is nothing to undo.
        let _ = self.poll.registry().deregister(&mut SourceFd(&fd.as_raw_fd()));
    }

    pub(crate) fn register(&mut self, stream: &mut mio::net::TcpStream, token: usize) -> io::Result<()> {
        self.poll.registry().register(stream, Token(token), mio::Interest::READABLE | mio::Interest::WRITABLE)
    }

    pub(crate) fn deregister(&mut self, stream: &mut mio::net::TcpStream) -> io::Result<()> {
        self.poll.registry().deregister(stream)
    }

    pub(crate) fn wait(&mut self, events: &mut Vec<Event>, timeout: Option<Duration>) -> io::Result<()> {
        match self.poll.poll(&mut self.events, timeout) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(()),
            Err(error) => return Err(error),
        }
        events.extend(self.events.iter().map(|event| Event {
            token: event.token().0,
            readable: event.is_readable() || event.is_read_closed(),
            closing: event.is_read_closed(),
        }));
        Ok(())
    }
}
