//! Adapters in device memory: where each lies, its descriptors, and the thread that brings it there.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    ops::Range,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering::Relaxed},
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    thread::JoinHandle,
    time::Duration,
};

use bytemuck::{bytes_of, cast_slice, cast_slice_mut};
use half::bf16;
use polylora_kernels::cuda::{
    CudaError, Device, Event, HostSlab, PinnedBuffer, Stream, View,
    embedding::EmbeddingAdapter,
    lora::{LoraDescriptor, RANK_TILE},
    lora_output::OutputTerms,
};

use super::{arena::ALIGNMENT, region::Region};
use crate::{
    adapter::{HostAdapter, ModuleId, PackedDtype, PackedModule, Projection, TokenRows},
    backend::{BackendError, cpu::module_shape},
    batch::AdapterHandle,
    block_pool::BlockMove,
    decoder::DecoderConfig,
};

/// Bytes that are staged at a time.
const STAGE_BYTES: usize = 8 << 20;
/// Bytes that are copied at once. Steps copy what they are about by the same engine, which turns to them only when nothing of an upload is queued:
/// after a whole adapter of 84 MB that would be up to 1.6 ms.
const MOST_QUEUED_BYTES: usize = 8 << 20;
/// Bytes of a line of an adapter's table, whatever it describes.
const LINE_BYTES: usize = 64;
/// Bytes of tables that are rewritten before the host waits: those of a hundred adapters of a large model.
const MOVED_TABLE_BYTES: usize = 1 << 20;
/// How often uploads that wait for steps are looked at while there are no others.
const WAIT_INTERVAL: Duration = Duration::from_micros(100);
/// Lines of an [`EmbeddingAdapter`].
const EMBEDDING_LINES: usize = 2;
/// Kernels take rows of so many columns, or twice as many, and so on: narrower ones are padded.
pub(super) const COLUMNS: usize = 8;

/// Projections that share their input, in the order of an adapter's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Group {
    Qkv,
    O,
    GateUp,
    Down,
}

impl Group {
    pub const ALL: [Self; 4] = [Self::Qkv, Self::O, Self::GateUp, Self::Down];

    fn projections(self) -> &'static [Projection] {
        match self {
            Self::Qkv => &[Projection::Q, Projection::K, Projection::V],
            Self::O => &[Projection::O],
            Self::GateUp => &[Projection::Gate, Projection::Up],
            Self::Down => &[Projection::Down],
        }
    }

    /// Projections of the group.
    pub fn num_slices(self) -> usize {
        self.projections().len()
    }

    /// Where this group of a layer is in an adapter's table.
    pub fn descriptor_offset(self, layer: usize) -> u32 {
        ((layer * Self::ALL.len() + self as usize) * LINE_BYTES) as u32
    }
}

/// Where the head is in an adapter's table.
pub(super) fn head_descriptor_offset(config: &DecoderConfig) -> u32 {
    ((config.num_layers * Group::ALL.len()) * LINE_BYTES) as u32
}

fn embedding_offset(config: &DecoderConfig) -> usize {
    head_descriptor_offset(config) as usize + LINE_BYTES
}

/// How an adapter lies in its run: a table of descriptors, then what they point to.
struct Placement {
    /// Each layer's groups, then the head.
    lora: Vec<LoraLine>,
    embedding: EmbeddingLine,
    /// As `lora`; empty if no module has a scale or a bias.
    terms: Vec<TermsLine>,
    /// Of the head that is used in place of the base model's.
    replaced_head: Option<usize>,
    /// Rows of the head that are used in place of those.
    head_rows: Option<RowsLine>,
    /// The tokens of [`RowsLine`]s, at the table's end.
    token_ids: Vec<u32>,
    /// Tokens that the adapter has.
    vocab_size: usize,
    pieces: Vec<Piece>,
    /// What no piece fills: padding.
    zeros: Vec<Range<usize>>,
    bytes: usize,
}

/// Bytes of the blob, and their offset in the run.
struct Piece {
    from: Range<usize>,
    to: usize,
    /// f32 in any blob and here, too (scales and biases); else weights, which are bf16 here.
    is_f32: bool,
}

/// Offsets, from which descriptors are made once the address is known (and again when the run moves).
#[derive(Clone, Copy, Default)]
struct LoraLine {
    a: usize,
    b_t: [usize; 3],
    lora_rank: [u16; 3],
    scaling: [f32; 3],
}

