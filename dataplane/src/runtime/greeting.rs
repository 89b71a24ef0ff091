//! Connections that have not finished the hello: they hold a kilobyte each, for a while, and there are only so many of them.

use std::collections::VecDeque;
use std::net::TcpStream;
use std::sync::Arc;

use praas_transport::hello::{HelloError, Responder, ResponderConfig, Session};
use praas_transport::tcp::on_loopback;

use crate::clock::unix_s;

/// How long a connection may take to say hello.
const HELLO_NS: u64 = 2_000_000_000;

/// What became of a connection that was looked at.
#[derive(Debug)]
pub(super) enum Greeted {
    /// It has more to say.
    Pending,
    /// It is who it says it is; frames follow.
    Done(TcpStream, Session),
    /// It is no use; to be closed.
    Refused(TcpStream, HelloError),
}

/// One connection before the end of its hello.
#[derive(Debug)]
struct Greeting {
    stream: TcpStream,
    responder: Responder,
    /// Names it, so that an event for its predecessor is not taken for its own.
    number: usize,
    since_ns: u64,
}

/// All of them, in the order of their arrival. Those given up are returned under the number they are watched by.
#[derive(Debug)]
pub(super) struct Greetings {
    waiting: VecDeque<Greeting>,
    config: Arc<ResponderConfig>,
    max: usize,
    next: usize,
}

impl Greetings {
    pub(super) fn new(config: ResponderConfig, max: usize) -> Greetings {
        Greetings { waiting: VecDeque::with_capacity(max), config: Arc::new(config), max, next: 0 }
    }

    /// Whether one more has to take another's place.
    pub(super) fn is_full(&self) -> bool {
        self.waiting.len() >= self.max
    }

    /// Gives up the oldest: a newcomer has the time of a whole queue, whatever those before it say. `None` when nobody waits.
    pub(super) fn take_oldest(&mut self) -> Option<(usize, TcpStream)> {
        self.waiting.pop_front().map(|greeting| (greeting.number, greeting.stream))
    }

    /// Takes a new connection in and hands it to `watch` under its number, which it returns.
    pub(super) fn enter(
        &mut self,
        stream: TcpStream,
        now_ns: u64,
        watch: impl FnOnce(&TcpStream, usize) -> std::io::Result<()>,
    ) -> Result<usize, HelloError> {
        let is_local = [stream.peer_addr()?, stream.local_addr()?].into_iter().all(on_loopback);
        let responder = Responder::new(Arc::clone(&self.config), is_local)?;
        let number = self.next;
        self.next = self.next.wrapping_add(1) % NUMBERS;
        watch(&stream, number)?;
        self.waiting.push_back(Greeting { stream, responder, number, since_ns: now_ns });
        Ok(number)
    }

    /// Reads and writes what there is. What is done or refused is no longer here; its stream is still watched.
    pub(super) fn advance(&mut self, number: usize) -> Greeted {
        let Some(at) = self.waiting.iter().position(|greeting| greeting.number == number) else {
            return Greeted::Pending;
        };
        let greeting = &mut self.waiting[at];
        match greeting.responder.advance(&mut greeting.stream, unix_s()) {
            Ok(None) => Greeted::Pending,
            ended => {
                let greeting = self.waiting.remove(at).expect("it was found there");
                match ended {
                    Ok(Some(session)) => Greeted::Done(greeting.stream, session),
                    Ok(None) => unreachable!("matched above"),
                    Err(error) => Greeted::Refused(greeting.stream, error),
                }
            }
        }
    }

    /// Gives up those that take too long, one by one.
    pub(super) fn take_late(&mut self, now_ns: u64) -> Option<(usize, TcpStream)> {
        let late = self.waiting.pop_front_if(|greeting| now_ns > greeting.since_ns + HELLO_NS)?;
        Some((late.number, late.stream))
    }
}

/// Numbers before they begin anew: far more than can wait at once.
pub(super) const NUMBERS: usize = 1 << 20;
