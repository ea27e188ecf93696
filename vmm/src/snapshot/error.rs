//! Why state cannot be written or read.

use std::io;
use std::path::PathBuf;

use tandem_devices::state::{RestoreError, SaveError};

use super::{FORMAT_VERSION, SECTION_LENGTH_MAX, SECTIONS_MAX, STATE_LENGTH_MAX, SectionId};
use crate::control::ControlError;
use crate::kvm::state::StateError;
use crate::memory_image::MemoryImageError;

/// Why state cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The stream fails.
    #[error("cannot read {place} of saved state")]
    Read {
        /// What was to be read.
        place: String,
        /// Why not.
        source: io::Error,
    },
    /// The stream fails.
    #[error("cannot write {place} of saved state")]
    Write {
        /// What was to be written.
        place: String,
        /// Why not.
        source: io::Error,
    },
    /// It begins with other bytes.
    #[error("this is no saved state: it begins with other bytes")]
    Magic,
    /// The layout is another one.
    #[error("saved state has format version {found}; allowed is {FORMAT_VERSION}")]
    Format {
        /// The version found.
        found: u32,
    },
    /// The stream ends too early.
    #[error("saved state is cut off in {place}")]
    Truncated {
        /// What was to be read.
        place: String,
    },
    /// The stream goes on.
    #[error("bytes follow the end of the saved state")]
    Trailing,
    /// A section of a kind that does not exist.
    #[error("saved state has an unknown section `{name}`")]
    Unknown {
        /// Its name, made printable.
        name: String,
    },
    /// A section is there twice.
    #[error("section {section} is there twice")]
    Duplicate {
        /// The section.
        section: SectionId,
    },
    /// A section is not there.
    #[error("section {section} is missing")]
    Missing {
        /// The section.
        section: SectionId,
    },
    /// A section is there that nothing belongs to.
    #[error("section {section} is left over: nothing here belongs to it")]
    LeftOver {
        /// The section.
        section: SectionId,
    },
    /// A section was changed.
    #[error("section {section} is damaged: its checksum is another")]
    Damaged {
        /// The section.
        section: String,
    },
    /// Sections were changed, moved or taken away.
    #[error("saved state is damaged: the checksum of the whole is another")]
    WholeDamaged,
    /// A section is larger than any could be.
    #[error("section {section} has {length} bytes; allowed are at most {SECTION_LENGTH_MAX}")]
    TooLong {
        /// The section.
        section: String,
        /// Its length in bytes.
        length: u64,
    },
    /// There is more than any guest could have.
    #[error(
        "saved state is too large; allowed are at most {SECTIONS_MAX} sections of {STATE_LENGTH_MAX} bytes in all"
    )]
    TooLarge,
    /// The section is of another version.
    #[error("section {section} has version {found}; allowed is {supported}")]
    Version {
        /// The section.
        section: SectionId,
        /// The version found.
        found: u32,
        /// The version that can be read.
        supported: u32,
    },
    /// The section's payload cannot be understood.
    #[error("section {section} cannot be understood: {reason}")]
    Decode {
        /// The section.
        section: SectionId,
        /// Why not.
        reason: String,
    },
    /// The state cannot be put into bytes.
    #[error("section {section} cannot be encoded: {reason}")]
    Encode {
        /// The section.
        section: SectionId,
        /// Why not.
        reason: String,
    },
    /// The guest is not of the shape that was saved.
    #[error("the guest was saved with {what} {saved}, but has {here}: they must be equal")]
    Shape {
        /// What differs.
        what: &'static str,
        /// As it was saved.
        saved: String,
        /// As it is here.
        here: String,
    },
    /// A saved value cannot be.
    #[error("{what} of section {section} is {value}: allowed is {allowed}")]
    Value {
        /// The section.
        section: SectionId,
        /// Name of the value.
        what: &'static str,
        /// The value.
        value: String,
        /// What it may be.
        allowed: String,
    },
    /// A device refuses its state.
    #[error("device `{id}` cannot be restored")]
    Device {
        /// Name of the device.
        id: String,
        /// Why not.
        source: RestoreError,
    },
    /// A device cannot be saved.
    #[error(transparent)]
    Save(#[from] SaveError),
    /// KVM refuses a state.
    #[error(transparent)]
    Kvm(#[from] StateError),
    /// Guest memory cannot be written or loaded.
    #[error(transparent)]
    Memory(#[from] MemoryImageError),
    /// A file of a snapshot cannot be used.
    #[error("cannot {action} `{}`", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The snapshot's directory exists.
    #[error("`{}` exists: a snapshot is written to a directory that does not", path.display())]
    Exists {
        /// The directory.
        path: PathBuf,
    },
    /// The guest is being saved to the same directory.
    #[error("a snapshot to `{}` is under way already", path.display())]
    UnderWay {
        /// The directory.
        path: PathBuf,
    },
    /// The running guest did not do what saving it takes.
    #[error("the guest cannot be saved")]
    Control(#[source] ControlError),
    /// Guest memory cannot be copied to where it should go.
    #[error("guest memory cannot be copied")]
    Copy(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// KVM does not tell which pages were written.
    #[error("the guest's writes cannot be followed: {0}")]
    Tracking(String),
    /// The guest began anew, or ended, while it was saved.
    #[error("the guest was reset or ended while it was saved")]
    Reset,
}

impl From<ControlError> for SnapshotError {
    fn from(error: ControlError) -> Self {
        match error {
            ControlError::Overtaken => Self::Reset,
            other => Self::Control(other),
        }
    }
}
