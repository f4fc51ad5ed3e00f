//! Where plans are run, and the choice of device: the only place that knows which devices there are.

use std::path::PathBuf;
use std::sync::Arc;

use quire_kernels::cpu::{CpuBackend, CpuConfig};
use quire_kernels::cuda::{CudaBackend, Device as _, Driver};
use quire_scheduler::{RowId, StepOutput, StepPlan};

use crate::config::{DeviceChoice, EngineConfig};
use crate::error::EngineError;
use crate::places::RequestGrammar;

/// Runs plans on a device, first in first out: `launch` for step N+1 may come before `collect` for step N.
///
/// An error ends the executor: what the device holds is not known any more, and no call may follow.
pub trait Executor: Send + 'static {
    /// The sequence that enters `row` with the next plan obeys `grammar`.
    fn constrain(&mut self, row: RowId, grammar: &Arc<RequestGrammar>);

    /// Starts computing a step. The tokens that it samples continue each row on the device.
    fn launch(&mut self, plan: &StepPlan) -> Result<(), EngineError>;

    /// Waits for the oldest step that was launched and not collected.
    fn collect(&mut self) -> Result<StepOutput, EngineError>;

    /// Takes an output's memory back for later steps.
    fn recycle(&mut self, output: StepOutput);
}

/// A device that was chosen and is usable.
pub(crate) enum Device {
    Cpu(Box<CpuBackend>),
    Cuda(Box<CudaBackend<Driver>>),
}

/// What a start says of a card, for as long as it is true of this version.
const NOT_SEEN_ON_HARDWARE: &str = "cuda: this version's device code was tested in an emulator only, and on no card yet: \
     compare its answers with --device cpu before you rely on them";

/// Opens the device that the configuration asks for. The string says why `auto` took the CPU, or what to know of the device.
pub(crate) fn open_device(config: &EngineConfig) -> Result<(Device, Option<String>), EngineError> {
    let refused = |error: EngineError| match error {
        EngineError::Kernel(error) => EngineError::Config { field: "engine.device".to_owned(), why: error.to_string() },
        error => error,
    };
    let note = match config.device {
        DeviceChoice::Cpu => None,
        DeviceChoice::Cuda(ordinal) => {
            let backend = open_cuda(config, ordinal).map_err(refused)?;
            return Ok((Device::Cuda(Box::new(backend)), Some(NOT_SEEN_ON_HARDWARE.to_owned())));
        }
        DeviceChoice::Auto => Some(format!("computing on the CPU: {}", why_not_cuda())),
    };
    let backend = CpuBackend::new(CpuConfig { num_threads: num_threads(config.num_threads), isa: None })?;
    Ok((Device::Cpu(Box::new(backend)), note))
}

/// Why `auto` takes no card: there is none, or device code that was proven on none is nobody's default.
fn why_not_cuda() -> String {
    match quire_kernels::cuda::probe() {
        Err(error) => error.to_string(),
        Ok(devices) => match devices.first() {
            None => "cuda: the driver lists no devices".to_owned(),
            Some(device) => {
                format!(
                    "cuda: {} is here, but this version's device code was run on no card yet; --device cuda tries it",
                    device.name
                )
            }
        },
    }
}

/// A card, its device code ready, allowed to take its share of memory.
fn open_cuda(config: &EngineConfig, ordinal: u32) -> Result<CudaBackend<Driver>, EngineError> {
    let share = config.memory_share;
    if !(share > 0.0 && share <= 1.0) {
        let why = format!("{share} is not above 0 and up to 1");
        return Err(EngineError::Config { field: "engine.memory_share".to_owned(), why });
    }
    let folder = Some(PathBuf::from(&config.module_cache)).filter(|folder| !folder.as_os_str().is_empty());
    let driver = Driver::open(ordinal as usize, folder)?;
    let total_bytes = driver.facts().total_bytes;
    let mut backend = CudaBackend::new(driver)?;
    backend.limit_memory((total_bytes as f64 * share) as u64)?;
    backend.prepare()?;
    Ok(backend)
}

/// 0 is one thread per core.
fn num_threads(asked: usize) -> usize {
    match asked {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        asked => asked,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_says_why_it_took_the_cpu_and_what_was_asked_for_by_name_is_refused_in_one_line() {
        let config = |device| EngineConfig { device, num_threads: 1, ..EngineConfig::default() };
        assert_eq!(open_device(&config(DeviceChoice::Cpu)).unwrap().1, None);
        // No machine has so many cards.
        let Err(EngineError::Config { field, why }) = open_device(&config(DeviceChoice::Cuda(1000))) else {
            panic!("there is no such card");
        };
        assert_eq!(field, "engine.device");
        assert!(why.starts_with("cuda: ") && !why.contains('\n'), "{why}");
        let (device, note) = open_device(&config(DeviceChoice::Auto)).unwrap();
        assert!(matches!(device, Device::Cpu(_)));
        assert!(note.is_some_and(|note| note.starts_with("computing on the CPU: cuda: ")));
    }

    #[test]
    fn a_share_of_memory_is_a_share() {
        for memory_share in [0.0, -0.5, 1.1, f64::NAN] {
            let config = EngineConfig { device: DeviceChoice::Cuda(0), memory_share, ..EngineConfig::default() };
            let error = open_device(&config).err().unwrap().to_string();
            assert!(error.starts_with("engine.memory_share: "), "{error}");
        }
    }
}
