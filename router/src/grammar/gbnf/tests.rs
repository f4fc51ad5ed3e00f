//! Grammars against a recogniser that is nothing but their meaning, over all short texts.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use quire_engine::Grammar as _;

use super::super::{GrammarError, GrammarLimits, GrammarSource, Grammars, OutputFormat, Vocabulary};
use super::parse::parse;
use super::{Expr, Rules, is_gbnf, to_lark};
use crate::detokenizer::TokenTable;
use crate::tokenizer::TextTokenizer;

/// The demo model's tokens, and the one that ends a sequence.
struct Tokens {
    table: Arc<TokenTable>,
    grammars: Grammars,
}

const VOCAB: u32 = 3072;
const EOS: u32 = 2;

impl Tokens {
    fn new() -> Self {
        let json = include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/demo/tokenizer.json"));
        let table = Arc::clone(TextTokenizer::load(json, VOCAB).expect("loads").table());
        let limits = GrammarLimits { compile_timeout_ms: 60_000, ..GrammarLimits::default() };
        let vocabulary = Vocabulary::new(&table, VOCAB, &[EOS], limits.parser_limits()).map(Arc::new);
        Self { table, grammars: Grammars::new(vocabulary, limits) }
    }

    async fn allowed(&self, grammar: &str, texts: &[String]) -> Result<Vec<bool>, String> {
        let limits = GrammarLimits::default();
        let format = OutputFormat::Gbnf(grammar.into());
        let source = GrammarSource::of(&format, &limits).map_err(|error| error.to_string())?;
        let compiled = self.grammars.compile("grammar", "r", source).await.map_err(|error| error.to_string())?;
        let id_of: HashMap<Vec<u8>, u32> =
            (0..VOCAB).filter(|id| !self.table.is_special(*id)).map(|id| (self.table.bytes(id).to_vec(), id)).collect();
        let is_allowed = |text: &String| {
            let mut follower = compiled.begin();
            let ids = text.bytes().map(|byte| id_of[&vec![byte]]);
            let mut mask = vec![0; VOCAB as usize / 32];
            for id in ids {
                mask.fill(0);
                let may = follower.mask(&mut mask).is_ok() && mask[id as usize / 32] & (1 << (id % 32)) != 0;
                if follower.advance(id).is_err() {
                    assert!(!may, "{grammar}: the mask allows what is refused, in {text:?}");
                    return false;
                }
                assert!(may, "{grammar}: the mask refuses what is allowed, in {text:?}");
            }
            mask.fill(0);
            follower.mask(&mut mask).is_ok() && mask[0] & (1 << EOS) != 0
        };
        Ok(texts.iter().map(is_allowed).collect())
    }
}

/// Where a match of `expr` that begins at `at` can end.
fn ends(expr: &Expr, text: &[char], at: usize, known: &Known) -> BTreeSet<usize> {
    match expr {
        Expr::Empty => [at].into(),
        Expr::Chars(ranges) => match text.get(at) {
            Some(next) if ranges.iter().any(|(first, last)| (first..=last).contains(&next)) => [at + 1].into(),
            _ => [].into(),
        },
        Expr::Seq(items) => items.iter().fold([at].into(), |ends_of, item| {
            ends_of.into_iter().flat_map(|at: usize| ends(item, text, at, known)).collect()
        }),
        Expr::Any(items) => items.iter().flat_map(|item| ends(item, text, at, known)).collect(),
        Expr::Repeat(item, least, most) => {
            let (mut all, mut now): (BTreeSet<usize>, BTreeSet<usize>) = (BTreeSet::new(), [at].into());
            for round in 0..=most.unwrap_or(least + text.len() as u32 + 1) {
                if round >= *least {
                    all.extend(&now);
                }
                now = now.into_iter().flat_map(|at| ends(item, text, at, known)).collect();
            }
            all
        }
        Expr::Rule(index) => known.get(&(*index, at)).cloned().unwrap_or_default(),
    }
}

type Known = HashMap<(usize, usize), BTreeSet<usize>>;

