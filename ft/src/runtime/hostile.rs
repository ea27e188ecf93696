//! What each side of a pair makes of what the other one says, without guests: for who says what no peer would.
//!
//! ```text
//!   connection of messages      PrimaryEnd, SecondaryEnd: all that is between the socket and the role
//!   connection of checkpoints   serve_disks, serve_pages; take_checkpoints, take_disks, want_pages
//!   the keeper's                take_late_frames, crate::keeper::is_told_of_takeover
//! ```
//!
//! How a connection begins is said to [`Invitation::hear`](super::Invitation::hear) and
//! [`Invitation::accept`](super::Invitation::accept).

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use roaring::RoaringTreemap;
use tandem_devices::GuestMemory;
use tandem_vmm::confinement::{Confinement, ThreadKind};
use tandem_vmm::control::Handle;
use tandem_vmm::dirty::PageSet;
use tandem_vmm::migration::{Hello, Link};
use tandem_vmm::snapshot::HardwareState;

use super::checkpoint::{Part, Receiver};
use super::image::Image;
use super::pair::PairCut;
use super::primary;
use super::secondary::{self, Standby};
use super::{Claims, Offer, Pair, ProtectionError, ResyncMode, late, wanted};
use crate::arbiter::{Arbiter, ArbiterError, Claim, Claimant, Owner, Tenure, Term};
use crate::delta::Encoder;
use crate::gate::overlay;
use crate::link::MessageError;
use crate::mirror;
use crate::pair::{Epoch, PrimaryEvent, PrimaryState, SecondaryEvent, SecondaryState};

/// How long a primary that is asked for pages waits for what it is asked.
const PATIENCE: Duration = Duration::from_secs(5);
/// The checkpoint from which both sides go on.
const FIRST: Epoch = Epoch(1);

/// Gives every term to whoever asks.
struct Generous;

impl Arbiter for Generous {
    fn current(&self, _guest: &str) -> Result<Option<Tenure>, ArbiterError> {
        Ok(None)
    }

    fn claim(&self, _guest: &str, _term: Term, _owner: &Owner) -> Result<Claim, ArbiterError> {
        Ok(Claim::Won)
    }
}

/// Who is given every term.
pub(super) fn claims() -> Claims {
    let owner = Owner {
        claimant: Claimant::from_bytes([7; 16]),
        host: "here".into(),
    };
    Claims::new(Box::new(Generous), "guest", owner)
}

/// A standby for a guest without disks.
pub fn standby() -> Standby {
    Standby {
        claims: claims(),
        disks: Vec::new(),
        standbys: None,
        keys: None,
        confinement: Confinement::none().entry(ThreadKind::Protection),
    }
}

/// A connection on which the other side `said` this, and its other end.
///
/// # Errors
/// When the host has no descriptors left, or that was too much for a socket.
pub fn open_link_with(said: &[u8]) -> io::Result<(Link, UnixStream)> {
    let (near, mut far) = UnixStream::pair()?;
    far.set_nonblocking(true)?;
    far.write_all(said)?;
    Ok((Link::Unix(near), far))
}

/// The same, of another side that says no more.
///
/// # Errors
/// As [`open_link_with`].
pub fn link_with(said: &[u8]) -> io::Result<(Link, UnixStream)> {
    let (link, far) = open_link_with(said)?;
    far.shutdown(Shutdown::Write)?;
    Ok((link, far))
}

/// The primary of a pair whose secondary runs on from the first checkpoint.
pub struct PrimaryEnd {
    core: Arc<primary::Core>,
}

impl PrimaryEnd {
    /// With the gates `pair`.
    ///
    /// # Errors
    /// When the host has no descriptors left.
    pub fn new(pair: &Arc<Pair>) -> io::Result<Self> {
        let core = primary::Core::alone(
            Arc::clone(pair),
            Handle::to_nobody()?,
            claims(),
            Term::FIRST,
        );
        core.event(PrimaryEvent::Joined);
        pair.cut(FIRST.0, PATIENCE);
        core.event(PrimaryEvent::CutDone(FIRST));
        core.event(PrimaryEvent::Loaded(FIRST));
        Ok(Self { core })
    }

