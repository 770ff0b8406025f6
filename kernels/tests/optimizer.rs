//! AdamW and gradient clipping.

mod golden;

use dataflow_kernels::cpu::optimizer::{AdamW, adamw, clip_coefficient};
use dataflow_kernels::cpu::reduce::sum_of_squares;
use dataflow_kernels::cpu::team::Team;
use dataflow_kernels::random::Stream;

fn on_threads<R: Send>(n: usize, body: impl FnOnce() -> R + Send) -> R {
    Team::new(Some(n)).unwrap().run(body)
}

#[test]
fn golden_adamw() {
    for case in golden::cases("adamw") {
        let number = |name: &str| case.attrs[name].as_f64().unwrap();
        for j in 0.. {
            if !case.has(&format!("in/p{j}")) {
                assert!(j > 0);
                break;
            }
            let tensor = case.get(&format!("in/p{j}"));
            let n = tensor.data.len();
            let (mut p, mut m, mut v) = (tensor.data.clone(), vec![0.0; n], vec![0.0; n]);
            for step in 0..case.size("steps") {
                let settings = AdamW {
                    lr: case.attrs["lr"][step].as_f64().unwrap(),
                    beta1: number("beta1"),
                    beta2: number("beta2"),
                    eps: 1e-8,
                    decay: if tensor.shape.len() >= 2 { number("weight_decay") } else { 0.0 },
                    step: step as u64 + 1,
                    grad_scale: 1.0,
                };
                adamw(&mut p, &case.data(&format!("in/g{j}"))[step * n..][..n], &mut m, &mut v, settings);
                golden::assert_close("parameter", &p, &case.data(&format!("out/p{j}"))[step * n..][..n], 1e-6);
            }
            golden::assert_close("m", &m, case.data(&format!("out/m{j}")), 1e-6);
            golden::assert_close("v", &v, case.data(&format!("out/v{j}")), 1e-6);
        }
    }
}

#[test]
fn golden_clip_grad_norm() {
    for case in golden::cases("clip_grad_norm") {
        let names: Vec<String> = (0..).map(|j| format!("g{j}")).take_while(|g| case.has(&format!("in/{g}"))).collect();
        let square: f64 = names.iter().map(|g| sum_of_squares(case.data(&format!("in/{g}")))).sum();
        golden::assert_close("norm", &[square.sqrt() as f32], case.data("out/norm"), 1e-6);
        let coefficient = clip_coefficient(square.sqrt(), case.attrs["max_norm"].as_f64().unwrap());
        for g in names {
            let clipped: Vec<f32> = case.data(&format!("in/{g}")).iter().map(|x| x * coefficient).collect();
            golden::assert_close(&g, &clipped, case.data(&format!("out/{g}")), 1e-6);
        }
    }
}

#[test]
fn scaled_gradients_and_threads() {
    let n = 150_001;
    let mut s = Stream::new(1, 1);
    let mut noise = || -> Vec<f32> { (0..n).map(|_| s.normal()).collect() };
    let (p0, g, m0) = (noise(), noise(), noise());
    let v0: Vec<f32> = noise().iter().map(|x| x * x).collect();
    let settings = AdamW { lr: 1e-2, beta1: 0.9, beta2: 0.99, eps: 1e-8, decay: 0.1, step: 7, grad_scale: 0.25 };
    let update = || {
        let (mut p, mut m, mut v) = (p0.clone(), m0.clone(), v0.clone());
        adamw(&mut p, &g, &mut m, &mut v, settings);
        (p, m, v)
    };
    let (p, m, v) = on_threads(1, update);
    assert!((p.clone(), m.clone(), v.clone()) == on_threads(2, update));
    for i in (0..n).step_by(97).chain([n - 1]) {
        let grad = 0.25 * f64::from(g[i]);
        let first = 0.9 * f64::from(m0[i]) + 0.1 * grad;
        let second = 0.99 * f64::from(v0[i]) + 0.01 * grad * grad;
        let step = first / (1.0 - 0.9f64.powi(7)) / ((second / (1.0 - 0.99f64.powi(7))).sqrt() + 1e-8);
        let want = f64::from(p0[i]) * (1.0 - 1e-3) - 1e-2 * step;
        assert!((f64::from(p[i]) - want).abs() < 1e-6 * want.abs().max(1.0));
        assert!((f64::from(m[i]) - first).abs() < 1e-6 && (f64::from(v[i]) - second).abs() < 1e-6 * second.max(1.0));
    }
    assert_eq!(clip_coefficient(0.5, 1.0), 1.0);
    assert!(clip_coefficient(f64::NAN, 1.0).is_nan());
}
