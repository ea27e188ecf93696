//! Stores of checkpoints.

use std::collections::BTreeMap;
use std::path::Path;

use serde_bytes::ByteBuf;

use super::Seed;
use crate::store::{HEAD, KINDS, Object, PACK, RAW, input_of};

/// Bytes of a length and of a hash.
const LENGTH: usize = 8;
const HASH: usize = 32;

/// A store that an earlier Tandem made, as it is, as what is in its objects, and in part.
pub(super) fn store() -> Vec<Seed> {
    let raw = golden("plain");
    let objects: Vec<Object> = raw.iter().map(opened).collect();
    let without = |kind: &str| -> Vec<Object> {
        let mut objects = objects.clone();
        objects.retain(|object| !object.name.ends_with(kind));
        objects
    };
    vec![
        ("raw", input_of(&raw)),
        ("encrypted", input_of(&golden("encrypted"))),
        ("objects", input_of(&objects)),
        ("without-packs", input_of(&without(".pack"))),
        ("without-tables", input_of(&without(".table"))),
    ]
}

fn golden(name: &str) -> Vec<Object> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let path = root.join(format!("../store/golden/v1/{name}.store"));
    let packed = std::fs::read(path).expect("golden stores are kept");
    let objects: BTreeMap<String, ByteBuf> = rmp_serde::from_slice(&packed).expect("a map");
    let objects = objects.into_iter().map(|(name, content)| Object {
        kind: RAW,
        name,
        content: content.into_vec(),
    });
    objects.collect()
}

/// What is in an object, if it is in an envelope.
fn opened(object: &Object) -> Object {
    let bytes = &object.content;
    let kind = bytes.get(LENGTH..LENGTH + 4).unwrap_or_default();
    let kind = KINDS.iter().position(|known| &known[..] == kind);
    let Some(kind) = kind.map(|kind| kind as u8) else {
        return object.clone();
    };
    let body = &bytes[HEAD..bytes.len() - HASH];
    let content = match kind {
        PACK => {
            let (rest, length) = body.split_at(body.len() - LENGTH);
            let length = u64::from_le_bytes(length.try_into().expect("8 bytes")) as usize;
            let (blocks, index) = rest.split_at(rest.len() - length);
            let length = (blocks.len() as u16).to_le_bytes();
            [&length[..], blocks, &unpacked(index)].concat()
        }
        _ => unpacked(body),
    };
    Object {
        kind,
        name: object.name.clone(),
        content,
    }
}

fn unpacked(bytes: &[u8]) -> Vec<u8> {
    let (length, packed) = bytes.split_first_chunk::<LENGTH>().expect("a length");
    let length = u64::from_le_bytes(*length) as usize;
    zstd::bulk::decompress(packed, length).expect("it was compressed")
}
