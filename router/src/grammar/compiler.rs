//! Compiles grammars beside the async threads, within budgets, and keeps what it compiled.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use llguidance::Matcher;
use llguidance::api::{ParserLimits, StopReason};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::sync::{Semaphore, oneshot};

use super::warm::warmed;
use super::{CompiledGrammar, GrammarError, GrammarSource, Vocabulary};
use crate::error::ApiError;

/// Stack of a thread that compiles: it recurses over what callers wrote, whose nesting is bounded before. Only what is used
/// of it is ever resident.
const STACK_BYTES: usize = 64 << 20;

/// What a grammar may cost. One that would cost more is refused by name, before anything is generated.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GrammarLimits {
    /// Bytes of a schema, a regular expression, a list of choices or a grammar.
    pub max_bytes: usize,
    /// Deepest nesting of a schema's arrays and objects, and of the groups of a regular expression or a grammar.
    pub max_depth: usize,
    /// Bytes of one regular expression.
    pub max_regex_bytes: usize,
    /// Values in a schema, or choices.
    pub max_nodes: usize,
    /// Largest `minLength`, `maxLength`, `minItems`, `maxItems`, `minProperties` and `maxProperties`.
    pub max_repeats: u64,
    /// Milliseconds that compiling may take; the request that waits for it is refused then.
    pub compile_timeout_ms: u64,
    /// Grammars compiled at once; 0 is half of the cores. Each takes a thread.
    pub max_concurrent_compiles: usize,
    /// Requests that may wait for a grammar to be compiled; past it callers get 429.
    pub max_waiting_compiles: usize,
    /// Steps that building a grammar's automaton may take: this, and not the clock, bounds its memory and time.
    pub compile_fuel: u64,
    /// Parts of a compiled grammar.
    pub max_grammar_size: usize,
    /// Steps that computing one mask may take. More allows more complex grammars; a step of the engine can take longer.
    pub step_fuel: u64,
    /// Parser items that one mask may look at.
    pub step_items: usize,
    /// States of one choice's automaton, some hundred bytes each.
    pub max_automaton_states: usize,
    /// Bytes of compiled grammars that are kept for later requests, estimated from their text and their automata.
    pub cache_bytes: usize,
}

impl Default for GrammarLimits {
    fn default() -> Self {
        Self {
            max_bytes: 256 << 10,
            max_depth: 64,
            max_regex_bytes: 8 << 10,
            max_nodes: 16_384,
            max_repeats: 65_536,
            compile_timeout_ms: 200,
            max_concurrent_compiles: 0,
            max_waiting_compiles: 256,
            compile_fuel: 400_000,
            max_grammar_size: 200_000,
            step_fuel: 200_000,
            step_items: 20_000,
            max_automaton_states: 50_000,
            cache_bytes: 64 << 20,
        }
    }
}

impl GrammarLimits {
    /// Fails with the first setting that cannot work and why.
    pub fn validate(&self) -> Result<(), (&'static str, &'static str)> {
        let at_least_one = [
            ("max_bytes", self.max_bytes as u64),
            ("max_depth", self.max_depth as u64),
            ("max_regex_bytes", self.max_regex_bytes as u64),
            ("max_nodes", self.max_nodes as u64),
            ("compile_timeout_ms", self.compile_timeout_ms),
            ("max_waiting_compiles", self.max_waiting_compiles as u64),
            ("compile_fuel", self.compile_fuel),
            ("max_grammar_size", self.max_grammar_size as u64),
            ("step_fuel", self.step_fuel),
            ("step_items", self.step_items as u64),
            ("max_automaton_states", self.max_automaton_states as u64),
        ];
        match at_least_one.into_iter().find(|(_, value)| *value == 0) {
            Some((field, _)) => Err((field, "must be at least 1")),
            None if self.compile_timeout_ms > 60_000 => Err(("compile_timeout_ms", "must be at most 60000")),
            None => Ok(()),
        }
    }

    pub(crate) fn parser_limits(&self) -> ParserLimits {
        ParserLimits {
            initial_lexer_fuel: self.compile_fuel,
            step_lexer_fuel: self.step_fuel,
            step_max_items: self.step_items,
            max_lexer_states: self.max_automaton_states,
            max_grammar_size: self.max_grammar_size,
            // Their errors would repeat the grammar.
            verbose_errors: false,
            ..ParserLimits::default()
        }
    }
}

type Compiled = Result<Arc<CompiledGrammar>, GrammarError>;

/// Compiles and keeps the grammars of one model.
pub struct Grammars {
    shared: Arc<Shared>,
    permits: Arc<Semaphore>,
    waiting: AtomicUsize,
}

