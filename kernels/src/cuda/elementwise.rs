//! CUDA code of elementwise programs. The text depends on the program and on the form of its tensors (types, vector
//! width, which inputs are broadcast), not on their sizes, so that all layers of a model share a kernel.

use std::fmt::Write;

use sha2::{Digest, Sha256};

use super::call::{Argument, Call, Calls, Tensor};
use crate::device::{DType, KernelError};
use crate::expression::{Binary, Instruction, Program, Unary, Value};

/// What stands before generated code.
pub const PRELUDE: &str =
    "#include \"common.cuh\"\n#include \"real.cuh\"\n#include \"keep.cuh\"\n#include \"elementwise.cuh\"\n";

/// How the rows of an input `[rows, cols]` repeat to those of an output: output row `r` reads row
/// `(r / div) % modulo`, and where `column` is set its only column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Repeat {
    /// Output rows that share an input row.
    pub div: usize,
    /// Input rows.
    pub modulo: usize,
    /// Whether the input has one column.
    pub column: bool,
}

/// How the code finds an input's row.
#[derive(Clone, Copy, PartialEq)]
enum RowOf {
    Same,
    First,
    Mapped,
}

/// Adds the call that computes `program`: its inputs are the first inputs of the launch, each repeated by its entry of
/// `repeats`. A random program's last input is the step counter.
///
/// # Errors
/// As [`Calls::launch`].
pub fn launch(c: &mut Calls<'_>, program: &Program, repeats: &[Repeat], seed: u64) -> Result<(), KernelError> {
    let outputs: Vec<Tensor> = (0..program.outputs().len()).map(|o| c.output(o)).collect();
    let inputs: Vec<Tensor> = (0..program.inputs()).map(|i| c.input(i)).collect();
    let (rows, cols) = (outputs[0].rows, outputs[0].cols);
    let row_of = |r: &Repeat| match (r.div, r.modulo) {
        (_, 1) => RowOf::First,
        (1, modulo) if modulo == rows => RowOf::Same,
        _ => RowOf::Mapped,
    };
    let whole = inputs.iter().zip(repeats).filter(|(_, r)| !r.column).map(|(t, _)| t);
    let vector = whole.chain(&outputs).map(|t| t.vector(4)).min().unwrap_or(1);
    let forms: Vec<(RowOf, bool, DType)> =
        inputs.iter().zip(repeats).map(|(t, r)| (row_of(r), r.column, t.dtype)).collect();
    let types: Vec<DType> = outputs.iter().map(|t| t.dtype).collect();
    let (text, entry) = generate(program, &forms, &types, vector);
    let width = cols.div_ceil(vector);
    let x = if width < 32 { width.next_power_of_two() } else { width.next_multiple_of(32).min(256) };
    let y = (256 / x).max(1);
    let mut call = Call::generated(text, entry).grid3(width.div_ceil(x), rows.div_ceil(y).min(65535), 1);
    call.block = [x as u32, y as u32, 1];
    for (tensor, repeat) in inputs.iter().zip(repeats) {
        call = call.rows(*tensor);
        if row_of(repeat) == RowOf::Mapped {
            call = call.arg(repeat.div as i32).arg(repeat.modulo as i32);
        }
    }
    for tensor in &outputs {
        call = call.rows(*tensor);
    }
    if program.is_random() {
        call = call.pointer(c.input(program.inputs())).arg(Argument::U64(seed));
    }
    c.launch(call)
}

/// The type's name in CUDA code.
pub fn type_name(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "float",
        DType::I32 => "int",
        DType::Bf16 => "bf16",
    }
}

