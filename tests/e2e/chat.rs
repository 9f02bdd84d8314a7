//! `rbee chat` as a person has it: keys go into a real terminal, and what stands on its screen is looked at.

use std::time::Duration;

use rbee_testkit::terminal::key::{BACKSPACE, CTRL_C, CTRL_D, ENTER, LEFT, TAB, UP};
use rbee_testkit::{Cluster, Setup, Signal, Tap, Terminal, patience, sim};
use rbee_wire::view::JobState;
use serde_json::{Value, json};

use crate::prompt;

/// A chat on a terminal of the usual size, at its first prompt.
#[track_caller]
fn chat(cluster: &Cluster, args: &[&str]) -> Terminal {
    let terminal = cluster.cmd(&[&["chat"], args].concat()).on_terminal(80, 24);
    terminal.sees_line(">");
    terminal
}

/// Says something and waits for the whole answer of a simulated worker, and for the next prompt.
#[track_caller]
fn ask(terminal: &Terminal, keys: &str, text: &str, tokens: usize) {
    terminal.types(keys).types(ENTER);
    answered(terminal, text, tokens);
}

#[track_caller]
fn answered(terminal: &Terminal, text: &str, tokens: usize) {
    // An answer begins its line, so that a prompt or typing before it shows.
    let answer = format!("\n{}\n", sim::text(0, text, tokens));
    terminal.sees(&format!("the answer to {text:?}"), |screen| screen.contains(&answer));
    terminal.sees_line(">");
}

/// Gives a command and waits for what it answers, and for the next prompt.
#[track_caller]
fn told(terminal: &Terminal, line: &str, answer: &str) {
    terminal.types(line).types(ENTER);
    terminal.sees(&format!("{answer:?} after {line:?}"), |screen| {
        screen.rsplit_once(&format!("> {line}\n")).is_some_and(|(_, after)| after.contains(answer))
    });
    terminal.sees_line(">");
}

#[track_caller]
fn leave(mut terminal: Terminal) {
    terminal.sees_line(">");
    terminal.types(CTRL_D);
    assert_eq!(terminal.ends(), 0, "{}", terminal.screen());
    assert!(terminal.is_cooked(), "the terminal is as it was found");
}

fn said(role: &str, text: &str) -> Value {
    json!({ "role": role, "content": text })
}

#[test]
fn a_conversation_streams_is_sent_whole_and_shows_its_pace() {
    let cluster = Setup::sim("--sim-step-us 100000").warm();
    let tap = Tap::new(cluster.queen);
    let queen = format!("http://{}", tap.address);
    let args = ["--queen", &queen, "--system", "be brief", "--max-tokens", "12", "--temperature", "0.5"];
    let terminal = chat(&cluster, &args);
    let (first, second) = (prompt("first"), prompt("second"));
    terminal.types(&first).types(ENTER);
    let begun = sim::text(0, &first, 3);
    terminal.sees("text before its end", |screen| screen.contains(&begun) && !screen.contains("12 tokens"));
    answered(&terminal, &first, 12);
    let screen = terminal.screen();
    assert!(screen.contains("\n12 tokens, ") && screen.contains(" tokens/s, the first after 0."), "{screen}");
    assert!(screen.contains("cut off by max_tokens"), "{screen}");
    assert!(terminal.raw().contains("\x1b[2m12 tokens"), "the line is dim");
    assert!(terminal.titles().iter().any(|title| title.contains(" tokens/s")), "{:?}", terminal.titles());
    assert!(terminal.raw().contains("\x1b[22;2t") && terminal.raw().contains("\x1b[23;2t"), "the title is given back");
    ask(&terminal, &second, &second, 12);
    let jobs = tap.infer_jobs();
    assert_eq!(jobs[0]["messages"], json!([said("system", "be brief"), said("user", &first)]));
    let history = json!([
        said("system", "be brief"),
        said("user", &first),
        said("assistant", &sim::text(0, &first, 12)),
        said("user", &second)
    ]);
    assert_eq!((&jobs[1]["messages"], &jobs[1]["temperature"]), (&history, &json!(0.5)));
    assert_eq!(jobs[1]["model"], "tinybee", "who answered first goes on answering");
    leave(terminal);
}

