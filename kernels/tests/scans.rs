//! The Longhorn and Mamba scans against the golden files, a plain loop, and themselves in pieces.
mod golden;

use dataflow_kernels::cpu::longhorn::{self, Dims};
use dataflow_kernels::cpu::selective_scan;
use dataflow_kernels::cpu::team::Team;
use dataflow_kernels::{Rows, RowsMut};
use golden::{Case, assert_close, cases};

/// Golden operations reach 1e-6 in f32; sums over time and channels cost a little more.
const TOLERANCE: f32 = 1e-5;

/// A matrix within a wider buffer, so that every kernel sees strides and odd alignments.
#[derive(Clone)]
struct Strided {
    data: Vec<f32>,
    rows: usize,
    cols: usize,
    stride: usize,
}

const OFFSET: usize = 3;

impl Strided {
    fn new(rows: usize, cols: usize, data: &[f32]) -> Self {
        let mut m = Self::unset(rows, cols);
        for (r, row) in data.chunks_exact(cols).enumerate() {
            m.as_mut().row(r).copy_from_slice(row);
        }
        m
    }
    /// Neither zeros nor numbers: what is not overwritten shows.
    fn unset(rows: usize, cols: usize) -> Self {
        let stride = cols + 5;
        Self { data: vec![f32::NAN; OFFSET + rows * stride], rows, cols, stride }
    }
    fn get(&self) -> Rows<'_> {
        Rows::new(&self.data[OFFSET..], self.rows, self.cols, self.stride)
    }
    fn as_mut(&mut self) -> RowsMut<'_> {
        RowsMut::new(&mut self.data[OFFSET..], self.rows, self.cols, self.stride)
    }
    fn values(&self) -> Vec<f32> {
        (0..self.rows).flat_map(|r| self.get().row(r).to_vec()).collect()
    }
    /// Rows `from..to` of every sequence of `time` rows.
    fn part(&self, time: usize, from: usize, to: usize) -> Self {
        let rows: Vec<f32> = (0..self.rows)
            .filter(|r| (from..to).contains(&(r % time)))
            .flat_map(|r| self.get().row(r).to_vec())
            .collect();
        Self::new(rows.len() / self.cols, self.cols, &rows)
    }
}

