//! Tokens to text: whole UTF-8 pieces as they become complete, and stop strings found across token borders.
//!
//! Nothing is decoded twice. Each token has its bytes in a table made at load; a stream keeps at most three bytes of an
//! unfinished character, and as much text as could still turn out to be the start of a stop string.

use std::sync::Arc;

use tokenizers::Tokenizer;

use crate::served_model::LoadError;

/// Bytes of every token of a vocabulary.
pub struct TokenTable {
    bytes: Vec<Arc<[u8]>>,
    special: Vec<bool>,
    /// Whether a text's first space was put there by the tokenizer and is no part of it.
    strips_first_space: bool,
}

/// How the vocabulary spells bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Spelling {
    /// Each byte is a printable character (GPT-2's table).
    ByteLevel,
    /// Words as they are, `▁` for a space, and `<0xNN>` for bytes without a word where `byte_fallback` says so.
    Plain { byte_fallback: bool },
    /// No decoder, or that of WordPiece: words with spaces between them.
    Words,
}

/// The decoder of a `tokenizer.json`, taken apart.
struct DecoderPlan {
    spelling: Spelling,
    /// Replacements inside each token.
    replace: Vec<(String, String)>,
    /// What a piece begins with that goes on with a word.
    continuation: Option<String>,
    strips_first_space: bool,
}

impl DecoderPlan {
    fn of(spelling: Spelling) -> Self {
        let strips_first_space = spelling == Spelling::Words;
        Self { spelling, replace: Vec::new(), continuation: None, strips_first_space }
    }

    fn read(tokenizer: &Tokenizer) -> Result<Self, LoadError> {
        let error = |why: String| LoadError { file: "tokenizer.json", why };
        let Some(decoder) = tokenizer.get_decoder() else {
            return Ok(Self::of(Spelling::Words));
        };
        let decoder = serde_json::to_value(decoder).map_err(|cause| error(cause.to_string()))?;
        let steps = match decoder["type"].as_str() {
            Some("Sequence") => decoder["decoders"].as_array().cloned().unwrap_or_default(),
            _ => vec![decoder],
        };
        let mut plan = Self::of(Spelling::Plain { byte_fallback: false });
        for step in &steps {
            match step["type"].as_str().unwrap_or_default() {
                "ByteLevel" => plan.spelling = Spelling::ByteLevel,
                "ByteFallback" => plan.spelling = Spelling::Plain { byte_fallback: true },
                "Fuse" => {}
                // What it cleans up (spaces before full stops) depends on more than a token, and stays.
                "WordPiece" if steps.len() == 1 => {
                    plan = Self::of(Spelling::Words);
                    plan.continuation = step["prefix"].as_str().filter(|prefix| !prefix.is_empty()).map(str::to_owned);
                }
                "Metaspace" => {
                    let replacement = step["replacement"].as_str().unwrap_or("▁");
                    plan.replace.push((replacement.to_owned(), " ".to_owned()));
                    plan.strips_first_space |= step["prepend_scheme"].as_str() != Some("never");
                }
                "Replace" => match (step["pattern"]["String"].as_str(), step["content"].as_str()) {
                    (Some(pattern), Some(content)) if !pattern.is_empty() => {
                        plan.replace.push((pattern.to_owned(), content.to_owned()));
                    }
                    _ => return Err(error("a decoder that replaces by a regular expression is not supported".into())),
                },
                "Strip" => match (step["content"].as_str(), step["start"].as_u64(), step["stop"].as_u64()) {
                    (Some(" "), Some(start), Some(0)) if start <= 1 => plan.strips_first_space |= start == 1,
                    _ => {
                        return Err(error("a decoder that strips more than one leading space is not supported".into()));
                    }
                },
                other => return Err(error(format!("a decoder of type {other:?} is not supported"))),
            }
        }
        Ok(plan)
    }

