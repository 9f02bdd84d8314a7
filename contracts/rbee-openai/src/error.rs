//! Our errors as the dialect has them.

use rbee_wire::{ErrorBody, ErrorCode};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The body of a refusal, and the last event of a stream that failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "DialectErrorReply")]
pub struct Reply {
    /// What went wrong.
    pub error: Error,
}

/// What went wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "DialectError")]
pub struct Error {
    /// What was attempted, what happened, and what to do next.
    pub message: String,
    /// `invalid_request_error`, `rate_limit_error` or `server_error`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The field that is to blame, where one is.
    pub param: Option<String>,
    /// Our code in lower case, or the dialect's own where it has one.
    pub code: Option<String>,
}

impl From<&ErrorBody> for Reply {
    fn from(body: &ErrorBody) -> Self {
        let kind = match body.code.status() {
            429 => "rate_limit_error",
            500.. => "server_error",
            _ => "invalid_request_error",
        };
        let code = match body.code {
            ErrorCode::Unauthorized => "invalid_api_key".to_owned(),
            other => other.name().to_lowercase(),
        };
        let message = match &body.hint {
            Some(hint) => format!("{}; {hint}", body.message),
            None => body.message.clone(),
        };
        let param = body.details.as_ref().and_then(|details| details["violations"][0]["field"].as_str());
        let param = param.or((body.code == ErrorCode::ModelNotFound).then_some("model")).map(str::to_owned);
        Self { error: Error { message, kind: kind.into(), param, code: Some(code) } }
    }
}

/// What the SDKs are told of a retry beyond what the status says: nothing, unless it cannot help.
pub fn retry_is_vain(body: &ErrorBody) -> bool {
    !body.retryable && (body.code.status() >= 500 || matches!(body.code.status(), 408 | 409 | 429))
}

#[cfg(test)]
mod tests {
    use rbee_wire::fields::Violation;
    use rbee_wire::job::invalid;

    use super::*;

    #[test]
    fn every_code_has_a_type_and_a_name_of_the_dialect() {
        for &code in ErrorCode::ALL {
            let Reply { error } = Reply::from(&ErrorBody::new(code, "m"));
            assert!(matches!(error.kind.as_str(), "invalid_request_error" | "rate_limit_error" | "server_error"));
            assert!(error.code.is_some_and(|name| name == name.to_lowercase() && !name.is_empty()));
        }
        let of = |code| Reply::from(&ErrorBody::new(code, "m")).error.code.unwrap();
        assert_eq!(of(ErrorCode::Unauthorized), "invalid_api_key");
        assert_eq!(of(ErrorCode::ModelNotFound), "model_not_found");
        assert_eq!(of(ErrorCode::ContextLengthExceeded), "context_length_exceeded");
    }

    #[test]
    fn the_first_field_at_fault_is_named() {
        let body = invalid(vec![
            Violation { field: "top_p".into(), problem: "is wrong".into() },
            Violation { field: "n".into(), problem: "is too".into() },
        ]);
        let json = serde_json::to_value(Reply::from(&body)).unwrap();
        assert_eq!(json["error"]["param"], "top_p");
        assert_eq!(json["error"]["type"], "invalid_request_error");
        assert!(json["error"]["message"].as_str().unwrap().contains("`n` is too"));
        let plain = serde_json::to_value(Reply::from(&ErrorBody::new(ErrorCode::Internal, "m"))).unwrap();
        assert_eq!(plain["error"]["param"], serde_json::Value::Null);
    }
}
