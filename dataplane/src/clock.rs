//! The one clock of deadlines: CLOCK_MONOTONIC, the same for every process on this machine. And the calendar, by which
//! credentials expire.

/// Nanoseconds of CLOCK_MONOTONIC. No system call where the kernel maps its clock (vDSO).
#[must_use]
pub fn now_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned()
}

/// Seconds since 1970, CLOCK_REALTIME.
#[must_use]
pub fn unix_s() -> u64 {
    unix_ns() / 1_000_000_000
}

/// Nanoseconds since 1970, CLOCK_REALTIME. 0 before, and the last there are after the year 2554.
#[must_use]
pub fn unix_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    u64::try_from(now.tv_sec).unwrap_or(0).saturating_mul(1_000_000_000).saturating_add(now.tv_nsec.cast_unsigned())
}
