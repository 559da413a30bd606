//! The reference backend, on the CPU.
