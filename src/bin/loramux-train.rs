use std::process::ExitCode;

fn main() -> ExitCode {
    match loramux::train::command::run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e}");
            ExitCode::FAILURE
        }
    }
}
