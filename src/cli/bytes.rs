//! Sizes of memory on the command line.

use std::fmt;
use std::str::FromStr;

/// A number of bytes, written `1073741824`, `1GiB`, `1.5G`, `512MB` or the like. `K`, `M`, `G` and `T` alone are powers of 1024.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bytes(pub u64);

const UNITS: [(&str, u64); 14] = [
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
    ("kB", 1000),
    ("KB", 1000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("TB", 1_000_000_000_000),
    ("K", 1 << 10),
    ("M", 1 << 20),
    ("G", 1 << 30),
    ("T", 1 << 40),
    ("B", 1),
];

impl FromStr for Bytes {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let (number, unit) =
            UNITS.iter().find_map(|(name, unit)| Some((s.strip_suffix(name)?.trim_end(), *unit))).unwrap_or((s, 1));
        let bytes = number.parse::<f64>().ok().map(|n| n * unit as f64);
        match bytes.filter(|b| (0.0..1e18).contains(b)) {
            Some(b) => Ok(Bytes(b as u64)),
            None => Err(format!("{s:?} is not a size; expected e.g. 512MiB, 1GiB or a number of bytes")),
        }
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let whole = UNITS[..4].iter().rev().find(|(_, unit)| self.0 >= *unit && self.0.is_multiple_of(*unit));
        match whole {
            Some((name, unit)) => write!(f, "{}{name}", self.0 / unit),
            None => write!(f, "{}", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_people_write() {
        for (text, bytes) in
            [("1GiB", 1 << 30), ("1.5G", 3 << 29), ("512MB", 512_000_000), ("7", 7), ("2 KiB", 2048), ("9B", 9)]
        {
            assert_eq!(text.parse(), Ok(Bytes(bytes)), "{text}");
        }
        for text in ["", "GiB", "-1", "1PB", "NaN", "1e30", "one"] {
            assert!(text.parse::<Bytes>().is_err(), "{text}");
        }
        assert_eq!(Bytes(1 << 30).to_string(), "1GiB");
        assert_eq!(Bytes(1000).to_string(), "1000");
    }
}
