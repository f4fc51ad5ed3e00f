use std::sync::atomic::{AtomicUsize, Ordering};

use quire_scheduler::{CacheSalt, RequestId, SamplingParams, TenantId};

use super::*;
use crate::constraint::{Grammar, TokenConstraint};

/// Allows the tokens that follow the last one by 1 or 2, from 0 on; panics at 13, ends with 63.
#[derive(Debug)]
struct Upwards;

struct UpwardsState(u32);

impl Grammar for Upwards {
    fn begin(&self) -> Box<dyn TokenConstraint> {
        Box::new(UpwardsState(0))
    }
}

impl TokenConstraint for UpwardsState {
    fn advance(&mut self, token_id: u32) -> Result<(), NotAllowed> {
        assert_ne!(token_id, 13);
        if token_id != self.0 + 1 && token_id != self.0 + 2 {
            return Err(NotAllowed);
        }
        self.0 = token_id;
        Ok(())
    }

    fn mask(&mut self, mask: &mut [u32]) -> Result<(), NotAllowed> {
        for id in if self.0 >= 20 { [63, 63] } else { [self.0 + 1, self.0 + 2] } {
            mask[id as usize / 32] |= 1 << (id % 32);
        }
        Ok(())
    }
}

fn upwards() -> Arc<RequestGrammar> {
    Arc::new(RequestGrammar::new(Arc::new(Upwards)))
}

fn request(allowed: Option<Vec<u32>>, min_tokens: u32) -> Request {
    Request {
        id: RequestId(0),
        tenant: TenantId(0),
        adapter: None,
        priority: 0,
        cache_salt: CacheSalt::default(),
        prompt: [1].as_slice().into(),
        generated: Vec::new(),
        choice_offset: 0,
        sampling: SamplingParams { allowed_token_ids: allowed, ..SamplingParams::default() },
        max_tokens: 8,
        min_tokens,
        stop_token_ids: vec![63, 1000],
        deadline: None,
    }
}

#[test]
fn each_row_follows_its_own_tokens() {
    (0..3).for_each(rows_follow_their_tokens);
}

fn rows_follow_their_tokens(num_threads: usize) {
    let mut masks = Masks::new(3, 64, num_threads).unwrap();
    assert_eq!(masks.entry(0), None);
    masks.enter(0, upwards(), 0, &request(None, 0), &[]);
    masks.enter(2, upwards(), 0, &request(None, 0), &[2, 3]);
    assert_eq!(masks.wait(2), Ok(&[0b11 << 4, 0][..]));
    assert_eq!(masks.wait(0), Ok(&[0b110, 0][..]));
    let (first, last) = (masks.entry(0).unwrap(), masks.entry(2).unwrap());
    masks.advance(0, first, 2);
    masks.advance(2, last, 5);
    assert_eq!(masks.wait(0), Ok(&[0b11 << 3, 0][..]));
    assert_eq!(masks.wait(0), Ok(&[0b11 << 3, 0][..]));
    assert_eq!(masks.wait(2), Ok(&[0b11 << 6, 0][..]));
    // Someone else is in the row when the token arrives.
    masks.enter(0, upwards(), 0, &request(None, 0), &[]);
    masks.advance(0, first, 3);
    assert_eq!(masks.wait(0), Ok(&[0b110, 0][..]));
    masks.leave(0);
    assert_eq!(masks.entry(0), None);
}

#[test]
fn whoever_has_time_computes_masks() {
    let mut masks = Masks::new(8, 64, 0).unwrap();
    (0..8).for_each(|row| masks.enter(row, upwards(), 0, &request(None, 0), &[row as u32 + 1]));
    assert_eq!(masks.num_waiting(), 8);
    masks.leave(3);
    assert_eq!(masks.num_waiting(), 7);
    let work = masks.work();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| (0..5).for_each(|_| work.compute_next()));
        }
    });
    assert_eq!(masks.num_waiting(), 0);
    for row in (0..8).filter(|row| *row != 3) {
        let expected = if row < 2 { Ok(()) } else { Err(NotAllowed) };
        assert_eq!(masks.wait(row).map(|_| ()), expected, "{row}");
    }
}

/// Counts what it is told and asked.
#[derive(Debug, Default)]
struct Counting(Arc<[AtomicUsize; 2]>);

struct CountingState(Arc<[AtomicUsize; 2]>, UpwardsState);

impl Grammar for Counting {
    fn begin(&self) -> Box<dyn TokenConstraint> {
        Box::new(CountingState(Arc::clone(&self.0), UpwardsState(0)))
    }
}

impl TokenConstraint for CountingState {
    fn advance(&mut self, token_id: u32) -> Result<(), NotAllowed> {
        self.0[0].fetch_add(1, Ordering::Relaxed);
        self.1.advance(token_id)
    }

    fn mask(&mut self, mask: &mut [u32]) -> Result<(), NotAllowed> {
        self.0[1].fetch_add(1, Ordering::Relaxed);
        self.1.mask(mask)
    }
}

