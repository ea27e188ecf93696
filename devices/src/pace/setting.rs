//! What a user says of a device's pace: `PROFILE` or `PROFILE+KEY:VALUE...`, as in `hdd+latency-us:500`.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::model::{NominalModel, PROFILES, TIME_MAX};

/// A moment when the guest can surely take an interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Safepoint {
    /// The vCPU that gets the interrupt is halted.
    Halted,
    /// The vCPU that gets it was seen in user mode with interrupts enabled and none in service.
    UserMode,
    /// The driver made requests.
    Kick,
    /// The driver looks at the queue by itself, and wants no interrupt.
    Poll,
    /// None: to see what becomes of a guest that gets its completions whenever they come.
    ForceEarly,
}

impl Safepoint {
    /// All kinds, in the order of their numbers.
    pub const ALL: [Self; 5] = [
        Self::Halted,
        Self::UserMode,
        Self::Kick,
        Self::Poll,
        Self::ForceEarly,
    ];

    /// The name in settings and figures.
    pub fn name(self) -> &'static str {
        match self {
            Self::Halted => "halted",
            Self::UserMode => "user-mode",
            Self::Kick => "kick",
            Self::Poll => "poll",
            Self::ForceEarly => "force-early",
        }
    }

    /// The kind of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

/// Kinds of safepoints that count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Safepoints(u8);

impl Default for Safepoints {
    /// All that are some.
    fn default() -> Self {
        let real = Safepoint::ALL.into_iter();
        real.filter(|kind| *kind != Safepoint::ForceEarly).collect()
    }
}

impl FromIterator<Safepoint> for Safepoints {
    fn from_iter<T: IntoIterator<Item = Safepoint>>(kinds: T) -> Self {
        Self(
            kinds
                .into_iter()
                .fold(0, |bits, kind| bits | 1 << kind as u8),
        )
    }
}

impl Safepoints {
    /// Whether `kind` counts.
    pub fn contains(self, kind: Safepoint) -> bool {
        self.0 & 1 << kind as u8 != 0
    }

    /// The names of those that count.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        let kinds = Safepoint::ALL.into_iter();
        kinds
            .filter(move |kind| self.contains(*kind))
            .map(Safepoint::name)
    }
}

/// How a device is paced: its nominal speed, and when completions may be earlier.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pace {
    /// The nominal device.
    pub model: NominalModel,
    /// The safepoints that count.
    pub safepoints: Safepoints,
}

/// A text that is no pace.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct PaceError(String);

/// The profile of a device that is not paced.
const NONE: &str = "none";
/// The profile of a device all of whose values are given.
const CUSTOM: &str = "custom";
/// Between safepoints, of which there may be none.
const SAFEPOINT_SEPARATOR: char = '/';
/// Largest rate, per second: more than a device has.
const RATE_MAX: u64 = 1 << 50;

type Time = fn(&mut NominalModel) -> &mut Duration;
type Rate = fn(&mut NominalModel) -> &mut u64;

const TIMES: [(&str, Time); 4] = [
    ("latency-us", |m| &mut m.latency),
    ("seek-min-us", |m| &mut m.seek_min),
    ("seek-max-us", |m| &mut m.seek_max),
    ("rotation-us", |m| &mut m.rotation),
];
const RATES: [(&str, Rate); 2] = [
    ("bytes-per-second", |m| &mut m.bytes_per_second),
    ("completions-per-second", |m| &mut m.completions_per_second),
];

impl Pace {
    /// Keys of its values that are numbers.
    pub const NUMBERS: [&str; 6] = [
        TIMES[0].0, TIMES[1].0, TIMES[2].0, TIMES[3].0, RATES[0].0, RATES[1].0,
    ];
    /// The key that says whether interrupts may be fewer than deliveries.
    pub const COALESCE: &str = "coalesce";
    /// The key of the safepoints that count.
    pub const SAFEPOINTS: &str = "safepoints";

    /// Whether it lets everything pass.
    pub fn is_none(&self) -> bool {
        self.model == NominalModel::default()
    }

    /// What a user may say.
    pub fn allowed() -> String {
        let profiles: Vec<&str> = PROFILES.iter().map(|p| p.name).collect();
        format!(
            "must be `{NONE}`, `{}` or `{CUSTOM}`, and may be followed by +KEY:VALUE with the keys {}, {}, {}; \
             times are at most {} s, safepoints are {} with `{SAFEPOINT_SEPARATOR}` in between",
            profiles.join("`, `"),
            Self::NUMBERS.join(", "),
            Self::COALESCE,
            Self::SAFEPOINTS,
            TIME_MAX.as_secs(),
            Safepoints::default().names().collect::<Vec<_>>().join(", "),
        )
    }

    /// The pace of a profile.
    ///
    /// # Errors
    /// When there is no such profile.
    pub fn profile(name: &str) -> Result<Self, PaceError> {
        let known = PROFILES.iter().find(|p| p.name == name).map(|p| p.model);
        let bare = matches!(name, NONE | CUSTOM).then(NominalModel::default);
        let model = known.or(bare).ok_or_else(|| PaceError(Self::allowed()))?;
        Ok(Self {
            model,
            safepoints: Safepoints::default(),
        })
    }

    /// Sets one value by its key.
    ///
    /// # Errors
    /// When there is no such key, or it cannot have this value.
    pub fn set(&mut self, key: &str, value: &str) -> Result<(), PaceError> {
        self.try_set(key, value)
            .ok_or_else(|| PaceError(Self::allowed()))
    }