#[test]
fn earlier_lines_come_back_and_can_be_changed() {
    let cluster = Setup::sim("").warm();
    let terminal = chat(&cluster, &["--max-tokens", "4"]);
    ask(&terminal, "one", "one", 4);
    ask(&terminal, "two", "two", 4);
    terminal.types(UP);
    terminal.sees_line("> two");
    terminal.types(UP);
    terminal.sees_line("> one");
    terminal.types(LEFT).types(BACKSPACE).types("X");
    terminal.sees_line("> oXe");
    ask(&terminal, "", "oXe", 4);
    terminal.types("/he").types(TAB);
    terminal.sees_line("> /help");
    terminal.types(CTRL_C);
    leave(terminal);
    let kept: Vec<_> = std::fs::read_dir(cluster.folder().join("state")).unwrap().flatten().collect();
    assert!(kept.iter().all(|file| !file.file_name().to_string_lossy().contains("history")), "{kept:?}");
}

#[test]
fn texts_of_several_lines() {
    let cluster = Setup::sim("").warm();
    let terminal = chat(&cluster, &["--max-tokens", "4"]);
    // Quoted text is taken as it is; nothing is sent before it closes.
    terminal.types("\"\"\"").types(ENTER).types("a \\").types(ENTER).types(ENTER);
    terminal.types("b");
    terminal.sees_line("b");
    assert!(cluster.answers().is_empty());
    ask(&terminal, "\"\"\"", "a \\\n\nb", 4);
    // A backslash at the end of the line is not sent.
    terminal.types("c\\").types(ENTER).types("d\\").types(ENTER);
    ask(&terminal, "e", "c\nd\ne", 4);
    terminal.types(UP);
    terminal.sees("all lines again", |screen| screen.ends_with("> c\nd\ne"));
    terminal.types(CTRL_C);
    terminal.sees_line(">");
    // Pasted text waits for Enter and keeps its backslashes.
    terminal.types("\x1b[200~run \\\r\n  it\x1b[201~");
    terminal.sees_line("  it");
    ask(&terminal, "", "run \\\n  it", 4);
    leave(terminal);
}

#[test]
fn ctrl_c_stops_the_answer_and_not_the_program() {
    let cluster = Setup::sim("--sim-step-us 20000").warm();
    let tap = Tap::new(cluster.queen);
    let terminal = chat(&cluster, &["--queen", &format!("http://{}", tap.address)]);
    let text = prompt("stops");
    terminal.types(&text).types(ENTER);
    let begun = sim::text(0, &text, 5);
    terminal.sees("some text", |screen| screen.contains(&begun));
    terminal.types("typed meanwhile").types(CTRL_C);
    terminal.sees_text("stopped; ");
    terminal.sees_line(">");
    assert!(!terminal.screen().contains("^C"), "{}", terminal.screen());
    cluster.workers_when("a free slot", patience(Duration::from_millis(500)), |workers| workers[0].slots.used == 0);
    assert_eq!(cluster.answers()[0].state, JobState::Cancelled);

    told(&terminal, "/set max_tokens 3", "max_tokens  3");
    ask(&terminal, "go on", "go on", 3);
    let messages = tap.infer_jobs()[1]["messages"].clone();
    let part = messages[1]["content"].as_str().unwrap().to_owned();
    assert!(part.starts_with(&begun) && sim::text(0, &text, 1000).starts_with(&part), "{part}");
    assert_eq!(messages, json!([said("user", &text), said("assistant", &part), said("user", "go on")]));
    assert!(terminal.screen().contains(&format!("\n{part}\nstopped; ")), "what is on the screen is what is kept");
    leave(terminal);
}

#[test]
fn ctrl_c_at_the_prompt_clears_the_line() {
    let cluster = Setup::sim("").warm();
    let terminal = chat(&cluster, &["--max-tokens", "4"]);
    terminal.types("not this");
    terminal.sees_line("> not this");
    terminal.types(CTRL_C);
    terminal.sees_line(">");
    assert!(!terminal.screen().contains("/bye or Ctrl-D leaves"));
    ask(&terminal, "this", "this", 4);
    terminal.types("once");
    terminal.sees_line("> once");
    terminal.types(CTRL_C);
    terminal.sees_line(">");
    terminal.types("again").types(CTRL_C);
    terminal.sees_text("/bye or Ctrl-D leaves");
    terminal.sees_line(">");
    // With text on the line Ctrl-D only deletes.
    terminal.types("ab").types(LEFT).types(CTRL_D);
    terminal.sees_line("> a");
    ask(&terminal, "", "a", 4);
    leave(terminal);
}

