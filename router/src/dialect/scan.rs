//! Looking for marks in text that comes in pieces.

/// Text in which one of several marks is looked for. What could still become a mark is held back; no text is looked at more
/// often than marks have bytes.
#[derive(Default)]
pub(super) struct Scanner {
    held: String,
}

/// What a scanner found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Found {
    /// Which of the marks.
    pub(super) mark: usize,
}

impl Scanner {
    pub(super) fn push(&mut self, text: &str) {
        self.held.push_str(text);
    }

    /// Hands text before the first mark to `before`. Where a mark is complete it is taken out, and the scanner stands behind it.
    pub(super) fn next(&mut self, marks: &[&str], mut before: impl FnMut(&str)) -> Option<Found> {
        let mut first: Option<(usize, usize)> = None;
        for (index, mark) in marks.iter().enumerate() {
            if let Some(at) = self.held.find(mark) {
                // The longest of those that begin at one place.
                let is_first =
                    first.is_none_or(|(place, other)| at < place || (at == place && mark.len() > marks[other].len()));
                if is_first {
                    first = Some((at, index));
                }
            }
        }
        if let Some((at, mark)) = first {
            before(&self.held[..at]);
            self.held.drain(..at + marks[mark].len());
            return Some(Found { mark });
        }
        let keep = marks.iter().map(|mark| partial(&self.held, mark)).max().unwrap_or(0);
        let done = self.held.len() - keep;
        before(&self.held[..done]);
        self.held.drain(..done);
        None
    }

    /// Everything that was held back.
    pub(super) fn take(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Bytes at the end of `text` that `mark` begins with.
fn partial(text: &str, mark: &str) -> usize {
    let longest = text.len().min(mark.len().saturating_sub(1));
    (1..=longest).rev().find(|len| mark.is_char_boundary(*len) && text.ends_with(&mark[..*len])).unwrap_or(0)
}

/// Content around calls: white space next to a call belongs to nobody.
#[derive(Default)]
pub(super) struct Content {
    space: String,
    has_calls: bool,
}

impl Content {
    /// The part of `text`, and of the white space before it, that is content for certain.
    pub(super) fn push(&mut self, text: &str, mut say: impl FnMut(&str)) {
        let body = text.trim_end();
        if !body.is_empty() {
            say(&std::mem::take(&mut self.space));
            say(body);
        }
        self.space.push_str(&text[body.len()..]);
    }

    /// A call was found here.
    pub(super) fn call(&mut self) {
        self.space.clear();
        self.has_calls = true;
    }

    /// The end of the text.
    pub(super) fn finish(&mut self, mut say: impl FnMut(&str)) {
        let space = std::mem::take(&mut self.space);
        if !self.has_calls {
            say(&space);
        }
    }
}
