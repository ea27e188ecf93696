//! Checkpoints into the store beside a guest that runs: a thread with a writer, which is fed batches of
//! pages and never waited for.
//!
//! ```text
//!   begin > pages > pages > ... > commit   or   abandon, when the guest was reset meanwhile
//! ```
//!
//! The queue is bounded. When it is full, [`Uploads::offer`] gives the batch back: whoever captures the guest
//! waits with the next checkpoint, and the guest goes on. What was completed, or failed, is told by
//! [`Uploads::ends`]: once for each that was begun.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{
    Receiver, RecvTimeoutError, SyncSender, TryRecvError, TrySendError, channel, sync_channel,
};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tandem_vmm::migration::pages::{BATCH_PAGES, Batch};

use crate::frames::Frames;
use crate::manifest::Section;
use crate::write::{Committed, Upload, Writer};
use crate::{CheckpointId, Page, StoreError};

/// Jobs that may wait: batches of [`BATCH_PAGES`] pages, 64 MiB.
pub const JOBS_MAX: usize = (64 << 20) / (BATCH_PAGES * crate::PAGE);

/// What the thread is to do next.
pub enum Job {
    /// A checkpoint begins, with images of these names and bytes.
    Begin(Vec<(String, u64)>),
    /// Pages of an image, by its number, as they are now.
    Pages(usize, Batch),
    /// Page frames of the guest's memory, which is image 0.
    Frames(Batch),
    /// All pages came, and this is everything else.
    Commit {
        /// The description of the hardware.
        description: String,
        /// State beside the pages.
        sections: Vec<Section>,
    },
    /// The checkpoint that was begun will not be.
    Abandon,
}

/// How a checkpoint ended.
#[derive(Debug)]
pub enum End {
    /// It is complete in the store.
    Complete(Committed),
    /// It is not, or nobody knows. Pages that were written since `last` are to be written again.
    Failed {
        /// Why.
        error: StoreError,
        /// The newest checkpoint that is complete, if that could be found out.
        last: Result<Option<CheckpointId>, StoreError>,
    },
    /// It was not wanted any more.
    Abandoned,
}

/// A thread that makes checkpoints.
pub struct Uploads {
    jobs: Option<SyncSender<Job>>,
    ends: Receiver<End>,
    /// Jobs that were not begun.
    waiting: Arc<AtomicUsize>,
    thread: Option<JoinHandle<()>>,
}

/// Jobs as they are taken.
struct Work {
    jobs: Receiver<Job>,
    waiting: Arc<AtomicUsize>,
}

impl Work {
    /// The next one; nothing if there will be none.
    fn next(&self) -> Option<Job> {
        let job = self.jobs.recv().ok()?;
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        Some(job)
    }
}