#[test]
fn a_terminal_that_changes_its_size() {
    let cluster = Setup::sim("--sim-step-us 20000").warm();
    let tap = Tap::new(cluster.queen);
    let args = ["--max-tokens", "30", "--queen", &format!("http://{}", tap.address)];
    let terminal = chat(&cluster, &args);
    let text = "a text that is much longer than thirty columns, and so it must wrap there";
    terminal.types(text);
    terminal.sees_line(&format!("> {text}"));
    terminal.resize(30, 24);
    // Without a key in between.
    terminal.sees("the whole text wrapped", |screen| screen.ends_with(&format!("> {text}")));
    terminal.types(BACKSPACE).types("E!");
    let changed = format!("{}E!", &text[..text.len() - 1]);
    terminal.sees("the change at the end", |screen| screen.ends_with(&format!("> {changed}")));
    terminal.types(ENTER);
    let begun = sim::text(0, &changed, 3);
    terminal.sees("some text", |screen| screen.contains(&begun));
    terminal.resize(60, 20);
    terminal.sees_text("30 tokens, ");
    terminal.sees_line(">");
    ask(&terminal, "x", "x", 30);
    assert_eq!(tap.infer_jobs()[1]["messages"][1]["content"], sim::text(0, &changed, 30));
    leave(terminal);
}

#[test]
fn backspace_takes_what_a_person_calls_a_character() {
    let cluster = Setup::sim("").warm();
    let terminal = chat(&cluster, &["--max-tokens", "4"]);
    for (typed, left, columns) in [
        ("日本", "日", 2),
        // A letter with a combining mark.
        ("noe\u{301}", "no", 2),
        // A thumb with a skin tone; a family joined of three; a flag of two letters.
        ("a👍🏽", "a", 1),
        ("b👨\u{200d}👩\u{200d}👧", "b", 1),
        ("c🇳🇱", "c", 1),
        ("שלום", "שלו", 3),
    ] {
        terminal.types(typed).types(BACKSPACE);
        terminal.sees_line(&format!("> {left}"));
        assert_eq!(terminal.column(), 2 + columns, "{typed}");
        ask(&terminal, "", left, 4);
    }
    // In the middle of wide text.
    terminal.types("日本語").types(LEFT).types(BACKSPACE).types("e\u{301}");
    terminal.sees_line("> 日e\u{301}語");
    ask(&terminal, "", "日e\u{301}語", 4);
    leave(terminal);
}

#[test]
fn every_command_does_what_help_says() {
    let cluster = Setup::sim("").warm();
    let tap = Tap::new(cluster.queen);
    let queen = format!("http://{}", tap.address);
    let mut terminal = chat(&cluster, &["--queen", &queen]);
    let told = |line: &str, answer: &str| told(&terminal, line, answer);
    for name in ["/system", "/model", "/save", "/load", "/clear", "/set", "/bye", "\"\"\"", "Ctrl-C"] {
        told("/help", name);
    }
    told("/model", "the default model");
    told("/model a b", "is not a model");
    told("/model ./none", "no model at");
    told("/model tinybee", "tinybee gives the next answer");
    told("/system", "there is no system message");
    told("/system be kind", "from the next answer on");
    told("/system", "be kind");
    told("/set temperature 9", "`temperature` must be");
    told("/set temprature 1", "did you mean temperature?");
    told("/set temperature 0.25", "0.25");
    told("/set max_tokens 2", "max_tokens");
    told("/set stop [\"zzzz\"]", "zzzz");
    told("/set seed 7", "7");
    told("/set seed default", "seed");
    told("/set", "min_p");
    told("/hepl", "did you mean /help?");
    told("/save", "/save needs FILE");
    told("//help", &sim::text(0, "/help", 2));
    told("/clear", "begins anew");
    told("/system \"\"", "no system message from now on");
    ask(&terminal, "hello", "hello", 2);
    let jobs = tap.infer_jobs();
    assert_eq!(jobs[0]["messages"], json!([said("system", "be kind"), said("user", "/help")]));
    assert_eq!(jobs[1]["messages"], json!([said("user", "hello")]));
    let fields = |name: &str| jobs[1].get(name).cloned().unwrap_or_default();
    assert_eq!(
        ["temperature", "max_tokens", "stop", "seed"].map(fields),
        [json!(0.25), json!(2), json!(["zzzz"]), Value::Null]
    );
    terminal.types("/bye").types(ENTER);
    assert_eq!(terminal.ends(), 0);
    assert!(terminal.is_cooked());
}

