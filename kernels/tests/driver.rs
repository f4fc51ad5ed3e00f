//! What lies between the device and NVIDIA's driver, against a driver without a card: loading, memory, copies, modules and their
//! cache, recordings, and every way to fail that is told of in one line.
#![cfg(unix)]

use std::path::Path;

use quire_kernels::cuda::{Arg, CudaBackend, Device, DevicePtr, Driver, KernelId, Launch};
use quire_kernels::ops::rms_norm::RmsNorm;
use quire_kernels::testing::fake_driver::{FakeDriver, ILLEGAL_ADDRESS, OUT_OF_MEMORY, UNKNOWN};
use quire_kernels::{Backend, DType, KernelError};

const KERNEL: KernelId = KernelId { module: "rms_norm", function: "rms_norm" };

fn open() -> Driver {
    Driver::open(0, None).expect("the fake card opens")
}

fn launch(driver: &mut Driver, kernel: KernelId, shared_bytes: u32, args: &[Arg]) -> Result<(), KernelError> {
    let launch = Launch { kernel, grid: [7, 1, 1], block: [32, 1, 1], shared_bytes, args };
    // SAFETY: no kernel runs.
    unsafe { driver.launch(&launch) }
}

/// The error's line.
fn line<T>(result: Result<T, KernelError>) -> String {
    let line = result.err().expect("it fails").to_string();
    assert!(!line.contains('\n'), "{line}");
    line
}

#[test]
fn a_device_says_what_it_is_and_leaves_nothing_behind() {
    let Some(fake) = FakeDriver::get() else { return };
    fake.set("num_devices", 2);
    let mut driver = Driver::open(1, None).expect("it opens");
    let facts = driver.facts().clone();
    assert_eq!((facts.info.name.as_str(), facts.info.isa.as_str()), ("fake card 1", "sm_90"));
    assert_eq!((facts.compute_capability, facts.num_multiprocessors), ([9, 0], 132));
    assert_eq!((facts.max_shared_bytes, facts.l2_bytes, facts.total_bytes), (227 << 10, 50 << 20, 1 << 28));
    assert_eq!(driver.free_bytes(), Ok(1 << 28));
    assert!(fake.count("living") > 1);
    drop(driver);
    assert_eq!(fake.count("living"), 0);

    assert_eq!(line(Driver::open(2, None)), "cuda: there is no device 2; the driver lists 2");
    fake.set("num_devices", 0);
    assert_eq!(line(Driver::open(0, None)), "cuda: there is no device 0; the driver lists 0");
    fake.set("num_devices", 1);
    fake.set("major", 7);
    fake.set("minor", 5);
    assert_eq!(line(Driver::open(0, None)), "cuda: fake card 0 has compute capability 7.5, 8.0 is the least");
    assert_eq!(fake.count("living"), 0);
}

#[test]
fn whatever_fails_while_it_opens_is_told_and_given_back() {
    let Some(fake) = FakeDriver::get() else { return };
    let functions = [
        "cuInit",
        "cuDeviceGetCount",
        "cuDeviceGet",
        "cuDeviceGetName",
        "cuDeviceGetAttribute",
        "cuDevicePrimaryCtxRetain",
        "cuCtxSetCurrent",
        "cuDeviceTotalMem_v2",
        "cuStreamCreate",
        "cuMemHostAlloc",
        "cuEventCreate",
        "cuDriverGetVersion",
    ];
    for function in functions {
        let before = fake.count(function);
        drop(open());
        let num_calls = fake.count(function) - before;
        assert!(num_calls > 0, "{function} is not called");
        for passing in 0..num_calls {
            fake.fail(function, passing, 1, UNKNOWN);
            let line = line(Driver::open(0, None));
            assert!(line.starts_with("cuda: ") && line.contains("CUDA_ERROR_UNKNOWN"), "{function}: {line}");
            assert_eq!(fake.count("living"), 0, "{function} the {passing}th time: {line}");
        }
    }
    // No card, as the driver says it where there is none.
    fake.fail("cuInit", 0, 1, 100);
    assert!(line(Driver::open(0, None)).contains("CUDA_ERROR_NO_DEVICE"));
    drop(open());
}