/// Deterministic numbers in about -1..1.
fn noise(seed: u64, len: usize) -> Vec<f32> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            (x >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

/// A channel-first golden tensor `(B, C, T)` as rows `[B T, C]`.
fn rows(case: &Case, name: &str) -> Strided {
    let t = case.get(name).permute(&[0, 2, 1]);
    Strided::new(t.shape[0] * t.shape[1], t.shape[2], &t.data)
}

fn case_dims(case: &Case) -> Dims {
    Dims { batch: case.size("B"), time: case.size("T"), channels: case.size("D"), state: case.size("N") }
}

/// Sizes that exercise tails of channels and states, several chunks, groups and batch elements.
const SIZES: [Dims; 4] = [
    Dims { batch: 2, time: 70, channels: 300, state: 16 },
    Dims { batch: 1, time: 33, channels: 37, state: 5 },
    Dims { batch: 3, time: 1, channels: 17, state: 1 },
    Dims { batch: 2, time: 64, channels: 32, state: 8 },
];

/// Inputs of a scan by name; both scans have two inputs per channel, two per state, and a gate.
#[derive(Clone)]
struct Data {
    dims: Dims,
    u: Strided,
    dt: Strided,
    /// `q` or `C`
    q: Strided,
    /// `k` or `B`
    k: Strided,
    z: Option<Strided>,
    bias: Option<Vec<f32>>,
    skip: Option<Vec<f32>>,
    a_log: Vec<f32>,
    dy: Strided,
}

impl Data {
    fn random(dims: Dims, optional: bool) -> Self {
        let m = |seed, cols| Strided::new(dims.rows(), cols, &noise(seed, dims.rows() * cols));
        let (d, n) = (dims.channels, dims.state);
        Self {
            dims,
            u: m(1, d),
            dt: m(2, d),
            q: m(3, n),
            k: m(4, n),
            z: optional.then(|| m(5, d)),
            bias: optional.then(|| noise(6, d)),
            skip: optional.then(|| noise(7, d)),
            a_log: noise(8, d * n),
            dy: m(9, d),
        }
    }

    fn part(&self, from: usize, to: usize) -> Self {
        let part = |x: &Strided| x.part(self.dims.time, from, to);
        Self {
            dims: Dims { time: to - from, ..self.dims },
            u: part(&self.u),
            dt: part(&self.dt),
            q: part(&self.q),
            k: part(&self.k),
            z: self.z.as_ref().map(part),
            dy: part(&self.dy),
            ..self.clone()
        }
    }
}

/// Results of a scan; `y` first, then gradients by name.
type Results = Vec<(&'static str, Vec<f32>)>;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Scan {
    Longhorn,
    Mamba,
}

use Scan::{Longhorn, Mamba};

impl Scan {
    fn forward(self, x: &Data, state: Option<&mut [f32]>, boundaries: Option<&mut [f32]>) -> Strided {
        let mut y = Strided::unset(x.dims.rows(), x.dims.channels);
        match self {
            Longhorn => longhorn::forward(x.dims, &longhorn_inputs(x), y.as_mut(), state, boundaries),
            Mamba => selective_scan::forward(x.dims, &mamba_inputs(x), y.as_mut(), state, boundaries),
        }
        y
    }

    fn forward_into(self, x: &Data, out: &mut Buffers) {
        let boundaries = Some(&mut out.boundaries[..]);
        match self {
            Longhorn => longhorn::forward(x.dims, &longhorn_inputs(x), out.y.as_mut(), None, boundaries),
            Mamba => selective_scan::forward(x.dims, &mamba_inputs(x), out.y.as_mut(), None, boundaries),
        }
    }

    fn backward(self, x: &Data, out: &mut Buffers) {
        let (rows, n) = (x.dims.rows(), x.dims.state);
        let pair = out.pair.as_mut();
        // SAFETY: the columns differ.
        let (q, k) = unsafe { (pair.shared_block(0..rows, 0..n), pair.shared_block(0..rows, n..2 * n)) };
        let (u, dt, gate) = (out.u.as_mut(), out.dt.as_mut(), out.z.as_mut().map(Strided::as_mut));
        let (bias, skip) = (out.bias.as_deref_mut(), out.skip.as_deref_mut());
        match self {
            Longhorn => longhorn::backward(
                x.dims,
                &longhorn_inputs(x),
                x.dy.get(),
                &out.boundaries,
                longhorn::Gradients { u, dt, q, k, t_bias: bias, skip, gate },
            ),
            Mamba => selective_scan::backward(
                x.dims,
                &mamba_inputs(x),
                x.dy.get(),
                &out.boundaries,
                selective_scan::Gradients {
                    u,
                    delta: dt,
                    a_log: Some(&mut out.a_log),
                    b: k,
                    c: q,
                    delta_bias: bias,
                    skip,
                    gate,
                },
            ),
        }
    }

    fn forward_backward(self, x: &Data) -> Results {
        let mut out = Buffers::new(x);
        self.forward_into(x, &mut out);
        self.backward(x, &mut out);
        let (rows, n) = (x.dims.rows(), x.dims.state);
        let columns =
            |from: usize| (0..rows).flat_map(|r| out.pair.get().row(r)[from..from + n].to_vec()).collect::<Vec<f32>>();
        let mut all = vec![("y", out.y.values()), ("u", out.u.values()), ("dt", out.dt.values())];
        all.extend([("q", columns(0)), ("k", columns(n))]);
        all.extend(out.z.map(|x| ("z", x.values())));
        all.extend(out.bias.map(|x| ("bias", x)));
        all.extend(out.skip.map(|x| ("D", x)));
        if self == Mamba {
            all.push(("A_log", out.a_log));
        }
        all
    }
}

/// What a scan writes. The gradients of `q` and `k` are two column blocks of one buffer.
struct Buffers {
    y: Strided,
    boundaries: Vec<f32>,
    u: Strided,
    dt: Strided,
    pair: Strided,
    z: Option<Strided>,
    bias: Option<Vec<f32>>,
    skip: Option<Vec<f32>>,
    a_log: Vec<f32>,
}

impl Buffers {
    fn new(x: &Data) -> Self {
        let Dims { channels, state, .. } = x.dims;
        let per_channel = || Strided::unset(x.dims.rows(), channels);
        Self {
            y: per_channel(),
            boundaries: vec![f32::NAN; x.dims.boundaries_len()],
            u: per_channel(),
            dt: per_channel(),
            pair: Strided::unset(x.dims.rows(), 2 * state),
            z: x.z.as_ref().map(|_| per_channel()),
            bias: x.bias.as_ref().map(|_| vec![f32::NAN; channels]),
            skip: x.skip.as_ref().map(|_| vec![f32::NAN; channels]),
            a_log: vec![f32::NAN; channels * state],
        }
    }
}

fn longhorn_inputs(x: &Data) -> longhorn::Inputs<'_> {
    longhorn::Inputs {
        u: x.u.get(),
        dt: x.dt.get(),
        q: x.q.get(),
        k: x.k.get(),
        t_bias: x.bias.as_deref(),
        skip: x.skip.as_deref(),
        gate: x.z.as_ref().map(Strided::get),
    }
}

