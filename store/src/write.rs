//! Making checkpoints.
//!
//! A [`Writer`] belongs to the owner of a term. Each checkpoint is an [`Upload`]: pages that were written since
//! the one before it, in any order and as often as one likes, then all other state; the manifest comes
//! last. What a page holds is found in the store, or is a delta to what the page held, or a chunk.
//!
//! # When something fails
//!
//! A checkpoint whose manifest could not be written may be there all the same, now or later. The writer is
//! of no more use then; [`Writer::reopen`] looks what is there. If that is the checkpoint before, its
//! number is used again, so of two tries one can be a checkpoint. If the late one comes through, that
//! shows: [`StoreError::Earlier`].
//!
//! # What a checkpoint may refer to
//!
//! To packs of its parent and to those of its own upload: whoever removes what is not needed relies on that
//! ([`crate::prune`]).

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::time::{SystemTime, UNIX_EPOCH};

use roaring::RoaringBitmap;
use tandem_ft::arbiter::{Arbiter, Tenure};

use crate::backend::Created;
use crate::chunk::{self, CHUNKS_MAX, ChunkRef, Known, PackBuilder, PackRecord};
use crate::envelope::{self, HASH_LENGTH, Kind};
use crate::manifest::{
    Counts, DESCRIPTION_LENGTH_MAX, ImageRecord, Manifest, ObjectRecord, SavedImage, SavedTable,
    Section,
};
use crate::names::ObjectKind;
use crate::read::Reader;
use crate::table::{PAGES_MAX, Table};
use crate::{CheckpointId, Guest, ObjectId, PAGE, Page, StoreError};

/// A table is written anew when one in so many of its pages has changed since the last one.
const CHANGED_SHARE: u64 = 4;
/// And not before so many pages have.
const CHANGED_MIN: u64 = 1024;
/// A pack is worth emptying if one in so many of the chunks that it could have is still needed, or less.
const SPARSE_SHARE: u32 = 2;
/// Pages that a full pack has.
const PACK_PAGES: u32 = (chunk::PACK_LENGTH / PAGE) as u32;
/// Packs that a checkpoint may need beyond twice those that its pages fill, before pages are moved.
const PACKS_SPARE: u64 = 64;
/// Bytes that packs may have for each that is needed, as far as can be told, before pages are moved.
const STORED_PER_NEEDED: u64 = 2;
/// And so many beyond that.
const STORED_SPARE: u64 = 1 << 20;
/// For so many pages that are written one is moved, once there are too many packs or chunks: no more than a tenth of what goes to
/// the store is there for what did not change. A guest that writes anywhere with equal chance then has 2.8 times the bytes
/// in packs that are needed: those that are emptied have one in 13 of theirs left, all others more.
const MOVED_SHARE: u64 = 12;
/// So many are moved then in any case.
const MOVED_MIN: u64 = 64;

/// Makes the checkpoints of a guest, for the owner of a term.
pub struct Writer {
    guest: Guest,
    arbiter: Box<dyn Arbiter>,
    tenure: Tenure,
    parent: Option<CheckpointId>,
    next_number: u64,
    state: State,
    known: Known,
    broken: bool,
    /// Fewest changed pages, and fewest pages at all, for which a table is written.
    table_pages_min: u64,
}

/// What the last checkpoint consists of.
#[derive(Default)]
struct State {
    images: Vec<Image>,
    table: Option<ObjectRecord>,
    /// By the numbers that chunks have here; those of the last checkpoint.
    packs: BTreeMap<u32, PackRecord>,
    next_pack: u32,
    /// Of packs whose indexes are known: their chunks that are deltas, and to pages of which pack.
    deltas: HashMap<u32, HashMap<u32, u32>>,
    description: Option<ObjectRecord>,
    sequence: u64,
}

/// Memory or a disk.
struct Image {
    name: String,
    bytes: u64,
    table: Table,
    /// Pages that have changed since the table was written.
    changed: RoaringBitmap,
}

