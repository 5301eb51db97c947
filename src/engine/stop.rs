//! Stop strings in text that comes in pieces.

/// One stop string as the automaton of Knuth, Morris and Pratt.
#[derive(Debug, Clone)]
struct Pattern {
    text: String,
    /// For each length of a matched prefix: the longest shorter one that is its suffix too.
    fallback: Vec<usize>,
    /// Bytes of `text` that the input ends with.
    matched: usize,
}

impl Pattern {
    fn new(text: &str) -> Self {
        let bytes = text.as_bytes();
        let mut fallback = vec![0; bytes.len() + 1];
        let mut length = 0;
        for i in 1..bytes.len() {
            while length > 0 && bytes[i] != bytes[length] {
                length = fallback[length];
            }
            if bytes[i] == bytes[length] {
                length += 1;
            }
            fallback[i + 1] = length;
        }
        Pattern { text: text.to_string(), fallback, matched: 0 }
    }

    /// Takes a byte; whether a match ends with it.
    fn push(&mut self, byte: u8) -> bool {
        let bytes = self.text.as_bytes();
        while self.matched > 0 && bytes[self.matched] != byte {
            self.matched = self.fallback[self.matched];
        }
        if bytes[self.matched] == byte {
            self.matched += 1;
        }
        let is_whole = self.matched == bytes.len();
        if is_whole {
            self.matched = self.fallback[self.matched];
        }
        is_whole
    }
}

/// Finds the stop string that is complete first (of several that end together, the longest), and holds back text that
/// could still become one. How the text is cut into pieces makes no difference.
#[derive(Debug, Clone)]
pub struct StopMatcher {
    patterns: Vec<Pattern>,
    include: bool,
    held: String,
}

impl StopMatcher {
    /// Empty stop strings are left out. `include` leaves the match in the text.
    pub fn new(stop: &[String], include: bool) -> Self {
        let patterns = stop.iter().filter(|s| !s.is_empty()).map(|s| Pattern::new(s)).collect();
        StopMatcher { patterns, include, held: String::new() }
    }

    /// Takes a piece of text and appends to `out` what is sure to stay. After a match, which it returns, there is nothing
    /// more to come and `push` is not to be called again.
    pub fn push(&mut self, piece: &str, out: &mut String) -> Option<String> {
        self.take(piece, true, out)
    }

    /// The same for text that no match ends in; one may begin there.
    pub fn pass(&mut self, piece: &str, out: &mut String) {
        self.take(piece, false, out);
    }

    fn take(&mut self, piece: &str, may_end: bool, out: &mut String) -> Option<String> {
        if self.patterns.is_empty() {
            out.push_str(piece);
            return None;
        }
        let start = self.held.len();
        self.held.push_str(piece);
        for (i, byte) in self.held.bytes().enumerate().skip(start) {
            let mut longest: Option<&str> = None;
            for pattern in &mut self.patterns {
                if pattern.push(byte) && may_end && longest.is_none_or(|l| l.len() < pattern.text.len()) {
                    longest = Some(&pattern.text);
                }
            }
            if let Some(stop) = longest {
                let end = i + 1;
                // The start of the match was held back, for it was a stop string's start all along.
                out.push_str(&self.held[..if self.include { end } else { end - stop.len() }]);
                let stop = stop.to_string();
                self.held.clear();
                return Some(stop);
            }
        }
        let keep = self.patterns.iter().map(|p| p.matched).max().unwrap_or(0);
        let sure = self.held.len() - keep;
        out.push_str(&self.held[..sure]);
        self.held.drain(..sure);
        None
    }

    /// Nothing more comes: appends what was held back.
    pub fn finish(&mut self, out: &mut String) {
        out.push_str(&self.held);
        self.held.clear();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run(stop: &[&str], include: bool, pieces: &[&str]) -> (Vec<String>, Option<String>) {
        run_after(0, stop, include, pieces)
    }

    /// Where nothing ends in the first `passed` pieces.
    fn run_after(passed: usize, stop: &[&str], include: bool, pieces: &[&str]) -> (Vec<String>, Option<String>) {
        let stop: Vec<String> = stop.iter().map(|s| s.to_string()).collect();
        let mut matcher = StopMatcher::new(&stop, include);
        let mut outs = vec![];
        for (i, piece) in pieces.iter().enumerate() {
            let mut out = String::new();
            let matched = if i < passed {
                matcher.pass(piece, &mut out);
                None
            } else {
                matcher.push(piece, &mut out)
            };
            outs.push(out);
            if matched.is_some() {
                return (outs, matched);
            }
        }
        let mut out = String::new();
        matcher.finish(&mut out);
        outs.push(out);
        (outs, None)
    }

    #[test]
    fn text_that_may_become_a_stop_string_waits() {
        assert_eq!(run(&["STOP"], false, &["a S", "T", "x STO", "P b"]).0, ["a ", "", "STx ", ""]);
        assert_eq!(run(&["STOP"], true, &["a S", "TOP b"]), (vec!["a ".into(), "STOP".into()], Some("STOP".into())));
        assert_eq!(run(&["STOP"], false, &["a S", "TO"]), (vec!["a ".into(), "".into(), "STO".into()], None));
        assert_eq!(run(&["\n\n", "é!"], false, &["x\n", "é", "\n", "é!"]).0, ["x", "\n", "é", "\n"]);
    }

    #[test]
    fn the_first_complete_match_wins_and_the_longest_of_those() {
        assert_eq!(run(&["bc", "abcd"], false, &["abcd"]), (vec!["a".into()], Some("bc".into())));
        assert_eq!(run(&["b", "ab"], false, &["xab"]), (vec!["x".into()], Some("ab".into())));
    }

    proptest! {
        #[test]
        fn the_result_is_that_of_searching_the_whole(
            text in "[abé]{0,40}",
            stop in prop::collection::vec("[abé]{1,5}", 0..5),
            cuts in prop::collection::vec(0usize..40, 0..10),
            (include, passed) in (any::<bool>(), 0usize..6),
        ) {
            let mut cuts: Vec<usize> = cuts.into_iter().filter(|&c| c < text.len() && text.is_char_boundary(c)).collect();
            cuts.extend([0, text.len()]);
            cuts.sort();
            let from = cuts[passed.min(cuts.len() - 1)];
            let mut expected = (text.clone(), None);
            'search: for end in from + 1..=text.len() {
                if !text.is_char_boundary(end) {
                    continue;
                }
                let mut ending: Vec<&String> = stop.iter().filter(|s| text[..end].ends_with(*s)).collect();
                ending.sort_by_key(|s| std::cmp::Reverse(s.len()));
                if let Some(found) = ending.first() {
                    let cut = if include { end } else { end - found.len() };
                    expected = (text[..cut].to_string(), Some(found.to_string()));
                    break 'search;
                }
            }
            let pieces: Vec<&str> = cuts.windows(2).map(|w| &text[w[0]..w[1]]).collect();
            let stop: Vec<&str> = stop.iter().map(String::as_str).collect();
            let (outs, matched) = run_after(passed, &stop, include, &pieces);
            prop_assert_eq!((outs.concat(), matched), expected);
        }
    }

    #[test]
    fn a_periodic_stop_string_and_text_take_linear_time() {
        let stop = format!("{}b", "a".repeat(1000));
        let piece = "a".repeat(1000);
        let pieces: Vec<&str> = std::iter::repeat_n(piece.as_str(), 200).collect();
        let (outs, matched) = run(&[&stop], false, &pieces);
        assert_eq!(matched, None);
        assert_eq!(outs.concat().len(), 200_000);
    }
}
