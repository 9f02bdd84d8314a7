//! The OpenAI dialect: its requests as jobs, the events of jobs as its answers, our errors as its errors.
//!
//! Pure codecs and validation. A request becomes the body of an `infer` job and is checked by that job's own validator, so that
//! no surface takes what another refuses; what the dialect adds is one table, [`fields`]. Start with [`request::chat`], then
//! [`answer::Answer`].

pub mod answer;
pub mod body;
pub mod embeddings;
pub mod error;
pub mod fields;
pub mod models;
pub mod request;
