//! Which reactor a process runs on: the one asked for, or the best that works here, and that it says so (R7, X7).

mod support;

use std::process::Command;
use std::time::{Duration, Instant};

use praas_dataplane::{Client, InvokeError, Ipc, LaunchConfig, LocalProcess, WaitMode};
use support::refusal::{Step, without_io_uring, without_step};
use support::started::Started;
use support::{
    PATIENCE, children, connect, content, has_flag, launch_config, lives, on_both_reactors, process_program, signal,
    start_with, wait_until,
};

/// Errnos with which kernels and sandboxes refuse.
const REFUSALS: [(i32, &str); 2] = [(libc::EPERM, "EPERM"), (libc::ENOSYS, "ENOSYS")];

/// Without this the other tests here would show nothing.
#[test]
fn x7_the_filter_refuses_io_uring() {
    for (errno, _) in REFUSALS {
        let error = without_io_uring(errno, || {
            // SAFETY: the kernel reads no memory for a null pointer, it returns EFAULT; no memory of ours is in play.
            let ring = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, std::ptr::null_mut::<u8>()) };
            assert_eq!(ring, -1);
            std::io::Error::last_os_error().raw_os_error()
        });
        assert_eq!(error, Some(errno));
    }
}

#[test]
fn x7_where_io_uring_is_refused_a_process_serves_on_epoll_and_says_why() {
    if !has_flag("--reactor") {
        return;
    }
    for (errno, name) in REFUSALS {
        for args in [&[][..], &["--reactor", "auto"]] {
            let process = without_io_uring(errno, || Started::with(args));
            assert_eq!(process.value("reactor"), "epoll", "{name}: {}", process.ready);
            process.serves();
            let (code, said) = process.end();
            assert_eq!(code, Some(0), "{said}");
            let text = std::io::Error::from_raw_os_error(errno).to_string();
            let text = text.split(" (").next().unwrap();
            let lines: Vec<_> = said.lines().filter(|line| line.contains("io_uring")).collect();
            assert!(lines.len() == 1 && lines[0].contains(text), "{name}, once, with `{text}`: {said}");
            assert!(lines[0].contains("WARN"), "everybody is told, not only who asks for more: {said}");
        }
    }
}

#[test]
fn x7_io_uring_asked_for_and_refused_is_an_error_that_says_what_to_do() {
    if !has_flag("--reactor") {
        return;
    }
    for (errno, name) in REFUSALS {
        let process = without_io_uring(errno, || Started::with(&["--reactor", "uring"]));
        assert_eq!(process.ready, "", "{name}");
        let (code, said) = process.end();
        assert!(code.is_some_and(|code| code != 0), "{name}: {code:?} {said}");
        let last = said.lines().last().unwrap_or_default();
        assert!(last.contains("io_uring") && last.contains("--reactor"), "{name}: {said}");
    }
}

/// A ring that can be made and not used is none: each later step is tried, too.
#[test]
fn x7_where_a_ring_can_be_made_and_not_used_a_process_serves_on_epoll_and_says_why() {
    if !has_io_uring() {
        return;
    }
    for (step, errno) in [
        (Step::Map, libc::ENOMEM),
        (Step::Register, libc::EPERM),
        (Step::Register, libc::ENOMEM),
        (Step::Enter, libc::EPERM),
    ] {
        let process = without_step(step, errno, || Started::with(&[]));
        assert_eq!(process.value("reactor"), "epoll", "{step:?}: {}", process.ready);
        process.serves();
        let (code, said) = process.end();
        let lines: Vec<_> = said.lines().filter(|line| line.contains("io_uring")).collect();
        let text = std::io::Error::from_raw_os_error(errno).to_string();
        assert!(
            code == Some(0) && lines.len() == 1 && lines[0].contains(&text),
            "{step:?}, once, with `{text}`: {said}"
        );
        let process = without_step(step, errno, || Started::with(&["--reactor", "uring"]));
        let (code, said) = process.end();
        let last = said.lines().last().unwrap_or_default();
        assert!(code == Some(6) && last.contains(&text) && last.contains("--reactor"), "{step:?}: {code:?} {said}");
    }
}

fn has_io_uring() -> bool {
    let process = Started::with(&["--reactor", "uring"]);
    if process.ready.is_empty() {
        println!("skipped: needs io_uring");
    }
    !process.ready.is_empty()
}

