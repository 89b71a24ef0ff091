//! Why a process does not start or cannot go on.

use std::io;

use crate::exit;

/// Why a process does not start or cannot go on. Each has an exit code of its own kind.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProcessError {
    /// The configuration was refused.
    #[error(transparent)]
    Config(#[from] crate::config::ConfigError),
    /// The listen address cannot be had.
    #[error("cannot listen on {address}: {source}; choose another with --listen (port 0 takes a free one)")]
    Listen {
        /// As configured.
        address: String,
        /// What the system said.
        source: io::Error,
    },
    /// The worker program cannot be started.
    #[error(
        "cannot start the worker `{program}`: {source}; check the path given to --worker, and with --worker-uids that those users may run it"
    )]
    WorkerMissing {
        /// As configured.
        program: String,
        /// What the system said.
        source: io::Error,
    },
    /// The worker program runs and does not register.
    #[error(
        "the worker `{program}` {how} before it registered; it has to call Worker::serve (see README, \"Writing a worker\")"
    )]
    WorkerSilent {
        /// As configured.
        program: String,
        /// What became of it.
        how: String,
    },
    /// A worker registers no function at all.
    #[error("the worker `{program}` registers no function; call Worker::function before serve")]
    NoFunctions {
        /// As configured.
        program: String,
    },
    /// POSIX queues cannot be had; says which limit, and what to do.
    #[error("POSIX queues: {0}")]
    Queue(#[from] praas_transport::queue::QueueError),
    /// A segment cannot be had.
    #[error("shared memory: {0}")]
    Segment(#[from] praas_shm::SegmentError),
    /// There is nowhere for what workers print.
    #[error(transparent)]
    WorkerLog(#[from] super::printed::LogError),
    /// io_uring was asked for and cannot be had.
    #[error("{0}; use --reactor auto or --reactor epoll")]
    NoUring(#[from] praas_transport::reactor::NoUring),
    /// The system refused something else.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

impl ProcessError {
    /// The exit code of a program that ends with this error (see [`crate::exit`]).
    #[must_use]
    pub fn exit_code(&self) -> i32 {
        match self {
            ProcessError::Config(_) => exit::USAGE,
            ProcessError::Listen { .. } => exit::ADDRESS,
            ProcessError::WorkerMissing { .. } => exit::WORKER_MISSING,
            ProcessError::WorkerSilent { .. } | ProcessError::NoFunctions { .. } => exit::WORKER_SILENT,
            ProcessError::WorkerLog(_)
            | ProcessError::Queue(_)
            | ProcessError::Segment(_)
            | ProcessError::NoUring(_)
            | ProcessError::System { .. } => exit::SYSTEM,
        }
    }
}

pub(crate) fn system(what: &'static str) -> impl FnOnce(io::Error) -> ProcessError {
    move |source| ProcessError::System { what, source }
}
