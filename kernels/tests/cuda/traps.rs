//! The emulation finds planted mistakes.

use dataflow_kernels::cuda::call::{Call, Calls};
use dataflow_kernels::device::KernelError;

use crate::emulation::{Memory, ORDERS, SANITIZE, available, sanitized};

fn call(body: &str) -> Call {
    let text = format!("KERNEL trap(const float* x, float* y) {{\n  const int i = threadIdx.x;\n{body}\n}}\n");
    Call::generated(text, "trap".into()).block(64)
}

/// What 64 threads write, in one order.
fn run(call: Call, order: u32) -> Vec<f32> {
    let memory = Memory::new(order);
    let x = memory.input(&(0..64).map(|i| i as f32).collect::<Vec<_>>(), 64);
    let y = memory.output(1, 64);
    let describe = |c: &mut Calls<'_>| -> Result<(), KernelError> { c.launch(call.pointer(x).pointer(y)) };
    memory.run(describe);
    memory.read(y)
}

/// The message with which a launch ends.
fn failure(body: &str) -> String {
    let call = call(body);
    let result = std::panic::catch_unwind(|| run(call, 0));
    *result.expect_err("the launch went well").downcast::<String>().unwrap()
}

#[test]
fn a_missing_barrier_shows() {
    if !available() {
        return;
    }
    let body = |barrier: &str| {
        call(&format!("  __shared__ float tile[64];\n  tile[i] = x[i];\n  {barrier}\n  y[i] = tile[63 - i];"))
    };
    let reversed: Vec<f32> = (0..64).map(|i| (63 - i) as f32).collect();
    assert!(ORDERS.iter().all(|&order| run(body("__syncthreads();"), order) == reversed));
    assert!(ORDERS.iter().all(|&order| run(body(""), order) != reversed));
    // within a warp too
    let body = |barrier: &str| {
        call(&format!("  __shared__ float tile[64];\n  tile[i] = x[i];\n  {barrier}\n  y[i] = tile[i ^ 1];"))
    };
    assert!(ORDERS.iter().any(|&order| run(body(""), order) != run(body("__syncwarp();"), order)));
}

#[test]
fn copies_that_nobody_waited_for_did_not_happen() {
    if !available() {
        return;
    }
    let body = |wait: &str| {
        call(&format!(
            "  __shared__ __align__(16) float tile[64];\n  if (i < 16) copy_async(tile + 4 * i, x + 4 * i);\n  \
             copy_commit();\n  {wait}\n  __syncthreads();\n  y[i] = tile[i];"
        ))
    };
    let same: Vec<f32> = (0..64).map(|i| i as f32).collect();
    assert_eq!(run(body("copy_wait<0>();"), 0), same);
    assert!(run(body("copy_wait<1>();"), 0).iter().all(|x| x.is_nan()));
}

#[test]
fn divergence_is_an_error_in_words() {
    if !available() {
        return;
    }
    let text = failure("  if (i & 1) __syncthreads(); else __syncwarp();");
    assert!(text.contains("deadlock"), "{text}");
    let text = failure("  if (i & 1) y[i] = __shfl_sync(1u, x[i], 0); else __syncwarp(0x55555555u);");
    assert!(text.contains("leaves it out"), "{text}");
    let text = failure("  if (i & 1) __syncwarp(); else y[i] = __shfl_xor_sync(0xffffffffu, x[i], 1);");
    assert!(text.contains("different operations"), "{text}");
    let text = failure("  y[i] = __shfl_sync(i < 16 ? 0xffffu : 0xffff0000u, x[i], 0);");
    assert!(text.contains("takes no part"), "{text}");
    let text = failure("  __shared__ float t[256];\n  copy_async(t + 4 * i, x + 1);");
    assert!(text.contains("aligned"), "{text}");
}

/// A shuffle of half a warp before one of all of it: lanes meet by mask, not by count.
#[test]
fn partial_shuffles_do_not_disturb_full_ones() {
    if !available() {
        return;
    }
    let body = "  float v = x[i];\n  if ((i & 31) < 16) v = __shfl_xor_sync(0x0000ffffu, v, 1);\n  \
                y[i] = __shfl_xor_sync(0xffffffffu, v, 16);";
    let want: Vec<f32> = (0..64usize)
        .map(|i| {
            let from = i ^ 16;
            (if from & 31 < 16 { from ^ 1 } else { from }) as f32
        })
        .collect();
    for order in ORDERS {
        assert_eq!(run(call(body), order), want);
    }
}

/// The sanitizer ends the process, so the mistake is made in a process of its own.
#[test]
fn sanitizers_find_accesses_out_of_bounds() {
    if !available() || sanitized() {
        return;
    }
    let path = std::process::Command::new("g++").arg("-print-file-name=libasan.so").output().unwrap().stdout;
    for body in ["global", "shared"] {
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", &format!("traps::out_of_bounds_{body}")])
            .env(SANITIZE, "1")
            .env("LD_PRELOAD", String::from_utf8(path.clone()).unwrap().trim())
            .env("ASAN_OPTIONS", "detect_leaks=0")
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && text.contains("heap-buffer-overflow"), "{body}: {text}");
    }
}

#[test]
#[ignore = "a planted mistake: run by `sanitizers_find_accesses_out_of_bounds`"]
fn out_of_bounds_global() {
    run(call("  y[i] = x[i + 1];"), 0);
}

#[test]
#[ignore = "a planted mistake: run by `sanitizers_find_accesses_out_of_bounds`"]
fn out_of_bounds_shared() {
    let body = "  DYNAMIC_SHARED(float, tile);\n  tile[i + 1] = x[i];\n  __syncthreads();\n  y[i] = tile[i];";
    run(call(body).shared(256), 0);
}
