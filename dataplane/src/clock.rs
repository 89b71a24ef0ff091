//! The one clock of deadlines: CLOCK_MONOTONIC, the same for every process on this machine.

/// Nanoseconds of CLOCK_MONOTONIC. No system call where the kernel maps its clock (vDSO).
#[must_use]
pub fn now_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned()
}
