//! Memory for the rows of a step, used again by the next operation.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};

/// Buffers that a thread keeps.
const KEPT: usize = 16;

thread_local! {
    static FREE: RefCell<Vec<Vec<f32>>> = const { RefCell::new(vec![]) };
}

/// Numbers for an operation to write: what they are at first means nothing. Clearing them would cost as much as some
/// operations do.
pub struct Buffer {
    numbers: Vec<f32>,
    len: usize,
}

impl Buffer {
    pub fn new(len: usize) -> Self {
        // The smallest that is large enough, else the largest, which then grows.
        let fit = |free: &mut Vec<Vec<f32>>| {
            let large = (0..free.len()).filter(|&i| free[i].len() >= len).min_by_key(|&i| free[i].len());
            let best = large.or_else(|| (0..free.len()).max_by_key(|&i| free[i].len()))?;
            Some(free.swap_remove(best))
        };
        let mut numbers = FREE.with_borrow_mut(fit).unwrap_or_default();
        if numbers.len() < len {
            numbers = vec![0.0; len];
        }
        Buffer { numbers, len }
    }
}

impl From<Vec<f32>> for Buffer {
    fn from(numbers: Vec<f32>) -> Self {
        Buffer { len: numbers.len(), numbers }
    }
}

impl From<Buffer> for Vec<f32> {
    fn from(mut buffer: Buffer) -> Self {
        let mut numbers = std::mem::take(&mut buffer.numbers);
        numbers.truncate(buffer.len);
        numbers
    }
}

impl Deref for Buffer {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        &self.numbers[..self.len]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.numbers[..self.len]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let numbers = std::mem::take(&mut self.numbers);
        if numbers.is_empty() {
            return;
        }
        // At its end a thread has nowhere to keep it.
        let _ = FREE.try_with(|free| {
            let mut free = free.borrow_mut();
            if free.len() < KEPT {
                free.push(numbers);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_used_again_by_what_fits_it() {
        let start = |buffer: &Buffer| buffer.as_ptr();
        let (large, small) = (Buffer::new(100), Buffer::new(10));
        let (at_large, at_small) = (start(&large), start(&small));
        drop((large, small));
        let (a, b) = (Buffer::new(7), Buffer::new(8));
        assert_eq!((start(&a), a.len()), (at_small, 7));
        assert_eq!((start(&b), b.len()), (at_large, 8));
        drop((a, b));
        let mut all: Vec<_> = (0..2 * KEPT).map(|i| Buffer::new(10 * i)).collect();
        all.iter_mut().enumerate().for_each(|(i, buffer)| buffer.fill(i as f32));
        assert!(
            all.iter().enumerate().all(|(i, buffer)| buffer.len() == 10 * i && buffer.iter().all(|&x| x == i as f32))
        );
        drop(all);
        assert_eq!(FREE.with_borrow(Vec::len), KEPT);
    }
}
