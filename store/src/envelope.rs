//! What is around the content of an object.
//!
//! ```text
//!   magic, 8 | kind, 4 | version, 4 | flags, 4 | salt, 16 | length of the content, 8 |
//!   content: compressed (zstd), then sealed if the store is encrypted | BLAKE3, 32
//! ```
//!
//! Integers are little-endian. The hash is of the object's name and all that is before it: an object under
//! another name is damaged too. Packs have the same head and end, and more in between ([`crate::chunk`]).

use crate::seal::{Key, ObjectKey, SALT_LENGTH};
use crate::{FORMAT_VERSION, StoreError};

/// The first bytes of every object.
const MAGIC: [u8; 8] = *b"TNDMSTO\x1a";
/// Bytes of a hash.
pub(crate) const HASH_LENGTH: usize = blake3::OUT_LEN;
/// Bytes before an object's content.
pub(crate) const HEAD_LENGTH: usize = 8 + 4 + 4 + 4 + SALT_LENGTH;
/// Flag: the content is sealed.
const SEALED: u32 = 1;
/// Compression of what is written once and read seldom; see zstd(1).
pub(crate) const LEVEL: i32 = 1;

/// What an object is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Kind {
    tag: [u8; 4],
    /// What people call it.
    title: &'static str,
    /// Most bytes of its content.
    length_max: u64,
}

impl Kind {
    pub(crate) const FORMAT: Self = Self::new(*b"form", "the description of a store", 64 << 10);
    pub(crate) const START: Self = Self::new(*b"strt", "the start of a term", 64 << 10);
    pub(crate) const FLOOR: Self = Self::new(*b"flor", "a floor", 64 << 10);
    pub(crate) const OWNER: Self = Self::new(*b"ownr", "an owner's record", 64 << 10);
    pub(crate) const MANIFEST: Self = Self::new(*b"mani", "a manifest", 48 << 20);
    pub(crate) const TABLE: Self = Self::new(*b"tabl", "a page table", 48 << 20);
    pub(crate) const PACK: Self = Self::new(*b"pack", "a pack", 32 << 20);

    const fn new(tag: [u8; 4], title: &'static str, length_max: u64) -> Self {
        Self {
            tag,
            title,
            length_max,
        }
    }

    /// Most bytes of an object of this kind.
    pub(crate) fn object_length_max(self) -> u64 {
        // What does not shrink grows by less than that.
        self.length_max + self.length_max / 128 + 1024
    }
}

/// The head of an object.
pub(crate) struct Head {
    bytes: [u8; HEAD_LENGTH],
}

impl Head {
    /// A new one, with a key for the object's content if the store has one.
    pub(crate) fn new(kind: Kind, name: &str, key: Option<&Key>) -> (Self, Option<ObjectKey>) {
        let salt = tandem_ft::arbiter::Claimant::random().expect("the host has random bytes");
        let flags = if key.is_some() { SEALED } else { 0 };
        let mut bytes = [0; HEAD_LENGTH];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&kind.tag);
        bytes[12..16].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
        bytes[16..20].copy_from_slice(&flags.to_le_bytes());
        bytes[20..].copy_from_slice(&salt.to_bytes());
        let key = key.map(|key| key.of_object(name, salt.to_bytes()));
        (Self { bytes }, key)
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Reads that of the object `name`; gives the key of its content if that is sealed.
    pub(crate) fn read(
        kind: Kind,
        name: &str,
        bytes: &[u8],
        key: Option<&Key>,
    ) -> Result<Option<ObjectKey>, StoreError> {
        let damaged = |what: String| Err(StoreError::damaged(name, what));
        let Some(bytes) = bytes.first_chunk::<HEAD_LENGTH>() else {
            return damaged("it is cut off in its head".to_owned());
        };
        let word = |at: usize| {
            let mut word = [0; 4];
            word.copy_from_slice(&bytes[at..at + 4]);
            u32::from_le_bytes(word)
        };
        if bytes[..8] != MAGIC || bytes[8..12] != kind.tag {
            return damaged(format!("it does not begin as {}", kind.title));
        }
        if word(12) != FORMAT_VERSION {
            let found = word(12);
            return damaged(format!(
                "it has version {found}; allowed is {FORMAT_VERSION}"
            ));
        }
        let mut salt = [0; SALT_LENGTH];
        salt.copy_from_slice(&bytes[20..]);
        match (word(16), key) {
            (0, _) => Ok(None),
            (SEALED, Some(key)) => Ok(Some(key.of_object(name, salt))),
            (SEALED, None) => Err(StoreError::Key {
                what: format!("`{name}` is encrypted: name the key file"),
            }),
            (flags, _) => damaged(format!("it has flags {flags:#x}; allowed are 0 and 1")),
        }
    }
}

