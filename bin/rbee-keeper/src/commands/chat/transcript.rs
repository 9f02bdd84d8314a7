//! The conversation: what was said so far, and the form in which it is kept in files.

use rbee_wire::ModelRef;
use rbee_wire::job::Message;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::exit::{Exit, Failure};

/// What was said so far. A question without an answer is never in it, so that roles alternate, which the
/// templates of many models ask for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Transcript {
    /// What the model is told before everything else.
    pub(super) system: Option<String>,
    /// Questions with their answers.
    pub(super) turns: Vec<Turn>,
}

/// A question with its answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Turn {
    /// What the person said.
    pub(super) question: String,
    /// What the model said.
    pub(super) answer: String,
    /// Why it said no more.
    pub(super) end: End,
}

/// Why an answer has no more text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum End {
    /// The model was done.
    #[default]
    Whole,
    /// `max_tokens` or the context's end cut it off.
    Length,
    /// Somebody stopped it. The model gets the part that came, as it came.
    Stopped,
}

impl End {
    fn is_whole(&self) -> bool {
        *self == Self::Whole
    }
}

/// The file's version; a reader takes its own and older ones.
const VERSION: u64 = 1;

/// A chat in a file.
#[derive(Debug, Serialize, Deserialize)]
struct ChatFile {
    /// Says whose file it is, and its version.
    rbee_chat: u64,
    #[serde(default)]
    model: Option<ModelRef>,
    #[serde(default)]
    system: Option<String>,
    messages: Vec<SavedMessage>,
}

#[derive(Debug, Serialize, Deserialize)]
struct SavedMessage {
    role: String,
    content: String,
    #[serde(default, skip_serializing_if = "End::is_whole")]
    end: End,
}

/// The version of a chat file, `None` when the bytes are something else.
pub(super) fn version(bytes: &[u8]) -> Option<u64> {
    serde_json::from_slice::<Map<String, Value>>(bytes).ok()?.get("rbee_chat")?.as_u64()
}

impl Transcript {
    /// What the model is to answer: everything so far and the next question.
    pub(super) fn messages(&self, question: &str) -> Vec<Message> {
        let mut messages: Vec<Message> = self.system.iter().map(|text| Message::new("system", text)).collect();
        for turn in &self.turns {
            messages.push(Message::new("user", &turn.question));
            messages.push(Message::new("assistant", &turn.answer));
        }
        messages.push(Message::new("user", question));
        messages
    }

    /// The text of a file that keeps it.
    pub(super) fn to_file(&self, model: Option<&ModelRef>) -> String {
        let saved =
            |role: &str, content: &String, end| SavedMessage { role: role.into(), content: content.clone(), end };
        let both =
            |turn: &Turn| [saved("user", &turn.question, End::Whole), saved("assistant", &turn.answer, turn.end)];
        let file = ChatFile {
            rbee_chat: VERSION,
            model: model.cloned(),
            system: self.system.clone(),
            messages: self.turns.iter().flat_map(both).collect(),
        };
        serde_json::to_string_pretty(&file).expect("texts and numbers are JSON") + "\n"
    }

    /// What a file keeps: the conversation, and the model if it has one.
    ///
    /// # Errors
    /// What the file is instead, or what is wrong with it.
    pub(super) fn from_file(bytes: &[u8]) -> Result<(Self, Option<ModelRef>), Failure> {
        match version(bytes) {
            None => return Err(Failure::new(Exit::Failed, "it is not a chat that /save wrote")),
            Some(version) if version > VERSION => {
                return Err(Failure::new(
                    Exit::Failed,
                    format!("it is of format {version}, and this rbee reads {VERSION}"),
                )
                .hint("use the rbee that wrote it, or a later one"));
            }
            Some(_) => {}
        }
        let file: ChatFile = serde_json::from_slice(bytes)
            .map_err(|error| Failure::new(Exit::Failed, format!("it is a damaged chat: {error}")))?;
        let mut turns = Vec::new();
        let mut messages = file.messages.into_iter();
        while let Some(question) = messages.next() {
            let at = turns.len() * 2;
            let wrong = |number: usize, role: &str| {
                Failure::new(Exit::Failed, format!("it is a damaged chat: message {number} is not of role {role}"))
            };
            if question.role != "user" {
                return Err(wrong(at, "user"));
            }
            match messages.next() {
                Some(answer) if answer.role == "assistant" => {
                    turns.push(Turn { question: question.content, answer: answer.content, end: answer.end });
                }
                _ => return Err(wrong(at + 1, "assistant")),
            }
        }
        Ok((Self { system: file.system, turns }, file.model))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chat() -> Transcript {
        let turn = |question: &str, answer: &str, end| Turn { question: question.into(), answer: answer.into(), end };
        Transcript {
            system: Some("be kind".into()),
            turns: vec![turn("a", "b", End::Whole), turn("c\n\"", " d", End::Stopped), turn("e", "f", End::Length)],
        }
    }

    #[test]
    fn every_turn_is_sent_with_the_next_question() {
        let sent: Vec<(String, String)> = chat().messages("g").into_iter().map(|m| (m.role, m.content)).collect();
        let sent: Vec<(&str, &str)> = sent.iter().map(|(role, text)| (role.as_str(), text.as_str())).collect();
        let (user, model) = ("user", "assistant");
        assert_eq!(
            sent,
            [
                ("system", "be kind"),
                (user, "a"),
                (model, "b"),
                (user, "c\n\""),
                (model, " d"),
                (user, "e"),
                (model, "f"),
                (user, "g")
            ]
        );
        assert_eq!(Transcript::default().messages("x").len(), 1);
    }

    #[test]
    fn a_file_gives_back_what_was_saved() {
        let model: ModelRef = "org/name:Q4_K_M".parse().unwrap();
        let text = chat().to_file(Some(&model));
        assert!(text.contains("\"end\": \"stopped\"") && text.contains("\"end\": \"length\""), "{text}");
        assert_eq!(text.matches("\"end\"").count(), 2, "{text}");
        assert_eq!(Transcript::from_file(text.as_bytes()).unwrap(), (chat(), Some(model)));
        let empty = Transcript::default();
        assert_eq!(Transcript::from_file(empty.to_file(None).as_bytes()).unwrap(), (empty, None));
    }

    #[test]
    fn what_is_no_chat_is_refused_with_the_reason() {
        for (text, why) in [
            ("", "not a chat"),
            ("[1]", "not a chat"),
            (r#"{"messages":[]}"#, "not a chat"),
            (r#"{"rbee_chat":"1","messages":[]}"#, "not a chat"),
            (r#"{"rbee_chat":2}"#, "format 2"),
            (r#"{"rbee_chat":1}"#, "messages"),
            (r#"{"rbee_chat":1,"model":"a b","messages":[]}"#, "damaged"),
            (r#"{"rbee_chat":1,"messages":[{"role":"assistant","content":"a"}]}"#, "message 0 is not of role user"),
            (r#"{"rbee_chat":1,"messages":[{"role":"user","content":"a"}]}"#, "message 1 is not of role assistant"),
        ] {
            let failure = Transcript::from_file(text.as_bytes()).unwrap_err();
            assert!(failure.message.contains(why), "{text}: {}", failure.message);
        }
        // A later rbee of the same format may add fields.
        assert!(Transcript::from_file(br#"{"rbee_chat":1,"new":1,"messages":[]}"#).is_ok());
    }
}
