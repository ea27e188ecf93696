use super::*;
use proptest::collection::vec;
use proptest::prelude::*;

const ROOM: usize = 64 << 20;

/// Feeds pieces as the server does: drain, feed, until nothing moves; gives all replies and
/// whether the connection was closed.
fn talk(store: &mut Store, pieces: &[&[u8]], window: usize) -> (Vec<u8>, bool) {
    let (mut session, mut sent, mut closed) = (Session::default(), Vec::new(), false);
    for piece in pieces {
        let mut rest = *piece;
        while !closed {
            drain(&mut session, &mut sent, window);
            let fed = session.feed(store, rest);
            rest = &rest[fed.consumed..];
            closed = fed.close;
            if rest.is_empty() && session.outbox().is_empty() {
                break;
            }
        }
    }
    while !session.outbox().is_empty() {
        drain(&mut session, &mut sent, window);
    }
    session.end(store);
    (sent, closed)
}

fn drain(session: &mut Session, sent: &mut Vec<u8>, window: usize) {
    let mut room = window;
    session.outbox().drain(|octets| {
        let size = octets.len().min(room);
        room -= size;
        sent.extend_from_slice(&octets[..size]);
        size
    });
}

/// The reply, with `|` for line ends.
fn reply(store: &mut Store, request: &str) -> String {
    let (sent, _) = talk(store, &[request.as_bytes(), b"\r\n"], usize::MAX);
    String::from_utf8(sent)
        .expect("the reply is ASCII")
        .replace("\r\n", "|")
}

#[test]
fn time_is_told_where_it_may_be() {
    let mut store = Store::new(ROOM);
    assert!(reply(&mut store, "TIME").starts_with("-ERR unknown"));
    store.set_time(12_000_345);
    assert_eq!(reply(&mut store, "TIME"), "*2|$2|12|$3|345|");
}

#[test]
fn answers_like_redis() {
    let cases = [
        ("PING", "+PONG|"),
        ("ping hi", "$2|hi|"),
        (
            "PING a b",
            "-ERR wrong number of arguments for 'ping' command|",
        ),
        ("ECHO \"a b\"", "$3|a b|"),
        ("GET k", "$-1|"),
        ("SET k v", "+OK|"),
        ("GET k", "$1|v|"),
        ("get", "-ERR wrong number of arguments for 'get' command|"),
        ("SET k w NX", "$-1|"),
        ("SET k w xx", "+OK|"),
        ("SET n 1 XX", "$-1|"),
        ("SET n 10 NX", "+OK|"),
        ("SET k v EX 10", "-ERR syntax error|"),
        ("SET k v NX XX", "-ERR syntax error|"),
        ("INCR n", ":11|"),
        ("DECR n", ":10|"),
        ("INCRBY n -20", ":-10|"),
        (
            "INCRBY n x",
            "-ERR value is not an integer or out of range|",
        ),
        ("INCR k", "-ERR value is not an integer or out of range|"),
        ("INCR fresh", ":1|"),
        ("SET big 9223372036854775807", "+OK|"),
        ("INCR big", "-ERR increment or decrement would overflow|"),
        ("EXISTS k k none", ":2|"),
        ("MGET k none n", "*3|$1|w|$-1|$3|-10|"),
        ("MSET a 1 b 2", "+OK|"),
        (
            "MSET a 1 b",
            "-ERR wrong number of arguments for 'mset' command|",
        ),
        ("DBSIZE", ":6|"),
        ("DEL a b none", ":2|"),
        ("CONFIG GET save", "*2|$4|save|$0||"),
        ("CONFIG GET nothing", "*0|"),
        ("COMMAND DOCS", "*0|"),
        ("CLIENT SETNAME x", "+OK|"),
        ("HELLO 3", "-NOPROTO unsupported protocol version|"),
        ("SELECT 0", "+OK|"),
        ("SELECT 1", "-ERR DB index is out of range|"),
        (
            "TIME",
            "-ERR unknown command 'TIME', with args beginning with: |",
        ),
        (
            "FOO a b",
            "-ERR unknown command 'FOO', with args beginning with: 'a' 'b' |",
        ),
        ("FLUSHALL now", "-ERR syntax error|"),
        ("FLUSHALL", "+OK|"),
        ("DBSIZE", ":0|"),
    ];
    let mut store = Store::new(ROOM);
    for (request, expected) in cases {
        assert_eq!(reply(&mut store, request), expected, "{request}");
    }
}

#[test]
fn info_and_hello_are_well_formed() {
    let mut store = Store::new(ROOM);
    assert!(reply(&mut store, "INFO").contains("redis_version:"));
    assert!(reply(&mut store, "HELLO").starts_with("*8|$6|server|"));
}

#[test]
fn quit_closes_after_its_reply() {
    let mut store = Store::new(ROOM);
    let (sent, closed) = talk(&mut store, &[b"QUIT\r\nPING\r\n"], usize::MAX);
    assert_eq!((&sent[..], closed), (&b"+OK\r\n"[..], true));
}

#[test]
fn rubbish_is_answered_and_closes() {
    let mut store = Store::new(ROOM);
    let (sent, closed) = talk(
        &mut store,
        &[b"PING\r\n*1\r\nrubbish\r\nPING\r\n"],
        usize::MAX,
    );
    assert_eq!(
        &sent[..],
        b"+PONG\r\n-ERR Protocol error: expected '$', got 'r'\r\n"
    );
    assert!(closed);
}

