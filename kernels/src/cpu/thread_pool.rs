//! Persistent workers that run one job at a time, all of them together.
//!
//! A step is some hundred jobs of 10 microseconds to some milliseconds each, so a job must start in about a microsecond
//! while steps follow one another, and cost nothing while there is no work: workers spin for a moment after each job,
//! then sleep.
//!
//! Who owns what: `job` is written by the caller while the gate is closed, and read by workers inside it. The gate counts
//! the workers that entered; the caller leaves only when the gate is closed and all who entered have finished, so a job
//! never outlives the borrow it was made from. A worker that comes late to a closed gate waits for the next job: where
//! other programs take a core away, [`ThreadPool::run_units`] goes on with the threads that it has.

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::marker::PhantomData;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle, Thread};

use crate::KernelError;

/// Turns of `spin_loop` before sleeping: 30 microseconds where `pause` takes 25 ns (Zen 4), 50 where 40 ns (Skylake on).
const NUM_SPINS: u32 = 1200;

/// Stack of a worker: what a caller has it run may recurse. Only what is used of it is ever resident.
const STACK_BYTES: usize = 64 << 20;

type Job = *const (dyn Fn(usize) + Sync);

/// See the module's documentation. Worker 0 is the thread that calls [`ThreadPool::run`].
///
/// Not `Sync`: one thread at a time runs jobs, and a job cannot start another on the same pool.
pub struct ThreadPool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// What each thread, the caller included, has left to do in [`ThreadPool::run_units`].
    shares: Vec<Alone<Share>>,
    not_sync: PhantomData<Cell<()>>,
}

/// A value on a cache line of its own, so that a write to it does not disturb who spins on another.
#[derive(Default)]
#[repr(align(64))]
struct Alone<T>(T);

struct Shared {
    /// See [`Gate`]; the only thing that idle workers watch.
    gate: Alone<AtomicU64>,
    job: UnsafeCell<Option<Job>>,
    is_closing: AtomicBool,
    /// Workers (without the caller) that have finished the job.
    num_finished: Alone<AtomicUsize>,
    /// One per worker (without the caller): set by the worker before it parks, cleared by who wakes it.
    sleeping: Vec<Alone<AtomicBool>>,
    /// The same for the caller, and who that is.
    caller_sleeping: AtomicBool,
    caller: Mutex<Option<Thread>>,
    /// The first panic of a worker in this job.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

/// One word: the number of the job (40 bits), whether it may be entered (1 bit), and how many workers did (23 bits).
#[derive(Clone, Copy)]
struct Gate(u64);

impl Gate {
    const EPOCH_SHIFT: u32 = 24;
    const OPEN: u64 = 1 << 23;

    fn epoch(self) -> u64 {
        self.0 >> Self::EPOCH_SHIFT
    }

    fn is_open(self) -> bool {
        self.0 & Self::OPEN != 0
    }

    fn num_entered(self) -> usize {
        (self.0 & (Self::OPEN - 1)) as usize
    }

    /// The next job's gate, open, nobody inside.
    fn next(self) -> Self {
        Self((self.epoch() + 1) << Self::EPOCH_SHIFT | Self::OPEN)
    }
}

// SAFETY: the pointer in `job` is used only while the caller of `run` keeps the closure borrowed; it points to a `Sync`
// closure, so any thread may call it.
unsafe impl Send for Shared {}
// SAFETY: `job` is written only by the one caller while the gate is closed and nobody is inside, and read by workers
// only after they entered through a gate that the caller opened after the write. Everything else is atomic or locked.
unsafe impl Sync for Shared {}

impl ThreadPool {
    /// A pool of `num_threads`, the caller included. Fails with none, or where the system refuses one.
    pub fn new(num_threads: usize) -> Result<Self, KernelError> {
        if num_threads == 0 {
            return Err(KernelError::Shape { op: "cpu", argument: "num_threads", expected: 1, found: 0 });
        }
        let shared = Arc::new(Shared {
            gate: Alone::default(),
            job: UnsafeCell::new(None),
            is_closing: AtomicBool::new(false),
            num_finished: Alone::default(),
            sleeping: (1..num_threads).map(|_| Alone::default()).collect(),
            caller_sleeping: AtomicBool::new(false),
            caller: Mutex::new(None),
            panic: Mutex::new(None),
        });
        // Made before the threads, so that a refused one closes those before it.
        let shares = (0..num_threads).map(|_| Alone::default()).collect();
        let mut pool = Self { shared, workers: Vec::with_capacity(num_threads - 1), shares, not_sync: PhantomData };
        for index in 1..num_threads {
            let shared = Arc::clone(&pool.shared);
            let worker = thread::Builder::new()
                .name(format!("quire-cpu-{index}"))
                .stack_size(STACK_BYTES)
                .spawn(move || shared.work(index))
                .map_err(|error| KernelError::Device { device: "cpu", cause: format!("thread {index}: {error}") })?;
            pool.workers.push(worker);
        }
        Ok(pool)
    }

