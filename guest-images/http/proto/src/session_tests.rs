use super::*;
use proptest::collection::vec;
use proptest::prelude::*;

/// Takes a limited number of octets at a time.
struct Window {
    sent: Vec<u8>,
    room: usize,
    turn: usize,
}

impl Sink for Window {
    fn write(&mut self, octets: &[u8]) -> usize {
        let count = octets.len().min(self.room);
        self.sent.extend_from_slice(&octets[..count]);
        self.room -= count;
        count
    }

    fn write_with(&mut self, writer: impl FnOnce(&mut [u8]) -> usize) -> usize {
        let mut room = vec![0; self.room];
        let count = writer(&mut room);
        self.write(&room[..count])
    }
}

/// Feeds pieces as the server does; gives all responses and whether the connection was closed.
fn talk(pieces: &[&[u8]], window: usize) -> (Vec<u8>, bool) {
    let mut session = Session::default();
    let mut sink = Window {
        sent: Vec::new(),
        room: 0,
        turn: window,
    };
    for piece in pieces {
        let mut rest = *piece;
        loop {
            sink.room = sink.turn;
            session.send(&mut sink);
            if !session.is_sent() {
                continue;
            }
            let consumed = session.feed(rest);
            rest = &rest[consumed..];
            if consumed == 0 && session.is_sent() {
                break;
            }
        }
    }
    (sink.sent, session.is_closing())
}

fn text(request: &str) -> String {
    let (sent, _) = talk(&[request.as_bytes()], 100_000);
    String::from_utf8(sent).expect("the response is ASCII")
}

#[test]
fn serves_pages() {
    let response = text("GET /size/5 HTTP/1.1\r\nHost: a\r\n\r\n");
    assert_eq!(
        response,
        "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 5\r\n\r\n00000"
    );
}

#[test]
fn serves_heads_alone() {
    let response = text("HEAD /size/5 HTTP/1.1\r\nHost: a\r\n\r\n");
    assert!(response.contains("Content-Length: 5\r\n") && response.ends_with("\r\n\r\n"));
}

#[test]
fn says_what_is_missing_and_goes_on() {
    let request = "GET /none HTTP/1.1\r\nHost: a\r\n\r\n";
    let (sent, closing) = talk(&[request.as_bytes(), request.as_bytes()], 1000);
    let sent = String::from_utf8(sent).expect("the response is ASCII");
    assert_eq!(sent.matches("404 Not Found\r\n").count(), 2);
    assert!(!closing);
}

#[test]
fn closes_when_asked_and_takes_no_more() {
    let request =
        "GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n";
    let (sent, closing) = talk(&[request.as_bytes()], 1000);
    let sent = String::from_utf8(sent).expect("the response is ASCII");
    assert_eq!(sent.matches("200 OK").count(), 1);
    assert!(sent.contains("Connection: close\r\n") && closing);
}

#[test]
fn keeps_old_clients_that_ask() {
    let response = text("GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n");
    assert!(response.contains("Connection: keep-alive\r\n"));
}

#[test]
fn refuses_and_closes() {
    let (sent, closing) = talk(&[b"POST / HTTP/1.1\r\nHost: a\r\n\r\n"], 1000);
    let sent = String::from_utf8(sent).expect("the response is ASCII");
    assert!(sent.starts_with("HTTP/1.1 405 Method Not Allowed\r\nAllow: GET, HEAD\r\n"));
    assert!(sent.contains("Connection: close\r\n") && closing);
}

#[test]
fn skips_bodies() {
    let request = b"GET /size/1 HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nGETxGET / HTTP/1.1\r\nHost: a\r\n\r\n";
    let (sent, closing) = talk(&[request], 1000);
    let sent = String::from_utf8(sent).expect("the response is ASCII");
    assert_eq!(sent.matches("200 OK").count(), 2);
    assert!(!closing);
}

/// A request of the mix that the property uses.
fn any_request() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        (0..3000u32)
            .prop_map(|size| format!("GET /size/{size} HTTP/1.1\r\nHost: a\r\n\r\n").into_bytes()),
        Just(b"HEAD / HTTP/1.1\r\nHost: a\r\n\r\n".to_vec()),
        Just(b"GET /x HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc".to_vec()),
        Just(format!("GET / HTTP/1.1\r\nHost: {}\r\n\r\n", "h".repeat(3000)).into_bytes()),
        Just(b"\r\n".to_vec()),
        Just(b"rubbish\r\n".to_vec()),
    ]
}

proptest! {
    #[test]
    fn responses_do_not_depend_on_the_cuts(
        requests in vec(any_request(), 0..12),
        cuts in vec(any::<usize>(), 0..20),
        window in 1..5000usize,
    ) {
        let stream = requests.concat();
        let mut ends: Vec<usize> = cuts.iter().map(|cut| cut % (stream.len() + 1)).collect();
        ends.extend([0, stream.len()]);
        ends.sort_unstable();
        let pieces: Vec<&[u8]> = ends.windows(2).map(|pair| &stream[pair[0]..pair[1]]).collect();
        prop_assert_eq!(talk(&pieces, window), talk(&[&stream], 1 << 20));
    }
}