/// RLIMIT_MEMLOCK of 0, for somebody who may not lock memory beyond it: whether a ring counts there depends on the kernel. Where it does, epoll
/// takes its place.
#[test]
fn x7_without_memory_to_lock_a_process_serves_and_says_what_it_does_without() {
    let limited = |args: &[&str]| {
        let mut command = Command::new("prlimit");
        command.args(["--memlock=0:0", "setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock"]);
        Started::of(command.arg(process_program()), args)
    };
    let has_io_uring = has_io_uring();
    let reactors = if has_io_uring { &["auto", "uring", "epoll"][..] } else { &["auto", "epoll"] };
    for reactor in reactors {
        let process = limited(&["--reactor", reactor]);
        if process.ready.is_empty() {
            let (code, said) = process.end();
            if *reactor == "uring" && said.contains("RLIMIT_MEMLOCK") {
                assert!(code == Some(6) && said.contains("ulimit -l") && said.contains("--reactor epoll"), "{said}");
                println!("--reactor uring: {said}");
                continue;
            }
            assert!(said.contains("setpriv") || said.contains("prlimit"), "{reactor}: {code:?} {said}");
            return println!("skipped: needs prlimit, setpriv and the right to give up a capability ({said})");
        }
        let file =
            |name: &str| std::fs::read_to_string(format!("/proc/{}/{name}", process.child.id())).expect("it lives");
        let (limits, status) = (file("limits"), file("status"));
        let memory = limits.lines().find(|line| line.starts_with("Max locked memory")).expect("a line");
        assert!(memory.split_whitespace().nth(3) == Some("0"), "{memory}");
        let capabilities = status.lines().find_map(|line| line.strip_prefix("CapEff:\t")).expect("a line");
        const CAP_IPC_LOCK: u32 = 14;
        assert_eq!(u64::from_str_radix(capabilities, 16).expect("hexadecimal") >> CAP_IPC_LOCK & 1, 0);
        process.serves();
        println!("--reactor {reactor}: {}", process.value("reactor"));
        let (code, said) = process.end();
        let lines: Vec<_> = said.lines().filter(|line| line.contains("reactor=")).collect();
        assert!(code == Some(0) && lines.len() == 1, "{said}");
        let fell_back = has_io_uring && *reactor == "auto" && lines[0].contains("io_uring cannot");
        assert!(!fell_back || lines[0].contains("RLIMIT_MEMLOCK"), "{said}");
    }
}

/// Memory for mappings that runs out at any point of the start (RLIMIT_AS, which fails as `vm.max_map_count` does: ENOMEM from mmap; that one is
/// of the whole machine): the process serves, or ends with a line that says what to do. It neither hangs nor panics. Unlike the other limit this
/// one is the heap's, too: where it leaves none for the next few bytes, a program of Rust says so and aborts.
#[test]
fn x7_too_little_address_space_is_served_with_or_an_error_that_says_what_to_do() {
    let limited = |kib: u64| {
        let mut command = Command::new("sh");
        command.args(["-c", &format!("ulimit -v {kib} && exec \"$0\" \"$@\""), &process_program()]);
        command
    };
    // 64 MiB of payload memory for each; before it, what takes to load the program at all.
    let args = ["--arena-bytes", "67108864"];
    let loads = |kib: u64| limited(kib).arg("--help").output().expect("a shell").status.success();
    let least = (8..128).map(|mib| mib << 10).find(|kib| loads(*kib)).expect("128 MiB load any program");
    let (mut served, mut refused, mut mapped, mut heapless) = (0, 0, 0, 0);
    // Less is too little for the first heap there is, without which no program of Rust goes on.
    let first = least + (2 << 10);
    for kib in (first..first + (400 << 10)).step_by(7 << 10) {
        for reactor in ["auto", "epoll"] {
            let begun = Instant::now();
            let process = Started::of(&mut limited(kib), &[&args[..], &["--reactor", reactor]].concat());
            if process.ready.is_empty() {
                let (code, said) = process.end();
                let last = said.lines().last().unwrap_or_default();
                assert!(!said.contains("panicked"), "{kib} KiB, {reactor}: {said}");
                if code.is_none() && said.contains("memory allocation of") {
                    heapless += 1;
                    continue;
                }
                let helps = ["ulimit -v", "memory", "worker"].iter().any(|word| last.contains(word));
                assert!(matches!(code, Some(4 | 6)) && helps, "{kib} KiB, {reactor}: {code:?} {said}");
                refused += 1;
                mapped += u32::from(last.contains("vm.max_map_count") && last.contains("ulimit -v"));
            } else {
                process.serves();
                assert_eq!(process.end().0, Some(0), "{kib} KiB, {reactor}");
                served += 1;
            }
            assert!(begun.elapsed() < Duration::from_secs(15), "{kib} KiB took {:?}", begun.elapsed());
        }
    }
    println!(
        "from {first} KiB: {refused} refused, {mapped} of them for want of mappings; {heapless} without heap; {served} served"
    );
    assert!(mapped > 10 && served > 10 && heapless < 5);
}

