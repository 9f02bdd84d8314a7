//! Values as text: tables without borders that can be piped, and lists of fields.
//!
//! Values arrive as JSON; what this build understands gets a table of its own ([`views`]), what a newer
//! peer sends in another shape is still shown, field by field.

mod models;
mod table;
#[cfg(test)]
mod tests;
mod views;

pub use models::{fetched, loaded, plan, removed, stored, stored_one, unloaded};
pub use table::{Table, age, bytes, fields};
pub use views::{
    any, binaries, binary, explain, hive, hives, info, job, jobs, keys, process, processes, spawn_note, spawned,
    status, timings, worker, workers,
};
