//! Keeps the controller's core from its caller, and its worker where it is had soonest, where cores are few.
//!
//! A client of this host waits and yields; a worker on the client's core has it at once, and the controller need not hand its own over at
//! each call. The scheduler, which sees three threads that are always ready, leaves them where they woke: often with the worker on
//! the controller's core (p50 of a call 11.2 us against 9.3), or with the controller on the caller's (12.8). They are moved, not pinned: the
//! scheduler may put them elsewhere at once. Where they are pinned, the worker is pinned elsewhere.
//!
//! With long payloads the client's core has enough to do with copying: the worker is had sooner on the controller's (1 MiB: 1.20 times the floor,
//! and 1.27 with the worker on the client's).

use std::os::fd::BorrowedFd;

use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};

use super::*;

/// Between two looks: each takes about 10 us, for the file that says where a worker is.
const LOOK_NS: u64 = 5_000_000;
/// Longest request whose worker is wanted on the client's core.
const SHORT_BYTES: usize = 16 << 10;

#[derive(Debug, Default)]
pub(super) struct Apart {
    due_ns: u64,
    /// The last request was a long one.
    is_long: bool,
    /// The pinned worker that is beside us, on the controller's core, for a while.
    guest: Option<WorkerId>,
    /// Another was given a call: with two cores it is on the controller's, too.
    guest_leaves: bool,
}

impl Apart {
    /// A request of this length came.
    #[inline]
    pub(super) fn came(&mut self, bytes: usize) {
        self.is_long = bytes > SHORT_BYTES;
    }

    /// Whether it is time to look: then not again for a while.
    #[inline]
    pub(super) fn take_due(&mut self, now_ns: u64) -> bool {
        let is_due = now_ns >= self.due_ns;
        if is_due {
            self.due_ns = now_ns + LOOK_NS;
        }
        is_due
    }

    /// This worker was given a call.
    pub(super) fn dispatched(&mut self, worker: WorkerId) {
        self.guest_leaves |= self.guest.is_some_and(|guest| guest != worker);
    }

    /// Whether a worker pinned to `home` is had sooner on our core: payloads are long, and their caller is where it is.
    fn wants_beside_us(&self, caller: BorrowedFd<'_>, home: usize) -> bool {
        self.is_long && praas_transport::incoming_cpu(caller).is_ok_and(|cpu| cpu == home)
    }

    /// Moves us off the core that brings the caller's bytes, or else the worker off ours onto that one; off that one onto ours when
    /// payloads are long.
    fn part(&self, caller: BorrowedFd<'_>, worker: i32) {
        let ours = sched_getcpu();
        // -1 where nothing was counted.
        let Some(callers) = praas_transport::incoming_cpu(caller).ok().filter(|cpu| *cpu < CpuSet::MAX_CPU) else {
            return;
        };
        if callers == ours {
            return move_to(None, |allowed| allowed.unset(ours));
        }
        let (from, to) = if self.is_long { (callers, ours) } else { (ours, callers) };
        if cpu_of(worker) == Some(from) {
            let there = |allowed: &mut CpuSet| {
                let may = allowed.is_set(to);
                allowed.clear();
                if may {
                    allowed.set(to);
                }
            };
            move_to(Pid::from_raw(worker), there);
        }
    }
}

impl Process {
    /// Where cores are few, the one that a client of this host is at and ours are two, and a worker is where it is had soonest.
    pub(super) fn keep_apart(&mut self, caller: usize) {
        let few = !self.placement.has_more_cores_than(self.seated.len() + 1);
        // Bytes of another host arrive where its card's interrupts do.
        let caller = self.clients.local_fd(caller, &self.reactor);
        // The one that had the last call: this one is not handed over yet.
        let last = self.handed_over.map(|(worker, _)| worker).filter(|_| few);
        let Some(ours) = self.placement.controller() else {
            let seat = last.and_then(|worker| self.seats[usize::from(worker)].as_ref());
            if let (WaitMode::Balanced, Some(caller), Some(seat)) = (self.config.wait, caller, seat) {
                self.apart.part(caller, seat.child.pid());
            }
            return;
        };
        if self.config.pin != Pin::Auto {
            return;
        }
        let guest = last.filter(|worker| {
            let home = self.placement.worker(*worker);
            caller.zip(home).is_some_and(|(caller, home)| self.apart.wants_beside_us(caller, home))
                && self.may_move(*worker)
        });
        if self.apart.guest != guest {
            self.send_guest_home();
        }
        if let Some(worker) = guest {
            self.apart.guest = guest;
            self.pin(worker, ours);
        }
    }

