//! The commands. Their replies are those of Redis 7 in RESP2.

use alloc::format;
use alloc::string::String;

use crate::number::{Decimal, parse_i64};
use crate::outbox::Outbox;
use crate::parser::Arguments;
use crate::store::{OutOfMemory, Store, Value};

/// The longest name that can be a command's.
const NAME_BYTES_MAX: usize = 16;
/// Octets of a command that an error repeats, as in Redis.
const QUOTED_BYTES_MAX: usize = 128;
/// Octets of short values that an MGET may copy without asking the budget.
const COPIED_FREELY_BYTES_MAX: usize = 64 * 1024;
/// The version of Redis whose replies these are, as clients want to know it.
const REDIS_VERSION: &str = "7.0.0";

const NOT_AN_INTEGER: &str = "ERR value is not an integer or out of range";
const OVERFLOW: &str = "ERR increment or decrement would overflow";
const SYNTAX: &str = "ERR syntax error";
pub(crate) const FULL: &str = "OOM command not allowed when used memory > 'maxmemory'.";

/// What becomes of the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It goes on.
    Continue,
    /// It ends once the replies are sent.
    Close,
}

/// Runs one command against the store and queues its reply. An empty command has none.
pub(crate) fn run(arguments: Arguments<'_>, store: &mut Store, outbox: &mut Outbox) -> Verdict {
    if arguments.is_empty() {
        return Verdict::Continue;
    }
    let mut upper = [0; NAME_BYTES_MAX];
    let name = upper_case(arguments.get(0), &mut upper);
    let mut command = Command {
        arguments,
        store,
        outbox,
    };
    match name {
        b"GET" => command.get(),
        b"SET" => command.set(),
        b"PING" => command.ping(),
        b"INCR" => command.increment_by_one(1),
        b"DECR" => command.increment_by_one(-1),
        b"INCRBY" => command.increment_by(),
        b"DEL" => command.del(),
        b"EXISTS" => command.exists(),
        b"MGET" => command.mget(),
        b"MSET" => command.mset(),
        b"ECHO" => command.echo(),
        b"DBSIZE" => command.dbsize(),
        b"FLUSHALL" | b"FLUSHDB" => command.flush(),
        b"INFO" => command.info(),
        b"TIME" => command.time(),
        b"CONFIG" => command.config(),
        b"COMMAND" => command.describe(),
        b"CLIENT" => command.client(),
        b"HELLO" => command.hello(),
        b"SELECT" => command.select(),
        b"QUIT" => {
            command.outbox.simple("OK");
            return Verdict::Close;
        }
        _ => command.unknown(),
    }
    Verdict::Continue
}

/// Copies `text` in upper case; gives nothing if it is longer than `buffer`.
fn upper_case<'a>(text: &[u8], buffer: &'a mut [u8]) -> &'a [u8] {
    let Some(copy) = buffer.get_mut(..text.len()) else {
        return &[];
    };
    copy.copy_from_slice(text);
    copy.make_ascii_uppercase();
    copy
}

/// A command at work.
struct Command<'a> {
    arguments: Arguments<'a>,
    store: &'a mut Store,
    outbox: &'a mut Outbox,
}

