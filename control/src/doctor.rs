//! `praas doctor`: what this machine allows, what the data plane will use because of it, and what to change.
//!
//! [`probe`] collects [`facts`], [`judge`] decides, [`report`] prints. Only [`trial`] contains unsafe code.

pub mod facts;
mod judge;
mod probe;
pub mod report;
mod trial;

pub use judge::{judge, queue_workers};
pub use probe::probe;
