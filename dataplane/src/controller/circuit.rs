//! Refuses a function for a while when it has killed its workers too often in a row (W7).

/// Losses in a row that break a function.
const LOSSES_MAX: u32 = 5;
/// First refusal; each further one doubles it up to the longest.
const COOL_DOWN_NS: u64 = 1_000_000_000;
const COOL_DOWN_MAX_NS: u64 = 30_000_000_000;

#[derive(Debug, Default)]
pub(super) struct Circuit {
    losses: u32,
    cool_down_ns: u64,
    open_until_ns: u64,
}

impl Circuit {
    /// Time left until the function is tried again, ns.
    pub(super) fn refuses(&self, now_ns: u64) -> Option<u64> {
        (now_ns < self.open_until_ns).then(|| self.open_until_ns - now_ns)
    }

    pub(super) fn losses(&self) -> u32 {
        self.losses
    }

    pub(super) fn worked(&mut self) {
        if self.losses > 0 {
            *self = Circuit::default();
        }
    }

    /// One more worker died of it. After a refusal a single further loss is enough.
    pub(super) fn lost(&mut self, now_ns: u64) {
        self.losses += 1;
        if self.losses >= LOSSES_MAX {
            self.cool_down_ns = (self.cool_down_ns * 2).clamp(COOL_DOWN_NS, COOL_DOWN_MAX_NS);
            self.open_until_ns = now_ns + self.cool_down_ns;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn w7_refusals_grow_and_one_success_forgives() {
        let mut circuit = Circuit::default();
        for _ in 0..4 {
            circuit.lost(0);
        }
        assert_eq!(circuit.refuses(0), None);
        circuit.lost(0);
        assert_eq!(circuit.refuses(0), Some(COOL_DOWN_NS));
        assert_eq!(circuit.refuses(COOL_DOWN_NS), None);
        circuit.lost(COOL_DOWN_NS);
        assert_eq!(circuit.refuses(COOL_DOWN_NS), Some(2 * COOL_DOWN_NS));
        for _ in 0..20 {
            circuit.lost(0);
        }
        assert_eq!(circuit.refuses(0), Some(COOL_DOWN_MAX_NS));
        circuit.worked();
        circuit.lost(0);
        assert_eq!(circuit.refuses(0), None);
    }
}
