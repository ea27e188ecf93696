//! Names of objects.

use std::fmt;

use serde::{Deserialize, Serialize};
use tandem_ft::arbiter::{Claimant, NAME_LENGTH_MAX, Term};

use crate::StoreError;

/// Largest number of a term, a checkpoint or an object: what comes next is a number too, and none gets so far.
pub(crate) const NUMBER_MAX: u64 = u64::MAX >> 1;
/// Digits of a number in a name, so that names sort as numbers do.
const DIGITS: usize = 20;

/// A checkpoint of a guest. Later ones are greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CheckpointId {
    /// Term of its owner.
    pub term: u64,
    /// Its number; grows by one with each checkpoint, over all terms.
    pub sequence: u64,
}

impl CheckpointId {
    /// Its name, as in a store and for people: `TERM-SEQUENCE`.
    pub(crate) fn file_name(self) -> String {
        format!("{}-{}", number(self.term), number(self.sequence))
    }

    /// That with such a name, of a store or as [`fmt::Display`] shows it.
    pub fn parse(name: &str) -> Option<Self> {
        let (term, sequence) = name.split_once('-')?;
        let (term, sequence) = (digits(term)?, digits(sequence)?);
        Some(Self { term, sequence })
    }
}

impl fmt::Display for CheckpointId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.term, self.sequence)
    }
}

/// An object that a guest's owner made, by a number that it used once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ObjectId {
    /// Term of its owner.
    pub term: u64,
    /// Its number in that term.
    pub number: u64,
}

/// What an object is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum ObjectKind {
    /// Content of pages.
    Pack,
    /// Which page has which content.
    Table,
    /// The hardware.
    Description,
}

impl ObjectKind {
    const ALL: [Self; 3] = [Self::Pack, Self::Table, Self::Description];

    /// What people call it.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Pack => "pack",
            Self::Table => "table",
            Self::Description => "description",
        }
    }

    fn extension(self) -> &'static str {
        match self {
            Self::Pack => "pack",
            Self::Table => "table",
            Self::Description => "toml",
        }
    }
}

/// Where a guest's objects are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Names {
    guest: String,
}

impl Names {
    pub(crate) fn of(guest: &str) -> Result<Self, StoreError> {
        check_guest(guest)?;
        let guest = guest.to_owned();
        Ok(Self { guest })
    }

    pub(crate) fn guest(&self) -> &str {
        &self.guest
    }

    /// All that the guest has in the store.
    pub(crate) fn all(&self) -> String {
        format!("{GUESTS}{}/", self.guest)
    }

    pub(crate) fn objects(&self) -> String {
        format!("{}objects/", self.all())
    }

    pub(crate) fn object(&self, id: ObjectId, kind: ObjectKind) -> String {
        let (term, number) = (number(id.term), number(id.number));
        format!("{}{term}-{number}.{}", self.objects(), kind.extension())
    }

    /// Which object has this name.
    pub(crate) fn parse_object(&self, name: &str) -> Option<(ObjectId, ObjectKind)> {
        let (id, extension) = name.strip_prefix(&self.objects())?.split_once('.')?;
        let kind = ObjectKind::ALL
            .into_iter()
            .find(|kind| kind.extension() == extension)?;
        let CheckpointId { term, sequence } = CheckpointId::parse(id)?;
        let number = sequence;
        Some((ObjectId { term, number }, kind))
    }

    pub(crate) fn checkpoints(&self) -> String {
        format!("{}checkpoints/", self.all())
    }

    pub(crate) fn checkpoint(&self, id: CheckpointId) -> String {
        self.checkpoints() + &id.file_name()
    }

    pub(crate) fn floors(&self) -> String {
        format!("{}floors/", self.all())
    }

    pub(crate) fn floor(&self, id: CheckpointId) -> String {
        self.floors() + &id.file_name()
    }

    pub(crate) fn starts(&self) -> String {
        format!("{}starts/", self.all())
    }

    pub(crate) fn start(&self, term: Term, base: Option<CheckpointId>) -> String {
        let from = base.map_or(ANEW.to_owned(), |base| {
            format!("{FROM}{}", base.file_name())
        });
        format!("{}{}-{from}", self.starts(), number(term.0))
    }

    /// Which term began how, by the name of its start.
    pub(crate) fn parse_start(&self, name: &str) -> Option<(u64, Option<CheckpointId>)> {
        let (term, from) = name.strip_prefix(&self.starts())?.split_once('-')?;
        let term = digits(term)?;
        if from == ANEW {
            return Some((term, None));
        }
        let base = CheckpointId::parse(from.strip_prefix(FROM)?)?;
        Some((term, Some(base)))
    }
}

/// Where guests are.
pub(crate) const GUESTS: &str = "guests/";
/// Begins what a start says of its checkpoint.
const FROM: &str = "from-";
/// Says that a term began without a checkpoint.
const ANEW: &str = "anew";

fn number(number: u64) -> String {
    format!("{number:0DIGITS$}")
}

/// The number that a part of a name is.
pub(crate) fn digits(text: &str) -> Option<u64> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let number: Option<u64> = digits.then(|| text.parse().ok()).flatten();
    number.filter(|number| *number <= NUMBER_MAX)
}

/// Fails if a guest cannot have this name.
pub(crate) fn check_guest(name: &str) -> Result<(), StoreError> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let first = name.bytes().next();
    let fits = (1..=NAME_LENGTH_MAX).contains(&name.len())
        && name.bytes().all(allowed)
        && first.is_some_and(|byte| byte != b'-' && byte != b'.');
    if fits {
        return Ok(());
    }
    let name = name.chars().take(NAME_LENGTH_MAX).collect::<String>();
    let name = name.escape_debug().to_string();
    Err(StoreError::GuestName { name })
}

/// A name that nobody else uses.
///
/// # Panics
/// When the host has no random bytes.
pub(crate) fn random_name() -> String {
    Claimant::random()
        .expect("the host has random bytes")
        .to_string()
}

#[cfg(test)]
mod name_tests {
    use super::*;

    #[test]
    fn names_come_back_and_sort_as_numbers_do() {
        let names = Names::of("web").unwrap();
        let id = ObjectId {
            term: 3,
            number: 12,
        };
        for kind in ObjectKind::ALL {
            let name = names.object(id, kind);
            assert_eq!(names.parse_object(&name), Some((id, kind)));
        }
        let (early, late) = (
            CheckpointId {
                term: 2,
                sequence: 900,
            },
            CheckpointId {
                term: 10,
                sequence: 5,
            },
        );
        assert!(early < late && names.checkpoint(early) < names.checkpoint(late));
        assert_eq!(CheckpointId::parse(&early.to_string()), Some(early));
        assert_eq!(CheckpointId::parse(&format!("1-{}", u64::MAX)), None);
        for base in [None, Some(early)] {
            let start = names.start(Term(7), base);
            assert_eq!(names.parse_start(&start), Some((7, base)));
        }
    }

    #[test]
    fn what_is_no_name_is_refused() {
        for name in ["", ".", "-a", "a/b", "a b", "ä", &"x".repeat(65)] {
            assert!(Names::of(name).is_err(), "{name}");
        }
        let names = Names::of("web").unwrap();
        for name in [
            "guests/web/objects/1-2.exe",
            "guests/web/objects/+1-2.pack",
            "x",
        ] {
            assert_eq!(names.parse_object(name), None, "{name}");
        }
    }
}