/// The kernel's text and name.
fn generate(program: &Program, inputs: &[(RowOf, bool, DType)], outputs: &[DType], vector: usize) -> (String, String) {
    let mut parameters = Vec::new();
    for (i, (row, _, dtype)) in inputs.iter().enumerate() {
        parameters.push(format!("Rows<const {}> x{i}", type_name(*dtype)));
        if *row == RowOf::Mapped {
            parameters.push(format!("int div{i}, int modulo{i}"));
        }
    }
    parameters.extend(outputs.iter().enumerate().map(|(o, dtype)| format!("Rows<{}> y{o}", type_name(*dtype))));
    if program.is_random() {
        parameters.push("const int* step, unsigned long long seed".into());
    }
    let mut body = String::new();
    // writing to a String cannot fail
    let mut line = |indent: usize, text: String| {
        let _ = writeln!(body, "{:1$}{text}", "", 2 * indent);
    };
    line(1, format!("const long long c = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * {vector};"));
    line(1, "if (c >= y0.cols) return;".into());
    let mut masks = Vec::new();
    for instruction in program.instructions() {
        if let Instruction::Keep { site, p } = *instruction {
            let keep = crate::random::Keep::new(0, 0, site, p.get());
            let (threshold, scale) = (keep.threshold, literal(keep.scale.into()));
            line(1, format!("const Keep keep{} = keep_new(seed, *step, {site}u, {threshold}u, {scale});", masks.len()));
            masks.push((site, p));
        }
    }
    line(
        1,
        "for (long long r = blockIdx.y * blockDim.y + threadIdx.y; r < y0.rows; r += gridDim.y * blockDim.y) {".into(),
    );
    for (i, (row, column, _)) in inputs.iter().enumerate() {
        let row = match row {
            RowOf::Same => format!("x{i}.row(r)"),
            RowOf::First => format!("x{i}.data"),
            RowOf::Mapped => format!("x{i}.row(r / div{i} % modulo{i})"),
        };
        match column {
            true => line(2, format!("const float a{i} = to_float({row}[0]);")),
            false => line(2, format!("float a{i}[{vector}]; load_vector<{vector}>({row} + c, a{i});")),
        }
    }
    for o in 0..outputs.len() {
        line(2, format!("float b{o}[{vector}];"));
    }
    line(2, format!("for (int v = 0; v < {vector}; ++v) {{"));
    for (register, instruction) in program.instructions().iter().enumerate() {
        let value = match *instruction {
            Instruction::Input(i) if inputs[i as usize].1 => format!("a{i}"),
            Instruction::Input(i) => format!("a{i}[v]"),
            Instruction::Constant(c) => literal(c),
            Instruction::Unary(op, a) => unary(op, &format!("t{a}")),
            Instruction::Binary(op, a, b) => binary(op, &format!("t{a}"), &format!("t{b}")),
            Instruction::Select(c, a, b) => format!("t{c} != 0.0f ? t{a} : t{b}"),
            Instruction::Keep { site, p } => {
                let mask = masks.iter().position(|m| *m == (site, p)).expect("every mask was listed");
                format!("keep{mask}.at(r * y0.cols + c + v)")
            }
        };
        line(3, format!("const float t{register} = {value};"));
    }
    for (o, register) in program.outputs().iter().enumerate() {
        line(3, format!("b{o}[v] = t{register};"));
    }
    line(2, "}".into());
    for o in 0..outputs.len() {
        line(2, format!("store_vector<{vector}>(y{o}.row(r) + c, b{o});"));
    }
    line(1, "}".into());
    let parameters = parameters.join(", ");
    let hash = Sha256::digest(format!("{parameters}{body}"));
    let name: String = hash[..8].iter().fold("elementwise_".into(), |name, byte| format!("{name}{byte:02x}"));
    (format!("KERNEL {name}({parameters}) {{\n{body}}}\n"), name)
}

fn literal(value: Value) -> String {
    let x = value.get();
    if x.is_finite() { format!("{x:?}f") } else { format!("__int_as_float({:#x})", x.to_bits()) }
}

fn unary(op: Unary, x: &str) -> String {
    match op {
        Unary::Neg => format!("-{x}"),
        Unary::Abs => format!("fabsf({x})"),
        Unary::Exp => format!("expf({x})"),
        Unary::Log => format!("logf({x})"),
        Unary::Sqrt => format!("sqrtf({x})"),
        Unary::Rsqrt => format!("rsqrtf({x})"),
        Unary::Recip => format!("1.0f / {x}"),
        Unary::Sigmoid => format!("sigmoid({x})"),
        Unary::Tanh => format!("tanhf({x})"),
        Unary::Erf => format!("erff({x})"),
        Unary::Softplus => format!("softplus({x})"),
        Unary::LogSigmoid => format!("log_sigmoid({x})"),
        Unary::Relu => format!("{x} <= 0.0f ? 0.0f : {x}"),
        Unary::Sin => format!("sinf({x})"),
        Unary::Cos => format!("cosf({x})"),
        Unary::Step => format!("{x} > 0.0f ? 1.0f : 0.0f"),
    }
}

fn binary(op: Binary, a: &str, b: &str) -> String {
    match op {
        Binary::Add => format!("{a} + {b}"),
        Binary::Sub => format!("{a} - {b}"),
        Binary::Mul => format!("{a} * {b}"),
        Binary::Div => format!("{a} / {b}"),
        Binary::Max => format!("{a} > {b} ? {a} : {b}"),
        Binary::Min => format!("{a} < {b} ? {a} : {b}"),
        Binary::Greater => format!("{a} > {b} ? 1.0f : 0.0f"),
    }
}