    /// Threads, the caller included.
    pub fn num_threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `f(worker_index)` once on each thread, `f(0)` on this one, and returns when all have returned. A panic in
    /// any of them goes on here, after all have returned.
    pub fn run(&self, f: &(dyn Fn(usize) + Sync)) {
        self.run_job(f, true);
    }

    /// Splits `0..len` into one range per thread (see [`split`]) and calls `f(worker_index, range)` for those that are
    /// not empty. With no more than `grain` elements this thread does it alone.
    pub fn run_ranges(&self, len: usize, grain: usize, f: &(dyn Fn(usize, Range<usize>) + Sync)) {
        let num_threads = self.num_threads();
        if len == 0 {
            return;
        }
        if num_threads == 1 || len <= grain {
            return f(0, 0..len);
        }
        self.run(&|worker| {
            let range = split(len, grain, worker, num_threads);
            if !range.is_empty() {
                f(worker, range);
            }
        });
    }

    /// Calls `f(worker_index, unit)` once for every unit of `0..num_units` (below 2^32). Each thread goes through a share
    /// of its own from the front, always the same one for the same number of units; who is done takes units from the back
    /// of others' shares, and a thread that does not get to run takes none. So results must not depend on the worker.
    pub fn run_units(&self, num_units: usize, f: &(dyn Fn(usize, usize) + Sync)) {
        assert!(u32::try_from(num_units).is_ok(), "{num_units} units");
        let num_threads = self.num_threads();
        if num_threads == 1 || num_units <= 1 {
            return (0..num_units).for_each(|unit| f(0, unit));
        }
        for (worker, share) in self.shares.iter().enumerate() {
            share.0.set(split(num_units, 1, worker, num_threads));
        }
        let shares = &self.shares;
        self.run_job(
            &|worker| {
                while let Some(unit) = shares[worker].0.take_first() {
                    f(worker, unit);
                }
                for victim in (worker + 1..num_threads).chain(0..worker) {
                    while let Some(unit) = shares[victim].0.take_last() {
                        f(worker, unit);
                    }
                }
            },
            false,
        );
    }

    /// Opens the gate, does this thread's part, and waits for all workers, or for those that came before this
    /// thread was done.
    fn run_job(&self, f: &(dyn Fn(usize) + Sync), waits_for_all: bool) {
        if self.workers.is_empty() {
            return f(0);
        }
        let shared = &*self.shared;
        shared.num_finished.0.store(0, Ordering::Relaxed);
        // SAFETY: the gate is closed and nobody is inside, since the last job waited for all who were, so nobody reads
        // `job`. The lifetime is forgotten, but this function returns only when that is so again.
        unsafe {
            *shared.job.get() = Some(std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), Job>(f));
        }
        let gate = Gate(shared.gate.0.load(Ordering::Relaxed)).next();
        self.open(gate);
        let own = catch_unwind(AssertUnwindSafe(|| f(0)));
        if waits_for_all {
            shared.wait_for_workers(self.workers.len());
            shared.gate.0.fetch_and(!Gate::OPEN, Ordering::Relaxed);
        } else {
            let gate = Gate(shared.gate.0.fetch_and(!Gate::OPEN, Ordering::AcqRel));
            shared.wait_for_workers(gate.num_entered());
        }
        let other = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(panic) = own.err().or(other) {
            resume_unwind(panic);
        }
    }

