//! How the outside talks to a running machine: a [`Handle`] sends commands to the thread that owns
//! the machine and waits, for a bounded time, for its answer.

use std::collections::BTreeMap;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tandem_devices::GuestMemory;
use tandem_devices::pace::Pace;
use vmm_sys_util::eventfd::EventFd;

use crate::dirty::{Follower, PAGE_SIZE, PageSet};
use crate::kvm::standing::{Stand, Standing};
use crate::machine::{LoadMemory, MemoryAhead, Replacement};
use crate::snapshot::{GuestState, HardwareState};

/// Longest wait for the machine's answer to a command.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// How often who waits for a halted guest's requests looks whether they are done.
const SETTLE_LOOK: Duration = Duration::from_micros(100);

/// Where a machine is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MachineState {
    /// vCPUs run.
    Running,
    /// vCPUs are stopped and no device works; nothing is lost.
    Paused,
    /// The machine is being taken down.
    Stopping,
}

impl std::fmt::Display for MachineState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopping => "stopping",
        })
    }
}

/// How a guest's run ended, when it did not end by an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// The guest powered itself off.
    PowerOff,
    /// The guest asked for a reset and the configuration says not to restart it.
    Reset,
    /// The user stopped it.
    Stopped,
    /// It goes on elsewhere.
    Left,
}

/// What a vCPU did so far.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuStats {
    /// Number of the vCPU, from 0.
    pub index: u8,
    /// Exits to the VMM by kind.
    pub exits: BTreeMap<String, u64>,
}

/// What a device did so far.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStats {
    /// Identifier, such as `disk0`, `net0`, `serial`.
    pub id: String,
    /// Kind of device, such as `block`.
    pub kind: String,
    /// How its completions are paced, if they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pace: Option<String>,
    /// Counters by name, such as `read_bytes`.
    pub counters: BTreeMap<String, u64>,
}

/// Counters of devices that count nothing: they go up and down.
const GAUGES: [&str; 6] = [
    "in_flight",
    "pace_waiting",
    "redo_bytes",
    "redo_full",
    "redo_layers",
    "tx_held_bytes",
];

impl DeviceStats {
    /// Whether what is called `counter` goes down, too.
    pub fn is_gauge(counter: &str) -> bool {
        GAUGES.contains(&counter)
    }
}

/// What a machine did so far.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineStats {
    /// Where the machine is in its life.
    pub state: MachineState,
    /// Time since the first guest instruction, in milliseconds.
    pub uptime_ms: u64,
    /// Time from the start of the process to the first guest instruction, in microseconds.
    pub start_us: u64,
    /// Times the guest was reset since the start.
    pub resets: u64,
    /// Per vCPU.
    pub vcpus: Vec<VcpuStats>,
    /// Per device.
    pub devices: Vec<DeviceStats>,
}

/// How to end a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StopMode {
    /// Press the power button and leave the rest to the guest.
    PowerButton,
    /// End the run now; disks are flushed first.
    Force,
}

/// A request to the thread that owns the machine.
#[derive(Debug)]
pub enum Command {
    /// Stop all vCPUs and devices.
    Pause,
    /// Stop all vCPUs alone.
    Halt,
    /// Say whether requests are done that were begun before.
    Settle,
    /// Run on.
    Resume,
    /// End the guest.
    Stop(StopMode),
    /// End the run now, since the guest goes on elsewhere.
    GiveUp,
    /// Report state and counters.
    Stats,
    /// Add a client to the serial console: it gets the recent output and all further output, and
    /// what it sends is input.
    AttachConsole(UnixStream),
    /// Make ready to save the guest: follow its writes to memory from now on.
    BeginSave,
    /// Both at once; if the guest is about to be reset, after that and before it runs.
    BeginFrozen,
    /// Stop the guest and read its state; it stays as it is until [`Command::Thaw`]. If it stands for another save,
    /// that ends first.
    Freeze(SaveId),
    /// Let a guest that was frozen for a save go on, if it ran before.
    Thaw(SaveId),
    /// Follow writes no longer for a save.
    EndSave(SaveId),
    /// Let a frozen guest's disks, taps and sockets go; this is its state. So many others may save it.
    Release(Box<GuestState>, usize),
    /// Take them again.
    Reacquire,
    /// Leave a released guest as it is, for the user to resume or to stop.
    Doubt,
    /// End a frozen guest that goes on elsewhere.
    Leave,
    /// Follow what a guest that is a copy writes.
    FollowCopy,
    /// Follow it no longer: the guest is the copy of none any more.
    FollowCopyNoMore,
    /// Let a guest that is a copy stand until it is replaced or goes on by itself, and tell what it wrote.
    Gather,
    /// Let a guest that is a copy go on from another state; it stands afterwards.
    Replace(Box<Replacement>),
    /// Put memory in place for a state that a copy may be given later; it stands.
    LoadAhead(MemoryAhead),
    /// The guest is a copy of none any more.
    GoLive,
    /// Pace the completions of the device of this name.
    Pace(String, Pace),
}

