//! What a hostile peer says on two paths, and on a path that it does not have.

use std::time::{Duration, Instant};

use tandem_ft::paths::{Frame, PATHS, Stream, WINDOW};

use crate::input::Input;

/// What this side says meanwhile.
const SAID: &[u8] = b"what is said though the other side says anything";
/// Bytes that may be taken for streams and what is said in one round.
const MEMORY_MAX: usize = 8 * WINDOW;

pub(crate) fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let mut now = Instant::now();
    let mut stream = Stream::new(now, 0);
    stream.put(SAID);
    let mut out = Vec::new();
    while !input.is_empty() {
        let path = usize::from(input.u8()) % PATHS;
        match input.u8() % 8 {
            0 => stream.connected(now, path),
            1 => stream.gone(path),
            2 => take_all(&mut stream),
            3 => now += Duration::from_millis(input.u8().into()),
            4 => stream.end(),
            _ => {
                let said = input.short();
                match hear(&mut stream, path, said) {
                    Ok(()) => {}
                    // That is the end of it.
                    Err(()) => return,
                }
            }
        }
        stream.look(now);
        for path in 0..PATHS {
            out.clear();
            while stream.say(now, path, &mut out) {}
            expect_own(&out);
        }
        assert!(stream.memory_bytes() <= MEMORY_MAX);
    }
}

fn hear(stream: &mut Stream, path: usize, mut said: &[u8]) -> Result<(), ()> {
    while let Some((frame, length)) = Frame::take(said).map_err(drop)? {
        stream.hear(path, &frame).map_err(drop)?;
        said = &said[length..];
    }
    Ok(())
}

fn take_all(stream: &mut Stream) {
    while !stream.come().is_empty() {
        let come = stream.come().len();
        assert!(come <= WINDOW);
        stream.take(come);
    }
}

/// Whatever the other side says, it hears frames, and of what this side said what is there.
fn expect_own(mut out: &[u8]) {
    while let Some((frame, length)) = Frame::take(out).expect("this side says frames") {
        let at = frame.offset as usize;
        let own = SAID.get(at..at + frame.payload.len());
        assert!(frame.payload.is_empty() || own == Some(frame.payload));
        out = &out[length..];
    }
    assert!(out.is_empty(), "this side says whole frames");
}