/// Offsets likewise.
#[derive(Clone, Copy, Default)]
struct TermsLine {
    scale: [Option<usize>; 3],
    bias: [Option<usize>; 3],
}

/// Offsets likewise, and what there is.
#[derive(Clone, Copy, Default)]
struct EmbeddingLine {
    lora: LoraLine,
    terms: TermsLine,
    table: Option<usize>,
    own_rows: Option<RowsLine>,
}

/// Offsets of rows for single tokens, and of the tokens.
#[derive(Clone, Copy)]
struct RowsLine {
    token_ids: usize,
    rows: usize,
    len: usize,
}

/// Rows of an adapter's own for single tokens, in device memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct OwnRows {
    /// Address of `[len]` ascending u32.
    pub token_ids: u64,
    /// Address of `[len, hidden]` bf16.
    pub rows: u64,
    pub len: usize,
}

/// An adapter that has a run.
pub(super) struct Resident {
    placement: Arc<Placement>,
    offset: usize,
    upload: Arc<Upload>,
    /// Tiles of 16 ranks in the largest stack of each group.
    pub rank_tiles: [u16; 4],
    /// The same of the head; 0 without one.
    pub head_rank_tiles: u16,
    /// Whether outputs of each group have scales or biases in any layer.
    pub has_output_terms: [bool; 4],
    /// The same of the head.
    pub head_has_output_terms: bool,
    /// Tokens of rows under this adapter.
    pub vocab_size: usize,
}

/// An upload that may be under way. Set once, when its last byte has arrived or it has failed.
#[derive(Default)]
struct Upload {
    result: OnceLock<Result<(), CudaError>>,
}

struct Job {
    host: Arc<HostAdapter>,
    placement: Arc<Placement>,
    table: Vec<u8>,
    address: u64,
    /// What the run's bytes were before may be in use until then.
    after: Option<Arc<Event>>,
    upload: Arc<Upload>,
}

/// All adapters of a device.
pub(super) struct Adapters {
    /// Before the region, so that it is dropped first.
    uploads: UploadThread,
    region: Region,
    max_lora_rank: usize,
    max_vocab_size: usize,
    next_handle: u32,
    residents: HashMap<AdapterHandle, Resident>,
    /// Freed while their upload was under way: their runs are free when it is done.
    leaving: Vec<(u32, Arc<Upload>)>,
    /// Tables of adapters that moved, and when they have been copied.
    moved_tables: PinnedBuffer<u8>,
    tables_copied: Event,
}

impl Adapters {
    /// In the upper part of `region`. Ranks above `max_lora_rank` are refused, and more than `max_vocab_size` tokens.
    pub fn new(device: &Arc<Device>, region: Region, (max_lora_rank, max_vocab_size): (usize, usize)) -> Result<Self, CudaError> {
        Ok(Self {
            uploads: UploadThread::start(device)?,
            region,
            max_lora_rank,
            max_vocab_size,
            next_handle: 0,
            residents: HashMap::new(),
            leaving: Vec::new(),
            moved_tables: PinnedBuffer::zeroed(device, MOVED_TABLE_BYTES)?,
            tables_copied: Event::new(device, false)?,
        })
    }