impl Writer {
    /// Goes on from checkpoint `base`, or with nothing, in the term that was won and started
    /// ([`Guest::resume`], [`Guest::begin_anew`]).
    ///
    /// # Errors
    /// When the storage fails, or the table of `base` is missing or damaged.
    pub fn open(
        guest: &Guest,
        arbiter: Box<dyn Arbiter>,
        tenure: Tenure,
        base: Option<Manifest>,
    ) -> Result<Self, StoreError> {
        let mut writer = Self {
            guest: guest.clone(),
            arbiter,
            tenure,
            parent: None,
            next_number: 0,
            state: State::default(),
            known: Known::default(),
            broken: false,
            table_pages_min: CHANGED_MIN,
        };
        writer.go_on_from(base)?;
        Ok(writer)
    }

    fn go_on_from(&mut self, base: Option<Manifest>) -> Result<(), StoreError> {
        self.known = Known::default();
        self.parent = base.as_ref().map(|base| base.id);
        if let Some(base) = &base
            && base.id.term == self.tenure.term.0
        {
            self.next_number = self.next_number.max(base.next_number);
        }
        self.state = match base {
            Some(base) => State::of(&self.guest, base)?,
            None => State::default(),
        };
        self.broken = false;
        Ok(())
    }

    /// Looks what is in the store after something failed, and goes on from the newest checkpoint of this
    /// line; says which that is. Pages that were written since that have to be written again.
    ///
    /// # Errors
    /// When another owns the guest, or the storage fails.
    pub fn reopen(&mut self) -> Result<Option<CheckpointId>, StoreError> {
        self.guest
            .expect_owner(self.arbiter.as_ref(), &self.tenure)?;
        let base = match self.guest.checkpoints()?.first() {
            Some(id) => Some(self.guest.manifest(*id)?),
            None => None,
        };
        self.go_on_from(base)?;
        Ok(self.parent)
    }

    /// Reads the hashes of all content of the last checkpoint, so that pages whose content is there already
    /// are not put into the store again.
    ///
    /// # Errors
    /// When the storage fails, or an index is missing or damaged.
    pub fn learn(&mut self) -> Result<(), StoreError> {
        let Some(parent) = self.parent else {
            return Ok(());
        };
        let manifest = self.guest.manifest(parent)?;
        let numbers: HashMap<ObjectId, u32> = self
            .state
            .packs
            .iter()
            .map(|(number, pack)| (pack.id, *number))
            .collect();
        let reader = Reader::open(&self.guest, manifest)?;
        for pack in &reader.manifest().packs {
            let number = numbers.get(&pack.id).copied();
            let number = number.ok_or_else(|| StoreError::NoSuchCheckpoint {
                guest: self.guest.name().to_owned(),
                id: parent,
            })?;
            let mut deltas = HashMap::new();
            for (chunk, (hash, base)) in (0..).zip(reader.chunks(pack.id)?) {
                match base.map(|base| numbers.get(&base)) {
                    None => self.known.add(
                        hash,
                        ChunkRef {
                            pack: number,
                            chunk,
                        },
                    ),
                    // It is a delta that no page needs any more, to one that is gone.
                    Some(None) => {}
                    Some(Some(base)) => {
                        deltas.insert(chunk, *base);
                        self.known.add(
                            hash,
                            ChunkRef {
                                pack: number,
                                chunk,
                            },
                        );
                    }
                }
            }
            self.state.deltas.insert(number, deltas);
        }
        Ok(())
    }

    /// The newest checkpoint that is complete.
    pub fn last(&self) -> Option<CheckpointId> {
        self.parent
    }

    /// Whether a checkpoint failed, or was abandoned, since it was opened.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// The term in which it writes.
    pub fn tenure(&self) -> &Tenure {
        &self.tenure
    }

    /// Bytes of memory that it takes for what it knows of the store.
    pub fn memory_bytes(&self) -> u64 {
        let tables = self
            .state
            .images
            .iter()
            .map(|image| image.table.memory_bytes());
        tables.sum::<u64>() + self.known.memory_bytes()
    }

