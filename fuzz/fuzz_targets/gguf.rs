//! Any bytes as a GGUF file: an answer or an error, never a panic.

#![no_main]

libfuzzer_sys::fuzz_target!(|file: &[u8]| {
    let _ = quire_engine::gguf::check(file);
});
