//! A CUDA driver without a card: `libcuda`, made by the system's C compiler of `fake_driver/libcuda.c`, for tests of what lies between
//! [`crate::cuda::Driver`] and the driver. It counts calls and living handles, and fails where it is told to.

use std::ffi::{CString, c_char, c_int, c_long, c_void};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

const SOURCE: &str = include_str!("fake_driver/libcuda.c");

type Reset = unsafe extern "C" fn();
type Set = unsafe extern "C" fn(*const c_char, c_long);
type Fail = unsafe extern "C" fn(*const c_char, c_long, c_long, c_int);
type Count = unsafe extern "C" fn(*const c_char) -> c_long;

/// The driver's number for "out of memory".
pub const OUT_OF_MEMORY: i32 = 2;
/// An error of the device itself: nothing works behind it.
pub const ILLEGAL_ADDRESS: i32 = 700;
/// One that says nothing.
pub const UNKNOWN: i32 = 999;

/// The fake in place of this process's CUDA driver, one card of compute capability 9.0 with 256 MiB. One test has it at a time; it is
/// as new when a test gets it.
pub struct FakeDriver {
    functions: &'static Functions,
    _alone: MutexGuard<'static, ()>,
}

struct Functions {
    reset: Reset,
    set: Set,
    fail: Fail,
    count: Count,
}

impl FakeDriver {
    /// Whoever asks first must not have asked for a real device before. `None` where it cannot be made, and a line that says so.
    pub fn get() -> Option<Self> {
        static ALONE: Mutex<()> = Mutex::new(());
        static FUNCTIONS: OnceLock<Result<Functions, String>> = OnceLock::new();
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        match FUNCTIONS.get_or_init(load) {
            Ok(functions) => {
                // SAFETY: it takes nothing, and whatever of an earlier test still lives is of no use to anybody.
                unsafe { (functions.reset)() };
                Some(Self { functions, _alone: alone })
            }
            Err(why) => {
                println!("skipped: {why}");
                None
            }
        }
    }

    /// Sets `num_devices`, `major`, `minor`, `version` or `total_bytes` of what it pretends to be; `broken` is the error that every call
    /// gives from now on.
    pub fn set(&self, what: &str, value: i64) {
        let what = CString::new(what).expect("a name");
        // SAFETY: the text ends with a zero.
        unsafe { (self.functions.set)(what.as_ptr(), value) };
    }

    /// Behind `passing` more calls of a function, `failing` calls of it fail with `error`. Errors of the device itself, 700 to 799,
    /// stay.
    pub fn fail(&self, function: &str, passing: u64, failing: u64, error: i32) {
        let function = CString::new(function).expect("a name");
        // SAFETY: the text ends with a zero.
        unsafe { (self.functions.fail)(function.as_ptr(), passing as c_long, failing as c_long, error) };
    }

    /// Calls of a function; or `living` handles, `launches` that ran, recordings that were `replays`, and `last_grid`,
    /// `last_shared_bytes` and `last_first_argument` of a launch.
    pub fn count(&self, what: &str) -> u64 {
        let what = CString::new(what).expect("a name");
        // SAFETY: the text ends with a zero.
        unsafe { (self.functions.count)(what.as_ptr()) as u64 }
    }
}

/// Builds the library and has the process load it. Its own name is the one that the driver's library is asked for by, and a
/// loader gives out what it has of that name.
fn load() -> Result<Functions, String> {
    if !cfg!(target_os = "linux") {
        return Err("the fake driver takes Linux".to_owned());
    }
    let folder = tempfolder().map_err(|error| format!("no folder for the fake driver: {error}"))?;
    let (source, library) = (folder.join("libcuda.c"), folder.join("libcuda.so"));
    std::fs::write(&source, SOURCE).map_err(|error| format!("the fake driver cannot be written: {error}"))?;
    let mut command = Command::new("cc");
    command.args([
        "-std=gnu11",
        "-O1",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-shared",
        "-fPIC",
        "-pthread",
        "-Wl,-soname,libcuda.so",
        "-o",
    ]);
    let output =
        command.arg(&library).arg(&source).output().map_err(|_| "no C compiler (cc) for the fake driver".to_owned())?;
    if !output.status.success() {
        return Err(format!("the fake driver is not compiled here: {}", String::from_utf8_lossy(&output.stderr)));
    }
    let path = CString::new(library.to_string_lossy().into_owned()).map_err(|error| error.to_string())?;
    // SAFETY: the library has no code that runs when it is loaded. It stays loaded.
    let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    // What is loaded needs no file.
    let _ = std::fs::remove_dir_all(&folder);
    if handle.is_null() {
        return Err("the fake driver cannot be loaded here".to_owned());
    }
    let symbol = |name: &str| -> Result<*mut c_void, String> {
        let text = CString::new(name).map_err(|error| error.to_string())?;
        // SAFETY: the library is loaded, and the text ends with a zero.
        let symbol = unsafe { libc::dlsym(handle, text.as_ptr()) };
        if symbol.is_null() { Err(format!("the fake driver has no {name}")) } else { Ok(symbol) }
    };
    // SAFETY: these are the types that libcuda.c defines them with.
    unsafe {
        Ok(Functions {
            reset: std::mem::transmute::<*mut c_void, Reset>(symbol("fake_reset")?),
            set: std::mem::transmute::<*mut c_void, Set>(symbol("fake_set")?),
            fail: std::mem::transmute::<*mut c_void, Fail>(symbol("fake_fail")?),
            count: std::mem::transmute::<*mut c_void, Count>(symbol("fake_count")?),
        })
    }
}

/// A folder of this process's own.
fn tempfolder() -> std::io::Result<std::path::PathBuf> {
    let folder = std::env::temp_dir().join(format!("quire-fake-driver-{}", std::process::id()));
    std::fs::create_dir(&folder)?;
    Ok(folder)
}