    /// Begins a checkpoint, whose images have these names and bytes.
    ///
    /// # Errors
    /// When an image is larger than it may be, or something failed before and [`Writer::reopen`] was not called.
    pub fn begin(&mut self, images: &[(&str, u64)]) -> Result<Upload<'_>, StoreError> {
        if self.broken {
            let what = "a checkpoint failed; look what is there first".to_owned();
            return Err(StoreError::Ended { what });
        }
        for (name, bytes) in images {
            let pages = bytes.div_ceil(PAGE as u64);
            if pages > PAGES_MAX {
                return Err(StoreError::TooLarge {
                    what: format!("image `{name}` in pages"),
                    found: pages,
                    max: PAGES_MAX,
                });
            }
        }
        self.broken = true;
        self.state.shape(images);
        let begun = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        Ok(Upload {
            first_pack: self.state.next_pack,
            parent_packs: self.state.packs.keys().copied().collect(),
            begun_ms: begun.as_millis().try_into().unwrap_or(u64::MAX),
            counts: Counts::default(),
            pack: None,
            content: HashMap::new(),
            writer: self,
        })
    }

    /// Writes tables for as few pages.
    #[cfg(test)]
    pub(crate) fn write_tables_from(&mut self, pages: u64) {
        self.table_pages_min = pages;
    }

    fn new_object(&mut self) -> ObjectId {
        let id = ObjectId {
            term: self.tenure.term.0,
            number: self.next_number,
        };
        self.next_number += 1;
        id
    }

    fn create(&self, name: &str, object: &[u8]) -> Result<(), StoreError> {
        match self.guest.backend().create(name, object)? {
            Created::Yes => Ok(()),
            Created::Taken => Err(StoreError::damaged(name, "another wrote it in this term")),
        }
    }
}

impl State {
    /// That of a checkpoint.
    fn of(guest: &Guest, base: Manifest) -> Result<Self, StoreError> {
        let reader = Reader::open(guest, base)?;
        let base = reader.manifest();
        let images = base.images.iter().zip(reader.tables());
        let mut state = Self {
            images: images
                .map(|(image, table)| Image {
                    name: image.name.clone(),
                    bytes: image.bytes,
                    table: table.clone(),
                    changed: RoaringBitmap::new(),
                })
                .collect(),
            // What has changed since its table is not kept apart: the next one is written anew.
            table: None,
            packs: (0..).zip(base.packs.iter().cloned()).collect(),
            next_pack: base.packs.len() as u32,
            deltas: HashMap::new(),
            description: Some(base.description),
            sequence: base.id.sequence,
        };
        state.mark_all();
        Ok(state)
    }

    fn mark_all(&mut self) {
        for image in &mut self.images {
            image.changed.insert_range(0..image.table.len() as u32);
        }
    }

    /// Gives it these images; what it has of others goes, and an image of another size is another one.
    fn shape(&mut self, images: &[(&str, u64)]) {
        let is = |image: &Image, name: &str, bytes| image.name == name && image.bytes == bytes;
        let same = self.images.len() == images.len()
            && self
                .images
                .iter()
                .zip(images)
                .all(|(i, (name, bytes))| is(i, name, *bytes));
        if same {
            return;
        }
        let mut old = std::mem::take(&mut self.images);
        self.images = images
            .iter()
            .map(
                |(name, bytes)| match old.iter().position(|i| is(i, name, *bytes)) {
                    Some(at) => old.swap_remove(at),
                    None => Image {
                        name: (*name).to_owned(),
                        bytes: *bytes,
                        table: Table::new(bytes.div_ceil(PAGE as u64)),
                        changed: RoaringBitmap::new(),
                    },
                },
            )
            .collect();
        self.table = None;
        self.mark_all();
    }

    fn changed(&self) -> u64 {
        self.images.iter().map(|image| image.changed.len()).sum()
    }

    fn held(&self) -> u64 {
        self.images.iter().map(|image| image.table.held()).sum()
    }

    fn set(&mut self, image: usize, page: u64, content: Option<ChunkRef>) {
        let image = &mut self.images[image];
        if image.table.get(page) != content {
            image.table.set(page, content);
            image.changed.insert(page as u32);
        }
    }

