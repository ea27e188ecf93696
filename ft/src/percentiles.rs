//! Durations as they were lately.

use std::collections::VecDeque;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Samples of which percentiles are taken.
const SAMPLES_MAX: usize = 4096;

/// Percentiles of some samples, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Percentiles {
    /// Median.
    pub p50: u64,
    /// 99th percentile.
    pub p99: u64,
    /// Largest.
    pub max: u64,
    /// How many there are, of the last 4,096.
    pub samples: u64,
}

/// The last durations of a kind. Adding one takes some nanoseconds.
#[derive(Clone, Debug, Default)]
pub struct Samples(VecDeque<u64>);

impl Samples {
    /// Adds one.
    pub fn add(&mut self, sample: Duration) {
        if self.0.len() >= SAMPLES_MAX {
            self.0.pop_front();
        }
        self.0.push_back(sample.as_micros() as u64);
    }

    /// Adds those of `other`, as many as there is room for.
    pub fn join(&mut self, other: &Self) {
        let room = SAMPLES_MAX - self.0.len();
        self.0.extend(other.0.iter().rev().take(room));
    }

    /// Their percentiles.
    pub fn percentiles(&self) -> Percentiles {
        let mut sorted: Vec<u64> = self.0.iter().copied().collect();
        sorted.sort_unstable();
        let at = |percent: usize| {
            let index = sorted.len().saturating_sub(1) * percent / 100;
            sorted.get(index).copied().unwrap_or(0)
        };
        Percentiles {
            p50: at(50),
            p99: at(99),
            max: at(100),
            samples: sorted.len() as u64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_samples_count() {
        let mut samples = Samples::default();
        assert_eq!(samples.percentiles(), Percentiles::default());
        for sample in 0..2 * SAMPLES_MAX as u64 {
            samples.add(Duration::from_micros(sample));
        }
        let Percentiles {
            p50,
            p99,
            max,
            samples: count,
        } = samples.percentiles();
        assert_eq!((max, count), (8191, 4096));
        assert_eq!((p50, p99), (4096 + 4095 / 2, 4096 + 4095 * 99 / 100));
    }

    #[test]
    fn samples_of_several_are_joined_as_far_as_there_is_room() {
        let mut samples = Samples::default();
        samples.add(Duration::from_micros(9));
        let mut all = samples.clone();
        all.join(&samples);
        assert_eq!(all.percentiles().samples, 2);
        for _ in 0..SAMPLES_MAX {
            samples.add(Duration::ZERO);
        }
        all.join(&samples);
        assert_eq!(all.percentiles().samples, SAMPLES_MAX as u64);
    }
}