fn mamba_inputs(x: &Data) -> selective_scan::Inputs<'_> {
    selective_scan::Inputs {
        u: x.u.get(),
        delta: x.dt.get(),
        a_log: &x.a_log,
        b: x.k.get(),
        c: x.q.get(),
        delta_bias: x.bias.as_deref(),
        skip: x.skip.as_deref(),
        gate: x.z.as_ref().map(Strided::get),
    }
}

/// `y` of the definition in double precision, with gradients by the chain rule one operation at a time.
fn plain(scan: Scan, x: &Data) -> Results {
    let Dims { batch, time, channels, state } = x.dims;
    let wide = |m: &Strided| m.values().into_iter().map(f64::from).collect::<Vec<f64>>();
    let (u, dt, q, k, dy) = (wide(&x.u), wide(&x.dt), wide(&x.q), wide(&x.k), wide(&x.dy));
    let z = x.z.as_ref().map(wide);
    let get = |p: &Option<Vec<f32>>, d: usize| p.as_ref().map_or(0.0, |p| f64::from(p[d]));
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    let mut y = vec![0.0; u.len()];
    let (mut du, mut ddt, mut dz) = (y.clone(), y.clone(), y.clone());
    let (mut dq, mut dk) = (vec![0.0; q.len()], vec![0.0; k.len()]);
    let (mut dbias, mut dskip) = (vec![0.0; channels], vec![0.0; channels]);
    let mut da_log = vec![0.0; channels * state];
    for (b, d) in (0..batch).flat_map(|b| (0..channels).map(move |d| (b, d))) {
        let mut h = vec![vec![0.0f64; state]]; // h[t] is the state before row t
        let at = |t: usize| (b * time + t) * channels + d;
        let kq = |t: usize, n: usize| (b * time + t) * state + n;
        let a = |n: usize| -f64::from(x.a_log[d * state + n]).exp();
        // (decay of state n, input of state n) of row t, and what their derivatives need
        let squares = |t: usize| (0..state).map(|n| k[kq(t, n)].powi(2)).sum::<f64>();
        let coefficients = |t: usize, n: usize| {
            let step = dt[at(t)] + get(&x.bias, d);
            match scan {
                Longhorn => {
                    let e = 1.0 / (1.0 / sigmoid(step) + squares(t));
                    (1.0 - e * k[kq(t, n)].powi(2), e * u[at(t)] * k[kq(t, n)])
                }
                Mamba => {
                    let step = step.exp().ln_1p();
                    ((step * a(n)).exp(), step * u[at(t)] * k[kq(t, n)])
                }
            }
        };
        for t in 0..time {
            let next = (0..state)
                .map(|n| {
                    let (decay, input) = coefficients(t, n);
                    decay * h[t][n] + input
                })
                .collect();
            h.push(next);
        }
        let mut lambda = vec![0.0; state];
        for t in (0..time).rev() {
            let i = at(t);
            let inner = (0..state).map(|n| q[kq(t, n)] * h[t + 1][n]).sum::<f64>() + get(&x.skip, d) * u[i];
            let (gate, slope) = z.as_ref().map_or((1.0, 0.0), |z| {
                let g = sigmoid(z[i]);
                (z[i] * g, g * (1.0 + z[i] * (1.0 - g)))
            });
            y[i] = inner * gate;
            dz[i] = dy[i] * inner * slope;
            let dy = dy[i] * gate;
            dskip[d] += dy * u[i];
            du[i] += dy * get(&x.skip, d);
            let step = dt[i] + get(&x.bias, d);
            let mut dstep = 0.0;
            for n in 0..state {
                let j = kq(t, n);
                dq[j] += dy * h[t + 1][n];
                lambda[n] += dy * q[j];
                let (decay, _) = coefficients(t, n);
                let (ddecay, dinput) = (lambda[n] * h[t][n], lambda[n]);
                match scan {
                    Longhorn => {
                        let s = squares(t);
                        let beta = sigmoid(step);
                        let e = beta / (1.0 + beta * s);
                        let de = -ddecay * k[j].powi(2) + dinput * u[i] * k[j];
                        dk[j] += -ddecay * 2.0 * e * k[j] + dinput * e * u[i];
                        du[i] += dinput * e * k[j];
                        let dbeta = de / (1.0 + beta * s).powi(2);
                        dstep += dbeta * beta * (1.0 - beta);
                        let ds = de * -(beta / (1.0 + beta * s)).powi(2);
                        for m in 0..state {
                            dk[kq(t, m)] += 2.0 * ds * k[kq(t, m)];
                        }
                    }
                    Mamba => {
                        let delta = step.exp().ln_1p();
                        let dx = ddecay * decay;
                        dk[j] += dinput * delta * u[i];
                        du[i] += dinput * delta * k[j];
                        dstep += (dx * a(n) + dinput * u[i] * k[j]) * sigmoid(step);
                        da_log[d * state + n] += dx * delta * a(n);
                    }
                }
                lambda[n] *= decay;
            }
            ddt[i] = dstep;
            dbias[d] += dstep;
        }
    }
    let narrow = |v: Vec<f64>| v.into_iter().map(|x| x as f32).collect::<Vec<f32>>();
    let mut all = vec![("y", narrow(y)), ("u", narrow(du)), ("dt", narrow(ddt)), ("q", narrow(dq)), ("k", narrow(dk))];
    all.extend(x.z.as_ref().map(|_| ("z", narrow(dz))));
    all.extend(x.bias.as_ref().map(|_| ("bias", narrow(dbias))));
    all.extend(x.skip.as_ref().map(|_| ("D", narrow(dskip))));
    if scan == Mamba {
        all.push(("A_log", narrow(da_log)));
    }
    all
}

