//! Values about checkpoints of guests and the stores in which they are.

use std::ops::RangeInclusive;
use std::str::FromStr;
use std::time::Duration;

use bytesize::ByteSize;
use tandem_ft::runtime::Budget;
use tandem_store::capture::{Every, INTERVAL_MAX, INTERVAL_MIN};
use tandem_store::place::PlaceError;
use tandem_store::prune::KEEP_MIN;
use tandem_store::{CheckpointId, Place};

use super::{ValueError, allowed, duration, name, size, time};

/// How often checkpoints are made.
///
/// # Errors
/// When it is no time, or one that is too short or too long.
pub fn interval(text: &str) -> Result<Duration, ValueError> {
    match duration(text)? {
        time if (INTERVAL_MIN..=INTERVAL_MAX).contains(&time) => Ok(time),
        _ => allowed(format!(
            "must be {} to {}",
            time(INTERVAL_MIN),
            time(INTERVAL_MAX)
        )),
    }
}

/// Word for an interval that is chosen by a budget.
const AUTO: &str = "auto";
/// Smallest share of a guest's time in millionths, and largest.
const PAUSE_PPM: RangeInclusive<u32> = 100..=500_000;
/// Millionths in a hundredth.
const PERCENT_PPM: u32 = 10_000;
/// Least bytes per second that may go to a store, and most.
const BANDWIDTH: RangeInclusive<u64> = 64 << 10..=1 << 40;

/// How often checkpoints are made: a time, or `auto` with what they may cost.
///
/// # Errors
/// When it is neither, or out of range.
pub fn every(text: &str) -> Result<Every, ValueError> {
    let mut parts = text.split(',');
    if parts.next() != Some(AUTO) {
        return interval(text).map(Every::Fixed);
    }
    let mut budget = Budget::default();
    for part in parts {
        match part.split_once('=') {
            Some(("pause", share)) => budget.pause_ppm = pause_share(share)?,
            Some(("bandwidth", rate)) => budget.bandwidth = bandwidth(rate)?,
            _ => return allowed("must be a time, or auto[,pause=PERCENT][,bandwidth=SIZE]"),
        }
    }
    Ok(Every::Auto(budget))
}

/// A share of a guest's time, in millionths.
fn pause_share(text: &str) -> Result<u32, ValueError> {
    let percent = text.strip_suffix('%').unwrap_or_default();
    let (whole, part) = percent.split_once('.').unwrap_or((percent, "0"));
    let digits = |text: &str, most| {
        let fits = (1..=most).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_digit());
        fits.then_some(())
    };
    // Four digits behind the point are millionths.
    let number = digits(whole, 2).and(digits(part, 4));
    let number = number.and_then(|()| format!("{whole}{part:0<4}").parse().ok());
    match number {
        Some(ppm) if PAUSE_PPM.contains(&ppm) => Ok(ppm),
        _ => allowed("pause must be 0.01% to 50%: for how much of its time the guest may stand"),
    }
}

fn bandwidth(text: &str) -> Result<u64, ValueError> {
    match ByteSize::from_str(text) {
        Ok(ByteSize(bytes)) if BANDWIDTH.contains(&bytes) => Ok(bytes),
        _ => allowed(format!(
            "bandwidth must be {} to {}: how much may go to the store per second",
            size(*BANDWIDTH.start()),
            size(*BANDWIDTH.end())
        )),
    }
}

/// How often checkpoints are made, as [`every`] takes it.
pub fn every_text(every: Every) -> String {
    match every {
        Every::Fixed(interval) => time(interval),
        Every::Auto(budget) => format!(
            "{AUTO},pause={},bandwidth={}",
            percent(budget.pause_ppm),
            size(budget.bandwidth)
        ),
    }
}

/// A share in millionths, in percent.
pub fn percent(ppm: u32) -> String {
    let (whole, part) = (ppm / PERCENT_PPM, ppm % PERCENT_PPM);
    let text = format!("{whole}.{part:04}");
    format!("{}%", text.trim_end_matches('0').trim_end_matches('.'))
}

/// Where a store of checkpoints is.
///
/// # Errors
/// When it is no address of a store.
pub fn store(text: &str) -> Result<Place, ValueError> {
    text.parse()
        .or_else(|error: PlaceError| allowed(error.to_string()))
}

/// A guest of a store, and perhaps one of its checkpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chosen {
    /// The guest.
    pub guest: String,
    /// The checkpoint; nothing for the newest that is whole.
    pub id: Option<CheckpointId>,
}

/// A guest of a store, or a checkpoint of it: `NAME` or `NAME@TERM-NUMBER`.
///
/// # Errors
/// When it is neither.
pub fn checkpoint(text: &str) -> Result<Chosen, ValueError> {
    let (guest, id) = match text.split_once('@') {
        None => (text, None),
        Some((guest, id)) => match CheckpointId::parse(id) {
            Some(id) => (guest, Some(id)),
            None => return allowed("must be NAME or NAME@TERM-NUMBER, such as web@3-17"),
        },
    };
    let guest = name(guest)?;
    Ok(Chosen { guest, id })
}

/// How many checkpoints to keep.
///
/// # Errors
/// When it is no number, or fewer than must be kept.
pub fn keep(text: &str) -> Result<usize, ValueError> {
    match text.parse() {
        Ok(count) if count >= KEEP_MIN => Ok(count),
        _ => allowed(format!(
            "must be {KEEP_MIN} or more: the newest may turn out to be damaged"
        )),
    }
}