    /// The KV blocks, which lie in the same memory.
    pub fn kv_cache(&self) -> View<'_, bf16> {
        self.region.kv_cache()
    }

    /// See `Backend::set_kv_blocks`. `stream` is the one that steps run on.
    pub fn set_kv_blocks(&mut self, num_blocks: usize, moves: &[BlockMove], stream: &Stream) -> Result<usize, CudaError> {
        self.reap_leaving();
        if self.region.is_in_the_way(num_blocks) {
            self.compact(stream)?;
        }
        self.region.set_kv_blocks(num_blocks, moves, stream)
    }

    fn place(&self, host: &HostAdapter, config: &DecoderConfig) -> Result<Placement, BackendError> {
        let (tokens, max) = (host.vocab_size(config.vocab_size), self.max_vocab_size);
        if tokens > max {
            return Err(BackendError::BadBatch(format!(
                "adapter {}: {tokens} tokens, at most {max} here",
                host.version
            )));
        }
        place(host, config, self.max_lora_rank)
    }

    /// Bytes that an adapter takes.
    pub fn device_bytes(&self, host: &HostAdapter, config: &DecoderConfig) -> Result<usize, BackendError> {
        Ok(self.place(host, config)?.bytes.next_multiple_of(ALIGNMENT))
    }

    pub fn get(&self, handle: AdapterHandle) -> Option<&Resident> {
        self.residents.get(&handle)
    }

    /// Tokens of rows under an adapter; `None` for one that is not ready.
    pub fn vocab_size(&self, handle: AdapterHandle) -> Option<usize> {
        let resident = self.residents.get(&handle)?;
        resident.is_ready().then_some(resident.vocab_size)
    }

    /// Where an adapter's table begins.
    pub fn address(&self, resident: &Resident) -> u64 {
        self.region.address(resident.offset)
    }

    /// Where an adapter's table of [`OutputTerms`] begins; of no use for one that has none.
    pub fn terms_address(&self, resident: &Resident, config: &DecoderConfig) -> u64 {
        self.address(resident) + (embedding_offset(config) + EMBEDDING_LINES * LINE_BYTES) as u64
    }

    /// The address of what `embedding.cu` reads, 0 for an adapter that leaves the embedding alone.
    pub fn embedding_address(&self, resident: &Resident, config: &DecoderConfig) -> u64 {
        match resident.placement.embedding.is_identity() {
            false => self.address(resident) + embedding_offset(config) as u64,
            true => 0,
        }
    }

    /// `[vocab, hidden]` that makes this adapter's logits in place of the base model's head; behind it rows of zeros up to a multiple of 8.
    pub fn replaced_head(&self, resident: &Resident, config: &DecoderConfig) -> Option<View<'_, bf16>> {
        let offset = resident.placement.replaced_head? + resident.offset;
        let bytes = 2 * resident.vocab_size.next_multiple_of(COLUMNS) * config.hidden_size;
        Some(self.region.view(offset..offset + bytes).cast())
    }

    /// Rows of the head that make this adapter's logits of some tokens.
    pub fn head_rows(&self, resident: &Resident) -> Option<OwnRows> {
        let address = self.address(resident);
        resident.placement.head_rows.map(|line| OwnRows {
            token_ids: address + line.token_ids as u64,
            rows: address + line.rows as u64,
            len: line.len,
        })
    }

    /// Finds room and queues the copy. `stream` is the one that steps run on: should runs have to move, they do between two steps.
    pub fn begin_upload(&mut self, host: &Arc<HostAdapter>, config: &DecoderConfig, stream: &Stream) -> Result<AdapterHandle, BackendError> {
        let placement = self.place(host, config)?;
        self.reap_leaving();
        let out_of_memory = |available_bytes| BackendError::OutOfMemory {
            what: format!("adapter {}", host.version),
            needed_bytes: placement.bytes.next_multiple_of(ALIGNMENT),
            available_bytes,
        };
        let available_bytes = self.region.free_bytes();
        if placement.bytes > available_bytes {
            return Err(out_of_memory(available_bytes));
        }
        let id = self.next_handle;
        let offset = match self.region.allocate(id, placement.bytes) {
            Some(offset) => offset,
            None => {
                self.compact(stream).map_err(super::device_error)?;
                self.region.allocate(id, placement.bytes).ok_or_else(|| out_of_memory(available_bytes))?
            }
        };
        // A handle that was freed is not given again soon: a batch that still names it is found out.
        self.next_handle = self.next_handle.wrapping_add(1);
        let placement = Arc::new(placement);
        let upload = Arc::new(Upload::default());
        let address = self.region.address(offset);
        let job = Job {
            host: host.clone(),
            table: placement.table_bytes(address),
            placement: placement.clone(),
            address,
            after: self.region.wait_before(offset..offset + placement.bytes).map_err(super::device_error)?,
            upload: upload.clone(),
        };
        if !self.uploads.begin(job) {
            return Err(BackendError::Device("the upload thread has ended".into()));
        }
        let resident = Resident::new(placement, offset, upload, config);
        self.residents.insert(AdapterHandle(id), resident);
        Ok(AdapterHandle(id))
    }

    pub fn poll_upload(&self, handle: AdapterHandle) -> Result<bool, BackendError> {
        let resident = self.residents.get(&handle);
        let resident = resident.ok_or_else(|| BackendError::BadBatch(format!("adapter handle {} was freed", handle.0)))?;
        match resident.upload.result.get() {
            None => Ok(false),
            Some(Ok(())) => Ok(true),
            Some(Err(error)) => Err(BackendError::Device(error.to_string())),
        }
    }

    pub fn free(&mut self, handle: AdapterHandle) {
        let Some(resident) = self.residents.remove(&handle) else { return };
        self.leaving.push((handle.0, resident.upload));
        self.reap_leaving();
    }

    fn reap_leaving(&mut self) {
        let region = &mut self.region;
        self.leaving.retain(|(id, upload)| {
            let is_done = upload.result.get().is_some();
            if is_done {
                region.free(*id);
            }
            !is_done
        });
    }

    /// Closes the gaps between runs whose uploads are done. Steps that were launched before read the old places, later ones the new.
    fn compact(&mut self, stream: &Stream) -> Result<(), CudaError> {
        let Self {
            region,
            residents,
            moved_tables,
            tables_copied,
            ..
        } = self;
        let ready: HashSet<u32> = residents
            .iter()
            .filter(|(_, resident)| resident.is_ready())
            .map(|(handle, _)| handle.0)
            .collect();
        let mut written = 0;
        let mut is_free = false;
        region.compact(
            stream,
            |id| ready.contains(&id),
            |region, id, offset| {
                let resident = residents.get_mut(&AdapterHandle(id)).expect("only residents move");
                resident.offset = offset;
                let table = resident.placement.table_bytes(region.address(offset));
                let to = region.view(offset..offset + table.len());
                if table.len() > moved_tables.len() {
                    stream.copy_to_device(to, &table)?;
                    return stream.synchronize();
                }
                if !is_free {
                    // Those of the last time, nearly always long ago.
                    tables_copied.synchronize()?;
                    is_free = true;
                }
                if written + table.len() > moved_tables.len() {
                    stream.synchronize()?;
                    written = 0;
                }
                let stage = &mut moved_tables[written..written + table.len()];
                written += table.len();
                stage.copy_from_slice(&table);
                stream.copy_to_device(to, stage)
            },
        )?;
        if is_free { tables_copied.record(stream) } else { Ok(()) }
    }
}

