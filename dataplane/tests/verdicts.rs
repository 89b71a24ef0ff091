//! The verdict on the calls of a dead worker (faults.md, "drain what it published first, then judge"), row by row: the controller is stopped while its
//! worker dies, so that it finds death and answer at once and in whatever order it looks.

mod support;

use std::path::PathBuf;
use std::time::Duration;

use praas_dataplane::{Client, ClientConfig, Delivery, InvokeError, Ipc, LaunchConfig, LocalProcess};
use support::{
    PATIENCE, children, connect_with, content, evil_worker, launch_config, on_both_channels, signal, start_with,
    start_workers, state, wait_until,
};

const SIGSTOP: i32 = 19;
const SIGCONT: i32 = 18;

/// A file for the runs of one call; goes with its test.
struct Runs(PathBuf);

impl Runs {
    fn new(name: &str) -> Runs {
        let path = std::env::temp_dir().join(format!("praas-verdict-{name}-{}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        Runs(path)
    }

    fn count(&self) -> usize {
        std::fs::read_to_string(&self.0).unwrap_or_default().lines().count()
    }
}

impl Drop for Runs {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Stops the controller until its worker is dead, which `kill` sees to if the worker does not do it itself.
fn unseen(process: &LocalProcess, worker: u32, kill: bool) {
    signal(process.pid(), SIGSTOP);
    wait_until("the controller is stopped", PATIENCE, || state(process.pid()) == Some('T'));
    if kill {
        signal(worker, 9);
    }
    wait_until("its worker is dead", PATIENCE, || state(worker) == Some('Z'));
    signal(process.pid(), SIGCONT);
}

fn with(process: &LocalProcess, delivery: Delivery) -> Client {
    connect_with(process, &ClientConfig { delivery, ..ClientConfig::default() })
}

/// READY, not TAKEN: it never started. Given to another worker silently, in any mode.
#[test]
fn w2_a_request_that_a_dead_worker_had_not_taken_runs_elsewhere_and_once() {
    on_both_channels(|ipc| {
        for (round, delivery) in [Delivery::AtMostOnce, Delivery::Retry].into_iter().enumerate() {
            let (process, _client) = start_workers(ipc, 1, &[]);
            let mut client = with(&process, delivery);
            let runs = Runs::new(&format!("untaken-{ipc}-{round}"));
            let worker = children(process.pid())[0];
            client.invoke("echo", b"warm").unwrap();
            signal(worker, SIGSTOP);
            wait_until("the worker is stopped", PATIENCE, || state(worker) == Some('T'));
            let input = format!("{} {round} 0", runs.0.display());
            let call = client.submit("note", input.as_str()).unwrap();
            // It is handed over; if not yet, this round shows less.
            std::thread::sleep(Duration::from_millis(50));
            unseen(&process, worker, true);
            assert_eq!(*client.wait(call).unwrap(), *input.as_bytes(), "{ipc}, {delivery:?}");
            assert_eq!(runs.count(), 1, "{ipc}, {delivery:?}");
        }
    });
}

/// TAKEN, no answer: it may have run. Lost, and run again only if the call allows it.
#[test]
fn w2_a_request_that_a_dead_worker_had_begun_is_lost_or_run_again_as_it_allows() {
    on_both_channels(|ipc| {
        for delivery in [Delivery::AtMostOnce, Delivery::Retry, Delivery::EffectivelyOnce] {
            let (process, _client) = start_workers(ipc, 1, &[]);
            let mut client = with(&process, delivery);
            let runs = Runs::new(&format!("begun-{ipc}-{delivery:?}"));
            let worker = children(process.pid())[0];
            let call = client.submit("posthumous", format!("begun 100 {}", runs.0.display()).as_str()).unwrap();
            wait_until("it has begun", PATIENCE, || {
                let _ = client.poll();
                runs.count() == 1
            });
            unseen(&process, worker, false);
            match (delivery, client.wait(call)) {
                (Delivery::AtMostOnce, Err(InvokeError::WorkerLost { text })) => {
                    assert!(text.contains("may have run") && text.contains("signal 9"), "{text}");
                    assert_eq!(runs.count(), 1);
                }
                (Delivery::Retry | Delivery::EffectivelyOnce, Ok(answer)) => {
                    assert_eq!((answer.len(), runs.count()), (100, 2));
                }
                (_, ended) => panic!("{ipc}, {delivery:?}: {ended:?}"),
            }
        }
    });
}

/// TAKEN, READY and valid: it finished. Delivered, though it is dead, from memory of the dead.
#[test]
fn w2_an_answer_that_a_dead_worker_had_published_is_delivered_and_not_run_again() {
    on_both_channels(|ipc| {
        // What fits the queue while nobody reads it.
        let sizes: &[usize] = if ipc == Ipc::Ring { &[8, 100, 5000, 10_000_000] } else { &[8, 5000] };
        for &bytes in sizes {
            let (process, _client) = start_workers(ipc, 1, &[]);
            let mut client = with(&process, Delivery::Retry);
            let runs = Runs::new(&format!("answered-{ipc}-{bytes}"));
            let worker = children(process.pid())[0];
            let call = client.submit("posthumous", format!("answered {bytes} {}", runs.0.display()).as_str()).unwrap();
            wait_until("it has begun", PATIENCE, || {
                let _ = client.poll();
                runs.count() == 1
            });
            unseen(&process, worker, false);
            let answer = client.wait(call).unwrap_or_else(|error| panic!("{ipc}, {bytes} bytes: {error}"));
            assert!(answer.len() == bytes && answer.iter().all(|byte| *byte == 7), "{ipc}, {bytes} bytes");
            assert_eq!(runs.count(), 1, "{ipc}, {bytes} bytes: it was run again");
            let input = content(1, 100_000);
            assert!(*client.invoke("echo", input.clone()).unwrap() == *input);
        }
    });
}

/// TAKEN, READY and invalid: lost, as by a crash, and never delivered.
#[test]
fn w2_r1_an_answer_of_a_dead_worker_that_is_none_is_never_delivered() {
    on_both_channels(|ipc| {
        let attacks: &[&str] = if ipc == Ipc::Ring {
            &["block far away", "block of the controller", "block over the end", "unknown code", "another reply"]
        } else {
            &["unknown code", "another reply", "unknown kind"]
        };
        for attack in attacks {
            let config = LaunchConfig { worker: vec![evil_worker()], workers: 2, workers_max: 2, ..launch_config(ipc) };
            let (process, mut client) = start_with(&config);
            // Everybody is idle: worker 1 is asked, which is the evil one.
            let evil: u32 = String::from_utf8_lossy(&client.invoke("pid", b"").unwrap()).parse().unwrap();
            let call = client.submit("evil", format!("unseen: {attack}").as_str()).unwrap();
            std::thread::sleep(Duration::from_millis(20));
            let _ = client.poll();
            std::thread::sleep(Duration::from_millis(20));
            unseen(&process, evil, false);
            let ended = client.wait(call);
            assert!(matches!(&ended, Err(InvokeError::WorkerLost { .. })), "{ipc}, {attack}: {ended:?}");
            wait_until("it is replaced", PATIENCE, || {
                let now = children(process.pid());
                now.len() == 2 && !now.contains(&evil)
            });
            for n in 0..20_u8 {
                assert_eq!(&*client.invoke("echo", &[n]).unwrap(), [n], "{ipc}, after {attack}");
            }
        }
    });
}
