//! One decoder, described as data: [`DecoderConfig`] says what differs, [`DecoderTensor`] what the checkpoint holds,
//! [`RopeTables`] how positions turn q and k.

pub mod config;
pub mod rope;
pub mod tensors;

pub use config::{Activation, ConfigError, DecoderConfig, RopeScaling};
pub use rope::RopeTables;
pub use tensors::{DecoderTensor, LayerTensor};
