//! Text to token ids and back.

use crate::Result;

/// A tokenizer with the bytes of each token at hand.
pub struct Tokenizer {}

impl Tokenizer {
    /// Token ids of `text`. Text that spells a special token becomes that token. `special` adds what the tokenizer's post-processor adds (e.g. BOS).
    pub fn encode(&self, _text: &str, _special: bool) -> Result<Vec<u32>> {
        todo!()
    }
    /// Text of `ids`, special tokens left out if `skip_special`; bytes that are no UTF-8 become U+FFFD.
    pub fn decode(&self, _ids: &[u32], _skip_special: bool) -> String {
        todo!()
    }
    /// The bytes a token stands for in running text; empty for an id outside the vocabulary.
    pub fn token_bytes(&self, _id: u32) -> &[u8] {
        todo!()
    }
    /// Whether a token is special (control) and so not part of the text.
    pub fn is_special(&self, _id: u32) -> bool {
        todo!()
    }
    /// The id of a token by its exact spelling in the vocabulary.
    pub fn token_id(&self, _token: &str) -> Option<u32> {
        todo!()
    }
    pub fn vocab_size(&self) -> usize {
        todo!()
    }
}
