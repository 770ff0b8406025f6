//! A compiled model on a device.

use std::ops::Range;
use std::sync::Arc;

use dataflow_kernels::device::{
    Bf16, Buffer, DType, Device, DeviceError, Element, Operand, Program, Region, as_bytes, as_bytes_mut,
};

use parking_lot::Mutex;

use crate::compile::Compiled;
use crate::diagnostic::{Diagnostic, Errors};
use crate::plan::{Plan, PlannedLaunch, Port, lower};
use crate::systems::update::gradient_sum;

/// Elements of a parameter that are made at a time.
const PART: usize = 1 << 16;

/// A plan with its kernels and memory.
pub struct Session {
    device: Arc<dyn Device>,
    plan: Plan,
    program: Box<dyn Program>,
    buffers: [Buffer; 4],
}

impl Session {
    /// Loads a compiled model. With `parameters_of`, parameters are shared with that session: a program that
    /// evaluates sees what the one that trains has learned.
    ///
    /// # Errors
    /// A node without a kernel for the device, or no memory left.
    pub fn new(device: Arc<dyn Device>, compiled: &Compiled, parameters_of: Option<&Session>) -> Result<Self, Errors> {
        Self::sharing(device, compiled, parameters_of, None)
    }

    /// As [`new`](Self::new); with `states_of`, states are shared with that session too: a program that decodes goes on
    /// where one that took in the prompt has ended.
    ///
    /// # Errors
    /// As `new`, and where parameters or states of the two programs differ.
    pub fn sharing(
        device: Arc<dyn Device>,
        compiled: &Compiled,
        parameters_of: Option<&Session>,
        states_of: Option<&Session>,
    ) -> Result<Self, Errors> {
        let plan = compiled.plan.clone();
        let launches = lower(&compiled.world, &plan, device.target())?;
        let to_errors = |e: DeviceError| Errors::from(Diagnostic::new(e.to_string()));
        let mut buffers = Vec::with_capacity(4);
        for region in Region::ALL {
            let other = match region {
                Region::Parameters => parameters_of,
                Region::State => states_of,
                _ => None,
            };
            buffers.push(match other {
                Some(other) if plan.shares(&other.plan, region) => other.buffer(region).clone(),
                Some(_) => return Err(Diagnostic::new(format!("the two programs differ in their {region:?}")).into()),
                None => device.allocate(plan.bytes(region)).map_err(to_errors)?,
            });
        }
        let buffers: [Buffer; 4] = buffers.try_into().expect("one buffer for each region");
        let program = device.load(launches, buffers.clone()).map_err(to_errors)?;
        Ok(Self { device, plan, program, buffers })
    }