/// Whether the whole text is one of the grammar's: what is known of each rule grows until nothing new comes.
fn means(rules: &Rules, text: &str) -> bool {
    let text: Vec<char> = text.chars().collect();
    let mut known = Known::new();
    loop {
        let mut next = Known::new();
        for (index, body) in rules.bodies.iter().enumerate() {
            for at in 0..=text.len() {
                next.insert((index, at), ends(body, &text, at, &known));
            }
        }
        if next == known {
            return known[&(rules.root, 0)].contains(&text.len());
        }
        known = next;
    }
}

/// All texts of up to so many of these characters.
fn texts(characters: &str, len: usize) -> Vec<String> {
    let mut all = vec![String::new()];
    let mut begin = 0;
    for _ in 0..len {
        let end = all.len();
        for index in begin..end {
            let shorter = all[index].clone();
            all.extend(characters.chars().map(|character| format!("{shorter}{character}")));
        }
        begin = end;
    }
    all
}

#[tokio::test]
async fn exactly_the_texts_of_a_grammar_are_allowed() {
    let tokens = Tokens::new();
    for (grammar, characters, len) in [
        ("root ::= \"a\" | \"ab\" | \"c\"+", "abc", 4),
        // What a lexer that takes the longest would lose.
        ("root ::= x \"b\"\nx ::= \"a\" | \"ab\"", "ab", 4),
        ("root ::= x \"ab\" | \"(\" root \")\"\nx ::= [a-b]+", "ab()", 5),
        ("root ::= word (\" \" word)* \"!\"?\nword ::= [a-c]{1,2}", "ac !", 5),
        ("root ::= \"[\" (root (\",\" root)*)? \"]\" # lists", "[],", 6),
        ("root ::= \"a\" root \"b\" | \"\"", "ab", 6),
        ("root ::= root \"a\" | \"b\"", "ab", 5),
        ("root ::= a a a\na ::= \"a\" | ", "a", 5),
        ("root ::= (\"a\" |\n  \"b\" # one or\n  | [^a-z!]){2,3}", "ab!\n", 4),
        ("root ::= \"a\"{2} b{0,1}\r\nb ::= \"b\"{2,}", "ab", 6),
        ("root ::= \"\\x61\\u0062\" . \"\\\"\\\\\\n\\t\" | [\\]\\-^]", "ab\"\\\n\t]-^", 3),
        ("root ::= expr\nexpr ::= expr \"+\" expr | \"(\" expr \")\" | [0-1]", "01+()", 5),
        ("root ::= item+\nitem ::= [a-b]+ | \"<\" item* \">\"", "ab<>", 5),
        ("root ::= ws \"a\" ws\nws ::= ([ \\n] ws)?", "a \n", 5),
        ("root ::= (\"a\"?)* \"b\"", "ab", 4),
        ("root ::= \"é\" | \"e\"", "e", 2),
    ] {
        let rules = parse(grammar, &GrammarLimits::default()).unwrap_or_else(|error| panic!("{grammar}: {error}"));
        let texts = texts(characters, len);
        let allowed = tokens.allowed(grammar, &texts).await.unwrap_or_else(|error| panic!("{grammar}: {error}"));
        for (text, is_allowed) in texts.iter().zip(allowed) {
            assert_eq!(is_allowed, means(&rules, text), "{grammar}: {text:?}");
        }
    }
}

