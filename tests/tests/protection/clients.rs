//! Clients that check every byte of every reply, for as long as they are told to.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tandem_tests::guest::PATIENCE;
use tandem_tests::kv::{self, Kv};
use tandem_tests::network::{GUEST, Network};

/// How much clients ask for.
#[derive(Clone, Copy)]
pub(crate) struct Pace {
    /// Connections at a time.
    pub(crate) connections: usize,
    /// Replies to each connection after which the service is said to carry on.
    pub(crate) progress: u64,
    /// Longest wait for them, and for each.
    pub(crate) patience: Duration,
    /// Pause before each request but the first.
    pub(crate) pause: Duration,
}

/// Of a guest that runs at native speed.
pub(crate) const NATIVE: Pace = Pace {
    connections: 4,
    progress: 20,
    patience: PATIENCE,
    pause: Duration::ZERO,
};

/// Longest page that is asked for, in bytes.
const PAGE_MAX: usize = 200_000;
/// Bytes that are sent to be echoed at a time, at most.
const ECHO_MAX: usize = 20_000;

/// What a client does on its connection until it is told to stop. An error is a reply that is
/// lost, repeated or wrong.
type Work = fn(&TcpStream, usize, &Orders) -> Result<(), String>;

/// A kind of service, and of its clients.
#[derive(Clone, Copy)]
pub(crate) struct Service {
    /// The guest.
    pub(crate) image: &'static str,
    /// Where it listens.
    pub(crate) port: u16,
    work: Work,
}

/// Counters that are counted up, and keys that are written and read.
pub(crate) const KV: Service = Service {
    image: "kv",
    port: kv::PORT,
    work: count_and_set,
};
/// Pages.
pub(crate) const HTTP: Service = Service {
    image: "http",
    port: 80,
    work: read_pages,
};
/// Streams of bytes.
pub(crate) const ECHO: Service = Service {
    image: "net-echo",
    port: 7,
    work: stream,
};

/// What a client is told, and tells.
#[derive(Debug)]
pub(crate) struct Orders {
    stop: AtomicBool,
    pause: Duration,
    replies: AtomicU64,
    /// When the last reply came.
    last: Mutex<Instant>,
    /// The longest time without a reply, a pause left out.
    silence: Mutex<Duration>,
    /// What was wrong with a reply.
    found: OnceLock<String>,
}

impl Orders {
    fn new(pause: Duration) -> Self {
        Self {
            stop: AtomicBool::new(false),
            pause,
            replies: AtomicU64::new(0),
            last: Mutex::new(Instant::now()),
            silence: Mutex::new(Duration::ZERO),
            found: OnceLock::new(),
        }
    }

    fn go_on(&self) -> bool {
        !self.stop.load(Ordering::SeqCst)
    }

    fn replied(&self) {
        let waited = self.waited();
        let mut silence = lock(&self.silence);
        *silence = waited.max(*silence);
        drop(silence);
        self.replies.fetch_add(1, Ordering::SeqCst);
        *lock(&self.last) = Instant::now();
    }

    /// Waits before the next request.
    fn pause(&self) {
        if !self.pause.is_zero() {
            std::thread::sleep(self.pause);
        }
    }

    /// The longest time without a reply since it was asked last, and that which lasts.
    fn longest_silence(&self) -> Duration {
        let silence = std::mem::take(&mut *lock(&self.silence));
        silence.max(self.waited())
    }

    /// How long ago the last reply came, a pause left out.
    fn waited(&self) -> Duration {
        lock(&self.last).elapsed().saturating_sub(self.pause)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("nobody panics with it")
}

struct Client {
    orders: Arc<Orders>,
    thread: Option<JoinHandle<()>>,
}

/// Clients at work.
pub(crate) struct Load {
    clients: Vec<Client>,
    pace: Pace,
}

impl Load {
    /// Starts clients of the guest in `network`, and waits until each has had replies.
    pub(crate) fn start(network: &Network, service: Service, pace: Pace) -> Self {
        let load = Self::begin(network, GUEST, service, pace);
        load.expect_progress();
        load
    }

