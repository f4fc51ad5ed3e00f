//! Grammars that outputs obey: from what a request asks for to masks over the model's tokens.
//!
//! An [`OutputFormat`] becomes a source, its source a [`CompiledGrammar`], which the engine follows beside each step. A grammar
//! that cannot be compiled within its budgets is refused, and a token that its mask does not allow never leaves the engine:
//! an answer is never free text where a form was asked for.

mod compiled;
mod compiler;
mod format;
mod gbnf;
mod rewrite;
mod schema;
mod source;
mod vocabulary;
mod warm;

pub use compiled::CompiledGrammar;
pub use compiler::{GrammarLimits, Grammars};
pub use format::{OutputFormat, StructuralTag, TagStructure};
pub use vocabulary::Vocabulary;

pub(crate) use source::{ANY_TEXT, GrammarSource, lark_string};

/// Why a grammar cannot be served. Names what is at fault, in few words; holds nothing of the request but names of keywords.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GrammarError {
    /// It is larger, deeper or has more parts than may be.
    #[error("{what} may be at most {limit}")]
    TooLarge { what: &'static str, limit: u64 },
    /// Compiling it, or following it, takes more than its budget.
    #[error("is too complex to be enforced within `limits.grammar.{budget}`{of}")]
    TooComplex { budget: &'static str, of: String },
    /// It asks for something that cannot be enforced.
    #[error("uses `{keyword}`, which cannot be enforced{why}")]
    Unsupported { keyword: String, why: &'static str },
    /// It is not what it says it is, or nothing could satisfy it.
    #[error("{why}")]
    Invalid { why: String },
}
