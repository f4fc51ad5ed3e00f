//! Tokenizers out of metadata against the `tokenizer.json` they were made from, and against SentencePiece's own rule.

use std::path::Path;

use quire_engine::gguf::{Container, Metadata};
use quire_engine::testing::gguf::GgufWriter;
use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, Tokenizer};

use super::*;
use crate::detokenizer::SpecialTokenText;
use crate::generation::ChatMessage;
use crate::tokenizer::{SpecialTokens, TextTokenizer};

const DEMO: &[u8] = include_bytes!("../../demo/tokenizer.json");

fn metadata(file: &GgufWriter) -> Metadata {
    Container::parse(&file.bytes()).expect("a good file").metadata
}

fn of_tokenizer_json(json: &[u8], pre: &str) -> GgufWriter {
    let mut file = GgufWriter::default();
    file.byte_level_tokenizer(json, pre);
    file
}

/// Some of everything, and seeded mixtures of it.
fn texts() -> Vec<String> {
    let parts = [
        "Hello",
        ", world",
        " I'll",
        " don't",
        " THE'RE",
        "\n",
        "\r\n",
        "  ",
        "\t",
        "   ",
        " 2 + 2 = 4",
        "1234567",
        "é",
        "naïve",
        "你好",
        "こんにちは",
        "🙂",
        "👩‍👩‍👧",
        "\u{a0}",
        "{\"a\": [1, 2]}",
        "fn main() {}",
        "<|im_start|>",
        "<|im_end|>",
        "<|im_",
        "end|>",
        "▁",
        "\0",
        "...",
        "!?",
        "ﬁ",
        "٣",
        "Ünïcödé",
        "a",
        " ",
        "'",
        "x\u{200d}y",
    ];
    let mut texts: Vec<String> = parts.iter().map(|part| (*part).to_owned()).collect();
    texts.push(String::new());
    let mut state = 7_u64;
    for len in 0..400 {
        let mut text = String::new();
        for _ in 0..len % 23 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            text.push_str(parts[(state >> 33) as usize % parts.len()]);
        }
        texts.push(text);
    }
    texts
}

#[test]
fn a_byte_level_tokenizer_agrees_with_the_file_it_came_from() {
    let reference = TextTokenizer::load(DEMO, 0).expect("loads");
    let json = tokenizer_json(&metadata(&of_tokenizer_json(DEMO, "qwen2"))).expect("a tokenizer");
    let tokenizer = TextTokenizer::load(&json, 0).expect("loads");
    for text in texts() {
        for special in [SpecialTokens::AsText, SpecialTokens::Parsed] {
            let ids = tokenizer.encode(&text, special, true).expect("encodes");
            assert_eq!(ids, reference.encode(&text, special, true).expect("encodes"), "{text:?}");
            for written in [SpecialTokenText::Skipped, SpecialTokenText::Written] {
                assert_eq!(tokenizer.table().decode(&ids, written), reference.table().decode(&ids, written));
            }
        }
    }
    for id in 0..3072 {
        assert_eq!(tokenizer.table().is_special(id), reference.table().is_special(id), "{id}");
    }
    // Qwen's tokenizer composes characters first.
    let composed = tokenizer.encode("e\u{301}", SpecialTokens::AsText, false).expect("encodes");
    assert_eq!(composed, tokenizer.encode("é", SpecialTokens::AsText, false).expect("encodes"));
}