    /// Starts clients of the guest at `address`, which nobody waits for.
    pub(crate) fn begin(network: &Network, address: &str, service: Service, pace: Pace) -> Self {
        let clients = (0..pace.connections).map(|number| {
            let connection = network.try_connect(address, service.port);
            let orders = Arc::new(Orders::new(pace.pause));
            let told = Arc::clone(&orders);
            let thread = std::thread::spawn(move || {
                let worked = connection
                    .and_then(|connection| {
                        connection.set_read_timeout(Some(pace.patience))?;
                        Ok(connection)
                    })
                    .map_err(|e| format!("no connection: {e}"))
                    .and_then(|connection| (service.work)(&connection, number, &told));
                if let Err(found) = worked {
                    told.found.set(found).expect("it ends once");
                }
            });
            let thread = Some(thread);
            Client { orders, thread }
        });
        let clients = clients.collect();
        Self { clients, pace }
    }

    fn replies(&self) -> Vec<u64> {
        let clients = self.clients.iter();
        clients
            .map(|client| client.orders.replies.load(Ordering::SeqCst))
            .collect()
    }

    /// Waits until every client has had more replies.
    pub(crate) fn expect_progress(&self) {
        self.progress().unwrap_or_else(|why| panic!("{why}"));
    }

    /// Waits until every client has had more replies, or says why they will not.
    pub(crate) fn progress(&self) -> Result<(), String> {
        let before = self.replies();
        let deadline = Instant::now() + self.pace.patience;
        loop {
            let now = self.replies();
            if now
                .iter()
                .zip(&before)
                .all(|(now, before)| now - before >= self.pace.progress)
            {
                return Ok(());
            }
            self.check()?;
            if Instant::now() > deadline {
                return Err(format!("no service: {before:?}, {now:?} replies"));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// How long a client waited at most since this was asked last.
    pub(crate) fn longest_silence(&self) -> Duration {
        let silences = self.clients.iter();
        let silences = silences.map(|client| client.orders.longest_silence());
        silences.max().unwrap_or_default()
    }

    /// An error is what clients found.
    pub(crate) fn check(&self) -> Result<(), String> {
        let found = self
            .clients
            .iter()
            .filter_map(|client| client.orders.found.get());
        let found: Vec<_> = found.collect();
        expect("the clients' work", &found, &Vec::new())
    }

    /// How many replies came during `time`.
    pub(crate) fn replies_within(&self, time: Duration) -> u64 {
        let before: u64 = self.replies().iter().sum();
        std::thread::sleep(time);
        self.replies().iter().sum::<u64>() - before
    }

    /// Ends the clients.
    pub(crate) fn finish(self) {
        self.end().unwrap_or_else(|why| panic!("{why}"));
    }

    /// Ends the clients. An error is what they found.
    pub(crate) fn end(mut self) -> Result<(), String> {
        for client in &self.clients {
            client.orders.stop.store(true, Ordering::SeqCst);
        }
        for client in &mut self.clients {
            let ended = client.thread.take().map(JoinHandle::join);
            assert!(matches!(ended, Some(Ok(()))), "a client panicked");
        }
        self.check()
    }
}

fn expect<T: PartialEq + std::fmt::Debug>(what: &str, found: &T, wanted: &T) -> Result<(), String> {
    if found == wanted {
        return Ok(());
    }
    Err(format!("{what} was answered by {found:?}, not {wanted:?}"))
}

fn count_and_set(stream: &TcpStream, number: usize, orders: &Orders) -> Result<(), String> {
    let mut kv = Kv::new(stream);
    let (counter, key) = (format!("counter-{number}"), format!("key-{number}"));
    let mut count = 0u64;
    while orders.go_on() {
        count += 1;
        let value = format!("value-{count}");
        expect(
            "INCR",
            &kv.ask(&["INCR", &counter])?,
            &Some(count.to_string()),
        )?;
        expect("SET", &kv.ask(&["SET", &key, &value])?, &Some("OK".into()))?;
        expect("GET", &kv.ask(&["GET", &key])?, &Some(value))?;
        orders.replied();
        orders.pause();
    }
    Ok(())
}

/// Page `/size/LENGTH` of the guest: lines that begin with their place in hexadecimal.
fn page(length: usize) -> Vec<u8> {
    let mut page = Vec::with_capacity(length + 64);
    while page.len() < length {
        let place = page.len();
        let line = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRS";
        writeln!(page, "{place:016x} {line}").expect("memory takes all");
    }
    page.truncate(length);
    page
}

fn read_pages(stream: &TcpStream, number: usize, orders: &Orders) -> Result<(), String> {
    let mut http = BufReader::new(stream);
    let mut chance = Chance(number as u64 + 1);
    while orders.go_on() {
        let length = chance.below(PAGE_MAX);
        let request = format!("GET /size/{length} HTTP/1.1\r\nHost: guest\r\n\r\n");
        let name = format!("page {length}");
        let failed = |e| format!("{name}: {e}");
        http.get_mut()
            .write_all(request.as_bytes())
            .map_err(failed)?;
        let (status, said) = read_head(&mut http).map_err(failed)?;
        expect(&name, &status.as_str(), &"HTTP/1.1 200 OK")?;
        expect(&name, &said, &Some(length))?;
        let mut body = vec![0; length];
        http.read_exact(&mut body).map_err(failed)?;
        if body != page(length) {
            return Err(format!("{name} is another"));
        }
        orders.replied();
        orders.pause();
    }
    Ok(())
}

/// Reads the head of a response: its status line, and the length of what follows.
fn read_head(http: &mut impl BufRead) -> std::io::Result<(String, Option<usize>)> {
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        http.read_line(&mut line)?;
        if line.trim_end().is_empty() {
            break;
        }
        lines.push(line.trim_end().to_owned());
    }
    let length = lines.iter().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        let is_it = name.eq_ignore_ascii_case("content-length");
        is_it.then(|| value.trim().parse().ok())?
    });
    Ok((lines.first().cloned().unwrap_or_default(), length))
}

/// Numbers that are the same again for the same seed.
pub(crate) struct Chance(pub(crate) u64);

impl Chance {
    /// splitmix64.
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number from 0 up to `limit`, without it.
    pub(crate) fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    /// A part of a time.
    pub(crate) fn part_of(&mut self, time: Duration) -> Duration {
        time.mul_f64(self.below(1000) as f64 / 1000.0)
    }

