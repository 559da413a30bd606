//! A [`StepBatch`] as the kernels want it: padded rows, attention work, LoRA items. Pure but for the adapters' addresses.

use polylora_kernels::cuda::{
    attention_prefill::PrefillTile,
    embedding::FROM_CHOSEN,
    lora::{ItemRows, LoraItem},
    rope_kv::NO_SLOT,
};

use super::{
    adapters::{Adapters, Group, Resident},
    staging::{Layout, Place, StageWriter},
};
use crate::{
    batch::{LoraSegment, SampleRow, StepBatch},
    decoder::DecoderConfig,
};

/// Row counts that decode steps are padded to, each with a captured graph; past the last, steps of 64 rows more.
const BUCKETS: [usize; 24] = [
    1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256,
];

/// Most tiles of the stack of gate and up with which the gated expand is the faster one for chunks: rank 16 in each.
const GATED_TILES: u16 = 2;

/// Rows of a segment, on average, from which items of 16 rows are faster than items of 8.
const LONG_SEGMENT_ROWS: usize = 12;

/// `rows` rounded up to what GEMM plans and graphs are made for.
pub(super) fn bucket(rows: usize) -> usize {
    let next = BUCKETS.partition_point(|&bucket| bucket < rows);
    BUCKETS.get(next).copied().unwrap_or_else(|| rows.next_multiple_of(64))
}

/// All buckets up to `max_rows`.
pub(super) fn buckets(max_rows: usize) -> impl Iterator<Item = usize> {
    BUCKETS.into_iter().take_while(move |&bucket| bucket <= max_rows)
}

/// What a step launches. Two steps with the same shape launch the same kernels with the same arguments: one graph serves both.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct StepShape {
    /// Padded rows.
    pub rows: usize,
    /// Rows that are alone in their sequence, padded to `rows` in a pure decode step.
    pub decode_rows: usize,
    /// Attention work of chunks.
    pub prefill_tiles: usize,
    /// `None`: no row runs under an adapter.
    pub lora: Option<LoraShape>,
}

/// Which LoRA kernels a step launches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct LoraShape {
    /// Rows of an item.
    pub item_rows: ItemRows,
    /// The expand of gate and up and the activation are one kernel; for chunks under higher ranks two are faster, and scales and biases on the
    /// outputs go in between.
    pub is_gated: bool,
    /// By group: some row's outputs have scales or biases.
    pub has_output_terms: [bool; 4],
}

impl LoraShape {
    /// Rows of an item of scales and biases: few, since a block takes them one after another.
    pub fn output_item_rows(self) -> usize {
        output_item_rows(self.item_rows)
    }
}

fn output_item_rows(item_rows: ItemRows) -> usize {
    if item_rows == ItemRows::UpTo64 { 8 } else { 1 }
}

/// Into items of how many rows segments are cut.
fn item_rows(has_chunks: bool, segments: &[LoraSegment]) -> ItemRows {
    let rows: usize = segments.iter().map(|segment| segment.num_rows as usize).sum();
    match has_chunks {
        true => ItemRows::UpTo64,
        false if rows >= LONG_SEGMENT_ROWS * segments.len() => ItemRows::UpTo16,
        false => ItemRows::UpTo8,
    }
}

impl StepShape {
    /// A step of decode rows alone, padded to a bucket: the graphs' case.
    pub fn is_decode(&self) -> bool {
        self.prefill_tiles == 0
    }
}

/// Places of the arrays that the forward pass reads. A function of the padded rows alone, so that a graph finds them again.
#[derive(Clone, Copy)]
pub(super) struct ForwardPlaces {
    /// Items of the expand, of the shrink by group, of those that cover every row, and of scales and biases.
    pub counts: Place<u32>,
    pub token_sources: Place<u32>,
    pub positions: Place<u32>,
    pub kv_slots: Place<u32>,
    pub embedding_adapters: Place<u64>,
    pub decode_rows: Place<u32>,
    pub context_lens: Place<u32>,
    pub block_table_starts: Place<u32>,
    pub expand_items: Place<LoraItem>,
    pub covering_items: Place<LoraItem>,
    pub output_items: Place<LoraItem>,
    /// Last, since its length is the adapters'.
    pub shrink_items: Place<LoraItem>,
}

impl ForwardPlaces {
    /// Room for `rows` rows and `max_shrink_items` items; and the bytes up to the shrink's items.
    pub fn new(rows: usize, max_shrink_items: usize) -> (Self, Layout) {
        let mut layout = Layout::default();
        let places = Self {
            counts: layout.place(8),
            token_sources: layout.place(rows),
            positions: layout.place(rows),
            kv_slots: layout.place(rows),
            embedding_adapters: layout.place(rows),
            decode_rows: layout.place(rows),
            context_lens: layout.place(rows),
            block_table_starts: layout.place(rows),
            expand_items: layout.place(rows),
            covering_items: layout.place(rows),
            output_items: layout.place(rows),
            shrink_items: layout.place(max_shrink_items),
        };
        (places, layout)
    }
}