/// The hash that ends the object `name`, of which `bytes` are all others.
pub(crate) fn hash_of(name: &str, bytes: &[u8]) -> [u8; HASH_LENGTH] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&(name.len() as u64).to_le_bytes());
    hasher.update(name.as_bytes());
    hasher.update(bytes);
    hasher.finalize().into()
}

/// All of an object before its hash, once that fits; and the hash.
pub(crate) fn checked<'a>(
    name: &str,
    object: &'a [u8],
) -> Result<(&'a [u8], [u8; HASH_LENGTH]), StoreError> {
    let Some((bytes, hash)) = object.split_last_chunk::<HASH_LENGTH>() else {
        return Err(StoreError::damaged(name, "it is cut off"));
    };
    if hash_of(name, bytes) != *hash {
        return Err(StoreError::damaged(name, "its hash does not fit"));
    }
    Ok((bytes, *hash))
}

/// Puts `content` into the object `name`.
pub(crate) fn wrap(
    kind: Kind,
    name: &str,
    content: &[u8],
    key: Option<&Key>,
) -> Result<Vec<u8>, StoreError> {
    if content.len() as u64 > kind.length_max {
        return Err(StoreError::TooLarge {
            what: format!("the content of `{name}` in bytes"),
            found: content.len() as u64,
            max: kind.length_max,
        });
    }
    let (head, key) = Head::new(kind, name, key);
    let mut body = compress(content);
    if let Some(key) = key {
        key.seal(0, &mut body);
    }
    let length = (content.len() as u64).to_le_bytes();
    let mut object = [head.bytes(), &length, &body].concat();
    object.extend(hash_of(name, &object));
    Ok(object)
}

/// The content of the object `name`.
pub(crate) fn unwrap(
    kind: Kind,
    name: &str,
    object: &[u8],
    key: Option<&Key>,
) -> Result<Vec<u8>, StoreError> {
    // Another version may end in another way, but that a key is missing is said of what is whole.
    let key = match Head::read(kind, name, object, key) {
        Err(error) if error.is_damage() => return Err(error),
        key => key,
    };
    let (bytes, _) = checked(name, object)?;
    let key = key?;
    let Some((length, body)) = bytes[HEAD_LENGTH..].split_first_chunk::<8>() else {
        return Err(StoreError::damaged(name, "it is cut off"));
    };
    let length = u64::from_le_bytes(*length);
    if length > kind.length_max {
        let what = format!(
            "it says that it has {length} bytes; allowed are {}",
            kind.length_max
        );
        return Err(StoreError::damaged(name, what));
    }
    let body = open(name, 0, body.to_vec(), key.as_ref())?;
    decompress(name, &body, length as usize)
}

/// Opens a part if it is sealed.
pub(crate) fn open(
    name: &str,
    number: u64,
    bytes: Vec<u8>,
    key: Option<&ObjectKey>,
) -> Result<Vec<u8>, StoreError> {
    let Some(key) = key else {
        return Ok(bytes);
    };
    key.open(number, bytes)
        .ok_or_else(|| StoreError::damaged(name, "what is sealed in it was changed"))
}

pub(crate) fn compress(bytes: &[u8]) -> Vec<u8> {
    zstd::bulk::compress(bytes, LEVEL).expect("memory can be compressed")
}

/// What was compressed to `bytes`, of `length` bytes.
pub(crate) fn decompress(name: &str, bytes: &[u8], length: usize) -> Result<Vec<u8>, StoreError> {
    let content = zstd::bulk::decompress(bytes, length).map_err(|error| {
        StoreError::damaged(name, format!("it cannot be decompressed: {error}"))
    })?;
    if content.len() != length {
        let found = content.len();
        return Err(StoreError::damaged(
            name,
            format!("it has {found} bytes, not {length}"),
        ));
    }
    Ok(content)
}

/// Bytes of a value in MessagePack, structures with the names of their fields.
pub(crate) fn to_bytes<T: serde::Serialize>(value: &T) -> Vec<u8> {
    rmp_serde::to_vec_named(value).expect("values in memory can be written")
}

/// The value that has exactly these bytes.
pub(crate) fn from_bytes<T: serde::de::DeserializeOwned>(
    name: &str,
    bytes: &[u8],
) -> Result<T, StoreError> {
    let damaged = |what: String| StoreError::damaged(name, what);
    let mut from = rmp_serde::Deserializer::new(std::io::Cursor::new(bytes));
    let value = T::deserialize(&mut from).map_err(|error| damaged(error.to_string()))?;
    if from.position() != bytes.len() as u64 {
        return Err(damaged("bytes follow its end".to_owned()));
    }
    Ok(value)
}
