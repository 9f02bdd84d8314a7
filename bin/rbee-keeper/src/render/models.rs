//! Models in a store, and what loads of them need.

use rbee_wire::view::{LoadedView, PlanView, Room, StoredView};
use serde_json::Value;

use super::table::{Table, age, bytes, fields};
use super::views::{any, typed};

fn one<T: serde::de::DeserializeOwned>(value: &Value, text: impl FnOnce(T) -> String) -> String {
    match serde_json::from_value(value.clone()) {
        Ok(view) => text(view),
        Err(_) => any(std::slice::from_ref(value)),
    }
}

/// The store's models.
pub fn stored(values: &[Value]) -> String {
    let Some(views) = typed::<StoredView>(values) else { return any(values) };
    let mut table = Table::new(&["MODEL", "SIZE", "STATE", "USED", "LOADED", "COMMIT"]);
    for view in views {
        let workers: Vec<String> = view.workers.iter().map(ToString::to_string).collect();
        table.row([
            view.id,
            bytes(view.bytes),
            if view.complete { "complete" } else { "partial" }.into(),
            view.used_ms.map(|ms| format!("{} ago", age(ms))).unwrap_or_default(),
            workers.join(","),
            view.commit.map(|commit| commit.chars().take(12).collect()).unwrap_or_default(),
        ]);
    }
    table.text()
}

/// One model of the store with its files.
pub fn stored_one(value: &Value) -> String {
    one(value, |view: StoredView| {
        let workers: Vec<String> = view.workers.iter().map(ToString::to_string).collect();
        let mut text = fields(&[
            ("model", view.id),
            ("hive", view.hive_id.to_string()),
            ("state", if view.complete { "complete" } else { "partial" }.into()),
            ("size", bytes(view.bytes)),
            ("commit", view.commit.unwrap_or_default()),
            ("path", view.path.unwrap_or_default()),
            ("last used", view.used_ms.map(|ms| format!("{} ago", age(ms))).unwrap_or_default()),
            ("loaded", workers.join(",")),
        ]);
        if !view.files.is_empty() {
            let mut table = Table::new(&["FILE", "SIZE"]);
            for file in view.files {
                table.row([file.name, bytes(file.bytes)]);
            }
            text.push('\n');
            text.push_str(&table.text());
        }
        text
    })
}

/// A model that is now in the store: its name.
pub fn fetched(value: &Value) -> String {
    one(value, |view: StoredView| format!("{}\n", view.id))
}

/// A model that was removed.
pub fn removed(value: &Value) -> String {
    one(value, |view: StoredView| format!("{} is removed: {} free\n", view.id, bytes(view.bytes)))
}

/// A model that serves now: its worker.
pub fn loaded(value: &Value) -> String {
    one(value, |view: LoadedView| format!("{}\n", view.worker_id))
}

/// Workers that were ended.
pub fn unloaded(values: &[Value]) -> String {
    let Some(views) = typed::<LoadedView>(values) else { return any(values) };
    views.iter().map(|view| format!("{} is unloaded from {} of {}\n", view.model, view.device, view.hive_id)).collect()
}

/// What a model needs, device by device.
pub fn plan(value: &Value) -> String {
    one(value, |view: PlanView| {
        let mut text = fields(&[("model", view.model.to_string()), ("hive", view.hive_id.to_string())]);
        let mut table =
            Table::new(&["DEVICE", "FREE", "TOTAL", "WEIGHTS", "KV/TOKEN", "LEAST", "FULL", "CONTEXT", "FITS"]);
        for room in &view.rooms {
            let needs = room.needs.unwrap_or_default();
            table.row([
                room.device.to_string(),
                bytes(room.free),
                bytes(room.total),
                bytes(needs.weights),
                bytes(needs.kv_per_token),
                bytes(needs.least),
                bytes(needs.total),
                needs.context.to_string(),
                fits(room),
            ]);
        }
        text.push('\n');
        text.push_str(&table.text());
        for room in &view.rooms {
            for held in &room.held {
                text.push_str(&format!(
                    "{}: {} has {} ({})\n",
                    room.device,
                    held.model,
                    bytes(held.bytes),
                    held.worker_id
                ));
            }
            for way in &room.would_fit {
                text.push_str(&format!(
                    "{}: with {} it needs {}, which fits\n",
                    room.device,
                    way.flags,
                    bytes(way.needed)
                ));
            }
        }
        text
    })
}

/// Whether a load fits, and how much of its context would.
fn fits(room: &Room) -> String {
    match (&room.needs, room.context_fits, &room.refused) {
        (None, _, why) => format!("no: {}", why.as_deref().unwrap_or("it cannot be used")),
        (Some(needs), _, _) if needs.total <= room.free => "yes".into(),
        (Some(_), _, _) if room.fits() => "yes, with less KV than all slots could fill".into(),
        (Some(_), Some(tokens), _) => format!("no: {tokens} tokens of context would"),
        (Some(_), None, _) => "no: its weights do not".into(),
    }
}
