//! Encryption at rest: AES-256-GCM (NIST SP 800-38D), with a key that each host has in a file.
//!
//! Each object has a key of its own, derived (BLAKE3) from the store's and a salt that is drawn when the
//! object is made. Its parts are sealed with their number as nonce, so no nonce comes twice. What is sealed
//! says for which object, so that nobody puts one in the place of another. The description of the hardware
//! stays readable: it has no secrets.

use std::fmt;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, MAX_TAG_LEN, NONCE_LEN, Nonce, UnboundKey};
use rustix::rand::{GetRandomFlags, getrandom};

use crate::StoreError;

/// Bytes of a key.
const KEY_LENGTH: usize = 32;
/// Bytes by which an object's key differs from others.
pub(crate) const SALT_LENGTH: usize = 16;
/// Bytes that sealing adds.
pub(crate) const TAG_LENGTH: usize = MAX_TAG_LEN;
/// Most bytes of a key file that are looked at.
const KEY_FILE_MAX: u64 = 1024;
/// Bits of a file's mode that let others than its owner at it.
const OTHERS: u32 = 0o077;
/// What an object's key is derived for.
const OBJECT_CONTEXT: &str = "Tandem checkpoint store, 2026: key of an object";
/// What tells keys apart is derived for.
const CHECK_CONTEXT: &str = "Tandem checkpoint store, 2026: which key";

/// A store's key.
#[derive(Clone, PartialEq, Eq)]
pub struct Key([u8; KEY_LENGTH]);

impl Key {
    /// The key in a file: 64 hexadecimal digits, such as `openssl rand -hex 32` prints. Only its owner may be
    /// allowed to read it.
    ///
    /// # Errors
    /// When it is anything else.
    pub fn read(path: &Path) -> Result<Self, StoreError> {
        let metadata = fs::metadata(path).map_err(StoreError::file("open", path))?;
        if metadata.mode() & OTHERS != 0 {
            return Err(StoreError::Key {
                what: format!(
                    "`{}` has mode {:o}: a key file must be its owner's alone (chmod 600)",
                    path.display(),
                    metadata.mode() & 0o777
                ),
            });
        }
        let text = match metadata.len() {
            0..=KEY_FILE_MAX => fs::read_to_string(path).map_err(StoreError::file("read", path))?,
            _ => String::new(),
        };
        Self::parse(text.trim()).ok_or_else(|| StoreError::Key {
            what: format!(
                "`{}` holds no key: it must be {} hexadecimal digits",
                path.display(),
                KEY_LENGTH * 2
            ),
        })
    }

    /// Draws a key, and writes it to a file that must not exist, for its owner alone.
    ///
    /// # Errors
    /// When the file is there or cannot be written, or the host has no random bytes.
    pub fn create(path: &Path) -> Result<Self, StoreError> {
        let mut key = [0; KEY_LENGTH];
        let drawn = getrandom(&mut key, GetRandomFlags::empty()).map_err(io::Error::from);
        let drawn = drawn.and_then(|length| match length == KEY_LENGTH {
            true => Ok(()),
            false => Err(io::ErrorKind::UnexpectedEof.into()),
        });
        drawn.map_err(StoreError::file("draw a key for", path))?;
        let digits: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
        let mut options = fs::File::options();
        let file = options.write(true).create_new(true).mode(0o600).open(path);
        let written = file.and_then(|mut file| {
            writeln!(file, "{digits}")?;
            file.sync_all()
        });
        written.map_err(StoreError::file("write", path))?;
        Ok(Self(key))
    }

    /// The key with these hexadecimal digits.
    pub fn parse(text: &str) -> Option<Self> {
        let digits: Vec<u8> = text
            .chars()
            .map(|c| c.to_digit(16).map(|digit| digit as u8))
            .collect::<Option<_>>()?;
        let (pairs, []) = digits.as_chunks::<2>() else {
            return None;
        };
        let bytes: Vec<u8> = pairs.iter().map(|[high, low]| high << 4 | low).collect();
        bytes.try_into().ok().map(Self)
    }

