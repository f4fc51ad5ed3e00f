//! Modules and their functions, assembled by the driver when they are first needed.

use std::collections::HashMap;
use std::ffi::CString;
use std::path::PathBuf;
use std::sync::Arc;

use cudarc::driver::{DriverError, result, sys};

use super::context::{Context, failed};
use super::module_cache::{Key, ModuleCache};
use crate::KernelError;
use crate::cuda::device::{KernelId, failure};
use crate::cuda::ptx::{Arch, MODULES, PtxModule};

/// Shared memory that a function may ask for without further ado.
const DEFAULT_SHARED_BYTES: u32 = 48 << 10;

/// Bytes of what the driver says of PTX that it does not take.
const LOG_BYTES: usize = 2048;

pub(super) struct Modules {
    images: Images,
    loaded: HashMap<&'static str, sys::CUmodule>,
    functions: HashMap<KernelId, Function>,
}

/// Where the device's own code comes from.
struct Images {
    compute_capability: [u32; 2],
    /// Of CUDA, that the driver is for: 13000 is 13.0.
    driver_version: i32,
    cache: ModuleCache,
}

struct Function {
    handle: sys::CUfunction,
    /// Most dynamic shared memory that it may be launched with.
    shared_bytes: u32,
}

impl Modules {
    /// The driver is initialised.
    pub(super) fn new(compute_capability: [u32; 2], cache_folder: Option<PathBuf>) -> Result<Self, KernelError> {
        let mut driver_version = 0;
        // SAFETY: the driver is loaded; it writes one number.
        unsafe { sys::cuDriverGetVersion(&raw mut driver_version) }
            .result()
            .map_err(|error| failed("the driver does not say its version", error))?;
        let images = Images { compute_capability, driver_version, cache: ModuleCache::new(cache_folder) };
        Ok(Self { images, loaded: HashMap::new(), functions: HashMap::new() })
    }

    /// The function, allowed to use so much shared memory.
    pub(super) fn function(
        &mut self,
        context: &Arc<Context>,
        kernel: KernelId,
        shared_bytes: u32,
    ) -> Result<sys::CUfunction, KernelError> {
        if !self.functions.contains_key(&kernel) {
            self.prepare(context, &[kernel.module])?;
            let name = CString::new(kernel.function).map_err(|_| failure(format!("{kernel} is no name")))?;
            // SAFETY: the module is loaded.
            let handle = unsafe { result::module::get_function(self.loaded[kernel.module], name) }
                .map_err(|error| failed(&format!("there is no {kernel}"), error))?;
            self.functions.insert(kernel, Function { handle, shared_bytes: DEFAULT_SHARED_BYTES });
        }
        let function = self.functions.get_mut(&kernel).expect("it is there now");
        if shared_bytes > function.shared_bytes {
            let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function is of a loaded module.
            unsafe { result::function::set_function_attribute(function.handle, attribute, shared_bytes as i32) }
                .map_err(|error| failed(&format!("{kernel} with {shared_bytes} bytes of shared memory"), error))?;
            function.shared_bytes = shared_bytes;
        }
        Ok(function.handle)
    }

    /// Loads those modules that are not loaded, assembling several at a time.
    pub(super) fn prepare(&mut self, context: &Arc<Context>, modules: &[&'static str]) -> Result<(), KernelError> {
        let mut missing: Vec<&PtxModule> = Vec::new();
        for &name in modules {
            if !self.loaded.contains_key(name) && !missing.iter().any(|module| module.name == name) {
                missing.push(choose(MODULES, name, self.images.compute_capability)?);
            }
        }
        let images: Vec<Result<Vec<u8>, KernelError>> = std::thread::scope(|scope| {
            let images = &self.images;
            let load = move |module: &'static PtxModule| images.image(context, module);
            let threads: Vec<_> = missing.iter().skip(1).map(|module| scope.spawn(move || load(module))).collect();
            let first = missing.first().map(|module| load(module));
            let others =
                threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| Err(failure("a thread died"))));
            first.into_iter().chain(others).collect()
        });
        for (module, image) in missing.iter().zip(images) {
            let handle = self.images.load(module, &image?)?;
            self.loaded.insert(module.name, handle);
        }
        Ok(())
    }

    /// # Safety
    /// Nothing runs or is recorded that uses them, and their context is the thread's own.
    pub(super) unsafe fn unload(&mut self) {
        self.functions.clear();
        for (_, module) in self.loaded.drain() {
            // SAFETY: loaded once, unloaded once. An error means that the context is lost, and the module with it.
            let _ = unsafe { result::module::unload(module) };
        }
    }
}

