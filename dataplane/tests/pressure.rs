//! Peers that are slow, deaf, many or greedy, beside one with manners: it is served, and memory stays within its bounds.
//!
//! `PRAAS_PEERS` sets the number of bad peers (default 120), `PRAAS_FLOOD_S` how long floods last (default 2 s).
#![allow(clippy::cast_possible_truncation, reason = "dice and patterns are cut to size on purpose")]

mod support;

use std::collections::VecDeque;
use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use praas_dataplane::{Client, ClientConfig, Delivery, InvokeError, Ipc, LaunchConfig, LocalProcess, WaitMode};
use support::proxy::{Fault, Lane, Plan, Proxy, Way};
use support::{
    Dice, PATIENCE, children, connect, connect_with, content, cpu_seconds, fds, lives, memory_kib, on_both_reactors,
    process_program, seed, setting, signal, start_with, wait_until,
};

fn peers() -> usize {
    setting("PRAAS_PEERS", 120) as usize
}

fn flood() -> Duration {
    Duration::from_secs(setting("PRAAS_FLOOD_S", 2))
}

/// A client with manners, at work in a thread: calls of any size below 64 KiB, one after the other, each checked.
struct Good {
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<(Vec<Duration>, u64)>,
}

impl Good {
    fn at_work(address: SocketAddr) -> Good {
        let stop = Arc::new(AtomicBool::new(false));
        let mut client = Client::connect(address, &ClientConfig::default()).expect("there is room for the good");
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let (mut dice, mut took, mut busy) = (Dice(seed()), Vec::new(), 0);
            while !stopped.load(Ordering::Relaxed) {
                let call = took.len() as u64;
                let input = content(call, dice.below(64 << 10) as usize);
                let begun = Instant::now();
                let reply = loop {
                    match client.invoke("echo", &input) {
                        Ok(reply) => break reply,
                        // An answer, too; asked again, and the time counts.
                        Err(InvokeError::Busy { .. }) => busy += 1,
                        Err(error) => panic!("the good client: {error}"),
                    }
                };
                took.push(begun.elapsed());
                assert!(*reply == *input, "the good client got another's answer");
            }
            (took, busy)
        });
        Good { stop, thread }
    }

    /// Ends its work. Every call was answered; none took longer than `longest`.
    fn done(self, what: &str, longest: Duration) {
        self.stop.store(true, Ordering::Relaxed);
        let (mut took, busy) = self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        took.sort_unstable();
        let (p50, p99, max) = (took[took.len() / 2], took[took.len() * 99 / 100], took[took.len() - 1]);
        println!(
            "{what}: {} good calls, p50 {p50:?}, p99 {p99:?}, longest {max:?}, told {busy} times to come again",
            took.len()
        );
        assert!(max < longest, "{what}: a good call took {max:?}");
    }
}

/// Bytes of a connection before its first request, each way.
fn greeting_bytes(process: &LocalProcess) -> [u64; 2] {
    let probe = Proxy::start(process.addr(), 0, |_| Plan::default());
    drop(Client::connect(probe.addr(), &ClientConfig::default()).expect("it connects"));
    probe.tape(0).1
}