    fn open(&self, gate: Gate) {
        let shared = &*self.shared;
        // Sequentially consistent, as are the worker's flag and its second look at the gate: either the worker sees
        // the new epoch, or we see that it sleeps.
        shared.gate.0.store(gate.0, Ordering::SeqCst);
        for (sleeping, worker) in shared.sleeping.iter().zip(&self.workers) {
            if sleeping.0.load(Ordering::SeqCst) && sleeping.0.swap(false, Ordering::SeqCst) {
                worker.thread().unpark();
            }
        }
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        self.shared.is_closing.store(true, Ordering::SeqCst);
        self.open(Gate(self.shared.gate.0.load(Ordering::Relaxed)).next());
        for worker in self.workers.drain(..) {
            // A worker catches the panics of jobs, so it has none of its own to report.
            let _ = worker.join();
        }
    }
}

impl Shared {
    /// The life of worker `index`.
    fn work(&self, index: usize) {
        let mut seen = 0;
        loop {
            let gate = self.wait_for_job(index, seen);
            seen = gate.epoch();
            if self.is_closing.load(Ordering::SeqCst) {
                return;
            }
            if !self.enter(seen) {
                continue;
            }
            // SAFETY: this worker entered through the open gate, so the job was written before and stays until this
            // worker has finished.
            let job = unsafe { *self.job.get() }.expect("a job is set before the gate opens");
            let result = catch_unwind(AssertUnwindSafe(|| {
                // SAFETY: the caller keeps the closure borrowed until all who entered have finished.
                unsafe { (*job)(index) }
            }));
            if let Err(panic) = result {
                self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(panic);
            }
            // Sequentially consistent, as are the caller's flag and its look at the count.
            self.num_finished.0.fetch_add(1, Ordering::SeqCst);
            if self.caller_sleeping.load(Ordering::SeqCst)
                && let Some(caller) = self.caller.lock().unwrap_or_else(PoisonError::into_inner).as_ref()
            {
                caller.unpark();
            }
        }
    }

    /// Enters the job of `epoch` unless its gate has closed.
    fn enter(&self, epoch: u64) -> bool {
        let update = |word| (Gate(word).epoch() == epoch && Gate(word).is_open()).then_some(word + 1);
        self.gate.0.try_update(Ordering::AcqRel, Ordering::Relaxed, update).is_ok()
    }

    /// The gate of the first job after `seen`.
    fn wait_for_job(&self, index: usize, seen: u64) -> Gate {
        let sleeping = &self.sleeping[index - 1].0;
        let mut num_spins = 0;
        loop {
            let gate = Gate(self.gate.0.load(Ordering::Acquire));
            if gate.epoch() != seen {
                return gate;
            }
            if num_spins < NUM_SPINS {
                num_spins += 1;
                std::hint::spin_loop();
                continue;
            }
            sleeping.store(true, Ordering::SeqCst);
            if Gate(self.gate.0.load(Ordering::SeqCst)).epoch() == seen {
                thread::park();
            }
            // Also after a wake-up without a reason.
            sleeping.store(false, Ordering::SeqCst);
        }
    }

    /// Returns when so many workers have finished the job.
    fn wait_for_workers(&self, num_workers: usize) {
        for _ in 0..NUM_SPINS {
            if self.num_finished.0.load(Ordering::Acquire) == num_workers {
                return;
            }
            std::hint::spin_loop();
        }
        *self.caller.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread::current());
        self.caller_sleeping.store(true, Ordering::SeqCst);
        while self.num_finished.0.load(Ordering::SeqCst) != num_workers {
            thread::park();
        }
        self.caller_sleeping.store(false, Ordering::SeqCst);
    }
}