#[test]
fn r7_the_reactor_in_use_is_printed() {
    if !has_flag("--reactor") {
        return;
    }
    let best = {
        let process = Started::with(&[]);
        process.serves();
        process.value("reactor").to_owned()
    };
    assert!(["uring", "epoll"].contains(&best.as_str()), "{best}");
    let mut reactors = vec!["epoll"];
    if best == "uring" {
        reactors.push("uring");
    } else {
        println!("skipped: needs io_uring");
    }
    for reactor in reactors {
        let process = Started::with(&["--reactor", reactor]);
        assert_eq!(process.value("reactor"), reactor, "{}", process.ready);
        process.serves();
        assert_eq!(process.end().0, Some(0));
    }
}

/// Whoever launches a process is told what it is on and why, in one line that programs read.
#[test]
fn r7_the_reactor_in_use_and_why_are_told_to_whoever_launched_it_and_logged_once() {
    on_both_reactors(|reactor| {
        let config = reactor.config(Ipc::Ring, 1, &[]);
        let process = LocalProcess::start(&config).expect("it starts");
        let asked = config.args.iter().find_map(|arg| arg.strip_prefix("--reactor="));
        let said = (process.reactor(), process.reactor_reason());
        match asked {
            Some(asked @ ("uring" | "epoll")) => {
                assert!(said.0 == asked && said.1.starts_with("as asked"), "{said:?}");
            }
            _ => assert!(["uring", "epoll"].contains(&said.0) && !said.1.is_empty(), "{said:?}"),
        }
    });
    for (args, word) in [(&["--reactor", "epoll"][..], "as asked"), (&["--wait", "latency"], "")] {
        let process = Started::with(args);
        let (_, reason) = process.ready.trim_end().split_once(" reason=\"").expect("the last word");
        let reason = reason.strip_suffix('"').expect("in quotes").to_owned();
        assert!(!reason.is_empty() && reason.contains(word) && !reason.contains('"'), "{}", process.ready);
        let reactor = process.value("reactor").to_owned();
        let (_, said) = process.end();
        let lines: Vec<_> = said.lines().filter(|line| line.contains("reactor=")).collect();
        let once = lines.len() == 1 && lines[0].contains(&format!("reactor={reactor}")) && lines[0].contains(&reason);
        assert!(once, "{reactor}, `{reason}`: {said}");
    }
    let refused = launch_config(Ipc::Ring);
    let process = without_io_uring(libc::EPERM, || LocalProcess::start(&refused).expect("it starts"));
    if std::env::var_os("PRAAS_TEST_REACTOR").is_none() {
        assert!(
            process.reactor() == "epoll" && process.reactor_reason().contains("seccomp"),
            "{}",
            process.reactor_reason()
        );
    }
}

