//! Sampling on every instruction set, in the emulator and on a card, against its meaning: the same draw must choose the same token.

use quire_kernels::cuda::{CudaBackend, Driver};
use quire_kernels::ops::sample::{NON_FINITE, Sample, SampleAt, SamplerRow, SamplerShape, philox, reference};
use quire_kernels::testing::{Rng, card, cpu_backends, emulated_backends};
use quire_kernels::{Backend, DType, KernelError, device_tests};

const MAX_MODEL_LEN: usize = 64;

const PLAIN: SamplerRow<'static> = SamplerRow {
    prompt_len: 0,
    seed: 1,
    choice_index: 0,
    temperature: 1.0,
    top_k: 0,
    top_p: 1.0,
    min_p: 0.0,
    typical_p: 1.0,
    repetition_penalty: 1.0,
    presence_penalty: 0.0,
    frequency_penalty: 0.0,
    bias: &[],
    mask: None,
    stop_token_ids: &[],
    min_tokens: 0,
    bad_words: &[],
};

/// One row to sample: its logits, what it holds, and how.
#[derive(Clone)]
struct Row<'a> {
    logits: &'a [f32],
    tokens: &'a [u32],
    params: SamplerRow<'a>,
}

/// Chosen tokens, and the token table after them; row i of the batch is row `rows.len() - 1 - i` of the tables.
fn sample<B: Backend>(backend: &mut B, rows: &[Row<'_>]) -> (Vec<u32>, Vec<u32>) {
    let shape =
        SamplerShape { max_num_seqs: rows.len(), max_model_len: MAX_MODEL_LEN, vocab_size: rows[0].logits.len() };
    let mut sampler = backend.alloc_sampler(&shape).expect("room");
    let mut logits = backend.alloc(DType::F32, (rows.len() + 1) * shape.vocab_size).expect("room");
    let mut token_table = backend.alloc(DType::U32, rows.len() * MAX_MODEL_LEN).expect("room");
    let mut places = Vec::new();
    for (index, row) in rows.iter().enumerate() {
        let place = rows.len() - 1 - index;
        backend.write_f32(&mut logits, index * shape.vocab_size, row.logits).expect("it fits");
        backend.write_u32(&mut token_table, place * MAX_MODEL_LEN, row.tokens).expect("it fits");
        backend.set_sampler_row(&mut sampler, place as u32, &row.params).expect("good parameters");
        places.extend(SampleAt { row: place as u32, num_tokens: row.tokens.len() as u32 }.words());
    }
    // One entry before those of the batch, and one that fills it up.
    let mut at = backend.alloc(DType::U32, places.len() + 4).expect("room");
    backend.write_u32(&mut at, 0, &SampleAt { row: 0, num_tokens: 0 }.words()).expect("it fits");
    backend.write_u32(&mut at, 2, &places).expect("it fits");
    backend.write_u32(&mut at, 2 + places.len(), &SampleAt::NOBODY.words()).expect("it fits");
    let mut out = backend.alloc(DType::U32, 2 + rows.len()).expect("room");
    let args = Sample {
        sampler: &mut sampler,
        logits: &logits,
        rows: &at,
        rows_offset: 1,
        num_rows: rows.len() + 1,
        token_table: &mut token_table,
        out: &mut out,
        out_offset: 1,
    };
    backend.sample(args).expect("shapes fit");
    let mut tokens = vec![0; rows.len()];
    backend.read_u32(&out, 1, &mut tokens).expect("it fits");
    let mut around = [0; 2];
    backend.read_u32(&out, 0, &mut around[..1]).expect("it fits");
    backend.read_u32(&out, 1 + rows.len(), &mut around[1..]).expect("it fits");
    assert_eq!(around, [0; 2], "nobody's room");
    let mut table = vec![0; rows.len() * MAX_MODEL_LEN];
    backend.read_u32(&token_table, 0, &mut table).expect("it fits");
    (tokens, table)
}

/// The token that the reference's probabilities give for the row's draw; `None` where the draw is so near to the edge
/// of a token that rounding decides.
fn expected(row: &Row<'_>) -> Option<u32> {
    let Some(p) = reference::distribution(row.logits, row.tokens, &row.params) else { return Some(NON_FINITE) };
    let u = philox::uniform(row.params.seed, row.params.choice_index, row.tokens.len() as u32);
    let mut sum = 0.0;
    for (id, &p) in p.iter().enumerate() {
        sum += p;
        if (sum - u).abs() < 1e-6 && p < 1.0 {
            return None;
        }
        if sum > u {
            return Some(id as u32);
        }
    }
    None
}

/// What draws are checked on.
enum Targets {
    /// Every instruction set, and the emulator.
    Host,
    /// The first card, if there is one.
    Card(Vec<CudaBackend<Driver>>),
}

impl Targets {
    fn card() -> Self {
        Self::Card(card(None).into_iter().collect())
    }

    /// Every draw of `num_draws` seeds against the reference.
    #[track_caller]
    fn check(&mut self, logits: &[f32], tokens: &[u32], params: SamplerRow<'_>, num_draws: u64) {
        let rows: Vec<Row<'_>> = (0..num_draws)
            .map(|seed| {
                let seed = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) + 5;
                Row { logits, tokens, params: SamplerRow { seed, ..params } }
            })
            .collect();
        let expected: Vec<Option<u32>> = rows.iter().map(expected).collect();
        assert!(expected.iter().flatten().count() * 10 >= rows.len() * 9, "most draws are decided");
        match self {
            Self::Card(backends) => backends.iter_mut().for_each(|backend| compare(backend, &rows, &expected)),
            Self::Host => {
                for mut backend in cpu_backends(&[2]) {
                    for (rows, expected) in rows.chunks(64).zip(expected.chunks(64)) {
                        compare(&mut backend, rows, expected);
                    }
                }
                // Slow: the first draw, and that of small vocabularies.
                if logits.len() <= MAX_EMULATED_VOCAB {
                    for mut backend in emulated_backends() {
                        compare(&mut backend, &rows[..1], &expected[..1]);
                    }
                }
            }
        }
    }
}