impl Command<'_> {
    /// Whether the count of arguments, the name included, is in `range`; says so if not.
    fn takes(&mut self, range: core::ops::RangeInclusive<usize>) -> bool {
        let right = range.contains(&self.arguments.len());
        if !right {
            self.wrong_count();
        }
        right
    }

    fn wrong_count(&mut self) {
        let name = printable(self.arguments.get(0)).to_ascii_lowercase();
        self.outbox.error(&format!(
            "ERR wrong number of arguments for '{name}' command"
        ));
    }

    fn stored(&mut self, result: Result<(), OutOfMemory>) {
        match result {
            Ok(()) => self.outbox.simple("OK"),
            Err(OutOfMemory) => self.outbox.error(FULL),
        }
    }

    fn get(&mut self) {
        if self.takes(2..=2) {
            match self.store.get(self.arguments.get(1)) {
                Some(value) => self.outbox.value(value),
                None => self.outbox.null(),
            }
        }
    }

    /// `SET key value [NX|XX]`. Options that need a clock are a syntax error.
    fn set(&mut self) {
        if !self.takes(3..=usize::MAX) {
            return;
        }
        let (key, value) = (self.arguments.get(1), self.arguments.get(2));
        let mut wants: Option<bool> = None;
        for option in self.arguments.from(3) {
            let exists = match option {
                _ if option.eq_ignore_ascii_case(b"NX") => false,
                _ if option.eq_ignore_ascii_case(b"XX") => true,
                _ => return self.outbox.error(SYNTAX),
            };
            if wants.is_some_and(|earlier| earlier != exists) {
                return self.outbox.error(SYNTAX);
            }
            wants = Some(exists);
        }
        if wants.is_some_and(|exists| exists != self.store.contains(key)) {
            return self.outbox.null();
        }
        let result = self.store.set(key, value);
        self.stored(result);
    }

    fn ping(&mut self) {
        if self.takes(1..=2) {
            match self.arguments.len() {
                1 => self.outbox.simple("PONG"),
                _ => self.outbox.bulk(self.arguments.get(1)),
            }
        }
    }

    fn increment_by_one(&mut self, step: i64) {
        if self.takes(2..=2) {
            self.increment(step);
        }
    }

    fn increment_by(&mut self) {
        if self.takes(3..=3) {
            match parse_i64(self.arguments.get(2)) {
                Some(step) => self.increment(step),
                None => self.outbox.error(NOT_AN_INTEGER),
            }
        }
    }

    /// Adds `step` to the value; a missing one counts as 0.
    fn increment(&mut self, step: i64) {
        let key = self.arguments.get(1);
        let old = match self.store.get(key) {
            Some(value) => parse_i64(value.as_bytes()),
            None => Some(0),
        };
        let Some(old) = old else {
            return self.outbox.error(NOT_AN_INTEGER);
        };
        let Some(new) = old.checked_add(step) else {
            return self.outbox.error(OVERFLOW);
        };
        match self.store.set(key, Decimal::new(new).as_bytes()) {
            Ok(()) => self.outbox.integer(new),
            Err(OutOfMemory) => self.outbox.error(FULL),
        }
    }

    fn del(&mut self) {
        if self.takes(2..=usize::MAX) {
            let removed = self
                .arguments
                .from(1)
                .filter(|key| self.store.remove(key))
                .count();
            self.outbox.integer(removed as i64);
        }
    }

    fn exists(&mut self) {
        if self.takes(2..=usize::MAX) {
            let found = self
                .arguments
                .from(1)
                .filter(|key| self.store.contains(key))
                .count();
            self.outbox.integer(found as i64);
        }
    }

    fn mget(&mut self) {
        if !self.takes(2..=usize::MAX) {
            return;
        }
        let short = |key| match self.store.get(key) {
            Some(Value::Short(octets)) => octets.len(),
            _ => 0,
        };
        let copied: usize = self.arguments.from(1).map(short).sum();
        if copied > COPIED_FREELY_BYTES_MAX && self.outbox.charge(self.store, copied).is_err() {
            return self.outbox.error(FULL);
        }
        self.outbox.array(self.arguments.len() - 1);
        for key in self.arguments.from(1) {
            match self.store.get(key) {
                Some(value) => self.outbox.value(value),
                None => self.outbox.null(),
            }
        }
    }

    /// Sets all pairs. Where memory ends in between, the pairs before it are set.
    fn mset(&mut self) {
        if !self.takes(3..=usize::MAX) {
            return;
        }
        if self.arguments.len().is_multiple_of(2) {
            return self.wrong_count();
        }
        let mut result = Ok(());
        for pair in 0..self.arguments.len() / 2 {
            let (key, value) = (
                self.arguments.get(2 * pair + 1),
                self.arguments.get(2 * pair + 2),
            );
            result = result.and_then(|()| self.store.set(key, value));
        }
        self.stored(result);
    }

    fn echo(&mut self) {
        if self.takes(2..=2) {
            self.outbox.bulk(self.arguments.get(1));
        }
    }

    fn dbsize(&mut self) {
        if self.takes(1..=1) {
            self.outbox.integer(self.store.len() as i64);
        }
    }

    /// `FLUSHALL [SYNC|ASYNC]`.
    fn flush(&mut self) {
        let mode = self.arguments.get(1);
        let known = mode.eq_ignore_ascii_case(b"SYNC") || mode.eq_ignore_ascii_case(b"ASYNC");
        match self.arguments.len() {
            1 => {}
            2 if known => {}
            _ => return self.outbox.error(SYNTAX),
        }
        self.store.clear();
        self.outbox.simple("OK");
    }

    fn info(&mut self) {
        let mut text = format!(
            "# Server\r\nredis_version:{REDIS_VERSION}\r\nredis_mode:standalone\r\n\
             # Memory\r\nused_memory:{}\r\nmaxmemory:{}\r\n# Keyspace\r\n",
            self.store.used_bytes(),
            self.store.limit_bytes(),
        );
        if !self.store.is_empty() {
            text += &format!("db0:keys={},expires=0,avg_ttl=0\r\n", self.store.len());
        }
        self.outbox.bulk(text.as_bytes());
    }

    /// Seconds and microseconds since boot, where the guest may tell them: copies of it differ in them.
    fn time(&mut self) {
        let Some(time) = self.store.time() else {
            return self.unknown();
        };
        if self.takes(1..=1) {
            self.outbox.array(2);
            for part in [time / 1_000_000, time % 1_000_000] {
                self.outbox.bulk(format!("{part}").as_bytes());
            }
        }
    }

    /// `CONFIG GET name...`, with `*` for all; `CONFIG RESETSTAT`.
    fn config(&mut self) {
        let verb = self.arguments.get(1);
        if verb.eq_ignore_ascii_case(b"RESETSTAT") {
            return self.outbox.simple("OK");
        }
        if !verb.eq_ignore_ascii_case(b"GET") {
            return self.outbox.error("ERR CONFIG knows only GET and RESETSTAT");
        }
        if !self.takes(3..=usize::MAX) {
            return;
        }
        let limit = format!("{}", self.store.limit_bytes());
        let settings = [
            ("save", ""),
            ("appendonly", "no"),
            ("databases", "1"),
            ("maxmemory", &limit),
        ];
        let asked = |name: &str| {
            self.arguments
                .from(2)
                .any(|pattern| pattern == b"*" || pattern.eq_ignore_ascii_case(name.as_bytes()))
        };
        let given = settings.map(|(name, text)| asked(name).then_some((name, text)));
        self.outbox.array(2 * given.iter().flatten().count());
        for (name, text) in given.into_iter().flatten() {
            self.outbox.bulk(name.as_bytes());
            self.outbox.bulk(text.as_bytes());
        }
    }

    /// `COMMAND [COUNT|...]`: clients ask, and cope with an empty table.
    fn describe(&mut self) {
        if self.arguments.get(1).eq_ignore_ascii_case(b"COUNT") {
            self.outbox.integer(0);
        } else {
            self.outbox.array(0);
        }
    }

    /// `CLIENT SETNAME|SETINFO`: taken and not kept.
    fn client(&mut self) {
        let verb = self.arguments.get(1);
        let known = verb.eq_ignore_ascii_case(b"SETNAME") || verb.eq_ignore_ascii_case(b"SETINFO");
        if known {
            self.outbox.simple("OK");
        } else if verb.eq_ignore_ascii_case(b"GETNAME") {
            self.outbox.null();
        } else {
            self.outbox
                .error("ERR CLIENT knows only SETNAME, SETINFO and GETNAME");
        }
    }

    /// `HELLO [2]`.
    fn hello(&mut self) {
        match self.arguments.get(1) {
            b"" | b"2" => {}
            _ => return self.outbox.error("NOPROTO unsupported protocol version"),
        }
        self.outbox.array(8);
        for (name, text) in [
            ("server", "redis"),
            ("version", REDIS_VERSION),
            ("mode", "standalone"),
        ] {
            self.outbox.bulk(name.as_bytes());
            self.outbox.bulk(text.as_bytes());
        }
        self.outbox.bulk(b"proto");
        self.outbox.integer(2);
    }

    fn select(&mut self) {
        if self.takes(2..=2) {
            match parse_i64(self.arguments.get(1)) {
                Some(0) => self.outbox.simple("OK"),
                Some(_) => self.outbox.error("ERR DB index is out of range"),
                None => self.outbox.error(NOT_AN_INTEGER),
            }
        }
    }

    fn unknown(&mut self) {
        let mut text = format!(
            "ERR unknown command '{}', with args beginning with: ",
            printable(self.arguments.get(0))
        );
        for argument in self.arguments.from(1) {
            if text.len() >= QUOTED_BYTES_MAX {
                break;
            }
            text += &format!("'{}' ", printable(argument));
        }
        self.outbox.error(&text);
    }
}

/// The start of `text` as an error may repeat it: one line, ASCII.
fn printable(text: &[u8]) -> String {
    let start = &text[..text.len().min(QUOTED_BYTES_MAX)];
    format!("{}", start.escape_ascii())
}
