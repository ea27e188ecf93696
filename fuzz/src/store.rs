//! Stores of checkpoints that somebody else wrote: listed, read, verified, pruned, gone on from.
//!
//! Hashes find damage, not forgery, so every input is tried twice: each object as it is, and around content of
//! its kind, with hashes and lengths that are right, also where a manifest says them of others.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use tandem_ft::arbiter::{Arbiter, Claimant, Owner};
use tandem_store::backend::{Backend, BackendError, Created, Entry};
use tandem_store::manifest::Manifest;
use tandem_store::owner::ObjectArbiter;
use tandem_store::prune::{KEEP_MIN, prune};
use tandem_store::read::Reader;
use tandem_store::seal::Key;
use tandem_store::survey::parts;
use tandem_store::verify::{verify, verify_checkpoint};
use tandem_store::write::Writer;
use tandem_store::{FORMAT_VERSION, Guest, ObjectId, Options, PAGE, Store, StoreError};

use crate::input::Input;

/// Begins every object.
const MAGIC: &[u8; 8] = b"TNDMSTO\x1a";
/// Bytes between flags and content.
const SALT: [u8; 16] = [7; 16];
/// Bytes of an object before its content.
pub(crate) const HEAD: usize = 36;
/// Kinds of objects by the number that an input has for them; the first is none.
pub(crate) const KINDS: [&[u8; 4]; 8] = [
    b"none", b"form", b"strt", b"flor", b"ownr", b"mani", b"tabl", b"pack",
];
pub(crate) const RAW: u8 = 0;
const MANIFEST: u8 = 5;
pub(crate) const PACK: u8 = 7;
/// Guests and checkpoints of each that are looked at.
const LOOKS_MAX: usize = 4;
/// Pages of an image that are looked at; one that says that it has more takes memory for these.
const PAGES_MAX: u64 = 1 << 16;

/// An object: number of its kind, its name, and its content.
#[derive(Clone)]
pub(crate) struct Object {
    pub(crate) kind: u8,
    pub(crate) name: String,
    pub(crate) content: Vec<u8>,
}

pub(crate) fn run(data: &[u8]) {
    let objects = objects(data);
    let raw = objects.iter().map(|o| (o.name.clone(), o.content.clone()));
    let raw: BTreeMap<String, Vec<u8>> = raw.collect();
    let key = Key::parse(&"5a".repeat(32));
    explore(raw.clone(), Options { key });
    explore(raw, Options::default());
    explore(sealed(&objects), Options::default());
}

/// The objects that an input names.
fn objects(data: &[u8]) -> Vec<Object> {
    let mut input = Input::new(data);
    let mut objects = Vec::new();
    while !input.is_empty() {
        let kind = input.u8();
        let name = String::from_utf8_lossy(input.short()).into_owned();
        let length = input.u16().into();
        let content = input.take(length).to_vec();
        objects.push(Object {
            kind: kind % KINDS.len() as u8,
            name,
            content,
        });
    }
    objects
}

/// The bytes of an input that names these objects.
pub(crate) fn input_of(objects: &[Object]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for object in objects {
        bytes.extend([object.kind, object.name.len() as u8]);
        bytes.extend(object.name.as_bytes());
        bytes.extend((object.content.len() as u16).to_le_bytes());
        bytes.extend(&object.content);
    }
    bytes
}

/// The same objects with heads, lengths and hashes that are right.
fn sealed(objects: &[Object]) -> BTreeMap<String, Vec<u8>> {
    let mut sealed = BTreeMap::new();
    let mut indexes = BTreeMap::new();
    for object in objects.iter().filter(|object| object.kind != MANIFEST) {
        let Object {
            kind,
            name,
            content,
        } = object;
        let bytes = match *kind {
            RAW => content.clone(),
            PACK => {
                let (bytes, index) = pack(name, content);
                indexes.insert(name.clone(), index);
                bytes
            }
            kind => wrapped(kind, name, content),
        };
        sealed.insert(name.clone(), bytes);
    }
    for object in objects.iter().filter(|object| object.kind == MANIFEST) {
        let content = match rmp_serde::from_slice::<Manifest>(&object.content) {
            Ok(mut manifest) => {
                set_right(&mut manifest, &sealed, &indexes);
                rmp_serde::to_vec_named(&manifest).expect("it was read")
            }
            Err(_) => object.content.clone(),
        };
        let bytes = wrapped(MANIFEST, &object.name, &content);
        sealed.insert(object.name.clone(), bytes);
    }
    sealed
}

