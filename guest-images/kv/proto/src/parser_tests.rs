use super::*;
use proptest::collection::vec;
use proptest::prelude::*;

/// What a stream turned out to hold: its commands, then the refusal that ended it.
type Found = (Vec<Vec<Vec<u8>>>, Option<ProtocolError>);

/// Feeds `stream` in pieces that end at `cuts`, as a connection would.
fn run(stream: &[u8], cuts: &[usize]) -> Found {
    let mut ends: Vec<usize> = cuts.iter().map(|cut| cut % (stream.len() + 1)).collect();
    ends.sort_unstable();
    ends.push(stream.len());
    let (mut parser, mut start, mut found) = (Parser::default(), 0, Vec::new());
    for end in ends {
        loop {
            match parser.step(&stream[start..end]) {
                Ok(Progress::NeedMore) => break,
                Ok(Progress::Ready(length)) => {
                    let arguments = parser.arguments(&stream[start..start + length]);
                    if !arguments.is_empty() {
                        found.push(arguments.from(0).map(<[u8]>::to_vec).collect());
                    }
                    start += length;
                    parser.restart();
                }
                Err(error) => return (found, Some(error)),
            }
        }
    }
    (found, None)
}

fn encode(commands: &[Vec<Vec<u8>>]) -> Vec<u8> {
    let mut stream = Vec::new();
    for command in commands {
        stream.extend(format!("*{}\r\n", command.len()).bytes());
        for argument in command {
            stream.extend(format!("${}\r\n", argument.len()).bytes());
            stream.extend(argument);
            stream.extend(b"\r\n");
        }
    }
    stream
}

/// Streams that are half protocol, half rubbish.
fn rubbish() -> impl Strategy<Value = Vec<u8>> {
    let token = prop_oneof![
        Just(b"*1\r\n".to_vec()),
        Just(b"*2\r\n".to_vec()),
        Just(b"*-1\r\n".to_vec()),
        Just(b"$3\r\nabc\r\n".to_vec()),
        Just(b"$0\r\n\r\n".to_vec()),
        Just(b"$-1\r\n".to_vec()),
        Just(b"$99999999\r\n".to_vec()),
        Just(b"\r\n".to_vec()),
        Just(b"PING\r\n".to_vec()),
        Just(b"SET a \"b".to_vec()),
        Just(b"*00000000000000000000000000000000000000".to_vec()),
        vec(any::<u8>(), 0..8),
    ];
    vec(token, 0..12).prop_map(|tokens| tokens.concat())
}

proptest! {
    #[test]
    fn any_cut_gives_the_same_commands(
        commands in vec(vec(vec(any::<u8>(), 0..40), 1..6), 0..8),
        cuts in vec(any::<usize>(), 0..20),
    ) {
        prop_assert_eq!(run(&encode(&commands), &cuts), (commands, None));
    }

    #[test]
    fn any_cut_refuses_the_same(stream in rubbish(), cuts in vec(any::<usize>(), 0..40)) {
        prop_assert_eq!(run(&stream, &cuts), run(&stream, &[]));
    }
}

#[test]
fn refuses_what_is_out_of_bounds() {
    let cases: [(&[u8], ProtocolError); 9] = [
        (b"*16385\r\n", ProtocolError::BadCount),
        (b"*x\r\n", ProtocolError::BadCount),
        (b"*1\n", ProtocolError::BadCount),
        (b"*1\r\nPING", ProtocolError::ExpectedLength(b'P')),
        (b"*1\r\n$524289\r\n", ProtocolError::BadLength),
        (b"*1\r\n$-1\r\n", ProtocolError::BadLength),
        (b"*1\r\n$1\r\nabc", ProtocolError::ExpectedLineEnd),
        (&[b'*'; HEADER_BYTES_MAX], ProtocolError::CountTooLong),
        (&[b'a'; INLINE_BYTES_MAX], ProtocolError::InlineTooLong),
    ];
    for (stream, error) in cases {
        assert_eq!(
            run(stream, &[]),
            (vec![], Some(error)),
            "{}",
            stream.escape_ascii()
        );
    }
}

#[test]
fn bounds_a_whole_command() {
    let argument = vec![b'v'; ARGUMENT_BYTES_MAX];
    let fits = encode(&[vec![argument.clone(); 7]]);
    assert_eq!(run(&fits, &[]).0.len(), 1);
    let exceeds = encode(&[vec![argument; 8]]);
    assert_eq!(
        run(&exceeds, &[]),
        (vec![], Some(ProtocolError::CommandTooLong))
    );
}

#[test]
fn names_the_octet_it_did_not_expect() {
    assert_eq!(
        ProtocolError::ExpectedLength(b'P').to_string(),
        "expected '$', got 'P'"
    );
}

#[test]
fn takes_empty_lines_and_empty_commands() {
    let (found, error) = run(b"\r\n*0\r\n*-1\r\n\nPING\r\n", &[]);
    assert_eq!((found, error), (vec![vec![b"PING".to_vec()]], None));
}

#[test]
fn long_arguments_are_read_once() {
    let mut parser = Parser::default();
    let stream = encode(&[vec![b"SET".to_vec(), vec![b'v'; 100_000]]]);
    assert_eq!(parser.step(&stream[..50]), Ok(Progress::NeedMore));
    assert_eq!(parser.wanted(), stream.len());
}
