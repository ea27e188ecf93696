//! Checkpoints on their connection: what is said first, and how each is sent and received.
//!
//! ```text
//!   primary                                            secondary
//!   call                                 ---------->   of which pair it is              (calls)
//!   preface: protection; Hello: Offer    ---------->   is there room for it?
//!                                        <----------   Accept, or Refuse and why
//!   call, preface: pairing, Hello        ---------->   on a connection of its own: messages  (link)
//!   call, preface: keeping, Hello        ---------->   on another, if it has a keeper       (keeper)
//!
//!   Digests, Blocks ...                 <--------->   all of its disks, if it has some     (mirror)
//!   Pages, while the guest runs          ---------->   the first checkpoint
//!   the guest is frozen; Cut             ---------->   on the connection of messages
//!   Deltas: the last pages               ---------->   put aside
//!   State, Outputs, Complete             ---------->   it is whole
//!   Digests, Blocks ... Synced          <--------->   what either wrote to disks
//!                                        <----------   Loaded, on the connection of messages
//!   Committed                            ---------->   once what it covers is out
//!
//!   Deltas, while the guest runs         ---------->   each further checkpoint, from here on
//!   the guest is frozen; Cut             ---------->
//!   Deltas, State, Outputs, Complete     ---------->   its guest stands
//!                                        <----------   Wanted, if it keeps no second image  (wanted)
//!   Deltas: just those                   ---------->
//!   Digests, Blocks ... Synced          <--------->
//!                                        <----------   Loaded
//! ```
//!
//! Meanwhile the secondary says on the connection of messages what it has taken of this one (`Taken`), and no more is on its
//! way than a [`window`](crate::link::window).
//!
//! Frames are those of [`frame`]. Offer, Greeting and Outputs are MessagePack, structures as maps with the names of
//! their fields; State is that of snapshots ([`tandem_vmm::snapshot`]).
//!
//! # Versions
//!
//! The preface has the version of all of that; another one is refused by its number. What is added later is a field of the
//! Offer, by which a primary says that it knows of it. A standby of an older version refuses a field that it does not
//! know by its name, and is offered the same without it (`Offer::forgo`); a primary of an older version does not say it,
//! and hears nothing of what came with it. `golden` has what each version said.
//!
//! | field | since | without it |
//! |---|---|---|
//! | `modes` | checkpoints as a mode | both copies run |
//! | `paced` | windows | checkpoints are sent as fast as the socket takes them |
//! | `heard` | windows of messages | inputs and outputs are sent as fast as the socket takes them, and up to some MiB wait |
//! | `path`, `second` of a standby | second paths | there is one path |
//! | `sectors` | groups | disks are compared, and sent, by parts of whole blocks |

use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tandem_vmm::migration::frame::{self, Kind, Purpose};
use tandem_vmm::migration::{Hello, Link, MigrationError};
use tandem_vmm::snapshot::GuestState;

use super::awaited::Awaited;
use super::calls::CALLS_TIMEOUT;
use super::pacing::Counted;
use super::pair::PairCut;
use super::shared::SharedOffer;
use super::stored::Stored;
use super::{Pair, ProtectionError, ResyncMode};
use crate::mirror::{Base, Grain};
use crate::mode::Wish;
use crate::pair::NUMBER_MAX;

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
    /// Disks that the guest may write to whose images are reached from here too, if there are any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shared: Vec<SharedOffer>,
    /// Number of the guest's owner.
    pub term: u64,
    /// Where its standbys listen, for whoever owns it next; see [`super::Standbys`].
    pub standbys: Vec<super::Place>,
    /// Which of them the primary says this to.
    pub here: u64,
    /// What of a resync the guest waits for: if for all of it, it can be asked for pages meanwhile.
    pub mode: ResyncMode,
    /// The mode that is asked for; none from a primary that knows of lockstep alone, or says so to a secondary that
    /// does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub modes: Option<Wish>,
    /// Bases that the disks have, and what may differ is told; none from a primary that knows of no bases, or to a
    /// secondary that does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bases: Option<Vec<(u8, Vec<Base>)>>,
    /// Where checkpoints of the guest go, which the secondary is to make; none from a primary that has no store.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub store: Option<Stored>,
    /// Whether it wants to hear what was taken of its checkpoints; not so from a primary that knows of no such thing.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub paced: bool,
    /// Whether either side says what it has heard of the connection of messages; not so from a primary that knows of no such
    /// thing.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub heard: bool,
    /// By which path this is said, if there is a second one; none from a primary that knows of one path, or has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<u8>,
    /// Whether sectors of disks are compared, many at once (see [`crate::mirror`]); not so by a primary that compares blocks.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub sectors: bool,
    /// The guest.
    pub hello: Hello,
}

