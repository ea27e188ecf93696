use super::*;
use proptest::collection::vec;
use proptest::prelude::*;

fn ready(text: &str) -> (Request<'_>, usize) {
    match parse(text.as_bytes()) {
        Ok(Parsed::Ready(request, length)) => (request, length),
        other => panic!("{text:?} gives {other:?}"),
    }
}

#[test]
fn reads_a_request() {
    let text = "GET /size/5?x=1 HTTP/1.1\r\nHost: a\r\nAccept: */*\r\n\r\nGET";
    let request = Request {
        method: Method::Get,
        path: b"/size/5",
        keep_alive: true,
        is_old: false,
        body_bytes: 0,
    };
    assert_eq!(ready(text), (request, text.len() - 3));
}

#[test]
fn knows_who_keeps_the_connection() {
    let cases = [
        (
            "GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
            false,
        ),
        (
            "GET / HTTP/1.1\r\nHost: a\r\nConnection: x, Close\r\n\r\n",
            false,
        ),
        ("GET / HTTP/1.0\r\n\r\n", false),
        ("GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n", true),
    ];
    for (text, keep_alive) in cases {
        assert_eq!(ready(text).0.keep_alive, keep_alive, "{text}");
    }
}

#[test]
fn takes_absolute_targets_and_empty_lines() {
    for (target, path) in [
        ("http://a/b?c", "/b"),
        ("http://a", "/"),
        ("http://a?b", "/"),
        ("/?", "/"),
    ] {
        let text = format!("\r\nHEAD {target} HTTP/1.1\r\nHost: a\r\n\r\n");
        assert_eq!(ready(&text).0.path, path.as_bytes(), "{target}");
    }
}

#[test]
fn refuses_with_the_right_status() {
    let long_line = format!("GET /{} HTTP/1.1\r\n", "x".repeat(LINE_BYTES_MAX));
    let long_head = format!("GET / HTTP/1.1\r\nHost: {}", "x".repeat(HEAD_BYTES_MAX));
    let many_fields = format!(
        "GET / HTTP/1.1\r\n{}\r\n",
        "a: b\r\n".repeat(FIELDS_MAX + 1)
    );
    let cases = [
        ("GET /\r\n\r\n", Refusal::Malformed),
        ("GET / HTTP/1.1\nHost: a\r\n\r\n", Refusal::Malformed),
        ("GET  / HTTP/1.1\r\nHost: a\r\n\r\n", Refusal::Malformed),
        ("GET x HTTP/1.1\r\nHost: a\r\n\r\n", Refusal::Malformed),
        ("GET / HTTP/1.1\r\n\r\n", Refusal::Malformed),
        (
            "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
            Refusal::Malformed,
        ),
        ("GET / HTTP/1.1\r\nHost : a\r\n\r\n", Refusal::Malformed),
        (
            "GET / HTTP/1.1\r\nHost: a\r\n folded\r\n\r\n",
            Refusal::Malformed,
        ),
        (
            "GET / HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n",
            Refusal::Malformed,
        ),
        (
            "GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
            Refusal::Malformed,
        ),
        (
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n",
            Refusal::Method,
        ),
        ("OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", Refusal::Method),
        (
            "GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999999999999\r\n\r\n",
            Refusal::BodyTooLong,
        ),
        (&long_line, Refusal::LineTooLong),
        (&long_head, Refusal::HeadTooLong),
        (&many_fields, Refusal::HeadTooLong),
        (
            "GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
            Refusal::TransferCoding,
        ),
        ("GET / HTTP/2.0\r\nHost: a\r\n\r\n", Refusal::Version),
    ];
    for (text, refusal) in cases {
        assert_eq!(
            parse(text.as_bytes()),
            Err(refusal),
            "{:?}",
            &text[..text.len().min(80)]
        );
    }
}

/// Heads that are half right, half rubbish.
fn heads() -> impl Strategy<Value = Vec<u8>> {
    let token = prop_oneof![
        Just(b"GET / HTTP/1.1\r\n".to_vec()),
        Just(b"Host: a\r\n".to_vec()),
        Just(b"Connection: close\r\n".to_vec()),
        Just(b"\r\n".to_vec()),
        Just(b"\n".to_vec()),
        Just(vec![b'x'; 3000]),
        vec(any::<u8>(), 0..10),
    ];
    vec(token, 0..10).prop_map(|tokens| tokens.concat())
}

proptest! {
    #[test]
    fn what_was_found_early_stays(head in heads(), cut in any::<prop::sample::Index>()) {
        let early = &head[..cut.index(head.len() + 1)];
        match parse(early) {
            Ok(Parsed::NeedMore) => {}
            found => prop_assert_eq!(parse(&head), found),
        }
    }

    #[test]
    fn long_enough_octets_are_decided(mut head in heads()) {
        head.extend([b'x'; HEAD_BYTES_MAX + 16]);
        prop_assert!(parse(&head) != Ok(Parsed::NeedMore));
    }
}
