//! Buckets: moto's S3 server where it can be had, and object_store's own objects in memory.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use object_store::memory::InMemory;

use super::contract::fulfil;
use crate::backend::ObjectBackend;
use crate::{Options, Store};

/// Names moto's server, if it is not on the path.
const MOTO: &str = "TANDEM_MOTO_SERVER";
/// Longest wait until it answers.
const START_TIME_MAX: Duration = Duration::from_secs(60);

/// A server that is killed when the test ends.
struct Server {
    child: Child,
    port: u16,
}

impl Server {
    /// Starts moto; says why the test is skipped where it is not installed.
    fn start() -> Option<Self> {
        let path = std::env::var("PATH").unwrap_or_default();
        let on_path = std::env::split_paths(&path).map(|directory| directory.join("moto_server"));
        let named = std::env::var(MOTO).map(PathBuf::from);
        let Some(program) = named.into_iter().chain(on_path).find(|path| path.is_file()) else {
            println!("skipped: no program moto_server (of the Python package moto), and no {MOTO}");
            return None;
        };
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let child = Command::new(program)
            .args(["-H", "127.0.0.1", "-p", &port.to_string()])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let server = Self { child, port };
        server.make_bucket();
        Some(server)
    }

    fn make_bucket(&self) {
        let started = Instant::now();
        loop {
            let answer = self.request("PUT /bucket HTTP/1.1");
            if answer.as_ref().is_ok_and(|answer| answer.contains(" 200 ")) {
                return;
            }
            assert!(started.elapsed() < START_TIME_MAX, "{answer:?}");
            thread::sleep(Duration::from_millis(100));
        }
    }

    fn request(&self, line: &str) -> std::io::Result<String> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port))?;
        let head = "Host: 127.0.0.1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
        write!(stream, "{line}\r\n{head}")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.child.kill().expect("it is a child");
        self.child.wait().expect("it was killed");
    }
}

#[test]
fn a_bucket_fulfils_it() {
    let Some(server) = Server::start() else {
        return;
    };
    let endpoint = format!("http://127.0.0.1:{}", server.port);
    let settings = BTreeMap::from([
        ("AWS_ENDPOINT_URL", endpoint.as_str()),
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "test"),
        ("AWS_REGION", "us-east-1"),
    ]);
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
