//! A term as a file: three lines, of which people can read the second.
//!
//! ```text
//! tandem term 1
//! {"guest":"kv","term":7,"claimant":"0c5f...","host":"a"}
//! xxh3 6d1b0c9b4f0a2e71
//! ```
//!
//! The first names the format's version, the last is the checksum of the two before it, their ends
//! included.

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use super::{Claimant, Owner, Tenure, Term, is_host};

/// Longest file, in bytes.
pub(super) const RECORD_LENGTH_MAX: usize = 512;
/// The first line.
const HEADING: &str = "tandem term 1";
/// Begins the last line.
const CHECKSUM: &str = "xxh3 ";

/// The second line.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    guest: String,
    term: u64,
    claimant: String,
    host: String,
}

/// The file of `tenure`.
pub(super) fn encode(guest: &str, tenure: &Tenure) -> Vec<u8> {
    let line = Line {
        guest: guest.to_owned(),
        term: tenure.term.0,
        claimant: tenure.owner.claimant.to_string(),
        host: tenure.owner.host.clone(),
    };
    let line = serde_json::to_string(&line).expect("numbers and strings are JSON");
    let body = format!("{HEADING}\n{line}\n");
    let checksum = xxh3_64(body.as_bytes());
    let record = format!("{body}{CHECKSUM}{checksum:016x}\n").into_bytes();
    assert!(record.len() <= RECORD_LENGTH_MAX, "names are bounded");
    record
}

/// What `bytes`, the file of `term` of `guest`, hold; else what is wrong with them.
pub(super) fn decode(bytes: &[u8], guest: &str, term: Term) -> Result<Tenure, String> {
    if bytes.len() > RECORD_LENGTH_MAX {
        return Err(format!("it is longer than {RECORD_LENGTH_MAX} bytes"));
    }
    let text = std::str::from_utf8(bytes).map_err(|_| "it is no text".to_owned())?;
    let (heading, _) = text.split_once('\n').ok_or("it is cut off")?;
    if heading != HEADING {
        return Err(format!("it does not begin with `{HEADING}`"));
    }
    let line = checked_line(text).ok_or("its checksum is wrong")?;
    let line: Line = serde_json::from_str(line).map_err(|error| error.to_string())?;
    if (line.guest.as_str(), line.term) != (guest, term.0) {
        return Err(format!("it holds term {} of {}", line.term, line.guest));
    }
    let host = line.host;
    let claimant = claimant(&line.claimant).filter(|_| is_host(&host));
    let claimant = claimant.ok_or("it names no owner")?;
    let owner = Owner { claimant, host };
    Ok(Tenure { term, owner })
}

/// The second line, if the third is its checksum and nothing follows.
fn checked_line(text: &str) -> Option<&str> {
    let (body, checksum) = text.strip_suffix('\n')?.rsplit_once('\n')?;
    let body = &text[..=body.len()];
    let expected = format!("{CHECKSUM}{:016x}", xxh3_64(body.as_bytes()));
    let line = body.strip_prefix(HEADING)?.trim_matches('\n');
    (checksum == expected && !line.contains('\n')).then_some(line)
}

fn claimant(text: &str) -> Option<Claimant> {
    let digits = text.len() == 32 && text.bytes().all(|b| b.is_ascii_hexdigit());
    let id = u128::from_str_radix(text, 16).ok().filter(|_| digits)?;
    Some(Claimant::from_bytes(id.to_be_bytes()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tenure(id: u128, host: &str) -> Tenure {
        Tenure {
            term: Term(7),
            owner: Owner {
                claimant: Claimant::from_bytes(id.to_be_bytes()),
                host: host.to_owned(),
            },
        }
    }

    #[test]
    fn a_record_can_be_read_by_people() {
        let text = String::from_utf8(encode("kv", &tenure(0xabc, "host a"))).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "tandem term 1");
        assert_eq!(
            lines[1],
            "{\"guest\":\"kv\",\"term\":7,\
             \"claimant\":\"00000000000000000000000000000abc\",\"host\":\"host a\"}"
        );
        assert_eq!(lines.len(), 3);
    }

    #[test]
    fn the_record_of_another_guest_or_term_is_refused() {
        let bytes = encode("kv", &tenure(1, "a"));
        assert!(decode(&bytes, "web", Term(7)).is_err());
        assert!(decode(&bytes, "kv", Term(8)).is_err());
    }

    #[test]
    fn every_changed_byte_is_found() {
        let bytes = encode("kv", &tenure(5, "a"));
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut changed = bytes.clone();
                changed[at] ^= 1 << bit;
                assert!(decode(&changed, "kv", Term(7)).is_err(), "{at} {bit}");
            }
            assert!(decode(&bytes[..at], "kv", Term(7)).is_err(), "{at}");
        }
        let longer = [&bytes[..], b"\n"].concat();
        assert!(decode(&longer, "kv", Term(7)).is_err());
    }

    proptest! {
        #[test]
        fn what_was_written_is_read(id: u128, host in "[ -~]{1,64}", guest in "[a-z][a-z0-9._-]{0,63}") {
            let tenure = tenure(id, &host);
            prop_assert_eq!(decode(&encode(&guest, &tenure), &guest, Term(7)), Ok(tenure));
        }

        #[test]
        fn other_bytes_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            prop_assert!(decode(&bytes, "kv", Term(7)).is_err());
        }
    }
}