#[test]
fn memory_is_zeroed_and_copies_of_any_length_arrive() {
    let Some(fake) = FakeDriver::get() else { return };
    let mut driver = open();
    assert_eq!(driver.alloc("nothing", 0), Ok(DevicePtr::NULL));
    let len = 20 << 20;
    let memory = driver.alloc("test memory", len).unwrap();
    let mut bytes = vec![1; len];
    driver.download(memory, &mut bytes).unwrap();
    assert!(bytes.iter().all(|&byte| byte == 0));
    // More than the ring that uploads go through has, in pieces of all sizes.
    let data: Vec<u8> = (0..len).map(|index| (index * 7 + index / 251) as u8).collect();
    let mut start = 0;
    for index in 0.. {
        let piece = (1 + index * index * 997).min(len - start);
        driver.upload(memory.offset(start), &data[start..start + piece]).unwrap();
        start += piece;
        if start == len {
            break;
        }
    }
    driver.download(memory, &mut bytes).unwrap();
    assert_eq!(bytes, data);
    assert!(fake.count("cuEventSynchronize") > 0, "the ring went around");

    let mut readback = driver.alloc_readback(64).unwrap();
    let ranges = [(memory.offset(100), 10), (DevicePtr::NULL, 0), (memory.offset(5000), 54)];
    driver.start_download(&mut readback, &ranges).unwrap();
    driver.fill(memory, 9, len).unwrap();
    let found = driver.finish_download(&mut readback).unwrap();
    assert_eq!(found, [&data[100..110], &data[5000..5054]].concat());
    drop((readback, driver));
    assert_eq!(fake.count("living"), 0);
}

#[test]
fn no_room_is_told_in_bytes_and_another_failure_is_not_called_that() {
    let Some(fake) = FakeDriver::get() else { return };
    let mut driver = open();
    let refused = driver.alloc("test memory", 1 << 40).unwrap_err();
    assert_eq!(refused, KernelError::OutOfMemory { what: "test memory", bytes: 1 << 40 });
    driver.alloc("test memory", 1 << 20).expect("a smaller piece fits");
    fake.fail("cuMemHostAlloc", 0, 1, OUT_OF_MEMORY);
    let refused = driver.alloc_readback(100).err();
    assert_eq!(refused, Some(KernelError::OutOfMemory { what: "page-locked memory", bytes: 100 }));
    fake.fail("cuMemAlloc_v2", 0, 1, UNKNOWN);
    let line = line(driver.alloc("test memory", 16));
    assert_eq!(line, "cuda: test memory could not be taken: the fake driver's words (CUDA_ERROR_UNKNOWN)");
}

/// Modules that are linked for `prepare`.
fn num_linked(fake: &FakeDriver, folder: &Path) -> u64 {
    let before = fake.count("cuLinkCreate_v2");
    let mut driver = Driver::open(0, Some(folder.to_owned())).unwrap();
    driver.prepare(&["embed", "rms_norm", "gather_rows"]).unwrap();
    driver.prepare(&["embed"]).unwrap();
    launch(&mut driver, KERNEL, 0, &[]).unwrap();
    fake.count("cuLinkCreate_v2") - before
}

#[test]
fn device_code_is_assembled_once_for_each_device_and_driver() {
    let Some(fake) = FakeDriver::get() else { return };
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(num_linked(&fake, folder.path()), 3);
    assert_eq!(num_linked(&fake, folder.path()), 0);
    fake.set("version", 13010);
    assert_eq!(num_linked(&fake, folder.path()), 3);
    fake.set("major", 8);
    fake.set("minor", 6);
    assert_eq!(num_linked(&fake, folder.path()), 3);
    assert_eq!(num_linked(&fake, folder.path()), 0);
    // A file that was damaged, and one that the driver does not take though it is whole.
    let files = || std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path());
    let damaged =
        files().find(|path| path.to_string_lossy().contains("embed") && path.to_string_lossy().contains("sm_86"));
    std::fs::write(damaged.unwrap(), "damage").unwrap();
    assert_eq!(num_linked(&fake, folder.path()), 1);
    fake.fail("cuModuleLoadData", 1, 1, UNKNOWN);
    assert_eq!(num_linked(&fake, folder.path()), 1);
    assert_eq!(num_linked(&fake, folder.path()), 0);
    assert_eq!(fake.count("living"), 0);
}