    /// The plan.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The device.
    pub fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }

    fn buffer(&self, region: Region) -> &Buffer {
        &self.buffers[Region::ALL.iter().position(|r| *r == region).expect("every region is listed")]
    }

    /// Fills all parameters by their initialisers.
    ///
    /// # Errors
    /// A formula without a value.
    pub fn initialize(&mut self, seed: u64) -> Result<(), Errors> {
        let parameters = &self.plan.parameters;
        let starts = |elements: usize| (0..elements).step_by(PART);
        let parts =
            parameters.iter().enumerate().flat_map(|(i, p)| starts(p.port.tensor.elements()).map(move |at| (i, at)));
        let parts: Vec<(usize, usize)> = parts.collect();
        let (device, buffer) = (&*self.device, self.buffer(Region::Parameters));
        let refused: Mutex<Option<(usize, String)>> = Mutex::new(None);
        device.on_host(parts.len(), &|task| {
            let (i, start) = parts[task];
            let (parameter, port) = (&parameters[i].parameter, &parameters[i].port);
            let mut values = vec![0.0; PART.min(port.tensor.elements() - start)];
            match parameter.init.fill(seed, &parameter.name, &parameter.shape, start, &mut values) {
                Ok(()) => write_real(device, buffer, port, start, &values),
                Err(message) => {
                    let mut refused = refused.lock();
                    if refused.as_ref().is_none_or(|(first, _)| task < *first) {
                        *refused = Some((task, message));
                    }
                }
            }
        });
        if let Some((task, message)) = refused.into_inner() {
            let planned = &parameters[parts[task].0];
            let mut diagnostic = Diagnostic::new(message).row(&planned.parameter.name);
            diagnostic.span = planned.place.clone();
            return Err(diagnostic.into());
        }
        Ok(())
    }

    /// Copies numbers to a tensor of `f32` or, rounded, of `bf16`.
    ///
    /// # Panics
    /// If their number is not the tensor's, or it is a tensor of integers.
    pub fn write_real(&self, port: &Port, values: &[f32]) {
        assert_eq!(values.len(), port.tensor.elements());
        write_real(&*self.device, self.buffer(port.operand.region), port, 0, values);
    }

    /// Copies numbers to a tensor.
    ///
    /// # Panics
    /// If their number or type is not the tensor's.
    pub fn write<T: Element>(&self, port: &Port, values: &[T]) {
        assert_eq!((values.len(), T::DTYPE), (port.tensor.elements(), port.tensor.dtype));
        self.device.write(self.buffer(port.operand.region), port.operand.offset, as_bytes(values));
    }

    /// Copies a tensor's numbers.
    ///
    /// # Panics
    /// If their number or type is not the tensor's.
    pub fn read_into<T: Element>(&self, port: &Port, values: &mut [T]) {
        assert_eq!((values.len(), T::DTYPE), (port.tensor.elements(), port.tensor.dtype));
        self.device.read(self.buffer(port.operand.region), port.operand.offset, as_bytes_mut(values));
    }

    /// A tensor's numbers.
    pub fn read<T: Element>(&self, port: &Port) -> Vec<T> {
        let mut values = vec![T::default(); port.tensor.elements()];
        self.read_into(port, &mut values);
        values
    }

    /// Writes the input of this name, such as `tokens`.
    ///
    /// # Panics
    /// If there is none, or the sizes differ.
    pub fn write_input<T: Element>(&self, name: &str, values: &[T]) {
        self.write(self.plan.inputs.get(name).unwrap_or_else(|| panic!("the program has no input `{name}`")), values);
    }

    /// The output of this name, such as `logits`.
    pub fn output<T: Element>(&self, name: &str) -> Option<Vec<T>> {
        self.plan.outputs.get(name).map(|port| self.read(port))
    }

    /// The output of this name as one number, such as `loss`.
    pub fn scalar(&self, name: &str) -> Option<f32> {
        let port = self.plan.outputs.get(name)?;
        let mut value = [0.0];
        self.read_into(port, &mut value);
        Some(value[0])
    }

    /// Runs the launches of one micro-batch.
    ///
    /// # Errors
    /// If a kernel refuses its input.
    pub fn run_step(&mut self) -> Result<(), DeviceError> {
        self.program.run(self.plan.step_range())
    }

    /// Waits for what runs, and tells what went wrong: what was [`read`](Self::read) before is right if this is.
    ///
    /// # Errors
    /// If a kernel refused its input, or the device failed.
    pub fn check(&mut self) -> Result<(), DeviceError> {
        self.program.check()
    }

    /// Runs the launches of an update.
    ///
    /// # Errors
    /// If a kernel refuses its input.
    pub fn run_update(&mut self) -> Result<(), DeviceError> {
        self.program.run(self.plan.update_range())
    }

    /// Runs the launches of one micro-batch one by one, up to the first that writes a number that is not finite;
    /// returns that one.
    ///
    /// # Errors
    /// If a kernel refuses its input.
    pub fn first_not_finite(&mut self) -> Result<Option<&PlannedLaunch>, DeviceError> {
        for at in self.plan.step_range() {
            self.program.run(at..at + 1)?;
            let outputs = self.plan.launches[at].outputs.iter().filter(|o| o.dtype != DType::I32);
            if !outputs.clone().all(|operand| self.is_finite(operand)) {
                return Ok(Some(&self.plan.launches[at]));
            }
        }
        Ok(None)
    }

    fn is_finite(&self, operand: &Operand) -> bool {
        let span = operand.span();
        let (count, buffer) = (span.len() / operand.dtype.size(), self.buffer(operand.region));
        let values: Vec<f32> = match operand.dtype {
            DType::Bf16 => {
                let mut values = vec![Bf16::default(); count];
                self.device.read(buffer, span.start, as_bytes_mut(&mut values));
                values.into_iter().map(Bf16::to_f32).collect()
            }
            _ => {
                let mut values = vec![0f32; count];
                self.device.read(buffer, span.start, as_bytes_mut(&mut values));
                values
            }
        };
        // between the rows may lie anything
        values.chunks(operand.stride.max(1)).all(|row| row.iter().take(operand.cols).all(|x| x.is_finite()))
    }

    /// Sets the gradient sums of the micro-batches to zero, as an update does.
    pub fn clear_gradients(&self) {
        for planned in &self.plan.parameters {
            if let Some(port) = self.plan.states.get(&gradient_sum(&planned.parameter.name)) {
                self.write(port, &vec![0f32; port.tensor.elements()]);
            }
        }
    }

    /// Runs launches and adds the seconds of each to its place in `seconds`.
    ///
    /// # Errors
    /// If a kernel refuses its input.
    pub fn run_timed(&mut self, range: Range<usize>, seconds: &mut [f64]) -> Result<(), DeviceError> {
        self.program.run_timed(range, seconds)
    }
}

/// Copies numbers to a tensor without gaps, from element `start` on; see [`Session::write_real`].
fn write_real(device: &dyn Device, buffer: &Buffer, port: &Port, start: usize, values: &[f32]) {
    let rounded: Vec<Bf16>;
    let bytes = match port.tensor.dtype {
        DType::F32 => as_bytes(values),
        DType::Bf16 => {
            rounded = values.iter().map(|x| Bf16::from_f32(*x)).collect();
            as_bytes(&rounded)
        }
        DType::I32 => panic!("a tensor of integers"),
    };
    assert!(start + values.len() <= port.tensor.elements());
    device.write(buffer, port.operand.offset + start * port.tensor.dtype.size(), bytes);
}
