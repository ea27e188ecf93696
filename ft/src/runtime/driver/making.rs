//! One checkpoint of a primary's guest, step by step.
//!
//! ```text
//!   stop > cut > thaw > send                               the guest runs on while it is sent
//!   stop > cut > send > give what is asked for > thaw      with `--resync stopped`: it stands until the other has all
//! ```

use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use roaring::RoaringTreemap;
use tandem_vmm::control::{FreezeTimes, Frozen};
use tandem_vmm::dirty::PAGE_SIZE;
use tandem_vmm::kvm::standing::Stand;
use tandem_vmm::migration::frame;
use tandem_vmm::migration::pages::PageSender;
use tandem_vmm::snapshot::SnapshotError;
use tandem_vmm::snapshot::save::{PageSink, Session, Stopped};

use super::{Connected, Driver};
use crate::delta::Ahead;
use crate::link::Kind;
use crate::mirror::{self, Base, Grain, Image, Traffic};
use crate::mode::Mode;
use crate::pair::{Cause, Epoch};
use crate::runtime::checkpoint::encode_rest;
use crate::runtime::loading::Load;
use crate::runtime::modes::Made;
use crate::runtime::pacing::Paced;
use crate::runtime::pair::PairCut;
use crate::runtime::protector::ResyncMode;
use crate::runtime::{Pair, ProtectionError};

/// How long the copy of one side may stay behind the other with an output.
const PATIENCE: Duration = Duration::from_millis(50);
/// How long copying the last pages of the first checkpoint may take while the guest stands.
const FIRST_STAND_BUDGET: Duration = Duration::from_millis(5);
/// Pages that are copied while the guest runs before a checkpoint, if it wrote more than that: a page costs the guest
/// 1 to 2 us while it stands.
const STAGED_PAGES_MAX: u64 = 512;
/// Room for staged pages that is kept between checkpoints, in bytes.
const STAGING_KEPT: usize = 4 << 20;
/// Rounds of that at most: a guest may write faster than memory is copied.
const ROUNDS_MAX: u32 = 8;
/// How often a checkpoint becomes one since which is known what changed: what is not written any more is not compared
/// when a secondary comes back.
const BASE_INTERVAL: Duration = Duration::from_secs(60);

/// What of a guest's memory is copied before it is frozen.
pub(super) enum Copying {
    /// All of it.
    All,
    /// What it wrote, until that is little.
    WhileMuch,
    /// Nothing: it stands already.
    Standing(Box<Frozen>),
}

