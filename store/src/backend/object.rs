//! Objects of a bucket: S3 and what speaks as it does, by object_store. The compare-and-swap is a conditional
//! put (`If-None-Match: *`), which not all of them keep: the race finds out.
//!
//! The crate is asynchronous; here each call runs it to its end on the thread that calls.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use object_store::aws::AmazonS3Builder;
use object_store::path::Path;
use object_store::{
    BackoffConfig, ClientOptions, Error, ObjectStore, ObjectStoreExt, PutMode, RetryConfig,
};
use tokio::runtime::{Builder, Runtime};

use super::{Backend, BackendError, Created, Entry, OBJECTS_MAX};
use crate::{Place, StoreError};

/// How long one request may take.
const REQUEST_TIME_MAX: Duration = Duration::from_secs(30);
/// How long a call goes on trying, requests included.
const RETRY_TIME_MAX: Duration = Duration::from_secs(60);
/// How often it tries again.
const RETRIES_MAX: usize = 8;

/// A bucket, or a part of it.
#[derive(Debug)]
pub struct ObjectBackend {
    store: Arc<dyn ObjectStore>,
    /// Ends with `/`, if it is not empty.
    prefix: String,
    place: String,
    runtime: Runtime,
}

impl ObjectBackend {
    /// The bucket `place`. Credentials, region and endpoint come from the environment, as the AWS
    /// tools take them (`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_REGION`, `AWS_ENDPOINT_URL`), or from
    /// the host's role. Plain HTTP is used only with an endpoint that says so.
    ///
    /// # Errors
    /// When it is no bucket, or something is missing in the environment.
    pub fn bucket(place: &Place) -> Result<Self, StoreError> {
        Self::bucket_with(place, &BTreeMap::new())
    }

    /// As [`ObjectBackend::bucket`], with settings by their names in the environment, which come before those of
    /// the environment.
    ///
    /// # Errors
    /// As that.
    pub fn bucket_with(place: &Place, settings: &BTreeMap<&str, &str>) -> Result<Self, StoreError> {
        let foreign = |what: String| StoreError::Foreign {
            place: format!("`{place}`"),
            what,
        };
        let Place::Bucket { bucket, prefix } = place else {
            return Err(foreign("it is no bucket".to_owned()));
        };
        provide_cryptography();
        let retry = RetryConfig {
            backoff: BackoffConfig::default(),
            max_retries: RETRIES_MAX,
            retry_timeout: RETRY_TIME_MAX,
        };
        let plain = endpoint(settings).is_some_and(|url| url.starts_with("http://"));
        let mut builder = AmazonS3Builder::from_env()
            .with_bucket_name(bucket)
            .with_client_options(
                ClientOptions::new()
                    .with_timeout(REQUEST_TIME_MAX)
                    .with_allow_http(plain),
            )
            .with_retry(retry);
        for (name, value) in settings {
            let key = name.to_lowercase().parse();
            let key = key.map_err(|error: Error| foreign(error.to_string()))?;
            builder = builder.with_config(key, *value);
        }
        let store = builder
            .build()
            .map_err(|error| foreign(error.to_string()))?;
        Self::over(Arc::new(store), prefix, &place.to_string())
            .map_err(|error| foreign(error.to_string()))
    }

    /// The objects of `store` whose names begin with `prefix`.
    ///
    /// # Errors
    /// When the host has no room for a runtime.
    pub fn over(store: Arc<dyn ObjectStore>, prefix: &str, place: &str) -> std::io::Result<Self> {
        let prefix = prefix.trim_matches('/');
        Ok(Self {
            store,
            prefix: match prefix {
                "" => String::new(),
                prefix => format!("{prefix}/"),
            },
            place: format!("`{place}`"),
            runtime: Builder::new_current_thread().enable_all().build()?,
        })
    }

    fn path(&self, name: &str) -> Path {
        Path::from(format!("{}{name}", self.prefix))
    }

    /// That the storage fails at `action` on `name`.
    fn failed(&self, action: &'static str, name: &str) -> impl FnOnce(Error) -> BackendError {
        let storage = BackendError::storage(action, name, self);
        move |error| storage(reason(&error))
    }

    fn put_new(&self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        let payload = bytes::Bytes::copy_from_slice(bytes).into();
        let path = self.path(name);
        let put = self.store.put_opts(&path, payload, PutMode::Create.into());
        self.runtime.block_on(put).map(drop)
    }

