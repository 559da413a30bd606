//! KV blocks: allocate, share, free. Bookkeeping only: it knows no device and no sequence.
//!
//! A block is in one of three states. *Free*: nobody's, content unknown. *Used*: one or more sequences hold a reference.
//! *Cached*: nobody holds it, but it still has the KV of a known prefix, so a later sequence may take it; the one released
//! longest ago is overwritten first when free blocks run out.
//!
//! A full block may be published under its [`BlockKey`]: what its KV depends on, which is the adapter version (or the base model) and
//! every token up to the block's end. Partly filled blocks are never shared, so a shared block is never written again.
//!
//! How many blocks there are may change ([`BlockPool::shrink`], [`BlockPool::grow`]), always at the upper end: the lowest free block is
//! given out first, so that few have to move when the upper ones go.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use sha2::{Digest, Sha256};

use crate::adapter::VersionId;

/// Names a block of the device's KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub u32);

/// What the KV of a full block depends on, as a chained SHA-256: the weights that it was computed under, and every token from
/// position 0 to the block's end. Keys are trusted to identify content: with 256 bits a collision, by chance or made on purpose, is
/// not a case to handle, so no tokens are kept for comparing.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockKey([u8; 32]);

impl std::fmt::Debug for BlockKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "BlockKey({:02x}{:02x}{:02x}{:02x}…)", self.0[0], self.0[1], self.0[2], self.0[3])
    }
}

impl BlockKey {
    /// The parent of a sequence's first block: nothing but the weights. Different versions have disjoint trees of keys, whatever their names.
    pub fn root(adapter: Option<VersionId>) -> Self {
        let mut hash = Sha256::new();
        match adapter {
            None => hash.update(b"polylora kv of the base model"),
            Some(version) => {
                hash.update(b"polylora kv of an adapter");
                hash.update(version.0);
            }
        }
        Self(hash.finalize().into())
    }

    /// The key of the block that holds `tokens` after the block `self`.
    pub fn child(&self, tokens: &[u32]) -> Self {
        let mut hash = Sha256::new();
        hash.update(self.0);
        for token in tokens {
            hash.update(token.to_le_bytes());
        }
        Self(hash.finalize().into())
    }
}

/// What a block has is moved to another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockMove {
    /// Its place so far, which is no block any more.
    pub from: BlockId,
    /// A free block.
    pub to: BlockId,
}

#[derive(Clone, Debug, Default)]
struct Block {
    /// Sequences that hold it.
    ref_count: u32,
    /// Set once published; cleared when the block is overwritten.
    key: Option<BlockKey>,
    /// Set while its holder computes what it will publish.
    promise: Option<BlockKey>,
    /// Its place in `BlockPool::cached`, valid while it is there.
    released_at: u64,
}

/// All KV blocks of a backend. See the module.
#[derive(Debug)]
pub struct BlockPool {
    blocks: Vec<Block>,
    free: BTreeSet<BlockId>,
    /// Unreferenced blocks with a key, by the time of their release.
    cached: BTreeMap<u64, BlockId>,
    by_key: HashMap<BlockKey, BlockId>,
    promised: HashMap<BlockKey, BlockId>,
    /// Of last uses: grows with each.
    clock: u64,
}

impl BlockPool {
    /// `num_blocks` free blocks.
    pub fn new(num_blocks: usize) -> Self {
        let mut pool = Self {
            blocks: Vec::new(),
            free: BTreeSet::new(),
            cached: BTreeMap::new(),
            by_key: HashMap::new(),
            promised: HashMap::new(),
            clock: 0,
        };
        pool.grow(num_blocks);
        pool
    }

    /// All blocks that there are now: ids from 0 on.
    pub fn num_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that are nobody's and hold nothing.
    pub fn num_free(&self) -> usize {
        self.free.len()
    }

    /// Blocks that `try_allocate` can give: free and cached ones.
    pub fn num_available(&self) -> usize {
        self.free.len() + self.cached.len()
    }

    /// Blocks that hold a cached prefix and that nobody uses.
    pub fn num_cached(&self) -> usize {
        self.cached.len()
    }

    /// Blocks that sequences hold.
    pub fn num_used(&self) -> usize {
        self.blocks.len() - self.num_available()
    }

