//! What a simulated worker must say: token i is a hash of the model's seed, the prompt and all tokens before it,
//! so loss, order, mix-ups and exact continuation can be checked without a second run.

pub use rbee_engine::sim::word;
use rbee_engine::sim::{encode, expected_tokens, hidden_state};
use rbee_wire::event::Token;

/// The text of the first `count` tokens that a simulated model gives to a prompt.
pub fn text(seed: u64, prompt: &str, count: usize) -> String {
    expected_tokens(seed, &encode(prompt), count).into_iter().map(word).collect()
}

/// The ids of the first `count` tokens that a simulated model gives to a prompt.
pub fn ids(seed: u64, prompt: &str, count: usize) -> Vec<u32> {
    expected_tokens(seed, &encode(prompt), count)
}

/// Checks that these are the first tokens of the answer, each once and in order.
///
/// # Errors
/// The first token that is not what it must be.
pub fn check(seed: u64, prompt: &str, tokens: &[Token]) -> Result<(), String> {
    for (at, (token, want)) in tokens.iter().zip(ids(seed, prompt, tokens.len())).enumerate() {
        if token.i != at as u64 || token.id != want || token.t != word(want) {
            return Err(format!("token {at} is {token:?}, and must be {want} ({:?})", word(want)));
        }
    }
    Ok(())
}

/// What a simulated worker must say of a text to embed: the mean of its bytes' states, of length 1.
pub fn embedding(text: &str) -> Vec<f32> {
    let sums = encode(text).into_iter().fold([0.0f64; 8], |sums, id| {
        let state = hidden_state(id);
        std::array::from_fn(|i| sums[i] + f64::from(state[i]))
    });
    let scale = sums.iter().map(|sum| sum * sum).sum::<f64>().sqrt().recip();
    sums.iter().map(|sum| (sum * scale) as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_repeated_or_foreign_token_is_seen() {
        let tokens = |prompt: &str| -> Vec<Token> {
            let token = |(i, id)| Token { i, t: word(id), id, ..Token::default() };
            (0..).zip(ids(7, prompt, 10)).map(token).collect()
        };
        let good = tokens("a");
        assert_eq!(check(7, "a", &good), Ok(()));
        let (mut lost, mut twice, mut swapped) = (good.clone(), good.clone(), good.clone());
        lost.remove(4);
        twice.insert(4, good[4].clone());
        swapped.swap(4, 5);
        for bad in [lost, twice, swapped, tokens("b")] {
            assert!(check(7, "a", &bad).is_err());
        }
        assert!(check(8, "a", &good).is_err());
    }
}
