//! Checkpoints on their connection: what is said first, and how each is sent and received.

use std::io::Write;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tandem_vmm::migration::frame::{self, Kind, Purpose};
use tandem_vmm::migration::{Hello, Link, MigrationError};
use tandem_vmm::snapshot::GuestState;

use super::pair::PairCut;
use super::{Pair, ProtectionError, ResyncMode};

/// What a primary says of its guest first.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Offer {
    /// By which its connections are known to belong together.
    pub token: u128,
    /// Whether there is a third one, from a keeper (see [`crate::keeper`]).
    pub keeper: bool,
    /// Disks that the guest may write to, of which a replica is needed: number and bytes of each.
    pub disks: Vec<(u8, u64)>,
    /// Number of the guest's owner.
    pub term: u64,
    /// Where its standbys listen, for whoever owns it next; see [`super::Standbys`].
    pub standbys: Vec<super::Place>,
    /// Which of them the primary says this to.
    pub here: u64,
    /// What of a resync the guest waits for: if for all of it, it can be asked for pages meanwhile.
    pub mode: ResyncMode,
    /// The guest.
    pub hello: Hello,
}

/// What a primary says on its other connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Greeting {
    pub(super) token: u128,
}

pub(super) fn encode(value: &impl Serialize) -> Result<Vec<u8>, ProtectionError> {
    rmp_serde::to_vec_named(value).map_err(|e| ProtectionError::Garbled(e.to_string()))
}

pub(super) fn decode<'a, T: Deserialize<'a>>(
    bytes: &'a [u8],
    what: &str,
) -> Result<T, ProtectionError> {
    rmp_serde::from_slice(bytes)
        .map_err(|e| ProtectionError::Garbled(format!("{what} that cannot be understood: {e}")))
}

/// Says first what a connection is for, and then `value`.
pub(super) fn greet(
    link: &mut impl Write,
    purpose: Purpose,
    value: &impl Serialize,
) -> Result<(), ProtectionError> {
    frame::send_preface(link, purpose)?;
    Ok(frame::send(link, Kind::Hello, &encode(value)?)?)
}

/// Hears what [`greet`] says.
pub(super) fn hear<T: for<'a> Deserialize<'a>>(
    link: &mut Link,
    purpose: Purpose,
) -> Result<T, ProtectionError> {
    frame::receive_preface(link, purpose)?;
    let mut payload = Vec::new();
    match frame::receive(link, &mut payload)? {
        Kind::Hello => decode(&payload, "a greeting"),
        kind => Err(ProtectionError::Garbled(format!("{kind:?} first"))),
    }
}

/// The end of a checkpoint, after its pages.
pub(super) fn encode_rest(state: &GuestState, cut: &PairCut) -> Result<Vec<u8>, ProtectionError> {
    let mut bytes = Vec::new();
    frame::send(&mut bytes, Kind::State, &state.to_bytes()?)?;
    frame::send(&mut bytes, Kind::Outputs, &encode(cut)?)?;
    frame::send(&mut bytes, Kind::Complete, &[])?;
    Ok(bytes)
}

/// Takes what a checkpoint says of outputs, as [`encode_outputs`] wrote it, into a copy's gates.
///
/// # Errors
/// When it is not that.
pub fn load_outputs(pair: &Pair, bytes: &[u8]) -> Result<(), ProtectionError> {
    pair.loaded(decode_outputs(bytes)?)
}

/// What a checkpoint of a primary's gates says of outputs. They hold what comes from then on.
///
/// # Errors
/// When it cannot be encoded.
pub fn encode_outputs(pair: &Pair, epoch: u64) -> Result<Vec<u8>, ProtectionError> {
    encode(&pair.cut(epoch, Duration::ZERO))
}

fn decode_outputs(bytes: &[u8]) -> Result<PairCut, ProtectionError> {
    decode(bytes, "outputs")
}

/// A part of a checkpoint.
pub(super) enum Part<'a> {
    Pages(&'a [u8]),
    Deltas(&'a [u8]),
    /// The first of the digests of parts of disks.
    Digests(Vec<u8>),
    Whole(Box<GuestState>, PairCut),
}

/// Receives checkpoints.
pub(super) struct Receiver {
    link: Link,
    payload: Vec<u8>,
    state: Option<Box<GuestState>>,
    cut: Option<PairCut>,
    /// Whether a primary that says nothing for a while is lost.
    hurried: bool,
}

impl Receiver {
    pub(super) fn new(link: Link) -> Self {
        Self {
            link,
            payload: Vec::new(),
            state: None,
            cut: None,
            hurried: false,
        }
    }

    /// Whether a primary that says nothing for a while is lost: one that sends a first checkpoint has something to
    /// say all the time.
    pub(super) fn expect_no_silence(&mut self, hurried: bool) {
        self.hurried = hurried;
    }

    pub(super) fn link(&mut self) -> &mut Link {
        &mut self.link
    }

    /// The next part that matters, whenever it comes. It is not waited for any more when that is `over`.
    pub(super) fn next(&mut self, over: &dyn Fn() -> bool) -> Result<Part<'_>, ProtectionError> {
        loop {
            let kind = match frame::receive(&mut self.link, &mut self.payload) {
                Ok(kind) => kind,
                Err(error) if is_silence(&error) && !self.hurried && !over() => continue,
                Err(error) => return Err(error.into()),
            };
            match kind {
                Kind::Pages => return Ok(Part::Pages(&self.payload)),
                Kind::Digests => return Ok(Part::Digests(std::mem::take(&mut self.payload))),
                Kind::Deltas => return Ok(Part::Deltas(&self.payload)),
                Kind::State => {
                    self.state = Some(Box::new(GuestState::from_bytes(&self.payload)?));
                }
                Kind::Outputs => self.cut = Some(decode_outputs(&self.payload)?),
                Kind::Complete => match (self.state.take(), self.cut.take()) {
                    (Some(state), Some(cut)) => return Ok(Part::Whole(state, cut)),
                    _ => return Err(wrong(kind)),
                },
                kind => return Err(wrong(kind)),
            }
        }
    }
}

fn wrong(kind: Kind) -> ProtectionError {
    ProtectionError::Garbled(format!("{kind:?} at the wrong time"))
}

/// Whether nothing came for a while, which between checkpoints is as it should be.
fn is_silence(error: &MigrationError) -> bool {
    matches!(error, MigrationError::Broken(error) if error.kind() == std::io::ErrorKind::WouldBlock)
}
