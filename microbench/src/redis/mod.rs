//! Redis on this machine: what others keep state and pass messages with, and what ours stands beside.
//!
//! | file        | is                                                                     |
//! |-------------|------------------------------------------------------------------------|
//! | `server.rs` | a `redis-server` of our own, on a free port, gone with us               |
//! | `client.rs` | one connection: the six commands we need, waiting as a wait mode says   |
//! | `end.rs`    | one end of an exchange of messages under keys: polled, or blocking      |
//! | `pair.rs`   | two OS processes with such an end each                                  |
//! | `reduce.rs` | a function of a cloud process that keeps its state in Redis             |
//!
//! Why a client of our own. The crate `redis` (1.8.1, no features) costs 0.4 µs of 6 more a command of 10 B, on one core: nothing. Of long
//! values it copies each more often: SET of 1 MiB takes 830 µs where this client takes 270, GET 415 and 240. And it sleeps for every
//! answer: on two cores a command takes 67 µs, and 20 when its client spins, as ours does in `latency`. (Medians of 20 000 and 200 by a
//! first version of this client, on the machine with two cores, everybody under its default congestion control.) We want Redis at its best,
//! not that crate.

mod client;
mod end;
mod pair;
mod reduce;
mod server;

use std::net::{SocketAddr, ToSocketAddrs};

use anyhow::{Context, Result};
use clap::Args;

pub(crate) use client::Connection;
pub(crate) use end::{Pace, RedisEnd, Side};
pub(crate) use pair::RedisPair;
pub(crate) use reduce::{Order as ReduceOrder, Reducer};
use server::Server;

use crate::placement::{Placement, Wait, startup_cores};
use crate::row::Row;

/// What to print in place of figures where there is no Redis.
pub(crate) const NEEDED: &str = "needs redis-server (install it, or name a running one with --redis HOST:PORT)";

/// Which Redis a command talks to.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct RedisArgs {
    /// A Redis that runs already; keys that begin with `praas-bench:` are written and deleted there. It is neither placed on a core nor
    /// stopped [default: one of our own on a free port of loopback, with nothing persistent].
    #[arg(long, value_name = "HOST:PORT")]
    redis: Option<String>,
}

/// A Redis to talk to; one of our own ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Host {
    address: SocketAddr,
    own: Option<Server>,
}

impl RedisArgs {
    /// The Redis that was named, or a new one, on the core that everybody is on in `efficient` and on all of them otherwise; `None`
    /// when `redis-server` is not installed.
    ///
    /// # Errors
    /// The name has no address, or the server does not start.
    pub(crate) fn host(&self, wait: Wait) -> Result<Option<Host>> {
        let Some(name) = &self.redis else {
            let mut cores = startup_cores()?;
            if wait == Wait::Efficient {
                cores = vec![Placement::of(wait, &cores)?.ours];
            }
            let Some(own) = Server::start(&cores)? else { return Ok(None) };
            return Ok(Some(Host { address: own.address(), own: Some(own) }));
        };
        let addresses = name.to_socket_addrs().with_context(|| format!("--redis {name}: write HOST:PORT"))?;
        let address = addresses.into_iter().next().with_context(|| format!("--redis {name}: no address"))?;
        Ok(Some(Host { address, own: None }))
    }
}

impl Host {
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// How rows tell that cores were not ours to choose.
    pub(crate) fn placement(&self, ends: &str) -> String {
        match self.own {
            Some(_) => ends.to_owned(),
            None => format!("{ends}; Redis where it was"),
        }
    }
}

/// One of our rows beside the one of Redis that did the same, if there is one: with its p50 as the floor.
pub(crate) fn beside(ours: &Row, theirs: &[Row]) -> Option<Row> {
    let same = |row: &&Row| {
        (&row.op, &row.wait, row.payload_bytes, row.invocations)
            == (&ours.op, &ours.wait, ours.payload_bytes, ours.invocations)
    };
    let redis = theirs.iter().find(same)?;
    let name = redis.via.as_deref().or(redis.peer.as_deref()).unwrap_or("redis");
    let row = Row { experiment: "beside_redis".into(), distribution: Vec::new(), ..ours.clone() };
    Some(row.against(name, redis.times.p50_us))
}

/// A name that nobody else uses, so that a Redis may be shared: keys begin with it.
///
/// # Errors
/// No random number.
pub(crate) fn unique_key() -> Result<String> {
    Ok(format!("praas-bench:{:016x}", getrandom::u64()?))
}
