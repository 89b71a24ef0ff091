//! Functions that do not run for one call: a ledger that writes once for many calls, and a shop that ships when an order and its payment are there.
//!
//! ```sh
//! target/release/praas-process --worker target/release/triggers-worker --listen 127.0.0.1:4000 &
//! target/release/triggers-client 127.0.0.1:4000 apples pears
//! ```

use std::time::Duration;

use praas_dataplane::{Batch, Context, Failure, Input, Join, Message, Output, SELF, Source, StateError, Worker};

/// Runs with up to 32 calls, or with those that came within 2 ms: each entry gets its number, and the state is written once.
fn enter(context: &mut Context<'_>, entries: Vec<Input>) -> Result<Vec<Result<Output, Failure>>, Failure> {
    loop {
        let ledger = context.state().get("ledger")?;
        let (mut lines, version) =
            (ledger.as_deref().unwrap_or_default().to_vec(), ledger.map(|ledger| ledger.version()));
        let mut number = lines.iter().filter(|byte| **byte == b'\n').count();
        let mut answers = Vec::new();
        for entry in &entries {
            if entry.contains(&b'\n') {
                // One that is refused is alone in that.
                answers.push(Err(Failure::new(-22, "an entry is one line")));
                continue;
            }
            number += 1;
            lines.extend_from_slice(entry);
            lines.push(b'\n');
            answers.push(Ok(Output::from(number.to_string())));
        }
        match context.state().put_if("ledger", version, lines) {
            Ok(_) => return Ok(answers),
            // Another worker has just written its own.
            Err(StateError::Conflict { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Runs when there is a message under `order` and one under `payment`, with the oldest of each.
fn ship(context: &mut Context<'_>, messages: Vec<Message>) -> Result<(), Failure> {
    let [order, payment] = messages.try_into().map_err(|_| Failure::new(-22, "one of each"))?;
    let text = format!("{} for {}", String::from_utf8_lossy(&order), String::from_utf8_lossy(&payment));
    Ok(context.send(SELF, "shipped", text.as_bytes())?)
}

fn main() -> std::process::ExitCode {
    Worker::new()
        .batch("enter", Batch { calls: 32, wait: Duration::from_millis(2) }, enter)
        .join("ship", Join::of(["order", "payment"]), ship)
        .function("order", |context, what| Ok(context.send(SELF, "order", what).map(|()| Output::empty())?))
        .function("pay", |context, how_much| Ok(context.send(SELF, "payment", how_much).map(|()| Output::empty())?))
        .function("shipped", |context, _| Ok(context.recv(Source::Own, "shipped")?.into()))
        .serve()
}