#[test]
fn what_the_driver_does_not_assemble_is_told_with_its_words() {
    let Some(fake) = FakeDriver::get() else { return };
    for function in ["cuLinkCreate_v2", "cuLinkAddData_v2", "cuLinkComplete", "cuLinkDestroy"] {
        let mut driver = open();
        fake.fail(function, 0, 1, 218);
        let line = line(driver.prepare(&["embed"]));
        assert!(line.starts_with("cuda: the driver does not assemble module embed"), "{line}");
        assert!(line.contains("CUDA_ERROR_INVALID_PTX"), "{line}");
        // Whitespace of the log becomes spaces.
        assert!(function == "cuLinkCreate_v2" || line.contains("(line 7: the fake driver takes no PTX)"), "{line}");
        driver.prepare(&["embed"]).expect("the next time it does");
    }
    let mut driver = open();
    fake.fail("cuModuleLoadData", 0, 2, UNKNOWN);
    assert!(line(driver.prepare(&["embed"])).starts_with("cuda: module embed could not be loaded: "));
    assert_eq!(line(driver.prepare(&["nonsense"])), "cuda: this build has no device code of nonsense");
}

#[test]
fn a_launch_hands_over_its_arguments_and_asks_for_shared_memory_once() {
    let Some(fake) = FakeDriver::get() else { return };
    let mut driver = open();
    launch(&mut driver, KERNEL, 48 << 10, &[Arg::U64(0x1234_5678_9abc), Arg::F32(1.0)]).unwrap();
    assert_eq!(fake.count("last_first_argument"), 0x1234_5678_9abc);
    assert_eq!((fake.count("last_grid"), fake.count("cuFuncSetAttribute")), (7, 0));
    for _ in 0..3 {
        launch(&mut driver, KERNEL, 100 << 10, &[]).unwrap();
        launch(&mut driver, KERNEL, 60 << 10, &[]).unwrap();
    }
    assert_eq!((fake.count("cuFuncSetAttribute"), fake.count("last_shared_bytes")), (1, 60 << 10));
    assert_eq!((fake.count("launches"), fake.count("cuModuleGetFunction")), (7, 1));
    let refused = line(launch(&mut driver, KERNEL, 228 << 10, &[]));
    assert!(refused.contains("rms_norm::rms_norm") && refused.contains("233472 bytes"), "{refused}");
    let missing = KernelId { module: "rms_norm", function: "no_such" };
    assert!(line(launch(&mut driver, missing, 0, &[])).starts_with("cuda: there is no rms_norm::no_such: "));
}

fn norm(
    backend: &mut CudaBackend<Driver>,
    buffers: &mut [<CudaBackend<Driver> as Backend>::Buffer; 3],
) -> Result<(), KernelError> {
    let [x, weight, out] = buffers;
    backend.rms_norm(RmsNorm { x, weight, eps: 1e-6, num_rows: 2, dim: 8, out })
}

#[test]
fn launches_are_recorded_and_replayed() {
    let Some(fake) = FakeDriver::get() else { return };
    let mut backend = CudaBackend::new(open()).unwrap();
    let mut buffers = [16, 8, 16].map(|len| backend.alloc(DType::F32, len).unwrap());
    norm(&mut backend, &mut buffers).unwrap();
    let graph = backend.capture(|backend| (0..3).try_for_each(|_| norm(backend, &mut buffers))).unwrap().unwrap();
    assert_eq!((fake.count("launches"), fake.count("replays")), (1, 0));
    backend.replay(&graph).unwrap();
    assert_eq!((fake.count("launches"), fake.count("replays")), (4, 1));
    // What may not be done meanwhile is told, and the device goes on without the recording.
    let failed = backend.capture(|backend| backend.alloc(DType::F32, 8).map(|_| ()));
    assert!(line(failed).contains("CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"));
    backend.replay(&graph).unwrap();
    norm(&mut backend, &mut buffers).unwrap();
    backend.read_f32(&buffers[2], 0, &mut [0.0; 16]).unwrap();
    drop(backend);
    assert_eq!(fake.count("living"), 0);
}

