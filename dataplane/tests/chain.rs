//! A chain A -> B -> C whose last process is slow, or does not go on at all (N9): B's function calls C, over a link of 1 Mbit/s.
//!
//! What B holds for A does not grow; A is told `Busy`, or waits to its deadline; whoever calls another function of B is served; and when C
//! goes on, so does all of it. `PRAAS_FLOOD_S` sets how long A keeps at it, each time (default 1 s).
#![allow(clippy::cast_precision_loss, reason = "slopes of small numbers")]

mod support;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use praas_dataplane::clock::unix_s;
use praas_dataplane::{
    Client, ClientConfig, Credential, InvokeError, Ipc, LaunchConfig, LaunchKey, LocalProcess, Role, Secret,
};
use support::namespace::Cable;
use support::proxy::{Lane, Plan, Proxy};
use support::{PATIENCE, connect, content, memory_kib, on_both_reactors, setting, signal, wait_until};

/// What A gives each of its calls, and what the machine may take beyond.
const DEADLINE: Duration = Duration::from_millis(400);
const LATE: Duration = Duration::from_millis(300);
/// An eighth of a second of the link: few calls of a full chain are answered.
const BODY_BYTES: usize = 16 << 10;
/// Calls that A has open at B: more than B takes.
const OPEN: usize = 100;
const QUEUE_MAX: usize = 32;

fn flood() -> Duration {
    Duration::from_secs(setting("PRAAS_FLOOD_S", 1))
}

/// How B reaches C. Dropped last.
enum Link {
    /// Between two namespaces, each end shaped by the kernel.
    Cable(Cable),
    /// Through a relay that lets 128 KB/s through each way, as long as it is there.
    Relay { _relay: Proxy },
}

/// C, and how B reaches it; where B gets its credential.
struct End {
    process: LocalProcess,
    address: SocketAddr,
    credential: PathBuf,
    link: Link,
}

impl Drop for End {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.credential);
    }
}

fn end(config: LaunchConfig) -> End {
    let key = Secret::new([3; 32]);
    let credential = std::env::temp_dir().join(format!("praas-chain-{}-{}", std::process::id(), unix_s()));
    let _ = std::fs::remove_file(&credential);
    let minted = Credential::mint(&key, Role::Client, "b", unix_s() + 3600).expect("a name");
    minted.write_new(&credential).expect("room");
    let mut config = LaunchConfig { key: Some(LaunchKey::Pipe(Arc::new(key))), ..config };
    if let Some(cable) = Cable::lay() {
        config.args.push(format!("--listen={}", SocketAddr::from((cable.far.address(), 0))));
        cable.slow_down("1mbit");
        let process = cable.far.run(|| LocalProcess::start(&config).expect("it starts"));
        return End { address: process.addr(), process, credential, link: Link::Cable(cable) };
    }
    println!("a relay takes the place of the cable");
    let process = LocalProcess::start(&config).expect("it starts");
    // Pieces of 768 bytes on average, one every 6 ms.
    let slow = || Lane { piece_max: 1536, pause: Duration::from_millis(6), ..Lane::default() };
    let relay = Proxy::start(process.addr(), 0, move |_| Plan { up: slow(), down: slow(), narrow: true });
    End { address: relay.addr(), process, credential, link: Link::Relay { _relay: relay } }
}

/// How A's calls ended.
#[derive(Debug, Default)]
struct Ends {
    answered: u64,
    busy: u64,
    late: u64,
}

