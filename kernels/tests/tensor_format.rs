//! Every format decodes to the bits that another reader gives for the same blocks (`fixtures/make_gguf_blocks.py`).

use quire_kernels::TensorFormat;
use quire_kernels::tensor_format::GROUP_LEN;
use quire_kernels::testing::assert_same_bits;

const FIXTURE: &[u8] = include_bytes!("fixtures/gguf_blocks.bin");

struct Record {
    format: TensorFormat,
    bytes: &'static [u8],
    weights: Vec<f32>,
}

fn records() -> Vec<Record> {
    let mut rest = FIXTURE;
    let mut take = |len: usize| {
        let (taken, behind) = rest.split_at(len);
        rest = behind;
        taken
    };
    let number = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().expect("four bytes")) as usize;
    TensorFormat::ALL
        .iter()
        .map(|_| {
            let name_len = usize::from(take(1)[0]);
            let name = std::str::from_utf8(take(name_len)).expect("a name");
            let format = *TensorFormat::ALL.iter().find(|format| format.name() == name).expect("a format of ours");
            let (num_weights, num_bytes) = (number(take(4)), number(take(4)));
            let bytes = take(num_bytes);
            let weights = take(4 * num_weights).chunks_exact(4);
            let weights = weights.map(|word| f32::from_le_bytes(word.try_into().expect("four bytes"))).collect();
            Record { format, bytes, weights }
        })
        .collect()
}

#[test]
fn every_format_decodes_bit_for_bit() {
    let mut seen = Vec::new();
    for Record { format, bytes, weights } in records() {
        assert_eq!(format.row_bytes(weights.len()), Some(bytes.len()), "{format:?}");
        let mut decoded = vec![f32::NAN; weights.len()];
        format.decode(bytes, &mut decoded);
        assert_same_bits(&decoded, &weights);
        // From any whole block on, as parts of a row are read.
        let half = weights.len() / 2;
        let mut decoded = vec![f32::NAN; half];
        format.decode(&bytes[bytes.len() / 2..], &mut decoded);
        assert_same_bits(&decoded, &weights[half..]);
        seen.push(format);
    }
    assert_eq!(seen, TensorFormat::ALL);
}

#[test]
fn groups_give_the_same_weights() {
    let mut num_grouped = 0;
    for Record { format, bytes, weights } in records() {
        let Some(bits) = format.code_bits() else { continue };
        num_grouped += 1;
        let mut codes = [0; GROUP_LEN];
        for (index, weights) in weights.chunks_exact(GROUP_LEN).enumerate() {
            let group = format.read_group(bytes, index, &mut codes);
            let value = |code: u8| group.scale * (i32::from(code) - i32::from(format.zero_point())) as f32 + group.min;
            assert_same_bits(&codes.map(value), weights);
            match format.code_table() {
                Some(table) => assert!(codes.iter().all(|code| table.contains(code)), "{format:?}"),
                None => assert!(codes.iter().all(|&code| u32::from(code) < 1 << bits), "{format:?}"),
            }
        }
    }
    assert_eq!(num_grouped, 8);
}
