//! What a request may ask its output to be.

use std::sync::Arc;

/// The form that an output must have.
#[derive(Clone, Debug, PartialEq)]
pub enum OutputFormat {
    /// Any JSON object.
    JsonObject,
    /// JSON that a schema allows; the schema's text.
    JsonSchema(Arc<str>),
    /// Text that a regular expression matches from its first to its last character.
    Regex(Arc<str>),
    /// One of these texts.
    Choice(Vec<String>),
    /// A context-free grammar: in Lark's syntax as llguidance reads it, its first rule `start`; or in GBNF, which shows.
    Lark(Arc<str>),
    /// A context-free grammar in GBNF, llama.cpp's form; its first rule is `root`.
    Gbnf(Arc<str>),
    /// Free text in which certain words begin something that has a form.
    StructuralTag(StructuralTag),
}

/// Free text; once it holds a trigger, one of the structures that begin with the trigger follows.
#[derive(Clone, Debug, PartialEq)]
pub struct StructuralTag {
    pub structures: Vec<TagStructure>,
    pub triggers: Vec<String>,
}

/// What stands between two fixed texts.
#[derive(Clone, Debug, PartialEq)]
pub struct TagStructure {
    /// Begins with one of the triggers.
    pub begin: String,
    /// Of the JSON in between.
    pub schema: Arc<str>,
    pub end: String,
}