fn set(key: &str, value: &[u8]) -> Vec<u8> {
    let head = format!(
        "*3\r\n$3\r\nSET\r\n${}\r\n{key}\r\n${}\r\n",
        key.len(),
        value.len()
    );
    [head.as_bytes(), value, b"\r\n"].concat()
}

#[test]
fn the_longest_value_goes_in_and_out() {
    let mut store = Store::new(ROOM);
    let value: Vec<u8> = (0..crate::ARGUMENT_BYTES_MAX)
        .map(|index| index as u8)
        .collect();
    let request = [set("k", &value), b"GET k\r\n".to_vec()].concat();
    let pieces: Vec<&[u8]> = request.chunks(1460).collect();
    let (sent, closed) = talk(&mut store, &pieces, 16_384);
    let expected = [
        format!("+OK\r\n${}\r\n", value.len()).as_bytes(),
        &value,
        b"\r\n",
    ]
    .concat();
    assert!(sent == expected && !closed);
}

#[test]
fn a_full_store_says_so_and_lives() {
    let mut store = Store::new(2 << 20);
    let value = vec![b'v'; 300_000];
    let mut replies = Vec::new();
    for key in 0..10 {
        replies.push(talk(&mut store, &[&set(&format!("k{key}"), &value)], usize::MAX).0);
    }
    assert_eq!(replies[0], b"+OK\r\n");
    assert!(
        replies[9].starts_with(b"-OOM command not allowed"),
        "{:?}",
        replies[9]
    );
    assert_eq!(reply(&mut store, "FLUSHALL"), "+OK|");
    assert_eq!(
        talk(&mut store, &[&set("k", &value)], usize::MAX).0,
        b"+OK\r\n"
    );
}

#[test]
fn a_full_store_still_takes_requests_in_pieces() {
    let mut store = Store::new(1 << 20);
    let request = set("k", &[b'v'; 10_000]);
    for key in 0..200 {
        let _filled = store.set(format!("k{key}").as_bytes(), &[b'v'; 10_000]);
    }
    let (first, rest) = request.split_at(9000);
    let (sent, closed) = talk(&mut store, &[first, rest], 9999);
    assert_eq!(
        (sent, closed),
        (format!("-{}\r\n", command::FULL).into_bytes(), false)
    );
}

#[test]
fn buffers_are_charged_and_given_back() {
    let mut store = Store::new(1 << 20);
    let request = set("k", &vec![b'v'; 400_000]);
    let (mut first, mut second) = (Session::default(), Session::default());
    assert_eq!(
        first.feed(&mut store, &request[..300]),
        Fed {
            consumed: 300,
            close: false
        }
    );
    assert!(store.used_bytes() > 380_000);
    second.feed(&mut store, &request[..300]);
    let mut third = Session::default();
    assert!(third.feed(&mut store, &request[..300]).close);
    for session in [&mut first, &mut second, &mut third] {
        session.end(&mut store);
    }
    assert_eq!(store.used_bytes(), 0);
}

#[test]
fn a_long_mget_is_paid_for_while_it_waits() {
    let mut store = Store::new(2 << 20);
    let mut session = Session::default();
    session.feed(&mut store, &set("k", &[b'v'; 4096]));
    session.outbox().drain(|octets| octets.len());
    let before = store.used_bytes();
    let request = format!("MGET{}\r\n", " k".repeat(400));
    session.feed(&mut store, request.as_bytes());
    assert!(store.used_bytes() >= before + 400 * 4096);
    assert_eq!(
        talk(&mut store, &[request.as_bytes()], 9999).0,
        format!("-{}\r\n", command::FULL).as_bytes()
    );
    session.outbox().drain(|octets| octets.len());
    session.feed(&mut store, b"");
    assert_eq!(store.used_bytes(), before);
}

/// A command of the mix that the properties use.
fn any_command() -> impl Strategy<Value = Vec<u8>> {
    let key = "[abc]";
    prop_oneof![
        (key, vec(any::<u8>(), 0..6000)).prop_map(|(key, value)| set(&key, &value)),
        key.prop_map(|key| format!("GET {key}\r\n").into_bytes()),
        key.prop_map(|key| format!("*2\r\n$4\r\nINCR\r\n$1\r\n{key}\r\n").into_bytes()),
        key.prop_map(|key| format!("DEL {key} a\r\n").into_bytes()),
        Just(b"MGET a b c\r\n".to_vec()),
        Just(b"\r\n".to_vec()),
        Just(b"FOO\r\n".to_vec()),
        Just(b"*1\r\n!\r\n".to_vec()),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn replies_do_not_depend_on_the_cuts(
        commands in vec(any_command(), 0..30),
        cuts in vec(any::<usize>(), 0..20),
        window in 1..20_000usize,
    ) {
        let stream = commands.concat();
        let mut ends: Vec<usize> = cuts.iter().map(|cut| cut % (stream.len() + 1)).collect();
        ends.extend([0, stream.len()]);
        ends.sort_unstable();
        let pieces: Vec<&[u8]> = ends.windows(2).map(|pair| &stream[pair[0]..pair[1]]).collect();
        let whole = talk(&mut Store::new(ROOM), &[&stream], usize::MAX);
        prop_assert_eq!(talk(&mut Store::new(ROOM), &pieces, window), whole);
    }

    #[test]
    fn no_octets_harm_the_server(pieces in vec(vec(any::<u8>(), 0..200), 0..10)) {
        let mut store = Store::new(ROOM);
        let pieces: Vec<&[u8]> = pieces.iter().map(Vec::as_slice).collect();
        talk(&mut store, &pieces, 100);
        prop_assert_eq!(reply(&mut store, "PING"), "+PONG|");
    }
}