#[test]
fn n2_slow_and_stalled_peers_are_closed_and_a_busy_one_is_served() {
    on_both_reactors(|reactor| {
        let (process, _client) = reactor.start(2, &["--arena-bytes", "67108864"]);
        let open = fds(process.pid());
        let [greeting, _] = greeting_bytes(&process);
        let alone = Good::at_work(process.addr());
        std::thread::sleep(Duration::from_millis(500));
        alone.done("alone", Duration::from_secs(2));
        wait_until("the good one has left", PATIENCE, || fds(process.pid()) == open);
        let mut after = Vec::new();
        for round in 0..2 {
            let good = Good::at_work(process.addr());
            // In the middle of a header, and byte by byte of a body, one a second.
            let proxy = Proxy::start(process.addr(), seed(), move |number| match number % 2 {
                0 => Plan::on(Way::Up, greeting + 1 + number % 63, Fault::Stall),
                _ => {
                    let drops = (0..30).map(|at| (greeting + 200 + at, Fault::Split(Duration::from_secs(1))));
                    Plan { up: Lane { faults: drops.collect(), ..Lane::default() }, ..Plan::default() }
                }
            });
            let patient = ClientConfig { deadline: Duration::from_secs(30), ..ClientConfig::default() };
            let mut slow: Vec<Client> = Vec::new();
            let mut silent: Vec<TcpStream> = Vec::new();
            for peer in 0..peers() {
                if peer % 3 == 0 {
                    silent.push(TcpStream::connect(process.addr()).expect("it listens"));
                } else {
                    let mut client = Client::connect(proxy.addr(), &patient).expect("it connects");
                    client.submit("echo", vec![1; 20_000]).expect("it is taken");
                    slow.push(client);
                }
            }
            let (begun, mut most) = (Instant::now(), 0);
            wait_until("bad peers are closed though they hold on", Duration::from_secs(12), || {
                most = most.max(memory_kib(process.pid()));
                // Those that say nothing say a byte of something now and then.
                silent
                    .iter_mut()
                    .filter(|_| begun.elapsed().subsec_millis() < 2)
                    .for_each(|peer| drop(peer.write(b"P")));
                std::thread::sleep(Duration::from_millis(20));
                // The good one is in.
                fds(process.pid()) <= open + 1
            });
            println!("round {round}: {} bad peers closed within {:?}, {most} KiB", peers(), begun.elapsed());
            assert_eq!(slow.len() + silent.len(), peers());
            // The whole of the arena, and as much again for everything else.
            assert!(most < 2 * 65_536, "{most} KiB");
            good.done("beside slow peers", Duration::from_secs(2));
            drop((slow, silent, proxy));
            wait_until("all have left", PATIENCE, || fds(process.pid()) == open);
            after.push(memory_kib(process.pid()));
        }
        assert!(after[1] < after[0] + 1024, "it grows with every round of bad peers: {after:?} KiB");
    });
}

/// Each leaves unread less than what closes one, and together they leave all there is.
#[test]
fn n9_deaf_clients_together_do_not_keep_memory_from_others() {
    on_both_reactors(|reactor| {
        let (process, mut client) = reactor.start(2, &["--arena-bytes", "67108864"]);
        let [_, greeted] = greeting_bytes(&process);
        // Their clients would read; nothing comes through to them.
        let proxy = Proxy::start(process.addr(), 0, move |_| Plan::on(Way::Down, greeted, Fault::Stall));
        let mut deaf: Vec<Client> =
            (0..20).map(|_| Client::connect(proxy.addr(), &ClientConfig::default()).expect("it connects")).collect();
        for client in &mut deaf {
            for _ in 0..8 {
                client.submit("echo", vec![1; 1 << 20]).expect("it is taken");
            }
        }
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(1) {
            deaf.iter_mut().for_each(|client| drop(client.poll()));
            std::thread::sleep(Duration::from_millis(1));
        }
        let input = content(3, 4 << 20);
        wait_until("a good client has room again", Duration::from_secs(12), || {
            match client.invoke("echo", input.clone()) {
                Ok(reply) => *reply == *input,
                Err(InvokeError::NoSpace { .. }) => false,
                Err(error) => panic!("{error}"),
            }
        });
        drop((deaf, proxy));
    });
}

