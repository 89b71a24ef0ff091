//! A client inside an event loop of one's own: one thread serves several connections to processes, and a clock.
//!
//! `event-loop-client ADDRESS [ADDRESS]...` calls `echo` at every address, each time with the answer of the time before,
//! and never blocks in the client: it registers the client's file descriptor with `mio` and calls `Client::poll` when the
//! kernel says that something happened. `mio` tells of changes only, so `poll` is called until it has nothing more.
//! Any other way to wait until a file descriptor is readable does as well. Deadlines, heartbeats and reconnecting come by way of it, too.
//!
//! ```sh
//! target/release/praas-process --worker target/release/echo-worker --listen 127.0.0.1:4000 &
//! target/release/event-loop-client 127.0.0.1:4000
//! ```

use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use anyhow::ensure;
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use praas_dataplane::{Client, ClientConfig};

/// Calls made at each address.
const ROUNDS: u64 = 1000;
/// How often the loop does something else.
const TICK: Duration = Duration::from_millis(20);

fn main() -> anyhow::Result<()> {
    let addresses: Vec<String> = std::env::args().skip(1).collect();
    ensure!(!addresses.is_empty(), "usage: event-loop-client ADDRESS [ADDRESS]...");

    let mut poll = Poll::new()?;
    let mut clients = Vec::new();
    for (at, address) in addresses.iter().enumerate() {
        let mut client = Client::connect(address, &ClientConfig::default())?;
        let fd = client.as_fd().as_raw_fd();
        // Once and for all: it stays the same when the connection is lost and made again.
        poll.registry().register(&mut SourceFd(&fd), Token(at), Interest::READABLE)?;
        client.submit("echo", &0_u64.to_le_bytes())?;
        clients.push(client);
    }

    let mut rounds = vec![0_u64; clients.len()];
    let mut events = Events::with_capacity(64);
    let mut tick = Instant::now() + TICK;
    let mut ticks = 0;
    while rounds.iter().any(|round| *round < ROUNDS) {
        poll.poll(&mut events, Some(tick.saturating_duration_since(Instant::now())))?;
        for event in &events {
            let Token(at) = event.token();
            serve(&mut clients[at], &mut rounds[at])?;
        }
        if Instant::now() >= tick {
            (tick, ticks) = (Instant::now() + TICK, ticks + 1);
        }
    }
    println!("{ROUNDS} calls at each of {} addresses, {ticks} ticks in between", clients.len());
    Ok(())
}

/// Takes every answer that is there and makes the next call.
fn serve(client: &mut Client, round: &mut u64) -> anyhow::Result<()> {
    while let Some((_, reply)) = client.poll() {
        ensure!(*reply? == round.to_le_bytes(), "round {round} came back changed");
        *round += 1;
        if *round < ROUNDS {
            client.submit("echo", &round.to_le_bytes())?;
        }
    }
    Ok(())
}
