//! A client inside tokio-uring: as inside tokio, whose tasks these are; the program's own files and sockets may use the ring.
//!
//! `embed-tokio-uring-client ADDRESS` makes 1000 calls from ten tasks, and writes each task's last answer to a file through the ring.
//!
//! ```sh
//! target/release/praas-process --worker target/release/echo-worker --listen 127.0.0.1:4000 &
//! target/release/embed-tokio-uring-client 127.0.0.1:4000
//! ```

#[path = "shared.rs"]
mod shared;

fn main() -> anyhow::Result<()> {
    tokio_uring::start(async {
        shared::calls("tokio-uring").await?;
        // Work of the program's own, in the same ring and thread.
        let path = std::env::temp_dir().join(format!("praas-embed-{}", std::process::id()));
        // A name in a folder of everybody's: a file that is there, or a link, is not ours to write to.
        let file = tokio_uring::fs::OpenOptions::new().write(true).create_new(true).open(&path).await?;
        let (written, _) = file.write_all_at(b"done".to_vec(), 0).await;
        written?;
        file.close().await?;
        anyhow::ensure!(std::fs::read(&path)? == b"done", "the ring wrote something else");
        Ok(std::fs::remove_file(path)?)
    })
}
