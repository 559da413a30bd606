//! One stream of tokens: its states and its counters.
