//! The built-in model says what its model card shows.

use rbee_tokenizer::{Controls, Specials, Tokenizer};

use crate::support::{greedy, options, runner, tinybee};

fn answer(prompt: &str, n: usize) -> String {
    let tokenizer = Tokenizer::from_json(&std::fs::read(tinybee().join("tokenizer.json")).unwrap()).unwrap();
    let mut runner = runner(&tinybee(), &options());
    let ids = tokenizer.encode(prompt, Specials::AsControl).unwrap();
    tokenizer.decode(&greedy(&mut runner, &ids, n), Controls::Hide)
}

fn chat(question: &str) -> String {
    answer(&format!("<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"), 60)
}

#[test]
fn greedy_samples_of_the_model_card_are_reproduced() {
    let story = answer("Once upon a time", 220);
    assert!(
        story.starts_with(
            ", there was a hungry boy named Theo. Theo had a silver ring that he loved very much. One day, Theo found"
        ),
        "{story}"
    );
    assert!(story.ends_with("And every summer, Theo sailed to the island with Anna the girl."), "{story}");
    assert_eq!(chat("What do bees make?"), "Bees make honey.");
    assert_eq!(chat("Why is the sky blue?"), "The sky is blue because the air scatters blue light from the sun.");
    assert_eq!(chat("What is 7 + 5?"), "7 + 5 = 12.");
}
