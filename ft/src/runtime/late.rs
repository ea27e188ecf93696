//! The secondary's thread that hears what the primary's keeper has: frames that were on their way to the guest
//! when the primary was lost.

use std::io::Read;
use std::sync::Arc;

use tandem_vmm::error::causes;
use tandem_vmm::migration::Link;

use super::secondary::Core;
use super::{Pair, ProtectionError};
use crate::link::{Kind, MessageError, Reader};

/// Starts it; it ends with the connection.
pub(super) fn listen(core: Arc<Core>, mut link: Link) -> Result<(), ProtectionError> {
    std::thread::Builder::new()
        .name("late".into())
        .spawn(move || {
            if let Err(error) = core.confinement.enter() {
                tracing::error!(%error, "the thread of late frames cannot be confined");
                return;
            }
            let error = hear(&core.pair, &mut link);
            tracing::debug!(why = %causes(&error), "no more late frames come");
            link.shut_down();
        })
        .map(drop)
        .map_err(ProtectionError::host("start the thread of late frames"))
}

/// Gives `pair` what comes, until nothing more does, or what is no late frame.
pub(super) fn hear(pair: &Pair, link: &mut Link) -> MessageError {
    let mut reader = Reader::default();
    loop {
        let filled = reader.fill(|room| link.read(room));
        if let Err(error) = filled {
            return error;
        }
        loop {
            match reader.take() {
                Ok(None) => break,
                Ok(Some(message)) if message.kind == Kind::Input => {
                    // A frame too many is lost, as in any network.
                    pair.late_input(message.device, message.payload);
                }
                Ok(Some(message)) => {
                    return MessageError::Refused(format!("a keeper said {:?}", message.kind));
                }
                Err(error) => return error,
            }
        }
    }
}