    /// A block for one sequence to write: a free one, or the cached one released longest ago. `None` when all are used.
    pub fn try_allocate(&mut self) -> Option<BlockId> {
        let block_id = match self.free.pop_first() {
            Some(block_id) => block_id,
            None => {
                let (_, block_id) = self.cached.pop_first()?;
                self.forget_key(block_id);
                block_id
            }
        };
        let block = self.block_mut(block_id);
        assert!(
            block.ref_count == 0 && block.key.is_none(),
            "{block_id:?} was given out while held or published"
        );
        block.ref_count = 1;
        Some(block_id)
    }

    /// One more reference on the block published under `key`, if there is one.
    pub fn try_share(&mut self, key: &BlockKey) -> Option<BlockId> {
        let block_id = *self.by_key.get(key)?;
        let block = &mut self.blocks[block_id.0 as usize];
        if block.ref_count == 0 {
            let cached = self.cached.remove(&block.released_at);
            assert_eq!(cached, Some(block_id), "an unreferenced published block is a cached one");
        }
        block.ref_count += 1;
        Some(block_id)
    }

    /// Notes that the holder of a block is computing what it will publish under `key`, so that others may wait instead of computing it too.
    /// The promise ends with `publish`, or when the block is released.
    pub fn promise(&mut self, block_id: BlockId, key: BlockKey) {
        let block = &mut self.blocks[block_id.0 as usize];
        assert!(
            block.ref_count > 0 && block.promise.is_none(),
            "{block_id:?} is promised once, by its holder"
        );
        self.promised.entry(key).or_insert_with(|| {
            block.promise = Some(key);
            block_id
        });
    }

    /// Whether somebody is computing the block of this key.
    pub fn is_promised(&self, key: &BlockKey) -> bool {
        self.promised.contains_key(key)
    }

    /// Lets others share a full, computed block that the caller holds. When another block has the key already, this one stays private.
    pub fn publish(&mut self, block_id: BlockId, key: BlockKey) {
        self.end_promise(block_id);
        let block = &mut self.blocks[block_id.0 as usize];
        assert!(block.ref_count > 0, "{block_id:?} is published by nobody");
        match block.key {
            Some(old_key) => assert_eq!(old_key, key, "{block_id:?} is published under two keys"),
            None => {
                self.by_key.entry(key).or_insert_with(|| {
                    block.key = Some(key);
                    block_id
                });
            }
        }
    }

    /// Gives one reference back. The last one makes the block cached if it is published, free if not.
    pub fn release(&mut self, block_id: BlockId) {
        let block = &mut self.blocks[block_id.0 as usize];
        assert!(block.ref_count > 0, "{block_id:?} is released by nobody");
        block.ref_count -= 1;
        if block.ref_count > 0 {
            return;
        }
        self.end_promise(block_id);
        let block = &mut self.blocks[block_id.0 as usize];
        if block.key.is_some() {
            self.clock += 1;
            block.released_at = self.clock;
            self.cached.insert(self.clock, block_id);
        } else {
            self.free.insert(block_id);
        }
    }

    /// Gives a sequence's blocks back, last first: of a long prefix the end is then overwritten before the beginning, which more
    /// sequences have in common, and which the end is of no use without.
    pub fn release_all(&mut self, block_ids: impl DoubleEndedIterator<Item = BlockId>) {
        block_ids.rev().for_each(|block_id| self.release(block_id));
    }

    /// Forgets every cached prefix that nobody uses.
    pub fn flush_cache(&mut self) {
        while self.forget_oldest() {}
    }

    /// The time of something's last use, later than that of every block released so far and earlier than those of all to come.
    pub fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// The time of the last use of the cached block that was released longest ago.
    pub fn oldest_use(&self) -> Option<u64> {
        self.cached.first_key_value().map(|(released_at, _)| *released_at)
    }

    /// Makes a free block of that one. False if none is cached.
    pub fn forget_oldest(&mut self) -> bool {
        let Some((_, block_id)) = self.cached.pop_first() else { return false };
        self.forget_key(block_id);
        self.free.insert(block_id);
        true
    }