#[test]
fn a_chat_is_saved_and_goes_on_elsewhere() {
    let cluster = Setup::sim("").warm();
    let tap = Tap::new(cluster.queen);
    let queen = format!("http://{}", tap.address);
    let args = ["--max-tokens", "4", "--queen", &queen];
    let terminal = chat(&cluster, &[&args[..], &["--system", "be kind"]].concat());
    std::fs::write(cluster.folder().join("precious"), "mine").unwrap();
    ask(&terminal, "hello", "hello", 4);
    told(&terminal, "/save ~/chat.json", "1 question with its answer saved");
    told(&terminal, "/save precious", "not a chat");
    assert_eq!(std::fs::read_to_string(cluster.folder().join("precious")).unwrap(), "mine");
    ask(&terminal, "more", "more", 4);
    told(&terminal, "/save chat.json", "2 questions with their answers saved");
    leave(terminal);

    let terminal = chat(&cluster, &args);
    told(&terminal, "/load none.json", "cannot load none.json");
    told(&terminal, "/load precious", "not a chat");
    told(&terminal, "/load chat.json", "2 questions with their answers loaded, for tinybee");
    ask(&terminal, "last", "last", 4);
    let answer = |text: &str| sim::text(0, text, 4);
    let (user, model) = ("user", "assistant");
    assert_eq!(
        tap.infer_jobs().last().unwrap()["messages"],
        json!([
            said("system", "be kind"),
            said(user, "hello"),
            said(model, &answer("hello")),
            said(user, "more"),
            said(model, &answer("more")),
            said(user, "last")
        ])
    );
    leave(terminal);
}

#[test]
fn a_lost_worker_loses_neither_the_chat_nor_the_question() {
    let cluster = Setup::sim("--sim-step-us 20000").warm();
    let tap = Tap::new(cluster.queen);
    let terminal = chat(&cluster, &["--queen", &format!("http://{}", tap.address), "--max-tokens", "100"]);
    let text = prompt("losses");
    terminal.types(&text).types(ENTER);
    let begun = sim::text(0, &text, 3);
    terminal.sees("some text", |screen| screen.contains(&begun));
    cluster.the("llm-worker-rbee").signal(Signal::KILL);
    terminal.sees("the failure with its hint", |screen| screen.contains("(WORKER_LOST)") && screen.contains("hint: "));
    terminal.sees_text("arrow up brings it again");
    terminal.sees_line(">");
    told(&terminal, "/set max_tokens 3", "max_tokens  3");
    terminal.types(UP).types(UP);
    terminal.sees_line(&format!("> {text}"));
    ask(&terminal, "", &text, 3);
    assert_eq!(tap.infer_jobs()[1]["messages"], json!([said("user", &text)]), "the lost turn is not sent");
    leave(terminal);
}

#[test]
fn a_queen_that_is_gone_is_said_and_started_again() {
    let cluster = Setup::sim("--sim-step-us 20000").warm();
    let terminal = chat(&cluster, &["--max-tokens", "100"]);
    terminal.types("hello").types(ENTER);
    let begun = sim::text(0, "hello", 3);
    terminal.sees("some text", |screen| screen.contains(&begun));
    cluster.the("queen-rbee").signal(Signal::KILL);
    terminal.sees_text("error: the queen went away");
    terminal.sees_line(">");
    told(&terminal, "/set max_tokens 3", "max_tokens  3");
    ask(&terminal, "again", "again", 3);
    assert!(terminal.screen().contains("the queen was gone and has been started again"), "{}", terminal.screen());
    leave(terminal);

    let terminal = chat(&cluster, &["--max-tokens", "3", "--no-start"]);
    // Which may still be dying as it is asked.
    cluster.the("queen-rbee").signal(Signal::KILL);
    terminal.types("hello").types(ENTER);
    terminal.sees("why and what to do", |screen| screen.contains("no queen answers at") && screen.contains("rbee up"));
    terminal.sees_line(">");
    cluster.rbee(&["queen", "start"]).exits(0);
    cluster.serving(1);
    terminal.types(UP);
    terminal.sees_line("> hello");
    ask(&terminal, "", "hello", 3);
    leave(terminal);
}

