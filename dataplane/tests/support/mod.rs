//! What the integration tests share: a process with the test worker, and a client.
#![allow(dead_code, reason = "each test binary uses its part")]

use praas_dataplane::{Client, ClientConfig, Ipc, LaunchConfig, LocalProcess, WaitMode};

/// The worker with the functions of `tests/worker/main.rs`.
pub(crate) fn test_worker() -> String {
    env!("CARGO_BIN_EXE_praas-test-worker").into()
}

pub(crate) fn launch_config(ipc: Ipc) -> LaunchConfig {
    LaunchConfig {
        process_binary: Some(env!("CARGO_BIN_EXE_praas-process").into()),
        worker: vec![test_worker()],
        ipc,
        wait: WaitMode::Balanced,
        ..LaunchConfig::default()
    }
}

pub(crate) fn start(ipc: Ipc) -> (LocalProcess, Client) {
    start_with(&launch_config(ipc))
}

pub(crate) fn start_with(config: &LaunchConfig) -> (LocalProcess, Client) {
    let process = LocalProcess::start(config).expect("the process starts");
    let client = connect(&process);
    (process, client)
}

pub(crate) fn connect(process: &LocalProcess) -> Client {
    Client::connect(process.addr(), &ClientConfig::default()).expect("the process answers")
}

/// Runs a test on both channels.
pub(crate) fn on_both_channels(test: impl Fn(Ipc)) {
    for ipc in [Ipc::Ring, Ipc::Queue] {
        test(ipc);
    }
}