/// Two clients send so many calls each, as many of them in flight as there are inputs. Gives what memory the process took meanwhile, KiB.
fn saturate(process: &LocalProcess, inputs: &[Arc<[u8]>], calls: usize) -> Vec<u64> {
    std::thread::scope(|scope| {
        let work: Vec<_> = (0..2)
            .map(|_| {
                let mut client = connect(process);
                scope.spawn(move || {
                    let mut open = VecDeque::new();
                    for input in inputs.iter().cycle().take(calls) {
                        if open.len() == inputs.len() {
                            let (input, handle) = open.pop_front().expect("one a place");
                            check(&mut client, input, handle);
                        }
                        open.push_back((input, client.submit("echo", Arc::clone(input)).expect("it is taken")));
                    }
                    open.into_iter().for_each(|(input, handle)| check(&mut client, input, handle));
                })
            })
            .collect();
        let mut memory = Vec::new();
        while !work.iter().all(|work| work.is_finished()) {
            memory.push(memory_kib(process.pid()));
            std::thread::sleep(Duration::from_millis(20));
        }
        memory
    })
}

#[test]
fn n9_large_transfers_both_ways_at_once_neither_lock_up_nor_grow() {
    on_both_reactors(|reactor| {
        let (process, _client) = reactor.start(2, &["--arena-bytes", "134217728"]);
        const BYTES: usize = 8 << 20;
        let inputs: Vec<Arc<[u8]>> = (0..4).map(|call| content(call, BYTES).into()).collect();
        let memory = saturate(&process, &inputs, 100);
        let half = memory.len() / 2;
        let (early, late) = (memory[..half].iter().max().unwrap(), memory[half..].iter().max().unwrap());
        println!("1600 MiB there and back: at most {early} KiB in the first half, {late} KiB in the second");
        assert!(*late < early + 9 * 1024 && *late < 3 * 131_072, "{early} KiB, then {late} KiB");
    });
}

/// As large as a payload may be, several of them open at once: the socket is full both ways all the time, each end with more to send than
/// the other takes in before it sends.
#[test]
fn n9_mutual_full_send_of_the_largest_bodies_neither_locks_up_nor_grows() {
    on_both_reactors(|reactor| {
        const BYTES: usize = 64 << 20;
        let (process, _client) = reactor.start(2, &["--arena-bytes", "536870912"]);
        let inputs: Vec<Arc<[u8]>> = (0..2).map(|call| content(call, BYTES).into()).collect();
        let begun = Instant::now();
        let memory = saturate(&process, &inputs, 8);
        let most = memory.iter().max().expect("it took a while");
        println!("1 GiB there and back in {:?}: at most {most} KiB", begun.elapsed());
        // The blocks of four bodies, and everything else.
        assert!(*most < 4 * 65_536 + 32_768, "{most} KiB for four bodies of 64 MiB");
    });
}

/// Slow readers, who do take what they asked for, only slowly: they wait for their own answers, and nobody else does.
#[test]
fn n9_slow_readers_stop_themselves_and_nobody_else() {
    on_both_reactors(|reactor| {
        let (process, _client) = reactor.start(2, &["--arena-bytes", "134217728"]);
        // 2 MB/s for each.
        let slow = || Lane { piece_max: 16 << 10, pause: Duration::from_millis(4), ..Lane::default() };
        let proxy = Proxy::start(process.addr(), 0, move |_| Plan { down: slow(), narrow: true, ..Plan::default() });
        let good = Good::at_work(process.addr());
        const CALLS: u64 = 8;
        let (memory, took) = std::thread::scope(|scope| {
            let readers: Vec<_> = (0..4)
                .map(|reader| {
                    let mut client = Client::connect(proxy.addr(), &ClientConfig::default()).expect("it connects");
                    scope.spawn(move || {
                        let begun = Instant::now();
                        let inputs: Vec<_> = (0..CALLS).map(|call| content(reader << 8 | call, 1 << 20)).collect();
                        let open: Vec<_> =
                            inputs.iter().map(|input| client.submit("echo", input).expect("it is taken")).collect();
                        for (input, call) in inputs.iter().zip(open) {
                            assert!(*client.wait(call).expect("slow is not dead") == **input);
                        }
                        begun.elapsed()
                    })
                })
                .collect();
            let mut memory = Vec::new();
            while !readers.iter().all(|reader| reader.is_finished()) {
                memory.push(memory_kib(process.pid()));
                std::thread::sleep(Duration::from_millis(20));
            }
            let took = readers.into_iter().map(|reader| reader.join().expect("a slow reader")).min();
            (memory, took.expect("four"))
        });
        good.done("beside slow readers", Duration::from_secs(2));
        let most = memory.iter().max().expect("it took a while");
        println!("32 MiB to slow readers, the first done after {took:?}: {most} KiB at most");
        assert!(took > Duration::from_secs(2), "they were not slow");
        // All that they asked for at most, and everything else.
        assert!(*most < (32 << 10) + 40_960, "{most} KiB");
    });
}

