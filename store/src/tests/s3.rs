//! Buckets: moto's S3 server where it can be had, and object_store's own objects in memory.

use std::collections::BTreeMap;
use std::sync::Arc;

use object_store::memory::InMemory;

use super::contract::fulfil;
use crate::backend::ObjectBackend;
use crate::testing::S3Server;
use crate::{Options, Store};

#[test]
fn a_bucket_fulfils_it() {
    let Some(server) = S3Server::start() else {
        return;
    };
    let settings = server.settings();
    let settings = settings.iter().map(|(name, value)| (*name, value.as_str()));
    let settings: BTreeMap<_, _> = settings.collect();
    for place in ["s3://bucket/some/prefix", "s3://bucket"] {
        fulfil(Arc::new(
            ObjectBackend::bucket_with(&place.parse().unwrap(), &settings).unwrap(),
        ));
    }
}

#[test]
fn objects_in_memory_fulfil_it() {
    let objects = Arc::new(InMemory::new());
    fulfil(Arc::new(
        ObjectBackend::over(objects, "a/b/", "memory").unwrap(),
    ));
}

#[test]
fn what_names_no_bucket_is_refused() {
    for place in ["s3://", "s3:///prefix"] {
        let error = Store::open(place, Options::default()).unwrap_err();
        let allowed = std::error::Error::source(&error).unwrap().to_string();
        assert!(allowed.contains("s3://BUCKET/PREFIX"), "{error}: {allowed}");
    }
    let error = ObjectBackend::bucket(&"/directory".parse().unwrap()).unwrap_err();
    assert!(error.to_string().contains("no bucket"), "{error}");
}

#[test]
fn a_server_that_is_not_there_is_told_of_in_one_sentence() {
    let settings = BTreeMap::from([
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:1"),
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "test"),
        ("AWS_REGION", "us-east-1"),
    ]);
    let backend = ObjectBackend::bucket_with(&"s3://b".parse().unwrap(), &settings).unwrap();
    let error = crate::backend::Backend::get(&backend, "format", 1).unwrap_err();
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert!(source.contains("refused"), "{source}");
    for part in source.split(": ") {
        assert_eq!(source.matches(part).count(), 1, "{source}");
    }
}
