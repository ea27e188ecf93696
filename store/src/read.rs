//! Reading a checkpoint: page by page as they are wanted, or all of it.
//!
//! What is wanted is read with its neighbours, 64 KiB of the guest at once, and kept for a while: a bounded
//! cache of blocks. No byte leaves this that was not checked: each page has its own hash.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use roaring::RoaringBitmap;
use tandem_ft::delta::runs;

use crate::chunk::{self, CHUNKS_MAX, ChunkRef, Hash, PackIndex, PackRecord};
use crate::envelope::{self, HEAD_LENGTH, Head, Kind};
use crate::manifest::{Manifest, ObjectRecord, SavedTable};
use crate::names::{ObjectId, ObjectKind};
use crate::seal::ObjectKey;
use crate::table::Table;
use crate::{Guest, PAGE, Page, StoreError};

/// Bytes of blocks that are kept, where nothing else is said.
pub const CACHE_BYTES: usize = 16 << 20;
/// Number of a pack that a table names and the checkpoint does not have.
const GONE: u32 = u32::MAX - 1;
/// A pack is read whole if more than one in so many of its chunks is wanted.
const WHOLE_SHARE: usize = 4;

/// A checkpoint that is read. Several threads may do so at once.
pub struct Reader {
    guest: Guest,
    manifest: Manifest,
    tables: Vec<Table>,
    /// Number of each pack in the manifest.
    numbers: HashMap<ObjectId, u32>,
    packs: Mutex<HashMap<u32, Arc<OpenPack>>>,
    blocks: Mutex<Blocks>,
}

/// A pack whose index was read.
struct OpenPack {
    name: String,
    key: Option<ObjectKey>,
    index: PackIndex,
}

/// A page's content on its way out of blocks.
enum Content<'a> {
    Whole(&'a [u8]),
    Delta {
        runs: &'a [u8],
        pack: ObjectId,
        base: u32,
    },
}

impl Reader {
    /// Opens a checkpoint of `guest`, and reads which page has which content.
    ///
    /// # Errors
    /// When the storage fails, or its table is missing or damaged.
    pub fn open(guest: &Guest, manifest: Manifest) -> Result<Self, StoreError> {
        let tables = read_tables(guest, &manifest)?;
        let ids = manifest.packs.iter().map(|pack| pack.id);
        Ok(Self {
            numbers: ids.zip(0..).collect(),
            guest: guest.clone(),
            manifest,
            tables,
            packs: Mutex::default(),
            blocks: Mutex::new(Blocks::new(CACHE_BYTES)),
        })
    }

    /// Keeps as many bytes of blocks.
    #[must_use]
    pub fn with_cache(self, bytes: usize) -> Self {
        Self {
            blocks: Mutex::new(Blocks::new(bytes)),
            ..self
        }
    }