#[test]
fn without_two_terminals_there_is_no_chat() {
    let cluster = Setup::sim("").home();
    cluster.rbee(&["chat"]).exits(2).says(&["terminal", "rbee infer"]);
    cluster.cmd(&["chat"]).stdin("hello\n").run().exits(2).says(&["rbee infer"]);
    for (args, hint) in
        [(&["chat", "--json"][..], "rbee infer --json"), (&["run", "tinybee", "--json"], "rbee infer --json")]
    {
        let mut terminal = cluster.cmd(args).on_terminal(80, 24);
        assert_eq!(terminal.ends(), 2);
        terminal.sees_text(hint);
    }
    let mut terminal = cluster.cmd(&["chat", "--temperature", "9"]).on_terminal(80, 24);
    assert_eq!(terminal.ends(), 1);
    terminal.sees_text("`temperature` must be");
    let mut terminal = cluster.cmd(&["chat", "--no-start"]).on_terminal(80, 24);
    assert_eq!(terminal.ends(), 4);
    let mut terminal = cluster.cmd(&["run", "tinybee", "--raw"]).on_terminal(80, 24);
    assert_eq!(terminal.ends(), 2);
    terminal.sees_text("has no --raw");
    assert_eq!(cluster.processes(), []);
}

#[test]
fn run_without_a_prompt_is_a_chat_that_starts_and_loads_what_it_needs() {
    let cluster = Setup::sim("--sim-load-ms 2500").home();
    let terminal = cluster.cmd(&["run", "tinybee", "--max-tokens", "4"]).on_terminal(40, 24);
    terminal.sees_line(">");
    assert!(terminal.screen().contains("queen and hive keep running"), "{}", terminal.screen());
    terminal.types("hello").types(ENTER);
    terminal
        .sees("the load's progress", |screen| screen.lines().last().is_some_and(|line| line.starts_with("loading")));
    answered(&terminal, "hello", 4);
    assert!(!terminal.screen().contains("loading"), "the progress is gone: {}", terminal.screen());
    leave(terminal);

    let mut once = cluster.cmd(&["run", "tinybee", "hello", "--max-tokens", "4"]).on_terminal(80, 24);
    assert_eq!(once.ends(), 0);
    once.sees_text(&sim::text(0, "hello", 4));
}

#[test]
fn what_is_typed_during_an_answer_is_on_the_next_line() {
    let cluster = Setup::sim("--sim-step-us 30000").warm();
    let terminal = chat(&cluster, &["--max-tokens", "30"]);
    terminal.types("first").types(ENTER);
    let begun = sim::text(0, "first", 3);
    terminal.sees("some text", |screen| screen.contains(&begun));
    terminal.types("second\rthird\rfour");
    let answers = ["first", "second", "third"].map(|text| format!("> {text}\n{}\n30 tokens, ", sim::text(0, text, 30)));
    terminal.sees("three answers", |screen| {
        // The worker's note before the first answer aside.
        let screen: Vec<&str> = screen.lines().filter(|line| !line.starts_with("no model named")).collect();
        answers.iter().all(|answer| screen.join("\n").contains(answer))
    });
    terminal.sees_line("> four");
    terminal.types(CTRL_C);
    leave(terminal);
}

#[test]
fn a_chat_that_is_told_to_end_leaves_the_terminal_in_order() {
    let cluster = Setup::sim("--sim-step-us 20000").warm();
    let mut terminal = chat(&cluster, &[]);
    terminal.types("hello").types(ENTER);
    let begun = sim::text(0, "hello", 3);
    terminal.sees("some text", |screen| screen.contains(&begun));
    assert!(!terminal.is_cooked(), "typing is not shown meanwhile");
    terminal.signal(Signal::TERM);
    assert_eq!(terminal.ends(), 130);
    assert!(terminal.is_cooked());
    cluster.workers_when("a free slot", patience(Duration::from_millis(500)), |workers| workers[0].slots.used == 0);
    let mut terminal = chat(&cluster, &[]);
    assert!(!terminal.is_cooked(), "the editor shows what is typed");
    terminal.signal(Signal::TERM);
    assert_eq!(terminal.ends(), 130);
    assert!(terminal.is_cooked());
}

#[test]
fn colour_and_hints_are_left_out_where_they_are_not_wanted() {
    let cluster = Setup::sim("").env("NO_COLOR", 1).warm();
    let terminal = chat(&cluster, &["--max-tokens", "4"]);
    ask(&terminal, "hello", "hello", 4);
    terminal.types("/hepl").types(ENTER);
    terminal.sees_text("error: there is no command /hepl");
    terminal.sees_line(">");
    for style in ["\x1b[2m", "\x1b[1;31m", "\x1b[36m"] {
        assert!(!terminal.raw().contains(style), "{:?}", terminal.raw());
    }
    leave(terminal);
    let terminal = chat(&cluster, &["--max-tokens", "4", "-q"]);
    ask(&terminal, "hello", "hello", 4);
    assert!(!terminal.screen().contains("tokens") && !terminal.raw().contains("\x1b]2;"), "{:?}", terminal.raw());
    leave(terminal);
}
