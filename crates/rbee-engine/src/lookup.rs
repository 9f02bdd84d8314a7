//! Drafts: what probably comes next in a text, because it came there before.
//!
//! The longest of a few lengths of the text's end that occurred before is looked up, and what followed it then is the draft
//! ("prompt lookup decoding", Saxena 2023, with the output looked at too). Where a text leaves what it repeats, it is likely to
//! come back to it as many tokens later, as code does in which a name is another one: for a few tokens the draft goes on there. A draft is a guess: whoever uses it checks
//! every token, so that what is lost here, to a hash that two stretches share or for want of room, costs time and nothing else.

use crate::runner::TokenId;

/// Lengths of an end that are looked up, ascending.
const LENGTHS: [usize; 3] = [2, 4, 8];

/// In the place of a length: no match, but where the last one would go on.
const KEPT: usize = LENGTHS.len();

/// How often drafts are right while nothing is known, after a match of each of the [`LENGTHS`] and of those that are kept.
const UNKNOWN: [f32; 4] = [0.4, 0.6, 0.8, 0.5];

/// Wrong tokens in a row after which a match is kept no longer.
const STRAYED: u32 = 3;

/// Weight of the newest token in how often drafts are right.
const NEWEST: f32 = 0.125;

/// Most tokens of a draft.
pub(crate) const LONGEST: usize = 8;

/// Most stretches that one text remembers, of four bytes each; later ones take the place of earlier ones.
const MOST_PLACES: usize = 1 << 16;

/// What one text remembers of itself. It costs nothing before the first draft is asked for, and then a fixed number of
/// operations for each token.
#[derive(Debug, Default)]
pub(crate) struct Lookup {
    /// Where what followed a stretch stands, by the stretch's hash; 0 for nowhere.
    places: Vec<u32>,
    /// Ends of stretches that are in `places` already: those before this one.
    indexed: usize,
    /// The text's last token and what may follow it; empty without a draft.
    ahead: Vec<TokenId>,
    /// Which of the lengths matched.
    length: usize,
    /// How far before the draft's place in the text what it repeats stands; 0 for nowhere.
    distance: usize,
    /// Wrong tokens in a row.
    strayed: u32,
    /// How often, of late, a token after a match of each length was the one that came.
    right: Option<[f32; 4]>,
}

impl Lookup {
    /// Looks for what may follow `tokens`, which are those of the last time and more: at most `most` tokens of it. The text
    /// will not be longer than `end`.
    pub(crate) fn draft(&mut self, tokens: &[TokenId], most: usize, end: usize) {
        self.forget();
        if self.places.is_empty() {
            let places = end.saturating_mul(LENGTHS.len()).min(MOST_PLACES);
            self.places = vec![0; places.next_power_of_two()];
        }
        // Ends that something follows: the last token is none yet.
        for end in self.indexed.max(1)..tokens.len() {
            for place in self.slots(&tokens[..end]).into_iter().flatten() {
                self.places[place] = end as u32;
            }
        }
        self.indexed = tokens.len();
        let slots = self.slots(tokens);
        let found = (0..LENGTHS.len()).rev().find_map(|length| {
            let from = self.places[slots[length]?] as usize;
            let stretch = tokens.get(from.checked_sub(LENGTHS[length])?..from)?;
            tokens.ends_with(stretch).then_some((length, from))
        });
        let kept = (self.distance > 0).then(|| (KEPT, tokens.len() - self.distance));
        let right = self.right.unwrap_or(UNKNOWN);
        let better = match (found, kept) {
            (Some((length, from)), Some((_, kept))) if from != kept && right[length] < right[KEPT] => None,
            _ => found,
        };
        let (Some((length, from)), Some(last)) = (better.or(kept), tokens.last()) else { return };
        self.length = length;
        if length != KEPT {
            (self.distance, self.strayed) = (tokens.len() - from, 0);
        }
        self.ahead.push(*last);
        for at in from..from + most.min(LONGEST) {
            // Where the text ends it goes on with the draft itself: what repeats is assumed to go on.
            let next = tokens.get(at).copied().unwrap_or_else(|| self.ahead[1 + at - tokens.len()]);
            self.ahead.push(next);
        }
    }

    /// No draft any more.
    pub(crate) fn forget(&mut self) {
        self.ahead.clear();
    }

    /// The text's last token and the first of the draft, `count` tokens together.
    pub(crate) fn ahead(&self, count: usize) -> &[TokenId] {
        &self.ahead[..count]
    }

    /// How likely each token of the draft is to come, all those before it included.
    pub(crate) fn odds(&self) -> impl Iterator<Item = f32> + use<> {
        let right = self.right.unwrap_or(UNKNOWN)[self.length];
        let drafted = self.ahead.len().saturating_sub(1);
        std::iter::successors(Some(right), move |odds| Some(odds * right)).take(drafted)
    }

    /// Told the token that came in the place of the draft's token `i`, all before it having come: whether it is that one.
    /// Drafts that nothing was computed for are learned from as well.
    pub(crate) fn meets(&mut self, i: usize, id: TokenId) -> bool {
        let Some(drafted) = self.ahead.get(1 + i) else { return false };
        let right = *drafted == id;
        let share = &mut self.right.get_or_insert(UNKNOWN)[self.length];
        *share += NEWEST * (f32::from(u8::from(right)) - *share);
        self.strayed = if right { 0 } else { self.strayed + 1 };
        if self.strayed == STRAYED {
            self.distance = 0;
        }
        right
    }

