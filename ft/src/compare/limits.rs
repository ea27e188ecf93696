//! What a comparator may hold, and what it counted.

use std::time::Duration;

use super::mismatch::Cause;

/// Limits of one comparator. At each of them it pushes back, or reports a mismatch; nothing is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Frames of the primary that wait or are ready, from which on there is no room.
    pub held_frames: usize,
    /// Bytes of them.
    pub held_bytes: usize,
    /// Frames of the secondary of which not everything has been released.
    pub ahead_frames: usize,
    /// Bytes by which the secondary may be ahead.
    pub ahead_bytes: usize,
    /// Flows that are known at the same time.
    pub flows: usize,
    /// Bytes that both sides sent and that are kept per connection for what is sent again.
    pub known_bytes_per_flow: usize,
    /// The same of all connections together.
    pub known_bytes: usize,
    /// How long one side may be without what the other sent, to begin with.
    pub patience: Duration,
    /// How long the secondary may be without an acknowledgement that the primary sent, if that is
    /// longer: stacks delay acknowledgements by up to half a second (RFC 1122, 4.2.3.2), Linux by 200 ms
    /// at most.
    pub ack_patience: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            held_frames: 8 << 10,
            held_bytes: 16 << 20,
            ahead_frames: 8 << 10,
            ahead_bytes: 16 << 20,
            flows: 16 << 10,
            known_bytes_per_flow: 256 << 10,
            known_bytes: 16 << 20,
            patience: Duration::from_millis(100),
            ack_patience: Duration::from_millis(250),
        }
    }
}

/// What a comparator counted since it was made, and what it holds now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// Frames of the primary that the secondary matched.
    pub matched_frames: u64,
    /// Bytes of them.
    pub matched_bytes: u64,
    /// Frames of the primary that a resync covered.
    pub covered_frames: u64,
    /// Frames that passed without a secondary.
    pub alone_frames: u64,
    /// Frames of the secondary that were compared.
    pub secondary_frames: u64,
    /// Mismatches per cause, in the order of [`Cause::NAMES`].
    pub mismatches: [u64; Cause::COUNT],
    /// Flows that were forgotten to make room.
    pub evicted_flows: u64,
    /// Flows that are known now.
    pub flows: usize,
    /// Frames of the primary that are held now.
    pub held_frames: usize,
    /// Bytes of them.
    pub held_bytes: usize,
    /// Bytes of streams that are kept now.
    pub known_bytes: usize,
}
