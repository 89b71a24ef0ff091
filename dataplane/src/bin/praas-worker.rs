//! `praas-worker`: functions to try a process with, before you have your own.
//!
//! | function | input | output |
//! |---|---|---|
//! | `echo` | anything | the same bytes, not copied |
//! | `hello` | a name | a greeting |
//! | `power` | base and exponent, decimal | base to the exponent, by nested calls |
//! | `sleep` | milliseconds, decimal | nothing, after that time or when nobody waits any more |
//! | `where` | - | worker number, pid and invocations so far |

use std::process::ExitCode;
use std::time::{Duration, Instant};

use praas_dataplane::{Context, Failure, Input, Output, Worker};

fn main() -> ExitCode {
    let mut invocations = 0_u64;
    Worker::new()
        .function("echo", |_, input| Ok(input.into()))
        .function("hello", |_, input| Ok(format!("Hello, {}!", String::from_utf8_lossy(&input)).into()))
        .function("power", power)
        .function("sleep", sleep)
        .function("where", move |context, _| {
            invocations += 1;
            Ok(format!("worker {} pid {} invocation {invocations}", context.worker(), std::process::id()).into())
        })
        .serve()
}

fn numbers(input: &Input) -> Result<Vec<u64>, Failure> {
    let text = String::from_utf8_lossy(input).into_owned();
    let numbers: Result<_, _> = text.split_whitespace().map(str::parse).collect();
    numbers.map_err(|error| Failure::new(-22, format!("`{text}` is not a list of numbers: {error}")))
}

fn power(context: &mut Context<'_>, input: Input) -> Result<Output, Failure> {
    let numbers = numbers(&input)?;
    let &[base, exponent] = numbers.as_slice() else {
        return Err(Failure::new(-22, "power takes two numbers, base and exponent"));
    };
    if exponent == 0 {
        return Ok(Output::from(b"1"));
    }
    let rest = context.invoke("power", format!("{base} {}", exponent - 1).into_bytes())?;
    let rest: u64 = String::from_utf8_lossy(&rest).parse().map_err(|_| Failure::new(-1, "power answered nonsense"))?;
    let product = rest.checked_mul(base).ok_or_else(|| Failure::new(-34, "the result exceeds 64 bits"))?;
    Ok(product.to_string().into())
}

fn sleep(context: &mut Context<'_>, input: Input) -> Result<Output, Failure> {
    let pause = Duration::from_millis(numbers(&input)?.first().copied().unwrap_or(0));
    let until = Instant::now() + pause;
    while Instant::now() < until && !context.is_cancelled() {
        std::thread::sleep(Duration::from_millis(1).min(until.saturating_duration_since(Instant::now())));
    }
    Ok(Output::empty())
}
