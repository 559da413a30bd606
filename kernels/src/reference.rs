//! Each operation on the CPU, plainly, sums in f32 or better: what tests compare with.
