//! `praas-bench invoke --path remote --checks off,on`: what it costs to know who calls and that nothing was changed.
//!
//! Question  How much longer is a remote call over a connection with a key, keyed tags and payload checksums than over one in plain text?
//! Measures  round trips of `echo` as `remote.rs` has them, of two processes, one without a key and one with a key and `--checks always`.
//! Load      closed loop, one call in flight, one connection; both ends on this host, the same worker program, reactor and cores.
//! Excludes  starting, connecting, the hello, and some calls at the start of each turn.
//! Samples   up to `--repetitions` per run, `--runs` runs, each of fresh processes. The two take turns, and the one who begins changes;
//!           the ratio is the median over those turns.
//! Checks    as `remote.rs`; that each session has what its row says; each tag and checksum, by the product itself.
//! Baseline  the one without.

use anyhow::{Result, ensure};
use indicatif::ProgressBar;

use crate::placement::{Placement, pin};
use crate::plan::Plan;
use crate::recorder::Recorder;
use crate::remote::RemoteCaller;
use crate::row::Row;
use crate::size::Size;
use crate::subject::{Checks, Setup, Subject};
use crate::twins::{TURNS, Turns, take_turns, warm_up};

/// In this order everywhere below.
const BOTH: [Checks; 2] = [Checks::Off, Checks::On];

/// One size: what was measured without and with.
struct Cell {
    samples: usize,
    recorders: [Recorder; 2],
    /// Of each turn: the median with, by that without.
    ratios: Vec<f64>,
}

impl Cell {
    fn new() -> Self {
        Self { samples: 0, recorders: [Recorder::new(), Recorder::new()], ratios: Vec::new() }
    }
}

/// The rows of both, those with checks beside those without; `row` is what they have in common.
pub(crate) fn beside(
    setup: Setup<'_>,
    placement: Placement,
    sizes: &[Size],
    plan: &Plan,
    row: &Row,
    bar: &ProgressBar,
) -> Result<Vec<Row>> {
    let mut cells: Vec<Cell> = sizes.iter().map(|_| Cell::new()).collect();
    let mut reactors = [None, None];
    for _ in 0..plan.runs {
        let mut start = |at: usize| -> Result<_> {
            let checks = BOTH[at];
            let subject = Setup { checks: Some(checks), ..setup }.start()?;
            reactors[at] = subject.reactor();
            let caller = caller(&subject, checks, row.touched != Some(false))?;
            Ok((subject, caller))
        };
        let mut twins = [start(0)?, start(1)?];
        // A process under test gave this thread all cores back.
        pin(&[placement.ours])?;
        for (cell, &Size(bytes)) in cells.iter_mut().zip(sizes) {
            let calls_ns = warm_up(&mut twins, bytes)?;
            if cell.samples == 0 {
                cell.samples = plan.samples(calls_ns[0].max(calls_ns[1])).div_ceil(TURNS);
            }
            let Turns { samples_ns, ratios } = take_turns(&mut twins, bytes, cell.samples, calls_ns)?;
            cell.ratios.extend(ratios);
            for (recorder, samples_ns) in cell.recorders.iter_mut().zip(&samples_ns) {
                recorder.add_run(samples_ns);
            }
        }
        bar.inc(1);
    }
    let mut rows = Vec::new();
    for (cell, size) in cells.into_iter().zip(sizes) {
        let [without, with] = cell.recorders.map(|recorder| recorder.summary());
        let of = |checks: Checks, reactor: &Option<String>, times| Row {
            payload_bytes: size.0 as u64,
            times,
            reactor: reactor.clone(),
            checks: Some(checks.to_string()),
            ..row.clone()
        };
        let floor_p50_us = without.p50_us;
        rows.push(of(Checks::Off, &reactors[0], without));
        rows.push(of(Checks::On, &reactors[1], with).in_turns_with("without checks", floor_p50_us, cell.ratios));
    }
    Ok(rows)
}

/// A client of a process with checks or without, as it was asked for.
fn caller(subject: &Subject, checks: Checks, touched: bool) -> Result<RemoteCaller> {
    let client = subject.client()?;
    let session = client.session();
    let found = (session.send_key.is_some(), session.payload_checksums);
    let wanted = checks == Checks::On;
    ensure!(found == (wanted, wanted), "asked for checks {checks}, and the session has a key, checksums: {found:?}");
    RemoteCaller::new(client, touched)
}