/// Mappings run out while it serves: in a worker, by a function that maps pages up to `vm.max_map_count`; in the controller, by RLIMIT_AS as it
/// is just then. Who can be served without a new one is, and what was lost comes back with the room for it.
#[test]
fn x7_mappings_that_run_out_while_it_serves_cost_a_worker_at_most() {
    on_both_reactors(|reactor| {
        let config = reactor.config(Ipc::Ring, 2, &["--arena-bytes", "67108864"]);
        let (process, mut client) = start_with(&config);
        let limit = std::fs::read_to_string("/proc/sys/vm/max_map_count").expect("Linux");
        if limit.trim().parse().is_ok_and(|limit: u64| limit > 300_000) {
            println!("skipped: needs a vm.max_map_count below 300000 to reach it; it is {}", limit.trim());
        } else {
            for left in ["0", "1", "2", "5", "50"] {
                let pages = client.invoke("crowd", left.as_bytes()).expect("it maps pages");
                println!("{} pages mapped, {left} left", String::from_utf8_lossy(&pages));
                // Calls of every sort, to the full one and the other: an answer, or the loss of that worker, and soon.
                for function in ["leased", "echo", "large", "leased", "echo"] {
                    let input: &[u8] = if function == "large" { b"30000000" } else { b"echo" };
                    let begun = Instant::now();
                    match client.invoke(function, input) {
                        Ok(_)
                        | Err(
                            InvokeError::WorkerLost { .. } | InvokeError::NoSpace { .. } | InvokeError::Failed { .. },
                        ) => {}
                        Err(error) => panic!("{function} with {left} mappings left: {error}"),
                    }
                    assert!(begun.elapsed() < Duration::from_secs(3), "{function} took {:?}", begun.elapsed());
                }
                client = connect(&process);
            }
        }
        let status = std::fs::read_to_string(format!("/proc/{}/statm", process.pid())).expect("it lives");
        let pages: u64 = status.split_whitespace().next().and_then(|pages| pages.parse().ok()).expect("a number");
        let address_space = |limit: &str| {
            let limit = format!("--as={limit}");
            let done = Command::new("prlimit").args(["--pid", &process.pid().to_string(), &limit]).status();
            done.is_ok_and(|status| status.success())
        };
        // What a call and its connection take, and far less than a segment.
        if !address_space(&format!("{}:unlimited", pages * 4096 + (16 << 20))) {
            return println!("skipped: needs prlimit");
        }
        let victim = children(process.pid())[0];
        signal(victim, 9);
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(1) {
            assert_eq!(&*client.invoke("echo", b"still").expect("there is another worker"), b"still");
        }
        assert!(address_space("unlimited:unlimited"));
        wait_until("the worker is replaced", PATIENCE, || {
            let children = children(process.pid());
            children.len() == 2 && children.iter().all(|pid| lives(*pid))
        });
        let calls: Vec<_> = (0..2).map(|_| client.submit("sleep", b"200").expect("it is taken")).collect();
        let begun = Instant::now();
        calls.into_iter().for_each(|call| assert_eq!(&*client.wait(call).expect("an answer"), b"slept"));
        println!("two calls at once in {:?}", begun.elapsed());
    });
}

/// R1, R7: a connection that calls again and again is read without the ring, until the process sleeps or another calls. Nobody is forgotten in
/// between.
#[test]
fn r1_r7_connections_that_turn_hot_and_cold_are_answered_at_once() {
    const SOON: Duration = Duration::from_millis(500);
    on_both_reactors(|reactor| {
        let (process, mut hot) = reactor.start(2, &[]);
        let mut other = connect(&process);
        let call = |client: &mut Client, seed: u64, bytes: usize| {
            let begun = Instant::now();
            let input = content(seed, bytes);
            assert!(*client.invoke("echo", &*input).expect("an answer") == *input, "{bytes} bytes changed");
            assert!(begun.elapsed() < SOON, "{bytes} bytes took {:?}", begun.elapsed());
        };
        let sizes = [64, 64, 5_000, 64, 100_000, 64, 300_000, 1 << 20];
        for burst in 0..60 {
            for at in 0..40 {
                call(&mut hot, at, 64);
            }
            // One after the other in the middle of it, alone and both.
            call(&mut hot, burst as u64, sizes[burst % sizes.len()]);
            call(&mut other, burst as u64, sizes[burst / 3 % sizes.len()]);
            let tickets = [&mut hot, &mut other].map(|client| client.submit("echo", "both").expect("room"));
            for (client, ticket) in [&mut hot, &mut other].into_iter().zip(tickets) {
                assert_eq!(*client.wait(ticket).expect("an answer"), *b"both");
            }
            std::thread::sleep(Duration::from_micros([0, 120, 2_000][burst % 3]));
        }
    });
}

/// R1: a connection that never has one call in flight alone is hot, too; others are answered beside it.
#[test]
fn r1_a_connection_with_many_calls_in_flight_turns_hot_and_holds_nobody_up() {
    on_both_reactors(|reactor| {
        let (process, mut many) = reactor.start(1, &[]);
        let mut other = connect(&process);
        for burst in 0..40_u8 {
            for round in 0..20 {
                let inputs: [_; 8] = std::array::from_fn(|place| vec![burst ^ round; 1 + place * 40]);
                let calls = inputs.each_ref().map(|input| many.submit("echo", &input[..]).expect("room"));
                for (call, input) in calls.into_iter().zip(inputs) {
                    assert_eq!(*many.wait(call).expect("an answer"), *input);
                }
            }
            let begun = Instant::now();
            assert_eq!(*other.invoke("echo", &[burst][..]).expect("an answer"), [burst]);
            assert!(begun.elapsed() < Duration::from_millis(500), "{:?}", begun.elapsed());
        }
    });
}

