//! Enters a hundred lines at once, and orders and pays: `triggers-client ADDRESS [WHAT ...]`. How to run it stands in `worker.rs`.

use anyhow::{bail, ensure};
use praas_dataplane::{Client, ClientConfig};

fn main() -> anyhow::Result<()> {
    let mut words = std::env::args().skip(1);
    let Some(address) = words.next() else { bail!("usage: triggers-client ADDRESS [WHAT ...]") };
    let mut client = Client::connect(address, &ClientConfig::default())?;
    let calls = (0..100)
        .map(|entry| client.submit("enter", format!("entry {entry}").into_bytes()))
        .collect::<Result<Vec<_>, _>>()?;
    let mut numbers = Vec::new();
    for call in calls {
        numbers.push(String::from_utf8_lossy(&client.wait(call)?).parse::<u32>()?);
    }
    numbers.sort_unstable();
    numbers.dedup();
    ensure!(numbers.len() == 100, "two entries have the same number");
    println!("100 entries, each with a number of its own");
    for (price, what) in (1..).zip(words) {
        client.invoke("order", what.as_str())?;
        client.invoke("pay", format!("{price} coins").into_bytes())?;
        println!("shipped: {}", String::from_utf8_lossy(&client.invoke("shipped", b"")?));
    }
    Ok(())
}
