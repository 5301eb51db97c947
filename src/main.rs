use std::process::ExitCode;

use loramux::ErrorKind;

fn main() -> ExitCode {
    match loramux::cli::run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e}");
            // As clap ends: what was asked for is wrong, and stays wrong.
            if e.kind == ErrorKind::BadRequest { ExitCode::from(2) } else { ExitCode::FAILURE }
        }
    }
}
