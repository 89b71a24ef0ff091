//! The leased local path, in `latency` mode, makes no heap allocation and no system call. Shown by counting, in the caller
//! and in the callee, over 100 000 calls of each kind.
//!
//! *Allocations* are counted by this program's global allocator. *System calls* are counted by the kernel's syscall user
//! dispatch (`prctl(2)`, Linux 5.11): while one byte of ours says so, each system call of the thread becomes a SIGSYS,
//! whose handler notes its number, lets it pass, and stays out of the way until the next call arms it again. Nothing is
//! exempt, `read` and `write` included; seccomp's strict mode would let those two pass, could not tell which call made
//! one, and could not be left again.
//!
//! `latency` promises to poll for 50 us before it yields its core. So a call that took longer, because the other side was
//! not running for a while, may make system calls; one that was quicker must make none, and nine in ten must be quicker.
//!
//! A program of its own (`harness = false`), because it is its own worker: it must be that from its first thread on, and
//! with an allocator that counts. Functions that allocate or ask the kernel on purpose show that the counts can fail.
#![allow(clippy::cast_possible_truncation, reason = "dice and patterns are cut to size on purpose")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::collections::VecDeque;
use std::hint::black_box;
use std::process::ExitCode;
use std::sync::atomic::{AtomicI64, AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use praas_dataplane::{
    Client, ClientConfig, Context, Failure, Input, LaunchConfig, Lease, LocalProcess, Output, Pin, WaitMode, Worker,
};

const CALLS: u64 = 100_000;
const TESTS: [(&str, fn()); 4] = [
    ("leased_echoes_neither_allocate_nor_enter_the_kernel", leased_echoes_neither_allocate_nor_enter_the_kernel),
    (
        "leased_calls_that_use_blocks_up_neither_allocate_nor_enter_the_kernel",
        leased_calls_that_use_blocks_up_neither_allocate_nor_enter_the_kernel,
    ),
    ("an_allocation_in_each_call_is_counted", an_allocation_in_each_call_is_counted),
    ("a_system_call_in_each_call_is_counted", a_system_call_in_each_call_is_counted),
];

/// What `cargo test` and `cargo nextest` ask of a test program: `--list`, and to run the tests that are named.
fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.iter().any(|arg| arg == "worker") {
        return serve();
    }
    let list = args.iter().any(|arg| arg == "--list");
    let filters: Vec<&String> = args.iter().filter(|arg| !arg.starts_with('-') && *arg != "terse").collect();
    for (name, test) in TESTS {
        let wanted = filters.is_empty() || filters.iter().any(|filter| name.contains(filter.as_str()));
        match (wanted && !args.iter().any(|arg| arg == "--ignored"), list) {
            (false, _) => {}
            (true, true) => println!("{name}: test"),
            (true, false) => {
                test();
                println!("test {name} ... ok");
            }
        }
    }
    ExitCode::SUCCESS
}

// ---- the tests ----------------------------------------------------------------------------------------------------

fn leased_echoes_neither_allocate_nor_enter_the_kernel() {
    count(&[("echo", 8), ("echo", 64), ("echo", 1 << 20)]);
}

/// What most functions do: read their input and answer with something else. Blocks then go back in records of their own,
/// which once were never read under an exchange lease: they filled the ring, and an answer that found it full was lost.
fn leased_calls_that_use_blocks_up_neither_allocate_nor_enter_the_kernel() {
    count(&[("sum", 64), ("sum", 4096), ("make", 8)]);
}