    /// What the checkpoint consists of.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    pub(crate) fn tables(&self) -> &[Table] {
        &self.tables
    }

    /// Number of the image of this name.
    ///
    /// # Errors
    /// When there is none.
    pub fn image(&self, name: &str) -> Result<usize, StoreError> {
        let mut images = self.manifest.images.iter();
        images.position(|image| image.name == name).ok_or_else(|| {
            let has: Vec<&str> = self
                .manifest
                .images
                .iter()
                .map(|i| i.name.as_str())
                .collect();
            StoreError::NoSuchImage {
                image: name.to_owned(),
                has: has.join(", "),
            }
        })
    }

    /// Whether a page of an image is zero.
    pub fn is_zero(&self, image: usize, page: u64) -> bool {
        self.tables[image].get(page).is_none()
    }

    /// Reads a page of an image; false, and nothing read, if it is zero.
    ///
    /// # Errors
    /// When the storage fails, or what it holds is missing or damaged, or there is no such page.
    pub fn page(&self, image: usize, page: u64, into: &mut Page) -> Result<bool, StoreError> {
        let table = &self.tables[image];
        if page >= table.len() {
            return Err(StoreError::NoSuchPage {
                image: self.manifest.images[image].name.clone(),
                page,
                pages: table.len(),
            });
        }
        match table.get(page) {
            None => Ok(false),
            Some(at) => self.chunk(at, into).map(|()| true),
        }
    }

    /// Reads pages of an image from `first` on until `bytes` are full, which are whole pages; false, and `bytes`
    /// untouched, if all of them are zero.
    ///
    /// # Errors
    /// As [`Reader::page`].
    pub fn pages(&self, image: usize, first: u64, bytes: &mut [u8]) -> Result<bool, StoreError> {
        let (pages, _) = bytes.as_chunks_mut::<PAGE>();
        let end = first + pages.len() as u64;
        if (first..end.min(self.tables[image].len())).all(|page| self.is_zero(image, page)) {
            return Ok(false);
        }
        for (page, into) in (first..).zip(pages) {
            if !self.page(image, page, into)? {
                into.fill(0);
            }
        }
        Ok(true)
    }

    /// Calls `take` with every page of an image that is not zero, in the order of the store: each object is
    /// read about once. That is the order in which the pages were written, for the most part that of
    /// their numbers.
    ///
    /// # Errors
    /// As [`Reader::page`], and those of `take`.
    pub fn each_page(
        &self,
        image: usize,
        mut take: impl FnMut(u64, &Page) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let mut pages: Vec<(ChunkRef, u64)> = self.tables[image]
            .iter()
            .map(|(page, at)| (at, page))
            .collect();
        pages.sort_unstable();
        for group in pages.chunk_by(|(a, _), (b, _)| a.pack == b.pack) {
            self.each_of_pack(group, &mut take)?;
        }
        Ok(())
    }

    /// Calls `take` with pages whose chunks are in one pack, in their order.
    fn each_of_pack(
        &self,
        group: &[(ChunkRef, u64)],
        take: &mut impl FnMut(u64, &Page) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let number = group[0].0.pack;
        let pack = self.pack(number)?;
        let whole = group.len() * WHOLE_SHARE > pack.index.chunks.len();
        let object = whole.then(|| self.read_pack(number)).transpose()?;
        let mut content = [0; PAGE];
        let mut last: Option<(u32, Vec<u8>)> = None;
        for &(at, page) in group {
            match &object {
                None => self.chunk(at, &mut content)?,
                Some(object) => {
                    let block = pack.chunk(at.chunk)?.block;
                    if last.as_ref().is_none_or(|(number, _)| *number != block) {
                        last = Some((block, pack.open_block_of(block, object)?));
                    }
                    let bytes = last.as_ref().map_or(&[][..], |(_, bytes)| bytes);
                    self.resolve(&pack, at.chunk, bytes, &mut content)?;
                }
            }
            take(page, &content)?;
        }
        Ok(())
    }

    /// All of a pack, unchecked but for its length.
    fn read_pack(&self, number: u32) -> Result<Vec<u8>, StoreError> {
        let record = self.record(number)?;
        let name = self.guest.names().object(record.id, ObjectKind::Pack);
        Ok(self.guest.backend().get_range(&name, 0..record.length)?)
    }

    fn record(&self, number: u32) -> Result<&PackRecord, StoreError> {
        let record = self.manifest.packs.get(number as usize);
        record.ok_or_else(|| self.damaged("it refers to a pack that it does not have"))
    }

    fn damaged(&self, what: &str) -> StoreError {
        StoreError::damaged(&self.guest.names().checkpoint(self.manifest.id), what)
    }

    /// The content of a chunk.
    fn chunk(&self, at: ChunkRef, into: &mut Page) -> Result<(), StoreError> {
        let pack = self.pack(at.pack)?;
        let block = self.block(at.pack, &pack, pack.chunk(at.chunk)?.block)?;
        self.resolve(&pack, at.chunk, &block, into)
    }

    /// The content of a chunk of a block that was read.
    fn resolve(
        &self,
        pack: &OpenPack,
        number: u32,
        block: &[u8],
        into: &mut Page,
    ) -> Result<(), StoreError> {
        let hash = pack.chunk(number)?.hash;
        match pack.content(number, block)? {
            Content::Whole(bytes) => into.copy_from_slice(bytes),
            Content::Delta {
                runs,
                pack: id,
                base,
            } => {
                self.base(id, base, into)?;
                apply(runs, into)
                    .ok_or_else(|| pack.damaged(number, "is a delta that does not fit"))?;
            }
        }
        pack.expect(number, &hash, into)
    }

    /// The page to which a delta is.
    fn base(&self, id: ObjectId, number: u32, into: &mut Page) -> Result<(), StoreError> {
        let at = *self
            .numbers
            .get(&id)
            .ok_or_else(|| self.damaged("it lacks a pack to whose pages deltas are"))?;
        let pack = self.pack(at)?;
        let block = self.block(at, &pack, pack.chunk(number)?.block)?;
        match pack.content(number, &block)? {
            Content::Whole(bytes) => into.copy_from_slice(bytes),
            Content::Delta { .. } => return Err(pack.damaged(number, "is a delta, and has one")),
        }
        pack.expect(number, &pack.chunk(number)?.hash, into)
    }

    /// The index of a pack, read when it is first wanted.
    fn pack(&self, number: u32) -> Result<Arc<OpenPack>, StoreError> {
        if let Some(pack) = lock(&self.packs).get(&number) {
            return Ok(Arc::clone(pack));
        }
        let pack = Arc::new(OpenPack::open(&self.guest, self.record(number)?)?);
        lock(&self.packs).insert(number, Arc::clone(&pack));
        Ok(pack)
    }

    fn block(&self, at: u32, pack: &OpenPack, block: u32) -> Result<Arc<Vec<u8>>, StoreError> {
        if let Some(bytes) = lock(&self.blocks).get((at, block)) {
            return Ok(bytes);
        }
        let place = pack.block(block)?.place.clone();
        let stored = self.guest.backend().get_range(&pack.name, place)?;
        let bytes =
            PackIndex::open_block(&pack.name, pack.block(block)?, stored, pack.key.as_ref())?;
        let bytes = Arc::new(bytes);
        lock(&self.blocks).put((at, block), Arc::clone(&bytes));
        Ok(bytes)
    }

    /// Hash of each chunk of a pack, and to a page of which pack it is a delta.
    pub(crate) fn chunks(&self, id: ObjectId) -> Result<Vec<(Hash, Option<ObjectId>)>, StoreError> {
        let pack = self.pack(self.number(id)?)?;
        let chunks = pack.index.chunks.iter();
        Ok(chunks
            .map(|c| (c.hash, c.base.map(|(base, _)| base)))
            .collect())
    }

    fn number(&self, id: ObjectId) -> Result<u32, StoreError> {
        let number = self.numbers.get(&id).copied();
        number.ok_or_else(|| self.damaged("it lacks a pack"))
    }

    /// Checks all chunks of a pack whose object is at hand; calls `bad` with what is wrong. A delta to what the
    /// checkpoint does not have is wrong if a page needs it.
    pub(crate) fn check_pack(
        &self,
        id: ObjectId,
        object: &[u8],
        needed: &NeededChunks,
        mut bad: impl FnMut(StoreError),
    ) -> Result<(), StoreError> {
        let number = self.number(id)?;
        let pack = self.pack(number)?;
        let mut content = [0; PAGE];
        for block in &pack.index.blocks {
            let bytes = match pack.open_block_of(block.number, object) {
                Ok(bytes) => bytes,
                Err(error) => {
                    bad(error);
                    continue;
                }
            };
            for chunk in block.chunks.clone() {
                let base = pack.chunk(chunk)?.base;
                if base.is_none_or(|(base, _)| self.numbers.contains_key(&base))
                    || needed.contains(number, chunk)
                {
                    self.resolve(&pack, chunk, &bytes, &mut content)
                        .unwrap_or_else(&mut bad);
                }
            }
        }
        Ok(())
    }

    /// The same without tables, which are most of what it takes in memory; and which chunks they name. It can
    /// check packs then, and reads no pages.
    pub(crate) fn without_tables(mut self) -> (Self, NeededChunks) {
        let mut needed = NeededChunks::default();
        for (_, at) in std::mem::take(&mut self.tables)
            .iter()
            .flat_map(Table::iter)
        {
            needed.0.entry(at.pack).or_default().insert(at.chunk);
        }
        for chunks in needed.0.values_mut() {
            chunks.optimize();
        }
        (self, needed)
    }
}

