//! Functions that run once for several calls.

use std::time::Duration;

use super::session::{Fatal, Incoming, Origin, Session};
use super::{Context, conclude};
use crate::controller::batch::{CALLS_MAX, WAIT_MAX_NS};
use crate::error::{Failure, InvokeError};
use crate::payload::{Input, Output};
use crate::wire::{Trigger, record};

/// When a function of [`Worker::batch`](super::Worker::batch) runs: with so many calls, or so long after the first of them.
///
/// Calls of all callers are collected together, in the order they come. Inputs of one run have [`payload_bytes_max`](crate::ProcessConfig::payload_bytes_max)
/// together at most: a batch that has no room for a call is closed before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Batch {
    /// Most calls of one run, 1 to [`Batch::CALLS_MAX`].
    pub calls: u16,
    /// How long the first call waits for others, up to an hour; 0: for those only that arrive with it.
    pub wait: Duration,
}

impl Batch {
    /// Most calls that one run may have.
    pub const CALLS_MAX: u16 = CALLS_MAX;

    /// # Panics
    /// When it is out of range.
    pub(super) fn trigger(self) -> Trigger {
        let Batch { calls, wait } = self;
        assert!((1..=CALLS_MAX).contains(&calls), "a batch of {calls} calls; 1 to {CALLS_MAX} are possible");
        let wait_ns = u64::try_from(wait.as_nanos()).unwrap_or(u64::MAX);
        assert!(wait_ns <= WAIT_MAX_NS, "a batch that waits for {wait:?}; an hour is the most");
        Trigger::Batch { calls, wait_ns }
    }
}

/// What a function of a batch gives: an output or a failure for each input, in their order; or one failure for all.
pub(super) type Answers = Result<Vec<Result<Output, Failure>>, Failure>;

/// Runs the function for what has come: a batch, or one call alone.
pub(super) fn serve<F>(session: &mut Session, incoming: &mut Incoming, function: &mut F) -> Result<(), Fatal>
where
    F: FnMut(&mut Context<'_>, Vec<Input>) -> Answers,
{
    let head = incoming.request;
    if head.kind() & record::KIND != record::BATCH {
        let Some((input, block)) = session.open(incoming)? else { return Ok(()) };
        let mut context = Context::new(session, incoming.origin, head.id(), head.tag(), head.aux());
        let answers = function(&mut context, vec![input]);
        context.finish();
        let answer = answers.and_then(|all| all.into_iter().next().unwrap_or_else(|| Err(missing(0, 1))));
        return conclude(session, incoming.origin, head.id(), block, answer);
    }
    let inputs = session.gather(&head)?;
    let calls = inputs.len();
    let mut context = Context::new(session, Origin::Controller, head.id(), head.tag(), head.aux());
    let answers = function(&mut context, inputs);
    context.finish();
    match answers {
        Ok(answers) => {
            let Failure { status, text } = missing(answers.len(), calls);
            session.answer_batch(answers, || InvokeError::Failed { status, text: text.clone() })
        }
        Err(Failure { status, text }) => {
            session.answer_batch([], || InvokeError::Failed { status, text: text.clone() })
        }
    }
}

fn missing(answers: usize, calls: usize) -> Failure {
    Failure::new(-1, format!("the function gave {answers} answers to {calls} calls, and none to this one"))
}
