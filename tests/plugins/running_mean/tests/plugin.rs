//! The example plugin from outside: through its program, and through the compiler.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use dataflow::graph::compile::{Compiled, Request, compile};
use dataflow::graph::components::{Options, Recurrence};
use dataflow::graph::diagnostic::{Errors, Source};
use dataflow::graph::format::model::ModelFile;
use dataflow::graph::op::{NodeView, Op, OpError};
use dataflow::graph::optimizer::{Optimizer, Update};
use dataflow::graph::session::Session;
use dataflow::graph::types::{DType, TensorType};
use dataflow::kernels::device::{CpuDevice, Kernel, Target};
use dataflow::ops::loss::CrossEntropy;
use dataflow::{App, Info, Plugin, Registry};
use running_mean::RunningMeanPlugin;
use serde::{Deserialize, Serialize};

fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

fn program(arguments: &[&str], files: &[&Path]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_running-mean")).args(arguments).args(files).output().expect("the program starts")
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).expect("UTF-8")
}

#[test]
fn the_program_of_the_plugin_trains_its_model() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let run = program(&["run", "--threads", "2", "--out", out.to_str().unwrap()], &[&file("pipeline.ron")]);
    assert_eq!(run.status.code(), Some(0), "{}", text(&run.stderr));
    let metrics = fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let rows = metrics.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let losses: Vec<f64> = rows.filter_map(|row| row["loss"].as_f64()).collect();
    assert_eq!(losses.len(), 60);
    // ln 64 = 4.16 at first; ln 32 = 3.47 for who knows which half of the tokens are values
    assert!(losses[59] < losses[0] - 0.5, "{} to {}", losses[0], losses[59]);
}

#[test]
fn the_program_describes_the_ops() {
    let described = program(&["ops", "LeakyRelu"], &[]);
    assert_eq!(described.status.code(), Some(0));
    for part in ["slope: 0.01", "Maas et al.", "max(x, 0) + slope min(x, 0)"] {
        assert!(text(&described.stdout).contains(part), "{part} is not in {}", text(&described.stdout));
    }
    let checked = program(&["check"], &[&file("model.ron"), &file("pipeline.ron")]);
    assert_eq!(checked.status.code(), Some(0), "{}", text(&checked.stderr));
}

/// Lets the host read the gradient of every parameter, and changes none.
#[derive(Debug)]
struct ReadGradients;

impl Optimizer for ReadGradients {
    fn update(&self, update: &mut Update<'_>) -> Result<(), OpError> {
        for parameter in update.parameters() {
            update.report(&format!("{}.gradient", parameter.name), parameter.gradient);
        }
        Ok(())
    }
}

/// Compiles the step of a model: forward, loss, backward.
fn step(app: App, name: &str, text: &str, [batch, block]: [usize; 2]) -> Result<Compiled, Errors> {
    let model = Arc::new(ModelFile::parse(Arc::new(Source { name: name.into(), text: text.into() }))?);
    let scope = model.config(&BTreeMap::new())?;
    compile(&Request {
        registry: app.into_registry(),
        model,
        scope,
        options: Options { seed: 1, training: true, ..Options::new(batch, block) },
        objectives: vec![("loss".into(), Arc::new(CrossEntropy {}))],
        optimizer: Some(Arc::new(ReadGradients)),
        memory_budget: None,
        without: vec![],
    })
}

fn with_plugin() -> App {
    App::new().add_plugin(RunningMeanPlugin)
}

#[test]
fn the_gradient_of_the_running_mean_agrees_with_finite_differences() {
    const ROWS: &str = r#"Model(nodes: [
        ("embedding", Embedding(rows: 35, dim: 3, init: Normal(std: 1.0)), ["tokens"]),
        ("mean", RunningMean, ["embedding"]),
        ("logits", Linear(out: 11, init: Normal(std: 1.0)), ["mean"]),
    ])"#;
    let (batch, block) = (5, 7);
    let compiled = step(with_plugin(), "rows.ron", ROWS, [batch, block]).unwrap_or_else(|e| panic!("{e}"));
    let device = Arc::new(CpuDevice::new(Some(2)).unwrap());
    let mut session = Session::new(device, &compiled, None).unwrap_or_else(|e| panic!("{e}"));
    session.initialize(1).unwrap();
    // every position has a token of its own, so the rows of the embedding are the inputs of the op
    let tokens: Vec<i32> = (0..(batch * block) as i32).collect();
    let targets: Vec<i32> = tokens.iter().map(|t| t * t % 11).collect();
    session.write_input("tokens", &tokens);
    session.write_input("targets", &targets);
    session.run_step().unwrap();
    session.run_update().unwrap();
    let gradient = session.output::<f32>("embedding.weight.gradient").expect("the optimizer reports it");

    let planned = compiled.plan.parameters.iter().find(|p| p.parameter.name == "embedding.weight").unwrap();
    let weight = session.read::<f32>(&planned.port);
    assert_eq!(gradient.len(), weight.len());
    let largest = gradient.iter().fold(0f32, |most, g| most.max(g.abs()));
    assert!(largest > 0.01, "{gradient:?}");
    let step = 0.02;
    for i in 0..weight.len() {
        let [above, below] = [step, -step].map(|change| {
            let mut moved = weight.clone();
            moved[i] += change;
            session.write(&planned.port, &moved);
            session.run_step().unwrap();
            session.scalar("loss").unwrap()
        });
        let difference = (above - below) / (2.0 * step);
        assert!((difference - gradient[i]).abs() < 0.01 * largest, "element {i}: {difference}, not {}", gradient[i]);
    }
}