    /// Whether a worker may be pinned to our core for a while: it yields there as it does at home, no other worker runs there, and nobody was
    /// told how to wait for a leased worker by where that one is.
    fn may_move(&self, worker: WorkerId) -> bool {
        let participants = usize::from(self.config.workers) + 1;
        let home = self.placement.worker(worker);
        let told = self.placement.patience(home, self.placement.controller(), false, participants);
        told.spin_ns == 0
            && !self.controller.lends()
            && !self.controller.has_leases()
            && self.seated.iter().all(|other| *other == worker || !self.controller.is_running(*other))
    }

    /// Ends the visit of a worker beside us if another was given a call, so that the two do not share our core.
    pub(super) fn part_workers(&mut self) {
        if std::mem::take(&mut self.apart.guest_leaves) {
            self.send_guest_home();
        }
    }

    /// Ends the visit of a worker beside us.
    pub(super) fn send_guest_home(&mut self) {
        if let Some(guest) = self.apart.guest.take() {
            self.send_home(guest);
        }
    }

    /// The core that a worker is pinned to.
    pub(super) fn core_of(&self, worker: WorkerId) -> Option<usize> {
        self.seats[usize::from(worker)].as_ref()?.cpu
    }

    /// Pins a worker to its own core again. One that has a connection is where that wants it.
    pub(super) fn send_home(&mut self, worker: WorkerId) {
        if let Some(home) = self.placement.worker(worker)
            && !self.lent.contains_key(&worker)
        {
            self.pin(worker, home);
        }
    }

    /// Pins a worker to this core, if it is not.
    pub(super) fn pin(&mut self, worker: WorkerId, core: usize) {
        if let Some(seat) = &mut self.seats[usize::from(worker)]
            && seat.cpu != Some(core)
            && seat.child.pin(&[core]).is_ok()
        {
            seat.cpu = Some(core);
        }
    }
}

/// Lets a thread run only where `narrow` leaves it to, which moves it, and then wherever it was allowed to. Nothing happens when that leaves
/// nowhere. A thread that it starts in the microseconds between stays there.
fn move_to(thread: Option<Pid>, narrow: impl FnOnce(&mut CpuSet)) {
    let Ok(allowed) = sched_getaffinity(thread) else { return };
    let mut narrowed = allowed;
    narrow(&mut narrowed);
    if narrowed.count() > 0 && sched_setaffinity(thread, &narrowed).is_ok() {
        let _ = sched_setaffinity(thread, &allowed);
    }
}

/// Where a process runs, or ran last: field 39 of /proc/PID/stat (proc_pid_stat(5)), after a name that may hold anything.
fn cpu_of(pid: i32) -> Option<usize> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(36)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_is_moved_and_keeps_what_it_is_allowed() {
        let allowed = sched_getaffinity(None).unwrap();
        if allowed.count() < 2 {
            eprintln!("skipped: needs two cores");
            return;
        }
        let me = i32::try_from(std::process::id()).unwrap();
        assert!(cpu_of(me).is_some_and(|cpu| cpu < CpuSet::MAX_CPU));
        let ours = sched_getcpu();
        move_to(None, |allowed| allowed.unset(ours));
        assert!(sched_getaffinity(None).unwrap() == allowed);
        move_to(None, CpuSet::clear);
        assert!(sched_getaffinity(None).unwrap() == allowed, "nowhere to go");
    }
}
