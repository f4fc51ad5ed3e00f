//! Blocks of the KV cache as numbers: identities, a sequence's table of them, and slot arithmetic.

/// A physical block of one KV group: a run of `block_size` token positions in each of the group's layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub u32);

impl BlockId {
    /// Entry of a block table that no kernel reads: its positions have left every window that is still to come.
    pub const NONE: Self = Self(u32::MAX);

    /// Whether this is [`BlockId::NONE`].
    #[must_use]
    pub fn is_none(self) -> bool {
        self == Self::NONE
    }
}

/// How many blocks hold `num_tokens` positions.
#[must_use]
pub fn num_blocks_for(num_tokens: u32, block_size: u32) -> u32 {
    num_tokens.div_ceil(block_size)
}

/// One sequence's blocks in one KV group: logical position -> physical block.
///
/// Entries before `first_live` are [`BlockId::NONE`]: they were given back, or never taken.
#[derive(Debug, Default)]
pub(crate) struct BlockTable {
    blocks: Vec<BlockId>,
    first_live: u32,
}

impl BlockTable {
    pub(crate) fn with_capacity(num_blocks: u32) -> Self {
        Self { blocks: Vec::with_capacity(num_blocks as usize), first_live: 0 }
    }

    /// All entries, the given-back ones included.
    pub(crate) fn entries(&self) -> &[BlockId] {
        &self.blocks
    }

    /// Entries that hold a reference.
    pub(crate) fn live(&self) -> &[BlockId] {
        &self.blocks[self.first_live as usize..]
    }

    pub(crate) fn first_live(&self) -> u32 {
        self.first_live
    }

    pub(crate) fn push(&mut self, block: BlockId) {
        self.blocks.push(block);
    }

    /// Starts an empty table behind `count` positions of which no block is held.
    pub(crate) fn skip(&mut self, count: u32) {
        debug_assert!(self.blocks.is_empty());
        self.blocks.resize(count as usize, BlockId::NONE);
        self.first_live = count;
    }

    /// Takes the first live entry out; `None` when there is none before `end`.
    pub(crate) fn drop_first_live(&mut self, end: u32) -> Option<BlockId> {
        if self.first_live >= end.min(self.blocks.len() as u32) {
            return None;
        }
        let entry = &mut self.blocks[self.first_live as usize];
        self.first_live += 1;
        Some(std::mem::replace(entry, BlockId::NONE))
    }

    /// Takes the last live entry out, so that a chain is given back leaf first; empties the table when none is left.
    pub(crate) fn pop_live(&mut self) -> Option<BlockId> {
        if self.blocks.len() as u32 > self.first_live {
            return self.blocks.pop();
        }
        self.blocks.clear();
        self.first_live = 0;
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_gives_back_from_both_ends() {
        let mut table = BlockTable::default();
        table.skip(1);
        for id in 10..14 {
            table.push(BlockId(id));
        }
        assert_eq!(table.entries()[0], BlockId::NONE);
        assert_eq!(table.drop_first_live(2), Some(BlockId(10)));
        assert_eq!(table.drop_first_live(2), None);
        assert_eq!(table.live(), [BlockId(11), BlockId(12), BlockId(13)]);
        let given_back: Vec<u32> = std::iter::from_fn(|| table.pop_live()).map(|block| block.0).collect();
        assert_eq!(given_back, [13, 12, 11]);
        assert_eq!((table.entries().len(), table.first_live()), (0, 0));
    }

    #[test]
    fn blocks_are_counted_up() {
        let counts: Vec<u32> = [0, 1, 15, 16, 17].iter().map(|&len| num_blocks_for(len, 16)).collect();
        assert_eq!(counts, [0, 1, 1, 1, 2]);
    }
}
