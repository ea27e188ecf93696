//! Where standbys of a guest listen, as each of its owners in turn is told.
//!
//! An owner tells the list to its secondary, and which of it the secondary is. Once that is the owner itself it
//! tries all others, and tells its own secondary in turn: a host that was lost and comes back is used again.

use serde::{Deserialize, Serialize};
use tandem_vmm::migration::tls::Keys;
use tandem_vmm::migration::{Address, Route};

use super::ProtectionError;

/// Standbys of one guest, at most.
pub const STANDBYS_MAX: usize = 16;

/// The number of none of them.
const NOWHERE: u64 = u64::MAX;

/// One of them, as an owner tells of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Place {
    /// Where it listens.
    pub address: String,
    /// What its host is called, by which it is verified.
    pub name: Option<String>,
    /// Where it is reached by another network; none from who knows of one path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub second: Option<String>,
}

impl Place {
    fn of(route: &Route) -> Self {
        Self {
            address: route.to_string(),
            name: route.name().map(str::to_owned),
            second: route.second().map(ToString::to_string),
        }
    }

    fn route(&self, keys: Option<&Keys>) -> Result<Route, ProtectionError> {
        let tls = keys.cloned().zip(self.name.clone());
        let route = |address: &str| -> Result<_, ProtectionError> {
            let address: Address = address.parse()?;
            Ok(Route::new(address, tls.clone()))
        };
        let second = self.second.as_deref().map(route).transpose()?;
        Ok(route(&self.address)?.or(second))
    }
}

/// A list of standbys, in the order in which they are tried.
#[derive(Clone, Debug, Default)]
pub struct Standbys {
    places: Vec<Route>,
    /// Which of them is this process's own.
    here: Option<usize>,
}

impl Standbys {
    /// Those at `places`; none of them is this process. What is more than [`STANDBYS_MAX`] is left out.
    pub fn new(mut places: Vec<Route>) -> Self {
        places.truncate(STANDBYS_MAX);
        Self { places, here: None }
    }

    /// What an owner told its secondary: [`Standbys::tell`]. They are verified by `keys`, if there are some here.
    pub(super) fn told(
        places: &[Place],
        here: u64,
        keys: Option<&Keys>,
    ) -> Result<Self, ProtectionError> {
        if places.len() > STANDBYS_MAX {
            let what = format!("more than {STANDBYS_MAX} standbys");
            return Err(ProtectionError::Garbled(what));
        }
        let places = places.iter().map(|place| place.route(keys));
        Ok(Self {
            places: places.collect::<Result<_, _>>()?,
            here: usize::try_from(here).ok(),
        })
    }

    /// What the secondary at the place of this number is told.
    pub(super) fn tell(&self, number: usize) -> (Vec<Place>, u64) {
        let places = self.places.iter().map(Place::of);
        (places.collect(), number as u64)
    }

    /// What an owner elsewhere is told, which none of them is.
    pub(super) fn tell_all(&self) -> Vec<Place> {
        self.places.iter().map(Place::of).collect()
    }

    /// What [`Standbys::tell_all`] told. They are verified by `keys`, if there are some here.
    pub(super) fn heard(places: &[Place], keys: Option<&Keys>) -> Result<Self, ProtectionError> {
        Self::told(places, NOWHERE, keys)
    }

    /// Those that may be tried, with their numbers.
    pub(super) fn others(&self) -> Vec<(usize, Route)> {
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

    fn place(address: &str) -> Place {
        let name = Some("host".to_owned());
        let address = address.to_owned();
        let second = Some("10.1.0.2:1".to_owned());
        Place {
            address,
            name,
            second,
        }
    }

    #[test]
    fn each_owner_tries_all_others() {
        let places = ["10.0.0.2:1", "10.0.0.3:1", "/run/x"].map(|place| place.parse().unwrap());
        let routes = places.map(|place| Route::new(place, None));
        let first = Standbys::new(routes.to_vec());
        assert_eq!(numbers(&first), [0, 1, 2]);
        let (told, here) = first.tell(1);
        assert_eq!(told[0].name.as_deref(), Some("10.0.0.2"));
        assert_eq!(told[0].second, None);
        let second = Standbys::told(&told, here, None).unwrap();
        assert_eq!(numbers(&second), [0, 2]);
        let (told, here) = second.tell(2);
        assert_eq!(numbers(&Standbys::told(&told, here, None).unwrap()), [0, 1]);
    }

    #[test]
    fn second_paths_are_told_of() {
        let told = [place("10.0.0.2:1")];
        let list = Standbys::told(&told, 7, None).unwrap();
        let second = list.others()[0].1.second().map(ToString::to_string);
        assert_eq!(second, told[0].second);
        assert_eq!(list.tell(0).0[0].second, told[0].second);
    }

    #[test]
    fn a_list_that_cannot_be_is_refused() {
        let long = vec![place("/run/x"); STANDBYS_MAX + 1];
        assert!(Standbys::told(&long, 0, None).is_err());
        assert!(Standbys::told(&[place("nowhere")], 0, None).is_err());
        let outside = Standbys::told(&[place("/run/x")], u64::MAX, None).unwrap();
        assert_eq!(numbers(&outside), [0]);
    }
}
