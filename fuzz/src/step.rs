//! What a hostile driver does next, and how that is written in an input.
//!
//! Addresses are 32 bits wide: guest memory is small, and the few addresses beyond it that matter
//! stand for all others ([`place`]).

use tandem_devices::virtio::testing::{BUFFERS, MEMORY_SIZE};

use crate::input::Input;

/// Most bytes of one raw register access.
const ACCESS_MAX: usize = 16;
/// Most parts of a chain in one step.
const PARTS_MAX: u8 = 16;
/// Addresses that are no memory or lead over its end.
const WILD: [u64; 6] = [
    MEMORY_SIZE as u64 - 1,
    MEMORY_SIZE as u64,
    u64::MAX,
    u64::MAX - 15,
    0xd000_0000,
    1 << 63,
];

/// One part of a chain: a place, its length, and whether the device may write it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    /// In units of 64 bytes from [`BUFFERS`].
    pub(crate) at: u16,
    pub(crate) len: u16,
    pub(crate) writable: bool,
}

impl Part {
    /// Address, length and direction as the driver lays them into a descriptor.
    pub(crate) fn descriptor(self) -> (u64, u32, bool) {
        let at = BUFFERS + u64::from(self.at) % 0x7000 * 64;
        (at, self.len.into(), self.writable)
    }
}

/// One step of a hostile driver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Initialises the device with all its features but these.
    Start { without: u32 },
    /// The same without queues and without DRIVER_OK.
    Negotiate { without: u32 },
    /// Puts the rings of a queue anywhere and enables it.
    Rings {
        queue: u8,
        descriptors: u32,
        available: u32,
        used: u32,
    },
    /// Writes a register, numbered in words.
    Register { at: u8, value: u32 },
    /// Writes registers or configuration space with any width.
    Write { at: u16, bytes: Vec<u8> },
    /// Reads them.
    Read { at: u16, len: u8 },
    /// Writes one descriptor of a queue, or of an indirect table if there is no such queue.
    Descriptor {
        table: u8,
        index: u8,
        at: u32,
        len: u32,
        flags: u8,
        next: u8,
    },
    /// Lays out a chain as the standard wants it, offers it and kicks.
    Chain {
        queue: u8,
        head: u8,
        parts: Vec<Part>,
    },
    /// Makes a head available.
    Offer { queue: u8, head: u16 },
    /// Kicks a queue.
    Kick { queue: u8 },
    /// Writes memory.
    Poke { at: u32, bytes: Vec<u8> },
    /// Gives the device an event.
    Ready { token: u8 },
    /// Gives it the events it asked for.
    Again,
    /// Something happens at the host side.
    Host { what: u8, value: u32 },
    /// Resets the device.
    Reset,
    /// Pauses and resumes it.
    Pause,
    /// Saves and restores it.
    Restore,
}

const STEPS: u8 = 17;

/// The guest address that `value` stands for.
pub(crate) fn place(value: u32) -> u64 {
    match value >> 24 {
        0xff => WILD[value as usize % WILD.len()],
        _ => u64::from(value) % (MEMORY_SIZE as u64 + 0x1000),
    }
}

impl Step {
    /// Reads the next step; none at the end of the input.
    pub(crate) fn read(input: &mut Input<'_>) -> Option<Self> {
        if input.is_empty() {
            return None;
        }
        Some(match input.u8() % STEPS {
            0 => Self::Start {
                without: input.u32(),
            },
            1 => Self::Negotiate {
                without: input.u32(),
            },
            2 => Self::Rings {
                queue: input.u8(),
                descriptors: input.u32(),
                available: input.u32(),
                used: input.u32(),
            },
            3 => Self::Register {
                at: input.u8(),
                value: input.u32(),
            },
            4 => Self::Write {
                at: input.u16(),
                bytes: bounded(input.short(), ACCESS_MAX),
            },
            5 => Self::Read {
                at: input.u16(),
                len: input.u8(),
            },
            6 => Self::Descriptor {
                table: input.u8(),
                index: input.u8(),
                at: input.u32(),
                len: input.u32(),
                flags: input.u8(),
                next: input.u8(),
            },
            7 => Self::read_chain(input),
            8 => Self::Offer {
                queue: input.u8(),
                head: input.u16(),
            },
            9 => Self::Kick { queue: input.u8() },
            10 => Self::Poke {
                at: input.u32(),
                bytes: input.short().to_vec(),
            },
            11 => Self::Ready { token: input.u8() },
            12 => Self::Again,
            13 => Self::Host {
                what: input.u8(),
                value: input.u32(),
            },
            14 => Self::Reset,
            15 => Self::Pause,
            _ => Self::Restore,
        })
    }