impl Driver<'_> {
    /// Makes the secondary the same as the primary; nothing if that is gone meanwhile.
    ///
    /// # Errors
    /// When the secondary is lost, or the guest cannot be stopped or was reset meanwhile.
    pub(super) fn try_checkpoint(
        &self,
        connected: &mut Connected<'_>,
        epoch: Epoch,
        cause: Cause,
        copying: Copying,
    ) -> Result<(), ProtectionError> {
        let mut making = Making::begin(&self.core.pair, epoch, cause);
        let stopped = connected.stop(copying, &mut making)?;
        let mut load = connected.load(&making, &stopped);
        load.disks |= self.core.pair.shares_disks();
        if !self.core.cut(epoch, &load) {
            // The secondary is gone meanwhile.
            connected.encoder.forget();
            connected.session.thaw()?;
            return Ok(());
        }
        let (cut, disks) = self.cut(connected, &making, &stopped.frozen);
        // A copy that stood has written nothing that it would have to ask for.
        let stand = match (self.mode, making.before) {
            (ResyncMode::Stopped, Mode::Lockstep) => None,
            _ => Some(connected.session.thaw()?),
        };
        connected.send(&stopped, &cut, disks, &mut making)?;
        let stand = match stand {
            Some(stand) => stand,
            None => self.stand_until_loaded(connected, &mut making)?,
        };
        if cause != Cause::Join {
            self.count(making, stand.until - stand.from);
        }
        Ok(())
    }

    /// Cuts what the guest, which stands, says and writes: what was before belongs to the checkpoint.
    fn cut(
        &self,
        connected: &mut Connected<'_>,
        making: &Making,
        frozen: &Frozen,
    ) -> (PairCut, DisksStand<'_>) {
        let pair = &self.core.pair;
        let number = making.epoch.0;
        let mut cut = pair.cut(number, PATIENCE);
        let disks = DisksStand::begin(pair);
        let due = making.cause == Cause::Join
            || connected.based.elapsed() >= BASE_INTERVAL && pair.may_propose();
        if connected.told.is_some() && due {
            let token = connected.token;
            pair.propose(Base { token, number });
            connected.based = Instant::now();
            cut.is_base = true;
        }
        let FreezeTimes { stop, quiesce, .. } = frozen.times;
        cut.age = (frozen.since + stop + quiesce).elapsed();
        pair.outbox().tell(Kind::Cut, 0, number);
        (cut, disks)
    }

    /// Lets the guest go on once its secondary, which stands too, has all of the checkpoint.
    fn stand_until_loaded(
        &self,
        connected: &mut Connected<'_>,
        making: &mut Making,
    ) -> Result<Stand, ProtectionError> {
        // A new secondary has written nothing.
        if making.cause != Cause::Join {
            let memory = Arc::clone(&connected.session.saving().memory);
            let given = self.give(&mut connected.checkpoints, &mut connected.encoder, &memory);
            making.rest += given?;
        }
        self.wait_loaded();
        Ok(connected.session.thaw()?)
    }

    /// Counts a checkpoint that was made, for which the guest stood for `pause`.
    fn count(&self, making: Making, pause: Duration) {
        let pair = &self.core.pair;
        let Making {
            epoch,
            sending,
            pages,
            bytes,
            rest,
            mirrored,
            ..
        } = making;
        pair.modes().made(Made {
            pause,
            sending,
            pages,
        });
        let why = making.why();
        tracing::debug!(%epoch, %why, ?pause, pages, bytes, mirrored, "checkpoint");
        let mut status = pair.lock_status();
        status.resyncs += 1;
        status.last_resync = Some(why);
        status.pauses.add(pause);
        status.count_sent(pages, bytes, rest);
    }
}

/// A checkpoint that is being made.
struct Making {
    epoch: Epoch,
    cause: Cause,
    began: Instant,
    /// The mode before it.
    before: Mode,
    /// What was different of what both sides said, if something was.
    difference: Option<String>,
    /// How long it took until all was sent.
    sending: Duration,
    /// Pages that were sent, and bytes for them.
    pages: u64,
    bytes: u64,
    /// Bytes of state and outputs, and of what the secondary asked for.
    rest: u64,
    /// Bytes of disks.
    mirrored: u64,
}

impl Making {
    /// Begins one, and tells what differed.
    fn begin(pair: &Pair, epoch: Epoch, cause: Cause) -> Self {
        let began = Instant::now();
        let difference = pair.mismatch();
        if let Some(difference) = &difference {
            pair.happened("differed", difference.clone());
            pair.lock_status().last_difference = Some(difference.clone());
        }
        Self {
            epoch,
            cause,
            began,
            before: pair.modes().mode(),
            difference,
            sending: Duration::ZERO,
            pages: 0,
            bytes: 0,
            rest: 0,
            mirrored: 0,
        }
    }

    /// Why it is made.
    fn why(self) -> String {
        self.difference.unwrap_or_else(|| match self.cause {
            Cause::Mismatch => "the outputs before differed each time".into(),
            Cause::Outputs => "outputs waited for it".into(),
            Cause::Mode => "another mode was to hold".into(),
            Cause::Store => "the store was to get one".into(),
            cause => format!("{cause:?}").to_lowercase(),
        })
    }
}