#[test]
fn every_known_name_cuts_text_its_own_way() {
    let text = "I'LL go  12345 km,\n你好!";
    let cases: [(&str, &[&str]); 6] = [
        ("llama-bpe", &["I", "'LL", " go", " ", " ", "123", "45", " km", ",\n", "你好", "!"]),
        ("qwen2", &["I", "'LL", " go", " ", " ", "1", "2", "3", "4", "5", " km", ",\n", "你好", "!"]),
        ("gpt-2", &["I", "'", "LL", " go", " ", " 12345", " km", ",", "\n", "你好", "!"]),
        ("deepseek-llm", &["I", "'", "LL", " go", "  ", "12345", " km", ",", "\n", "你好", "!"]),
        ("deepseek-coder", &["I", "'", "LL", " go", "  ", "1", "2", "3", "4", "5", " km", ",", "\n", "你好", "!"]),
        ("deepseek-v3", &["I", "'LL", " go", "  ", "123", "45", " km", ",\n", "你好", "!"]),
    ];
    for (name, expected) in cases {
        let mut file = GgufWriter::default();
        file.text(MODEL, "gpt2").text("tokenizer.ggml.pre", name).texts(TOKENS, &["a", "b"]).texts::<&str>(MERGES, &[]);
        let tokenizer = Tokenizer::from_bytes(tokenizer_json(&metadata(&file)).expect("known")).expect("loads");
        let mut pieces = PreTokenizedString::from(text);
        tokenizer.get_pre_tokenizer().expect("it has one").pre_tokenize(&mut pieces).expect("cuts");
        let pieces: Vec<&str> = pieces
            .get_splits(OffsetReferential::Original, OffsetType::Byte)
            .into_iter()
            .map(|(_, (start, end), _)| &text[start..end])
            .collect();
        assert_eq!(pieces, expected, "{name}");
    }
}

#[test]
fn whole_words_come_before_merges_where_the_model_says_so() {
    for (pre, expected) in [("llama-bpe", vec![2]), ("qwen2", vec![0, 1])] {
        let mut file = GgufWriter::default();
        // Nothing merges to "ab", but it is a token.
        file.text(MODEL, "gpt2").text("tokenizer.ggml.pre", pre).texts(TOKENS, &["a", "b", "ab"]);
        file.texts::<&str>(MERGES, &[]);
        let tokenizer = TextTokenizer::load(&tokenizer_json(&metadata(&file)).expect("known"), 0).expect("loads");
        assert_eq!(tokenizer.encode("ab", SpecialTokens::AsText, false).expect("encodes"), expected, "{pre}");
    }
}

const PIECES: [&str; 32] = [
    "▁t",
    "he",
    "▁the",
    "in",
    "▁a",
    "an",
    "▁an",
    "and",
    "▁and",
    "er",
    "▁th",
    "ing",
    "re",
    "▁s",
    "on",
    "▁in",
    "▁",
    "t",
    "h",
    "e",
    "i",
    "n",
    "a",
    "d",
    "r",
    "s",
    "g",
    "o",
    "▁▁",
    "▁▁▁▁",
    "é",
    "the",
];

fn sentence_piece_file() -> (GgufWriter, Vec<String>, Vec<f32>) {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).into();
    let mut types = vec![2, 3, 3];
    for byte in 0..=255 {
        tokens.push(format!("<0x{byte:02X}>"));
        types.push(6);
    }
    let mut scores = vec![0.0; tokens.len()];
    for (rank, piece) in PIECES.iter().enumerate() {
        tokens.push((*piece).to_owned());
        types.push(1);
        scores.push(-(rank as f32));
    }
    tokens.push("[pad]".to_owned());
    types.push(5);
    scores.push(0.0);
    let mut file = GgufWriter::default();
    file.text(MODEL, "llama").texts(TOKENS, &tokens).i32s(TYPES, &types).f32s(SCORES, &scores);
    file.u32("tokenizer.ggml.bos_token_id", 1).u32("tokenizer.ggml.eos_token_id", 2);
    file.u32("tokenizer.ggml.unknown_token_id", 0);
    (file, tokens, scores)
}