    fn fill(&mut self, room: &mut [u8]) {
        room.iter_mut().for_each(|byte| *byte = self.next() as u8);
    }
}

/// One thread sends bytes, of which as many are under way as buffers hold; this one compares what comes
/// back, to the end of the stream.
fn stream(stream: &TcpStream, number: usize, orders: &Orders) -> Result<(), String> {
    let seed = number as u64 + 1;
    std::thread::scope(|scope| {
        let sender = scope.spawn(|| send_stream(stream, seed, orders));
        let back = read_stream(stream, seed, orders);
        // Or else who sends would wait for long if it was wrong.
        drop(stream.shutdown(Shutdown::Both));
        let sent = sender.join().expect("the sender does not panic");
        expect("a stream of that length", &back?, &sent?)
    })
}

fn send_stream(mut stream: &TcpStream, seed: u64, orders: &Orders) -> Result<u64, String> {
    let mut chance = Chance(seed);
    let mut lengths = Chance(!seed);
    let mut sent = 0;
    while orders.go_on() {
        let mut part = vec![0; lengths.below(ECHO_MAX) + 1];
        chance.fill(&mut part);
        stream
            .write_all(&part)
            .map_err(|e| format!("byte {sent} of a stream cannot be sent: {e}"))?;
        sent += part.len() as u64;
        orders.pause();
    }
    let ended = stream.shutdown(Shutdown::Write);
    ended.map_err(|e| format!("a stream cannot be ended: {e}"))?;
    Ok(sent)
}

fn read_stream(mut stream: &TcpStream, seed: u64, orders: &Orders) -> Result<u64, String> {
    let mut chance = Chance(seed);
    let mut back = 0;
    let mut room = vec![0; ECHO_MAX];
    let mut wanted = vec![0; ECHO_MAX];
    loop {
        let length = stream
            .read(&mut room)
            .map_err(|e| format!("byte {back} of a stream does not come back: {e}"))?;
        if length == 0 {
            return Ok(back);
        }
        chance.fill(&mut wanted[..length]);
        if room[..length] != wanted[..length] {
            return Err(format!("bytes from {back} of a stream come back as others"));
        }
        back += length as u64;
        orders.replied();
    }
}