    /// Gives up the blocks from `num_blocks` on, which are at least those in use. Cached prefixes that have no room left are forgotten, the
    /// one released longest ago first; every other block up there moves down to a free one, and whoever holds it is to be told.
    pub fn shrink(&mut self, num_blocks: usize) -> Vec<BlockMove> {
        assert!(
            num_blocks >= self.num_used(),
            "{} blocks are in use, {num_blocks} are to stay",
            self.num_used()
        );
        while self.num_used() + self.cached.len() > num_blocks {
            assert!(self.forget_oldest(), "what is not used is cached");
        }
        if num_blocks >= self.blocks.len() {
            return Vec::new();
        }
        let end = BlockId(num_blocks as u32);
        let gone = self.free.split_off(&end);
        let mut moves = Vec::new();
        for from in (end.0..self.blocks.len() as u32).map(BlockId).filter(|block_id| !gone.contains(block_id)) {
            let to = self.free.pop_first().expect("as many are free below as are held above");
            let block = std::mem::take(self.block_mut(from));
            if let Some(key) = block.key {
                self.by_key.insert(key, to);
            }
            if let Some(promise) = block.promise {
                self.promised.insert(promise, to);
            }
            if block.ref_count == 0 {
                self.cached.insert(block.released_at, to);
            }
            *self.block_mut(to) = block;
            moves.push(BlockMove { from, to });
        }
        self.blocks.truncate(num_blocks);
        moves
    }

    /// Has `num_blocks` blocks from now on, the new ones free.
    pub fn grow(&mut self, num_blocks: usize) {
        let end = u32::try_from(num_blocks).expect("block ids are 32 bits; kv_slots would overflow far earlier");
        self.free.extend((self.blocks.len() as u32..end).map(BlockId));
        self.blocks.resize(self.blocks.len().max(num_blocks), Block::default());
    }

    /// Panics unless every block is in exactly one state and every index agrees with it. Walks all blocks: for tests.
    pub fn assert_consistent(&self) {
        let mut places = vec![0; self.blocks.len()];
        for block_id in &self.free {
            places[block_id.0 as usize] += 1;
            assert!(self.blocks[block_id.0 as usize].key.is_none(), "free {block_id:?} is published");
        }
        for (released_at, block_id) in &self.cached {
            places[block_id.0 as usize] += 1;
            let block = &self.blocks[block_id.0 as usize];
            assert!(
                block.key.is_some() && block.released_at == *released_at,
                "cached {block_id:?} is not published"
            );
        }
        for (place, block) in places.iter().zip(&self.blocks) {
            assert_eq!(
                *place,
                u32::from(block.ref_count == 0),
                "a block is free, cached or used, just one of them"
            );
        }
        let published = self.blocks.iter().filter(|block| block.key.is_some()).count();
        assert_eq!(published, self.by_key.len(), "published blocks and keys");
        let promising = self.blocks.iter().filter(|block| block.promise.is_some()).count();
        assert_eq!(promising, self.promised.len(), "promising blocks and promises");
        for (key, block_id) in &self.promised {
            let block = &self.blocks[block_id.0 as usize];
            assert!(block.promise == Some(*key) && block.ref_count > 0, "promise of {block_id:?}");
        }
        for (key, block_id) in &self.by_key {
            assert_eq!(self.blocks[block_id.0 as usize].key, Some(*key), "key of {block_id:?}");
        }
    }

    fn block_mut(&mut self, block_id: BlockId) -> &mut Block {
        &mut self.blocks[block_id.0 as usize]
    }

    fn end_promise(&mut self, block_id: BlockId) {
        if let Some(key) = self.block_mut(block_id).promise.take() {
            self.promised.remove(&key);
        }
    }

