//! The smallest client: calls `hello` of the process whose address it is given, and prints the reply.
//!
//! How to run it stands in `worker.rs`. It may be started together with the process, so it tries for some seconds.

use std::time::{Duration, Instant};

use praas_dataplane::client::ConnectError;
use praas_dataplane::{Client, ClientConfig};

fn main() -> anyhow::Result<()> {
    let address = std::env::args().nth(1).unwrap_or("127.0.0.1:4000".into());
    let begun = Instant::now();
    let mut client = loop {
        match Client::connect(&address, &ClientConfig::default()) {
            Err(ConnectError::Refused { .. }) if begun.elapsed().as_secs() < 5 => {
                std::thread::sleep(Duration::from_millis(20))
            }
            connected => break connected?,
        }
    };
    println!("{}", String::from_utf8_lossy(&client.invoke("hello", "world")?));
    Ok(())
}
