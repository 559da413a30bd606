//! Model files to tensors: safetensors, one or many, mapped.
