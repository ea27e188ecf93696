//! Where standbys of a guest listen, as each of its owners in turn is told.
//!
//! An owner tells the list to its secondary, and which of it the secondary is. Once that is the owner itself it
//! tries all others, and tells its own secondary in turn: a host that was lost and comes back is used again.

use tandem_vmm::migration::Address;

use super::ProtectionError;

/// Standbys of one guest, at most.
pub const STANDBYS_MAX: usize = 16;

/// A list of standbys, in the order in which they are tried.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Standbys {
    places: Vec<Address>,
    /// Which of them is this process's own.
    here: Option<usize>,
}

impl Standbys {
    /// Those at `places`; none of them is this process. What is more than [`STANDBYS_MAX`] is left out.
    pub fn new(mut places: Vec<Address>) -> Self {
        places.truncate(STANDBYS_MAX);
        Self { places, here: None }
    }

    /// What an owner told its secondary: [`Standbys::tell`].
    pub(super) fn told(places: &[String], here: u64) -> Result<Self, ProtectionError> {
        if places.len() > STANDBYS_MAX {
            let what = format!("more than {STANDBYS_MAX} standbys");
            return Err(ProtectionError::Garbled(what));
        }
        let places = places.iter().map(|place| place.parse());
        Ok(Self {
            places: places.collect::<Result<_, _>>()?,
            here: usize::try_from(here).ok(),
        })
    }

    /// What the secondary at the place of this number is told.
    pub(super) fn tell(&self, number: usize) -> (Vec<String>, u64) {
        let places = self.places.iter().map(ToString::to_string);
        (places.collect(), number as u64)
    }

    /// Those that may be tried, with their numbers.
    pub(super) fn others(&self) -> Vec<(usize, Address)> {
        let all = self.places.iter().cloned().enumerate();
        all.filter(|(number, _)| Some(*number) != self.here)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(list: &Standbys) -> Vec<usize> {
        let others = list.others().into_iter();
        others.map(|(number, _)| number).collect()
    }

    #[test]
    fn each_owner_tries_all_others() {
        let places = ["10.0.0.2:1", "10.0.0.3:1", "/run/x"];
        let first = Standbys::new(places.map(|place| place.parse().unwrap()).to_vec());
        assert_eq!(numbers(&first), [0, 1, 2]);
        let (told, here) = first.tell(1);
        let second = Standbys::told(&told, here).unwrap();
        assert_eq!(numbers(&second), [0, 2]);
        let (told, here) = second.tell(2);
        assert_eq!(numbers(&Standbys::told(&told, here).unwrap()), [0, 1]);
    }

    #[test]
    fn a_list_that_cannot_be_is_refused() {
        let place = "/run/x".to_owned();
        assert!(Standbys::told(&vec![place.clone(); STANDBYS_MAX + 1], 0).is_err());
        assert!(Standbys::told(&["nowhere".into()], 0).is_err());
        let outside = Standbys::told(&[place], u64::MAX).unwrap();
        assert_eq!(numbers(&outside), [0]);
    }
}
