//! Where rbee keeps its files, and the settings that govern it.
//!
//! [`Home`] is the set of folders of one installation; two homes live side by side. [`Settings`] are merged
//! from flags over environment over `config.toml` over defaults, and each value knows where it came from.

mod home;
mod settings;

pub use home::Home;
pub use settings::{ConfigError, KEYS, Key, Origin, Overrides, Row, Setting, Settings};