    /// The place of the end of each length, where the text is as long.
    fn slots(&self, text: &[TokenId]) -> [Option<usize>; 3] {
        let mut slots = [None; 3];
        let (mut hash, mut length) = (0u64, 0);
        for (i, id) in (1..).zip(text.iter().rev()) {
            // As FxHash does: good in its upper bits.
            hash = (hash.rotate_left(5) ^ u64::from(*id)).wrapping_mul(0x517C_C1B7_2722_0A95);
            if i == LENGTHS[length] {
                slots[length] = Some((hash >> 32) as usize & (self.places.len() - 1));
                length += 1;
                if length == LENGTHS.len() {
                    break;
                }
            }
        }
        slots
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn draft(tokens: &[TokenId], most: usize) -> Vec<TokenId> {
        let mut lookup = Lookup::default();
        lookup.draft(tokens, most, 100);
        lookup.ahead.get(1..).unwrap_or_default().to_vec()
    }

    #[test]
    fn a_draft_is_what_followed_the_longest_end_that_was_there_before() {
        assert_eq!(draft(&[1, 2, 3, 4, 5, 1, 2], 3), [3, 4, 5]);
        assert_eq!(draft(&[1, 2, 3, 4, 5, 1, 2], 0), []);
        assert_eq!(
            draft(&[9, 1, 2, 3, 4, 7, 3, 4, 8, 1, 2, 3, 4], 2),
            [7, 3],
            "four before two, though two came later"
        );
        assert_eq!(draft(&[3, 4, 7, 5, 3, 4, 8, 6, 3, 4], 2), [8, 6], "the latest of its length");
        assert_eq!(draft(&[1, 2, 1, 2, 1, 2], 5), [1, 2, 1, 2, 1], "beyond the end");
        assert_eq!(draft(&[5, 5, 5], 4), [5, 5, 5, 5]);
        for nothing in [&[][..], &[1], &[1, 1], &[1, 2, 3, 2]] {
            assert_eq!(draft(nothing, 4), [], "{nothing:?}");
        }
    }

    #[test]
    fn what_is_repeated_goes_on_after_a_token_that_differs() {
        let mut lookup = Lookup::default();
        let mut text = vec![1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2];
        let mut drafts = Vec::new();
        for came in [3, 50, 5, 60, 70, 80, 90, 91] {
            lookup.draft(&text, 1, 100);
            drafts.push(lookup.ahead.get(1).copied());
            lookup.meets(0, came);
            text.push(came);
        }
        assert_eq!(drafts, [Some(3), Some(4), Some(5), Some(6), Some(7), Some(8), None, None]);
    }

    #[test]
    fn drafts_that_are_wrong_are_expected_to_be_and_forgiven_later() {
        let mut lookup = Lookup::default();
        let text = [1, 2, 3, 1, 2];
        let first = |lookup: &mut Lookup, came: TokenId| {
            lookup.draft(&text, 2, 100);
            assert_eq!(lookup.odds().count(), 2);
            lookup.meets(0, came);
            lookup.odds().next().unwrap()
        };
        (0..20).for_each(|_| {
            first(&mut lookup, 9);
        });
        assert!(first(&mut lookup, 9) < 0.05);
        (0..20).for_each(|_| {
            first(&mut lookup, 3);
        });
        assert!(first(&mut lookup, 3) > 0.9);
    }

    proptest! {
        /// However a text grows, its draft is the one of the whole text at once, and as long as asked for.
        #[test]
        fn a_draft_is_a_function_of_the_text(
            tokens in prop::collection::vec(0u32..3, 1..80), cuts in prop::collection::vec(1usize..9, 0..40), most in 0usize..12,
        ) {
            let mut lookup = Lookup::default();
            let mut len = 0;
            for cut in cuts.into_iter().chain([80]) {
                len = tokens.len().min(len + cut);
                // Without a match that is kept.
                lookup.distance = 0;
                lookup.draft(&tokens[..len], most, 100);
                let got = lookup.ahead.get(1..).unwrap_or_default();
                prop_assert_eq!(got, &draft(&tokens[..len], most)[..]);
                prop_assert!(lookup.ahead.is_empty() || got.len() == most.min(LONGEST));
                // Two stretches of one hash may lose one, and make up none.
                let pair = len >= 2 && tokens[..len - 1].windows(2).any(|pair| tokens[..len].ends_with(pair));
                prop_assert!(lookup.ahead.is_empty() || pair);
            }
        }

        /// A table that is too small for a text loses drafts and makes up none.
        #[test]
        fn what_has_no_room_is_lost_and_nothing_else(tokens in prop::collection::vec(0u32..3, 1..80), end in 0usize..20) {
            let mut lookup = Lookup::default();
            for len in 1..=tokens.len() {
                let text = &tokens[..len];
                lookup.distance = 0;
                lookup.draft(text, 1, end);
                if let [last, next] = lookup.ahead[..] {
                    prop_assert_eq!(Some(&last), text.last());
                    let mut followed = text.windows(3);
                    prop_assert!(followed.any(|three| three[2] == next && text.ends_with(&three[..2])));
                }
            }
        }
    }
}
