//! This process and another one, which exchange messages through Redis.

use std::net::SocketAddr;

use anyhow::{Context, Result};

use super::end::{Pace, RedisEnd, Side};
use super::unique_key;
use crate::end::{self, Block, Messages};
use crate::peer::{Order, Peer};
use crate::placement::{Placement, Wait, pin};

/// The asking end here, the answering end in a process of its own. Dropping it ends that process.
#[derive(Debug)]
pub(crate) struct RedisPair {
    end: RedisEnd,
    peer: Peer,
    placement: Placement,
    messages: Messages,
    sequence: u64,
}

impl RedisPair {
    pub(crate) fn open(redis: SocketAddr, pace: Pace, wait: Wait, placement: Placement) -> Result<Self> {
        let name = unique_key()?;
        let end = RedisEnd::open(redis, wait, pace, Side::Asking, &name)
            .with_context(|| format!("connect to Redis at {redis}"))?;
        let peer = Peer::spawn(&Order::JoinRedis { redis, pace, wait, core: placement.theirs, name }, &[])?;
        Ok(Self { end, peer, placement, messages: Messages::default(), sequence: 0 })
    }

    /// One block of round trips; appends its samples. Pins the calling thread.
    pub(crate) fn run(&mut self, block: Block, samples_ns: &mut Vec<u64>) -> Result<()> {
        pin(&[self.placement.ours])?;
        self.peer.serve(block.bytes, block.samples as u64 * u64::from(block.trips_per_sample))?;
        end::ping(&mut self.end, &mut self.messages, block, &mut self.sequence, samples_ns)?;
        self.peer.expect_done()
    }
}
