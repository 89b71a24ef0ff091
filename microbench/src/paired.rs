//! Something measured in turns with the floor it stands on, one size at a time: floor, samples, floor, samples, ... And the experiment
//! made of such cells, for each kind of thing and wait mode.

use std::fmt;
use std::path::Path;

use anyhow::Result;

use crate::channel::Pair;
use crate::end::Block;
use crate::floors::{DISTRIBUTION_BYTES_MAX, progress};
use crate::owed::judge;
use crate::placement::{Placement, Wait, startup_cores};
use crate::plan::{Plan, turn_warm_up};
use crate::recorder::{Recorder, median};
use crate::row::{Row, RowSink};
use crate::size::BYTES_MIN;
use crate::table;

/// How often a run goes back and forth.
pub(crate) const TURNS: usize = 8;

/// Most samples taken, and not recorded, at the start of a turn.
const TURN_WARM_UP_MAX: usize = 5_000;

/// What came of a kind of thing in a wait mode.
#[derive(Debug)]
pub(crate) enum Measured {
    Rows(Vec<Row>),
    /// Not measured, and what it needs.
    Skipped(&'static str),
}

/// Measures each kind in each wait mode, prints a table, and writes the rows to `json` as they come. What cannot be measured here is said
/// on stderr, and skipped.
///
/// # Errors
/// Those of `measure`, which ends the experiment; a file that cannot be written.
pub(crate) fn experiment<K: Copy + fmt::Display>(
    kinds: &[K],
    waits: &[Wait],
    json: Option<&Path>,
    mut measure: impl FnMut(K, Wait, Placement) -> Result<Measured>,
) -> Result<()> {
    let cores = startup_cores()?;
    let mut sink = RowSink::open(json)?;
    let bar = progress((kinds.len() * waits.len()) as u64);
    let mut rows = Vec::new();
    for (&kind, &wait) in kinds.iter().flat_map(|kind| waits.iter().map(move |wait| (kind, wait))) {
        bar.set_message(format!("{kind}, {wait}"));
        let skip = |why: &dyn fmt::Display| bar.suspend(|| eprintln!("skipped: {kind}, {wait}: {why}"));
        match Placement::of(wait, &cores) {
            Err(error) => skip(&error),
            Ok(placement) => match measure(kind, wait, placement)? {
                Measured::Skipped(why) => skip(&why),
                Measured::Rows(measured) => {
                    for row in measured {
                        let row = judge(row);
                        sink.write(&row)?;
                        rows.push(row);
                    }
                }
            },
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    if json.is_none_or(|path| path.as_os_str() != "-") && !rows.is_empty() {
        println!("{}", table::render(&rows));
    }
    Ok(())
}

/// One cell of an experiment, over all its runs.
#[derive(Debug)]
pub(crate) struct Paired {
    bytes: usize,
    /// Round trips of the floor that one sample stands on.
    trips_per_sample: u32,
    /// What a sample takes once warm, of the thing measured and of its floor.
    sample_ns: u64,
    floor_ns: u64,
    /// Samples per turn, of the thing measured and of its floor.
    samples: usize,
    floor_samples: usize,
    recorder: Recorder,
    floor: Recorder,
    /// Of each turn: median of the samples by that of the floor just before.
    ratios: Vec<f64>,
}

impl Paired {
    /// So many samples a run as the plan wants, and has time for when one of each takes `sample_ns` and `floor_ns`.
    pub(crate) fn new(bytes: usize, trips_per_sample: u32, sample_ns: u64, floor_ns: u64, plan: &Plan) -> Self {
        Self {
            bytes,
            trips_per_sample,
            sample_ns,
            floor_ns,
            samples: plan.samples(sample_ns).div_ceil(TURNS),
            floor_samples: plan.samples(floor_ns).div_ceil(TURNS),
            recorder: Recorder::new(),
            floor: Recorder::new(),
            ratios: Vec::new(),
        }
    }

    /// One run beside a floor of two plain processes. See [`Self::run_beside`]; the floor sends `trips_per_sample` messages of this length, or
    /// of a word where its channel carries no more.
    pub(crate) fn run(
        &mut self,
        floor: &mut Pair,
        take: impl FnMut(usize, usize, &mut Vec<u64>) -> Result<()>,
    ) -> Result<()> {
        let bytes = if floor.channel.is_a_word() { BYTES_MIN } else { self.bytes };
        let trips_per_sample = self.trips_per_sample;
        let take_floor = |warm_up, samples, samples_ns: &mut Vec<u64>| {
            floor.run(Block { bytes, samples: warm_up, trips_per_sample }, &mut Vec::new())?;
            floor.run(Block { bytes, samples, trips_per_sample }, samples_ns)
        };
        self.run_beside(take_floor, take)
    }

    /// One run. `take(warm_up, samples, samples_ns)` takes so many samples that do not count and appends so many that do; when it returns,
    /// nobody may keep the floor's cores busy. `take_floor` is the same for the floor.
    pub(crate) fn run_beside(
        &mut self,
        mut take_floor: impl FnMut(usize, usize, &mut Vec<u64>) -> Result<()>,
        mut take: impl FnMut(usize, usize, &mut Vec<u64>) -> Result<()>,
    ) -> Result<()> {
        let (mut samples_ns, mut floor_ns) = (Vec::new(), Vec::new());
        for _ in 0..TURNS {
            let (floor_start, start) = (floor_ns.len(), samples_ns.len());
            // Where few samples are asked for, cold ones would be most of the floor's.
            take_floor(turn_warm_up(self.floor_ns, TURN_WARM_UP_MAX), self.floor_samples, &mut floor_ns)?;
            take(turn_warm_up(self.sample_ns, TURN_WARM_UP_MAX), self.samples, &mut samples_ns)?;
            // Copies: the order of the samples is theirs.
            let floor_median_ns = median(&mut floor_ns[floor_start..].to_vec());
            let median_ns = median(&mut samples_ns[start..].to_vec());
            self.ratios.push(median_ns as f64 / floor_median_ns.max(1) as f64);
        }
        self.recorder.add_run(&samples_ns);
        self.floor.add_run(&floor_ns);
        Ok(())
    }

    /// The row of all runs: `row` and what was measured.
    pub(crate) fn row(&self, row: Row, floor: &str) -> Row {
        let small = self.bytes <= DISTRIBUTION_BYTES_MAX;
        Row {
            payload_bytes: self.bytes as u64,
            times: self.recorder.summary(),
            distribution: if small { self.recorder.distribution() } else { Vec::new() },
            ..row
        }
        .in_turns_with(floor, self.floor.summary().p50_us, self.ratios.clone())
    }
}