/// Counts calls of every way one after another, so that one may not leave anything behind that disturbs the next.
fn count(functions: &[(&str, usize)]) {
    let Some(mut client) = start() else { return };
    let mut wrong = Vec::new();
    for way in ["exchange", "ring", "pipelined", "exchange"] {
        for &(function, bytes) in functions {
            let Some((caller, callee)) = client.drive(way, function, bytes) else { return };
            let what = format!("{way}, {function} of {bytes} B: caller {caller:?}, callee {callee:?}");
            println!("{what}");
            if !caller.is_clean() || !callee.is_clean() {
                wrong.push(what);
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

fn an_allocation_in_each_call_is_counted() {
    let Some(mut client) = start() else { return };
    let Some((caller, callee)) = client.drive("exchange", "allocates", 8) else { return };
    assert_eq!((caller.allocations, callee.allocations), (0, CALLS));
}

fn a_system_call_in_each_call_is_counted() {
    let Some(mut client) = start() else { return };
    let Some((caller, callee)) = client.drive("exchange", "asks", 8) else { return };
    assert_eq!(caller.calls_with_syscall, 0);
    assert!(callee.calls_with_syscall + callee.slow >= CALLS && callee.slow < CALLS / 10, "{callee:?}");
    assert_eq!(i128::from(callee.number), i128::from(libc::SYS_getppid));
}

struct Driver {
    client: Client,
    _process: LocalProcess,
}

fn start() -> Option<Driver> {
    if std::thread::available_parallelism().map_or(1, usize::from) < 2 {
        println!("skipped: needs two cores");
        return None;
    }
    let program = std::env::current_exe().expect("this program has a path").display().to_string();
    let process = LocalProcess::start(&LaunchConfig {
        process_binary: Some(env!("CARGO_BIN_EXE_praas-process").into()),
        worker: vec![program, "worker".into()],
        workers: 2,
        workers_max: 2,
        wait: WaitMode::Latency,
        pin: Pin::Auto,
        ..LaunchConfig::default()
    });
    let process = process.expect("the process starts");
    // We sleep while they are counted: both cores are theirs.
    let config =
        ClientConfig { wait: WaitMode::Efficient, deadline: Duration::from_secs(10), ..ClientConfig::default() };
    let client = Client::connect(process.addr(), &config).expect("the process answers");
    Some(Driver { client, _process: process })
}

impl Driver {
    /// Counts of caller and callee.
    fn drive(&mut self, way: &str, function: &str, bytes: usize) -> Option<(Counts, Counts)> {
        let reply = self
            .client
            .invoke("drive", format!("{way} {function} {bytes}").as_str())
            .unwrap_or_else(|e| panic!("{way} {function} {bytes}: {e}"));
        if reply.status() == UNCOUNTABLE {
            println!("skipped: needs syscall user dispatch (CONFIG_GENERIC_ENTRY, Linux 5.11)");
            return None;
        }
        let (caller, callee) = reply.split_at(Counts::BYTES);
        Some((Counts::decode(caller), Counts::decode(callee)))
    }
}

/// What one side did during the counted calls.
#[derive(Debug, Clone, Copy, Default)]
struct Counts {
    allocations: u64,
    /// Calls of less than 50 us during which the thread made a system call.
    calls_with_syscall: u64,
    /// Number of such a system call.
    number: u64,
    /// Calls that took longer: the other side was not running.
    slow: u64,
}

impl Counts {
    const BYTES: usize = 32;

    /// Nothing was counted, and the machine was free enough for that to mean something.
    fn is_clean(&self) -> bool {
        self.allocations == 0 && self.calls_with_syscall == 0 && self.slow < CALLS / 10
    }

    fn encode(self) -> [u8; Counts::BYTES] {
        let mut bytes = [0; Counts::BYTES];
        for (place, word) in
            bytes.as_chunks_mut().0.iter_mut().zip([self.allocations, self.calls_with_syscall, self.number, self.slow])
        {
            *place = word.to_le_bytes();
        }
        bytes
    }

    fn decode(bytes: &[u8]) -> Counts {
        let word = |at: usize| bytes.as_chunks().0.get(at).map_or(0, |word| u64::from_le_bytes(*word));
        Counts { allocations: word(0), calls_with_syscall: word(1), number: word(2), slow: word(3) }
    }
}

// ---- the worker ---------------------------------------------------------------------------------------------------

/// Status of `drive` where the kernel cannot count for us.
const UNCOUNTABLE: i32 = 1;
/// What `make` answers with: a few hundred of it fill the callee's payload memory, if it does not come back in time.
const MADE_BYTES: usize = 1 << 20;
/// `latency` mode polls so long before its first system call (`placement.rs`).
const SPIN: Duration = Duration::from_micros(50);

fn serve() -> ExitCode {
    Worker::new()
        .function("drive", drive)
        .function("begin", |_, _| {
            CALLEE.set(Counts { allocations: ALLOCATIONS.load(Ordering::Relaxed), ..Counts::default() });
            LAST.set(None);
            if dispatch::is_available() { Ok(Output::empty()) } else { Ok(Output::empty().with_status(UNCOUNTABLE)) }
        })
        .function("echo", |_, input| {
            entered();
            Ok(input.into())
        })
        .function("sum", |_, input| {
            entered();
            let words = input.as_chunks().0.iter().map(|word| u64::from_le_bytes(*word));
            Ok(Output::from(&words.fold(0, u64::wrapping_add).to_le_bytes()))
        })
        .function("make", |context, input| {
            entered();
            let mut made = context.loan(MADE_BYTES)?;
            made[..input.len()].copy_from_slice(&input);
            Ok(made.into())
        })
        .function("allocates", |_, input| {
            entered();
            black_box(Box::new(1_u8));
            Ok(input.into())
        })
        .function("asks", |_, input| {
            entered();
            black_box(std::os::unix::process::parent_id());
            Ok(input.into())
        })
        .function("end", |_, _| {
            left();
            let counts = CALLEE.get();
            let allocations = ALLOCATIONS.load(Ordering::Relaxed) - counts.allocations;
            Ok(Output::from(&Counts { allocations, ..counts }.encode()))
        })
        .serve()
}

thread_local! {
    /// The callee's counts since `begin`; `allocations` is the allocator's count at that moment.
    static CALLEE: Cell<Counts> = const { Cell::new(Counts { allocations: 0, calls_with_syscall: 0, number: 0, slow: 0 }) };
    /// When the callee's last counted call came.
    static LAST: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// The callee's next call is here: what the last one did, its answer and the wait after it included, is now known.
fn entered() {
    left();
    LAST.set(Some(Instant::now()));
    dispatch::arm();
}

fn left() {
    let mut counts = CALLEE.get();
    if let Some(last) = LAST.take() {
        counts.add(dispatch::disarm(), last.elapsed());
    }
    CALLEE.set(counts);
}

impl Counts {
    fn add(&mut self, syscall: Option<u64>, took: Duration) {
        if took >= SPIN {
            self.slow += 1;
        } else if let Some(number) = syscall {
            self.calls_with_syscall += 1;
            self.number = number;
        }
    }
}

/// Calls in flight at once when pipelined.
const PIPELINED: usize = 16;

/// `WAY FUNCTION BYTES`: warms up until calls travel that way, then makes the counted ones.
fn drive(context: &mut Context<'_>, input: Input) -> Result<Output, Failure> {
    let text = String::from_utf8_lossy(&input).into_owned();
    let words: Vec<&str> = text.split(' ').collect();
    let &[way, function, bytes] = words.as_slice() else { return Err(Failure::new(-22, "WAY FUNCTION BYTES")) };
    let bytes: usize = bytes.parse().map_err(|_| Failure::new(-22, "BYTES is a number"))?;
    let function = context.function_id(function).ok_or_else(|| Failure::new(-22, "no such function"))?;
    let lease = if way == "exchange" { Lease::Exchange } else { Lease::Ring };
    context.prefer_exchange(lease == Lease::Exchange);

    let mut calls =
        Calls { context, function, bytes, pipelined: way == "pipelined", open: VecDeque::with_capacity(PIPELINED) };
    for _ in 0..1000 {
        calls.next(0)?;
    }
    calls.drain()?;
    if calls.context.lease_state() != lease || !dispatch::is_available() {
        return if dispatch::is_available() {
            Err(Failure::new(-1, "no lease"))
        } else {
            Ok(Output::empty().with_status(UNCOUNTABLE))
        };
    }
    calls.context.invoke("begin", b"")?;

    let mut counts = Counts::default();
    let allocations = ALLOCATIONS.load(Ordering::Relaxed);
    for number in 0..CALLS {
        let begun = Instant::now();
        dispatch::arm();
        let done = calls.next(number);
        let syscall = dispatch::disarm();
        counts.add(syscall, begun.elapsed());
        done?;
    }
    counts.allocations = ALLOCATIONS.load(Ordering::Relaxed) - allocations;
    calls.drain()?;
    let callee = context.invoke("end", b"")?;
    Ok(Output::from([&counts.encode()[..], &callee].concat()))
}

struct Calls<'a, 'b> {
    context: &'a mut Context<'b>,
    function: praas_dataplane::FunctionId,
    bytes: usize,
    pipelined: bool,
    open: VecDeque<(u64, praas_dataplane::Pending)>,
}

impl Calls<'_, '_> {
    /// Makes a call that carries `number`, inline or as a loan, and checks the answer: its own or, pipelined, an older one's.
    fn next(&mut self, number: u64) -> Result<(), Failure> {
        let word = number.to_le_bytes();
        if self.open.len() == PIPELINED {
            self.collect()?;
        }
        let mut loan = None;
        if self.bytes > 40 {
            let block = loan.insert(self.context.loan(self.bytes)?);
            // Its content is arbitrary. Zeroing a megabyte each time would outlast the callee's patience.
            let summed = block.len().min(4096);
            block[..summed].fill(0);
            block[..8].copy_from_slice(&word);
        }
        match (self.pipelined, loan) {
            (true, None) => self.open.push_back((number, self.context.submit(self.function, &word)?)),
            (true, Some(loan)) => self.open.push_back((number, self.context.submit(self.function, loan)?)),
            (false, None) => check(number, &self.context.invoke(self.function, &word)?)?,
            (false, Some(loan)) => check(number, &self.context.invoke(self.function, loan)?)?,
        }
        Ok(())
    }

    fn collect(&mut self) -> Result<(), Failure> {
        let Some((number, pending)) = self.open.pop_front() else { return Ok(()) };
        check(number, &self.context.wait(pending)?)
    }

    fn drain(&mut self) -> Result<(), Failure> {
        while !self.open.is_empty() {
            self.collect()?;
        }
        Ok(())
    }
}

/// An echo begins with the number; so does a sum of it and zeros.
fn check(number: u64, reply: &[u8]) -> Result<(), Failure> {
    if reply.starts_with(&number.to_le_bytes()) { Ok(()) } else { Err(Failure::new(-5, "a wrong answer")) }
}

// ---- counting -----------------------------------------------------------------------------------------------------

/// Allocations and reallocations of this process so far.
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

struct Counting;

#[global_allocator]
static COUNTING: Counting = Counting;

// SAFETY: every request goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promises are those the system's allocator asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, bytes) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// Syscall user dispatch for the thread that runs the functions, the only one of a worker.
mod dispatch {
    use super::{AtomicI64, AtomicU8, Ordering};
    use std::sync::OnceLock;

    // From <linux/prctl.h>; `libc` has them for other targets only.
    const PR_SET_SYSCALL_USER_DISPATCH: libc::c_int = 59;
    const PR_SYS_DISPATCH_ON: libc::c_ulong = 1;
    const ALLOW: u8 = 0;
    const BLOCK: u8 = 1;
    /// Bytes of the instruction `syscall` on x86-64.
    const SYSCALL_BYTES: i64 = 2;

    /// Read by the kernel at each system call.
    static SELECTOR: AtomicU8 = AtomicU8::new(ALLOW);
    /// Number of the system call that disarmed us, or -1.
    static SEEN: AtomicI64 = AtomicI64::new(-1);

    /// Notes the system call that was about to be made, and makes it after all: `syscall` is run once more, unwatched.
    extern "C" fn on_syscall(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
        SELECTOR.store(ALLOW, Ordering::Relaxed);
        // SAFETY: SA_SIGINFO hands a handler the context of the thread it interrupts: ours alone until we return.
        let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
        // The kernel has put back the registers as they were before the instruction, except for its address.
        SEEN.store(registers[libc::REG_RAX as usize], Ordering::Relaxed);
        registers[libc::REG_RIP as usize] -= SYSCALL_BYTES;
    }

    /// Sets it up at the first call, for the calling thread. False where the kernel lacks it.
    pub(super) fn is_available() -> bool {
        static AVAILABLE: OnceLock<bool> = OnceLock::new();
        *AVAILABLE.get_or_init(|| {
            let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = on_syscall;
            // SAFETY: a sigaction of zeros is a valid one: no flags, nothing masked.
            let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
            action.sa_sigaction = handler as usize;
            action.sa_flags = libc::SA_SIGINFO;
            // SAFETY: the handler has the signature of SA_SIGINFO and touches atomics and its own context only.
            let installed = unsafe { libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut()) } == 0;
            // SAFETY: the kernel keeps the selector's address, which is a static's; no range of code is exempt.
            let on = || unsafe {
                libc::prctl(PR_SET_SYSCALL_USER_DISPATCH, PR_SYS_DISPATCH_ON, 0_u64, 0_u64, SELECTOR.as_ptr())
            };
            installed && on() == 0
        })
    }

    /// The next system call of this thread will be seen.
    pub(super) fn arm() {
        SEEN.store(-1, Ordering::Relaxed);
        SELECTOR.store(BLOCK, Ordering::Relaxed);
    }

    /// Looks away again. The number of the first system call since `arm`, if there was one.
    pub(super) fn disarm() -> Option<u64> {
        SELECTOR.store(ALLOW, Ordering::Relaxed);
        u64::try_from(SEEN.load(Ordering::Relaxed)).ok()
    }
}
