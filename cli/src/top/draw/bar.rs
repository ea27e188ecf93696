//! Bars of a histogram that lies on its side.

use ratatui::style::Stylize;
use ratatui::text::{Line, Span};

/// Longest bar, in columns.
const LENGTH_MAX: usize = 30;
/// Parts of a column that a bar can end in.
const EIGHTHS: [&str; 8] = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"];

/// `text` and a bar that is full at `share` 1, in `room` columns.
pub(super) fn line(text: String, share: f64, room: usize) -> Line<'static> {
    let most = room.saturating_sub(text.chars().count()).min(LENGTH_MAX);
    Line::from(vec![Span::from(text), Span::from(bar(share, most)).cyan()])
}

fn bar(share: f64, most: usize) -> String {
    let eighths = (share.clamp(0.0, 1.0) * most as f64 * 8.0).round() as usize;
    "█".repeat(eighths / 8) + EIGHTHS[eighths % 8]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_end_in_eighths_and_do_not_overflow() {
        let bars = [0.0, 1.0 / 16.0, 0.5, 1.0, 7.0].map(|share| bar(share, 2));
        assert_eq!(bars, ["", "▏", "█", "██", "██"]);
        assert_eq!(bar(1.0, 0), "");
    }
}
