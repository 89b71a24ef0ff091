//! Prints a power, or why there is none: `power-client ADDRESS [BASE EXPONENT]`, by default 2^10.
//!
//! A function's refusal is an answer like any other, so the process serves on: the client shows it with a smaller power.
//! How to run it stands in `worker.rs`.

use anyhow::{Context, bail};
use praas_dataplane::{Client, ClientConfig, InvokeError};

fn main() -> anyhow::Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let (address, base, exponent) = match &words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [address] => (*address, "2", "10"),
        [address, base, exponent] => (*address, *base, *exponent),
        _ => bail!("usage: power-client ADDRESS [BASE EXPONENT]"),
    };
    let mut client = Client::connect(address, &ClientConfig::default())?;
    match client.invoke("power", format!("{base} {exponent}").as_str()) {
        Ok(result) => println!("{base}^{exponent} = {}", String::from_utf8_lossy(&result)),
        Err(InvokeError::Failed { status, text }) => {
            println!("{base}^{exponent} has no result, status {status}: {text}");
            let smaller = client.invoke("power", "2 1").context("a process serves on after a refusal")?;
            println!("2^1 = {}", String::from_utf8_lossy(&smaller));
        }
        Err(error) => return Err(error.into()),
    }
    Ok(())
}
