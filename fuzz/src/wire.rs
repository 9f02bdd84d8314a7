//! Bodies and streams that `rbee-wire` reads.

use rbee_wire::sse::{Decoder, Frame, TooLarge, write_event};
use rbee_wire::{Event, JobRequest};

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
        Ok(again) => assert_eq!(again, job, "{text} means something else"),
        Err(refusal) => unreachable!("{text} was accepted in another spelling: {refusal:?}"),
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