fn assert_all_close(what: &str, got: &Results, want: &Results, tolerance: f32) {
    assert_eq!(got.len(), want.len());
    for ((name, got), (other, want)) in got.iter().zip(want) {
        assert_eq!(name, other);
        if std::env::var("SHOW_ERRORS").is_ok() {
            println!("{what} {name}: {:e}", golden::relative_error(got, want));
        }
        assert_close(&format!("{what}: {name}"), got, want, tolerance);
    }
}

fn check_golden(scan: Scan) {
    // name here, name in the file
    let (op, names) = match scan {
        Longhorn => (
            "longhorn_scan",
            vec![("u", "u"), ("dt", "dt"), ("q", "q"), ("k", "k"), ("z", "z"), ("bias", "t_bias"), ("D", "D")],
        ),
        Mamba => (
            "selective_scan",
            vec![
                ("u", "u"),
                ("dt", "delta"),
                ("q", "C"),
                ("k", "B"),
                ("z", "z"),
                ("bias", "delta_bias"),
                ("D", "D"),
                ("A_log", "A_log"),
            ],
        ),
    };
    for case in cases(op) {
        let name_of = |name: &str| names.iter().find(|(here, _)| *here == name).unwrap().1;
        let input = |name: &str| format!("in/{}", name_of(name));
        let x = Data {
            dims: case_dims(&case),
            u: rows(&case, &input("u")),
            dt: rows(&case, &input("dt")),
            q: rows(&case, &input("q")),
            k: rows(&case, &input("k")),
            z: Some(rows(&case, &input("z"))),
            bias: Some(case.data(&input("bias")).to_vec()),
            skip: Some(case.data(&input("D")).to_vec()),
            a_log: if scan == Mamba { case.data("in/A_log").to_vec() } else { Vec::new() },
            dy: rows(&case, "cot/y"),
        };
        let mut want = vec![("y", rows(&case, "out/y").values())];
        for (here, there) in &names {
            let name = format!("grad/{there}");
            let activation = case.get(&name).shape.len() == 3;
            want.push((here, if activation { rows(&case, &name).values() } else { case.data(&name).to_vec() }));
        }
        assert_all_close(&format!("{scan:?} {}", case.name), &scan.forward_backward(&x), &want, TOLERANCE);
    }
}

