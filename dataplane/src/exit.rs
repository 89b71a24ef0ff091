//! Exit codes of our programs. 0 is success; 1 is left to programs that return an error from `main`, 101 is a panic of ours.

/// The command line or the configuration is wrong.
pub const USAGE: i32 = 2;
/// The worker program cannot be started.
pub const WORKER_MISSING: i32 = 3;
/// The worker program runs but does not register in time, or exits first.
pub const WORKER_SILENT: i32 = 4;
/// The listen address cannot be had (in use, or not ours).
pub const ADDRESS: i32 = 5;
/// The system refuses something we need (queues, memory, descriptors); the line says what and how to get it.
pub const SYSTEM: i32 = 6;
/// A worker lost its controller or could not understand it.
pub const WORKER_PROTOCOL: i32 = 70;
/// A worker leaves because one of its functions panicked.
pub const WORKER_PANICKED: i32 = 71;
