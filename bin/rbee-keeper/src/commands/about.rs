//! `config`, `completions` and `version`: what the program knows without any daemon.

use clap_complete::Shell;
use serde_json::json;

use crate::exit::Failure;
use crate::printer::{Outcome, Shown};
use crate::render::{Table, fields};
use crate::settings::Context;

pub(crate) fn config(context: &Context) -> Result<Outcome, Failure> {
    let mut table = Table::new(&["KEY", "VALUE", "FROM"]);
    let mut settings = Vec::new();
    for row in context.settings.rows() {
        settings.push(json!({ "key": row.key, "value": row.value, "from": row.origin.to_string() }));
        table.row([row.key.to_owned(), row.value, row.origin.to_string()]);
    }
    let aliases = &context.settings.aliases;
    for (name, model) in aliases {
        table.row([format!("aliases.{name}"), model.to_string(), "config.toml".into()]);
    }
    let home = &context.home;
    let path = |path: &std::path::Path| path.display().to_string();
    let mut text = table.text();
    text.push('\n');
    text.push_str(&fields(&[
        ("config.toml", path(&home.config_file())),
        ("data", path(&home.data)),
        ("cache", path(&home.cache)),
        ("state", path(&home.state)),
        ("run", path(&home.run)),
        ("queen", context.queen.url.clone()),
    ]));
    let folders = json!({
        "config": home.config, "data": home.data, "cache": home.cache, "state": home.state, "run": home.run,
    });
    let json = json!({ "settings": settings, "aliases": aliases, "folders": folders, "queen": context.queen.url });
    Ok(Shown::new(json, text).into())
}

pub(crate) fn completions(shell: Shell) -> Result<Outcome, Failure> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut crate::cli(), "rbee", &mut script);
    let script =
        String::from_utf8(script).map_err(|error| Failure::new(crate::exit::Exit::Fault, error.to_string()))?;
    Ok(Shown::new(json!({ "shell": shell.to_string(), "script": script }), script).into())
}

pub(crate) fn version() -> Result<Outcome, Failure> {
    let version = env!("CARGO_PKG_VERSION");
    let build = std::env::current_exe().and_then(|path| rbee_supervisor::build_id(&path)).unwrap_or_default();
    let protocol = rbee_wire::PROTOCOL;
    let text = fields(&[("rbee", version.to_owned()), ("build", build.clone()), ("protocol", protocol.to_string())]);
    Ok(Shown::new(json!({ "version": version, "build": build, "protocol": protocol }), text).into())
}
