//! A great many objects: what each takes besides its key and value, and whether a get still finds its own quickly.
//!
//! Question  What does the bookkeeping of an object cost, in memory and in time, and does it come back?
//! Measures  memory: PSS of controller and workers (`smaps_rollup`), with N objects less with the first 1000, by those put in between, less 8 B of key and
//!           64 B of value. Time: a get at a random key, as in `inside.rs`. Versions: PSS after one object of 1 KiB was overwritten 100 000 times, less after twice.
//! Load      one function, one object at a time.
//! Excludes  nothing that is resident: index, blocks rounded up, page tables are not.
//! Samples   time as in `inside.rs`; memory once a run, the median of the runs.
//! Checks    each object got has the stamp of its key; after the versions another worker looks at the last one.
//! Baseline  a get at a random key of 1000 objects, in the same process, just before. `state_reads`: beside three reads in a row (slot, entry, object), each
//!           where the one before says, of as much memory: what this machine takes for so many lines that no cache holds.

use anyhow::Result;

use super::inside::{Gets, Inside};
use super::{Op, Way};
use crate::paired::Measured;
use crate::plan::Plan;
use crate::row::Row;
use crate::subject::Channel;
use crate::usage::{family, memory};
use crate::worker::state::Timed;

const VALUE_BYTES: usize = 64;
const KEY_BYTES: usize = 8;

/// The first ones, that a get at random is set beside.
const FEW: u32 = 1000;

/// Most objects a process has room for unless it is told.
const OBJECTS_MAX: u32 = 1 << 20;

/// Bytes of a version, and how many there are: all of them together would be 100 MB.
const VERSION_BYTES: usize = 1 << 10;
const VERSIONS: usize = 100_000;

/// PSS of a process and its workers, bytes.
fn resident_bytes(inside: &Inside) -> Result<f64> {
    Ok(memory(&family(inside.pid())?)?.proportional_kib as f64 * 1024.0)
}

/// The rows of one wait mode.
pub(super) fn measure(way: Way, objects: u32, plan: &Plan) -> Result<Measured> {
    let (mut few, mut all, mut reads) = (Gets::new(), Gets::new(), Gets::new());
    let (mut overheads, mut growths) = (Vec::new(), Vec::new());
    for _ in 0..plan.runs {
        growths.push(versions(way)?);
        // Of a larger crowd blocks may need more than a worker's default payload memory; what is not touched takes none.
        let mut inside = Inside::start(way, None, usize::MAX, (objects > OBJECTS_MAX).then_some(objects))?;
        fill(&mut inside, 0, FEW)?;
        let gets = Timed::GetRandom;
        few.run(&mut inside, plan, |inside, warm_up, samples, batch| {
            among(inside, gets, FEW, warm_up, samples, batch)
        })?;
        let before = resident_bytes(&inside)?;
        fill(&mut inside, FEW, objects)?;
        let each = (resident_bytes(&inside)? - before) / f64::from(objects - FEW);
        overheads.push(each - (VALUE_BYTES + KEY_BYTES) as f64);
        all.run(&mut inside, plan, |inside, warm_up, samples, batch| {
            among(inside, gets, objects, warm_up, samples, batch)
        })?;
        reads.run(&mut inside, plan, |inside, warm_up, samples, batch| {
            among(inside, Timed::ReadRandom, objects, warm_up, samples, batch)
        })?;
    }
    let common = Row {
        path: "local".into(),
        objects: Some(FEW),
        workers: Some(2),
        ..Way { op: Op::Get, ..way }.row(Channel::Ring.name(), None, way.placement.to_string())
    };
    let few = few.row(VALUE_BYTES, common.clone());
    let floor_us = few.times.p50_us;
    let all = all.row(VALUE_BYTES, Row { objects: Some(objects), ..common.clone() });
    let value = |experiment: &str, objects, bytes: usize, value: f64, unit: &str| Row {
        experiment: experiment.into(),
        objects,
        payload_bytes: bytes as u64,
        value: Some(value),
        unit: Some(unit.into()),
        ..common.clone()
    };
    let reads_us = reads.row(VALUE_BYTES, common.clone()).times.p50_us;
    let beside_reads = Row { experiment: "state_reads".into(), distribution: Vec::new(), ..all.clone() };
    Ok(Measured::Rows(vec![
        few,
        all.against("any of 1000 objects", floor_us),
        beside_reads.against("three reads in a row of as much memory", reads_us),
        value("state_memory", Some(objects), VALUE_BYTES, middle(overheads), "B each"),
        value("state_versions", None, VERSION_BYTES, middle(growths) / 1024.0, "KiB"),
    ]))
}

fn middle(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Puts the objects from one number up to another.
fn fill(inside: &mut Inside, first: u32, objects: u32) -> Result<()> {
    let order = inside.order(Timed::Fill, VALUE_BYTES, 0, 1, 1);
    inside.run(
        crate::worker::state::StateOrder { first: first.into(), objects: objects.into(), ..order },
        &mut Vec::new(),
    )
}

fn among(
    inside: &mut Inside,
    timed: Timed,
    objects: u32,
    warm_up: usize,
    samples: usize,
    batch: usize,
) -> crate::worker::state::StateOrder {
    let order = inside.order(timed, VALUE_BYTES, warm_up, samples, batch);
    crate::worker::state::StateOrder { objects: objects.into(), ..order }
}

/// What many versions of one object leave behind, beside two, bytes.
fn versions(way: Way) -> Result<f64> {
    let mut inside = Inside::start(way, None, 0, None)?;
    let mut put = |versions| {
        let order = inside.order(Timed::Put, VERSION_BYTES, versions, 0, 1);
        inside.run(order, &mut Vec::new())?;
        resident_bytes(&inside)
    };
    let two = put(2)?;
    Ok(put(VERSIONS)? - two)
}