/// An answer to a [`Command`].
#[derive(Debug)]
pub enum Answer {
    /// Done.
    Done,
    /// Whether no request is under way.
    Settled(bool),
    /// State and counters.
    Stats(Box<MachineStats>),
    /// What it takes to copy the guest's memory.
    Saving(Saving),
    /// The guest's state.
    Frozen(Box<Frozen>),
    /// Both.
    BegunFrozen(Saving, Box<Frozen>),
    /// Pages that a guest wrote.
    Pages(PageSet),
    /// A guest was thawed: from when it began to stop until its vCPUs were let go, if it was to go on.
    Thawed(Stand),
}

/// Names a save of a guest. There may be several at a time, up to [`crate::dirty::FOLLOWERS_MAX`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SaveId(pub(crate) u64);

/// What it takes to copy the memory of a running guest.
#[derive(Clone)]
pub struct Saving {
    /// Which save it is.
    pub id: SaveId,
    /// Which pages are written.
    pub tracker: Follower,
    /// Guest memory.
    pub memory: Arc<GuestMemory>,
    /// How long each vCPU stood the last time.
    pub standings: Vec<Arc<Standing>>,
    /// What the guest is made of.
    pub hardware: HardwareState,
    /// Resets of the guest so far: a later one makes what was copied worthless.
    pub resets: u64,
}

impl Saving {
    /// Pages of guest memory.
    pub fn memory_pages(&self) -> u64 {
        self.hardware.memory / PAGE_SIZE
    }
}

impl std::fmt::Debug for Saving {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Saving")
            .field("resets", &self.resets)
            .finish_non_exhaustive()
    }
}

/// A guest that was stopped to be saved.
#[derive(Debug)]
pub struct Frozen {
    /// Its state.
    pub state: GuestState,
    /// When it began to stop.
    pub since: Instant,
    /// How long stopping and reading took.
    pub times: FreezeTimes,
    /// Whether it ran before.
    pub ran: bool,
    /// Resets of the guest so far.
    pub resets: u64,
}

/// How long the parts of a freeze took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FreezeTimes {
    /// Until all vCPUs stood.
    pub stop: Duration,
    /// Until all I/O in flight was finished.
    pub quiesce: Duration,
    /// Reading the state of KVM, vCPUs and devices.
    pub state: Duration,
}

/// Why a command was not carried out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// The machine is gone.
    #[error("the guest has ended")]
    Gone,
    /// No answer within [`ANSWER_TIMEOUT`].
    #[error("the guest's VMM did not answer within {} s", ANSWER_TIMEOUT.as_secs())]
    Timeout,
    /// The command does not fit the machine's state.
    #[error("the guest is {state}: {action} is possible only while it is {wanted}")]
    WrongState {
        /// What was asked for.
        action: &'static str,
        /// Where the machine is.
        state: MachineState,
        /// Where it should be.
        wanted: &'static str,
    },
    /// The guest was reset since it was begun to be saved.
    #[error("the guest was reset or ended while it was saved")]
    Overtaken,
    /// The machine tried and failed.
    #[error("{0}")]
    Failed(String),
}

/// Where the answer to a command goes.
pub(crate) type Reply = SyncSender<Result<Answer, ControlError>>;

pub(crate) struct Request {
    pub(crate) command: Command,
    pub(crate) reply: Reply,
}

/// Sends commands to one machine. Cheap to clone, usable from any thread.
#[derive(Clone)]
pub struct Handle {
    requests: Sender<Request>,
    wake: Arc<EventFd>,
}

impl Handle {
    /// A handle, and the end that the machine's thread reads; `wake` is written for each request.
    pub(crate) fn new(wake: Arc<EventFd>) -> (Self, Receiver<Request>) {
        let (requests, incoming) = channel();
        (Self { requests, wake }, incoming)
    }

    /// To no machine: each request is refused as by one that is gone. For what is told of guests where there is none.
    ///
    /// # Errors
    /// When the host has no descriptors left.
    pub fn to_nobody() -> std::io::Result<Self> {
        let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let (handle, _) = Self::new(Arc::new(wake));
        Ok(handle)
    }