/// A: as many calls as it may have open, over and over. None ends long after its deadline.
fn ask(client: &mut Client, input: &Arc<[u8]>, stop: &AtomicBool) -> Ends {
    let (mut ends, mut open) = (Ends::default(), std::collections::HashMap::new());
    while !stop.load(Ordering::Relaxed) || !open.is_empty() {
        while open.len() < OPEN && !stop.load(Ordering::Relaxed) {
            let call = client.submit("forward", Arc::clone(input)).expect("the connection to B is no worse");
            open.insert(call, Instant::now());
        }
        let Some((call, ended)) = client.wait_any() else { break };
        let took = open.remove(&call).expect("one of ours").elapsed();
        assert!(took < DEADLINE + LATE, "a call took {took:?}: {:?}", ended.err());
        match ended {
            Ok(reply) => {
                assert!(*reply == **input, "another's answer");
                ends.answered += 1;
            }
            Err(InvokeError::Busy { .. }) => {
                ends.busy += 1;
                // Whoever is told so comes again later.
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(InvokeError::Timeout { .. }) => ends.late += 1,
            // B's function ran into the deadline first: at C, or on the way there.
            Err(InvokeError::Failed { text, .. }) if text.contains("timeout") || text.contains("connect") => {
                ends.late += 1
            }
            Err(error) => panic!("{error}"),
        }
    }
    ends
}

/// Growth of what was measured, in its unit a second, by least squares.
fn slope(samples: &[(f64, f64)]) -> f64 {
    let count = samples.len() as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| samples.iter().map(of).sum::<f64>() / count;
    let (x, y) = (mean(|sample| sample.0), mean(|sample| sample.1));
    let both: f64 = samples.iter().map(|sample| (sample.0 - x) * (sample.1 - y)).sum();
    both / samples.iter().map(|sample| (sample.0 - x).powi(2)).sum::<f64>()
}

/// A floods for a while, with somebody beside it who wants nothing of C; says what B's memory does meanwhile.
fn flooded(what: &str, b: &LocalProcess, input: &Arc<[u8]>) -> Ends {
    let stop = AtomicBool::new(false);
    let config = ClientConfig { deadline: DEADLINE, ..ClientConfig::default() };
    let (ends, samples, longest) = std::thread::scope(|scope| {
        let asking = scope.spawn(|| ask(&mut Client::connect(b.addr(), &config).expect("B listens"), input, &stop));
        let beside = scope.spawn(|| {
            let (mut neighbour, mut longest) = (connect(b), Duration::ZERO);
            while !stop.load(Ordering::Relaxed) {
                let asked = Instant::now();
                assert_eq!(&*neighbour.invoke("echo", b"beside").expect("who wants nothing of C is served"), b"beside");
                longest = longest.max(asked.elapsed());
            }
            longest
        });
        // Until it has taken what it takes.
        std::thread::sleep(Duration::from_secs(1));
        let (begun, mut samples) = (Instant::now(), Vec::new());
        while begun.elapsed() < flood() {
            samples.push((begun.elapsed().as_secs_f64(), memory_kib(b.pid()) as f64));
            std::thread::sleep(Duration::from_millis(20));
        }
        stop.store(true, Ordering::Relaxed);
        (asking.join().expect("A"), samples, beside.join().expect("the neighbour"))
    });
    let most = samples.iter().map(|sample| sample.1).fold(0.0, f64::max);
    let slope = slope(&samples);
    println!("{what}: {ends:?}; B: {most} KiB at most, {slope:+.0} KiB/s; the neighbour waited {longest:?}");
    // A process at rest, and every call that may be open, twice.
    let bound_kib = 16.0 * 1024.0 + 2.0 * (OPEN + QUEUE_MAX) as f64 * (BODY_BYTES >> 10) as f64;
    assert!(most < bound_kib, "B holds {most} KiB, more than {bound_kib}");
    // A hundredth of what A sends in a second at the least.
    assert!(slope.abs() < 1024.0, "B's memory moves by {slope:+.0} KiB/s");
    // One call of A's before it, whose turn is over with its deadline.
    assert!(longest < 2 * DEADLINE + LATE, "the neighbour waited {longest:?}");
    ends
}

#[test]
fn n9_a_chain_with_a_slow_or_stopped_end_pushes_back_and_holds_no_more_for_it() {
    on_both_reactors(|reactor| {
        let c = end(reactor.config(Ipc::Ring, 2, &[]));
        let queue_max = QUEUE_MAX.to_string();
        let mut config = reactor.config(Ipc::Ring, 2, &["--queue-max", &queue_max, "--arena-bytes", "67108864"]);
        config.worker.push(format!("forward={}", c.address));
        config.worker.push(format!("credential={}", c.credential.display()));
        let b = match &c.link {
            // A stays where it is: a socket that was bound in a namespace is reached only there.
            Link::Cable(cable) => cable.near.run(|| LocalProcess::start(&config).expect("it starts")),
            Link::Relay { .. } => LocalProcess::start(&config).expect("it starts"),
        };
        let input: Arc<[u8]> = content(7, BODY_BYTES).into();
        let run = || {
            let slow = flooded("over 1 Mbit/s", &b, &input);
            assert!(slow.answered > 0 && slow.busy > 0 && slow.late > 0, "{slow:?}");
            signal(c.process.pid(), 19);
            let stopped = flooded("C stopped", &b, &input);
            signal(c.process.pid(), 18);
            assert!(stopped.answered == 0 && stopped.busy > 0 && stopped.late > 0, "{stopped:?}");
            // What was given up is still on its way; then there is room again.
            let mut client = connect(&b);
            wait_until("the chain goes on", PATIENCE, || {
                client.invoke("forward", content(8, 1000)).is_ok_and(|reply| *reply == *content(8, 1000))
            });
        };
        match &c.link {
            Link::Cable(cable) => cable.near.run(run),
            Link::Relay { .. } => run(),
        }
    });
}
