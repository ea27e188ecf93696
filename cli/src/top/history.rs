//! A guest's figures over the last minute. Pure.

use std::collections::VecDeque;
use std::time::Duration;

use super::rates::Totals;

/// How far back figures are kept.
pub(crate) const KEPT: Duration = Duration::from_secs(60);
/// Most points that are kept: the shortest interval's.
const POINTS_MAX: usize = 600;

/// A guest's figures between two times.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Point {
    /// From when.
    pub(crate) from: Duration,
    /// Until when.
    pub(crate) until: Duration,
    /// The figures.
    pub(crate) totals: Totals,
}

/// The points of the last minute, oldest first.
#[derive(Clone, Debug, Default)]
pub(crate) struct History(VecDeque<Point>);

impl History {
    /// Adds the latest one, and forgets those that are too old.
    pub(crate) fn add(&mut self, point: Point) {
        let oldest = point.until.saturating_sub(KEPT);
        while self.0.front().is_some_and(|first| first.until <= oldest) {
            self.0.pop_front();
        }
        if self.0.len() >= POINTS_MAX {
            self.0.pop_front();
        }
        self.0.push_back(point);
    }

    /// A figure over the minute before `now`, in so many equal parts of it: its mean over the part, or none
    /// if nothing is known of it.
    pub(crate) fn columns(
        &self,
        now: Duration,
        columns: usize,
        of: impl Fn(&Totals) -> Option<f64>,
    ) -> Vec<Option<f64>> {
        let width = KEPT.as_secs_f64() / columns.max(1) as f64;
        let start = now.as_secs_f64() - KEPT.as_secs_f64();
        let begins = (0..columns).map(|column| start + width * column as f64);
        begins
            .map(|begin| self.mean(begin, begin + width, &of))
            .collect()
    }

    /// The most that a figure was between two samples of the minute before `now`, if it is known.
    pub(crate) fn most(&self, now: Duration, of: impl Fn(&Totals) -> Option<f64>) -> Option<f64> {
        let oldest = now.saturating_sub(KEPT);
        let points = self.0.iter().filter(|point| point.until > oldest);
        points
            .filter_map(|point| of(&point.totals))
            .reduce(f64::max)
    }

    /// The mean between two times in seconds, each point counted by how much of it lies there.
    fn mean(&self, from: f64, until: f64, of: impl Fn(&Totals) -> Option<f64>) -> Option<f64> {
        let (mut sum, mut covered) = (0.0, 0.0);
        for point in &self.0 {
            let begin = point.from.as_secs_f64().max(from);
            let share = point.until.as_secs_f64().min(until) - begin;
            if let (true, Some(value)) = (share > 0.0, of(&point.totals)) {
                sum += value * share;
                covered += share;
            }
        }
        (covered > 0.0).then(|| sum / covered)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn point(from: f64, until: f64, exits: f64) -> Point {
        Point {
            from: Duration::from_secs_f64(from),
            until: Duration::from_secs_f64(until),
            totals: Totals {
                exits,
                ..Totals::default()
            },
        }
    }

    fn exits(totals: &Totals) -> Option<f64> {
        Some(totals.exits)
    }

    #[test]
    fn columns_are_means_and_say_what_they_do_not_know() {
        let mut history = History::default();
        history.add(point(80.0, 90.0, 4.0));
        history.add(point(90.0, 95.0, 10.0));
        // Nothing was heard between 95 and 100.
        history.add(point(100.0, 120.0, 1.0));
        let now = Duration::from_secs(120);
        let seen = history.columns(now, 6, exits);
        let wanted = [None, None, Some(4.0), Some(10.0), Some(1.0), Some(1.0)];
        assert_eq!(seen, wanted);
        let coarse = history.columns(now, 2, exits);
        assert_eq!(coarse, [Some(4.0), Some((50.0 + 20.0) / 25.0)]);
        assert_eq!(history.columns(now, 0, exits), []);
        assert_eq!(history.most(now, exits), Some(10.0));
        assert_eq!(history.most(Duration::from_secs(160), exits), Some(1.0));
        assert_eq!(history.most(Duration::from_secs(200), exits), None);
    }

    #[test]
    fn figures_that_are_missing_are_no_zeros() {
        let mut history = History::default();
        history.add(point(0.0, 60.0, 1.0));
        let cpu = |totals: &Totals| totals.cpu;
        assert_eq!(history.columns(KEPT, 3, cpu), [None, None, None]);
        assert_eq!(history.most(KEPT, cpu), None);
    }

    #[test]
    fn what_is_old_or_too_much_is_forgotten() {
        let mut history = History::default();
        for second in 0..200 {
            let from = f64::from(second);
            history.add(point(from, from + 1.0, 1.0));
        }
        assert_eq!(history.0.len(), 60);
        for step in 0..2 * POINTS_MAX {
            let from = 200.0 + step as f64 / 1000.0;
            history.add(point(from, from + 0.001, 1.0));
        }
        assert_eq!(history.0.len(), POINTS_MAX);
    }

    proptest! {
        #[test]
        fn no_column_is_outside_of_what_was_seen(
            values in prop::collection::vec((1u32..5000, 0u32..1000), 0..80),
            columns in 0usize..200,
        ) {
            let (mut history, mut now) = (History::default(), 0.0);
            for (milliseconds, value) in &values {
                let until = now + f64::from(*milliseconds) / 1000.0;
                history.add(point(now, until, f64::from(*value)));
                now = until;
            }
            let seen = history.columns(Duration::from_secs_f64(now), columns, exits);
            prop_assert_eq!(seen.len(), columns);
            let most = values.iter().map(|(_, value)| *value).max().unwrap_or(0);
            for value in seen.into_iter().flatten() {
                prop_assert!((-1e-6..=f64::from(most) + 1e-6).contains(&value));
            }
        }
    }
}
