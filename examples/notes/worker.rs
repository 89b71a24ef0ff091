//! A process that remembers: a typed value in its state, which every worker reads where it lies, and messages to whoever listens.
//!
//! ```sh
//! target/release/praas-process --worker target/release/notes-worker --listen 127.0.0.1:4000 &
//! target/release/notes-client 127.0.0.1:4000 "buy milk" "water the plants"
//! ```
//!
//! Two functions write at once, on two workers: `put_typed_if` says which of them has to look again.

use praas_dataplane::{Context, Failure, Input, Output, SELF, Source, StateError, Worker, state_type};

state_type! {
    /// All notes, oldest first.
    pub struct Notes {
        lines: Vec<String>,
    }
}

/// Adds a line, and tells whoever waits for news.
fn add(context: &mut Context<'_>, input: Input) -> Result<Output, Failure> {
    let line = String::from_utf8_lossy(&input).into_owned();
    loop {
        let (mut lines, version) = match context.state().get_typed::<Notes>("notes")? {
            Some(notes) => (notes.lines.iter().map(|line| line.as_str().to_owned()).collect(), Some(notes.version())),
            None => (Vec::new(), None),
        };
        lines.push(line.clone());
        match context.state().put_typed_if("notes", version, &Notes { lines }) {
            Ok(_) => break,
            // Somebody else was faster: once more, with what is there now.
            Err(StateError::Conflict { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    context.send(SELF, "news", line.as_bytes())?;
    Ok(Output::empty())
}

/// All lines, or nothing.
fn list(context: &mut Context<'_>, _: Input) -> Result<Output, Failure> {
    let Some(notes) = context.state().get_typed::<Notes>("notes")? else { return Ok(Output::empty()) };
    Ok(notes.lines.iter().map(|line| line.as_str()).collect::<Vec<_>>().join("\n").into())
}

/// The next line that is added, or was and nobody has heard of.
fn hear(context: &mut Context<'_>, _: Input) -> Result<Output, Failure> {
    Ok(context.recv(Source::Own, "news")?.into())
}

fn main() -> std::process::ExitCode {
    Worker::new().function("add", add).function("list", list).function("hear", hear).serve()
}
