//! What an adapter may be called, and whose it is by its name.

use crate::{Error, Result};

/// The name that always means the base model.
pub const BASE_NAME: &str = "base";
/// Stands in the whole name of a tenant's adapter between the name that the tenant knows and the tenant's.
pub const OWNER: char = '@';

const MAX_LENGTH: usize = 128;
/// Of a tenant's name; with the adapter's it has to be a file's name.
const MAX_TENANT: usize = 64;

fn is_well_formed(name: &str, length: usize) -> bool {
    let allowed = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'_' | b'-');
    name.len() <= length && name.bytes().all(allowed) && name.bytes().next().is_some_and(|c| c.is_ascii_alphanumeric())
}

/// Refuses a tenant's name that could not be part of an adapter's.
pub fn check_tenant(name: &str) -> Result<()> {
    const RULE: &str = "1 to 64 of letters, digits, '.', '_', '-', the first a letter or digit";
    match is_well_formed(name, MAX_TENANT) {
        true => Ok(()),
        false => Err(Error::bad_request(format!("tenant {name:?}: a tenant's name is {RULE}"))),
    }
}

/// [`check_name`] for a whole name: a tenant's adapter is called `NAME@TENANT`.
pub fn check_whole_name(name: &str) -> Result<()> {
    match name.split_once(OWNER) {
        None => check_name(name),
        Some((name, tenant)) => check_name(name).and_then(|()| check_tenant(tenant)),
    }
}

/// Refuses a name that could not stand in a URL, a metric label and a file name as it is.
pub fn check_name(name: &str) -> Result<()> {
    const RULE: &str = "a name is 1 to 128 of letters, digits, '.', '_', '-', and starts with a letter or digit";
    if !is_well_formed(name, MAX_LENGTH) {
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
        assert!(check_name("a@b").is_err());
    }

    #[test]
    fn a_tenants_adapter_has_both_names() {
        let (name, tenant) = ("x".repeat(128), "t".repeat(64));
        for whole in ["a", "a@b", "v1.2_final@acme-2", &format!("{name}@{tenant}")] {
            check_whole_name(whole).unwrap();
        }
        for whole in ["@", "a@", "@b", "a@b@c", "base@a", "a@-b", "a@b/c", "a@b\n", &format!("{name}@{tenant}t")] {
            assert!(check_whole_name(whole).is_err(), "{whole:?}");
        }
    }
}
