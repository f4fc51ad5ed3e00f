//! Functions of single numbers between two products.

pub(crate) mod cpu;
#[cfg(feature = "testing")]
pub mod reference;

use crate::ops::at_least;
use crate::{Backend, KernelError};

/// Which function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ActivationKind {
    /// `x * Phi(x)` with the normal distribution's own `Phi` (Hendrycks and Gimpel 2016).
    Gelu,
    /// The same with `Phi` approximated by a hyperbolic tangent (there, sec. 2).
    GeluTanh,
    Relu,
    Tanh,
}

/// `x[i] = f(x[i])` in place, for the first `len` numbers of `x`, `F32`. Within 1e-6 of the function, relative to the larger of
/// `|x|` and 1; a NaN stays one.
pub struct Activation<'a, B: Backend> {
    pub kind: ActivationKind,
    pub len: usize,
    pub x: &'a mut B::Buffer,
}

impl<B: Backend> Activation<'_, B> {
    pub(crate) const OP: &'static str = "activation";

    /// What every device refuses.
    pub(crate) fn check(&self, x_len: usize) -> Result<(), KernelError> {
        at_least(Self::OP, "x", self.len, x_len)
    }
}
