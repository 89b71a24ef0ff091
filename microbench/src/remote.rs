//! A client that calls `echo` of a process, one call at a time, and times what it sees.
//!
//! Question  How long does a client wait for an answer over TCP?
//! Measures  from one answer to the next: making a call, waiting, checking its answer, one read of the clock; not halved.
//! Load      closed loop, one call in flight.
//! Excludes  connecting, and as many calls as the caller asks to be left out.
//! Checks    length of every answer; sequence number and last byte where the payload is touched; the first of a block whole.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Result, ensure};
use praas_dataplane::Client;
use praas_dataplane::client::RemoteFunction;

use crate::end::{is_stamped, nanoseconds, stamp};
use crate::plan::WARM_UP;
use crate::recorder::median;
use crate::worker::ECHO;

/// A client, and the message it sends over and over.
#[derive(Debug)]
pub(crate) struct RemoteCaller {
    client: Client,
    echo: RemoteFunction,
    /// Whether each call writes and reads its payload.
    touched: bool,
    message: Arc<[u8]>,
    sequence: u64,
}

impl RemoteCaller {
    pub(crate) fn new(client: Client, touched: bool) -> Result<Self> {
        let echo = client.function(ECHO)?;
        Ok(Self { client, echo, touched, message: Arc::new([]), sequence: 0 })
    }

    /// The client, for calls of another kind.
    pub(crate) fn client(&mut self) -> &mut Client {
        &mut self.client
    }

    /// Appends the times of `calls` calls, after `warm_up` untimed ones.
    pub(crate) fn calls(
        &mut self,
        bytes: usize,
        warm_up: usize,
        calls: usize,
        samples_ns: &mut Vec<u64>,
    ) -> Result<()> {
        if self.message.len() != bytes {
            self.message = vec![0xA5; bytes].into();
        }
        samples_ns.reserve(calls);
        let mut before = Instant::now();
        for call in 0..warm_up + calls {
            self.sequence += 1;
            if self.touched {
                // Ours alone again once it was sent, so nothing is copied here.
                stamp(Arc::make_mut(&mut self.message), self.sequence);
            }
            let reply = self.client.invoke(self.echo, Arc::clone(&self.message))?;
            ensure!(
                reply.len() == bytes && (!self.touched || is_stamped(&reply, self.sequence)),
                "wrong answer: call {} of {bytes} B came back as {} B or with another stamp",
                self.sequence,
                reply.len()
            );
            // Compared whole once a block, outside the times.
            let after = Instant::now();
            if call >= warm_up {
                samples_ns.push(nanoseconds(before, after));
            }
            before = after;
            if call == 0 {
                ensure!(*reply == *self.message, "wrong answer: the first {bytes} B payload came back changed");
                before = Instant::now();
            }
        }
        Ok(())
    }

    /// Calls until warm; what a call takes then, in nanoseconds.
    pub(crate) fn warm_up(&mut self, bytes: usize) -> Result<u64> {
        until_warm(|calls, samples_ns| self.calls(bytes, 1, calls, samples_ns))
    }
}

/// Takes samples, twice as many each time so that one cold one does not decide, until warm; the median of the last lot.
pub(crate) fn until_warm(mut take: impl FnMut(usize, &mut Vec<u64>) -> Result<()>) -> Result<u64> {
    let mut samples_ns = Vec::new();
    let (mut samples, mut spent_ns) = (4, 0);
    loop {
        samples_ns.clear();
        take(samples, &mut samples_ns)?;
        spent_ns += samples_ns.iter().sum::<u64>();
        if u128::from(spent_ns) >= WARM_UP.as_nanos() {
            return Ok(median(&mut samples_ns));
        }
        samples *= 2;
    }
}
