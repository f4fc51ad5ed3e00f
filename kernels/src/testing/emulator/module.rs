//! Sources to libraries, compiled once per content and kept in the target folder.

use std::collections::BTreeMap;
use std::ffi::{CStr, OsStr, c_char, c_int, c_void};
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::KernelError;
use crate::cuda::device::failure;

const CRATE: &str = env!("CARGO_MANIFEST_DIR");

/// Of both: exact arithmetic, and no library but the system's own.
const FLAGS: [&str; 7] =
    ["-std=c++17", "-O2", "-fPIC", "-fno-exceptions", "-fno-rtti", "-fvisibility=hidden", "-ffp-contract=off"];

/// Of kernels: a call before each load and store, each as the source has it.
const KERNEL_FLAGS: [&str; 3] = ["-fsanitize=thread", "-fno-tree-vectorize", "-fno-tree-slp-vectorize"];

/// Memory that a launch may touch; as `Buffer` in runtime.cpp.
#[repr(C)]
pub(super) struct BufferRange {
    pub(super) start: usize,
    pub(super) end: usize,
    pub(super) name: *const c_char,
}

/// As `Request` in runtime.cpp.
#[repr(C)]
pub(super) struct Request {
    pub(super) kernel: *const c_char,
    pub(super) grid: [u32; 3],
    pub(super) block: [u32; 3],
    pub(super) shared_bytes: u32,
    pub(super) args: *mut *const c_void,
    pub(super) num_args: usize,
    pub(super) buffers: *const BufferRange,
    pub(super) num_buffers: usize,
    pub(super) error: *mut c_char,
    pub(super) error_len: usize,
}

/// The functions of a library; it stays loaded.
pub(super) struct Module {
    parameters: unsafe extern "C" fn(*const c_char) -> *const c_char,
    new: unsafe extern "C" fn() -> *mut c_void,
    delete: unsafe extern "C" fn(*mut c_void),
    launch: unsafe extern "C" fn(*mut c_void, *const Request) -> c_int,
}

/// Stacks and shared memory of a launch.
pub(super) struct Machine {
    module: &'static Module,
    machine: *mut c_void,
}

// SAFETY: a machine is used by whoever has it, one launch at a time; no part of it belongs to a thread between launches.
unsafe impl Send for Machine {}

/// The first C++ compiler of this machine that can do it, and what it calls itself.
pub(super) fn compiler() -> Result<&'static (&'static str, String), KernelError> {
    static COMPILER: OnceLock<Option<(&'static str, String)>> = OnceLock::new();
    let found = COMPILER.get_or_init(|| {
        if !cfg!(target_os = "linux") {
            return None;
        }
        ["c++", "g++", "clang++"].into_iter().find_map(|name| {
            let output = Command::new(name).arg("--version").output().ok()?;
            can_compile(name).then(|| (name, String::from_utf8_lossy(&output.stdout).into_owned()))
        })
    });
    found.as_ref().ok_or_else(|| failure("device code is not emulated here: it takes Linux and a C++ compiler (c++)"))
}

/// Whether a compiler has what the emulator takes: headers, C++17 and the instrumentation.
fn can_compile(name: &str) -> bool {
    let mut command = Command::new(name);
    command.args(FLAGS).args(KERNEL_FLAGS).args(["-x", "c++", "-c", "-", "-o", "/dev/null"]);
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    let Ok(mut child) = command.spawn() else { return false };
    let source = b"#include <cmath>\n#include <link.h>\n#include <memory>\n";
    let is_written = child.stdin.take().is_some_and(|mut stdin| stdin.write_all(source).is_ok());
    child.wait().is_ok_and(|status| status.success()) && is_written
}

impl Module {
    /// The library of `ops/<name>/<name>.cu`, or of `tests/emulator/<name>.cu`.
    pub(super) fn load(name: &'static str) -> Result<&'static Self, KernelError> {
        static MODULES: Mutex<BTreeMap<&'static str, &'static Module>> = Mutex::new(BTreeMap::new());
        let mut modules = MODULES.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(module) = modules.get(name) {
            return Ok(module);
        }
        let module = Box::leak(Box::new(Self::open(&build(name)?)?));
        modules.insert(name, module);
        Ok(module)
    }

    pub(super) fn machine(&'static self) -> Machine {
        // SAFETY: takes nothing, and fails by ending the process.
        Machine { module: self, machine: unsafe { (self.new)() } }
    }

    /// Codes of a kernel's parameters.
    pub(super) fn parameters(&self, function: &CStr) -> Option<&CStr> {
        // SAFETY: what comes back is null or lives as long as the library.
        unsafe {
            let codes = (self.parameters)(function.as_ptr());
            if codes.is_null() { None } else { Some(CStr::from_ptr(codes)) }
        }
    }

    #[cfg(not(unix))]
    fn open(path: &Path) -> Result<Self, KernelError> {
        Err(failure(format!("{} is not loaded: only Unix is known here", path.display())))
    }

    #[cfg(unix)]
    fn open(path: &Path) -> Result<Self, KernelError> {
        let text =
            std::ffi::CString::new(path.as_os_str().as_encoded_bytes()).map_err(|_| failure("a path holds a zero"))?;
        // SAFETY: the library is our own; what runs when it is loaded is the registration of its kernels.
        let library = unsafe { libc::dlopen(text.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        if library.is_null() {
            // SAFETY: after a failure this is a text, valid until the next call of this thread.
            let reason = unsafe { CStr::from_ptr(libc::dlerror()) }.to_string_lossy().into_owned();
            return Err(failure(format!("{} is not loaded: {reason}", path.display())));
        }
        let symbol = |name: &CStr| {
            // SAFETY: the library is loaded.
            let address = unsafe { libc::dlsym(library, name.as_ptr()) };
            if address.is_null() { Err(failure(format!("{} lacks {name:?}", path.display()))) } else { Ok(address) }
        };
        // SAFETY: runtime.cpp, which is part of every library, gives the functions these types.
        unsafe {
            Ok(Self {
                parameters: std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*const c_char) -> *const c_char>(
                    symbol(c"quire_emulator_parameters")?,
                ),
                new: std::mem::transmute::<*mut c_void, unsafe extern "C" fn() -> *mut c_void>(symbol(
                    c"quire_emulator_new",
                )?),
                delete: std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*mut c_void)>(symbol(
                    c"quire_emulator_delete",
                )?),
                launch: std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*mut c_void, *const Request) -> c_int>(
                    symbol(c"quire_emulator_launch")?,
                ),
            })
        }
    }
}

impl Machine {
    pub(super) fn module(&self) -> &'static Module {
        self.module
    }

    /// Whether the grid ran to its end; else the request's `error` says why.
    pub(super) fn launch(&mut self, request: &Request) -> bool {
        // SAFETY: the kernel's parameters were compared with the arguments; its accesses are looked at one by one.
        unsafe { (self.module.launch)(self.machine, request) == 0 }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // SAFETY: made by the same library, and used no more.
        unsafe { (self.module.delete)(self.machine) };
    }
}

