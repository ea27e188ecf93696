//! Addresses of stores, as users write them: one parser for every flag, key and call.
//!
//! ```text
//!   /shared/tandem               a directory
//!   file:///shared/tandem        the same, taken as it is written: nothing in it is decoded
//!   s3://BUCKET/PREFIX           a bucket, or a part of it
//! ```

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Begins the address of a directory that could be taken for something else.
const FILE: &str = "file://";
/// Begins that of a bucket.
const S3: &str = "s3://";
/// Ends the scheme of any address.
const SCHEME_END: &str = "://";
/// Longest name of a bucket in bytes.
const BUCKET_LENGTH_MAX: usize = 255;
/// Longest prefix in a bucket in bytes; a key has 1024 in all.
const PREFIX_LENGTH_MAX: usize = 512;
/// What is allowed, for messages.
const ALLOWED: &str = "must be a directory, `file:///DIRECTORY` or `s3://BUCKET/PREFIX`";

/// Where a store is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// A directory, which hosts may share.
    Directory(PathBuf),
    /// A bucket of S3 or of what speaks as it does.
    Bucket {
        /// Its name.
        bucket: String,
        /// What the names of the store's objects begin with, without `/` at either end; empty for all of the bucket.
        prefix: String,
    },
}

/// A text that is no address of a store.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what}")]
pub struct PlaceError {
    /// What is allowed.
    what: String,
}

impl Place {
    /// The directory, if it is one.
    pub fn directory(&self) -> Option<&Path> {
        match self {
            Self::Directory(path) => Some(path),
            Self::Bucket { .. } => None,
        }
    }

    /// The same place for whoever has another working directory: a relative path is below `directory`.
    #[must_use]
    pub fn based_on(self, directory: &Path) -> Self {
        match self {
            Self::Directory(path) => Self::Directory(directory.join(path)),
            bucket @ Self::Bucket { .. } => bucket,
        }
    }
}

impl FromStr for Place {
    type Err = PlaceError;

    fn from_str(text: &str) -> Result<Self, PlaceError> {
        if let Some(rest) = text.strip_prefix(S3) {
            return bucket(rest);
        }
        let path = match text.strip_prefix(FILE) {
            Some(path) if path.starts_with('/') => path,
            Some(_) => return refuse("must be `file:///DIRECTORY`, with three slashes"),
            // A scheme that is not known is not the name of a directory.
            None if has_scheme(text) => return refuse(ALLOWED),
            None => text,
        };
        if path.is_empty() || path.contains('\0') {
            return refuse(ALLOWED);
        }
        Ok(Self::Directory(path.into()))
    }
}

fn has_scheme(text: &str) -> bool {
    let scheme = text.split_once(SCHEME_END).map(|(scheme, _)| scheme);
    scheme.is_some_and(|scheme| scheme.bytes().all(|byte| byte.is_ascii_alphanumeric()))
}

fn bucket(rest: &str) -> Result<Place, PlaceError> {
    let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    if !is_name(bucket) || bucket.len() > BUCKET_LENGTH_MAX {
        return refuse(
            "must be `s3://BUCKET/PREFIX`, the bucket's name of letters, digits, `-`, `_` and `.`",
        );
    }
    let prefix = prefix.trim_matches('/');
    let fits = prefix.is_empty() || prefix.split('/').all(is_name);
    if !fits || prefix.len() > PREFIX_LENGTH_MAX {
        return refuse(format!(
            "must be `s3://BUCKET/PREFIX`, the prefix of at most {PREFIX_LENGTH_MAX} letters, digits, `-`, `_` and `.` with single `/` in between"
        ));
    }
    Ok(Place::Bucket {
        bucket: bucket.to_owned(),
        prefix: prefix.to_owned(),
    })
}

/// Whether it can be a bucket's name, or a part of a prefix: what comes back as it was from every server.
fn is_name(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    !text.is_empty() && text.bytes().all(allowed) && !text.bytes().all(|byte| byte == b'.')
}

fn refuse<T>(what: impl Into<String>) -> Result<T, PlaceError> {
    Err(PlaceError { what: what.into() })
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            // Else it would be read as another address.
            Self::Directory(path) if has_scheme(&path.to_string_lossy()) => {
                write!(f, "./{}", path.display())
            }
            Self::Directory(path) => path.display().fmt(f),
            Self::Bucket { bucket, prefix } if prefix.is_empty() => write!(f, "{S3}{bucket}"),
            Self::Bucket { bucket, prefix } => write!(f, "{S3}{bucket}/{prefix}"),
        }
    }
}

#[cfg(test)]
mod place_tests {
    use proptest::prelude::*;

    use super::*;

    fn read(text: &str) -> Result<Place, PlaceError> {
        text.parse()
    }

    fn directory(path: &str) -> Place {
        Place::Directory(path.into())
    }

    fn bucket(bucket: &str, prefix: &str) -> Place {
        let (bucket, prefix) = (bucket.to_owned(), prefix.to_owned());
        Place::Bucket { bucket, prefix }
    }

    #[test]
    fn directories_and_buckets_are_told_apart() {
        let places = [
            ("/shared/tandem", directory("/shared/tandem")),
            ("file:///shared/tan%20dem", directory("/shared/tan%20dem")),
            ("store", directory("store")),
            ("a b://c", directory("a b://c")),
            ("s3:/x", directory("s3:/x")),
            ("s3://bucket", bucket("bucket", "")),
            ("s3://bucket/", bucket("bucket", "")),
            (
                "s3://my-bucket/some/prefix/",
                bucket("my-bucket", "some/prefix"),
            ),
        ];
        for (text, place) in places {
            assert_eq!(read(text), Ok(place), "{text}");
        }
    }

    #[test]
    fn what_is_neither_is_refused_with_what_is_allowed() {
        let wrong = [
            ("", "s3://BUCKET/PREFIX"),
            ("a\0b", "s3://BUCKET/PREFIX"),
            ("http://host/x", "file:///DIRECTORY"),
            ("file://host/x", "three slashes"),
            ("s3://", "letters, digits"),
            ("s3:///prefix", "letters, digits"),
            ("s3://bucket/a//b", "single `/`"),
            ("s3://bucket/../x", "single `/`"),
            ("s3://bucket/a b", "single `/`"),
        ];
        for (text, expected) in wrong {
            let error = read(text).unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
        assert!(read(&format!("s3://bucket/{}", "x".repeat(513))).is_err());
    }

    #[test]
    fn relative_directories_are_below_a_base() {
        let base = Path::new("/base");
        assert_eq!(directory("x").based_on(base), directory("/base/x"));
        assert_eq!(directory("/x").based_on(base), directory("/x"));
        assert_eq!(bucket("b", "p").based_on(base), bucket("b", "p"));
    }

    proptest! {
        #[test]
        fn an_address_is_read_as_it_is_shown(text in "(s3://|file://|x://|/|\\./)?[a-z0-9./ :_-]{0,30}") {
            if let Ok(place) = read(&text) {
                // A directory may get `./` in front, and is the same one.
                let again = read(&place.to_string()).unwrap().based_on(Path::new("/"));
                prop_assert_eq!(again.to_string().replace("/./", "/"), place.based_on(Path::new("/")).to_string().replace("/./", "/"));
            }
        }
    }
}
