//! What a file says, and every lie that it could tell.

use quire_kernels::TensorFormat;

use super::*;
use crate::testing::gguf::GgufWriter;

/// A file of a few hundred bytes with a value of each type and three tensors.
fn small() -> GgufWriter {
    let mut file = GgufWriter::default();
    file.text("general.architecture", "llama");
    file.u32("llama.block_count", 2).f32("llama.rope.freq_base", 5e5).flag("tokenizer.ggml.add_bos_token", true);
    file.raw("a.u8", 0, &[200]).raw("a.i8", 1, &[200]).raw("a.u16", 2, &[1, 2]).raw("a.i16", 3, &[0, 0x80]);
    file.raw("a.i32", 5, &[0xff; 4]).raw("a.u64", 10, &[1, 0, 0, 0, 0, 0, 0, 1]).raw("a.i64", 11, &[0xfe; 8]);
    file.raw("a.f64", 12, &1.5f64.to_le_bytes());
    file.texts("tokenizer.ggml.tokens", &["<s>", "é", ""]).i32s("types", &[3, -1, 1]).f32s("scores", &[0.5, -2.0]);
    file.tensor("a", TensorFormat::Q4_0, &[2, 32], &[1; 36]);
    file.tensor("b", TensorFormat::F32, &[3], &[2; 12]);
    file.tensor("c", TensorFormat::Bf16, &[2, 1, 3], &[3; 12]);
    file
}

fn refused(file: &GgufWriter) -> String {
    Container::parse(&file.bytes()).map(|_| ()).unwrap_err().to_string()
}

#[test]
fn what_was_written_is_read() {
    for file in [small(), small().version(2)] {
        let bytes = file.bytes();
        let Container { metadata, tensors } = Container::parse(&bytes).unwrap();
        assert_eq!(metadata.text("general.architecture"), Ok(Some("llama")));
        let scalars = [
            ("a.u8", Scalar::Unsigned(200)),
            ("a.i8", Scalar::Negative(-56)),
            ("a.u16", Scalar::Unsigned(0x201)),
            ("a.i16", Scalar::Negative(-32768)),
            ("a.i32", Scalar::Negative(-1)),
            ("a.u64", Scalar::Unsigned(1 << 56 | 1)),
            ("a.i64", Scalar::Negative(i64::from_le_bytes([0xfe; 8]))),
            ("a.f64", Scalar::Float(1.5)),
            ("tokenizer.ggml.add_bos_token", Scalar::Flag(true)),
            ("llama.rope.freq_base", Scalar::Float(5e5)),
        ];
        for (key, scalar) in scalars {
            assert_eq!(metadata.scalar(key), Ok(Some(scalar)), "{key}");
        }
        assert_eq!(metadata.texts("tokenizer.ggml.tokens").unwrap().unwrap(), ["<s>", "é", ""]);
        assert_eq!(metadata.array_len("types"), Ok(Some(3)));
        let types = [Scalar::Unsigned(3), Scalar::Negative(-1), Scalar::Unsigned(1)];
        assert_eq!(metadata.scalars("types").unwrap().unwrap(), types);
        assert_eq!(metadata.scalars("scores").unwrap().unwrap(), [Scalar::Float(0.5), Scalar::Float(-2.0)]);
        assert_eq!(metadata.text("absent"), Ok(None));
        // Another type is never taken for an absent key.
        assert!(metadata.text("a.u8").is_err() && metadata.unsigned("a.i8").is_err());
        assert!(metadata.texts("types").is_err() && metadata.scalars("tokenizer.ggml.tokens").is_err());
        assert!(metadata.flag("a.u8").is_err() && metadata.float("general.architecture").is_err());

        let found: Vec<_> = tensors.iter().map(|t| (t.name.as_str(), t.format, &t.shape[..])).collect();
        let expected: [(&str, TensorFormat, &[usize]); 3] = [
            ("a", TensorFormat::Q4_0, &[2, 32]),
            ("b", TensorFormat::F32, &[3]),
            ("c", TensorFormat::Bf16, &[2, 1, 3]),
        ];
        assert_eq!(found, expected);
        for (tensor, fill) in tensors.iter().zip(1..) {
            assert!(bytes[tensor.range.clone()].iter().all(|byte| *byte == fill));
        }
    }
}

#[test]
fn every_prefix_is_refused() {
    let bytes = small().bytes();
    for len in 0..bytes.len() {
        assert!(Container::parse(&bytes[..len]).is_err(), "{len} of {} bytes", bytes.len());
    }
    assert!(Container::parse(&bytes).is_ok());
}

