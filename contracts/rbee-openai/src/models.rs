//! `GET /v1/models`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The models that can be named.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ModelList {
    /// `list`.
    pub object: String,
    /// One each.
    pub data: Vec<Model>,
}

/// One model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Model {
    /// What to put into `model`.
    pub id: String,
    /// `model`.
    pub object: String,
    /// Seconds since 1970; of the queen's start, as files do not say when a model was made.
    pub created: u64,
    /// Who published it, as far as its name says.
    pub owned_by: String,
}

impl Model {
    /// The model of this name.
    pub fn named(id: &str, created: u64) -> Self {
        let owner = match id.split_once('/') {
            Some((owner, _)) if !owner.is_empty() => owner,
            Some(_) => "local",
            None => "rbee",
        };
        Self { id: id.to_owned(), object: "model".into(), created, owned_by: owner.to_owned() }
    }
}

impl ModelList {
    /// These models.
    pub fn of(data: Vec<Model>) -> Self {
        Self { object: "list".into(), data }
    }
}
