//! `docs/api.md`: what becomes of every field of the OpenAI dialect, from the table that parses them.

use std::fmt::Write as _;

use rbee_openai::fields::{Endpoint, Fate};
use rbee_wire::fields::Kind;
use rbee_wire::op::INFER_FIELDS;

/// The page.
pub fn page() -> String {
    let mut out = String::from(
        "# The OpenAI API\n\n\
         Point a client at `http://127.0.0.1:7833/v1`; any key will do while the queen has no token. With one, `rbee key create --name NAME` makes keys (`OPENAI_API_KEY`), with limits if wanted: over one it is `429` with `rate_limit_exceeded` and `Retry-After`. `model` is whatever `rbee infer \
         --model` takes, or an alias; without one the default answers. `GET /v1/models` lists what serves, the aliases and the built-in \
         model. A model that is not loaded is loaded: a stream's headers come after 10 s at the latest and comments fill the silence, a whole \
         answer waits.\n\n\
         Each row is tried by `cargo xtask test` on the built programs (`tests/e2e/openai.rs`): what is honoured with a good value and a \
         bad one, what is refused with one that asks for something and one that does not. The openai packages for Python (3.54 and \
         1.109) and Node (6.49) run against it as well (`tests/sdk/`).\n\n\
         - A field that is *ignored*, or that no table has, is named in the response header `x-rbee-ignored`; with the request header \
         `x-rbee-strict: true` it is refused.\n\
         - Errors are `{\"error\": {\"message\", \"type\", \"param\", \"code\"}}` with our code in lower case \
         ([errors](reference/errors.md)), whatever part of the queen refuses. `x-should-retry: false` stands where a retry cannot help, \
         `Retry-After` where it can.\n\
         - A stream that fails after its first token ends in such an error as its last event, and never in `[DONE]`.\n\
         - Events have no `id` and no name; keep-alives are comments of one line.\n\
         - A client that leaves cancels its answer, streamed or not.\n\
         - `Server-Timing` says where the time went until the headers were sent, in milliseconds: queue, load, prefill, of it network, decode, total. \
         A `traceparent` is written into the logs of queen and worker.\n\
         - A whole answer that is over 300 s away is refused with 503 and `Retry-After`; a stream waits.\n\
         - Reasoning is in `reasoning_content`, where the model's family has it apart from the answer. `tools` are refused by models whose \
         template has no place for them.\n\
         - An answer with a `response_format`, and calls that a `tool_choice` asks for, are held to their form token by token: what comes is of the \
         schema, whatever the model and the seed, unless `max_tokens` cuts it off (`length`). Reasoning comes before and is free. A schema that cannot be \
         adhered to is `400` with the reason. Beside `json_object` and `json_schema` the types `regex` (`{\"type\": \"regex\", \"regex\": …}`) and \
         `grammar` (in Lark's notation) are rbee's own.\n\
         - `GET /openapi.json` has all of it as an OpenAPI 3.1 document ([the same](reference/openapi.json)).\n\
         - `system_fingerprint` is release, build, weights and numerics id: two answers that share it came from the same arithmetic.\n",
    );
    for endpoint in Endpoint::ALL {
        let _ = writeln!(out, "\n## `POST {}`\n\n| field | | |\n|---|---|---|", endpoint.path());
        for field in endpoint.fields() {
            let (fate, more) = match field.fate {
                Fate::Job(name) => ("honoured", job_field(field.name, name)),
                Fate::Own(how) => ("honoured", how.to_owned()),
                Fate::Refused(unless) => ("refused", unless.to_owned()),
                Fate::Ignored => ("ignored", String::new()),
            };
            let _ = writeln!(out, "| `{}` | {fate} | {more} |", field.name);
        }
    }
    out
}

fn job_field(name: &str, of_job: &str) -> String {
    let Some(row) = INFER_FIELDS.iter().find(|row| row.name == of_job) else { return String::new() };
    let range = match row.kind {
        Kind::Int(min, max) => format!("; {min} to {max}"),
        Kind::Float(min, max) => format!("; {min} to {max}"),
        Kind::Texts(max) => format!("; at most {max}"),
        _ => String::new(),
    };
    let renamed = if name == of_job { String::new() } else { format!("; another name of `{of_job}`") };
    format!("{}{range}{renamed}", row.about)
}