    fn forget_key(&mut self, block_id: BlockId) {
        let key = self.block_mut(block_id).key.take().expect("a cached block is published");
        let forgotten = self.by_key.remove(&key);
        assert_eq!(forgotten, Some(block_id), "the key of a published block names it");
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key(number: u32) -> BlockKey {
        BlockKey::root(None).child(&[number])
    }

    #[test]
    fn keys_differ_by_adapter_version_by_any_token_and_by_depth() {
        let roots = [
            BlockKey::root(None),
            BlockKey::root(Some(VersionId([0; 32]))),
            BlockKey::root(Some(VersionId([1; 32]))),
        ];
        let mut keys = Vec::new();
        for root in roots {
            keys.push(root);
            keys.push(root.child(&[1, 2]));
            keys.push(root.child(&[1, 3]));
            keys.push(root.child(&[1, 2]).child(&[1, 2]));
            keys.push(root.child(&[1, 3]).child(&[1, 2]));
        }
        let distinct: std::collections::BTreeSet<_> = keys.iter().collect();
        assert_eq!(distinct.len(), keys.len());
        assert_eq!(roots[1].child(&[1, 2]), BlockKey::root(Some(VersionId([0; 32]))).child(&[1, 2]));
    }

    #[test]
    fn the_prefix_released_longest_ago_is_overwritten_first_and_its_end_before_its_beginning() {
        let mut pool = BlockPool::new(4);
        let blocks: Vec<BlockId> = (0..4).map(|_| pool.try_allocate().expect("4 blocks")).collect();
        assert_eq!(pool.try_allocate(), None);
        for (number, block_id) in blocks.iter().enumerate() {
            pool.publish(*block_id, key(number as u32));
        }
        pool.release_all(blocks[2..4].iter().copied());
        pool.release_all(blocks[0..2].iter().copied());
        assert_eq!((pool.num_used(), pool.num_cached()), (0, 4));
        assert_eq!(pool.try_allocate(), Some(blocks[3]));
        assert_eq!(pool.try_share(&key(3)), None, "overwritten");
        assert_eq!(pool.try_share(&key(2)), Some(blocks[2]), "still there, and now taken");
        assert_eq!(pool.try_allocate(), Some(blocks[1]));
        pool.assert_consistent();
    }

    #[test]
    fn a_second_block_with_the_same_content_stays_private() {
        let mut pool = BlockPool::new(2);
        let (first, second) = (pool.try_allocate().expect("free"), pool.try_allocate().expect("free"));
        pool.publish(first, key(0));
        pool.publish(second, key(0));
        pool.release(second);
        assert_eq!(pool.num_cached(), 0, "the copy is free at once");
        assert_eq!(pool.try_share(&key(0)), Some(first));
        pool.assert_consistent();
    }

    #[test]
    fn flushing_forgets_what_nobody_uses_and_nothing_else() {
        let mut pool = BlockPool::new(2);
        let (used, unused) = (pool.try_allocate().expect("free"), pool.try_allocate().expect("free"));
        pool.publish(used, key(0));
        pool.publish(unused, key(1));
        pool.release(unused);
        pool.flush_cache();
        pool.assert_consistent();
        assert_eq!(pool.try_share(&key(1)), None);
        assert_eq!(pool.try_share(&key(0)), Some(used));
    }

    #[test]
    fn a_pool_that_shrinks_forgets_the_oldest_prefixes_and_moves_the_rest_down() {
        let mut pool = BlockPool::new(6);
        let blocks: Vec<BlockId> = (0..6).map(|_| pool.try_allocate().expect("6 blocks")).collect();
        for (number, block_id) in blocks.iter().enumerate().skip(1) {
            pool.publish(*block_id, key(number as u32));
        }
        pool.promise(blocks[0], key(9));
        for place in [4, 1, 2, 3] {
            pool.release(blocks[place]);
        }
        // 0 and 5 are used; 4 was released first, then 1, 2 and 3.
        let moved = |from, to| BlockMove {
            from: BlockId(from),
            to: BlockId(to),
        };
        assert_eq!(pool.shrink(3), [moved(3, 1), moved(5, 2)]);
        pool.assert_consistent();
        assert_eq!((pool.num_blocks(), pool.num_used(), pool.num_cached(), pool.num_free()), (3, 2, 1, 0));
        assert_eq!([1, 2, 4].map(|number| pool.try_share(&key(number))), [None; 3], "forgotten");
        assert_eq!(pool.try_share(&key(3)), Some(BlockId(1)));
        assert_eq!(pool.try_share(&key(5)), Some(BlockId(2)), "used, and shared at its new place");
        assert!(pool.is_promised(&key(9)));
        pool.grow(4);
        assert_eq!(pool.try_allocate(), Some(BlockId(3)));
        assert_eq!(pool.try_allocate(), None);
        pool.assert_consistent();
    }

    #[test]
    fn the_lowest_free_block_is_given_out_first() {
        let mut pool = BlockPool::new(3);
        let blocks: Vec<BlockId> = (0..3).map(|_| pool.try_allocate().expect("free")).collect();
        assert_eq!(blocks, [0, 1, 2].map(BlockId));
        for place in [1, 2, 0] {
            pool.release(blocks[place]);
        }
        assert_eq!(pool.try_allocate(), Some(BlockId(0)));
        assert_eq!(pool.shrink(1), []);
    }

    #[test]
    #[should_panic(expected = "released by nobody")]
    fn releasing_twice_is_a_bug_that_stops() {
        let mut pool = BlockPool::new(1);
        let block_id = pool.try_allocate().expect("free");
        pool.release(block_id);
        pool.release(block_id);
    }

    #[test]
    fn a_promise_ends_when_it_is_kept_and_when_it_cannot_be() {
        let mut pool = BlockPool::new(3);
        let blocks: Vec<BlockId> = (0..3).map(|_| pool.try_allocate().expect("free")).collect();
        pool.promise(blocks[0], key(0));
        pool.promise(blocks[1], key(1));
        pool.promise(blocks[2], key(0));
        pool.assert_consistent();
        pool.publish(blocks[0], key(0));
        assert!(!pool.is_promised(&key(0)) && pool.is_promised(&key(1)));
        pool.release(blocks[1]);
        assert!(!pool.is_promised(&key(1)));
        pool.release(blocks[2]);
        pool.assert_consistent();
    }

    #[derive(Clone, Debug)]
    enum Action {
        Allocate,
        Share(u32),
        Publish(usize, u32),
        Release(usize),
        Flush,
        Resize(usize),
    }

    fn action() -> impl Strategy<Value = Action> {
        prop_oneof![
            4 => Just(Action::Allocate),
            3 => (0..12u32).prop_map(Action::Share),
            4 => (any::<usize>(), 0..12u32).prop_map(|(held, key)| Action::Publish(held, key)),
            4 => any::<usize>().prop_map(Action::Release),
            1 => Just(Action::Flush),
            2 => (0..12usize).prop_map(Action::Resize),
        ]
    }

    proptest! {
        /// A model of who holds what content: a shared block always has the content that was published, whatever happened between.
        #[test]
        fn blocks_are_conserved_and_a_key_always_finds_its_own_content(actions in prop::collection::vec(action(), 1..200)) {
            let mut pool = BlockPool::new(6);
            let mut held: Vec<BlockId> = Vec::new();
            let mut content: HashMap<BlockId, u32> = HashMap::new();
            for action in actions {
                match action {
                    Action::Allocate => {
                        let available = pool.num_available();
                        let block_id = pool.try_allocate();
                        prop_assert_eq!(block_id.is_some(), available > 0);
                        if let Some(block_id) = block_id {
                            prop_assert!(!held.contains(&block_id));
                            content.remove(&block_id);
                            held.push(block_id);
                        }
                    }
                    Action::Share(number) => {
                        if let Some(block_id) = pool.try_share(&key(number)) {
                            prop_assert_eq!(content.get(&block_id), Some(&number));
                            held.push(block_id);
                        }
                    }
                    Action::Publish(index, number) => {
                        if let Some(&block_id) = (!held.is_empty()).then(|| &held[index % held.len()]) {
                            let number = *content.entry(block_id).or_insert(number);
                            pool.publish(block_id, key(number));
                        }
                    }
                    Action::Release(index) => {
                        if !held.is_empty() {
                            pool.release(held.swap_remove(index % held.len()));
                        }
                    }
                    Action::Flush => pool.flush_cache(),
                    Action::Resize(num_blocks) => {
                        pool.grow(num_blocks);
                        let num_blocks = num_blocks.max(pool.num_used());
                        let num_kept = pool.num_cached().min(num_blocks - pool.num_used());
                        for BlockMove { from, to } in pool.shrink(num_blocks) {
                            prop_assert!(from.0 as usize >= num_blocks && (to.0 as usize) < num_blocks);
                            prop_assert!(!held.contains(&to), "it moved onto a block in use");
                            held.iter_mut().filter(|block_id| **block_id == from).for_each(|block_id| *block_id = to);
                            match content.remove(&from) {
                                Some(number) => content.insert(to, number),
                                None => content.remove(&to),
                            };
                        }
                        prop_assert_eq!((pool.num_blocks(), pool.num_cached()), (num_blocks, num_kept));
                        prop_assert!(held.iter().all(|block_id| (block_id.0 as usize) < num_blocks));
                    }
                }
                pool.assert_consistent();
                let distinct: std::collections::BTreeSet<_> = held.iter().collect();
                prop_assert_eq!(pool.num_used(), distinct.len());
            }
            held.into_iter().for_each(|block_id| pool.release(block_id));
            pool.flush_cache();
            pool.assert_consistent();
            prop_assert_eq!(pool.num_available(), pool.num_blocks());
            prop_assert_eq!(pool.num_cached(), 0);
        }
    }
}
