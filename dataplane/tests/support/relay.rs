//! Stands between a client and a process, and does to their connections what networks do.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

#[derive(Debug)]
struct State {
    /// Connections below are cut.
    cut_below: AtomicU64,
    /// Connections below forward nothing.
    held_below: AtomicU64,
    /// Nobody is let in.
    closed: AtomicBool,
    /// Bytes from the process go nowhere.
    deaf: AtomicBool,
    /// Bytes until everything is cut; below zero: never.
    left: AtomicI64,
    next: AtomicU64,
    ended: AtomicBool,
}

/// A relay to one address. Ends its threads when it is dropped.
#[derive(Debug)]
pub(crate) struct Relay {
    pub(crate) address: SocketAddr,
    state: Arc<State>,
}

/// How soon a thread notices what it was told.
const LOOK: Duration = Duration::from_millis(2);

impl Relay {
    pub(crate) fn to(process: SocketAddr) -> Relay {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("bound");
        listener.set_nonblocking(true).expect("a socket");
        let state = Arc::new(State {
            cut_below: AtomicU64::new(0),
            held_below: AtomicU64::new(0),
            closed: AtomicBool::new(false),
            deaf: AtomicBool::new(false),
            left: AtomicI64::new(-1),
            next: AtomicU64::new(0),
            ended: AtomicBool::new(false),
        });
        let shared = Arc::clone(&state);
        std::thread::spawn(move || {
            while !shared.ended.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok((client, _)) => join(client, process, &shared),
                    Err(_) => std::thread::sleep(LOOK),
                }
            }
        });
        Relay { address, state }
    }

    /// Resets every connection there is.
    pub(crate) fn cut(&self) {
        self.state.cut_below.store(self.state.next.load(Ordering::SeqCst), Ordering::SeqCst);
    }

    /// Resets every connection after so many bytes more, both ways together.
    pub(crate) fn cut_after(&self, bytes: i64) {
        self.state.left.store(bytes, Ordering::SeqCst);
    }

    /// Keeps back what the connections there are send, both ways, until [`Relay::release`].
    pub(crate) fn hold(&self) {
        self.state.held_below.store(self.state.next.load(Ordering::SeqCst), Ordering::SeqCst);
    }

    pub(crate) fn release(&self) {
        self.state.held_below.store(0, Ordering::SeqCst);
    }

    /// From now on connections are reset as they come, or not.
    pub(crate) fn close(&self, closed: bool) {
        self.state.closed.store(closed, Ordering::SeqCst);
    }

    /// Loses what the process says, or not.
    pub(crate) fn lose_answers(&self, lose: bool) {
        self.state.deaf.store(lose, Ordering::SeqCst);
    }

    /// Connections made so far.
    pub(crate) fn connections(&self) -> u64 {
        self.state.next.load(Ordering::SeqCst)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.state.ended.store(true, Ordering::Relaxed);
        self.cut();
    }
}

fn reset(stream: &TcpStream) {
    let _ = rustix::net::sockopt::set_socket_linger(stream, Some(Duration::ZERO));
}

fn join(client: TcpStream, process: SocketAddr, state: &Arc<State>) {
    if state.closed.load(Ordering::SeqCst) {
        return reset(&client);
    }
    let Ok(process) = TcpStream::connect(process) else { return reset(&client) };
    let number = state.next.fetch_add(1, Ordering::SeqCst);
    for stream in [&client, &process] {
        stream.set_nonblocking(false).expect("a socket");
        stream.set_nodelay(true).expect("a socket");
        stream.set_read_timeout(Some(LOOK)).expect("a socket");
    }
    let (client_too, process_too) = (client.try_clone().expect("a socket"), process.try_clone().expect("a socket"));
    let shared = Arc::clone(state);
    std::thread::spawn(move || forward(client, process, false, number, &shared));
    let shared = Arc::clone(state);
    std::thread::spawn(move || forward(process_too, client_too, true, number, &shared));
}

/// Carries bytes one way until either end is closed or cut.
fn forward(mut from: TcpStream, mut to: TcpStream, is_answers: bool, number: u64, state: &State) {
    let mut bytes = vec![0; 64 << 10];
    loop {
        if number < state.cut_below.load(Ordering::SeqCst) {
            break;
        }
        match from.read(&mut bytes) {
            Ok(0) => {
                let _ = to.shutdown(Shutdown::Write);
                return;
            }
            Ok(count) => {
                while number < state.held_below.load(Ordering::SeqCst)
                    && number >= state.cut_below.load(Ordering::SeqCst)
                {
                    std::thread::sleep(LOOK);
                }
                let left = state.left.load(Ordering::SeqCst);
                let mut taken = count;
                if left >= 0 {
                    taken = taken.min(usize::try_from(left).unwrap_or(0));
                    state.left.fetch_sub(i64::try_from(taken).unwrap_or(0), Ordering::SeqCst);
                }
                let lost = is_answers && state.deaf.load(Ordering::SeqCst);
                if !lost && to.write_all(&bytes[..taken]).is_err() {
                    break;
                }
                if taken < count {
                    state.left.store(-1, Ordering::SeqCst);
                    state.cut_below.store(state.next.load(Ordering::SeqCst), Ordering::SeqCst);
                }
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(_) => break,
        }
    }
    reset(&from);
    reset(&to);
    let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
}