#[test]
fn a_recording_without_memory_is_none_and_no_failure() {
    let Some(fake) = FakeDriver::get() else { return };
    let mut backend = CudaBackend::new(open()).unwrap();
    let mut buffers = [16, 8, 16].map(|len| backend.alloc(DType::F32, len).unwrap());
    norm(&mut backend, &mut buffers).unwrap();
    let functions = ["cuStreamBeginCapture_v2", "cuLaunchKernel", "cuStreamEndCapture", "cuGraphInstantiateWithFlags"];
    for function in functions {
        fake.fail(function, 0, 1, OUT_OF_MEMORY);
        let graph = backend.capture(|backend| norm(backend, &mut buffers));
        assert_eq!(graph, Ok(None), "{function}");
        norm(&mut backend, &mut buffers).expect("it runs as it is");
        backend.read_f32(&buffers[2], 0, &mut [0.0; 16]).expect("nothing is recorded any more");
        fake.fail(function, 0, 1, UNKNOWN);
        let failed = line(backend.capture(|backend| norm(backend, &mut buffers)));
        assert!(failed.contains("CUDA_ERROR_UNKNOWN"), "{failed}");
        norm(&mut backend, &mut buffers).expect("the device goes on");
    }
    let graph = backend.capture(|backend| norm(backend, &mut buffers)).unwrap().unwrap();
    fake.fail("cuGraphLaunch", 0, 1, OUT_OF_MEMORY);
    assert!(matches!(backend.replay(&graph), Err(KernelError::OutOfMemory { .. })));
    backend.replay(&graph).expect("with memory it does");
    drop(backend);
    assert_eq!(fake.count("living"), 0);
}

#[test]
fn a_device_that_is_lost_says_so_at_every_call_and_can_be_let_go() {
    let Some(fake) = FakeDriver::get() else { return };
    let mut driver = open();
    let memory = driver.alloc("test memory", 64).unwrap();
    let mut readback = driver.alloc_readback(64).unwrap();
    driver.start_download(&mut readback, &[(memory, 64)]).unwrap();
    launch(&mut driver, KERNEL, 0, &[]).unwrap();
    fake.fail("cuEventSynchronize", 0, 1, ILLEGAL_ADDRESS);
    let found = line(driver.finish_download(&mut readback).map(|_| ()));
    assert_eq!(found, "cuda: the device failed: the fake driver's words (CUDA_ERROR_ILLEGAL_ADDRESS)");
    for found in [
        driver.upload(memory, &[1]),
        driver.download(memory, &mut [0]),
        driver.fill(memory, 0, 1),
        driver.synchronize(),
        driver.begin_capture(),
        driver.alloc("test memory", 64).map(|_| ()),
        driver.free_bytes().map(|_| ()),
        launch(&mut driver, KERNEL, 0, &[]),
    ] {
        let found = line(found);
        assert!(found.contains("CUDA_ERROR_ILLEGAL_ADDRESS"), "{found}");
    }
    drop((readback, driver));
    assert_eq!(fake.count("living"), 0);
    // With the context gone the device works again.
    fake.set("broken", 0);
    open().synchronize().unwrap();
}

/// A context belongs to the thread that made it current, and its address to whoever comes next.
#[test]
fn a_device_goes_from_thread_to_thread() {
    let Some(fake) = FakeDriver::get() else { return };
    let (to_worker, from_here) = std::sync::mpsc::channel::<Driver>();
    let (to_here, from_worker) = std::sync::mpsc::channel::<Driver>();
    let worker = std::thread::spawn(move || {
        for mut driver in from_here {
            driver.alloc("test memory", 64).expect("it is current here too");
            to_here.send(driver).unwrap();
        }
    });
    for _ in 0..3 {
        to_worker.send(open()).unwrap();
        let mut driver = from_worker.recv().unwrap();
        driver.synchronize().unwrap();
        drop(driver);
        assert_eq!(fake.count("living"), 0);
    }
    drop(to_worker);
    worker.join().unwrap();
}
