//! Peers that are gone without a word (N1) and networks that part and heal (N10): between network namespaces, where a cable
//! can be pulled, and, where that is not allowed, through a proxy that stops relaying.
//!
//! `PRAAS_PARTITIONS` sets how often the network parts (default 1 and 3).
#![allow(clippy::cast_possible_truncation, reason = "dice and patterns are cut to size on purpose")]

mod support;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use praas_dataplane::{Client, ClientConfig, Credential, InvokeError, Ipc, LaunchKey, LocalProcess, Role, Secret};
use support::namespace::Cable;
use support::proxy::{Plan, Proxy, Way};
use support::{Dice, PATIENCE, Tally, fds, launch_config, seed, setting, start_workers, wait_until};

/// Three heartbeats of a second, or TCP's own patience, and a little for the machine.
const FOUND_OUT: Duration = Duration::from_millis(5500);
/// Far beyond it, so that whoever waits for its deadline is told apart.
const DEADLINE: Duration = Duration::from_secs(20);

fn patient() -> ClientConfig {
    ClientConfig { deadline: DEADLINE, ..ClientConfig::default() }
}

/// Waits for calls in flight whose process has fallen silent: none waits for its deadline, none has an answer.
fn found_out(clients: &mut [(Client, praas_dataplane::client::CallHandle)], what: &str) {
    for (client, call) in clients {
        // A client that was not asked meanwhile has asked nobody: its time begins with this wait.
        let silent = Instant::now();
        let error = client.wait(*call).expect_err("there was no answer").to_string();
        let took = silent.elapsed();
        println!("{what}: `{error}` after {took:?}");
        assert!(took < FOUND_OUT, "{what}: found out after {took:?}: {error}");
    }
}

/// And idleness is not silence: nobody polls an idle client, and no thread of ours answers for it.
#[test]
fn n1_a_process_that_falls_silent_is_found_out_and_an_idle_client_is_kept() {
    let (process, mut idle) = start_workers(Ipc::Ring, 2, &[]);
    assert_eq!(&*idle.invoke("echo", b"before").unwrap(), b"before");
    let address = process.addr();
    std::thread::scope(|scope| {
        for ways in [&[Way::Up, Way::Down][..], &[Way::Up], &[Way::Down]] {
            scope.spawn(move || {
                let proxy = Proxy::start(address, 0, |_| Plan::default());
                let mut clients: Vec<_> = (0..3)
                    .map(|_| {
                        let mut client = Client::connect(proxy.addr(), &patient()).expect("it connects");
                        let call = client.submit("sleep", b"15000").expect("it is taken");
                        (client, call)
                    })
                    .collect();
                // So that they are on their way.
                std::thread::sleep(Duration::from_millis(100));
                proxy.hold(ways);
                found_out(&mut clients, &format!("{ways:?} held"));
            });
        }
        std::thread::sleep(Duration::from_secs(7));
    });
    assert_eq!(&*idle.invoke("echo", b"after").unwrap(), b"after");
}

/// A process at the far end of a cable, and what its clients need to be let in. `None`, and a line that says why, where
/// there is no cable.
fn far_away(args: &[&str]) -> Option<(Cable, LocalProcess, ClientConfig, Tally)> {
    let key = Secret::new([7; 32]);
    let expires = praas_dataplane::clock::unix_s() + 3600;
    let credential = Credential::mint(&key, Role::Client, "far", expires).expect("a name");
    let cable = Cable::lay()?;
    let mut config = launch_config(Ipc::Ring);
    config.args.extend(args.iter().map(|arg| (*arg).to_owned()));
    config.key = Some(LaunchKey::Pipe(Arc::new(key)));
    config.args.push(format!("--listen={}", SocketAddr::from((cable.far.address(), 0))));
    let tally = Tally::keep(&mut config);
    let process = cable.far.run(|| LocalProcess::start(&config).expect("it starts"));
    Some((cable, process, ClientConfig { credential: Some(credential), ..patient() }, tally))
}

fn connect_over(cable: &Cable, process: &LocalProcess, config: &ClientConfig) -> Client {
    cable.near.run(|| Client::connect(process.addr(), config).expect("it connects"))
}

#[test]
fn n1_a_host_that_is_gone_is_found_out_by_both_ends() {
    let Some((cable, process, config, _tally)) = far_away(&[]) else { return };
    let open = fds(process.pid());
    for round in 0..setting("PRAAS_PARTITIONS", 1).min(20) {
        let mut busy: Vec<_> = (0..20)
            .map(|_| {
                let mut client = connect_over(&cable, &process, &config);
                let call = client.submit("sleep", b"15000").expect("it is taken");
                (client, call)
            })
            .collect();
        let idle: Vec<_> = (0..20).map(|_| connect_over(&cable, &process, &config)).collect();
        std::thread::sleep(Duration::from_millis(200));
        let pulled = Instant::now();
        cable.pull();
        found_out(&mut busy, "cable pulled");
        wait_until("the process drops its dead connections", Duration::from_secs(8), || fds(process.pid()) == open);
        println!("round {round}: the process was rid of 40 dead connections after {:?}", pulled.elapsed());
        assert!(pulled.elapsed() < Duration::from_secs(7));
        cable.mend();
        drop((busy, idle));
    }
}

