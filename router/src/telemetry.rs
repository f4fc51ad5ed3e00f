//! Log lines on standard error: one event, one line, for people on a terminal and as JSON elsewhere.
//!
//! A value can come from a client (a model's name, a request id), so every value is escaped, so that it cannot begin a
//! line of its own or drive a terminal, and cut at [`MAX_VALUE_BYTES`]. Prompts and answers are never handed to a log
//! macro in the first place; panics are logged without the values in their messages for the same reason.

use std::fmt::{self, Write as _};
use std::io::{IsTerminal, Write as _};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;

use crate::config::{LogConfig, LogFormat};

/// Bytes of a value before it is cut.
pub const MAX_VALUE_BYTES: usize = 256;
/// Bytes of a message before it is cut. Messages are written in this program, but quote file names and reasons.
const MAX_MESSAGE_BYTES: usize = 2048;

/// Which events are wanted.
pub fn parse_level(level: &str) -> Result<Targets, String> {
    // The parser takes any word for a module's name, at every level; a lone word that is no level is a mistake.
    for part in level.split(',') {
        let level = part.rsplit_once('=').map_or(part, |(_, level)| level);
        if level != "off" && level.parse::<Level>().is_err() {
            return Err(format!("{level:?} is not a level"));
        }
    }
    level.parse().map_err(|error: tracing_subscriber::filter::ParseError| error.to_string())
}

/// Starts logging, once per process; later calls change nothing.
pub fn init(config: &LogConfig) {
    let json = match config.format {
        LogFormat::Auto => !std::io::stderr().is_terminal(),
        LogFormat::Human => false,
        LogFormat::Json => true,
    };
    let targets = parse_level(&config.level).unwrap_or_else(|_| Targets::new().with_default(Level::INFO));
    let layer = Lines { json, write: |line: String| drop(std::io::stderr().lock().write_all(line.as_bytes())) };
    let subscriber = tracing_subscriber::registry().with(layer.with_filter(targets));
    let _ = tracing::subscriber::set_global_default(subscriber);
}

/// Logs panics through [`tracing`], and counts them. A panic's message can quote what a client sent (slicing a text
/// does), so only messages without values are logged, and of the others only where they came from.
pub fn log_panics() {
    std::panic::set_hook(Box::new(|panic| {
        crate::metrics::count_panic();
        let place = panic.location().map(ToString::to_string).unwrap_or_default();
        let message = panic.payload().downcast_ref::<&'static str>().copied().unwrap_or("");
        let thread = std::thread::current();
        tracing::error!(place, thread = thread.name().unwrap_or(""), "panic: {message}");
    }));
}

/// Formats events and hands whole lines on.
struct Lines<W> {
    json: bool,
    write: W,
}

/// A span's values, kept with it.
struct SpanFields(Fields);

#[derive(Default)]
struct Fields {
    message: String,
    values: Vec<(&'static str, Value)>,
}

/// Takes what fits and counts on nothing after it.
struct Bounded<'a> {
    out: &'a mut String,
    left: usize,
}

impl fmt::Write for Bounded<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        if text.len() <= self.left {
            self.out.push_str(text);
            self.left -= text.len();
            return Ok(());
        }
        let end = (0..=self.left).rev().find(|&end| text.is_char_boundary(end)).unwrap_or(0);
        self.out.push_str(&text[..end]);
        self.out.push('…');
        self.left = 0;
        // Ends the formatting of a large value early.
        Err(fmt::Error)
    }
}

fn bounded(value: &dyn fmt::Debug, limit: usize) -> String {
    let mut out = String::new();
    let _ = write!(Bounded { out: &mut out, left: limit }, "{value:?}");
    out
}

impl Fields {
    fn put(&mut self, field: &Field, value: Value) {
        self.values.retain(|(name, _)| *name != field.name());
        self.values.push((field.name(), value));
    }
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.record_debug(field, &format_args!("{value}"));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            self.message = bounded(value, MAX_MESSAGE_BYTES);
        } else {
            self.put(field, Value::String(bounded(value, MAX_VALUE_BYTES)));
        }
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, value.into());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, value.into());
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.put(field, value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, value.into());
    }
}

impl<S, W> Layer<S> for Lines<W>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    W: Fn(String) + 'static,
{
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        if let Some(span) = context.span(id) {
            let mut fields = Fields::default();
            attributes.record(&mut fields);
            span.extensions_mut().insert(SpanFields(fields));
        }
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        if let Some(span) = context.span(id)
            && let Some(SpanFields(fields)) = span.extensions_mut().get_mut()
        {
            values.record(fields);
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let mut values = Vec::new();
        for span in context.event_scope(event).into_iter().flat_map(|scope| scope.from_root()) {
            if let Some(SpanFields(fields)) = span.extensions().get() {
                values.extend(fields.values.iter().cloned());
            }
        }
        values.append(&mut fields.values);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let time = format_time(now.as_secs(), now.subsec_millis());
        let level = *event.metadata().level();
        let line = if self.json {
            json_line(time, level, event.metadata().target(), fields.message, values)
        } else {
            human_line(&time, level, &fields.message, &values)
        };
        (self.write)(line);
    }
}

