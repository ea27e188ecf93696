//! Who may own a guest: terms, and what gives each term to exactly one claimant (US10430217, US9558070).
//!
//! A [`Term`] numbers the owners of a guest and grows by one with each takeover. Whoever would own
//! the guest next claims the term after the newest; the arbiter gives it to one claimant and shows
//! all others who that is. A claim that failed may all the same have been recorded. The same
//! claimant claims again until it knows: a term that it has already is won again.
//!
//! Claims block on storage, for as long as that likes. Whoever needs a bound runs them in a thread
//! of their own and takes a claim that is late for one that failed.

mod directory;
mod record;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::path::PathBuf;

pub use directory::DirectoryArbiter;

/// Longest name of a guest or a host, in bytes; that of a guest is the VMM's limit.
pub const NAME_LENGTH_MAX: usize = 64;

/// Number of an owner of a guest. The first is 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Term(pub u64);

impl Term {
    /// That of a guest's first owner.
    pub const FIRST: Self = Self(1);

    /// The term of the next owner.
    ///
    /// # Panics
    /// After 2^64 takeovers.
    pub fn next(self) -> Self {
        Self(self.0.checked_add(1).expect("takeovers are rarer"))
    }
}

impl fmt::Display for Term {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One process that claims terms, told from all others by chance.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Claimant([u8; 16]);

impl Claimant {
    /// One that nobody else is.
    ///
    /// # Errors
    /// When the host has no random bytes.
    pub fn random() -> io::Result<Self> {
        let mut id = [0; 16];
        let length = rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty())?;
        if length != id.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(Self(id))
    }

    /// The one with this id; for ids that were drawn elsewhere, or are given in a simulation.
    pub const fn from_bytes(id: [u8; 16]) -> Self {
        Self(id)
    }

    /// Its id.
    pub const fn to_bytes(self) -> [u8; 16] {
        self.0
    }
}

impl fmt::Display for Claimant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

impl fmt::Debug for Claimant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Who claims, or owns, a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Its process.
    pub claimant: Claimant,
    /// Name of its host, for people: 1 to [`NAME_LENGTH_MAX`] printable ASCII characters.
    pub host: String,
}

/// An owner and its term.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tenure {
    /// The term.
    pub term: Term,
    /// Who won it.
    pub owner: Owner,
}

impl fmt::Display for Tenure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Owner { claimant, host } = &self.owner;
        write!(f, "term {} of {claimant} on {host}", self.term)
    }
}

/// How a claim ended.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use = "who lost a claim must not own the guest"]
pub enum Claim {
    /// The term is the claimant's, and stays so over a crash of the arbiter.
    Won,
    /// Another has this term, or there is a newer one; this is the newest, whose owner may be the claimant.
    ///
    /// Who got the term and was overtaken before it knew is told of the newer one: a term has at most one
    /// winner, and none if its holder was overtaken.
    Lost(Tenure),
}

/// What decides who may own a guest.
pub trait Arbiter: Send {
    /// The newest term of `guest` and who owns it; nothing if nobody ever did.
    ///
    /// Blocks on storage; see the module.
    ///
    /// # Errors
    /// When the arbiter cannot be asked, or what it holds is damaged.
    fn current(&self, guest: &str) -> Result<Option<Tenure>, ArbiterError>;

    /// Claims `term` of `guest` for `owner`. It must be the term after the newest; claiming again a
    /// newest term that the same claimant has is won again.
    ///
    /// Blocks on storage; see the module.
    ///
    /// # Errors
    /// When the arbiter cannot be asked, when what it holds is damaged, or when `term` leaves out
    /// others. The term may be the claimant's all the same, but in the last case: it has to claim
    /// again before it knows.
    fn claim(&self, guest: &str, term: Term, owner: &Owner) -> Result<Claim, ArbiterError>;
}

/// Why an arbiter cannot answer.
#[derive(Debug, thiserror::Error)]
pub enum ArbiterError {
    /// The name cannot be one of a guest.
    #[error(
        "`{name}` cannot be a guest's name: it must be 1 to {NAME_LENGTH_MAX} letters, digits, `-`, `_` or `.`, the first not `-` or `.`"
    )]
    GuestName {
        /// The name, made printable and cut.
        name: String,
    },
    /// The name cannot be one of a host.
    #[error(
        "`{name}` cannot be a host's name: it must be 1 to {NAME_LENGTH_MAX} printable ASCII characters"
    )]
    HostName {
        /// The name, made printable and cut.
        name: String,
    },
    /// Terms would be left out.
    #[error("term {term} of guest {guest} cannot be claimed: the next is {next}")]
    Gap {
        /// The guest.
        guest: String,
        /// The term claimed.
        term: Term,
        /// The only one that can be claimed.
        next: Term,
    },
    /// Storage fails.
    #[error("cannot {action} {path}")]
    File {
        /// What was to be done.
        action: &'static str,
        /// With what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A file is not what an arbiter wrote.
    #[error("{path} is damaged: {what}; whoever knows which host owns the guest can write it anew")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// There are too many files.
    #[error("{path} has more than {max} entries")]
    Crowded {
        /// The directory.
        path: PathBuf,
        /// As many are allowed.
        max: usize,
    },
    /// The directory's storage does not do what terms need.
    #[error("{path} cannot hold terms: {what}")]
    Unfit {
        /// The directory.
        path: PathBuf,
        /// What it did.
        what: String,
    },
}

/// Whether `name` can be a guest's; the rule that the VMM has.
fn check_guest(name: &str) -> Result<(), ArbiterError> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    let fits = (1..=NAME_LENGTH_MAX).contains(&name.len())
        && name.bytes().all(allowed)
        && !name.starts_with(['.', '-']);
    if fits {
        Ok(())
    } else {
        let name = printable(name);
        Err(ArbiterError::GuestName { name })
    }
}

/// Whether `name` can be a host's.
fn check_host(name: &str) -> Result<(), ArbiterError> {
    if is_host(name) {
        Ok(())
    } else {
        let name = printable(name);
        Err(ArbiterError::HostName { name })
    }
}

fn is_host(name: &str) -> bool {
    let printable = |b: u8| b.is_ascii_graphic() || b == b' ';
    (1..=NAME_LENGTH_MAX).contains(&name.len()) && name.bytes().all(printable)
}

/// `text` as one line of bounded length.
fn printable(text: &str) -> String {
    text.escape_debug().take(NAME_LENGTH_MAX).collect()
}
