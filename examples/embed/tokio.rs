//! A client inside tokio: many tasks share one connection, no thread is started, and a call is something to `await`.
//!
//! `embed-tokio-client ADDRESS` makes 1000 calls from ten tasks of one thread. All that it takes is to wait until the client's file
//! descriptor is readable and to `drain` it then; who waits for which answer is a map.
//!
//! ```sh
//! target/release/praas-process --worker target/release/echo-worker --listen 127.0.0.1:4000 &
//! target/release/embed-tokio-client 127.0.0.1:4000
//! ```

#[path = "shared.rs"]
mod shared;

fn main() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    tokio::task::LocalSet::new().block_on(&runtime, shared::calls("tokio"))
}
