//! The side that is given a guest.

use std::sync::Arc;

use tandem_devices::GuestMemory;

use super::frame::{self, Hello, Kind, Purpose};
use super::pages;
use super::protocol::{End, TargetFate, TargetPhase, target_fate};
use super::{Link, MigrationError};
use crate::snapshot::GuestState;

/// A source that said what it has.
#[derive(Debug)]
pub struct Offer {
    link: Link,
    /// What it has.
    pub hello: Hello,
}

/// A guest that was received whole, and has yet to run.
#[derive(Debug)]
pub struct Received {
    link: Link,
    /// Its state.
    pub state: GuestState,
    /// What its company has to let out first, if there is anything.
    pub outputs: Option<Vec<u8>>,
}

impl Offer {
    /// Hears what a source has.
    ///
    /// # Errors
    /// When it is no source, or of another version.
    pub fn hear(mut link: Link) -> Result<Self, MigrationError> {
        let heard = hear(&mut link);
        match heard {
            Ok(hello) => Ok(Self { link, hello }),
            Err(error) => {
                frame::refuse(&mut link, &error.to_string());
                Err(error)
            }
        }
    }

    /// Tells the source that its guest will not be taken.
    pub fn refuse(mut self, reason: &str) {
        frame::refuse(&mut self.link, reason);
    }

    /// Takes the guest: memory is filled, state received.
    ///
    /// # Errors
    /// When the source gives up or something breaks; the guest must not run here then.
    pub fn accept(mut self, memory: &Arc<GuestMemory>) -> Result<Received, MigrationError> {
        let state = self.receive_all(memory);
        match state {
            Ok((state, outputs)) => Ok(Received {
                link: self.link,
                state,
                outputs,
            }),
            Err(error) => {
                frame::refuse(&mut self.link, &error.to_string());
                Err(error)
            }
        }
    }

    fn receive_all(
        &mut self,
        memory: &GuestMemory,
    ) -> Result<(GuestState, Option<Vec<u8>>), MigrationError> {
        frame::send(&mut self.link, Kind::Accept, &[])?;
        let mut payload = Vec::new();
        let mut state = None;
        let mut outputs = None;
        loop {
            let phase = match &state {
                None => TargetPhase::Receiving,
                Some(_) => TargetPhase::Whole,
            };
            let (received, end) = match frame::receive(&mut self.link, &mut payload) {
                Ok(Kind::Pages) if phase == TargetPhase::Receiving => {
                    pages::apply(&payload, memory, |_| {})?;
                    continue;
                }
                Ok(Kind::State) if phase == TargetPhase::Receiving => {
                    state = Some(self.understand(&payload)?);
                    continue;
                }
                Ok(Kind::Outputs) if phase == TargetPhase::Receiving && outputs.is_none() => {
                    outputs = Some(std::mem::take(&mut payload));
                    continue;
                }
                Ok(Kind::Complete) if phase == TargetPhase::Whole => {
                    return Ok((state.ok_or(MigrationError::Closed)?, outputs));
                }
                Ok(kind) => {
                    let what = format!("{kind:?} at the wrong time");
                    (MigrationError::Garbled { what }, End::Silent)
                }
                Err(error) => {
                    let end = error.end_of_source();
                    (error, end)
                }
            };
            return match (target_fate(phase, end), state) {
                (TargetFate::Run, Some(state)) => {
                    tracing::warn!("the source died when it had sent everything");
                    Ok((state, outputs))
                }
                _ => Err(received),
            };
        }
    }

    fn understand(&self, bytes: &[u8]) -> Result<GuestState, MigrationError> {
        let state = GuestState::from_bytes(bytes)?;
        state.hardware.expect(&self.hello.hardware)?;
        Ok(state)
    }
}

impl Received {
    /// Tells the source that the guest is this side's now. It must be let run after that, whatever
    /// happens, and not before.
    pub fn announce(mut self) {
        // A source that cannot hear it is dead or in doubt, and does not go on either way.
        if let Err(error) = frame::send(&mut self.link, Kind::Running, &[]) {
            tracing::warn!(%error, "the source was not told that the guest runs here");
        }
        // Closed only with the process: the end of the connection would say that this side died.
        std::mem::forget(self.link);
    }

    /// Tells the source that the guest cannot run here.
    pub fn refuse(mut self, reason: &str) {
        frame::refuse(&mut self.link, reason);
    }
}

fn hear(link: &mut Link) -> Result<Hello, MigrationError> {
    frame::receive_preface(link, Purpose::Migration)?;
    let mut payload = Vec::new();
    match frame::receive(link, &mut payload)? {
        Kind::Hello => Hello::decode(&payload),
        kind => Err(MigrationError::Garbled {
            what: format!("{kind:?} first"),
        }),
    }
}
