//! The built-in model: it says what its card says, and its free text reads well.

use std::thread;

use std::collections::HashSet;

use rbee_testkit::story::check_story;
use rbee_testkit::{Cluster, Setup};
use rbee_wire::event::FinishReason;
use serde_json::{Value, json};

fn ask(cluster: &Cluster, prompt: &str, more: &[&str]) -> String {
    cluster.rbee(&[&["infer", "-q", "-p", prompt][..], more].concat()).exits(0).stdout
}

#[test]
fn it_reproduces_the_samples_of_its_card() {
    let cluster = Setup::real().warm();
    let greedy = ["--temperature", "0"];
    let story = ask(&cluster, "Once upon a time", &["--raw", "--temperature", "0"]);
    assert_eq!(
        story.trim_end(),
        ", there was a hungry boy named Theo. Theo had a silver ring that he loved very much. One day, Theo found a \
         little silver boat on the beach. Theo sailed past a big whale, singing a song. Suddenly there was a hole in the \
         boat, and water came in. A dolphin came out of the water. \"I will push you,\" it said. At last, he saw land. \
         There was an island full of flowers. And every summer, Theo sailed to the island with Anna the girl."
    );
    for (prompt, answer) in [
        ("What do bees make?", "Bees make honey."),
        ("Why is the sky blue?", "The sky is blue because the air scatters blue light from the sun."),
        ("Explain quantum physics.", "I do not know. I am too small for that question."),
        ("What is 7 + 5?", "7 + 5 = 12."),
        ("Who are you?", "I am tinybee, a very small language model that lives inside rbee."),
    ] {
        assert_eq!(ask(&cluster, prompt, &greedy).trim(), answer, "{prompt}");
    }
}