    fn bytes(&self, token: &str) -> Vec<u8> {
        match self.spelling {
            // A token that is not spelled in the table's characters stands for itself, as in `tokenizers`.
            Spelling::ByteLevel => {
                token.chars().map(byte_of_character).collect::<Option<Vec<u8>>>().unwrap_or_else(|| token.into())
            }
            Spelling::Plain { byte_fallback } => {
                if byte_fallback && let Some(byte) = fallback_byte(token) {
                    return vec![byte];
                }
                let mut text = token.to_owned();
                for (pattern, content) in &self.replace {
                    text = text.replace(pattern, content);
                }
                text.into_bytes()
            }
            Spelling::Words => {
                match self.continuation.as_ref().and_then(|prefix| token.strip_prefix(prefix.as_str())) {
                    Some(rest) => rest.into(),
                    None => format!(" {token}").into_bytes(),
                }
            }
        }
    }
}

/// `<0xNN>`, two hexadecimal digits and nothing else.
fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() != 2 || !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    u8::from_str_radix(digits, 16).ok()
}

/// The byte that a character stands for in GPT-2's table: printable Latin-1 stands for itself, the other bytes follow
/// from U+0100 on in order.
fn byte_of_character(character: char) -> Option<u8> {
    match u32::from(character) {
        code @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => u8::try_from(code).ok(),
        code @ 0x100..=0x120 => u8::try_from(code - 0x100).ok(),
        code @ 0x121..=0x142 => u8::try_from(code - 0x121 + 0x7f).ok(),
        0x143 => Some(0xad),
        _ => None,
    }
}

impl TokenTable {
    /// The table of a tokenizer for a model with `vocab_size` rows.
    pub fn build(tokenizer: &Tokenizer, vocab_size: u32) -> Result<Self, LoadError> {
        let plan = DecoderPlan::read(tokenizer)?;
        let added = tokenizer.get_added_tokens_decoder();
        let highest_added = added.keys().max().map_or(0, |id| *id as usize + 1);
        let len = (vocab_size as usize).max(tokenizer.get_vocab_size(true)).max(highest_added);
        let empty: Arc<[u8]> = Arc::from([]);
        let mut table =
            Self { bytes: vec![empty; len], special: vec![false; len], strips_first_space: plan.strips_first_space };
        for (token, id) in tokenizer.get_vocab(false) {
            if let Some(bytes) = table.bytes.get_mut(id as usize) {
                *bytes = plan.bytes(&token).into();
            }
        }
        for (id, token) in added {
            // Added tokens are written as they are, but for the spaces between words.
            let content =
                if plan.spelling == Spelling::Words { plan.bytes(&token.content) } else { token.content.into() };
            table.bytes[id as usize] = content.into();
            table.special[id as usize] = token.special;
        }
        Ok(table)
    }

    /// Adds rows without bytes up to `vocab_size`.
    pub fn cover(&mut self, vocab_size: u32) {
        if self.bytes.len() < vocab_size as usize {
            self.bytes.resize(vocab_size as usize, Arc::from([]));
            self.special.resize(vocab_size as usize, false);
        }
    }

    /// The token's bytes; none for a row of the model that the tokenizer does not know.
    pub fn bytes(&self, id: u32) -> Arc<[u8]> {
        self.bytes.get(id as usize).cloned().unwrap_or_else(|| Arc::from([]))
    }

    /// Whether the token marks structure and not text.
    pub fn is_special(&self, id: u32) -> bool {
        self.special.get(id as usize).copied().unwrap_or(false)
    }

    /// The special token that is spelled so.
    pub fn special_id(&self, text: &str) -> Option<u32> {
        (0..self.special.len()).find(|id| self.special[*id] && *self.bytes[*id] == *text.as_bytes()).map(|id| id as u32)
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// How many characters of the text of a whole run each of its tokens completes.
    pub fn num_chars(self: &Arc<Self>, ids: &[u32], special_tokens: SpecialTokenText) -> Vec<u32> {
        let mut detokenizer = Detokenizer::new(Arc::clone(self), Start::OfText, special_tokens);
        let mut text = String::new();
        let count = |id: &u32| {
            text.clear();
            detokenizer.push(*id, &mut text);
            text.chars().count() as u32
        };
        ids.iter().map(count).collect()
    }

    /// The text of a whole run of tokens.
    pub fn decode(self: &Arc<Self>, ids: &[u32], special_tokens: SpecialTokenText) -> String {
        let mut detokenizer = Detokenizer::new(Arc::clone(self), Start::OfText, special_tokens);
        let mut text = String::new();
        for id in ids {
            detokenizer.push(*id, &mut text);
        }
        detokenizer.finish(&mut text);
        text
    }
}

/// Where decoding starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// At the start of a text: a space that the tokenizer put before its first word is dropped.
    OfText,
    /// Behind a prompt: that space belongs to the text.
    BehindPrompt,
}