impl Resident {
    fn new(placement: Arc<Placement>, offset: usize, upload: Arc<Upload>, config: &DecoderConfig) -> Self {
        let tiles = |line: &LoraLine| line.rank_total().div_ceil(RANK_TILE) as u16;
        let lines = |group: Group| (0..config.num_layers).map(move |layer| layer * Group::ALL.len() + group as usize);
        let has_terms = |line: usize| placement.terms.get(line).is_some_and(|terms| !terms.is_empty());
        let head = config.num_layers * Group::ALL.len();
        Self {
            rank_tiles: Group::ALL.map(|group| lines(group).map(|line| tiles(&placement.lora[line])).max().unwrap_or(0)),
            head_rank_tiles: tiles(&placement.lora[head]),
            has_output_terms: Group::ALL.map(|group| lines(group).any(has_terms)),
            head_has_output_terms: has_terms(head),
            vocab_size: placement.vocab_size,
            placement,
            offset,
            upload,
        }
    }

    /// Whether its last byte has arrived.
    fn is_ready(&self) -> bool {
        matches!(self.upload.result.get(), Some(Ok(())))
    }
}

impl LoraLine {
    fn rank_total(&self) -> usize {
        self.lora_rank.iter().map(|&rank| usize::from(rank)).sum()
    }
}

impl TermsLine {
    fn is_empty(&self) -> bool {
        self.scale.iter().chain(&self.bias).all(Option::is_none)
    }
}

impl EmbeddingLine {
    /// Whether it leaves the embedding as it is.
    fn is_identity(&self) -> bool {
        self.lora.rank_total() == 0 && self.terms.is_empty() && self.table.is_none() && self.own_rows.is_none()
    }
}

