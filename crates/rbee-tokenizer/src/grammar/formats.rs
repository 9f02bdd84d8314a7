//! String formats as regular expressions: subsets of their RFCs on which all validators agree.

/// The names of the formats that can be enforced.
pub(super) const NAMES: [&str; 10] =
    ["date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"];

/// Days that every year has, and the 29th of February in those that have it.
macro_rules! date {
    () => {
        concat!(
            r"(?:[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|",
            r"02-(?:0[1-9]|1[0-9]|2[0-8]))|",
            r"(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)-02-29)"
        )
    };
}

/// No leap seconds: whether there was one is in no expression.
macro_rules! time {
    () => {
        r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,9})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
    };
}

macro_rules! label {
    () => {
        r"[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,30}[a-zA-Z0-9])?"
    };
}

macro_rules! hostname {
    () => {
        concat!(label!(), r"(?:\.", label!(), "){0,6}")
    };
}

macro_rules! ipv4 {
    () => {
        r"(?:(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])\.){3}(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
    };
}

macro_rules! group {
    () => {
        "[0-9a-fA-F]{1,4}"
    };
}

/// A format's texts, anchored.
pub(super) fn pattern(name: &str) -> Option<&'static str> {
    Some(match name {
        "date" => concat!("^", date!(), "$"),
        "time" => concat!("^", time!(), "$"),
        "date-time" => concat!("^", date!(), "T", time!(), "$"),
        "duration" => concat!(
            r"^P(?:[0-9]{1,9}W|(?:[0-9]{1,9}Y(?:[0-9]{1,9}M(?:[0-9]{1,9}D)?)?|[0-9]{1,9}M(?:[0-9]{1,9}D)?|[0-9]{1,9}D)",
            r"(?:T(?:[0-9]{1,9}H(?:[0-9]{1,9}M(?:[0-9]{1,9}S)?)?|[0-9]{1,9}M(?:[0-9]{1,9}S)?|[0-9]{1,9}S))?|",
            r"T(?:[0-9]{1,9}H(?:[0-9]{1,9}M(?:[0-9]{1,9}S)?)?|[0-9]{1,9}M(?:[0-9]{1,9}S)?|[0-9]{1,9}S))$"
        ),
        "email" => concat!(
            r"^[a-zA-Z0-9_+-]{1,16}(?:\.[a-zA-Z0-9_+-]{1,16}){0,2}@",
            label!(),
            r"(?:\.",
            label!(),
            r"){0,4}\.[a-zA-Z]{2,16}$"
        ),
        "hostname" => concat!("^", hostname!(), "$"),
        "ipv4" => concat!("^", ipv4!(), "$"),
        "ipv6" => concat!(
            r"^(?:(?:",
            group!(),
            r":){7}",
            group!(),
            r"|::(?:",
            group!(),
            r":){0,5}",
            group!(),
            r"|(?:",
            group!(),
            r":){1,6}:",
            group!(),
            r"|(?:",
            group!(),
            r":){1,7}:|::)$"
        ),
        "uuid" => r"^[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}$",
        "uri" => concat!(
            r"^[a-zA-Z][a-zA-Z0-9+.-]{0,15}:(?://",
            hostname!(),
            r"(?::[0-9]{1,4})?(?:/(?:[a-zA-Z0-9._~!$&'()*+,;=:@-]|%[0-9a-fA-F]{2})*)*|",
            r"(?:[a-zA-Z0-9._~!$&'()*+,;=:@-]|%[0-9a-fA-F]{2})+(?:/(?:[a-zA-Z0-9._~!$&'()*+,;=:@-]|%[0-9a-fA-F]{2})*)*)",
            r"(?:\?(?:[a-zA-Z0-9._~!$&'()*+,;=:@/?-]|%[0-9a-fA-F]{2})*)?",
            r"(?:#(?:[a-zA-Z0-9._~!$&'()*+,;=:@/?-]|%[0-9a-fA-F]{2})*)?$"
        ),
        _ => return None,
    })
}
