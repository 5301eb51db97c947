//! Tokens to text, a token at a time.

use crate::base::Tokenizer;

/// What the engine needs to know of the tokenizer.
pub trait Vocabulary: Send + Sync {
    /// The bytes a token stands for in running text; empty for an id outside the vocabulary.
    fn token_bytes(&self, id: u32) -> &[u8];
    /// Whether a token is special (control) and so not part of the text.
    fn is_special(&self, id: u32) -> bool;
}

impl Vocabulary for Tokenizer {
    fn token_bytes(&self, id: u32) -> &[u8] {
        Tokenizer::token_bytes(self, id)
    }
    fn is_special(&self, id: u32) -> bool {
        Tokenizer::is_special(self, id)
    }
}

/// Bytes to text as they come. All pieces together are what [`String::from_utf8_lossy`] makes of all bytes together.
#[derive(Debug, Clone, Default)]
pub struct Detokenizer {
    /// The start of a character, or nothing.
    pending: Vec<u8>,
}

impl Detokenizer {
    /// Appends to `text` the characters that `bytes` completes.
    pub fn push(&mut self, bytes: &[u8], text: &mut String) {
        self.pending.extend_from_slice(bytes);
        let mut rest = self.pending.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    rest = &[];
                    break;
                }
                Err(e) => {
                    let (valid, invalid) = rest.split_at(e.valid_up_to());
                    text.push_str(&String::from_utf8_lossy(valid));
                    rest = invalid;
                    let Some(length) = e.error_len() else { break };
                    text.push(char::REPLACEMENT_CHARACTER);
                    rest = &rest[length..];
                }
            }
        }
        let done = self.pending.len() - rest.len();
        self.pending.drain(..done);
    }

    /// Nothing more comes: a character cut short becomes U+FFFD.
    pub fn finish(&mut self, text: &mut String) {
        if !self.pending.is_empty() {
            text.push(char::REPLACEMENT_CHARACTER);
            self.pending.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pieces(parts: &[Vec<u8>]) -> Vec<String> {
        let mut detokenizer = Detokenizer::default();
        let mut pieces: Vec<String> = parts
            .iter()
            .map(|part| {
                let mut text = String::new();
                detokenizer.push(part, &mut text);
                text
            })
            .collect();
        let mut text = String::new();
        detokenizer.finish(&mut text);
        pieces.push(text);
        pieces
    }

    #[test]
    fn a_character_comes_whole_with_its_last_byte() {
        let parts = "é😀".bytes().map(|b| vec![b]).collect::<Vec<_>>();
        assert_eq!(pieces(&parts), ["", "é", "", "", "", "😀", ""]);
        assert_eq!(
            pieces(&[b"a\xf0\x9f".to_vec(), b"b".to_vec(), b"\xe2\x82".to_vec()]),
            ["a", "\u{fffd}b", "", "\u{fffd}"]
        );
    }

    proptest! {
        #[test]
        fn pieces_add_up_to_the_whole(
            parts in prop::collection::vec(prop_oneof![
                prop::collection::vec(any::<u8>(), 0..4),
                // Halves of characters, so that both valid and invalid joints are common.
                (any::<char>(), 0usize..4).prop_map(|(c, at)| { let s = c.to_string(); s.as_bytes()[..at.min(s.len())].to_vec() }),
                (any::<char>(), 0usize..4).prop_map(|(c, at)| { let s = c.to_string(); s.as_bytes()[at.min(s.len())..].to_vec() }),
            ], 0..20),
        ) {
            let whole = String::from_utf8_lossy(&parts.concat()).into_owned();
            prop_assert_eq!(pieces(&parts).concat(), whole);
        }

        #[test]
        fn any_split_of_a_text_gives_the_text(text: String, cuts in prop::collection::vec(0usize..100, 0..10)) {
            let mut cuts: Vec<usize> = cuts.into_iter().map(|c| c.min(text.len())).collect();
            cuts.extend([0, text.len()]);
            cuts.sort();
            let parts: Vec<Vec<u8>> = cuts.windows(2).map(|w| text.as_bytes()[w[0]..w[1]].to_vec()).collect();
            prop_assert_eq!(pieces(&parts).concat(), text);
        }
    }
}
