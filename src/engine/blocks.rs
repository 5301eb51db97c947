//! The pool of KV cache blocks: which are free, in use, or unused but still holding a prefix.
//!
//! It counts references and never sees a tensor, nor what is written where.

use std::collections::HashMap;

use sha2::{Digest, Sha256};

use crate::adapter::Generation;

/// What a full block holds: SHA-256 over the adapter generation and all tokens from the sequence's start to the block's
/// end. Keys and values at a position depend on exactly these, so equal keys mean equal content. The tenant is part of it too, so
/// that none finds what another left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key([u8; 32]);

impl Key {
    /// The parent of a sequence's first block; no `generation` is the base.
    pub fn root(tenant: Option<&str>, generation: Option<&Generation>) -> Key {
        let mut hash = Sha256::new();
        if let Some(tenant) = tenant {
            hash.update(b"tenant ");
            hash.update(tenant);
            // No tenant's name has it, so that it ends the name.
            hash.update(b"\n");
        }
        match generation {
            None => hash.update(b"base"),
            Some(generation) => {
                hash.update(b"adapter ");
                hash.update(generation.as_str());
            }
        }
        Key(hash.finalize().into())
    }

    /// The block that holds `tokens` after the block `self`.
    pub fn child(&self, tokens: &[u32]) -> Key {
        let mut hash = Sha256::new();
        hash.update(self.0);
        for token in tokens {
            hash.update(token.to_le_bytes());
        }
        Key(hash.finalize().into())
    }
}

const NONE: u32 = u32::MAX;

#[derive(Debug, Clone)]
struct Block {
    /// Block tables that it stands in.
    references: u32,
    /// Set once the block is full and computed.
    key: Option<Key>,
    // Neighbours in the list of cached blocks.
    older: u32,
    newer: u32,
}

/// How many blocks are in each state. Their sum is the size of the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockCounts {
    /// In a block table.
    pub used: usize,
    /// In no block table, still holding a prefix.
    pub cached: usize,
    pub free: usize,
}

/// A fixed number of blocks. Each operation takes constant time for a block and allocates nothing.
#[derive(Debug)]
pub struct BlockPool {
    blocks: Vec<Block>,
    free: Vec<u32>,
    index: HashMap<Key, u32>,
    // Cached blocks as a list through `Block::older` and `Block::newer`, by the time of their release.
    oldest: u32,
    newest: u32,
    cached: usize,
}

impl BlockPool {
    /// `count` must be below `u32::MAX`.
    pub fn new(count: usize) -> Self {
        let block = Block { references: 0, key: None, older: NONE, newer: NONE };
        BlockPool {
            blocks: vec![block; count],
            free: (0..count as u32).rev().collect(),
            index: HashMap::with_capacity(count),
            oldest: NONE,
            newest: NONE,
            cached: 0,
        }
    }

    pub fn counts(&self) -> BlockCounts {
        let (cached, free) = (self.cached, self.free.len());
        BlockCounts { used: self.blocks.len() - cached - free, cached, free }
    }

    /// Blocks that [`allocate`](Self::allocate) can give.
    pub fn available(&self) -> usize {
        self.free.len() + self.cached
    }

    /// An empty block: a free one, else the cached one that was released first, whose prefix is forgotten.
    pub fn allocate(&mut self) -> Option<u32> {
        let block = match self.free.pop() {
            Some(block) => block,
            None if self.oldest != NONE => {
                let block = self.oldest;
                self.unlink(block);
                if let Some(key) = self.blocks[block as usize].key.take() {
                    self.index.remove(&key);
                }
                block
            }
            None => return None,
        };
        self.blocks[block as usize].references = 1;
        Some(block)
    }

    /// One more reference to the block that holds `key`, if there is one.
    pub fn acquire(&mut self, key: &Key) -> Option<u32> {
        let block = *self.index.get(key)?;
        if self.blocks[block as usize].references == 0 {
            self.unlink(block);
        }
        self.blocks[block as usize].references += 1;
        Some(block)
    }

    /// Lets others find a block that is full and computed. If another block holds the same already, that one stays the
    /// one to be found.
    pub fn publish(&mut self, block: u32, key: Key) {
        let entry = &mut self.blocks[block as usize];
        debug_assert!(entry.references > 0, "only a block in use can be published");
        if entry.key.is_none() && !self.index.contains_key(&key) {
            entry.key = Some(key);
            self.index.insert(key, block);
        }
    }

    /// Empties a block table. Its last block is the first to be evicted, since a prefix is of use only from its start.
    pub fn release(&mut self, table: &mut Vec<u32>) {
        for block in table.drain(..).rev() {
            let entry = &mut self.blocks[block as usize];
            debug_assert!(entry.references > 0, "block {block} was released twice");
            entry.references -= 1;
            if entry.references > 0 {
                continue;
            }
            if entry.key.is_some() {
                self.link(block);
            } else {
                self.free.push(block);
            }
        }
    }