    /// What tells this key from others and says nothing of it.
    pub(crate) fn check(&self) -> String {
        blake3::Hash::from(blake3::derive_key(CHECK_CONTEXT, &self.0)).to_string()
    }

    /// The key of the object `name`, made with `salt`.
    pub(crate) fn of_object(&self, name: &str, salt: [u8; SALT_LENGTH]) -> ObjectKey {
        let key = blake3::derive_key(OBJECT_CONTEXT, &[&self.0[..], &salt].concat());
        let key =
            UnboundKey::new(&AES_256_GCM, &key).expect("it is as long as the algorithm's keys");
        ObjectKey {
            key: LessSafeKey::new(key),
            name: name.to_owned(),
        }
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key")
    }
}

/// The key of one object.
#[derive(Debug)]
pub(crate) struct ObjectKey {
    key: LessSafeKey,
    name: String,
}

impl ObjectKey {
    /// Seals part `number` of the object, in place.
    pub(crate) fn seal(&self, number: u64, bytes: &mut Vec<u8>) {
        let aad = Aad::from(self.name.as_bytes());
        self.key
            .seal_in_place_append_tag(nonce(number), aad, bytes)
            .expect("parts are shorter than 64 GiB");
    }

    /// Opens part `number`; nothing if it is not what was sealed.
    pub(crate) fn open(&self, number: u64, mut bytes: Vec<u8>) -> Option<Vec<u8>> {
        let aad = Aad::from(self.name.as_bytes());
        let length = self
            .key
            .open_in_place(nonce(number), aad, &mut bytes)
            .ok()?
            .len();
        bytes.truncate(length);
        Some(bytes)
    }
}

fn nonce(number: u64) -> Nonce {
    let mut nonce = [0; NONCE_LEN];
    nonce[..size_of::<u64>()].copy_from_slice(&number.to_le_bytes());
    Nonce::assume_unique_for_key(nonce)
}

#[cfg(test)]
mod key_tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn key(digit: &str) -> Key {
        Key::parse(&digit.repeat(KEY_LENGTH * 2)).unwrap()
    }

    #[test]
    fn sealed_parts_open_for_their_object_number_and_key_only() {
        let salt = [1; SALT_LENGTH];
        let mut sealed = b"state".to_vec();
        key("a").of_object("x", salt).seal(3, &mut sealed);
        assert_eq!(sealed.len(), 5 + TAG_LENGTH);
        let open =
            |key: Key, name, salt, number| key.of_object(name, salt).open(number, sealed.clone());
        assert_eq!(open(key("a"), "x", salt, 3).as_deref(), Some(&b"state"[..]));
        assert_eq!(open(key("b"), "x", salt, 3), None);
        assert_eq!(open(key("a"), "y", salt, 3), None);
        assert_eq!(open(key("a"), "x", [2; SALT_LENGTH], 3), None);
        assert_eq!(open(key("a"), "x", salt, 4), None);
    }

    #[test]
    fn a_key_that_was_drawn_is_read_and_never_overwritten() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key");
        let key = Key::create(&path).unwrap();
        assert_eq!(Key::read(&path).unwrap(), key);
        assert!(key != Key([0; KEY_LENGTH]));
        assert!(matches!(Key::create(&path), Err(StoreError::File { .. })));
        assert_eq!(Key::read(&path).unwrap(), key);
    }

    #[test]
    fn key_files_of_others_or_without_a_key_are_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let write = |text: &str, mode| {
            fs::write(file.path(), text).unwrap();
            fs::set_permissions(file.path(), fs::Permissions::from_mode(mode)).unwrap();
            Key::read(file.path())
        };
        let text = "0F".repeat(KEY_LENGTH) + "\n";
        assert_eq!(write(&text, 0o600).unwrap(), Key([0x0f; KEY_LENGTH]));
        assert!(
            write(&text, 0o640)
                .unwrap_err()
                .to_string()
                .contains("mode 640")
        );
        for text in ["", "0f", &"0g".repeat(KEY_LENGTH), &"é".repeat(KEY_LENGTH)] {
            let error = write(text, 0o600).unwrap_err().to_string();
            assert!(error.contains("64 hexadecimal digits"), "{error}");
        }
    }
}