/// What becomes of special tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpecialTokenText {
    Skipped,
    Written,
}

/// Turns one stream of tokens into text.
pub struct Detokenizer {
    table: Arc<TokenTable>,
    special_tokens: SpecialTokenText,
    /// Special tokens that are written in any case.
    shown: Arc<[u32]>,
    /// The start of a character whose other bytes have not come.
    carry: [u8; 4],
    carry_len: usize,
    strip_next_space: bool,
}

impl Detokenizer {
    pub fn new(table: Arc<TokenTable>, start: Start, special_tokens: SpecialTokenText) -> Self {
        let strip_next_space = start == Start::OfText && table.strips_first_space;
        Self { table, special_tokens, shown: Arc::from([]), carry: [0; 4], carry_len: 0, strip_next_space }
    }

    /// Writes these special tokens in any case.
    #[must_use]
    pub fn showing(mut self, token_ids: Arc<[u32]>) -> Self {
        self.shown = token_ids;
        self
    }

    /// Appends the characters that this token completes.
    pub fn push(&mut self, id: u32, text: &mut String) {
        let table = Arc::clone(&self.table);
        let Some(bytes) = table.bytes.get(id as usize) else { return };
        if self.special_tokens == SpecialTokenText::Skipped && table.is_special(id) && !self.shown.contains(&id) {
            return;
        }
        let mut bytes: &[u8] = bytes;
        if self.strip_next_space && !bytes.is_empty() {
            self.strip_next_space = false;
            bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
        }
        if self.carry_len == 0 {
            self.push_bytes(bytes, text);
        } else {
            let mut joined = Vec::with_capacity(self.carry_len + bytes.len());
            joined.extend_from_slice(&self.carry[..self.carry_len]);
            joined.extend_from_slice(bytes);
            self.carry_len = 0;
            self.push_bytes(&joined, text);
        }
    }

    /// The end of the stream: an unfinished character becomes U+FFFD.
    pub fn finish(&mut self, text: &mut String) {
        if std::mem::take(&mut self.carry_len) > 0 {
            text.push(char::REPLACEMENT_CHARACTER);
        }
    }

    fn push_bytes(&mut self, mut bytes: &[u8], text: &mut String) {
        loop {
            match std::str::from_utf8(bytes) {
                Ok(valid) => {
                    text.push_str(valid);
                    return;
                }
                Err(error) => {
                    let (valid, rest) = bytes.split_at(error.valid_up_to());
                    text.push_str(std::str::from_utf8(valid).unwrap_or_default());
                    match error.error_len() {
                        Some(len) => {
                            text.push(char::REPLACEMENT_CHARACTER);
                            bytes = &rest[len..];
                        }
                        // An unfinished character has at most three bytes.
                        None => {
                            self.carry[..rest.len()].copy_from_slice(rest);
                            self.carry_len = rest.len();
                            return;
                        }
                    }
                }
            }
        }
    }
}

/// A stop string was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StopMatch {
    /// Which of the stop strings.
    pub index: usize,
}

/// Looks for stop strings in a stream of text, and holds back what could become one.
///
/// The string that is complete first ends the text; of several that end at the same character the longest. One automaton
/// for each string (Knuth, Morris and Pratt 1977), a step for each byte: no text is looked at twice.
pub struct StopMatcher {
    stops: Arc<[StopString]>,
    /// How many bytes of each string the text ends with.
    matched: Vec<usize>,
    held: String,
    include_in_output: bool,
}

/// A stop string, ready to be looked for.
pub struct StopString {
    text: String,
    /// Length of the longest proper prefix that the first i + 1 bytes end with.
    fallback: Vec<usize>,
}

impl StopString {
    /// `text` must not be empty.
    pub fn new(text: String) -> Self {
        let bytes = text.as_bytes();
        let mut fallback = vec![0; bytes.len()];
        let mut len = 0;
        for index in 1..bytes.len() {
            while len > 0 && bytes[index] != bytes[len] {
                len = fallback[len - 1];
            }
            if bytes[index] == bytes[len] {
                len += 1;
            }
            fallback[index] = len;
        }
        Self { text, fallback }
    }

