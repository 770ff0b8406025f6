//! The command line.

mod bench;
mod check;
mod eval;
mod import;
mod model_args;
mod ops;
mod plan;
mod run;
mod sample;
mod serve;
mod verify;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Args, Parser, Subcommand, ValueEnum};
use dataflow_graph::components::{Precision, Target};
use dataflow_graph::diagnostic::{Diagnostic, Errors};
use dataflow_graph::format::formula::Number;
use dataflow_graph::format::number::Scope;
use dataflow_graph::registry::Registry;
use dataflow_kernels::cuda::device::{CudaDevice, Settings};
use dataflow_kernels::device::{CpuDevice, Device};
use std::io::IsTerminal;

/// Train and run sequence models that are written as graphs.
#[derive(Parser)]
#[command(name = "dataflow", version, about, long_about = None, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a pipeline: prepare data, train, evaluate, write the run folder
    Run(run::Run),
    /// Make a run folder of weights from elsewhere: safetensors, PyTorch state_dicts, Hugging Face names
    Import(import::Import),
    /// Parse, expand and infer models and pipelines; print every error at once
    Check(check::Check),
    /// List the registered ops and stages, or describe one
    Ops(ops::Ops),
    /// Show the compiled training step of a model: launches and memory
    Plan(plan::Plan),
    /// Time training steps on random tokens: the slowest launches and their distance from the roofline
    Bench(bench::Bench),
    /// Generate text with a trained model, token by token
    Sample(sample::Sample),
    /// Loss and perplexity of a trained model, also at contexts longer than in training
    Eval(eval::Eval),
    /// Answer OpenAI's completion requests with a trained model
    Serve(serve::Serve),
    /// Compare golden files (ops, gradients, training trajectories) with this program
    Verify(verify::Verify),
}

/// What `--without` calls the capture of a step into one CUDA graph.
const CAPTURE: &str = "capture";

/// `--without capture`, for commands that have no other system to leave out.
#[derive(Args)]
struct WithoutArgs {
    /// `--without capture`: launch a step kernel by kernel on CUDA, not as one graph
    #[arg(long, value_name = "SYSTEM", value_parser = [CAPTURE])]
    without: Vec<String>,
}

/// Where a model runs.
#[derive(Args)]
struct DeviceArgs {
    /// The device: cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Threads of the CPU; all processors by default. Results do not depend on it
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
}

/// In which precision a model runs.
#[derive(Args)]
struct PrecisionArgs {
    /// f32; tf32: products in it, on CUDA; bf16: factors of products, on CUDA all activations, with parameters and sums
    /// in f32. The default is f32 on the CPU, bf16 on CUDA
    #[arg(long, value_name = "f32|tf32|bf16")]
    precision: Option<NumberFormat>,
}

/// What `--precision` names.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum NumberFormat {
    F32,
    Tf32,
    Bf16,
}

impl PrecisionArgs {
    /// Opens the device in this precision, or in `default` if none is given, or in that of the device.
    fn open(
        &self,
        device: &DeviceArgs,
        without: &[String],
        default: Option<NumberFormat>,
    ) -> Result<(Arc<dyn Device>, Precision), Errors> {
        let wanted = self.precision.or(default);
        if wanted == Some(NumberFormat::Tf32) && device.device == "cpu" {
            let error = Diagnostic::new("tf32 is a format of CUDA devices");
            return Err(error.help("use --precision f32 or bf16, or --device cuda").into());
        }
        let opened = device.open_with(without, wanted == Some(NumberFormat::Tf32))?;
        let precision = match (wanted, opened.target()) {
            (Some(NumberFormat::Bf16), _) | (None, Target::Cuda) => Precision::Bf16,
            _ => Precision::F32,
        };
        Ok((opened, precision))
    }
}

impl DeviceArgs {
    /// The threads of the processor that may be used.
    fn threads(&self) -> usize {
        let all = || std::thread::available_parallelism().map_or(1, usize::from);
        self.threads.map_or_else(all, usize::from)
    }

    /// Opens the device; `without` names what is left out, of which `capture` is the device's.
    fn open(&self, without: &[String]) -> Result<Arc<dyn Device>, Errors> {
        self.open_with(without, false)
    }

    fn open_with(&self, without: &[String], tf32: bool) -> Result<Arc<dyn Device>, Errors> {
        match self.device.as_str() {
            "cpu" => {
                let device = CpuDevice::new(self.threads.map(usize::from)).map_err(Diagnostic::new)?;
                Ok(Arc::new(device))
            }
            other => {
                let ordinal = match other.strip_prefix("cuda") {
                    Some("") => Some(0),
                    Some(rest) => rest.strip_prefix(':').and_then(|n| n.parse().ok()),
                    None => None,
                };
                let Some(ordinal) = ordinal else {
                    let message = format!("there is no device `{other}`");
                    return Err(Diagnostic::new(message).help("there are: cpu, cuda, cuda:N").into());
                };
                let settings = Settings { ordinal, capture: !without.iter().any(|name| name == CAPTURE), tf32 };
                Ok(Arc::new(CudaDevice::open(settings).map_err(Diagnostic::new)?))
            }
        }
    }
}

/// `--set name=value` for the config of a model.
fn config_settings(settings: &[String]) -> Result<BTreeMap<String, Number>, Errors> {
    let mut config = BTreeMap::new();
    for setting in settings {
        let wrong = |what: String| Diagnostic::new(format!("--set {setting}: {what}"));
        let (name, value) = setting.split_once('=').ok_or_else(|| wrong("write --set name=value".into()))?;
        let value = match value.trim() {
            "true" => Number::Int(1),
            "false" => Number::Int(0),
            value => Scope::default().evaluate(value).map_err(wrong)?,
        };
        config.insert(name.trim().to_string(), value);
    }
    Ok(config)
}

/// Runs the command line `arguments`, of which the first is the program's name.
pub fn run(registry: &Arc<Registry>, arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { 2 } else { 0 });
        }
    };
    let done = match cli.command {
        Command::Run(run) => run.run(registry),
        Command::Import(import) => import.run(registry),
        Command::Check(check) => check.run(registry),
        Command::Ops(ops) => ops.run(registry),
        Command::Plan(plan) => plan.run(registry),
        Command::Bench(bench) => bench.run(registry),
        Command::Sample(sample) => sample.run(registry),
        Command::Eval(eval) => eval.run(registry),
        Command::Serve(serve) => serve.run(registry),
        Command::Verify(verify) => verify.run(registry),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(errors) => {
            report(&errors);
            ExitCode::from(1)
        }
    }
}

/// Shows errors: with the lines of the file on a terminal, one line each elsewhere.
fn report(errors: &Errors) {
    let fancy = std::io::stderr().is_terminal();
    for error in &errors.0 {
        if fancy && error.span.is_some() {
            eprintln!("{:?}", miette::Report::new(error.clone()));
        } else {
            eprintln!("error: {error}");
            if let Some(help) = &error.help {
                eprintln!("  help: {help}");
            }
        }
    }
}

/// Prints to standard output; a closed pipe ends the program quietly.
fn print(text: &str) {
    use std::io::Write;
    if std::io::stdout().write_all(text.as_bytes()).is_err() {
        std::process::exit(0);
    }
}

/// Prints a value as one JSON object.
fn print_json(value: &serde_json::Value) {
    print(&format!("{value}\n"));
}

/// `1234567` as `1,234,567`.
fn thousands(n: usize) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    #[test]
    fn numbers_are_grouped() {
        assert_eq!(super::thousands(123_587_328), "123,587,328");
        assert_eq!(super::thousands(12), "12");
    }
}