fn json_line(time: String, level: Level, target: &str, message: String, values: Vec<(&str, Value)>) -> String {
    let mut line = Map::new();
    // Values first, so that no value can pass for the time, level or message.
    for (name, value) in values {
        line.insert(name.to_owned(), value);
    }
    line.insert("time".to_owned(), time.into());
    line.insert("level".to_owned(), level.to_string().to_lowercase().into());
    line.insert("target".to_owned(), target.into());
    line.insert("message".to_owned(), message.into());
    format!("{}\n", Value::Object(line))
}

fn human_line(time: &str, level: Level, message: &str, values: &[(&str, Value)]) -> String {
    let mut line = format!("{time} {level:>5} ");
    escape(message, &mut line);
    for (name, value) in values {
        let _ = write!(line, " {name}=");
        match value {
            Value::String(text) if !text.is_empty() && text.chars().all(|c| c.is_ascii_graphic() && c != '"') => {
                line.push_str(text);
            }
            Value::String(text) => {
                line.push('"');
                escape(text, &mut line);
                line.push('"');
            }
            value => drop(write!(line, "{value}")),
        }
    }
    line.push('\n');
    line
}

/// Leaves what can be read, and spells out what a terminal would act on.
fn escape(text: &str, out: &mut String) {
    for c in text.chars() {
        if c == '"' || c == '\\' || c.is_control() || is_invisible(c) {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
}

/// Separators and marks that reorder or hide text.
fn is_invisible(c: char) -> bool {
    matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

/// RFC 3339 in UTC. Days to a date by Howard Hinnant's `civil_from_days`.
pub(crate) fn format_time(seconds: u64, milliseconds: u32) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let day_of_era = shifted % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{milliseconds:03}Z")
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    /// The lines that `body` logs.
    fn lines(json: bool, body: impl FnOnce()) -> Vec<String> {
        let lines = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&lines);
        let layer = Lines { json, write: move |line| sink.lock().unwrap().push(line) };
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), body);
        let lines = lines.lock().unwrap();
        lines.clone()
    }

    #[test]
    fn an_event_is_one_line_whatever_its_values() {
        let hostile = "a\r\nb \u{1b}[31mred\u{202e}\"\\ \u{0}";
        for json in [true, false] {
            let lines = lines(json, || {
                tracing::info!(model = hostile, request_id = %hostile, other = ?hostile, "bad {hostile}");
            });
            assert_eq!(lines.len(), 1);
            let line = lines[0].strip_suffix('\n').unwrap();
            assert!(!line.chars().any(|c| c.is_control()), "{line:?}");
            if json {
                let parsed: Value = serde_json::from_str(line).unwrap();
                assert_eq!(parsed["model"], hostile);
            }
        }
    }

    #[test]
    fn long_values_are_cut() {
        let long = "é".repeat(1 << 20);
        for json in [true, false] {
            let lines = lines(json, || tracing::info!(model = long.as_str(), "{long}"));
            assert!(lines[0].len() < 3 * MAX_MESSAGE_BYTES, "{}", lines[0].len());
            assert!(lines[0].contains('…'));
        }
    }

    #[test]
    fn spans_lend_their_request_id() {
        let lines = lines(true, || {
            let span = tracing::info_span!("request", request_id = "r-1", tokens = tracing::field::Empty);
            let _entered = span.enter();
            span.record("tokens", 7);
            tracing::warn!(message_of = "x", level = "forged", "late");
        });
        let parsed: Value = serde_json::from_str(&lines[0]).unwrap();
        assert_eq!((&parsed["request_id"], &parsed["tokens"]), (&Value::from("r-1"), &Value::from(7)));
        assert_eq!((&parsed["level"], &parsed["message"]), (&Value::from("warn"), &Value::from("late")));
    }

    #[test]
    fn times_are_dates() {
        assert_eq!(format_time(0, 0), "1970-01-01T00:00:00.000Z");
        assert_eq!(format_time(951_827_696, 7), "2000-02-29T12:34:56.007Z");
        assert_eq!(format_time(4_102_444_799, 999), "2099-12-31T23:59:59.999Z");
    }

    #[test]
    fn levels_are_checked() {
        for good in ["info", "debug", "warn,quire_router::grpc=debug", "off"] {
            assert!(parse_level(good).is_ok(), "{good}");
        }
        for bad in ["", "loud", "quire=loud", "info,,debug"] {
            assert!(parse_level(bad).is_err(), "{bad}");
        }
    }
}