#[test]
fn the_same_seed_gives_the_same_text_alone_and_among_others() {
    let cluster = Setup::real().warm();
    let seeded = |seed: &str| ask(&cluster, "Write a story about a fox", &["--seed", seed, "--max-tokens", "60"]);
    let alone = seeded("11");
    assert_ne!(alone, seeded("12"));
    let among: Vec<String> = thread::scope(|scope| {
        let others: Vec<_> = (0..5)
            .map(|i| {
                let cluster = &cluster;
                scope.spawn(move || ask(cluster, &format!("Tell me about bee number {i}."), &["--max-tokens", "80"]))
            })
            .collect();
        let same: Vec<_> = (0..3).map(|_| scope.spawn(|| seeded("11"))).collect();
        others.into_iter().for_each(|thread| drop(thread.join().unwrap()));
        same.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(among.iter().all(|text| *text == alone), "{alone:?} {among:#?}");
}

#[test]
fn a_prompt_that_was_there_before_is_not_computed_again_and_gives_the_same_text() {
    let cluster = Setup::real().warm();
    let prompt = "Once upon a time there was a little bee who lived in a garden with many flowers and many friends.";
    let job = json!({ "operation": "infer", "prompt": prompt, "max_tokens": 20, "temperature": 0 });
    let told: Vec<_> = (0..2).map(|_| cluster.job(&job)).collect();
    let usage = told.iter().map(|told| told.done().usage.unwrap()).collect::<Vec<_>>();
    assert_eq!(usage[0].cached_tokens, 0);
    assert!(usage[1].cached_tokens >= 16 && usage[1].cached_tokens < usage[1].prompt_tokens, "{usage:?}");
    assert_eq!(told[0].text(), told[1].text());
    let timings = told[1].done().timings.unwrap();
    assert!(timings.decode_ms > 0.0 && timings.prefill_ms >= 0.0 && timings.tokens_per_s < 1e6, "{timings:?}");
}

/// Things that people ask a small model, and that it was made for.
const PROMPTS: [&str; 30] = [
    "Write a story about a fox",
    "Tell me a story about a bee and a bear.",
    "Write a story about a frog.",
    "Tell me a story about a girl who lost something.",
    "Write a short story about a mouse.",
    "Tell me a story about a storm.",
    "Please write a story about a rabbit.",
    "Tell me a story about a brave bird.",
    "Write a story about an owl.",
    "Tell me a bedtime story.",
    "Write a story about a hedgehog who finds a treasure.",
    "Tell me a story about two friends.",
    "What do bees make?",
    "Why is the sky blue?",
    "What is the capital of France?",
    "How many legs does a spider have?",
    "What is the opposite of hot?",
    "What color is grass?",
    "What do cows eat?",
    "What is 2 + 3?",
    "Who are you?",
    "What can you do?",
    "Hello!",
    "How are you?",
    "Thank you!",
    "What is a bee?",
    "Explain quantum physics.",
    "Who won the election?",
    "What is a fish?",
    "Where do birds live?",
];

#[test]
fn thirty_prompts_at_its_own_sampling_read_well() {
    let cluster = Setup::real().warm();
    let words = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../tinybee/words.txt")).unwrap();
    let words: HashSet<&str> = words.lines().collect();
    let jobs: Vec<String> = PROMPTS
        .iter()
        .zip(1u64..)
        .map(|(prompt, seed)| {
            let messages = json!([{ "role": "user", "content": prompt }]);
            cluster.post(&json!({ "operation": "infer", "messages": messages, "seed": seed, "detach": true }))
        })
        .collect();
    let mut bad = Vec::new();
    for (prompt, job) in PROMPTS.iter().zip(jobs) {
        let told = cluster.queen().listen(&format!("/v1/jobs/{job}/stream"), None).rest().whole();
        let text = told.text();
        if told.done().choices[0].finish_reason != FinishReason::Stop {
            bad.push(format!("{prompt}: it does not end by itself: {text}"));
        }
        if let Err(problems) = check_story(&text, &words) {
            bad.push(format!("{prompt}: {problems:?}: {text}"));
        }
    }
    assert!(bad.is_empty(), "{} of {}: {bad:#?}", bad.len(), PROMPTS.len());
}

#[test]
fn what_is_reserved_for_it_without_measuring_is_enough() {
    let cluster = Setup::real().warm();
    let needs = cluster.program("llm-worker-rbee", &["inspect", "tinybee"]).run().exits(0).json();
    let processes = cluster.rbee(&["worker", "process", "list", "--json"]).exits(0).json();
    let (needed, reserved) = (needs["total"].as_u64().unwrap(), processes[0]["reserved"].as_u64().unwrap());
    let memory = cluster.status().workers[0].memory;
    assert!(needed <= reserved, "{needed} {reserved}");
    assert!(memory.total <= reserved, "{memory:?} {reserved}");
}

/// Ids of answers that repeat, as their form has it, and of free ones; and how many of their tokens were guessed and right.
fn answers(speculation: &str) -> (Vec<Vec<u32>>, f64) {
    let cluster = Setup::real().env("RBEE_SPECULATION", speculation).home();
    cluster.rbee(&["queen", "start"]).exits(0);
    let worker = cluster.worker_by_hand_on("cpu", &["--model", "tinybee"]);
    worker.ready();
    let ask = |temperature: f64, form: Value| {
        let generation = json!({ "prompt": "Once upon a time", "temperature": temperature, "seed": 5, "max_tokens": 60, "response_format": form });
        let body = json!({ "job_id": "j", "request_id": "r", "generation": generation });
        let answer = worker.http.stream_of("/v1/inference", &body).rest().whole();
        answer.tokens().iter().map(|token| token.id).collect()
    };
    let repeats = json!({ "type": "regex", "regex": "(The (bee|fox) saw a red flower[.] ){6}" });
    let asked = [(0.0, &repeats), (0.8, &repeats), (0.0, &Value::Null), (1.0, &Value::Null)];
    let ids = asked.map(|(temperature, form)| ask(temperature, form.clone())).into();
    let metrics = worker.http.get("/metrics").text();
    let right = crate::metrics::value(&metrics, "rbee_engine_accepted_tokens_total", &[])
        .unwrap_or_else(|| panic!("{metrics}"));
    worker.stop();
    (ids, right)
}

#[test]
fn tokens_that_were_guessed_are_those_that_would_have_come() {
    let ((plain, none), (guessed, some)) = (answers("off"), answers("always"));
    assert_eq!(guessed, plain);
    assert!(none == 0.0 && some > 10.0, "{none} and {some} were right");
}

#[test]
fn a_prompt_that_no_context_holds_is_refused_at_once_and_takes_no_memory() {
    let cluster = Setup::real().warm();
    let text = "bee ".repeat(2 << 20);
    let worker = cluster.the("llm-worker-rbee");
    let before = worker.peak();
    for body in [json!({ "prompt": text }), json!({ "messages": [{ "role": "user", "content": text }] })] {
        let told = cluster.job(&crate::with(json!({ "operation": "infer" }), body));
        assert_eq!(told.error().code, rbee_wire::ErrorCode::ContextLengthExceeded);
    }
    // Its tokens would take a gigabyte for a moment; some copies of the text are taken by whoever passes it on.
    let taken = worker.peak().saturating_sub(before);
    assert!(taken < 256 << 20, "{} MiB", taken >> 20);
}
