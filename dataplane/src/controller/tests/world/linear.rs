//! Whether what was said about one key of a state could have been said if all had happened one after the other, each deed at some
//! moment between its question and its answer (Herlihy and Wing 1990). The search is that of Wing and Gong (1993), with what was tried
//! remembered: of the deeds that may be next, each is tried.

use std::collections::BTreeSet;

use crate::wire::state::WHATEVER;

/// A deed on a key. What was said of it is `None` when nobody lived to hear: it was done at some time, or never.
#[derive(Debug, Clone, Copy)]
pub(super) enum Deed {
    /// Said: its version, or the one that was current instead of the expected.
    Put { expected: u64, value: u64, said: Option<Result<u64, u64>> },
    /// Said: whether there was one, or the version that was current.
    Delete { expected: u64, said: Option<Result<bool, u64>> },
    /// Version and value; zero, when there was none.
    Get { version: u64, value: u64 },
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Done {
    pub(super) asked: u64,
    /// `u64::MAX`: never.
    pub(super) answered: u64,
    pub(super) deed: Deed,
}

/// What stands under the key: version, if it was ever said, and value. Zeros: nothing.
type Current = (Option<u64>, u64);
const NOTHING: Current = (Some(0), 0);

fn is_version(current: Current, version: u64) -> bool {
    match current {
        (Some(known), _) => known == version,
        (None, _) => version != 0,
    }
}

impl Deed {
    /// What stands there afterwards, if it may have happened now.
    fn after(self, current: Current) -> Option<Current> {
        let fits = |expected| expected == WHATEVER || is_version(current, expected);
        match self {
            Deed::Put { expected, value, said } => match said {
                Some(Ok(version)) => {
                    let later = current.0.is_none_or(|known| known < version);
                    (fits(expected) && later).then_some((Some(version), value))
                }
                Some(Err(found)) => {
                    (!fits(expected) || current.0.is_none()).then_some(current).filter(|_| is_version(current, found))
                }
                None => Some(if fits(expected) { (None, value) } else { current }),
            },
            Deed::Delete { expected, said } => match said {
                Some(Ok(existed)) => (fits(expected) && existed != (current == NOTHING)).then_some(NOTHING),
                Some(Err(found)) => {
                    (!fits(expected) || current.0.is_none()).then_some(current).filter(|_| is_version(current, found))
                }
                None => Some(if fits(expected) { NOTHING } else { current }),
            },
            Deed::Get { version, value } => {
                (is_version(current, version) && current.1 == value).then_some((Some(version), value))
            }
        }
    }
}

/// Whether there is such an order. `history` in the order in which it was asked.
pub(super) fn is_linearizable(history: &[Done]) -> bool {
    let mut tried = BTreeSet::new();
    // What was done, and what stands under the key then.
    let mut open = vec![(vec![0_u64; history.len().div_ceil(64)], 0_usize, NOTHING)];
    while let Some((done, first, current)) = open.pop() {
        let is_done = |at: usize| done[at / 64] & 1 << (at % 64) != 0;
        let mut first = first;
        while first < history.len() && is_done(first) {
            first += 1;
        }
        let left = || (first..history.len()).filter(|at| !is_done(*at));
        let Some(soonest) = left().map(|at| history[at].answered).filter(|at| *at != u64::MAX).min() else {
            return true;
        };
        for at in left().take_while(|at| history[*at].asked <= soonest) {
            let Some(after) = history[at].deed.after(current) else { continue };
            let mut with = done.clone();
            with[at / 64] |= 1 << (at % 64);
            if tried.insert((with.clone(), after)) {
                open.push((with, first, after));
            }
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn done(asked: u64, answered: u64, deed: Deed) -> Done {
        Done { asked, answered, deed }
    }

    fn put(expected: u64, value: u64, said: Result<u64, u64>) -> Deed {
        Deed::Put { expected, value, said: Some(said) }
    }

    #[test]
    fn s3_an_order_is_found_when_there_is_one_and_not_otherwise() {
        let get = |version, value| Deed::Get { version, value };
        let any = WHATEVER;
        assert!(is_linearizable(&[]));
        // Two racers: the later question may have come first.
        let race = [done(1, 9, put(0, 5, Ok(1))), done(2, 8, put(0, 6, Err(1))), done(10, 11, get(1, 5))];
        assert!(is_linearizable(&race));
        let both = [done(1, 9, put(0, 5, Ok(1))), done(2, 8, put(0, 6, Ok(2)))];
        assert!(!is_linearizable(&both), "both racers won");
        let old = [done(1, 2, put(any, 5, Ok(1))), done(3, 4, put(any, 6, Ok(2))), done(5, 6, get(1, 5))];
        assert!(!is_linearizable(&old), "what was overwritten was read");
        let meanwhile = [done(1, 2, put(any, 5, Ok(1))), done(3, 6, put(any, 6, Ok(2))), done(4, 5, get(1, 5))];
        assert!(is_linearizable(&meanwhile));
        // Nobody heard of the put: it may have been done, at any time after it was asked for.
        let unheard = Deed::Put { expected: any, value: 7, said: None };
        assert!(is_linearizable(&[done(1, u64::MAX, unheard), done(5, 6, get(0, 0)), done(7, 8, get(3, 7))]));
        assert!(!is_linearizable(&[done(1, u64::MAX, unheard), done(5, 6, get(3, 7)), done(7, 8, get(0, 0))]));
        let delete = |said| Deed::Delete { expected: any, said: Some(said) };
        assert!(is_linearizable(&[
            done(1, 2, delete(Ok(false))),
            done(3, 4, put(0, 1, Ok(4))),
            done(5, 6, delete(Ok(true)))
        ]));
        assert!(!is_linearizable(&[done(1, 2, put(0, 1, Ok(4))), done(5, 6, delete(Ok(false)))]));
    }
}
