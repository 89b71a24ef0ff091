//! Hands its input back as output: the block itself, not a copy of it.
//!
//! ```sh
//! target/release/praas-process --worker target/release/echo-worker --listen 127.0.0.1:4000 &
//! target/release/echo-client 127.0.0.1:4000
//! ```

use praas_dataplane::Worker;

fn main() -> std::process::ExitCode {
    Worker::new().function("echo", |_, input| Ok(input.into())).serve()
}