impl Placement {
    /// The tables as the kernels read them, for a run at `address`.
    fn table_bytes(&self, address: u64) -> Vec<u8> {
        let at = |offset: usize| address + offset as u64;
        let or_null = |offset: Option<usize>| offset.map_or(0, at);
        let mut bytes = Vec::with_capacity(self.table_len());
        for line in &self.lora {
            bytes.extend_from_slice(bytes_of(&LoraDescriptor {
                a: at(line.a),
                b_t: line.b_t.map(at),
                lora_rank: line.lora_rank,
                rank_total: line.rank_total() as u16,
                scaling: line.scaling,
                reserved: [0; 3],
            }));
        }
        let EmbeddingLine {
            lora,
            terms,
            table,
            own_rows,
        } = self.embedding;
        bytes.extend_from_slice(bytes_of(&EmbeddingAdapter {
            a: at(lora.a),
            b_t: at(lora.b_t[0]),
            lora_rank: u32::from(lora.lora_rank[0]),
            scaling: lora.scaling[0],
            table: or_null(table),
            scale: or_null(terms.scale[0]),
            bias: or_null(terms.bias[0]),
            own_ids: or_null(own_rows.map(|line| line.token_ids)),
            own_rows: or_null(own_rows.map(|line| line.rows)),
            num_own: own_rows.map_or(0, |line| line.len as u32),
            vocab: self.vocab_size as u32,
        }));
        bytes.resize((self.lora.len() + EMBEDDING_LINES) * LINE_BYTES, 0);
        for line in &self.terms {
            bytes.extend_from_slice(bytes_of(&OutputTerms {
                scale: line.scale.map(or_null),
                bias: line.bias.map(or_null),
                reserved: [0; 2],
            }));
        }
        bytes.extend_from_slice(cast_slice(&self.token_ids));
        bytes
    }

    fn table_len(&self) -> usize {
        lines_len(self.lora.len(), self.terms.len()) + 4 * self.token_ids.len()
    }
}

/// Bytes of a table up to its token ids.
fn lines_len(num_lora_lines: usize, num_terms_lines: usize) -> usize {
    (num_lora_lines + EMBEDDING_LINES + num_terms_lines) * LINE_BYTES
}

/// Lays an adapter out: per layer and group the A's of its slices without a gap, then each Bᵀ, then scales and biases; at last whole weights and rows of
/// single tokens.
fn place(host: &HostAdapter, base: &DecoderConfig, max_lora_rank: usize) -> Result<Placement, BackendError> {
    let config = &DecoderConfig {
        vocab_size: host.vocab_size(base.vocab_size),
        ..base.clone()
    };
    let bad = |what: String| BackendError::BadBatch(format!("adapter {}: {what}", host.version));
    for module in &host.modules {
        let (d_in, d_out) = module_shape(module.id, config);
        let is_known = !matches!(module.id, ModuleId::Layer { layer, .. } if usize::from(layer) >= config.num_layers);
        if !is_known || (module.d_in as usize, module.d_out as usize) != (d_in, d_out) {
            let (got_in, got_out) = (module.d_in, module.d_out);
            return Err(bad(format!("{:?}: expected {d_in} to {d_out}, got {got_in} to {got_out}", module.id)));
        }
        if module.lora_rank as usize > max_lora_rank {
            return Err(bad(format!(
                "{:?}: lora_rank {}, at most {max_lora_rank} here",
                module.id, module.lora_rank
            )));
        }
        if module.id != ModuleId::LmHead && !d_out.is_multiple_of(COLUMNS) {
            return Err(bad(format!("{:?}: an output width of {d_out} is no multiple of 8", module.id)));
        }
    }
    let has_terms = |module: &PackedModule| module.output_scale_offset_bytes.is_some() || module.output_bias_offset_bytes.is_some();
    let num_lora_lines = config.num_layers * Group::ALL.len() + 1;
    // The embedding's terms are in its own line.
    let num_terms_lines = if host.modules.iter().any(has_terms) { num_lora_lines } else { 0 };
    let mut token_ids = Vec::new();
    let ids_at = lines_len(num_lora_lines, num_terms_lines);
    let mut rows_lines: Vec<(&TokenRows, RowsLine)> = Vec::new();
    for rows in &host.token_rows {
        // A tied head has those of the embedding.
        let known = rows_lines.iter().find(|(other, _)| other.token_ids == rows.token_ids);
        let ids_at = known.map_or(ids_at + 4 * token_ids.len(), |(_, line)| line.token_ids);
        if known.is_none() {
            token_ids.extend_from_slice(&rows.token_ids);
        }
        let line = RowsLine {
            token_ids: ids_at,
            rows: 0,
            len: rows.token_ids.len(),
        };
        rows_lines.push((rows, line));
    }
    let mut placer = Placer {
        host,
        pieces: Vec::new(),
        zeros: Vec::new(),
        bytes: ids_at + 4 * token_ids.len(),
    };
    let (mut lora, mut terms) = (Vec::with_capacity(num_lora_lines), Vec::with_capacity(num_terms_lines));
    let mut place_line = |modules: &[Option<&PackedModule>]| {
        lora.push(placer.lora_line(modules));
        if num_terms_lines > 0 {
            terms.push(placer.terms_line(modules));
        }
    };
    for layer in 0..config.num_layers as u16 {
        for group in Group::ALL {
            let of = |&projection: &Projection| host.module(ModuleId::Layer { layer, projection });
            place_line(&group.projections().iter().map(of).collect::<Vec<_>>());
        }
    }
    place_line(&[host.module(ModuleId::LmHead)]);
    let embedding = [host.module(ModuleId::EmbedTokens)];
    let mut embedding = EmbeddingLine {
        lora: placer.lora_line(&embedding),
        terms: placer.terms_line(&embedding),
        table: None,
        own_rows: None,
    };
    let mut replaced_head = None;
    let mut placed: Vec<(usize, usize)> = Vec::new();
    for weight in &host.replaced {
        // Both may be the same bytes.
        let known = placed.iter().find(|(offset, _)| *offset == weight.offset_bytes);
        let at = known.map_or_else(
            || {
                let at = placer.weights(weight.offset_bytes, config.vocab_size * config.hidden_size);
                placer.pad(2 * (config.vocab_size.next_multiple_of(COLUMNS) - config.vocab_size) * config.hidden_size);
                at
            },
            |&(_, at)| at,
        );
        placed.push((weight.offset_bytes, at));
        match weight.id {
            ModuleId::EmbedTokens => embedding.table = Some(at),
            ModuleId::LmHead => replaced_head = Some(at),
            ModuleId::Layer { .. } => return Err(bad(format!("{:?}: a projection can't be replaced", weight.id))),
        }
    }
    let mut head_rows = None;
    for (rows, line) in rows_lines {
        let known = placed.iter().find(|(offset, _)| *offset == rows.offset_bytes);
        let at = known.map_or_else(|| placer.weights(rows.offset_bytes, line.len * config.hidden_size), |&(_, at)| at);
        placed.push((rows.offset_bytes, at));
        let line = Some(RowsLine { rows: at, ..line });
        match rows.id {
            ModuleId::EmbedTokens => embedding.own_rows = line,
            ModuleId::LmHead => head_rows = line,
            ModuleId::Layer { .. } => return Err(bad(format!("{:?}: a projection has no rows of tokens", rows.id))),
        }
    }
    Ok(Placement {
        lora,
        embedding,
        terms,
        replaced_head,
        head_rows,
        token_ids,
        vocab_size: config.vocab_size,
        pieces: placer.pieces,
        zeros: placer.zeros,
        bytes: placer.bytes,
    })
}

