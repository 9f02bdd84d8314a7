//! What a daemon shows Prometheus of one moment: numbers that something else keeps, written down when somebody scrapes.

use std::borrow::Cow;
use std::sync::atomic::AtomicU64;

use axum::http::header;
use axum::response::{IntoResponse, Response};
use prometheus_client::encoding::prometheus_text::{CONTENT_TYPE, encode};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// Numbers of one moment.
#[derive(Debug)]
pub struct Exposition(Registry);

impl Exposition {
    /// None yet; all that come have these labels.
    pub fn new(labels: &[(&'static str, &str)]) -> Self {
        let labels = labels.iter().map(|(name, value)| (Cow::Borrowed(*name), Cow::Owned((*value).to_owned())));
        Self(Registry::with_labels(labels))
    }

    /// What only rises; its name gets `_total`.
    pub fn counter(&mut self, name: &str, help: &str, value: u64) {
        self.0.register(name, help, ConstCounter::new(value));
    }

    /// What rises and falls.
    pub fn gauge(&mut self, name: &str, help: &str, value: f64) {
        let gauge = Gauge::<f64, AtomicU64>::default();
        gauge.set(value);
        self.0.register(name, help, gauge);
    }

    /// The same of several things that a label tells apart.
    pub fn gauges(&mut self, name: &str, help: &str, label: &str, values: impl IntoIterator<Item = (String, f64)>) {
        let family = Family::<Vec<(String, String)>, Gauge<f64, AtomicU64>>::default();
        for (value, number) in values {
            family.get_or_create_owned(&vec![(label.to_owned(), value)]).set(number);
        }
        self.0.register(name, help, family);
    }
}

impl IntoResponse for Exposition {
    fn into_response(self) -> Response {
        let mut text = String::new();
        encode(&mut text, &self.0).expect("a string takes all that is written");
        ([(header::CONTENT_TYPE, CONTENT_TYPE)], text).into_response()
    }
}
