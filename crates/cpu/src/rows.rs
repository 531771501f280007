//! Work on the rows of a matrix, spread over the pool's threads.
//!
//! Owns the splitting of a mutable matrix into one contiguous piece a thread, without `unsafe`.

use std::sync::{Mutex, PoisonError};

use crate::pool::{Pool, balanced};

/// Elements below which a dispatch costs more than it saves.
const SERIAL: usize = 8 * 1024;

/// Calls `f(index, row)` for each row of `out`, `[rows, width]`.
pub(crate) fn for_each_row<T: Send>(
    pool: &Pool,
    out: &mut [T],
    width: usize,
    f: &(dyn Fn(usize, &mut [T]) + Sync),
) {
    if width == 0 {
        return;
    }
    let rows = out.len() / width;
    let threads = pool.threads().min(rows);
    if threads <= 1 || out.len() < SERIAL {
        for (index, row) in out.chunks_exact_mut(width).enumerate() {
            f(index, row);
        }
        return;
    }
    let mut rest = out;
    let pieces: Vec<_> = (0..threads)
        .map(|thread| {
            let range = balanced(rows, threads, thread);
            let (piece, tail) = std::mem::take(&mut rest).split_at_mut(range.len() * width);
            rest = tail;
            (range.start, Mutex::new(piece))
        })
        .collect();
    pool.run(&|worker| {
        let Some((first, piece)) = pieces.get(worker) else { return };
        let mut piece = piece.lock().unwrap_or_else(PoisonError::into_inner);
        for (index, row) in piece.chunks_exact_mut(width).enumerate() {
            f(first + index, row);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_once_with_its_index() {
        for threads in [1, 2, 3] {
            let pool = Pool::new(threads);
            for (rows, width) in [(0, 5), (1, 9000), (2, 9000), (7, 3000), (40, 10), (1001, 17), (3, 0)] {
                let mut data = vec![0.0; rows * width];
                for_each_row(&pool, &mut data, width, &|index, row| {
                    for x in row {
                        *x += index as f32 + 1.0;
                    }
                });
                for (index, row) in data.chunks(width.max(1)).enumerate() {
                    assert!(
                        row.iter().all(|x| *x == index as f32 + 1.0),
                        "{threads} threads, {rows} x {width}"
                    );
                }
            }
        }
    }
}
