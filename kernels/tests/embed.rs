//! `embed` on every backend against its reference: data movement, so exact.

use quire_kernels::ops::embed::{Embed, reference};
use quire_kernels::testing::{POISON, Rng, assert_same_bits, cpu_backends};
use quire_kernels::weight_format::{Codes, Grouping};
use quire_kernels::{
    Backend, DType, HostTensor, KernelError, TensorFormat, WeightFormat, WeightLayout, WeightSource, device_tests,
};

fn bytes_of(numbers: &[f32]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

#[test]
fn rows_come_out_as_they_were_packed_for_the_cpu() {
    rows_come_out_of(cpu_backends(&[1, 3]));
}

device_tests! {
    rows_come_out_as_they_were_packed: |open| rows_come_out_of(open(None).into_iter().collect());
    indices_past_their_tables_are_told_when_it_is_read: |open| open(None).into_iter().for_each(tells_of_bad_indices);
}

fn rows_come_out_of<B: Backend>(backends: Vec<B>) {
    let mut rng = Rng::new(1);
    for mut backend in backends {
        let short = Grouping { codes: Codes::Int8, group_len: 32, has_min: true };
        let formats = [
            WeightFormat::F32,
            WeightFormat::Bf16,
            WeightFormat::Fp8,
            WeightFormat::int8(128),
            WeightFormat::Grouped(short),
            WeightFormat::int4(),
        ];
        for format in formats {
            for (vocab_size, hidden_size) in [(1, 1), (130, 7), (64, 64), (200, 129)] {
                // Two parts, as where added tokens follow a vocabulary.
                let numbers = rng.outliers(2 * vocab_size * hidden_size);
                let bytes = bytes_of(&numbers);
                let (first, second) = bytes.split_at(vocab_size * hidden_size * 4);
                let part = |bytes| HostTensor { format: TensorFormat::F32, rows: vocab_size, cols: hidden_size, bytes };
                for layout in [WeightLayout::Stacked, WeightLayout::GateUp] {
                    let source = WeightSource { parts: vec![part(first), part(second)], layout, format };
                    let table = backend.pack_weight(&source).expect("a good source");
                    let tokens: Vec<u32> = (0..50).map(|_| rng.below(2 * vocab_size) as u32).collect();
                    for num_tokens in [0, 1, 4, 5, 33] {
                        let indices: Vec<u32> = (0..num_tokens).map(|_| rng.below(50) as u32).collect();
                        let mut token_table = backend.alloc(DType::U32, 50).expect("small");
                        backend.write_u32(&mut token_table, 0, &tokens).expect("fits");
                        let mut token_indices = backend.alloc(DType::U32, num_tokens + 3).expect("small");
                        backend.write_u32(&mut token_indices, 0, &indices).expect("fits");
                        // Past the tokens of the step lies what an earlier one left.
                        backend.write_u32(&mut token_indices, num_tokens, &[u32::MAX; 3]).expect("fits");
                        let mut actual = vec![POISON; num_tokens * hidden_size];
                        let mut out = backend.alloc(DType::F32, actual.len()).expect("small");
                        backend.write_f32(&mut out, 0, &actual).expect("fits");
                        backend
                            .embed(Embed {
                                table: &table,
                                token_table: &token_table,
                                token_indices: &token_indices,
                                num_tokens,
                                out: &mut out,
                            })
                            .expect("arguments fit");
                        backend.read_f32(&out, 0, &mut actual).expect("fits");
                        assert_same_bits(&actual, &reference::embed(&source, &tokens, &indices));
                    }
                }
            }
        }
    }
}

#[test]
fn wrong_arguments_are_named() {
    for mut backend in cpu_backends(&[2]) {
        let bytes = bytes_of(&[1.0; 12]);
        let part = HostTensor { format: TensorFormat::F32, rows: 4, cols: 3, bytes: &bytes };
        let source = WeightSource { parts: vec![part], layout: WeightLayout::Stacked, format: WeightFormat::Bf16 };
        let table = backend.pack_weight(&source).expect("a good source");
        let mut refuse = |tokens: &[u32], indices: &[u32], num_tokens, out_len, expected: KernelError| {
            let mut token_table = backend.alloc(DType::U32, tokens.len()).expect("small");
            backend.write_u32(&mut token_table, 0, tokens).expect("fits");
            let mut token_indices = backend.alloc(DType::U32, indices.len()).expect("small");
            backend.write_u32(&mut token_indices, 0, indices).expect("fits");
            let mut out = backend.alloc(DType::F32, out_len).expect("small");
            let (token_table, token_indices) = (&token_table, &token_indices);
            let result = backend.embed(Embed { table: &table, token_table, token_indices, num_tokens, out: &mut out });
            assert_eq!(result, Err(expected));
            let mut after = vec![1.0; out_len];
            backend.read_f32(&out, 0, &mut after).expect("fits");
            assert!(after.iter().all(|&x| x == 0.0), "a refused call wrote");
        };
        let shape = |argument, expected, found| KernelError::Shape { op: "embed", argument, expected, found };
        let range = |argument, value, limit| KernelError::Range { op: "embed", argument, value, limit };
        refuse(&[0, 1], &[0], 2, 6, shape("token_indices", 2, 1));
        refuse(&[0, 1], &[0, 1], 2, 5, shape("out", 6, 5));
        refuse(&[0, 1], &[0, 2], 2, 6, range("token_indices", 2, 2));
        refuse(&[0, 4], &[0, 1], 2, 6, range("token_table", 4, 4));

        let floats = backend.alloc(DType::F32, 6).expect("small");
        let indices = backend.alloc(DType::U32, 6).expect("small");
        let mut out = backend.alloc(DType::F32, 6).expect("small");
        for (token_table, token_indices, argument) in
            [(&floats, &indices, "token_table"), (&indices, &floats, "token_indices")]
        {
            let result =
                backend.embed(Embed { table: &table, token_table, token_indices, num_tokens: 1, out: &mut out });
            assert_eq!(result, Err(KernelError::Type { op: "embed", argument, found: "f32" }));
        }
    }
}

fn tells_of_bad_indices<B: Backend>(mut backend: B) {
    let bytes = bytes_of(&[1.0; 12]);
    let part = HostTensor { format: TensorFormat::F32, rows: 4, cols: 3, bytes: &bytes };
    let source = WeightSource { parts: vec![part], layout: WeightLayout::Stacked, format: WeightFormat::Bf16 };
    let table = backend.pack_weight(&source).expect("a good source");
    for (tokens, indices, argument, value, limit) in
        [([0, 1], [0, 2], "token_indices", 2, 2), ([0, 4], [0, 1], "token_table", 4, 4)]
    {
        let mut token_table = backend.alloc(DType::U32, 2).expect("small");
        backend.write_u32(&mut token_table, 0, &tokens).expect("fits");
        let mut token_indices = backend.alloc(DType::U32, 2).expect("small");
        backend.write_u32(&mut token_indices, 0, &indices).expect("fits");
        let mut out = backend.alloc(DType::F32, 6).expect("small");
        let (token_table, token_indices) = (&token_table, &token_indices);
        let args = Embed { table: &table, token_table, token_indices, num_tokens: 2, out: &mut out };
        backend.embed(args).expect("sizes fit");
        let mut after = vec![7.0; 6];
        let found = backend.read_f32(&out, 0, &mut after);
        assert_eq!(found, Err(KernelError::Range { op: "embed", argument, value, limit }));
        backend.read_f32(&out, 0, &mut after).expect("fits");
        assert_eq!(after, [1.0, 1.0, 1.0, 0.0, 0.0, 0.0], "the other row is there");
    }
}