#[test]
fn each_lie_is_named() {
    let changed = |change: &dyn Fn(&mut GgufWriter)| {
        let mut file = small();
        change(&mut file);
        refused(&file)
    };
    let array = |kind: u32, len: u64| [&kind.to_le_bytes()[..], &len.to_le_bytes()].concat();
    let keys: [(u32, Vec<u8>, &str); 15] = [
        (8, (1u64 << 60).to_le_bytes().to_vec(), "is more than"),
        (8, 1_000_000u64.to_le_bytes().to_vec(), "ends inside"),
        (8, [&1u64.to_le_bytes()[..], &[0xff]].concat(), "is not UTF-8"),
        (9, array(8, u64::MAX), "is more than"),
        (9, array(8, 1 << 22), "ends inside"),
        (9, array(0, 1 << 63), "is more than"),
        (9, array(12, 1 << 22), "ends inside"),
        (9, array(9, 1), "arrays in an array"),
        (9, array(9, 0), "arrays in an array"),
        (9, array(99, 0), "unknown type 99"),
        (9, array(13, 0), "unknown type 13"),
        (9, [&array(8, 1)[..], &1u64.to_le_bytes(), &[0xc0]].concat(), "is not UTF-8"),
        (13, vec![0; 8], "unknown type 13"),
        (255, vec![0; 8], "unknown type 255"),
        (u32::MAX, vec![0; 8], "unknown type"),
    ];
    for (kind, bytes, expected) in keys {
        let why = changed(&|file| _ = file.raw("key", kind, &bytes));
        assert!(why.contains(expected), "type {kind}, {expected}: {why}");
    }
    let why = changed(&|file| _ = file.u32("llama.block_count", 3));
    assert!(why.contains("\"llama.block_count\" is there twice"), "{why}");
    assert!(changed(&|file| _ = file.u32(&"k".repeat(300), 3)).contains("is more than"));

    for alignment in [0, 1, 4, 24, 1 << 17, u32::MAX] {
        let why = changed(&|file| _ = file.u32("general.alignment", alignment));
        assert!(why.contains("general.alignment"), "{alignment}: {why}");
    }
    assert!(changed(&|file| _ = file.text("general.alignment", "32")).contains("general.alignment"));

    // `small` has data up to 76 bytes, tensors at 0, 64 and 96.
    let far = 96;
    let tensors: [(&str, u32, &[u64], u64, &str); 17] = [
        ("d", 0, &[4], 1 << 40, "of "),
        ("d", 0, &[4], u64::MAX - 31, "of "),
        ("d", 0, &[4], 33, "no multiple"),
        ("d", 0, &[1], 0, "lies over"),
        ("d", 0, &[1], 32, "lies over"),
        ("b", 0, &[1], far + 32, "\"b\" is there twice"),
        ("d", 0, &[0], far + 32, "no shape"),
        ("d", 0, &[u64::MAX], far + 32, "no shape"),
        ("d", 0, &[1 << 32, 1 << 32], far + 32, "no shape"),
        ("d", 0, &[1 << 62, 1], far + 32, "no shape"),
        ("d", 0, &[1 << 21, 1 << 21, 1 << 21], far + 32, "no shape"),
        ("d", 2, &[1, 33], far + 32, "no shape of whole Q4_0 blocks"),
        ("d", 12, &[1, 32], far + 32, "no shape of whole Q4_K blocks"),
        ("d", 0, &[1, 1, 1, 1, 1], far + 32, "5 dimensions"),
        ("d", 0, &[], far + 32, "0 dimensions"),
        ("d", 16, &[1, 256], far + 32, "IQ2_XXS; F32, BF16"),
        ("d", 255, &[1], far + 32, "unknown type 255"),
    ];
    for (name, kind, shape, offset, expected) in tensors {
        let why = changed(&|file| _ = file.raw_tensor(name, kind, shape, offset, &[0; 64]));
        assert!(why.contains(expected), "{name} {kind} {shape:?} at {offset}, {expected}: {why}");
    }
    let escaped = changed(&|file| _ = file.raw_tensor("\u{1b}[2J\n", 255, &[1], 0, &[]));
    assert!(!escaped.contains(['\u{1b}', '\n']), "{escaped}");
}

#[test]
fn counts_and_versions_are_held_against_the_file() {
    let patched = |at: usize, bytes: &[u8]| {
        let mut file = small().bytes();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        Container::parse(&file).map(|_| ()).unwrap_err()
    };
    assert_eq!(patched(0, b"GGML"), GgufError::NotGguf);
    assert_eq!(patched(4, &1u32.to_le_bytes()), GgufError::Version(1));
    assert_eq!(patched(4, &4u32.to_le_bytes()), GgufError::Version(4));
    assert_eq!(patched(4, &3u32.to_be_bytes()), GgufError::BigEndian);
    for at in [8, 16] {
        for count in [1 << 32, 1 << 63, u64::MAX, 1 << 16 | 1] {
            assert!(matches!(patched(at, &count.to_le_bytes()), GgufError::TooMany { .. }), "{count}");
        }
        assert!(matches!(patched(at, &(1u64 << 16).to_le_bytes()), GgufError::Truncated { .. }));
    }
}

#[test]
fn an_alignment_of_its_own_is_kept() {
    let mut file = GgufWriter::default().alignment(64);
    file.tensor("a", TensorFormat::F32, &[1], &[7; 4]).tensor("b", TensorFormat::F32, &[1], &[8; 4]);
    let bytes = file.bytes();
    let tensors = Container::parse(&bytes).unwrap().tensors;
    assert!(tensors.iter().all(|tensor| tensor.range.start % 64 == 0));
    assert_eq!(bytes[tensors[1].range.clone()], [8; 4]);
}