struct Placer<'a> {
    host: &'a HostAdapter,
    pieces: Vec<Piece>,
    zeros: Vec<Range<usize>>,
    bytes: usize,
}

impl Placer<'_> {
    fn lora_line(&mut self, modules: &[Option<&PackedModule>]) -> LoraLine {
        let mut line = LoraLine::default();
        self.align();
        line.a = self.bytes;
        for module in modules.iter().flatten() {
            self.piece(module.a_offset_bytes, module.lora_rank as usize * module.d_in as usize, false);
        }
        for (slice, module) in modules.iter().enumerate() {
            if let Some(module) = module {
                line.lora_rank[slice] = module.lora_rank as u16;
                line.scaling[slice] = module.scaling;
                line.b_t[slice] = self.rows(module.b_t_offset_bytes, module.lora_rank as usize, module.d_out as usize);
            }
        }
        line
    }

    fn terms_line(&mut self, modules: &[Option<&PackedModule>]) -> TermsLine {
        let mut line = TermsLine::default();
        for (slice, module) in modules.iter().enumerate() {
            let Some(module) = module else { continue };
            let mut place = |offset: Option<usize>| {
                self.align();
                let at = self.bytes;
                offset.map(|offset| {
                    let width = module.d_out as usize;
                    self.piece(offset, width, true);
                    self.pad(4 * (width.next_multiple_of(COLUMNS) - width));
                    at
                })
            };
            line.scale[slice] = place(module.output_scale_offset_bytes);
            line.bias[slice] = place(module.output_bias_offset_bytes);
        }
        line
    }

    /// Appends `len` weights of the blob and says where.
    fn weights(&mut self, blob_offset: usize, len: usize) -> usize {
        self.align();
        let at = self.bytes;
        self.piece(blob_offset, len, false);
        at
    }

    /// Appends rows of weights, padded to whole [`COLUMNS`], and says where.
    fn rows(&mut self, blob_offset: usize, num_rows: usize, width: usize) -> usize {
        let padded = width.next_multiple_of(COLUMNS);
        if padded == width {
            return self.weights(blob_offset, num_rows * width);
        }
        self.align();
        let at = self.bytes;
        for row in 0..num_rows {
            self.piece(blob_offset + row * width * self.host.dtype.size_bytes(), width, false);
            self.pad(2 * (padded - width));
        }
        at
    }

    /// Appends zero bytes.
    fn pad(&mut self, bytes: usize) {
        if bytes > 0 {
            self.zeros.push(self.bytes..self.bytes + bytes);
            self.bytes += bytes;
        }
    }

    fn align(&mut self) {
        self.bytes = self.bytes.next_multiple_of(LINE_BYTES);
    }

    /// Appends `len` elements of the blob; what was neighbours there and stays so is one piece.
    fn piece(&mut self, blob_offset: usize, len: usize, is_f32: bool) {
        let element_bytes = |is_f32: bool| if is_f32 { 4 } else { self.host.dtype.size_bytes() };
        let device_bytes = |is_f32: bool| if is_f32 { 4 } else { 2 };
        let from = blob_offset..blob_offset + len * element_bytes(is_f32);
        match self.pieces.last_mut() {
            _ if len == 0 => {}
            Some(last)
                if last.is_f32 == is_f32
                    && last.from.end == from.start
                    && last.to + last.from.len() / element_bytes(is_f32) * device_bytes(is_f32) == self.bytes =>
            {
                last.from.end = from.end;
            }
            _ => self.pieces.push(Piece {
                from,
                to: self.bytes,
                is_f32,
            }),
        }
        self.bytes += len * device_bytes(is_f32);
    }
}