/// Chunks that pages of a checkpoint need, by the numbers of packs in its manifest.
#[derive(Default)]
pub(crate) struct NeededChunks(HashMap<u32, RoaringBitmap>);

impl NeededChunks {
    fn contains(&self, pack: u32, chunk: u32) -> bool {
        self.0
            .get(&pack)
            .is_some_and(|chunks| chunks.contains(chunk))
    }
}

impl OpenPack {
    fn open(guest: &Guest, record: &PackRecord) -> Result<Self, StoreError> {
        let name = guest.names().object(record.id, ObjectKind::Pack);
        let key = match guest.key() {
            None => None,
            Some(key) => {
                let head = guest.backend().get_range(&name, 0..HEAD_LENGTH as u64)?;
                Head::read(Kind::PACK, &name, &head, Some(key))?
            }
        };
        let place = PackIndex::place(&name, record)?;
        let stored = guest.backend().get_range(&name, place)?;
        let index = PackIndex::read(&name, record, stored, key.as_ref())?;
        Ok(Self { name, key, index })
    }

    fn damaged(&self, chunk: u32, what: &str) -> StoreError {
        StoreError::damaged(&self.name, format!("chunk {chunk} {what}"))
    }

    fn chunk(&self, number: u32) -> Result<&chunk::Chunk, StoreError> {
        let chunk = self.index.chunks.get(number as usize);
        chunk.ok_or_else(|| self.damaged(number, "is not there"))
    }