/// A batch's rows and work, on the host.
pub(super) struct StepPlan {
    pub shape: StepShape,
    pub token_sources: Vec<u32>,
    pub embedding_adapters: Vec<u64>,
    pub decode_rows: Vec<u32>,
    pub context_lens: Vec<u32>,
    pub block_table_starts: Vec<u32>,
    pub block_tables: Vec<u32>,
    pub prefill_tiles: Vec<PrefillTile>,
    pub lora: LoraWork,
}

/// Items of every segment; those and items of the base rows between them, for expands that do something else on the way; and of the shrink one
/// for each 16 ranks, tile by tile, so that each group's are a prefix.
#[derive(Default)]
pub(super) struct LoraWork {
    pub expand_items: Vec<LoraItem>,
    pub covering_items: Vec<LoraItem>,
    pub shrink_items: Vec<LoraItem>,
    /// Of `shrink_items`, by group.
    pub num_shrink_items: [u32; 4],
    /// Of rows whose outputs have scales or biases; their tables are of those.
    pub output_items: Vec<LoraItem>,
    /// Of 16 ranks, in the largest stack of each group.
    largest_tiles: [u16; 4],
}

impl StepPlan {
    pub fn new(batch: &StepBatch, adapters: &Adapters, config: &DecoderConfig, tile_rows: usize) -> Self {
        let rows = batch.token_ids.len();
        let mut plan = Self {
            shape: StepShape {
                rows: bucket(rows),
                decode_rows: 0,
                prefill_tiles: 0,
                lora: None,
            },
            token_sources: batch.token_ids.clone(),
            embedding_adapters: vec![0; rows],
            decode_rows: Vec::new(),
            context_lens: Vec::new(),
            block_table_starts: Vec::new(),
            block_tables: Vec::new(),
            prefill_tiles: Vec::new(),
            lora: LoraWork::default(),
        };
        for carried in &batch.carried_tokens {
            plan.token_sources[carried.row as usize] = FROM_CHOSEN | carried.sample_idx;
        }
        plan.add_attention_work(batch, tile_rows);
        let has_chunks = !plan.prefill_tiles.is_empty();
        if !batch.lora_segments.is_empty() {
            let item_rows = item_rows(has_chunks, &batch.lora_segments);
            let max_rows = item_rows.max_rows();
            plan.lora = LoraWork::new(&batch.lora_segments, adapters, max_rows, |resident| resident.rank_tiles);
            plan.lora.cover(rows as u32, max_rows as u32);
            let mut has_output_terms = [false; 4];
            for segment in &batch.lora_segments {
                let resident = adapters.get(segment.adapter).expect("the batch was checked");
                if resident.has_output_terms != [false; 4] {
                    let address = adapters.terms_address(resident, config);
                    plan.lora.output_items.extend(items(segment, address, output_item_rows(item_rows)));
                }
                for (all, own) in has_output_terms.iter_mut().zip(resident.has_output_terms) {
                    *all |= own;
                }
            }
            let is_low_rank = !has_chunks || plan.lora.largest_tiles[Group::GateUp as usize] <= GATED_TILES;
            plan.shape.lora = Some(LoraShape {
                item_rows,
                is_gated: is_low_rank && !has_output_terms[Group::GateUp as usize],
                has_output_terms,
            });
            for segment in &batch.lora_segments {
                let resident = adapters.get(segment.adapter).expect("the batch was checked");
                let rows = segment.row_start as usize..(segment.row_start + segment.num_rows) as usize;
                plan.embedding_adapters[rows].fill(adapters.embedding_address(resident, config));
            }
        }
        plan.shape.prefill_tiles = plan.prefill_tiles.len();
        plan.shape.decode_rows = if has_chunks { plan.decode_rows.len() } else { plan.shape.rows };
        plan
    }

    fn add_attention_work(&mut self, batch: &StepBatch, tile_rows: usize) {
        for sequence in &batch.sequences {
            let block_table_start = self.block_tables.len() as u32;
            // What lies past the context is none of this step's.
            self.block_tables.extend_from_slice(&sequence.block_table);
            if sequence.num_rows == 1 {
                self.decode_rows.push(sequence.row_start);
                self.context_lens.push(sequence.context_len);
                self.block_table_starts.push(block_table_start);
                continue;
            }
            for first in (0..sequence.num_rows).step_by(tile_rows) {
                self.prefill_tiles.push(PrefillTile {
                    row_start: sequence.row_start + first,
                    num_rows: (sequence.num_rows - first).min(tile_rows as u32),
                    position: sequence.context_len - sequence.num_rows + first,
                    block_table_start,
                });
            }
        }
    }