    /// Sends `command` and waits for the answer, at most [`ANSWER_TIMEOUT`].
    ///
    /// # Errors
    /// When the machine is gone, does not answer, or refuses.
    pub fn request(&self, command: Command) -> Result<Answer, ControlError> {
        let (reply, answer) = sync_channel(1);
        self.requests
            .send(Request { command, reply })
            .map_err(|_| ControlError::Gone)?;
        self.wake.write(1).map_err(|_| ControlError::Gone)?;
        answer.recv_timeout(ANSWER_TIMEOUT).map_err(|e| match e {
            std::sync::mpsc::RecvTimeoutError::Timeout => ControlError::Timeout,
            std::sync::mpsc::RecvTimeoutError::Disconnected => ControlError::Gone,
        })?
    }

    /// Stops all vCPUs and devices.
    ///
    /// # Errors
    /// As [`Handle::request`].
    pub fn pause(&self) -> Result<(), ControlError> {
        self.request(Command::Pause).map(drop)
    }

    /// Stops all vCPUs, and waits for nothing else: requests to disks go on. [`Handle::resume`] ends it.
    ///
    /// # Errors
    /// As [`Handle::request`].
    pub fn halt(&self) -> Result<(), ControlError> {
        self.request(Command::Halt).map(drop)
    }

    /// Waits until the requests are done that a machine had begun when it was halted. It takes what else it
    /// is asked for meanwhile, for a disk may be slow. When nobody `wants` it any more, it is as if the machine were gone.
    ///
    /// # Errors
    /// As [`Handle::request`], and when it runs.
    pub fn settle(&self, wants: impl Fn() -> bool) -> Result<(), ControlError> {
        while wants() {
            match self.request(Command::Settle)? {
                Answer::Settled(false) => std::thread::sleep(SETTLE_LOOK),
                _ => return Ok(()),
            }
        }
        Err(ControlError::Gone)
    }

    /// Lets a paused machine run on.
    ///
    /// # Errors
    /// As [`Handle::request`].
    pub fn resume(&self) -> Result<(), ControlError> {
        self.request(Command::Resume).map(drop)
    }

    /// Ends the guest, or asks it to end itself.
    ///
    /// # Errors
    /// As [`Handle::request`].
    pub fn stop(&self, mode: StopMode) -> Result<(), ControlError> {
        self.request(Command::Stop(mode)).map(drop)
    }

    /// Ends the run at once, for a guest that another process has.
    ///
    /// # Errors
    /// As [`Handle::request`].
    pub fn give_up(&self) -> Result<(), ControlError> {
        self.request(Command::GiveUp).map(drop)
    }

    /// State and counters.
    ///
    /// # Errors
    /// As [`Handle::request`].
    pub fn stats(&self) -> Result<MachineStats, ControlError> {
        match self.request(Command::Stats)? {
            Answer::Stats(stats) => Ok(*stats),
            _ => Err(ControlError::Failed("the VMM gave no figures".into())),
        }
    }

    /// Makes ready to save the guest: its writes to memory are followed from now on, until
    /// [`Handle::end_save`].
    ///
    /// # Errors
    /// As [`Handle::request`].
    pub fn begin_save(&self) -> Result<Saving, ControlError> {
        match self.request(Command::BeginSave)? {
            Answer::Saving(saving) => Ok(saving),
            _ => Err(ControlError::Failed("the VMM does not save".into())),
        }
    }

    /// As [`Handle::begin_save`] and [`Handle::freeze`] in one step, between which no reset of the guest
    /// comes. One that is about to be reset stands after that, before it runs.
    ///
    /// # Errors
    /// As those; the guest goes on and its writes are not followed then.
    pub fn begin_frozen(&self) -> Result<(Saving, Frozen), ControlError> {
        match self.request(Command::BeginFrozen)? {
            Answer::BegunFrozen(saving, frozen) => Ok((saving, *frozen)),
            _ => Err(ControlError::Failed("the VMM does not save".into())),
        }
    }

    /// Stops the guest and reads its state. It stays as it is until [`Handle::thaw`]. Saves of a guest freeze it one
    /// after the other.
    ///
    /// # Errors
    /// As [`Handle::request`]; the guest goes on then.
    pub fn freeze(&self, save: SaveId) -> Result<Frozen, ControlError> {
        match self.request(Command::Freeze(save))? {
            Answer::Frozen(frozen) => Ok(*frozen),
            _ => Err(ControlError::Failed("the VMM gave no state".into())),
        }
    }

