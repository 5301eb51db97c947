//! Results of the programs, on standard output.

use std::fmt::Display;
use std::io::{self, ErrorKind, Write};

use crate::Result;

/// Writes a line. Where it is no longer read, as behind `| head`, nothing is said and nothing is wrong.
pub fn line(text: impl Display) -> Result<()> {
    write(format_args!("{text}\n"))
}

/// Writes a part of a line, to be seen at once. As [`line`].
pub fn part(text: impl Display) -> Result<()> {
    write(format_args!("{text}"))
}

fn write(text: std::fmt::Arguments) -> Result<()> {
    let mut out = io::stdout().lock();
    match out.write_fmt(text).and_then(|()| out.flush()) {
        Err(e) if e.kind() == ErrorKind::BrokenPipe => Ok(()),
        written => Ok(written?),
    }
}
