//! What runs a launch: the threads of its device, which survive a panic.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};

use dataflow_kernels::cpu::threads::{parallel_for, with_scratch};
use dataflow_kernels::device::{Buffer, CpuDevice, CpuKernel, Device, Kernel, Launch};

fn launch(kernel: CpuKernel) -> Launch {
    Launch { name: "test".into(), kernel: Kernel::Cpu(kernel), inputs: vec![], outputs: vec![], in_place: vec![] }
}

fn device(threads: usize) -> (CpuDevice, [Buffer; 4]) {
    let device = CpuDevice::new(Some(threads)).unwrap();
    let buffers = std::array::from_fn(|_| device.allocate(64).unwrap());
    (device, buffers)
}

#[test]
fn a_panic_of_a_kernel_reaches_the_caller_and_the_device_goes_on() {
    for threads in [1, 3] {
        let (device, buffers) = device(threads);
        let failing: CpuKernel = Box::new(|_| {
            parallel_for(8, |i| with_scratch(4, |_| assert!(i != 5, "task 5")));
            Ok(())
        });
        let mut program = device.load(vec![launch(failing), launch(Box::new(|_| Ok(())))], buffers).unwrap();
        for _ in 0..3 {
            let panic = catch_unwind(AssertUnwindSafe(|| program.run(0..1))).expect_err("the kernel panics");
            assert_eq!(panic.downcast_ref::<&str>(), Some(&"task 5"));
            program.run(1..2).unwrap();
        }
    }
}

#[test]
fn launches_of_several_devices_run_on_threads_of_their_own() {
    let programs: Vec<_> = (1..4)
        .map(|threads| {
            let (device, buffers) = device(threads);
            let kernel: CpuKernel = Box::new(move |_| {
                let arrived = AtomicUsize::new(0);
                parallel_for(threads, |_| {
                    // so that each task has a thread to itself
                    arrived.fetch_add(1, Ordering::SeqCst);
                    while arrived.load(Ordering::SeqCst) < threads {
                        std::thread::yield_now();
                    }
                });
                assert_eq!(arrived.into_inner(), threads);
                Ok(())
            });
            assert_eq!(device.threads(), threads);
            device.load(vec![launch(kernel)], buffers).unwrap()
        })
        .collect();
    // the devices are gone; what they loaded keeps its threads
    for mut program in programs {
        program.run(0..1).unwrap();
    }
}
