//! One thread, epoll through mio, edge-triggered: what our epoll reactor is made of, with nothing in it.

use std::io::{self, Read, Write};
use std::net::TcpListener;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use mio::{Events, Interest, Poll, Token};

use super::linger;
use super::stage::Stage;
use crate::placement::Wait;

const LISTENER: Token = Token(usize::MAX);

struct Connection {
    stream: mio::net::TcpStream,
    stage: Stage,
    /// Of the whole messages, how many bytes were returned already.
    returned: usize,
}

pub(super) fn serve(wait: Wait, listener: TcpListener) -> Result<()> {
    listener.set_nonblocking(true)?;
    let mut listener = mio::net::TcpListener::from_std(listener);
    let mut poll = Poll::new().context("epoll")?;
    poll.registry().register(&mut listener, LISTENER, Interest::READABLE)?;
    let mut events = Events::with_capacity(1024);
    let mut connections: Vec<Option<Connection>> = Vec::new();
    let linger = linger(wait);
    let mut last = Instant::now();
    loop {
        let looks_on = !linger.is_zero() && last.elapsed() < linger;
        match poll.poll(&mut events, looks_on.then_some(Duration::ZERO)) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            polled => polled.context("epoll_wait")?,
        }
        if !events.is_empty() && !linger.is_zero() {
            last = Instant::now();
        }
        for event in &events {
            if event.token() == LISTENER {
                while let Ok((mut stream, _)) = listener.accept() {
                    let at = connections.iter().position(Option::is_none).unwrap_or(connections.len());
                    let interest = Interest::READABLE | Interest::WRITABLE;
                    poll.registry().register(&mut stream, Token(at), interest).context("register")?;
                    let connection = Some(Connection { stream, stage: Stage::new(), returned: 0 });
                    match connections.get_mut(at) {
                        Some(free) => *free = connection,
                        None => connections.push(connection),
                    }
                }
                continue;
            }
            let Some(slot) = connections.get_mut(event.token().0) else { continue };
            let Some(connection) = slot else { continue };
            match connection.go_on() {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // Gone, which is how a connection ends.
                Ok(()) | Err(_) => *slot = None,
            }
        }
    }
}

impl Connection {
    /// Receives and returns until one of them would block, or the other side is gone.
    fn go_on(&mut self) -> io::Result<()> {
        let mut drained = false;
        loop {
            while self.returned < self.stage.whole_bytes() {
                self.returned +=
                    self.stage.whole().get(self.returned..).map_or(Ok(0), |rest| self.stream.write(rest))?;
            }
            self.stage.returned(std::mem::take(&mut self.returned));
            if drained {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            let room = self.stage.room();
            let room_bytes = room.len();
            let got = self.stream.read(room)?;
            if got == 0 {
                return Ok(());
            }
            // A short read has emptied the socket: the next edge is one to wait for. But for the first, a room of few bytes.
            drained = got < room_bytes;
            self.stage.received(got)?;
        }
    }
}
