//! Asking the arbiter, which blocks on storage: on a thread of its own.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use super::{ProtectionError, lock};
use crate::arbiter::{
    Arbiter, ArbiterError, Claim, Claimant, DirectoryArbiter, Owner, Tenure, Term,
};
use crate::pair::Outcome;

/// An arbiter and who asks it. Cheap to clone.
#[derive(Clone)]
pub struct Claims {
    arbiter: Arc<Mutex<Box<dyn Arbiter>>>,
    guest: String,
    owner: Owner,
    /// Where that is for others, if it is a directory.
    place: Option<PathBuf>,
}

/// Host name when the host has none that can be told.
const NO_NAME: &str = "unnamed";

impl Claims {
    /// Claims terms of `guest`, for this process, from the directory `arbiter`. Blocks on storage.
    ///
    /// # Errors
    /// When the directory cannot be one that decides.
    pub fn open(arbiter: &Path, guest: &str) -> Result<Self, ProtectionError> {
        let claimant = Claimant::random();
        let claimant = claimant.map_err(ProtectionError::host("draw a random number"))?;
        Self::open_as(claimant, arbiter, guest)
    }

    /// As [`Claims::open`], as `claimant`, whom nobody else is.
    ///
    /// # Errors
    /// As that.
    pub fn open_as(
        claimant: Claimant,
        arbiter: &Path,
        guest: &str,
    ) -> Result<Self, ProtectionError> {
        let place = std::path::absolute(arbiter).ok();
        let arbiter = DirectoryArbiter::open(arbiter)?;
        let owner = Owner {
            claimant,
            host: host_name(),
        };
        Ok(Self {
            place,
            ..Self::new(Box::new(arbiter), guest, owner)
        })
    }

    /// Claims terms of `guest` for `owner`.
    pub fn new(arbiter: Box<dyn Arbiter>, guest: &str, owner: Owner) -> Self {
        Self {
            arbiter: Arc::new(Mutex::new(arbiter)),
            guest: guest.to_owned(),
            owner,
            place: None,
        }
    }

    /// Who claims.
    pub fn claimant(&self) -> Claimant {
        self.owner.claimant
    }

    /// The directory that decides, if one does.
    pub fn place(&self) -> Option<&Path> {
        self.place.as_deref()
    }

    /// Claims a term. Blocks on storage.
    ///
    /// # Errors
    /// As [`Arbiter::claim`].
    pub fn claim(&self, term: Term) -> Result<Claim, ArbiterError> {
        let arbiter = lock(&self.arbiter);
        arbiter.claim(&self.guest, term, &self.owner)
    }

    /// The newest term and who owns it; nothing if nobody ever did. Blocks on storage.
    ///
    /// # Errors
    /// As [`Arbiter::current`].
    pub fn current(&self) -> Result<Option<Tenure>, ArbiterError> {
        lock(&self.arbiter).current(&self.guest)
    }

    /// Wins the next term, which takes the guest from whoever owned it before; none if somebody else won it
    /// meanwhile. Blocks on storage.
    ///
    /// # Errors
    /// As [`Arbiter::claim`].
    pub fn claim_next(&self) -> Result<Option<Term>, ArbiterError> {
        let arbiter = lock(&self.arbiter);
        let current = arbiter.current(&self.guest)?;
        let next = current.map_or(Term::FIRST, |tenure| tenure.term.next());
        let claim = arbiter.claim(&self.guest, next, &self.owner)?;
        Ok((claim == Claim::Won).then_some(next))
    }

    /// Claims `term` on a thread of its own, and tells `then` of the answer.
    pub(super) fn ask(&self, term: Term, then: impl FnOnce(Outcome) + Send + 'static) {
        let claims = self.clone();
        let asking = move || {
            let claim = claims.claim(term);
            if let Err(error) = &claim {
                let why = tandem_vmm::error::causes(error);
                tracing::warn!(%term, %why, "the arbiter does not answer");
            }
            then(claim.into());
        };
        let thread = std::thread::Builder::new().name("ask".into());
        if let Err(error) = thread.spawn(asking) {
            // Whoever asked asks again only after an answer, so there must be one.
            tracing::error!(%error, "the arbiter cannot be asked: this host has no threads left");
            std::process::abort();
        }
    }
}

fn host_name() -> String {
    let name = rustix::system::uname();
    match name.nodename().to_str() {
        Ok(name) if !name.is_empty() => name.into(),
        _ => NO_NAME.into(),
    }
}
