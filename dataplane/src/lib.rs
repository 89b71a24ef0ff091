#![doc = include_str!("../README.md")]
#![deny(unsafe_code)]

pub mod cgroup;
pub mod client;
pub mod clock;
pub mod config;
pub mod confinement;
mod controller;
mod error;
pub mod exit;
pub mod launch;
mod letter;
pub mod members;
mod numbered;
pub mod object;
mod payload;
pub mod placement;
mod runtime;
mod stall;
pub mod wire;
pub mod worker;

pub use client::{CallOptions, Client, ClientConfig, ClientReply, Delivery};
pub use config::{
    Checks, ConfigError, Congestion, Dial, Ipc, Pin, ProcessConfig, ReactorChoice, WaitMode, WhenSwapped,
};
pub use error::{Failure, InvokeError};
pub use launch::{LaunchConfig, LaunchError, LaunchKey, LocalProcess};
pub use payload::{Input, Loan, Output, Payload, Reply};
pub use praas_transport::hello::{Credential, Role, Secret, SecretError, Session};
pub use runtime::{LogError, Process, ProcessError, Ready};
pub use worker::{
    Batch, Broadcast, Context, Draft, FunctionId, Join, Key, KeyInfo, Lease, Message, MessageError, Object, Pending,
    SELF, Source, State, StateError, Typed, Worker,
};