/// The definition: the neighbours that make the best token are merged, the first of equal ones, until none do.
fn by_definition(text: &str, tokens: &[String], scores: &[f32]) -> Vec<u32> {
    let find = |piece: &str| tokens[259..].iter().position(|token| token == piece).map(|at| at + 259);
    let mut pieces: Vec<String> = text.chars().map(String::from).collect();
    loop {
        let pairs = pieces.windows(2).enumerate();
        let scored = pairs.filter_map(|(at, pair)| find(&pair.concat()).map(|id| (at, scores[id])));
        let best = scored.fold(None, |best: Option<(usize, f32)>, next| match best {
            Some(best) if best.1 >= next.1 => Some(best),
            _ => Some(next),
        });
        let Some((at, _)) = best else { break };
        let right = pieces.remove(at + 1);
        pieces[at].push_str(&right);
    }
    let bytes = |piece: &String| piece.bytes().map(|byte| u32::from(byte) + 3).collect::<Vec<_>>();
    pieces.iter().flat_map(|piece| find(piece).map_or_else(|| bytes(piece), |id| vec![id as u32])).collect()
}

#[test]
fn a_sentence_piece_tokenizer_follows_its_definition() {
    let (file, tokens, scores) = sentence_piece_file();
    let tokenizer = TextTokenizer::load(&tokenizer_json(&metadata(&file)).expect("a tokenizer"), 0).expect("loads");
    let alphabet = ["t", "h", "e", "i", "n", "a", "d", " ", "the", " and", "é", "🙂", "\n", "ing", "    "];
    let mut state = 3_u64;
    for len in 1..600 {
        let mut text = String::new();
        for _ in 0..1 + len % 17 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            text.push_str(alphabet[(state >> 33) as usize % alphabet.len()]);
        }
        let ids = tokenizer.encode(&text, SpecialTokens::AsText, false).expect("encodes");
        let marked = format!("{SPACE}{}", text.replace(' ', SPACE));
        assert_eq!(ids, by_definition(&marked, &tokens, &scores), "{text:?}");
        assert_eq!(tokenizer.table().decode(&ids, SpecialTokenText::Skipped), text);
    }
    // BOS is put before a text unless the file says otherwise.
    assert_eq!(tokenizer.encode("the", SpecialTokens::AsText, true).expect("encodes"), [1, 261]);
    let parsed = tokenizer.encode("<s>the</s>", SpecialTokens::Parsed, false).expect("encodes");
    assert_eq!(parsed, [1, 261, 2]);
}

#[test]
fn what_is_put_around_a_text_is_what_the_file_says() {
    let encode = |change: &dyn Fn(&mut GgufWriter)| {
        let (mut file, ..) = sentence_piece_file();
        change(&mut file);
        let json = tokenizer_json(&metadata(&file)).expect("a tokenizer");
        let tokenizer = TextTokenizer::load(&json, 0).expect("loads");
        let ids = tokenizer.encode("the", SpecialTokens::AsText, true).expect("encodes");
        let text = tokenizer.table().decode(&ids, SpecialTokenText::Skipped);
        assert_eq!(text, "the");
        ids
    };
    assert_eq!(encode(&|file| _ = file.flag("tokenizer.ggml.add_bos_token", false)), [261]);
    assert_eq!(encode(&|file| _ = file.flag("tokenizer.ggml.add_eos_token", true)), [1, 261, 2]);
    // Without a space before it the text is another token.
    assert_eq!(encode(&|file| _ = file.flag("tokenizer.ggml.add_space_prefix", false)), [1, 259 + 31]);
}