/// The thread that uploads. Dropping it ends the upload that is under way and forgets those that wait; then nothing writes their runs any more.
struct UploadThread {
    /// `None` once it is to end.
    jobs: Option<Sender<Job>>,
    is_ending: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl UploadThread {
    fn start(device: &Arc<Device>) -> Result<Self, CudaError> {
        let mut uploader = Uploader::new(device)?;
        let (jobs, inbox) = channel();
        let is_ending = Arc::new(AtomicBool::new(false));
        let ends = is_ending.clone();
        let thread = std::thread::Builder::new()
            .name("polylora-upload".into())
            .spawn(move || uploader.run(&inbox, &ends))
            .map_err(|error| CudaError::NoDevice(format!("no thread for uploads: {error}")))?;
        Ok(Self {
            jobs: Some(jobs),
            is_ending,
            thread: Some(thread),
        })
    }

    /// False if the thread has died.
    fn begin(&self, job: Job) -> bool {
        self.jobs.as_ref().is_some_and(|jobs| jobs.send(job).is_ok())
    }
}

impl Drop for UploadThread {
    fn drop(&mut self) {
        self.is_ending.store(true, Relaxed);
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            // One that panicked has nothing left to give.
            let _ = thread.join();
        }
    }
}

/// Uploads on a stream of its own: straight from the adapter's memory where that is page-locked. What has to wait for steps lets others pass.
struct Uploader {
    device: Arc<Device>,
    /// In the order in which they came.
    waiting: VecDeque<Job>,
    stream: Stream,
    stages: [PinnedBuffer<bf16>; 2],
    copied: [Event; 2],
    turn: usize,
}

impl Uploader {
    fn new(device: &Arc<Device>) -> Result<Self, CudaError> {
        let stage = || PinnedBuffer::zeroed(device, STAGE_BYTES / 2);
        Ok(Self {
            device: device.clone(),
            waiting: VecDeque::new(),
            stream: Stream::new(device)?,
            stages: [stage()?, stage()?],
            copied: [Event::new(device, false)?, Event::new(device, false)?],
            turn: 0,
        })
    }

    fn run(&mut self, inbox: &Receiver<Job>, is_ending: &AtomicBool) {
        let bound = self.device.bind();
        while let Some((job, is_free)) = self.next_job(inbox, is_ending) {
            let result = bound.clone().and(is_free).and_then(|()| self.upload(&job));
            job.upload.result.set(result).expect("one job an upload");
        }
    }

