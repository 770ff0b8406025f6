//! `dataflow plan MODEL`

use std::sync::Arc;
use std::time::Instant;

use clap::Args;
use dataflow_graph::builtin::Elementwise;
use dataflow_graph::compile::{Compiled, Request, compile};
use dataflow_graph::components::{OpRef, Target};
use dataflow_graph::diagnostic::Errors;
use dataflow_graph::op::Epilogue;
use dataflow_graph::plan::PlannedLaunch;
use dataflow_graph::registry::Registry;
use dataflow_graph::systems::rematerialize::Rematerialized;
use dataflow_kernels::device::{Operand, Region};
use dataflow_kernels::expression::input_name;
use serde_json::json;

use super::model_args::ModelArgs;
use super::{print, print_json, thousands};

#[derive(Args)]
pub(super) struct Plan {
    #[command(flatten)]
    model: ModelArgs,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

impl Plan {
    pub(super) fn run(self, registry: &Arc<Registry>) -> Result<(), Errors> {
        let request = self.model.training(registry, Target::Cpu)?;
        let start = Instant::now();
        let Compiled { plan, world } = compile(&request)?;
        let seconds = start.elapsed().as_secs_f64();
        let all = registry.systems.optional().map(String::from).collect();
        let unfused = compile(&Request { without: all, memory_budget: None, ..request })?.plan.launches.len();
        let (layout, cost) = (&plan.layout, plan.cost());
        if self.json {
            print_json(&json!({
                "launches": plan.launches.len(),
                "launches_unfused": unfused,
                "arena_bytes": plan.bytes(Region::Arena),
                "live_peak_bytes": layout.live_peak_bytes,
                "sum_bytes": layout.sum_bytes,
                "parameters": plan.parameter_count(),
                "flops_per_step": cost.flops,
                "bytes_per_step": cost.bytes,
            }));
            return Ok(());
        }
        for (i, launch) in plan.launches.iter().enumerate() {
            print(&format!("{i:5}  {}\n", describe(launch)));
            // what was fused is a formula of the launch's inputs
            let Some(OpRef(op)) = world.get(launch.node) else { continue };
            if let Some(Elementwise { program, .. }) = op.downcast() {
                print(&format!("{:7}{program}\n", ""));
            }
            if let Some(Epilogue { program, result, .. }) = op.epilogue() {
                print(&format!("{:7}{program}, where {} is the product\n", "", input_name(*result as u32)));
            }
        }
        let mib = |bytes: usize| format!("{:.1} MiB", bytes as f64 / (1 << 20) as f64);
        print(&format!(
            "\nlaunches          {} ({unfused} with all optional systems off)\n\
             parameters        {} ({})\n\
             optimizer state   {}\n\
             arena             {}\n  largest live set {}\n  without reuse   {}\n\
             work per step     {:.2} GFLOP, {:.2} GB\n\
             compiled in       {seconds:.3} s\n",
            plan.launches.len(),
            thousands(plan.parameter_count()),
            mib(plan.bytes(Region::Parameters)),
            mib(plan.bytes(Region::State)),
            mib(plan.bytes(Region::Arena)),
            mib(layout.live_peak_bytes),
            mib(layout.sum_bytes),
            cost.flops / 1e9,
            cost.bytes / 1e9,
        ));
        if let Some(Rematerialized { launches, flops, arena_before }) = plan.rematerialized {
            let saved = mib(arena_before - plan.bytes(Region::Arena));
            print(&format!(
                "recomputed        {launches} launches, {:.2} GFLOP ({:.1} %), which save {saved} of {}\n",
                flops / 1e9,
                100.0 * flops / cost.flops,
                mib(arena_before),
            ));
        }
        Ok(())
    }
}

/// What a launch does, and where it reads and writes.
fn describe(launch: &PlannedLaunch) -> String {
    let op = launch.op.split([' ', '(', '{']).next().unwrap_or_default();
    let operands = |list: &[Operand]| {
        let shown = list.iter().take(6).map(operand).collect::<Vec<_>>().join(" ");
        if list.len() > 6 { format!("{shown} and {} more", list.len() - 6) } else { shown }
    };
    let (inputs, outputs) = (operands(&launch.inputs), operands(&launch.outputs));
    format!("{:<44} {op:<24} {inputs} -> {outputs}", launch.name)
}

fn operand(operand: &Operand) -> String {
    let region = match operand.region {
        Region::Arena => "a",
        Region::Parameters => "p",
        Region::State => "s",
        Region::Io => "io",
    };
    let stride =
        if operand.rows > 1 && operand.stride != operand.cols { format!("/{}", operand.stride) } else { String::new() };
    format!("{region}@{}[{}x{}{stride}]", operand.offset, operand.rows, operand.cols)
}