    pub fn text(&self) -> &str {
        &self.text
    }

    fn advance(&self, mut matched: usize, byte: u8) -> usize {
        let bytes = self.text.as_bytes();
        while matched > 0 && (matched == bytes.len() || bytes[matched] != byte) {
            matched = self.fallback[matched - 1];
        }
        if bytes.get(matched) == Some(&byte) { matched + 1 } else { matched }
    }
}

/// Whether a stop string that is complete ends the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopAllowed {
    Yes,
    /// Fewer tokens than `min_tokens` so far.
    NotYet,
}

impl StopMatcher {
    pub fn new(stops: Arc<[StopString]>, include_in_output: bool) -> Self {
        let matched = vec![0; stops.len()];
        Self { stops, matched, held: String::new(), include_in_output }
    }

    /// Takes new text and appends what is safe to send. After a match the rest of the text is dropped and nothing more
    /// may be pushed.
    pub fn push(&mut self, new: &str, allowed: StopAllowed, out: &mut String) -> Option<StopMatch> {
        if self.stops.is_empty() {
            out.push_str(new);
            return None;
        }
        let before = self.held.len();
        self.held.push_str(new);
        for (offset, byte) in new.bytes().enumerate() {
            let mut found: Option<(usize, usize)> = None;
            for (index, stop) in self.stops.iter().enumerate() {
                let matched = stop.advance(self.matched[index], byte);
                self.matched[index] = matched;
                if matched == stop.text.len() && found.is_none_or(|(_, len)| len < matched) {
                    found = Some((index, matched));
                }
            }
            if let Some((index, len)) = found
                && allowed == StopAllowed::Yes
            {
                let end = before + offset + 1;
                let keep = if self.include_in_output { end } else { end.saturating_sub(len) };
                out.push_str(self.held.get(..keep).unwrap_or_default());
                self.held.clear();
                return Some(StopMatch { index });
            }
        }
        // What a string's automaton has matched may still become that string.
        let hold = self
            .stops
            .iter()
            .zip(&self.matched)
            .map(|(stop, matched)| if *matched == stop.text.len() { stop.fallback[matched - 1] } else { *matched })
            .max()
            .unwrap_or(0);
        let send = self.held.len() - hold;
        out.push_str(self.held.get(..send).unwrap_or_default());
        self.held.drain(..send);
        None
    }