impl Images {
    fn key<'a>(&self, module: &'a PtxModule) -> Key<'a> {
        let [major, minor] = self.compute_capability;
        Key {
            module: module.name,
            ptx_sha256: module.sha256,
            compute_capability: [major, minor],
            driver_version: self.driver_version,
        }
    }

    /// The device's own code of a module: what was kept of an earlier run, or else assembled now and kept.
    fn image(&self, context: &Context, module: &PtxModule) -> Result<Vec<u8>, KernelError> {
        let key = self.key(module);
        if let Some(image) = self.cache.load(&key) {
            return Ok(image);
        }
        context.enter()?;
        let image = assemble(module)?;
        self.cache.store(&key, &image);
        Ok(image)
    }

    /// Loads code. What the driver does not take, although it was kept as its own, is assembled once more.
    fn load(&self, module: &PtxModule, image: &[u8]) -> Result<sys::CUmodule, KernelError> {
        // SAFETY: a whole image, which the driver copies.
        let load = |image: &[u8]| unsafe { result::module::load_data(image.as_ptr().cast()) };
        if let Ok(handle) = load(image) {
            return Ok(handle);
        }
        let image = assemble(module)?;
        self.cache.store(&self.key(module), &image);
        load(&image).map_err(|error| not_loaded(module, error))
    }
}

fn not_loaded(module: &PtxModule, error: DriverError) -> KernelError {
    failed(&format!("module {} could not be loaded", module.name), error)
}

/// The module of an operation for this device: Hopper's own where there is one.
fn choose(
    modules: &'static [PtxModule],
    name: &str,
    compute_capability: [u32; 2],
) -> Result<&'static PtxModule, KernelError> {
    let find = |arch| modules.iter().find(|module| module.name == name && module.arch == arch);
    let own = if compute_capability == [9, 0] { find(Arch::Sm90a) } else { None };
    own.or_else(|| find(Arch::Sm80)).ok_or_else(|| failure(format!("this build has no device code of {name}")))
}

/// Has the driver make the present device's code of PTX.
fn assemble(module: &PtxModule) -> Result<Vec<u8>, KernelError> {
    let name = CString::new(module.name).map_err(|_| failure(format!("{} is no name", module.name)))?;
    let mut log = vec![0_u8; LOG_BYTES];
    let mut options =
        [sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER, sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES];
    // Option values are passed in place of pointers.
    let mut values = [log.as_mut_ptr().cast(), std::ptr::without_provenance_mut(LOG_BYTES)];
    let mut state = std::ptr::null_mut();
    // PTX is text that ends with a zero.
    let mut text = module.text.to_vec();
    text.push(0);
    // SAFETY: the options, their values, the log and the text live until the link is destroyed; the image is copied
    // before that.
    let image = unsafe {
        sys::cuLinkCreate_v2(2, options.as_mut_ptr(), values.as_mut_ptr(), &raw mut state).result().and_then(|()| {
            let (mut image, mut len) = (std::ptr::null_mut(), 0);
            let kind = sys::CUjitInputType::CU_JIT_INPUT_PTX;
            let data = text.as_mut_ptr().cast();
            let none = std::ptr::null_mut();
            let linked =
                sys::cuLinkAddData_v2(state, kind, data, text.len(), name.as_ptr(), 0, none, std::ptr::null_mut())
                    .result()
                    .and_then(|()| sys::cuLinkComplete(state, &raw mut image, &raw mut len).result())
                    .map(|()| std::slice::from_raw_parts(image.cast::<u8>(), len).to_vec());
            sys::cuLinkDestroy(state).result()?;
            linked
        })
    };
    image.map_err(|error| {
        let end = log.iter().position(|&byte| byte == 0).unwrap_or(log.len());
        let said: Vec<&str> = std::str::from_utf8(&log[..end]).unwrap_or("").split_whitespace().collect();
        let what = match said.is_empty() {
            true => format!("the driver does not assemble module {}", module.name),
            false => format!("the driver does not assemble module {} ({})", module.name, said.join(" ")),
        };
        failed(&what, error)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hopper_gets_its_own_module_and_others_the_common_one() {
        const fn module(name: &'static str, arch: Arch) -> PtxModule {
            PtxModule { name, arch, text: b"", sha256: "", source_sha256: "" }
        }
        const MODULES: &[PtxModule] =
            &[module("a", Arch::Sm80), module("b", Arch::Sm90a), module("b", Arch::Sm80), module("c", Arch::Sm90a)];
        let arch = |name, compute_capability| choose(MODULES, name, compute_capability).map(|module| module.arch);
        assert_eq!(arch("a", [9, 0]), Ok(Arch::Sm80));
        assert_eq!(arch("b", [9, 0]), Ok(Arch::Sm90a));
        assert_eq!(arch("b", [8, 9]), Ok(Arch::Sm80));
        assert_eq!(arch("b", [10, 0]), Ok(Arch::Sm80));
        for (name, compute_capability) in [("c", [8, 0]), ("d", [9, 0])] {
            let line = arch(name, compute_capability).unwrap_err().to_string();
            assert_eq!(line, format!("cuda: this build has no device code of {name}"));
        }
    }
}
