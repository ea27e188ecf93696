//! What a guest's command line says about its network.

use core::fmt::Display;
use core::str::FromStr;

use alloc::string::{String, ToString};

use smoltcp::wire::{IpCidr, Ipv4Address, Ipv4Cidr, Ipv6Address, Ipv6Cidr};

/// Connections at a time, unless `connections=` says otherwise or memory is short.
const CONNECTIONS_DEFAULT: usize = 256;
/// Connections at a time even if memory is short.
const CONNECTIONS_DEFAULT_MIN: usize = 8;
/// Part of the memory that the buffers of all connections take by default: one in this many.
const BUFFERS_SHARE: usize = 4;
/// The most connections that can be asked for.
const CONNECTIONS_MAX: usize = 1024;
/// Octets that a connection buffers in each direction, unless `buffer=` says otherwise.
const BUFFER_BYTES_DEFAULT: usize = 64 * 1024;
/// The smallest and largest buffers that can be asked for.
const BUFFER_BYTES: core::ops::RangeInclusive<usize> = 4 * 1024..=1024 * 1024;

/// A key of the command line whose value cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the value `{value}` of `{key}=` is not {wanted}")]
pub struct ConfigError {
    /// The key.
    pub key: &'static str,
    /// Its value.
    pub value: String,
    /// What the value has to be.
    pub wanted: &'static str,
}

/// Where the IPv4 address comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ipv4Setting {
    /// `ip=dhcp`, which is the default.
    Dhcp,
    /// `ip=ADDRESS/PREFIX`.
    Static(Ipv4Cidr),
    /// `ip=off`.
    Off,
}

/// The network settings of a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// `ip=`: the IPv4 address.
    pub ipv4: Ipv4Setting,
    /// `gw=`: the IPv4 router.
    pub ipv4_router: Option<Ipv4Address>,
    /// `ip6=`: the IPv6 address, besides the link-local one.
    pub ipv6: Option<Ipv6Cidr>,
    /// `gw6=`: the IPv6 router.
    pub ipv6_router: Option<Ipv6Address>,
    /// `seed=`: where sequence numbers and transaction ids start.
    pub seed: u64,
    /// `connections=`: how many connections there may be at a time; see [`Config::fit`].
    pub connections_max: Option<usize>,
    /// `buffer=`: octets that a connection buffers in each direction.
    pub buffer_bytes: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            ipv4: Ipv4Setting::Dhcp,
            ipv4_router: None,
            ipv6: None,
            ipv6_router: None,
            seed: 0,
            connections_max: None,
            buffer_bytes: BUFFER_BYTES_DEFAULT,
        }
    }
}

impl Config {
    /// Reads the keys it knows from the words of a command line; `seed` is what counts where no
    /// `seed=` is given. A later word overrides an earlier one.
    ///
    /// # Errors
    /// [`ConfigError`] names the first key whose value cannot be used.
    pub fn from_words<'a>(
        words: impl Iterator<Item = (&'a str, &'a str)>,
        seed: u64,
    ) -> Result<Self, ConfigError> {
        let mut config = Self {
            seed,
            ..Self::default()
        };
        for (key, value) in words {
            config.read(key, value)?;
        }
        Ok(config)
    }

    /// Settles how many connections there may be at a time, if that was left open, so that a
    /// quarter of `memory_bytes` holds their buffers.
    #[must_use]
    pub fn fit(mut self, memory_bytes: usize) -> Self {
        let affordable = memory_bytes / BUFFERS_SHARE / (2 * self.buffer_bytes);
        let fitting = affordable.clamp(CONNECTIONS_DEFAULT_MIN, CONNECTIONS_DEFAULT);
        self.connections_max.get_or_insert(fitting);
        self
    }

    /// How many connections there may be at a time.
    pub fn connections(&self) -> usize {
        self.connections_max.unwrap_or(CONNECTIONS_DEFAULT)
    }

    fn read(&mut self, key: &str, value: &str) -> Result<(), ConfigError> {
        match key {
            "ip" => self.ipv4 = ipv4_setting(value)?,
            "gw" => self.ipv4_router = Some(parsed("gw", value, "an IPv4 address")?),
            "ip6" => {
                let wanted = "a unicast IPv6 address with a prefix length, as fd00::2/64";
                let cidr: Ipv6Cidr = parsed("ip6", value, wanted)?;
                let unicast = IpCidr::Ipv6(cidr).address().is_unicast();
                self.ipv6 = Some(
                    unicast
                        .then_some(cidr)
                        .ok_or_else(|| bad("ip6", value, wanted))?,
                );
            }
            "gw6" => self.ipv6_router = Some(parsed("gw6", value, "an IPv6 address")?),
            "seed" => self.seed = parsed("seed", value, "a number from 0 to 2^64-1")?,
            "connections" => {
                let wanted = "a number from 1 to 1024";
                let number = within("connections", value, 1..=CONNECTIONS_MAX, wanted)?;
                self.connections_max = Some(number);
            }
            "buffer" => {
                let wanted = "a number of octets from 4096 to 1048576";
                self.buffer_bytes = within("buffer", value, BUFFER_BYTES, wanted)?;
            }
            _ => {}
        }
        Ok(())
    }
}

