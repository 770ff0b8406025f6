//! What a device can do at best: the rate of a large matrix product and of a pass over memory.
//!
//! Both are measured with ops of the registry, on programs of a few rows, so that any device can be measured.

use std::sync::Arc;

use dataflow_graph::compile::{Request, compile_in};
use dataflow_graph::components::{Options, Precision};
use dataflow_graph::diagnostic::{Errors, Source};
use dataflow_graph::format::model::ModelFile;
use dataflow_graph::op::Cost;
use dataflow_graph::registry::Registry;
use dataflow_graph::session::Session;
use dataflow_kernels::device::{Device, Target};
use serde::{Deserialize, Serialize};

use super::step::to_errors;

/// The best rates of a device.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Roofline {
    /// Floating-point operations of a matrix product in a second.
    pub flops_per_s: f64,
    /// Bytes that a sum of two long tensors reads and writes in a second.
    pub bytes_per_s: f64,
}

impl Roofline {
    /// Measures a device, with products of this precision. Takes about a second on a processor.
    ///
    /// # Errors
    /// No memory left (it takes 200 MB, and 1.6 GB on a GPU), or a registry without the ops `Embedding`, `Linear` and `Add`.
    pub fn measure(registry: &Arc<Registry>, device: &Arc<dyn Device>, precision: Precision) -> Result<Self, Errors> {
        // so large that a GPU is busy for much longer than a launch takes
        let (width, rows) = match device.target() {
            Target::Cpu => (1536, 16384),
            Target::Cuda => (4096, 131_072),
        };
        let linear = format!("Linear(out: {width})");
        let (cost, seconds) = best(registry, (device, precision), &linear, "[\"rows\"]", (width, width), 16)?;
        let flops_per_s = cost.flops / seconds;
        let (cost, seconds) = best(registry, (device, precision), "Add", "[\"rows\", \"rows_2\"]", (rows, 1024), 12)?;
        Ok(Self { flops_per_s, bytes_per_s: cost.bytes / seconds })
    }

    /// The least seconds that the work could take.
    pub fn floor(&self, cost: Cost) -> f64 {
        (cost.flops / self.flops_per_s).max(cost.bytes / self.bytes_per_s)
    }
}

/// The work and the shortest time of the op in `runs` runs, on inputs of `(rows, columns)`.
fn best(
    registry: &Arc<Registry>,
    (device, precision): (&Arc<dyn Device>, Precision),
    op: &str,
    inputs: &str,
    (rows, columns): (usize, usize),
    runs: usize,
) -> Result<(Cost, f64), Errors> {
    let text = format!(
        "Model(about: \"\", config: {{}}, nodes: [
            (\"rows\", Embedding(rows: 8, dim: {columns}), [\"tokens\"]),
            (\"rows_2\", Embedding(rows: 8, dim: {columns}), [\"tokens\"]),
            (\"measured\", {op}, {inputs}),
        ], output: \"measured\")"
    );
    let model = Arc::new(ModelFile::parse(Arc::new(Source { name: "the roofline's program".into(), text }))?);
    let scope = model.config(&Default::default())?;
    let optional = registry.systems.optional().filter(|name| *name != "mixed_precision");
    let request = Request {
        registry: registry.clone(),
        model,
        scope,
        options: Options { target: device.target(), ..Options::new(1, rows) },
        objectives: Vec::new(),
        optimizer: None,
        memory_budget: None,
        without: optional.map(String::from).collect(),
    };
    let compiled = compile_in(&request, precision)?;
    let mut session = Session::new(device.clone(), &compiled, None)?;
    session.initialize(0)?;
    let tokens: Vec<i32> = (0..rows as i32).map(|i| i % 8).collect();
    session.write_input("tokens", &tokens);
    let launches = &compiled.plan.launches;
    let at = launches.iter().position(|l| l.name == "measured").unwrap_or(launches.len() - 1);
    let mut shortest = f64::INFINITY;
    for _ in 0..runs {
        let mut seconds = vec![0.0; launches.len()];
        session.run_timed(0..launches.len(), &mut seconds).map_err(to_errors)?;
        shortest = shortest.min(seconds[at]);
    }
    Ok((launches[at].cost, shortest))
}
