//! A directory behind another process's lines, as buckets are for confined VMMs.

use std::sync::Arc;
use std::thread::JoinHandle;

use super::contract::fulfil;
use super::directory;
use crate::backend::proxy::{Proxy, control, serve};
use crate::backend::{Backend, Directory};

type Served = JoinHandle<std::io::Result<()>>;

/// What a VMM has of the storage that `open` makes, and who serves it.
fn served(
    open: impl FnOnce() -> Result<Arc<dyn Backend>, String> + Send + 'static,
) -> (Result<Proxy, crate::StoreError>, Served) {
    let (near, far) = control().unwrap();
    let served = std::thread::spawn(move || serve(&far, open));
    (Proxy::connect(near, "s3://bucket/prefix"), served)
}

#[test]
fn storage_of_another_process_fulfils_it() {
    let root = directory();
    let path = root.path().to_owned();
    let (proxy, served) = served(move || Ok(Arc::new(Directory::open(&path).unwrap())));
    let proxy = Arc::new(proxy.unwrap());
    fulfil(Arc::clone(&proxy) as Arc<dyn Backend>);
    assert_eq!(proxy.sweep().unwrap(), 0);
    // More than there are lines.
    std::thread::scope(|scope| {
        for number in 0..30 {
            let proxy = &proxy;
            scope.spawn(move || proxy.create(&format!("x/{number}"), b"x").unwrap());
        }
    });
    assert_eq!(proxy.list("x/").unwrap().len(), 30);
    // It ends with whoever it serves.
    drop(proxy);
    served.join().unwrap().unwrap();
}

#[test]
fn what_another_process_refuses_is_told() {
    let (proxy, _served) = served(|| Err("no region".to_owned()));
    let told = proxy.unwrap_err().to_string();
    assert!(
        told.contains("s3://bucket/prefix") && told.contains("no region"),
        "{told}"
    );
    let root = directory();
    let path = root.path().to_owned();
    let (proxy, _served) = served(move || Ok(Arc::new(Directory::open(&path).unwrap())));
    let proxy = proxy.unwrap();
    let error = proxy.create("../elsewhere", b"x").unwrap_err();
    let told = std::error::Error::source(&error).unwrap().to_string();
    assert!(told.contains("cannot be a name"), "{told}");
    assert_eq!(proxy.list("x/").unwrap(), []);
}

#[test]
fn a_process_that_has_ended_is_told_of_each_time() {
    let (near, far) = control().unwrap();
    let served = std::thread::spawn(move || {
        // It takes its lines, begins, and ends with a request under way.
        let taken = crate::backend::proxy::take_lines(&far);
        rustix::net::send(&far, &[0], rustix::net::SendFlags::NOSIGNAL).unwrap();
        drop(taken);
    });
    let proxy = Proxy::connect(near, "s3://bucket").unwrap();
    served.join().unwrap();
    for _ in 0..20 {
        let error = proxy.get("format", 1).unwrap_err();
        let told = std::error::Error::source(&error).unwrap().to_string();
        assert!(told.contains("has ended"), "{told}");
    }
}
