//! Adds notes to a process, all at once, and prints what it remembers: `notes-client ADDRESS [NOTE ...]`. How to run it stands in `worker.rs`.

use anyhow::bail;
use praas_dataplane::{Client, ClientConfig};

fn main() -> anyhow::Result<()> {
    let mut words = std::env::args().skip(1);
    let Some(address) = words.next() else { bail!("usage: notes-client ADDRESS [NOTE ...]") };
    let mut client = Client::connect(address, &ClientConfig::default())?;
    let notes: Vec<String> = words.collect();
    let calls = notes.iter().map(|note| client.submit("add", note.as_str())).collect::<Result<Vec<_>, _>>()?;
    for call in calls {
        client.wait(call)?;
    }
    for _ in &notes {
        client.invoke("hear", b"")?;
    }
    println!("{} heard of, and kept:", notes.len());
    println!("{}", String::from_utf8_lossy(&client.invoke("list", b"")?));
    Ok(())
}