/// Tests over [`Targets`]: `<name>::on_the_host`, `<name>::on_a_card`.
macro_rules! target_tests {
    ($($name:ident),+ $(,)?) => { $(
        mod $name {
            #[test]
            fn on_the_host() {
                super::$name(&mut super::Targets::Host);
            }

            #[test]
            fn on_a_card() {
                super::$name(&mut super::Targets::card());
            }
        }
    )+ };
}

target_tests! {
    draws_from_the_whole_vocabulary,
    filters_alone_and_together,
    filters_cut_through_equals_by_id,
    a_large_vocabulary,
    penalties,
    masks_bias_bad_words_and_stop_tokens,
}

device_tests! {
    more_tokens_than_threads: |open| open(None).into_iter().for_each(|mut backend| more_tokens_than_threads(&mut backend));
    rows_that_are_not_finite: |open| open(None).iter_mut().for_each(name_rows_that_are_not_finite);
    a_full_row_of_the_table: |open| open(None).iter_mut().for_each(keep_a_full_row);
    any_batch: |open| open(None).into_iter().for_each(|backend| same_token_in_any_batch(&mut [backend], 10));
    bad_parameters: |open| open(None).into_iter().for_each(name_bad_parameters);
}

/// Larger vocabularies have a test of their own in the emulator.
const MAX_EMULATED_VOCAB: usize = 1100;

