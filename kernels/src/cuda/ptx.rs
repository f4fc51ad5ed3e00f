//! The device code in this binary: PTX that was made of `ops/<op>/<op>.cu` ahead of time.

/// What a module was made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Arch {
    /// Runs on compute capability 8.0 and everything behind it.
    Sm80,
    /// Runs on compute capability 9.0 and nothing else.
    Sm90a,
}

/// One module.
#[derive(Clone, Copy, Debug)]
pub struct PtxModule {
    /// Name of the operation's folder.
    pub name: &'static str,
    pub arch: Arch,
    pub text: &'static [u8],
    /// SHA-256 of `text`, in lower case hexadecimal.
    pub sha256: &'static str,
    /// That of the sources that it was made of, see `ptx/make.py`: a test compares it with what is there.
    pub source_sha256: &'static str,
}

/// All modules. An operation has one of [`Arch::Sm80`], and one of [`Arch::Sm90a`] where Hopper's own instructions help.
pub const MODULES: &[PtxModule] = include!("../../ptx/manifest.rs");
