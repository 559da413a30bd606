//! The demo model and its adapters, carried in the binary: what `polylora serve` serves when no model is named.

use polylora_engine::EmbeddedFile;

/// An adapter in the binary; loadable as `demo:NAME`.
#[derive(Clone, Copy, Debug)]
pub struct EmbeddedAdapter {
    /// Its name.
    pub name: &'static str,
    /// Its files.
    pub files: &'static [EmbeddedFile],
}

include!(concat!(env!("OUT_DIR"), "/demo.rs"));
