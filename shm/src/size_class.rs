//! Sizes of blocks: 64-byte units, four steps per doubling, so that rounding up wastes a fifth at most.
//!
//! `1 2 3 4 | 5 6 7 8 | 10 12 14 16 | 20 24 28 32 | …` units.

/// Bytes of a unit: blocks start and end on cache lines.
pub(crate) const UNIT_BYTES: u64 = 64;

/// Classes up to `2^30` units, which is the largest arena.
pub(crate) const CLASSES: usize = 116;

const _: () = assert!(size(CLASSES - 1) == 1 << 30);

/// Units that hold `bytes`; none for more than an arena can have. Zero bytes take one unit.
#[inline]
pub(crate) fn units_for(bytes: usize) -> Option<u32> {
    let units = (bytes as u64).div_ceil(UNIT_BYTES).max(1);
    if units <= 1 << 30 { u32::try_from(units).ok() } else { None }
}

/// The smallest class that holds `units`, which are `1..=2^30`.
#[inline]
pub(crate) const fn at_least(units: u32) -> usize {
    if units <= 4 {
        return units as usize - 1;
    }
    let below = units - 1;
    let shift = below.ilog2() - 2;
    (shift * 4 + (below >> shift)) as usize
}

/// The largest class that `units` can serve: where a free run of that size is kept.
#[inline]
pub(crate) const fn at_most(units: u32) -> usize {
    let class = at_least(units);
    if size(class) > units { class - 1 } else { class }
}

/// Units of a class.
#[inline]
#[allow(clippy::cast_possible_truncation, reason = "a class is below 116")]
pub(crate) const fn size(class: usize) -> u32 {
    if class < 4 {
        return class as u32 + 1;
    }
    let above = class as u32 - 4;
    (5 + above % 4) << (above / 4)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn classes_grow_and_every_size_falls_between_two() {
        let sizes: Vec<u32> = (0..16).map(size).collect();
        assert_eq!(sizes, [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32]);
        let near_powers = (3..30).flat_map(|power| (1 << power) - 2..(1 << power) + 3);
        for units in (1..=10_000).chain(near_powers).chain([1 << 30]) {
            let (up, down) = (at_least(units), at_most(units));
            assert!(size(up) >= units && size(down) <= units, "{units}");
            assert!(up == 0 || size(up - 1) < units, "{units} has a smaller class");
            assert!(down + 1 == CLASSES || size(down + 1) > units, "{units} has a larger class");
            assert!(u64::from(size(up)) * 4 <= u64::from(units) * 5 + 3, "{units} wastes over a quarter");
        }
    }

    #[test]
    fn bytes_become_units() {
        assert_eq!(units_for(0), Some(1));
        assert_eq!(units_for(64), Some(1));
        assert_eq!(units_for(65), Some(2));
        assert_eq!(units_for(64 << 30), Some(1 << 30));
        assert_eq!(units_for((64 << 30) + 1), None);
        assert_eq!(units_for(usize::MAX), None);
    }
}