#[test]
fn what_is_not_clear_is_refused() {
    type Change<'a> = &'a dyn Fn(&mut GgufWriter);
    let bytes = |change: Change<'_>| {
        let mut file = GgufWriter::default();
        change(&mut file);
        tokenizer_json(&metadata(&file)).expect_err("it is refused").why
    };
    let gpt2 = |file: &mut GgufWriter, tokens: &[&str], merges: &[&str]| {
        file.text(MODEL, "gpt2").texts(TOKENS, tokens).texts(MERGES, merges);
    };
    let cases: [(Change<'_>, &str); 14] = [
        (&|_| {}, "no tokenizer"),
        (&|file| _ = file.texts(TOKENS, &["a"]), "tokenizer.ggml.model is missing"),
        (&|file| _ = file.text(MODEL, "bert").texts(TOKENS, &["a"]), "\"bert\" is not served; gpt2 and llama are"),
        (&|file| gpt2(file, &["a"], &[]), "tokenizer.ggml.pre is missing"),
        (
            &|file| {
                gpt2(file, &["a"], &[]);
                file.text("tokenizer.ggml.pre", "tekken");
            },
            "\"tekken\" is not known; llama-bpe",
        ),
        (
            &|file| {
                gpt2(file, &["a", "b"], &["a", "b"]);
                file.text("tokenizer.ggml.pre", "gpt-2");
            },
            "not two tokens",
        ),
        (
            &|file| {
                gpt2(file, &["a", "a"], &[]);
                file.text("tokenizer.ggml.pre", "gpt-2");
            },
            "token 1 is \"a\", as an earlier one is",
        ),
        (&|file| _ = file.texts(TOKENS, &["a"]).i32s(TYPES, &[1, 1]), "token_type"),
        (&|file| _ = file.texts(TOKENS, &["a"]).i32s(TYPES, &[7]), "token_type"),
        (&|file| _ = file.texts(TOKENS, &["a"]).i32s(TYPES, &[-1]), "token_type"),
        (&|file| _ = file.texts(TOKENS, &["<0x-1>"]).i32s(TYPES, &[6]), "said to be a byte"),
        (&|file| _ = file.text(MODEL, "llama").texts(TOKENS, &["a"]), "scores is missing"),
        (
            &|file| _ = file.text(MODEL, "llama").texts(TOKENS, &["a"]).f32s(SCORES, &[f32::NAN]),
            "not a number for each token",
        ),
        (
            &|file| {
                file.text(MODEL, "llama").texts(TOKENS, &["a"]).f32s(SCORES, &[0.0]);
                file.u32("tokenizer.ggml.unknown_token_id", 1);
            },
            "unknown_token_id is 1, which is no token",
        ),
    ];
    for (change, expected) in cases {
        let why = bytes(change);
        assert!(why.contains(expected), "{expected}: {why}");
    }
    let long = "a".repeat(MAX_TOKEN_BYTES + 1);
    let why = bytes(&|file| _ = file.text(MODEL, "llama").texts(TOKENS, &[&long]).f32s(SCORES, &[0.0]));
    assert!(why.contains("1025 bytes"), "{why}");
}

#[test]
fn a_chat_template_knows_the_special_tokens() {
    let (mut file, ..) = sentence_piece_file();
    file.text(CHAT_TEMPLATE, "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}");
    let limits = Limits::default();
    let template = chat_template(&metadata(&file), &limits).expect("compiles").expect("is there");
    let message = ChatMessage { role: "user".into(), content: "hi".into(), ..ChatMessage::default() };
    let options = crate::chat_template::RenderOptions { add_generation_prompt: true, ..Default::default() };
    assert_eq!(template.render(&[message], options).expect("renders"), "<s>hi</s>");
    let (without, ..) = sentence_piece_file();
    assert!(chat_template(&metadata(&without), &limits).expect("fine").is_none());
    file.u32("tokenizer.ggml.padding_token_id", 9999);
    assert!(chat_template(&metadata(&file), &limits).is_err());
}

#[test]
fn names_have_plain_letters() {
    let name = |general: Option<&str>, path: &str| {
        let mut file = GgufWriter::default();
        general.map(|name| file.text("general.name", name).bytes());
        model_name(&metadata(&file), Path::new(path))
    };
    assert_eq!(name(Some("Qwen2.5 0.5B Instruct"), "x.gguf"), "Qwen2.5-0.5B-Instruct");
    assert_eq!(name(Some("../../etc\n"), "x.gguf"), "etc");
    assert_eq!(name(Some("  "), "/models/tiny-q4_0.gguf"), "tiny-q4_0");
    assert_eq!(name(None, "/models/tiny-00001-of-00003.gguf"), "tiny");
    assert_eq!(name(None, "/models/…"), "model");
}
