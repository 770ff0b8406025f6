//! The golden ops and the rows that compute the same.
//!
//! Inputs are rows of trained tensors under their golden names, so that each has a gradient. The trained tensors of the row
//! `op` itself are the golden inputs of their names: `op.weight` is `weight`. Numbers among a case's attributes
//! are names for the rows; a list `shape` gives `shape_0`, `shape_1` and so on.

use super::file::Layout;

/// How a golden op is written as rows.
#[derive(Debug)]
pub(super) struct GoldenOp {
    /// As the metadata names it.
    pub name: &'static str,
    /// Golden inputs that the rows read.
    pub inputs: &'static [&'static str],
    /// The golden input of whole numbers, which the rows read as `tokens`.
    pub tokens: Option<&'static str>,
    /// The golden layout of activations.
    pub layout: Layout,
    /// The rows.
    pub rows: &'static str,
    /// The row that computes `y`.
    pub output: &'static str,
}

const fn op(
    name: &'static str,
    layout: Layout,
    inputs: &'static [&'static str],
    rows: &'static str,
    output: &'static str,
) -> GoldenOp {
    GoldenOp { name, inputs, tokens: None, layout, rows, output }
}

const fn with_tokens(op: GoldenOp, tokens: &'static str) -> GoldenOp {
    GoldenOp { tokens: Some(tokens), ..op }
}

use Layout::{ChannelsFirst, Heads, Same};

/// Every golden op but those of the optimizer.
pub(super) const GOLDEN_OPS: &[GoldenOp] = &[
    op("linear", Same, &["x"], r#"("op", Linear(out: "out", bias: "bias"), ["x"])"#, "op"),
    op("matmul", Same, &["a", "b"], r#"("y", MatMul, ["a", "b"])"#, "y"),
    with_tokens(op("embedding", Same, &[], r#"("op", Embedding(rows: "V", dim: "C"), ["tokens"])"#, "op"), "idx"),
    with_tokens(op("cross_entropy", Same, &["logits"], r#"("y", CrossEntropy, ["logits", "tokens"])"#, "y"), "targets"),
    op("silu", Same, &["x"], r#"("y", Silu, ["x"])"#, "y"),
    op("gelu", Same, &["x"], r#"("y", Gelu, ["x"])"#, "y"),
    op("sigmoid", Same, &["x"], r#"("y", Sigmoid, ["x"])"#, "y"),
    op("squared_relu", Same, &["x"], r#"("y", SquaredRelu, ["x"])"#, "y"),
    op("log_sigmoid", Same, &["x"], r#"("y", LogSigmoid, ["x"])"#, "y"),
    op("softplus", Same, &["x"], r#"("y", Softplus, ["x"])"#, "y"),
    op("swiglu", Same, &["up", "gate"], r#"("y", Gate(activation: Silu), ["up", "gate"])"#, "y"),
    op("rms_norm", Same, &["x"], r#"("op", RmsNorm(eps: "eps", weight: "weight"), ["x"])"#, "op"),
    op("layer_norm", Same, &["x"], r#"("op", LayerNorm(eps: "eps", weight: "weight", bias: "bias"), ["x"])"#, "op"),
    op("group_norm", Same, &["x"], r#"("op", GroupNorm(groups: "groups", eps: "eps"), ["x"])"#, "op"),
    op("rope", Heads, &["x"], r#"("y", Rotary(heads: "shape_1"), ["x"])"#, "y"),
    op("theta_shift", Heads, &["x"], r#"("y", Rotary(heads: "shape_1", pairing: Interleaved), ["x"])"#, "y"),
    op("token_shift", Same, &["x"], r#"("y", TokenShift, ["x"])"#, "y"),
    op("causal_attention", Heads, &["q", "k", "v"], r#"("y", CausalAttention(heads: "H"), ["q", "k", "v"])"#, "y"),
    op(
        "wkv_x051a",
        Heads,
        &["r", "k", "v", "time_decay", "time_faaaa"],
        r#"("y", Wkv(heads: "H"), ["r", "k", "v", "time_decay", "time_faaaa"])"#,
        "y",
    ),
    op("retention", Heads, &["q", "k", "v"], r#"("y", Retention(heads: "H", form: Exact), ["q", "k", "v"])"#, "y"),
    op(
        "gla",
        Heads,
        &["q", "k", "v", "log_gate"],
        r#"("y", GatedLinearAttention(heads: "H"), ["q", "k", "v", "log_gate"])"#,
        "y",
    ),
    op(
        "causal_conv1d_silu",
        ChannelsFirst,
        &["x"],
        r#"("op", CausalConv1d(width: "K", activation: Silu), ["x"])"#,
        "op",
    ),
    op(
        "selective_scan",
        ChannelsFirst,
        &["u", "delta", "B", "C", "z", "delta_bias"],
        r#"("step", Add, ["delta", "delta_bias"]),
           ("op", SelectiveScan, ["u", "step", "B", "C"]),
           ("y", Gate(activation: Silu), ["op", "z"])"#,
        "y",
    ),
    op(
        "longhorn_scan",
        ChannelsFirst,
        &["u", "q", "k", "dt", "z", "t_bias"],
        r#"("step", Add, ["dt", "t_bias"]),
           ("op", Longhorn, ["u", "q", "k", "step"]),
           ("y", Gate(activation: Silu), ["op", "z"])"#,
        "y",
    ),
];
