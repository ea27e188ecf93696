//! Confinement: what the threads of a running guest may still ask of the host's kernel.
//!
//! A guest that breaks out of its virtual machine is in one of our threads. What it can do from there
//! is what that thread may do, so each gives up all that it does not need, as the last thing before
//! its loop ([`Entry::enter`]):
//!
//! 1. credentials: the user that was asked for, no capabilities but those of [`credentials`];
//! 2. files: by Landlock none, but the device loop the [`Grant`]s, the API what saving a guest takes, and who makes
//!    or loads checkpoints the directory that they are in;
//! 3. system calls: by a seccomp filter only those of the [`tables`] for its [`ThreadKind`].
//!
//! All three are passed on to threads that it starts. So a vCPU of a guest that was reset, which the
//! device loop starts, is confined by the device loop's filter and by its own: the device loop's
//! table contains a vCPU's.
//!
//! A forbidden system call is not carried out: the process says which it was and ends with
//! [`VIOLATION_EXIT_CODE`].

pub mod credentials;
pub mod error;
mod files;
mod filter;
pub mod rules;
pub mod tables;
#[cfg(test)]
mod tests;
mod violation;

use std::fs::File;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use seccompiler::BpfProgram;

pub use credentials::User;
pub use error::ConfinementError;
use files::Reach;
pub use files::{Grant, Use};
pub use rules::{Condition, Rule};
pub use violation::VIOLATION_EXIT_CODE;

/// What a thread does, which decides what it may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThreadKind {
    /// Owns all devices and the machine: the main thread.
    DeviceLoop,
    /// Runs a vCPU and carries out its exits.
    Vcpu,
    /// Carries out requests of a disk.
    BlockWorker,
    /// Loads the memory of a restored guest.
    MemoryLoader,
    /// Serves the API, with the threads that it starts; saves the guest and sends it elsewhere.
    Api,
    /// Protects the guest, or runs it as a copy, with the threads that it starts.
    Protection,
    /// Holds a protected guest's taps, in a process of its own.
    Keeper,
    /// Makes checkpoints of the guest in a store, with the thread that it starts.
    Checkpoints,
    /// Loads the memory of a guest that goes on from a store.
    StoreLoader,
    /// Speaks to the bucket that a guest's checkpoints are in, in a process of its own, with the threads that it starts.
    Bucket,
}

impl ThreadKind {
    /// All kinds.
    pub const ALL: [Self; 10] = [
        Self::DeviceLoop,
        Self::Vcpu,
        Self::BlockWorker,
        Self::MemoryLoader,
        Self::Api,
        Self::Protection,
        Self::Keeper,
        Self::Checkpoints,
        Self::StoreLoader,
        Self::Bucket,
    ];

    /// The kind in words.
    pub const fn name(self) -> &'static str {
        match self {
            Self::DeviceLoop => "device loop",
            Self::Vcpu => "vCPU",
            Self::BlockWorker => "block worker",
            Self::MemoryLoader => "memory loader",
            Self::Api => "API",
            Self::Protection => "protection",
            Self::Keeper => "keeper",
            Self::Checkpoints => "checkpoints",
            Self::StoreLoader => "store loader",
            Self::Bucket => "bucket",
        }
    }

    /// Whether threads of this kind start others.
    fn starts_threads(self) -> bool {
        match self {
            Self::DeviceLoop | Self::Api | Self::Protection | Self::Checkpoints | Self::Bucket => {
                true
            }
            Self::Vcpu
            | Self::BlockWorker
            | Self::MemoryLoader
            | Self::Keeper
            | Self::StoreLoader => false,
        }
    }

    /// How many filters a thread of this kind installs; it is confined by the last one.
    pub fn filters(self) -> usize {
        1 + usize::from(self.starts_threads())
    }

    /// The system calls that threads of this kind may make.
    pub fn rules(self) -> impl Iterator<Item = &'static Rule> {
        tables::of(self).iter().flat_map(|table| table.iter())
    }
}

/// What happens at a forbidden system call.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Enforcement {
    /// The process reports it and ends.
    #[default]
    On,
    /// The kernel logs and allows it. Files are not restricted either.
    Log,
    /// Nothing is forbidden; a user that was asked for is still taken on.
    Off,
}

/// Everything that confinement depends on.
#[derive(Debug, Default)]
pub struct Plan {
    /// What happens at a forbidden system call.
    pub enforcement: Enforcement,
    /// The user to run as from the loops on.
    pub user: Option<User>,
    /// What the device loop, or who speaks to a bucket, may still do with files.
    pub grants: Vec<Grant>,
    /// The directory of the store that checkpoints of the guest are in, if there is one.
    pub store: Option<PathBuf>,
    /// Directories of redo logs, in which who makes checkpoints makes and removes files.
    pub logs: Vec<PathBuf>,
    /// Where a forbidden system call is reported besides standard error; opened for appending.
    pub log: Option<File>,
}