    fn try_set(&mut self, key: &str, value: &str) -> Option<()> {
        if let Some((_, field)) = TIMES.iter().find(|(name, _)| *name == key) {
            let time = Duration::from_micros(value.parse().ok()?);
            *field(&mut self.model) = Some(time).filter(|time| *time <= TIME_MAX)?;
        } else if let Some((_, field)) = RATES.iter().find(|(name, _)| *name == key) {
            let rate = value.parse().ok();
            *field(&mut self.model) = rate.filter(|rate| *rate <= RATE_MAX)?;
        } else if key == Self::COALESCE {
            self.model.coalesce = value.parse().ok()?;
        } else if key == Self::SAFEPOINTS {
            let names = value
                .split(SAFEPOINT_SEPARATOR)
                .filter(|name| !name.is_empty());
            self.safepoints = names.map(Safepoint::from_name).collect::<Option<_>>()?;
        } else {
            return None;
        }
        Some(())
    }

    /// The values in which it differs from `base`.
    fn differences(mut self, mut base: Self) -> Vec<(&'static str, String)> {
        let mut found = Vec::new();
        for (key, field) in TIMES {
            let (own, other) = (*field(&mut self.model), *field(&mut base.model));
            if own != other {
                found.push((key, own.as_micros().to_string()));
            }
        }
        for (key, field) in RATES {
            let (own, other) = (*field(&mut self.model), *field(&mut base.model));
            if own != other {
                found.push((key, own.to_string()));
            }
        }
        if self.model.coalesce != base.model.coalesce {
            found.push((Self::COALESCE, self.model.coalesce.to_string()));
        }
        if self.safepoints != base.safepoints {
            let names: Vec<&str> = self.safepoints.names().collect();
            found.push((
                Self::SAFEPOINTS,
                names.join(&SAFEPOINT_SEPARATOR.to_string()),
            ));
        }
        found
    }
}

impl fmt::Display for Pace {
    /// The shortest text that says the same.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = [NONE, CUSTOM].into_iter();
        let names = names.chain(PROFILES.iter().map(|p| p.name));
        let texts = names.filter_map(|name| {
            let base = Self::profile(name).ok()?;
            Some((name, self.differences(base)))
        });
        let Some((name, values)) = texts.min_by_key(|(_, values)| values.len()) else {
            return Ok(());
        };
        let name = if name == NONE && !values.is_empty() {
            CUSTOM
        } else {
            name
        };
        f.write_str(name)?;
        values
            .iter()
            .try_for_each(|(key, value)| write!(f, "+{key}:{value}"))
    }
}

impl FromStr for Pace {
    type Err = PaceError;

    fn from_str(text: &str) -> Result<Self, PaceError> {
        let mut parts = text.split('+');
        let mut pace = Self::profile(parts.next().unwrap_or_default())?;
        for part in parts {
            let (key, value) = part.split_once(':').unwrap_or((part, ""));
            pace.set(key, value)?;
        }
        Ok(pace)
    }
}

impl Serialize for Pace {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Pace {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "test code fails by panicking")]

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn profiles_go_by_their_names() {
        for name in ["none", "hdd", "ssd", "nvme", "nic-1g"] {
            let pace: Pace = name.parse().unwrap();
            assert_eq!(pace.to_string(), name);
            assert_eq!(pace.is_none(), name == "none");
        }
        assert_eq!("custom".parse::<Pace>().unwrap(), Pace::default());
    }

    #[test]
    fn a_profile_can_be_changed() {
        let text = "hdd+latency-us:500+safepoints:halted/kick";
        let pace: Pace = text.parse().unwrap();
        assert_eq!(pace.model.latency, Duration::from_micros(500));
        assert_eq!(
            pace.safepoints.names().collect::<Vec<_>>(),
            ["halted", "kick"]
        );
        assert_eq!(pace.to_string(), text);
        let none: Pace = "ssd+safepoints:".parse().unwrap();
        assert_eq!(none.safepoints.names().count(), 0);
        let forced: Pace = "hdd+safepoints:force-early".parse().unwrap();
        assert!(forced.safepoints.contains(Safepoint::ForceEarly));
    }

    #[test]
    fn what_is_not_allowed_is_refused_in_words() {
        for text in [
            "",
            "tape",
            "hdd+",
            "hdd+latency-us",
            "hdd+latency-us:-1",
            "hdd+latency-us:60000001",
            "ssd+bytes-per-second:99999999999999999",
            "ssd+coalesce:1",
            "ssd+safepoints:idle",
            "ssd+speed:3",
        ] {
            let error = text.parse::<Pace>().unwrap_err().to_string();
            assert!(
                error.contains("`nic-1g`") && error.contains("seek-max-us"),
                "{text}: {error}"
            );
            assert!(!error.contains("force-early"), "{error}");
        }
    }

    proptest! {
        #[test]
        fn every_pace_survives_its_text(
            times in prop::array::uniform4(0_u64..=60_000_000),
            rates in prop::array::uniform2(0..=RATE_MAX),
            coalesce in any::<bool>(),
            kinds in prop::collection::vec(0_usize..5, 0..5),
        ) {
            let mut pace = Pace::default();
            for ((_, field), value) in TIMES.iter().zip(times) {
                *field(&mut pace.model) = Duration::from_micros(value);
            }
            for ((_, field), value) in RATES.iter().zip(rates) {
                *field(&mut pace.model) = value;
            }
            pace.model.coalesce = coalesce;
            pace.safepoints = kinds.iter().map(|kind| Safepoint::ALL[*kind]).collect();
            prop_assert_eq!(pace.to_string().parse::<Pace>(), Ok(pace));
        }

        #[test]
        fn no_text_panics(text in "[a-z0-9+:/-]{0,40}") {
            if let Ok(pace) = text.parse::<Pace>() {
                prop_assert_eq!(pace.to_string().parse::<Pace>(), Ok(pace));
            }
        }
    }
}
