use dataflow_kernels::cuda::optimizer::{self, AdamW, Parameter, Rate};

use crate::golden::{assert_close, cases};
use crate::in_all_orders;

#[test]
fn adamw_matches_the_golden_numbers() {
    in_all_orders(|memory| {
        for case in cases("adamw") {
            let number = |name: &str| case.attrs[name].as_f64().unwrap();
            let count = (0..).take_while(|j| case.has(&format!("in/p{j}"))).count();
            let rates: Vec<f32> =
                case.attrs["lr"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect();
            let value = |j: usize| case.get(&format!("in/p{j}"));
            let parameters: Vec<Parameter> = (0..count)
                .map(|j| {
                    let (p, zeros) = (value(j), vec![0.0; value(j).data.len()]);
                    let tensor = |data: &[f32]| memory.input(data, data.len());
                    Parameter {
                        value: tensor(&p.data),
                        gradient: tensor(&zeros),
                        m: tensor(&zeros),
                        v: tensor(&zeros),
                        decay: if p.shape.len() > 1 { number("weight_decay") } else { 0.0 },
                    }
                })
                .collect();
            let settings = AdamW { beta1: number("beta1"), beta2: number("beta2"), eps: 1e-8, clip: None };
            let (lr, norm) = (memory.output(1, 1), memory.input(&[1.0], 1));
            for step in 0..rates.len() {
                let counter = memory.integers(&[step as i32]);
                for (j, p) in parameters.iter().enumerate() {
                    let len = p.value.len();
                    memory.write(p.gradient, &case.data(&format!("in/g{j}"))[step * len..(step + 1) * len]);
                }
                memory.run(|c| optimizer::learning_rate(c, Rate::Table(&rates), counter, lr));
                memory.run(|c| optimizer::adamw(c, settings, counter, lr, norm, &parameters));
                for (j, p) in parameters.iter().enumerate() {
                    let len = p.value.len();
                    let want = &case.data(&format!("out/p{j}"))[step * len..(step + 1) * len];
                    assert_close("parameter", &memory.read(p.value), want, 1e-5);
                }
            }
            for (j, p) in parameters.iter().enumerate() {
                assert_close("m", &memory.read(p.m), case.data(&format!("out/m{j}")), 1e-5);
                assert_close("v", &memory.read(p.v), case.data(&format!("out/v{j}")), 1e-5);
            }
        }
    });
}

#[test]
fn the_norm_matches_the_golden_numbers() {
    in_all_orders(|memory| {
        for case in cases("clip_grad_norm") {
            let count = (0..).take_while(|j| case.has(&format!("in/g{j}"))).count();
            let gradients: Vec<_> = (0..count)
                .map(|j| {
                    let data = case.data(&format!("in/g{j}"));
                    memory.input(data, data.len())
                })
                .collect();
            let norm = memory.output(1, 1);
            memory.run(|c| optimizer::global_norm(c, &gradients, norm));
            assert_close("norm", &memory.read(norm), case.data("out/norm"), 1e-6);
        }
        // several pieces, none of whole vectors
        let data: Vec<f32> = (0..40_003).map(|i| (i % 17) as f32 - 8.0).collect();
        let want = data.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
        let (tensor, norm) = (memory.input(&data, data.len()), memory.output(1, 1));
        memory.run(|c| optimizer::global_norm(c, &[tensor], norm));
        assert_close("norm", &memory.read(norm), &[want as f32], 1e-6);
    });
}

#[test]
fn the_rate_follows_the_schedule_and_clipping_scales() {
    in_all_orders(|memory| {
        let rate = Rate::Cosine { peak: 1e-3, floor: 1e-4, warmup: 100, steps: 2000 };
        let lr = memory.output(1, 1);
        for (step, want) in [(0, 0.0), (50, 5e-4), (100, 1e-3), (1050, 5.5e-4), (2000, 1e-4), (5000, 1e-4)] {
            let step = memory.integers(&[step]);
            memory.run(|c| optimizer::learning_rate(c, rate, step, lr));
            assert!((memory.read(lr)[0] - want).abs() < 1e-9, "{want}");
        }
        // the first moment tells the gradient that the update saw
        let [value, gradient, m, v] = std::array::from_fn(|i| memory.input(&[[1.0, 8.0, 0.0, 0.0][i]; 5], 5));
        let settings = AdamW { beta1: 0.5, beta2: 0.5, eps: 1e-8, clip: Some(2.0) };
        let (step, lr, norm) = (memory.integers(&[0]), memory.input(&[0.0], 1), memory.input(&[4.0], 1));
        let parameter = Parameter { value, gradient, m, v, decay: 0.0 };
        memory.run(|c| optimizer::adamw(c, settings, step, lr, norm, &[parameter]));
        assert_close("m", &memory.read(m), &[2.0; 5], 1e-6);
    });
}
