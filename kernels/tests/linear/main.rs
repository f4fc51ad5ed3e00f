//! `linear` on every backend against its reference, and its promise that a row's bits depend on nothing but the row.

mod card;
mod cpu;
mod cuda;
mod support;
