//! What a hostile primary's checkpoint says of outputs, taken by a copy's gates, which take a good one's
//! afterwards.

use tandem_ft::runtime::{Pair, ProtectionError, encode_outputs, load_outputs};

/// Network devices of the guest.
const NETS: usize = 2;
/// The epoch of the good checkpoint.
const EPOCH: u64 = 7;

/// Gates as a primary has them.
pub(crate) fn gates() -> Pair {
    Pair::new("fuzz", NETS, 0).expect("gates")
}

pub(crate) fn run(data: &[u8]) {
    let copy = gates();
    copy.become_secondary();
    let before = copy.epoch();
    match load_outputs(&copy, data) {
        Ok(()) => {}
        Err(ProtectionError::Garbled(what)) => {
            assert!(!what.is_empty());
            assert_eq!(copy.epoch(), before, "what was refused is not gone on from");
        }
        Err(error) => panic!("{error}"),
    }
    let good = encode_outputs(&gates(), EPOCH).expect("encoded");
    load_outputs(&copy, &good).expect("a good primary's are taken");
    assert_eq!(copy.epoch(), EPOCH);
    assert!(!copy.status().protected, "who compares has to say so");
}