    /// Hears what the secondary `said` before it was gone. True if the guest is alone then, as it must be.
    ///
    /// # Errors
    /// When the host has no descriptors left.
    pub fn hear(self, said: &[u8]) -> io::Result<bool> {
        let (link, _far) = link_with(said)?;
        self.core.pair.outbox().connect(link.try_clone()?, true);
        primary::talk(&self.core, &link);
        Ok(self.core.state() == PrimaryState::Alone)
    }
}

/// The secondary of a pair, which runs on from the first checkpoint.
pub struct SecondaryEnd {
    core: Arc<secondary::Core>,
    link: Link,
    _far: UnixStream,
}

impl SecondaryEnd {
    /// With the gates `pair`, and a primary that `said` this before it was gone.
    ///
    /// # Errors
    /// When the host has no descriptors left.
    pub fn new(pair: &Arc<Pair>, said: &[u8]) -> Result<Self, ProtectionError> {
        let failed = ProtectionError::host("make a connection");
        let (link, far) = link_with(said).map_err(failed)?;
        let share = || {
            link.try_clone()
                .map_err(ProtectionError::host("share a connection"))
        };
        pair.become_secondary();
        let links = (share()?, share()?);
        let core = secondary::Core::new(&offer(), standby(), pair, links, None)?;
        core.event(SecondaryEvent::Cut(FIRST));
        core.event(SecondaryEvent::Staged(FIRST));
        pair.loaded(PairCut {
            epoch: FIRST.0,
            ..PairCut::default()
        })?;
        core.event(SecondaryEvent::Loaded(FIRST));
        Ok(Self {
            core,
            link,
            _far: far,
        })
    }

    /// Hears what was said. True if the guest is live here then, or ended as the primary may say.
    pub fn hear(self) -> bool {
        secondary::talk(Arc::clone(&self.core), &self.link);
        matches!(
            self.core.state(),
            SecondaryState::Live(_) | SecondaryState::Ended
        )
    }
}

/// What a primary offers of a guest without anything.
pub(super) fn offer() -> Offer {
    Offer {
        token: 1,
        keeper: false,
        disks: Vec::new(),
        shared: Vec::new(),
        term: Term::FIRST.0,
        standbys: Vec::new(),
        here: 0,
        mode: ResyncMode::Running,
        modes: None,
        bases: None,
        store: None,
        paced: false,
        heard: true,
        path: None,
        sectors: false,
        hello: Hello {
            description: String::new(),
            hardware: HardwareState {
                tandem: "0".into(),
                name: "guest".into(),
                cpus: 1,
                memory: 1 << 20,
                devices: Vec::new(),
            },
            company: None,
        },
    }
}

/// What a side has said, and room for what it is told.
struct Script<'a> {
    said: &'a [u8],
    told: u64,
}

impl<'a> Script<'a> {
    fn new(said: &'a [u8]) -> Self {
        Self { said, told: 0 }
    }
}

impl Read for Script<'_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        self.said.read(room)
    }
}

impl Write for Script<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.told += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn grain(by_sectors: bool) -> mirror::Grain {
    match by_sectors {
        true => mirror::Grain::Sectors,
        false => mirror::Grain::Blocks,
    }
}

/// What a primary makes of what a secondary says to digests of all of its one disk, the first `bytes` of `file`. Gives
/// the bytes that it told.
///
/// # Errors
/// When that is not what a secondary says.
pub fn serve_disks(
    file: File,
    bytes: u64,
    said: &[u8],
    by_sectors: bool,
) -> Result<u64, ProtectionError> {
    let images = [mirror::Image::new(0, Arc::new(file), bytes)];
    let mut script = Script::new(said);
    let regions = mirror::bitmap::Regions::of(bytes).all();
    let parts = mirror::parts_of(&images[0], &regions);
    mirror::reconcile(&mut script, &images, (0, grain(by_sectors)), parts, || true)?;
    Ok(script.told)
}