fn more_tokens_than_threads<B: Backend>(backend: &mut B) {
    let mut rng = Rng::new(10);
    let tokens: Vec<u32> = (0..60).map(|_| rng.below(5003) as u32).collect();
    let logits: Vec<Vec<f32>> =
        (0..16).map(|i| rng.normals(5003).iter().map(|x| x * (1 + i % 3) as f32).collect()).collect();
    let params = [
        PLAIN,
        SamplerRow { temperature: 0.0, ..PLAIN },
        SamplerRow { top_k: 50, top_p: 0.9, ..PLAIN },
        SamplerRow { top_k: 3000, ..PLAIN },
        SamplerRow { top_p: 0.95, repetition_penalty: 1.2, frequency_penalty: 0.1, ..PLAIN },
        SamplerRow { typical_p: 0.8, min_p: 1e-3, ..PLAIN },
        SamplerRow { min_p: 0.02, ..PLAIN },
        SamplerRow { typical_p: 0.5, top_k: 2000, ..PLAIN },
    ];
    let row = |index: usize| Row {
        logits: &logits[index],
        tokens: &tokens[..4 * index],
        params: SamplerRow { seed: index as u64, prompt_len: 20, ..params[index % params.len()] },
    };
    let rows: Vec<Row<'_>> = (0..logits.len()).map(row).collect();
    let expected: Vec<Option<u32>> = rows.iter().map(expected).collect();
    compare(backend, &rows, &expected);
}

