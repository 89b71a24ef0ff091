//! Keeps a runtime from sleeping while there was traffic a moment ago: its way of waiting as `latency` does.

use std::future::poll_fn;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

/// Tells the task that keeps a runtime awake that something happened. Everybody is on one thread; what is shared is
/// atomic because runtimes ask for it.
#[derive(Clone, Debug, Default)]
pub(super) struct Pulse(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    beats: AtomicU64,
    asleep: AtomicBool,
    sleeper: Mutex<Option<Waker>>,
}

impl Pulse {
    /// Something happened.
    pub(super) fn beat(&self) {
        self.0.beats.fetch_add(1, Ordering::Relaxed);
        if self.0.asleep.swap(false, Ordering::Relaxed)
            && let Some(waker) = self.0.sleeper.lock().unwrap_or_else(PoisonError::into_inner).take()
        {
            waker.wake();
        }
    }

    /// Never ends: yields while the last beat is not older than `linger`, then sleeps until the next one.
    pub(super) async fn keep_awake(self, linger: Duration) {
        let (mut seen, mut last) = (0, Instant::now());
        poll_fn(|context| {
            let beats = self.0.beats.load(Ordering::Relaxed);
            if beats != seen {
                (seen, last) = (beats, Instant::now());
            }
            if last.elapsed() < linger {
                context.waker().wake_by_ref();
            } else {
                *self.0.sleeper.lock().unwrap_or_else(PoisonError::into_inner) = Some(context.waker().clone());
                self.0.asleep.store(true, Ordering::Relaxed);
            }
            Poll::<()>::Pending
        })
        .await;
    }
}

/// A runtime on this thread; one that is to be kept awake looks at its sockets each time round.
pub(super) fn runtime(awake: bool) -> std::io::Result<tokio::runtime::Runtime> {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    if awake {
        builder.event_interval(1);
    }
    builder.enable_all().build()
}
