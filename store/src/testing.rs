//! What tests of this crate and of others need: storage, which is moto's S3 server or directories that hosts share, and
//! snapshots that an earlier Tandem made.

use std::env;
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use tandem_vmm::snapshot::directory::{CHECKSUMS, DESCRIPTION, MEMORY, STATE};

use crate::names::random_name;

/// Names directories of one shared storage, as each host has it: separated by colons.
const SHARED: &str = "TANDEM_SHARED_DIRECTORIES";
/// How many hosts there are where nothing is named: all have a directory of this machine.
const HOSTS: usize = 2;
/// Names moto's server, if it is not on the path.
const MOTO: &str = "TANDEM_MOTO_SERVER";
/// Longest wait until it answers.
const START_TIME_MAX: Duration = Duration::from_secs(60);

/// Where golden snapshots are; `tests/tests/golden.rs` says what they are.
const SNAPSHOTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/v1");
/// Memory of one, compressed, beside the other files.
pub const PACKED_MEMORY: &str = "memory.lz4";

/// Writes the golden snapshot `name` into `directory`, as `tandem restore` takes it.
///
/// # Panics
/// When there is no such snapshot, or no such directory.
pub fn unpack_snapshot(name: &str, directory: &Path) {
    let golden = Path::new(SNAPSHOTS).join(name);
    for file in [STATE, CHECKSUMS, DESCRIPTION] {
        let copied = fs::copy(golden.join(file), directory.join(file));
        copied.expect("golden snapshots are whole");
    }
    let packed = fs::read(golden.join(PACKED_MEMORY)).expect("golden snapshots have memory");
    let memory = lz4_flex::block::decompress_size_prepended(&packed);
    let written = fs::write(directory.join(MEMORY), memory.expect("it was compressed"));
    written.expect("there is such a directory");
}

/// A server with the bucket `bucket`, which is killed when the test ends.
#[derive(Debug)]
pub struct S3Server {
    child: Child,
    port: u16,
}

impl S3Server {
    /// Starts moto; says why the test is skipped where it is not installed.
    ///
    /// # Panics
    /// When it is installed and does not start.
    pub fn start() -> Option<Self> {
        let path = env::var("PATH").unwrap_or_default();
        let on_path = env::split_paths(&path).map(|directory| directory.join("moto_server"));
        let named = env::var(MOTO).map(PathBuf::from);
        let Some(program) = named.into_iter().chain(on_path).find(|path| path.is_file()) else {
            println!("skipped: no program moto_server (of the Python package moto), and no {MOTO}");
            return None;
        };
        let listener = TcpListener::bind("127.0.0.1:0").expect("there is a port");
        let port = listener.local_addr().expect("it is bound").port();
        drop(listener);
        let child = Command::new(program)
            .args(["-H", "127.0.0.1", "-p", &port.to_string()])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("it can be run");
        let server = Self { child, port };
        server.make_bucket();
        Some(server)
    }

    /// What a client has to have in its environment.
    pub fn settings(&self) -> [(&'static str, String); 4] {
        let endpoint = format!("http://127.0.0.1:{}", self.port);
        [
            ("AWS_ENDPOINT_URL", endpoint),
            ("AWS_ACCESS_KEY_ID", "test".to_owned()),
            ("AWS_SECRET_ACCESS_KEY", "test".to_owned()),
            ("AWS_REGION", "us-east-1".to_owned()),
        ]
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

impl Drop for S3Server {
    fn drop(&mut self) {
        self.child.kill().expect("it is a child");
        self.child.wait().expect("it was killed");
    }
}

/// A fresh directory of storage that hosts share, which is removed when the test ends.
#[derive(Debug)]
pub struct SharedDirectory {
    places: Vec<PathBuf>,
}

impl SharedDirectory {
    /// One on the storage that `TANDEM_SHARED_DIRECTORIES` names, such as two mounts of CephFS. Without, hosts have one of this
    /// machine's temporary directories.
    ///
    /// # Panics
    /// When it cannot be made, or not all hosts see it.
    pub fn new() -> Self {
        let roots: Vec<PathBuf> = match env::var_os(SHARED) {
            Some(named) => env::split_paths(&named).collect(),
            None => vec![env::temp_dir(); HOSTS],
        };
        let name = format!("tandem-store-{}", random_name());
        let places: Vec<PathBuf> = roots.iter().map(|root| root.join(&name)).collect();
        fs::create_dir(&places[0]).expect("it is new");
        for place in &places {
            assert!(place.is_dir(), "{} is not shared", place.display());
        }
        Self { places }
    }

    /// The directory as one of the hosts has it, which have it in turn.
    pub fn of_host(&self, number: usize) -> &Path {
        &self.places[number % self.places.len()]
    }

    /// The directory, once for each host.
    pub fn places(&self) -> &[PathBuf] {
        &self.places
    }
}

impl Default for SharedDirectory {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for SharedDirectory {
    fn drop(&mut self) {
        // What is left of a test that fails harms nobody.
        drop(fs::remove_dir_all(&self.places[0]));
    }
}