fn check(client: &mut Client, input: &[u8], handle: praas_dataplane::client::CallHandle) {
    let reply = client.wait(handle).unwrap_or_else(|error| panic!("{error}"));
    assert!(*reply == *input, "another's answer");
}

#[test]
fn n11_clients_that_come_all_at_once_are_all_served() {
    on_both_reactors(|reactor| {
        let (process, _client) = reactor.start(2, &[]);
        let open = fds(process.pid());
        for round in 0..3 {
            let start = Barrier::new(200);
            let longest = std::thread::scope(|scope| {
                let storm: Vec<_> = (0..200_u64)
                    .map(|client| {
                        let (start, address) = (&start, process.addr());
                        scope.spawn(move || {
                            start.wait();
                            let begun = Instant::now();
                            let mut ours = Client::connect(address, &ClientConfig::default()).expect("it connects");
                            assert_eq!(
                                *ours.invoke("echo", content(client, 50)).expect("an answer"),
                                *content(client, 50)
                            );
                            begun.elapsed()
                        })
                    })
                    .collect();
                storm.into_iter().map(|client| client.join().expect("served")).max()
            });
            println!("round {round}: the last of 200 was served after {longest:?}");
            assert!(longest < Some(Duration::from_secs(5)), "{longest:?}");
            wait_until("all have left", PATIENCE, || fds(process.pid()) == open);
        }
    });
}

