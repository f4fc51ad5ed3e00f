//! Where plans are run, and the choice of device: the only place that knows which devices there are.

use std::sync::Arc;

use quire_kernels::cpu::{CpuBackend, CpuConfig};
use quire_scheduler::{RowId, StepOutput, StepPlan};

use crate::config::{DeviceChoice, EngineConfig};
use crate::constraint::Grammar;
use crate::error::EngineError;

/// Runs plans on a device, first in first out: `launch` for step N+1 may come before `collect` for step N.
///
/// An error ends the executor: what the device holds is not known any more, and no call may follow.
pub trait Executor: Send + 'static {
    /// The sequence that enters `row` with the next plan obeys `grammar`.
    fn constrain(&mut self, row: RowId, grammar: &Arc<dyn Grammar>);

    /// Starts computing a step. The tokens that it samples continue each row on the device.
    fn launch(&mut self, plan: &StepPlan) -> Result<(), EngineError>;

    /// Waits for the oldest step that was launched and not collected.
    fn collect(&mut self) -> Result<StepOutput, EngineError>;

    /// Takes an output's memory back for later steps.
    fn recycle(&mut self, output: StepOutput);
}

/// A device that was chosen and is usable.
pub(crate) enum Device {
    Cpu(CpuBackend),
}

/// Opens the device that the configuration asks for. The string says why `auto` took the CPU.
pub(crate) fn open_device(config: &EngineConfig) -> Result<(Device, Option<String>), EngineError> {
    let note = match config.device {
        DeviceChoice::Cpu => None,
        DeviceChoice::Auto => Some(format!("computing on the CPU: {}", why_not_cuda())),
        DeviceChoice::Cuda => {
            return Err(EngineError::Config { field: "engine.device".to_owned(), why: why_not_cuda() });
        }
    };
    let backend = CpuBackend::new(CpuConfig { num_threads: num_threads(config.num_threads), isa: None })?;
    Ok((Device::Cpu(backend), note))
}

/// 0 is one thread per core.
fn num_threads(asked: usize) -> usize {
    match asked {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        asked => asked,
    }
}

/// Why CUDA is not what computes: no driver or no card here, or a card that this build cannot use.
fn why_not_cuda() -> String {
    match quire_kernels::cuda::probe() {
        Err(error) => error.to_string(),
        Ok(devices) => match devices.first() {
            None => "cuda: the driver lists no devices".to_owned(),
            Some(device) => format!("cuda: {} is here, but this build does not compute on CUDA yet", device.name),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::EngineError;

    #[test]
    fn asking_for_cuda_gives_one_line_and_auto_a_note() {
        let config = |device| EngineConfig { device, num_threads: 1, ..EngineConfig::default() };
        let Err(EngineError::Config { field, why }) = open_device(&config(DeviceChoice::Cuda)) else {
            panic!("CUDA does not compute in this build");
        };
        assert_eq!(field, "engine.device");
        assert!(why.starts_with("cuda: ") && !why.contains('\n'), "{why}");
        let (_, note) = open_device(&config(DeviceChoice::Auto)).unwrap();
        assert!(note.is_some_and(|note| note.ends_with(&why)));
        assert_eq!(open_device(&config(DeviceChoice::Cpu)).unwrap().1, None);
    }
}