    /// Lets a frozen guest go on, if it ran before. Returns how long it stood, as the device loop saw it:
    /// who asked hears of it later, above all where a vCPU has taken the CPU meanwhile.
    ///
    /// # Errors
    /// As [`Handle::request`].
    pub fn thaw(&self, save: SaveId) -> Result<Stand, ControlError> {
        match self.request(Command::Thaw(save))? {
            Answer::Thawed(stand) => Ok(stand),
            _ => Err(ControlError::Failed(
                "the VMM did not thaw the guest".into(),
            )),
        }
    }

    /// Ends a save: writes are followed no longer.
    ///
    /// # Errors
    /// As [`Handle::request`].
    pub fn end_save(&self, save: SaveId) -> Result<(), ControlError> {
        self.request(Command::EndSave(save)).map(drop)
    }

    /// Lets a frozen guest's disks, taps and sockets go. `others` that save it know that, and begin anew if the guest
    /// goes on here.
    ///
    /// # Errors
    /// As [`Handle::request`], and when more save it.
    pub fn release(&self, state: GuestState, others: usize) -> Result<(), ControlError> {
        self.request(Command::Release(Box::new(state), others))
            .map(drop)
    }

    /// Takes a released guest's disks, taps and sockets again.
    ///
    /// # Errors
    /// As [`Handle::request`]; the guest ends then.
    pub fn reacquire(&self) -> Result<(), ControlError> {
        self.request(Command::Reacquire).map(drop)
    }

    /// Leaves a released guest as it is, for the user to resume or to stop.
    ///
    /// # Errors
    /// As [`Handle::request`].
    pub fn doubt(&self) -> Result<(), ControlError> {
        self.request(Command::Doubt).map(drop)
    }

    /// Ends a frozen guest that goes on elsewhere.
    ///
    /// # Errors
    /// As [`Handle::request`].
    pub fn leave(&self) -> Result<(), ControlError> {
        self.request(Command::Leave).map(drop)
    }

    /// Follows what a guest that is a copy writes from now on, which it has to undo when it is replaced.
    ///
    /// # Errors
    /// As [`Handle::request`], and when it is no copy.
    pub fn follow_copy(&self) -> Result<(), ControlError> {
        self.request(Command::FollowCopy).map(drop)
    }

    /// Ends that, for a guest that is the copy of none any more.
    ///
    /// # Errors
    /// As [`Handle::request`].
    pub fn follow_copy_no_more(&self) -> Result<(), ControlError> {
        self.request(Command::FollowCopyNoMore).map(drop)
    }

    /// Lets a guest that is a copy stand, and returns the pages that it wrote since it was replaced last. It
    /// stands until it is replaced or goes live; nobody can resume it before.
    ///
    /// # Errors
    /// As [`Handle::request`], and when it is no copy.
    pub fn gather(&self) -> Result<PageSet, ControlError> {
        match self.request(Command::Gather)? {
            Answer::Pages(pages) => Ok(pages),
            _ => Err(ControlError::Failed("the VMM gave no pages".into())),
        }
    }

    /// Lets a guest that is a copy go on from another state. It stands afterwards.
    ///
    /// # Errors
    /// As [`Handle::request`]; if the state was refused nothing changed, otherwise the guest ends.
    pub fn replace(&self, replacement: Replacement) -> Result<(), ControlError> {
        self.request(Command::Replace(Box::new(replacement)))
            .map(drop)
    }

    /// Puts memory in place for a state that a guest that is a copy may be given later, by [`Handle::replace`]. It
    /// stands until then.
    ///
    /// # Errors
    /// As [`Handle::request`], and when it is no copy. Its memory may be neither this nor that then.
    pub fn load_ahead(&self, load: LoadMemory) -> Result<(), ControlError> {
        self.request(Command::LoadAhead(MemoryAhead(load)))
            .map(drop)
    }

    /// Makes a guest that was a copy of another the guest itself.
    ///
    /// # Errors
    /// As [`Handle::request`].
    pub fn go_live(&self) -> Result<(), ControlError> {
        self.request(Command::GoLive).map(drop)
    }

    /// Paces the completions of device `id` from now on.
    ///
    /// # Errors
    /// As [`Handle::request`], and when there is no such device.
    pub fn pace(&self, id: String, pace: Pace) -> Result<(), ControlError> {
        self.request(Command::Pace(id, pace)).map(drop)
    }

    /// Adds a client to the serial console.
    ///
    /// # Errors
    /// As [`Handle::request`].
    pub fn attach_console(&self, client: UnixStream) -> Result<(), ControlError> {
        self.request(Command::AttachConsole(client)).map(drop)
    }
}