#[test]
fn a_refusal_names_the_place() {
    for (grammar, at) in [
        ("root := \"a\"", "line 1, column 6: `::=`"),
        ("root ::= \"a\"\nb \"x\"", "line 2, column 3: `::=`"),
        ("root ::= a\n# b\n  ", "line 1, column 10: a rule of this name is not defined"),
        ("root ::= \"a", "line 1, column 10: a text"),
        ("root ::= \"a\nb\"", "line 1, column 10: a text"),
        ("root ::= é", "line 1, column 10: nothing"),
        ("root ::= (\"a\" | (\"b\")\n", "line 2, column 1: `)`"),
        ("root ::= [a", "line 1, column 10: a class"),
        ("root ::= [a-", "line 1, column 13: a character"),
        ("root ::= [b-a]", "line 1, column 14: a range"),
        ("root ::= []", "line 1, column 10: a class that no"),
        ("root ::= [^\\x00-\\U0010FFFF]", "line 1, column 10: a class that no"),
        ("root ::= \"\\q\"", "line 1, column 11: this escape is not known"),
        ("root ::= \"\\x6\"", "line 1, column 11: this escape is no"),
        ("root ::= \"\\uD800\"", "line 1, column 11: this escape is no"),
        ("root ::= \"\\", "line 1, column 11: a character"),
        ("root ::= \"a\"{,2}", "line 1, column 14: a whole number"),
        ("root ::= \"a\"{3,2}", "line 1, column 17: a repetition"),
        ("root ::= \"a\"{3", "line 1, column 15: `}`"),
        ("root ::= \"a\" )", "line 1, column 14: nothing"),
        ("root ::= * \"a\"", "line 1, column 10: nothing"),
        ("root ::= <[12]>", "line 1, column 10: tokens"),
        ("root ::= \"a\"\nroot ::= \"b\"", "line 2, column 1: a rule of this name is defined"),
        ("start ::= \"a\"", "`root`"),
        ("", "`root`"),
    ] {
        let error = to_lark(grammar, &GrammarLimits::default()).expect_err(grammar).to_string();
        assert!(error.contains(at), "{grammar}: {error}");
    }
}

/// Bounds and fuel end each, without the clock: here it is set so that it never does.
#[tokio::test]
async fn hostile_grammars_end() {
    let tokens = Tokens::new();
    let chain = |len: usize, last: &str| {
        let rules: Vec<String> = (0..len).map(|index| format!("a{index} ::= a{} a{}", index + 1, index + 1)).collect();
        format!("root ::= a0\n{}\na{len} ::= {last}", rules.join("\n"))
    };
    let hostile = [
        format!("root ::= {}\"a\"{}", "(".repeat(100_000), ")".repeat(100_000)),
        format!("root ::= \"a\"{}", "*".repeat(100_000)),
        format!("root ::= \"a\"{}", "{60000}".repeat(20)),
        "root ::= \"a\"{999999999999}".to_owned(),
        chain(60, "\"a\""),
        chain(60, "\"a\" | root"),
        chain(1000, "\"a\"?"),
        chain(2000, "\"a\""),
        "root ::= root".to_owned(),
        "root ::= a b\na ::= b a\nb ::= a b".to_owned(),
        "root ::= root root | \"a\" | \"\"".to_owned(),
        "root ::= (((\"a\"*)*)*)*".to_owned(),
        "root ::= ([a-z]* [a-z]* [a-z]* [a-z]* [a-z]*){1,1000} \"!\"".to_owned(),
        format!("root ::= {}", "\"a\" | ".repeat(30_000)),
        format!("root ::= [{}]", "a-z".repeat(30_000)),
        format!("root ::= {}", (0..3000).map(|index| format!("x{index} ")).collect::<String>()),
        "root ::= .{0,60000} \"x\" .{0,60000} \"y\"".to_owned(),
    ];
    for grammar in &hostile {
        let answer = tokens.allowed(grammar, &["a".to_owned()]).await;
        let short: String = grammar.chars().take(60).collect();
        if let Err(why) = answer {
            assert!(why.len() < 200, "{short}: {why}");
        }
    }
    // Nothing is in this language, and that is a refusal and not an answer.
    assert!(tokens.allowed("root ::= root", &[]).await.is_err());
    let large = format!("root ::= \"{}\"", "a".repeat(300 << 10));
    let error = GrammarSource::of(&OutputFormat::Gbnf(large.into()), &GrammarLimits::default());
    assert!(matches!(error, Err(GrammarError::TooLarge { .. })), "{error:?}");
}

#[test]
fn the_form_shows_in_the_first_rule() {
    assert!(is_gbnf("# a comment\n\n root ::= \"a\"") && is_gbnf("root::=x"));
    assert!(!is_gbnf("start: NAME \"::=\" NAME\nNAME: /[a-z]+/") && !is_gbnf("") && !is_gbnf("%import x"));
}