    /// Calls `need` with each page and a pack that it needs; two, if it is a delta that is known.
    fn each_need(&self, mut need: impl FnMut(usize, u64, u32)) {
        for (number, image) in self.images.iter().enumerate() {
            let mut last = (u32::MAX, None);
            for (page, at) in image.table.iter() {
                if last.0 != at.pack {
                    last = (at.pack, self.deltas.get(&at.pack));
                }
                need(number, page, at.pack);
                let base = last.1.and_then(|deltas| deltas.get(&at.chunk));
                if let Some(base) = base.filter(|base| **base != at.pack) {
                    need(number, page, *base);
                }
            }
        }
    }

    /// How many pages need each pack.
    fn needs(&self) -> HashMap<u32, u64> {
        let mut needs = HashMap::new();
        let mut last = (u32::MAX, 0);
        self.each_need(|_, _, pack| {
            if last.0 != pack {
                *needs.entry(last.0).or_default() += last.1;
                last = (pack, 0);
            }
            last.1 += 1;
        });
        *needs.entry(last.0).or_default() += last.1;
        needs.remove(&u32::MAX);
        needs
    }

    /// Lets go of the packs that no page needs. Of those whose index is not known, all deltas count.
    fn drop_packs(&mut self) {
        let needs = self.needs();
        let unknown = self
            .packs
            .iter()
            .filter(|(number, _)| needs.contains_key(number) && !self.deltas.contains_key(number));
        let bases: HashSet<ObjectId> = unknown
            .flat_map(|(_, pack)| pack.bases.iter().copied())
            .collect();
        self.packs
            .retain(|number, pack| needs.contains_key(number) || bases.contains(&pack.id));
        let packs = &self.packs;
        self.deltas.retain(|number, _| packs.contains_key(number));
    }

    /// Whether a chunk can be read: its pack is there, and that of the page to which it is a delta.
    fn can_read(&self, at: ChunkRef) -> bool {
        let base = self
            .deltas
            .get(&at.pack)
            .and_then(|deltas| deltas.get(&at.chunk));
        self.packs.contains_key(&at.pack) && base.is_none_or(|base| self.packs.contains_key(base))
    }
}

/// A checkpoint that is being made. Dropped before it is complete, it leaves a writer that has to be opened
/// again, and objects that nobody needs.
pub struct Upload<'w> {
    writer: &'w mut Writer,
    begun_ms: u64,
    counts: Counts,
    /// Packs from this one on are of this upload.
    first_pack: u32,
    parent_packs: HashSet<u32>,
    /// The pack that is being filled.
    pack: Option<(u32, PackBuilder)>,
    /// Pages as they are now, by image and number.
    content: HashMap<(usize, u64), Option<ChunkRef>>,
}

