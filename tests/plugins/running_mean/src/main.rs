//! The `dataflow` program with the ops of this crate.

use std::process::ExitCode;

use dataflow::App;
use running_mean::RunningMeanPlugin;

fn main() -> ExitCode {
    App::new().add_plugin(RunningMeanPlugin).run()
}