    fn link(&mut self, block: u32) {
        let entry = &mut self.blocks[block as usize];
        (entry.older, entry.newer) = (self.newest, NONE);
        match self.newest {
            NONE => self.oldest = block,
            newest => self.blocks[newest as usize].newer = block,
        }
        self.newest = block;
        self.cached += 1;
    }

    fn unlink(&mut self, block: u32) {
        let Block { older, newer, .. } = self.blocks[block as usize];
        match older {
            NONE => self.oldest = newer,
            older => self.blocks[older as usize].newer = newer,
        }
        match newer {
            NONE => self.newest = older,
            newer => self.blocks[newer as usize].older = older,
        }
        self.cached -= 1;
    }

    /// Checks every invariant against all block tables in use.
    #[cfg(test)]
    pub fn check<'a>(&self, tables: impl Iterator<Item = &'a [u32]>) {
        let mut references = vec![0; self.blocks.len()];
        for block in tables.flatten() {
            references[*block as usize] += 1;
        }
        // 1: free, 2: cached, 4: used
        let mut states = vec![0; self.blocks.len()];
        for &block in &self.free {
            states[block as usize] += 1;
            assert!(self.blocks[block as usize].key.is_none(), "free block {block} has a key");
        }
        let (mut block, mut older) = (self.oldest, NONE);
        while block != NONE {
            let entry = &self.blocks[block as usize];
            states[block as usize] += 2;
            assert!(entry.key.is_some(), "cached block {block} has no key");
            assert_eq!(entry.older, older);
            (older, block) = (block, entry.newer);
        }
        assert_eq!(older, self.newest);
        for (i, entry) in self.blocks.iter().enumerate() {
            assert_eq!(entry.references, references[i], "references of block {i}");
            states[i] += if references[i] > 0 { 4 } else { 0 };
            assert!(matches!(states[i], 1 | 2 | 4), "block {i} is in states {:b}", states[i]);
            if let Some(key) = &entry.key {
                assert_eq!(self.index.get(key), Some(&(i as u32)), "key of block {i}");
            }
        }
        assert_eq!(self.index.len(), self.blocks.iter().filter(|b| b.key.is_some()).count());
        let counts = self.counts();
        assert_eq!(counts.used + counts.cached + counts.free, self.blocks.len());
        assert_eq!(counts.cached, states.iter().filter(|&&s| s == 2).count());
        assert_eq!(counts.free, states.iter().filter(|&&s| s == 1).count());
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn keys_differ_by_generation_and_by_every_token_before() {
        let (a, b) = (Generation::new("aa"), Generation::new("bb"));
        let root = |generation| Key::root(None, generation);
        let (base, a, b) = (root(None), root(Some(&a)), root(Some(&b)));
        let tokens = [1, 2];
        assert_ne!(base.child(&tokens), a.child(&tokens));
        assert_ne!(a.child(&tokens), b.child(&tokens));
        assert_ne!(base.child(&tokens).child(&[5, 6]), base.child(&[1, 3]).child(&[5, 6]));
        assert_eq!(base.child(&tokens).child(&[5, 6]), root(None).child(&tokens).child(&[5, 6]));
        // An adapter cannot take the base's place by its name.
        assert_ne!(root(None), root(Some(&Generation::new(""))));
        let tenants = [None, Some("a"), Some("b")].map(|tenant| Key::root(tenant, None));
        assert!(tenants[0] != tenants[1] && tenants[1] != tenants[2] && tenants[0] != tenants[2]);
    }

    #[test]
    fn the_block_released_first_is_evicted_first_and_a_prefix_from_its_end() {
        let mut pool = BlockPool::new(3);
        let root = Key::root(None, None);
        let (first, second) = (root.child(&[1]), root.child(&[1]).child(&[2]));
        let mut table = vec![pool.allocate().unwrap(), pool.allocate().unwrap()];
        pool.publish(table[0], first);
        pool.publish(table[1], second);
        pool.release(&mut table);
        assert_eq!(pool.counts(), BlockCounts { used: 0, cached: 2, free: 1 });
        let mut other = vec![pool.allocate().unwrap(), pool.allocate().unwrap()];
        assert_eq!(pool.acquire(&second), None);
        let kept = pool.acquire(&first).unwrap();
        assert_eq!(pool.allocate(), None);
        other.push(kept);
        pool.check([other.as_slice()].into_iter());
    }

    proptest! {
        #[test]
        fn no_block_is_lost_under_random_use(size in 1usize..12, ops in prop::collection::vec((0u8..4, 0usize..6, 0u32..8), 1..200)) {
            let mut pool = BlockPool::new(size);
            let mut tables: Vec<Vec<u32>> = vec![vec![]; 6];
            for (op, table, token) in ops {
                let key = Key::root(None, None).child(&[token]);
                match op {
                    0 => tables[table].extend(pool.allocate()),
                    1 => tables[table].extend(pool.acquire(&key)),
                    2 => {
                        if let Some(&block) = tables[table].last() {
                            pool.publish(block, key);
                        }
                    }
                    _ => pool.release(&mut tables[table]),
                }
                pool.check(tables.iter().map(Vec::as_slice));
            }
        }
    }
}