fn ipv4_setting(value: &str) -> Result<Ipv4Setting, ConfigError> {
    let wanted =
        "`dhcp`, `off` or a unicast IPv4 address with a prefix length, as 192.168.100.2/24";
    match value {
        "dhcp" => Ok(Ipv4Setting::Dhcp),
        "off" => Ok(Ipv4Setting::Off),
        _ => {
            let cidr: Ipv4Cidr = parsed("ip", value, wanted)?;
            let unicast = IpCidr::Ipv4(cidr).address().is_unicast();
            unicast
                .then_some(Ipv4Setting::Static(cidr))
                .ok_or_else(|| bad("ip", value, wanted))
        }
    }
}

fn bad(key: &'static str, value: impl Display, wanted: &'static str) -> ConfigError {
    ConfigError {
        key,
        value: value.to_string(),
        wanted,
    }
}

fn parsed<T: FromStr>(
    key: &'static str,
    value: &str,
    wanted: &'static str,
) -> Result<T, ConfigError> {
    value.parse().map_err(|_| bad(key, value, wanted))
}

fn within(
    key: &'static str,
    value: &str,
    range: core::ops::RangeInclusive<usize>,
    wanted: &'static str,
) -> Result<usize, ConfigError> {
    let number = parsed(key, value, wanted)?;
    if range.contains(&number) {
        Ok(number)
    } else {
        Err(bad(key, value, wanted))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Config, ConfigError> {
        let words = text
            .split(' ')
            .map(|word| word.split_once('=').unwrap_or((word, "")));
        Config::from_words(words, 7)
    }

    #[test]
    fn knows_its_keys_and_leaves_others_alone() {
        let config = read("quiet ip=192.168.100.2/24 gw=192.168.100.1 ip6=fd00::2/64 buffer=8192")
            .expect("the words are right");
        let cidr = Ipv4Cidr::new(Ipv4Address::new(192, 168, 100, 2), 24);
        assert_eq!(config.ipv4, Ipv4Setting::Static(cidr));
        assert_eq!(config.ipv4_router, Some(Ipv4Address::new(192, 168, 100, 1)));
        assert_eq!(config.ipv6.map(|cidr| cidr.prefix_len()), Some(64));
        assert_eq!((config.seed, config.buffer_bytes), (7, 8192));
    }

    #[test]
    fn asks_a_server_by_default() {
        assert_eq!(
            read("quiet"),
            Ok(Config {
                seed: 7,
                ..Config::default()
            })
        );
        assert_eq!(read("ip=dhcp seed=9").map(|config| config.seed), Ok(9));
    }

    #[test]
    fn takes_as_many_connections_as_it_can_afford() {
        let connections =
            |text, mib: usize| read(text).map(|config| config.fit(mib << 20).connections());
        assert_eq!(connections("", 1024), Ok(256));
        assert_eq!(connections("", 64), Ok(128));
        assert_eq!(connections("", 1), Ok(8));
        assert_eq!(connections("buffer=16384", 16), Ok(128));
        assert_eq!(connections("connections=300", 1), Ok(300));
    }

    #[test]
    fn names_key_value_and_what_is_allowed() {
        let error = read("connections=0").expect_err("no connections make no server");
        assert_eq!(
            error.to_string(),
            "the value `0` of `connections=` is not a number from 1 to 1024"
        );
        for text in [
            "ip=1.2.3.4",
            "ip=224.0.0.1/4",
            "ip6=ff02::1/8",
            "gw=x",
            "buffer=1",
            "seed=-1",
        ] {
            assert!(read(text).is_err(), "{text}");
        }
    }
}