/// What a secondary, whose guest wrote the blocks `own` of its one disk, makes of what a primary says of disks. Gives
/// the bytes that it took.
///
/// # Errors
/// When that is not what a primary says.
pub fn take_disks(
    replica: &Path,
    bytes: u64,
    own: &[u32],
    said: &[u8],
    by_sectors: bool,
) -> Result<u64, ProtectionError> {
    let (_lock, image) = mirror::open(replica, 0, bytes)?;
    let images = [image];
    let blocks = own.iter().map(|block| u64::from(*block));
    let sectors = blocks.flat_map(|block| {
        let first = block * mirror::BLOCK_SECTORS;
        first..first + mirror::BLOCK_SECTORS
    });
    let own = vec![(0, sectors.collect::<RoaringTreemap>())];
    let mut taken = 0;
    let mut script = Script::new(said);
    let mut take = |image: &mirror::Image, extent: mirror::Extent, part: &[u8]| {
        taken += part.len() as u64;
        image.write(extent, part)
    };
    mirror::answer(
        &mut script,
        &images,
        (0, grain(by_sectors)),
        None,
        own,
        &mut take,
    )?;
    Ok(taken)
}

/// What a primary makes of what a secondary wants of its `memory`. Gives the bytes that it sent.
///
/// # Errors
/// When that is not what a secondary says.
pub fn serve_pages(memory: &Arc<GuestMemory>, said: &[u8]) -> Result<u64, ProtectionError> {
    let (mut link, _far) = link_with(said).map_err(ProtectionError::host("make a connection"))?;
    let mut encoder = Encoder::default();
    let deadline = Instant::now() + PATIENCE;
    wanted::give(&mut link, &mut encoder, memory, deadline, &|| true)
}

/// What a secondary that wants the pages `missing` makes of what a primary says.
///
/// # Errors
/// When that is not what a primary says.
pub fn want_pages(
    memory: &Arc<GuestMemory>,
    beside: Arc<GuestMemory>,
    missing: PageSet,
    said: &[u8],
) -> Result<(), ProtectionError> {
    let (link, _far) = link_with(said).map_err(ProtectionError::host("make a connection"))?;
    let mut image = Image::new(ResyncMode::Stopped, memory, beside);
    image.begin(memory)?;
    let Image::Staged(stage) = &mut image else {
        return Err(ProtectionError::Garbled("an image of another kind".into()));
    };
    wanted::want(&mut Receiver::new(link, None), stage, missing, &|| true)
}

/// What a secondary, whose guest has `memory`, makes of one checkpoint after the other; its guest writes `own` pages
/// before each. Gives how many it took, and why there was no other.
pub fn take_checkpoints(
    mode: ResyncMode,
    memory: &Arc<GuestMemory>,
    beside: Arc<GuestMemory>,
    own: &PageSet,
    said: &[u8],
) -> (u64, ProtectionError) {
    let mut taken = 0;
    let took = take_each(mode, memory, beside, own, said, &mut taken);
    (taken, took.unwrap_or_else(|error| error))
}

/// Counts those that it took in `taken`. Gives why there was no other.
fn take_each(
    mode: ResyncMode,
    memory: &Arc<GuestMemory>,
    beside: Arc<GuestMemory>,
    own: &PageSet,
    said: &[u8],
    taken: &mut u64,
) -> Result<ProtectionError, ProtectionError> {
    let (link, _far) = link_with(said).map_err(ProtectionError::host("make a connection"))?;
    let mut receiver = Receiver::new(link, None);
    let mut image = Image::new(mode, memory, beside);
    image.begin(memory)?;
    loop {
        match receiver.next(&|| true) {
            Ok(Part::Pages(batch)) => image.apply(batch)?,
            Ok(Part::Deltas(deltas)) => image.change(deltas)?,
            Ok(Part::Unwritten(part)) => {
                if overlay::decode(part).is_none() {
                    let what = "writes that cannot be".to_owned();
                    return Err(ProtectionError::Garbled(what));
                }
            }
            Ok(Part::Digests(_) | Part::Changed(_)) => {
                let what = "disks without a checkpoint".to_owned();
                return Err(ProtectionError::Garbled(what));
            }
            Ok(Part::Whole(..)) => {
                if let Image::Staged(stage) = &mut image {
                    let missing = stage.recall(own)?;
                    wanted::want(&mut receiver, stage, missing, &|| true)?;
                }
                image.loader()(memory, own)?;
                image.loaded();
                *taken += 1;
            }
            Err(end) => return Ok(end),
        }
    }
}

/// What a secondary makes of what the primary's keeper says: why it hears nothing more.
///
/// # Errors
/// When the host has no descriptors left.
pub fn take_late_frames(pair: &Pair, said: &[u8]) -> io::Result<MessageError> {
    let (mut link, _far) = link_with(said)?;
    Ok(late::hear(pair, &mut link))
}