    /// Writes everything that the forward pass reads, padding included: padded rows have token 0, no slot and no context.
    pub fn write(&self, batch: &StepBatch, places: &ForwardPlaces, to: &mut StageWriter<'_>) {
        let counts = [
            self.lora.expand_items.len() as u32,
            self.lora.num_shrink_items[0],
            self.lora.num_shrink_items[1],
            self.lora.num_shrink_items[2],
            self.lora.num_shrink_items[3],
            self.lora.covering_items.len() as u32,
            self.lora.output_items.len() as u32,
        ];
        to.write(places.counts, &counts, 0);
        to.write(places.token_sources, &self.token_sources, 0);
        to.write(places.positions, &batch.positions, 0);
        to.write(places.kv_slots, &batch.kv_slots, NO_SLOT);
        to.write(places.embedding_adapters, &self.embedding_adapters, 0);
        to.write(places.decode_rows, &self.decode_rows, 0);
        to.write(places.context_lens, &self.context_lens, 0);
        to.write(places.block_table_starts, &self.block_table_starts, 0);
        to.write(places.expand_items, &self.lora.expand_items, LoraItem::default());
        to.write(places.covering_items, &self.lora.covering_items, LoraItem::default());
        to.write(places.output_items, &self.lora.output_items, LoraItem::default());
        to.write(places.shrink_items, &self.lora.shrink_items, LoraItem::default());
    }
}

impl LoraWork {
    /// `rank_tiles` of an adapter, by group.
    pub fn new(segments: &[LoraSegment], adapters: &Adapters, max_rows: usize, rank_tiles: impl Fn(&Resident) -> [u16; 4]) -> Self {
        let mut work = Self::default();
        let mut tiles_of_items = Vec::new();
        for segment in segments {
            let resident = adapters.get(segment.adapter).expect("the batch was checked");
            let tiles = rank_tiles(resident);
            if tiles == [0; 4] {
                continue;
            }
            work.expand_items.extend(items(segment, adapters.address(resident), max_rows));
            tiles_of_items.resize(work.expand_items.len(), tiles);
        }
        let largest = |group: usize| tiles_of_items.iter().map(|tiles: &[u16; 4]| tiles[group]).max().unwrap_or(0);
        let by_group = [0, 1, 2, 3].map(largest);
        work.largest_tiles = by_group;
        for rank_tile in 0..by_group.into_iter().max().unwrap_or(0) {
            let has_tile = tiles_of_items.iter().map(|tiles| tiles.iter().any(|&tiles| tiles > rank_tile));
            let items = work.expand_items.iter().zip(has_tile).filter(|(_, has_tile)| *has_tile);
            work.shrink_items.extend(items.map(|(item, _)| LoraItem { rank_tile, ..*item }));
            for (group, &tiles) in by_group.iter().enumerate() {
                if tiles > rank_tile {
                    work.num_shrink_items[group] = work.shrink_items.len() as u32;
                }
            }
        }
        work
    }

    /// Makes `covering_items` of the expand's, with items of base rows wherever there are none of adapters.
    fn cover(&mut self, num_rows: u32, max_rows: u32) {
        let base = |from: u32, to: u32| {
            (from..to).step_by(max_rows as usize).map(move |row_start| LoraItem {
                descriptors: 0,
                row_start,
                num_rows: max_rows.min(to - row_start) as u16,
                rank_tile: 0,
            })
        };
        let mut covered = 0;
        for item in &self.expand_items {
            self.covering_items.extend(base(covered, item.row_start));
            self.covering_items.push(*item);
            covered = item.row_start + u32::from(item.num_rows);
        }
        self.covering_items.extend(base(covered, num_rows));
    }
}

/// A segment's rows, at most `max_rows` an item.
pub(super) fn items(segment: &LoraSegment, descriptors: u64, max_rows: usize) -> impl Iterator<Item = LoraItem> {
    let LoraSegment { row_start, num_rows, .. } = *segment;
    (0..num_rows).step_by(max_rows).map(move |first| LoraItem {
        descriptors,
        row_start: row_start + first,
        num_rows: (num_rows - first).min(max_rows as u32) as u16,
        rank_tile: 0,
    })
}

/// Segments over the sample rows: row `i` is that of `samples[i]`.
pub(super) fn segments_of_samples(segments: &[LoraSegment], samples: &[SampleRow]) -> Vec<LoraSegment> {
    let before = |row: u32| samples.partition_point(|sample| sample.row < row) as u32;
    segments
        .iter()
        .map(|segment| {
            let row_start = before(segment.row_start);
            LoraSegment {
                row_start,
                num_rows: before(segment.row_start + segment.num_rows) - row_start,
                ..*segment
            }
        })
        .filter(|segment| segment.num_rows > 0)
        .collect()
}

/// Segments cut to the rows `first .. first + count`, counted from there.
pub(super) fn segments_within(segments: &[LoraSegment], first: u32, count: u32) -> Vec<LoraSegment> {
    let cut = |segment: &LoraSegment| {
        let start = segment.row_start.max(first);
        let end = (segment.row_start + segment.num_rows).min(first + count);
        (start < end).then(|| LoraSegment {
            row_start: start - first,
            num_rows: end - start,
            ..*segment
        })
    };
    segments.iter().filter_map(cut).collect()
}