impl Uploads {
    /// Starts the thread, for a guest whose memory has these frames. It calls `begin` first, such as to give
    /// up privileges.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn start(
        writer: Writer,
        frames: Frames,
        begin: impl FnOnce() -> std::io::Result<()> + Send + 'static,
    ) -> Result<Self, StoreError> {
        let (jobs, work) = sync_channel(JOBS_MAX);
        let (tell, ends) = channel();
        let waiting = Arc::<AtomicUsize>::default();
        let work = Work {
            jobs: work,
            waiting: Arc::clone(&waiting),
        };
        let ended = |error: std::io::Error| StoreError::Ended {
            what: error.to_string(),
        };
        let thread = thread::Builder::new()
            .name("store-upload".into())
            .spawn(move || match begin() {
                Ok(()) => run(writer, &frames, &work, &|end| drop(tell.send(end))),
                Err(error) => drop(tell.send(End::Failed {
                    error: ended(error),
                    last: Ok(None),
                })),
            })
            .map_err(ended)?;
        Ok(Self {
            jobs: Some(jobs),
            ends,
            waiting,
            thread: Some(thread),
        })
    }

    /// Hands a job over; gives it back if too many wait.
    ///
    /// # Errors
    /// When the thread has ended.
    pub fn offer(&self, job: Job) -> Result<Option<Job>, StoreError> {
        let gone = || StoreError::Ended {
            what: "it takes no more".to_owned(),
        };
        let jobs = self.jobs.as_ref().ok_or_else(gone)?;
        // Before it can be taken.
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let offered = match jobs.try_send(job) {
            Ok(()) => return Ok(None),
            Err(TrySendError::Full(job)) => Ok(Some(job)),
            Err(TrySendError::Disconnected(_)) => Err(gone()),
        };
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        offered
    }

    /// Jobs that were not begun.
    pub fn waiting(&self) -> usize {
        self.waiting.load(Ordering::SeqCst)
    }

    /// How the next checkpoint ended, if one has.
    ///
    /// # Errors
    /// When the thread has ended, and all was told.
    pub fn ends(&self) -> Result<Option<End>, StoreError> {
        match self.ends.try_recv() {
            Ok(end) => Ok(Some(end)),
            Err(TryRecvError::Empty) => Ok(None),
            Err(TryRecvError::Disconnected) => Err(StoreError::Ended {
                what: "all checkpoints were told of".to_owned(),
            }),
        }
    }

    /// How the next checkpoint ended, if one does within `time`.
    ///
    /// # Errors
    /// As [`Uploads::ends`].
    pub fn end_within(&self, time: Duration) -> Result<Option<End>, StoreError> {
        match self.ends.recv_timeout(time) {
            Ok(end) => Ok(Some(end)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => self.ends(),
        }
    }

    /// Waits for the end of the next checkpoint.
    ///
    /// # Errors
    /// As [`Uploads::ends`].
    pub fn wait(&self) -> Result<End, StoreError> {
        self.ends.recv().map_err(|_| StoreError::Ended {
            what: "all checkpoints were told of".to_owned(),
        })
    }
}

impl Drop for Uploads {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            // A panic there was printed.
            drop(thread.join());
        }
    }
}

/// Makes checkpoints until nobody wants any more.
fn run(mut writer: Writer, frames: &Frames, work: &Work, tell: &dyn Fn(End)) {
    while let Some(job) = work.next() {
        // What belongs to a checkpoint that failed goes by.
        let Job::Begin(images) = job else {
            continue;
        };
        match one(&mut writer, frames, &images, work) {
            Ok(None) => match writer.reopen() {
                Ok(_) => tell(End::Abandoned),
                Err(error) => tell(failed(&mut writer, error)),
            },
            Ok(Some(committed)) => tell(End::Complete(committed)),
            Err(error) => tell(failed(&mut writer, error)),
        }
    }
}

fn failed(writer: &mut Writer, error: StoreError) -> End {
    let last = writer.reopen();
    End::Failed { error, last }
}

/// Makes a checkpoint; nothing if it was abandoned.
fn one(
    writer: &mut Writer,
    frames: &Frames,
    images: &[(String, u64)],
    work: &Work,
) -> Result<Option<Committed>, StoreError> {
    let images: Vec<(&str, u64)> = images
        .iter()
        .map(|(name, bytes)| (&**name, *bytes))
        .collect();
    if writer.is_broken() {
        writer.reopen()?;
    }
    let mut upload = writer.begin(&images)?;
    loop {
        match work.next() {
            Some(Job::Pages(image, batch)) => put(&mut upload, image, batch.pages())?,
            Some(Job::Frames(batch)) => {
                let pages = batch.pages().map(|(frame, content)| {
                    // A frame that the guest does not have is refused as a page that it does not.
                    (frames.page(frame).unwrap_or(u64::MAX), content)
                });
                put(&mut upload, 0, pages)?;
            }
            Some(Job::Commit {
                description,
                sections,
            }) => return upload.commit(&description, sections).map(Some),
            Some(Job::Abandon) | None => return Ok(None),
            Some(Job::Begin(_)) => {
                return Err(StoreError::Ended {
                    what: "a checkpoint began before the one before it ended".to_owned(),
                });
            }
        }
    }
}

fn put<'a>(
    upload: &mut Upload<'_>,
    image: usize,
    pages: impl Iterator<Item = (u64, Option<&'a Page>)>,
) -> Result<(), StoreError> {
    for (number, content) in pages {
        upload.page(image, number, content)?;
    }
    Ok(())
}
