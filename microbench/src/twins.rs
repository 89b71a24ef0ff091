//! Two processes called in turns, for what one of them has and the other has not.
//!
//! The speed of a shared machine changes by 40 % from one second to the next: only what was measured within milliseconds compares. So the
//! two take short turns, the one who begins changes, and what counts is the ratio of the two medians of each turn.

use anyhow::Result;

use crate::plan::turn_warm_up;
use crate::recorder::median;
use crate::remote::RemoteCaller;
use crate::subject::Subject;

/// How often each of the two has its turn in a run.
pub(crate) const TURNS: usize = 12;

/// Most calls made, and not recorded, at the start of each turn.
const TURN_WARM_UP_MAX: usize = 2_000;

/// The one without, the one with, and who calls them.
pub(crate) type Twins = [(Subject, RemoteCaller); 2];

/// What came of a run, in the order of the twins.
pub(crate) struct Turns {
    pub(crate) samples_ns: [Vec<u64>; 2],
    /// Of each turn: the median of the second, by that of the first.
    pub(crate) ratios: Vec<f64>,
}

/// Calls both until they are warm: how long a call of each takes, ns.
pub(crate) fn warm_up(twins: &mut Twins, bytes: usize) -> Result<[u64; 2]> {
    let mut calls_ns = [0; 2];
    for ((subject, caller), call_ns) in twins.iter_mut().zip(&mut calls_ns) {
        *call_ns = caller.warm_up(bytes)?;
        subject.settle();
    }
    Ok(calls_ns)
}

/// So many samples of each in each of [`TURNS`] turns. `calls_ns` is what [`warm_up`] gave.
pub(crate) fn take_turns(twins: &mut Twins, bytes: usize, samples: usize, calls_ns: [u64; 2]) -> Result<Turns> {
    let mut turns = Turns { samples_ns: [Vec::new(), Vec::new()], ratios: Vec::new() };
    for turn in 0..TURNS {
        let mut medians_ns = [0; 2];
        for place in 0..2 {
            let at = (turn + place) % 2;
            let (subject, caller) = &mut twins[at];
            let first = turn_warm_up(calls_ns[at], TURN_WARM_UP_MAX);
            let samples_ns = &mut turns.samples_ns[at];
            let start = samples_ns.len();
            caller.calls(bytes, first, samples, samples_ns)?;
            subject.settle();
            medians_ns[at] = median(&mut samples_ns[start..]);
        }
        turns.ratios.push(medians_ns[1] as f64 / medians_ns[0].max(1) as f64);
    }
    Ok(turns)
}
