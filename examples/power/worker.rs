//! A function that calls itself: `power` asks another worker for the next smaller power.
//!
//! Functions are not re-entered: a worker that waits for a nested call serves nobody else. So `base ^ exponent` keeps
//! `exponent + 1` workers busy at once. The process starts more as they are needed, up to `--workers-max`; at that bound
//! the innermost call is refused with `Busy`, and each caller passes that on.
//!
//! ```sh
//! target/release/praas-process --worker target/release/power-worker --workers-max 11 --listen 127.0.0.1:4000 &
//! target/release/power-client 127.0.0.1:4000 2 10
//! ```
//!
//! Leave `--workers-max` at its 8 to see the refusal.

use praas_dataplane::{Context, Failure, Input, Output, Worker};

/// Takes `base exponent` in decimal.
fn power(context: &mut Context<'_>, input: Input) -> Result<Output, Failure> {
    let text = String::from_utf8_lossy(&input).into_owned();
    let numbers: Result<Vec<u64>, _> = text.split(' ').map(str::parse).collect();
    let Ok(&[base, exponent]) = numbers.as_deref() else {
        return Err(Failure::new(-22, format!("`{text}` is not `base exponent`")));
    };
    if exponent == 0 {
        return Ok(Output::from(b"1"));
    }
    let smaller = context.invoke("power", format!("{base} {}", exponent - 1).into_bytes())?;
    let smaller: u64 =
        String::from_utf8_lossy(&smaller).parse().map_err(|_| Failure::new(-1, "power answered nonsense"))?;
    let result = smaller.checked_mul(base).ok_or_else(|| Failure::new(-34, "the result exceeds 64 bits"))?;
    Ok(Output::from(result.to_string()))
}

fn main() -> std::process::ExitCode {
    Worker::new().function("power", power).serve()
}
