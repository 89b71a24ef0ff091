//! What the doctor says, and how it is printed.

use super::facts::Facts;
use comfy_table::{Attribute, Cell, Color, ContentArrangement, Table, TableComponent, presets};
use serde::Serialize;
use std::io::{self, Write};

/// The whole diagnosis.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// One finding per subject, in a fixed order.
    pub findings: Vec<Finding>,
}

impl Report {
    /// Whether `praas-process` can run here with its defaults: no finding is a problem.
    #[must_use]
    pub fn can_run(&self) -> bool {
        self.findings.iter().all(|found| found.verdict != Verdict::Problem)
    }

    /// The finding called `id`.
    #[must_use]
    pub fn finding(&self, id: &str) -> Option<&Finding> {
        self.findings.iter().find(|found| found.id == id)
    }
}

/// How much a finding matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As good as it gets.
    Ok,
    /// It runs, with less speed or fewer choices than it could have.
    Note,
    /// The data plane cannot run.
    Problem,
}

/// One subject, judged.
#[derive(Debug, Clone, Serialize)]
pub struct Finding {
    /// Stable name for programs.
    pub id: &'static str,
    /// Name for people.
    pub title: &'static str,
    /// What was found.
    pub value: String,
    /// How much it matters.
    pub verdict: Verdict,
    /// What the data plane uses because of it.
    pub uses: String,
    /// The command or step that would make it better.
    pub change: Option<String>,
}

impl Finding {
    /// A finding about which nothing has been said yet.
    pub(super) fn new(id: &'static str, title: &'static str, value: impl Into<String>) -> Self {
        Self { id, title, value: value.into(), verdict: Verdict::Ok, uses: String::new(), change: None }
    }

    pub(super) fn ok(self, uses: impl Into<String>) -> Self {
        self.judged(Verdict::Ok, uses)
    }

    pub(super) fn note(self, uses: impl Into<String>) -> Self {
        self.judged(Verdict::Note, uses)
    }

    pub(super) fn problem(self, uses: impl Into<String>) -> Self {
        self.judged(Verdict::Problem, uses)
    }

    fn judged(mut self, verdict: Verdict, uses: impl Into<String>) -> Self {
        self.verdict = verdict;
        self.uses = uses.into();
        self
    }

    pub(super) fn change(mut self, change: impl Into<String>) -> Self {
        self.change = Some(change.into());
        self
    }
}

/// Width of the table where there is no terminal to ask.
const COLUMNS_UNKNOWN: u16 = 120;

/// Prints a table, then the list of what could be changed, then one line of conclusion. Colours only on a terminal,
/// and not there either when `NO_COLOR` is set.
///
/// # Errors
/// When `out` cannot be written.
pub fn print_table(report: &Report, out: &mut impl Write) -> io::Result<()> {
    let mut table = Table::new();
    table
        .load_preset(presets::UTF8_HORIZONTAL_ONLY)
        .remove_style(TableComponent::HorizontalLines)
        .remove_style(TableComponent::MiddleIntersections)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_header(["", "subject", "found", "used because of it"]);
    if std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty()) {
        table.force_no_tty();
    }
    if !table.is_tty() {
        table.set_width(COLUMNS_UNKNOWN);
    }
    for found in &report.findings {
        let verdict = match found.verdict {
            Verdict::Ok => Cell::new("ok").fg(Color::Green),
            Verdict::Note => Cell::new("note").fg(Color::Yellow),
            Verdict::Problem => Cell::new("PROBLEM").fg(Color::Red).add_attribute(Attribute::Bold),
        };
        table.add_row([verdict, Cell::new(found.title), Cell::new(&found.value), Cell::new(&found.uses)]);
    }
    writeln!(out, "{table}")?;

    let changes = || report.findings.iter().filter_map(|found| Some((found, found.change.as_ref()?)));
    if changes().next().is_some() {
        writeln!(out, "\nWhat could be changed:")?;
        for (found, change) in changes() {
            writeln!(out, "  {:<24}{change}", found.title)?;
        }
    }
    let problems = report.findings.iter().filter(|found| found.verdict == Verdict::Problem).count();
    if problems == 0 {
        writeln!(out, "\nThe data plane can run on this machine.")
    } else {
        writeln!(out, "\nThe data plane cannot run on this machine: {problems} problem(s).")
    }
}

/// What `--json` prints: one object, `version` raised when a field changes its meaning or goes.
#[derive(Debug, Serialize)]
struct Document<'a> {
    version: u32,
    can_run: bool,
    findings: &'a [Finding],
    facts: &'a Facts,
}

/// Prints findings and facts as one JSON object on several lines.
///
/// # Errors
/// When `out` cannot be written.
pub fn print_json(report: &Report, facts: &Facts, out: &mut impl Write) -> io::Result<()> {
    let document = Document { version: 1, can_run: report.can_run(), findings: &report.findings, facts };
    serde_json::to_writer_pretty(&mut *out, &document)?;
    writeln!(out)
}