/// The library of a module, compiled unless it is there.
fn build(name: &str) -> Result<PathBuf, KernelError> {
    let io = |path: &Path, error: std::io::Error| failure(format!("{}: {error}", path.display()));
    let (cxx, version) = compiler()?;
    let root = Path::new(CRATE);
    let candidates = [root.join(format!("src/ops/{name}/{name}.cu")), root.join(format!("tests/emulator/{name}.cu"))];
    let source = candidates.iter().find(|path| path.exists());
    let source = source.ok_or_else(|| failure(format!("there is no {name}.cu")))?;
    let runtime = root.join("emulator/runtime.cpp");
    let folders = [root.join("include"), root.join("emulator")];

    let mut files = vec![source.clone()];
    let beside = source.parent().filter(|folder| folder.ends_with(name));
    for folder in folders.iter().map(PathBuf::as_path).chain(beside) {
        let entries = fs::read_dir(folder).map_err(|error| io(folder, error))?;
        let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
        files.extend(
            paths.filter(|path| path.extension().is_some_and(|end| end == "cuh" || end == "hpp" || end == "cpp")),
        );
    }
    files.sort();
    let mut hasher = DefaultHasher::new();
    (version, FLAGS, KERNEL_FLAGS).hash(&mut hasher);
    for file in &files {
        (file, fs::read(file).map_err(|error| io(file, error))?).hash(&mut hasher);
    }
    let hash = hasher.finish();

    let exe = std::env::current_exe().map_err(|error| failure(format!("where this program lies: {error}")))?;
    // Tests lie in `target/<profile>/deps`.
    let folder = exe.parent().and_then(Path::parent).unwrap_or(Path::new(".")).join("emulator");
    fs::create_dir_all(&folder).map_err(|error| io(&folder, error))?;
    let library = folder.join(format!("{name}-{hash:016x}.so"));
    if library.exists() {
        return Ok(library);
    }
    // Another process may be at it too: names of their own, and the last one stays.
    let part = |end: &str| folder.join(format!("{name}-{hash:016x}.{}.{end}", std::process::id()));
    let (kernels, rest, linked) = (part("kernels.o"), part("runtime.o"), part("so"));
    let includes = folders.iter().flat_map(|folder| [OsStr::new("-I"), folder.as_os_str()]);
    let includes: Vec<&OsStr> = includes.collect();
    let compile = |source: &Path, to: &Path, flags: &[&str]| {
        let mut command = Command::new(cxx);
        command.args(FLAGS).args(flags).args(&includes);
        command.args(["-x", "c++", "-c"]).arg(source).arg("-o").arg(to);
        run(command)
    };
    let result = compile(source, &kernels, &KERNEL_FLAGS).and_then(|()| compile(&runtime, &rest, &[])).and_then(|()| {
        let mut command = Command::new(cxx);
        command.arg("-shared").arg(&kernels).arg(&rest).arg("-o").arg(&linked);
        run(command)
    });
    let result = result.and_then(|()| fs::rename(&linked, &library).map_err(|error| io(&library, error)));
    for path in [&kernels, &rest, &linked] {
        // What was never made is no loss.
        let _ = fs::remove_file(path);
    }
    result?;
    // What other sources of this name were compiled to is not needed any more.
    for entry in fs::read_dir(&folder).map_err(|error| io(&folder, error))?.flatten() {
        let file_name = entry.file_name();
        let is_own = file_name.to_str().and_then(|text| text.strip_prefix(name)).is_some_and(|rest| {
            rest.starts_with('-') && rest.len() == "-0123456789abcdef.so".len() && rest.ends_with(".so")
        });
        if is_own && entry.path() != library {
            let _ = fs::remove_file(entry.path());
        }
    }
    Ok(library)
}

fn run(mut command: Command) -> Result<(), KernelError> {
    let output = command.output().map_err(|error| failure(format!("the C++ compiler does not start: {error}")))?;
    if output.status.success() {
        return Ok(());
    }
    Err(failure(format!("the C++ compiler refuses device code:\n{}", String::from_utf8_lossy(&output.stderr))))
}