/// Answers that come after the network has healed are nobody's, and what ran, ran once.
#[test]
fn n10_networks_that_part_and_heal_deliver_nothing_late_or_twice() {
    let Some((cable, process, config, tally)) = far_away(&[]) else { return };
    let open = fds(process.pid());
    let mut dice = Dice(seed());
    let (mut call, mut answered) = (0_u64, Vec::new());
    for round in 0..setting("PRAAS_PARTITIONS", 3) {
        let mut client = connect_over(&cable, &process, &config);
        let begun = Instant::now();
        let parted_ms = 100 + dice.below(1500);
        let (mut parted, mut healed) = (false, None);
        loop {
            call += 1;
            let bytes = dice.below(5000) as usize;
            match client.invoke("tally", Tally::input(call, bytes)) {
                Ok(reply) => {
                    assert!(*reply == *Tally::input(call, bytes), "call {call} got another's answer");
                    answered.push(call);
                }
                // Longer apart than TCP and heartbeats are patient; it connects again, or we do.
                Err(InvokeError::ConnectionLost { .. }) => client = connect_over(&cable, &process, &config),
                Err(error) => panic!("round {round}: {error}"),
            }
            let ms = begun.elapsed().as_millis() as u64;
            if !parted && ms > 50 {
                parted = true;
                match round % 3 {
                    0 => cable.pull(),
                    1 => cable.near.loses(&cable.far),
                    _ => cable.far.loses(&cable.near),
                }
                let cable = &cable;
                std::thread::scope(|scope| {
                    scope.spawn(|| {
                        std::thread::sleep(Duration::from_millis(parted_ms));
                        cable.mend();
                    });
                    call += 1;
                    let reply = client.invoke("tally", Tally::input(call, 10));
                    if reply.is_ok_and(|reply| *reply == *Tally::input(call, 10)) {
                        answered.push(call);
                    }
                });
                healed = Some(Instant::now());
            }
            if healed.is_some_and(|healed| healed.elapsed() > Duration::from_millis(100)) {
                break;
            }
            assert!(begun.elapsed() < PATIENCE, "round {round}: parted for {parted_ms} ms, and never the same again");
        }
    }
    wait_until("no connection stays", PATIENCE, || fds(process.pid()) == open);
    let runs = tally.runs();
    let twice: Vec<_> = runs.iter().filter(|(_, runs)| **runs > 1).collect();
    assert!(twice.is_empty(), "ran more than once: {twice:?}");
    assert!(answered.iter().all(|call| runs.contains_key(call)), "answered, and did not run");
    println!("{} calls answered, {} ran", answered.len(), runs.len());
}

/// The cable itself: without this, what is not seen over it may be what never was.
#[test]
fn n10_a_pulled_cable_carries_nothing_and_a_mended_one_everything() {
    use std::io::{Read, Write};
    let Some(cable) = Cable::lay() else { return };
    let listener = cable.far.run(|| std::net::TcpListener::bind((cable.far.address(), 0)).unwrap());
    let address = listener.local_addr().unwrap();
    let mut near = cable.near.run(|| std::net::TcpStream::connect(address).unwrap());
    let (mut far, _) = listener.accept().unwrap();
    near.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    far.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    let mut byte = [0];
    for (near_loses, far_loses) in [(true, true), (true, false), (false, true)] {
        near.write_all(b"a").unwrap();
        far.read_exact(&mut byte).unwrap();
        if near_loses {
            cable.near.loses(&cable.far);
        }
        if far_loses {
            cable.far.loses(&cable.near);
        }
        near.write_all(b"b").unwrap();
        assert_eq!(far.read(&mut byte).is_ok(), !near_loses);
        far.write_all(b"c").unwrap();
        let arrived = near.read(&mut byte).is_ok();
        // Without acknowledgements of ours it is sent again; it arrives all the same.
        assert_eq!(arrived, !far_loses);
        cable.mend();
        // What was held back arrives once TCP tries again.
        near.set_read_timeout(Some(PATIENCE)).unwrap();
        far.set_read_timeout(Some(PATIENCE)).unwrap();
        if near_loses {
            far.read_exact(&mut byte).unwrap();
        }
        if far_loses {
            near.read_exact(&mut byte).unwrap();
        }
        near.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        far.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    }
}
