//! Decode steps that were recorded once and are replayed.
//!
//! A step that only decodes does the same operations each time, and only their sizes depend on how many sequences there are.
//! So such a step is filled up to one of a few sizes, and each size is recorded when it comes for the second time: the
//! first time it runs as it is, which makes its kernels ready. A size that the device has no memory to record or to replay
//! runs as it is from then on.

/// Sizes that a batch is filled up to: few enough to be recorded, near enough that little is computed for nobody.
const SIZES: [usize; 15] = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512];

/// What has been done of a size.
#[derive(Debug)]
pub(super) enum Recorded<G> {
    Never,
    /// It ran once.
    Ran,
    Graph(G),
    /// The device has no memory for its recording: it runs as it is from then on.
    Refused,
}

/// The sizes, ascending, and their recordings.
#[derive(Debug)]
pub(super) struct DecodeGraphs<G> {
    sizes: Vec<(usize, Recorded<G>)>,
}

impl<G> DecodeGraphs<G> {
    /// For batches of at most `max_num_seqs`, which is the last size where it is not larger than the largest of all.
    pub(super) fn new(max_num_seqs: usize) -> Self {
        let smaller = SIZES.into_iter().filter(|&size| size < max_num_seqs);
        let last = Some(max_num_seqs).filter(|&size| size <= SIZES[SIZES.len() - 1]);
        Self { sizes: smaller.chain(last).map(|size| (size, Recorded::Never)).collect() }
    }

    /// What a batch of `num_seqs` is filled up to. `None` where there are more than any size has.
    pub(super) fn size_for(&self, num_seqs: usize) -> Option<usize> {
        let index = self.sizes.partition_point(|&(size, _)| size < num_seqs);
        self.sizes.get(index).map(|&(size, _)| size)
    }

    /// The recording of a size that [`Self::size_for`] gave.
    pub(super) fn recorded(&mut self, size: usize) -> &mut Recorded<G> {
        let index = self.sizes.binary_search_by_key(&size, |&(size, _)| size).expect("one of the sizes");
        &mut self.sizes[index].1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_gets_the_next_size() {
        let graphs = DecodeGraphs::<()>::new(40);
        let sizes = [0, 1, 2, 3, 5, 9, 17, 25, 33, 40, 41].map(|num_seqs| graphs.size_for(num_seqs));
        let expected = [1, 1, 2, 4, 8, 16, 24, 32, 40, 40].map(Some);
        assert_eq!(sizes[..10], expected);
        assert_eq!(sizes[10], None);
        assert_eq!(DecodeGraphs::<()>::new(1).size_for(1), Some(1));
        let many = DecodeGraphs::<()>::new(4096);
        assert_eq!((many.size_for(512), many.size_for(513)), (Some(512), None));
    }

    #[test]
    fn a_size_keeps_what_was_recorded_of_it() {
        let mut graphs = DecodeGraphs::new(8);
        assert!(matches!(graphs.recorded(4), Recorded::Never));
        *graphs.recorded(4) = Recorded::Graph(7);
        assert!(matches!(graphs.recorded(4), Recorded::Graph(7)));
        assert!(matches!(graphs.recorded(2), Recorded::Never));
    }
}