struct Shared {
    vocabulary: Option<Arc<Vocabulary>>,
    limits: GrammarLimits,
    cache: Mutex<Cache>,
}

/// What was compiled or refused, by the hash of its source. The least recently used go first.
#[derive(Default)]
struct Cache {
    entries: HashMap<[u8; 32], Entry>,
    bytes: usize,
    clock: u64,
}

struct Entry {
    compiled: Compiled,
    bytes: usize,
    used_at: u64,
}

impl Cache {
    fn get(&mut self, key: &[u8; 32]) -> Option<Compiled> {
        self.clock += 1;
        let entry = self.entries.get_mut(key)?;
        entry.used_at = self.clock;
        Some(entry.compiled.clone())
    }

    fn put(&mut self, key: [u8; 32], compiled: Compiled, bytes: usize, limit: usize) {
        if bytes > limit {
            return;
        }
        self.clock += 1;
        if let Some(old) = self.entries.insert(key, Entry { compiled, bytes, used_at: self.clock }) {
            self.bytes -= old.bytes;
        }
        self.bytes += bytes;
        while self.bytes > limit {
            let Some((key, bytes)) =
                self.entries.iter().min_by_key(|(_, entry)| entry.used_at).map(|(k, e)| (*k, e.bytes))
            else {
                break;
            };
            self.entries.remove(&key);
            self.bytes -= bytes;
        }
    }
}

impl Shared {
    fn cache(&self) -> MutexGuard<'_, Cache> {
        // Whole at every moment.
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Grammars {
    /// `vocabulary` is `None` where the model's outputs cannot end, and so cannot obey a grammar.
    pub fn new(vocabulary: Option<Arc<Vocabulary>>, limits: GrammarLimits) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let at_once = match limits.max_concurrent_compiles {
            0 => cores.div_ceil(2),
            chosen => chosen,
        };
        Self {
            permits: Arc::new(Semaphore::new(at_once.min(Semaphore::MAX_PERMITS))),
            waiting: AtomicUsize::new(0),
            shared: Arc::new(Shared { vocabulary, limits, cache: Mutex::default() }),
        }
    }

    /// The grammar of a source, compiled now or before. A refusal names `param`.
    pub(crate) async fn compile(
        &self,
        param: &str,
        request_id: &str,
        source: GrammarSource,
    ) -> Result<Arc<CompiledGrammar>, ApiError> {
        struct Waiting<'p>(&'p AtomicUsize);
        impl Drop for Waiting<'_> {
            fn drop(&mut self) {
                self.0.fetch_sub(1, Ordering::Relaxed);
            }
        }
        let refused = |error: GrammarError| error.at(param);
        let Some(vocabulary) = self.shared.vocabulary.clone() else {
            let why = "cannot be enforced: the model has no token that ends its output".to_owned();
            return Err(refused(GrammarError::Invalid { why }));
        };
        let text = source.key();
        let key: [u8; 32] = Sha256::digest(text.as_bytes()).into();
        if let Some(compiled) = self.shared.cache().get(&key) {
            return compiled.map_err(refused);
        }
        let internal = || {
            tracing::error!(request_id, "compiling a grammar ended without a result");
            ApiError::Internal { request_id: request_id.to_owned() }
        };
        let permit = {
            let _waiting = Waiting(&self.waiting);
            if self.waiting.fetch_add(1, Ordering::Relaxed) >= self.shared.limits.max_waiting_compiles {
                return Err(ApiError::Overloaded { retry_after_seconds: 1 });
            }
            Arc::clone(&self.permits).acquire_owned().await.map_err(|_| internal())?
        };
        // Someone else may have waited for the same.
        if let Some(compiled) = self.shared.cache().get(&key) {
            return compiled.map_err(refused);
        }
        let shared = Arc::clone(&self.shared);
        let (reply, answer) = oneshot::channel();
        let of = source.at_fault();
        let at_fault = of.clone();
        let job = move || {
            let compiled = compile(&vocabulary, source).map_err(|error| error.about(at_fault));
            // Kept though nobody may wait for it any more: it was paid for.
            let automaton = compiled.as_ref().map_or(0, |grammar| grammar.num_bytes());
            let num_bytes = 64 * (text.len() + 1024) + automaton;
            shared.cache().put(key, compiled.clone(), num_bytes, shared.limits.cache_bytes);
            drop(permit);
            let _ = reply.send(compiled);
        };
        let thread = std::thread::Builder::new().name("quire-grammar".to_owned()).stack_size(STACK_BYTES);
        if thread.spawn(job).is_err() {
            return Err(ApiError::Overloaded { retry_after_seconds: 1 });
        }
        let limit = Duration::from_millis(self.shared.limits.compile_timeout_ms);
        match tokio::time::timeout(limit, answer).await {
            Ok(Ok(compiled)) => compiled.map_err(refused),
            Ok(Err(_)) => Err(internal()),
            Err(_) => Err(refused(GrammarError::TooComplex { budget: "compile_timeout_ms", of })),
        }
    }
}

