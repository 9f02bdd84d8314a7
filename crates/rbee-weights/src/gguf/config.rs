//! `config.json` of a GGUF.
