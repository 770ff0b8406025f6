//! `dataflow bench MODEL`

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use clap::Args;
use dataflow_graph::diagnostic::Errors;
use dataflow_graph::registry::Registry;
use serde_json::json;

use super::model_args::ModelArgs;
use super::sample::Weights;
use super::{DeviceArgs, PrecisionArgs, print, print_json};
use crate::bench::compare::Earlier;
use crate::bench::decode;
use crate::bench::launches::{Measured, measure};
use crate::bench::roofline::Roofline;
use crate::bench::step::TrainingStep;
use crate::bench::table::table;
use crate::bench::{median, peak_resident_bytes};
use crate::generate::pool::Setup;
use crate::utilization::Utilization;

/// Steps before the first that counts.
const WARMUP: usize = 2;
/// The most steps of which each launch is timed.
const PROFILED: usize = 8;

#[derive(Args)]
pub(super) struct Bench {
    #[command(flatten)]
    model: ModelArgs,
    /// Steps that are timed, behind two that are not
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    precision: PrecisionArgs,
    /// Launches to show, the slowest first
    #[arg(long, value_name = "N", default_value_t = 15)]
    top: usize,
    /// Compare with an earlier result of `--json`
    #[arg(long, value_name = "FILE")]
    compare: Option<PathBuf>,
    /// Time decoding instead: one more token for each of `--batch` sequences, behind `--block` others
    #[arg(long)]
    decode: bool,
    /// The element type of the large parameters in decoding
    #[arg(long, value_enum, default_value_t, requires = "decode")]
    weights: Weights,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

impl Bench {
    pub(super) fn run(self, registry: &Arc<Registry>) -> Result<(), Errors> {
        if self.decode {
            return self.decoding(registry);
        }
        let earlier = self.compare.as_deref().map(Earlier::read).transpose()?;
        let (device, precision) = self.precision.open(&self.device, &self.model.without, None)?;
        let start = Instant::now();
        let request = self.model.training(registry, device.target())?;
        // every model file of ours has the name; two tokens exist in any other too
        let vocab = request.scope.evaluate("vocab").map_or(2, |v| v.real() as usize);
        let mut step = TrainingStep::prepare(&request, precision, device.clone(), vocab)?;
        step.run()?;
        let first_step_s = start.elapsed().as_secs_f64();
        for _ in 1..WARMUP {
            step.run()?;
        }
        let seconds = step.time(self.steps as usize)?;
        let peak_rss = peak_resident_bytes();
        let roofline = Roofline::measure(registry, &device, precision)?;
        let timed = step.time_launches((self.steps as usize).min(PROFILED))?;
        let (launches, ops) = measure(&step.plan().launches, &timed, &roofline);

        let (median_s, cost) = (median(&seconds), step.plan().cost());
        let tokens = f64::from(self.model.batch) * f64::from(self.model.block);
        let fraction = cost.flops / roofline.flops_per_s / median_s;
        let mfu = Utilization::new(step.plan(), 1, precision, device.as_ref()).map(|u| u.in_seconds(median_s));
        let extreme = |pick: fn(f64, f64) -> f64| seconds.iter().copied().reduce(pick).unwrap_or(0.0) * 1e3;
        if self.json {
            print_json(&json!({
                "model": self.model.model.display().to_string(),
                "batch": self.model.batch,
                "block": self.model.block,
                "device": device.describe(),
                "precision": precision.to_string(),
                "steps": self.steps,
                "tokens_per_s": tokens / median_s,
                "step_ms_median": median_s * 1e3,
                "step_ms_min": extreme(f64::min),
                "step_ms_max": extreme(f64::max),
                "first_step_s": first_step_s,
                "peak_rss_mb": peak_rss.map(|bytes| bytes / 1e6),
                "flops_per_step": cost.flops,
                "bytes_per_step": cost.bytes,
                "flops_per_s": cost.flops / median_s,
                "roofline": roofline,
                "roofline_fraction": fraction,
                "mfu": mfu,
                "ops": ops,
                "launches": launches,
            }));
            return Ok(());
        }
        print(&format!("device: {}, {}\n", device.describe(), precision));
        print(&format!(
            "roofline: {:.1} GFLOP/s (matrix product), {:.1} GB/s (sum of two tensors)\n\n",
            roofline.flops_per_s / 1e9,
            roofline.bytes_per_s / 1e9
        ));
        print(&table("by op", &ops.iter().collect::<Vec<_>>()));
        let mut slowest: Vec<&Measured> = launches.iter().collect();
        slowest.sort_by(|a, b| b.ms.total_cmp(&a.ms));
        slowest.truncate(self.top);
        print(&format!("\n{}", table("slowest launches", &slowest)));
        if let Some(earlier) = &earlier {
            print(&format!("\n{}", earlier.table(median_s * 1e3, &ops)));
        }
        print(&format!(
            "\nstep              {:.2} ms (median of {}; {:.2} to {:.2})\n\
             tokens per second {:.0}\n\
             work per step     {:.2} GFLOP, {:.2} GB\n\
             rate              {:.1} GFLOP/s, {:.1}% of the roofline\n\
             first step after  {:.2} s\n",
            median_s * 1e3,
            seconds.len(),
            extreme(f64::min),
            extreme(f64::max),
            tokens / median_s,
            cost.flops / 1e9,
            cost.bytes / 1e9,
            cost.flops / median_s / 1e9,
            100.0 * fraction,
            first_step_s,
        ));
        if let Some(mfu) = mfu {
            print(&format!("model utilization {:.1}% of the device's data sheet\n", 100.0 * mfu));
        }
        if let Some(bytes) = peak_rss {
            print(&format!("peak memory       {:.0} MB\n", bytes / 1e6));
        }
        Ok(())
    }

    fn decoding(&self, registry: &Arc<Registry>) -> Result<(), Errors> {
        let device = self.device.open(&[])?;
        let request = self.model.training(registry, device.target())?;
        let (context, steps) = (self.model.block as usize, self.steps as usize);
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = self.device.threads.map_or(processors, usize::from);
        let setup = Setup {
            registry: registry.clone(),
            device: device.clone(),
            model: request.model,
            scope: request.scope,
            slots: self.model.batch as usize,
            // the steps that do not count are fewer than these
            capacity: context + steps + 16,
            weights: self.weights.dtype(),
        };
        let measured = decode::measure(setup, context, steps, threads)?;
        if self.json {
            let mut json = serde_json::to_value(&measured).unwrap_or_default();
            json["model"] = self.model.model.display().to_string().into();
            json["batch"] = self.model.batch.into();
            json["context"] = context.into();
            json["steps"] = steps.into();
            json["device"] = device.describe().into();
            print_json(&json);
            return Ok(());
        }
        let mb = |bytes: usize| bytes as f64 / 1e6;
        print(&format!(
            "device: {}\n\n\
             step              {:.2} ms (median of {steps}; {:.2} to {:.2})\n\
             tokens per second {:.1}, of {} sequences behind {context} tokens\n\
             parameters        {:.1} MB, states {:.1} MB\n\
             memory            {:.1} GB/s, so that no step takes less than {:.2} ms\n\
             share of that     {:.1}%\n",
            device.describe(),
            measured.step_ms_median,
            measured.step_ms_min,
            measured.step_ms_max,
            measured.tokens_per_s,
            self.model.batch,
            mb(measured.weight_bytes),
            mb(measured.state_bytes),
            measured.read_bytes_per_s / 1e9,
            measured.bound_ms,
            100.0 * measured.bound_fraction,
        ));
        Ok(())
    }
}