    fn read(&self, name: &str, length_max: u64) -> Result<Option<Vec<u8>>, BackendError> {
        let path = self.path(name);
        let failed = |error| self.failed("read", name)(error);
        let got = match self.runtime.block_on(self.store.get(&path)) {
            Err(Error::NotFound { .. }) => return Ok(None),
            got => got.map_err(failed)?,
        };
        BackendError::expect_length(self, name, got.meta.size, length_max)?;
        let bytes = self.runtime.block_on(got.bytes());
        bytes.map(|bytes| Some(bytes.to_vec())).map_err(failed)
    }
}

impl Backend for ObjectBackend {
    fn place(&self) -> String {
        self.place.clone()
    }

    fn create(&self, name: &str, bytes: &[u8]) -> Result<Created, BackendError> {
        let failed = match self.put_new(name, bytes) {
            Ok(()) => return Ok(Created::Yes),
            Err(error) => error,
        };
        // The answer to a put that succeeded may have been lost: what is there counts.
        match (self.read(name, bytes.len() as u64), failed) {
            (Ok(Some(found)), _) if found == bytes => Ok(Created::Yes),
            (Ok(Some(_)) | Err(BackendError::TooLong { .. }), _) => Ok(Created::Taken),
            (_, failed) => Err(self.failed("write", name)(failed)),
        }
    }

    fn get(&self, name: &str, length_max: u64) -> Result<Option<Vec<u8>>, BackendError> {
        self.read(name, length_max)
    }

    fn get_range(&self, name: &str, range: Range<u64>) -> Result<Vec<u8>, BackendError> {
        if range.is_empty() {
            return Ok(Vec::new());
        }
        let wanted = (range.end - range.start) as usize;
        let path = self.path(name);
        let got = self.runtime.block_on(self.store.get_range(&path, range));
        match got {
            Ok(bytes) if bytes.len() == wanted => Ok(bytes.to_vec()),
            // What begins behind the end is refused, what ends there is cut off.
            Ok(_) | Err(Error::NotFound { .. }) => Err(BackendError::missing(name, self)),
            Err(error) => match self.runtime.block_on(self.store.head(&path)) {
                Ok(meta) if meta.size < wanted as u64 => Err(BackendError::missing(name, self)),
                _ => Err(self.failed("read", name)(error)),
            },
        }
    }

    fn list(&self, prefix: &str) -> Result<Vec<Entry>, BackendError> {
        let below = self.path(prefix.trim_end_matches('/'));
        let listed = self.runtime.block_on(async {
            let mut stream = self.store.list(Some(&below));
            let mut entries = Vec::new();
            while let Some(meta) = futures_util::StreamExt::next(&mut stream).await {
                let meta = meta?;
                let name = meta.location.as_ref();
                let name = name.strip_prefix(&self.prefix).unwrap_or(name).to_owned();
                let length = meta.size;
                entries.push(Entry { name, length });
                if entries.len() > OBJECTS_MAX {
                    break;
                }
            }
            Ok::<_, Error>(entries)
        });
        let mut entries = listed.map_err(self.failed("list", prefix))?;
        if entries.len() > OBJECTS_MAX {
            let (prefix, place) = (prefix.to_owned(), self.place());
            return Err(BackendError::Crowded { prefix, place });
        }
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    fn remove(&self, name: &str) -> Result<(), BackendError> {
        match self.runtime.block_on(self.store.delete(&self.path(name))) {
            Ok(()) | Err(Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(self.failed("remove", name)(error)),
        }
    }
}

/// Why a request failed: the error and its causes, without those that repeat what caused them.
fn reason(error: &Error) -> String {
    let causes = std::iter::successors(Some(error as &dyn std::error::Error), |e| e.source());
    let causes: Vec<String> = causes.map(ToString::to_string).collect();
    let next = causes.iter().skip(1).map(Some).chain([None]);
    let own = causes.iter().zip(next);
    let own = own.filter(|(cause, next)| next.is_none_or(|next| !cause.contains(next)));
    let own: Vec<&str> = own.map(|(cause, _)| cause.as_str()).collect();
    own.join(": ")
}

/// The endpoint that was set, if one was.
fn endpoint(settings: &BTreeMap<&str, &str>) -> Option<String> {
    let names = ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"];
    let set = names
        .iter()
        .find_map(|name| settings.get(name).map(|url| (*url).to_owned()));
    set.or_else(|| names.iter().find_map(|name| std::env::var(name).ok()))
}

/// The HTTP client takes the process's cryptography; that is the one of links between hosts.
fn provide_cryptography() {
    // Another provider that was there first does as well.
    drop(rustls::crypto::ring::default_provider().install_default());
}