fn hash(name: &str, bytes: &[u8]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&(name.len() as u64).to_le_bytes());
    hasher.update(name.as_bytes());
    hasher.update(bytes);
    hasher.finalize().into()
}

fn head(kind: u8) -> Vec<u8> {
    let kind = KINDS[usize::from(kind)];
    let (version, flags) = (FORMAT_VERSION.to_le_bytes(), [0; 4]);
    [&MAGIC[..], kind, &version, &flags, &SALT].concat()
}

fn compressed(bytes: &[u8]) -> Vec<u8> {
    let length = (bytes.len() as u64).to_le_bytes();
    let packed = zstd::bulk::compress(bytes, 1).expect("memory can be compressed");
    [&length[..], &packed].concat()
}

fn ended(name: &str, mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.extend(hash(name, &bytes));
    bytes
}

fn wrapped(kind: u8, name: &str, content: &[u8]) -> Vec<u8> {
    ended(name, [head(kind), compressed(content)].concat())
}

/// A pack, and length and hash of its index. Its content is the length of its blocks, these, and its index.
fn pack(name: &str, content: &[u8]) -> (Vec<u8>, (u64, [u8; 32])) {
    let mut input = Input::new(content);
    let length = input.u16().into();
    let blocks = input.take(length);
    let index = compressed(input.rest());
    let length = index.len() as u64;
    let bytes = [
        head(PACK),
        blocks.to_vec(),
        index.clone(),
        length.to_le_bytes().to_vec(),
    ];
    (ended(name, bytes.concat()), (length, hash(name, &index)))
}

/// Lets a manifest say of other objects what is true.
fn set_right(
    manifest: &mut Manifest,
    objects: &BTreeMap<String, Vec<u8>>,
    indexes: &BTreeMap<String, (u64, [u8; 32])>,
) {
    let name_of = |guest: &str, ObjectId { term, number }: ObjectId, kind: &str| {
        format!("guests/{guest}/objects/{term:020}-{number:020}.{kind}")
    };
    let guest = manifest.guest.clone();
    for record in &mut manifest.packs {
        let name = name_of(&guest, record.id, "pack");
        if let (Some(bytes), Some(index)) = (objects.get(&name), indexes.get(&name)) {
            record.length = bytes.len() as u64;
            record.hash = hash(&name, &bytes[..bytes.len() - 32]);
            (record.index_length, record.index_hash) = *index;
        }
    }
    if let Some(record) = &mut manifest.table {
        let name = name_of(&guest, record.id, "table");
        if let Some(bytes) = objects.get(&name).filter(|bytes| bytes.len() >= 32) {
            record.length = bytes.len() as u64;
            record.hash = hash(&name, &bytes[..bytes.len() - 32]);
        }
    }
    let name = name_of(&guest, manifest.description.id, "toml");
    if let Some(bytes) = objects.get(&name) {
        manifest.description.length = bytes.len() as u64;
        manifest.description.hash = hash(&name, bytes);
    }
    for section in &mut manifest.sections {
        section.checksum = xxhash_rust::xxh3::xxh3_64(&section.bytes);
    }
}

fn explore(objects: BTreeMap<String, Vec<u8>>, options: Options) {
    let backend = Arc::new(Memory(Mutex::new(objects)));
    let Some(store) = said(Store::read_on(backend, options)) else {
        return;
    };
    let guests = said(store.guests()).unwrap_or_default();
    for guest in guests.iter().take(LOOKS_MAX) {
        if let Some(guest) = said(store.guest(guest)) {
            look(&store, &guest);
        }
    }
    said(verify(&store, None, None, &mut |_| {}));
}

/// What was read; nothing if it was refused, in words.
fn said<T>(read: Result<T, StoreError>) -> Option<T> {
    read.map_err(|error| assert!(!error.to_string().is_empty()))
        .ok()
}

fn look(store: &Store, guest: &Guest) {
    let survey = said(guest.survey());
    let whole = said(guest.newest_whole()).flatten().map(|w| w.manifest.id);
    if let Some(survey) = survey {
        assert_eq!(survey.newest, whole, "both see the same");
    }
    let ids = said(guest.checkpoints()).unwrap_or_default();
    for id in ids.into_iter().take(LOOKS_MAX) {
        if let Some(manifest) = said(guest.manifest(id)) {
            read(guest, manifest);
        }
        said(verify_checkpoint(guest, id, &mut |_| {}));
    }
    go_on(store, guest);
    said(prune(guest, KEEP_MIN, true));
    said(prune(guest, KEEP_MIN, false));
    said(guest.survey());
}