    fn block(&self, number: u32) -> Result<&chunk::Block, StoreError> {
        let block = self.index.blocks.get(number as usize);
        block.ok_or_else(|| StoreError::damaged(&self.name, format!("block {number} is not there")))
    }

    /// A block out of the whole object.
    fn open_block_of(&self, number: u32, object: &[u8]) -> Result<Vec<u8>, StoreError> {
        let block = self.block(number)?;
        let place = block.place.start as usize..block.place.end as usize;
        let stored = object.get(place);
        let stored = stored.ok_or_else(|| StoreError::damaged(&self.name, "it is cut off"))?;
        PackIndex::open_block(&self.name, block, stored.to_vec(), self.key.as_ref())
    }

    fn content<'a>(&self, number: u32, block: &'a [u8]) -> Result<Content<'a>, StoreError> {
        let chunk = self.chunk(number)?;
        let bytes = block.get(chunk.place.clone());
        let bytes = bytes.ok_or_else(|| self.damaged(number, "is not in its block"))?;
        Ok(match chunk.base {
            None => Content::Whole(bytes),
            Some((pack, base)) => Content::Delta {
                runs: bytes,
                pack,
                base,
            },
        })
    }

    fn expect(&self, number: u32, hash: &Hash, page: &Page) -> Result<(), StoreError> {
        match chunk::hash(page) == *hash {
            true => Ok(()),
            false => Err(self.damaged(number, "has another hash")),
        }
    }
}

/// Puts runs into a page; nothing if they do not fit.
fn apply(mut runs: &[u8], page: &mut Page) -> Option<()> {
    let mut end = 0;
    while !runs.is_empty() {
        let run = runs::take(&mut runs, end)?;
        end = run.offset + run.bytes.len();
        page[run.offset..end].copy_from_slice(run.bytes);
    }
    Some(())
}

