//! What it takes to `await` calls: one descriptor to wait on, and a map of who waits for which call.

use std::cell::RefCell;
use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;

use anyhow::{Context, ensure};
use praas_dataplane::client::{CallHandle, ClientReply};
use praas_dataplane::{Client, ClientConfig, InvokeError};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::oneshot;

type Answer = Result<ClientReply, InvokeError>;

/// A client that tasks of one thread share.
#[derive(Clone)]
struct Shared(Rc<Inner>);

struct Inner {
    client: RefCell<Client>,
    waiting: RefCell<HashMap<CallHandle, oneshot::Sender<Answer>>>,
    /// A copy of the client's descriptor, which stays the same when the connection is made anew.
    readable: AsyncFd<OwnedFd>,
}

impl Shared {
    fn connect(address: &str) -> anyhow::Result<Shared> {
        let client = Client::connect(address, &ClientConfig::default())?;
        let readable = client.as_fd().try_clone_to_owned()?;
        // SAFETY: an `OwnedFd` is open as long as it lives, and nobody exchanges it inside the `AsyncFd` that owns it.
        let readable = unsafe { AsyncFd::register_with_interest(readable, Interest::READABLE) }?;
        let inner = Inner { client: RefCell::new(client), waiting: RefCell::default(), readable };
        Ok(Shared(Rc::new(inner)))
    }

    /// Calls `function`. Cancelling this future leaves the call to its own end; nobody looks at its answer then.
    async fn invoke(&self, function: &str, input: &[u8]) -> Answer {
        let call = self.0.client.borrow_mut().submit(function, input)?;
        let (tell, told) = oneshot::channel();
        self.0.waiting.borrow_mut().insert(call, tell);
        told.await.expect("the task that serves the client lives as long as we do")
    }

    /// Takes answers as they come. Has to run beside the calls.
    async fn serve(self) -> anyhow::Result<()> {
        loop {
            // Cleared first: what comes while we drain is told again.
            self.0.readable.readable().await?.clear_ready();
            let mut waiting = self.0.waiting.borrow_mut();
            self.0.client.borrow_mut().drain(&mut |call, answer| {
                if let Some(tell) = waiting.remove(&call) {
                    let _ = tell.send(answer);
                }
            });
        }
    }
}

/// 1000 calls from ten tasks.
pub(crate) async fn calls(runtime: &str) -> anyhow::Result<()> {
    let address = std::env::args().nth(1).with_context(|| format!("usage: embed-{runtime}-client ADDRESS"))?;
    let shared = Shared::connect(&address)?;
    let server = tokio::task::spawn_local(shared.clone().serve());
    let tasks = (0..10_u64).map(|task| {
        let shared = shared.clone();
        tokio::task::spawn_local(async move {
            for round in 0..100 {
                let input = (task * 1000 + round).to_le_bytes();
                ensure!(*shared.invoke("echo", &input).await? == input, "task {task}, round {round} came back changed");
            }
            Ok(())
        })
    });
    for task in tasks.collect::<Vec<_>>() {
        task.await??;
    }
    server.abort();
    println!("1000 calls from 10 tasks of {runtime}, one connection, one thread");
    Ok(())
}
