//! Golden files of models: parameters, logits, loss, gradients, and a training trajectory.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use dataflow_graph::compile::{Compiled, Request, compile_in};
use dataflow_graph::components::{Options, Precision, Recurrence};
use dataflow_graph::diagnostic::Diagnostic;
use dataflow_graph::format::formula::Number;
use dataflow_graph::format::model::ModelFile;
use dataflow_graph::format::number::Scope;
use dataflow_graph::op::Op;
use dataflow_graph::optimizer::Optimizer;
use dataflow_graph::plan::Plan;
use dataflow_graph::registry::Registry;
use dataflow_graph::session::Session;
use dataflow_kernels::device::DType;
use dataflow_ops::optimizer::{AdamW, Schedule};
use serde::Deserialize;

use super::file::GoldenFile;
use super::program::{Gradients, check_parameters, output};
use super::tolerance::Kind;
use super::{Backend, Judge, Models, Problem};

/// Logits of the published recurrent form, where they differ from those of the parallel form.
const RECURRENT_LOGITS: &str = "decode/logits_recurrent";

/// The config name that chooses RetNet's form.
const EXACT: &str = "exact";

/// Largest hyper-parameter, so that products of them are numbers too.
const MAX_CONFIG: i64 = 1 << 24;

/// The common hyper-parameters, as the published code names them.
#[derive(Deserialize)]
struct Config {
    vocab_size: i64,
    n_layer: i64,
    n_head: i64,
    n_embd: i64,
    block_size: i64,
    bias: bool,
}

/// The settings of the trajectory.
#[derive(Deserialize)]
struct Train {
    learning_rate: f64,
    min_lr: f64,
    warmup_iters: u64,
    lr_decay_iters: u64,
    beta1: f64,
    beta2: f64,
    eps: f64,
    weight_decay: f64,
    grad_clip: f64,
}

impl Train {
    fn optimizer(&self) -> AdamW {
        AdamW {
            schedule: Schedule::Cosine {
                peak: self.learning_rate,
                floor: self.min_lr,
                warmup: self.warmup_iters,
                steps: self.lr_decay_iters,
            },
            betas: (self.beta1, self.beta2),
            eps: self.eps,
            decay: self.weight_decay,
            clip: (self.grad_clip > 0.0).then_some(self.grad_clip),
        }
    }
}

/// What a model became under training.
#[derive(Clone, Debug, PartialEq)]
pub struct Trajectory {
    /// The learning rate of each update.
    pub lr: Vec<f32>,
    /// The loss before each update, averaged over its micro-batches.
    pub loss: Vec<f32>,
    /// The norm of all gradients together, before clipping.
    pub grad_norm: Vec<f32>,
    /// Every parameter after the last update, by name.
    pub parameters: BTreeMap<String, Vec<f32>>,
}

/// A golden file with the model that it is about.
struct Golden<'a> {
    file: &'a GoldenFile,
    model: Arc<ModelFile>,
    scope: Scope,
    registry: &'a Arc<Registry>,
    backend: &'a Backend,
    loss: Arc<dyn Op>,
}

impl<'a> Golden<'a> {
    fn new(
        file: &'a GoldenFile,
        name: &str,
        registry: &'a Arc<Registry>,
        models: &Models<'_>,
        backend: &'a Backend,
    ) -> Result<Self, Problem> {
        let model = models(name)?;
        let config: Config = file.json("config")?;
        let mut set = BTreeMap::from([("dropout".to_string(), Number::Int(0))]);
        for (theirs, ours, value) in [
            ("vocab_size", "vocab", config.vocab_size),
            ("n_layer", "n_layer", config.n_layer),
            ("n_head", "n_head", config.n_head),
            ("n_embd", "d_model", config.n_embd),
            ("block_size", "block", config.block_size),
        ] {
            if !(1..=MAX_CONFIG).contains(&value) {
                let message = format!("`{theirs}` of the config: {value} is not between 1 and {MAX_CONFIG}");
                return Err(Problem::Content(message));
            }
            set.insert(ours.to_string(), Number::Int(value));
        }
        // a model without biases need not say so
        let has_bias = model.config(&BTreeMap::new())?.get("bias").is_some();
        if has_bias || config.bias {
            set.insert("bias".into(), Number::Int(config.bias.into()));
        }
        let scope = model.config(&set)?;
        let loss = registry.ops().and_then(|ops| ops.get("CrossEntropy")).and_then(|entry| entry.parse("()").ok());
        let loss = loss.ok_or_else(|| Diagnostic::new("the op `CrossEntropy` is not registered"))?;
        Ok(Self { file, model, scope, registry, backend, loss })
    }

    fn compile(
        &self,
        [batch, block]: [usize; 2],
        micro_batches: usize,
        optimizer: Option<Arc<dyn Optimizer>>,
    ) -> Result<Compiled, Problem> {
        let training = optimizer.is_some();
        self.compile_with(
            Options { micro_batches, training, target: self.backend.device.target(), ..Options::new(batch, block) },
            optimizer,
        )
    }

