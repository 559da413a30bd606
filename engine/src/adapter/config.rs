//! `adapter_config.json`: read completely, or refused by the key's name.
