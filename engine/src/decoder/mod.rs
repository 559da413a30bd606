//! One decoder, described as data.

pub mod config;

pub use config::{Activation, DecoderConfig, RopeScaling};
