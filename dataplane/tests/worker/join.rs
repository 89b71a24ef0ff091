//! Functions of the test worker that run for messages.

use praas_dataplane::{Context, Failure, Join, Message, SELF, Worker};

pub(crate) fn register(worker: Worker) -> Worker {
    worker
        .join("joined", Join::of(["left", "right"]), |context, messages| pair(context, messages, "pair"))
        .join("of_one", Join::of(["one x", "one y"]).from_one_sender(), |context, messages| {
            pair(context, messages, "pair of one")
        })
        .join("tally_one", Join::of(["tally one"]), |_, messages| tally(&messages))
        .join("tally_two", Join::of(["tally x", "tally y"]).idempotent(), |_, messages| tally(&messages))
        .join("bad", Join::of(["bad"]), |_, messages| {
            Err(Failure::new(-5, format!("failed for {}", String::from_utf8_lossy(&messages[0]))))
        })
        .join("worse", Join::of(["worse"]), |_, _| std::process::abort())
}

/// Sends where the messages are from, and then their bytes.
fn pair(context: &mut Context<'_>, messages: Vec<Message>, key: &str) -> Result<(), Failure> {
    let about = |message: &Message| format!("{}:{} ", message.from(), String::from_utf8_lossy(message.key()));
    let mut both = messages.iter().map(about).collect::<String>().into_bytes();
    messages.iter().for_each(|message| both.extend_from_slice(message));
    Ok(context.send(SELF, key, &both)?)
}

fn tally(messages: &[Message]) -> Result<(), Failure> {
    crate::tally_of(messages[0].get(..8).ok_or_else(|| Failure::new(-22, "a number, please"))?)
}
