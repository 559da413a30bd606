//! What the sampling parameters mean: logits to one token. Every backend gives this answer.