impl Connected<'_> {
    /// Stops the guest; what it wrote until little was left is sent before, the rest is staged.
    fn stop(&mut self, copying: Copying, making: &mut Making) -> Result<Stopped, ProtectionError> {
        let Self {
            session,
            checkpoints,
            staged,
            encoder,
            ..
        } = self;
        // A checkpoint that came to nothing may have left some.
        staged.clear(STAGING_KEPT);
        encoder.begin();
        Ok(match copying {
            Copying::Standing(frozen) => session.copy_rest(*frozen, staged)?,
            Copying::All => {
                // Nothing is remembered of so many pages, and they are not looked at.
                encoder.forget();
                let mut ahead = PageSender::new(checkpoints, session.saving().clone());
                session.precopy(&mut ahead, FIRST_STAND_BUDGET)?;
                copy_while_much(session, &mut ahead)?;
                session.freeze(staged)?
            }
            Copying::WhileMuch => {
                let memory = Arc::clone(&session.saving().memory);
                let mut ahead = Ahead::new(encoder, memory, checkpoints);
                copy_while_much(session, &mut ahead)?;
                (making.pages, making.bytes) = (ahead.pages, ahead.bytes);
                session.freeze(staged)?
            }
        })
    }

    /// What the secondary has to do with a checkpoint of the guest, which was just stopped.
    fn load(&self, making: &Making, stopped: &Stopped) -> Load {
        let all = self.session.saving().hardware.memory / PAGE_SIZE;
        Load {
            pages: match making.cause {
                Cause::Join => all,
                _ => making.pages + stopped.pages,
            },
            disks: !self.images.is_empty(),
            sending: making.began.elapsed(),
        }
    }

    /// Sends what the guest was when it stood; it may run by now.
    fn send(
        &mut self,
        stopped: &Stopped,
        cut: &PairCut,
        disks: DisksStand<'_>,
        making: &mut Making,
    ) -> Result<(), ProtectionError> {
        let Self {
            checkpoints,
            staged,
            encoder,
            images,
            token,
            grain,
            ..
        } = self;
        let pair = disks.pair;
        // The secondary takes the first pages while the others are encoded.
        making.pages += stopped.pages;
        making.bytes += encoder.send(staged.batch().pages(), checkpoints)?;
        making.bytes += pair.send_covered(checkpoints)?;
        let rest = encode_rest(&stopped.frozen.state, cut)?;
        checkpoints.write_all(&rest).map_err(frame::broken)?;
        making.rest = rest.len() as u64;
        let mirrored = disks.reconcile(checkpoints, images, (*token as u64, *grain))?;
        if let Some(mirror) = &mut pair.lock_status().mirror {
            mirror.written_bytes = disks.bytes;
            mirror.wire_bytes += mirrored.wire();
        }
        making.mirrored = mirrored.sent;
        drop(disks);
        staged.clear(STAGING_KEPT);
        making.sending = making.began.elapsed();
        Ok(())
    }
}

/// Disks that the guest does not write to, and what it wrote before.
struct DisksStand<'a> {
    pair: &'a Pair,
    /// Bytes that it wrote since the secondary joined.
    bytes: u64,
    written: Vec<(u8, RoaringTreemap)>,
}

impl<'a> DisksStand<'a> {
    /// The guest stands, and its requests are done.
    fn begin(pair: &'a Pair) -> Self {
        pair.hold_disks();
        let written = pair.take_written();
        let bytes = pair.disk_bytes_written();
        Self {
            pair,
            bytes,
            written,
        }
    }

    /// Makes the secondary's replicas what the guest's disks are.
    fn reconcile(
        &self,
        link: &mut Paced,
        images: &[Image],
        alike: (u64, Grain),
    ) -> Result<Traffic, ProtectionError> {
        if images.is_empty() {
            return Ok(Traffic::default());
        }
        let parts = mirror::parts_of_written(&self.written, alike.1);
        mirror::reconcile(link, images, alike, parts, || self.pair.disks_hold())
    }
}

impl Drop for DisksStand<'_> {
    fn drop(&mut self) {
        self.pair.let_disks_go();
    }
}

/// Copies what the guest writes while it runs, until that is little.
fn copy_while_much(
    session: &mut Session<'_>,
    sink: &mut impl PageSink,
) -> Result<(), SnapshotError> {
    let mut before = u64::MAX;
    for _ in 0..ROUNDS_MAX {
        let pages = session.pending()?;
        // Outputs wait for all rounds: one that leaves nearly as much as it found is not worth it.
        if pages <= STAGED_PAGES_MAX || pages > before / 4 * 3 {
            break;
        }
        session.copy_pending(sink)?;
        before = pages;
    }
    Ok(())
}