fn check_plain(scan: Scan) {
    for dims in SIZES {
        for optional in [true, false] {
            let x = Data::random(dims, optional);
            assert_all_close(&format!("{scan:?} {dims:?}"), &scan.forward_backward(&x), &plain(scan, &x), TOLERANCE);
        }
    }
}

fn check_threads(scan: Scan) {
    let x = Data::random(SIZES[0], true);
    let on = |threads| {
        let team = Team::new(Some(threads)).unwrap();
        team.run(|| scan.forward_backward(&x))
    };
    for ((name, one), (_, two)) in on(1).iter().zip(&on(2)) {
        assert!(one.iter().zip(two).all(|(a, b)| a.to_bits() == b.to_bits()), "{scan:?} {name}");
    }
}

/// A sequence in pieces, down to one token at a time, is the sequence.
fn check_pieces(scan: Scan) {
    let x = Data::random(SIZES[0], true);
    let time = x.dims.time;
    let mut state = vec![0.0; x.dims.state_len()];
    let whole = scan.forward(&x, Some(&mut state), None);
    for cuts in [vec![0, 40, time], (0..=time).collect()] {
        let mut carried = vec![0.0; x.dims.state_len()];
        for part in cuts.windows(2) {
            let y = scan.forward(&x.part(part[0], part[1]), Some(&mut carried), None);
            let want = whole.part(time, part[0], part[1]);
            assert_close(&format!("{scan:?} rows {part:?}"), &y.values(), &want.values(), 1e-6);
        }
        assert_close(&format!("{scan:?} state"), &carried, &state, 1e-6);
    }
}

/// Extreme step sizes give finite results.
fn check_extremes(scan: Scan) {
    let mut x = Data::random(SIZES[1], true);
    let steps = [-200.0, -100.0, -30.0, 0.0, 30.0, 100.0];
    for (i, v) in x.dt.data.iter_mut().enumerate() {
        *v = steps[i % steps.len()];
    }
    for (name, values) in scan.forward_backward(&x) {
        assert!(values.iter().all(|x| x.is_finite()), "{scan:?} {name}");
    }
}

#[test]
fn longhorn_matches_the_golden_files() {
    check_golden(Longhorn);
}

#[test]
fn longhorn_matches_the_definition() {
    check_plain(Longhorn);
}

#[test]
fn longhorn_does_not_depend_on_threads() {
    check_threads(Longhorn);
}

#[test]
fn longhorn_in_pieces_is_longhorn() {
    check_pieces(Longhorn);
}

#[test]
fn longhorn_survives_extreme_steps() {
    check_extremes(Longhorn);
}

#[test]
fn mamba_matches_the_golden_files() {
    check_golden(Mamba);
}

#[test]
fn mamba_matches_the_definition() {
    check_plain(Mamba);
}

#[test]
fn mamba_does_not_depend_on_threads() {
    check_threads(Mamba);
}

#[test]
fn mamba_in_pieces_is_mamba() {
    check_pieces(Mamba);
}

#[test]
fn mamba_survives_extreme_steps() {
    check_extremes(Mamba);
}
