//! How a guest's completions were delivered, for devices that are paced.

use ratatui::text::Line;

use super::bar;
use crate::top::figures::{self, count};
use crate::top::rates::Rates;
use crate::top::sample::{Device, Sample};

/// How the names of these counters begin.
const PREFIX: &str = "pace_";
/// How the rest of the name begins of those that count deliveries at safepoints.
const EARLY: &str = "early_";
/// The other deliveries.
const LATER: [&str; 2] = ["immediate", "mature"];
/// Time that deliveries were early, in microseconds.
const SAVED: &str = "saved_us";

/// Whether a counter is one of these.
pub(super) fn is_pacing(counter: &str) -> bool {
    counter.starts_with(PREFIX)
}

/// Each device that is or was paced: what came of it, and its deliveries as a histogram.
pub(super) fn lines(sample: &Sample, rates: Option<&Rates>, room: usize) -> Vec<Line<'static>> {
    let of = |device| device_lines(device, rates, room);
    sample.devices.iter().flat_map(of).collect()
}

fn device_lines(device: &Device, rates: Option<&Rates>, room: usize) -> Vec<Line<'static>> {
    let counters = device.counters.iter();
    let counters = counters.filter_map(|(name, value)| Some((name.strip_prefix(PREFIX)?, *value)));
    let (deliveries, others): (Vec<_>, Vec<_>) =
        counters.partition(|(name, _)| name.starts_with(EARLY) || LATER.contains(name));
    let happened: Vec<&str> = deliveries
        .iter()
        .filter(|(_, total)| *total > 0)
        .map(|(name, _)| *name)
        .collect();
    if device.pace.is_none() && happened.is_empty() {
        return Vec::new();
    }
    let mut lines = vec![Line::from(summary(device, &others))];
    let rate =
        |name: &str| rates.and_then(|rates| rates.of(&device.id, &format!("{PREFIX}{name}")));
    let rates: Vec<_> = happened.iter().map(|name| (*name, rate(name))).collect();
    let most = rates.iter().filter_map(|(_, rate)| *rate);
    let most = most.fold(0.0, f64::max);
    lines.extend(rates.into_iter().map(|(name, rate)| {
        let text = format!(
            "{:<18}{:>5}/s  ",
            name.replace('_', " "),
            figures::rate(rate)
        );
        let share = if most > 0.0 {
            rate.unwrap_or(0.0) / most
        } else {
            0.0
        };
        bar::line(text, share, room)
    }));
    lines
}

/// Which device it is, how it is paced, and the figures that are no deliveries.
fn summary(device: &Device, others: &[(&str, u64)]) -> String {
    let pace = device.pace.as_deref().unwrap_or("no longer");
    let mut words = vec![format!("{} ({pace})", device.id)];
    words.extend(others.iter().map(|(name, value)| match *name {
        SAVED => format!("saved {}", figures::time(*value)),
        name => format!("{} {}", name.replace('_', " "), count(*value as f64)),
    }));
    words.join(", ")
}