    /// The first one whose bytes no step uses any more, and what went wrong with finding that out.
    fn next_job(&mut self, inbox: &Receiver<Job>, is_ending: &AtomicBool) -> Option<(Job, Result<(), CudaError>)> {
        loop {
            self.waiting.extend(inbox.try_iter());
            if is_ending.load(Relaxed) {
                return None;
            }
            let is_free = |job: &Job| job.after.as_ref().map_or(Ok(true), |event| event.is_done());
            let states = self.waiting.iter().map(is_free).enumerate();
            let first = states.into_iter().find_map(|(index, state)| match state {
                Ok(false) => None,
                Ok(true) => Some((index, Ok(()))),
                Err(error) => Some((index, Err(error))),
            });
            if let Some((index, state)) = first {
                return self.waiting.remove(index).map(|job| (job, state));
            }
            let next = match self.waiting.is_empty() {
                true => inbox.recv().map_err(|_| RecvTimeoutError::Disconnected),
                false => inbox.recv_timeout(WAIT_INTERVAL),
            };
            match next {
                Ok(job) => self.waiting.push_back(job),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return None,
            }
        }
    }

    /// Also of one that failed nothing is under way afterwards.
    fn upload(&mut self, job: &Job) -> Result<(), CudaError> {
        let enqueued = self.enqueue(job);
        let ended = self.stream.synchronize();
        enqueued.and(ended)
    }

    fn enqueue(&mut self, job: &Job) -> Result<(), CudaError> {
        let is_direct = job.host.dtype == PackedDtype::Bf16 && job.host.blob.is_locked();
        for range in &job.placement.zeros {
            let padding: View<'_, u8> = View::from_address(job.address + range.start as u64, range.len());
            self.stream.fill_bytes(padding, 0)?;
        }
        let mut queued_bytes = 0;
        for Piece { from, to, is_f32 } in &job.placement.pieces {
            let bytes = &job.host.blob.as_bytes()[from.clone()];
            let address = job.address + *to as u64;
            match (is_direct, is_f32) {
                (true, _) => {
                    let first = bytes.as_ptr().addr();
                    for part in within_parts(first..first + bytes.len()) {
                        let part = &bytes[part.start - first..part.end - first];
                        let to = address + (part.as_ptr().addr() - first) as u64;
                        self.stream.copy_to_device(View::from_address(to, part.len()), part)?;
                        queued_bytes += part.len();
                        if queued_bytes >= MOST_QUEUED_BYTES {
                            self.stream.synchronize()?;
                            queued_bytes = 0;
                        }
                    }
                }
                // Two of what the stage takes for bf16 are one f32, copied as it is.
                (false, true) => self.stage(bytes, PackedDtype::Bf16, address)?,
                (false, false) => self.stage(bytes, job.host.dtype, address)?,
            }
        }
        self.stream.copy_to_device(View::from_address(job.address, job.table.len()), &job.table)
    }

    /// Copies through pinned memory, rounding f32 on the way.
    fn stage(&mut self, bytes: &[u8], dtype: PackedDtype, mut address: u64) -> Result<(), CudaError> {
        let element_bytes = dtype.size_bytes();
        for chunk in bytes.chunks(STAGE_BYTES / 2 * element_bytes) {
            let len = chunk.len() / element_bytes;
            self.copied[self.turn].synchronize()?;
            let stage = &mut self.stages[self.turn][..len];
            match dtype {
                PackedDtype::Bf16 => cast_slice_mut(stage).copy_from_slice(chunk),
                PackedDtype::F32 => {
                    let values: &[f32] = cast_slice(chunk);
                    stage.iter_mut().zip(values).for_each(|(to, from)| *to = bf16::from_f32(*from));
                }
            }
            self.stream.copy_to_device(View::from_address(address, len), stage)?;
            self.copied[self.turn].record(&self.stream)?;
            self.turn ^= 1;
            address += 2 * len as u64;
        }
        Ok(())
    }
}

/// A range of host addresses, cut where the parts of a slab end.
fn within_parts(range: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let mut rest = range;
    std::iter::from_fn(move || {
        let end = rest.end.min((rest.start / HostSlab::PART + 1) * HostSlab::PART);
        let cut = rest.start..end;
        rest.start = end;
        (!cut.is_empty()).then_some(cut)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_end_where_locked_parts_end() {
        const PART: usize = HostSlab::PART;
        let cut = |range| within_parts(range).map(|part| (part.start, part.end)).collect::<Vec<_>>();
        assert_eq!(cut(10..PART), [(10, PART)]);
        assert_eq!(
            cut(PART - 1..2 * PART + 5),
            [(PART - 1, PART), (PART, 2 * PART), (2 * PART, 2 * PART + 5)]
        );
        assert!(cut(PART..PART).is_empty());
    }
}
