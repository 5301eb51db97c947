//! What an adapter may be called.

use crate::{Error, Result};

/// The name that always means the base model.
pub const BASE_NAME: &str = "base";

const MAX_LENGTH: usize = 128;

/// Refuses a name that could not stand in a URL, a metric label and a file name as it is.
pub fn check_name(name: &str) -> Result<()> {
    const RULE: &str = "a name is 1 to 128 of letters, digits, '.', '_', '-', and starts with a letter or digit";
    let allowed = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'_' | b'-');
    let well_formed = name.len() <= MAX_LENGTH
        && name.bytes().all(allowed)
        && name.bytes().next().is_some_and(|c| c.is_ascii_alphanumeric());
    if !well_formed {
        let shown: String = name.chars().take(MAX_LENGTH).collect();
        return Err(Error::bad_request(format!("adapter name {shown:?}: {RULE}")).param("name"));
    }
    if name == BASE_NAME {
        return Err(Error::bad_request(format!("adapter name {name:?} is reserved for the base model")).param("name"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    #[test]
    fn letters_digits_and_three_marks_are_allowed() {
        for name in ["a", "0", "book-reviews", "v1.2_final", &"x".repeat(128)] {
            check_name(name).unwrap();
        }
    }

    #[test]
    fn other_names_are_refused() {
        let long = "x".repeat(129);
        for name in ["", ".", "..", "-a", "_a", "a/b", "a\\b", "a b", "a\n", "a\0", "é", "base", long.as_str()] {
            assert_eq!(check_name(name).unwrap_err().kind, ErrorKind::BadRequest, "{name:?}");
        }
    }
}