impl Offer {
    /// Does without what a standby of an older version refused, which names what it does not know. False if that is
    /// none of what can be done without.
    pub(super) fn forgo(&mut self, refusal: &ProtectionError) -> bool {
        match unknown_to(refusal) {
            Some("modes") => self.modes.take().is_some(),
            Some("bases") => self.bases.take().is_some(),
            Some("paced") => std::mem::take(&mut self.paced),
            Some("heard") => std::mem::take(&mut self.heard),
            Some("path") => self.path.take().is_some(),
            Some("second") => self.forget_seconds(),
            Some("sectors") => std::mem::take(&mut self.sectors),
            Some("budget") => {
                let stored = self.store.as_mut();
                stored.is_some_and(|stored| stored.budget.take().is_some())
            }
            _ => false,
        }
    }

    /// Tells of one path to each standby. False if it does so already.
    fn forget_seconds(&mut self) -> bool {
        let seconds = self.standbys.iter_mut().map(|place| place.second.take());
        seconds.fold(false, |any, second| any | second.is_some())
    }

    /// How both sides know what of disks differs.
    pub(super) fn grain(&self) -> Grain {
        match self.sectors {
            true => Grain::Sectors,
            false => Grain::Blocks,
        }
    }
}

/// What a standby says that it does not know, of what it was told.
fn unknown_to(refusal: &ProtectionError) -> Option<&str> {
    let ProtectionError::Transfer(MigrationError::Refused(why)) = refusal else {
        return None;
    };
    let (_, named) = why.split_once("unknown field `")?;
    named.split('`').next()
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

/// Hears what [`greet`] says, within [`CALLS_TIMEOUT`], however little at a time.
pub(super) fn hear<T: for<'a> Deserialize<'a>>(
    link: &mut Link,
    purpose: Purpose,
) -> Result<T, ProtectionError> {
    let mut link = Awaited {
        link,
        deadline: Instant::now() + CALLS_TIMEOUT,
        waits: &|| true,
    };
    frame::receive_preface(&mut link, purpose)?;
    let mut payload = Vec::new();
    match frame::receive(&mut link, &mut payload)? {
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
    let cut: PairCut = decode(bytes, "outputs")?;
    expect_number("checkpoint", cut.epoch)?;
    Ok(cut)
}

/// There are no numbers so large, and none behind the largest.
pub(super) fn expect_number(what: &str, number: u64) -> Result<(), ProtectionError> {
    if number <= NUMBER_MAX {
        return Ok(());
    }
    let what = format!("{what} {number}; allowed are numbers up to {NUMBER_MAX}");
    Err(ProtectionError::Garbled(what))
}

/// A part of a checkpoint.
pub(super) enum Part<'a> {
    Pages(&'a [u8]),
    Deltas(&'a [u8]),
    /// Writes that it covers and that are not in shared images.
    Unwritten(&'a [u8]),
    /// The first of the digests of parts of disks.
    Digests(Vec<u8>),
    /// What of a disk may differ.
    Changed(Vec<u8>),
    Whole(Box<GuestState>, PairCut),
}

/// Receives checkpoints.
pub(super) struct Receiver {
    link: Counted,
    payload: Vec<u8>,
    state: Option<Box<GuestState>>,
    cut: Option<PairCut>,
    /// Whether a primary that says nothing for a while is lost.
    hurried: bool,
}

impl Receiver {
    /// Who wants to know what was taken is told over the outbox of `to`.
    pub(super) fn new(link: Link, to: Option<Arc<Pair>>) -> Self {
        Self {
            link: Counted::new(link, to),
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

    pub(super) fn link(&mut self) -> &mut Counted {
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
                Kind::Changed => return Ok(Part::Changed(std::mem::take(&mut self.payload))),
                Kind::Deltas => return Ok(Part::Deltas(&self.payload)),
                Kind::Unwritten => return Ok(Part::Unwritten(&self.payload)),
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

#[cfg(test)]
mod tests {
    use tandem_vmm::snapshot::HardwareState;

    use super::*;
    use crate::mode::Choice;
    use crate::runtime::{Budget, Place};

    /// Where one listens that has one address.
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    #[expect(dead_code, reason = "only whether it is taken matters")]
    struct OldPlace {
        address: String,
        name: Option<String>,
    }

    /// What a version took that knew of this besides what the first one did.
    macro_rules! taken_before {
        ($(#[$what:meta])* $name:ident { $($field:ident: $type:ty)? }) => {
            $(#[$what])*
            #[derive(Deserialize)]
            #[serde(deny_unknown_fields)]
            #[expect(dead_code, reason = "only whether it is taken matters")]
            struct $name {
                token: u128,
                keeper: bool,
                disks: Vec<(u8, u64)>,
                term: u64,
                standbys: Vec<OldPlace>,
                here: u64,
                mode: ResyncMode,
                $($field: $type,)?
                hello: Hello,
            }
        };
    }
    taken_before! {
        /// One that knew of lockstep alone, and of no pace.
        Oldest {}
    }
    taken_before! {
        /// One that knew of all modes.
        Older { modes: Option<Wish> }
    }

    taken_before! {
        /// One that knew of stores, and of no budgets.
        Storing { store: Option<StoredAt> }
    }

    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    #[expect(dead_code, reason = "only whether it is taken matters")]
    struct StoredAt {
        place: String,
        key: Option<std::path::PathBuf>,
        kin: u64,
        every_ms: u64,
    }

    fn offer(modes: Option<Wish>) -> Offer {
        let hardware = HardwareState {
            tandem: "0".into(),
            name: "guest".into(),
            cpus: 1,
            memory: 1 << 20,
            devices: Vec::new(),
        };
        Offer {
            token: 1,
            keeper: false,
            disks: Vec::new(),
            shared: Vec::new(),
            term: 1,
            standbys: vec![Place {
                address: "10.0.0.1:1".into(),
                name: None,
                second: Some("10.1.0.1:1".into()),
            }],
            here: 0,
            mode: ResyncMode::Running,
            modes,
            bases: None,
            store: None,
            paced: true,
            heard: true,
            path: Some(0),
            sectors: true,
            hello: Hello {
                description: String::new(),
                hardware,
                company: None,
            },
        }
    }

    /// What is left of an offer that a standby takes which understands it as `T`.
    fn taken_by<T: for<'a> Deserialize<'a>>(mut offer: Offer) -> Offer {
        loop {
            let bytes = encode(&offer).unwrap();
            let Err(refused) = decode::<T>(&bytes, "a greeting") else {
                return decode(&bytes, "a greeting").unwrap();
            };
            // What is told goes through the link as text.
            let told = MigrationError::Refused(refused.to_string());
            assert!(offer.forgo(&told.into()), "{refused}");
        }
    }

    #[test]
    fn older_standbys_are_offered_what_they_know() {
        let wish = Some(Wish::of(Choice::Checkpoint));
        let left = taken_by::<Oldest>(offer(wish));
        assert_eq!((left.modes, left.paced, left.sectors), (None, false, false));
        assert_eq!((left.path, &left.standbys[0].second), (None, &None));
        let left = taken_by::<Older>(offer(wish));
        assert_eq!((left.modes, left.paced, left.heard), (wish, false, false));
        let left = taken_by::<Offer>(offer(wish));
        assert_eq!((left.modes, left.paced, left.sectors), (wish, true, true));
        assert!(left.heard);
        assert_eq!(left.path, Some(0));
        assert!(left.standbys[0].second.is_some());
        // Nor does a checkpoint say anything of modes to one that knows none.
        let cut = encode(&PairCut::default()).unwrap();
        assert!(!cut.windows(5).any(|part| part == b"modes"));
    }

    #[test]
    fn older_standbys_make_checkpoints_for_a_store_at_an_interval() {
        let stored = Stored {
            place: "/shared".into(),
            key: None,
            kin: 1,
            every_ms: 1000,
            budget: Some(Budget::default()),
        };
        let offered = || Offer {
            store: Some(stored.clone()),
            ..offer(None)
        };
        let left = taken_by::<Storing>(offered()).store.unwrap();
        assert_eq!((left.budget, left.every_ms), (None, 1000));
        let left = taken_by::<Offer>(offered()).store.unwrap();
        assert_eq!(left.budget, stored.budget);
    }

    #[test]
    fn nothing_else_is_done_without() {
        let whys = [
            "there is no room for the `modes` of it",
            "unknown field `hello`, expected `modes`",
            "unknown field `",
        ];
        for why in whys {
            let mut offer = offer(Some(Wish::default()));
            let refused = MigrationError::Refused(why.into());
            assert!(!offer.forgo(&refused.into()), "{why}");
            assert!(offer.modes.is_some() && offer.paced);
        }
    }
}
