//! Checkpoints of guests on shared storage, from which any host that reaches it lets a guest go on
//! (US9032133, US8880774).
//!
//! ```text
//!   format                             which store this is, its version, whether it is encrypted
//!   probes/..                          names that were raced for when the store was opened
//!   terms/..                           who owns each guest: the arbiter's
//!   guests/NAME/starts/TERM-..         from which checkpoint the owner of a term went on
//!   guests/NAME/checkpoints/TERM-SEQ   manifests: one that is there and whole is a checkpoint
//!   guests/NAME/objects/TERM-N.pack    content of pages, compressed, by hash
//!                             .table   which page has which content
//!                             .toml    the hardware, readable
//!   guests/NAME/floors/TERM-SEQ        checkpoints before this one are being removed
//! ```
//!
//! Every object is written once, under a name that nobody else may have ([`backend::Backend::create`]), and is never
//! changed. So a reader sees all of it or nothing, and of two writers one gets the name.
//!
//! # What makes a checkpoint exist
//!
//! Its manifest, which is written last and says length and hash of all that it needs. It *counts* if its
//! owner's term does: the owner of a term writes down from which checkpoint it goes on before it
//! does ([`owner`]), and what an older owner writes after that one never counts. A writer looks who
//! owns the guest after its manifest is there, and takes it for complete only then.
//!
//! # Why removing is safe
//!
//! Objects belong to one guest and are numbered by its owner. A manifest refers to what its parent
//! refers to, and to newer objects of its own term; it says which number comes next. So all that no kept
//! manifest refers to is garbage, but for objects of the newest term from that number on, which may be
//! under way: no clock is asked, and no writer ([`prune`]).

pub mod backend;
pub mod capture;
pub mod chunk;
pub mod disk;
mod envelope;
pub mod error;
pub mod frames;
pub mod guest;
pub mod manifest;
pub mod memory;
mod names;
pub mod owner;
pub mod place;
pub mod plain;
pub mod prune;
pub mod read;
pub mod redo;
pub mod seal;
mod store;
pub mod survey;
mod table;
#[cfg(any(test, feature = "test-utils"))]
pub mod testing;
#[cfg(test)]
mod tests;
pub mod upload;
pub mod verify;
pub mod write;

pub use error::StoreError;
pub use guest::Guest;
pub use names::{CheckpointId, ObjectId};
pub use place::Place;
pub use store::{Options, Store, open_bucket};

/// Bytes of a page: of guest memory, and of what of a disk is kept together.
pub const PAGE: usize = tandem_vmm::migration::pages::PAGE;
/// What is in a page.
pub type Page = tandem_vmm::migration::pages::Page;
/// Version of all formats of a store; one number for all, for they refer to each other.
pub const FORMAT_VERSION: u32 = 1;
