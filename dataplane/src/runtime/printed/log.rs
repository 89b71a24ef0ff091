//! Where the lines of workers go: our stderr, or a file that is put aside when it is full. Takes a line or drops it, and counts what it
//! dropped; waits for nobody.

use std::fmt::Write;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{FlockOperation, Mode, OFlags};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};

use crate::config::ProcessConfig;

#[derive(Debug)]
pub(super) struct Log {
    to: To,
    /// Lines that were not taken since the last one that was, and why the first was not.
    lost: u64,
    why: Option<io::Error>,
    /// The operator was told that lines are lost.
    warned: bool,
    /// The last line was taken in part.
    torn: bool,
    /// Kept for its memory.
    text: String,
}

#[derive(Debug)]
enum To {
    Stderr,
    Folder(Box<Files>),
}

/// The file that is written to and the older ones, `NAME.log.1` the youngest of them.
#[derive(Debug)]
struct Files {
    path: PathBuf,
    file: File,
    bytes: u64,
    bytes_max: u64,
    old_files: u32,
}

/// Why there is no log.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The file cannot be had.
    #[error("worker log {path}: {source}; check --worker-log")]
    Open {
        /// The file.
        path: String,
        /// What the system said.
        source: io::Error,
    },
    /// Two of one name would put aside each other's.
    #[error(
        "worker log {path}: another process writes to it; give this one another --process NAME or --worker-log DIR"
    )]
    Taken {
        /// The file.
        path: String,
    },
    /// A device, a folder or a link would not be a file of ours.
    #[error("worker log {path} is no file; remove it, or give another --worker-log")]
    NoFile {
        /// The file.
        path: String,
    },
}

impl Log {
    pub(super) fn new(config: &ProcessConfig) -> Result<Log, LogError> {
        let to = match &config.worker_log {
            None => To::Stderr,
            Some(folder) => To::Folder(Box::new(Files::open(
                &folder.join(format!("{}.log", config.process)),
                config.worker_log_bytes_max,
                config.worker_log_old_files,
            )?)),
        };
        Ok(Log { to, lost: 0, why: None, warned: false, torn: false, text: String::new() })
    }

    /// Takes a line, which `write` writes without its end, or drops and counts it. With files it has the time before it.
    pub(super) fn line(&mut self, write: impl FnOnce(&mut String)) {
        if self.lost > 0 {
            self.tell_lost();
        }
        if self.lost > 0 || !self.try_line(write) {
            self.lost += 1;
        }
    }

    /// Says how many lines were dropped, if it can.
    fn tell_lost(&mut self) {
        let (lost, why) = (self.lost, self.why.take());
        let taken = self.try_line(|text| {
            let _ = write!(text, "praas-process: {lost} lines of workers are lost, this log did not take them");
            let _ = why.as_ref().map(|why| write!(text, ": {why}"));
        });
        if taken {
            self.lost = 0;
        } else {
            self.why = why;
        }
    }

    fn try_line(&mut self, write: impl FnOnce(&mut String)) -> bool {
        let mut text = std::mem::take(&mut self.text);
        text.clear();
        if self.torn {
            text.push('\n');
        }
        if matches!(self.to, To::Folder(_)) {
            // As the messages of the process have it.
            let _ = SystemTime.format_time(&mut Writer::new(&mut text));
            text.push(' ');
        }
        write(&mut text);
        text.push('\n');
        let taken = match &mut self.to {
            To::Stderr => write_now(rustix::stdio::stderr(), text.as_bytes()),
            To::Folder(files) => files.write(text.as_bytes()),
        };
        let whole = matches!(taken, Ok(bytes) if bytes == text.len());
        match taken {
            Ok(_) if whole => (self.torn, self.warned) = (false, false),
            // No more than the end of the line that was torn before.
            Ok(bytes) => self.torn = bytes > 1 || !self.torn && bytes > 0,
            Err(why) => {
                if let To::Folder(files) = &self.to
                    && !std::mem::replace(&mut self.warned, true)
                {
                    let path = files.path.display();
                    tracing::warn!(%path, %why, "lines of workers are dropped: their log does not take them");
                }
                self.why.get_or_insert(why);
            }
        }
        self.text = text;
        whole
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        if self.lost > 0 {
            self.tell_lost();
        }
    }
}