/// A range of units, taken by its owner from the front and by others from the back: `start` in the upper half of the
/// word, `end` in the lower.
#[derive(Default)]
struct Share(AtomicU64);

impl Share {
    fn set(&self, range: Range<usize>) {
        self.0.store((range.start as u64) << 32 | range.end as u64, Ordering::Relaxed);
    }

    fn take_first(&self) -> Option<usize> {
        self.take(|start, end| ((start + 1, end), start))
    }

    fn take_last(&self) -> Option<usize> {
        self.take(|start, end| ((start, end - 1), end - 1))
    }

    /// Relaxed: units carry no data; what a job wrote is handed over at the gate.
    fn take(&self, pick: impl Fn(u64, u64) -> ((u64, u64), u64)) -> Option<usize> {
        let mut word = self.0.load(Ordering::Relaxed);
        loop {
            let (start, end) = (word >> 32, word & 0xffff_ffff);
            if start >= end {
                return None;
            }
            let ((start, end), unit) = pick(start, end);
            match self.0.compare_exchange_weak(word, start << 32 | end, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Some(unit as usize),
                Err(found) => word = found,
            }
        }
    }
}

/// The part of `0..len` that belongs to `worker`: contiguous, in order of workers, cut at multiples of `grain`, and as
/// equal as that allows.
pub fn split(len: usize, grain: usize, worker: usize, num_threads: usize) -> Range<usize> {
    let num_units = len.div_ceil(grain);
    let start = (num_units * worker / num_threads * grain).min(len);
    let end = (num_units * (worker + 1) / num_threads * grain).min(len);
    start..end
}

/// A slice that the threads of one job write in disjoint parts. The one place where several threads hold `&mut` to the
/// same memory.
pub struct SharedMut<'a, T> {
    ptr: *mut T,
    len: usize,
    slice: PhantomData<&'a mut [T]>,
}

// SAFETY: hands out disjoint `&mut [T]` only (the contract of its functions), which may go to other threads where
// `T: Send`.
unsafe impl<T: Send> Sync for SharedMut<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for SharedMut<'_, T> {}

impl<'a, T> SharedMut<'a, T> {
    pub fn new(slice: &'a mut [T]) -> Self {
        Self { ptr: slice.as_mut_ptr(), len: slice.len(), slice: PhantomData }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Its first element, for parts that are no ranges.
    pub fn as_mut_ptr(&self) -> *mut T {
        self.ptr
    }

    /// The elements of `range`. Panics where it is past the end.
    ///
    /// # Safety
    /// While the result lives, no other part that overlaps it is in use, on this or another thread.
    #[expect(clippy::mut_from_ref, reason = "disjointness is the caller's promise")]
    pub unsafe fn slice_mut(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {}", self.len);
        // SAFETY: inside the slice (checked above), which is borrowed for as long as `self`; alone by contract.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(range.start), range.len()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;
    use std::time::Duration;

    #[test]
    fn split_covers_everything_once_in_order() {
        for len in [0, 1, 5, 63, 64, 65, 1000] {
            for grain in [1, 3, 64] {
                for num_threads in [1, 2, 3, 7] {
                    let mut next = 0;
                    for worker in 0..num_threads {
                        let range = split(len, grain, worker, num_threads);
                        if !range.is_empty() {
                            assert_eq!(range.start, next);
                            assert!(range.start.is_multiple_of(grain));
                            next = range.end;
                        }
                    }
                    assert_eq!(next, len, "{len} {grain} {num_threads}");
                }
            }
        }
    }

    #[test]
    fn every_worker_runs_every_job_exactly_once() {
        for num_threads in [1, 2, 3, 5] {
            let pool = ThreadPool::new(num_threads).expect("threads");
            let counts: Vec<AtomicU32> = (0..num_threads).map(|_| AtomicU32::new(0)).collect();
            const NUM_JOBS: u32 = 20_000;
            for job in 0..NUM_JOBS {
                pool.run(&|worker| {
                    assert_eq!(counts[worker].fetch_add(1, Ordering::Relaxed), job);
                });
                // All are back: the counts are equal and no worker is a job behind.
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == job + 1));
            }
        }
    }

