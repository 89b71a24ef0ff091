//! Functions of the test worker that run once for several calls.

use std::time::Duration;

use praas_dataplane::{Batch, Context, Failure, Input, Output, Payload, Worker};

use crate::state::{arguments, number};

pub(crate) fn register(worker: Worker) -> Worker {
    let few = Batch { calls: 4, wait: Duration::from_millis(50) };
    let many = Batch { calls: 32, wait: Duration::from_millis(2) };
    let patient = Batch { calls: Batch::CALLS_MAX, wait: Duration::from_secs(60) };
    worker
        .batch("together", few, together)
        .batch("tally_together", many, |_, inputs| {
            let tally = |input: Input| -> Result<Output, Failure> {
                crate::tally_of(input.get(..8).ok_or_else(|| Failure::new(-22, "a call's number, please"))?)?;
                Ok(input.into())
            };
            Ok(inputs.into_iter().map(tally).collect())
        })
        .batch("patient", patient, |_, inputs| {
            let status = i32::try_from(inputs.len()).unwrap_or(-1);
            Ok(inputs.into_iter().map(|input| Ok(Output::from(input).with_status(status))).collect())
        })
        .function("call_together", |context, input| {
            // So many at once, and the same under a lease, which they are not for.
            let [count] = arguments(&input)?;
            let count = number(count)?;
            let open = context.submit_all("together", (0..count).map(|at| at.to_le_bytes().to_vec()))?;
            let mut all = Vec::new();
            for (at, pending) in (0..count).zip(open) {
                let reply = context.wait(pending)?;
                if *reply != at.to_le_bytes() {
                    return Err(Failure::new(-3, format!("call {at}: another answer")));
                }
                all.push(reply.status().to_string());
            }
            context.invoke("echo", b"")?;
            context.invoke("echo", b"")?;
            all.push(context.invoke("together", Payload::from(vec![7; 5000]))?.status().to_string());
            Ok(all.join(" ").into())
        })
}

/// Echoes each input, with the number of all as its status; but for what one of them says.
fn together(context: &mut Context<'_>, mut inputs: Vec<Input>) -> Result<Vec<Result<Output, Failure>>, Failure> {
    let status = i32::try_from(inputs.len()).unwrap_or(-1);
    let told: Vec<String> =
        inputs.iter().map(|input| String::from_utf8_lossy(&input[..input.len().min(200)]).into_owned()).collect();
    let first = |word: &str| told.iter().find_map(|told| told.strip_prefix(word)).map(str::to_owned);
    if let Some(ms) = first("sleep ") {
        std::thread::sleep(Duration::from_millis(ms.parse().unwrap_or(0)));
    }
    if let Some(path) = first("abort once ") {
        let made = std::fs::OpenOptions::new().create_new(true).write(true).open(path);
        if made.is_ok() {
            std::process::abort();
        }
    }
    if first("panic").is_some() {
        panic!("panicked as asked");
    }
    if first("all fail").is_some() {
        return Err(Failure::new(-9, "all failed as asked"));
    }
    if first("nest").is_some() {
        // What lies in our inputs is read while others answer us.
        let reply = context.invoke("echo", vec![9; 5000])?;
        if *reply != [9; 5000] {
            return Err(Failure::new(-3, "another answer"));
        }
    }
    if first("swap").is_some() {
        inputs.reverse();
    }
    let mut answers = Vec::new();
    for input in inputs {
        answers.push(match &*input {
            b"fail" => Err(Failure::new(-7, "failed as asked")),
            // Its memory is given back before it is answered.
            b"drop" => Ok(Output::empty().with_status(status)),
            _ => Ok(Output::from(input).with_status(status)),
        });
    }
    if first("few").is_some() {
        answers.truncate(1);
    }
    Ok(answers)
}
