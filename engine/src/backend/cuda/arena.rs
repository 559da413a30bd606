//! One piece of device memory, dealt out in runs. Pure: offsets in, offsets out.
//!
//! Free bytes are usable bytes, whatever the order of what came and went: when no gap is long enough, [`Arena::compact`] says which runs
//! to move where.

/// Runs start at multiples of this.
pub(super) const ALIGNMENT: usize = 256;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    offset: usize,
    len: usize,
    id: u32,
}

/// A run that moves down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Move {
    pub id: u32,
    pub from: usize,
    pub to: usize,
    pub len: usize,
}

/// Who has what, by offset.
#[derive(Debug, Default)]
pub(super) struct Arena {
    capacity: usize,
    /// Ascending by offset.
    runs: Vec<Run>,
}

impl Arena {
    pub fn new(capacity: usize) -> Self {
        Self {
            capacity: capacity / ALIGNMENT * ALIGNMENT,
            runs: Vec::new(),
        }
    }

    /// Makes it longer, or shorter by what no run has.
    pub fn set_capacity(&mut self, capacity: usize) {
        assert!(capacity >= self.end(), "a run ends at {}, beyond {capacity}", self.end());
        self.capacity = capacity / ALIGNMENT * ALIGNMENT;
    }

    /// Where the last run ends.
    pub fn end(&self) -> usize {
        self.runs.last().map_or(0, |run| run.offset + run.len)
    }

    pub fn free_bytes(&self) -> usize {
        self.capacity - self.runs.iter().map(|run| run.len).sum::<usize>()
    }

    /// The lowest gap that is long enough; `None` if there is none (see [`Self::compact`]).
    pub fn allocate(&mut self, id: u32, bytes: usize) -> Option<usize> {
        let len = bytes.next_multiple_of(ALIGNMENT);
        let mut offset = 0;
        let mut index = 0;
        while index < self.runs.len() && self.runs[index].offset - offset < len {
            offset = self.runs[index].offset + self.runs[index].len;
            index += 1;
        }
        if self.capacity - offset < len {
            return None;
        }
        self.runs.insert(index, Run { offset, len, id });
        Some(offset)
    }

    /// A run at a place that is free.
    pub fn allocate_at(&mut self, id: u32, offset: usize, len: usize) {
        let index = self.runs.partition_point(|run| run.offset < offset);
        let is_before_the_next = self
            .runs
            .get(index)
            .map_or(offset + len <= self.capacity, |next| offset + len <= next.offset);
        assert!(is_before_the_next, "bytes {offset} to {} are not free", offset + len);
        self.runs.insert(index, Run { offset, len, id });
    }

    pub fn free(&mut self, id: u32) {
        self.runs.retain(|run| run.id != id);
    }

    /// Moves every run that may move as far down as it goes. The moves are to be done in this order; each goes to a lower offset, and what
    /// it overlaps is only its own old place or what was moved or freed before.
    pub fn compact(&mut self, may_move: impl Fn(u32) -> bool) -> Vec<Move> {
        let mut moves = Vec::new();
        let mut end = 0;
        for run in &mut self.runs {
            if run.offset > end && may_move(run.id) {
                moves.push(Move {
                    id: run.id,
                    from: run.offset,
                    to: end,
                    len: run.len,
                });
                run.offset = end;
            }
            end = run.offset + run.len;
        }
        moves
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn gaps_are_filled_from_below() {
        let mut arena = Arena::new(10 * ALIGNMENT);
        assert_eq!(arena.allocate(1, 3 * ALIGNMENT), Some(0));
        assert_eq!(arena.allocate(2, 1), Some(3 * ALIGNMENT));
        assert_eq!(arena.allocate(3, 2 * ALIGNMENT), Some(4 * ALIGNMENT));
        arena.free(1);
        assert_eq!(arena.free_bytes(), 7 * ALIGNMENT);
        arena.allocate_at(7, ALIGNMENT, ALIGNMENT);
        assert_eq!(
            arena.allocate(4, 2 * ALIGNMENT),
            Some(6 * ALIGNMENT),
            "one is free on either side of the one in the gap"
        );
        arena.free(7);
        arena.free(4);
        assert_eq!(arena.allocate(4, 2 * ALIGNMENT), Some(0));
        assert_eq!(arena.allocate(5, 5 * ALIGNMENT), None, "five are free, four of them together");
        let moves = arena.compact(|_| true);
        assert_eq!(moves.len(), 2);
        assert_eq!(arena.allocate(5, 5 * ALIGNMENT), Some(5 * ALIGNMENT));
        assert_eq!(arena.allocate(6, 1), None);
    }

    #[test]
    fn what_may_not_move_stays() {
        let mut arena = Arena::new(4 * ALIGNMENT);
        for id in 0..4 {
            arena.allocate(id, ALIGNMENT);
        }
        arena.free(0);
        arena.free(2);
        assert_eq!(
            arena.compact(|id| id != 1),
            [Move {
                id: 3,
                from: 3 * ALIGNMENT,
                to: 2 * ALIGNMENT,
                len: ALIGNMENT
            }]
        );
        assert_eq!(arena.allocate(5, 2 * ALIGNMENT), None);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
        /// Whatever came and went: runs don't overlap, what was written moves with its run, and free bytes can be had in one run.
        #[test]
        fn free_bytes_are_usable_bytes(steps in proptest::collection::vec((0usize..3, 1usize..2000), 1..80)) {
            const CAPACITY: usize = 64 * ALIGNMENT;
            let mut arena = Arena::new(CAPACITY);
            let mut memory = vec![0u32; CAPACITY / ALIGNMENT];
            let mut live: Vec<u32> = Vec::new();
            for (id, (what, amount)) in (1..).zip(steps) {
                if what == 0 && !live.is_empty() {
                    arena.free(live.swap_remove(amount % live.len()));
                    continue;
                }
                let fits = amount.next_multiple_of(ALIGNMENT) <= arena.free_bytes();
                let mut offset = arena.allocate(id, amount);
                if offset.is_none() && fits {
                    for Move { from, to, len, .. } in arena.compact(|_| true) {
                        memory.copy_within(from / ALIGNMENT..(from + len) / ALIGNMENT, to / ALIGNMENT);
                    }
                    offset = arena.allocate(id, amount);
                }
                prop_assert_eq!(offset.is_some(), fits);
                if let Some(offset) = offset {
                    memory[offset / ALIGNMENT..(offset + amount.next_multiple_of(ALIGNMENT)) / ALIGNMENT].fill(id);
                    live.push(id);
                }
                let mut end = 0;
                for run in &arena.runs {
                    prop_assert!(run.offset >= end && run.offset + run.len <= CAPACITY);
                    end = run.offset + run.len;
                    prop_assert!(memory[run.offset / ALIGNMENT..end / ALIGNMENT].iter().all(|&id| id == run.id));
                }
            }
        }
    }
}