    /// The end of the stream: nothing more can complete a stop string.
    pub fn finish(&mut self, out: &mut String) {
        out.push_str(&self.held);
        self.held.clear();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DEMO: &[u8] = include_bytes!("../demo/tokenizer.json");

    fn demo() -> (Tokenizer, Arc<TokenTable>) {
        let tokenizer = Tokenizer::from_bytes(DEMO).expect("the demo tokenizer loads");
        let table = TokenTable::build(&tokenizer, 0).expect("its decoder is supported");
        (tokenizer, Arc::new(table))
    }

    /// A vocabulary as SentencePiece writes it: `▁` for spaces, bytes for what has no piece.
    fn sentencepiece() -> (Tokenizer, Arc<TokenTable>) {
        let bytes: Vec<String> = (0..=255u8).map(|byte| format!("\"<0x{byte:02X}>\":{}", byte as u32 + 3)).collect();
        let json = format!(
            r#"{{"version":"1.0","truncation":null,"padding":null,
            "added_tokens":[{{"id":0,"content":"<unk>","single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":true}},
                {{"id":1,"content":"<s>","single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":true}},
                {{"id":2,"content":"</s>","single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":true}}],
            "normalizer":null,
            "pre_tokenizer":{{"type":"Metaspace","replacement":"▁","prepend_scheme":"first","split":false}},
            "post_processor":{{"type":"TemplateProcessing","single":[{{"SpecialToken":{{"id":"<s>","type_id":0}}}},{{"Sequence":{{"id":"A","type_id":0}}}}],
                "pair":[{{"Sequence":{{"id":"A","type_id":0}}}},{{"Sequence":{{"id":"B","type_id":1}}}}],
                "special_tokens":{{"<s>":{{"id":"<s>","ids":[1],"tokens":["<s>"]}}}}}},
            "decoder":{{"type":"Sequence","decoders":[{{"type":"Replace","pattern":{{"String":"▁"}},"content":" "}},{{"type":"ByteFallback"}},
                {{"type":"Fuse"}},{{"type":"Strip","content":" ","start":1,"stop":0}}]}},
            "model":{{"type":"BPE","dropout":null,"unk_token":"<unk>","continuing_subword_prefix":null,"end_of_word_suffix":null,
                "fuse_unk":true,"byte_fallback":true,"ignore_merges":false,
                "vocab":{{"<unk>":0,"<s>":1,"</s>":2,{},"▁":259,"a":260,"b":261,"▁a":262,"ab":263,"▁ab":264}},
                "merges":["▁ a","a b","▁a b"]}}}}"#,
            bytes.join(",")
        );
        let tokenizer = Tokenizer::from_bytes(json.as_bytes()).expect("the tokenizer loads");
        let table = TokenTable::build(&tokenizer, 0).expect("its decoder is supported");
        (tokenizer, Arc::new(table))
    }

    #[test]
    fn byte_characters_cover_every_byte_once() {
        let mut seen: Vec<u8> = (0..0x200u32).filter_map(char::from_u32).filter_map(byte_of_character).collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..=255).collect::<Vec<u8>>());
    }

    #[test]
    fn only_two_digits_spell_a_byte() {
        assert_eq!(fallback_byte("<0x0A>"), Some(10));
        for token in ["<0x-1>", "<0x+1>", "<0xA>", "<0x0AB>", "<0xGG>", "0x0A"] {
            assert_eq!(fallback_byte(token), None, "{token}");
        }
    }

    #[test]
    fn first_space_belongs_to_text_behind_a_prompt_only() {
        let (_, table) = sentencepiece();
        let text = |start| {
            let mut detokenizer = Detokenizer::new(Arc::clone(&table), start, SpecialTokenText::Skipped);
            let mut text = String::new();
            [264, 262].into_iter().for_each(|id| detokenizer.push(id, &mut text));
            text
        };
        assert_eq!(text(Start::OfText), "ab a");
        assert_eq!(text(Start::BehindPrompt), " ab a");
    }

    #[test]
    fn characters_come_whole() {
        let (_, table) = sentencepiece();
        let mut detokenizer = Detokenizer::new(table, Start::BehindPrompt, SpecialTokenText::Skipped);
        let mut pieces = Vec::new();
        // U+1F600 as four byte tokens, then half of a character that never ends.
        for byte in [0xf0u8, 0x9f, 0x98, 0x80, 0xe2, 0x82] {
            let mut text = String::new();
            detokenizer.push(u32::from(byte) + 3, &mut text);
            pieces.push(text);
        }
        assert_eq!(pieces, ["", "", "", "\u{1f600}", "", ""]);
        let mut text = String::new();
        detokenizer.finish(&mut text);
        assert_eq!(text, "\u{fffd}");
    }

    #[test]
    fn unknown_rows_have_no_text() {
        let (_, table) = demo();
        assert!(table.bytes(u32::MAX).is_empty());
        assert_eq!(table.decode(&[u32::MAX, 1, 16], SpecialTokenText::Skipped), "!");
        assert_eq!(table.decode(&[1, 16], SpecialTokenText::Written), "<|im_start|>!");
    }

    /// Pushes `text` in pieces and gives what came out, with the matched string's index.
    fn matched(stops: &[&str], pieces: &[&str], include: bool) -> (String, Option<usize>) {
        let stops: Arc<[StopString]> = stops.iter().map(|stop| StopString::new((*stop).to_owned())).collect();
        let mut matcher = StopMatcher::new(stops, include);
        let mut out = String::new();
        for piece in pieces {
            if let Some(found) = matcher.push(piece, StopAllowed::Yes, &mut out) {
                return (out, Some(found.index));
            }
        }
        matcher.finish(&mut out);
        (out, None)
    }

    #[test]
    fn stop_strings() {
        let check = |stops: &[&str], pieces: &[&str], text: &str, found: Option<usize>| {
            assert_eq!(matched(stops, pieces, false), (text.to_owned(), found), "{stops:?} {pieces:?}");
        };
        check(&["END"], &["a E", "N", "Dx"], "a ", Some(0));
        check(&["END"], &["a E", "N", "N"], "a ENN", None);
        check(&["aab"], &["aa", "aa", "b"], "aa", Some(0));
        check(&["abc", "b"], &["xab", "c"], "xa", Some(1));
        // Of two that end together the longer one, so that none of it is sent.
        check(&["c", "abc"], &["xabc"], "x", Some(1));
        check(&["é!"], &["caf", "é", "!"], "caf", Some(0));
        check(&[], &["any"], "any", None);
        assert_eq!(matched(&["END"], &["a E", "NDx"], true), ("a END".to_owned(), Some(0)));
    }

    #[test]
    fn stop_strings_wait_for_min_tokens() {
        let stops: Arc<[StopString]> = [StopString::new("aa".to_owned())].into();
        let mut matcher = StopMatcher::new(stops, false);
        let mut out = String::new();
        assert_eq!(matcher.push("xaa", StopAllowed::NotYet, &mut out), None);
        assert_eq!(out, "xa");
        assert_eq!(matcher.push("b", StopAllowed::Yes, &mut out), None);
        assert_eq!(out, "xaab");
        assert!(matcher.push("aa", StopAllowed::Yes, &mut out).is_some());
        assert_eq!(out, "xaab");
    }

    /// What the matcher should do, looking at the whole text again for each character.
    fn naive(stops: &[String], text: &str) -> (String, Option<usize>) {
        for end in (0..=text.len()).filter(|end| text.is_char_boundary(*end)) {
            let ending = |stop: &&(usize, &String)| text[..end].ends_with(stop.1.as_str());
            let found: Vec<(usize, &String)> = stops.iter().enumerate().collect();
            if let Some((index, stop)) =
                found.iter().filter(ending).max_by_key(|(index, stop)| (stop.len(), usize::MAX - index))
            {
                return (text[..end - stop.len()].to_owned(), Some(*index));
            }
        }
        (text.to_owned(), None)
    }

    /// Cuts a list in pieces.
    fn cut<T: Clone>(items: &[T], cuts: &[usize]) -> Vec<Vec<T>> {
        let mut pieces = Vec::new();
        let mut rest = items;
        for cut in cuts {
            let (piece, behind) = rest.split_at((*cut).min(rest.len()));
            pieces.push(piece.to_vec());
            rest = behind;
        }
        pieces.push(rest.to_vec());
        pieces
    }

    proptest! {
        #[test]
        fn streamed_text_is_the_decoded_text(ids in prop::collection::vec(0u32..3072, 0..64)) {
            let (tokenizer, table) = demo();
            let ids: Vec<u32> = ids.into_iter().filter(|id| tokenizer.id_to_token(*id).is_some()).collect();
            for (special_tokens, skip) in [(SpecialTokenText::Skipped, true), (SpecialTokenText::Written, false)] {
                let whole = tokenizer.decode(&ids, skip).expect("decodes");
                prop_assert_eq!(table.decode(&ids, special_tokens), whole);
            }
        }

        #[test]
        fn sentencepiece_text_is_the_decoded_text(text in "[ab é\u{1f600}\n]{0,24}") {
            let (tokenizer, table) = sentencepiece();
            let ids = tokenizer.encode_fast(text.as_str(), false).expect("encodes").get_ids().to_vec();
            let whole = tokenizer.decode(&ids, true).expect("decodes");
            prop_assert_eq!(table.decode(&ids, SpecialTokenText::Skipped), whole);
        }

        #[test]
        fn stop_strings_do_not_depend_on_token_borders(
            text in "[abé]{0,24}",
            stops in prop::collection::vec("[abé]{1,4}", 0..4),
            cuts in prop::collection::vec(0usize..5, 0..12),
        ) {
            let characters: Vec<char> = text.chars().collect();
            let pieces: Vec<String> = cut(&characters, &cuts).iter().map(|piece| piece.iter().collect()).collect();
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            let names: Vec<&str> = stops.iter().map(String::as_str).collect();
            prop_assert_eq!(matched(&names, &pieces, false), naive(&stops, &text));
        }
    }
}
