//! Ids to text, for any tokenizer and any way of getting the ids.

use proptest::prelude::*;
use rbee_tokenizer::{Controls, Error, Pushed, Scan, Specials, Start, StopMatcher, TextStream, Tokenizer};

use crate::fixtures::*;

fn stream(tokenizer: &Tokenizer, stops: &[&str]) -> TextStream {
    TextStream::new(tokenizer.detokenizer(Controls::Hide, Start::Fresh), StopMatcher::new(stops).unwrap())
}

/// The text of all ids, and that each piece came only when it was certain.
fn run(tokenizer: &Tokenizer, stops: &[&str], ids: &[u32]) -> (String, bool) {
    let mut stream = stream(tokenizer, stops);
    let mut text = String::new();
    for &id in ids {
        let Pushed { piece, stopped } = stream.push(id);
        text.push_str(&piece.text);
        if stopped {
            assert_eq!(stream.finish().text, "");
            assert_eq!(stream.push(ids[0]).piece.text, "");
            return (text, true);
        }
    }
    text.push_str(&stream.finish().text);
    (text, false)
}

#[test]
fn a_character_in_pieces_comes_whole() {
    let tokenizer = byte_level();
    let ids = tokenizer.encode("a👋b", Specials::AsText).unwrap();
    let mut stream = stream(&tokenizer, &[]);
    let texts: Vec<String> = ids.iter().map(|&id| stream.push(id).piece.text).collect();
    assert_eq!(texts, ["a", "", "", "", "👋", "b"]);
}

#[test]
fn broken_bytes_are_replaced_as_soon_as_they_are_broken() {
    let tokenizer = sentencepiece();
    let byte = |b: u8| tokenizer.token_to_id(&format!("<0x{b:02X}>")).unwrap();
    let mut stream = stream(&tokenizer, &[]);
    assert_eq!(stream.push(byte(0xe4)).piece.text, "");
    assert_eq!(stream.push(byte(0xbd)).piece.text, "");
    assert_eq!(stream.push(byte(0x41)).piece.text, "\u{fffd}A");
    assert_eq!(stream.push(byte(0xff)).piece.text, "\u{fffd}");
    assert_eq!(stream.push(byte(0xf0)).piece.text, "");
    assert_eq!(stream.finish().text, "\u{fffd}");
}

#[test]
fn stop_string_split_over_two_tokens_is_never_sent() {
    let tokenizer = byte_level();
    let ids = tokenizer.encode("ok</s><|not sent", Specials::AsText).unwrap();
    let mut stream = stream(&tokenizer, &["</s><|"]);
    let mut sent = Vec::new();
    for &id in &ids {
        let pushed = stream.push(id);
        sent.push(pushed.piece.text);
        if pushed.stopped {
            break;
        }
    }
    assert_eq!(sent.concat(), "ok");
    assert_eq!(sent.len(), "ok</s><|".len());
    assert_eq!(stream.stop_index(), Some(0));
}

#[test]
fn a_prefix_that_fails_is_sent_after_all() {
    let mut stops = StopMatcher::new(&["aab"]).unwrap();
    let mut out = String::new();
    assert_eq!(stops.push("xaa", &mut out), Scan::Running);
    assert_eq!(out, "x");
    assert_eq!(stops.push("a", &mut out), Scan::Running);
    assert_eq!(out, "xa");
    assert_eq!(stops.push("b", &mut out), Scan::Stopped);
    assert_eq!(out, "xa");
}

#[test]
fn too_many_or_odd_stop_strings_are_refused() {
    assert!(StopMatcher::new(&["x"; 16]).is_ok());
    for stops in [vec!["x"; 17], vec![""], vec!["a", ""]] {
        assert!(matches!(StopMatcher::new(&stops), Err(Error::InvalidStops(_))));
    }
    assert!(StopMatcher::new(&["x".repeat(1025)]).is_err());
}

#[test]
fn control_tokens_are_hidden_or_shown() {
    let tokenizer = byte_level();
    let ids = [256, 68, 257];
    assert_eq!(tokenizer.decode(&ids, Controls::Show).matches("<|im_").count(), 2);
    assert_eq!(tokenizer.decode(&ids, Controls::Hide).chars().count(), 1);
    // Ids that the vocabulary does not have write nothing.
    assert_eq!(tokenizer.decode(&[u32::MAX, 100_000], Controls::Show), "");
}

#[test]
fn a_continued_text_keeps_its_first_space() {
    let tokenizer = sentencepiece();
    let hello = tokenizer.token_to_id("▁hello").unwrap();
    let first = |start| {
        let mut out = String::new();
        tokenizer.detokenizer(Controls::Hide, start).push(hello, &mut out);
        out
    };
    assert_eq!(first(Start::Fresh), "hello");
    assert_eq!(first(Start::Continues), " hello");
}