/// Which page has which content, for each image of a checkpoint; packs as its manifest numbers them.
fn read_tables(guest: &Guest, manifest: &Manifest) -> Result<Vec<Table>, StoreError> {
    let numbers: HashMap<ObjectId, u32> = manifest.packs.iter().map(|p| p.id).zip(0..).collect();
    let mut tables: Vec<Table> = manifest
        .images
        .iter()
        .map(|image| Table::new(image.pages()))
        .collect();
    let checkpoint = guest.names().checkpoint(manifest.id);
    let pack_of = |number: u32| manifest.packs.get(number as usize);
    let chunks_of = |number: u32| pack_of(number).map_or(0, |pack| pack.chunks);
    if let Some(record) = &manifest.table {
        let (name, saved) = read_table(guest, record)?;
        for image in &saved.images {
            let number = manifest.images.iter().position(|i| i.name == image.name);
            let table = number.and_then(|number| tables.get_mut(number));
            // Packs that only changed pages needed are not the checkpoint's any more.
            let pack = |number: u64| {
                let id = saved.packs.get(usize::try_from(number).ok()?)?;
                let there = numbers.get(id).copied();
                Some(there.map_or((GONE, CHUNKS_MAX), |number| (number, chunks_of(number))))
            };
            let applied = table.and_then(|table| table.apply(&image.runs, pack));
            applied.ok_or_else(|| StoreError::damaged(&name, "its pages do not fit the images"))?;
        }
    }
    for (table, image) in tables.iter_mut().zip(&manifest.images) {
        let pack = |number: u64| {
            let there = number < manifest.packs.len() as u64;
            there.then(|| (number as u32, chunks_of(number as u32)))
        };
        let applied = table.apply(&image.changes, pack);
        applied.ok_or_else(|| {
            let what = format!("the pages of `{}` do not fit it", image.name.escape_debug());
            StoreError::damaged(&checkpoint, what)
        })?;
        if !table.iter().all(|(_, at)| at.pack != GONE) {
            return Err(StoreError::damaged(
                &checkpoint,
                "it lacks a pack that its pages need",
            ));
        }
        if table.held() != image.held {
            let (name, held) = (image.name.escape_debug(), table.held());
            let what = format!("`{name}` holds {held} pages, not {}", image.held);
            return Err(StoreError::damaged(&checkpoint, what));
        }
    }
    Ok(tables)
}

/// The table that `record` is about, and its name.
pub(crate) fn read_table(
    guest: &Guest,
    record: &ObjectRecord,
) -> Result<(String, SavedTable), StoreError> {
    let name = guest.names().object(record.id, ObjectKind::Table);
    let object = guest
        .backend()
        .get(&name, Kind::TABLE.object_length_max())?;
    let object = object.ok_or_else(|| StoreError::Missing { name: name.clone() })?;
    let (_, hash) = envelope::checked(&name, &object)?;
    if hash != record.hash {
        return Err(StoreError::damaged(&name, "it is another table"));
    }
    let content = envelope::unwrap(Kind::TABLE, &name, &object, guest.key())?;
    let saved = envelope::from_bytes(&name, &content)?;
    Ok((name, saved))
}

/// A block, and when it was last used, in uses of any.
type UsedBlock = (Arc<Vec<u8>>, u64);

/// Blocks that were read, the latest used of them.
struct Blocks {
    /// By number of pack and block.
    blocks: HashMap<(u32, u32), UsedBlock>,
    bytes: usize,
    bytes_max: usize,
    uses: u64,
}

impl Blocks {
    fn new(bytes_max: usize) -> Self {
        Self {
            blocks: HashMap::new(),
            bytes: 0,
            bytes_max,
            uses: 0,
        }
    }

    fn get(&mut self, at: (u32, u32)) -> Option<Arc<Vec<u8>>> {
        self.uses += 1;
        let (block, used) = self.blocks.get_mut(&at)?;
        *used = self.uses;
        Some(Arc::clone(block))
    }

    fn put(&mut self, at: (u32, u32), block: Arc<Vec<u8>>) {
        self.uses += 1;
        self.bytes += block.len();
        if let Some((old, _)) = self.blocks.insert(at, (block, self.uses)) {
            self.bytes -= old.len();
        }
        while self.bytes > self.bytes_max && self.blocks.len() > 1 {
            let oldest = self.blocks.iter().min_by_key(|(_, (_, used))| *used);
            let Some(oldest) = oldest.map(|(at, _)| *at) else {
                return;
            };
            if let Some((block, _)) = self.blocks.remove(&oldest) {
                self.bytes -= block.len();
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