/// The confinement of one guest's process. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Confinement(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    plan: Plan,
    programs: [OnceLock<BpfProgram>; ThreadKind::ALL.len()],
    /// Threads that start from now on are started by the confined device loop.
    loop_is_confined: AtomicBool,
}

impl Confinement {
    /// Begins confinement: from now on no program that is executed can gain privileges, and
    /// forbidden system calls are reported. Threads are confined by [`Entry::enter`].
    ///
    /// # Errors
    /// When the host refuses, or has another architecture than the tables are for.
    pub fn begin(plan: Plan) -> Result<Self, ConfinementError> {
        if plan.enforcement != Enforcement::Off {
            filter::check_architecture()?;
            find_clock();
            rustix::thread::set_no_new_privs(true)
                .map_err(ConfinementError::refused("set no_new_privs"))?;
            credentials::bound()?;
        }
        if plan.enforcement == Enforcement::On {
            violation::report_to(plan.log.as_ref())?;
        }
        Ok(Self(Arc::new(Shared {
            plan,
            programs: Default::default(),
            loop_is_confined: AtomicBool::new(false),
        })))
    }

    /// No confinement at all, for guests that are built in tests.
    pub fn none() -> Self {
        Self(Arc::new(Shared {
            plan: Plan {
                enforcement: Enforcement::Off,
                ..Plan::default()
            },
            programs: Default::default(),
            loop_is_confined: AtomicBool::new(false),
        }))
    }

    /// The confinement of a thread that the calling thread is about to start, or of itself.
    pub fn entry(&self, kind: ThreadKind) -> Entry {
        Entry {
            confinement: self.clone(),
            kind,
            inherits: self.0.loop_is_confined.load(Ordering::Acquire),
        }
    }

    /// The filter of `kind`, compiled at first use.
    fn program(&self, kind: ThreadKind) -> Result<&BpfProgram, ConfinementError> {
        let place = &self.0.programs[kind as usize];
        if let Some(program) = place.get() {
            return Ok(program);
        }
        let program = filter::compile(kind, self.0.plan.enforcement)?;
        Ok(place.get_or_init(|| program))
    }
}

/// Finds out where the kernel's clock is in this process. `rustix` does that when a clock is first read, on
/// kernels before 6.4 by opening a file, which a confined thread may not.
fn find_clock() {
    let _ = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
}

/// A thread's confinement, made by whoever starts the thread: that decides what it inherits.
#[derive(Clone, Debug)]
pub struct Entry {
    confinement: Confinement,
    kind: ThreadKind,
    /// Whether the thread is born with the credentials and the files of the device loop.
    inherits: bool,
}

impl Entry {
    /// Confines the calling thread for good, the last thing before its loop.
    ///
    /// # Errors
    /// When the host refuses; the thread must not go on then.
    pub fn enter(&self) -> Result<(), ConfinementError> {
        let shared = &self.confinement.0;
        if !self.inherits {
            self.give_up_privileges()?;
        }
        if shared.plan.enforcement != Enforcement::Off {
            if self.kind.starts_threads() {
                filter::install(&filter::compile_missing()?)?;
            }
            filter::install(self.confinement.program(self.kind)?)?;
        }
        if self.kind == ThreadKind::DeviceLoop {
            shared.loop_is_confined.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// What the thread may do with the store, and with redo logs.
    fn stored(&self) -> Vec<Grant> {
        let what = match self.kind {
            ThreadKind::Checkpoints => Use::Store,
            _ => Use::Read,
        };
        let plan = &self.confinement.0.plan;
        let logs = match self.kind {
            ThreadKind::Checkpoints => &plan.logs[..],
            _ => &[],
        };
        let places = plan.store.iter().chain(logs);
        places
            .map(|place| Grant {
                place: place.clone(),
                what,
            })
            .collect()
    }

    fn give_up_privileges(&self) -> Result<(), ConfinementError> {
        let plan = &self.confinement.0.plan;
        match plan.enforcement {
            Enforcement::Off => credentials::take_on(plan.user),
            Enforcement::Log => credentials::give_up(plan.user, self.kind),
            Enforcement::On => {
                let stored = self.stored();
                let reach = match self.kind {
                    ThreadKind::DeviceLoop => Reach::Grants(&plan.grants),
                    ThreadKind::Api | ThreadKind::Protection => Reach::Saves,
                    ThreadKind::Checkpoints | ThreadKind::StoreLoader => Reach::Grants(&stored),
                    ThreadKind::Bucket => Reach::Hosts(&plan.grants),
                    ThreadKind::Vcpu
                    | ThreadKind::BlockWorker
                    | ThreadKind::MemoryLoader
                    | ThreadKind::Keeper => Reach::Nothing,
                };
                // Places are looked up with the rights that they were made with.
                let restricted = files::restrict(reach)?;
                if self.kind == ThreadKind::DeviceLoop && !restricted {
                    tracing::info!("this kernel has no Landlock: files are not restricted");
                }
                credentials::give_up(plan.user, self.kind)
            }
        }
    }
}