fn compile(vocabulary: &Vocabulary, source: GrammarSource) -> Compiled {
    let parser = vocabulary.factory().create_parser(source.into_grammar());
    let parser = parser.map_err(|error| GrammarError::of_compiler(&error.to_string()))?;
    let mut matcher = Matcher::new(Ok(parser.deep_clone()));
    if let Some(why) = matcher.get_error() {
        return Err(GrammarError::of_compiler(&why));
    }
    // What cannot begin cannot be enforced; and the first mask, which all choices begin with, is computed here.
    match matcher.compute_mask() {
        Ok(_) => {
            let start = warmed(matcher, parser, vocabulary);
            Ok(Arc::new(CompiledGrammar::new(start, Arc::clone(vocabulary.eos_token_ids()))))
        }
        Err(_) => Err(match matcher.stop_reason() {
            StopReason::LexerTooComplex | StopReason::ParserTooComplex => {
                GrammarError::TooComplex { budget: "step_fuel", of: String::new() }
            }
            _ => GrammarError::Invalid { why: "allows nothing that the model's tokens can spell".to_owned() },
        }),
    }
}

/// Keywords of JSON schema that a refusal may name.
const KEYWORDS: [&str; 24] = [
    "$dynamicAnchor",
    "$dynamicRef",
    "$ref",
    "contains",
    "contentEncoding",
    "contentMediaType",
    "contentSchema",
    "dependencies",
    "dependentRequired",
    "dependentSchemas",
    "else",
    "if",
    "maxContains",
    "minContains",
    "maxProperties",
    "minProperties",
    "not",
    "oneOf",
    "propertyNames",
    "then",
    "unevaluatedItems",
    "unevaluatedProperties",
    "uniqueItems",
    "format",
];

impl GrammarError {
    /// A refusal that names the request's field.
    pub(crate) fn at(self, param: &str) -> ApiError {
        ApiError::InvalidRequest { param: Some(param.to_owned()), message: format!("`{param}`: {self}") }
    }

    /// The same, with what it can be about where it names no keyword itself.
    fn about(self, of: String) -> Self {
        match self {
            Self::TooComplex { budget, .. } => Self::TooComplex { budget, of },
            Self::Invalid { why } if !why.contains('`') => Self::Invalid { why: why + &of },
            named => named,
        }
    }

    /// What the compiler says, in words that repeat nothing of the grammar but the names of keywords.
    fn of_compiler(why: &str) -> Self {
        let lower = why.to_lowercase();
        let has = |words: &[&str]| words.iter().any(|word| lower.contains(word));
        if has(&["fuel", "too complex", "too large", "limit", "too many", "too big", "size exceeded"]) {
            return Self::TooComplex { budget: "compile_fuel", of: String::new() };
        }
        let unsupported = |keyword: &str, why: &'static str| Self::Unsupported { keyword: keyword.to_owned(), why };
        if has(&["unimplemented keys", "not supported", "only supported", "unknown format"]) || lower.contains("$ref") {
            let named = KEYWORDS
                .iter()
                .find(|keyword| why.contains(&format!("\"{keyword}\"")) || why.contains(&format!("'{keyword}'")));
            let named = named.or_else(|| KEYWORDS.iter().find(|keyword| why.contains(*keyword)));
            if let Some(keyword) = named {
                return unsupported(keyword, "");
            }
            if lower.contains("min/maxproperties") {
                return unsupported("minProperties", " beside properties that are not required");
            }
        }
        if has(&["resource", "retriev", "resolv", "anchor", "pointer", "reference", "metaschema", "meta-schema"]) {
            return unsupported("$ref", " (or `$schema`): it leads to what is not in the schema");
        }
        if has(&["unsatisfiable"]) {
            return Self::Invalid { why: "allows nothing: no output could satisfy it".to_owned() };
        }
        if has(&["regex", "pattern"]) {
            return Self::Invalid { why: "holds a regular expression that cannot be compiled".to_owned() };
        }
        Self::Invalid { why: "cannot be compiled: it is not well formed".to_owned() }
    }
}