fn is_small(manifest: &Manifest) -> bool {
    manifest
        .images
        .iter()
        .all(|image| image.pages() <= PAGES_MAX)
}

fn read(guest: &Guest, manifest: Manifest) {
    assert!(parts(guest, &manifest).len() <= manifest.packs.len() + 2);
    if !is_small(&manifest) {
        return;
    }
    let Some(reader) = said(Reader::open(guest, manifest)) else {
        return;
    };
    for image in 0..reader.manifest().images.len() {
        let pages = reader.manifest().images[image].pages();
        said(reader.each_page(image, |page, _| {
            assert!(page < pages, "it is a page of the image");
            Ok(())
        }));
        let mut content = [0; PAGE];
        for page in (0..=pages).take(64) {
            let read = said(reader.page(image, page, &mut content));
            assert!(page < pages || read.is_none());
        }
    }
}

/// Takes the guest and makes a checkpoint.
fn go_on(store: &Store, guest: &Guest) {
    let arbiter = || Box::new(ObjectArbiter::new(Arc::clone(store.backend())));
    drop(arbiter().current(guest.name()));
    let owner = Owner {
        claimant: Claimant::from_bytes([9; 16]),
        host: "fuzz".to_owned(),
    };
    let Some(tenancy) = said(guest.resume(arbiter().as_ref(), &owner)) else {
        return;
    };
    let base = tenancy.from.map(|whole| whole.manifest);
    if !base.as_ref().is_some_and(is_small) {
        return;
    }
    let Some(mut writer) = said(Writer::open(guest, arbiter(), tenancy.tenure, base)) else {
        return;
    };
    said(writer.learn());
    let made = said(writer.begin(&[("memory", 2 * PAGE as u64)])).and_then(|mut upload| {
        said(upload.page(0, 1, Some(&[3; PAGE])))?;
        said(upload.commit("a", Vec::new()))
    });
    if let Some(made) = made {
        let manifest = guest.manifest(made.id).expect("it is complete");
        let reader = Reader::open(guest, manifest).expect("it is whole");
        let mut content = [0; PAGE];
        assert!(reader.page(0, 1, &mut content).expect("it is there"));
        assert_eq!(content, [3; PAGE]);
    }
}

/// Objects in memory.
#[derive(Debug)]
struct Memory(Mutex<BTreeMap<String, Vec<u8>>>);

impl Memory {
    fn objects(&self) -> MutexGuard<'_, BTreeMap<String, Vec<u8>>> {
        self.0.lock().unwrap()
    }

    fn missing(&self, name: &str) -> BackendError {
        BackendError::Missing {
            name: name.to_owned(),
            place: self.place(),
        }
    }
}

impl Backend for Memory {
    fn place(&self) -> String {
        "memory".to_owned()
    }

    fn create(&self, name: &str, bytes: &[u8]) -> Result<Created, BackendError> {
        let mut objects = self.objects();
        let found = objects.entry(name.to_owned());
        let found = found.or_insert_with(|| bytes.to_vec());
        Ok(match found == bytes {
            true => Created::Yes,
            false => Created::Taken,
        })
    }

    fn get(&self, name: &str, length_max: u64) -> Result<Option<Vec<u8>>, BackendError> {
        let Some(bytes) = self.objects().get(name).cloned() else {
            return Ok(None);
        };
        match bytes.len() as u64 {
            length if length > length_max => Err(BackendError::TooLong {
                name: name.to_owned(),
                place: self.place(),
                length,
                max: length_max,
            }),
            _ => Ok(Some(bytes)),
        }
    }

    fn get_range(&self, name: &str, range: Range<u64>) -> Result<Vec<u8>, BackendError> {
        let asked = range.end.checked_sub(range.start).expect("a range");
        assert!(asked <= 64 << 20, "{asked} bytes are wanted at once");
        let objects = self.objects();
        let bytes = objects.get(name);
        let part = bytes.and_then(|bytes| bytes.get(range.start as usize..range.end as usize));
        part.map(<[u8]>::to_vec).ok_or_else(|| self.missing(name))
    }

    fn list(&self, prefix: &str) -> Result<Vec<Entry>, BackendError> {
        let objects = self.objects();
        let below = objects.iter().filter(|(name, _)| name.starts_with(prefix));
        let entries = below.map(|(name, bytes)| Entry {
            name: name.clone(),
            length: bytes.len() as u64,
        });
        Ok(entries.collect())
    }

    fn remove(&self, name: &str) -> Result<(), BackendError> {
        self.objects().remove(name);
        Ok(())
    }
}