impl Upload<'_> {
    /// Page `number` of an image, by the image's number, holds this now; nothing if it is zero. Whole packs go
    /// into the store meanwhile.
    ///
    /// # Errors
    /// When there is no such page, or the storage fails.
    pub fn page(
        &mut self,
        image: usize,
        number: u64,
        content: Option<&Page>,
    ) -> Result<(), StoreError> {
        self.expect_page(image, number)?;
        self.counts.pages += 1;
        let content = content.filter(|page| **page != [0; PAGE]);
        let at = match content {
            None => {
                self.counts.zero += 1;
                None
            }
            Some(page) => Some(self.store(image, number, page)?),
        };
        self.content.insert((image, number), at);
        Ok(())
    }

    fn expect_page(&self, image: usize, page: u64) -> Result<(), StoreError> {
        let images = &self.writer.state.images;
        let (name, pages) = images
            .get(image)
            .map_or(("", 0), |image| (&image.name, image.table.len()));
        if page < pages {
            return Ok(());
        }
        Err(StoreError::NoSuchPage {
            image: name.to_owned(),
            page,
            pages,
        })
    }

    /// Where the content of a page is, once it is in the store or on its way.
    fn store(&mut self, image: usize, number: u64, page: &Page) -> Result<ChunkRef, StoreError> {
        let hash = chunk::hash(page);
        if let Some(at) = self
            .writer
            .known
            .find(&hash)
            .filter(|at| self.is_there(*at))
        {
            self.counts.known += 1;
            return Ok(at);
        }
        let image = image as u32;
        let is_there = |at| self.is_there(at);
        let delta = self.writer.known.delta(image, number, page, is_there);
        let at = match delta.and_then(|(base, runs)| Some((self.pack_id(base.pack)?, base, runs))) {
            Some((pack, base, runs)) => {
                self.counts.deltas += 1;
                let at = self.add(|builder| builder.add_delta(hash, &runs, pack, base.chunk))?;
                let deltas = self.writer.state.deltas.entry(at.pack).or_default();
                deltas.insert(at.chunk, base.pack);
                at
            }
            None => {
                let at = self.add(|builder| builder.add_page(hash, page))?;
                self.writer.known.keep(image, number, at, page);
                at
            }
        };
        self.writer.known.add(hash, at);
        self.end_pack_if(PackBuilder::is_full)?;
        Ok(at)
    }

    /// Whether this checkpoint may refer to a chunk.
    fn is_there(&self, at: ChunkRef) -> bool {
        at.pack >= self.first_pack || self.parent_packs.contains(&at.pack)
    }

    fn pack_id(&self, number: u32) -> Option<ObjectId> {
        match &self.pack {
            Some((at, builder)) if *at == number => Some(builder.id()),
            _ => self.writer.state.packs.get(&number).map(|pack| pack.id),
        }
    }

    fn add(&mut self, add: impl FnOnce(&mut PackBuilder) -> u32) -> Result<ChunkRef, StoreError> {
        let (number, builder) = match &mut self.pack {
            Some(pack) => pack,
            None => {
                let number = self.writer.state.next_pack;
                self.writer.state.next_pack = number.checked_add(1).ok_or_else(|| {
                    let what = "it has made all the packs that it can".to_owned();
                    StoreError::Ended { what }
                })?;
                let id = self.writer.new_object();
                let guest = &self.writer.guest;
                let name = guest.names().object(id, ObjectKind::Pack);
                self.pack
                    .insert((number, PackBuilder::new(id, name, guest.key())))
            }
        };
        let chunk = add(builder);
        Ok(ChunkRef {
            pack: *number,
            chunk,
        })
    }

    /// Puts what came so far into the store, however little that is.
    ///
    /// # Errors
    /// When the storage fails.
    pub fn flush(&mut self) -> Result<(), StoreError> {
        self.end_pack_if(|_| true)
    }

    fn end_pack_if(&mut self, ends: impl Fn(&PackBuilder) -> bool) -> Result<(), StoreError> {
        let Some((number, builder)) = self.pack.take_if(|(_, builder)| ends(builder)) else {
            return Ok(());
        };
        let built = builder.build();
        self.counts.stored_bytes += built.object.len() as u64;
        self.writer.create(&built.name, &built.object)?;
        self.writer.state.deltas.entry(number).or_default();
        self.writer.state.packs.insert(number, built.record);
        Ok(())
    }

    /// Completes the checkpoint. `description` says of the guest's hardware, for people and for a resume;
    /// `sections` are all state that is not in pages.
    ///
    /// # Errors
    /// When another owns the guest by now, the storage fails, or something is larger than it may be. The
    /// checkpoint may be complete all the same, but for the last case; see the module.
    pub fn commit(
        mut self,
        description: &str,
        sections: Vec<Section>,
    ) -> Result<Committed, StoreError> {
        self.move_pages()?;
        self.flush()?;
        for ((image, page), content) in std::mem::take(&mut self.content) {
            self.writer.state.set(image, page, content);
        }
        self.writer.state.drop_packs();
        self.describe(description)?;
        self.write_table()?;
        let manifest = self.manifest(sections);
        self.publish(&manifest)?;
        let writer = self.writer;
        writer.state.sequence = manifest.id.sequence;
        writer.parent = Some(manifest.id);
        let state = &writer.state;
        writer.known.retain(|at| state.can_read(at));
        writer.broken = false;
        Ok(Committed {
            id: manifest.id,
            counts: self.counts,
            packs: manifest.packs.len(),
        })
    }

    /// Writes pages anew whose packs have little else that is needed.
    fn move_pages(&mut self) -> Result<(), StoreError> {
        let Some(parent) = self.writer.parent else {
            return Ok(());
        };
        let pages = self.pages_to_move();
        if pages.is_empty() {
            return Ok(());
        }
        let manifest = self.writer.guest.manifest(parent)?;
        let reader = Reader::open(&self.writer.guest, manifest)?;
        let mut content = [0; PAGE];
        for (image, page) in pages {
            let name = &self.writer.state.images[image].name;
            reader.page(reader.image(name)?, page, &mut content)?;
            let hash = chunk::hash(&content);
            let at = self.add(|builder| builder.add_page(hash, &content))?;
            self.writer.known.add(hash, at);
            self.writer.known.keep(image as u32, page, at, &content);
            self.counts.moved += 1;
            self.content.insert((image, page), Some(at));
            self.end_pack_if(PackBuilder::is_full)?;
        }
        Ok(())
    }

    /// How many pages may be moved. None, until there is reason to: what is not written is not moved, on the
    /// whole, and a guest that writes little costs little.
    fn move_budget(&self) -> u64 {
        let state = &self.writer.state;
        let needs = state.needs();
        let mut stored = 0;
        let mut needed = 0;
        for (number, pack) in &state.packs {
            let chunks = u64::from(pack.chunks).max(1);
            let share = needs.get(number).copied().unwrap_or_default().min(chunks);
            stored += pack.length;
            needed += pack.length * share / chunks;
        }
        let packs = state.packs.len() as u64;
        let packs_max = 2 * (state.held() / u64::from(PACK_PAGES) + 1) + PACKS_SPARE;
        let stored_max = STORED_PER_NEEDED * needed + STORED_SPARE;
        match () {
            () if packs > 2 * packs_max || stored > 2 * stored_max => self.counts.pages,
            () if packs > packs_max || stored > stored_max => self.counts.pages / MOVED_SHARE,
            () => return 0,
        }
        .max(MOVED_MIN)
    }

    /// Pages that are to move, the emptiest packs' first, as many as may.
    fn pages_to_move(&self) -> Vec<(usize, u64)> {
        let budget = self.move_budget();
        if budget == 0 {
            return Vec::new();
        }
        let mut needs: HashMap<u32, Vec<(usize, u64)>> = HashMap::new();
        self.writer.state.each_need(|image, page, pack| {
            if !self.content.contains_key(&(image, page)) {
                needs.entry(pack).or_default().push((image, page));
            }
        });
        needs.retain(|_, pages| pages.len() as u32 <= PACK_PAGES / SPARSE_SHARE);
        let mut sparse: Vec<_> = needs.into_iter().collect();
        sparse.sort_by_key(|(pack, pages)| (pages.len(), *pack));
        let mut pages = BTreeSet::new();
        for (_, of_pack) in sparse {
            if !pages.is_empty() && (pages.len() + of_pack.len()) as u64 > budget {
                break;
            }
            pages.extend(of_pack);
        }
        pages.into_iter().collect()
    }

    /// Writes the description, if it is another one than the last.
    fn describe(&mut self, description: &str) -> Result<(), StoreError> {
        let length = description.len() as u64;
        if length > DESCRIPTION_LENGTH_MAX {
            return Err(StoreError::TooLarge {
                what: "the description of the hardware in bytes".to_owned(),
                found: length,
                max: DESCRIPTION_LENGTH_MAX,
            });
        }
        if let Some(last) = &self.writer.state.description
            && described(&self.writer.guest, last.id, description).0 == last.hash
        {
            return Ok(());
        }
        let id = self.writer.new_object();
        let (hash, name) = described(&self.writer.guest, id, description);
        self.writer.create(&name, description.as_bytes())?;
        self.counts.stored_bytes += length;
        self.writer.state.description = Some(ObjectRecord { id, length, hash });
        Ok(())
    }

    /// Writes the table, if much has changed since the last.
    fn write_table(&mut self) -> Result<(), StoreError> {
        let (state, min) = (&self.writer.state, self.writer.table_pages_min);
        let changed_max = (state.held() / CHANGED_SHARE).max(min);
        if state.table.is_none() && state.held() <= min {
            // A small guest's manifest says it all. Whatever is not in it is zero.
            return Ok(());
        }
        if state.table.is_some() && state.changed() <= changed_max {
            return Ok(());
        }
        let numbers: HashMap<u32, u64> = state.packs.keys().copied().zip(0..).collect();
        let saved = SavedTable {
            packs: state.packs.values().map(|pack| pack.id).collect(),
            images: state
                .images
                .iter()
                .map(|image| SavedImage {
                    name: image.name.clone(),
                    runs: image
                        .table
                        .runs(image.table.iter().map(|(page, _)| page), |n| numbers[&n]),
                })
                .collect(),
        };
        let id = self.writer.new_object();
        let guest = &self.writer.guest;
        let name = guest.names().object(id, ObjectKind::Table);
        let object = envelope::wrap(Kind::TABLE, &name, &envelope::to_bytes(&saved), guest.key())?;
        self.writer.create(&name, &object)?;
        let length = object.len() as u64;
        let mut hash = [0; HASH_LENGTH];
        hash.copy_from_slice(&object[object.len() - HASH_LENGTH..]);
        self.counts.stored_bytes += length;
        let state = &mut self.writer.state;
        state.table = Some(ObjectRecord { id, length, hash });
        state
            .images
            .iter_mut()
            .for_each(|image| image.changed.clear());
        Ok(())
    }

    fn manifest(&self, sections: Vec<Section>) -> Manifest {
        let (writer, state) = (&*self.writer, &self.writer.state);
        let numbers: HashMap<u32, u64> = state.packs.keys().copied().zip(0..).collect();
        Manifest {
            tandem: env!("CARGO_PKG_VERSION").to_owned(),
            guest: writer.guest.name().to_owned(),
            id: CheckpointId {
                term: writer.tenure.term.0,
                sequence: state.sequence + 1,
            },
            parent: writer.parent,
            begun_ms: self.begun_ms,
            next_number: writer.next_number,
            description: state.description.expect("it was written"),
            table: state.table,
            packs: state.packs.values().cloned().collect(),
            images: state
                .images
                .iter()
                .map(|image| ImageRecord {
                    name: image.name.clone(),
                    bytes: image.bytes,
                    held: image.table.held(),
                    changes: image
                        .table
                        .runs(image.changed.iter().map(u64::from), |n| numbers[&n]),
                })
                .collect(),
            sections,
            counts: self.counts,
        }
    }

    /// Writes the manifest, and looks whether it counts.
    fn publish(&self, manifest: &Manifest) -> Result<(), StoreError> {
        let guest = &self.writer.guest;
        let object = manifest.to_object(guest.names(), guest.key())?;
        let name = guest.names().checkpoint(manifest.id);
        if guest.backend().create(&name, &object)? == Created::Taken {
            return Err(StoreError::Earlier {
                guest: guest.name().to_owned(),
                id: manifest.id,
            });
        }
        guest.expect_owner(self.writer.arbiter.as_ref(), &self.writer.tenure)
    }
}

/// Hash and name of a description.
fn described(guest: &Guest, id: ObjectId, text: &str) -> ([u8; HASH_LENGTH], String) {
    let name = guest.names().object(id, ObjectKind::Description);
    (envelope::hash_of(&name, text.as_bytes()), name)
}

/// A checkpoint that is complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Committed {
    /// Which one.
    pub id: CheckpointId,
    /// What making it came to.
    pub counts: Counts,
    /// Packs that it needs.
    pub packs: usize,
}

// Chunks are numbered in a pack by 32 bits, and pages of a table by as many.
const _: () = assert!(CHUNKS_MAX < u32::MAX && PAGES_MAX <= 1 << 32);
