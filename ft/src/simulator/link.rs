//! Links between two processes: ordered, reliable, cut and late at times.

use std::collections::VecDeque;

use super::process::Message;
use super::world::Micros;

/// A link's streams.
pub(super) const CHANNELS: [Channel; 3] = [Channel::Data, Channel::Bulk, Channel::Back];

/// One stream of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Channel {
    /// From the primary, all but checkpoints.
    Data,
    /// From the primary, checkpoints.
    Bulk,
    /// From the secondary.
    Back,
}

impl Channel {
    /// The end that sends: 0 is the primary's.
    pub(super) fn sender(self) -> usize {
        usize::from(self == Self::Back)
    }
}

/// A link; end 0 is the primary's, end 1 the secondary's.
pub(super) struct Link {
    /// Processes at its ends.
    pub(super) ends: [usize; 2],
    /// Whether an end is there to receive.
    open: [bool; 2],
    streams: [VecDeque<(Micros, Message)>; 3],
}

impl Link {
    pub(super) fn new(primary: usize, secondary: usize) -> Self {
        Self {
            ends: [primary, secondary],
            open: [true; 2],
            streams: Default::default(),
        }
    }

    pub(super) fn end_of(&self, process: usize) -> usize {
        usize::from(self.ends[1] == process)
    }

    pub(super) fn is_open(&self, end: usize) -> bool {
        self.open[end]
    }

    /// An end receives no more.
    pub(super) fn close(&mut self, end: usize) {
        self.open[end] = false;
    }

    /// Puts a message on its way, behind those before it; gives when it arrives.
    pub(super) fn send(&mut self, channel: Channel, arrives: Micros, message: Message) -> Micros {
        let stream = &mut self.streams[channel as usize];
        let arrives = stream
            .back()
            .map_or(arrives, |(last, _)| arrives.max(*last));
        stream.push_back((arrives, message));
        arrives
    }

    /// The next message that has arrived by now.
    pub(super) fn receive(&mut self, channel: Channel, now: Micros) -> Option<Message> {
        let stream = &mut self.streams[channel as usize];
        stream
            .pop_front_if(|(arrives, _)| *arrives <= now)
            .map(|(_, message)| message)
    }

    /// What is under way arrives not before then.
    pub(super) fn hold(&mut self, channel: Channel, until: Micros) {
        for (arrives, _) in &mut self.streams[channel as usize] {
            *arrives = until.max(*arrives);
        }
    }

    /// When the last that is under way arrives.
    pub(super) fn last_arrival(&self, channel: Channel) -> Option<Micros> {
        self.streams[channel as usize]
            .back()
            .map(|(arrives, _)| *arrives)
    }

    /// What an end sent and was not received is lost.
    pub(super) fn lose(&mut self, end: usize) {
        for channel in CHANNELS {
            if channel.sender() == end {
                self.streams[channel as usize].clear();
            }
        }
    }
}
