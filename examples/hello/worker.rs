//! The smallest worker: one function, which greets.
//!
//! ```sh
//! cargo build --release
//! target/release/praas-process --worker target/release/hello-worker --listen 127.0.0.1:4000 &
//! target/release/hello-client 127.0.0.1:4000
//! ```

use praas_dataplane::{Output, Worker};

fn main() -> std::process::ExitCode {
    Worker::new()
        .function("hello", |_, name| Ok(Output::from(format!("Hello, {}!", String::from_utf8_lossy(&name)))))
        .serve()
}
