//! The `dataflow` program.

use std::process::ExitCode;

fn main() -> ExitCode {
    dataflow::App::new().run()
}
