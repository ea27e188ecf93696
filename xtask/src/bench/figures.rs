//! Figures: samples of both monitors, medians, and the ratio between them.

use std::collections::BTreeMap;
use std::fmt;

use anyhow::Result;
use serde::Serialize;

use super::engine::Engine;

/// Least width of the column of names.
const NAME_MIN: usize = 30;

/// Which way is ahead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Better {
    /// More is better.
    Higher,
    /// Less is better.
    Lower,
}

/// What a figure is made of its values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Statistic {
    /// The one in the middle.
    Median,
    /// The one that so many percent do not exceed.
    Percentile(u8),
}

/// One measured value.
#[derive(Clone, Debug)]
pub(super) struct Sample {
    /// What was measured.
    pub(super) what: String,
    /// In what.
    pub(super) unit: &'static str,
    /// Which way is ahead.
    pub(super) better: Better,
    /// The value.
    pub(super) value: f64,
    /// Over how many events the client took it.
    pub(super) events: u64,
    /// How it and the others of its figure make one.
    pub(super) statistic: Statistic,
}

impl Sample {
    /// A value of one event, of which the median counts.
    pub(super) fn new(what: &str, unit: &'static str, better: Better, value: f64) -> Self {
        Self {
            what: what.to_owned(),
            unit,
            better,
            value,
            events: 1,
            statistic: Statistic::Median,
        }
    }

    /// The value was taken over so many events.
    pub(super) fn over(self, events: u64) -> Self {
        Self { events, ..self }
    }
}

/// All samples of one figure.
#[derive(Clone, Debug)]
struct Figure {
    row: &'static str,
    what: String,
    unit: &'static str,
    better: Better,
    statistic: Statistic,
    values: BTreeMap<Engine, Vec<f64>>,
    events: u64,
}

/// All figures of a run.
#[derive(Debug, Default)]
pub(super) struct Table {
    figures: Vec<Figure>,
    notes: Vec<String>,
}

#[derive(Serialize)]
struct Record<'a> {
    row: &'a str,
    what: &'a str,
    unit: &'a str,
    ours: &'a [f64],
    theirs: &'a [f64],
    ratio: Option<f64>,
}

impl Table {
    /// Adds what one measurement of a row gave.
    pub(super) fn add(&mut self, row: &'static str, engine: Engine, samples: Vec<Sample>) {
        for sample in samples {
            let figure = self.figure(row, &sample);
            figure.values.entry(engine).or_default().push(sample.value);
            figure.events += sample.events;
        }
    }

    /// Says that a row was left out.
    pub(super) fn leave_out(&mut self, row: &str, why: &str) {
        self.note(row, &format!("left out: {why}"));
    }

    /// Says that a measurement failed.
    pub(super) fn fail(&mut self, row: &str, engine: Engine, error: &anyhow::Error) {
        self.note(row, &format!("{engine} failed: {error:#}"));
    }

    /// Adds a remark below the table, once.
    pub(super) fn note(&mut self, row: &str, what: &str) {
        let note = format!("{row}: {what}");
        if !self.notes.contains(&note) {
            self.notes.push(note);
        }
    }

    /// All samples, for programs.
    pub(super) fn json(&self) -> Result<String> {
        let records: Vec<Record<'_>> = self
            .figures
            .iter()
            .map(|figure| Record {
                row: figure.row,
                what: &figure.what,
                unit: figure.unit,
                ours: figure.of(Engine::Tandem),
                theirs: figure.of(Engine::Qemu),
                ratio: figure.ratio(),
            })
            .collect();
        Ok(serde_json::to_string_pretty(&records)?)
    }

    fn figure(&mut self, row: &'static str, sample: &Sample) -> &mut Figure {
        let known = self
            .figures
            .iter()
            .position(|figure| figure.row == row && figure.what == sample.what);
        let at = known.unwrap_or_else(|| {
            self.figures.push(Figure {
                row,
                what: sample.what.clone(),
                unit: sample.unit,
                better: sample.better,
                statistic: sample.statistic,
                values: BTreeMap::new(),
                events: 0,
            });
            self.figures.len() - 1
        });
        &mut self.figures[at]
    }
}

impl Figure {
    fn name(&self) -> String {
        format!("{}: {}", self.row, self.what)
    }

    fn of(&self, engine: Engine) -> &[f64] {
        self.values.get(&engine).map_or(&[], Vec::as_slice)
    }

    /// How far ahead ours is: 1.00 and more is ahead.
    fn ratio(&self) -> Option<f64> {
        let ours = self.statistic.of(self.of(Engine::Tandem))?;
        let theirs = self.statistic.of(self.of(Engine::Qemu))?;
        match self.better {
            _ if ours == theirs => Some(1.0),
            Better::Higher => Some(ours / theirs),
            Better::Lower => Some(theirs / ours),
        }
    }
}

