//! [`MockEngine`]: scripted, gated, deterministic; for tests of the API.

/// An engine without a model.
pub struct MockEngine {}