#[test]
fn without_the_plugin_its_ops_are_unknown() {
    let text = fs::read_to_string(file("model.ron")).unwrap();
    let message = step(App::new(), "model.ron", &text, [2, 8]).err().expect("an error").to_string();
    for part in ["unknown op `RunningMean`", "unknown op `LeakyRelu`", "model.ron"] {
        assert!(message.contains(part), "{part} is not in: {message}");
    }
    step(with_plugin(), "model.ron", &text, [2, 8]).unwrap_or_else(|e| panic!("{e}"));
}

#[test]
fn a_wrong_shape_is_an_error_that_names_the_row() {
    let rows = r#"Model(nodes: [("mean", RunningMean, ["tokens"]), ("logits", Linear(out: 8), ["mean"])])"#;
    let message = step(with_plugin(), "rows.ron", rows, [2, 8]).err().expect("an error").to_string();
    for part in ["rows.ron:1:", "mean", "expected f32[B, T, C], found i32[2, 8]"] {
        assert!(message.contains(part), "{part} is not in: {message}");
    }
}

/// A copy of its input whose author forgot the gradient.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Opaque {}

impl Op for Opaque {
    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, OpError> {
        Ok(inputs.to_vec())
    }
    fn lower(&self, _: &NodeView<'_>, target: Target) -> Result<Kernel, OpError> {
        match target {
            Target::Cuda => Err(OpError::no_kernel(target)),
            Target::Cpu => Ok(Kernel::cpu(|arguments| {
                arguments.slice_mut::<f32>(0).copy_from_slice(arguments.slice(0));
                Ok(())
            })),
        }
    }
}

/// An op whose author forgot one of two gradients.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Half {}

impl Op for Half {
    fn gradient(&self, g: &mut dataflow::graph::gradient::Gradient<'_>) -> Result<(), OpError> {
        let dy = g.output_gradient_or_zeros(0)?;
        g.set(0, dy)
    }
    fn arity(&self) -> std::ops::RangeInclusive<usize> {
        2..=2
    }
}

struct Forgetful;

impl Plugin for Forgetful {
    fn build(&self, registry: &mut Registry) {
        let info = Info { name: "Opaque", about: "", inputs: &["x"], formula: "", source: "", example: "" };
        registry.op::<Opaque>(info);
        registry.op::<Half>(Info { name: "Half", inputs: &["a", "b"], ..info });
    }
}

#[test]
fn an_op_without_a_gradient_on_a_path_to_the_loss_is_an_error() {
    let build = |rows: &str| {
        let text = format!("Model(nodes: [\n(\"embedding\", Embedding(rows: 8, dim: 4), [\"tokens\"]),\n{rows}])");
        step(App::new().add_plugin(Forgetful), "rows.ron", &text, [2, 3])
    };
    let message = |rows: &str| build(rows).err().expect("an error").to_string();

    let opaque = message("(\"copy\", Opaque, [\"embedding\"]),\n(\"logits\", Linear(out: 8), [\"copy\"])");
    for part in ["rows.ron:3:", "`copy`", "no gradient", "path from a parameter to the loss"] {
        assert!(opaque.contains(part), "{part} is not in: {opaque}");
    }
    let half = message("(\"both\", Half, [\"embedding\", \"embedding\"]),\n(\"logits\", Linear(out: 8), [\"both\"])");
    for part in ["rows.ron:3:", "`both`", "no gradient for input 1"] {
        assert!(half.contains(part), "{part} is not in: {half}");
    }
    // beside the path it does no harm: nothing asks for its gradient
    let beside = "(\"copy\", Opaque, [\"embedding\"]),\n(\"logits\", Linear(out: 8), [\"embedding\"])";
    build(beside).unwrap_or_else(|e| panic!("{e}"));
}

/// A program of one token would give the token itself where the model means the mean of all before it.
#[test]
fn an_op_of_which_nobody_knows_whether_it_looks_back_does_not_generate() {
    let generate = |name: &str| {
        let text = fs::read_to_string(file("model.ron")).unwrap();
        let source = Source { name: "model.ron".into(), text: edited(&text, name) };
        let model = Arc::new(ModelFile::parse(Arc::new(source)).unwrap());
        let scope = model.config(&BTreeMap::new()).unwrap();
        let options = Options {
            recurrent: Some(Recurrence { slots: 1, capacity: 16, logits: true, weights: DType::F32 }),
            ..Options::new(1, 1)
        };
        compile(&Request {
            registry: App::new().add_plugin(RunningMeanPlugin).into_registry(),
            model,
            scope,
            options,
            objectives: vec![],
            optimizer: None,
            without: vec![],
            memory_budget: None,
        })
    };
    let message = generate("RunningMean").err().expect("an error").to_string();
    for part in ["model.ron:", "`RunningMean`", "no recurrent form", "Op::recurrent"] {
        assert!(message.contains(part), "{part} is not in: {message}");
    }
    // an elementwise op of the plugin is known to look at each token alone
    generate("LeakyRelu").unwrap_or_else(|e| panic!("{e}"));
}

/// The model with another op in place of the running mean.
fn edited(text: &str, op: &str) -> String {
    assert!(text.contains("RunningMean"), "{text}");
    text.replace("RunningMean", op)
}
