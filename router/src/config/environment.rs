//! The process's environment: the only place that reads it.

use std::ffi::OsString;
use std::path::PathBuf;

/// The variables that mean something to this program.
#[derive(Clone, Debug, Default)]
pub struct Environment {
    /// Those that begin with `QUIRE_`.
    pub settings: Vec<(String, OsString)>,
    /// `HF_ENDPOINT`: the hub's address.
    pub hub_endpoint: Option<String>,
    /// `HF_HOME`: where downloads are kept.
    pub hub_home: Option<String>,
    /// `HF_TOKEN`: what the hub is shown; never printed.
    pub hub_token: Option<Secret>,
    /// The user's home directory.
    pub home: Option<PathBuf>,
}

/// A value that no log line and no message shows.
#[derive(Clone)]
pub struct Secret(String);

impl Secret {
    pub fn new(value: String) -> Self {
        Self(value)
    }

    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("***")
    }
}

impl Environment {
    /// Of this process.
    #[allow(clippy::disallowed_methods, reason = "the one place that reads it")]
    pub fn of_process() -> Self {
        let text = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let mut settings: Vec<_> = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value)))
            .filter(|(name, _)| name.starts_with("QUIRE_"))
            .collect();
        settings.sort();
        Self {
            settings,
            hub_endpoint: text("HF_ENDPOINT"),
            hub_home: text("HF_HOME"),
            hub_token: text("HF_TOKEN").map(Secret::new),
            home: std::env::home_dir(),
        }
    }
}
