//! A stream of random bytes that can be saved and continued.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};

use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// Bytes of a seed.
pub const SEED_SIZE: usize = 32;
/// Where the host gives out random bytes.
const HOST_SOURCE: &str = "/dev/urandom";

/// Everything that decides what comes next.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct StreamState {
    /// The seed.
    pub seed: [u8; SEED_SIZE],
    /// 32-bit words given out.
    pub position: u64,
}

impl fmt::Debug for StreamState {
    /// Leaves the seed out: it is a secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StreamState")
            .field("position", &self.position)
            .finish_non_exhaustive()
    }
}

/// ChaCha20 keyed with a seed. Two streams of the same state give the same bytes.
pub struct SeededStream(ChaCha20Rng);

impl SeededStream {
    /// The beginning of the stream of `seed`.
    pub fn new(seed: [u8; SEED_SIZE]) -> Self {
        Self(ChaCha20Rng::from_seed(seed))
    }

    /// A stream that nobody can guess.
    ///
    /// # Errors
    /// When the host's source of random bytes cannot be read.
    pub fn from_host() -> io::Result<Self> {
        let mut seed = [0; SEED_SIZE];
        File::open(HOST_SOURCE)?.read_exact(&mut seed)?;
        Ok(Self::new(seed))
    }

    /// Goes on where another stream was.
    pub fn resume(state: StreamState) -> Self {
        let mut stream = Self::new(state.seed);
        stream.0.set_word_pos(u128::from(state.position));
        stream
    }

    /// Where the stream is. The counter is 64 bits of words: at a gigabyte per second it wraps
    /// after two thousand years.
    pub fn state(&self) -> StreamState {
        StreamState {
            seed: self.0.get_seed(),
            position: self.0.get_word_pos() as u64,
        }
    }

    /// Fills `into`. Uses whole words: bytes left over of the last one are thrown away.
    pub fn fill(&mut self, into: &mut [u8]) {
        self.0.fill_bytes(into);
    }
}

impl fmt::Debug for SeededStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.state().fmt(f)
    }
}