#[test]
fn a_choice_that_comes_back_goes_on_where_it_left() {
    let mut masks = Masks::new(2, 64, 0).unwrap();
    let counts = Arc::<[AtomicUsize; 2]>::default();
    let told_and_asked = || counts.each_ref().map(|count| count.load(Ordering::Relaxed));
    let grammar = Arc::new(RequestGrammar::new(Arc::new(Counting(Arc::clone(&counts)))));
    let request = request(None, 0);
    masks.enter(0, Arc::clone(&grammar), 0, &request, &[1, 3]);
    masks.enter(1, Arc::clone(&grammar), 1, &request, &[2]);
    let entry = masks.entry(0).unwrap();
    assert!(masks.wait(0).is_ok() && masks.wait(1).is_ok());
    masks.advance(0, entry, 4);
    let at_four = masks.wait(0).unwrap().to_vec();
    assert_eq!(told_and_asked(), [4, 3]);
    // It comes back as it left, to another row; then with a token more; then with one that was not told when it left.
    masks.leave(0);
    masks.enter(1, Arc::clone(&grammar), 0, &request, &[1, 3, 4]);
    assert_eq!((masks.wait(1), told_and_asked()), (Ok(&*at_four), [4, 3]));
    masks.leave(1);
    masks.enter(0, Arc::clone(&grammar), 0, &request, &[1, 3, 4, 6]);
    assert_eq!((masks.wait(0), told_and_asked()), (Ok(&[0b11 << 7, 0][..]), [5, 4]));
    masks.advance(0, masks.entry(0).unwrap(), 7);
    masks.leave(0);
    masks.enter(0, Arc::clone(&grammar), 0, &request, &[1, 3, 4, 6, 7]);
    assert_eq!((masks.wait(0), told_and_asked()), (Ok(&[0b11 << 8, 0][..]), [6, 5]));
    // The other choice was put out of its row, and is where it was.
    masks.enter(1, Arc::clone(&grammar), 1, &request, &[2]);
    assert_eq!((masks.wait(1), told_and_asked()), (Ok(&[0b11 << 3, 0][..]), [6, 5]));
    // With other tokens than those it had it begins anew.
    masks.leave(0);
    masks.enter(0, Arc::clone(&grammar), 0, &request, &[1, 3, 4, 5]);
    assert_eq!((masks.wait(0), told_and_asked()), (Ok(&[0b11 << 6, 0][..]), [10, 6]));
    // Of who ended nothing is kept.
    grammar.end(0);
    masks.leave(0);
    assert!(grammar.take(0, &[1, 3, 4, 5]).is_none());
}

#[test]
fn a_place_that_a_thread_had_is_kept_too() {
    let counts = Arc::<[AtomicUsize; 2]>::default();
    let grammar = Arc::new(RequestGrammar::new(Arc::new(Counting(Arc::clone(&counts)))));
    let mut masks = Masks::new(2, 64, 1).unwrap();
    let request = request(None, 0);
    // Whether the thread has it, had it or never began: it comes back to the same mask.
    for len in 1..12 {
        let generated: Vec<u32> = (1..=len).collect();
        masks.enter(0, Arc::clone(&grammar), 0, &request, &generated);
        masks.leave(0);
        masks.enter(1, Arc::clone(&grammar), 0, &request, &generated);
        assert_eq!(masks.wait(1), Ok(&[0b11 << (len + 1), 0][..]), "{len}");
        masks.leave(1);
    }
}

#[test]
fn rows_that_come_and_go_leave_nothing_behind() {
    let mut masks = Masks::new(2, 64, 0).unwrap();
    for round in 0..100 {
        masks.enter(0, upwards(), 0, &request(None, 0), &[]);
        // Some leave before their mask was computed, some behind it.
        if round % 2 == 0 {
            masks.work().compute_next();
        }
        masks.leave(0);
    }
    let queues = lock(&masks.shared.queues);
    assert_eq!((queues.waiting.len(), queues.done.len()), (0, 0));
}

#[test]
fn a_row_without_a_way_on_fails_alone_and_for_good() {
    let mut masks = Masks::new(3, 64, 1).unwrap();
    masks.enter(0, upwards(), 0, &request(None, 0), &[9]);
    masks.enter(1, upwards(), 0, &request(Some(vec![7, 40]), 0), &[]);
    let up_to_13: Vec<u32> = (1..=13).collect();
    masks.enter(2, upwards(), 0, &request(None, 0), &up_to_13);
    for row in 0..3 {
        assert_eq!(masks.wait(row), Err(NotAllowed), "{row}");
    }
    assert_eq!(masks.wait(0), Err(NotAllowed));
    masks.enter(2, upwards(), 0, &request(None, 0), &[]);
    assert!(masks.wait(2).is_ok());
}

#[test]
#[should_panic(expected = "token 3 was chosen")]
fn a_token_outside_its_mask_is_a_bug() {
    let mut masks = Masks::new(1, 64, 1).unwrap();
    masks.enter(0, upwards(), 0, &request(None, 0), &[]);
    assert!(masks.wait(0).is_ok());
    let entry = masks.entry(0).unwrap();
    masks.advance(0, entry, 3);
}

#[test]
fn a_complete_output_ends_before_min_tokens() {
    let mut masks = Masks::new(1, 64, 1).unwrap();
    let complete: Vec<u32> = (1..=10).map(|i| 2 * i).collect();
    masks.enter(0, upwards(), 0, &request(None, 100), &complete);
    assert_eq!(masks.wait(0), Ok(&[0, 1 << 31][..]));
}
