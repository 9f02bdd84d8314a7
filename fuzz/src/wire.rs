//! Bodies and streams that `rbee-wire` and `rbee-openai` read.

use rbee_openai::error::{Reply, retry_is_vain};
use rbee_openai::fields::Endpoint;
use rbee_openai::request::{Unknown, read};
use rbee_wire::sse::{Decoder, Frame, TooLarge, write_event};
use rbee_wire::{Event, JobRequest};
use serde_json::Value;

/// The bytes are the body of `POST /v1/jobs`.
pub(crate) fn job(bytes: &[u8]) {
    let job = match JobRequest::parse(bytes) {
        Ok(job) => job,
        Err(refusal) => {
            serde_json::to_vec(&refusal).expect("a refusal is sent as JSON");
            return;
        }
    };
    let _ = (job.operation(), job.hive_id());
    let text = serde_json::to_string(&job).expect("a job is JSON");
    match JobRequest::parse(text.as_bytes()) {
        Ok(again) => {
            let [one, two] = [job, again].map(|job| serde_json::to_value(job).expect("a job is JSON"));
            assert!(same(&one, &two), "{text} means something else: {two}");
        }
        Err(refusal) => unreachable!("{text} was accepted in another spelling: {refusal:?}"),
    }
}

/// The bytes are a body of the OpenAI dialect, of each of its endpoints in turn.
pub(crate) fn dialect(bytes: &[u8]) {
    for endpoint in Endpoint::ALL {
        let strict = read(endpoint, bytes, Unknown::Refused);
        let asked = match read(endpoint, bytes, Unknown::Reported) {
            Ok(asked) => asked,
            Err(refusal) => {
                let _ = retry_is_vain(&refusal);
                let reply = serde_json::to_value(Reply::from(&refusal)).expect("a refusal is sent as JSON");
                assert_eq!(reply["error"]["type"], "invalid_request_error", "{reply}");
                assert!(strict.is_err(), "{endpoint:?}: strictness allows what is refused without: {reply}");
                continue;
            }
        };
        assert_eq!(strict.is_ok(), asked.ignored.is_empty(), "{endpoint:?}: {:?}", asked.ignored);
        assert!(!asked.jobs.is_empty(), "{endpoint:?}: a request that is accepted is at least one job");
        for infer in asked.jobs {
            let job = JobRequest::Infer(Box::new(infer));
            let text = serde_json::to_string(&job).expect("a job is JSON");
            // No surface takes what another refuses.
            if let Err(refusal) = JobRequest::parse(text.as_bytes()) {
                unreachable!("{endpoint:?} makes a job of it that is none: {text}: {refusal:?}");
            }
        }
    }
}

/// Whether two values are equal, but for the last bit of fractions, which serde_json does not keep.
fn same(one: &Value, two: &Value) -> bool {
    match (one, two) {
        (Value::Number(a), Value::Number(b)) if a.is_f64() && b.is_f64() => {
            let [a, b] = [a, b].map(|number| number.as_f64().unwrap_or_default());
            (a - b).abs() <= 2.0 * f64::EPSILON * a.abs() + f64::MIN_POSITIVE
        }
        (Value::Array(a), Value::Array(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(a, b)),
        (Value::Object(a), Value::Object(b)) => {
            a.len() == b.len() && a.iter().all(|(key, a)| b.get(key).is_some_and(|b| same(a, b)))
        }
        _ => one == two,
    }
}

/// The bytes are a stream of events; wherever it is cut, it gives the same ones.
pub(crate) fn sse(bytes: &[u8]) {
    for max in [1 << 20, 24] {
        let whole = decode(max, [bytes]);
        for cut in 0..=bytes.len() {
            let (one, two) = bytes.split_at(cut);
            assert_eq!(decode(max, [one, two]), whole, "cut at {cut}");
        }
        assert_eq!(decode(max, bytes.chunks(1)), whole, "cut everywhere");
        assert!(max > 24 || whole.0.iter().all(|frame| frame.data.len() <= max));
    }
    let (frames, _) = decode(1 << 20, [bytes]);
    for frame in frames {
        let event = serde_json::from_slice::<Event>(&frame.data);
        assert!(event.is_err() || event.is_ok_and(|event| serde_json::to_vec(&event).is_ok()));
        if let Some(id) = frame.id
            && !frame.data.contains(&b'\n')
        {
            let mut out = Vec::new();
            write_event(&mut out, id, &frame.data);
            assert_eq!(decode(1 << 20, [&out[..]]), (vec![frame], Ok(())));
        }
    }
}

fn decode<'b>(max: usize, parts: impl IntoIterator<Item = &'b [u8]>) -> (Vec<Frame>, Result<(), TooLarge>) {
    let mut decoder = Decoder::new(max);
    let mut frames = Vec::new();
    let end = parts.into_iter().try_for_each(|part| decoder.feed(part, |frame| frames.push(frame)));
    (frames, end)
}
