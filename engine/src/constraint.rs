//! What the tokens of a choice must obey beyond its sampling parameters: a grammar, seen from here as masks over tokens.

use std::fmt;

/// Something that every choice of a request obeys. It is compiled before it comes here; nothing here knows text.
pub trait Grammar: fmt::Debug + Send + Sync {
    /// The state of a choice that has no token yet. Takes a moment, so it is called beside the engine's thread.
    fn begin(&self) -> Box<dyn TokenConstraint>;
}

/// One choice on its way through a grammar.
///
/// What it allows depends on the grammar and on the tokens that it was given alone: never on time, on other choices or on
/// which masks were asked for. A choice that is continued from another server begins anew with the tokens that it had.
pub trait TokenConstraint: Send {
    /// Takes in the next token. Fails where the token is not allowed here.
    fn advance(&mut self, token_id: u32) -> Result<(), NotAllowed>;

    /// Sets a bit of `mask` for every token that may come next, low bit first; all bits are clear when it is called. Once the
    /// output is complete these are the tokens that end a sequence.
    fn mask(&mut self, mask: &mut [u32]) -> Result<(), NotAllowed>;
}

/// A grammar has no way on: it does not allow the tokens that there are, or following it would take more than its budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the grammar allows no token here")]
pub struct NotAllowed;