/// Nobody refuses there: a host that is gone, or behind a wall.
#[test]
fn n11_n13_an_address_that_does_not_answer_is_an_error_in_time() {
    use rustix::net::{AddressFamily, SocketType, bind, connect, getsockname, listen, socket};
    // A listener that takes nobody, with its queue full: further SYNs are dropped.
    let listener = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    bind(&listener, &SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    listen(&listener, 0).unwrap();
    let address: SocketAddr = getsockname(&listener).unwrap().try_into().unwrap();
    let _waiting: Vec<_> = (0..3)
        .map(|_| {
            let flags = rustix::net::SocketFlags::NONBLOCK;
            let stream = rustix::net::socket_with(AddressFamily::INET, SocketType::STREAM, flags, None).unwrap();
            let _ = connect(&stream, &address);
            stream
        })
        .collect();
    for within in [Duration::from_millis(100), Duration::from_millis(700)] {
        let config = ClientConfig { connect_within: within, ..ClientConfig::default() };
        let begun = Instant::now();
        let error = Client::connect(address, &config).unwrap_err().to_string();
        let took = begun.elapsed();
        assert!(error.contains(&address.to_string()) && error.contains("timed out"), "{error}");
        assert!(took >= within && took < 2 * within + Duration::from_millis(300), "{within:?} took {took:?}");
    }
}

/// Connections, calls, cancellations and names without end from some, and memory that does not grow.
#[test]
fn a8_a_flood_of_everything_costs_a_fixed_memory() {
    on_both_reactors(|reactor| {
        let args = ["--arena-bytes", "67108864", "--queue-max", "64", "--connections-max", "64"];
        let (process, _client) = reactor.start(2, &args);
        let good = Good::at_work(process.addr());
        let stop = AtomicBool::new(false);
        let (memory, made) = std::thread::scope(|scope| {
            let floods: Vec<_> = (0..3)
                .map(|flood| {
                    let (stop, address) = (&stop, process.addr());
                    scope.spawn(move || flood_with(flood, address, stop))
                })
                .collect();
            let (begun, mut memory) = (Instant::now(), Vec::new());
            while begun.elapsed() < flood() {
                memory.push(memory_kib(process.pid()));
                std::thread::sleep(Duration::from_millis(50));
            }
            stop.store(true, Ordering::Relaxed);
            (memory, floods.into_iter().map(|flood| flood.join().expect("a flood")).collect::<Vec<_>>())
        });
        let half = memory.len() / 2;
        let (early, late) = (memory[..half].iter().max().unwrap(), memory[half..].iter().max().unwrap());
        println!("{made:?} connections, calls and cancellations: {early} KiB, then {late} KiB");
        assert!(made.iter().all(|made| *made > 100), "{made:?}");
        // io_uring's buffers, 2 MiB, are touched as they are used.
        assert!(*late < early + early / 10 + 4096 && *late < 131_072, "{early} KiB, then {late} KiB");
        good.done("beside a flood", Duration::from_secs(5));
    });
}

/// One that has as many calls in flight as it may, and one that has one at a time.
#[test]
fn n9_a_greedy_connection_does_not_take_the_queue_from_others() {
    on_both_reactors(|reactor| {
        let (process, mut client) = reactor.start(1, &["--queue-max", "64"]);
        let stop = AtomicBool::new(false);
        let (stop, address) = (&stop, process.addr());
        std::thread::scope(|scope| {
            let greedy = scope.spawn(move || {
                let mut client = Client::connect(address, &ClientConfig::default()).expect("it connects");
                let mut done = 0;
                while !stop.load(Ordering::Relaxed) {
                    while client.in_flight() < 500 {
                        client.submit("sleep", b"1").expect("it is taken");
                    }
                    done += client.wait_any().map_or(0, |(_, ended)| u64::from(ended.is_ok()));
                }
                done
            });
            std::thread::sleep(Duration::from_millis(300));
            let mut took: Vec<_> = (0..40)
                .map(|_| {
                    let begun = Instant::now();
                    (client.invoke("sleep", b"1").map(|_| ()), begun.elapsed())
                })
                .collect();
            stop.store(true, Ordering::Relaxed);
            println!("the greedy one: {} calls", greedy.join().expect("greedy"));
            let refused = took.iter().filter(|(ended, _)| ended.is_err()).count();
            took.sort_by_key(|(_, took)| *took);
            // In turns it waits for the call that runs and for one of the greedy one's; behind its queue, for 64.
            let median = took[20].1;
            println!("the modest one: {refused} of 40 calls refused, half of them within {median:?}");
            assert!(refused == 0 && median < Duration::from_millis(30), "{refused} refused, {median:?}");
        });
    });
}

/// Floods until it is stopped; returns of how many things.
fn flood_with(kind: usize, address: SocketAddr, stop: &AtomicBool) -> u64 {
    let config = ClientConfig {
        connect_within: Duration::from_millis(500),
        delivery: Delivery::Retry,
        ..ClientConfig::default()
    };
    let (mut made, mut kept) = (0, VecDeque::new());
    while !stop.load(Ordering::Relaxed) {
        let Ok(mut client) = Client::connect(address, &config) else { continue };
        match kind {
            // Connections, each with a call or two, left to themselves.
            0 => {
                for _ in 0..3 {
                    made += u64::from(client.submit("echo", vec![1; 1000]).is_ok());
                }
                kept.push_back(client);
                if kept.len() > 20 {
                    kept.pop_front();
                }
            }
            // Calls, as many as are taken, and answers that nobody reads for long.
            1 => {
                for call in 0..2000_u32 {
                    made += u64::from(client.submit("echo", vec![2; (call % 3000) as usize]).is_ok());
                    if call % 100 == 0 {
                        while client.poll().is_some() {}
                    }
                }
            }
            // Calls that are cancelled at once.
            _ => {
                for _ in 0..500 {
                    if let Ok(call) = client.submit("sleep", b"1") {
                        made += 1;
                        let _ = client.cancel(call);
                    }
                    while client.poll().is_some() {}
                }
            }
        }
    }
    made
}

#[test]
fn x3_descriptors_that_run_out_stop_nobody_who_is_in_and_come_back() {
    on_both_reactors(|reactor| {
        // As many as it has when it is up, and some: io_uring accepts by the limit that was there when it was told to.
        let (free, _client) = reactor.start(2, &[]);
        let few = fds(free.pid()) + 6;
        let script = std::env::temp_dir().join(format!("praas-few-descriptors-{}", std::process::id()));
        std::fs::write(&script, format!("#!/bin/sh\nulimit -S -n {few}\nexec {} \"$@\"\n", process_program())).unwrap();
        std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o700)).unwrap();
        drop(free);
        let config = LaunchConfig { process_binary: Some(script.clone()), ..reactor.config(Ipc::Ring, 2, &[]) };
        let (process, mut client) = start_with(&config);
        std::fs::remove_file(script).unwrap();
        assert_eq!(&*client.invoke("echo", b"in").unwrap(), b"in");
        let crowd: Vec<_> = (0..30).map(|_| TcpStream::connect(process.addr()).expect("the kernel listens")).collect();
        let quick = ClientConfig { connect_within: Duration::from_millis(500), ..ClientConfig::default() };
        // Whoever says hello takes the place of one that says nothing, until there is nobody left to give way.
        let late: Vec<_> = (0..30).map(|_| Client::connect(process.addr(), &quick)).collect();
        assert!(late.iter().any(Result::is_err), "there were descriptors for all, and this test shows nothing");
        // A worker that cannot be replaced now: its segment, bells and socket want descriptors.
        let victim = children(process.pid())[0];
        signal(victim, 9);
        let (begun, cpu) = (Instant::now(), cpu_seconds(process.pid()));
        while begun.elapsed() < Duration::from_secs(1) {
            match client.invoke("echo", b"still") {
                Ok(reply) => assert_eq!(&*reply, b"still"),
                Err(error) => panic!("who is in is served: {error}"),
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let cpu = cpu_seconds(process.pid()) - cpu;
        println!("{cpu:.2} s of CPU in 1 s without descriptors");
        assert!(cpu < 0.5, "{cpu} s of CPU in 1 s: it spins on what it cannot have");
        drop((crowd, late));
        wait_until("the worker is replaced", PATIENCE, || {
            let children = children(process.pid());
            children.len() == 2 && children.iter().all(|pid| lives(*pid))
        });
        let config = ClientConfig { connect_within: Duration::from_secs(2), ..ClientConfig::default() };
        assert_eq!(&*connect_with(&process, &config).invoke("echo", b"late").unwrap(), b"late");
    });
}

/// A request of over a megabyte that lay in the socket whole was read in two turns, the second without an event, and handed to a worker only
/// after the sleep that followed: a second later.
#[test]
fn a_request_that_is_read_to_its_end_without_an_event_is_run_at_once() {
    on_both_reactors(|reactor| {
        let config = LaunchConfig { wait: WaitMode::Efficient, ..reactor.config(Ipc::Ring, 1, &[]) };
        let (process, mut client) = start_with(&config);
        for round in 0..20 {
            let input = content(round, (1 << 20) + 300_000);
            // Stopped, it finds as much of it as the kernel holds when it goes on.
            signal(process.pid(), 19);
            let call = client.submit("echo", input.clone()).expect("room for it");
            std::thread::sleep(Duration::from_millis(20));
            signal(process.pid(), 18);
            let begun = Instant::now();
            assert!(*client.wait(call).expect("an answer") == *input);
            assert!(begun.elapsed() < Duration::from_millis(700), "call {round} took {:?}", begun.elapsed());
        }
    });
}