/// N3: short calls of one connection in the middle of the long payloads of others, each of which is read by the process itself as long as nobody else calls.
#[test]
fn n3_long_payloads_and_short_calls_of_others_stay_whole() {
    on_both_reactors(|reactor| {
        let (process, _client) = reactor.start(2, &[]);
        std::thread::scope(|scope| {
            for (lane, bytes, calls) in [(1_u64, 1 << 20, 150), (2, 700_000, 200), (3, 64, 4_000), (4, 20_000, 2_000)] {
                let mut client = connect(&process);
                scope.spawn(move || {
                    for call in 0..calls {
                        let input = content(lane << 32 | call, bytes);
                        let answer = client.invoke("echo", &*input).expect("an answer");
                        assert!(*answer == *input, "call {call} of {bytes} bytes changed");
                        if call % 50 == 0 {
                            std::thread::sleep(Duration::from_millis(1));
                        }
                    }
                });
            }
        });
    });
}

/// The cores a worker may run on.
fn cores_of(pid: u32) -> Vec<usize> {
    let allowed =
        rustix::thread::sched_getaffinity(rustix::process::Pid::from_raw(pid.cast_signed())).expect("it lives");
    (0..rustix::thread::CpuSet::MAX_CPU).filter(|core| allowed.is_set(*core)).collect()
}

/// With two cores the worker of a client of this host is where the client is while payloads are short, and where the controller is while they are
/// long (`docs/decisions/0024`).
#[test]
fn on_two_cores_a_worker_is_where_its_payloads_are_not_copied() {
    let cores = cores_of(0);
    if cores.len() != 2 {
        println!("skipped: needs two cores, and there are {}", cores.len());
        return;
    }
    let mut config = LaunchConfig { wait: WaitMode::Latency, workers: 1, workers_max: 1, ..launch_config(Ipc::Ring) };
    // A worker with a connection is where that wants it.
    config.args.retain(|arg| !arg.starts_with("--lease-connections"));
    let (process, mut client) = start_with(&config);
    let worker = children(process.pid())[0];
    let controllers = cores_of(process.pid());
    assert_eq!(controllers.len(), 1, "pinned");
    for bytes in [1 << 20, 64, 300_000, 64] {
        until_beside(&mut client, worker, &controllers, bytes, bytes > 64);
        // What it starts where it is comes along when it moves (it stayed behind).
        client.invoke("thread", vec![0; bytes]).expect("an answer");
        let threads = std::fs::read_dir(format!("/proc/{worker}/task")).expect("it lives");
        let numbers = threads.map(|thread| thread.expect("it lives").file_name().to_string_lossy().parse().unwrap());
        let (home, cores): (_, Vec<_>) = (cores_of(worker), numbers.map(cores_of).collect());
        assert!(cores.len() > 1 && cores.iter().all(|one| *one == home), "{cores:?}, and it is on {home:?}");
    }
}

/// Calls with payloads of this length until the worker is on the controller's core, or is not.
fn until_beside(client: &mut Client, worker: u32, controllers: &[usize], bytes: usize, is_beside: bool) {
    let input = content(1, bytes);
    let begun = Instant::now();
    while (cores_of(worker) == controllers) != is_beside {
        assert!(begun.elapsed() < PATIENCE, "{bytes} bytes: on {:?} for long", cores_of(worker));
        assert!(*client.invoke("echo", &*input).expect("an answer") == *input);
    }
}

/// A worker that is beside the controller leaves when another one is given a call: with two cores that one's is the controller's, too. It
/// stayed until bytes came again, so that two long calls shared a core and the other had nothing to do.
#[test]
fn on_two_cores_two_calls_do_not_share_the_controllers() {
    let cores = cores_of(0);
    if cores.len() != 2 {
        println!("skipped: needs two cores, and there are {}", cores.len());
        return;
    }
    let mut config = LaunchConfig { wait: WaitMode::Latency, workers: 2, workers_max: 2, ..launch_config(Ipc::Ring) };
    config.args.retain(|arg| !arg.starts_with("--lease-connections"));
    let (process, mut client) = start_with(&config);
    let controllers = cores_of(process.pid());
    let first = children(process.pid()).into_iter().find(|worker| cores_of(*worker) != controllers);
    let first = first.expect("the first worker is on the other core");
    for _ in 0..20 {
        until_beside(&mut client, first, &controllers, 1 << 20, true);
        // As long, and the second comes before the next look at who is where.
        let input = format!("50{}", " ".repeat(1 << 20));
        let calls = [(); 2].map(|()| client.submit("sleep", input.as_str()).expect("room"));
        wait_until("the two are on two cores", Duration::from_millis(40), || cores_of(first) != controllers);
        for call in calls {
            assert_eq!(*client.wait(call).expect("an answer"), *b"slept");
        }
    }
}
