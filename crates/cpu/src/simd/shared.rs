//! The two ways in which threads of the pool share memory that the borrow checker cannot follow.
//!
//! Owns: [`SharedMut`] (one output slice, written by several threads at disjoint places) and [`TaskCell`] (a task
//! whose borrow outlives no call of the pool). Never: scheduling, arithmetic.

use std::cell::UnsafeCell;
use std::marker::PhantomData;
use std::ops::Range;

/// A mutable slice that several threads write at disjoint ranges.
pub(crate) struct SharedMut<'a, T> {
    start: *mut T,
    len: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: it is a `&mut [T]` handed out in pieces; `range` asks its callers to keep the pieces apart.
unsafe impl<T: Send> Sync for SharedMut<'_, T> {}

impl<'a, T> SharedMut<'a, T> {
    /// Takes the slice for as long as the threads need it.
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), borrow: PhantomData }
    }

    /// The piece `range`, to write.
    ///
    /// # Safety
    /// While the piece lives, nobody else holds a piece that overlaps it.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn range(&self, range: Range<usize>) -> &mut [T] {
        assert!(
            range.start <= range.end && range.end <= self.len,
            "piece {range:?} of a slice of {} elements",
            self.len
        );
        // SAFETY: inside the slice by the assertion, alone by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}

/// What a pool runs: called with the index of the worker.
pub(crate) type Task<'a> = dyn Fn(usize) + Sync + 'a;

/// Holds the task of the dispatch in progress, without its lifetime.
pub(crate) struct TaskCell(UnsafeCell<Option<*const Task<'static>>>);

// SAFETY: the pool writes the cell only while no worker reads it, and publishes by an atomic with release order.
unsafe impl Sync for TaskCell {}
// SAFETY: the pointer is only followed between `set` and the end of the dispatch, where its referent is borrowed.
unsafe impl Send for TaskCell {}

impl TaskCell {
    /// An empty cell.
    pub(crate) fn new() -> Self {
        Self(UnsafeCell::new(None))
    }

    /// Stores the task, forgetting how long it lives.
    ///
    /// # Safety
    /// No other thread is inside `set`, `clear` or `call`, and the caller does not return, nor unwind, before every
    /// `call` has ended and `clear` was called.
    pub(crate) unsafe fn set(&self, task: &Task<'_>) {
        let short: *const Task<'_> = task;
        // SAFETY: both are fat pointers of one layout; only the lifetime differs, and the caller outlives its use.
        let long = unsafe { std::mem::transmute::<*const Task<'_>, *const Task<'static>>(short) };
        // SAFETY: nobody else touches the cell, by the caller's promise.
        unsafe { *self.0.get() = Some(long) };
    }

    /// Forgets the task.
    ///
    /// # Safety
    /// No other thread is inside `set`, `clear` or `call`.
    pub(crate) unsafe fn clear(&self) {
        // SAFETY: nobody else touches the cell, by the caller's promise.
        unsafe { *self.0.get() = None };
    }

    /// Runs the task as worker `index`.
    ///
    /// # Safety
    /// Called between `set` and `clear`, and ordered after `set` by an acquire load.
    pub(crate) unsafe fn call(&self, index: usize) {
        // SAFETY: between `set` and `clear` the cell is only read.
        let task = unsafe { *self.0.get() };
        if let Some(task) = task {
            // SAFETY: the caller of `set` still borrows the task.
            unsafe { (*task)(index) };
        }
    }
}