impl Statistic {
    /// The figure that `values` make.
    fn of(self, values: &[f64]) -> Option<f64> {
        match self {
            Self::Median => median(values),
            Self::Percentile(percent) => percentile(values, percent),
        }
    }
}

/// The value that `percent` of the values do not exceed.
pub(super) fn percentile(values: &[f64], percent: u8) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (sorted.len() * usize::from(percent)).div_ceil(100);
    sorted.get(rank.saturating_sub(1)).copied()
}

/// The middle of the values.
pub(super) fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        length if length % 2 == 1 => Some(sorted[middle]),
        _ => Some(f64::midpoint(sorted[middle - 1], sorted[middle])),
    }
}

/// The figure, and the least and the greatest value behind it.
fn spread(values: &[f64], statistic: Statistic) -> String {
    let Some(middle) = statistic.of(values) else {
        return "-".to_owned();
    };
    let least = values.iter().copied().fold(f64::INFINITY, f64::min);
    let greatest = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    format!("{} [{} {}]", plain(middle), plain(least), plain(greatest))
}

/// A number with as many digits as are worth reading.
fn plain(value: f64) -> String {
    match value.abs() {
        large if large >= 100.0 => format!("{value:.0}"),
        middle if middle >= 10.0 => format!("{middle:.1}"),
        _ => format!("{value:.2}"),
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = self.figures.iter().map(Figure::name);
        let width = names
            .map(|name| name.len())
            .max()
            .unwrap_or(0)
            .max(NAME_MIN);
        writeln!(
            f,
            "{:<width$} {:<6} {:>28} {:>28} {:>6} {:>8} {:>9}",
            "figure",
            "unit",
            "tandem median [min max]",
            "QEMU median [min max]",
            "ahead",
            "samples",
            "events"
        )?;
        for figure in &self.figures {
            let ours = figure.of(Engine::Tandem);
            let theirs = figure.of(Engine::Qemu);
            let ratio = figure
                .ratio()
                .map_or("-".to_owned(), |ratio| format!("{ratio:.2}"));
            writeln!(
                f,
                "{:<width$} {:<6} {:>28} {:>28} {ratio:>6} {:>8} {:>9}",
                figure.name(),
                figure.unit,
                spread(ours, figure.statistic),
                spread(theirs, figure.statistic),
                format!("{}+{}", ours.len(), theirs.len()),
                figure.events,
            )?;
        }
        for note in &self.notes {
            writeln!(f, "{note}")?;
        }
        write!(
            f,
            "ahead >= 1.00: ours is as good or better; samples: ours + theirs; events: what \
             they were taken over, requests, starts or kills"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(value: f64, better: Better) -> Vec<Sample> {
        vec![Sample::new("x", "ms", better, value)]
    }

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0]), Some(2.5));
    }

    #[test]
    fn a_percentile_is_one_of_the_values() {
        let values: Vec<f64> = (1..=200).rev().map(f64::from).collect();
        assert_eq!(percentile(&values, 50), Some(100.0));
        assert_eq!(percentile(&values, 99), Some(198.0));
        assert_eq!(percentile(&values, 100), Some(200.0));
        assert_eq!(percentile(&[], 99), None);
    }

    #[test]
    fn nothing_is_ahead_of_something_where_less_is_better() {
        for (theirs, ahead) in [(5.0, f64::INFINITY), (0.0, 1.0)] {
            let mut table = Table::default();
            table.add("row", Engine::Tandem, sample(0.0, Better::Lower));
            table.add("row", Engine::Qemu, sample(theirs, Better::Lower));
            assert_eq!(table.figures[0].ratio(), Some(ahead));
        }
    }

    #[test]
    fn ahead_is_above_one_whichever_way_is_better() {
        for (better, ours, theirs) in [(Better::Higher, 20.0, 10.0), (Better::Lower, 1.0, 2.0)] {
            let mut table = Table::default();
            table.add("row", Engine::Tandem, sample(ours, better));
            table.add("row", Engine::Qemu, sample(theirs, better));
            assert_eq!(table.figures[0].ratio(), Some(2.0));
        }
    }

    #[test]
    fn without_a_peer_there_is_no_ratio() {
        let mut table = Table::default();
        table.add("row", Engine::Tandem, sample(1.0, Better::Lower));
        table.note("row", "peer not installed");
        table.note("row", "peer not installed");
        let text = table.to_string();
        assert_eq!(text.matches("peer not installed").count(), 1);
        assert_eq!(table.figures[0].ratio(), None);
    }
}