    fn compile_with(&self, options: Options, optimizer: Option<Arc<dyn Optimizer>>) -> Result<Compiled, Problem> {
        let objectives = if options.training { vec![("loss".to_string(), self.loss.clone())] } else { Vec::new() };
        let request = Request {
            registry: self.registry.clone(),
            model: self.model.clone(),
            scope: self.scope.clone(),
            options,
            objectives,
            optimizer,
            memory_budget: None,
            without: Vec::new(),
        };
        Ok(compile_in(&request, self.backend.precision)?)
    }

    /// A session with the file's parameters.
    fn session(&self, compiled: &Compiled) -> Result<Session, Problem> {
        self.check_parameters(&compiled.plan)?;
        let session = Session::new(self.backend.device.clone(), compiled, None)?;
        for planned in &compiled.plan.parameters {
            session.write(&planned.port, self.file.real(&format!("param/{}", planned.parameter.name))?.1);
        }
        Ok(session)
    }

    /// Fails unless names and shapes of the parameters are the file's.
    fn check_parameters(&self, plan: &Plan) -> Result<(), Problem> {
        let shapes = self.file.below("param/").map(|(name, tensor)| (name.to_string(), tensor.shape.clone()));
        check_parameters(&format!("`{}`", self.model.source.name), plan, &shapes.collect())
    }

    /// Fails unless number and weight decay of the parameters are the file's.
    fn check_decay(&self, plan: &Plan) -> Result<(), Problem> {
        let mut differences = Vec::new();
        let (count, wanted) = (plan.parameter_count(), self.file.json::<usize>("n_params")?);
        if count != wanted {
            differences.push(format!("{count} trained numbers, but {wanted} in the file"));
        }
        let decayed: BTreeSet<String> = self.file.json("decayed")?;
        for planned in &plan.parameters {
            let name = &planned.parameter.name;
            match (planned.decays, decayed.contains(name)) {
                (true, false) => differences.push(format!("`{name}` decays, but not in the file")),
                (false, true) => differences.push(format!("`{name}` does not decay, but does in the file")),
                _ => {}
            }
        }
        if differences.is_empty() {
            return Ok(());
        }
        Err(Problem::Parameters { model: format!("`{}`", self.model.source.name), differences })
    }

    /// Tokens and their shape `(B, T)`.
    fn tokens(&self, name: &str) -> Result<([usize; 2], &'a [i32]), Problem> {
        match self.file.whole(name)? {
            (&[batch, time], tokens) => Ok(([batch, time], tokens)),
            (shape, _) => Err(Problem::Content(format!("`{name}` must be (B, T), but is {shape:?}"))),
        }
    }

    /// The logits of the evaluation program.
    fn compare_logits(&self, tokens: &str, logits: &str, kind: Kind, judge: &mut Judge) -> Result<(), Problem> {
        let (shape, idx) = self.tokens(tokens)?;
        let mut session = self.session(&self.compile(shape, 1, None)?)?;
        session.write_input("tokens", idx);
        session.run_step()?;
        session.check()?;
        judge.compare(logits, &output(&session, "logits")?, self.file.real(logits)?.1, kind);
        Ok(())
    }

    /// The logits of the recurrent program, which is given one token after the other.
    fn compare_steps(&self, tokens: &str, logits: &str, kind: Kind, judge: &mut Judge) -> Result<(), Problem> {
        let ([batch, time], idx) = self.tokens(tokens)?;
        let recurrent = Some(Recurrence { slots: batch, capacity: time, logits: true, weights: DType::F32 });
        let options = Options { recurrent, target: self.backend.device.target(), ..Options::new(batch, 1) };
        let mut session = self.session(&self.compile_with(options, None)?)?;
        session.write_input("slots", &(0..batch as i32).collect::<Vec<_>>());
        session.write_input("lengths", &vec![1; batch]);
        let mut made = vec![Vec::new(); batch];
        for t in 0..time {
            let column: Vec<i32> = (0..batch).map(|b| idx[b * time + t]).collect();
            session.write_input("tokens", &column);
            session.write_input("positions", &vec![t as i32; batch]);
            session.run_step()?;
            session.check()?;
            let step = output(&session, "logits")?;
            made.iter_mut().zip(step.chunks(step.len() / batch)).for_each(|(made, row)| made.extend_from_slice(row));
        }
        judge.compare(format!("{logits} by steps"), &made.concat(), self.file.real(logits)?.1, kind);
        Ok(())
    }

    /// The loss of the training program and every gradient.
    fn compare_gradients(&self, judge: &mut Judge) -> Result<(), Problem> {
        let (shape, idx) = self.tokens("idx")?;
        let (targets_shape, targets) = self.tokens("targets")?;
        if shape != targets_shape {
            return Err(Problem::Content("`idx` and `targets` have different shapes".into()));
        }
        let mut session = self.session(&self.compile(shape, 1, Some(Arc::new(Gradients)))?)?;
        session.write_input("tokens", idx);
        session.write_input("targets", targets);
        session.run_step()?;
        session.check()?;
        judge.compare("loss", &output(&session, "loss")?, self.file.real("loss")?.1, Kind::Values);
        for planned in &session.plan().parameters {
            let name = &planned.parameter.name;
            let label = format!("grad/{name}");
            let gradient = output(&session, &Gradients::output(name))?;
            judge.compare(label.clone(), &gradient, self.file.real(&label)?.1, Kind::Deep);
        }
        Ok(())
    }