/// Writes if there is room just now. A pipe that says it has room takes what fits `PIPE_BUF`, 4096 bytes, as a line does.
fn write_now(to: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<usize> {
    let mut polled = [PollFd::from_borrowed_fd(to, PollFlags::OUT)];
    let room = rustix::event::poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
    if room.is_ok_and(|ready| ready == 0) {
        return Err(io::ErrorKind::WouldBlock.into());
    }
    Ok(rustix::io::write(to, bytes)?)
}

impl Files {
    fn open(path: &Path, bytes_max: u64, old_files: u32) -> Result<Files, LogError> {
        let shown = || path.display().to_string();
        let file = open(path).map_err(|source| LogError::Open { path: shown(), source })?;
        let stat = file.metadata().map_err(|source| LogError::Open { path: shown(), source })?;
        if !stat.is_file() {
            return Err(LogError::NoFile { path: shown() });
        }
        if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            return Err(LogError::Taken { path: shown() });
        }
        Ok(Files { path: path.to_owned(), file, bytes: stat.len(), bytes_max, old_files })
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes > 0 && self.bytes + bytes.len() as u64 > self.bytes_max {
            self.put_aside()?;
        }
        let taken = rustix::io::write(self.file.as_fd(), bytes)?;
        self.bytes += taken as u64;
        Ok(taken)
    }

    /// The file becomes the youngest of the old ones, the oldest goes, and an empty one takes its place.
    fn put_aside(&mut self) -> io::Result<()> {
        let old = |number: u32| match number {
            0 => self.path.clone(),
            number => {
                let mut path = self.path.clone().into_os_string();
                path.push(format!(".{number}"));
                path.into()
            }
        };
        if self.old_files == 0 {
            self.file.set_len(0)?;
            self.bytes = 0;
            return Ok(());
        }
        for number in (0..self.old_files).rev() {
            match std::fs::rename(old(number), old(number + 1)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        let file = open(&self.path)?;
        // Nobody else waits for it: who finds it locked, or no more there, has given up.
        let _ = rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive);
        (self.bytes, self.file) = (file.metadata()?.len(), file);
        Ok(())
    }
}

/// At its end, made if it is not there, for us alone. Follows no link, and does not wait for the other end of a pipe.
fn open(path: &Path) -> io::Result<File> {
    let flags =
        OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR)?.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Folder {
            let path = std::env::temp_dir().join(format!("praas-log-{name}-{}", std::process::id()));
            std::fs::create_dir_all(&path).unwrap();
            Folder(path)
        }

        fn log(&self, bytes_max: u64, old_files: u32) -> Result<Log, LogError> {
            Log::new(&ProcessConfig {
                process: "p".into(),
                worker_log: Some(self.0.clone()),
                worker_log_bytes_max: bytes_max,
                worker_log_old_files: old_files,
                ..ProcessConfig::default()
            })
        }

        /// All lines there are, the oldest first, without their times.
        fn lines(&self) -> Vec<String> {
            let mut paths: Vec<_> = std::fs::read_dir(&self.0).unwrap().map(|entry| entry.unwrap().path()).collect();
            paths.sort_by_key(|path| {
                std::cmp::Reverse(path.extension().and_then(|end| end.to_str()?.parse::<u32>().ok()))
            });
            let text: String = paths.iter().map(|path| std::fs::read_to_string(path).unwrap()).collect();
            text.lines().map(|line| line.split_once(' ').unwrap().1.to_owned()).collect()
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn full_files_are_put_aside_and_the_oldest_goes() {
        for old_files in [0, 1, 3] {
            let folder = Folder::new("full");
            let mut log = folder.log(1000, old_files).unwrap();
            for number in 0..200 {
                log.line(|text| write!(text, "line {number}").unwrap());
            }
            let lines = folder.lines();
            let expected: Vec<_> = (200 - lines.len()..200).map(|number| format!("line {number}")).collect();
            assert_eq!(lines, expected, "the last ones, in order, none torn");
            let files: Vec<_> = std::fs::read_dir(&folder.0).unwrap().flatten().collect();
            assert_eq!(files.len(), 1 + old_files as usize);
            assert!(files.iter().all(|file| file.metadata().unwrap().len() <= 1000));
            // Found again by the next life of the process.
            drop(log);
            folder.log(1000, old_files).unwrap().line(|text| text.push_str("line 200"));
            assert_eq!(folder.lines().last().unwrap(), "line 200");
        }
    }

    #[test]
    fn a_log_is_one_process_s_and_a_file() {
        let folder = Folder::new("taken");
        let _first = folder.log(1000, 1).unwrap();
        assert!(matches!(folder.log(1000, 1), Err(LogError::Taken { .. })));
        let linked = Folder::new("linked");
        std::os::unix::fs::symlink("/dev/null", linked.0.join("p.log")).unwrap();
        assert!(matches!(linked.log(1000, 1), Err(LogError::Open { .. })));
        let piped = Folder::new("piped");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            piped.0.join("p.log"),
            rustix::fs::FileType::Fifo,
            Mode::RUSR | Mode::WUSR,
            0,
        )
        .unwrap();
        assert!(matches!(piped.log(1000, 1), Err(LogError::Open { .. })));
    }

    /// X6: what a full device does not take is dropped, counted, and told of when there is room.
    #[test]
    fn x6_lines_that_find_no_room_are_counted_and_told_of_later() {
        let folder = Folder::new("no-room");
        let mut log = folder.log(1000, 1).unwrap();
        let full = |log: &mut Log, path: &str| {
            let To::Folder(files) = &mut log.to else { unreachable!("a folder was given") };
            std::mem::replace(&mut files.file, std::fs::OpenOptions::new().write(true).open(path).unwrap())
        };
        log.line(|text| text.push_str("before"));
        let room = full(&mut log, "/dev/full");
        for _ in 0..3 {
            log.line(|text| text.push_str("lost"));
        }
        let To::Folder(files) = &mut log.to else { unreachable!("a folder was given") };
        files.file = room;
        log.line(|text| text.push_str("after"));
        let lines = folder.lines();
        assert_eq!((&*lines[0], &*lines[2], lines.len()), ("before", "after", 3));
        assert!(lines[1].contains("3 lines") && lines[1].contains("No space left"), "{}", lines[1]);
    }
}
