//! KV blocks: allocate, share by prefix, free.