    fn read_chain(input: &mut Input<'_>) -> Self {
        let (queue, head) = (input.u8(), input.u8());
        let count = input.u8() % (PARTS_MAX + 1);
        let parts = (0..count)
            .map(|_| Part {
                at: input.u16(),
                len: input.u16(),
                writable: input.u8() & 1 != 0,
            })
            .collect();
        Self::Chain { queue, head, parts }
    }

    /// Appends the step to an input.
    pub(crate) fn write(&self, to: &mut Vec<u8>) {
        to.push(self.number());
        match self {
            Self::Start { without } | Self::Negotiate { without } => {
                to.extend(without.to_le_bytes());
            }
            Self::Rings {
                queue,
                descriptors,
                available,
                used,
            } => {
                to.push(*queue);
                to.extend(
                    [*descriptors, *available, *used]
                        .map(u32::to_le_bytes)
                        .concat(),
                );
            }
            Self::Register { at, value } | Self::Host { what: at, value } => {
                to.push(*at);
                to.extend(value.to_le_bytes());
            }
            Self::Write { at, bytes } => {
                to.extend(at.to_le_bytes());
                short(bytes, to);
            }
            Self::Read { at, len } => {
                to.extend(at.to_le_bytes());
                to.push(*len);
            }
            Self::Descriptor {
                table,
                index,
                at,
                len,
                flags,
                next,
            } => {
                to.extend([*table, *index]);
                to.extend([*at, *len].map(u32::to_le_bytes).concat());
                to.extend([*flags, *next]);
            }
            Self::Chain { queue, head, parts } => {
                to.extend([*queue, *head, parts.len() as u8]);
                for part in parts {
                    to.extend([part.at, part.len].map(u16::to_le_bytes).concat());
                    to.push(part.writable.into());
                }
            }
            Self::Offer { queue, head } => {
                to.push(*queue);
                to.extend(head.to_le_bytes());
            }
            Self::Poke { at, bytes } => {
                to.extend(at.to_le_bytes());
                short(bytes, to);
            }
            Self::Kick { queue: number } | Self::Ready { token: number } => to.push(*number),
            Self::Again | Self::Reset | Self::Pause | Self::Restore => {}
        }
    }

    fn number(&self) -> u8 {
        match self {
            Self::Start { .. } => 0,
            Self::Negotiate { .. } => 1,
            Self::Rings { .. } => 2,
            Self::Register { .. } => 3,
            Self::Write { .. } => 4,
            Self::Read { .. } => 5,
            Self::Descriptor { .. } => 6,
            Self::Chain { .. } => 7,
            Self::Offer { .. } => 8,
            Self::Kick { .. } => 9,
            Self::Poke { .. } => 10,
            Self::Ready { .. } => 11,
            Self::Again => 12,
            Self::Host { .. } => 13,
            Self::Reset => 14,
            Self::Pause => 15,
            Self::Restore => 16,
        }
    }
}

fn bounded(bytes: &[u8], max: usize) -> Vec<u8> {
    bytes[..bytes.len().min(max)].to_vec()
}

fn short(bytes: &[u8], to: &mut Vec<u8>) {
    to.push(bytes.len() as u8);
    to.extend(bytes);
}

/// The input that makes a driver take these steps.
pub(crate) fn script(steps: &[Step]) -> Vec<u8> {
    let mut bytes = Vec::new();
    steps.iter().for_each(|step| step.write(&mut bytes));
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_step_is_read_as_it_was_written() {
        let mut random: Vec<u8> = (0..4000u32).map(|i| ((i * i * 31) >> 5) as u8).collect();
        (0..STEPS).for_each(|number| random.extend([number; 24]));
        let mut input = Input::new(&random);
        let mut seen = std::collections::BTreeSet::new();
        while let Some(step) = Step::read(&mut input) {
            let bytes = script(std::slice::from_ref(&step));
            assert_eq!(Step::read(&mut Input::new(&bytes)), Some(step.clone()));
            seen.insert(step.number());
        }
        assert_eq!(seen.len(), usize::from(STEPS));
    }
}