    /// Trains as the file says.
    fn trajectory(&self) -> Result<Trajectory, Problem> {
        let (shape, idx) = self.file.whole("train/idx")?;
        let (targets_shape, targets) = self.file.whole("train/targets")?;
        let &[_, micro_batches, batch, time] = shape else {
            return Err(Problem::Content(format!("`train/idx` must be (steps, micro, B, T), but is {shape:?}")));
        };
        if shape != targets_shape {
            return Err(Problem::Content("`train/idx` and `train/targets` have different shapes".into()));
        }
        let train: Train = self.file.json("train")?;
        let compiled = self.compile([batch, time], micro_batches, Some(Arc::new(train.optimizer())))?;
        let mut session = self.session(&compiled)?;
        let mut run = Trajectory { lr: vec![], loss: vec![], grad_norm: vec![], parameters: BTreeMap::new() };
        let one = batch * time;
        for (idx, targets) in idx.chunks(micro_batches * one).zip(targets.chunks(micro_batches * one)) {
            let mut loss = 0.0;
            for (idx, targets) in idx.chunks(one).zip(targets.chunks(one)) {
                session.write_input("tokens", idx);
                session.write_input("targets", targets);
                session.run_step()?;
                session.check()?;
                loss += f64::from(output(&session, "loss")?[0]);
            }
            session.run_update()?;
            session.check()?;
            run.loss.push((loss / micro_batches as f64) as f32);
            run.lr.extend(output(&session, "lr")?);
            run.grad_norm.extend(output(&session, "grad_norm")?);
        }
        for planned in &compiled.plan.parameters {
            run.parameters.insert(planned.parameter.name.clone(), session.read(&planned.port));
        }
        Ok(run)
    }

    fn compare_trajectory(&self, judge: &mut Judge) -> Result<(), Problem> {
        let run = self.trajectory()?;
        let order: Vec<String> = self.file.json("param_order")?;
        let norm = |values: &Vec<f32>| values.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt() as f32;
        let norms = order.iter().map(|name| {
            let values = run.parameters.get(name);
            values
                .map(norm)
                .ok_or_else(|| Problem::Content(format!("`param_order` has `{name}`, which is no parameter")))
        });
        let norms: Vec<f32> = norms.collect::<Result<_, _>>()?;
        for (name, ours, kind) in [
            ("train/lr", &run.lr, Kind::LearningRate),
            ("train/loss", &run.loss, Kind::Trajectory),
            ("train/grad_norm", &run.grad_norm, Kind::GradientNorm),
            ("train/param_l2_after", &norms, Kind::Trajectory),
        ] {
            judge.compare(name, ours, self.file.real(name)?.1, kind);
        }
        Ok(())
    }
}

/// Compares everything in a model's file.
pub(super) fn verify(
    file: &GoldenFile,
    name: &str,
    registry: &Arc<Registry>,
    models: &Models<'_>,
    backend: &Backend,
    judge: &mut Judge,
) -> Result<(), Problem> {
    let golden = Golden::new(file, name, registry, models, backend)?;
    let plan = golden.compile(golden.tokens("idx")?.0, 1, None)?.plan;
    golden.check_parameters(&plan)?;
    golden.check_decay(&plan)?;
    golden.compare_logits("idx", "logits", Kind::Deep, judge)?;
    golden.compare_gradients(judge)?;
    golden.compare_trajectory(judge)?;
    // another batch and a longer sequence than in training
    golden.compare_logits("decode/idx", "decode/logits", Kind::Deep, judge)?;
    let published = if file.tensor(RECURRENT_LOGITS).is_ok() { RECURRENT_LOGITS } else { "decode/logits" };
    // generation is in single precision
    if backend.precision == Precision::F32 {
        golden.compare_steps("decode/idx", published, Kind::Deep, judge)?;
    }
    // where the published model decodes in another form than it trains in, the model file's other form is that one
    if file.tensor(RECURRENT_LOGITS).is_ok() && golden.scope.get(EXACT).is_some() {
        let scope = golden.scope.with(EXACT, Number::Int(0));
        let recurrent = Golden { scope, ..golden };
        recurrent.compare_logits("decode/idx", RECURRENT_LOGITS, Kind::Recurrent, judge)?;
    }
    Ok(())
}

/// Trains the model of a golden file.
pub(super) fn trajectory(
    file: &GoldenFile,
    name: &str,
    registry: &Arc<Registry>,
    models: &Models<'_>,
    backend: &Backend,
) -> Result<Trajectory, Problem> {
    Golden::new(file, name, registry, models, backend)?.trajectory()
}