    #[test]
    fn sleeping_workers_and_callers_wake_up() {
        let pool = ThreadPool::new(3).expect("threads");
        let count = AtomicU32::new(0);
        for job in 0..300_u64 {
            // Pauses around the time that workers spin hit the moment when they fall asleep.
            thread::sleep(Duration::from_micros(job % 80));
            pool.run(&|worker| {
                // A slow worker lets the caller fall asleep.
                if worker as u64 == job % 3 {
                    thread::sleep(Duration::from_micros(job % 90));
                }
                count.fetch_add(1, Ordering::Relaxed);
            });
        }
        assert_eq!(count.into_inner(), 900);
    }

    #[test]
    fn panics_reach_the_caller_and_the_pool_goes_on() {
        let pool = ThreadPool::new(3).expect("threads");
        for culprit in 0..3 {
            let panic = catch_unwind(AssertUnwindSafe(|| {
                pool.run(&|worker| assert_ne!(worker, culprit, "the culprit"));
            }));
            assert!(panic.is_err());
            let count = AtomicU32::new(0);
            pool.run(&|_| {
                count.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(count.into_inner(), 3);
        }
    }

    #[test]
    fn ranges_of_one_slice_are_written_by_all() {
        let pool = ThreadPool::new(3).expect("threads");
        for len in [0, 1, 4, 5, 1000] {
            let mut data = vec![0_usize; len];
            let shared = SharedMut::new(&mut data);
            pool.run_ranges(len, 4, &|_, range| {
                // SAFETY: the ranges of one job are disjoint.
                for (offset, value) in unsafe { shared.slice_mut(range.clone()) }.iter_mut().enumerate() {
                    *value += range.start + offset;
                }
            });
            assert!(data.iter().enumerate().all(|(index, &value)| index == value));
        }
    }

    #[test]
    fn every_unit_is_done_exactly_once_by_whoever_comes() {
        for num_threads in [1, 2, 3, 5] {
            let pool = ThreadPool::new(num_threads).expect("threads");
            for job in 0..4000_usize {
                let num_units = job % 23;
                let counts: Vec<AtomicU32> = (0..num_units).map(|_| AtomicU32::new(0)).collect();
                pool.run_units(num_units, &|worker, unit| {
                    assert!(worker < num_threads);
                    counts[unit].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1), "{num_threads} {job}");
                // Jobs of the other kind in between: late workers must not take one for the other.
                if job % 3 == 0 {
                    let count = AtomicU32::new(0);
                    pool.run(&|_| {
                        count.fetch_add(1, Ordering::Relaxed);
                    });
                    assert_eq!(count.into_inner() as usize, num_threads);
                }
                if job % 50 == 0 {
                    thread::sleep(Duration::from_micros(60));
                }
            }
        }
    }

    #[test]
    fn a_panic_in_a_unit_reaches_the_caller() {
        let pool = ThreadPool::new(3).expect("threads");
        for culprit in 0..10 {
            let panic = catch_unwind(AssertUnwindSafe(|| {
                pool.run_units(10, &|_, unit| assert_ne!(unit, culprit, "the culprit"));
            }));
            assert!(panic.is_err());
            pool.run_units(10, &|_, _| {});
        }
    }

    #[test]
    fn the_pool_can_move_to_another_thread_and_close_there() {
        let pool = ThreadPool::new(2).expect("threads");
        pool.run(&|_| {});
        thread::spawn(move || {
            let names = Mutex::new(Vec::new());
            pool.run(&|worker| {
                if worker > 0 {
                    names.lock().expect("no panic").push(thread::current().name().map(str::to_owned));
                }
            });
            assert_eq!(names.into_inner().expect("no panic"), [Some("quire-cpu-1".to_owned())]);
        })
        .join()
        .expect("no panic");
        assert!(matches!(ThreadPool::new(0), Err(KernelError::Shape { argument: "num_threads", .. })));
    }
}
