//! How calls fail, one variant a cause.

use crate::wire::Code;

/// Why a call has no result. The same for clients and for functions that call functions.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvokeError {
    /// The function ran and returned a negative status, or an answer for which there is no room.
    #[error("the function returned status {status}: {text}")]
    Failed {
        /// Below zero.
        status: i32,
        /// What the function said.
        text: String,
    },
    /// The function panicked; its worker is replaced.
    #[error("the function panicked: {text}")]
    Panicked {
        /// The panic's message.
        text: String,
    },
    /// The process has no such function.
    #[error("unknown function: {text}")]
    UnknownFunction {
        /// The name or id, and what there is instead.
        text: String,
    },
    /// A bound is reached. Try again later.
    #[error("busy: {text}")]
    Busy {
        /// Which bound.
        text: String,
    },
    /// The input is larger than the process allows. Not a byte of it was sent.
    #[error("payload too large: {text}")]
    TooLarge {
        /// The size and the limit.
        text: String,
    },
    /// Payload memory is full. The function has not run.
    #[error("no payload memory: {text}")]
    NoSpace {
        /// What was needed and what is free.
        text: String,
    },
    /// The deadline passed. The function may have run, and may still be running for a short while.
    #[error("timeout: {text}")]
    Timeout {
        /// Where the call was then.
        text: String,
    },
    /// The call was cancelled by its caller.
    #[error("cancelled")]
    Cancelled,
    /// The worker died. The text says how, and whether the function may have run.
    #[error("worker lost: {text}")]
    WorkerLost {
        /// Cause of death.
        text: String,
    },
    /// The function has killed its workers too often in a row and is refused for a while.
    #[error("function broken: {text}")]
    FunctionBroken {
        /// How often, and when it is tried again.
        text: String,
    },
    /// The process is stopping.
    #[error("the process is stopping")]
    Draining,
    /// The connection to the process is lost. Calls in flight may have run.
    #[error("connection lost: {text}")]
    ConnectionLost {
        /// What the system said.
        text: String,
    },
    /// The call was sent again after a connection was lost, and the process does not know any more how it ended. It was not run
    /// again; whether it ran the first time nobody knows: look at what it should have done.
    #[error("expired: {text}")]
    Expired {
        /// What the process said.
        text: String,
    },
    /// No process of this name is a member of the application.
    #[error("unknown process: {text}")]
    UnknownProcess {
        /// The name.
        text: String,
    },
    /// The process that was called ended. The function may have run.
    #[error("process lost: {text}")]
    PeerLost {
        /// What is known.
        text: String,
    },
    /// The process that was to be called is swapped out, and this one does not wait for it (`--when-swapped refuse`). It has not run.
    #[error("swapped out: {text}")]
    Swapped {
        /// Which process.
        text: String,
    },
    /// The other side broke the protocol.
    #[error("protocol error: {text}")]
    Protocol {
        /// What was wrong.
        text: String,
    },
}

impl InvokeError {
    /// Whether the same call may succeed when sent again later, without having run.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        matches!(
            self,
            InvokeError::Busy { .. }
                | InvokeError::NoSpace { .. }
                | InvokeError::FunctionBroken { .. }
                | InvokeError::Swapped { .. }
        )
    }

    pub(crate) fn from_wire(code: Code, status: i32, text: &[u8]) -> InvokeError {
        let text = String::from_utf8_lossy(text).into_owned();
        match code {
            Code::Failed => InvokeError::Failed { status, text },
            Code::Panicked => InvokeError::Panicked { text },
            Code::UnknownFunction => InvokeError::UnknownFunction { text },
            Code::Busy => InvokeError::Busy { text },
            Code::TooLarge => InvokeError::TooLarge { text },
            Code::NoSpace => InvokeError::NoSpace { text },
            Code::Timeout => InvokeError::Timeout { text },
            Code::Cancelled => InvokeError::Cancelled,
            Code::WorkerLost => InvokeError::WorkerLost { text },
            Code::FunctionBroken => InvokeError::FunctionBroken { text },
            Code::Draining => InvokeError::Draining,
            Code::Expired => InvokeError::Expired { text },
            Code::UnknownProcess => InvokeError::UnknownProcess { text },
            Code::PeerLost => InvokeError::PeerLost { text },
            Code::Swapped => InvokeError::Swapped { text },
            Code::Ok | Code::Protocol | Code::Conflict => InvokeError::Protocol { text },
        }
    }

    /// The negative status that a function failing with this error passes on to its own caller.
    pub(crate) fn status(&self) -> i32 {
        match self {
            InvokeError::Failed { status, .. } => *status,
            _ => -1,
        }
    }
}

/// What is said of a function that ran when there is no room for its answer.
pub(crate) fn answer_did_not_fit(why: impl std::fmt::Display) -> String {
    format!("the function ran, its answer did not fit: {why}")
}

/// What a function returns instead of an output: a negative status and a text for its caller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    pub(crate) status: i32,
    pub(crate) text: String,
}

impl Failure {
    /// A failure with `status`, which is made negative when it is not, and a text.
    #[must_use]
    pub fn new(status: i32, text: impl Into<String>) -> Self {
        Failure { status: if status < 0 { status } else { -1 }, text: text.into() }
    }
}

impl From<InvokeError> for Failure {
    fn from(error: InvokeError) -> Self {
        Failure { status: error.status(), text: error.to_string() }
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Failure { status: -1, text: error.to_string() }
    }
}