/// A long run of bytes that never become a character costs the same per token at its end.
#[test]
fn endless_broken_bytes_are_not_kept() {
    let tokenizer = byte_level();
    let broken = (0..256).find(|&id| tokenizer.token_bytes(id) == [0x80]).unwrap();
    let mut stream = stream(&tokenizer, &[]);
    for _ in 0..200_000 {
        assert_eq!(stream.push(broken).piece.text, "\u{fffd}");
    }
}

/// The first stop string to end in the text, the longest of those.
fn reference<'t>(text: &'t str, stops: &[&str]) -> Option<&'t str> {
    stops.iter().filter_map(|stop| text.find(stop).map(|at| (at + stop.len(), at))).min().map(|(_, at)| &text[..at])
}

fn texts() -> impl Strategy<Value = String> {
    let word = prop_oneof![
        "[a-c<>|/ ]{0,6}",
        Just("👩\u{200d}👩\u{200d}👧".to_owned()),
        Just("日本語".to_owned()),
        Just("e\u{301}\u{327}".to_owned()),
        Just("<|im_end|>".to_owned()),
        Just("</s>".to_owned()),
        Just("\u{fffd}\0".to_owned()),
        "\\PC{0,4}",
    ];
    prop::collection::vec(word, 0..8).prop_map(|words| words.concat())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    /// Streaming gives the text of all ids together, which is what was encoded.
    #[test]
    fn streamed_text_is_the_whole_text(text in texts()) {
        for tokenizer in [&tinybee(), &byte_level(), &sentencepiece()] {
            let ids = tokenizer.encode(&text, Specials::AsText).unwrap();
            prop_assert!(ids.iter().all(|&id| !tokenizer.is_control(id)));
            prop_assert_eq!(run(tokenizer, &[], &ids), (text.clone(), false));
            // Cut between any two ids, a copy goes on as the first would have.
            let mut before = stream(tokenizer, &[]);
            let mut sent = String::new();
            for (at, &id) in ids.iter().enumerate() {
                let mut copy = before.clone();
                let mut rest: String = ids[at..].iter().map(|&id| copy.push(id).piece.text).collect();
                rest.push_str(&copy.finish().text);
                prop_assert_eq!(format!("{sent}{rest}"), text.as_str());
                sent.push_str(&before.push(id).piece.text);
            }
        }
    }

    /// Any ids at all give the text of their bytes, broken ones replaced as everywhere.
    #[test]
    fn any_ids_give_the_text_of_their_bytes(ids in prop::collection::vec(0u32..300, 0..40)) {
        for tokenizer in [&byte_level(), &sentencepiece()] {
            let bytes: Vec<u8> = ids
                .iter()
                .filter(|&&id| !tokenizer.is_control(id))
                .flat_map(|&id| tokenizer.token_bytes(id).to_vec())
                .collect();
            let lossy = String::from_utf8_lossy(&bytes).into_owned();
            let (text, _) = run(tokenizer, &[], &ids);
            match tokenizer.token_to_id("</s>") {
                Some(_) => prop_assert_eq!(&text, lossy.strip_prefix(' ').unwrap_or(&lossy)),
                None => prop_assert_eq!(&text, &lossy),
            }
        }
        let oracle = tokenizers::Tokenizer::from_bytes(
            serde_json::to_vec(&byte_level_json()).unwrap(),
        ).unwrap();
        prop_assert_eq!(run(&byte_level(), &[], &ids).0, oracle.decode(&ids, true).unwrap());
    }

    /// The matcher finds what a search over the whole text finds, however the text is cut.
    #[test]
    fn stops_are_those_of_a_search_over_the_whole_text(
        pieces in prop::collection::vec("[ab]{0,5}|é|日", 0..12),
        stops in prop::collection::vec("[ab]{1,4}|bé|日a", 0..4),
    ) {
        let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
        let whole = pieces.concat();
        let mut matcher = StopMatcher::new(&stops).unwrap();
        let mut out = String::new();
        let mut stopped = false;
        for piece in &pieces {
            if matcher.push(piece, &mut out) == Scan::Stopped {
                stopped = true;
                break;
            }
            // Nothing is held back that could not become a stop string.
            let seen = pieces.concat();
            prop_assert!(seen.starts_with(&out));
        }
        if !stopped {
            matcher.finish(&mut out);
        }
        match reference(&whole, &stops) {
            Some(text) => prop_assert_eq!((out.as_str(), stopped), (text, true)),
            None => prop_assert_eq!((out.as_str(), stopped), (whole.as_str(), false)),
        }
    }

    /// Through both: the stop is found over token borders inside characters too.
    #[test]
    fn streams_stop_where_a_search_would(text in texts(), stop in "[a-c<|]{1,2}|語|👧") {
        let tokenizer = byte_level();
        let ids = tokenizer.encode(&text, Specials::AsText).unwrap();
        let expected = match reference(&text, &[&stop]) {
            Some(before) => (before.to_owned(), true),
            None => (text.clone(), false),
        };
        prop_assert_eq!(run(&tokenizer, &[&stop], &ids), expected);
    }
}