#[track_caller]
fn compare<B: Backend>(backend: &mut B, rows: &[Row<'_>], expected: &[Option<u32>]) {
    let (actual, _) = sample(backend, rows);
    for ((row, &expected), &actual) in rows.iter().zip(expected).zip(&actual) {
        if let Some(expected) = expected {
            assert_eq!(actual, expected, "{} {:?}", backend.info().isa, row.params);
        }
    }
}

fn draws_from_the_whole_vocabulary(targets: &mut Targets) {
    let mut rng = Rng::new(1);
    for len in [1, 2, 15, 16, 17, 127, 128, 129, 1000, 5003] {
        let logits: Vec<f32> = rng.normals(len).iter().map(|x| x * 3.0).collect();
        for temperature in [0.0, 1e-30, 0.3, 1.0, 2.0] {
            targets.check(&logits, &[], SamplerRow { temperature, ..PLAIN }, 60);
        }
    }
}

fn filters_alone_and_together(targets: &mut Targets) {
    let mut rng = Rng::new(2);
    for len in [3, 40, 1000, 4097] {
        for spread in [0.5, 3.0] {
            let logits: Vec<f32> = rng.normals(len).iter().map(|x| x * spread).collect();
            for top_k in [0, 1, 2, 7, 50, 3000, 10_000] {
                targets.check(&logits, &[], SamplerRow { top_k, ..PLAIN }, 40);
            }
            for top_p in [0.0, 1e-6, 0.1, 0.5, 0.9, 0.999, 2.0] {
                targets.check(&logits, &[], SamplerRow { top_p, ..PLAIN }, 40);
                targets.check(&logits, &[], SamplerRow { top_p, top_k: 20, temperature: 0.7, ..PLAIN }, 40);
            }
            for min_p in [1e-4, 0.05, 0.5, 1.0] {
                targets.check(&logits, &[], SamplerRow { min_p, ..PLAIN }, 40);
                targets.check(&logits, &[], SamplerRow { min_p, top_p: 0.8, ..PLAIN }, 40);
                targets.check(&logits, &[], SamplerRow { min_p, top_k: 30, ..PLAIN }, 40);
            }
            for typical_p in [0.0, 0.2, 0.9, 0.99] {
                targets.check(&logits, &[], SamplerRow { typical_p, ..PLAIN }, 40);
                targets.check(&logits, &[], SamplerRow { typical_p, min_p: 0.01, top_p: 0.9, ..PLAIN }, 40);
                targets.check(&logits, &[], SamplerRow { typical_p, top_k: 100, temperature: 1.5, ..PLAIN }, 40);
            }
        }
    }
}

fn filters_cut_through_equals_by_id(targets: &mut Targets) {
    let mut rng = Rng::new(3);
    // Few different values, and zeros of both signs.
    let logits: Vec<f32> = rng.normals(700).iter().map(|x| (x * 2.0).round() / 2.0).collect();
    for top_k in [1, 3, 10, 100, 500] {
        targets.check(&logits, &[], SamplerRow { top_k, ..PLAIN }, 60);
    }
    for top_p in [0.01, 0.1, 0.5, 0.95] {
        targets.check(&logits, &[], SamplerRow { top_p, ..PLAIN }, 60);
        targets.check(&logits, &[], SamplerRow { typical_p: top_p, ..PLAIN }, 60);
    }
    targets.check(&[2.0; 300], &[], SamplerRow { top_k: 4, ..PLAIN }, 60);
    targets.check(&[2.0; 300], &[], SamplerRow { temperature: 0.0, ..PLAIN }, 1);
    targets.check(&[-0.0, 0.0, 0.0, -0.0], &[], SamplerRow { top_k: 2, ..PLAIN }, 60);
}

fn a_large_vocabulary(targets: &mut Targets) {
    let mut rng = Rng::new(4);
    let logits: Vec<f32> = rng.normals(151_936).iter().map(|x| x * 4.0).collect();
    for params in [
        PLAIN,
        SamplerRow { temperature: 0.0, ..PLAIN },
        SamplerRow { top_k: 50, top_p: 0.9, ..PLAIN },
        SamplerRow { top_p: 0.95, ..PLAIN },
        SamplerRow { top_k: 100_000, ..PLAIN },
        SamplerRow { typical_p: 0.8, ..PLAIN },
    ] {
        targets.check(&logits, &[], params, 4);
    }
}

#[test]
fn frequencies_are_those_of_the_probabilities() {
    let logits: Vec<f32> = Rng::new(5).normals(24);
    let params = SamplerRow { top_k: 12, temperature: 0.8, ..PLAIN };
    let p = reference::distribution(&logits, &[], &params).expect("finite");
    for mut backend in cpu_backends(&[1]) {
        const NUM_DRAWS: u64 = 20_000;
        let mut counts = [0_u32; 24];
        for start in (0..NUM_DRAWS).step_by(1000) {
            let row = |seed| Row { logits: &logits, tokens: &[], params: SamplerRow { seed, ..params } };
            let rows: Vec<Row<'_>> = (start..start + 1000).map(row).collect();
            for token in sample(&mut backend, &rows).0 {
                counts[token as usize] += 1;
            }
        }
        let mut chi_square = 0.0;
        for (&count, &p) in counts.iter().zip(&p) {
            if p == 0.0 {
                assert_eq!(count, 0);
                continue;
            }
            let expected = p * NUM_DRAWS as f64;
            chi_square += (f64::from(count) - expected).powi(2) / expected;
        }
        // 11 degrees of freedom: above 31.3 once in a thousand times; the seeds are fixed.
        assert!(chi_square < 31.3, "{chi_square}");
    }
}

#[test]
fn positions_and_choices_have_draws_of_their_own() {
    let logits = [0.0; 1000];
    let tokens = [3; 40];
    let mut backend = cpu_backends(&[1]).remove(0);
    let row = |num_tokens: usize, choice_index| Row {
        logits: &logits,
        tokens: &tokens[..num_tokens],
        params: SamplerRow { choice_index, ..PLAIN },
    };
    let rows: Vec<Row<'_>> = (0..40).flat_map(|num_tokens| [row(num_tokens, 0), row(num_tokens, 1)]).collect();
    let (mut chosen, _) = sample(&mut backend, &rows);
    chosen.sort_unstable();
    chosen.dedup();
    assert!(chosen.len() > 70, "{} of 80 draws differ", chosen.len());
}

fn penalties(targets: &mut Targets) {
    let mut rng = Rng::new(6);
    let logits: Vec<f32> = rng.normals(50).iter().map(|x| x * 2.0).collect();
    // Tokens beyond the vocabulary stand for what is no text.
    let tokens: Vec<u32> = (0..40).map(|i| if i == 3 || i == 30 { 1000 } else { rng.below(20) as u32 }).collect();
    for prompt_len in [0, 10, 40, 60] {
        for params in [
            SamplerRow { repetition_penalty: 1.3, ..PLAIN },
            SamplerRow { repetition_penalty: 0.7, ..PLAIN },
            SamplerRow { presence_penalty: 1.5, ..PLAIN },
            SamplerRow { frequency_penalty: 0.4, ..PLAIN },
            SamplerRow { presence_penalty: -0.5, frequency_penalty: -0.2, repetition_penalty: 1.1, ..PLAIN },
            SamplerRow { presence_penalty: 2.0, frequency_penalty: 2.0, temperature: 0.0, ..PLAIN },
        ] {
            targets.check(&logits, &tokens, SamplerRow { prompt_len, ..params }, 60);
        }
    }
}

fn masks_bias_bad_words_and_stop_tokens(targets: &mut Targets) {
    let mut rng = Rng::new(7);
    let logits = rng.normals(100);
    let tokens = [1, 2, 3, 4, 5, 6];
    let mask = [0xdead_beef, 0x0000_ffff, 0, 0b1010];
    let params = SamplerRow { prompt_len: 3, ..PLAIN };
    targets.check(&logits, &tokens, SamplerRow { mask: Some(&mask), ..params }, 60);
    targets.check(&logits, &tokens, SamplerRow { mask: Some(&[0, 0, 0, 2]), ..params }, 5);
    let bias = [(0, 5.0), (99, -3.0), (7, f32::NEG_INFINITY), (0, 1.0)];
    targets.check(&logits, &tokens, SamplerRow { bias: &bias, ..params }, 60);
    targets.check(&logits, &tokens, SamplerRow { bias: &bias, mask: Some(&mask), top_k: 5, ..params }, 60);
    // Behind 4, 5, 6; the third starts in the prompt, the fourth does not match, the last is longer than what there is.
    let bad_words = [vec![7], vec![6, 8], vec![3, 4, 5, 6, 9], vec![5, 5, 10], vec![4, 5, 6, 11], vec![0; 30]];
    let likely: Vec<f32> = (0..100).map(|id| if (7..12).contains(&id) { 9.0 } else { 0.0 }).collect();
    targets.check(&likely, &tokens, SamplerRow { bad_words: &bad_words, ..params }, 60);
    let allowed = reference::distribution(&likely, &tokens, &SamplerRow { bad_words: &bad_words, ..params });
    let allowed = allowed.expect("finite");
    assert!([7, 8, 11].into_iter().all(|id| allowed[id] == 0.0) && allowed[9] > 0.1 && allowed[10] > 0.1);
    for min_tokens in [0, 3, 4] {
        targets.check(&likely, &tokens, SamplerRow { stop_token_ids: &[8, 9], min_tokens, ..params }, 60);
    }
}

#[test]
fn rows_that_are_not_finite_are_named_and_disturb_nobody() {
    cpu_backends(&[1, 2]).iter_mut().for_each(name_rows_that_are_not_finite);
}

fn name_rows_that_are_not_finite<B: Backend>(backend: &mut B) {
    let good: Vec<f32> = Rng::new(8).normals(40);
    let with = |index: usize, x: f32| {
        let mut logits = good.clone();
        logits[index] = x;
        logits
    };
    let (nan, infinite) = (with(39, f32::NAN), with(0, f32::INFINITY));
    let (banned, nothing) = (with(5, f32::NEG_INFINITY), vec![f32::NEG_INFINITY; 40]);
    let tokens = [9; 5];
    for temperature in [0.0, 1.0] {
        let row = |logits, params| Row { logits, tokens: &tokens, params: SamplerRow { temperature, ..params } };
        let all_banned: Vec<Vec<u32>> = (0..40).map(|id| vec![id]).collect();
        let rows = [
            row(&good, PLAIN),
            row(&nan, PLAIN),
            row(&infinite, PLAIN),
            row(&nothing, PLAIN),
            row(&good, SamplerRow { mask: Some(&[0, 0]), ..PLAIN }),
            row(&good, SamplerRow { bad_words: &all_banned, ..PLAIN }),
            row(&good, SamplerRow { bias: &[(3, f32::MAX), (3, f32::MAX)], ..PLAIN }),
            // What is not finite is seen though it is masked.
            row(&nan, SamplerRow { mask: Some(&[3, 0]), ..PLAIN }),
            row(&banned, PLAIN),
            row(&good, PLAIN),
        ];
        {
            let (chosen, table) = sample(backend, &rows);
            assert!(chosen[1..8].iter().all(|&token| token == NON_FINITE), "{chosen:?}");
            assert!(chosen[0] < 40 && chosen[8] < 40 && chosen[9] == chosen[0], "{chosen:?}");
            for (index, &token) in chosen.iter().enumerate() {
                let row = &table[(rows.len() - 1 - index) * MAX_MODEL_LEN..][..MAX_MODEL_LEN];
                // A token that a step planned already can look up.
                assert_eq!(row[5], if token == NON_FINITE { 0 } else { token });
                assert!(row[..5] == tokens && row[6..].iter().all(|&token| token == 0));
            }
        }
    }
}

#[test]
fn a_mask_that_is_replaced_bounds_the_next_token() {
    const VOCAB: usize = 70;
    let shape = SamplerShape { max_num_seqs: 2, max_model_len: 8, vocab_size: VOCAB };
    let likely: Vec<f32> = (0..2 * VOCAB).map(|id| (id % VOCAB) as f32).collect();
    for mut backend in cpu_backends(&[1, 2]) {
        let mut sampler = backend.alloc_sampler(&shape).expect("room");
        let mut logits = backend.alloc(DType::F32, 2 * VOCAB).expect("room");
        let mut token_table = backend.alloc(DType::U32, 16).expect("room");
        let mut out = backend.alloc(DType::U32, 2).expect("room");
        backend.write_f32(&mut logits, 0, &likely).expect("it fits");
        for row in 0..2 {
            backend.set_sampler_row(&mut sampler, row, &SamplerRow { temperature: 0.0, ..PLAIN }).expect("good");
        }
        let mut rows = backend.alloc(DType::U32, 4).expect("room");
        backend.write_u32(&mut rows, 0, &[0, 1, 1, 1]).expect("it fits");
        for (mask, expected) in [
            (None, [69, 69]),
            (Some([0, 1 << 3, 0]), [69, 35]),
            (Some([0b110, 0, 0]), [69, 2]),
            (Some([u32::MAX, 0, 1 << 5]), [69, 69]),
            (Some([0; 3]), [69, NON_FINITE]),
        ] {
            if let Some(mask) = mask {
                backend.set_sampler_mask(&mut sampler, 1, &mask).expect("good");
            }
            let args = Sample {
                sampler: &mut sampler,
                logits: &logits,
                rows: &rows,
                rows_offset: 0,
                num_rows: 2,
                token_table: &mut token_table,
                out: &mut out,
                out_offset: 0,
            };
            backend.sample(args).expect("sampled");
            let mut chosen = [0; 2];
            backend.read_u32(&out, 0, &mut chosen).expect("it fits");
            assert_eq!(chosen, expected, "{mask:?}");
        }
        let shape = backend.set_sampler_mask(&mut sampler, 0, &[0; 2]);
        assert!(matches!(shape, Err(KernelError::Shape { op: "set_sampler_mask", argument: "mask", .. })));
        let row = backend.set_sampler_mask(&mut sampler, 2, &[0; 3]);
        assert!(matches!(row, Err(KernelError::Range { op: "set_sampler_mask", argument: "row", .. })));
        // A row that is set anew has the mask that it is set with.
        backend.set_sampler_row(&mut sampler, 1, &SamplerRow { temperature: 0.0, ..PLAIN }).expect("good");
        let args = Sample {
            sampler: &mut sampler,
            logits: &logits,
            rows: &rows,
            rows_offset: 0,
            num_rows: 2,
            token_table: &mut token_table,
            out: &mut out,
            out_offset: 0,
        };
        backend.sample(args).expect("sampled");
        let mut chosen = [0; 2];
        backend.read_u32(&out, 0, &mut chosen).expect("it fits");
        assert_eq!(chosen, [69, 69]);
    }
}

#[test]
fn a_full_row_of_the_table_stays_as_it_is() {
    keep_a_full_row(&mut cpu_backends(&[1])[0]);
}

fn keep_a_full_row<B: Backend>(backend: &mut B) {
    let logits = [0.0, 1.0];
    let tokens = [1; MAX_MODEL_LEN];
    let row = Row { logits: &logits, tokens: &tokens, params: PLAIN };
    let rows = [row.clone(), row];
    let (chosen, table) = sample(backend, &rows);
    assert!(chosen[0] < 2);
    assert_eq!(table, [1; 2 * MAX_MODEL_LEN]);
}

#[test]
fn a_row_has_the_same_token_at_any_place_of_any_batch() {
    cpu_backends(&[1, 2, 3]).chunks_mut(3).for_each(|backends| same_token_in_any_batch(backends, 30));
}

/// `backends` compute alike.
fn same_token_in_any_batch<B: Backend>(backends: &mut [B], num_rows: usize) {
    let mut rng = Rng::new(9);
    let logits: Vec<Vec<f32>> = (0..30).map(|_| rng.normals(3000)).collect();
    let tokens: Vec<u32> = (0..50).map(|_| rng.below(3000) as u32).collect();
    let rows: Vec<Row<'_>> = logits
        .iter()
        .enumerate()
        .map(|(index, logits)| {
            let params = [
                PLAIN,
                SamplerRow { top_p: 0.9, ..PLAIN },
                SamplerRow { top_k: 40, repetition_penalty: 1.2, ..PLAIN },
                SamplerRow { typical_p: 0.9, frequency_penalty: 0.3, ..PLAIN },
                SamplerRow { temperature: 0.0, ..PLAIN },
            ][index % 5];
            Row { logits, tokens: &tokens[..index], params: SamplerRow { seed: index as u64, prompt_len: 5, ..params } }
        })
        .collect();
    let rows = &rows[..num_rows];
    let alone: Vec<u32> = rows.iter().flat_map(|row| sample(&mut backends[0], std::slice::from_ref(row)).0).collect();
    for backend in backends {
        assert_eq!(sample(backend, rows).0, alone);
        let reversed: Vec<Row<'_>> = rows.iter().rev().cloned().collect();
        let mut chosen = sample(backend, &reversed).0;
        chosen.reverse();
        assert_eq!(chosen, alone);
    }
}

#[test]
fn bad_parameters_are_named_and_change_nothing() {
    name_bad_parameters(cpu_backends(&[1]).remove(0));
}

fn name_bad_parameters<B: Backend>(mut backend: B) {
    let shape = SamplerShape { max_num_seqs: 2, max_model_len: 8, vocab_size: 33 };
    let mut sampler = backend.alloc_sampler(&shape).expect("room");
    let mut refused = |row, params: SamplerRow<'_>| match backend.set_sampler_row(&mut sampler, row, &params) {
        Err(KernelError::Range { op: "set_sampler_row", argument, .. }) => argument,
        Err(KernelError::Shape { op: "set_sampler_row", argument, .. }) => argument,
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(2, PLAIN), "row");
    assert_eq!(refused(0, SamplerRow { temperature: f32::NAN, ..PLAIN }), "temperature");
    assert_eq!(refused(0, SamplerRow { temperature: -1.0, ..PLAIN }), "temperature");
    assert_eq!(refused(0, SamplerRow { temperature: f32::INFINITY, ..PLAIN }), "temperature");
    assert_eq!(refused(0, SamplerRow { top_p: f32::NAN, ..PLAIN }), "top_p");
    assert_eq!(refused(0, SamplerRow { min_p: 1.5, ..PLAIN }), "min_p");
    assert_eq!(refused(0, SamplerRow { typical_p: -0.5, ..PLAIN }), "typical_p");
    assert_eq!(refused(0, SamplerRow { repetition_penalty: 0.0, ..PLAIN }), "repetition_penalty");
    assert_eq!(refused(0, SamplerRow { presence_penalty: f32::NEG_INFINITY, ..PLAIN }), "presence_penalty");
    assert_eq!(refused(0, SamplerRow { bias: &[(33, 0.0)], ..PLAIN }), "bias");
    assert_eq!(refused(0, SamplerRow { bias: &[(3, f32::NAN)], ..PLAIN }), "bias");
    assert_eq!(refused(0, SamplerRow { mask: Some(&[1]), ..PLAIN }), "mask");
    assert_eq!(refused(0, SamplerRow { stop_token_ids: &[40], ..PLAIN }), "stop_token_ids");
    assert_eq!(refused(0, SamplerRow { bad_words: &[vec![]], ..PLAIN }), "bad_words");
    assert_eq!(refused(0, SamplerRow { bad_words: &[vec![1, 33]], ..PLAIN }), "bad_words");
    let long = vec![vec![1; 1023]; 16];
    assert_eq!(refused(0, SamplerRow { bad_words: &long, stop_token_ids: &[2], ..PLAIN }), "lists");
    backend.set_sampler_row(&mut sampler, 0, &SamplerRow { temperature: -0.0, ..PLAIN }).expect("zero is zero");
    backend.set_sampler_row(&mut sampler, 0, &SamplerRow { bad_words: &long, ..PLAIN }).expect("as many as fit");

    let logits = backend.alloc(DType::F32, 2 * 33).expect("room");
    let mut token_table = backend.alloc(DType::U32, 16).expect("room");
    let mut out = backend.alloc(DType::U32, 2).expect("room");
    let mut rows = backend.alloc(DType::U32, 4).expect("room");
    let mut refused = |row, num_tokens, rows_offset, out_offset| {
        let at = [SampleAt { row: 0, num_tokens: 1 }, SampleAt { row, num_tokens }];
        backend.write_u32(&mut rows, 0, at.map(SampleAt::words).as_flattened()).expect("it fits");
        let args = Sample {
            sampler: &mut sampler,
            logits: &logits,
            rows: &rows,
            rows_offset,
            num_rows: 2,
            token_table: &mut token_table,
            out: &mut out,
            out_offset,
        };
        // A device tells of what lies in its memory when it is read.
        let result = backend.sample(args);
        result.and_then(|()| backend.read_u32(&out, 0, &mut [0; 2])).expect_err("refused")
    };
    let range = |argument, value, limit| KernelError::Range { op: "sample", argument, value, limit };
    assert_eq!(refused(2, 1, 0, 0), range("row", 2, 2));
    assert_eq!(refused(1, 9, 0, 0), range("num_tokens", 9, 9));
    let shape_error = |argument, expected, found| KernelError::Shape { op: "sample", argument, expected, found };
    assert_eq!(refused(1, 8, 0, 1), shape_error("out", 3, 2));
    assert_eq!(refused(1, 8, 1, 0), shape_error("rows", 6, 4));
    let mut table = [0; 16];
    backend.read_u32(&token_table, 0, &mut table).expect("it fits");
    // Of a row that is refused; a device chooses a token for the other.
    assert_eq!(table[8..], [0; 8]);
    assert!(backend.info().kind != "cpu" || table[..8] == [0; 8]);
    for shape in [
        SamplerShape { max_num_seqs: 0, ..shape },
        SamplerShape { max_model_len: 0, ..shape },
        SamplerShape { vocab_size: 0, ..shape },
    ] {
        assert!(matches!(backend.alloc_sampler(&shape), Err(KernelError::Shape { op: "alloc_sampler", .. })));
    }
}
