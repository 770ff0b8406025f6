//! Prints by how much one training step raises the peak of the resident memory, for every model and T = 256 to 2048
//! at the Shakespeare configuration: `cargo run --release -p dataflow-ops --example step_memory`. Linux only.
//!
//! The peak of a process never falls, so each step runs in a process of its own: the program calls itself with
//! a model, a T and a number of sequences. A last column has the whole peak of a process that makes three updates on 8
//! sequences of 256 tokens.

#[path = "../tests/common/mod.rs"]
mod common;

use std::error::Error;
use std::process::Command;

use common::{MODELS, SHAKESPEARE, learn, model, training};
use dataflow_kernels::device::Region;

const BLOCKS: [usize; 4] = [256, 512, 1024, 2048];

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match &arguments[..] {
        [] => table(),
        [name, block, batch] => one_process(name, block.parse()?, batch.parse()?),
        _ => Err("usage: step_memory [MODEL T B]".into()),
    }
}

/// Runs every case; prints megabytes of peak growth, and of the plan (arena, parameters, states) in parentheses.
fn table() -> Result<(), Box<dyn Error>> {
    println!("peak growth of a training step in MB (planned), by T");
    println!("{:9}{}{:>20}", "", BLOCKS.map(|b| format!("{b:>20}")).concat(), "8 x 256, whole");
    for name in MODELS {
        let mut line = format!("{name:9}");
        for (block, batch) in BLOCKS.map(|block| (block, 1)).into_iter().chain([(256, 8)]) {
            let arguments = [name, &block.to_string(), &batch.to_string()];
            let output = Command::new(std::env::current_exe()?).args(arguments).output()?;
            if !output.status.success() {
                return Err(format!("{name}, T = {block}: {}", String::from_utf8_lossy(&output.stderr)).into());
            }
            line += &format!("{:>20}", String::from_utf8(output.stdout)?.trim());
        }
        println!("{line}");
    }
    Ok(())
}

fn one_process(name: &str, block: usize, batch: usize) -> Result<(), Box<dyn Error>> {
    let mut set = SHAKESPEARE.to_vec();
    set.retain(|(name, _)| *name != "block");
    set.push(("block", block as i64));
    let compiled = training(&model(name), &set, batch, block).map_err(|e| e.to_string())?;
    let planned: usize = Region::ALL.iter().map(|r| compiled.plan.bytes(*r)).sum();
    let before = peak()?;
    if batch > 1 {
        learn(&compiled, 65, 3);
        println!("{:.0}", peak()? / 1e6);
    } else {
        learn(&compiled, 65, 1);
        println!("{:.0} ({:.0})", (peak()? - before) / 1e6, planned as f64 / 1e6);
    }
    Ok(())
}

/// The highest resident memory of this process so far, in bytes.
fn peak() -> Result<f64, Box<dyn Error>> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|l| l.starts_with("VmHWM:")).ok_or("no VmHWM in /proc/self/status")?;
    let kilobytes = line.split_whitespace().nth(1).ok_or("VmHWM without a number")?;
    Ok(kilobytes.parse::<f64>()? * 1024.0)
}
