//! Many calls in flight on one connection, answered in whatever order they are done; then one of 1 MiB.
//!
//! `submit` starts a call and returns a handle at once, `wait_any` gives whichever is done next. `function` looks a name up
//! once. A `Vec` is sent as it is, and the reply of the 1 MiB call is taken as one: this client copies no payload.
//! How to run it stands in `worker.rs`.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, ensure};
use praas_dataplane::{Client, ClientConfig, InvokeError};

const CALLS: u32 = 10_000;

fn main() -> anyhow::Result<()> {
    let address = std::env::args().nth(1).context("usage: echo-client ADDRESS")?;
    let mut client = Client::connect(&address, &ClientConfig::default())?;
    let echo = client.function("echo")?;

    let begun = Instant::now();
    let mut in_flight = HashMap::new();
    let (mut next, mut answered, mut most) = (0_u32, 0_u32, 0);
    while answered < CALLS {
        // `Busy` at the process's limit of calls in flight: then it is time to take answers.
        while next < CALLS {
            match client.submit(echo, &next.to_le_bytes()) {
                Ok(call) => in_flight.insert(call, next),
                Err(InvokeError::Busy { .. }) => break,
                Err(error) => return Err(error.into()),
            };
            next += 1;
        }
        most = most.max(client.in_flight());
        let (call, reply) = client.wait_any().context("calls are in flight")?;
        let expected = in_flight.remove(&call).context("an answer nobody asked for")?;
        ensure!(*reply? == expected.to_le_bytes(), "call {expected} came back changed");
        answered += 1;
    }
    println!(
        "{answered} calls echoed, up to {most} in flight, {:.0} a second",
        f64::from(CALLS) / begun.elapsed().as_secs_f64()
    );

    // Shared, so that we still have it to compare with while it is sent.
    let sent: Arc<[u8]> = (0..1_u32 << 20).map(|i| i.to_le_bytes()[i as usize % 3]).collect();
    let back = client.invoke(echo, Arc::clone(&sent))?.into_vec();
    ensure!(*back == *sent, "the large payload came back changed");
    println!("{} bytes echoed", back.len());
    Ok(())
}
