//! Mappings as they are saved: with a checkpoint, for the next secondary.

use serde::{Deserialize, Serialize};

use super::{Mapper, Mapping, OVER_MAX, Opening};
use crate::packet::Flow;

/// All mappings of one network device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    connections: Vec<SavedConnection>,
}

impl State {
    /// Number of connections.
    pub fn len(&self) -> usize {
        self.connections.len()
    }

    /// Whether the outside knows every connection by the guest's own numbers.
    pub fn is_empty(&self) -> bool {
        self.connections.is_empty()
    }
}

/// One connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SavedConnection {
    /// See [`Flow::to_bytes`]; from the guest to the outside.
    flow: Vec<u8>,
    /// What is added to the guest's sequence numbers on their way out.
    sequence: u32,
    /// The same of its timestamps.
    time: u32,
    /// The guest's initial sequence number, if it was seen.
    initial: Option<u32>,
    /// The opening of which it is not known how it left.
    opening: Option<SavedOpening>,
    /// The latest timestamp that the outside has seen.
    seen: Option<u32>,
    /// Timestamps that leave are at least this.
    floor: Option<u32>,
    guest_ended: bool,
    outside_ended: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SavedOpening {
    acknowledges: bool,
    time: Option<u32>,
}

/// Why a state cannot be taken.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// A connection is not named as one.
    #[error("connection {0} of the sequence mappings has a malformed name")]
    Name(usize),
    /// There is one twice.
    #[error("sequence mappings have {0} twice")]
    Twice(Flow),
    /// There are too many.
    #[error("sequence mappings are of {found} connections, at most {allowed} are allowed")]
    TooMany {
        /// How many there are.
        found: usize,
        /// How many are allowed.
        allowed: usize,
    },
}

impl Mapper {
    /// All mappings, those that were used longest ago first.
    pub fn state(&self) -> State {
        let tables = self.tables.iter().rev();
        let all = tables.flat_map(|table| table.by_age().map(move |id| (table, id)));
        State {
            connections: all
                .map(|(table, id)| save(&table.flow(id), table.get(id)))
                .collect(),
        }
    }

    /// The mapper of a secondary whose guest is a copy of the one that `state` is of. At most `limit`
    /// connections are known at the same time, and as many without an answer yet.
    pub fn from_state(state: &State, limit: usize) -> Result<Self, StateError> {
        let mut mapper = Self::following(limit);
        let allowed = limit.saturating_mul(2).saturating_add(OVER_MAX);
        if state.len() > allowed {
            return Err(StateError::TooMany {
                found: state.len(),
                allowed,
            });
        }
        for (index, saved) in state.connections.iter().enumerate() {
            let flow = Flow::tcp_from_bytes(&saved.flow).ok_or(StateError::Name(index))?;
            if mapper.find(&flow).is_some() {
                return Err(StateError::Twice(flow));
            }
            mapper.place(flow, load(saved));
        }
        Ok(mapper)
    }
}

fn save(flow: &Flow, mapping: &Mapping) -> SavedConnection {
    SavedConnection {
        flow: flow.to_bytes().to_vec(),
        sequence: mapping.sequence,
        time: mapping.time,
        initial: mapping.initial,
        opening: mapping.opening.map(|opening| SavedOpening {
            acknowledges: opening.acknowledges,
            time: opening.time,
        }),
        seen: mapping.seen,
        floor: mapping.floor,
        guest_ended: mapping.guest_ended,
        outside_ended: mapping.outside_ended,
    }
}

fn load(saved: &SavedConnection) -> Mapping {
    Mapping {
        sequence: saved.sequence,
        time: saved.time,
        initial: saved.initial,
        opening: saved.opening.as_ref().map(|opening| Opening {
            acknowledges: opening.acknowledges,
            time: opening.time,
        }),
        seen: saved.seen,
        floor: saved.floor,
        guest_ended: saved.guest_ended,
        outside_ended: saved.outside_ended,
    }
}
